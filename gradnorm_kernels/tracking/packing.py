"""Packed sequences: where they begin and end, and which of them each token of a micro-batch belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CuSeqlens = Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]]


class Packing:
    """S sequences in the N tokens of B rows of L, each row's sequences one after another.

    Tokens behind the last sequence of a row, or between the last sequence and N, are padding: they belong to no
    sequence. ``lengths`` [S] int64 on the CPU. ``grid`` (B, L) becomes known when the model is called.
    """

    def __init__(self, offsets: list[list[int]], *, per_row: bool) -> None:
        """``offsets``: ascending from 0, for each row (``per_row``), else one list over the tokens of all rows."""
        self._offsets, self._per_row = offsets, per_row
        self.lengths = torch.tensor([b - a for row in offsets for a, b in pairwise(row)], device="cpu")
        self.grid: tuple[int, int] | None = None
        self._sequence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def covered(self) -> int:
        """The number of tokens in sequences."""
        return int(self.lengths.sum())

    @property
    def filled(self) -> int:
        """The number of sequences that have tokens."""
        return int((self.lengths > 0).sum())

    @property
    def tokens(self) -> int:
        """N.

        Raises:
            RuntimeError: the model was not called yet.
        """
        if self.grid is None:
            raise RuntimeError("the number of tokens of the packed micro-batch is not known yet")
        return self.grid[0] * self.grid[1]

    def why_not(self, grid: tuple[int, int]) -> str | None:
        """Why the sequences cannot lie in B rows of L tokens; None where they can."""
        rows, length = grid
        if self._per_row:
            if rows != len(self._offsets):
                return f"cu_seqlens describes {len(self._offsets)} rows, but the model got {rows} (of {length} tokens)"
            for row, offsets in enumerate(self._offsets):
                if offsets[-1] > length:
                    return f"cu_seqlens of row {row} ends at {offsets[-1]}, but the model got rows of {length} tokens"
            return None
        offsets = self._offsets[0]
        if offsets[-1] > rows * length:
            return f"cu_seqlens ends at {offsets[-1]}, but the model got {rows * length} tokens ({rows} x {length})"
        for a, b in pairwise(offsets):
            if b > a and a // length != (b - 1) // length:
                return (
                    f"cu_seqlens has a sequence of the tokens {a} to {b}, which crosses from one row of {length} "
                    "tokens into the next: a sequence lies in one row; where rows end in padding, pass one cu_seqlens "
                    "per row"
                )
        return None

    def settle(self, grid: tuple[int, int]) -> None:
        """The model got B rows of L tokens.

        Raises:
            ValueError: the sequences do not lie in them.
        """
        fault = self.why_not(grid)
        if fault is not None:
            raise ValueError(fault)
        self.grid, self._sequence = grid, None

    def sequence_of_tokens(self) -> Tensor:
        """[N] int64 on the CPU: the sequence that each token belongs to, -1 for padding."""
        if self._sequence is None:
            found = torch.full((self.tokens,), -1, dtype=torch.long, device="cpu")
            sequence, length = 0, self.tokens if self.grid is None else self.grid[1]
            for row, offsets in enumerate(self._offsets):
                for a, b in pairwise(offsets):
                    found[row * length + a : row * length + b] = sequence
                    sequence += 1
            self._sequence = found
        return self._sequence

    def inside(self, tokens: Tensor, select: Any) -> Tensor:
        """``tokens`` [N, ...] without the padding, sequence after sequence.

        ``select(index)``: an index of the host's on the device of ``tokens``.
        """
        if self.covered == len(tokens):
            return tokens
        index = (self.sequence_of_tokens() >= 0).nonzero()[:, 0]
        if not len(index) or int(index[-1]) == len(index) - 1:
            return tokens[: len(index)]
        return tokens[select(index)]

    def outside(self, tokens: Tensor, select: Any) -> Tensor | None:
        """The padding of ``tokens`` [N, ...]; None where there is none."""
        if self.covered == len(tokens):
            return None
        return tokens[select((self.sequence_of_tokens() < 0).nonzero()[:, 0])]


@dataclass(frozen=True)
class TokenPlacement:
    """Where the N tokens of B rows of L lie in a tensor.

    ``dims``: (i, j) with sizes B and L, or (d,) with size N k: each token has k parts (heads) in that dimension, next
    to each other, or N apart where ``interleaved``.
    """

    dims: tuple[int, ...]
    parts: int = 1
    interleaved: bool = False

    def fits(self, shape: Sequence[int], grid: tuple[int, int]) -> bool:
        """Whether a tensor with these token dimensions can be read like this."""
        if max(self.dims) >= len(shape):
            return False
        sizes = tuple(shape[dim] for dim in self.dims)
        return sizes == grid if len(sizes) == 2 else sizes == (grid[0] * grid[1] * self.parts,)

    def split(self, tensor: Tensor, count: int) -> Tensor:
        """[N, ...]: each token as the module sees it alone."""
        if len(self.dims) == 2:
            return tensor.movedim(self.dims, (0, 1)).flatten(0, 1)
        dim = self.dims[0]
        if self.parts == 1:
            return tensor.movedim(dim, 0)
        if self.interleaved:
            return tensor.unflatten(dim, (-1, count)).movedim(dim + 1, 0)
        return tensor.unflatten(dim, (count, -1)).movedim(dim, 0)

    def holds(self, shape: Sequence[int], like: Sequence[int]) -> bool:
        """Whether an argument of this shape has the tokens where the input, of shape ``like``, has them."""
        last = max(self.dims) + 1
        return tuple(shape[:last]) == tuple(like[:last])

    def __str__(self) -> str:
        if len(self.dims) == 2:
            return f"dimensions {self.dims[0]} and {self.dims[1]} hold rows and tokens"
        how = "interleaved" if self.interleaved else "flattened"
        return f"dimension {self.dims[0]} holds the tokens" + (
            f", {how} with {self.parts} parts" if self.parts > 1 else ""
        )


def readings(shape: Sequence[int], grid: tuple[int, int]) -> list[TokenPlacement]:
    """All placements of B rows of L tokens under which token dimensions of this shape could be read."""
    rows, tokens = grid[0], grid[0] * grid[1]
    if tokens == 1:
        return [TokenPlacement((0,))] if shape and shape[0] == 1 else []
    found: list[TokenPlacement] = []
    if rows > 1:
        pairs = [(i, j) for i in range(len(shape)) for j in range(len(shape)) if i != j]
        found = [TokenPlacement(pair) for pair in pairs if (shape[pair[0]], shape[pair[1]]) == grid]
    for dim, size in enumerate(shape):
        if size == tokens:
            found.append(TokenPlacement((dim,)))
        elif size > tokens and size % tokens == 0:
            found += [TokenPlacement((dim,), size // tokens, how) for how in (False, True)]
    return found


def leading(shape: Sequence[int], grid: tuple[int, int]) -> list[TokenPlacement]:
    """The placements with the tokens in front, in the order of the model's own arguments: what is taken unprobed."""
    return [
        placement
        for placement in readings(shape, grid)
        if placement.parts == 1
        and (placement.dims == (0, 1) or (len(placement.dims) == 1 and all(n == 1 for n in shape[: placement.dims[0]])))
    ]


def make_packing(cu_seqlens: CuSeqlens) -> Packing:
    """Check ``cu_seqlens``: [S+1] integers over the tokens of all rows, or one such list per row.

    Raises:
        TypeError: not integers.
        ValueError: a list that does not ascend from 0, or no sequence.
    """
    if not isinstance(cu_seqlens, (Tensor, list, tuple)):
        raise TypeError(
            "cu_seqlens must be a 1-D integer tensor or a list of ints, or a list of them with one per row, got "
            f"{type(cu_seqlens).__name__}"
        )
    per_row = not isinstance(cu_seqlens, Tensor) and any(map(_is_row, cu_seqlens))
    rows: list[Any] = list(cu_seqlens) if per_row else [cu_seqlens]
    if per_row and all(isinstance(row, Tensor) for row in rows):
        rows = _on_host(rows)
    offsets = [_offsets(row, f"cu_seqlens of row {at}" if per_row else "cu_seqlens") for at, row in enumerate(rows)]
    packing = Packing(offsets, per_row=per_row)
    if not len(packing):
        raise ValueError(f"cu_seqlens must describe at least one sequence, got {cu_seqlens!r}")
    return packing


def _is_row(item: Any) -> bool:
    return isinstance(item, (list, tuple)) or (isinstance(item, Tensor) and item.dim() > 0)


def _on_host(rows: list[Tensor]) -> list[Tensor]:
    """The rows' tensors on the CPU, in one copy where they can be joined."""
    joinable = len({(row.dtype, row.device) for row in rows}) == 1 and all(row.dim() == 1 for row in rows)
    if not joinable or rows[0].device.type == "cpu":
        return rows
    return list(torch.cat(rows).cpu().split([len(row) for row in rows]))


def _offsets(given: Any, name: str) -> list[int]:
    if isinstance(given, Tensor):
        if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a 1-D integer tensor, got shape {tuple(given.shape)} and dtype {given.dtype}"
            )
        values = given.tolist()  # from a GPU this is the one copy, and the one wait
    else:
        values = list(given)
    for at, value in enumerate(values):
        if isinstance(value, Tensor):
            value = values[at] = value.item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must hold ints, got {value!r} ({type(value).__name__}) at {at}")
    if not values or values[0] != 0:
        raise ValueError(f"{name} must start at 0 and have one entry more than sequences, got {values[:8]!r}")
    for at, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueError(f"{name} must not descend: entry {at + 1} is {b}, after {a}")
    return values


def cu_seqlens_from_position_ids(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | list[Tensor]:
    """The boundaries of packed sequences: a sequence begins where the position is 0.

    Args:
        position_ids: [T] or [1, T] integers that count 0, 1, 2, ... in each sequence; or [B, T], packed rows.
        attention_mask: of the same shape, 0 at the padding behind the last sequence of a row. Without it padding counts
            as sequences of its own: position ids do not tell a padded token from a sequence of one token.

    Returns:
        [S+1] int64 on the CPU for :meth:`GradNormTracker.microbatch`; for [B, T] with B > 1 a list with one per row.
        The values are read, so on a GPU this waits.

    Raises:
        ValueError: positions that do not count up from 0 in each sequence, or padding in front of a token.
        TypeError: not an integer tensor.
    """
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        given = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids must be an integer tensor, got {given}")
    if position_ids.dim() not in (1, 2) or not position_ids.numel():
        raise ValueError(f"position_ids must have shape [T], [1, T] or [B, T], got {tuple(position_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != position_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of position_ids, {tuple(position_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    positions = position_ids.cpu().reshape(-1, position_ids.shape[-1])
    valid = (
        torch.ones_like(positions)
        if attention_mask is None
        else real_tokens(attention_mask).cpu().reshape_as(positions)
    )
    rows = enumerate(zip(positions, valid.bool(), strict=True))
    found = [_row_boundaries(row, int(keep.sum()), keep, at) for at, (row, keep) in rows]
    return found[0] if len(found) == 1 else found


def real_tokens(attention_mask: Tensor) -> Tensor:
    """bool, of its shape: which tokens are real. Raises ValueError for an additive mask, which means the opposite."""
    if attention_mask.is_floating_point() and bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask holds negative numbers, as an additive mask does (0 for tokens, -inf for padding); give 1 "
            "or True for tokens and 0 or False for padding"
        )
    return attention_mask != 0


def _row_boundaries(positions: Tensor, length: int, valid: Tensor, row: int) -> Tensor:
    if not bool(valid[:length].all()):
        raise ValueError(
            f"attention_mask of row {row} has padding in front of a token: packed rows are padded behind their last "
            "sequence"
        )
    positions = positions[:length]
    starts = (positions == 0).nonzero()[:, 0]
    follows = torch.ones(length, dtype=torch.bool, device="cpu")
    follows[1:] = (positions[1:] == positions[:-1] + 1) | (positions[1:] == 0)
    if length and (int(positions[0]) != 0 or not bool(follows.all())):
        at = 0 if int(positions[0]) != 0 else int((~follows).nonzero()[0])
        raise ValueError(
            f"position_ids must count 0, 1, 2, ... in each sequence: row {row} has {int(positions[at])} at token {at}"
            + (f", after {int(positions[at - 1])}" if at else "")
        )
    return torch.cat([starts, torch.tensor([length], device="cpu")])


def token_arguments(leaves: dict[str, Tensor]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (B, L)) of the arguments of a model that can hold its tokens: token ids and embeddings before others."""
    named = [path for path in leaves if path.rpartition(".")[2] in ("input_ids", "inputs_embeds")]
    for path in [*named, *(path for path in leaves if path not in named)]:
        tensor = leaves[path]
        shape = tuple(tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape)
        if len(shape) in (1, 2):
            yield path, (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
