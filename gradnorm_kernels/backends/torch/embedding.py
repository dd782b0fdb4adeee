"""Gradients of an embedding matrix: of the embedding's own tokens, and of a head that shares the matrix.

An embedding's gradient ``G_i = sum over t in i of one_hot(id_t) dy_t^T`` has one non-zero row per distinct id, and a
sample has few. The tokens are sorted by (id, owner), an owner being a sample or a group, and each run of equal keys is
added up to one row. ``<G_i, G_j>`` is then the sum of the products of rows over the ids that i and j share: runs with
the same id are neighbours, so that the products lie in tiles near the diagonal.

A tied head's gradient is ``H_i = sum over t in i of dy_t x_t^T``. Its inner products with an embedding's are sums over
pairs of tokens: ``<H_i, G_j> = sum over t in i, s in j of (x_t . e_s) dy_t[id_s]``.

Nothing of the size of the matrix is formed.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...batch import GradBatch
from ...segments import HostSegments, Segment, host_segments, one_sample_per_group, to_device
from ..base import Plan
from .gram import token_tiles
from .numerics import block_sums, exact_matmuls, index, inner, wide_dtype, zeros

# Elements widened to float64 at a time while runs are added up.
_WIDENED = 1 << 22


class _Runs(NamedTuple):
    """One row per distinct (id, owner), sorted by id and then by owner.

    ``sums`` [R, d] in the wide dtype: the gradients added up. ``word`` [R] ascending, ``owner`` [R]: int64.
    """

    sums: Tensor
    word: Tensor
    owner: Tensor


def embedding_grad_norm(batch: GradBatch, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sample_sq_norms [N], group_sq_norms [K], group_gram [K, K] or None), float64."""
    table = host_segments(batch)
    samples, groups = (zeros(batch.dy, n) for n in (table.samples, table.groups))
    gram = zeros(batch.dy, table.groups, table.groups) if batch.group_gram else None
    if not table.segments or batch.empty:
        return samples, groups, gram
    ids, dy = _arrange(table, batch)
    kept = (ids >= 0).nonzero()[:, 0]
    ids, dy = ids[kept], dy[kept]
    sample, group = (owner[kept] for owner in _owners(table, ids))
    with exact_matmuls(dy.device):
        runs = _runs(ids, dy, group, table.groups)
        if gram is None:
            groups = _norms(runs, table.groups)
        else:
            gram = _gram(runs, table.groups, plan.workspace)
            groups = gram.diagonal().clone()
        alone = one_sample_per_group(batch)
        samples = groups.clone() if alone else _norms(_runs(ids, dy, sample, table.samples), table.samples)
    return samples, groups, gram


def tied_grad_gram(head: GradBatch, embedding: GradBatch, plan: Plan) -> tuple[Tensor, Tensor]:
    """(``<H_i, G_i>`` [N], ``<sum H_a, sum G_b>`` [K, K]), float64."""
    mine, theirs = host_segments(head), host_segments(embedding)
    vocabulary = head.d_out
    samples, groups = zeros(head.x, mine.samples), zeros(head.x, mine.groups, mine.groups)
    if not mine.segments or not theirs.segments or head.empty or embedding.empty:
        return samples, groups
    ids, e = _arrange(theirs, embedding)
    if int(ids.max()) >= vocabulary:
        raise ValueError(f"ids must be below the number of rows of the matrix ({vocabulary}), got {int(ids.max())}")
    kept = (ids >= 0).nonzero()[:, 0]
    ids, e, segments = ids[kept], e[kept], _without(theirs, ids >= 0)
    if not segments:
        return samples, groups
    words, word = ids.unique(return_inverse=True)
    if mine.order is not None and 2 * len(words) <= vocabulary:
        # Only the columns of words that occur are read, and only they are put in order.
        dy, ids = mine.arrange(head.dy.index_select(-1, words)), word
    else:
        dy = mine.arrange(head.dy)
    x = mine.arrange(head.x)
    place = {segment.sample: at for at, segment in enumerate(segments)}
    their_groups = [list(own) for _, own in groupby(segments, key=lambda segment: segment.group)]
    their_present = index(x, [own[0].group for own in their_groups])
    members = [len(own) for own in their_groups]
    with exact_matmuls(x.device):
        tiles = token_tiles(segments, plan.tile)
        for head_tile in token_tiles(mine.segments, plan.tile):
            rows = mine.segments[head_tile.segments]
            cross = zeros(x, len(rows), len(segments))
            for tile in tiles:
                terms = inner(x[head_tile.rows], e[tile.rows])
                factor = dy[head_tile.rows].index_select(1, ids[tile.rows])
                # A token without a gradient adds nothing, whatever its x holds: padding may hold NaN.
                terms = torch.where(factor == 0, 0.0, terms * factor)
                cross[:, tile.segments] += block_sums(terms, head_tile.lengths, tile.lengths)
            own = [(at, place[s.sample], s.sample) for at, s in enumerate(rows) if s.sample in place]
            if own:
                at, column, sample = (index(x, list(values)) for values in zip(*own, strict=True))
                samples[sample] += cross[at, column]
            my_groups = [list(part) for _, part in groupby(rows, key=lambda segment: segment.group)]
            sums = block_sums(cross, [len(part) for part in my_groups], members)
            groups[index(x, [part[0].group for part in my_groups])[:, None], their_present] += sums
    return samples, groups


def _arrange(table: HostSegments, batch: GradBatch) -> tuple[Tensor, Tensor]:
    """(ids [T] int64, dy [T, d]) in the table's order."""
    return table.arrange(batch.x[..., None])[:, 0].long(), table.arrange(batch.dy)


def _owners(table: HostSegments, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sample, group) of each row in the table's order: [T] int64."""
    lengths = torch.tensor([segment.tokens for segment in table.segments], device="cpu")
    found = [
        torch.tensor([getattr(segment, name) for segment in table.segments], device="cpu").repeat_interleave(lengths)
        for name in ("sample", "group")
    ]
    return to_device(found[0], like.device), to_device(found[1], like.device)


def _runs(ids: Tensor, dy: Tensor, owner: Tensor, owners: int) -> _Runs:
    """The tokens' gradients added up by (id, owner)."""
    keys, order = torch.sort(ids * owners + owner, stable=True)
    keys, lengths = keys.unique_consecutive(return_counts=True)
    sums = dy.new_empty(len(keys), dy.shape[1], dtype=wide_dtype(dy.dtype))
    width = max(1, _WIDENED // max(len(order), 1))
    for lo in range(0, dy.shape[1], width):
        part = dy[:, lo : lo + width].index_select(0, order).double()
        sums[:, lo : lo + width] = torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True)
    return _Runs(sums, keys.div(max(owners, 1), rounding_mode="floor"), keys.remainder(max(owners, 1)))


def _norms(runs: _Runs, owners: int) -> Tensor:
    """The squared norm of each owner's gradient: [owners] float64."""
    return _by_owner(runs.sums.square().sum(1, dtype=torch.float64), runs.owner, owners)


def _gram(runs: _Runs, owners: int, workspace: int) -> Tensor:
    """``<G_i, G_j>`` [owners, owners] float64, with at most ``workspace`` elements of products held at a time."""
    gram = zeros(runs.sums, owners, owners)
    count = len(runs.word)
    first_of_word = torch.searchsorted(runs.word, runs.word).tolist()
    height = max(1, min(1024, workspace // max(owners, 1), int(workspace**0.5)))
    for lo in range(0, count, height):
        hi, left = min(lo + height, count), first_of_word[lo]
        products = inner(runs.sums[lo:hi], runs.sums[left:hi])
        places = torch.arange(left, hi, device=gram.device)
        same = (runs.word[lo:hi, None] == runs.word[left:hi]) & (places <= places[lo - left :, None])
        row, column = same.nonzero().unbind(1)
        # No two runs of one id have the same owner, so that each product has the place (row, owner) to itself.
        held = zeros(gram, hi - lo, owners)
        held[row, runs.owner[left:hi][column]] = products[row, column].double()
        gram += _by_owner(held, runs.owner[lo:hi], owners)
    # Below the diagonal are the pairs of different owners, each once; on it what a run has with itself.
    return gram + gram.tril(-1).T


def _by_owner(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Sums of rows [R, ...] float64 by owner, in a fixed order: [owners, ...]."""
    ordered, order = torch.sort(owner, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(owners + 1, device=owner.device))
    return torch.segment_reduce(values[order], "sum", lengths=bounds.diff(), unsafe=True, initial=0.0)


def _without(table: HostSegments, kept: Tensor) -> list[Segment]:
    """The table's segments after the rows that are not ``kept`` [T] are dropped; those without rows left out."""
    lengths = torch.tensor([segment.tokens for segment in table.segments], device="cpu")
    counts = torch.segment_reduce(kept.double().cpu(), "sum", lengths=lengths, unsafe=True).long().tolist()
    segments, at = [], 0
    for segment, tokens in zip(table.segments, counts, strict=True):
        if tokens:
            segments.append(segment._replace(start=at, end=at + tokens))
            at += tokens
    return segments
