"""The torch backend: chunked GEMMs through torch's own BLAS, on any device.

Two passes share the work. :func:`_slab_pass` runs the weight-gradient GEMM in slabs of output rows and stops at each
sample's end for its norm; :func:`_short_norms` takes the norms of short samples from their Grams, so that the slab pass
crosses their rows without a stop. For calls with few tokens :func:`_pairs` gets everything from inner products of tokens.

Products accumulate in float32 (float64 for float64 inputs); sums over slabs and tiles are float64. The integer tensors
are read on the host: on a GPU, a call synchronises unless they are on the CPU.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import Plan
from .layout import Layout, Stretch, read
from .numerics import block_sums, exact_matmuls, inner, product_, wide_dtype

# Columns of the float32 product that one step of a Gram of sums takes before it is added in float64.
_GRAM_COLUMNS = 1 << 16


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
    weight_grad: bool,
    group_gram: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    layout = read(x, cu_seqlens, sample_ids, group_ids, sizes)
    x, dy = layout.arrange(x), layout.arrange(dy)
    sample_sq = torch.zeros(layout.samples, dtype=torch.float64, device=x.device)
    group_sq = torch.zeros(layout.groups, dtype=torch.float64, device=x.device)
    gram = torch.zeros(layout.groups, layout.groups, dtype=torch.float64, device=x.device) if group_gram else None
    d_weight = x.new_zeros(dy.shape[1], x.shape[1]) if weight_grad else None
    if not layout.stretches or x.shape[1] == 0 or dy.shape[1] == 0:
        return sample_sq, group_sq, d_weight, gram

    samples = _index([s.sample for s in layout.stretches], x.device)
    runs = [list(members) for _, members in groupby(layout.stretches, key=lambda s: s.group)]
    groups = _index([run[0].group for run in runs], x.device)
    with exact_matmuls(x.device):
        if plan.sums == "gram" and not weight_grad:
            found = _norms_from_pairs(x, dy, runs, plan.tile, group_gram)
        else:
            found = _slab_pass(x, dy, runs, plan, d_weight, group_gram)
    sample_sq[samples] = found.sample_sq
    group_sq[groups] = found.group_sq
    if gram is not None and found.gram is not None:
        gram[groups[:, None], groups] = found.gram
    return sample_sq, group_sq, d_weight, gram


def grad_gram(
    x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None, sizes: checks.Sizes, plan: Plan
) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    layout = read(x, cu_seqlens, sample_ids, None, sizes)
    x, dy = layout.arrange(x), layout.arrange(dy)
    gram = torch.zeros(layout.samples, layout.samples, dtype=torch.float64, device=x.device)
    if not layout.stretches or x.shape[1] == 0 or dy.shape[1] == 0:
        return gram
    samples = _index([s.sample for s in layout.stretches], x.device)
    with exact_matmuls(x.device):
        if plan.sums == "gram":
            found = _pairs(x, dy, layout.stretches, plan.tile)
        else:
            found = _slab_pass(x, dy, [[s] for s in layout.stretches], plan, None, True).gram
    gram[samples[:, None], samples] = found
    return gram


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
) -> Tensor:
    """``<G_i, v> = sum over t of dy_t . (v x_t)`` [N] float64: one product with v, no gradient is formed."""
    layout = read(x, cu_seqlens, sample_ids, None, sizes)
    x, dy = layout.arrange(x), layout.arrange(dy)
    dots = torch.zeros(layout.samples, dtype=torch.float64, device=x.device)
    if not layout.stretches or x.shape[1] == 0 or dy.shape[1] == 0:
        return dots
    dtype = wide_dtype(x.dtype)
    v = v.to(x.dtype if v.dtype == x.dtype else dtype)
    rows = max(1, plan.slab // max(x.shape[1], dy.shape[1]))
    per_token = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    with exact_matmuls(x.device):
        for lo in range(0, x.shape[0], rows):
            block = slice(lo, lo + rows)
            vx = inner(x[block] if v.dtype == x.dtype else x[block].to(dtype), v)
            per_token[block] = vx.mul_(dy[block]).sum(1, dtype=torch.float64)
    lengths = [s.hi - s.lo for s in layout.stretches]
    sums = torch.segment_reduce(per_token, "sum", lengths=_index(lengths, x.device), unsafe=True)
    dots[_index([s.sample for s in layout.stretches], x.device)] = sums
    return dots


class _Norms(NamedTuple):
    """Squared norms of the samples that have rows, of the groups that have rows, and the Gram of the groups' sums."""

    sample_sq: Tensor
    group_sq: Tensor
    gram: Tensor | None


def _index(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _slab_pass(
    x: Tensor, dy: Tensor, runs: list[list[Stretch]], plan: Plan, d_weight: Tensor | None, group_gram: bool
) -> _Norms:
    """Segmented wgrad; ``runs`` are the stretches of each group, ``d_weight`` (zeros) is filled in if given."""
    dtype = wide_dtype(x.dtype)
    d_in, d_out = x.shape[1], dy.shape[1]
    short = [s for run in runs for s in run if s.hi - s.lo <= plan.gram_tokens]
    steps = [_steps(run, plan.gram_tokens) for run in runs]
    places = [i for i, s in enumerate(s for run in runs for s in run) if s.hi - s.lo > plan.gram_tokens]

    held = len(runs) if group_gram else 1
    rows = min(d_out, max(1, plan.slab // (d_in * held)))
    sums = torch.empty(held, rows, d_in, dtype=dtype, device=x.device)
    scratch = torch.empty(rows, d_in, dtype=dtype, device=x.device)
    sample_sq = torch.zeros(len(places), dtype=torch.float64, device=x.device)
    group_sq = torch.zeros(len(runs), dtype=torch.float64, device=x.device)
    gram = torch.zeros(held, held, dtype=torch.float64, device=x.device) if group_gram else None
    partial = torch.empty(len(places), dtype=dtype, device=x.device)
    group_partial = torch.empty(len(runs), dtype=dtype, device=x.device)
    for lo in range(0, d_out, rows):
        columns = slice(lo, min(lo + rows, d_out))
        height = columns.stop - lo
        total = torch.zeros(height, d_in, dtype=dtype, device=x.device) if d_weight is not None else None
        at = 0
        for k, run in enumerate(steps):
            acc = sums[k if group_gram else 0, :height]
            for j, step in enumerate(run):
                slab = scratch[:height] if step.measured and j else acc
                product_(slab, dy[step.lo : step.hi, columns], x[step.lo : step.hi], j > 0 and not step.measured)
                if step.measured:
                    _sum_of_squares(slab, partial[at])
                    at += 1
                    if j:
                        acc.add_(slab)
            _sum_of_squares(acc, group_partial[k])
            if total is not None:
                total.add_(acc)
        sample_sq += partial
        group_sq += group_partial
        if d_weight is not None and total is not None:
            d_weight[columns] = total.to(d_weight.dtype)
        if gram is not None:
            gram += _gram_of_sums(sums[:, :height])
    norms = torch.empty(len(short) + len(places), dtype=torch.float64, device=x.device)
    if short:
        short_places = [i for i, s in enumerate(s for run in runs for s in run) if s.hi - s.lo <= plan.gram_tokens]
        norms[_index(short_places, x.device)] = _short_norms(x, dy, short, plan.tile)
    norms[_index(places, x.device)] = sample_sq
    return _Norms(norms, group_sq, gram)


class _Step(NamedTuple):
    """Rows multiplied in one go; ``measured`` if they are one sample, whose norm is taken from the product."""

    lo: int
    hi: int
    measured: bool


def _steps(run: list[Stretch], gram_tokens: int) -> list[_Step]:
    """A group's stretches with neighbours merged where no norm is to be taken between them."""
    steps: list[_Step] = []
    for s in run:
        measured = s.hi - s.lo > gram_tokens
        if steps and not measured and not steps[-1].measured:
            steps[-1] = _Step(steps[-1].lo, s.hi, False)
        else:
            steps.append(_Step(s.lo, s.hi, measured))
    return steps


def _sum_of_squares(slab: Tensor, out: Tensor) -> None:
    flat = slab.view(-1)
    torch.dot(flat, flat, out=out)


def _gram_of_sums(sums: Tensor) -> Tensor:
    """Inner products of sums [K, rows, d_in], in float32 over a limited stretch and float64 from there on."""
    flat = sums.flatten(1)
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for lo in range(0, flat.shape[1], _GRAM_COLUMNS):
        piece = flat[:, lo : lo + _GRAM_COLUMNS]
        gram += piece @ piece.T
    return gram


def _short_norms(x: Tensor, dy: Tensor, stretches: list[Stretch], tile: int) -> Tensor:
    """``||G_i||^2 = sum over t, s in i of (x_t . x_s)(dy_t . dy_s)``; neighbours of equal length go as one batch."""
    norms = []
    at = 0
    while at < len(stretches):
        lo, hi = stretches[at].lo, stretches[at].hi
        length = hi - lo
        if length > tile:
            norms.append(_pairs(x[lo:hi], dy[lo:hi], [Stretch(0, length, 0, 0)], tile).view(1))
            at += 1
            continue
        most = max(1, tile * tile // (length * length))
        count = 1
        while count < most and at + count < len(stretches) and stretches[at + count][:2] == (hi, hi + length):
            hi += length
            count += 1
        a, b = x[lo:hi].view(count, length, -1), dy[lo:hi].view(count, length, -1)
        norms.append(inner(a, a).mul_(inner(b, b)).sum((1, 2), dtype=torch.float64))
        at += count
    return torch.cat(norms)


def _norms_from_pairs(x: Tensor, dy: Tensor, runs: list[list[Stretch]], tile: int, group_gram: bool) -> _Norms:
    """Everything from pairs of tokens: over the whole batch if the groups' Gram is wanted, else within each group."""
    if group_gram:
        gram = _pairs(x, dy, [s for run in runs for s in run], tile)
        sizes = [len(run) for run in runs]
        group_gram_ = block_sums(gram, sizes, sizes)
        return _Norms(gram.diagonal(), group_gram_.diagonal(), group_gram_)
    blocks = [_pairs(x, dy, run, tile) for run in runs]
    return _Norms(torch.cat([b.diagonal() for b in blocks]), torch.stack([b.sum() for b in blocks]), None)


def _pairs(x: Tensor, dy: Tensor, stretches: list[Stretch], tile: int) -> Tensor:
    """``<G_i, G_j>`` of neighbouring stretches, from tiles of token pairs on and above the diagonal."""
    first, last = stretches[0].lo, stretches[-1].hi
    tiles = []
    at = 0
    for lo in range(first, last, tile):
        hi = min(lo + tile, last)
        while stretches[at].hi <= lo:
            at += 1
        end = at
        while end < len(stretches) and stretches[end].lo < hi:
            end += 1
        tiles.append((slice(lo, hi), slice(at, end), [min(s.hi, hi) - max(s.lo, lo) for s in stretches[at:end]]))
    gram = torch.zeros(len(stretches), len(stretches), dtype=torch.float64, device=x.device)
    for i, (a, a_samples, a_lengths) in enumerate(tiles):
        for b, b_samples, b_lengths in tiles[i:]:
            products = inner(x[a], x[b]).mul_(inner(dy[a], dy[b])).double()
            sums = block_sums(products, a_lengths, b_lengths)
            gram[a_samples, b_samples] += sums
            if b is not a:
                gram[b_samples, a_samples] += sums.T
    return gram
