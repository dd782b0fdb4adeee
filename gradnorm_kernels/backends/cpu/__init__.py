"""The cpu backend: segmented wgrad in C++ (``csrc/cpu``), for CPUs of any kind.

:mod:`.wgrad` takes norms and sums from the weight-gradient GEMM: it reaches the end of a sample inside the registers,
so that a norm costs a few percent of the GEMM and the GEMM itself is no slower than the BLAS library's. Pairs of tokens
(the norms of short samples, everything in calls with few tokens), ``grad_dot`` and ``grad_sketch``, which are products
with a matrix, are BLAS in this backend too: there the code is the torch backend's.

Products accumulate in float32. The same call gives the same bits, whatever the number of threads; it runs on at most
``torch.get_num_threads()`` of them, which are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...batch import GradBatch
from .. import native
from ..base import NO_FLOAT64, UP_TO_FLOAT32, Backend, Plan
from ..torch import fused_grad_norm as blas_fused_grad_norm
from ..torch import grad_dot, grad_sketch
from ..torch import grad_gram as blas_grad_gram
from . import wgrad

__all__ = ["BACKEND", "fused_grad_norm", "grad_dot", "grad_gram", "grad_sketch"]


def _unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it is for tensors on the CPU, not on {device_type!r}"
    return NO_FLOAT64 if dtype == torch.float64 else None


BACKEND = Backend(
    "cpu",
    devices=("cpu",),
    dtypes=UP_TO_FLOAT32,
    priority=1,
    why="is compiled for this CPU",
    unavailable_reason=native.unavailable_reason,
    unsupported_reason=_unsupported_reason,
)


def fused_grad_norm(batch: GradBatch, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    return blas_fused_grad_norm(batch, plan, wgrad.segmented_wgrad)


def grad_gram(batch: GradBatch, plan: Plan) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    return blas_grad_gram(batch, plan, wgrad.segmented_wgrad)
