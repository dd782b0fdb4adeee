"""The torch backend: GEMMs through torch's own BLAS, on any device.

:mod:`.wgrad` takes norms and sums from the weight-gradient GEMM, with a norm at the end of each sample; :mod:`.gram`
takes the norms of short samples from inner products of their tokens, so that the GEMM crosses them in one span, and in
calls with few tokens everything. ``Plan.gram_tokens`` and ``Plan.group_sums`` decide which. :mod:`.dot` takes inner
products with a given matrix, :mod:`.sketch` random projections of the gradients, :mod:`.embedding` norms of embeddings
and of heads tied to them.

Products accumulate in float32 (float64 for float64 inputs), as do the squares within one block of rows; sums over
blocks and tiles are float64. The squares of a gradient's elements between about 1e-19 and 1e16 fit float32.

The integer tensors are read on the host: on a GPU a call synchronises, unless they are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ...batch import GradBatch
from ...checks import DTYPES
from ...segments import HostSegments, Segment, host_segments
from ..base import Backend, Plan
from .dot import grad_dot
from .embedding import embedding_grad_norm, tied_grad_gram
from .gram import pair_gram, sample_norms
from .numerics import block_sums, exact_matmuls, index, zeros
from .sketch import grad_sketch
from .wgrad import Span, SquaredNorms, segmented_wgrad, spans

__all__ = [
    "BACKEND",
    "embedding_grad_norm",
    "fused_grad_norm",
    "grad_dot",
    "grad_gram",
    "grad_sketch",
    "tied_grad_gram",
]

BACKEND = Backend("torch", devices=None, dtypes=DTYPES, priority=0, why="runs everywhere")
# Arguments and result of :func:`.wgrad.segmented_wgrad`, and the row of each token where that is not the tokens' order.
# The cpu backend has a compiled one.
SegmentedWgrad = Callable[[Tensor, Tensor, list[list[Span]], int, Tensor | None, bool, Tensor | None], SquaredNorms]


def fused_grad_norm(
    batch: GradBatch, plan: Plan, wgrad: SegmentedWgrad | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    table = host_segments(batch)
    x, dy = batch.x, batch.dy
    samples, groups = (zeros(x, n) for n in (table.samples, table.groups))
    gram = zeros(x, table.groups, table.groups) if batch.group_gram else None
    if not table.segments or batch.empty:
        return samples, groups, x.new_zeros(batch.d_out, batch.d_in) if batch.weight_grad else None, gram

    total = x.new_empty(batch.d_out, batch.d_in) if batch.weight_grad else None
    by_group = [list(own) for _, own in groupby(table.segments, key=lambda segment: segment.group)]
    with exact_matmuls(x.device):
        if plan.group_sums == "gram" and not batch.weight_grad:
            found = _from_gram(table.arrange(x), table.arrange(dy), by_group, plan.tile, batch.group_gram)
        else:
            found = _from_wgrad(table, x, dy, by_group, plan, total, batch.group_gram, wgrad)
    present = index(x, [own[0].group for own in by_group])
    samples[index(x, [segment.sample for segment in table.segments])] = found.sample_sq
    groups[present] = found.group_sq
    if gram is not None and found.gram is not None:
        gram[present[:, None], present] = found.gram
    return samples, groups, total, gram


def grad_gram(batch: GradBatch, plan: Plan, wgrad: SegmentedWgrad | None = None) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    table = host_segments(batch)
    result = zeros(batch.x, table.samples, table.samples)
    if not table.segments or batch.empty:
        return result
    x, dy = batch.x, batch.dy
    gram: Tensor | None
    with exact_matmuls(x.device):
        if plan.group_sums == "gram":
            gram = pair_gram(table.arrange(x), table.arrange(dy), table.segments, plan.tile)
        else:
            alone = [[Span(segment.tokens, measured=True)] for segment in table.segments]
            gram = _pass(table, x, dy, alone, plan.workspace, None, True, wgrad).gram
    assert gram is not None
    present = index(x, [segment.sample for segment in table.segments])
    result[present[:, None], present] = gram
    return result


def _pass(
    table: HostSegments,
    x: Tensor,
    dy: Tensor,
    groups: list[list[Span]],
    workspace: int,
    weight_grad: Tensor | None,
    group_gram: bool,
    wgrad: SegmentedWgrad | None,
) -> SquaredNorms:
    """Segmented wgrad. A compiled one reads the rows wherever they lie, torch's takes them in the table's order."""
    if wgrad is None:
        x, dy = table.arrange(x), table.arrange(dy)
        return segmented_wgrad(x, dy, groups, workspace, weight_grad, group_gram)
    return wgrad(table.dense(x), table.dense(dy), groups, workspace, weight_grad, group_gram, table.order)


def _from_wgrad(
    table: HostSegments,
    x: Tensor,
    dy: Tensor,
    by_group: list[list[Segment]],
    plan: Plan,
    weight_grad: Tensor | None,
    group_gram: bool,
    wgrad: SegmentedWgrad | None,
) -> SquaredNorms:
    """Sums from segmented wgrad; norms of long samples from there too, of short ones from their Grams."""
    groups = [spans(own, plan.gram_tokens) for own in by_group]
    shortest = min(segment.tokens for segment in table.segments)
    if shortest <= plan.gram_tokens:  # their Grams need the rows in order, which then serve the pass too
        x, dy = table.arrange(x), table.arrange(dy)
        table = replace(table, order=None)
    found = _pass(table, x, dy, groups, plan.workspace, weight_grad, group_gram, wgrad)
    segments = [segment for own in by_group for segment in own]
    short = [i for i, segment in enumerate(segments) if segment.tokens <= plan.gram_tokens]
    if not short:
        return found
    measured = [i for i, segment in enumerate(segments) if segment.tokens > plan.gram_tokens]
    norms = zeros(x, len(segments))
    norms[index(x, short)] = sample_norms(x, dy, [segments[i] for i in short], plan.tile)
    norms[index(x, measured)] = found.sample_sq
    return found._replace(sample_sq=norms)


def _from_gram(x: Tensor, dy: Tensor, by_group: list[list[Segment]], tile: int, group_gram: bool) -> SquaredNorms:
    """Everything from pairs of tokens: of the whole batch if the groups' Gram is wanted, else within each group."""
    if group_gram:
        samples = pair_gram(x, dy, [segment for own in by_group for segment in own], tile)
        sizes = [len(own) for own in by_group]
        groups = block_sums(samples, sizes, sizes)
        return SquaredNorms(samples.diagonal(), groups.diagonal(), groups)
    blocks = [pair_gram(x, dy, own, tile) for own in by_group]
    norms = torch.cat([block.diagonal() for block in blocks])
    return SquaredNorms(norms, torch.stack([block.sum() for block in blocks]), None)
