"""The segmented wgrad kernels: one for pointer loads (sm_80), one for tensor descriptors (sm_90), and what they share.

A program takes one output tile after another and walks the schedule's K tiles (:mod:`.wgrad_schedule`). It holds two
accumulators: the current sample's gradient and the group's running sum.

- :func:`prologue` finds the tile, the range of K tiles and the program's part of every output.
- :func:`segment_epilogue` runs where a sample or a group ends. It adds the sum of squares of the sample's gradient to
  a partial sum and the gradient to the group's sum. At a group's end it does the same with the group's sum and dW.
- :func:`tile_epilogue` runs after the last K tile. It writes dW and the inner products of few groups' sums
  (:mod:`.products`), whose place the program's next tile takes. With SPLIT the fix-up completes and multiplies them.

Only ends of groups, and ends of samples that a split of the token axis cuts, write tiles to memory.

On Hopper products are asynchronous. If anything but a product writes to their accumulator, ptxas may wait for every
product of the loop separately (its advice C7515, seen with Triton 3.6), so a product of zeros clears it there
(:func:`cleared`). The cross-thread part of a sample's sum of squares waits for the next products (add_pending_squares).

With SPLIT a program has one of several even parts of the schedule. What the edges of the part cut, it stores in the
workspace as float32 tiles: SAMPLE_IN of a sample carried in from an earlier split, SAMPLE_OUT of one carried out to the
next, GROUP_IN and GROUP_OUT likewise. With ONE_GROUP a single tile, GROUP_IN, holds the split's whole sum. With several
groups the last tile is the split's share of dW without the group tiles. The split-K fix-up (:mod:`.reduce`) adds them
up before they are squared. TILES is the number of workspace tiles per program; without SPLIT it is one, for dW.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from ...tuning.tiles import KernelConfig
from .launch import asynchronous, copies_ahead, fence_copies
from .products import PRODUCT_GROUPS, add_pending_squares, add_sum, group_products, thread_squares
from .wgrad_schedule import (
    FLAG_SHIFT,
    GROUP_ENDS,
    ROW_SHIFT,
    ROWS_MASK,
    SAMPLE_ENDS,
    carried_in,
    inside_matrix,
    split_start,
    tile_position,
)

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)

SAMPLE_IN = tl.constexpr(0)
SAMPLE_OUT = tl.constexpr(1)
GROUP_IN = tl.constexpr(2)
GROUP_OUT = tl.constexpr(3)


@triton.jit
def _tile_offsets(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def cleared(element: tl.constexpr, ASYNC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An accumulator of zeros; if ``ASYNC`` by the tensor cores, from operands of ``element``."""
    if ASYNC:
        return tl.dot(tl.zeros([BLOCK_M, 16], element), tl.zeros([16, BLOCK_N], element))
    else:
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def prologue(
    work,  # the number of this (split, tile)
    program,
    count,  # K tiles of the schedule
    tiles,  # of this launch
    tile_first,
    splits,
    d_in,
    d_out,
    columns,
    groups,
    k_tile_ptr,
    k_sample_ptr,
    partial_ptr,
    workspace_ptr,
    sum_ptr,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Before a tile's first K tile. dW starts from zero, and all threads see the partial sums of the tile before.

    Returns the tile's (row, column), its K tiles (first, stop), whether the first one's sample and group are carried
    in, this program's (partial sums, workspace, group sums), and whether nothing was written to the partial sums yet.
    """
    size: tl.constexpr = BLOCK_M * BLOCK_N
    local = work % tiles
    row, column = tile_position(tile_first + local, d_in, d_out, BLOCK_M, BLOCK_N, GROUP_M)
    first, stop = 0, count
    sample_carried, group_carried = 0, 0
    own_partial = partial_ptr + program.to(tl.int64) * columns
    own_workspace = workspace_ptr + program.to(tl.int64) * size
    fresh = work == program
    if SPLIT:
        split = work // tiles
        first, stop = split_start(count, split, splits), split_start(count, split + 1, splits)
        sample_carried, group_carried = carried_in(k_tile_ptr, k_sample_ptr, first)
        own_partial = partial_ptr + local.to(tl.int64) * columns
        own_workspace = workspace_ptr + work.to(tl.int64) * (TILES * size)
        fresh = work >= 0
    # The sums of a program's next tile take the place of this one's, unless all are kept.
    own_sum = sum_ptr + (program if LANES > 0 and not SPLIT else local).to(tl.int64) * groups * size
    tl.debug_barrier()
    if WEIGHT_GRAD and not ONE_GROUP:
        inner = own_workspace + (TILES - 1) * BLOCK_M * BLOCK_N + _tile_offsets(BLOCK_M, BLOCK_N)
        tl.store(inner, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    return row, column, first, stop, sample_carried, group_carried, own_partial, own_workspace, own_sum, fresh


@triton.jit
def segment_epilogue(
    acc,  # [BLOCK_M, BLOCK_N] float32: the current sample's gradient, zero outside the matrix
    total,  # [BLOCK_M, BLOCK_N] float32: the group's sum without acc
    flags,
    k_tile,
    sample_carried,
    group_carried,
    fresh,
    partial_ptr,  # [N + K] float64: this program's
    workspace_ptr,  # [TILES, BLOCK_M * BLOCK_N] float32: this program's
    sum_ptr,  # [K, BLOCK_M * BLOCK_N] float32: this tile's
    k_sample_ptr,  # [K tiles] int32
    k_group_ptr,  # [K tiles] int32
    samples,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    TILES: tl.constexpr,
    DEFER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """After a K tile with flags. Returns the new (total, sample, sample_carried, group_carried); acc starts from zero.

    ``sample``: with DEFER, the one whose squares the caller must add to the partial sums; otherwise, or if there is
    none, -1.
    """
    size: tl.constexpr = BLOCK_M * BLOCK_N
    offsets = _tile_offsets(BLOCK_M, BLOCK_N)
    sample = -1
    if flags & SAMPLE_ENDS:
        if SPLIT and sample_carried != 0:
            tl.store(workspace_ptr + SAMPLE_IN * size + offsets, acc)
        elif DEFER:
            sample = tl.load(k_sample_ptr + k_tile)
        else:
            add_sum(acc * acc, partial_ptr + tl.load(k_sample_ptr + k_tile), fresh)
    total += acc
    if not ONE_GROUP and flags & GROUP_ENDS:
        if SPLIT and group_carried != 0:
            tl.store(workspace_ptr + GROUP_IN * size + offsets, total)
        else:
            group = tl.load(k_group_ptr + k_tile)
            add_sum(total * total, partial_ptr + samples + group, fresh)
            if STORE_SUMS:
                tl.store(sum_ptr + group.to(tl.int64) * size + offsets, total)
            if WEIGHT_GRAD:
                # Threads may load other elements of a tile than they stored. The sum over the tile above has already
                # synchronised them; a barrier here would keep Triton from pipelining the loop.
                inner = workspace_ptr + (TILES - 1) * size + offsets
                tl.store(inner, total + tl.load(inner))
        group_carried = group_carried * 0
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return total, sample, sample_carried * 0, group_carried


@triton.jit
def tile_epilogue(
    acc,
    total,
    row,  # of the tile, in tiles
    column,
    first,  # the K tiles that were walked
    stop,
    sample_carried,
    group_carried,
    fresh,
    partial_ptr,
    workspace_ptr,
    sum_ptr,  # [K, BLOCK_M * BLOCK_N] float32: this tile's
    product_ptr,  # [K, K] float32, out if LANES: this tile's
    weight_ptr,  # [d_out, d_in], out
    k_tile_ptr,
    k_sample_ptr,
    samples,
    groups,
    d_in,
    d_out,
    SPLIT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    EDGES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """After the last K tile: what the end of the split cuts, or the single group's norm, dW and the products."""
    size: tl.constexpr = BLOCK_M * BLOCK_N
    offsets = _tile_offsets(BLOCK_M, BLOCK_N)
    if SPLIT:
        if stop > first:
            flags = (tl.load(k_tile_ptr + stop - 1) >> FLAG_SHIFT) & 15
            if flags == 0:
                acc = inside_matrix(acc, row, column, d_in, d_out, EDGES, BLOCK_M, BLOCK_N)
                if tl.load(k_sample_ptr + stop - 1) >= 0:
                    tl.store(workspace_ptr + tl.where(sample_carried != 0, SAMPLE_IN, SAMPLE_OUT) * size + offsets, acc)
                total += acc
            if not ONE_GROUP and (flags & GROUP_ENDS) == 0:
                tl.store(workspace_ptr + tl.where(group_carried != 0, GROUP_IN, GROUP_OUT) * size + offsets, total)
        if ONE_GROUP:
            tl.store(workspace_ptr + GROUP_IN * size + offsets, total)
    else:
        if ONE_GROUP:
            add_sum(total * total, partial_ptr + samples, fresh)
        if WEIGHT_GRAD:
            if not ONE_GROUP:
                tl.debug_barrier()
                total = tl.load(workspace_ptr + offsets)
            rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
            columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
            elements = weight_ptr + rows.to(tl.int64)[:, None] * d_in + columns[None, :]
            tl.store(elements, total.to(weight_ptr.dtype.element_ty), mask=inside)
        if LANES > 0:
            group_products(sum_ptr, product_ptr, groups, size, size, LANES)


@triton.jit(do_not_specialize=["samples", "columns", "groups", "tile_first", "tile_stop", "splits"])
def wgrad_sm80_kernel(
    x_ptr,  # [T, d_in], rows of unit stride
    dy_ptr,  # [T, d_out], rows of unit stride
    k_tile_ptr,  # [K tiles + 1] int64: the schedule
    k_sample_ptr,  # [K tiles] int32
    k_group_ptr,  # [K tiles] int32
    count_ptr,  # [1] int32: K tiles
    partial_ptr,  # [programs or tiles, N + K] float64, out: each written by one program
    workspace_ptr,  # [splits, tiles, TILES, BLOCK_M * BLOCK_N] float32, out; without SPLIT [programs, 1, ...] for dW
    sum_ptr,  # [tiles, K, BLOCK_M * BLOCK_N] float32, out if STORE_SUMS: the groups' sums; per program if LANES
    product_ptr,  # [tiles, K, K] float32, out if LANES and not SPLIT: the inner products of the groups' sums
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD; with SPLIT the fix-up writes it
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
    EDGES: tl.constexpr,  # some tiles have a part outside the matrix
    STORE_SUMS: tl.constexpr,
    LANES: tl.constexpr,  # of group_products; 0: they are not wanted, or for torch
    TILES: tl.constexpr,
    ASYNC: tl.constexpr,  # products are asynchronous (wgmma)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Operands by pointer loads, which Triton makes into pipelined asynchronous copies: for Ampere and newer.

    Any strides and widths. On Hopper for what descriptors cannot hold: rows that overlap or are not aligned to 16
    bytes, and float32, whose exact products run on no tensor core.
    """
    program = tl.program_id(0)
    count = tl.load(count_ptr)
    tiles = tile_stop - tile_first
    for turn in tl.range(0, tl.cdiv(tiles * splits - program, tl.num_programs(0)), disable_licm=True):
        work = program + turn * tl.num_programs(0)
        row, column, first, stop, sample_carried, group_carried, own_partial, own_workspace, own_sum, fresh = prologue(
            work,
            program,
            count,
            tiles,
            tile_first,
            splits,
            d_in,
            d_out,
            columns,
            groups,
            k_tile_ptr,
            k_sample_ptr,
            partial_ptr,
            workspace_ptr,
            sum_ptr,
            SPLIT,
            ONE_GROUP,
            WEIGHT_GRAD,
            LANES,
            TILES,
            BLOCK_M,
            BLOCK_N,
            GROUP_M,
        )

        rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.arange(0, BLOCK_K)
        # dy's tile is loaded transposed, as the left operand needs it.
        dy_offsets = rows[:, None] + token[None, :] * dy_stride
        x_offsets = token[:, None] * x_stride + cols[None, :]
        rows_inside = (rows < d_out)[:, None]
        cols_inside = (cols < d_in)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # One K tile ahead: the loads of the next tiles do not wait for the number that says where they are.
        following = tl.load(k_tile_ptr + first)
        stages: tl.constexpr = copies_ahead(x_ptr.dtype.element_ty, STAGES)
        for k_tile in tl.range(first, stop, num_stages=stages, disable_licm=True):
            packed = following
            following = tl.load(k_tile_ptr + k_tile + 1)
            at = packed >> ROW_SHIFT
            live = token < (packed & ROWS_MASK).to(tl.int32)
            a = tl.load(dy_ptr + at * dy_stride + dy_offsets, mask=live[None, :] & rows_inside, other=0.0)
            b = tl.load(x_ptr + at * x_stride + x_offsets, mask=live[:, None] & cols_inside, other=0.0)
            fence_copies(a.dtype)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            flags = (packed >> FLAG_SHIFT) & 15
            if flags != 0:
                total, _, sample_carried, group_carried = segment_epilogue(
                    inside_matrix(acc, row, column, d_in, d_out, EDGES, BLOCK_M, BLOCK_N),
                    total,
                    flags,
                    k_tile,
                    sample_carried,
                    group_carried,
                    fresh,
                    own_partial,
                    own_workspace,
                    own_sum,
                    k_sample_ptr,
                    k_group_ptr,
                    samples,
                    SPLIT,
                    ONE_GROUP,
                    WEIGHT_GRAD,
                    STORE_SUMS,
                    TILES,
                    False,
                    BLOCK_M,
                    BLOCK_N,
                )
                acc = cleared(x_ptr.dtype.element_ty, ASYNC, BLOCK_M, BLOCK_N)
        tile_epilogue(
            acc,
            total,
            row,
            column,
            first,
            stop,
            sample_carried,
            group_carried,
            fresh,
            own_partial,
            own_workspace,
            own_sum,
            product_ptr + (work % tiles).to(tl.int64) * groups * groups,
            weight_ptr,
            k_tile_ptr,
            k_sample_ptr,
            samples,
            groups,
            d_in,
            d_out,
            SPLIT,
            ONE_GROUP,
            WEIGHT_GRAD,
            EDGES,
            LANES,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["samples", "columns", "groups", "tile_first", "tile_stop", "splits"])
def wgrad_sm90_kernel(
    x_desc,  # ragged, of [T, d_in], boxes of [BLOCK_K, BLOCK_N]
    dy_desc,  # ragged, of [T, d_out], boxes of [BLOCK_K, BLOCK_M]
    k_tile_ptr,  # [K tiles + 1] int64: the schedule
    k_sample_ptr,  # [K tiles] int32
    k_group_ptr,  # [K tiles] int32
    count_ptr,  # [1] int32: K tiles
    partial_ptr,  # [programs or tiles, N + K] float64, out: each written by one program
    workspace_ptr,  # [splits, tiles, TILES, BLOCK_M * BLOCK_N] float32, out; without SPLIT [programs, 1, ...] for dW
    sum_ptr,  # [tiles, K, BLOCK_M * BLOCK_N] float32, out if STORE_SUMS: the groups' sums; per program if LANES
    product_ptr,  # [tiles, K, K] float32, out if LANES and not SPLIT: the inner products of the groups' sums
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD; with SPLIT the fix-up writes it
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
    EDGES: tl.constexpr,  # some tiles have a part outside the matrix
    STORE_SUMS: tl.constexpr,
    LANES: tl.constexpr,  # of group_products; 0: they are not wanted, or for torch
    TILES: tl.constexpr,
    ASYNC: tl.constexpr,  # products are asynchronous (wgmma)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Operands through tensor descriptors (TMA), asynchronous products (wgmma): for Hopper.

    The descriptors are "ragged": a load names the rows it may see, and the hardware fills the rest of the tile with
    zeros. The end of a sample needs no mask and no pass over the operands, and copies run ahead across it. The only
    waits besides the pipeline's are at the ends themselves, for the accumulator.
    """
    program = tl.program_id(0)
    count = tl.load(count_ptr)
    tiles = tile_stop - tile_first
    for turn in range(tl.cdiv(tiles * splits - program, tl.num_programs(0))):
        work = program + turn * tl.num_programs(0)
        row, column, first, stop, sample_carried, group_carried, own_partial, own_workspace, own_sum, fresh = prologue(
            work,
            program,
            count,
            tiles,
            tile_first,
            splits,
            d_in,
            d_out,
            columns,
            groups,
            k_tile_ptr,
            k_sample_ptr,
            partial_ptr,
            workspace_ptr,
            sum_ptr,
            SPLIT,
            ONE_GROUP,
            WEIGHT_GRAD,
            LANES,
            TILES,
            BLOCK_M,
            BLOCK_N,
            GROUP_M,
        )

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_M, 8], tl.float32)
        pending = -1
        # One K tile ahead: the loads of the next tiles do not wait for the number that says where they are.
        following = tl.load(k_tile_ptr + first)
        for k_tile in tl.range(first, stop, num_stages=STAGES):
            packed = following
            following = tl.load(k_tile_ptr + k_tile + 1)
            at = (packed >> ROW_SHIFT).to(tl.int32)
            rows = (packed & ROWS_MASK).to(tl.int32)
            a = load_ragged(dy_desc, at, rows, [0, row * BLOCK_M])
            b = load_ragged(x_desc, at, rows, [0, column * BLOCK_N])
            acc = tl.dot(a.T, b, acc, input_precision="ieee")
            # The sample that ended one K tile ago: these products hide its sum.
            add_pending_squares(squares, pending, own_partial, fresh)
            pending = -1
            flags = (packed >> FLAG_SHIFT) & 15
            if flags != 0:
                gradient = inside_matrix(acc, row, column, d_in, d_out, EDGES, BLOCK_M, BLOCK_N)
                squares = thread_squares(gradient, BLOCK_M, BLOCK_N)
                total, pending, sample_carried, group_carried = segment_epilogue(
                    gradient,
                    total,
                    flags,
                    k_tile,
                    sample_carried,
                    group_carried,
                    fresh,
                    own_partial,
                    own_workspace,
                    own_sum,
                    k_sample_ptr,
                    k_group_ptr,
                    samples,
                    SPLIT,
                    ONE_GROUP,
                    WEIGHT_GRAD,
                    STORE_SUMS,
                    TILES,
                    True,
                    BLOCK_M,
                    BLOCK_N,
                )
                acc = cleared(x_desc.dtype, ASYNC, BLOCK_M, BLOCK_N)
        add_pending_squares(squares, pending, own_partial, fresh)
        tile_epilogue(
            acc,
            total,
            row,
            column,
            first,
            stop,
            sample_carried,
            group_carried,
            fresh,
            own_partial,
            own_workspace,
            own_sum,
            product_ptr + (work % tiles).to(tl.int64) * groups * groups,
            weight_ptr,
            k_tile_ptr,
            k_sample_ptr,
            samples,
            groups,
            d_in,
            d_out,
            SPLIT,
            ONE_GROUP,
            WEIGHT_GRAD,
            EDGES,
            LANES,
            BLOCK_M,
            BLOCK_N,
        )


def pointer_config(config: KernelConfig) -> KernelConfig:
    """The config for pointer loads: a descriptor config's width leaves no registers for addresses."""
    pointers = replace(config, block_n=max(16, config.block_n // 2), num_stages=3, descriptors=False)
    return pointers if config.descriptors else config


def workspace_tiles(split: bool, one_group: bool, weight_grad: bool) -> int:
    """The number of workspace tiles per program (TILES)."""
    return 1 if not split else 3 if one_group else 5 if weight_grad else 4


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    if config.nested:
        return []
    pointers = pointer_config(config)
    inputs = {"x_ptr": f"*{element}", "dy_ptr": f"*{element}", "x_stride": "i32", "dy_stride": "i32"}
    options = {"num_stages": pointers.num_stages}
    found = [(*form, options) for form in _forms(wgrad_sm80_kernel, pointers, inputs, element)]
    if config.descriptors:
        rows = f"{element}[1,1,{config.block_k},"
        inputs = {"x_desc": f"tensordesc<{rows}{config.block_n}]>", "dy_desc": f"tensordesc<{rows}{config.block_m}]>"}
        found += [(*form, {}) for form in _forms(wgrad_sm90_kernel, config, inputs, element)]
    return found


def _forms(
    kernel: Any, config: KernelConfig, inputs: dict[str, str], element: str
) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Every form in which a kernel is launched. ``inputs``: the types of the arguments in which the kernels differ."""
    pointers = {"k_tile_ptr": "*i64", "k_sample_ptr": "*i32", "k_group_ptr": "*i32", "count_ptr": "*i32"}
    pointers |= {"partial_ptr": "*fp64", "weight_ptr": f"*{element}"}
    pointers |= dict.fromkeys(("workspace_ptr", "sum_ptr", "product_ptr"), "*fp32")
    sizes = ("d_in", "d_out", "samples", "columns", "groups", "tile_first", "tile_stop", "splits")
    types = inputs | pointers | dict.fromkeys(sizes, "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    tile |= {"GROUP_M": config.group_m, "STAGES": config.num_stages}
    tile["ASYNC"] = asynchronous(config, config.element_bytes)
    found = []
    for edges, split, one_group, weight_grad, store_sums in product((True, False), *[(False, True)] * 4):
        if one_group and store_sums:
            continue
        form: dict[str, Any] = {"SPLIT": split, "ONE_GROUP": one_group, "WEIGHT_GRAD": weight_grad}
        form |= {"STORE_SUMS": store_sums, "EDGES": edges, "TILES": workspace_tiles(split, one_group, weight_grad)}
        # Where the tokens are split, LANES only say that sums are kept per tile, as without them.
        for lanes in (0, PRODUCT_GROUPS) if store_sums and not split else (0,):
            found.append((kernel, types, form | {"LANES": lanes} | tile))
    return found
