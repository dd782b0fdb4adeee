"""What the segmented wgrad kernels share: where a tile is, and what happens where a sample, a group or a tile ends.

A program holds two accumulators: that of the sample at hand and the group's running sum. A sample's end takes the sum
of squares of the first and adds it to the second; a group's end does the same with the second and the tile of dW. Only
group ends, and ends of samples in a list cut into splits, write tiles to memory.

On Hopper products are asynchronous. If something else than a product writes to their accumulator, ptxas may wait for
every product of the loop by itself (its advice C7515, seen with Triton 3.6), so there a product of zeros clears it
(:func:`cleared`). What is left of a sample's squares is added up behind the next products (:func:`settles`).

With SPLIT a program has a part of the list of blocks. What the part's edges cut, it writes as a *piece*, a whole tile
in float32: HEAD, a sample that began in an earlier part; TAIL, one that goes on in the next; GROUP_HEAD and GROUP_TAIL
likewise (with ONE_GROUP one piece, GROUP_HEAD, holds the part's whole sum). With several groups the last piece is the
part's share of dW without its group pieces. :mod:`.wgrad_join` adds them up before they are squared. KINDS is how many
pieces there is room for; without SPLIT one, for dW.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import triton
import triton.language as tl

from ...tuning.costs import KernelConfig
from .wgrad_table import FLAG_SHIFT, GROUP_ENDS, MEASURED

HEAD = tl.constexpr(0)
TAIL = tl.constexpr(1)
GROUP_HEAD = tl.constexpr(2)
GROUP_TAIL = tl.constexpr(3)


@triton.jit
def tile_place(tile, d_in, d_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of an output tile, GROUP_M rows of tiles walked together: neighbours share operands in L2."""
    rows = tl.cdiv(d_out, BLOCK_M)
    band = GROUP_M * tl.cdiv(d_in, BLOCK_N)
    first = tile // band * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    return first + tile % band % height, tile % band // height


@triton.jit
def part(count, split, splits):
    """The first block of a part of the list; that of the next part is where it stops."""
    return (count.to(tl.int64) * split // splits).to(tl.int32)


@triton.jit
def begun_before(block_ptr, owner_ptr, first):
    """Whether the (measured) sample and the group of block ``first`` began before it: two int32."""
    earlier = first > 0
    packed = tl.load(block_ptr + first - 1, mask=earlier, other=0)
    flags = (packed >> FLAG_SHIFT) & 15
    owner = tl.load(owner_ptr + first - 1, mask=earlier, other=-1)
    sample = earlier & (flags == 0) & (owner >= 0)
    group = earlier & ((flags & GROUP_ENDS) == 0)
    return sample.to(tl.int32), group.to(tl.int32)


@triton.jit
def _tile_offsets(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def add_square(tile, partial_ptr, fresh):
    """Add the tile's sum of squares to a partial of this program's own; if ``fresh``, nothing is there yet."""
    add_up(tile * tile, partial_ptr, fresh)


@triton.jit
def add_up(terms, partial_ptr, fresh):
    """The same for the sum of ``terms``."""
    # The load is issued before the sum, which hides it.
    before = tl.load(partial_ptr, mask=fresh == 0, other=0.0)
    tl.store(partial_ptr, before + tl.sum(terms).to(tl.float64))


@triton.jit
def squares(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's squares, added up as far as one thread holds them: [BLOCK_M, 8]. No thread waits for another."""
    return tl.sum(tl.reshape(tile * tile, [BLOCK_M, BLOCK_N // 8, 8]), 1)


@triton.jit
def settles(square, owner, partial_ptr, fresh):
    """Add the squares of a sample that has ended to its partial; an ``owner`` below 0: there is none."""
    if owner >= 0:
        add_up(square, partial_ptr + owner, fresh)


@triton.jit
def cleared(element: tl.constexpr, ASYNC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An accumulator of zeros; if ``ASYNC`` by the tensor cores, from operands of ``element``."""
    if ASYNC:
        return tl.dot(tl.zeros([BLOCK_M, 16], element), tl.zeros([16, BLOCK_N], element))
    else:
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def ends(
    acc,  # [BLOCK_M, BLOCK_N] float32: of the sample at hand
    total,  # [BLOCK_M, BLOCK_N] float32: of the group, without acc
    flags,
    block,
    begun,
    group_begun,
    fresh,
    partial_ptr,  # [N + K] float64: this program's
    piece_ptr,  # [kinds, BLOCK_M * BLOCK_N] float32: this program's
    sum_ptr,  # [K, BLOCK_M * BLOCK_N] float32: this tile's
    owner_ptr,  # [blocks] int32
    group_ptr,  # [blocks] int32
    samples,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    LATER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What ends behind a block that has flags. Returns the new (total, owner, begun, group_begun); acc starts afresh.

    ``owner``: with LATER, the sample whose squares the caller must settle; else, and where there is none, -1.
    """
    size: tl.constexpr = BLOCK_M * BLOCK_N
    offsets = _tile_offsets(BLOCK_M, BLOCK_N)
    owner = -1
    if flags & MEASURED:
        if SPLIT and begun != 0:
            tl.store(piece_ptr + HEAD * size + offsets, acc)
        elif LATER:
            owner = tl.load(owner_ptr + block)
        else:
            add_square(acc, partial_ptr + tl.load(owner_ptr + block), fresh)
    total += acc
    if not ONE_GROUP and flags & GROUP_ENDS:
        if SPLIT and group_begun != 0:
            tl.store(piece_ptr + GROUP_HEAD * size + offsets, total)
        else:
            group = tl.load(group_ptr + block)
            add_square(total, partial_ptr + samples + group, fresh)
            if STORE_SUMS:
                tl.store(sum_ptr + group.to(tl.int64) * size + offsets, total)
            if WEIGHT_GRAD:
                # Threads may load other elements of a tile than they stored. The sum over the tile, above, has made
                # them wait for each other; a barrier of its own would keep Triton from pipelining the loop.
                inner = piece_ptr + (KINDS - 1) * size + offsets
                tl.store(inner, total + tl.load(inner))
        group_begun = group_begun * 0
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return total, owner, begun * 0, group_begun


@triton.jit
def begins(
    piece_ptr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Before a tile's first block: dW starts from zero, and all threads see the partials of the tile before."""
    tl.debug_barrier()
    if WEIGHT_GRAD and not ONE_GROUP:
        inner = piece_ptr + (KINDS - 1) * BLOCK_M * BLOCK_N + _tile_offsets(BLOCK_M, BLOCK_N)
        tl.store(inner, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))


@triton.jit
def finishes(
    acc,
    total,
    row,  # of the tile, in tiles
    column,
    first,  # the blocks that were walked
    stop,
    begun,
    group_begun,
    fresh,
    partial_ptr,
    piece_ptr,
    weight_ptr,  # [d_out, d_in], out
    block_ptr,
    owner_ptr,
    samples,
    d_in,
    d_out,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """After the last block: the pieces that the part's end cuts, or the lone group's norm and the tile of dW."""
    size: tl.constexpr = BLOCK_M * BLOCK_N
    offsets = _tile_offsets(BLOCK_M, BLOCK_N)
    if SPLIT:
        if stop > first:
            flags = (tl.load(block_ptr + stop - 1) >> FLAG_SHIFT) & 15
            if flags == 0:
                if tl.load(owner_ptr + stop - 1) >= 0:
                    tl.store(piece_ptr + tl.where(begun != 0, HEAD, TAIL) * size + offsets, acc)
                total += acc
            if not ONE_GROUP and (flags & GROUP_ENDS) == 0:
                tl.store(piece_ptr + tl.where(group_begun != 0, GROUP_HEAD, GROUP_TAIL) * size + offsets, total)
        if ONE_GROUP:
            tl.store(piece_ptr + GROUP_HEAD * size + offsets, total)
    else:
        if ONE_GROUP:
            add_square(total, partial_ptr + samples, fresh)
        if WEIGHT_GRAD:
            if not ONE_GROUP:
                tl.debug_barrier()
                total = tl.load(piece_ptr + offsets)
            rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
            columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
            places = weight_ptr + rows.to(tl.int64)[:, None] * d_in + columns[None, :]
            tl.store(places, total.to(weight_ptr.dtype.element_ty), mask=inside)


def pointer_config(config: KernelConfig) -> KernelConfig:
    """The config for loads by pointers: one that is for descriptors leaves no registers for addresses at its width."""
    if not config.descriptors:
        return config
    return replace(config, block_n=max(16, config.block_n // 2), num_stages=3, descriptors=False)


def asynchronous(config: KernelConfig, element_bytes: int) -> bool:
    """Whether products are wgmma's, which run on while a program goes on (ASYNC)."""
    return config.arch >= 90 and element_bytes == 2


def piece_kinds(split: bool, one_group: bool, weight_grad: bool) -> int:
    """How many pieces there is room for (KINDS)."""
    return 1 if not split else 3 if one_group else 5 if weight_grad else 4


def forms(
    kernel: Any, config: KernelConfig, inputs: dict[str, str], element: str
) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Every form in which one of the two kernels is launched: (kernel, argument -> type, constexpr -> value).

    ``inputs`` are the types of those arguments in which the two differ.
    """
    pointers = {"block_ptr": "*i64", "owner_ptr": "*i32", "group_ptr": "*i32", "count_ptr": "*i32"}
    pointers |= {"partial_ptr": "*fp64", "piece_ptr": "*fp32", "sum_ptr": "*fp32", "weight_ptr": f"*{element}"}
    sizes = ("d_in", "d_out", "samples", "columns", "groups", "tile_first", "tile_stop", "splits")
    types = inputs | pointers | dict.fromkeys(sizes, "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    tile |= {"GROUP_M": config.group_m, "STAGES": config.num_stages}
    tile["ASYNC"] = asynchronous(config, config.element_bytes)
    found = []
    for split, one_group, weight_grad, store_sums in product((False, True), repeat=4):
        if one_group and store_sums:
            continue
        form = {"SPLIT": split, "ONE_GROUP": one_group, "WEIGHT_GRAD": weight_grad, "STORE_SUMS": store_sums}
        found.append((kernel, types, form | {"KINDS": piece_kinds(split, one_group, weight_grad)} | tile))
    return found
