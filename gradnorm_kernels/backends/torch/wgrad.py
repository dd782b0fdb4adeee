"""Segmented wgrad: the weight-gradient GEMM in slabs of output rows, with a norm at each sample's end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import Stretch
from .numerics import product_, wide_dtype

# Columns that one float32 step of the Gram of sums takes before its result is added in float64.
_GRAM_COLUMNS = 1 << 16
# Elements whose squares are summed in float32 before float64: over two million, the sum is off by 2e-5.
_PIECE = 1 << 18


class Step(NamedTuple):
    """Rows multiplied in one go; ``measured`` if they are one sample, whose norm is taken from the product."""

    rows: int
    measured: bool


class Sums(NamedTuple):
    """``sample_sq``: squared norms of the measured samples, in order; ``group_sq`` of the groups; ``gram`` or None."""

    sample_sq: Tensor
    group_sq: Tensor
    gram: Tensor | None


def steps(run: list[Stretch], gram_tokens: int) -> list[Step]:
    """A group's stretches: those longer than ``gram_tokens`` measured, neighbours among the rest merged."""
    merged: list[Step] = []
    unmeasured = 0
    for stretch in run:
        rows = stretch.hi - stretch.lo
        if rows <= gram_tokens:
            unmeasured += rows
            continue
        if unmeasured:
            merged.append(Step(unmeasured, False))
            unmeasured = 0
        merged.append(Step(rows, True))
    if unmeasured:
        merged.append(Step(unmeasured, False))
    return merged


def slab_pass(
    x: Tensor, dy: Tensor, runs: list[list[Step]], slab: int, weight_grad: Tensor | None, group_gram: bool
) -> Sums:
    """Run the pass over the steps of each group, which cover the rows in order.

    ``weight_grad`` [d_out, d_in], if given, is overwritten with the sum.
    At most ``slab`` elements of sums are held at a time (one row of each sum where that is more), and at most as many
    again of the sample at hand and of the total.
    """
    d_in, d_out, dtype = x.shape[1], dy.shape[1], wide_dtype(x.dtype)
    held = len(runs) if group_gram else 1
    samples = sum(step.measured for run in runs for step in run)
    # The total is formed where it is returned if the dtype allows; a lone group's sum is the total.
    in_place = weight_grad if weight_grad is not None and weight_grad.dtype == dtype else None
    if in_place is not None and len(runs) == 1 and not samples:
        rows = d_out  # nothing is held besides the result
    else:
        rows = -(-d_out // -(-d_out // max(1, slab // (d_in * held))))
    total = x.new_empty(rows if in_place is None else 0, d_in, dtype=dtype)
    sums = x.new_empty(held, rows, d_in, dtype=dtype) if len(runs) > 1 else None
    scratch = x.new_empty(rows if any(step.measured for run in runs for step in run[1:]) else 0, d_in, dtype=dtype)

    sample_sq, group_sq = x.new_zeros(samples, dtype=torch.float64), x.new_zeros(len(runs), dtype=torch.float64)
    gram = x.new_zeros(held, held, dtype=torch.float64) if group_gram else None
    sizes = [step.rows for run in runs for step in run]
    x_steps = x.split(sizes)
    for lo in range(0, d_out, rows):
        height = min(rows, d_out - lo)
        operands = zip(dy.T[lo : lo + height].split(sizes, 1), x_steps, strict=True)
        slab_total = total[:height] if in_place is None else in_place[lo : lo + height]
        pieces = -(-height * d_in // _PIECE)
        sample_parts, group_parts = (x.new_empty(n, pieces, dtype=dtype) for n in (samples, len(runs)))
        sample_places, group_places = (iter(parts.view(-1).unbind()) for parts in (sample_parts, group_parts))
        for k, run in enumerate(runs):
            into = slab_total if sums is None else sums[k if group_gram else 0, :height]
            _run_slab(into, scratch[:height], run, operands, sample_places)
            _sum_of_squares(into, group_places)
            if sums is not None and weight_grad is not None:
                slab_total.add_(into) if k else slab_total.copy_(into)
        sample_sq += sample_parts.sum(1, dtype=torch.float64)
        group_sq += group_parts.sum(1, dtype=torch.float64)
        if weight_grad is not None and in_place is None:
            weight_grad[lo : lo + height] = slab_total
        if gram is not None and sums is not None:
            gram += gram_of_sums(sums[:, :height].flatten(1))
    if gram is not None:
        gram.diagonal().copy_(group_sq)
    return Sums(sample_sq, group_sq, gram)


def _run_slab(
    into: Tensor,
    scratch: Tensor,
    run: list[Step],
    operands: Iterator[tuple[Tensor, Tensor]],
    places: Iterator[Tensor],
) -> None:
    """One group's sum for one slab, taking a pair of operands a step; measured steps' sums of squares go to places."""
    for j, (step, (a, b)) in enumerate(zip(run, operands, strict=False)):
        product = scratch if step.measured and j else into
        product_(product, a, b, accumulate=j > 0 and not step.measured)
        if step.measured:
            _sum_of_squares(product, places)
            if j:
                into.add_(product)


def _sum_of_squares(product: Tensor, places: Iterator[Tensor]) -> None:
    """The sum of squares of a slab to the next places, one a piece."""
    # dot, not vector_norm: on a CPU it is the one of the two that uses all cores at these sizes.
    for piece in product.view(-1).split(_PIECE):
        torch.dot(piece, piece, out=next(places))


def gram_of_sums(sums: Tensor) -> Tensor:
    """``sums @ sums.T`` for sums [K, n]: float32 over a limited number of columns, float64 from there on."""
    gram = torch.zeros(len(sums), len(sums), dtype=torch.float64, device=sums.device)
    for lo in range(0, sums.shape[1], _GRAM_COLUMNS):
        part = sums[:, lo : lo + _GRAM_COLUMNS]
        gram += part @ part.T
    return (gram + gram.T) / 2
