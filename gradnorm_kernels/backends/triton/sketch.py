"""``C_out^T G_i C_in = sum over t in i of (C_out^T dy_t)(C_in^T x_t)^T``: two GEMMs and one segmented product.

torch's BLAS projects the tokens. A program then holds one tile of one split of one segment, and adds up the outer
products of its rows in float32. The parts of a sample are added in a fixed order (:func:`.reduce.row_sums`). Rows of
other segments are masked, so that their NaN does not get in. Nothing is read back to the host, and the grid comes from
sizes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments, rows
from ..torch.numerics import exact_matmuls
from ..torch.sketch import project
from .launch import checked, on_device, widened
from .reduce import row_sums

#: No config chooses among forms of this kernel.
CONFIGS = ()
# A tile of a sketch, and rows per step.
_BLOCK, _BLOCK_K = 64, 32
_OPTIONS = {"num_warps": 4, "num_stages": 3}
# Segments are split until there are about so many programs, if every split keeps so many tokens on average.
_PROGRAMS, _SPLIT_TOKENS = 512, 256


@triton.jit(do_not_specialize=["x_stride", "dy_stride", "r_in", "r_out", "splits"])
def sketch_kernel(
    x_ptr,  # [T, r_in] projected inputs, any float dtype
    dy_ptr,  # [T, r_out] projected output gradients, any float dtype
    start_ptr,  # [S] int64
    end_ptr,  # [S] int64
    part_ptr,  # [S, splits, r_out, r_in] float32, out
    x_stride,
    dy_stride,
    r_in,
    r_out,
    splits,
    BLOCK_M: tl.constexpr,  # columns of dy
    BLOCK_N: tl.constexpr,  # columns of x
    BLOCK_K: tl.constexpr,  # tokens
):
    columns = tl.cdiv(r_in, BLOCK_N)
    tiles = tl.cdiv(r_out, BLOCK_M) * columns
    tile = tl.program_id(0) % tiles
    part = (tl.program_id(0) // tiles).to(tl.int64)
    m = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(start_ptr + part // splits)
    length = (tl.load(end_ptr + part // splits) - start).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_K), splits) * BLOCK_K
    first = (part % splits).to(tl.int32) * share
    stop = tl.minimum(first + share, length)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(first, stop, BLOCK_K):
        token = at + tl.arange(0, BLOCK_K)
        present = token < stop
        row = start + token
        dy = tl.load(
            dy_ptr + row[None, :] * dy_stride + m[:, None], mask=present[None, :] & (m < r_out)[:, None], other=0.0
        )
        x = tl.load(
            x_ptr + row[:, None] * x_stride + n[None, :], mask=present[:, None] & (n < r_in)[None, :], other=0.0
        )
        total = tl.dot(dy.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
    out = part_ptr + part * r_out * r_in + m[:, None] * r_in + n[None, :]
    tl.store(out, total, mask=(m < r_out)[:, None] & (n < r_in)[None, :])


def grad_sketch(x: Tensor, dy: Tensor, c_in: Tensor | None, c_out: Tensor | None, segments: Segments) -> Tensor:
    """``C_out^T G_i C_in`` [N, r_out, r_in] float32.

    x [T, d_in], dy [T, d_out] with rows of unit stride, c_in [d_in, r_in] and c_out [d_out, r_out] or None.
    """
    with exact_matmuls(x.device):
        x, dy = widened(rows(project(x, c_in)), rows(project(dy, c_out)))
    tokens, r_in, r_out, count = checked(x, dy), x.shape[1], dy.shape[1], len(segments.start)
    size = r_out * r_in
    if not (tokens and size and count and segments.samples):
        return x.new_zeros(segments.samples, r_out, r_in, dtype=torch.float32)
    tiles = triton.cdiv(r_out, _BLOCK) * triton.cdiv(r_in, _BLOCK)
    splits = max(1, min(triton.cdiv(_PROGRAMS, count * tiles), tokens // (count * _SPLIT_TOKENS)))
    parts = x.new_empty(count * splits, size, dtype=torch.float32)
    with on_device(x):
        sketch_kernel[(count * splits * tiles,)](
            x,
            dy,
            segments.start,
            segments.end,
            parts,
            x.stride(0),
            dy.stride(0),
            r_in,
            r_out,
            splits,
            BLOCK_M=_BLOCK,
            BLOCK_N=_BLOCK,
            BLOCK_K=_BLOCK_K,
            enable_fp_fusion=True,
            **_OPTIONS,
        )
    # The table is sorted by sample: a sample's segments are neighbours.
    bounds = torch.searchsorted(
        segments.sample, torch.arange(segments.samples + 1, dtype=torch.int32, device=x.device), out_int32=True
    )
    spans = torch.stack([bounds[:-1], bounds[1:]], 1) * splits
    return row_sums(parts, spans, dtype=torch.float32).view(segments.samples, r_out, r_in)


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = {"start_ptr": "*i64", "end_ptr": "*i64", "part_ptr": "*fp32"}
    types |= dict.fromkeys(("x_ptr", "dy_ptr"), f"*{element}")
    types |= dict.fromkeys(("x_stride", "dy_stride", "r_in", "r_out", "splits"), "i32")
    return [(sketch_kernel, types, {"BLOCK_M": _BLOCK, "BLOCK_N": _BLOCK, "BLOCK_K": _BLOCK_K}, _OPTIONS)]
