"""Norms and inner products from pairs of tokens (``csrc/gram_sm80.cu``, which runs on every architecture)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import Segments
from .. import native
from ..torch.numerics import exact_matmuls, inner, wide_dtype
from . import tables
from .launch import Machine


def norms(
    machine: Machine, x: Tensor, dy: Tensor, segments: Segments, key: Tensor, keys: int, limit: int | None
) -> Tensor:
    """||sum of the gradients of the tokens with one key||^2: [keys] float64.

    ``key`` [S]: the segments' samples or groups. ``limit``: keys of more tokens are left out (their result is 0).
    """
    count, reach, lengths = len(x), None, None
    if limit is not None and limit < count:
        lengths = segments.end - segments.start
        per_key = lengths.new_zeros(keys).index_add_(0, key, lengths)
        lengths = torch.where(per_key[key] <= limit, lengths, 0)
        # Tiles that tokens of one key can be apart, and the tile itself.
        reach = (machine.module.GRAM_TILE - 2 + limit) // machine.module.GRAM_TILE + 1
    return _run(machine, x, dy, tables.tokens(segments, key, keys, count, lengths), keys, reach)


def pairs(machine: Machine, x: Tensor, dy: Tensor, segments: Segments, key: Tensor, keys: int) -> Tensor:
    """The inner products of the sums by key: [keys, keys] float64."""
    return _run(machine, x, dy, tables.tokens(segments, key, keys, len(x)), keys, None, pairwise=True)


def dots(machine: Machine, x: Tensor, dy: Tensor, v: Tensor, segments: Segments, slab: int) -> Tensor:
    """``<G_i, v>`` [N] float64: x times v by torch, at most ``slab`` elements at a time, then sums by samples."""
    dtype = x.dtype if v.dtype == x.dtype else wide_dtype(x.dtype)
    v = v.to(dtype)
    values = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    rows = max(1, slab // max(v.shape))
    with exact_matmuls(x.device):
        for lo in range(0, len(x), rows):
            block = slice(lo, lo + rows)
            values[block] = inner(x[block].to(dtype), v).mul_(dy[block]).sum(1, dtype=torch.float64)
    order = tables.tokens(segments, segments.sample, segments.samples, len(x))
    out = torch.zeros(segments.samples, dtype=torch.float64, device=x.device)
    machine.launch(
        "token_sums",
        values=values,
        token_row=order.row,
        rank_begin=order.begin,
        rank_sample=order.key,
        ranks=len(order.key),
        out=out,
    )
    return out


def _run(
    machine: Machine, x: Tensor, dy: Tensor, order: tables.Tokens, keys: int, reach: int | None, pairwise: bool = False
) -> Tensor:
    tiles = -(-len(x) // machine.module.GRAM_TILE)
    reach = tiles if reach is None else min(reach, tiles)
    fragments = tiles + len(order.key)
    partial = torch.zeros(fragments, fragments if pairwise else reach, dtype=torch.float32, device=x.device)
    machine.launch(
        "gram_sm80",
        x=x,
        dy=dy,
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=native.TYPES[x.dtype],
        tokens=len(x),
        d_in=x.shape[1],
        d_out=dy.shape[1],
        token_row=order.row,
        token_rank=order.rank,
        reach=reach,
        pairwise=pairwise,
        fragments=fragments,
        partial=partial,
    )
    out = torch.zeros((keys, keys) if pairwise else (keys,), dtype=torch.float64, device=x.device)
    machine.launch(
        "gram_sums",
        partial=partial,
        rank_begin=order.begin,
        rank_sample=order.key,
        ranks=len(order.key),
        samples=keys,
        reach=reach,
        fragments=fragments,
        pairwise=pairwise,
        out=out,
    )
    return out
