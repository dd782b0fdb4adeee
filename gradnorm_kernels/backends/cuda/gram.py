"""Norms and inner products from pairs of tokens (``csrc/gram_sm80.cu``, which runs on every architecture)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import PlainSegments, Segments
from .. import native
from ..base import Results
from . import reduce
from .launch import LaunchContext
from .schedule import Schedule, build


class GramPartials(NamedTuple):
    """What a launch left: ``partial`` [partials, reach], or [partials, partials] pairwise, float32."""

    partial: Tensor
    reach: int


def norms(
    context: LaunchContext, x: Tensor, dy: Tensor, segments: Segments | PlainSegments, group_gram: bool
) -> Results:
    """Everything but dW from pairs of tokens, for x [T, d_in] and dy [T, d_out]."""
    schedule = build(
        context, segments, x.shape[0], x.device, gram_tokens=x.shape[0], samples_by_gram=True, groups_by_gram=True
    )
    of_samples = partial_sums(context, x, dy, schedule, None)
    of_groups = partial_sums(context, x, dy, schedule, None, by_group=True, pairwise=group_gram)
    results = Results.empty(x, segments.samples, segments.groups, None, group_gram)
    reduce.finish(context, results, schedule, of_samples=of_samples, of_groups=of_groups)
    return results


def pairs(context: LaunchContext, x: Tensor, dy: Tensor, segments: Segments) -> Tensor:
    """The inner products of the groups' sums: [K, K] float64."""
    schedule = build(context, segments, x.shape[0], x.device, gram_tokens=x.shape[0], groups_by_gram=True)
    of_groups = partial_sums(context, x, dy, schedule, None, by_group=True, pairwise=True)
    gram = x.new_empty(segments.groups, segments.groups, dtype=torch.float64)
    reduce.finish_pairs(context, gram, schedule, of_groups)
    return gram


def partial_sums(
    context: LaunchContext,
    x: Tensor,
    dy: Tensor,
    schedule: Schedule,
    limit: int | None,
    by_group: bool = False,
    pairwise: bool = False,
) -> GramPartials:
    """The sums over pairs of tokens of one sample (or group), or pairwise over all pairs, per pair of tiles.

    ``limit``: no sample among them has more tokens; None: any number.
    """
    tokens = schedule.tokens
    assert tokens is not None
    rank, ranks = (tokens.group_rank, tokens.ranks[1]) if by_group else (tokens.sample_rank, tokens.ranks[0])
    tiles = -(-x.shape[0] // context.module.GRAM_TILE)
    reach = tiles
    if limit is not None:
        # How many tiles apart the tokens of one sample can be, plus the tile itself.
        reach = min(tiles, (context.module.GRAM_TILE - 2 + limit) // context.module.GRAM_TILE + 1)
    partials = tiles + ranks
    partial = x.new_empty(partials, partials if pairwise else reach, dtype=torch.float32)
    context.launch(
        "gram_sm80",
        x=x,
        dy=dy,
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=native.TYPES[x.dtype],
        tokens=x.shape[0],
        d_in=x.shape[1],
        d_out=dy.shape[1],
        token_row=tokens.row,
        token_rank=rank,
        count=tokens.total,
        reach=reach,
        pairwise=pairwise,
        partials=partials,
        partial=partial,
    )
    return GramPartials(partial, reach)
