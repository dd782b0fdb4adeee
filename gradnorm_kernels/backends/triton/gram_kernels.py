"""The Gram kernels: inner products of gradients from pairs of tokens, in tiles, with no T x T matrix in memory.

``<G_i, G_j> = sum over t in i, s in j of (x_t . x_s)(dy_t . dy_s)``. For a pair of blocks of BLOCK tokens a program
gathers ``x_t . x_s`` over d_in in one float32 tile and ``dy_t . dy_s`` over d_out in another, multiplies the two and
adds up. Blocks pair with themselves and with earlier ones: symmetry gives the rest.

**Blocks and samples.** Blocks are BLOCK places in a row of the order of :mod:`.gram_order`; they do not stop where a
sample ends. Blocks cut at samples' ends would run almost empty at the 32 to 256 tokens that are the main use: a tile's
work is BLOCK^2 however few tokens are in it. A tile here has BLOCK tokens on both sides, and what belongs to whom is
settled once, on the finished tile, which costs little beside d_in + d_out products an element. Entries are picked by
``tl.where``, never by multiplying with zero: a dot product mixes no tokens, so a NaN stays in its own row and column of
the tile, and picking keeps it out of everybody else's sums.

- :func:`gram_norms_kernel` looks at the tiles near the diagonal only: each token's row of the tile is summed over the
  tokens of the token's own sample. A short sample meets one or two blocks. What comes out is a number a token, added up
  over samples by :func:`.rows.place_sums`. Small blocks waste the least here.
- :func:`gram_pairs_kernel` looks at all tiles, or at those within groups. A *piece* is what one sample (or group) has
  in one block, and its number is ``block + id``. As ids ascend with the places, these numbers are unique and there are
  fewer than blocks + ids of them: nothing is counted and nothing read back. A tile sums its entries to pairs of pieces,
  each written once, and :func:`.rows.row_sums` adds the pieces of a sample in float64.

One form serves sm_80 and sm_90: loads through pointers, pipelined (cp.async), products by mma or wgmma, both operands
with the features contiguous. Rows are gathered, which a tensor descriptor of sm_90 cannot do. There are no masks along
the features: the launch pads what BLOCK_K does not divide, which no model's layers need.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tuning.costs import KernelConfig

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("gram", "gram_norms")
#: Pieces of a block that :func:`gram_pairs_kernel` sums at a time: five are there where samples have 32 tokens.
LANES = 16


@triton.jit
def inner(
    left_ptr,  # [rows, width], BLOCK_K divides width
    right_ptr,  # [rows, width]
    left_row,  # [BLOCK] int64
    right_row,  # [BLOCK] int64
    left_stride,
    right_stride,
    width,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``left_row . right_row`` over the features: [BLOCK, BLOCK] float32."""
    feature = tl.arange(0, BLOCK_K)
    left = left_ptr + left_row[:, None] * left_stride + feature[None, :]
    right = right_ptr + right_row[None, :] * right_stride + feature[:, None]
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    for at in range(0, width, BLOCK_K):
        tile = tl.dot(tl.load(left + at), tl.load(right + at), tile, input_precision="ieee")
    return tile


@triton.jit
def _terms(
    x_ptr,
    dy_ptr,
    left_row,
    right_row,
    x_stride,
    dy_stride,
    d_in,
    d_out,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(x_t . x_s)(dy_t . dy_s)`` for the rows of two blocks: [BLOCK, BLOCK] float32."""
    products = inner(x_ptr, x_ptr, left_row, right_row, x_stride, x_stride, d_in, BLOCK, BLOCK_K)
    return products * inner(dy_ptr, dy_ptr, left_row, right_row, dy_stride, dy_stride, d_out, BLOCK, BLOCK_K)


@triton.jit(do_not_specialize=["tokens", "longest"])
def gram_norms_kernel(
    x_ptr,  # [T, d_in]
    dy_ptr,  # [T, d_out], BLOCK_K divides d_in and d_out
    row_ptr,  # [T] int32: the row of each place
    sample_ptr,  # [T] int32: the sample of each place
    span_ptr,  # [N, 2] int32: first place of each sample and the one after its last
    part_ptr,  # [splits, T] float64, out: each place's share of its sample's norm
    tokens,
    x_stride,
    dy_stride,
    d_in,
    d_out,
    longest,  # samples of more tokens get 0
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    row = tl.load(row_ptr + place, mask=inside, other=0).to(tl.int64)
    sample = tl.load(sample_ptr + place, mask=inside, other=0)
    begin = tl.load(span_ptr + 2 * sample)
    wanted = inside & (tl.load(span_ptr + 2 * sample + 1) - begin <= longest)
    # The earliest block that the wanted ones reach back to; none of them wanted: no block at all.
    first = tl.min(tl.where(wanted, begin // BLOCK, block + 1), 0)
    owner = tl.where(wanted, sample, -1)
    total = tl.zeros([BLOCK], tl.float64)
    for other in range(first + split, block + 1, tl.num_programs(1)):
        other_place = other * BLOCK + tl.arange(0, BLOCK)
        other_inside = other_place < tokens
        other_row = tl.load(row_ptr + other_place, mask=other_inside, other=0).to(tl.int64)
        terms = _terms(x_ptr, dy_ptr, row, other_row, x_stride, dy_stride, d_in, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        other_owner = tl.load(sample_ptr + other_place, mask=other_inside, other=-2)
        sums = tl.sum(tl.where(owner[:, None] == other_owner[None, :], terms, 0.0), 1).to(tl.float64)
        # A pair of different blocks stands for its mirror image as well.
        total += tl.where(other == block, sums, 2 * sums)
    tl.store(part_ptr + split.to(tl.int64) * tokens + place, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "pieces"])
def gram_pairs_kernel(
    x_ptr,  # [T, d_in]
    dy_ptr,  # [T, d_out], BLOCK_K divides d_in and d_out
    row_ptr,  # [T] int32: the row of each place
    id_ptr,  # [T] int32, ascending: the sample (or group) of each place
    pair_ptr,  # [P, P] float32, out, P = blocks + ids: sums over pairs of pieces
    tokens,
    x_stride,
    dy_stride,
    d_in,
    d_out,
    pieces,  # P
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITHIN: tl.constexpr,  # only tiles with an id on both sides: other pairs of pieces are left unwritten
    GROUP: tl.constexpr,  # rows of tiles walked together, for the L2 cache
    LANES: tl.constexpr,  # pieces of a block summed at a time
):
    blocks = tl.cdiv(tokens, BLOCK)
    first_block = tl.program_id(0) // (GROUP * blocks) * GROUP
    height = tl.minimum(blocks - first_block, GROUP)
    block = first_block + tl.program_id(0) % (GROUP * blocks) % height
    other = tl.program_id(0) % (GROUP * blocks) // height
    wanted = other <= block
    if WITHIN:
        reach = tl.load(id_ptr + tl.minimum(other * BLOCK + BLOCK, tokens) - 1)
        wanted = wanted & (reach >= tl.load(id_ptr + block * BLOCK))
    if wanted:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < tokens
        row = tl.load(row_ptr + place, mask=inside, other=0).to(tl.int64)
        owner = tl.load(id_ptr + place, mask=inside, other=-1)
        other_place = other * BLOCK + tl.arange(0, BLOCK)
        other_inside = other_place < tokens
        other_row = tl.load(row_ptr + other_place, mask=other_inside, other=0).to(tl.int64)
        other_owner = tl.load(id_ptr + other_place, mask=other_inside, other=-1)
        terms = _terms(x_ptr, dy_ptr, row, other_row, x_stride, dy_stride, d_in, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        last = tl.load(id_ptr + tl.minimum(block * BLOCK + BLOCK, tokens) - 1)
        other_last = tl.load(id_ptr + tl.minimum(other * BLOCK + BLOCK, tokens) - 1)
        for mine in range(tl.load(id_ptr + block * BLOCK), last + 1):
            columns = tl.sum(tl.where((owner == mine)[:, None], terms, 0.0), 0)
            piece = (block + mine).to(tl.int64)
            for at in range(tl.load(id_ptr + other * BLOCK), other_last + 1, LANES):
                theirs = at + tl.arange(0, LANES)
                sums = tl.sum(tl.where(theirs[:, None] == other_owner[None, :], columns[None, :], 0.0), 1)
                other_piece = (other + theirs).to(tl.int64)
                present = theirs <= other_last
                tl.store(pair_ptr + piece * pieces + other_piece, sums, mask=present)
                if other < block:
                    tl.store(pair_ptr + other_piece * pieces + piece, sums, mask=present)


def signatures(config: KernelConfig, element: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value) of each form, for a compile-only check.

    ``element`` is Triton's name of x's dtype ("bf16", "fp16", "fp32"). All pointers, strides, d_in and d_out are
    divisible by 16, as they are at every launch.
    """
    tile = {"BLOCK": config.block_m, "BLOCK_K": config.block_k}
    arguments = {"x_ptr": f"*{element}", "dy_ptr": f"*{element}", "row_ptr": "*i32"}
    sizes = {"tokens": "i32", "x_stride": "i32", "dy_stride": "i32", "d_in": "i32", "d_out": "i32"}
    if config.kernel == "gram_norms":
        arguments |= {"sample_ptr": "*i32", "span_ptr": "*i32", "part_ptr": "*fp64", **sizes, "longest": "i32"}
        return [(gram_norms_kernel, arguments, tile)]
    arguments |= {"id_ptr": "*i32", "pair_ptr": "*fp32", **sizes, "pieces": "i32"}
    tile |= {"GROUP": config.group_m, "LANES": LANES}
    return [(gram_pairs_kernel, arguments, tile | {"WITHIN": within}) for within in (False, True)]
