"""Sums over runs of rows, in float64 and in a fixed order: what turns partial results into results.

A *span* is a pair (begin, stop) of places. Every sum is made by one program that walks its span from front to back, so
that the same inputs give the same bits; rows outside a span are masked, so that their NaN does not get in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: No config chooses among forms of these kernels.
CONFIGS = ()
_WARPS = 4
_PLACES = 512  # places summed at a time by place_sums
_ROWS, _COLUMNS = 32, 128  # a tile of row_sums
_FEW_ROWS = 4  # the same, for spans of a few rows


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """What Triton needs around a launch: the tensor's GPU made the current one; nothing under the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["parts", "tokens"])
def place_sums_kernel(
    part_ptr,  # [Q, T] float64: parts of each place's value
    row_ptr,  # [T] int32: where a place's parts are; read if GATHER
    span_ptr,  # [N, 2] int32
    out_ptr,  # [N] float64
    parts,  # Q
    tokens,  # T
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(0)
    begin = tl.load(span_ptr + 2 * run)
    stop = tl.load(span_ptr + 2 * run + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, stop, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < stop
        row = tl.load(row_ptr + place, mask=inside, other=0) if GATHER else place
        value = part_ptr + row
        for _ in range(parts):
            total += tl.load(value, mask=inside, other=0.0)
            value += tokens
    tl.store(out_ptr + run, tl.sum(total, 0))


@triton.jit(do_not_specialize=["columns"])
def row_sums_kernel(
    in_ptr,  # [R, C], any float dtype, any strides
    row_ptr,  # [places] int: which row a place is; read if GATHER
    span_ptr,  # [N, 2] int32: places
    out_ptr,  # [N, C] float64 or float32
    in_row_stride,
    in_column_stride,
    columns,  # C
    GATHER: tl.constexpr,
    PIECES: tl.constexpr,  # spans count tokens, places are the pieces of blocks of so many; 0: both count places
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    begin = tl.load(span_ptr + 2 * run)
    stop = tl.load(span_ptr + 2 * run + 1)
    if PIECES > 0:
        empty = begin == stop
        begin = begin // PIECES + run.to(tl.int32)
        stop = tl.where(empty, begin, (stop - 1) // PIECES + run.to(tl.int32) + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for at in range(begin, stop, ROWS):
        place = at + tl.arange(0, ROWS)
        present = place < stop
        row = (tl.load(row_ptr + place, mask=present, other=0) if GATHER else place).to(tl.int64)
        where = row[:, None] * in_row_stride + column[None, :].to(tl.int64) * in_column_stride
        total += tl.load(in_ptr + where, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float64)
    sums = tl.sum(total, 0)
    tl.store(out_ptr + run * columns + column, sums.to(out_ptr.dtype.element_ty), mask=inside)


def place_sums(parts: Tensor, spans: Tensor, row: Tensor | None = None) -> Tensor:
    """``out[n] = sum over the places of span n, and over q, of parts[q, place]``, or of ``parts[q, row[place]]``.

    parts [Q, T] float64, spans [N, 2] int32, row [T] int32 -> [N] float64.
    """
    out = parts.new_empty(spans.shape[0])
    if out.numel():
        with on_device(parts):
            place_sums_kernel[(len(out),)](
                parts,
                spans if row is None else row,
                spans,
                out,
                *parts.shape,
                GATHER=row is not None,
                BLOCK=_PLACES,
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
    return out


def row_sums(
    values: Tensor,
    spans: Tensor,
    row: Tensor | None = None,
    *,
    pieces: int = 0,
    short: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``out[n] = sum over the places of span n of values[place]``, or of ``values[row[place]]``, added in float64.

    values [R, C] of any float dtype and strides, spans [N, 2] int32, row [places] int -> [N, C] of ``dtype``. With
    ``pieces`` the spans count tokens and the rows are the pieces of blocks of so many tokens (:mod:`.gram_kernels`).
    ``short``: most spans hold a few rows.
    """
    out = values.new_empty(spans.shape[0], values.shape[1], dtype=dtype)
    if out.numel():
        with on_device(values):
            row_sums_kernel[(len(out), triton.cdiv(out.shape[1], _COLUMNS))](
                values,
                spans if row is None else row,
                spans,
                out,
                *values.stride(),
                values.shape[1],
                GATHER=row is not None,
                PIECES=pieces,
                ROWS=_FEW_ROWS if short else _ROWS,
                COLUMNS=_COLUMNS,
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
    return out


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    options = {"num_warps": _WARPS}
    places = {"part_ptr": "*fp64", "row_ptr": "*i32", "span_ptr": "*i32", "out_ptr": "*fp64"}
    places |= {"parts": "i32", "tokens": "i32"}
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (place_sums_kernel, places, {"GATHER": gather, "BLOCK": _PLACES}, options) for gather in (False, True)
    ]
    # What is summed: pieces of a Gram twice, the second time down its columns; gathered rows, long spans and short.
    for source, out, stride, gather, pieces, rows in (
        ("fp32", "fp64", "columns", False, 128, _ROWS),
        ("fp64", "fp64", "rows", False, 128, _ROWS),
        ("fp32", "fp64", "columns", True, 0, _ROWS),
        (element, "fp32", "columns", True, 0, _FEW_ROWS),
    ):
        constants = {"GATHER": gather, "PIECES": pieces, "ROWS": rows, "COLUMNS": _COLUMNS}
        # A stride of one is compiled in.
        one, other = ("in_column_stride", "in_row_stride")[:: 1 if stride == "columns" else -1]
        types = {"in_ptr": f"*{source}", "row_ptr": "*i32", "span_ptr": "*i32", "out_ptr": f"*{out}"}
        found.append((row_sums_kernel, types | {other: "i32", "columns": "i32"}, constants | {one: 1}, options))
    return found
