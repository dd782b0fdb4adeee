"""Adds up what the splits of segmented wgrad cut: the pieces of a sample, a group and dW, before they are squared."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl

from ...tuning.costs import KernelConfig
from .wgrad_table import FLAG_SHIFT, GROUP_ENDS
from .wgrad_tiles import GROUP_HEAD, GROUP_TAIL, HEAD, TAIL, part, piece_kinds, tile_place

#: Elements of a tile that one program joins, and its warps.
CHUNK_SIZE = 1024
WARPS = 4

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


@triton.jit(do_not_specialize=["groups", "tile_first", "splits"])
def join_kernel(
    block_ptr,  # [blocks + 1] int64: the list (wgrad_table)
    owner_ptr,  # [blocks] int32
    group_ptr,  # [blocks] int32
    count_ptr,  # [1] int32
    piece_ptr,  # [splits, tiles, KINDS, SIZE] float32
    joined_ptr,  # [splits, 2, programs] float64, out: sums of squares of the sample and the group that end in a split
    sum_ptr,  # [tiles, K, SIZE] float32, out if STORE_SUMS
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD
    d_in,
    d_out,
    groups,  # K
    tile_first,
    splits,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for CHUNK elements of a tile."""
    size: tl.constexpr = BLOCK_M * BLOCK_N
    program, programs = tl.program_id(0), tl.num_programs(0)
    chunks: tl.constexpr = size // CHUNK
    local, tiles = program // chunks, programs // chunks
    element = program % chunks * CHUNK + tl.arange(0, CHUNK)
    count = tl.load(count_ptr)

    sample = tl.zeros([CHUNK], tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    weight = tl.zeros([CHUNK], tl.float32)
    for split in range(splits):
        first, stop = part(count, split, splits), part(count, split + 1, splits)
        piece = piece_ptr + (tiles.to(tl.int64) * split + local) * (KINDS * size) + element
        out = joined_ptr + programs.to(tl.int64) * 2 * split + program
        if ONE_GROUP:
            total += tl.load(piece + GROUP_HEAD * size)
        elif WEIGHT_GRAD:
            weight += tl.load(piece + (KINDS - 1) * size)
        if stop > first:
            # What goes on from before, and what goes on afterwards: a measured sample or -1, a group or -1.
            earlier = first > 0
            flags = (tl.load(block_ptr + first - 1, mask=earlier, other=0) >> FLAG_SHIFT) & 15
            owner = tl.load(owner_ptr + first - 1, mask=earlier & (flags == 0), other=-1)
            group = tl.load(group_ptr + first - 1, mask=earlier & ((flags & GROUP_ENDS) == 0), other=-1)
            flags = (tl.load(block_ptr + stop - 1) >> FLAG_SHIFT) & 15
            next_owner = tl.load(owner_ptr + stop - 1, mask=flags == 0, other=-1)
            next_group = tl.load(group_ptr + stop - 1, mask=(flags & GROUP_ENDS) == 0, other=-1)
            if owner >= 0:
                sample += tl.load(piece + HEAD * size)
                if next_owner != owner:
                    tl.store(out, tl.sum(sample * sample).to(tl.float64))
                    sample = tl.zeros([CHUNK], tl.float32)
            if (next_owner >= 0) & (next_owner != owner):
                sample = tl.load(piece + TAIL * size)
            if not ONE_GROUP:
                if group >= 0:
                    head = tl.load(piece + GROUP_HEAD * size)
                    total += head
                    if WEIGHT_GRAD:
                        weight += head
                    if next_group != group:
                        tl.store(out + programs, tl.sum(total * total).to(tl.float64))
                        if STORE_SUMS:
                            at = local.to(tl.int64) * groups + group
                            tl.store(sum_ptr + at * size + element, total)
                        total = tl.zeros([CHUNK], tl.float32)
                if (next_group >= 0) & (next_group != group):
                    total = tl.load(piece + GROUP_TAIL * size)
                    if WEIGHT_GRAD:
                        weight += total
    if ONE_GROUP:
        out = joined_ptr + ((splits - 1).to(tl.int64) * 2 + 1) * programs + program
        tl.store(out, tl.sum(total * total).to(tl.float64))
        weight = total
    if WEIGHT_GRAD:
        row, column = tile_place(tile_first + local, d_in, d_out, BLOCK_M, BLOCK_N, GROUP_M)
        at_row = row * BLOCK_M + element // BLOCK_N
        at_column = column * BLOCK_N + element % BLOCK_N
        place = weight_ptr + at_row.to(tl.int64) * d_in + at_column
        tl.store(place, weight.to(weight_ptr.dtype.element_ty), mask=(at_row < d_out) & (at_column < d_in))


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    types = {"block_ptr": "*i64", "owner_ptr": "*i32", "group_ptr": "*i32", "count_ptr": "*i32", "piece_ptr": "*fp32"}
    types |= {"joined_ptr": "*fp64", "sum_ptr": "*fp32", "weight_ptr": f"*{element}"}
    types |= dict.fromkeys(("d_in", "d_out", "groups", "tile_first", "splits"), "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP_M": config.group_m}
    tile["CHUNK"] = min(CHUNK_SIZE, config.block_m * config.block_n)
    found = []
    for one_group, weight_grad, store_sums in product((False, True), repeat=3):
        if one_group and store_sums:
            continue
        form: dict[str, Any] = {"ONE_GROUP": one_group, "WEIGHT_GRAD": weight_grad, "STORE_SUMS": store_sums}
        form["KINDS"] = piece_kinds(True, one_group, weight_grad)
        found.append((join_kernel, types, form | tile, {"num_warps": WARPS}))
    return found
