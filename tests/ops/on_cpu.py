"""What the tests of the operators share: the backends that run on a CPU, and plain cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import backends, traps
from gradnorm_kernels.tolerances import NORMS

DTYPES = list(NORMS)


def _param(name: str) -> Any:
    reason = backends.unavailable_reason(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


BACKENDS = [_param("torch"), _param("cpu")]


def packed(
    lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    case = traps.packed(lengths, d_in, d_out, dtype)
    assert case.cu_seqlens is not None
    return case.x, case.dy, case.cu_seqlens


def served(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if backends.unavailable_reason(backend, "fused_grad_norm", "cpu", dtype) is None]
