"""The schedule of segmented wgrad: a flat list of K tiles in the order of (group, sample), made on the device.

A *K tile* is up to BLOCK_K consecutive rows of one sample. The number of K tiles is known on the device only, so the
arrays have room for the worst case. One program makes the whole list: it is short, and no launch waits for another. The
wgrad kernels then walk one flat loop over the K tiles. The flags of a K tile say what ends behind it, so that loads run
ahead across the ends of samples.

:class:`ShortSamples` are not measured: nothing is squared at their ends, and where they are neighbours in memory one K
tile may hold several of them.

With few output tiles the schedule is cut into even *splits*, wherever that cuts samples and groups. The partial sums of
what is cut are added by the split-K fix-up (:mod:`.reduce`) before they are squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import PlainSegments, Segments, vectors
from ...tuning.tiles import KernelConfig
from .launch import on_device

# What ends behind a K tile. SAMPLE_ENDS: a sample that is measured. UNMEASURED_ENDS: rows that are only added up.
# GROUP_ENDS: a group; one of the other two is set as well.
SAMPLE_ENDS = tl.constexpr(1)
UNMEASURED_ENDS = tl.constexpr(2)
GROUP_ENDS = tl.constexpr(4)
# A K tile in one number: first row << ROW_SHIFT | flags << FLAG_SHIFT | rows.
ROW_SHIFT = tl.constexpr(20)
FLAG_SHIFT = tl.constexpr(16)
ROWS_MASK = tl.constexpr(0xFFFF)
# Where the squared norm of a sample or a group is found: nowhere (it is 0), in the partial sums, or from IN_FIXUP on in
# the fix-up's partial sums, in the row of the split that holds its end.
ABSENT = tl.constexpr(0)
IN_PARTIALS = tl.constexpr(1)
IN_FIXUP = tl.constexpr(2)

_CHUNK = 1024
_WARPS = 8

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


class ShortSamples(NamedTuple):
    """Samples of at most ``tokens`` tokens: wgrad does not measure them, their norms are known from pairs of tokens.

    ``norms`` [N] float64, 0 for the others. ``spans`` [N, 2] int32, of all samples (:mod:`.token_order`).
    """

    tokens: int
    norms: Tensor
    spans: Tensor


@dataclass(frozen=True)
class Schedule:
    """The list of K tiles, and where the norms will be.

    ``k_tiles``: [most + 1] int64, packed as above, a zero behind the last. ``sample``: [most] int32, the sample of a
    K tile, -1 if it is not measured. ``group``: [most] int32. ``count``: [2] int32, the number of K tiles, and 1 if the
    values of the index tensors were in range, else 0.
    ``state``: [N + K] int32: ABSENT, IN_PARTIALS or IN_FIXUP + split, of each sample and then of each group.
    ``runs``: [S + 2] int32: the number of runs, the first K tile of each, and where the last one ends. A *run* is the
    K tiles up to one with flags: a sample, or neighbours whose norms are not measured.
    ``splits``: the number of even parts that the list is cut into.
    """

    k_tiles: Tensor
    sample: Tensor
    group: Tensor
    count: Tensor
    state: Tensor
    runs: Tensor
    splits: int


def build(
    segments: Segments | PlainSegments,
    tokens: int,
    short: ShortSamples | None,
    block_k: int,
    splits: int,
    device: torch.device,
) -> Schedule:
    """The schedule of at least one segment. ``tokens`` is T, ``splits`` the number of even parts.

    With plain segments every sample is measured: ``short`` must be None.
    """
    plain = isinstance(segments, PlainSegments)
    count = segments.samples if isinstance(segments, PlainSegments) else segments.start.shape[0]
    most = tokens // block_k + count
    k_tiles, bounds = vectors([most + 1, 4 * count], torch.int64, device)
    sizes = [most, most, 2, segments.samples + segments.groups, count + 2, 5 * count]
    sample, group, number, state, runs, ids = vectors(sizes, torch.int32, device)
    length, valid = 0, None
    start, end, of_sample, of_group = bounds, bounds, ids, ids
    if isinstance(segments, PlainSegments):
        assert short is None
        length = segments.length
        start = bounds if segments.offsets is None else segments.offsets
    else:
        start, end, of_sample, of_group = segments.start, segments.end, segments.sample, segments.group
        valid = None if segments.valid is None else segments.valid.view(torch.uint8)
    with on_device(k_tiles):
        schedule_kernel[(1,)](
            start,
            end,
            of_sample,
            of_group,
            ids if short is None else short.spans,
            ids if valid is None else valid,
            bounds,
            ids,
            k_tiles,
            sample,
            group,
            number,
            state,
            runs,
            count,
            segments.samples,
            segments.groups,
            tokens,
            length,
            0 if short is None else min(short.tokens, tokens),
            splits,
            PLAIN=plain,
            OFFSETS=plain and start is not bounds,
            CHECKED=valid is None,
            ALL_MEASURED=short is None,
            BLOCK_K=block_k,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return Schedule(k_tiles, sample, group, number, state, runs, splits)


@triton.jit
def tile_position(tile, d_in, d_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of an output tile. GROUP_M rows of tiles are walked together: neighbours share operands in L2."""
    rows = tl.cdiv(d_out, BLOCK_M)
    band = GROUP_M * tl.cdiv(d_in, BLOCK_N)
    first = tile // band * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    return first + tile % band % height, tile % band // height


@triton.jit
def inside_matrix(tile, row, column, d_in, d_out, EDGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile with zeros outside the matrix, for what is squared, summed or multiplied again.

    Outside, products have the padding of one operand as a factor: 0, but NaN where the other one is infinite.
    """
    if EDGES:
        # Counted from the tile's corner: constants are compared, where the matrix's columns would take a register each.
        width = tl.where(tl.arange(0, BLOCK_M) < d_out - row * BLOCK_M, d_in - column * BLOCK_N, 0)
        return tl.where(tl.arange(0, BLOCK_N)[None, :] < width[:, None], tile, 0.0)
    else:
        return tile


@triton.jit
def split_start(count, split, splits):
    """The first of a split's K tiles. The split ends where the next one starts."""
    return (count.to(tl.int64) * split // splits).to(tl.int32)


@triton.jit
def carried_in(k_tile_ptr, k_sample_ptr, first):
    """Whether the (measured) sample and the group of K tile ``first`` began before it: two int32."""
    earlier = first > 0
    packed = tl.load(k_tile_ptr + first - 1, mask=earlier, other=0)
    flags = (packed >> FLAG_SHIFT) & 15
    sample_before = tl.load(k_sample_ptr + first - 1, mask=earlier, other=-1)
    sample = earlier & (flags == 0) & (sample_before >= 0)
    group = earlier & ((flags & GROUP_ENDS) == 0)
    return sample.to(tl.int32), group.to(tl.int32)


@triton.jit(
    do_not_specialize=["segments", "samples", "groups", "tokens", "even_length", "short_tokens", "splits"],
    do_not_specialize_on_alignment=["start_ptr"],  # cu_seqlens may be a slice
)
def schedule_kernel(
    start_ptr,  # [S] int64; with OFFSETS [S + 1] int32 or int64: cu_seqlens
    end_ptr,  # [S] int64; read unless PLAIN, like the next two
    sample_ptr,  # [S] int32
    group_ptr,  # [S] int32
    span_ptr,  # [N, 2] int32: positions of each sample; read unless ALL_MEASURED
    valid_ptr,  # [] uint8: whether all values are in range; read unless CHECKED or PLAIN
    bounds_ptr,  # [4, S] int64, workspace: start and end of the segments with rows, then of the merged ones
    ids_ptr,  # [5, S] int32, workspace: sample and group of the same, then the merged ones' first K tiles
    k_tile_ptr,  # [most + 1] int64, out
    k_sample_ptr,  # [most] int32, out
    k_group_ptr,  # [most] int32, out
    count_ptr,  # [2] int32, out
    state_ptr,  # [N + K] int32, out
    run_ptr,  # [S + 2] int32, out
    segments,  # S
    samples,  # N
    groups,  # K
    tokens,  # T
    even_length,  # rows of a segment, where PLAIN without OFFSETS
    short_tokens,  # samples of so many tokens are not measured
    splits,
    PLAIN: tl.constexpr,  # segment s is sample s, of one group
    OFFSETS: tl.constexpr,
    CHECKED: tl.constexpr,  # the host has seen all values, or the kernel looks at them itself
    ALL_MEASURED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    lane = tl.arange(0, CHUNK)
    merged_start_ptr, merged_end_ptr = bounds_ptr + 2 * segments, bounds_ptr + 3 * segments
    merged_sample_ptr, merged_group_ptr = ids_ptr + 2 * segments, ids_ptr + 3 * segments
    merged_first_ptr = ids_ptr + 4 * segments

    valid = 1
    if OFFSETS:
        wrong = tl.zeros([CHUNK], tl.int32)
        for base in range(0, segments, CHUNK):
            at = base + lane
            inside = at < segments
            start = tl.load(start_ptr + at, mask=inside, other=0).to(tl.int64)
            end = tl.load(start_ptr + at + 1, mask=inside, other=0).to(tl.int64)
            bad = (start < 0) | (end < start) | (end > tokens)
            bad = bad | ((at == 0) & (start != 0)) | ((at == segments - 1) & (end != tokens))
            wrong |= (inside & bad).to(tl.int32)
        valid = (tl.sum(wrong, 0) == 0).to(tl.int32)
    elif not (CHECKED or PLAIN):
        valid = (tl.load(valid_ptr) != 0).to(tl.int32)
    tl.store(count_ptr + 1, valid)

    # Segments that have rows, without gaps.
    filled = 0
    for base in range(0, segments, CHUNK):
        at = base + lane
        inside = at < segments
        if PLAIN:
            sample, group = at, at * 0
            if OFFSETS:
                # Where a value is out of range the first segment has all rows, and every result will be NaN.
                start = tl.load(start_ptr + at, mask=inside & (valid != 0), other=0).to(tl.int64)
                end = tl.load(start_ptr + at + 1, mask=inside & (valid != 0), other=0).to(tl.int64)
                end = tl.where((valid == 0) & (at == 0), tokens, end)
            else:
                start = at.to(tl.int64) * even_length
                end = start + even_length
        else:
            start = tl.load(start_ptr + at, mask=inside, other=0)
            end = tl.load(end_ptr + at, mask=inside, other=0)
            sample = tl.load(sample_ptr + at, mask=inside, other=0)
            group = tl.load(group_ptr + at, mask=inside, other=0)
        if not ALL_MEASURED:
            begin = tl.load(span_ptr + 2 * sample, mask=inside, other=0)
            stop = tl.load(span_ptr + 2 * sample + 1, mask=inside, other=0)
            sample = tl.where(stop - begin > short_tokens, sample, -1)
        kept = inside & (end > start)
        to = filled + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(bounds_ptr + to, start, mask=kept)
        tl.store(bounds_ptr + segments + to, end, mask=kept)
        tl.store(ids_ptr + to, sample, mask=kept)
        tl.store(ids_ptr + segments + to, group, mask=kept)
        filled += tl.sum(kept.to(tl.int32), 0)
    for base in range(0, samples + groups, CHUNK):
        at = base + lane
        tl.store(state_ptr + at, tl.zeros([CHUNK], tl.int32) + ABSENT, mask=at < samples + groups)
    tl.debug_barrier()

    # Merge neighbours in memory: of one sample, or unmeasured ones of one group.
    merged = 0
    for base in range(0, filled, CHUNK):
        at = base + lane
        inside = at < filled
        later = at + 1 < filled
        earlier = inside & (at > 0)
        start = tl.load(bounds_ptr + at, mask=inside, other=0)
        end = tl.load(bounds_ptr + segments + at, mask=inside, other=0)
        sample = tl.load(ids_ptr + at, mask=inside, other=0)
        group = tl.load(ids_ptr + segments + at, mask=inside, other=0)
        joins = earlier & (tl.load(bounds_ptr + segments + at - 1, mask=earlier, other=0) == start)
        joins = joins & (tl.load(ids_ptr + at - 1, mask=earlier, other=0) == sample)
        joins = joins & (tl.load(ids_ptr + segments + at - 1, mask=earlier, other=0) == group)
        continues = later & (tl.load(bounds_ptr + at + 1, mask=later, other=0) == end)
        continues = continues & (tl.load(ids_ptr + at + 1, mask=later, other=0) == sample)
        continues = continues & (tl.load(ids_ptr + segments + at + 1, mask=later, other=0) == group)
        first = inside & (joins == 0)
        to = merged + tl.cumsum(first.to(tl.int32), 0) - 1
        tl.store(merged_start_ptr + to, start, mask=first)
        tl.store(merged_sample_ptr + to, sample, mask=first)
        tl.store(merged_group_ptr + to, group, mask=first)
        tl.store(merged_end_ptr + to, end, mask=inside & (continues == 0))
        merged += tl.sum(first.to(tl.int32), 0)
    tl.debug_barrier()

    count = 0
    for base in range(0, merged, CHUNK):
        at = base + lane
        inside = at < merged
        rows = tl.load(merged_end_ptr + at, mask=inside, other=0) - tl.load(merged_start_ptr + at, mask=inside, other=0)
        needed = tl.cdiv(rows, BLOCK_K).to(tl.int32)
        tl.store(merged_first_ptr + at, count + tl.cumsum(needed, 0) - needed, mask=inside)
        count += tl.sum(needed, 0)
    tl.store(count_ptr, count)
    tl.store(k_tile_ptr + count, count.to(tl.int64) * 0)
    tl.debug_barrier()

    runs = 0
    tl.store(run_ptr + 1, 0)
    span = 1
    while span < merged:
        span *= 2
    for base in range(0, count, CHUNK):
        at = base + lane
        inside = at < count
        segment = _last_at_most(merged_first_ptr, merged, span, at)
        row = tl.load(merged_start_ptr + segment, mask=inside, other=0)
        row += (at - tl.load(merged_first_ptr + segment, mask=inside, other=0)).to(tl.int64) * BLOCK_K
        left = tl.load(merged_end_ptr + segment, mask=inside, other=0) - row
        sample = tl.load(merged_sample_ptr + segment, mask=inside, other=0)
        group = tl.load(merged_group_ptr + segment, mask=inside, other=0)
        later = inside & (segment + 1 < merged)
        next_sample = tl.load(merged_sample_ptr + segment + 1, mask=later, other=-1)
        next_group = tl.load(merged_group_ptr + segment + 1, mask=later, other=-1)
        ends = left <= BLOCK_K
        group_ends = ends & (next_group != group)
        measured = ends & (sample >= 0) & (group_ends | (next_sample != sample))
        unmeasured = ends & (sample < 0) & (group_ends | (next_sample >= 0))
        flags = measured.to(tl.int64) * SAMPLE_ENDS + unmeasured.to(tl.int64) * UNMEASURED_ENDS
        flags += group_ends.to(tl.int64) * GROUP_ENDS
        rows = tl.minimum(left, BLOCK_K)
        tl.store(k_tile_ptr + at, (row << ROW_SHIFT) | (flags << FLAG_SHIFT) | rows, mask=inside)
        tl.store(k_sample_ptr + at, sample, mask=inside)
        tl.store(k_group_ptr + at, group, mask=inside)
        ended = inside & (flags != 0)
        tl.store(run_ptr + 1 + runs + tl.cumsum(ended.to(tl.int32), 0), at + 1, mask=ended)
        runs += tl.sum(ended.to(tl.int32), 0)
    tl.store(run_ptr, runs)
    tl.debug_barrier()

    # A sample or group is cut if the K tile before the split that holds its end belongs to it, too.
    for base in range(0, count, CHUNK):
        at = base + lane
        inside = at < count
        flags = (tl.load(k_tile_ptr + at, mask=inside, other=0) >> FLAG_SHIFT) & 15
        sample = tl.load(k_sample_ptr + at, mask=inside, other=0)
        group = tl.load(k_group_ptr + at, mask=inside, other=0)
        split = ((at + 1).to(tl.int64) * splits - 1) // tl.maximum(count, 1)
        before = split * count // splits - 1
        earlier = inside & (before >= 0)
        cut = earlier & (tl.load(k_sample_ptr + before, mask=earlier, other=-1) == sample)
        state = tl.where(cut, IN_FIXUP + split, IN_PARTIALS).to(tl.int32)
        tl.store(state_ptr + sample, state, mask=inside & ((flags & SAMPLE_ENDS) != 0))
        cut = earlier & (tl.load(k_group_ptr + before, mask=earlier, other=-1) == group)
        # A single group always goes through the fix-up.
        cut = cut | (inside & (groups == 1) & (splits > 1))
        state = tl.where(cut, IN_FIXUP + split, IN_PARTIALS).to(tl.int32)
        tl.store(state_ptr + samples + group, state, mask=inside & ((flags & GROUP_ENDS) != 0))


@triton.jit
def _last_at_most(values_ptr, count, span, wanted):
    """The last index at which ascending ``values`` [count], the first of them 0, are at most ``wanted``."""
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
    wide = ("start_ptr", "end_ptr", "bounds_ptr", "k_tile_ptr")
    narrow = (
        "sample_ptr",
        "group_ptr",
        "span_ptr",
        "ids_ptr",
        "k_sample_ptr",
        "k_group_ptr",
        "count_ptr",
        "state_ptr",
        "run_ptr",
    )
    types = dict.fromkeys(wide, "*i64") | dict.fromkeys(narrow, "*i32") | {"valid_ptr": "*u8"}
    types |= dict.fromkeys(("segments", "samples", "groups", "tokens", "even_length", "short_tokens", "splits"), "i32")
    tile = {"BLOCK_K": config.block_k, "CHUNK": _CHUNK}
    options = {"num_warps": _WARPS}
    found = []
    for start, plain, offsets, measured in (
        ("*i64", True, False, True),
        ("*i32", True, True, True),
        ("*i64", True, True, True),
        ("*i64", False, False, True),
        ("*i64", False, False, False),
    ):
        form = {"PLAIN": plain, "OFFSETS": offsets, "CHECKED": plain, "ALL_MEASURED": measured}
        found.append((schedule_kernel, types | {"start_ptr": start}, form | tile, options))
    return found
