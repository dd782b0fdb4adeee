"""Inner products with a given matrix: ``<G_i, v> = sum over t in i of dy_t . (v x_t)``, one product with v."""

from __future__ import annotations

import torch
from torch import Tensor

from ...batch import GradBatch
from ...segments import host_segments
from ..base import Plan
from .numerics import exact_matmuls, index, inner, wide_dtype, zeros


def grad_dot(batch: GradBatch, v: Tensor, plan: Plan) -> Tensor:
    """``<G_i, v>`` [N] float64; no gradient is formed."""
    table = host_segments(batch)
    dots = zeros(batch.x, table.samples)
    if not table.segments or batch.empty:
        return dots
    x, dy = table.arrange(batch.x), table.arrange(batch.dy)
    dtype = x.dtype if v.dtype == x.dtype else wide_dtype(x.dtype)
    v = v.to(dtype)
    tokens = zeros(x, len(x))
    rows = max(1, plan.workspace // max(batch.d_in, batch.d_out))
    with exact_matmuls(x.device):
        for lo in range(0, len(x), rows):
            block = slice(lo, lo + rows)
            tokens[block] = inner(x[block].to(dtype), v).mul_(dy[block]).sum(1, dtype=torch.float64)
    lengths = index(x, [segment.tokens for segment in table.segments])
    sums = torch.segment_reduce(tokens, "sum", lengths=lengths, unsafe=True)
    dots[index(x, [segment.sample for segment in table.segments])] = sums
    return dots
