"""The kernel of grad_dot: ``<G_i, v> = sum over t in i of dy_t . (v x_t)``, in one pass over x and dy.

A program holds a block of tokens. For one block of v's rows after another it forms the tile of ``v x_t`` in float32,
multiplies it with dy's elements and adds up each token's row; the tile never leaves the registers. What comes out is a
number a token and split of v's rows, added up over samples in float64. A token's row of a tile depends on no other
token: a NaN stays with its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tuning.costs import KernelConfig

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("dot",)


@triton.jit(do_not_specialize=["tokens", "rows", "splits"])
def dot_kernel(
    x_ptr,  # [T, d_in], BLOCK_K divides d_in
    dy_ptr,  # [T, d_out]
    v_ptr,  # [d_out, d_in], of x's dtype or float32: zeros where x and dy were padded
    part_ptr,  # [splits, T] float64, out: the part that one split of v's rows has in each token's product
    tokens,
    x_stride,
    dy_stride,
    v_stride,
    d_in,
    d_out,
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
        v_row = tl.minimum(out, d_out - 1).to(tl.int64)
        v_tile = v_ptr + v_row[None, :] * v_stride + feature[:, None]
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, d_in, BLOCK_K):
            x = tl.load(x_tile + at).to(v_ptr.dtype.element_ty)
            products = tl.dot(x, tl.load(v_tile + at), products, input_precision="ieee")
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + out[None, :], mask=present[None, :], other=0.0)
        terms = tl.where(present[None, :], products * dy.to(tl.float32), 0.0)
        total += tl.sum(terms, 1).to(tl.float64)
    tl.store(part_ptr + split.to(tl.int64) * tokens + token, total, mask=token < tokens)


def signatures(config: KernelConfig, element: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value) of each form, for a compile-only check.

    ``element`` is Triton's name of v's dtype: a float32 v comes with x of any. All pointers, strides, d_in and d_out
    are divisible by 16, as they are at every launch.
    """
    integers = ("tokens", "x_stride", "dy_stride", "v_stride", "d_in", "d_out", "rows", "splits")
    arguments = {"v_ptr": f"*{element}", "part_ptr": "*fp64"} | dict.fromkeys(integers, "i32")
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": config.group_m}
    inputs = ("fp32", "bf16", "fp16") if element == "fp32" else (element,)
    return [(dot_kernel, arguments | {"x_ptr": f"*{x}", "dy_ptr": f"*{x}"}, tile) for x in inputs]
