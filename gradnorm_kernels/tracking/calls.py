"""One call of a layer, and where its rows lie: which dimension of its tensors runs over the rows of the micro-batch."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layers import Layer
from .rows import Rows

BatchDim = int | Mapping[str, int] | None


@dataclass(frozen=True)
class Placement:
    """Where the R rows lie in a tensor: dimension ``dim`` has size R k, as [R, k] (row after row) or as [k, R].

    ``whole``: k is 1. ``per_sample``: R is the number of samples N (a part that runs once per sample, as a shared
    prompt prefix does), else the number of rows B. ``dim`` None: there is one row, and every token belongs to it.
    """

    dim: int | None
    whole: bool = True
    per_sample: bool = False
    interleaved: bool = False

    def count(self, rows: Rows) -> int:
        """R."""
        return rows.num_samples if self.per_sample else rows.batch

    def fits(self, shape: Sequence[int], rows: Rows) -> bool:
        """Whether a tensor with these token dimensions can be read like this."""
        if self.dim is None:
            return rows.batch == 1
        if self.dim >= len(shape):
            return False
        size, count = shape[self.dim], self.count(rows)
        return size == count if self.whole else size > 0 and size % count == 0

    def split(self, tensor: Tensor, count: int) -> Tensor:
        """[R, ...]: each row as the module sees it alone, with size k at ``dim``."""
        if self.dim is None:
            return tensor[None]
        if self.interleaved:
            return tensor.unflatten(self.dim, (-1, count)).movedim(self.dim + 1, 0)
        return tensor.unflatten(self.dim, (count, -1)).movedim(self.dim, 0)

    def __str__(self) -> str:
        if self.dim is None:
            return "one row"
        what = "samples" if self.per_sample else "rows"
        how = "" if self.whole else (", interleaved with tokens" if self.interleaved else ", flattened with tokens")
        return f"dimension {self.dim} holds the {what}{how}"


@dataclass
class Call:
    """One call of a layer: its input ``x`` (ids of an embedding), all its arguments, and which sample each row is.

    ``factor``: the constant c of a module whose output is c times the formula of its kind. ``padding_idx``: of an
    embedding whose rows at this id get no gradient.
    """

    layer: Layer
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    placement: Placement
    row_sample: Tensor  # [R] int64, CPU
    scale: Tensor  # [R] float64, CPU: row_scale over the sample's number of rows
    factor: float = 1.0
    padding_idx: int | None = None

    def split(self, tensor: Tensor) -> Tensor:
        """[R, ...]: the tensor's rows, each in the layout in which the module sees it."""
        return self.placement.split(tensor, len(self.row_sample))

    def token_rows(self) -> Tensor:
        """[T] int64, CPU: which row each token of ``x`` belongs to, in the order of its flattened token dimensions."""
        shape = token_shape(self.layer, self.x)
        tokens = self.split(torch.arange(math.prod(shape), device="cpu").view(shape)).reshape(len(self.row_sample), -1)
        rows = torch.empty(math.prod(shape), dtype=torch.int64, device="cpu")
        rows[tokens] = torch.arange(len(self.row_sample), device="cpu")[:, None].expand_as(tokens)
        return rows


def token_shape(layer: Layer, x: Tensor) -> tuple[int, ...]:
    """The dimensions of a layer's input that run over tokens: all of an embedding's ids, else all but the last."""
    return tuple(x.shape if layer.kind == "embedding" else x.shape[:-1])


class Unreadable(ValueError):
    """Nothing says which row of the micro-batch a call's tokens belong to."""


@dataclass
class Placements:
    """What is known of each layer's calls: by the layer's name and the number of token dimensions.

    ``given``: the tracker's ``batch_dim``. ``seen``: placements found by the probe. ``unclear``: why the probe could
    not place a call.
    """

    given: BatchDim = None
    seen: dict[tuple[str, int], set[Placement]] = field(default_factory=dict)
    unclear: dict[tuple[str, int], str] = field(default_factory=dict)

    def of(self, layer: Layer, x: Tensor, rows: Rows, outermost: bool) -> Placement:
        """Where the call's rows lie.

        ``outermost``: the caller itself passed ``x``, so that its first dimension is the batch by convention.

        Raises:
            Unreadable: two readings are possible, or none.
        """
        shape = token_shape(layer, x)
        if rows.batch == 1:
            return Placement(None)
        dim = self._given(layer)
        if dim is not None:
            return self._at(layer, x, shape, rows, dim)
        key = (layer.name, len(shape))
        known = {placement for placement in self.seen.get(key, ()) if placement.fits(shape, rows)}
        if len(known) == 1:
            return known.pop()
        if known:
            readings = " or ".join(sorted(map(str, known)))
            raise Unreadable(f"{_got(layer, x)}: its calls differ ({readings}), and this one fits both; {_ADVICE}")
        if key in self.unclear:
            raise Unreadable(f"{_got(layer, x)}: {self.unclear[key]}; {_ADVICE}")
        return self._by_shape(layer, x, shape, rows, outermost)

    def _given(self, layer: Layer) -> int | None:
        if isinstance(self.given, Mapping):
            for pattern, dim in self.given.items():
                if fnmatch.fnmatchcase(layer.name, pattern):
                    return dim
            return None
        return self.given

    def _at(self, layer: Layer, x: Tensor, shape: tuple[int, ...], rows: Rows, dim: int) -> Placement:
        """The placement that ``batch_dim`` asks for."""
        for placement in (Placement(dim), Placement(dim, per_sample=True), Placement(dim, whole=False)):
            if placement.fits(shape, rows):
                return placement
        raise Unreadable(
            f"{_got(layer, x)}: batch_dim={dim} does not hold the {rows.batch} rows of the micro-batch (or its "
            f"{rows.num_samples} samples)"
        )

    def _by_shape(self, layer: Layer, x: Tensor, shape: tuple[int, ...], rows: Rows, outermost: bool) -> Placement:
        """Without a probe: the first dimension, where its size can mean nothing else."""
        sizes = {rows.batch: False, rows.num_samples: True} if rows.num_samples != rows.batch else {rows.batch: False}
        length = rows.length
        if layer.kind == "experts" and len(shape) != 1:
            raise Unreadable(f"{_got(layer, x)}: no probe showed its rows; {_ADVICE}")
        if shape and len(shape) == 1 and rows.mask is not None and shape[0] == rows.mask.numel() != rows.batch:
            return Placement(0, whole=False)
        if not shape or shape[0] not in sizes:
            raise Unreadable(
                f"{_got(layer, x)}: its leading size must be the {rows.batch} rows of the micro-batch (or its "
                f"{rows.num_samples} samples); pass task_ids for every row the model sees, {_ADVICE}"
            )
        if any(size in sizes for size in shape[1:]):
            raise Unreadable(
                f"{_got(layer, x)}: dimensions of equal size could each be the {shape[0]} rows of the micro-batch; "
                f"{_ADVICE}"
            )
        if len(shape) == 1 and not outermost and (length is None or length in sizes):
            raise Unreadable(
                f"{_got(layer, x)}: its first dimension could be the {shape[0]} rows of the micro-batch or the tokens "
                f"of one sequence; {_ADVICE}"
            )
        return Placement(0, per_sample=sizes[shape[0]])


_ADVICE = "say which dimension holds the rows with batch_dim=, or leave the layer out of layers="


def _got(layer: Layer, x: Tensor) -> str:
    return f"layer {layer.name!r} ({type(layer.module).__name__}) got an input of shape {tuple(x.shape)}"


def whose_rows(layer: Layer, placement: Placement, rows: Rows) -> tuple[Tensor, Tensor]:
    """([R] samples, [R] factors) of a call's rows.

    Raises:
        ValueError: one row stands for all rows of a sample, but their factors differ.
    """
    if not placement.per_sample:
        return rows.row_sample, rows.scale
    if rows.sample_scale is None:
        raise ValueError(
            f"layer {layer.name!r} ran once per sample ({rows.num_samples} rows for {rows.batch}), but row_scale or "
            "rows_per_sample differs between rows of one sample: a shared prefix needs one factor per sample"
        )
    return torch.arange(rows.num_samples, device="cpu"), rows.sample_scale
