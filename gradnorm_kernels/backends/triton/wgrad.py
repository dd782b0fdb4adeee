"""Launches segmented wgrad: one pass over x and dy for the norms of samples and groups, and dW.

The list of token blocks is made on the device (:mod:`.wgrad_table`), so that nothing synchronises. Programs stay on
their multiprocessor and walk over the tiles of the weight's gradient. Where there are fewer tiles than multiprocessors
the list is cut into even parts, whatever samples that cuts (:mod:`.wgrad_join`). Squared norms are kept as one float64
a program and sample, which only that program adds to, and added up at the end (:mod:`.reduce`): the same bits every
time on the same kind of GPU.

Memory besides the results: 8 (N + K) bytes a program, 16 a token block, and a float32 tile a program if dW is wanted
with several groups: 0.1 and 8.3 MiB for 64 samples at 4096 x 4096 and 65536 tokens on 132 multiprocessors. Cut lists
take three to five tiles a program (25 MiB for three). ``group_gram`` holds the groups' sums of a slab of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...segments import Segments
from ...tuning import costs as tuning
from ...tuning.costs import KernelConfig
from ..torch.numerics import exact_matmuls
from .reduce import norms
from .rows import on_device
from .wgrad_join import CHUNK_SIZE, WARPS, join_kernel
from .wgrad_sm80 import wgrad_sm80_kernel
from .wgrad_sm90 import wgrad_sm90_kernel
from .wgrad_table import Table, build
from .wgrad_tiles import asynchronous, piece_kinds, pointer_config

# The fewest token blocks that a part of a cut list should have.
_PART_BLOCKS = 4
# A ragged descriptor counts rows up to here, and offsets within a tile are 32-bit numbers.
_MOST_ROWS = 1 << 30
_MOST_OFFSET = (1 << 31) - 1


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: its config, how many programs run at a time, and into how many parts the list is cut
    (None: as many as the programs need)."""

    config: KernelConfig
    programs: int
    splits: int | None = None


@dataclass(frozen=True)
class Wgrad:
    """Squared norms [N] and [K] float64, dW [d_out, d_in] in x's dtype or None, the groups' Gram [K, K] float64 or
    None. Norms of samples that were not measured are 0."""

    sample_sq: Tensor
    group_sq: Tensor
    weight_grad: Tensor | None
    group_gram: Tensor | None


def launch_for(x: Tensor, d_in: int, d_out: int) -> Launch:
    """The launch for x's GPU; under the interpreter, where x is on the CPU, that of sm_80 on four programs."""
    chip = tuning.chip(x.device)
    config = tuning.kernel_config(chip.gpu, chip.arch or 80, "wgrad", x.element_size(), d_in, d_out)
    if not x.is_cuda:
        return Launch(config, 4)
    # Four warps leave room for a second program on a multiprocessor, which hides the first one's stops.
    count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return Launch(config, count * (2 if config.num_warps <= 4 else 1))


def wgrad(
    x: Tensor,
    dy: Tensor,
    segments: Segments,
    gram_tokens: int,
    weight_grad: bool,
    group_gram: bool,
    slab: int,
    launch: Launch | None = None,
) -> Wgrad:
    """Norms from the weight-gradient GEMM, stopping at the end of each sample of more than ``gram_tokens`` tokens.

    x [T, d_in], dy [T, d_out] with rows of unit stride, none of the sizes 0, and at least one segment. ``slab``: the
    most elements of groups' sums held at a time (one tile of each where that is more).
    """
    tokens, d_in, d_out = x.shape[0], x.shape[1], dy.shape[1]
    launch = launch_for(x, d_in, d_out) if launch is None else launch
    if not (_describable(x) and _describable(dy)):
        launch = replace(launch, config=pointer_config(launch.config))
    config, size = launch.config, launch.config.block_m * launch.config.block_n
    tiles = -(-d_in // config.block_n) * -(-d_out // config.block_m)
    groups, store_sums = segments.groups, group_gram and segments.groups > 1
    step = min(tiles, max(1, slab // (groups * size))) if store_sums else tiles
    splits = launch.splits
    if splits is None:
        splits = max(1, min(launch.programs // step, tokens // (_PART_BLOCKS * config.block_k)))
    table = build(segments, tokens, gram_tokens, config.block_k, splits)
    total = x.new_empty(d_out, d_in) if weight_grad else None
    sums = x.new_empty(step, groups, size, dtype=torch.float32) if store_sums else None
    gram = x.new_zeros(groups, groups, dtype=torch.float64) if group_gram else None
    found: Tensor | None = None
    for first in range(0, tiles, step):
        stop = min(tiles, first + step)
        partials, joined = _pass(x, dy, table, segments, first, stop, total, sums, launch)
        found = norms(table.state, partials, joined, segments.samples, found)
        if gram is not None and sums is not None:
            with exact_matmuls(x.device):
                part = sums[: stop - first]
                gram += torch.bmm(part, part.mT).sum(0, dtype=torch.float64)
    assert found is not None
    sample_sq, group_sq = found.split([segments.samples, groups])
    if segments.valid is None:
        # Results of an operator must not share memory; what is guarded is made anew.
        sample_sq, group_sq = sample_sq.clone(), group_sq.clone()
    if gram is not None:
        # Nothing was written for groups without rows.
        there = table.state[segments.samples :] != 0
        gram = torch.where(there[:, None] & there, (gram + gram.T) / 2, 0.0)
        gram.diagonal().copy_(group_sq)
    return Wgrad(sample_sq, group_sq, total, gram)


def _pass(
    x: Tensor,
    dy: Tensor,
    table: Table,
    segments: Segments,
    first: int,
    stop: int,
    weight_grad: Tensor | None,
    sums: Tensor | None,
    launch: Launch,
) -> tuple[Tensor, Tensor | None]:
    """One launch over the tiles ``first`` to ``stop``: (partials, joined partials or None)."""
    config, tiles = launch.config, stop - first
    size, d_in, d_out = config.block_m * config.block_n, x.shape[1], dy.shape[1]
    columns = segments.samples + segments.groups
    split, one_group = table.splits > 1, segments.groups == 1
    work = tiles * table.splits
    programs = min(work, launch.programs)
    kinds = piece_kinds(split, one_group, weight_grad is not None)
    places = work * kinds if split else 0 if one_group or weight_grad is None else programs
    pieces = x.new_empty(places * size, dtype=torch.float32)
    partials = x.new_empty(tiles if split else programs, columns, dtype=torch.float64)
    meta = {
        "ONE_GROUP": one_group,
        "WEIGHT_GRAD": weight_grad is not None,
        "STORE_SUMS": sums is not None,
        "KINDS": kinds,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "enable_fp_fusion": True,
    }
    shared = (table.blocks, table.owner, table.group, table.count)
    out = x if weight_grad is None else weight_grad
    held = pieces if sums is None else sums
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
            pieces,
            held,
            out,
            d_in,
            d_out,
            *strides,
            segments.samples,
            columns,
            segments.groups,
            first,
            stop,
            table.splits,
            SPLIT=split,
            ASYNC=asynchronous(config, x.element_size()),
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **meta,
        )
        if not split:
            return partials, None
        chunk = min(CHUNK_SIZE, size)
        joined = partials.new_empty(table.splits, 2, tiles * (size // chunk))
        join_kernel[(joined.shape[2],)](
            *shared,
            pieces,
            joined,
            held,
            out,
            d_in,
            d_out,
            segments.groups,
            first,
            table.splits,
            CHUNK=chunk,
            num_warps=WARPS,
            **meta,
        )
    return partials, joined


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can hold [T, d]: aligned rows that do not overlap."""
    stride, width = tensor.stride(0), tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and stride * width % 16 == 0
    return aligned and stride >= tensor.shape[1] and tensor.shape[0] <= _MOST_ROWS and stride < _MOST_ROWS


def _ragged(tensor: Tensor, rows: int, columns: int) -> object:
    from triton.tools.ragged_tma import create_ragged_descriptor

    return create_ragged_descriptor(tensor, [rows, columns])


def _narrow(tensor: Tensor, block_k: int) -> Tensor:
    """A tensor whose offsets within a tile fit 32 bits; copied if its rows are further apart than that."""
    return tensor if tensor.stride(0) * block_k + tensor.shape[1] <= _MOST_OFFSET else tensor.contiguous()
