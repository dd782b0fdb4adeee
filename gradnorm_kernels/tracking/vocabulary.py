"""The sums of an embedding matrix: of an embedding's own tokens, and of the head that it may be tied to.

An embedding's gradient is ``one_hot(id) dy^T``; a head tied to it adds ``dy_head x^T``. Where the triton backend can
run, its kernels pair the tokens with equal ids and nothing waits for the GPU; elsewhere the Gram is added up over rows
of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..layout import to_device
from ..segments import Segments
from .owners import by_owner, resident
from .rows import Rows

VOCABULARY_CHUNK = 2048  # rows of an embedding matrix handled at once: bounds the one-hot factor at T x 2048


class Sums(NamedTuple):
    """Over blocks, float64: gram [b, b] and the samples' own squares summed [b]; dW [d_out, d_in] if asked for."""

    gram: Tensor
    self_sq: Tensor
    weight_grad: Tensor | None


class Tokens(NamedTuple):
    """T tokens of one use of a weight, row after row: x [T, d_in] (ids [T] for an embedding), dy [T, d_out].

    ``lengths`` [R] int64: tokens of each row, ``row_sample`` [R] int64 and ``scale`` [R] float64, all on the CPU. Ids
    below 0 add nothing.
    """

    x: Tensor
    dy: Tensor
    lengths: Tensor
    row_sample: Tensor
    scale: Tensor
    embedding: bool


LinearSums = Callable[[Sequence[Tokens], Rows, bool], Sums]


def vocabulary_sums(parts: Sequence[Tokens], rows: Rows, linear: LinearSums) -> Sums:
    """The sums of uses of one matrix of which some are embeddings; ``linear`` takes those of a linear's tokens."""
    first = parts[0].dy
    if resident(first) and all(backends.unable("triton", first.device.type, part.dy.dtype) is None for part in parts):
        return _paired(parts, rows, linear)
    return _chunked(parts, rows, linear)


def _paired(parts: Sequence[Tokens], rows: Rows, linear: LinearSums) -> Sums:
    """By pairs of tokens: embedding with embedding, head with head, and twice head with embedding."""
    embeddings, heads = ([part for part in parts if part.embedding == kind] for kind in (True, False))
    by_block, alone = rows.sample_block, rows.num_samples == rows.num_blocks
    gram = _embedding_gram(embeddings, by_block, rows.num_blocks)
    samples = torch.arange(rows.num_samples, device="cpu")
    if heads:
        cross = _cross_gram(heads, embeddings, by_block, rows.num_blocks)
        gram = gram + cross + cross.T
    if alone and torch.equal(by_block, samples):
        own = gram.diagonal()
    else:
        own = _embedding_norms(embeddings, samples)
        if heads:
            own = own + 2 * _cross_gram(heads, embeddings, samples, len(samples)).diagonal()
        own = by_owner(own, by_block, rows.num_blocks)
    if not heads:
        return Sums(gram, own, None)
    sums = linear(heads, rows, False)
    return Sums(sums.gram + gram, sums.self_sq + own, None)


def _embedding_tokens(parts: Sequence[Tokens], owner_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [T], dy [T, d], owner [T]) of embeddings; ``owner_of`` [N] on the CPU says what a sample belongs to."""
    owners = [
        to_device(owner_of[part.row_sample], part.x.device)[:, None].expand(-1, len(part.x) // len(part.lengths))
        for part in parts
    ]
    ids, dy = (torch.cat(tensors) for tensors in zip(*[(part.x, part.dy) for part in parts], strict=True))
    return ids, dy, torch.cat([owner.reshape(-1) for owner in owners])


def _embedding_gram(parts: Sequence[Tokens], owner_of: Tensor, owners: int) -> Tensor:
    from ..backends.triton.embedding import embedding_gram

    return embedding_gram(*_embedding_tokens(parts, owner_of), owners)


def _embedding_norms(parts: Sequence[Tokens], owner_of: Tensor) -> Tensor:
    from ..backends.triton.embedding import embedding_norms

    return embedding_norms(*_embedding_tokens(parts, owner_of), len(owner_of))


def _cross_gram(heads: Sequence[Tokens], embeddings: Sequence[Tokens], owner_of: Tensor, owners: int) -> Tensor:
    """``<H_i, E_j>`` [owners, owners] float64."""
    from ..backends.triton.embedding import tied_gram

    x, dy = (torch.cat(tensors) for tensors in zip(*[(part.x, part.dy) for part in heads], strict=True))
    ids, e = (torch.cat(tensors) for tensors in zip(*[(part.x, part.dy) for part in embeddings], strict=True))
    dtype = torch.promote_types(x.dtype, e.dtype)
    segments, other = (_segments(kind, owner_of, owners, x.device) for kind in (heads, embeddings))
    return tied_gram(x.to(dtype), dy, segments, ids, e.to(dtype), other)


def _segments(parts: Sequence[Tokens], owner_of: Tensor, owners: int, device: torch.device) -> Segments:
    """Each row a segment, in the order of their owners; made on the host."""
    end = torch.cat([part.lengths for part in parts]).cumsum(0)
    start = torch.nn.functional.pad(end, (1, 0))[:-1]
    owner = owner_of[torch.cat([part.row_sample for part in parts])]
    order = torch.argsort(owner, stable=True)
    start, end, owner = (to_device(tensor[order], device) for tensor in (start, end, owner))
    return Segments(start, end, owner.int(), owner.int(), owners, owners, None)


def _chunked(parts: Sequence[Tokens], rows: Rows, linear: LinearSums) -> Sums:
    """By rows of the matrix, so that nothing larger than tokens x VOCABULARY_CHUNK is made.

    Without a head only the ids that occur are looked at.
    """
    wide = torch.promote_types(parts[0].dy.dtype, torch.float32)
    heads = [part for part in parts if not part.embedding]
    ids = [part.x for part in parts if part.embedding]
    if heads:
        vocabulary = heads[0].dy.shape[1]
    else:
        occurring, inverse = torch.cat(ids).unique(return_inverse=True)
        vocabulary = occurring.numel()
        # Ids below 0 come first, if there are any: those go below 0 again.
        ids = list((inverse - (occurring < 0).sum()).split([len(part) for part in ids]))
    remaining = iter(ids)
    codes = [next(remaining) if part.embedding else None for part in parts]
    total: Sums | None = None
    for start in range(0, max(vocabulary, 1), VOCABULARY_CHUNK):
        span = torch.arange(start, min(start + VOCABULARY_CHUNK, max(vocabulary, 1)), device=parts[0].x.device)
        pieces = [
            part._replace(x=part.x.to(wide), dy=part.dy[:, start : start + VOCABULARY_CHUNK].to(wide))
            if code is None
            else part._replace(x=part.dy.to(wide), dy=(code[:, None] == span).to(wide))
            for part, code in zip(parts, codes, strict=True)
        ]
        sums = linear(pieces, rows, False)
        total = sums if total is None else Sums(total.gram + sums.gram, total.self_sq + sums.self_sq, None)
    assert total is not None
    return total
