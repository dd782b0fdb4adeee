"""Norms and sums from tiles of the weight's gradient: how the pass is split, launched and summed up.

The kernel (``csrc/wgrad_norm_sm80.cu``, ``csrc/wgrad_norm_sm90.cu``) reads the tokens once and takes squares at the end
of each sample and group. Where the weight has fewer tiles than the GPU has multiprocessors, the tokens are split. The
splits' sums then go to a workspace, and the split-K fix-up adds them before it squares. A split ends between samples;
where there are too few samples for that, it ends anywhere, and the workspace holds the sums of samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...segments import PlainSegments, Segments
from ...tuning.tiles import CudaConfig, cluster_size, cuda_config
from .. import native
from ..base import Results
from ..torch.numerics import exact_matmuls
from . import gram
from .launch import LaunchContext
from .reduce import SquareSums, finish, split_fixup
from .schedule import Schedule, build, segment_count

BLOCK_M = 128
# The most bytes of workspace. Where more would be needed, the rows of the weight are taken in several passes.
_WORKSPACE = 256 << 20
# The most bytes of workspace for splits that end anywhere.
_SAMPLE_WORKSPACE = 64 << 20
# Elements of the groups' sums whose products are added in float32, at most; float64 from there on.
_SLAB = 1 << 16
# The fewest tokens of a split.
_SPLIT_TOKENS = 256


def run(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    segments: Segments | PlainSegments,
    gram_tokens: int,
    weight_grad: Tensor | None,
    group_gram: bool,
) -> Results:
    """The results of x [T, d_in] and dy [T, d_out]; norms of samples of at most ``gram_tokens`` tokens from the Gram.

    ``weight_grad`` [d_out, d_in], if given, is overwritten with the sum. Where the values of index tensors were out of
    range, every result is NaN (dW in its first row).
    """
    d_in, d_out, groups = x.shape[1], dy.shape[1], segments.groups
    store_sums = group_gram and groups > 1
    # The workspace holds a sum of every group, twice where the fix-up does not take their inner products.
    copies = groups if groups <= context.module.FIXUP_GROUPS else 2 * groups
    # Rows of the weight per pass: all, unless the workspace must hold the groups' sums of each of them.
    rows = max(BLOCK_M, _WORKSPACE // (4 * d_in * copies) // BLOCK_M * BLOCK_M) if store_sums else d_out
    config = launch_config(context, d_in, min(rows, d_out), len(x))
    wanted = splits(tile_count(d_in, min(rows, d_out), config.columns), len(x), context.multiprocessors)
    few = min(segments.samples, segment_count(segments))
    size = 4 * d_out * d_in
    anywhere = wanted > 1 and few < 4 * wanted and (wanted + few) * size <= _SAMPLE_WORKSPACE and not store_sums
    if not (anywhere or store_sums) and (wanted + groups) * size > _WORKSPACE:
        wanted = max(1, _WORKSPACE // size - groups)
    schedule = build(
        context,
        segments,
        len(x),
        x.device,
        gram_tokens=gram_tokens,
        splits=wanted,
        anywhere=anywhere,
        stored=wanted > 1 or store_sums,
        samples_by_gram=gram_tokens > 0,
    )
    results = Results.empty(x, segments.samples, groups, weight_grad, group_gram)
    short = gram.partial_sums(context, x, dy, schedule, gram_tokens) if gram_tokens > 0 else None
    for lo in range(0, d_out, rows):
        part = None if weight_grad is None else weight_grad[lo : lo + rows]
        of_wgrad, of_fixup = _pass(context, config, x, dy[:, lo : lo + rows], schedule, part, store_sums)
        finish(
            context,
            results,
            schedule,
            of_wgrad=of_wgrad,
            of_fixup=of_fixup,
            of_samples=short,
            first=lo == 0,
            last=lo + rows >= d_out,
        )
    return results


def tile_count(d_in: int, d_out: int, columns: int) -> int:
    """Tiles of 128 rows and ``columns`` columns of a weight."""
    return -(-d_out // BLOCK_M) * -(-d_in // columns)


def launch_config(context: LaunchContext, d_in: int, d_out: int, tokens: int) -> CudaConfig:
    """The tile and its order for a pass over ``d_out`` rows of a layer's weight."""
    return cuda_config(
        context.arch,
        context.module.WGRAD_TILES[context.arch],
        context.shared_memory,
        lambda columns: _split(tile_count(d_in, d_out, columns), tokens, context.multiprocessors)[1],
    )


def splits(tiles: int, tokens: int, multiprocessors: int) -> int:
    """How many splits: the fewest rounds of blocks, plus the cost of storing sums."""
    return _split(tiles, tokens, multiprocessors)[0]


def _split(tiles: int, tokens: int, multiprocessors: int) -> tuple[int, float]:
    """(the number of splits, its price in rounds over all tokens).

    The cost of storing a split's tile and reading it again (192 KiB at 2 TB/s, against 128 x 128 products per token at
    2.9 TFLOP/s per multiprocessor) is counted from an A100's data sheet, not measured.
    """
    best, price = 1, -(-tiles // multiprocessors) * 1.0
    for count in range(2, min(multiprocessors, tokens // _SPLIT_TOKENS) + 1):
        stored = 8.7 * tiles * count / tokens
        if tiles / multiprocessors + stored >= price:  # not even full rounds would be cheaper, here and further on
            break
        cost = -(-tiles * count // multiprocessors) / count + stored
        if cost < price:
            best, price = count, cost
    return best, price


def _pass(
    context: LaunchContext,
    config: CudaConfig,
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    weight_grad: Tensor | None,
    store_sums: bool,
) -> tuple[SquareSums, SquareSums | None]:
    """One pass over rows of the weight: squares of wgrad, and what the fix-up finds, inner products included."""
    d_in, d_out = x.shape[1], dy.shape[1]
    if schedule.fixup is None:
        running = None
        if weight_grad is not None and schedule.groups > 1:
            running = torch.empty(weight_grad.shape, dtype=torch.float32, device=x.device)
        return _launch(context, config, x, dy, schedule, None, weight_grad, running), None
    assert schedule.wgrad is not None
    elements = d_out * d_in
    held = schedule.wgrad.splits + len(schedule.fixup.outer) - 1
    workspace = torch.empty(held, elements, dtype=torch.float32, device=x.device)
    of_wgrad = _launch(context, config, x, dy, schedule, workspace, None, None)
    products = store_sums and schedule.groups <= context.module.FIXUP_GROUPS
    sums, slabs = None, -(-elements // _SLAB)
    if store_sums and not products:
        # With zeros behind the last element, so that all slabs are one product.
        sums = torch.empty(schedule.groups, slabs * -(-elements // slabs), dtype=torch.float32, device=x.device)
    of_fixup = split_fixup(
        context, workspace, schedule, weight_grad, native.TYPES[x.dtype], products=products, sums=sums
    )
    if sums is not None:
        parts = sums.unflatten(1, (slabs, -1)).transpose(0, 1)
        with exact_matmuls(x.device):
            of_fixup = replace(of_fixup, products=torch.bmm(parts, parts.mT))
    return of_wgrad, of_fixup


def _launch(
    context: LaunchContext,
    config: CudaConfig,
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    workspace: Tensor | None,
    weight_grad: Tensor | None,
    running: Tensor | None,
) -> SquareSums:
    """One launch: the partial sums of squares per tile, of groups only where there is no ``workspace``."""
    tables = schedule.wgrad
    assert tables is not None
    d_in, d_out = x.shape[1], dy.shape[1]
    name = f"wgrad_norm_sm{context.arch}"
    rows = context.size(f"{name}_rows", d_in=d_in, d_out=d_out, block_n=config.columns)
    sample_sq = torch.empty(rows, schedule.samples, dtype=torch.float32, device=x.device)
    group_sq = None
    if workspace is None:
        group_sq = torch.empty(rows, schedule.groups, dtype=torch.float32, device=x.device)
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
        segment_start=tables.start,
        segment_end=tables.end,
        segment_sample=tables.sample,
        segment_group=tables.group,
        segments=len(tables.start),
        samples=schedule.samples,
        groups=schedule.groups if schedule.fixup is None else len(schedule.fixup.outer),
        split_start=tables.split_start,
        splits=tables.splits,
        sample_sq=sample_sq,
        group_sq=group_sq,
        workspace=workspace,
        weight_grad=weight_grad,
        running=running,
        block_n=config.columns,
        group_m=config.group_m,
        staggered=config.staggered,
        cluster=cluster_size(
            config,
            -(-d_out // BLOCK_M),
            tile_count(d_in, d_out, config.columns) * tables.splits,
            context.multiprocessors,
        ),
        multiprocessors=context.multiprocessors,
    )
    return SquareSums(sample_sq, group_sq, rows)
