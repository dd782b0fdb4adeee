"""Inner products of an embedding's gradients, and their cross terms with a tied head's.

The embedding: ``<G_i, G_j> = sum over t in i, s in j with the same token id of dy_t . dy_s``. Its gradient has a row
for each token id, and a sample touches few. Tokens are sorted by (id, sample); a sample may also stand for a block of
samples. Tokens with the same (id, sample) are added up to one row ``E``, so that ``<G_i, G_j>`` is the sum of
``E_r . E_s`` over the ids that i and j share. Rows of one id are neighbours: tiles of pairs lie near the diagonal, like
those of short samples in :mod:`.gram`. In one row r of the tiles no two rows of r's id have the same sample, so that
``E_r . E_s`` has the element (r, sample of s) to itself. What is added up afterwards, in float64 and in a fixed order,
are rows of one sample. There is no [N, vocabulary, d], there are no atomics, and nothing is read back: there are at
most T rows.

The tied head: ``<H_i, E_j> = sum over t in i, s in j of (x_t . e_s) dy_t[id_s]``. The head's gradient is
``H_i = sum of dy_t x_t^T`` over its tokens t; the embedding's has ``e_s`` in row id_s for each of its tokens s. So the
cross term is the Gram formula with one of the two inner products replaced by one element of dy. Tiles, blocks and
partial sums are those of :mod:`.gram`, with different tokens on the two sides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments
from .gram import LANES, inner
from .launch import even_rows, on_device
from .reduce import position_sums, row_sums
from .token_order import order

#: No config chooses among forms of these kernels.
CONFIGS = ()
_BLOCK, _BLOCK_K = 64, 16
_OPTIONS = {"num_warps": 4, "num_stages": 3}
# The most elements of (row, sample) held at a time: 64 MiB.
_HELD = 1 << 24


@triton.jit(do_not_specialize=["rows", "first_row", "pitch"])
def embedding_pairs_kernel(
    sum_ptr,  # [R, d_out] float32: E; BLOCK_K divides d_out
    id_ptr,  # [R] int64, ascending: each index's id, below 0 for what is left out
    begin_ptr,  # [R] int32: the first index with that id
    sample_ptr,  # [R] int32
    pair_ptr,  # [rows, samples] float32 out, rows ``pitch`` apart, zero before: E_r . E_s at (r, sample of s), s <= r
    rows,
    first_row,  # the first of the rows of pair_ptr, a multiple of BLOCK
    pitch,
    sum_stride,
    d_out,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = first_row // BLOCK + tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    word = tl.load(id_ptr + index, mask=inside, other=-1)
    begin = tl.load(begin_ptr + index, mask=inside, other=0)
    # What is left out sorts first: its rows reach back to nowhere.
    first = tl.min(tl.where(word >= 0, begin // BLOCK, block + 1), 0)
    row = tl.minimum(index, rows - 1).to(tl.int64)
    for other in range(first, block + 1):
        other_index = other * BLOCK + tl.arange(0, BLOCK)
        other_row = tl.minimum(other_index, rows - 1).to(tl.int64)
        terms = inner(sum_ptr, sum_ptr, row, other_row, sum_stride, sum_stride, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        other_word = tl.load(id_ptr + other_index, mask=other_index < rows, other=-2)
        other_sample = tl.load(sample_ptr + other_index, mask=other_index < rows, other=0)
        keep = (word >= 0)[:, None] & (word[:, None] == other_word[None, :]) & (other_index[None, :] <= index[:, None])
        offset = (index - first_row).to(tl.int64)[:, None] * pitch + other_sample[None, :]
        tl.store(pair_ptr + offset, terms, mask=keep)


def _sorted_rows(ids: Tensor, sample: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens sorted by (id, sample): (the token at each position, spans of the rows, their ids, their samples).

    There are T rows, of which the last ones are empty; their id is -1.
    """
    key, token = torch.sort(ids.long().clamp_min(-1) * samples + sample, stable=True)
    count = torch.arange(len(key), device=key.device)
    index = torch.cat([count[:1], (key[1:] != key[:-1]).cumsum(0)])
    begin, stop = torch.searchsorted(index, count), torch.searchsorted(index, count, right=True)
    row_key = torch.where(begin < stop, key[begin.clamp_max(len(key) - 1)], -samples)
    spans = torch.stack([begin, stop], 1).int()
    return token.int(), spans, row_key.div(samples, rounding_mode="floor"), row_key.remainder(samples).int()


def _spans(sample: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(order, spans [samples, 2]) of values sorted by sample, those below 0 left out."""
    ordered, order = torch.sort(sample, stable=True)
    ids = torch.arange(samples, dtype=ordered.dtype, device=sample.device)
    ends = [torch.searchsorted(ordered, ids, right=right) for right in (False, True)]
    return order.int(), torch.stack(ends, 1).int()


def embedding_norms(ids: Tensor, dy: Tensor, sample: Tensor, samples: int) -> Tensor:
    """``||G_i||^2`` of each sample, [samples] float64; arguments as in :func:`embedding_gram`."""
    if not dy.numel():
        return dy.new_zeros(samples, dtype=torch.float64)
    token, spans, word, row_sample = _sorted_rows(ids, sample, samples)
    sums = row_sums(dy, spans, token, short=True, dtype=torch.float32)
    squares = torch.linalg.vector_norm(sums, dim=1).double().square()
    order, spans_of = _spans(torch.where(word >= 0, row_sample, -1), samples)
    return position_sums(squares[None], spans_of, order)


def embedding_gram(ids: Tensor, dy: Tensor, sample: Tensor, samples: int) -> Tensor:
    """``<G_i, G_j>`` [samples, samples] float64, symmetric.

    ids [T] int, below 0 for tokens to leave out; dy [T, d] float32, bfloat16 or float16; sample [T] int in
    [0, samples).
    """
    gram = dy.new_zeros(samples, samples, dtype=torch.float64)
    if not (dy.numel() and samples):
        return gram
    token, spans, word, row_sample = _sorted_rows(ids, sample, samples)
    sums = even_rows(row_sums(dy, spans, token, short=True, dtype=torch.float32), _BLOCK_K)
    # Empty rows at the end would break the order of the ids. They belong to no id.
    ordered = torch.where(spans[:, 0] < spans[:, 1], word, torch.iinfo(torch.int64).max)
    begin = torch.searchsorted(ordered, ordered).int()
    pitch = triton.cdiv(samples, 16) * 16  # other strides would compile row_sums again
    height = max(1, _HELD // pitch // _BLOCK) * _BLOCK
    for first in range(0, len(sums), height):
        rows = min(height, len(sums) - first)
        pairs = sums.new_zeros(rows, pitch)[:, :samples]
        with on_device(sums):
            embedding_pairs_kernel[(triton.cdiv(rows, _BLOCK),)](
                sums,
                word,
                begin,
                row_sample,
                pairs,
                len(sums),
                first,
                pitch,
                sums.stride(0),
                sums.shape[1],
                BLOCK=_BLOCK,
                BLOCK_K=_BLOCK_K,
                enable_fp_fusion=True,
                **_OPTIONS,
            )
        part = slice(first, first + rows)
        order, spans_of = _spans(torch.where(word[part] >= 0, row_sample[part], -1), samples)
        gram += row_sums(pairs, spans_of, order)
    # Below the diagonal are the pairs of different samples, each once; on it the product of each row with itself.
    return gram + gram.tril(-1).T


@triton.jit(do_not_specialize=["tokens", "other_tokens", "partials", "dy_pitch"])
def tied_pairs_kernel(
    x_ptr,  # [T, d_in] the head's inputs, BLOCK_K divides d_in
    dy_ptr,  # [T, vocabulary] the gradients of its outputs
    row_ptr,  # [T] int32: the row of each position, of the head's tokens
    id_ptr,  # [T] int32, ascending: its sample
    e_ptr,  # [T', d_in] the gradients of the embedding's outputs
    word_ptr,  # [T'] int64: token ids by row, below 0 for what is left out
    other_row_ptr,  # [T'] int32: the row of each position, of the embedding's tokens
    other_id_ptr,  # [T'] int32, ascending
    pair_ptr,  # [partials of the head, partials of the embedding] float32, out
    tokens,
    other_tokens,
    x_stride,
    dy_pitch,  # elements from one row of dy to the next, whatever they are
    e_stride,
    d_in,
    partials,  # of the embedding
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
):
    block = tl.program_id(0)
    other = tl.program_id(1)
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < tokens
    row = tl.load(row_ptr + position, mask=inside, other=0).to(tl.int64)
    sample = tl.load(id_ptr + position, mask=inside, other=-1)
    other_position = other * BLOCK + tl.arange(0, BLOCK)
    other_inside = other_position < other_tokens
    other_row = tl.load(other_row_ptr + other_position, mask=other_inside, other=0).to(tl.int64)
    word = tl.load(word_ptr + other_row, mask=other_inside, other=-1)
    other_sample = tl.where(word >= 0, tl.load(other_id_ptr + other_position, mask=other_inside, other=-1), -1)

    products = inner(x_ptr, e_ptr, row, other_row, x_stride, e_stride, d_in, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
    weight = tl.load(dy_ptr + row[:, None] * dy_pitch + tl.maximum(word, 0)[None, :]).to(tl.float32)
    # A token without a gradient adds nothing, whatever its x holds (padding may hold NaN).
    terms = tl.where(weight == 0.0, 0.0, products * weight)

    last = tl.load(id_ptr + tl.minimum(block * BLOCK + BLOCK, tokens) - 1)
    other_last = tl.load(other_id_ptr + tl.minimum(other * BLOCK + BLOCK, other_tokens) - 1)
    for mine in range(tl.load(id_ptr + block * BLOCK), last + 1):
        columns = tl.sum(tl.where((sample == mine)[:, None], terms, 0.0), 0)
        partial = (block + mine).to(tl.int64)
        for at in range(tl.load(other_id_ptr + other * BLOCK), other_last + 1, LANES):
            theirs = at + tl.arange(0, LANES)
            sums = tl.sum(tl.where(theirs[:, None] == other_sample[None, :], columns[None, :], 0.0), 1)
            tl.store(pair_ptr + partial * partials + other + theirs, sums, mask=theirs <= other_last)


def tied_gram(x: Tensor, dy: Tensor, segments: Segments, ids: Tensor, e: Tensor, other: Segments) -> Tensor:
    """``<H_i, E_j>`` [N, N] float64, not symmetric.

    x [T, d], dy [T, vocabulary] of the head's tokens, e [T', d] and ids [T'] (below 0 for tokens to leave out) of the
    embedding's, x and e of one dtype. ``segments`` and ``other`` say whose they are: the same N samples, in order.
    """
    block_k = 16 if x.element_size() == 4 else 64
    x, e, dy = even_rows(x, block_k), even_rows(e, block_k), even_rows(dy, 1)
    positions, other_positions = order(segments, len(x)), order(other, len(e))
    count = segments.samples
    if not (x.numel() and e.numel() and count):
        return x.new_zeros(count, count, dtype=torch.float64)
    blocks, other_blocks = triton.cdiv(len(x), _BLOCK), triton.cdiv(len(e), _BLOCK)
    partials = triton.cdiv(other_blocks + count, 16) * 16  # rows begin at multiples of 16 bytes
    pairs = x.new_empty(blocks + count, partials, dtype=torch.float32)
    with on_device(x):
        tied_pairs_kernel[(blocks, other_blocks)](
            x,
            dy,
            positions.row,
            positions.sample,
            e,
            ids.long(),
            other_positions.row,
            other_positions.sample,
            pairs,
            len(x),
            len(e),
            x.stride(0),
            dy.stride(0),
            e.stride(0),
            x.shape[1],
            partials,
            BLOCK=_BLOCK,
            BLOCK_K=block_k,
            LANES=LANES,
            enable_fp_fusion=True,
            **_OPTIONS,
        )
    half = row_sums(pairs, positions.sample_span, partials=_BLOCK)
    return row_sums(half.T, other_positions.sample_span, partials=_BLOCK).T


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = {"sum_ptr": "*fp32", "id_ptr": "*i64", "begin_ptr": "*i32", "sample_ptr": "*i32", "pair_ptr": "*fp32"}
    types |= dict.fromkeys(("rows", "first_row", "pitch", "sum_stride", "d_out"), "i32")
    constants = {"BLOCK": _BLOCK, "BLOCK_K": _BLOCK_K}
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (embedding_pairs_kernel, types, constants, _OPTIONS)
    ]
    types = dict.fromkeys(("x_ptr", "dy_ptr", "e_ptr"), f"*{element}")
    types |= dict.fromkeys(("row_ptr", "id_ptr", "other_row_ptr", "other_id_ptr"), "*i32")
    types |= {"word_ptr": "*i64", "pair_ptr": "*fp32"}
    integers = ("tokens", "other_tokens", "x_stride", "dy_pitch", "e_stride", "d_in", "partials")
    types |= dict.fromkeys(integers, "i32")
    constants = {"BLOCK": _BLOCK, "BLOCK_K": 16 if element == "fp32" else 64, "LANES": LANES}
    found.append((tied_pairs_kernel, types, constants, _OPTIONS))
    return found
