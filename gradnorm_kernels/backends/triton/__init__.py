"""The triton backend: A100, H100, H200 and newer, and Triton's interpreter on a CPU.

:mod:`.wgrad` takes norms, sums and dW from one pass of the weight-gradient GEMM; :mod:`.gram` takes the norms of short
samples, and in calls with few tokens everything, from inner products of tokens; :mod:`.dot` takes inner products with a
given matrix.

Index tensors that are on the GPU stay there: nothing synchronises, and a call whose sizes are all known (num_samples,
num_groups) can be captured in a CUDA graph. Values that are out of range then cannot raise: every result is NaN
(dW in its first row).
Products accumulate in float32, float32 inputs without tf32; there are no atomics, and results have the same bits on
every run on the same kind of GPU.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
import triton
from torch import Tensor

from ... import checks
from ... import segments as layout
from ...segments import Segments, prepare
from .. import NO_FLOAT64, Plan
from . import dot, gram, wgrad

__all__ = ["fused_grad_norm", "grad_dot", "grad_gram", "missing", "unsupported"]


def missing() -> str | None:
    """Why this backend cannot run here at all; None if it can."""
    if _interpreted():
        return old_interpreter(triton.__version__, version("numpy"))
    if not torch.cuda.is_available():
        return (
            "there is no CUDA device that torch can use; on CPU tensors Triton runs only in its interpreter: set "
            "TRITON_INTERPRET=1 before Python starts, or use backend='torch'"
        )
    if torch.version.cuda is None:
        return "it is for NVIDIA GPUs, and this torch is built for others"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0 or newer, and this GPU has {major}.{minor}"


def old_interpreter(of_triton: str, of_numpy: str) -> str | None:
    """Why these versions cannot interpret; None if they can.

    Triton 3.6's interpreter makes a Python number of an array of one element in every loop, which NumPy 2.4 refuses.
    """
    if _release(of_triton) >= (3, 7) or _release(of_numpy) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {of_triton} does not run under NumPy {of_numpy}: install NumPy 2.3 or Triton 3.7 "
        "or newer, or unset TRITON_INTERPRET"
    )


def _release(text: str) -> tuple[int, int]:
    """'3.6.0+git1' -> (3, 6)."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it cannot take tensors of this kind; None if it can."""
    if dtype == torch.float64:
        return NO_FLOAT64
    if not _interpreted():
        return None if device_type == "cuda" else f"it is for tensors on a GPU, not on {device_type!r}"
    if device_type != "cpu":
        return f"Triton's interpreter (TRITON_INTERPRET=1) takes tensors on the CPU here, not on {device_type!r}"
    if dtype == torch.bfloat16:
        return "the interpreter multiplies the bit patterns of bfloat16 numbers in tl.dot: use float32 or float16 there"
    return None


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
    segments = prepare(x, cu_seqlens, sample_ids, group_ids, sizes)
    x, dy = layout.rows(x), layout.rows(dy)
    total: Tensor | None = None
    between: Tensor | None = None
    if _nothing(x, dy, segments):
        samples, groups = (x.new_zeros(n, dtype=torch.float64) for n in (segments.samples, segments.groups))
        total = x.new_zeros(sizes.d_out, sizes.d_in) if weight_grad else None
        between = x.new_zeros(segments.groups, segments.groups, dtype=torch.float64) if group_gram else None
    elif plan.sums == "gram" and not weight_grad:
        samples, groups, between = gram.pair_sums(x, dy, segments, group_gram)
    else:
        short = min(plan.gram_tokens, sizes.tokens)
        found = wgrad.wgrad(x, dy, segments, short, weight_grad, group_gram, plan.slab)
        samples, groups, total, between = found.sample_sq, found.group_sq, found.weight_grad, found.group_gram
        if short:
            samples = torch.where(segments.lengths() <= short, gram.sample_norms(x, dy, segments, short), samples)
    guard = segments.guard
    return (
        guard(samples),
        guard(groups),
        None if total is None else segments.guard_weight_grad(total),
        None if between is None else guard(between),
    )


def grad_gram(
    x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sizes: checks.Sizes, plan: Plan
) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    segments = prepare(x, cu_seqlens, sample_ids, None, sizes)
    x, dy = layout.rows(x), layout.rows(dy)
    if _nothing(x, dy, segments):
        result: Tensor | None = x.new_zeros(segments.samples, segments.samples, dtype=torch.float64)
    elif plan.sums == "gram":
        result = gram.pair_gram(x, dy, segments)
    else:
        result = wgrad.wgrad(x, dy, segments.each_alone(), 0, False, True, plan.slab).group_gram
    assert result is not None
    return segments.guard(result)


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
) -> Tensor:
    """``<G_i, v> = sum over t in i of dy_t . (v x_t)`` [N] float64."""
    segments = prepare(x, cu_seqlens, sample_ids, None, sizes)
    x, dy = layout.rows(x), layout.rows(dy)
    if _nothing(x, dy, segments):
        return segments.guard(x.new_zeros(segments.samples, dtype=torch.float64))
    return segments.guard(dot.grad_dot(x, dy, v, segments))


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _nothing(x: Tensor, dy: Tensor, segments: Segments) -> bool:
    """Whether every sum is empty."""
    return not (x.numel() and dy.numel() and segments.start.numel())
