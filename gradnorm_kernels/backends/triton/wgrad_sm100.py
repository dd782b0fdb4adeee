"""Segmented wgrad for Blackwell's data centre chips (sm_100, sm_103): nested loops, specialised warps, tensor memory.

The flat loop of :mod:`.wgrad_kernels` keeps its accumulator in registers. Tensor cores of sm_100 accumulate in tensor
memory, and there a condition around the accumulator moves it out and in again at every K tile. Here the loops are
nested instead, (tile, run, K tile), and the loop over K tiles has no condition: a *run* of the schedule is a sample, or
neighbours whose norms are not measured, and its accumulator is complete when the inner loop ends.

Triton divides the outer loop among warps (``warp_specialize``): one partition copies through tensor descriptors, one
multiplies, one has the epilogue of each run. With two accumulators in tensor memory the next run's products go on
while the last one's are squared and added up.

It is for one group without a split of the token axis, with and without dW. Samples without tokens have no run, so that
no accumulator is read that nothing was added to. What it lacks runs on the flat kernel (:func:`flat_config`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from ...tuning.tiles import KernelConfig
from .wgrad_schedule import ROW_SHIFT, ROWS_MASK, inside_matrix, tile_position

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("wgrad",)


@triton.jit(do_not_specialize=["samples"])
def wgrad_sm100_kernel(
    x_desc,  # ragged, of [T, d_in], boxes of [BLOCK_K, BLOCK_N]
    dy_desc,  # ragged, of [T, d_out], boxes of [BLOCK_K, BLOCK_M]
    k_tile_ptr,  # [K tiles + 1] int64: the schedule
    k_sample_ptr,  # [K tiles] int32
    run_ptr,  # [S + 2] int32: the number of runs, the first K tile of each, the end of the last
    partial_ptr,  # [tiles, N + 1] float64, out
    weight_ptr,  # [d_out, d_in], out if WEIGHT_GRAD
    d_in,
    d_out,
    samples,  # N
    WEIGHT_GRAD: tl.constexpr,
    EDGES: tl.constexpr,  # some tiles have a part outside the matrix
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every tile has partial sums of its own: none is read again, so that no partition waits for another's stores."""
    runs = tl.load(run_ptr)
    tiles = tl.cdiv(d_out, BLOCK_M) * tl.cdiv(d_in, BLOCK_N)
    program = tl.program_id(0)
    for turn in tl.range(0, tl.cdiv(tiles - program, tl.num_programs(0)), warp_specialize=True):
        tile = program + turn * tl.num_programs(0)
        row, column = tile_position(tile, d_in, d_out, BLOCK_M, BLOCK_N, GROUP_M)
        own_partial = partial_ptr + tile.to(tl.int64) * (samples + 1)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for run in tl.range(0, runs):
            first = tl.load(run_ptr + 1 + run)
            stop = tl.load(run_ptr + 2 + run)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k_tile in tl.range(first, stop, num_stages=STAGES):
                packed = tl.load(k_tile_ptr + k_tile)
                at = (packed >> ROW_SHIFT).to(tl.int32)
                live = (packed & ROWS_MASK).to(tl.int32)
                a = load_ragged(dy_desc, at, live, [0, row * BLOCK_M])
                b = load_ragged(x_desc, at, live, [0, column * BLOCK_N])
                acc = tl.dot(a.T, b, acc)
            gradient = inside_matrix(acc, row, column, d_in, d_out, EDGES, BLOCK_M, BLOCK_N)
            sample = tl.load(k_sample_ptr + stop - 1)
            tl.store(own_partial + sample, tl.sum(gradient * gradient).to(tl.float64), mask=sample >= 0)
            total += gradient
        tl.store(own_partial + samples, tl.sum(total * total).to(tl.float64))
        if WEIGHT_GRAD:
            rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
            columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
            elements = weight_ptr + rows.to(tl.int64)[:, None] * d_in + columns[None, :]
            tl.store(elements, total.to(weight_ptr.dtype.element_ty), mask=inside)


def fitting_config(config: KernelConfig, d_in: int, d_out: int) -> KernelConfig:
    """The config for a matrix: 256 columns only where no tile has a part outside of it. The masks there would spill."""
    if config.block_n <= 128 or not config.edges(d_in, d_out):
        return config
    return replace(config, block_n=128, block_k=64, num_stages=5)


def flat_config(config: KernelConfig) -> KernelConfig:
    """The config of the flat kernel for what this one lacks: two accumulators in registers leave 128 columns."""
    if not config.nested:
        return config
    return replace(config, arch=90, block_n=min(config.block_n, 128), num_stages=4)


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    if not config.nested:
        return []
    narrow = fitting_config(config, 1, 1)
    found = _forms(narrow, element, (True, False))
    return found if narrow == config else found + _forms(config, element, (False,))


def _forms(
    config: KernelConfig, element: str, edges: tuple[bool, ...]
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    rows = f"{element}[1,1,{config.block_k},"
    types = {"x_desc": f"tensordesc<{rows}{config.block_n}]>", "dy_desc": f"tensordesc<{rows}{config.block_m}]>"}
    types |= {"k_tile_ptr": "*i64", "k_sample_ptr": "*i32", "run_ptr": "*i32", "partial_ptr": "*fp64"}
    types |= {"weight_ptr": f"*{element}", "d_in": "i32", "d_out": "i32", "samples": "i32"}
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    tile |= {"GROUP_M": config.group_m, "STAGES": config.num_stages}
    forms = [{"WEIGHT_GRAD": wanted, "EDGES": masked} for masked, wanted in product(edges, (False, True))]
    return [(wgrad_sm100_kernel, types, form | tile, {"num_stages": config.num_stages}) for form in forms]
