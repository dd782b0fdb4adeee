"""The cross terms of an embedding tied to a head: ``<H_i, E_j> = sum over t in i, s in j of (x_t . e_s) dy_t[id_s]``.

The head's gradient is ``H_i = sum of dy_t x_t^T`` over its tokens t, the embedding's has ``e_s`` in row id_s for each
of its tokens s. So the cross term is the Gram formula with one of the two inner products replaced by one element of dy:
the tiles, blocks and pieces are those of :mod:`.gram_kernels`, with different tokens on the two sides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments
from .gram import even_rows
from .gram_kernels import LANES, inner
from .gram_order import order
from .rows import on_device, row_sums

#: No config chooses among forms of this kernel.
CONFIGS = ()
_BLOCK = 64
_OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["tokens", "other_tokens", "pieces", "dy_pitch"])
def tied_pairs_kernel(
    x_ptr,  # [T, d_in] the head's inputs, BLOCK_K divides d_in
    dy_ptr,  # [T, vocabulary] the gradients of its outputs
    row_ptr,  # [T] int32: the row of each place, of the head's tokens
    id_ptr,  # [T] int32, ascending: whose it is
    e_ptr,  # [T', d_in] the gradients of the embedding's outputs
    word_ptr,  # [T'] int64: token ids by row, below 0 for what is left out
    other_row_ptr,  # [T'] int32: the row of each place, of the embedding's tokens
    other_id_ptr,  # [T'] int32, ascending
    pair_ptr,  # [pieces of the head, pieces of the embedding] float32, out
    tokens,
    other_tokens,
    x_stride,
    dy_pitch,  # elements from one row of dy to the next, whatever they are
    e_stride,
    d_in,
    pieces,  # of the embedding
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
):
    block = tl.program_id(0)
    other = tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    row = tl.load(row_ptr + place, mask=inside, other=0).to(tl.int64)
    owner = tl.load(id_ptr + place, mask=inside, other=-1)
    other_place = other * BLOCK + tl.arange(0, BLOCK)
    other_inside = other_place < other_tokens
    other_row = tl.load(other_row_ptr + other_place, mask=other_inside, other=0).to(tl.int64)
    word = tl.load(word_ptr + other_row, mask=other_inside, other=-1)
    other_owner = tl.where(word >= 0, tl.load(other_id_ptr + other_place, mask=other_inside, other=-1), -1)

    products = inner(x_ptr, e_ptr, row, other_row, x_stride, e_stride, d_in, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
    weight = tl.load(dy_ptr + row[:, None] * dy_pitch + tl.maximum(word, 0)[None, :]).to(tl.float32)
    # A token without a gradient adds nothing, whatever its x holds (padding may hold NaN).
    terms = tl.where(weight == 0.0, 0.0, products * weight)

    last = tl.load(id_ptr + tl.minimum(block * BLOCK + BLOCK, tokens) - 1)
    other_last = tl.load(other_id_ptr + tl.minimum(other * BLOCK + BLOCK, other_tokens) - 1)
    for mine in range(tl.load(id_ptr + block * BLOCK), last + 1):
        columns = tl.sum(tl.where((owner == mine)[:, None], terms, 0.0), 0)
        piece = (block + mine).to(tl.int64)
        for at in range(tl.load(other_id_ptr + other * BLOCK), other_last + 1, LANES):
            theirs = at + tl.arange(0, LANES)
            sums = tl.sum(tl.where(theirs[:, None] == other_owner[None, :], columns[None, :], 0.0), 1)
            tl.store(pair_ptr + piece * pieces + other + theirs, sums, mask=theirs <= other_last)


def tied_gram(x: Tensor, dy: Tensor, segments: Segments, ids: Tensor, e: Tensor, other: Segments) -> Tensor:
    """``<H_i, E_j>`` [N, N] float64, not symmetric.

    x [T, d], dy [T, vocabulary] of the head's tokens, e [T', d] and ids [T'] (below 0 for tokens to leave out) of the
    embedding's, x and e of one dtype. ``segments`` and ``other`` say whose they are: the same N samples, in order.
    """
    block_k = 16 if x.element_size() == 4 else 64
    x, e, dy = even_rows(x, block_k), even_rows(e, block_k), even_rows(dy, 1)
    places, other_places = order(segments, len(x)), order(other, len(e))
    count = segments.samples
    if not (x.numel() and e.numel() and count):
        return x.new_zeros(count, count, dtype=torch.float64)
    blocks, other_blocks = triton.cdiv(len(x), _BLOCK), triton.cdiv(len(e), _BLOCK)
    pieces = triton.cdiv(other_blocks + count, 16) * 16  # rows begin at multiples of 16 bytes
    pairs = x.new_empty(blocks + count, pieces, dtype=torch.float32)
    with on_device(x):
        tied_pairs_kernel[(blocks, other_blocks)](
            x,
            dy,
            places.row,
            places.sample,
            e,
            ids.long(),
            other_places.row,
            other_places.sample,
            pairs,
            len(x),
            len(e),
            x.stride(0),
            dy.stride(0),
            e.stride(0),
            x.shape[1],
            pieces,
            BLOCK=_BLOCK,
            BLOCK_K=block_k,
            LANES=LANES,
            enable_fp_fusion=True,
            **_OPTIONS,
        )
    half = row_sums(pairs, places.sample_span, pieces=_BLOCK)
    return row_sums(half.T, other_places.sample_span, pieces=_BLOCK).T


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = dict.fromkeys(("x_ptr", "dy_ptr", "e_ptr"), f"*{element}")
    types |= dict.fromkeys(("row_ptr", "id_ptr", "other_row_ptr", "other_id_ptr"), "*i32")
    types |= {"word_ptr": "*i64", "pair_ptr": "*fp32"}
    integers = ("tokens", "other_tokens", "x_stride", "dy_pitch", "e_stride", "d_in", "pieces")
    types |= dict.fromkeys(integers, "i32")
    constants = {"BLOCK": _BLOCK, "BLOCK_K": 16 if element == "fp32" else 64, "LANES": LANES}
    return [(tied_pairs_kernel, types, constants, _OPTIONS)]
