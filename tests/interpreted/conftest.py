"""Triton's interpreter runs these tests, on CPU tensors and without a GPU: a process of their own.

Triton decides when a kernel is defined whether it will be interpreted or compiled. So TRITON_INTERPRET=1 must be set
before the process starts, and no test that compiles may share it.
"""

from __future__ import annotations

import os

import pytest

from gradnorm_kernels import backends

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreted needs TRITON_INTERPRET=1 set before Python starts: run `make test-interpreted`, "
        "or TRITON_INTERPRET=1 python -m pytest tests/interpreted"
    )
if (reason := backends.unavailable_reason("triton")) is not None:
    raise pytest.UsageError(f"tests/interpreted: {reason}")
