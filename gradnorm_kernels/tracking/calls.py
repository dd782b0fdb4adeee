"""One call of a layer, and where its rows lie: which dimension of its tensors runs over the rows of the micro-batch."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..segments import to_device
from . import distributed
from .layers import Layer
from .packing import Packing, TokenPlacement, leading, readings
from .replay import tensors_in
from .rows import Rows, on_gpu, sum_by

BatchDim = int | Mapping[str, int] | None
#: Columns that are added up in float64 at a time.
_COLUMNS = 256
#: A shape, and the model's arguments' sizes.
Form = tuple[tuple[int, ...], tuple[tuple[str, int], ...]]
#: A layer's name, the number of its input's token dimensions, and whether rows are padded or how they are packed.
Key = tuple[str, int, str]


def check_batch_dim(batch_dim: BatchDim) -> None:
    """Raises ValueError where it is neither None, a dimension nor dimensions by layer."""
    values = list(batch_dim.values()) if isinstance(batch_dim, Mapping) else [batch_dim]
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(
                f"batch_dim must be None, a dimension (0, 1, ...) or {{layer name or pattern: dimension}}, got "
                f"{batch_dim!r}"
            )


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

    def holds(self, shape: Sequence[int], like: Sequence[int]) -> bool:
        """Whether an argument of this shape has the rows where the input, of shape ``like``, has them."""
        return tuple(shape) == tuple(like) or (
            self.dim is not None and tuple(shape[: self.dim + 1]) == tuple(like[: self.dim + 1])
        )

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
    embedding whose rows at this id get no gradient. ``groups``: over which each parameter is sharded while the layer
    computes. ``nodes``: autograd's node of each parameter that trains. Both are read at the call: in backward FSDP2 may
    not have gathered the parameters when dy arrives.
    """

    layer: Layer
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    placement: Placement | TokenPlacement
    row_sample: Tensor  # [R] int64, CPU
    scale: Tensor  # [R] float64, CPU: row_scale over the sample's number of rows
    factor: float = 1.0
    padding_idx: int | None = None
    packing: Packing | None = None  # where the R sequences lie, if ``placement`` is that of packed tokens
    groups: dict[str, tuple[Any, ...]] = field(init=False)
    nodes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        own = list(self.layer.module.named_parameters(remove_duplicate=False))
        self.groups = {leaf: distributed.shard_groups(parameter) for leaf, parameter in own}
        # Not read in backward: a caller may freeze a layer for one forward.
        self.nodes = {leaf: get_gradient_edge(p).node for leaf, p in own if p.requires_grad}

    def gets(self, leaf: str) -> bool:
        """In backward: whether this pass computes a gradient of the parameter.

        It does not where the layer was frozen when it was called, where its forward does not use the parameter or
        detaches it, and where ``torch.autograd.grad`` asks for the gradient of something else.
        """
        return leaf in self.nodes and _executed(self.nodes[leaf]) is not False

    @property
    def layout(self) -> tuple[tuple[int, bool], ...]:
        """Of each tensor among the arguments: its number of dimensions, and whether it has the rows."""
        tensors = tensors_in((self.args, self.kwargs))
        return tuple((t.dim(), self.placement.holds(t.shape, self.x.shape)) for t in tensors)

    @property
    def in_this_pass(self) -> bool:
        """In backward: whether the pass computes a gradient of some parameter of the layer."""
        return self.layer.frozen or any(map(self.gets, self.nodes))

    @property
    def handed_out(self) -> bool:
        """In backward: whether ``torch.autograd.grad`` returns the gradient, which then is in no ``.grad``."""
        return any(_executed(node) is None for node in self.nodes.values())

    def split(self, tensor: Tensor) -> Tensor:
        """[U, ...]: the parts of the tensor that the module sees alone, in its layout: R rows, or the tokens of R
        packed sequences without padding, sequence after sequence.
        """
        if self.packing is None:
            return self.placement.split(tensor, len(self.row_sample))
        tokens = self.placement.split(tensor, self.packing.tokens)
        return self.packing.inside(tokens, partial(to_device, device=tensor.device))

    def padding(self, tensor: Tensor) -> Tensor | None:
        """The tokens that belong to no sequence, [P, ...]; None where there are none."""
        if self.packing is None:
            return None
        tokens = self.placement.split(tensor, self.packing.tokens)
        return self.packing.outside(tokens, partial(to_device, device=tensor.device))

    @property
    def parts(self) -> Tensor:
        """[R] int64 on the CPU: how many parts of :meth:`split` each row has."""
        return torch.ones_like(self.row_sample) if self.packing is None else self.packing.lengths

    def row_sums(self, values: Tensor) -> Tensor:
        """[R, ...] float64: ``values`` [U, ...] of the parts added up by row, in a fixed order."""
        if self.packing is None:
            return values.to(torch.float64)
        flat = values.reshape(len(values), -1)
        if not on_gpu(values):
            sums = [part.sum(0, dtype=torch.float64) for part in flat.split(self.packing.lengths.tolist())]
            return torch.stack(sums).reshape(-1, *values.shape[1:])
        row = torch.arange(len(self.row_sample), device="cpu").repeat_interleave(self.packing.lengths)
        sums = [sum_by(part.to(torch.float64), row, len(self.row_sample)) for part in flat.split(_COLUMNS, 1)]
        return torch.cat(sums, 1).reshape(-1, *values.shape[1:])

    def row_of_tokens(self) -> Tensor:
        """[T] int64 on the CPU: the row of each token of the input, flattened; -1 for a token of no packed sequence."""
        shape = token_shape(self.layer, self.x)
        index = torch.arange(math.prod(shape), device="cpu").view(shape)
        if self.packing is None:
            count, owner = len(self.row_sample), torch.arange(len(self.row_sample), device="cpu")
        else:
            count, owner = self.packing.tokens, self.packing.sequence_of_tokens()
        at = self.placement.split(index, count)
        found = torch.empty(index.numel(), dtype=torch.long, device="cpu")
        found[at.reshape(count, -1)] = owner[:, None]
        return found


def _executed(node: Any) -> bool | None:
    """In backward: whether the pass reaches a parameter's node; None where ``torch.autograd.grad`` asks for it."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return None


def row_sizes(arguments: Mapping[str, Tensor], rows: Rows) -> dict[str, int]:
    """{path: elements per row} of a model's arguments that have the rows of the micro-batch, or else its samples."""
    for count in (rows.batch, rows.num_samples):
        found = {path: t.numel() // count for path, t in arguments.items() if count in t.shape[:2]}
        if found:
            return found
    return {}


def form(shape: tuple[int, ...], sizes: Mapping[str, int]) -> Form:
    """What two calls of a layer have in common that are read alike."""
    return shape, tuple(sorted(sizes.items()))


def token_shape(layer: Layer, x: Tensor) -> tuple[int, ...]:
    """The dimensions of a layer's input that run over tokens: all of an embedding's ids, else all but the last."""
    return tuple(x.shape if layer.kind == "embedding" else x.shape[:-1])


class Unreadable(ValueError):
    """Nothing says which row of the micro-batch a call's tokens belong to."""


class Ambiguous(Unreadable):
    """The calls of a layer differ in how they depend on the rows, so that this one may be of either kind."""


@dataclass
class Placements:
    """What is known of each layer's calls: by the layer's name and the number of token dimensions.

    ``given``: the tracker's ``batch_dim``. ``seen``: placements found by the probe. ``unclear``: why the probe could
    not place a call. ``mixed``: where some call depends on the rows in a way that is no placement, so that a placement
    of other calls says nothing. ``forms``: of layers of which some inputs do not depend on the rows, the
    (shape, arguments' sizes) of those that do and of those that do not. ``parts``: of placements in which rows are
    flattened with tokens, the tokens per row and the arguments' sizes. ``sizes``: those of the model's arguments in the
    call that runs now, {path: elements per row}.
    """

    given: BatchDim = None
    seen: dict[Key, set[Placement | TokenPlacement]] = field(default_factory=dict)
    unclear: dict[Key, str] = field(default_factory=dict)
    mixed: set[Key] = field(default_factory=set)
    forms: dict[Key, tuple[set[Form], set[Form]]] = field(default_factory=dict)
    parts: dict[tuple[Key, Placement], list[tuple[int, dict[str, int]]]] = field(default_factory=dict)
    sizes: dict[str, int] | None = None
    _assumed: dict[Key, set[Placement]] = field(default_factory=dict)  # of calls by the caller itself

    @staticmethod
    def key(layer: Layer, dims: int, rows: Rows) -> Key:
        """Under which what is known of such a call is kept."""
        packing = rows.packing
        if packing is None or packing.grid is None:
            return layer.name, dims, "padded" if packing is None else "packed"
        return layer.name, dims, "one packed row" if packing.grid[0] == 1 else "packed rows"

    def knows(self, layer: Layer) -> bool:
        """Whether some call of the layer was placed."""
        return any(key[0] == layer.name for key in (*self.seen, *self._assumed))

    def unseen(self, layer: Layer, x: Tensor, rows: Rows) -> bool:
        """Whether no probe has shown how to read such a call of a layer."""
        shape = token_shape(layer, x)
        key = self.key(layer, len(shape), rows)
        if self._given(layer) is not None or key in self.mixed or (key in self.unclear and key not in self.seen):
            return False
        if rows.packing is not None:
            places = [place for place in self.seen.get(key, ()) if isinstance(place, TokenPlacement)]
            return not any(place.fits(shape, rows.packing.grid or (0, 0)) for place in places)
        placed, shared = self.forms.get(key, (set(), set()))
        if shared and self.sizes is not None:
            return form(shape, self.sizes) not in placed | shared
        known = self._known(key, shape, rows)
        return not known or any(not self._as_before(key, place, shape, rows) for place in known)

    def _known(self, key: Key, shape: tuple[int, ...], rows: Rows) -> list[Placement]:
        places = self.seen.get(key, set()) | self._assumed.get(key, set())
        return [place for place in places if isinstance(place, Placement) and place.fits(shape, rows)]

    def _as_before(self, key: Key, place: Placement, shape: tuple[int, ...], rows: Rows) -> bool:
        """Whether rows flattened with tokens have as many as a probe saw, or as many more as the model's arguments."""
        before = self.parts.get((key, place))
        if place.dim is None or not before or self.sizes is None:
            return True
        now, count = self.sizes, shape[place.dim] // place.count(rows)
        return any(
            count == then or any(path in now and count * size == then * now[path] for path, size in sizes.items())
            for then, sizes in before
        )

    def of(self, layer: Layer, x: Tensor, rows: Rows, outermost: bool) -> Placement | TokenPlacement:
        """Where the call's rows lie.

        ``outermost``: the caller itself passed ``x``, so that its first dimension is the batch by convention.

        Raises:
            Unreadable: two readings are possible, or none.
        """
        shape = token_shape(layer, x)
        if rows.packing is not None:
            return self._of_tokens(layer, x, shape, rows, rows.packing)
        if rows.batch == 1:
            return Placement(None)
        dim = self._given(layer)
        if dim is not None:
            return self._at(layer, x, shape, rows, dim)
        key = self.key(layer, len(shape), rows)
        if key in self.mixed:
            raise Ambiguous(f"{_got(layer, x)}: {self.unclear[key]}; {_ADVICE}")
        known = self._known(key, shape, rows)
        shared = self.forms[key][1] if key in self.forms and key in self.unclear else ()
        if known and any(shape == before and self.sizes in (None, dict(sizes)) for before, sizes in shared):
            raise Ambiguous(f"{_got(layer, x)}: {self.unclear[key]}, in one of its calls; {_ADVICE}")
        if len(known) == 1:
            if not self._as_before(key, known[0], shape, rows):
                raise Unreadable(f"{_got(layer, x)}: it has another number of tokens per row than before; {_ADVICE}")
            return known[0]
        if known:
            readings = " or ".join(sorted(map(str, known)))
            raise Unreadable(f"{_got(layer, x)}: its calls differ ({readings}), and this one fits both; {_ADVICE}")
        if key in self.unclear:
            raise Unreadable(f"{_got(layer, x)}: {self.unclear[key]}; {_ADVICE}")
        if key in self.seen:
            readings = " or ".join(sorted(map(str, self.seen[key])))
            raise Unreadable(
                f"{_got(layer, x)}: in its other calls {readings}, which does not fit this one with its {rows.batch} "
                f"rows; pass task_ids for every row the model sees, {_ADVICE}"
            )
        placement = self._by_shape(layer, x, shape, rows, outermost)
        if outermost:
            self._assumed.setdefault(key, set()).add(placement)
        return placement

    def _of_tokens(
        self, layer: Layer, x: Tensor, shape: tuple[int, ...], rows: Rows, packing: Packing
    ) -> Placement | TokenPlacement:
        """Where the tokens of packed sequences lie."""
        if packing.grid is None:
            packing.settle(_grid_of(layer, x, shape, packing))
        assert packing.grid is not None
        dim = self._given(layer)
        if dim is not None:
            return self._tokens_at(layer, x, shape, rows, packing, dim)
        key = self.key(layer, len(shape), rows)
        if key in self.mixed:
            raise Unreadable(f"{_got(layer, x)}: {self.unclear[key]}; {_TOKEN_ADVICE}")
        known = {
            place
            for place in self.seen.get(key, ())
            if isinstance(place, TokenPlacement) and place.fits(shape, packing.grid)
        }
        if len(known) == 1:
            return known.pop()
        if known:
            raise Unreadable(
                f"{_got(layer, x)}: its calls differ ({' or '.join(sorted(map(str, known)))}); {_TOKEN_ADVICE}"
            )
        if key in self.unclear:
            raise Unreadable(f"{_got(layer, x)}: {self.unclear[key]}; {_TOKEN_ADVICE}")
        found = leading(shape, packing.grid)
        if len(found) != 1 and packing.filled == 1:
            # Nothing to confuse: without padding every reading gives all tokens to the one sequence.
            found = readings(shape, packing.grid)
            found = found[:1] if packing.covered == packing.tokens else found
        if len(found) != 1:
            raise Unreadable(f"{_got(layer, x)}: {not_tokens(packing)}; {_TOKEN_ADVICE}")
        return found[0]

    def _tokens_at(
        self, layer: Layer, x: Tensor, shape: tuple[int, ...], rows: Rows, packing: Packing, dim: int
    ) -> Placement | TokenPlacement:
        """What ``batch_dim`` asks for: the packed rows (or the tokens of the only row) at ``dim``, else one row of the
        input per sequence.
        """
        assert packing.grid is not None
        every = readings(shape, packing.grid)
        tokens = [place for place in every if dim in (place.dims[0], *_ones_before(place, shape))]
        if len(tokens) == 1:
            return tokens[0]
        if not tokens and dim < len(shape) and shape[dim] == rows.batch:
            return Placement(dim)
        raise Unreadable(
            f"{_got(layer, x)}: batch_dim={dim} does not say where the {packing.tokens} tokens of the packed rows or "
            f"the {rows.batch} sequences are"
        )

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


_TOKEN_ADVICE = (
    "leave the layer out of layers=, or where its input has one row per sequence (a pooled head) say which dimension "
    "holds them with batch_dim="
)


def not_tokens(packing: Packing) -> str:
    """Why an input of other sizes is not read."""
    return (
        f"no dimension holds the {packing.tokens} tokens of the packed rows in their order (tokens were selected, "
        "pooled or moved)"
    )


def _ones_before(placement: TokenPlacement, shape: Sequence[int]) -> range:
    """The dimensions of size 1 in front of the tokens, which ``batch_dim`` may mean."""
    first = placement.dims[0]
    return range(first) if all(size == 1 for size in shape[:first]) else range(0)


def _grid_of(layer: Layer, x: Tensor, shape: tuple[int, ...], packing: Packing) -> tuple[int, int]:
    """(B, L) where the model's arguments did not show them: the only sizes that this input allows."""
    long = [size for size in shape if size != 1]
    if len(long) <= 1:
        return 1, math.prod(shape)
    grids = [grid for grid in ((1, shape[0]), (shape[0], shape[1])) if packing.why_not(grid) is None]
    exact = [grid for grid in grids if math.prod(grid) == packing.covered]
    if len(exact) != 1:
        raise Unreadable(
            f"{_got(layer, x)}: nothing says which of its dimensions hold the tokens of the packed rows; pass "
            "attention_mask= to microbatch (its shape [B, L] says how many tokens the model gets)"
        )
    return exact[0]


def whose_rows(layer: Layer, placement: Placement | TokenPlacement, rows: Rows) -> tuple[Tensor, Tensor]:
    """([R] samples, [R] factors) of a call's rows.

    Raises:
        ValueError: one row stands for all rows of a sample, but their factors differ.
    """
    if isinstance(placement, TokenPlacement) or not placement.per_sample:
        return rows.row_sample, rows.scale
    if rows.sample_scale is None:
        raise ValueError(
            f"layer {layer.name!r} ran once per sample ({rows.num_samples} rows for {rows.batch}), but row_scale or "
            "rows_per_sample differs between rows of one sample: a shared prefix needs one factor per sample"
        )
    return torch.arange(rows.num_samples, device="cpu"), rows.sample_scale
