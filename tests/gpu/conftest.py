"""The GPU backends on a GPU. ``--rehearse`` runs the same tests on the CPU as far as possible, to find slips early.

A rehearsal covers the triton backend in the interpreter (TRITON_INTERPRET=1), which has no bfloat16, streams or graphs;
tests that need these are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradnorm_kernels import backends

BACKENDS = ("triton", "cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu" if request.config.getoption("--rehearse") else "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend that can run here; others are skipped with the reason, and ``test_backends_can_run`` fails for them."""
    name: str = request.param
    reason = backends.unavailable_reason(name, "fused_grad_norm", device.type, torch.float16)
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run: {reason}")
    return name


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, backend: str, device: torch.device) -> torch.dtype:
    """A dtype that the backend supports here."""
    dtype = DTYPES[request.param]
    reason = backends.unavailable_reason(backend, "fused_grad_norm", device.type, dtype)
    if reason is not None:
        pytest.skip(f"backend {backend!r}: {reason}")
    return dtype


@pytest.fixture
def repeatable_attention() -> Iterator[None]:
    """Attention whose backward adds in a fixed order; that of the fused kernels uses atomics."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def gpu_only(request: pytest.FixtureRequest) -> None:
    """For tests of features that only a GPU has."""
    if request.config.getoption("--rehearse"):
        pytest.skip("only a GPU has what this test needs")
