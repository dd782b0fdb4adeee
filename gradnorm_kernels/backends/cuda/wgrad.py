"""Norms and sums from tiles of the weight's gradient: how the pass is split, launched and summed up.

The kernel (``csrc/wgrad_norm_sm80.cu``, ``csrc/wgrad_norm_sm90.cu``) goes over the tokens once and takes squares at
each sample's and group's end. Where the weight has fewer tiles than the GPU has multiprocessors, the tokens are split,
the splits' sums are stored, and a second kernel adds them before it squares. A split ends between samples; where the
samples are too few for that, it ends anywhere, and the sums of samples are what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segments
from .. import native
from ..torch.numerics import exact_matmuls
from ..torch.wgrad import gram_of_sums
from . import tables
from .launch import Machine

BLOCK_M = 128
# Bytes of stored sums. Where more would be needed, rows of the weight are done one slab after another.
_PARTS = 256 << 20
# Bytes of stored sums up to which samples are split anywhere.
_SAMPLE_PARTS = 64 << 20
# Fewer tokens than this are not worth a split.
_SPLIT_TOKENS = 256


@dataclass(frozen=True)
class Tiles:
    """How the weight is cut into tiles and walked; results differ in the order of sums at most.

    ``columns``: of d_in in a tile; None: by the shape. ``group_m``: rows of tiles that are walked together.
    ``staggered``: on Hopper a block's second consumer stays behind the first, see csrc/device/sm90_wgrad.cuh.
    """

    columns: int | None = None
    group_m: int = 8
    staggered: bool = True


_tiles = Tiles()


@contextmanager
def forced(tiles: Tiles) -> Iterator[None]:
    """Inside, the pass is launched with these tiles whatever the shape: to time them against each other."""
    global _tiles
    before, _tiles = _tiles, tiles
    try:
        yield
    finally:
        _tiles = before


class Sums(NamedTuple):
    """``sample_sq`` [N], ``group_sq`` [K], ``gram`` [K, K] or None: float64. A sample that was not measured has 0."""

    sample_sq: Tensor
    group_sq: Tensor
    gram: Tensor | None


def run(
    machine: Machine,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    gram_tokens: int,
    weight_grad: Tensor | None,
    group_gram: bool,
) -> Sums:
    """The pass over x [T, d_in] and dy [T, d_out]; samples of at most ``gram_tokens`` tokens are not measured.

    ``weight_grad`` [d_out, d_in], if given, is overwritten with the sum.
    """
    d_in, d_out, groups = x.shape[1], dy.shape[1], segments.groups
    columns = -(-d_in // block_n(machine, d_in, d_out))
    # Rows of the weight that are done at once: all, unless sums of every group are stored for each of them.
    rows = max(BLOCK_M, _PARTS // (4 * d_in * 2 * groups) // BLOCK_M * BLOCK_M) if group_gram else d_out
    wanted = splits(-(-min(rows, d_out) // BLOCK_M) * columns, len(x), machine.multiprocessors)
    few = min(segments.samples, len(segments.start))
    size = 4 * d_out * d_in
    if wanted > 1 and few < 4 * wanted and (wanted + few) * size <= _SAMPLE_PARTS and not group_gram:
        return _by_samples(machine, x, dy, segments, wanted, weight_grad)
    if not group_gram and (wanted + groups) * size > _PARTS:
        wanted = max(1, _PARTS // size - groups)
    target = segments.sample
    if gram_tokens > 0:
        target = torch.where(segments.lengths()[segments.sample] > gram_tokens, segments.sample, -1)
    items = tables.whole_samples(segments, wanted, len(x))
    if wanted == 1 and not group_gram:
        return _direct(machine, x, dy, segments, items, target, weight_grad)

    sums = _zeros(x, segments.samples), _zeros(x, groups)
    gram = _zeros(x, groups, groups) if group_gram else None
    for lo in range(0, d_out, rows):
        part = None if weight_grad is None else weight_grad[lo : lo + rows]
        found = _stored(machine, x, dy[:, lo : lo + rows], segments, items, target, part, group_gram)
        for total, value in zip(sums, found[:2], strict=True):
            total += value
        if gram is not None and found.gram is not None:
            gram += found.gram
    return Sums(*sums, gram)


def block_n(machine: Machine, d_in: int, d_out: int) -> int:
    """Columns of a tile: on Hopper 192 where that wastes no more of the last tile than 128 would."""
    if machine.arch == 80:
        return 128
    if _tiles.columns is not None:
        return _tiles.columns
    return 192 if -(-d_in // 192) * 192 <= -(-d_in // 128) * 128 else 128


def splits(tiles: int, tokens: int, multiprocessors: int) -> int:
    """How many splits: the fewest rounds of blocks, with the cost of storing sums counted against them.

    In units of one round over all tokens. What a split's tile costs to store and read again (192 KiB at 2 TB/s, against
    128 x 128 products a token at 2.9 TFLOP/s a multiprocessor) is counted from an A100's data sheet, not measured.
    """
    best, price = 1, -(-tiles // multiprocessors) * 1.0
    for count in range(2, min(multiprocessors, tokens // _SPLIT_TOKENS) + 1):
        cost = -(-tiles * count // multiprocessors) / count + 8.7 * tiles * count / tokens
        if cost < price:
            best, price = count, cost
    return best


def _direct(
    machine: Machine,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    items: tables.Items,
    target: Tensor,
    weight_grad: Tensor | None,
) -> Sums:
    """One launch, nothing stored but partial sums of squares."""
    running = None
    if weight_grad is not None and segments.groups > 1:
        running = torch.empty(weight_grad.shape, dtype=torch.float32, device=x.device)
    sample_sq, group_sq = _launch(machine, x, dy, segments, items, target, segments.groups, None, weight_grad, running)
    return Sums(_columns(machine, sample_sq), _columns(machine, group_sq), None)


def _stored(
    machine: Machine,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    items: tables.Items,
    target: Tensor,
    weight_grad: Tensor | None,
    group_gram: bool,
) -> Sums:
    """The groups' sums are stored, by splits, and squared afterwards."""
    groups, elements = segments.groups, dy.shape[1] * x.shape[1]
    parts = torch.zeros(items.splits + groups - 1, elements, dtype=torch.float32, device=x.device)
    sample_sq, _ = _launch(machine, x, dy, segments, items, target, groups, parts, None, None)
    sums = torch.zeros(groups, elements, dtype=torch.float32, device=x.device) if group_gram else None
    outer = torch.arange(groups, dtype=torch.int32, device=x.device)
    _, group_sq = _add_parts(machine, parts, items, groups, outer, groups, sums, weight_grad, native.TYPES[x.dtype])
    gram = None
    if sums is not None:
        with exact_matmuls(x.device):
            gram = gram_of_sums(sums)
        gram.diagonal().copy_(group_sq)
    return Sums(_columns(machine, sample_sq), group_sq, gram)


def _by_samples(
    machine: Machine, x: Tensor, dy: Tensor, segments: Segments, count: int, weight_grad: Tensor | None
) -> Sums:
    """The samples' sums are stored, by splits that end anywhere; the groups' are made of them."""
    items = tables.anywhere(segments, count, len(x))
    rank = tables.ranks(segments.sample)
    bound = min(segments.samples, len(segments.start))
    target = torch.full_like(items.group, -1)
    parts = torch.zeros(count + bound - 1, dy.shape[1] * x.shape[1], dtype=torch.float32, device=x.device)
    _launch(machine, x, dy, segments, items, target, bound, parts, None, None)
    # A rank that there is not belongs to no group that matters: it has nothing to add to the last one.
    outer = torch.full((bound,), segments.groups - 1, dtype=torch.int32, device=x.device)
    outer = outer.scatter_(0, rank, segments.group)
    arguments = (items, bound, outer, segments.groups, None, weight_grad, native.TYPES[x.dtype])
    by_rank, group_sq = _add_parts(machine, parts, *arguments)
    # By index_copy into one place more, which takes the ranks that there are not.
    names = torch.full((bound,), segments.samples, dtype=torch.int64, device=x.device)
    names = names.scatter_(0, rank, segments.sample.long())
    sample_sq = _zeros(x, segments.samples + 1).index_copy_(0, names, by_rank)
    return Sums(sample_sq[:-1], group_sq, None)


def _launch(
    machine: Machine,
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    items: tables.Items,
    target: Tensor,
    groups: int,
    parts: Tensor | None,
    weight_grad: Tensor | None,
    running: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sums of squares by tiles: ([rows, N], [rows, groups]) float32."""
    d_in, d_out = x.shape[1], dy.shape[1]
    width = block_n(machine, d_in, d_out)
    name = f"wgrad_norm_sm{machine.arch}"
    rows = machine.size(f"{name}_rows", d_in=d_in, d_out=d_out, block_n=width)
    # One launch fills both.
    sizes = [rows * segments.samples, rows * groups if parts is None else 0]
    sample_sq, group_sq = torch.zeros(sum(sizes), dtype=torch.float32, device=x.device).split(sizes)
    sample_sq, group_sq = sample_sq.view(rows, segments.samples), group_sq.view(-1, groups)
    machine.launch(
        name,
        x=x,
        dy=dy,
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=native.TYPES[x.dtype],
        tokens=len(x),
        d_in=d_in,
        d_out=d_out,
        item_start=items.start,
        item_end=items.end,
        item_target=target,
        item_group=items.group,
        items=len(items.start),
        samples=segments.samples,
        groups=groups,
        split_start=items.split_start,
        splits=items.splits,
        sample_sq=sample_sq,
        group_sq=group_sq if parts is None else None,
        parts=parts,
        weight_grad=weight_grad,
        running=running,
        block_n=width,
        group_m=_tiles.group_m,
        staggered=_tiles.staggered,
        multiprocessors=machine.multiprocessors,
    )
    return sample_sq, group_sq


def _add_parts(
    machine: Machine,
    parts: Tensor,
    items: tables.Items,
    groups: int,
    outer: Tensor,
    outer_groups: int,
    sums: Tensor | None,
    weight_grad: Tensor | None,
    element: int,
) -> tuple[Tensor, Tensor]:
    """(squares of the groups' sums, of the outer groups' sums): [groups], [outer_groups] float64."""
    elements = parts.shape[1]
    rows = machine.size("part_sums_rows", elements=elements)
    group_sq = torch.zeros(rows, groups, dtype=torch.float32, device=parts.device)
    outer_sq = torch.zeros(rows, outer_groups, dtype=torch.float32, device=parts.device)
    first, last = tables.split_ranges(items, groups)
    machine.launch(
        "part_sums",
        parts=parts,
        elements=elements,
        split_first=first,
        split_last=last,
        outer=outer,
        groups=groups,
        outer_groups=outer_groups,
        group_sq=group_sq,
        outer_sq=outer_sq,
        sums=sums,
        type=element,
        weight_grad=weight_grad,
    )
    return _columns(machine, group_sq), _columns(machine, outer_sq)


def _columns(machine: Machine, partial: Tensor) -> Tensor:
    # Every column is written.
    out = torch.empty(partial.shape[1], dtype=torch.float64, device=partial.device)
    if partial.shape[1]:
        machine.launch("column_sums", partial=partial, rows=partial.shape[0], columns=partial.shape[1], out=out)
    return out


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
