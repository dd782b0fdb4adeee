"""The cuda backend: hand-written kernels for the tensor cores of sm_80 (A100) and sm_90a (H100, H200).

Hand-written: the weight-gradient pass with its norms, the Gram of pairs of tokens, every reduction. From torch: the
index tables (a dozen small operations), the products in ``grad_dot`` and the inner products of the groups' sums, which
are plain GEMMs that cuBLAS does best. Inputs are bfloat16 or float16.

Nothing here waits for the device: calls can be captured in a CUDA graph where the segments' values stay on it, and run
on the current stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...segments import Segments, prepare
from .. import NO_FLOAT64, Plan
from . import dot, gram, wgrad
from .launch import launch_context, missing, operand

__all__ = ["fused_grad_norm", "grad_dot", "grad_gram", "missing", "unsupported"]


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it cannot take tensors of this kind; None if it can."""
    if device_type != "cuda":
        return (
            f"it is for tensors on a CUDA device, not on {device_type!r}: move x and dy there, or use backend='torch'"
        )
    if dtype == torch.float64:
        return NO_FLOAT64
    if dtype == torch.float32:
        return "its kernels are for bfloat16 and float16, not float32: use backend='triton' or backend='torch'"
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
    total = x.new_empty(sizes.d_out, sizes.d_in) if weight_grad else None
    if _nothing(segments, sizes):
        samples, groups = _zeros(x, segments.samples), _zeros(x, segments.groups)
        pairs = _zeros(x, segments.groups, segments.groups) if group_gram else None
        return samples, groups, None if total is None else total.zero_(), pairs

    with launch_context(x.device) as context:
        x, dy = operand(x), operand(dy)
        of_sample = context, x, dy, segments, segments.sample, segments.samples
        of_group = context, x, dy, segments, segments.group, segments.groups
        if plan.sums == "gram" and not weight_grad:
            # Samples are not in the order of their numbers, but each is in one piece: that is all a rank needs.
            samples = gram.norms(*of_sample, None)
            pairs = gram.pairs(*of_group) if group_gram else None
            groups = gram.norms(*of_group, None) if pairs is None else pairs.diagonal().clone()
        else:
            found = wgrad.run(context, x, dy, segments, plan.gram_tokens, total, group_gram)
            samples, groups, pairs = found
            if plan.gram_tokens > 0:
                short = segments.lengths() <= plan.gram_tokens
                samples = torch.where(short, gram.norms(*of_sample, plan.gram_tokens), samples)
    guard = segments.guard
    return (
        guard(samples),
        guard(groups),
        None if total is None else segments.guard_weight_grad(total),
        None if pairs is None else guard(pairs),
    )


def grad_gram(
    x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sizes: checks.Sizes, plan: Plan
) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64."""
    segments = prepare(x, cu_seqlens, sample_ids, None, sizes).each_alone()
    if _nothing(segments, sizes):
        return _zeros(x, segments.samples, segments.samples)
    with launch_context(x.device) as context:
        x, dy = operand(x), operand(dy)
        if plan.sums == "gram":
            result = gram.pairs(context, x, dy, segments, segments.sample, segments.samples)
        else:
            found = wgrad.run(context, x, dy, segments, 0, None, True)
            assert found.gram is not None
            result = found.gram
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
    if _nothing(segments, sizes):
        return _zeros(x, segments.samples)
    with launch_context(x.device) as context:
        return segments.guard(dot.dots(context, x.flatten(0, -2), dy.flatten(0, -2), v, segments, plan.slab))


def _nothing(segments: Segments, sizes: checks.Sizes) -> bool:
    """No product at all to be made. Raises ValueError for more tokens than the kernels can count."""
    if sizes.tokens >= 2**31 - 1024:
        raise ValueError(
            f"x must have fewer than 2^31 - 1024 tokens for backend='cuda', got {sizes.tokens}; use backend='torch' or "
            "smaller batches"
        )
    return min(sizes.tokens, sizes.d_in, sizes.d_out, len(segments.start)) == 0


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
