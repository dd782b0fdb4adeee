"""The cuda backend: hand-written kernels for the tensor cores of sm_80 (A100) and sm_90a (H100, H200).

Hand-written: the tables of segments, segmented wgrad with its norms, the Gram of pairs of tokens, and every reduction.
From torch: the products in ``grad_dot`` and the inner products of the groups' sums, which are plain GEMMs. Inputs are
bfloat16 or float16.

A call of fused_grad_norm is three launches: the prologue checks the segments and makes the tables (:mod:`.schedule`),
the products take the norms, and the epilogue adds in float64 (:mod:`.reduce`). Split tokens take one more, the split-K
fix-up, and so do ids on the device, which are sorted first, and the Gram of short samples.

Nothing here waits for the device: calls can be captured in a CUDA graph where the segments' values stay on it, and run
on the current stream. Values on the device that are out of range make every result NaN (dW in its first row).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ...batch import GradBatch
from ...segments import PlainSegments, Segments, device_segments, plain_segments
from ..base import NO_FLOAT64, Backend, Plan
from . import dot, gram, segment_table, wgrad
from .launch import launch_context, operand, unavailable_reason

__all__ = ["BACKEND", "fused_grad_norm", "grad_dot", "grad_gram"]


def _unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return (
            f"it is for tensors on a CUDA device, not on {device_type!r}: move x and dy there, or use backend='torch'"
        )
    if dtype == torch.float64:
        return NO_FLOAT64
    if dtype == torch.float32:
        return "its kernels are for bfloat16 and float16, not float32: use backend='triton' or backend='torch'"
    return None


BACKEND = Backend(
    "cuda",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    priority=1,
    why="is compiled for this GPU",
    unavailable_reason=unavailable_reason,
    unsupported_reason=_unsupported_reason,
)


def fused_grad_norm(batch: GradBatch, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    segments = _segments(batch)
    x, dy = batch.x, batch.dy
    total = x.new_empty(batch.d_out, batch.d_in) if batch.weight_grad else None
    if _nothing(segments, batch):
        samples, groups = _zeros(x, segments, segments.samples), _zeros(x, segments, segments.groups)
        pairs = _zeros(x, segments, segments.groups, segments.groups) if batch.group_gram else None
        return samples, groups, None if total is None else segments.guard_weight_grad(total.zero_()), pairs

    with launch_context(x.device) as context:
        x, dy = operand(x), operand(dy)
        if plan.group_sums == "gram" and not batch.weight_grad:
            found = gram.norms(context, x, dy, segments, batch.group_gram)
        else:
            short = min(plan.gram_tokens, batch.tokens)
            found = wgrad.run(context, x, dy, segments, short, total, batch.group_gram)
    return found.sample_sq, found.group_sq, found.weight_grad, found.group_gram


def grad_gram(batch: GradBatch, plan: Plan) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    segments = device_segments(batch, segment_table.sort).each_alone()
    if _nothing(segments, batch):
        return _zeros(batch.x, segments, segments.samples, segments.samples)
    with launch_context(batch.x.device) as context:
        x, dy = operand(batch.x), operand(batch.dy)
        if plan.group_sums == "gram":
            return gram.pairs(context, x, dy, segments)
        found = wgrad.run(context, x, dy, segments, 0, None, True)
    assert found.group_gram is not None
    return found.group_gram


def grad_dot(batch: GradBatch, v: Tensor, plan: Plan) -> Tensor:
    """``<G_i, v> = sum over t in i of dy_t . (v x_t)`` [N] float64."""
    segments = _segments(batch)
    if _nothing(segments, batch):
        return _zeros(batch.x, segments, segments.samples)
    with launch_context(batch.x.device) as context:
        x, dy = batch.x.flatten(0, -2), batch.dy.flatten(0, -2)
        return dot.dots(context, x, dy, v, segments, plan.workspace)


def _segments(batch: GradBatch) -> Segments | PlainSegments:
    """The plain form, which the schedule's launch reads and checks, where the call has one."""
    return (None if batch.empty else plain_segments(batch)) or device_segments(batch, segment_table.sort)


def _nothing(segments: Segments | PlainSegments, batch: GradBatch) -> TypeGuard[Segments]:
    """Whether there is no product at all. Raises ValueError for more tokens than the kernels can count."""
    if batch.tokens >= 2**31 - 1024:
        raise ValueError(
            f"x must have fewer than 2^31 - 1024 tokens for backend='cuda', got {batch.tokens}; use backend='torch' or "
            "smaller batches"
        )
    return isinstance(segments, Segments) and (batch.empty or not len(segments.start))


def _zeros(like: Tensor, segments: Segments, *shape: int) -> Tensor:
    return segments.guard(torch.zeros(shape, dtype=torch.float64, device=like.device))
