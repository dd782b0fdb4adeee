"""Inner products with a given matrix: x times v by torch, then sums per sample (``csrc/reduce.cu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import PlainSegments, Segments
from ..torch.numerics import exact_matmuls, inner, wide_dtype
from .launch import LaunchContext
from .reduce import token_sums
from .schedule import build


def dots(
    context: LaunchContext, x: Tensor, dy: Tensor, v: Tensor, segments: Segments | PlainSegments, workspace: int
) -> Tensor:
    """``<G_i, v>`` [N] float64: x times v by torch, at most ``workspace`` elements at a time, then sums per sample."""
    dtype = x.dtype if v.dtype == x.dtype else wide_dtype(x.dtype)
    v = v.to(dtype)
    values = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    rows = max(1, workspace // max(v.shape))
    with exact_matmuls(x.device):
        for lo in range(0, x.shape[0], rows):
            block = slice(lo, lo + rows)
            values[block] = inner(x[block].to(dtype), v).mul_(dy[block]).sum(1, dtype=torch.float64)
    schedule = build(context, segments, x.shape[0], x.device, gram_tokens=x.shape[0])
    return token_sums(context, values, schedule)
