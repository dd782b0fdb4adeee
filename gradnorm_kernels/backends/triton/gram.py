"""Norms and inner products of gradients from pairs of tokens, in tiles, with no T x T matrix in memory.

``<G_i, G_j> = sum over t in i, s in j of (x_t . x_s)(dy_t . dy_s)``. For a pair of blocks of BLOCK tokens a program
accumulates ``x_t . x_s`` over d_in in one float32 tile and ``dy_t . dy_s`` over d_out in another, multiplies the two
and sums. A block is paired with itself and with earlier ones: symmetry gives the rest.

**Order.** The kernels cut the *positions* of tokens (:mod:`.token_order`) into blocks and look up the row of x and dy
that a position stands for. Gathering whole rows costs nothing extra: along a row the loads are as wide as ever.

**Blocks and samples.** Blocks do not stop where a sample ends. Blocks cut at the ends of samples would be almost empty
at the 32 to 256 tokens that are the main use: the work per tile is BLOCK^2 however few tokens are in it. A tile here
has BLOCK tokens on both sides, and samples are separated once, on the finished tile, which costs little beside
d_in + d_out products per element. Entries are selected by ``tl.where``, never multiplied by zero: a dot product mixes
no tokens, so a NaN stays in its own row and column of the tile, and selecting keeps it out of all other sums.

- :func:`gram_norms_kernel` takes only the tiles near the diagonal: each token's row of the tile is summed over the
  tokens of the token's own sample. A short sample meets one or two blocks. The result is one number per token, added up
  per sample by :func:`.reduce.position_sums`. Small blocks waste the least here.
- :func:`gram_pairs_kernel` takes all tiles, or those within groups. The tokens that one sample (or group) has in one
  block give one *partial sum*, numbered ``block + id``. As ids ascend with the positions, these numbers are unique, and
  there are fewer than blocks + ids of them: nothing is counted and nothing is read back. A tile writes a partial sum
  for each pair of them once, and :func:`.reduce.row_sums` adds those of a sample in float64.

One form serves sm_80 and sm_90: pipelined pointer loads (cp.async), products by mma or wgmma, both operands with the
features contiguous. Rows are gathered, which a tensor descriptor of sm_90 cannot do. There are no masks along the
features: the launch pads what BLOCK_K does not divide, which layers of real models do not need.

All index work stays on the device, grids come from sizes alone, and nothing is read back: a call can be captured in a
CUDA graph. The caller applies ``Segments.guard`` to the results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments
from ...tuning.tiles import KernelConfig
from .launch import checked, config_for, copies_ahead, even_rows, fence_copies, on_device
from .reduce import position_sums, row_sums
from .token_order import TokenOrder, order

#: The kernels of the configs that this module is compiled for.
CONFIGS = ("gram", "gram_norms")
#: Partial sums of a block that :func:`gram_pairs_kernel` computes at a time: samples of 32 tokens make at most five.
LANES = 16
# Programs that keep every multiprocessor of a large GPU busy: few blocks of tokens are split over the blocks they meet.
_PROGRAMS = 512


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
    for at in tl.range(0, width, BLOCK_K, num_stages=copies_ahead(left_ptr.dtype.element_ty, None)):
        a, b = tl.load(left + at), tl.load(right + at)
        fence_copies(a.dtype)
        tile = tl.dot(a, b, tile, input_precision="ieee")
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
    row_ptr,  # [T] int32: the row of each position
    sample_ptr,  # [T] int32: the sample of each position
    span_ptr,  # [N, 2] int32: first position of each sample and the one after its last
    part_ptr,  # [splits, T] float64, out: each position's share of its sample's norm
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
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < tokens
    row = tl.load(row_ptr + position, mask=inside, other=0).to(tl.int64)
    sample = tl.load(sample_ptr + position, mask=inside, other=0)
    begin = tl.load(span_ptr + 2 * sample)
    wanted = inside & (tl.load(span_ptr + 2 * sample + 1) - begin <= longest)
    # The earliest block that the wanted ones reach back to; none of them wanted: no block at all.
    first = tl.min(tl.where(wanted, begin // BLOCK, block + 1), 0)
    own_id = tl.where(wanted, sample, -1)
    total = tl.zeros([BLOCK], tl.float64)
    for other in range(first + split, block + 1, tl.num_programs(1)):
        other_position = other * BLOCK + tl.arange(0, BLOCK)
        other_inside = other_position < tokens
        other_row = tl.load(row_ptr + other_position, mask=other_inside, other=0).to(tl.int64)
        terms = _terms(x_ptr, dy_ptr, row, other_row, x_stride, dy_stride, d_in, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        other_id = tl.load(sample_ptr + other_position, mask=other_inside, other=-2)
        sums = tl.sum(tl.where(own_id[:, None] == other_id[None, :], terms, 0.0), 1).to(tl.float64)
        # A pair of different blocks stands for its mirror image as well.
        total += tl.where(other == block, sums, 2 * sums)
    tl.store(part_ptr + split.to(tl.int64) * tokens + position, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "partials"])
def gram_pairs_kernel(
    x_ptr,  # [T, d_in]
    dy_ptr,  # [T, d_out], BLOCK_K divides d_in and d_out
    row_ptr,  # [T] int32: the row of each position
    id_ptr,  # [T] int32, ascending: the sample (or group) of each position
    pair_ptr,  # [P, P] float32, out, P = blocks + ids: sums over pairs of partials
    tokens,
    x_stride,
    dy_stride,
    d_in,
    d_out,
    partials,  # P
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITHIN: tl.constexpr,  # only tiles with an id on both sides: other pairs of partials are left unwritten
    GROUP: tl.constexpr,  # rows of tiles walked together, for the L2 cache
    LANES: tl.constexpr,  # partials of a block summed at a time
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
        position = block * BLOCK + tl.arange(0, BLOCK)
        inside = position < tokens
        row = tl.load(row_ptr + position, mask=inside, other=0).to(tl.int64)
        own_id = tl.load(id_ptr + position, mask=inside, other=-1)
        other_position = other * BLOCK + tl.arange(0, BLOCK)
        other_inside = other_position < tokens
        other_row = tl.load(row_ptr + other_position, mask=other_inside, other=0).to(tl.int64)
        other_id = tl.load(id_ptr + other_position, mask=other_inside, other=-1)
        terms = _terms(x_ptr, dy_ptr, row, other_row, x_stride, dy_stride, d_in, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        last = tl.load(id_ptr + tl.minimum(block * BLOCK + BLOCK, tokens) - 1)
        other_last = tl.load(id_ptr + tl.minimum(other * BLOCK + BLOCK, tokens) - 1)
        for mine in range(tl.load(id_ptr + block * BLOCK), last + 1):
            columns = tl.sum(tl.where((own_id == mine)[:, None], terms, 0.0), 0)
            partial = (block + mine).to(tl.int64)
            for at in range(tl.load(id_ptr + other * BLOCK), other_last + 1, LANES):
                theirs = at + tl.arange(0, LANES)
                sums = tl.sum(tl.where(theirs[:, None] == other_id[None, :], columns[None, :], 0.0), 1)
                other_partial = (other + theirs).to(tl.int64)
                present = theirs <= other_last
                tl.store(pair_ptr + partial * partials + other_partial, sums, mask=present)
                if other < block:
                    tl.store(pair_ptr + other_partial * partials + partial, sums, mask=present)


def sample_norms(
    x: Tensor, dy: Tensor, positions: TokenOrder, longest: int, config: KernelConfig | None = None
) -> Tensor:
    """``||G_i||^2`` of each sample of at most ``longest`` tokens, 0 for the others: [N] float64."""
    config = config or config_for("gram_norms", x, x.shape[-1], dy.shape[-1])
    x, dy = even_rows(x, config.block_k), even_rows(dy, config.block_k)
    tokens = checked(x, dy)
    if not _any(x, dy, positions):
        return x.new_zeros(len(positions.sample_span), dtype=torch.float64)
    longest = min(longest, tokens)
    blocks = triton.cdiv(tokens, config.block_m)
    # A block meets at most as many blocks as the longest sample reaches back to.
    splits = max(1, min(blocks, triton.cdiv(longest, config.block_m) + 1, _PROGRAMS // blocks))
    parts = x.new_empty(splits, tokens, dtype=torch.float64)
    with on_device(x):
        gram_norms_kernel[(blocks, splits)](
            x,
            dy,
            positions.row,
            positions.sample,
            positions.sample_span,
            parts,
            tokens,
            x.stride(0),
            dy.stride(0),
            x.shape[1],
            dy.shape[1],
            longest,
            BLOCK=config.block_m,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return position_sums(parts, positions.sample_span)


def pair_sums(
    x: Tensor, dy: Tensor, segments: Segments, group_gram: bool, config: KernelConfig | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Everything from pairs of tokens, float64: sample_sq_norms [N], group_sq_norms [K], group_gram [K, K] or None.

    ``config`` is that of the pairs. Without ``group_gram`` only pairs within a group are looked at.
    """
    positions = order(segments, x.shape[0])
    samples = sample_norms(x, dy, positions, x.shape[0])
    groups = _gram(x, dy, positions, config, groups=True, within=not group_gram)
    # A diagonal is a view with another stride, and results of an operator must not share memory.
    return samples, groups.diagonal().clone(), groups if group_gram else None


def pair_gram(x: Tensor, dy: Tensor, segments: Segments, config: KernelConfig | None = None) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64, symmetric. The segments must have one group, or every sample its own."""
    return _gram(x, dy, order(segments, x.shape[0]), config, groups=False, within=False)


def _gram(
    x: Tensor, dy: Tensor, positions: TokenOrder, config: KernelConfig | None, *, groups: bool, within: bool
) -> Tensor:
    """The Gram of samples or groups; ``within``: only its diagonal is defined."""
    config = config or config_for("gram", x, x.shape[-1], dy.shape[-1])
    x, dy = even_rows(x, config.block_k), even_rows(dy, config.block_k)
    tokens = checked(x, dy)
    ids, spans = (positions.group, positions.group_span) if groups else (positions.sample, positions.sample_span)
    count = spans.shape[0]
    if not _any(x, dy, positions):
        return x.new_zeros(count, count, dtype=torch.float64)
    blocks = triton.cdiv(tokens, config.block_m)
    partials = triton.cdiv(blocks + count, 16) * 16  # rows begin at multiples of 16 bytes
    pairs = x.new_empty(partials, partials, dtype=torch.float32)
    with on_device(x):
        gram_pairs_kernel[(blocks * blocks,)](
            x,
            dy,
            positions.row,
            ids,
            pairs,
            tokens,
            x.stride(0),
            dy.stride(0),
            x.shape[1],
            dy.shape[1],
            partials,
            WITHIN=within,
            BLOCK=config.block_m,
            BLOCK_K=config.block_k,
            GROUP=config.group_m,
            LANES=LANES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    half = row_sums(pairs, spans, partials=config.block_m)
    gram = row_sums(half.T, spans, partials=config.block_m)
    # The two triangles add the same numbers in different orders.
    return (gram + gram.T) / 2


def _any(x: Tensor, dy: Tensor, positions: TokenOrder) -> bool:
    """Whether there is anything to add up."""
    return bool(x.numel() and dy.numel() and positions.sample_span.numel())


def signatures(
    config: KernelConfig, element: str = "bf16"
) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a config launches: (kernel, argument -> type, constexpr -> value, options), for a compile-only check.

    ``element`` is Triton's name of x's dtype ("bf16", "fp16", "fp32"). All pointers, strides, d_in and d_out are
    divisible by 16, as they are at every launch.
    """
    tile = {"BLOCK": config.block_m, "BLOCK_K": config.block_k}
    arguments = {"x_ptr": f"*{element}", "dy_ptr": f"*{element}", "row_ptr": "*i32"}
    sizes = {"tokens": "i32", "x_stride": "i32", "dy_stride": "i32", "d_in": "i32", "d_out": "i32"}
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    if config.kernel == "gram_norms":
        types = arguments | {"sample_ptr": "*i32", "span_ptr": "*i32", "part_ptr": "*fp64", **sizes, "longest": "i32"}
        found.append((gram_norms_kernel, types, tile, {}))
    else:
        types = arguments | {"id_ptr": "*i32", "pair_ptr": "*fp32", **sizes, "partials": "i32"}
        tile |= {"GROUP": config.group_m, "LANES": LANES}
        found += [(gram_pairs_kernel, types, tile | {"WITHIN": within}, {}) for within in (False, True)]
    return found
