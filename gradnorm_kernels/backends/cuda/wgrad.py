"""Norms and sums from tiles of the weight's gradient: how the pass is split, launched and summed up.

The kernel (``csrc/wgrad_norm_sm80.cu``, ``csrc/wgrad_norm_sm90.cu``) reads the tokens once and takes squares at the end
of each sample and group. Where the weight's tiles leave multiprocessors without work, the tokens of all tiles or of the
last rows of tiles are split (``splits.py``). The splits' sums then go to a workspace, and the split-K fix-up adds them
before it squares. A split ends between samples; where there are too few samples for that, it ends anywhere, and the
workspace holds the sums of samples.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...segments import PlainSegments, Segments
from ...tuning.tiles import CudaConfig, all_forced, cluster_size, cuda_config
from .. import native
from ..base import Results
from ..torch.numerics import exact_matmuls
from . import gram, splits
from .launch import Gpu, LaunchContext
from .reduce import SquareSums, finish, split_fixup
from .schedule import Schedule, build, segment_count
from .splits import BLOCK_M, WORKSPACE, Split

# Elements of the groups' sums whose products are added in float32, at most; float64 from there on.
_SLAB = 1 << 16


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
    few = min(segments.samples, segment_count(segments))
    # Where the mean length is one that the Gram takes, the pass goes on across the ends of samples.
    ends = few if x.shape[0] > gram_tokens * few else 0
    most = context.module.FIXUP_GROUPS
    rows, config, split = choose_launch(
        context.gpu, all_forced(), d_in, d_out, x.shape[0], few, groups, ends, most if store_sums else None
    )
    stored = split.parts > 1 or store_sums
    schedule = build(
        context,
        segments,
        x.shape[0],
        x.device,
        gram_tokens=gram_tokens,
        splits=split.parts,
        anywhere=split.anywhere,
        stored=stored,
        samples_by_gram=gram_tokens > 0,
    )
    results = Results.empty(x, segments.samples, groups, weight_grad, group_gram)
    short = gram.partial_sums(context, x, dy, schedule, gram_tokens) if gram_tokens > 0 else None
    for lo in range(0, d_out, rows):
        part = None if weight_grad is None else weight_grad[lo : lo + rows]
        columns = dy[:, lo : lo + rows]
        of_wgrad, of_fixup = _pass(context, config, x, columns, schedule, part, split.whole_rows, store_sums)
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


# Cached for the next layer of the same shape: the choice would take the host longer than a launch.
@lru_cache(maxsize=4096)
def choose_launch(
    gpu: Gpu,
    forced: tuple[CudaConfig, ...],
    d_in: int,
    d_out: int,
    tokens: int,
    samples: int,
    groups: int,
    ends: int,
    fixup_groups: int | None,
) -> tuple[int, CudaConfig, Split]:
    """(rows of the weight per pass, the tile and its order, how the tokens are split).

    ``forced``: what :func:`all_forced` says, on which the choice depends. ``ends``: of samples that are measured.
    ``fixup_groups``: the most groups whose inner products the fix-up takes; None: they are not wanted.
    """
    rows, pairs = d_out, fixup_groups is not None
    if fixup_groups is not None:
        # The workspace holds a sum of every group, twice where the fix-up does not take their inner products.
        copies = groups if groups <= fixup_groups else 2 * groups
        rows = min(d_out, max(BLOCK_M, WORKSPACE // (4 * d_in * copies) // BLOCK_M * BLOCK_M))
    # A pass for the groups' inner products stores their sums in any case: no row of tiles is whole there.
    kinds = {"samples": samples, "groups": 1 if pairs else groups, "some": not pairs, "cut": not pairs}
    config = launch_config(gpu, d_in, rows, tokens, ends, **kinds)
    kinds["some"] = config.split_last and not pairs
    split = choose_split(gpu, config.columns, d_in, rows, tokens, 1 + config.clusters, **kinds)
    return rows, config, split._replace(whole_rows=0) if pairs else split


def tile_grid(d_in: int, d_out: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of tiles of a weight, each of 128 rows and ``columns`` columns."""
    return -(-d_out // BLOCK_M), -(-d_in // columns)


def choose_split(
    gpu: Gpu,
    columns: int,
    d_in: int,
    d_out: int,
    tokens: int,
    row_step: int = 1,
    **kinds: Any,
) -> Split:
    """How the tokens of a pass over ``d_out`` rows of the weight are split; see :func:`.splits.choose`."""
    grid = tile_grid(d_in, d_out, columns)
    return splits.choose(gpu.arch, *grid, d_in, tokens, gpu.multiprocessors, row_step=row_step, **kinds)


def launch_config(gpu: Gpu, d_in: int, d_out: int, tokens: int, ends: int = 0, **kinds: Any) -> CudaConfig:
    """The tile and its order for a pass over ``d_out`` rows of the weight. ``ends``: of samples that are measured."""
    return cuda_config(
        gpu.arch,
        gpu.columns,
        gpu.shared_memory,
        lambda columns: choose_split(gpu, columns, d_in, d_out, tokens, **kinds).price,
        ends / tokens,
    )


def _pass(
    context: LaunchContext,
    config: CudaConfig,
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    weight_grad: Tensor | None,
    whole_rows: int,
    store_sums: bool,
) -> tuple[SquareSums, SquareSums | None]:
    """One pass over rows of the weight: squares of wgrad, and what the fix-up finds, inner products included.

    The upper ``whole_rows`` rows of tiles are whole; the fix-up has the rest of the weight.
    """
    d_in, d_out = x.shape[1], dy.shape[1]
    above = min(whole_rows * BLOCK_M, d_out)
    whole, split = (None, None) if weight_grad is None else (weight_grad[:above], weight_grad[above:])
    running = None
    if whole is not None and schedule.groups > 1:
        running = torch.empty(whole.shape, dtype=torch.float32, device=x.device)
    if schedule.fixup is None:
        return _launch(context, config, x, dy, schedule, whole_rows, None, whole, running), None
    assert schedule.wgrad is not None
    elements = (d_out - above) * d_in
    held = schedule.wgrad.splits + schedule.fixup.outer.size - 1
    workspace = torch.empty(held, elements, dtype=torch.float32, device=x.device)
    of_wgrad = _launch(context, config, x, dy, schedule, whole_rows, workspace, whole, running)
    products = store_sums and schedule.groups <= context.module.FIXUP_GROUPS
    sums, slabs = None, -(-elements // _SLAB)
    if store_sums and not products:
        # With zeros behind the last element, so that all slabs are one product.
        sums = torch.empty(schedule.groups, slabs * -(-elements // slabs), dtype=torch.float32, device=x.device)
    of_fixup = split_fixup(context, workspace, schedule, split, native.TYPES[x.dtype], products=products, sums=sums)
    if sums is not None:
        parts = sums.unflatten(1, (slabs, -1)).transpose(0, 1)
        with exact_matmuls(x.device):
            of_fixup = of_fixup._replace(products=torch.bmm(parts, parts.mT))
    return of_wgrad, of_fixup


def _launch(
    context: LaunchContext,
    config: CudaConfig,
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    whole_rows: int,
    workspace: Tensor | None,
    weight_grad: Tensor | None,
    running: Tensor | None,
) -> SquareSums:
    """One launch: the partial sums of squares per tile, of groups in the whole rows of tiles."""
    tables = schedule.wgrad
    assert tables is not None
    d_in, d_out = x.shape[1], dy.shape[1]
    name = f"wgrad_norm_sm{context.gpu.arch}"
    tile_rows, tile_columns = tile_grid(d_in, d_out, config.columns)
    rows = context.size(f"{name}_rows", d_in=d_in, d_out=d_out, block_n=config.columns)
    sample_sq = torch.empty(rows, schedule.samples, dtype=torch.float32, device=x.device)
    group_sq = None
    if whole_rows:
        group_sq = torch.empty(rows // tile_rows * whole_rows, schedule.groups, dtype=torch.float32, device=x.device)
    items = tile_columns * (whole_rows + (tile_rows - whole_rows) * tables.splits)
    context.launch(
        name,
        x=x,
        dy=dy,
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=native.TYPES[x.dtype],
        tokens=x.shape[0],
        d_in=d_in,
        d_out=d_out,
        segment_start=tables.start,
        segment_end=tables.end,
        segment_sample=tables.sample,
        segment_group=tables.group,
        segments=tables.start.size,
        samples=schedule.samples,
        groups=schedule.groups if schedule.fixup is None else schedule.fixup.outer.size,
        split_start=tables.split_start,
        splits=tables.splits,
        whole_rows=whole_rows,
        sample_sq=sample_sq,
        group_sq=group_sq,
        workspace=workspace,
        weight_grad=weight_grad,
        running=running,
        block_n=config.columns,
        group_m=config.group_m,
        staggered=config.staggered,
        cluster=cluster_size(config, tile_rows, items, context.gpu.multiprocessors),
        multiprocessors=context.gpu.multiprocessors,
    )
    return SquareSums(sample_sq, group_sq)
