"""``<G_i, v> = sum over t in i of dy_t . (v x_t)`` in one pass over x and dy.

A program holds a block of tokens. For one block of v's rows after another it forms the tile of ``v x_t`` in float32,
multiplies it with dy's elements and adds up each token's row. The tile never leaves the registers. The result is one
number per token and split of v's rows, added up per sample in float64. A token's row of a tile depends on no other
token: a NaN stays with its own. Nothing is read back to the host, and the grid comes from sizes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments
from ...tuning.tiles import KernelConfig
from .launch import checked, config_for, copies_ahead, even_rows, fence_copies, on_device, widened
from .reduce import position_sums
from .token_order import order

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("dot",)
# At most so many parts per token: 8 MiB of them for 64k tokens.
_SPLITS = 16
# dy is read in blocks of rows of v, masked at the end. Aligned rows are read 16 bytes at a time.
_EVEN = 16


@triton.jit(do_not_specialize=["tokens", "v_rows", "rows", "splits"])
def dot_kernel(
    x_ptr,  # [T, d_in], BLOCK_K divides d_in
    dy_ptr,  # [T, d_out]
    v_ptr,  # [v_rows, d_in], of x's dtype or float32: zeros where x was padded
    part_ptr,  # [splits, T] float64, out: the part that one split of v's rows has in each token's product
    tokens,
    x_stride,
    dy_stride,
    v_stride,
    d_in,
    d_out,  # padded: a multiple of 16
    v_rows,  # d_out without the padding
    rows,  # of v in a split, a multiple of BLOCK_N
    splits,
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_N: tl.constexpr,  # rows of v
    BLOCK_K: tl.constexpr,  # columns of v
    GROUP: tl.constexpr,  # blocks of tokens walked together, for the L2 cache
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    first_block = tl.program_id(0) // (GROUP * splits) * GROUP
    height = tl.minimum(blocks - first_block, GROUP)
    block = first_block + tl.program_id(0) % (GROUP * splits) % height
    split = tl.program_id(0) % (GROUP * splits) // height

    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Past the end the last token is read again and not stored.
    row = tl.minimum(token, tokens - 1).to(tl.int64)
    feature = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + row[:, None] * x_stride + feature[None, :]
    total = tl.zeros([BLOCK_M], tl.float64)
    for first in range(split * rows, tl.minimum(split * rows + rows, d_out), BLOCK_N):
        out = first + tl.arange(0, BLOCK_N)
        present = out < d_out
        v_row = tl.minimum(out, v_rows - 1).to(tl.int64)
        v_tile = v_ptr + v_row[None, :] * v_stride + feature[:, None]
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in tl.range(0, d_in, BLOCK_K, num_stages=copies_ahead(v_ptr.dtype.element_ty, None)):
            x = tl.load(x_tile + at).to(v_ptr.dtype.element_ty)
            v = tl.load(v_tile + at)
            fence_copies(v.dtype)
            products = tl.dot(x, v, products, input_precision="ieee")
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + out[None, :], mask=present[None, :], other=0.0)
        # Padding is left out, not multiplied: a product may be infinite, and 0 x inf is NaN.
        terms = tl.where((out < v_rows)[None, :], products * dy.to(tl.float32), 0.0)
        total += tl.sum(terms, 1).to(tl.float64)
    tl.store(part_ptr + split.to(tl.int64) * tokens + token, total, mask=token < tokens)


def grad_dot(x: Tensor, dy: Tensor, v: Tensor, segments: Segments, config: KernelConfig | None = None) -> Tensor:
    """``<G_i, v>`` of each sample, [N] float64, for v [d_out, d_in] of any floating dtype.

    A ``v`` of another dtype than x's is taken as float32, and x with it: exact, without tensor cores.
    """
    if v.dtype != x.dtype:
        x, v = widened(x, v.float())
    config = config or config_for("dot", v, v.shape[1], v.shape[0])
    x, dy, v = even_rows(x, config.block_k), even_rows(dy, _EVEN), even_rows(v, config.block_k)
    tokens, d_out = checked(x, dy), dy.shape[1]
    positions = order(segments, tokens)
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
            len(v),
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
    return position_sums(parts, positions.sample_span, positions.row)


def signatures(config: KernelConfig, element: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value) of each form, for a compile-only check.

    ``element`` is Triton's name of v's dtype: a float32 v comes with x of any. All pointers, strides, d_in and d_out
    are divisible by 16, as they are at every launch.
    """
    integers = ("tokens", "x_stride", "dy_stride", "v_stride", "d_in", "d_out", "v_rows", "rows", "splits")
    arguments = {"v_ptr": f"*{element}", "part_ptr": "*fp64"} | dict.fromkeys(integers, "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": config.group_m}
    inputs = ("fp32", "bf16", "fp16") if element == "fp32" else (element,)
    return [(dot_kernel, arguments | {"x_ptr": f"*{x}", "dy_ptr": f"*{x}"}, tile) for x in inputs]
