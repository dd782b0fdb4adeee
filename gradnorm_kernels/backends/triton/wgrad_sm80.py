"""Segmented wgrad with pointer loads, which Triton makes into pipelined asynchronous copies: for Ampere and newer.

It takes any strides and widths, so that on Hopper it serves what tensor descriptors cannot (rows that are not aligned
to 16 bytes, rows that overlap) and float32, whose exact products run on no tensor core.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tuning.costs import KernelConfig
from .wgrad_table import FLAG_SHIFT, ROW_SHIFT, ROWS_MASK
from .wgrad_tiles import begins, begun_before, cleared, ends, finishes, forms, part, pointer_config, tile_place

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


@triton.jit(do_not_specialize=["samples", "columns", "groups", "tile_first", "tile_stop", "splits"])
def wgrad_sm80_kernel(
    x_ptr,  # [T, d_in], rows of unit stride
    dy_ptr,  # [T, d_out], rows of unit stride
    block_ptr,  # [blocks + 1] int64: the list (wgrad_table)
    owner_ptr,  # [blocks] int32
    group_ptr,  # [blocks] int32
    count_ptr,  # [1] int32: blocks
    partial_ptr,  # [programs or tiles, N + K] float64, out: each written by one program
    piece_ptr,  # [splits, tiles, KINDS, BLOCK_M * BLOCK_N] float32, out; without SPLIT [programs, 1, ...] for dW
    sum_ptr,  # [tiles, K, BLOCK_M * BLOCK_N] float32, out if STORE_SUMS: the groups' sums
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD (with SPLIT wgrad_join writes it)
    d_in,
    d_out,
    x_stride,
    dy_stride,
    samples,  # N
    columns,  # N + K
    groups,  # K
    tile_first,  # the tiles of this launch
    tile_stop,
    splits,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    ASYNC: tl.constexpr,  # products are wgmma's
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    count = tl.load(count_ptr)
    tiles = tile_stop - tile_first
    size: tl.constexpr = BLOCK_M * BLOCK_N
    for turn in tl.range(0, tl.cdiv(tiles * splits - program, tl.num_programs(0)), disable_licm=True):
        work = program + turn * tl.num_programs(0)
        local = work % tiles
        row, column = tile_place(tile_first + local, d_in, d_out, BLOCK_M, BLOCK_N, GROUP_M)
        first, stop = 0, count
        begun, group_begun = 0, 0
        own_partial = partial_ptr + program.to(tl.int64) * columns
        own_piece = piece_ptr + program.to(tl.int64) * size
        fresh = work == program  # nothing was written yet
        if SPLIT:
            split = work // tiles
            first, stop = part(count, split, splits), part(count, split + 1, splits)
            begun, group_begun = begun_before(block_ptr, owner_ptr, first)
            own_partial = partial_ptr + local.to(tl.int64) * columns
            own_piece = piece_ptr + work.to(tl.int64) * (KINDS * size)
            fresh = work >= 0
        own_sum = sum_ptr + local.to(tl.int64) * groups * size
        begins(own_piece, ONE_GROUP, WEIGHT_GRAD, KINDS, BLOCK_M, BLOCK_N)

        rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.arange(0, BLOCK_K)
        # dy's tile is loaded as its transpose, the left operand as it is needed.
        dy_offsets = rows[:, None] + token[None, :] * dy_stride
        x_offsets = token[:, None] * x_stride + cols[None, :]
        rows_inside = (rows < d_out)[:, None]
        cols_inside = (cols < d_in)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # One block ahead: the loads of the next tiles do not wait for the number that says where they are.
        following = tl.load(block_ptr + first)
        for block in tl.range(first, stop, num_stages=STAGES, disable_licm=True):
            packed = following
            following = tl.load(block_ptr + block + 1)
            at = packed >> ROW_SHIFT
            live = token < (packed & ROWS_MASK).to(tl.int32)
            a = tl.load(dy_ptr + at * dy_stride + dy_offsets, mask=live[None, :] & rows_inside, other=0.0)
            b = tl.load(x_ptr + at * x_stride + x_offsets, mask=live[:, None] & cols_inside, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            flags = (packed >> FLAG_SHIFT) & 15
            if flags != 0:
                total, _, begun, group_begun = ends(
                    acc,
                    total,
                    flags,
                    block,
                    begun,
                    group_begun,
                    fresh,
                    own_partial,
                    own_piece,
                    own_sum,
                    owner_ptr,
                    group_ptr,
                    samples,
                    SPLIT,
                    ONE_GROUP,
                    WEIGHT_GRAD,
                    STORE_SUMS,
                    KINDS,
                    False,
                    BLOCK_M,
                    BLOCK_N,
                )
                acc = cleared(x_ptr.dtype.element_ty, ASYNC, BLOCK_M, BLOCK_N)
        finishes(
            acc,
            total,
            row,
            column,
            first,
            stop,
            begun,
            group_begun,
            fresh,
            own_partial,
            own_piece,
            weight_ptr,
            block_ptr,
            owner_ptr,
            samples,
            d_in,
            d_out,
            SPLIT,
            ONE_GROUP,
            WEIGHT_GRAD,
            BLOCK_M,
            BLOCK_N,
        )


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    config = pointer_config(config)
    inputs = {"x_ptr": f"*{element}", "dy_ptr": f"*{element}"}
    strides = {"x_stride": "i32", "dy_stride": "i32"}
    options = {"num_stages": config.num_stages}
    return [(*form, options) for form in forms(wgrad_sm80_kernel, config, inputs | strides, element)]
