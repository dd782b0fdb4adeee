"""Norms and inner products from pairs of tokens (``csrc/gram_sm80.cu``, which runs on every architecture)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import Segments
from .. import native
from . import tables
from .launch import LaunchContext


def norms(
    context: LaunchContext, x: Tensor, dy: Tensor, segments: Segments, key: Tensor, keys: int, limit: int | None
) -> Tensor:
    """||sum of the gradients of the tokens with one key||^2: [keys] float64.

    ``key`` [S]: the segments' samples or groups. ``limit``: keys of more tokens are left out (their result is 0).
    """
    count, reach, lengths = len(x), None, None
    if limit is not None and limit < count:
        lengths = segments.end - segments.start
        per_key = lengths.new_zeros(keys).index_add_(0, key, lengths)
        lengths = torch.where(per_key[key] <= limit, lengths, 0)
        # How many tiles apart the tokens of one key can be, plus the tile itself.
        reach = (context.module.GRAM_TILE - 2 + limit) // context.module.GRAM_TILE + 1
    return _run(context, x, dy, tables.tokens(segments, key, keys, count, lengths), keys, reach)


def pairs(context: LaunchContext, x: Tensor, dy: Tensor, segments: Segments, key: Tensor, keys: int) -> Tensor:
    """The inner products of the sums by key: [keys, keys] float64."""
    return _run(context, x, dy, tables.tokens(segments, key, keys, len(x)), keys, None, pairwise=True)


def _run(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    order: tables.TokenOrder,
    keys: int,
    reach: int | None,
    pairwise: bool = False,
) -> Tensor:
    tiles = -(-len(x) // context.module.GRAM_TILE)
    reach = tiles if reach is None else min(reach, tiles)
    partials = tiles + len(order.key)
    partial = torch.zeros(partials, partials if pairwise else reach, dtype=torch.float32, device=x.device)
    context.launch(
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
        partials=partials,
        partial=partial,
    )
    out = torch.zeros((keys, keys) if pairwise else (keys,), dtype=torch.float64, device=x.device)
    context.launch(
        "gram_sums",
        partial=partial,
        rank_begin=order.begin,
        rank_sample=order.key,
        ranks=len(order.key),
        samples=keys,
        reach=reach,
        partials=partials,
        pairwise=pairwise,
        out=out,
    )
    return out
