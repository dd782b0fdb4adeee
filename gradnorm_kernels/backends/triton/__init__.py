"""The triton backend: A100, H100, H200 and newer, and Triton's interpreter on a CPU.

:mod:`.wgrad` takes norms, sums and dW from one pass of the weight-gradient GEMM; :mod:`.gram` takes the norms of short
samples, and in calls with few tokens everything, from inner products of tokens; :mod:`.dot` takes inner products with a
given matrix; :mod:`.embedding` is for embeddings and for heads tied to them.

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

from ... import segments as table
from ...batch import GradBatch
from ...segments import Segments, device_segments, one_sample_per_group, plain_segments
from ..base import NO_FLOAT64, UP_TO_FLOAT32, Backend, Plan
from . import dot, gram, segment_table, sketch, wgrad
from .embedding import embedding_gram, embedding_norms, tied_gram
from .token_order import order
from .wgrad_schedule import ShortSamples

__all__ = [
    "BACKEND",
    "embedding_grad_norm",
    "fused_grad_norm",
    "grad_dot",
    "grad_gram",
    "grad_sketch",
    "tied_grad_gram",
]


def _unavailable_reason() -> str | None:
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

    Triton 3.6's interpreter converts an array of one element to a Python number in every loop, which NumPy 2.4 refuses.
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


def _unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it cannot take such tensors; None if it can."""
    if dtype == torch.float64:
        return NO_FLOAT64
    if not _interpreted():
        return None if device_type == "cuda" else f"it is for tensors on a GPU, not on {device_type!r}"
    if device_type != "cpu":
        return f"Triton's interpreter (TRITON_INTERPRET=1) takes tensors on the CPU here, not on {device_type!r}"
    if dtype == torch.bfloat16:
        return "the interpreter multiplies the bit patterns of bfloat16 numbers in tl.dot: use float32 or float16 there"
    return None


BACKEND = Backend(
    "triton",
    devices=("cuda",),  # the interpreter takes CPU tensors too, when it is asked for by name
    dtypes=UP_TO_FLOAT32,
    priority=2,
    why="is compiled for this GPU",
    unavailable_reason=_unavailable_reason,
    unsupported_reason=_unsupported_reason,
)


def fused_grad_norm(batch: GradBatch, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    x, dy = table.rows(batch.x), table.rows(batch.dy)
    by_pairs = plan.group_sums == "gram" and not batch.weight_grad
    short = min(plan.gram_tokens, batch.tokens)
    plain = None if batch.empty or by_pairs or short else plain_segments(batch)
    if plain is not None:
        found = wgrad.wgrad(x, dy, plain, None, batch.weight_grad, batch.group_gram, plan.workspace)
        return found.sample_sq, found.group_sq, found.weight_grad, found.group_gram
    segments = _segments(batch)
    total: Tensor | None = None
    pairs: Tensor | None = None
    if _nothing(batch, segments):
        samples, groups = _zeros(x, segments.samples), _zeros(x, segments.groups)
        total = x.new_zeros(batch.d_out, batch.d_in) if batch.weight_grad else None
        pairs = _zeros(x, segments.groups, segments.groups) if batch.group_gram else None
    elif by_pairs:
        samples, groups, pairs = gram.pair_sums(x, dy, segments, batch.group_gram)
    else:
        short_samples = None
        if short:
            positions = order(segments, batch.tokens)
            short_samples = ShortSamples(short, gram.sample_norms(x, dy, positions, short), positions.sample_span)
        found = wgrad.wgrad(x, dy, segments, short_samples, batch.weight_grad, batch.group_gram, plan.workspace)
        return found.sample_sq, found.group_sq, found.weight_grad, found.group_gram
    guard = segments.guard
    return (
        guard(samples),
        guard(groups),
        None if total is None else segments.guard_weight_grad(total),
        None if pairs is None else guard(pairs),
    )


def grad_gram(batch: GradBatch, plan: Plan) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    segments = _segments(batch)
    x, dy = table.rows(batch.x), table.rows(batch.dy)
    if _nothing(batch, segments):
        return segments.guard(_zeros(x, segments.samples, segments.samples))
    if plan.group_sums == "gram":
        return segments.guard(gram.pair_gram(x, dy, segments))
    result = wgrad.wgrad(x, dy, segments.each_alone(), None, False, True, plan.workspace).group_gram
    assert result is not None
    return result


def grad_dot(batch: GradBatch, v: Tensor, plan: Plan) -> Tensor:
    """``<G_i, v> = sum over t in i of dy_t . (v x_t)`` [N] float64."""
    segments = _segments(batch)
    x, dy = table.rows(batch.x), table.rows(batch.dy)
    if _nothing(batch, segments):
        return segments.guard(_zeros(x, segments.samples))
    return segments.guard(dot.grad_dot(x, dy, v, segments))


def grad_sketch(batch: GradBatch, c_in: Tensor | None, c_out: Tensor | None, plan: Plan) -> Tensor:
    """``C_out^T G_i C_in`` [N, r_out, r_in] float32."""
    segments = _segments(batch)
    return segments.guard(sketch.grad_sketch(table.rows(batch.x), table.rows(batch.dy), c_in, c_out, segments))


def embedding_grad_norm(batch: GradBatch, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sample_sq_norms [N], group_sq_norms [K], group_gram [K, K] or None), float64."""
    segments = _segments(batch)
    ids, dy = batch.x.flatten(), table.rows(batch.dy)
    sample, group = (segments.by_token(owner, batch.tokens) for owner in (segments.sample, segments.group))
    gram_of_groups: Tensor | None = None
    if batch.group_gram:
        gram_of_groups = segments.guard(embedding_gram(ids, dy, group, segments.groups))
        groups = gram_of_groups.diagonal().clone()
    else:
        groups = segments.guard(embedding_norms(ids, dy, group, segments.groups))
    if one_sample_per_group(batch):
        return groups.clone(), groups, gram_of_groups
    samples = segments.guard(embedding_norms(ids, dy, sample, segments.samples))
    return samples, groups, gram_of_groups


def tied_grad_gram(head: GradBatch, embedding: GradBatch, plan: Plan) -> tuple[Tensor, Tensor]:
    """(``<H_i, G_i>`` [N], ``<sum H_a, sum G_b>`` [K, K]), float64."""
    mine, theirs = _segments(head), _segments(embedding)
    x, dy, e, ids = table.rows(head.x), table.rows(head.dy), table.rows(embedding.dy), embedding.x.flatten()
    # An id out of range would be read from outside dy's row: it is left out, and the results are NaN.
    inside = ids < head.d_out

    def cross(own: Segments, other: Segments) -> Tensor:
        found = tied_gram(x, dy, own, torch.where(inside, ids, -1), e, other)
        return torch.where(inside.all(), other.guard(own.guard(found)), torch.nan)

    groups = cross(mine.groups_as_samples(), theirs.groups_as_samples())
    if one_sample_per_group(head):
        return groups.diagonal().clone(), groups
    return cross(mine.each_alone(), theirs.each_alone()).diagonal().clone(), groups


def _segments(batch: GradBatch) -> Segments:
    return device_segments(batch, segment_table.sort)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _nothing(batch: GradBatch, segments: Segments) -> bool:
    """Whether every sum is empty."""
    return batch.empty or not len(segments.start)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
