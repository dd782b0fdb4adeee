"""The second kernels: partial results become results, in float64 and in a fixed order.

- :func:`split_fixup_kernel` adds the workspace tiles of what the splits of wgrad cut, before they are squared, and then
  takes the inner products of the groups' sums.
- :func:`finish` adds the partial sums of squares of segmented wgrad, and the inner products of the groups' sums.
- :func:`position_sums` and :func:`row_sums` add values over spans. A *span* is a pair (begin, stop) of positions.

Every sum is made by one program that walks its terms from front to back, so that the same inputs give the same bits.
What is outside is masked, so that its NaN does not get in.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.tiles import KernelConfig
from ..base import Results
from .launch import on_device
from .products import PRODUCT_GROUPS, group_products
from .wgrad_kernels import GROUP_IN, GROUP_OUT, SAMPLE_IN, SAMPLE_OUT, workspace_tiles
from .wgrad_schedule import FLAG_SHIFT, GROUP_ENDS, IN_FIXUP, IN_PARTIALS, split_start, tile_position

#: The kernels of the configs that this module is compiled for: the fix-up has wgrad's tile.
CONFIGS = ("wgrad",)
#: Elements of a tile that one program of the fix-up adds, and its warps.
FIXUP_CHUNK = 1024
WARPS = 4
_NORM_COLUMNS, _NORM_ROWS = 32, 32  # a tile of norms
_SPLIT_NORM_ROWS = 16  # the same where norms are also in the fix-up: 32 rows spill on sm_100
_POSITIONS = 512  # positions summed at a time by position_sums
_ROWS, _COLUMNS = 32, 128  # a tile of row_sums
_FEW_ROWS = 4  # the same, for spans of a few rows


@triton.jit(do_not_specialize=["groups", "tile_first", "splits"])
def split_fixup_kernel(
    k_tile_ptr,  # [K tiles + 1] int64: the schedule
    k_sample_ptr,  # [K tiles] int32
    k_group_ptr,  # [K tiles] int32
    count_ptr,  # [1] int32
    workspace_ptr,  # [splits, tiles, TILES, SIZE] float32
    fixup_ptr,  # [splits, 2, programs] float64, out: sums of squares of what ends in a split: sample, group
    sum_ptr,  # [tiles, K, SIZE] float32, out if STORE_SUMS
    product_ptr,  # [programs, K, K] float32, out if LANES: the inner products of the groups' sums
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD
    d_in,
    d_out,
    groups,  # K
    tile_first,
    splits,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    LANES: tl.constexpr,  # of group_products; 0: they are not wanted, or for torch
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per CHUNK elements of a tile."""
    size: tl.constexpr = BLOCK_M * BLOCK_N
    program, programs = tl.program_id(0), tl.num_programs(0)
    chunks: tl.constexpr = size // CHUNK
    local, tiles = program // chunks, programs // chunks
    element = program % chunks * CHUNK + tl.arange(0, CHUNK)
    count = tl.load(count_ptr)

    sample_sum = tl.zeros([CHUNK], tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    weight = tl.zeros([CHUNK], tl.float32)
    for split in range(splits):
        first, stop = split_start(count, split, splits), split_start(count, split + 1, splits)
        tile = workspace_ptr + (tiles.to(tl.int64) * split + local) * (TILES * size) + element
        out = fixup_ptr + programs.to(tl.int64) * 2 * split + program
        if ONE_GROUP:
            total += tl.load(tile + GROUP_IN * size)
        elif WEIGHT_GRAD:
            weight += tl.load(tile + (TILES - 1) * size)
        if stop > first:
            # What is carried in and what is carried out: a measured sample or -1, a group or -1.
            earlier = first > 0
            flags = (tl.load(k_tile_ptr + first - 1, mask=earlier, other=0) >> FLAG_SHIFT) & 15
            sample = tl.load(k_sample_ptr + first - 1, mask=earlier & (flags == 0), other=-1)
            group = tl.load(k_group_ptr + first - 1, mask=earlier & ((flags & GROUP_ENDS) == 0), other=-1)
            flags = (tl.load(k_tile_ptr + stop - 1) >> FLAG_SHIFT) & 15
            next_sample = tl.load(k_sample_ptr + stop - 1, mask=flags == 0, other=-1)
            next_group = tl.load(k_group_ptr + stop - 1, mask=(flags & GROUP_ENDS) == 0, other=-1)
            if sample >= 0:
                sample_sum += tl.load(tile + SAMPLE_IN * size)
                if next_sample != sample:
                    tl.store(out, tl.sum(sample_sum * sample_sum).to(tl.float64))
                    sample_sum = tl.zeros([CHUNK], tl.float32)
            if (next_sample >= 0) & (next_sample != sample):
                sample_sum = tl.load(tile + SAMPLE_OUT * size)
            if not ONE_GROUP:
                if group >= 0:
                    carried = tl.load(tile + GROUP_IN * size)
                    total += carried
                    if WEIGHT_GRAD:
                        weight += carried
                    if next_group != group:
                        tl.store(out + programs, tl.sum(total * total).to(tl.float64))
                        if STORE_SUMS:
                            at = local.to(tl.int64) * groups + group
                            tl.store(sum_ptr + at * size + element, total)
                        total = tl.zeros([CHUNK], tl.float32)
                if (next_group >= 0) & (next_group != group):
                    total = tl.load(tile + GROUP_OUT * size)
                    if WEIGHT_GRAD:
                        weight += total
    if ONE_GROUP:
        out = fixup_ptr + ((splits - 1).to(tl.int64) * 2 + 1) * programs + program
        tl.store(out, tl.sum(total * total).to(tl.float64))
        weight = total
    if WEIGHT_GRAD:
        row, column = tile_position(tile_first + local, d_in, d_out, BLOCK_M, BLOCK_N, GROUP_M)
        at_row = row * BLOCK_M + element // BLOCK_N
        at_column = column * BLOCK_N + element % BLOCK_N
        element_ptr = weight_ptr + at_row.to(tl.int64) * d_in + at_column
        tl.store(element_ptr, weight.to(weight_ptr.dtype.element_ty), mask=(at_row < d_out) & (at_column < d_in))
    if LANES > 0:
        # The sums that no split cut are wgrad's, the others this program's.
        own_sum = sum_ptr + local.to(tl.int64) * groups * size + program % chunks * CHUNK
        own_products = product_ptr + program.to(tl.int64) * groups * groups
        group_products(own_sum, own_products, groups, CHUNK, size, LANES)


def finish(
    results: Results,
    state: Tensor,
    count: Tensor,
    partials: Tensor,
    fixup: Tensor | None,
    products: Tensor | None,
    *,
    first: bool,
    last: bool,
    of_samples: Tensor | None = None,
) -> None:
    """Add one pass of segmented wgrad to the results. After the ``last`` one all are NaN if values were out of range.

    ``state`` [N + K] int32 says where each norm is found, ``count`` [2] int32 whether they were in range
    (:mod:`.wgrad_schedule`). ``partials`` [rows, N + K] float64. ``fixup`` [splits, 2, programs] float64: those of what
    the splits cut. ``products`` [parts, K, K] float32: the inner products of the groups' sums by parts of the weight;
    None where there is one group, or the Gram is not wanted. ``first``: the results hold nothing yet.
    ``of_samples`` [N] float64: norms that wgrad did not measure, 0 of the others; added by the first pass. Of
    weight_grad only the first row becomes NaN.
    """
    samples, groups = len(results.sample_sq), len(results.group_sq)
    columns = samples + groups
    d_in = 0 if results.weight_grad is None else results.weight_grad.shape[1]
    norm_programs = triton.cdiv(columns, _NORM_COLUMNS)
    pair_programs = 0 if products is None else triton.cdiv(groups * groups, _NORM_COLUMNS)
    with on_device(partials):
        finish_kernel[(norm_programs + pair_programs,)](
            state,
            count,
            partials,
            partials if fixup is None else fixup,
            partials if products is None else products,
            partials if of_samples is None else of_samples,
            results.sample_sq,
            results.group_sq,
            partials if results.group_gram is None else results.group_gram,
            partials if results.weight_grad is None else results.weight_grad,
            samples,
            groups,
            partials.shape[0],
            0 if fixup is None else fixup.shape[2],
            0 if products is None else products.shape[0],
            d_in,
            norm_programs,
            ACCUMULATE=not first,
            OF_SAMPLES=first and of_samples is not None,
            LAST=last,
            SPLIT=fixup is not None,
            GRAM=results.group_gram is not None,
            WEIGHT_GRAD=results.weight_grad is not None,
            COLUMNS=_NORM_COLUMNS,
            ROWS=_NORM_ROWS if fixup is None else _SPLIT_NORM_ROWS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["samples", "groups", "rows", "programs", "parts", "d_in", "norm_programs"])
def finish_kernel(
    state_ptr,  # [N + K] int32
    count_ptr,  # [2] int32: the second one is 1 if all values were in range
    partial_ptr,  # [rows, N + K] float64
    fixup_ptr,  # [splits, 2, programs] float64; read if SPLIT
    product_ptr,  # [parts, K, K] float32; read by the programs from norm_programs on
    of_sample_ptr,  # [N] float64; read if OF_SAMPLES
    sample_ptr,  # [N] float64, out
    group_ptr,  # [K] float64, out
    gram_ptr,  # [K, K] float64, out if GRAM
    weight_ptr,  # [d_out, d_in]; the first row is written if WEIGHT_GRAD and a value was wrong
    samples,  # N
    groups,  # K
    rows,
    programs,
    parts,
    d_in,
    norm_programs,
    ACCUMULATE: tl.constexpr,
    OF_SAMPLES: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    GRAM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The first ``norm_programs`` programs take the norms and the Gram's diagonal, the others what is beside it."""
    program = tl.program_id(0)
    valid = tl.load(count_ptr + 1) != 0
    lane = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    nan = tl.full([COLUMNS], float("nan"), tl.float64)
    if program < norm_programs:
        columns = samples + groups
        column = program * COLUMNS + lane
        inside = column < columns
        of_sample, of_group = column < samples, inside & (column >= samples)
        group = (column - samples).to(tl.int64)
        state = tl.load(state_ptr + column, mask=inside, other=0)
        in_partials = inside & (state == IN_PARTIALS)
        for base in range(0, rows, ROWS):
            row = base + tl.arange(0, ROWS)
            at = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
            total += tl.sum(tl.load(at, mask=(row < rows)[:, None] & in_partials[None, :], other=0.0), 0)
        if SPLIT:
            in_fixup = inside & (state >= IN_FIXUP)
            line = (state - IN_FIXUP).to(tl.int64) * 2 + of_group.to(tl.int64)
            for base in range(0, programs, ROWS):
                row = base + tl.arange(0, ROWS)
                at = fixup_ptr + line[None, :] * programs + row[:, None]
                total += tl.sum(tl.load(at, mask=(row < programs)[:, None] & in_fixup[None, :], other=0.0), 0)
        if ACCUMULATE:
            total += tl.load(sample_ptr + column, mask=of_sample, other=0.0)
            total += tl.load(group_ptr + group, mask=of_group, other=0.0)
        if OF_SAMPLES:
            total += tl.load(of_sample_ptr + column, mask=of_sample, other=0.0)
        if LAST:
            total = tl.where(valid, total, nan)
            if WEIGHT_GRAD and (program == 0) & (valid == 0):
                for base in range(0, d_in, COLUMNS):
                    tl.store(weight_ptr + base + lane, nan.to(weight_ptr.dtype.element_ty), mask=base + lane < d_in)
        tl.store(sample_ptr + column, total, mask=of_sample)
        tl.store(group_ptr + group, total, mask=of_group)
        if GRAM:
            tl.store(gram_ptr + group * (groups + 1), total, mask=of_group)
    elif GRAM:
        entry = ((program - norm_programs) * COLUMNS + lane).to(tl.int64)
        a, b = entry // groups, entry % groups
        beside = (a < groups) & (a != b)
        # Nothing was written for groups without rows.
        present = beside & (tl.load(state_ptr + samples + a, mask=beside, other=0) != 0)
        present = present & (tl.load(state_ptr + samples + b, mask=beside, other=0) != 0)
        size = groups.to(tl.int64) * groups
        for base in range(0, parts, ROWS):
            part = base + tl.arange(0, ROWS)
            there = (part < parts)[:, None] & present[None, :]
            matrix = product_ptr + part.to(tl.int64)[:, None] * size
            # <S_a, S_b> and <S_b, S_a> may differ in their last digits; the Gram is symmetric to the bit.
            found = tl.load(matrix + entry[None, :], mask=there, other=0.0).to(tl.float64)
            found += tl.load(matrix + (b * groups + a)[None, :], mask=there, other=0.0).to(tl.float64)
            total += tl.sum(found, 0) / 2
        if ACCUMULATE:
            total += tl.load(gram_ptr + entry, mask=beside, other=0.0)
        if LAST:
            total = tl.where(valid, total, nan)
        tl.store(gram_ptr + entry, total, mask=beside)


@triton.jit(do_not_specialize=["parts", "tokens"])
def position_sums_kernel(
    part_ptr,  # [Q, T] float64: parts of each position's value
    row_ptr,  # [T] int32: where a position's parts are; read if GATHER
    span_ptr,  # [N, 2] int32
    out_ptr,  # [N] float64
    parts,  # Q
    tokens,  # T
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    begin = tl.load(span_ptr + 2 * index)
    stop = tl.load(span_ptr + 2 * index + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, stop, BLOCK):
        position = at + tl.arange(0, BLOCK)
        inside = position < stop
        row = tl.load(row_ptr + position, mask=inside, other=0) if GATHER else position
        value = part_ptr + row
        for _ in range(parts):
            total += tl.load(value, mask=inside, other=0.0)
            value += tokens
    tl.store(out_ptr + index, tl.sum(total, 0))


@triton.jit(do_not_specialize=["columns"])
def row_sums_kernel(
    in_ptr,  # [R, C], any float dtype, any strides
    row_ptr,  # [positions] int: which row a position is; read if GATHER
    span_ptr,  # [N, 2] int32: positions
    out_ptr,  # [N, C] float64 or float32
    in_row_stride,
    in_column_stride,
    columns,  # C
    GATHER: tl.constexpr,
    PARTIALS: tl.constexpr,  # spans count tokens, rows are partial sums per so many tokens; 0: spans count rows
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In one dimension: a grid's second one has at most 65535 programs, and the widest sketches have more columns.
    blocks = tl.cdiv(columns, COLUMNS)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    begin = tl.load(span_ptr + 2 * index)
    stop = tl.load(span_ptr + 2 * index + 1)
    if PARTIALS > 0:
        empty = begin == stop
        begin = begin // PARTIALS + index.to(tl.int32)
        stop = tl.where(empty, begin, (stop - 1) // PARTIALS + index.to(tl.int32) + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for at in range(begin, stop, ROWS):
        position = at + tl.arange(0, ROWS)
        present = position < stop
        row = (tl.load(row_ptr + position, mask=present, other=0) if GATHER else position).to(tl.int64)
        offset = row[:, None] * in_row_stride + column[None, :].to(tl.int64) * in_column_stride
        total += tl.load(in_ptr + offset, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float64)
    sums = tl.sum(total, 0)
    tl.store(out_ptr + index * columns + column, sums.to(out_ptr.dtype.element_ty), mask=inside)


def position_sums(parts: Tensor, spans: Tensor, row: Tensor | None = None) -> Tensor:
    """``out[n] = sum over the positions p of span n, and over q, of parts[q, p]``, or of ``parts[q, row[p]]``.

    parts [Q, T] float64, spans [N, 2] int32, row [T] int32 -> [N] float64.
    """
    out = parts.new_empty(spans.shape[0])
    if out.numel():
        with on_device(parts):
            position_sums_kernel[(len(out),)](
                parts,
                spans if row is None else row,
                spans,
                out,
                *parts.shape,
                GATHER=row is not None,
                BLOCK=_POSITIONS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return out


def row_sums(
    values: Tensor,
    spans: Tensor,
    row: Tensor | None = None,
    *,
    partials: int = 0,
    short: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``out[n] = sum over the positions p of span n of values[p]``, or of ``values[row[p]]``, added in float64.

    values [R, C] of any float dtype and strides, spans [N, 2] int32, row [positions] int -> [N, C] of ``dtype``. With
    ``partials`` the spans count tokens, and the rows are the partial sums per block of so many tokens (:mod:`.gram`).
    ``short``: most spans hold a few rows.
    """
    out = values.new_empty(spans.shape[0], values.shape[1], dtype=dtype)
    if out.numel():
        with on_device(values):
            row_sums_kernel[(len(out) * triton.cdiv(out.shape[1], _COLUMNS),)](
                values,
                spans if row is None else row,
                spans,
                out,
                *values.stride(),
                values.shape[1],
                GATHER=row is not None,
                PARTIALS=partials,
                ROWS=_FEW_ROWS if short else _ROWS,
                COLUMNS=_COLUMNS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return out


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What is launched: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    options = {"num_warps": WARPS, "num_stages": 3}  # the stages are Triton's default, as at every launch
    types = {"k_tile_ptr": "*i64", "k_sample_ptr": "*i32", "k_group_ptr": "*i32", "count_ptr": "*i32"}
    types |= {"workspace_ptr": "*fp32", "fixup_ptr": "*fp64", "sum_ptr": "*fp32", "weight_ptr": f"*{element}"}
    types["product_ptr"] = "*fp32"
    types |= dict.fromkeys(("d_in", "d_out", "groups", "tile_first", "splits"), "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP_M": config.group_m}
    tile["CHUNK"] = min(FIXUP_CHUNK, config.block_m * config.block_n)
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for one_group, weight_grad, store_sums in product((False, True), repeat=3):
        if config.nested or (one_group and store_sums):  # nested loops split no tokens
            continue
        form: dict[str, Any] = {"ONE_GROUP": one_group, "WEIGHT_GRAD": weight_grad, "STORE_SUMS": store_sums}
        form["TILES"] = workspace_tiles(True, one_group, weight_grad)
        for lanes in (0, PRODUCT_GROUPS) if store_sums else (0,):
            found.append((split_fixup_kernel, types, form | {"LANES": lanes} | tile, options))
    types = {"state_ptr": "*i32", "count_ptr": "*i32", "product_ptr": "*fp32", "weight_ptr": f"*{element}"}
    types |= dict.fromkeys(
        ("partial_ptr", "fixup_ptr", "of_sample_ptr", "sample_ptr", "group_ptr", "gram_ptr"), "*fp64"
    )
    types |= dict.fromkeys(("samples", "groups", "rows", "programs", "parts", "d_in", "norm_programs"), "i32")
    # The only pass of a call, with dW or the Gram; and the first, a middle and the last one of several.
    for accumulate, last, split, gram, weight_grad in (
        (False, True, False, False, True),
        (False, True, True, False, True),
        (False, True, False, True, True),
        (False, True, True, True, False),
        (False, False, False, True, True),
        (True, False, False, True, True),
        (True, True, True, True, True),
    ):
        form = {"ACCUMULATE": accumulate, "LAST": last, "SPLIT": split, "GRAM": gram, "WEIGHT_GRAD": weight_grad}
        form["OF_SAMPLES"] = not accumulate
        form |= {"COLUMNS": _NORM_COLUMNS, "ROWS": _SPLIT_NORM_ROWS if split else _NORM_ROWS}
        found.append((finish_kernel, types, form, options))
    types = {"part_ptr": "*fp64", "row_ptr": "*i32", "span_ptr": "*i32", "out_ptr": "*fp64"}
    types |= {"parts": "i32", "tokens": "i32"}
    for gather in (False, True):
        found.append((position_sums_kernel, types, {"GATHER": gather, "BLOCK": _POSITIONS}, options))
    # What is summed: partial sums of a Gram twice, the second time along its columns; gathered rows, long spans, short.
    for source, out, stride, gather, partials, rows in (
        ("fp32", "fp64", "columns", False, 128, _ROWS),
        ("fp64", "fp64", "rows", False, 128, _ROWS),
        ("fp32", "fp64", "columns", True, 0, _ROWS),
        (element, "fp32", "columns", True, 0, _FEW_ROWS),
    ):
        constants = {"GATHER": gather, "PARTIALS": partials, "ROWS": rows, "COLUMNS": _COLUMNS}
        # A stride of one is compiled in.
        one, other = ("in_column_stride", "in_row_stride")[:: 1 if stride == "columns" else -1]
        types = {"in_ptr": f"*{source}", "row_ptr": "*i32", "span_ptr": "*i32", "out_ptr": f"*{out}"}
        found.append((row_sums_kernel, types | {other: "i32", "columns": "i32"}, constants | {one: 1}, options))
    return found
