"""Segmented wgrad: the weight-gradient GEMM in blocks of output rows, with a norm at the end of each sample.

The pass walks the tokens of each group in order. A *span* is what it multiplies in one GEMM: a sample whose norm is
taken from the product, or neighbouring samples whose norms come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segment
from .numerics import product_, wide_dtype

# Columns that one float32 step of the Gram of sums takes before its result is added in float64.
_GRAM_COLUMNS = 1 << 16
# Elements whose squares are summed in float32 before float64: over two million, the sum is off by 2e-5.
_SQUARES = 1 << 18


class Span(NamedTuple):
    """Consecutive tokens that are multiplied in one GEMM.

    ``measured``: they are one sample, whose squared norm is taken from the product.
    """

    tokens: int
    measured: bool


class SquaredNorms(NamedTuple):
    """What segmented wgrad or the Gram of a batch finds, float64.

    ``sample_sq``: of the measured samples, in order. ``group_sq``: of the groups' sums. ``gram``: the inner products of
    the groups' sums, or None.
    """

    sample_sq: Tensor
    group_sq: Tensor
    gram: Tensor | None


def spans(segments: list[Segment], gram_tokens: int) -> list[Span]:
    """A group's segments as spans: those longer than ``gram_tokens`` measured, neighbours among the others merged."""
    merged: list[Span] = []
    unmeasured = 0
    for segment in segments:
        if segment.tokens <= gram_tokens:
            unmeasured += segment.tokens
            continue
        if unmeasured:
            merged.append(Span(unmeasured, False))
            unmeasured = 0
        merged.append(Span(segment.tokens, True))
    if unmeasured:
        merged.append(Span(unmeasured, False))
    return merged


def segmented_wgrad(
    x: Tensor, dy: Tensor, groups: list[list[Span]], workspace: int, weight_grad: Tensor | None, group_gram: bool
) -> SquaredNorms:
    """Run the pass over the spans of each group, which cover the rows in order.

    ``weight_grad`` [d_out, d_in], if given, is overwritten with the sum over the groups.
    At most ``workspace`` elements of the groups' sums are held at a time (one row of each sum where that is more), and
    at most as many again of the current sample and of the total.
    """
    d_in, d_out, dtype = x.shape[1], dy.shape[1], wide_dtype(x.dtype)
    held = len(groups) if group_gram else 1
    samples = sum(span.measured for group in groups for span in group)
    # The total is formed where it is returned if the dtype allows; a lone group's sum is the total.
    in_place = weight_grad if weight_grad is not None and weight_grad.dtype == dtype else None
    if in_place is not None and len(groups) == 1 and not samples:
        rows = d_out  # nothing is held besides the result
    else:
        rows = -(-d_out // -(-d_out // max(1, workspace // (d_in * held))))
    total = x.new_empty(rows if in_place is None else 0, d_in, dtype=dtype)
    sums = x.new_empty(held, rows, d_in, dtype=dtype) if len(groups) > 1 else None
    scratch = x.new_empty(
        rows if any(span.measured for group in groups for span in group[1:]) else 0, d_in, dtype=dtype
    )

    sample_sq, group_sq = x.new_zeros(samples, dtype=torch.float64), x.new_zeros(len(groups), dtype=torch.float64)
    gram = x.new_zeros(held, held, dtype=torch.float64) if group_gram else None
    lengths = [span.tokens for group in groups for span in group]
    x_spans = x.split(lengths)
    for lo in range(0, d_out, rows):
        height = min(rows, d_out - lo)
        operands = zip(dy.T[lo : lo + height].split(lengths, 1), x_spans, strict=True)
        block_total = total[:height] if in_place is None else in_place[lo : lo + height]
        parts = -(-height * d_in // _SQUARES)
        sample_parts, group_parts = (x.new_empty(n, parts, dtype=dtype) for n in (samples, len(groups)))
        sample_out, group_out = (iter(partial.view(-1).unbind()) for partial in (sample_parts, group_parts))
        for k, group in enumerate(groups):
            into = block_total if sums is None else sums[k if group_gram else 0, :height]
            _sum_group(into, scratch[:height], group, operands, sample_out)
            _sum_of_squares(into, group_out)
            if sums is not None and weight_grad is not None:
                block_total.add_(into) if k else block_total.copy_(into)
        sample_sq += sample_parts.sum(1, dtype=torch.float64)
        group_sq += group_parts.sum(1, dtype=torch.float64)
        if weight_grad is not None and in_place is None:
            weight_grad[lo : lo + height] = block_total
        if gram is not None and sums is not None:
            gram += gram_of_sums(sums[:, :height].flatten(1))
    if gram is not None:
        gram.diagonal().copy_(group_sq)
    return SquaredNorms(sample_sq, group_sq, gram)


def _sum_group(
    into: Tensor,
    scratch: Tensor,
    group: list[Span],
    operands: Iterator[tuple[Tensor, Tensor]],
    partial_sums: Iterator[Tensor],
) -> None:
    """One group's sum for one block of rows, from one pair of operands per span.

    The sums of squares of measured spans go to the next of ``partial_sums``.
    """
    for j, (span, (a, b)) in enumerate(zip(group, operands, strict=False)):
        product = scratch if span.measured and j else into
        product_(product, a, b, accumulate=j > 0 and not span.measured)
        if span.measured:
            _sum_of_squares(product, partial_sums)
            if j:
                into.add_(product)


def _sum_of_squares(product: Tensor, partial_sums: Iterator[Tensor]) -> None:
    """The sum of squares of a block of rows, in parts of ``_SQUARES`` elements, to the next of ``partial_sums``."""
    # dot, not vector_norm: on a CPU it is the one of the two that uses all cores at these sizes.
    for part in product.view(-1).split(_SQUARES):
        torch.dot(part, part, out=next(partial_sums))


def gram_of_sums(sums: Tensor) -> Tensor:
    """``sums @ sums.T`` for sums [K, n]: float32 over a limited number of columns, float64 from there on."""
    # One product for all parts: on a GPU a loop would be two launches per part.
    whole = sums.shape[1] // _GRAM_COLUMNS * _GRAM_COLUMNS
    parts = sums[:, :whole].unflatten(1, (-1, _GRAM_COLUMNS)).transpose(0, 1)
    gram = torch.bmm(parts, parts.mT).sum(0, dtype=torch.float64)
    if whole < sums.shape[1]:
        rest = sums[:, whole:]
        gram += rest @ rest.T
    return (gram + gram.T) / 2
