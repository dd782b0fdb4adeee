"""Segmented wgrad for Hopper: operands through tensor descriptors (TMA), products asynchronous (wgmma).

The descriptors are "ragged": a load names the rows it may see, and the hardware fills the rest of the tile with zeros.
A sample's end needs no mask and no pass over the operands, and the copies run ahead across it. The only waits besides
those of the pipeline are at the ends themselves, for the accumulator.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from ...tuning.costs import KernelConfig
from .wgrad_table import FLAG_SHIFT, ROW_SHIFT, ROWS_MASK
from .wgrad_tiles import begins, begun_before, cleared, ends, finishes, forms, part, settles, squares, tile_place

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


@triton.jit(do_not_specialize=["samples", "columns", "groups", "tile_first", "tile_stop", "splits"])
def wgrad_sm90_kernel(
    x_desc,  # ragged, of [T, d_in], blocks of [BLOCK_K, BLOCK_N]
    dy_desc,  # ragged, of [T, d_out], blocks of [BLOCK_K, BLOCK_M]
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
    for turn in range(tl.cdiv(tiles * splits - program, tl.num_programs(0))):
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

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_M, 8], tl.float32)
        owner = -1
        # One block ahead: the loads of the next tiles do not wait for the number that says where they are.
        following = tl.load(block_ptr + first)
        for block in tl.range(first, stop, num_stages=STAGES):
            packed = following
            following = tl.load(block_ptr + block + 1)
            at = (packed >> ROW_SHIFT).to(tl.int32)
            rows = (packed & ROWS_MASK).to(tl.int32)
            a = load_ragged(dy_desc, at, rows, [0, row * BLOCK_M])
            b = load_ragged(x_desc, at, rows, [0, column * BLOCK_N])
            acc = tl.dot(a.T, b, acc, input_precision="ieee")
            # The sample that ended a block ago: these products hide its sum.
            settles(square, owner, own_partial, fresh)
            owner = -1
            flags = (packed >> FLAG_SHIFT) & 15
            if flags != 0:
                square = squares(acc, BLOCK_M, BLOCK_N)
                total, owner, begun, group_begun = ends(
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
                    True,
                    BLOCK_M,
                    BLOCK_N,
                )
                acc = cleared(x_desc.dtype, ASYNC, BLOCK_M, BLOCK_N)
        settles(square, owner, own_partial, fresh)
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


def signatures(config: KernelConfig, element: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value) of each form, for a compile-only check."""
    if not config.descriptors:
        return []
    rows = f"{element}[1,1,{config.block_k},"
    inputs = {"x_desc": f"tensordesc<{rows}{config.block_n}]>", "dy_desc": f"tensordesc<{rows}{config.block_m}]>"}
    return forms(wgrad_sm90_kernel, config, inputs, element)
