"""The table of segments from index tensors on the device: one launch checks and sorts them.

A segment's place is the number of segments that come before it: every program counts them for its own, against all.
That is quadratic in the number of segments, which are few, and the same whatever the order of programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...segments import IndexTensors, Segments
from .launch import on_device

_ROWS, _COLUMNS = 32, 128  # segments of a program, and what they are compared with at a time
_WARPS = 4
#: The kernels of the configs that this module is compiled for.
CONFIGS = ()


def sort(given: IndexTensors) -> Segments:
    """Segments in the order of (group, sample). ``valid`` is False where a value is out of range."""
    table = given.empty_table()
    assert table.valid is not None
    unused = table.sample
    with on_device(unused):
        segment_table_kernel[(triton.cdiv(given.segments, _ROWS),)](
            unused if given.cu_seqlens is None else given.cu_seqlens,
            unused if given.sample_ids is None else given.sample_ids,
            unused if given.group_ids is None else given.group_ids,
            table.start,
            table.end,
            table.sample,
            table.group,
            table.valid.view(torch.uint8),
            given.segments,
            given.samples,
            given.groups,
            given.tokens,
            given.length,
            OFFSETS=given.cu_seqlens is not None,
            SAMPLE_IDS=given.sample_ids is not None,
            GROUP_IDS=given.group_ids is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return table


@triton.jit(
    do_not_specialize=["segments", "samples", "groups", "tokens", "length"],
    do_not_specialize_on_alignment=["offset_ptr", "sample_id_ptr", "group_id_ptr"],  # they may be slices
)
def segment_table_kernel(
    offset_ptr,  # [S + 1] int32 or int64: cu_seqlens; read if OFFSETS
    sample_id_ptr,  # [S] int32 or int64; read if SAMPLE_IDS
    group_id_ptr,  # [N] int32 or int64; read if GROUP_IDS
    start_ptr,  # [S] int64, out
    end_ptr,  # [S] int64, out
    sample_ptr,  # [S] int32, out
    group_ptr,  # [S] int32, out
    valid_ptr,  # [] uint8, out
    segments,  # S
    samples,  # N
    groups,  # K
    tokens,  # T
    length,  # rows of a segment, without OFFSETS
    OFFSETS: tl.constexpr,
    SAMPLE_IDS: tl.constexpr,
    GROUP_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per ROWS segments."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, _ = _key(sample_id_ptr, group_id_ptr, row, segments, samples, groups, SAMPLE_IDS, GROUP_IDS)
    before = tl.zeros([ROWS], tl.int32)
    wrong = tl.zeros([COLUMNS], tl.int32)
    for base in range(0, segments, COLUMNS):
        at = base + tl.arange(0, COLUMNS)
        inside = at < segments
        key, bad = _key(sample_id_ptr, group_id_ptr, at, segments, samples, groups, SAMPLE_IDS, GROUP_IDS)
        if OFFSETS:
            start = tl.load(offset_ptr + at, mask=inside, other=0).to(tl.int64)
            end = tl.load(offset_ptr + at + 1, mask=inside, other=0).to(tl.int64)
            bad = bad | (start < 0) | (end < start) | (end > tokens)
            bad = bad | ((at == 0) & (start != 0)) | ((at == segments - 1) & (end != tokens))
        wrong |= (inside & bad).to(tl.int32)
        earlier = (key[None, :] < own[:, None]) | ((key[None, :] == own[:, None]) & (at[None, :] < row[:, None]))
        before += tl.sum((inside[None, :] & earlier).to(tl.int32), 1)
    if GROUP_IDS:  # of samples that no segment names, too
        for base in range(0, samples, COLUMNS):
            at = base + tl.arange(0, COLUMNS)
            group = tl.load(group_id_ptr + at, mask=at < samples, other=0).to(tl.int64)
            wrong |= ((at < samples) & ((group < 0) | (group >= groups))).to(tl.int32)
    valid = tl.sum(wrong, 0) == 0
    if tl.program_id(0) == 0:
        tl.store(valid_ptr, valid.to(tl.uint8))

    inside = row < segments
    if OFFSETS:
        start = tl.load(offset_ptr + row, mask=inside, other=0).to(tl.int64)
        end = tl.load(offset_ptr + row + 1, mask=inside, other=0).to(tl.int64)
    else:
        start = row.to(tl.int64) * length
        end = start + length
    # Where a value is out of range the first segment of the table has all rows, and every result will be NaN.
    all_rows = tl.zeros([ROWS], tl.int64) + tokens
    start = tl.where(valid, start, tl.where(before == 0, all_rows * 0, all_rows))
    end = tl.where(valid, end, all_rows)
    tl.store(start_ptr + before, start, mask=inside)
    tl.store(end_ptr + before, end, mask=inside)
    tl.store(sample_ptr + before, (own % samples).to(tl.int32), mask=inside)
    tl.store(group_ptr + before, (own // samples).to(tl.int32), mask=inside)


@triton.jit
def _key(
    sample_id_ptr,
    group_id_ptr,
    at,
    segments,
    samples,
    groups,
    SAMPLE_IDS: tl.constexpr,
    GROUP_IDS: tl.constexpr,
):
    """(group N + sample of segments ``at``, whether an id is out of range: it is then the nearest one that is not)."""
    inside = at < segments
    sample = at.to(tl.int64)
    if SAMPLE_IDS:
        sample = tl.load(sample_id_ptr + at, mask=inside, other=0).to(tl.int64)
    bad = (sample < 0) | (sample >= samples)
    sample = tl.minimum(tl.maximum(sample, 0), samples - 1)
    group = sample * 0
    if GROUP_IDS:
        group = tl.load(group_id_ptr + sample, mask=inside, other=0).to(tl.int64)
    bad = bad | (group < 0) | (group >= groups)
    group = tl.minimum(tl.maximum(group, 0), groups - 1)
    return group * samples + sample, inside & bad


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = {"start_ptr": "*i64", "end_ptr": "*i64", "sample_ptr": "*i32", "group_ptr": "*i32", "valid_ptr": "*u8"}
    types |= dict.fromkeys(("segments", "samples", "groups", "tokens", "length"), "i32")
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    found = []
    for ids in ("*i32", "*i64"):
        types = types | dict.fromkeys(("offset_ptr", "sample_id_ptr", "group_id_ptr"), ids)
        for offsets, samples, groups in ((True, False, False), (True, True, True), (False, True, True)):
            form = {"OFFSETS": offsets, "SAMPLE_IDS": samples, "GROUP_IDS": groups}
            found.append((segment_table_kernel, types, form | tile, {"num_warps": _WARPS}))
    return found
