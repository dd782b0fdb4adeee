"""One parameter's gradient per sample, as the Gram matrix of its blocks: from the tokens of its uses in one backward.

A *use* is one call of a layer: its input and the gradient of its output. Several uses of one parameter (a tied or
reused weight) are more tokens of the same samples. They are concatenated, so that the cross terms are right.

On a GPU nothing here waits for the device: which sample a row belongs to is known on the host, shapes do not depend on
data (tokens without a gradient stay and add zeros), and copies to the device do not block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import embedding_grad_norm, fused_grad_norm, tied_grad_gram
from ..segments import to_device
from . import distributed
from .calls import Call
from .rows import Rows, on_gpu

#: The most tokens and blocks of several experts in one call of the operator: the inner products between different
#: experts, which nobody needs, stay few. Not tuned.
_TOKENS, _BLOCKS = 256, 512
#: The share of a linear's tokens from which those without a gradient are left out. Not tuned.
_MANY_ZEROS = 0.125


class BlockSums(NamedTuple):
    """Float64: gram [b, b] over blocks, the samples' own squares [N]; dW [d_out, d_in] if asked for.

    The gram is diagonal where the rows' ``inner_products`` are not wanted.
    """

    gram: Tensor
    sample_sq: Tensor
    weight_grad: Tensor | None


class Tokens(NamedTuple):
    """T tokens of one use of a weight, row after row: x [T, d_in] (ids [T] for an embedding), dy [T, d_out].

    ``lengths`` [R] int64: tokens of each row, ``row_sample`` [R] int64 and ``scale`` [R] float64, all on the CPU. Ids
    below 0 add nothing. ``expert`` [R] int64 on the CPU, ascending, where the parameter has a matrix per expert: whose
    matrix the tokens met. A row of the batch then has an entry for every expert that got tokens of it.
    """

    x: Tensor
    dy: Tensor
    lengths: Tensor
    row_sample: Tensor
    scale: Tensor
    embedding: bool
    expert: Tensor | None = None

    def by_expert(self) -> Iterator[tuple[int, Tokens]]:
        """(expert, the tokens that met its matrix), in the order of experts."""
        assert self.expert is not None
        experts, counts = torch.unique_consecutive(self.expert, return_counts=True)
        row = token = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            own = slice(row, row + count)
            part = slice(token, token + int(self.lengths[own].sum()))
            row, token = own.stop, part.stop
            one = (
                self.x[part],
                self.dy[part],
                self.lengths[own],
                self.row_sample[own],
                self.scale[own],
                self.embedding,
            )
            yield expert, Tokens(*one)


def tokens_of(call: Call, dy: Tensor) -> Tokens:
    """The tokens of one use, row after row. ``dy``: the gradient of the call's output, in the output's shape.

    On a CPU tokens with a zero dy are left out, of a linear where they are many. The id of an embedding's padding
    becomes -1, which adds nothing.
    """
    embedding = call.layer.kind == "embedding"
    dy, x = call.split(dy), call.split(call.x)
    scale = call.scale * call.factor
    each = math.prod(dy.shape[1:-1])  # tokens of each part that the call is split into
    lengths = call.parts * each
    dy = dy.reshape(-1, dy.shape[-1])
    x = x.reshape(-1) if embedding else x.reshape(-1, x.shape[-1])
    if embedding and call.padding_idx is not None:
        x = torch.where(x == call.padding_idx, -1, x)
    if on_gpu(dy):
        return Tokens(x, dy, lengths, call.row_sample, scale, embedding)
    keep = (dy != 0).any(-1) & (x >= 0) if embedding else _with_gradient(dy)
    if keep is None:
        return Tokens(x, dy, lengths, call.row_sample, scale, embedding)
    row = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    kept = torch.bincount(row[keep], minlength=len(lengths))
    return Tokens(x[keep], dy[keep], kept, call.row_sample, scale, embedding)


def _with_gradient(dy: Tensor) -> Tensor | None:
    """[T] bool: the rows of dy [T, d_out] that are not zero; None where so few are zero that copying costs more."""
    if not dy.shape[-1]:
        return None
    # A row with a zero in front is nearly always a zero row, so that only those are read.
    zero = (dy[:, 0] == 0).nonzero()[:, 0]
    if len(zero) < _MANY_ZEROS * len(dy):
        return None
    zero = zero[(dy[zero] == 0).all(-1)]
    if len(zero) < _MANY_ZEROS * len(dy):
        return None
    return torch.ones(len(dy), dtype=torch.bool, device=dy.device).index_fill_(0, zero, False)


def weight_sums(
    parts: Sequence[Tokens], rows: Rows, *, weight_grad: bool = False, head: BlockSums | None = None
) -> BlockSums:
    """Gram over blocks of ``G_p = sum_uses sum_tokens scale dy x^T`` for one weight matrix.

    With ``weight_grad`` (one linear use only) also dW of the plain, unscaled gradient, which backward needs. ``head``:
    what this function gave for the only linear use among several, without the embeddings.
    """
    if head is not None and not any(part.embedding for part in parts):
        return head
    if parts[0].expert is not None:
        return _expert_sums(parts, rows)
    factors = _block_factors(parts, rows)
    scaled = parts if factors is not None else [_prescale(part) for part in parts]

    if any(part.embedding for part in parts):
        sums = _embedding_sums(scaled, rows, with_heads=head is None)
    else:
        sums = _linear_sums(scaled, rows, weight_grad and factors is not None)
    if factors is not None:
        factor = to_device(factors, sums.gram.device)
        own = to_device(factors[rows.sample_block], sums.gram.device)
        sums = BlockSums(sums.gram * factor[:, None] * factor, sums.sample_sq * own**2, sums.weight_grad)
    elif weight_grad:  # the sums are of dy times its rows' factors
        plain = parts[0]
        sums = sums._replace(weight_grad=plain.dy.T @ plain.x.to(plain.dy.dtype))
    if head is not None:
        sums = BlockSums(sums.gram + head.gram, sums.sample_sq + head.sample_sq, None)
    return sums


def _expert_sums(parts: Sequence[Tokens], rows: Rows) -> BlockSums:
    """The sums over the experts' matrices, from the operator.

    Experts with few tokens share a call, in which each has samples and blocks of its own: what a call costs besides its
    products would be most of the time. The inner products between different experts are left out of the result.
    """
    own: dict[int, list[Tokens]] = {}
    for part in parts:
        for expert, tokens in part.by_expert():
            own.setdefault(expert, []).append(tokens)
    device = parts[0].dy.device
    gram = torch.zeros(rows.num_blocks, rows.num_blocks, dtype=torch.float64, device=device)
    sample_sq = torch.zeros(rows.num_samples, dtype=torch.float64, device=device)
    for uses in _calls([own[expert] for expert in sorted(own)], rows):
        count = len(uses)
        together = [
            tokens._replace(row_sample=tokens.row_sample + at * rows.num_samples)
            for at, several in enumerate(uses)
            for tokens in several
        ]
        blocks = [rows.sample_block + at * rows.num_blocks for at in range(count)]
        stacked = replace(
            rows, samples=rows.samples * count, sample_block=torch.cat(blocks), block_keys=rows.block_keys * count
        )
        sums = weight_sums(together, stacked)
        gram += sums.gram.view(count, rows.num_blocks, count, rows.num_blocks).diagonal(dim1=0, dim2=2).sum(-1)
        sample_sq += sums.sample_sq.view(count, rows.num_samples).sum(0)
    return BlockSums(gram, sample_sq, None)


def _calls(experts: Sequence[list[Tokens]], rows: Rows) -> Iterator[list[list[Tokens]]]:
    """The tokens of experts, those of one call together: as many experts as ``_TOKENS`` and ``_BLOCKS`` allow."""
    together: list[list[Tokens]] = []
    size = 0
    for uses in experts:
        more = sum(len(tokens.dy) for tokens in uses)
        if together and (size + more > _TOKENS or (len(together) + 1) * rows.num_blocks > _BLOCKS):
            yield together
            together, size = [], 0
        together.append(uses)
        size += more
    if together:
        yield together


def _block_factors(parts: Sequence[Tokens], rows: Rows) -> Tensor | None:
    """[blocks] float64: the factor shared by all rows of a block, so that the block's sums can be scaled afterwards.

    None where rows of one block differ.
    """
    scale = torch.cat([part.scale for part in parts])
    block = rows.sample_block[torch.cat([part.row_sample for part in parts])]
    factors = torch.zeros(rows.num_blocks, dtype=torch.float64, device="cpu")
    factors[block] = scale
    return factors if bool((factors[block] == scale).all()) else None


def _prescale(tokens: Tokens) -> Tokens:
    """Scale dy row by row without rounding it to its dtype again, which would lose digits of the estimate."""
    dy = tokens.dy
    factor = tokens.scale.to(torch.promote_types(dy.dtype, torch.float32)).repeat_interleave(tokens.lengths)
    wide = dy.to(factor.dtype) * to_device(factor, dy.device)[:, None]
    if not on_gpu(dy) or tokens.embedding or dy.dtype != torch.bfloat16:
        return tokens._replace(dy=wide)
    return split(tokens._replace(dy=wide))


def split(tokens: Tokens) -> Tokens:
    """Tokens of float32 dy as twice as many of bfloat16: the leading part and the remainder, 16 bits of dy together.

    Tensor cores multiply those ten times faster than float32.
    """
    high = tokens.dy.bfloat16()
    low = (tokens.dy - high).bfloat16()
    x, rows = tokens.x.bfloat16(), tokens.row_sample
    return tokens._replace(
        x=torch.cat([x, x]),
        dy=torch.cat([high, low]),
        lengths=torch.cat([tokens.lengths, tokens.lengths]),
        row_sample=torch.cat([rows, rows]),
        scale=torch.cat([tokens.scale, tokens.scale]),
    )


def _linear_sums(parts: Sequence[Tokens], rows: Rows, weight_grad: bool) -> BlockSums:
    """The sums of a linear's tokens, unscaled, from the operator."""
    lengths = torch.cat([part.lengths for part in parts])
    x, dy = (
        torch.cat(tensors) if len(parts) > 1 else tensors[0]
        for tensors in zip(*[(part.x, part.dy) for part in parts], strict=True)
    )
    r = fused_grad_norm(
        x.to(dy.dtype),
        dy,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        sample_ids=torch.cat([part.row_sample for part in parts]),
        group_ids=rows.sample_block,
        num_groups=rows.num_blocks,
        group_gram=rows.inner_products,
        weight_grad=weight_grad,
    )
    gram = r.group_sq_norms.diag() if r.group_gram is None else r.group_gram
    return BlockSums(gram, r.sample_sq_norms, r.weight_grad)


def _embedding_sums(parts: Sequence[Tokens], rows: Rows, *, with_heads: bool) -> BlockSums:
    """The sums of uses of one matrix of which some are embeddings: ``one_hot(id) dy^T``, and ``dy x^T`` of a tied head.

    The operators for embeddings give the first and the inner products of the two. Without ``with_heads`` the inner
    products of heads with themselves are left out.
    """
    embeddings, heads = ([part for part in parts if part.embedding == kind] for kind in (True, False))
    ids, e, e_cu_seqlens, e_sample_ids = _packed(embeddings)
    own = embedding_grad_norm(
        ids,
        e,
        e_cu_seqlens,
        sample_ids=e_sample_ids,
        group_ids=rows.sample_block,
        num_groups=rows.num_blocks,
        group_gram=rows.inner_products,
    )
    gram, sample_sq = own.group_sq_norms.diag() if own.group_gram is None else own.group_gram, own.sample_sq_norms
    if not heads:
        return BlockSums(gram, sample_sq, None)
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
    cross_gram = cross.group_gram if rows.inner_products else cross.group_gram.diagonal().diag()
    gram, sample_sq = gram + cross_gram + cross_gram.T, sample_sq + 2 * cross.sample_dots
    if not with_heads:
        return BlockSums(gram, sample_sq, None)
    head = _linear_sums(heads, rows, False)
    return BlockSums(head.gram + gram, head.sample_sq + sample_sq, None)


def _packed(parts: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x or ids, dy, cu_seqlens, sample_ids) of the parts one after the other, each row a segment."""
    x, dy = (torch.cat(tensors) for tensors in zip(*[(part.x, part.dy) for part in parts], strict=True))
    offsets = torch.nn.functional.pad(torch.cat([part.lengths for part in parts]).cumsum(0), (1, 0))
    return x, dy, offsets, torch.cat([part.row_sample for part in parts])


def plain_weight_grad(call: Call, dy: Tensor) -> Tensor:
    """dW [d_out, d_in] of one linear use, as autograd has it, for a weight whose norms wait for its other uses."""
    x = call.x.reshape(-1, call.x.shape[-1]).to(dy.dtype)
    return dy.reshape(-1, dy.shape[-1]).T @ x


def padding_weight_grad(call: Call, dy: Tensor) -> Tensor | None:
    """dW [d_out, d_in] through the tokens of no packed sequence, a part of what backward needs; None without any."""
    outside, x = call.padding(dy), call.padding(call.x)
    if outside is None or x is None or (not on_gpu(dy) and not bool((outside != 0).any())):
        return None
    return outside.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)


def bias_rows(call: Call, dy: Tensor) -> Tensor:
    """[R, d_out] float64: the gradient of a bias through each row, ``sum_t dy_t``, unscaled."""
    dy = call.split(dy)
    dy = dy.reshape(len(dy), math.prod(dy.shape[1:-1]), dy.shape[-1])
    return call.row_sums(dy.sum(1, dtype=torch.promote_types(dy.dtype, torch.float32)))


class RowReplay:
    """A norm-like module's own forward, run row by row with all arguments that a call had: what is differentiated."""

    def __init__(self, call: Call, wide: torch.dtype) -> None:
        """``wide``: the floating-point dtype to compute in."""
        self._call, self._wide = call, wide
        self._module = call.layer.module
        self.parameters = {name: p.detach().to(wide) for name, p in self._module.named_parameters()}
        leaves: list[Tensor] = []
        self._args, self._kwargs = self._take((call.args, call.kwargs), leaves)
        self.rows = tuple(leaves)  # each [R, ...]

    def _take(self, value: Any, leaves: list[Tensor]) -> Any:
        """The arguments, with ``_Row(i)`` in the place of the i-th tensor that has the rows."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._take(item, leaves) for item in value)
        if isinstance(value, dict):
            return {key: self._take(item, leaves) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        value = distributed.local(value.detach())
        value = value.to(self._wide) if value.is_floating_point() else value
        if self._call.placement.holds(value.shape, self._call.x.shape):
            leaves.append(self._call.split(value))
            return _Row(len(leaves) - 1)
        return value

    def run(self, parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        """The module's output for one row."""

        def put(value: Any) -> Any:
            if isinstance(value, _Row):
                return row[value.index]
            if isinstance(value, (tuple, list)):
                return type(value)(put(item) for item in value)
            return {key: put(item) for key, item in value.items()} if isinstance(value, dict) else value

        out: Tensor = torch.func.functional_call(self._module, parameters, put(self._args), put(self._kwargs))
        return out

    def outputs(self) -> Tensor:
        """[R, ...]: the outputs of all rows."""
        with torch.no_grad(), torch.autocast(self._call.x.device.type, enabled=False):
            return torch.func.vmap(lambda *row: self.run(self.parameters, row))(*self.rows)


@dataclass(frozen=True)
class _Row:
    index: int


def vector_rows(call: Call, dy: Tensor) -> dict[str, Tensor]:
    """The gradients of a norm-like module's own parameters through each row: name -> [R, *shape] float64, unscaled.

    One vectorised vector-Jacobian product of the module's own forward, so every norm is right whatever its formula.

    Raises:
        RuntimeError: the forward does not run row by row.
    """
    module = call.layer.module
    wide = torch.promote_types(dy.dtype, torch.float32)
    try:
        replay = RowReplay(call, wide)
        trained = {name: replay.parameters[name] for name, _ in module.named_parameters() if call.gets(name)}

        def one_row(dy: Tensor, *row: Tensor) -> dict[str, Tensor]:
            return torch.func.vjp(lambda own: replay.run({**replay.parameters, **own}, row), trained)[1](dy)[0]

        with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
            grads = torch.func.vmap(one_row)(call.split(dy.to(wide)), *replay.rows)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"layer {call.layer.name!r} ({type(module).__name__}) cannot be measured: its forward does not run row by "
            f"row ({error}); leave it out of layers="
        ) from error
    return {name: call.row_sums(grad) for name, grad in grads.items()}
