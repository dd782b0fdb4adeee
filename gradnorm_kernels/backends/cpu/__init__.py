"""The cpu backend: segmented wgrad in C++ (``csrc/cpu``), for CPUs of any kind.

The pass that takes norms and sums from the weight-gradient GEMM is compiled: it stops at a sample's end inside the
registers, so that a norm costs a few percent of the GEMM and the GEMM itself is no slower than the BLAS library's. What
is made of pairs of tokens (the norms of short samples, everything in calls with few tokens) and ``grad_dot``, which is
one product with a matrix, is BLAS in this backend too: there the code is the torch backend's.

Products accumulate in float32. The same call gives the same bits, whatever the number of threads; it runs on at most
``torch.get_num_threads()`` of them, which are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .. import NO_FLOAT64, Plan, native
from ..torch import fused_grad_norm as blas_fused_grad_norm
from ..torch import grad_dot
from ..torch import grad_gram as blas_grad_gram
from ..torch.wgrad import Step, Sums, gram_of_sums

__all__ = ["fused_grad_norm", "grad_dot", "grad_gram", "missing", "slab_pass", "unsupported"]


def missing() -> str | None:
    """Why this backend cannot run here at all; None if it can."""
    return native.unable()


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it cannot take tensors of this kind; None if it can."""
    if device_type != "cpu":
        return f"it is for tensors on the CPU, not on {device_type!r}"
    return NO_FLOAT64 if dtype == torch.float64 else None


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
    weight_grad: bool,
    group_gram: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    return blas_fused_grad_norm(
        x, dy, cu_seqlens, sample_ids, group_ids, sizes, plan, weight_grad, group_gram, slab_pass
    )


def grad_gram(
    x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sizes: checks.Sizes, plan: Plan
) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    return blas_grad_gram(x, dy, cu_seqlens, sample_ids, sizes, plan, slab_pass)


def slab_pass(
    x: Tensor,
    dy: Tensor,
    runs: list[list[Step]],
    slab: int,
    weight_grad: Tensor | None,
    group_gram: bool,
    isa: int | None = None,
    threads: int | None = None,
) -> Sums:
    """What :func:`gradnorm_kernels.backends.torch.wgrad.slab_pass` computes, compiled.

    ``isa`` is a position in ``build_info()["cpu_isas"]`` that this processor runs (default: the newest).
    """
    module = native.module()
    isa = module.best_isa() if isa is None else isa
    threads = torch.get_num_threads() if threads is None else threads
    d_in, d_out = x.shape[1], dy.shape[1]
    held = len(runs) if group_gram else 1
    steps = [(step, group) for group, run in enumerate(runs) for step in run]
    samples = sum(step.measured for step, _ in steps)
    ends, slots, at, slot = [], [], 0, 0
    for step, _ in steps:
        at += step.rows
        ends.append(at)
        slots.append(slot if step.measured else -1)
        slot += step.measured
    index = torch.tensor([ends, [group for _, group in steps], slots], device="cpu")

    # A lone group's sum is the total: it is formed where it is returned if the dtype allows.
    in_place = weight_grad is not None and weight_grad.dtype == torch.float32 and len(runs) == 1
    rows = d_out if in_place else -(-d_out // -(-d_out // max(1, slab // (d_in * held))))
    sums = weight_grad if weight_grad is not None and in_place else _scratch(held, rows, d_in)
    total = None if weight_grad is None or len(runs) == 1 else _scratch(rows, d_in)
    unfinished = _scratch(rows, d_in)
    workspace = _scratch(-(-module.segmented_wgrad_workspace(isa, len(x), d_in, rows) // 4))
    sample_sq, group_sq = (torch.zeros(n, dtype=torch.float64, device="cpu") for n in (samples, len(runs)))
    gram = torch.zeros(held, held, dtype=torch.float64, device="cpu") if group_gram else None
    for lo in range(0, d_out, rows):
        height = min(rows, d_out - lo)
        module.segmented_wgrad(
            x=x.data_ptr(),
            dy=dy.data_ptr() + lo * dy.element_size(),
            x_stride=x.stride(0),
            dy_stride=dy.stride(0),
            type=native.TYPES[x.dtype],
            tokens=len(x),
            d_in=d_in,
            d_out=height,
            ends=index[0].data_ptr(),
            groups=index[1].data_ptr(),
            slots=index[2].data_ptr(),
            stretches=len(steps),
            sums=sums.data_ptr(),
            sums_kept=group_gram,
            open=unfinished.data_ptr(),
            total=0 if total is None else total.data_ptr(),
            sample_sq=sample_sq.data_ptr(),
            group_sq=group_sq.data_ptr(),
            workspace=workspace.data_ptr(),
            isa=isa,
            threads=threads,
        )
        if weight_grad is not None and not in_place:
            whole = sums[0] if total is None else total
            weight_grad[lo : lo + height] = whole[:height]
        if gram is not None:
            gram += gram_of_sums(sums.view(-1)[: held * height * d_in].view(held, -1))
    if gram is not None:
        gram.diagonal().copy_(group_sq)
    return Sums(sample_sq, group_sq, gram)


def _scratch(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
