"""The order of tokens for kernels that work on pairs of tokens or add up values of tokens.

Segments arrive sorted by (group, sample). Concatenated they give every token a *position*. One launch finds, for every
position, the row of x and dy that it stands for, and for every sample and group its span of positions. Every program
walks over all segments, which are few, and adds up their lengths for itself: no launch and no torch operator before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments, vectors
from .launch import on_device

#: The kernels of the configs that this module is compiled for: what it launches depends on none.
CONFIGS = ()
# Positions of a program, and segments that each of them is compared with at a time.
_POSITIONS, _SEGMENTS = 128, 32
# Samples or groups of a program, and segments that are walked over at a time.
_IDS, _CHUNK = 8, 256
_WARPS = 4


@dataclass(frozen=True)
class TokenOrder:
    """``row``, ``sample``, ``group``: [T] int32, of each position. Ids ascend with the positions as the segments' do.

    ``sample_span`` [N, 2] and ``group_span`` [K, 2] int32: first position and the one after the last; (0, 0) for none.
    """

    row: Tensor
    sample: Tensor
    group: Tensor
    sample_span: Tensor
    group_span: Tensor


def order(segments: Segments, tokens: int) -> TokenOrder:
    """The order of ``tokens`` rows that ``segments`` describe, on the segments' device."""
    samples, groups, count = segments.samples, segments.groups, segments.start.shape[0]
    sizes = [tokens, tokens, tokens, 2 * samples, 2 * groups]
    row, sample, group, sample_span, group_span = vectors(sizes, torch.int32, segments.start.device)
    found = TokenOrder(row, sample, group, sample_span.view(samples, 2), group_span.view(groups, 2))
    if not (tokens and count):
        sample_span.zero_()
        group_span.zero_()
        return found
    programs = [triton.cdiv(size, of) for size, of in ((tokens, _POSITIONS), (samples, _IDS), (groups, _IDS))]
    with on_device(row):
        token_order_kernel[(sum(programs),)](
            segments.start,
            segments.end,
            segments.sample,
            segments.group,
            row,
            sample,
            group,
            sample_span,
            group_span,
            tokens,
            count,
            samples,
            groups,
            POSITIONS=_POSITIONS,
            IDS=_IDS,
            SEGMENTS=_SEGMENTS,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return found


@triton.jit(do_not_specialize=["tokens", "segments", "samples", "groups"])
def token_order_kernel(
    start_ptr,  # [S] int64: first row of each segment
    end_ptr,  # [S] int64: the row after its last one
    segment_sample_ptr,  # [S] int32
    segment_group_ptr,  # [S] int32
    row_ptr,  # [T] int32, out
    sample_ptr,  # [T] int32, out
    group_ptr,  # [T] int32, out
    sample_span_ptr,  # [N, 2] int32, out
    group_span_ptr,  # [K, 2] int32, out
    tokens,  # T
    segments,  # S
    samples,  # N
    groups,  # K
    POSITIONS: tl.constexpr,
    IDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first programs take POSITIONS positions each, the next ones IDS samples each, the last ones IDS groups."""
    program = tl.program_id(0)
    of_positions, of_samples = tl.cdiv(tokens, POSITIONS), tl.cdiv(samples, IDS)
    if program < of_positions:
        first = program.to(tl.int64) * POSITIONS
        # The segments that end at or before the first position, and where the last of them ends.
        ended, begin, length_before = 0, first * 0, first * 0
        for base in range(0, segments, CHUNK):
            at = base + tl.arange(0, CHUNK)
            inside = at < segments
            length, end = _ends(start_ptr, end_ptr, at, inside, length_before)
            before = inside & (end <= first)
            ended += tl.sum(before.to(tl.int32), 0)
            begin = tl.maximum(begin, tl.max(tl.where(before, end, 0), 0))
            length_before += tl.sum(length, 0)
        # The same for every position, counted from ``first``, by the segments that end among the program's.
        lane = tl.arange(0, POSITIONS)
        own = tl.zeros([POSITIONS], tl.int32) + ended
        shift = tl.zeros([POSITIONS], tl.int32) + (begin - first).to(tl.int32)
        while (ended < segments) & (begin < first + POSITIONS):
            at = ended + tl.arange(0, SEGMENTS)
            inside = at < segments
            length, end = _ends(start_ptr, end_ptr, at, inside, begin)
            near = tl.minimum(end - first, POSITIONS).to(tl.int32)
            before = inside[None, :] & (near[None, :] <= lane[:, None])
            own += tl.sum(before.to(tl.int32), 1)
            shift = tl.maximum(shift, tl.max(tl.where(before, near[None, :], shift[:, None]), 1))
            ended += SEGMENTS
            begin += tl.sum(length, 0)
        # Segments that do not cover the rows make nonsense of a row: kept inside the tensors, and reported elsewhere.
        own = tl.minimum(own, segments - 1)
        row = tl.load(start_ptr + own) + (lane - shift)
        row = tl.minimum(tl.maximum(row, 0), tokens - 1)
        position = first + lane
        there = position < tokens
        tl.store(row_ptr + position, row.to(tl.int32), mask=there)
        tl.store(sample_ptr + position, tl.load(segment_sample_ptr + own), mask=there)
        tl.store(group_ptr + position, tl.load(segment_group_ptr + own), mask=there)
    elif program < of_positions + of_samples:
        of = program - of_positions
        _write_spans(
            start_ptr, end_ptr, segment_sample_ptr, sample_span_ptr, of, samples, tokens, segments, IDS, SEGMENTS
        )
    else:
        of = program - of_positions - of_samples
        _write_spans(start_ptr, end_ptr, segment_group_ptr, group_span_ptr, of, groups, tokens, segments, IDS, CHUNK)


@triton.jit
def _write_spans(
    start_ptr,
    end_ptr,
    id_ptr,
    span_ptr,
    program,
    ids,
    tokens,
    segments,
    IDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """First position and the one after the last of IDS samples or groups; (0, 0) where they have no rows."""
    own = program * IDS + tl.arange(0, IDS)
    begin = tl.zeros([IDS], tl.int32) + tokens
    stop = tl.zeros([IDS], tl.int32)
    length_before = tokens.to(tl.int64) * 0
    for base in range(0, segments, CHUNK):
        at = base + tl.arange(0, CHUNK)
        inside = at < segments
        length, end = _ends(start_ptr, end_ptr, at, inside, length_before)
        length_before += tl.sum(length, 0)
        found = tl.load(id_ptr + at, mask=inside, other=-1)
        mine = (inside & (length > 0))[None, :] & (found[None, :] == own[:, None])
        from_position = tl.minimum(end - length, tokens).to(tl.int32)
        to_position = tl.minimum(end, tokens).to(tl.int32)
        begin = tl.minimum(begin, tl.min(tl.where(mine, from_position[None, :], begin[:, None]), 1))
        stop = tl.maximum(stop, tl.max(tl.where(mine, to_position[None, :], 0), 1))
    tl.store(span_ptr + 2 * own, tl.where(stop > 0, begin, 0), mask=own < ids)
    tl.store(span_ptr + 2 * own + 1, stop, mask=own < ids)


@triton.jit
def _ends(start_ptr, end_ptr, at, inside, length_before):
    """(rows of each of these segments, the position after its last one), int64. ``length_before``: of earlier ones."""
    length = tl.load(end_ptr + at, mask=inside, other=0) - tl.load(start_ptr + at, mask=inside, other=0)
    return length, length_before + tl.cumsum(length, 0)


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = dict.fromkeys(("start_ptr", "end_ptr"), "*i64")
    types |= dict.fromkeys(("segment_sample_ptr", "segment_group_ptr", "row_ptr", "sample_ptr", "group_ptr"), "*i32")
    types |= dict.fromkeys(("sample_span_ptr", "group_span_ptr"), "*i32")
    types |= dict.fromkeys(("tokens", "segments", "samples", "groups"), "i32")
    tile = {"POSITIONS": _POSITIONS, "IDS": _IDS, "SEGMENTS": _SEGMENTS, "CHUNK": _CHUNK}
    return [(token_order_kernel, types, tile, {"num_warps": _WARPS})]
