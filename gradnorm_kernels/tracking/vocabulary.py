"""The sums of an embedding matrix: of an embedding's own tokens, and of the head that it may be tied to.

An embedding's gradient is ``one_hot(id) dy^T``; a head tied to it adds ``dy_head x^T``. The operators for embeddings
give the first and the inner products of the two; the head's own come from the operator for linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import embedding_grad_norm, tied_grad_gram
from .owners import by_owner
from .rows import Rows


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
    embeddings, heads = ([part for part in parts if part.embedding == kind] for kind in (True, False))
    ids, e, e_cu_seqlens, e_sample_ids = _packed(embeddings)
    own = embedding_grad_norm(
        ids,
        e,
        e_cu_seqlens,
        sample_ids=e_sample_ids,
        group_ids=rows.sample_block,
        num_groups=rows.num_blocks,
        group_gram=True,
    )
    assert own.group_gram is not None
    gram, sample_sq = own.group_gram, own.sample_sq_norms
    if not heads:
        return Sums(gram, by_owner(sample_sq, rows.sample_block, rows.num_blocks), None)
    x, dy, cu_seqlens, sample_ids = _packed(heads)
    dtype = torch.promote_types(x.dtype, e.dtype)
    cross = tied_grad_gram(
        x.to(dtype),
        dy,
        ids,
        e.to(dtype),
        cu_seqlens,
        e_cu_seqlens,
        sample_ids=sample_ids,
        e_sample_ids=e_sample_ids,
        group_ids=rows.sample_block,
        num_groups=rows.num_blocks,
    )
    gram = gram + cross.group_gram + cross.group_gram.T
    self_sq = by_owner(sample_sq + 2 * cross.sample_dots, rows.sample_block, rows.num_blocks)
    head = linear(heads, rows, False)
    return Sums(head.gram + gram, head.self_sq + self_sq, None)


def _packed(parts: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x or ids, dy, cu_seqlens, sample_ids) of the parts one after the other, each row a segment."""
    x, dy = (torch.cat(tensors) for tensors in zip(*[(part.x, part.dy) for part in parts], strict=True))
    offsets = torch.nn.functional.pad(torch.cat([part.lengths for part in parts]).cumsum(0), (1, 0))
    return x, dy, offsets, torch.cat([part.row_sample for part in parts])
