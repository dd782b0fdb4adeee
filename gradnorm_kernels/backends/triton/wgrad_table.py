"""The order of work of segmented wgrad: a flat list of token blocks, made on the device from the segments.

A *block* is up to BLOCK_K consecutive rows that belong together; the blocks are in the order of (group, sample). Their
number is known on the device only, so the arrays have the room of the worst case. One program makes the whole list:
it is short, and no launch waits for another. A kernel then walks one flat loop over the blocks, and a block's flags say
what ends behind it, so that loads run ahead across the ends of samples.

Samples of at most ``gram_tokens`` tokens are not *measured*: nothing stops at their ends, and where they are neighbours
in memory one block may hold several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments, vectors
from ...tuning.costs import KernelConfig
from .rows import on_device

# What ends behind a block. MEASURED: a sample whose norm is taken. FLUSH: rows that are only added up. GROUP_ENDS: a
# group (one of the other two is set as well).
MEASURED = tl.constexpr(1)
FLUSH = tl.constexpr(2)
GROUP_ENDS = tl.constexpr(4)
# A block in one number: first row << ROW_SHIFT | flags << FLAG_SHIFT | rows.
ROW_SHIFT = tl.constexpr(20)
FLAG_SHIFT = tl.constexpr(16)
ROWS_MASK = tl.constexpr(0xFFFF)
# Where a sample's or a group's squared norm is: nowhere (it is 0), among the partials, or from CUT on among the joined
# ones, in the place of the split that holds its end.
ABSENT = tl.constexpr(0)
WHOLE = tl.constexpr(1)
CUT = tl.constexpr(2)

_CHUNK = 1024
_WARPS = 8

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


@dataclass(frozen=True)
class Table:
    """The list of blocks, and where the norms will be.

    ``blocks``: [most + 1] int64, packed as above, a zero behind the last. ``owner``: [most] int32, the sample that a
    block belongs to, or -1 if it is not measured. ``group``: [most] int32. ``count``: [1] int32, the number of blocks.
    ``state``: [N + K] int32: ABSENT, WHOLE or CUT + split, of each sample and then of each group.
    ``splits``: into how many even parts the list is cut.
    """

    blocks: Tensor
    owner: Tensor
    group: Tensor
    count: Tensor
    state: Tensor
    splits: int


def build(segments: Segments, tokens: int, gram_tokens: int, block_k: int, splits: int) -> Table:
    """The table for at least one segment. ``tokens`` is T, ``splits`` the number of even parts."""
    count = segments.start.shape[0]
    most = tokens // block_k + count
    device = segments.start.device
    blocks, spans = vectors([most + 1, 4 * count], torch.int64, device)
    sizes = [most, most, 1, segments.samples + segments.groups, 5 * count]
    owner, group, number, state, runs = vectors(sizes, torch.int32, device)
    lengths = segments.lengths() if gram_tokens else segments.start
    with on_device(blocks):
        table_kernel[(1,)](
            segments.start,
            segments.end,
            segments.sample,
            segments.group,
            lengths,
            spans,
            runs,
            blocks,
            owner,
            group,
            number,
            state,
            count,
            segments.samples,
            segments.groups,
            gram_tokens,
            splits,
            ALL_MEASURED=gram_tokens == 0,
            BLOCK_K=block_k,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return Table(blocks, owner, group, number, state, splits)


@triton.jit(do_not_specialize=["segments", "samples", "groups", "gram_tokens", "splits"])
def table_kernel(
    start_ptr,  # [S] int64
    end_ptr,  # [S] int64
    sample_ptr,  # [S] int32
    group_ptr,  # [S] int32
    length_ptr,  # [N] int64: tokens of each sample; read unless ALL_MEASURED
    span_ptr,  # [4, S] int64, scratch: start and end of the segments with rows, then of the runs
    run_ptr,  # [5, S] int32, scratch: owner and group of the segments with rows, then of the runs, and first blocks
    block_ptr,  # [most + 1] int64, out
    block_owner_ptr,  # [most] int32, out
    block_group_ptr,  # [most] int32, out
    count_ptr,  # [1] int32, out
    state_ptr,  # [N + K] int32, out
    segments,  # S
    samples,  # N
    groups,  # K
    gram_tokens,
    splits,
    ALL_MEASURED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    lane = tl.arange(0, CHUNK)
    run_start_ptr, run_end_ptr = span_ptr + 2 * segments, span_ptr + 3 * segments
    run_owner_ptr, run_group_ptr = run_ptr + 2 * segments, run_ptr + 3 * segments
    run_block_ptr = run_ptr + 4 * segments

    # Segments with rows, close together.
    filled = 0
    for base in range(0, segments, CHUNK):
        at = base + lane
        inside = at < segments
        start = tl.load(start_ptr + at, mask=inside, other=0)
        end = tl.load(end_ptr + at, mask=inside, other=0)
        owner = tl.load(sample_ptr + at, mask=inside, other=0)
        group = tl.load(group_ptr + at, mask=inside, other=0)
        if not ALL_MEASURED:
            length = tl.load(length_ptr + owner, mask=inside, other=0)
            owner = tl.where(length > gram_tokens, owner, -1)
        kept = inside & (end > start)
        to = filled + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(span_ptr + to, start, mask=kept)
        tl.store(span_ptr + segments + to, end, mask=kept)
        tl.store(run_ptr + to, owner, mask=kept)
        tl.store(run_ptr + segments + to, group, mask=kept)
        filled += tl.sum(kept.to(tl.int32), 0)
    for base in range(0, samples + groups, CHUNK):
        at = base + lane
        tl.store(state_ptr + at, tl.zeros([CHUNK], tl.int32) + ABSENT, mask=at < samples + groups)
    tl.debug_barrier()

    # Runs: neighbours in memory of one sample, or unmeasured ones of one group.
    runs = 0
    for base in range(0, filled, CHUNK):
        at = base + lane
        inside = at < filled
        later = at + 1 < filled
        earlier = inside & (at > 0)
        start = tl.load(span_ptr + at, mask=inside, other=0)
        end = tl.load(span_ptr + segments + at, mask=inside, other=0)
        owner = tl.load(run_ptr + at, mask=inside, other=0)
        group = tl.load(run_ptr + segments + at, mask=inside, other=0)
        joins = earlier & (tl.load(span_ptr + segments + at - 1, mask=earlier, other=0) == start)
        joins = joins & (tl.load(run_ptr + at - 1, mask=earlier, other=0) == owner)
        joins = joins & (tl.load(run_ptr + segments + at - 1, mask=earlier, other=0) == group)
        goes_on = later & (tl.load(span_ptr + at + 1, mask=later, other=0) == end)
        goes_on = goes_on & (tl.load(run_ptr + at + 1, mask=later, other=0) == owner)
        goes_on = goes_on & (tl.load(run_ptr + segments + at + 1, mask=later, other=0) == group)
        first = inside & (joins == 0)
        to = runs + tl.cumsum(first.to(tl.int32), 0) - 1
        tl.store(run_start_ptr + to, start, mask=first)
        tl.store(run_owner_ptr + to, owner, mask=first)
        tl.store(run_group_ptr + to, group, mask=first)
        tl.store(run_end_ptr + to, end, mask=inside & (goes_on == 0))
        runs += tl.sum(first.to(tl.int32), 0)
    tl.debug_barrier()

    count = 0
    for base in range(0, runs, CHUNK):
        at = base + lane
        inside = at < runs
        rows = tl.load(run_end_ptr + at, mask=inside, other=0) - tl.load(run_start_ptr + at, mask=inside, other=0)
        needed = tl.cdiv(rows, BLOCK_K).to(tl.int32)
        tl.store(run_block_ptr + at, count + tl.cumsum(needed, 0) - needed, mask=inside)
        count += tl.sum(needed, 0)
    tl.store(count_ptr, count)
    tl.store(block_ptr + count, count.to(tl.int64) * 0)
    tl.debug_barrier()

    span = 1
    while span < runs:
        span *= 2
    for base in range(0, count, CHUNK):
        at = base + lane
        inside = at < count
        run = _last_at_most(run_block_ptr, runs, span, at)
        row = tl.load(run_start_ptr + run, mask=inside, other=0)
        row += (at - tl.load(run_block_ptr + run, mask=inside, other=0)).to(tl.int64) * BLOCK_K
        left = tl.load(run_end_ptr + run, mask=inside, other=0) - row
        owner = tl.load(run_owner_ptr + run, mask=inside, other=0)
        group = tl.load(run_group_ptr + run, mask=inside, other=0)
        later = inside & (run + 1 < runs)
        next_owner = tl.load(run_owner_ptr + run + 1, mask=later, other=-1)
        next_group = tl.load(run_group_ptr + run + 1, mask=later, other=-1)
        run_ends = left <= BLOCK_K
        group_ends = run_ends & (next_group != group)
        measured = run_ends & (owner >= 0) & (group_ends | (next_owner != owner))
        flush = run_ends & (owner < 0) & (group_ends | (next_owner >= 0))
        flags = measured.to(tl.int64) * MEASURED + flush.to(tl.int64) * FLUSH + group_ends.to(tl.int64) * GROUP_ENDS
        rows = tl.minimum(left, BLOCK_K)
        tl.store(block_ptr + at, (row << ROW_SHIFT) | (flags << FLAG_SHIFT) | rows, mask=inside)
        tl.store(block_owner_ptr + at, owner, mask=inside)
        tl.store(block_group_ptr + at, group, mask=inside)
    tl.debug_barrier()

    # A sample or group is cut if the block before the part that holds its end is its own, too.
    for base in range(0, count, CHUNK):
        at = base + lane
        inside = at < count
        flags = (tl.load(block_ptr + at, mask=inside, other=0) >> FLAG_SHIFT) & 15
        owner = tl.load(block_owner_ptr + at, mask=inside, other=0)
        group = tl.load(block_group_ptr + at, mask=inside, other=0)
        split = ((at + 1).to(tl.int64) * splits - 1) // tl.maximum(count, 1)
        before = split * count // splits - 1
        earlier = inside & (before >= 0)
        cut = earlier & (tl.load(block_owner_ptr + before, mask=earlier, other=-1) == owner)
        state = tl.where(cut, CUT + split, WHOLE).to(tl.int32)
        tl.store(state_ptr + owner, state, mask=inside & ((flags & MEASURED) != 0))
        cut = earlier & (tl.load(block_group_ptr + before, mask=earlier, other=-1) == group)
        # A lone group is always joined.
        cut = cut | (inside & (groups == 1) & (splits > 1))
        state = tl.where(cut, CUT + split, WHOLE).to(tl.int32)
        tl.store(state_ptr + samples + group, state, mask=inside & ((flags & GROUP_ENDS) != 0))


@triton.jit
def _last_at_most(values_ptr, count, span, wanted):
    """The last place of ascending ``values`` [count], the first of them 0, that holds at most ``wanted``."""
    found = wanted * 0
    while span > 0:
        tried = found + span
        fits = tried < count
        fits = fits & (tl.load(values_ptr + tried, mask=fits, other=0) <= wanted)
        found = tl.where(fits, tried, found)
        span = span // 2
    return found


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    wide = ("start_ptr", "end_ptr", "length_ptr", "span_ptr", "block_ptr")
    narrow = ("sample_ptr", "group_ptr", "run_ptr", "block_owner_ptr", "block_group_ptr", "count_ptr", "state_ptr")
    types = dict.fromkeys(wide, "*i64") | dict.fromkeys(narrow, "*i32")
    types |= dict.fromkeys(("segments", "samples", "groups", "gram_tokens", "splits"), "i32")
    tile = {"BLOCK_K": config.block_k, "CHUNK": _CHUNK}
    options = {"num_warps": _WARPS}
    return [(table_kernel, types, {"ALL_MEASURED": measured} | tile, options) for measured in (False, True)]
