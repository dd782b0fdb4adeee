"""Norms and sums from tiles of the weight's gradient: how the pass is split, launched and summed up.

The kernel (``csrc/wgrad_norm_sm80.cu``, ``csrc/wgrad_norm_sm90.cu``) reads the tokens once and takes squares at the end
of each sample and group. Where the weight has fewer tiles than the GPU has multiprocessors, the tokens are split. The
splits' sums then go to a workspace, and the split-K fix-up adds them before it squares. A split ends between samples;
where there are too few samples for that, it ends anywhere, and the workspace holds the sums of samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segments
from ...tuning.tiles import CudaConfig, cuda_config
from .. import native
from ..torch.numerics import exact_matmuls
from ..torch.wgrad import gram_of_sums
from . import tables
from .launch import LaunchContext
from .reduce import column_sums, split_fixup, zeros

BLOCK_M = 128
# The most bytes of workspace. Where more would be needed, the rows of the weight are taken in several passes.
_WORKSPACE = 256 << 20
# The most bytes of workspace for splits that end anywhere.
_SAMPLE_WORKSPACE = 64 << 20
# The fewest tokens of a split.
_SPLIT_TOKENS = 256


class Wgrad(NamedTuple):
    """``sample_sq`` [N], ``group_sq`` [K], ``gram`` [K, K] or None: float64. A sample that was not measured has 0."""

    sample_sq: Tensor
    group_sq: Tensor
    gram: Tensor | None

    def plus(self, more: Wgrad) -> Wgrad:
        """The sums of two passes over different rows of the weight."""
        gram = None if self.gram is None or more.gram is None else self.gram + more.gram
        return Wgrad(self.sample_sq + more.sample_sq, self.group_sq + more.group_sq, gram)


def run(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    gram_tokens: int,
    weight_grad: Tensor | None,
    group_gram: bool,
) -> Wgrad:
    """The pass over x [T, d_in] and dy [T, d_out]; samples of at most ``gram_tokens`` tokens are not measured.

    ``weight_grad`` [d_out, d_in], if given, is overwritten with the sum.
    """
    d_in, d_out, groups = x.shape[1], dy.shape[1], segments.groups
    columns = -(-d_in // launch_config(context, d_in).columns)
    # Rows of the weight per pass: all, unless the workspace must hold sums of every group for each of them.
    rows = max(BLOCK_M, _WORKSPACE // (4 * d_in * 2 * groups) // BLOCK_M * BLOCK_M) if group_gram else d_out
    wanted = splits(-(-min(rows, d_out) // BLOCK_M) * columns, len(x), context.multiprocessors)
    few = min(segments.samples, len(segments.start))
    size = 4 * d_out * d_in
    if wanted > 1 and few < 4 * wanted and (wanted + few) * size <= _SAMPLE_WORKSPACE and not group_gram:
        return _by_samples(context, x, dy, segments, wanted, weight_grad)
    if not group_gram and (wanted + groups) * size > _WORKSPACE:
        wanted = max(1, _WORKSPACE // size - groups)
    measured = segments.sample
    if gram_tokens > 0:
        measured = torch.where(segments.lengths()[segments.sample] > gram_tokens, segments.sample, -1)
    split = tables.whole_samples(segments, wanted, len(x))
    if wanted == 1 and not group_gram:
        return _direct(context, x, dy, segments, split, measured, weight_grad)

    found: Wgrad | None = None
    for lo in range(0, d_out, rows):
        part = None if weight_grad is None else weight_grad[lo : lo + rows]
        more = _stored(context, x, dy[:, lo : lo + rows], segments, split, measured, part, group_gram)
        found = more if found is None else found.plus(more)
    assert found is not None
    return found


def launch_config(context: LaunchContext, d_in: int) -> CudaConfig:
    """The tile and its order for a layer of ``d_in`` inputs."""
    return cuda_config(context.arch, context.module.WGRAD_TILES[context.arch], d_in)


def splits(tiles: int, tokens: int, multiprocessors: int) -> int:
    """How many splits: the fewest rounds of blocks, plus the cost of storing sums.

    In units of one round over all tokens. The cost of storing a split's tile and reading it again (192 KiB at 2 TB/s,
    against 128 x 128 products per token at 2.9 TFLOP/s per multiprocessor) is counted from an A100's data sheet, not
    measured.
    """
    best, price = 1, -(-tiles // multiprocessors) * 1.0
    for count in range(2, min(multiprocessors, tokens // _SPLIT_TOKENS) + 1):
        cost = -(-tiles * count // multiprocessors) / count + 8.7 * tiles * count / tokens
        if cost < price:
            best, price = count, cost
    return best


def _direct(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    split: tables.SplitSegments,
    measured: Tensor,
    weight_grad: Tensor | None,
) -> Wgrad:
    """One launch that writes nothing but dW and partial sums of squares."""
    running = None
    if weight_grad is not None and segments.groups > 1:
        running = torch.empty(weight_grad.shape, dtype=torch.float32, device=x.device)
    sample_sq, group_sq = _launch(
        context, x, dy, segments, split, measured, segments.groups, None, weight_grad, running
    )
    return Wgrad(column_sums(context, sample_sq), column_sums(context, group_sq), None)


def _stored(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    split: tables.SplitSegments,
    measured: Tensor,
    weight_grad: Tensor | None,
    group_gram: bool,
) -> Wgrad:
    """Each split stores its groups' sums; the fix-up adds and squares them."""
    groups, elements = segments.groups, dy.shape[1] * x.shape[1]
    workspace = torch.zeros(split.splits + groups - 1, elements, dtype=torch.float32, device=x.device)
    sample_sq, _ = _launch(context, x, dy, segments, split, measured, groups, workspace, None, None)
    sums = torch.zeros(groups, elements, dtype=torch.float32, device=x.device) if group_gram else None
    outer = torch.arange(groups, dtype=torch.int32, device=x.device)
    _, group_sq = split_fixup(
        context, workspace, split, groups, outer, groups, sums, weight_grad, native.TYPES[x.dtype]
    )
    gram = None
    if sums is not None:
        with exact_matmuls(x.device):
            gram = gram_of_sums(sums)
        gram.diagonal().copy_(group_sq)
    return Wgrad(column_sums(context, sample_sq), group_sq, gram)


def _by_samples(
    context: LaunchContext, x: Tensor, dy: Tensor, segments: Segments, count: int, weight_grad: Tensor | None
) -> Wgrad:
    """Splits that end anywhere store their samples' sums; the fix-up makes the groups' sums of them."""
    split = tables.anywhere(segments, count, len(x))
    rank = tables.ranks(segments.sample)
    bound = min(segments.samples, len(segments.start))
    measured = torch.full_like(split.group, -1)
    workspace = torch.zeros(count + bound - 1, dy.shape[1] * x.shape[1], dtype=torch.float32, device=x.device)
    _launch(context, x, dy, segments, split, measured, bound, workspace, None, None)
    # Unused ranks have nothing to add: they may name the last group.
    outer = torch.full((bound,), segments.groups - 1, dtype=torch.int32, device=x.device)
    outer = outer.scatter_(0, rank, segments.group)
    arguments = (split, bound, outer, segments.groups, None, weight_grad, native.TYPES[x.dtype])
    by_rank, group_sq = split_fixup(context, workspace, *arguments)
    # index_copy into one element more, which takes the unused ranks.
    names = torch.full((bound,), segments.samples, dtype=torch.int64, device=x.device)
    names = names.scatter_(0, rank, segments.sample.long())
    sample_sq = zeros(x, segments.samples + 1).index_copy_(0, names, by_rank)
    return Wgrad(sample_sq[:-1], group_sq, None)


def _launch(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    split: tables.SplitSegments,
    measured: Tensor,
    groups: int,
    workspace: Tensor | None,
    weight_grad: Tensor | None,
    running: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One launch. Returns the partial sums of squares per tile: ([rows, N], [rows, groups]) float32."""
    d_in, d_out = x.shape[1], dy.shape[1]
    config = launch_config(context, d_in)
    name = f"wgrad_norm_sm{context.arch}"
    rows = context.size(f"{name}_rows", d_in=d_in, d_out=d_out, block_n=config.columns)
    # One launch fills both.
    sizes = [rows * segments.samples, rows * groups if workspace is None else 0]
    sample_sq, group_sq = torch.zeros(sum(sizes), dtype=torch.float32, device=x.device).split(sizes)
    sample_sq, group_sq = sample_sq.view(rows, segments.samples), group_sq.view(-1, groups)
    context.launch(
        name,
        x=x,
        dy=dy,
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=native.TYPES[x.dtype],
        tokens=len(x),
        d_in=d_in,
        d_out=d_out,
        segment_start=split.start,
        segment_end=split.end,
        segment_sample=measured,
        segment_group=split.group,
        segments=len(split.start),
        samples=segments.samples,
        groups=groups,
        split_start=split.split_start,
        splits=split.splits,
        sample_sq=sample_sq,
        group_sq=group_sq if workspace is None else None,
        workspace=workspace,
        weight_grad=weight_grad,
        running=running,
        block_n=config.columns,
        group_m=config.group_m,
        staggered=config.staggered,
        multiprocessors=context.multiprocessors,
    )
    return sample_sq, group_sq
