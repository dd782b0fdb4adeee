"""Projections of per-sample gradients: ``C_out^T G_i C_in = sum over t in i of (C_out^T dy_t)(C_in^T x_t)^T``.

Two GEMMs project the tokens, and one segmented product adds up each sample's outer products of the projections.
"""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import Tensor

from ...batch import GradBatch
from ...segments import Segment, host_segments
from ..base import Plan
from .numerics import exact_matmuls, inner, wide_dtype

# Rows that are widened at a time, and rows of one product of several samples: bounds the copies.
_ROWS = 4096
# Samples of fewer tokens are multiplied in batches of equal length.
_SHORT = 64


def grad_sketch(batch: GradBatch, c_in: Tensor | None, c_out: Tensor | None, plan: Plan) -> Tensor:
    """``C_out^T G_i C_in`` [N, r_out, r_in] in the wide dtype."""
    table = host_segments(batch)
    r_in, r_out = (width if c is None else c.shape[1] for c, width in ((c_in, batch.d_in), (c_out, batch.d_out)))
    sketches = batch.x.new_zeros(table.samples, r_out, r_in, dtype=wide_dtype(batch.x.dtype))
    if not table.segments or batch.empty or not sketches.numel():
        return sketches
    with exact_matmuls(batch.x.device):
        # Projected first: what the table's order copies is narrow then.
        x, dy = (table.arrange(project(tokens.flatten(0, -2), c)) for tokens, c in ((batch.x, c_in), (batch.dy, c_out)))
        at = 0
        while at < len(table.segments):
            own = _equal(table.segments, at)
            _outer_products(sketches, x, dy, own)
            at += len(own)
    return sketches


def project(tokens: Tensor, c: Tensor | None) -> Tensor:
    """``tokens`` [T, d] times ``c`` [d, r] in the wide dtype: [T, r]; the tokens themselves without ``c``."""
    if c is None:
        return tokens
    dtype = wide_dtype(tokens.dtype)
    if c.dtype == tokens.dtype and (tokens.is_cuda or tokens.dtype == dtype):
        return inner(tokens, c.T)
    c = c.to(dtype)
    if tokens.dtype == dtype:
        return tokens @ c
    projected = tokens.new_empty(tokens.shape[0], c.shape[1], dtype=dtype)
    for lo in range(0, len(tokens), _ROWS):
        torch.mm(tokens[lo : lo + _ROWS].to(dtype), c, out=projected[lo : lo + _ROWS])
    return projected


def _equal(segments: list[Segment], first: int) -> list[Segment]:
    """The segments from ``first`` on that one batched product takes: neighbours of equal length, one if it is long."""
    length = segments[first].tokens
    most = max(1, _ROWS // length) if length < _SHORT else 1
    return list(takewhile(lambda segment: segment.tokens == length, segments[first : first + most]))


def _outer_products(sketches: Tensor, x: Tensor, dy: Tensor, own: list[Segment]) -> None:
    """Each segment's ``sum of dy_t x_t^T`` to its sample's place. The segments are neighbours of equal length."""
    start, end, dtype = own[0].start, own[-1].end, sketches.dtype
    if len(own) > 1:
        a, b = (tensor[start:end].to(dtype).unflatten(0, (len(own), -1)) for tensor in (dy, x))
        products = a.mT @ b
        for segment, product in zip(own, products, strict=True):
            sketches[segment.sample] = product
        return
    into = sketches[own[0].sample]
    for lo in range(start, end, _ROWS):
        rows = slice(lo, min(lo + _ROWS, end))
        into.addmm_(dy[rows].to(dtype).T, x[rows].to(dtype))
