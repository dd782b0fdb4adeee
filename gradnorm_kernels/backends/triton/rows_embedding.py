"""The Gram of an embedding's gradients: ``<G_i, G_j> = sum over t in i, s in j with the same token id of dy_t . dy_s``.

An embedding's gradient has a row for each word, and a sample touches few. Tokens are sorted by (id, owner), an owner
being a sample or a block of samples; each run is added up to one row ``E``, so that ``<G_i, G_j>`` is the sum of
``E_r . E_s`` over the ids that i and j share. Runs of one id are neighbours: tiles of pairs lie near the diagonal, as
those of short samples do in :mod:`.gram_kernels`. In one row r of the tiles no two runs of r's id have the same owner:
``E_r . E_s`` has the place (r, owner of s) to itself, and what is added up afterwards, in float64 and in a fixed order,
are rows of one owner. No [N, vocabulary, d], no atomics, and nothing is read back: there are at most T runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import even_rows
from .gram_kernels import inner
from .rows import on_device, place_sums, row_sums

#: No config chooses among forms of this kernel.
CONFIGS = ()
_BLOCK, _BLOCK_K = 64, 16
_OPTIONS = {"num_warps": 4, "num_stages": 3}
# The most elements of (run, owner) held at a time: 64 MiB.
_HELD = 1 << 24


@triton.jit(do_not_specialize=["runs", "first_run", "pitch"])
def embedding_pairs_kernel(
    sum_ptr,  # [R, d_out] float32: E, BLOCK_K divides d_out
    id_ptr,  # [R] int64, ascending: each run's id, below 0 for what is left out
    begin_ptr,  # [R] int32: the first run with that id
    owner_ptr,  # [R] int32
    pair_ptr,  # [rows, owners] float32 in rows of ``pitch``, out, zero before: E_r . E_s at (r, owner of s), s <= r
    runs,
    first_run,  # the first of the rows of pair_ptr, a multiple of BLOCK
    pitch,
    sum_stride,
    d_out,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = first_run // BLOCK + tl.program_id(0)
    run = block * BLOCK + tl.arange(0, BLOCK)
    inside = run < runs
    word = tl.load(id_ptr + run, mask=inside, other=-1)
    begin = tl.load(begin_ptr + run, mask=inside, other=0)
    # What is left out sorts first: its runs reach back to nowhere.
    first = tl.min(tl.where(word >= 0, begin // BLOCK, block + 1), 0)
    row = tl.minimum(run, runs - 1).to(tl.int64)
    for other in range(first, block + 1):
        other_run = other * BLOCK + tl.arange(0, BLOCK)
        other_row = tl.minimum(other_run, runs - 1).to(tl.int64)
        terms = inner(sum_ptr, sum_ptr, row, other_row, sum_stride, sum_stride, d_out, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
        other_word = tl.load(id_ptr + other_run, mask=other_run < runs, other=-2)
        other_owner = tl.load(owner_ptr + other_run, mask=other_run < runs, other=0)
        keep = (word >= 0)[:, None] & (word[:, None] == other_word[None, :]) & (other_run[None, :] <= run[:, None])
        place = (run - first_run).to(tl.int64)[:, None] * pitch + other_owner[None, :]
        tl.store(pair_ptr + place, terms, mask=keep)


def _runs(ids: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens sorted by (id, owner): (the token at each place, spans of the runs, their ids, their owners).

    There are T runs, of which the last ones are empty; their id is -1.
    """
    key, token = torch.sort(ids.long().clamp_min(-1) * owners + owner, stable=True)
    count = torch.arange(len(key), device=key.device)
    run = torch.cat([count[:1], (key[1:] != key[:-1]).cumsum(0)])
    begin, stop = torch.searchsorted(run, count), torch.searchsorted(run, count, right=True)
    run_key = torch.where(begin < stop, key[begin.clamp_max(len(key) - 1)], -owners)
    spans = torch.stack([begin, stop], 1).int()
    return token.int(), spans, run_key.div(owners, rounding_mode="floor"), run_key.remainder(owners).int()


def _spans(owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """(order, spans [owners, 2]) of values sorted by owner, those below 0 left out."""
    ordered, order = torch.sort(owner, stable=True)
    ids = torch.arange(owners, dtype=ordered.dtype, device=owner.device)
    ends = [torch.searchsorted(ordered, ids, right=right) for right in (False, True)]
    return order.int(), torch.stack(ends, 1).int()


def embedding_norms(ids: Tensor, dy: Tensor, owner: Tensor, owners: int) -> Tensor:
    """``||G_i||^2`` of each owner, [owners] float64; arguments as in :func:`embedding_gram`."""
    if not dy.numel():
        return dy.new_zeros(owners, dtype=torch.float64)
    token, spans, word, run_owner = _runs(ids, owner, owners)
    sums = row_sums(dy, spans, token, short=True, dtype=torch.float32)
    squares = torch.linalg.vector_norm(sums, dim=1).double().square()
    order, by_owner = _spans(torch.where(word >= 0, run_owner, -1), owners)
    return place_sums(squares[None], by_owner, order)


def embedding_gram(ids: Tensor, dy: Tensor, owner: Tensor, owners: int) -> Tensor:
    """``<G_i, G_j>`` [owners, owners] float64, symmetric.

    ids [T] int, below 0 for tokens to leave out; dy [T, d] float32, bfloat16 or float16; owner [T] int in [0, owners).
    """
    gram = dy.new_zeros(owners, owners, dtype=torch.float64)
    if not (dy.numel() and owners):
        return gram
    token, spans, word, run_owner = _runs(ids, owner, owners)
    sums = even_rows(row_sums(dy, spans, token, short=True, dtype=torch.float32), _BLOCK_K)
    # Empty runs break the order of the ids at the end: no run is of theirs.
    ordered = torch.where(spans[:, 0] < spans[:, 1], word, torch.iinfo(torch.int64).max)
    begin = torch.searchsorted(ordered, ordered).int()
    runs = len(sums)
    pitch = triton.cdiv(owners, 16) * 16  # row_sums is compiled anew for rows that do not begin at multiples of it
    height = max(1, _HELD // pitch // _BLOCK) * _BLOCK
    for first in range(0, runs, height):
        rows = min(height, runs - first)
        pairs = sums.new_zeros(rows, pitch)[:, :owners]
        with on_device(sums):
            embedding_pairs_kernel[(triton.cdiv(rows, _BLOCK),)](
                sums,
                word,
                begin,
                run_owner,
                pairs,
                runs,
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
        order, by_owner = _spans(torch.where(word[part] >= 0, run_owner[part], -1), owners)
        gram += row_sums(pairs, by_owner, order)
    # Below the diagonal are the pairs of different owners, each once; on it what a run has with itself.
    return gram + gram.tril(-1).T


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = {"sum_ptr": "*fp32", "id_ptr": "*i64", "begin_ptr": "*i32", "owner_ptr": "*i32", "pair_ptr": "*fp32"}
    types |= dict.fromkeys(("runs", "first_run", "pitch", "sum_stride", "d_out"), "i32")
    return [(embedding_pairs_kernel, types, {"BLOCK": _BLOCK, "BLOCK_K": _BLOCK_K}, _OPTIONS)]
