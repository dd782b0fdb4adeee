"""The cuda backend: hand-written kernels for the tensor cores of sm_80 (A100) and sm_90a (H100, H200).

Hand-written: segmented wgrad with its norms, the Gram of pairs of tokens, and every reduction. From torch: the index
tables (a dozen small operations), the products in ``grad_dot`` and the inner products of the groups' sums, which are
plain GEMMs. Inputs are bfloat16 or float16.

Nothing here waits for the device: calls can be captured in a CUDA graph where the segments' values stay on it, and run
on the current stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...batch import GradBatch
from ...segments import Segments, device_segments
from ..base import NO_FLOAT64, Backend, Plan
from . import dot, gram, wgrad
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
    segments = device_segments(batch)
    x, dy = batch.x, batch.dy
    total = x.new_empty(batch.d_out, batch.d_in) if batch.weight_grad else None
    if _nothing(segments, batch):
        samples, groups = _zeros(x, segments.samples), _zeros(x, segments.groups)
        pairs = _zeros(x, segments.groups, segments.groups) if batch.group_gram else None
        return samples, groups, None if total is None else total.zero_(), pairs

    with launch_context(x.device) as context:
        x, dy = operand(x), operand(dy)
        of_sample = context, x, dy, segments, segments.sample, segments.samples
        of_group = context, x, dy, segments, segments.group, segments.groups
        if plan.group_sums == "gram" and not batch.weight_grad:
            # Samples are not in the order of their numbers, but each one's places are neighbours, which is enough.
            samples = gram.norms(*of_sample, None)
            pairs = gram.pairs(*of_group) if batch.group_gram else None
            groups = gram.norms(*of_group, None) if pairs is None else pairs.diagonal().clone()
        else:
            found = wgrad.run(context, x, dy, segments, plan.gram_tokens, total, batch.group_gram)
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


def grad_gram(batch: GradBatch, plan: Plan) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    segments = device_segments(batch).each_alone()
    if _nothing(segments, batch):
        return _zeros(batch.x, segments.samples, segments.samples)
    with launch_context(batch.x.device) as context:
        x, dy = operand(batch.x), operand(batch.dy)
        if plan.group_sums == "gram":
            result = gram.pairs(context, x, dy, segments, segments.sample, segments.samples)
        else:
            found = wgrad.run(context, x, dy, segments, 0, None, True)
            assert found.gram is not None
            result = found.gram
    return segments.guard(result)


def grad_dot(batch: GradBatch, v: Tensor, plan: Plan) -> Tensor:
    """``<G_i, v> = sum over t in i of dy_t . (v x_t)`` [N] float64."""
    segments = device_segments(batch)
    if _nothing(segments, batch):
        return _zeros(batch.x, segments.samples)
    with launch_context(batch.x.device) as context:
        x, dy = batch.x.flatten(0, -2), batch.dy.flatten(0, -2)
        return segments.guard(dot.dots(context, x, dy, v, segments, plan.workspace))


def _nothing(segments: Segments, batch: GradBatch) -> bool:
    """Whether there is no product at all. Raises ValueError for more tokens than the kernels can count."""
    if batch.tokens >= 2**31 - 1024:
        raise ValueError(
            f"x must have fewer than 2^31 - 1024 tokens for backend='cuda', got {batch.tokens}; use backend='torch' or "
            "smaller batches"
        )
    return batch.empty or not len(segments.start)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
