"""Launching the kernel of grad_dot. Nothing is read back to the host, and the grid comes from sizes alone."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...segments import Segments
from ...tuning.costs import KernelConfig
from .dot_kernels import dot_kernel
from .gram import checked, config_for, even_rows
from .gram_order import order
from .rows import on_device, place_sums

# At most so many parts a token: 8 MiB of them for 64k tokens.
_SPLITS = 16
# dy is read in blocks of rows of v, masked at the end; aligned rows are read 16 bytes at a time.
_EVEN = 16


def grad_dot(x: Tensor, dy: Tensor, v: Tensor, segments: Segments, config: KernelConfig | None = None) -> Tensor:
    """``<G_i, v>`` of each sample, [N] float64, for v [d_out, d_in] of any floating dtype.

    A ``v`` of another dtype than x's is taken as float32, and x with it: exact, without tensor cores.
    """
    if v.dtype != x.dtype:
        v = v.float()
    config = config or config_for("dot", v, v.shape[1], v.shape[0])
    x, dy, v = even_rows(x, config.block_k), even_rows(dy, _EVEN), even_rows(v, config.block_k)
    tokens, d_out = checked(x, dy), dy.shape[1]
    if d_out > len(v):
        v = torch.nn.functional.pad(v, (0, 0, 0, d_out - len(v)))
    places = order(segments, tokens)
    if not (x.numel() and dy.numel() and segments.samples):
        return x.new_zeros(segments.samples, dtype=torch.float64)
    blocks = triton.cdiv(tokens, config.block_m)
    share = triton.cdiv(triton.cdiv(d_out, config.block_n), _SPLITS) * config.block_n
    splits = triton.cdiv(d_out, share)
    parts = x.new_empty(splits, tokens, dtype=torch.float64)
    with on_device(x):
        dot_kernel[(blocks * splits,)](
            x,
            dy,
            v,
            parts,
            tokens,
            x.stride(0),
            dy.stride(0),
            v.stride(0),
            x.shape[1],
            d_out,
            share,
            splits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return place_sums(parts, places.sample_span, places.row)
