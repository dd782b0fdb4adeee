"""Products that accumulate in the wide dtype (float32, or float64 for float64 inputs), and sums over blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...segments import to_device

# Rows widened at a time: bounds the float32 copies of half-precision inputs and costs nothing measurable.
_BLOCK = 4096


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype products accumulate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """Keep the caller's autocast and TF32 or bf16 matmul settings away from the products inside."""
    settings: Any = getattr(torch.backends, "cuda" if device.type == "cuda" else "mkldnn").matmul
    before = settings.fp32_precision
    if before not in ("none", "ieee"):
        settings.fp32_precision = "ieee"
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        if before not in ("none", "ieee"):
            settings.fp32_precision = before


def product_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """``out = a @ b``, or ``out += a @ b``, for a [m, T] and b [T, n] of x's dtype and out [m, n] wide."""
    if a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda:  # tensor cores take half precision as it is and return their float32 accumulators
        result = torch.mm(a, b, out_dtype=out.dtype)
        out.add_(result) if accumulate else out.copy_(result)
    else:
        for lo in range(0, len(b), _BLOCK):
            rows = slice(lo, lo + _BLOCK)
            # a is a transposed view: widen it the way it lies in memory.
            widened = a.T[rows].to(out.dtype).T
            product_(out, widened, b[rows].to(out.dtype), accumulate or lo > 0)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` in the wide dtype, for matrices [m, d], [n, d] or batches of them."""
    dtype = wide_dtype(a.dtype)
    if a.dtype != dtype and a.is_cuda:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b.mT, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype).mT


def block_sums(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Float64 sums of the blocks into which runs of ``rows`` and ``columns`` cut a matrix.

    By segment_reduce: a product with indicator vectors would carry a NaN into its neighbours (NaN times 0), and
    index_add is not deterministic on a GPU.
    """
    matrix = matrix.double()
    for lengths in (rows, columns):
        sizes = to_device(torch.tensor(lengths, device="cpu"), matrix.device)
        matrix = torch.segment_reduce(matrix, "sum", lengths=sizes, unsafe=True, initial=0.0).T.contiguous()
    return matrix


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Float64 zeros on ``like``'s device."""
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def index(like: Tensor, values: list[int]) -> Tensor:
    """``values`` as int64 on ``like``'s device."""
    return to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), like.device)
