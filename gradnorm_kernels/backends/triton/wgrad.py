"""Launches segmented wgrad: one pass over x and dy for the norms of samples and groups, and dW.

The schedule is made on the device (:mod:`.wgrad_schedule`), so that nothing synchronises. Programs stay on their
multiprocessor and walk over the tiles of the weight's gradient. Where there are fewer tiles than multiprocessors the
schedule is cut into even splits, wherever that cuts samples, and a fix-up adds what was cut (:mod:`.reduce`). Squared
norms are partial sums in float64, one per program and sample, which only that program adds to. They are added up at the
end: the same bits every time on the same kind of GPU.

B200 and B300 run nested loops (:mod:`.wgrad_sm100`) where there is one group, the schedule is not split, rows fit a
tensor descriptor and Triton is 3.7 or newer, and the flat kernels everywhere else.

Memory besides the results: 8 (N + K) bytes per program (per tile with nested loops), 16 per K tile, and a float32 tile
per program if dW is wanted with several groups: 0.1 and 8.3 MiB for 64 samples at 4096 x 4096 and 65536 tokens on 132
multiprocessors. A split schedule takes a workspace of three to five tiles per program (25 MiB for three).
``group_gram`` holds the sums of up to 16 groups per program, 33 MiB for four and 132 MiB for 16 groups there, and takes
their inner products in the kernel, in one pass. Where that would be more than 256 MiB, and for more groups, it holds
the sums of several tiles, which torch multiplies, and takes as many passes as that needs; so do B200, B300 and Thor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...segments import PlainSegments, Segments
from ...tuning.tiles import KernelConfig
from ..base import Results
from ..torch.numerics import exact_matmuls
from .launch import asynchronous, config_for, has_tensor_memory, on_device
from .products import product_lanes
from .reduce import FIXUP_CHUNK, WARPS, finish, split_fixup_kernel
from .wgrad_kernels import pointer_config, wgrad_sm80_kernel, wgrad_sm90_kernel, workspace_tiles
from .wgrad_schedule import Schedule, ShortSamples, build
from .wgrad_sm100 import COMPILES, fitting_config, flat_config, wgrad_sm100_kernel

# The fewest K tiles that a split should have.
_SPLIT_K_TILES = 4
# A ragged descriptor counts rows up to here, and offsets within a tile are 32-bit numbers.
_MOST_ROWS = 1 << 30
_MOST_OFFSET = (1 << 31) - 1
# On Blackwell the driver makes tensor maps as if the first 128 KiB from their address on were mapped. Where they are
# not, loads may fault (a known issue of NVIDIA's driver 595.71.05). From 3.7 on Triton corrects this for drivers up to
# CUDA 13.1.
_MAPPED = 128 << 10
# The most elements of groups' sums (256 MiB) that are held for kernels that take the inner products themselves.
_SUMS_HELD = 1 << 26


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: its config, how many programs run at a time, and how many splits the schedule has
    (None: as many as the programs need)."""

    config: KernelConfig
    programs: int
    splits: int | None = None


def launch_for(x: Tensor, d_in: int, d_out: int) -> Launch:
    """The launch for x's GPU. Under the interpreter, where x is on the CPU, that of sm_80 on four programs."""
    config = config_for("wgrad", x, d_in, d_out)
    if not x.is_cuda:
        return Launch(config, 4)
    # Four warps leave room for a second program on a multiprocessor, which hides the first one's epilogues. Where
    # loops are nested the program hides its own.
    count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return Launch(config, count * (2 if config.num_warps <= 4 and not config.nested else 1))


def wgrad(
    x: Tensor,
    dy: Tensor,
    segments: Segments | PlainSegments,
    short: ShortSamples | None,
    weight_grad: bool,
    group_gram: bool,
    workspace: int,
    launch: Launch | None = None,
) -> Results:
    """Norms from the weight-gradient GEMM, with an epilogue at the end of each sample that is not ``short``.

    x [T, d_in], dy [T, d_out] with rows of unit stride, no size 0, and at least one segment. ``workspace``: the most
    elements of the groups' sums held at a time where torch multiplies them (one tile of each group where that is more).
    Where the values of index tensors on the GPU were out of range, every result is NaN (dW in its first row).
    """
    tokens, d_in, d_out = x.shape[0], x.shape[1], dy.shape[1]
    launch = launch_for(x, d_in, d_out) if launch is None else launch
    if not (_describable(x) and _describable(dy)):
        launch = replace(launch, config=pointer_config(flat_config(launch.config)))
    elif launch.config.nested:
        able = COMPILES and segments.groups == 1
        config = fitting_config(launch.config, d_in, d_out) if able else flat_config(launch.config)
        launch = replace(launch, config=config)
    config, size = launch.config, launch.config.block_m * launch.config.block_n
    if config.descriptors and _is_blackwell(x):
        x, dy = _roomy(x), _roomy(dy)
    tiles = -(-d_in // config.block_n) * -(-d_out // config.block_m)
    groups, store_sums = segments.groups, group_gram and segments.groups > 1
    splits = launch.splits
    # Sums of every tile where the tokens are split, which are fewer than programs unless splits were asked for.
    held = min(tiles, launch.programs) if splits in (None, 1) else tiles
    # Not where accumulators are in tensor memory: the loop of products makes the kernel spill there.
    own_products = store_sums and held * groups * size <= _SUMS_HELD and not has_tensor_memory(x)
    lanes = product_lanes(groups) if own_products else 0
    step = min(tiles, max(1, workspace // (groups * size))) if store_sums and not lanes else tiles
    if not COMPILES and has_tensor_memory(x) and asynchronous(config, x.element_size()):
        splits = 1  # Triton 3.6 fails to compile the forms for split tokens there
    elif splits is None:
        splits = max(1, min(launch.programs // step, tokens // (_SPLIT_K_TILES * config.block_k)))
    if config.nested and splits > 1:
        flat = replace(launch, config=flat_config(config))
        return wgrad(x, dy, segments, short, weight_grad, group_gram, workspace, flat)
    schedule = build(segments, tokens, short, config.block_k, splits, x.device)
    sums = x.new_empty(held if lanes else step, groups, size, dtype=torch.float32) if store_sums else None
    results = Results.empty(x, segments.samples, groups, x.new_empty(d_out, d_in) if weight_grad else None, group_gram)
    for first in range(0, tiles, step):
        stop = min(tiles, first + step)
        if config.nested:
            partials, fixup, products = _nested(x, dy, schedule, segments, results.weight_grad, launch), None, None
        else:
            partials, fixup, products = _pass(
                x, dy, schedule, segments, first, stop, results.weight_grad, sums, lanes, launch
            )
        if sums is not None and products is None:
            with exact_matmuls(x.device):
                part = sums[: stop - first]
                products = torch.bmm(part, part.mT)
        finish(
            results,
            schedule.state,
            schedule.count,
            partials,
            fixup,
            products,
            first=first == 0,
            last=stop == tiles,
            of_samples=None if short is None else short.norms,
        )
    return results


def _pass(
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    segments: Segments | PlainSegments,
    first: int,
    stop: int,
    weight_grad: Tensor | None,
    sums: Tensor | None,
    lanes: int,
    launch: Launch,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One launch over the tiles ``first`` to ``stop``: (partial sums, those of the fix-up or None, products or None).

    The products [parts, K, K] float32 are those of the groups' sums, with ``lanes`` (:func:`.product_lanes`) if not 0.
    """
    config, tiles = launch.config, stop - first
    size, d_in, d_out = config.block_m * config.block_n, x.shape[1], dy.shape[1]
    columns = segments.samples + segments.groups
    split, one_group = schedule.splits > 1, segments.groups == 1
    work = tiles * schedule.splits
    programs = min(work, launch.programs)
    tiles_held = workspace_tiles(split, one_group, weight_grad is not None)
    slots = work * tiles_held if split else 0 if one_group or weight_grad is None else programs
    workspace = x.new_empty(slots * size, dtype=torch.float32)
    partials = x.new_empty(tiles if split else programs, columns, dtype=torch.float64)
    meta = {
        "ONE_GROUP": one_group,
        "WEIGHT_GRAD": weight_grad is not None,
        "STORE_SUMS": sums is not None,
        "LANES": lanes,
        "TILES": tiles_held,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "enable_fp_fusion": True,
    }
    shared = (schedule.k_tiles, schedule.sample, schedule.group, schedule.count)
    out = x if weight_grad is None else weight_grad
    group_sums = workspace if sums is None else sums
    chunk = min(FIXUP_CHUNK, size)
    parts = tiles * (size // chunk) if split else tiles
    products = x.new_empty(parts, segments.groups, segments.groups, dtype=torch.float32) if lanes else None
    group_products = workspace if products is None else products
    kernel: Any
    operands: tuple[Any, Any]
    strides: tuple[int, ...] = ()
    if config.descriptors:
        kernel = wgrad_sm90_kernel
        operands = _ragged(x, config.block_k, config.block_n), _ragged(dy, config.block_k, config.block_m)
    else:
        kernel = wgrad_sm80_kernel
        operands = _narrow(x, config.block_k), _narrow(dy, config.block_k)
        strides = operands[0].stride(0), operands[1].stride(0)
    with on_device(x):
        kernel[(programs,)](
            *operands,
            *shared,
            partials,
            workspace,
            group_sums,
            group_products,
            out,
            d_in,
            d_out,
            *strides,
            segments.samples,
            columns,
            segments.groups,
            first,
            stop,
            schedule.splits,
            SPLIT=split,
            EDGES=config.edges(d_in, d_out),
            ASYNC=asynchronous(config, x.element_size()),
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **meta,
        )
        if not split:
            return partials, None, products
        fixup = partials.new_empty(schedule.splits, 2, parts)
        split_fixup_kernel[(parts,)](
            *shared,
            workspace,
            fixup,
            group_sums,
            group_products,
            out,
            d_in,
            d_out,
            segments.groups,
            first,
            schedule.splits,
            CHUNK=chunk,
            num_warps=WARPS,
            **meta,
        )
    return partials, fixup, products


def _nested(
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    segments: Segments | PlainSegments,
    weight_grad: Tensor | None,
    launch: Launch,
) -> Tensor:
    """The launch of sm_100's kernel over all tiles: the partial sums [tiles, N + 1]."""
    config, d_in, d_out = launch.config, x.shape[1], dy.shape[1]
    tiles = -(-d_in // config.block_n) * -(-d_out // config.block_m)
    partials = x.new_empty(tiles, segments.samples + 1, dtype=torch.float64)
    with on_device(x):
        wgrad_sm100_kernel[(min(tiles, launch.programs),)](
            _ragged(x, config.block_k, config.block_n),
            _ragged(dy, config.block_k, config.block_m),
            schedule.k_tiles,
            schedule.sample,
            schedule.runs,
            partials,
            x if weight_grad is None else weight_grad,
            d_in,
            d_out,
            segments.samples,
            WEIGHT_GRAD=weight_grad is not None,
            EDGES=config.edges(d_in, d_out),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return partials


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can hold [T, d]: aligned rows that do not overlap."""
    stride, width = tensor.stride(0), tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and stride * width % 16 == 0
    return aligned and stride >= tensor.shape[1] and tensor.shape[0] <= _MOST_ROWS and stride < _MOST_ROWS


def _is_blackwell(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (10, 0)


def _roomy(tensor: Tensor) -> Tensor:
    """``tensor`` [T, d] where 128 KiB of memory begin, with the same strides: copied if there is less behind it."""
    size = tensor.element_size()
    if tensor.untyped_storage().nbytes() - tensor.storage_offset() * size >= _MAPPED:
        return tensor
    held = tensor.new_empty(_MAPPED // size)
    return held.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _ragged(tensor: Tensor, rows: int, columns: int) -> object:
    from triton.tools.ragged_tma import create_ragged_descriptor

    return create_ragged_descriptor(tensor, [rows, columns])


def _narrow(tensor: Tensor, block_k: int) -> Tensor:
    """``tensor`` with offsets within a tile that fit 32 bits: copied if its rows are further apart than that."""
    return tensor if tensor.stride(0) * block_k + tensor.shape[1] <= _MOST_OFFSET else tensor.contiguous()
