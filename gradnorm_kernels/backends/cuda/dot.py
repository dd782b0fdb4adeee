"""Inner products with a given matrix: x times v by torch, then sums per sample (``csrc/reduce.cu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import Segments
from ..torch.numerics import exact_matmuls, inner, wide_dtype
from . import tables
from .launch import LaunchContext


def dots(context: LaunchContext, x: Tensor, dy: Tensor, v: Tensor, segments: Segments, workspace: int) -> Tensor:
    """``<G_i, v>`` [N] float64: x times v by torch, at most ``workspace`` elements at a time, then sums per sample."""
    dtype = x.dtype if v.dtype == x.dtype else wide_dtype(x.dtype)
    v = v.to(dtype)
    values = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    rows = max(1, workspace // max(v.shape))
    with exact_matmuls(x.device):
        for lo in range(0, len(x), rows):
            block = slice(lo, lo + rows)
            values[block] = inner(x[block].to(dtype), v).mul_(dy[block]).sum(1, dtype=torch.float64)
    order = tables.tokens(segments, segments.sample, segments.samples, len(x))
    out = torch.zeros(segments.samples, dtype=torch.float64, device=x.device)
    context.launch(
        "token_sums",
        values=values,
        token_row=order.row,
        rank_begin=order.begin,
        rank_sample=order.key,
        ranks=len(order.key),
        out=out,
    )
    return out
