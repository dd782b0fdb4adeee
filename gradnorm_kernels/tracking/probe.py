"""Whose row is it: two or more forwards that differ in a known subset of the batch show where a layer sees its rows.

Some rows of the model's arguments are perturbed. A dimension of a layer's input in which exactly these rows change
holds the rows of the batch. A layer whose input does not change (positions that the model makes up itself) is perturbed
at its own output instead, and the rows of the model's output are looked at.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .calls import Key, Placement, Placements, form, row_sizes, token_shape
from .experts import experts_input
from .layers import Layer
from .packing import TokenPlacement
from .replay import Impossible, copied, module_state, refuse_sharded, tensors_in, without_a_trace
from .rows import Rows

ATTEMPTS = 3  # perturbations that are tried where a forward raises
INJECTIONS = 8  # forwards at most for layers whose input does not change
SHARED = (
    "its input does not depend on the rows of the batch (all of them share it), so that no gradient per row can be seen"
)
MIXED = "its input changes in other rows too when some rows of the batch change"
VARYING = "how often it is called, or with how many tokens, depends on the data"
SQUARE = "the model's arguments have as many tokens as rows, and either could be the rows"
SAMPLES = (
    "the model's arguments have as many tokens as there are samples, and their first dimension could be the rows "
    "(task_ids needs an entry for every row that the model sees)"
)
SEVERAL = "several of its dimensions could hold the rows of the batch"
TRAINING = "in training mode its input changes in other rows too when some rows of the batch change"
TOGETHER = (
    "the model's output changes in other rows too when some rows of the batch change (a batch norm in training mode, "
    "in-batch negatives, experts with a limited capacity), so that a row's gradient is not that of its own loss"
)

_Key = tuple[str, int]  # a layer's name and the index of its call
Place = Placement | TokenPlacement


class _Subset:
    """R rows of which some are perturbed: ``rows`` [R] bool."""

    def __init__(self, rows: Tensor, per_sample: bool, dim: int = 0) -> None:
        self.rows, self.per_sample, self.dim = rows, per_sample, dim

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Seen:
    """What one forward showed: each call's token fingerprints, and the model's output."""

    inputs: dict[_Key, Tensor] = field(default_factory=dict)
    layers: dict[_Key, Layer] = field(default_factory=dict)
    outputs: dict[_Key, tuple[int, ...]] = field(default_factory=dict)
    result: list[Tensor] = field(default_factory=list)
    injected: bool = False


class Probe:
    """The probe of one call of the model (or of a part of it that the caller called itself)."""

    shared = SHARED  # why a call is not placed whose input never changes

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, *, training: bool = False
    ) -> None:
        """``training``: look at the forward in training mode too."""
        self._module, self._args, self._kwargs, self._rows = module, args, kwargs, rows
        self._modes = [(inner, inner.training) for inner in module.modules()] if training else []
        self._trains = False  # forwards run in training mode
        self._seen = Seen()
        self._calls: dict[str, int] = {}
        self._inject: tuple[_Key, Tensor] | None = None  # a call, and where its output is perturbed (broadcasts)
        self._leaves: dict[str, Tensor] = {}
        self._random = random.Random(0)
        self._possible: dict[_Key, set[Place]] = {}  # what no perturbation has ruled out
        self._exact: dict[_Key, set[Place]] = {}  # what a perturbation has shown: exactly its rows changed
        self._why: dict[_Key, str] = {}

    def run(self, placements: Placements, set_running: Callable[[Probe | None], None]) -> None:
        """Find the placements of every measured call inside.

        Raises:
            Impossible: the forward cannot be run again; nothing was found.
        """
        refuse_sharded(self._module)
        copied((self._args, self._kwargs), self._remember)
        set_running(self)
        try:
            with without_a_trace(self._module):
                self._search()
        finally:
            set_running(None)
        known = set(placements.seen)
        for key, layer in self._base.layers.items():
            tokens = self._base.inputs[key]
            place, found = placements.key(layer, tokens.dim(), self._rows), self._found(key)
            now = form(tuple(tokens.shape), row_sizes(self._leaves, self._rows))
            placed, shared = placements.forms.setdefault(place, (set(), set()))
            if len(found) == 1:
                placed.add(now)
                placements.seen.setdefault(place, set()).update(found)
                self._note_parts(placements, place, next(iter(found)), tuple(tokens.shape))
                continue
            why = SEVERAL if found else self._why.get(key, MIXED if key in self._possible else self.shared)
            if why == self.shared:
                shared.add(now)
                placements.unclear.setdefault(place, why)
            elif why not in (SEVERAL, SQUARE, SAMPLES) or place not in known:  # else what a probe showed still holds
                placements.mixed.add(place)
                placements.unclear[place] = why

    def _note_parts(self, placements: Placements, key: Key, place: Place, shape: tuple[int, ...]) -> None:
        """How many tokens a row has, where rows are flattened with tokens."""
        if isinstance(place, Placement) and place.dim is not None and not place.whole:
            each = shape[place.dim] // place.count(self._rows)
            placements.parts.setdefault((key, place), []).append((each, row_sizes(self._leaves, self._rows)))

    def _remember(self, path: str, tensor: Tensor) -> Tensor:
        self._leaves[path] = tensor.detach()
        return tensor

    # What the layers' hooks report

    def saw(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A layer's call in a forward of the probe; returns its output, perturbed where that is asked for."""
        x = experts_input(layer, args, kwargs)
        index = self._calls.get(layer.name, 0)
        self._calls[layer.name] = index + 1
        key = (layer.name, index)
        if x is None:
            return None
        self._seen.layers[key] = layer
        self._seen.inputs[key] = _fingerprint(layer, x)
        if isinstance(output, Tensor) and output.is_floating_point():
            self._seen.outputs[key] = tuple(output.shape)
            if self._inject is not None and self._inject[0] == key:
                return self._injected(output)
        return None

    def _injected(self, output: Tensor) -> Tensor:
        assert self._inject is not None
        at = self._inject[1].to(output.device)
        self._seen.injected = True
        noise = torch.randn(output.shape, device=output.device, dtype=torch.float32).to(output.dtype)
        return torch.where(at, output + noise * output.abs().mean().clamp_min(0.1), output)

    # Forwards

    def _forward(self, changed: dict[str, Tensor] | None = None) -> Seen:
        """One forward; ``changed``: {path: tensor} in the place of arguments."""
        changed = changed or {}
        self._seen, self._calls = Seen(), {}
        # The same random numbers in every forward; the caller's state is put back at the end.
        torch.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        args, kwargs = copied(
            (self._args, self._kwargs), lambda path, tensor: changed.get(path, tensor).detach().clone()
        )
        try:
            with self._mode():
                result = self._module(*args, **kwargs)
        except Exception as error:
            raise Impossible(f"its forward raised {type(error).__name__}: {error}") from error
        self._seen.result = [t for t in tensors_in(result) if t.is_floating_point() and t.dim() > 0]
        return self._seen

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Where ``_trains``: the caller's training flags but for dropout, and each forward from the same state."""
        if not self._trains:
            yield
            return
        with module_state(self._module):
            for module, training in self._modes:
                module.training = training and not isinstance(module, _DropoutNd)
            yield

    def _perturbed(self, subset: _Subset, level: str) -> tuple[Seen, Tensor] | None:
        """(what a perturbed forward showed, the rows that changed); None where nothing could be perturbed."""
        for _ in range(ATTEMPTS):
            changed, rows = self._perturb(subset, level)
            if not changed or not bool(rows.any()) or bool(rows.all()):
                return None
            try:
                return self._forward(changed), rows
            except Impossible:
                continue
        return None

    # The search

    def _search(self) -> None:
        self._base = self._forward()
        if not self._base.inputs:
            return
        rows, tried = self._rows, False
        counts = [(rows.batch, False)] + ([(rows.num_samples, True)] if 1 < rows.num_samples != rows.batch else [])
        for count, per_sample in counts:
            subset = self._subset(count, per_sample)
            if subset is None:
                continue
            tried = True
            other = _Subset(~subset.rows, per_sample, subset.dim)
            levels = ("swap", "replace", "mask", "blocks")
            for level in levels:
                if not self._open():
                    break
                for half in (subset, other):
                    self._compare(half, level)
            if not per_sample:
                self._check_square(subset)
                if level == "replace":  # it did not run: tokens that change places leave sums over them alone
                    self._hold(self._base, self._perturbed(subset, level), MIXED)
            if not per_sample or self._samples_only():
                self._check_training(subset)
            if subset.dim == 1:
                self._check_first_dimension(subset)
        if not tried:
            raise Impossible("none of its arguments has the rows of the micro-batch")
        self._inject_outputs()

    def _found(self, key: _Key) -> set[Place]:
        return self._possible.get(key, set()) & self._exact.get(key, set())

    def _shown_by(self, key: _Key, per_sample: bool) -> bool:
        """Whether the placement of a call was shown by perturbed samples, or else by perturbed rows."""
        return any(isinstance(place, Placement) and place.per_sample == per_sample for place in self._found(key))

    def _open(self) -> list[_Key]:
        """Calls of which no perturbation has shown enough yet."""
        return [key for key in self._base.inputs if not self._found(key) and key not in self._why]

    def _subset(self, count: int, per_sample: bool) -> _Subset | None:
        """A random half of the rows, with the first and without the last, and the dimension that has them."""
        dims = [next((d for d in (0, 1) if t.dim() > d and t.shape[d] == count), None) for t in self._leaves.values()]
        known = [dim for dim in dims if dim is not None]
        if not known:
            return None
        rows = torch.tensor([self._random.random() < 0.5 for _ in range(count)], device="cpu")
        rows[0], rows[-1] = True, False
        return _Subset(rows, per_sample, 0 if 0 in known else 1)

    def _compare(self, subset: _Subset, level: str) -> None:
        """Perturb, and narrow down the placements of every call that changed."""
        done = self._perturbed(subset, level)
        if done is None:
            return
        seen, rows = done
        if (not subset.per_sample or self._samples_only()) and self._coupled(self._base, seen, rows):
            self._refuse_all(TOGETHER)
        for key, before in self._base.inputs.items():
            if key in self._why or (subset.per_sample and self._found(key)):
                continue
            after = seen.inputs.get(key)
            if after is None or after.shape != before.shape:
                self._why[key] = VARYING
                continue
            shown = _candidates(before, after, rows, subset.per_sample)
            if shown is not None:
                self._narrow(key, *shown, MIXED)

    def _coupled(self, base: Seen, seen: Seen, rows: Tensor) -> bool:
        """Whether the model's output changed in other rows than ``rows``.

        Similarities of all rows with each other, [B, B], do not count: their loss may still be a row's own.
        """
        pairs = [(a, b) for a, b in zip(base.result, seen.result, strict=False) if a.shape == b.shape]
        count = len(rows)
        for before, after in [pair for pair in pairs if pair[0].dim() > 1] or pairs[:1]:
            dims = [dim for dim, size in enumerate(before.shape[:2]) if size == count]
            if dims and before.shape != (count, count):
                changed = differing(before, after).cpu()
                along = [changed.movedim(dim, 0).reshape(count, -1).any(1) for dim in dims]
                if all(bool((moved & ~rows).any()) for moved in along):
                    return True
        return False

    def _refuse_all(self, why: str) -> None:
        for key in self._base.inputs:
            self._exact[key], self._possible[key], self._why[key] = set(), set(), why

    def _communicates(self) -> bool:
        """Whether a module's forward in training mode is a collective call that mixes the rows of all ranks."""
        return any(training and type(module).__name__ == "SyncBatchNorm" for module, training in self._modes)

    def _check_training(self, subset: _Subset) -> None:
        """Refuse what mixes rows in training mode only. Calls that are made only there are placed."""
        if not self._modes or not self._base.inputs:
            return
        if self._communicates():
            self._refuse_all(TOGETHER)
            return
        self._trains = True
        try:
            base = self._forward()
            if alike(base, self._base):
                return
            shown = {level: self._perturbed(subset, level) for level in ("swap", "replace")}
            if not any(shown.values()) or not alike(self._forward(), base):
                return  # random numbers of its own: nothing is shown
        except Impossible:
            return
        finally:
            self._trains = False
        for key, before in base.inputs.items():
            self._base.inputs.setdefault(key, before)
            self._base.layers.setdefault(key, base.layers[key])
            if before.shape != self._base.inputs[key].shape:
                self._why.setdefault(key, VARYING)
                self._exact[key] = set()
        for done in shown.values():
            self._hold(base, done, TRAINING, per_sample=subset.per_sample)

    def _hold(self, base: Seen, done: tuple[Seen, Tensor] | None, why: str, *, per_sample: bool = False) -> None:
        """Hold what is known of the rows against one more perturbation. ``why``: the reason where it is wrong.

        Other ids may change how often a layer is called, and with how many tokens: that shows nothing here.
        """
        if done is None:
            return
        seen, rows = done
        if self._coupled(base, seen, rows):
            self._refuse_all(TOGETHER)
            return
        for key, before in base.inputs.items():
            after = seen.inputs.get(key)
            if key in self._why or after is None or after.shape != before.shape:
                continue
            shown = _candidates(before, after, rows, per_sample)
            if shown is not None and (self._shown_by(key, per_sample) or not self._found(key)):
                self._narrow(key, *shown, why)

    def _narrow(self, key: _Key, exact: Set[Place], possible: Set[Place], why: str) -> None:
        """Take in what one perturbation showed of a call. ``why``: the reason where no placement is left."""
        self._exact.setdefault(key, set()).update(exact)
        self._possible[key] = self._possible.get(key, set(possible)) & possible
        if not self._possible[key]:
            self._why[key] = why

    def _check_square(self, subset: _Subset) -> None:
        """Where an argument has B rows of B tokens: refuse if its second dimension could be the rows as well."""
        count = len(subset)
        tokens = [t.shape[:-1] if t.is_floating_point() else t.shape for t in self._leaves.values()]
        if not any(len(shape) > 1 and shape[0] == shape[1] == count for shape in tokens):
            return
        done = self._perturbed(_Subset(subset.rows, False, 1), "swap")
        if done is None:
            return
        seen, rows = done
        for before, after in zip(self._base.result, seen.result, strict=False):
            if before.shape != after.shape:
                return
            moved = differing(before, after).cpu()
            if bool(moved.any()) and moved.dim() > 1 and moved.shape[0] == count:
                parts = moved.any(-1) if moved.dim() > 2 else moved
                along = [parts.movedim(dim, 0).reshape(size, -1).any(1) for dim, size in enumerate(parts.shape)]
                if not any(len(part) == count and torch.equal(part, rows) for part in along):
                    return
        changed = 0
        for key, inputs in self._base.inputs.items():
            later = seen.inputs.get(key)
            if later is None or later.shape != inputs.shape:
                return
            shown = _candidates(inputs, later, rows, False)
            if shown is not None:
                changed += 1
                if not shown[0]:
                    return  # tokens of a row are mixed, so the second dimension does not hold rows
        if changed:
            for key in self._base.inputs:
                self._exact[key] = set()
                self._why[key] = SQUARE if key in self._possible else self.shared

    def _samples_only(self) -> bool:
        """Whether no argument has the rows of the micro-batch, so that the call is one of its samples."""
        return not any(self._rows.batch in t.shape[:2] for t in self._leaves.values())

    def _check_first_dimension(self, subset: _Subset) -> None:
        """Where the second dimension was taken for the rows: refuse if the first could hold rows as well.

        A batch of other rows than task_ids has (chosen and rejected ones together), with as many tokens as there are
        rows or samples, looks like one whose sequences come first. Sequences have tokens that are mixed.
        """
        count = len(subset)
        sizes = {t.shape[0] for t in self._leaves.values() if t.dim() > 1 and t.shape[1] == count}
        size = sizes.pop() if len(sizes) == 1 else 0
        if size < 2 or size == count or not (subset.per_sample or size % count == 0):
            return
        taken = [key for key in self._base.inputs if self._shown_by(key, subset.per_sample)]
        half = torch.arange(size, device="cpu") % 2 == 0
        done = next(filter(None, (self._perturbed(_Subset(half, False), level) for level in ("swap", "replace"))), None)
        if not taken or done is None or self._coupled(self._base, *done):
            return
        seen, rows = done
        for key, before in self._base.inputs.items():
            after = seen.inputs.get(key)
            shown = None if after is None or after.shape != before.shape else _candidates(before, after, rows, False)
            if shown is not None and not shown[1]:
                return
        for key in taken:
            self._exact[key], self._why[key] = set(), SAMPLES if subset.per_sample else SQUARE

    def _inject_outputs(self) -> None:
        """Perturb the outputs of calls whose inputs never changed, and look at the rows of the model's output."""
        count, budget = self._rows.batch, INJECTIONS
        results = [t for t in self._base.result if t.shape[0] == count]
        for key in self._open():
            shape = self._base.outputs.get(key)
            if shape is None or not results:
                continue
            rows = torch.tensor([self._random.random() < 0.5 for _ in range(count)], device="cpu")
            rows[0], rows[-1] = True, False
            for dim in [d for d, size in enumerate(shape[:-1]) if size == count]:
                if budget == 0:
                    return
                budget -= 1
                self._inject = (key, rows.view([-1 if other == dim else 1 for other in range(len(shape))]))
                try:
                    seen = self._forward()
                except Impossible:
                    continue
                finally:
                    self._inject = None
                after = [t for t in seen.result if t.shape[0] == count]
                if seen.injected and len(after) == len(results):
                    moved = torch.zeros(count, dtype=torch.bool, device="cpu")
                    for a, b in zip(results, after, strict=True):
                        if a.shape == b.shape:
                            moved |= differing(a, b).reshape(count, -1).any(1).cpu()
                    if torch.equal(moved, rows):
                        self._possible.setdefault(key, set()).add(Placement(dim))
                        self._exact.setdefault(key, set()).add(Placement(dim))

    # Perturbations

    def _perturb(self, subset: _Subset, level: str) -> tuple[dict[str, Tensor], Tensor]:
        """({path: perturbed argument}, [R] the rows in which an argument changed)."""
        changed: dict[str, Tensor] = {}
        moved = torch.zeros(len(subset), dtype=torch.bool, device="cpu")
        for path, tensor in self._leaves.items():
            size = tensor.shape[subset.dim] if tensor.dim() > subset.dim else 0
            if level == "blocks":
                if not tensor.is_floating_point() or size <= len(subset) or size % len(subset):
                    continue
                rows_first = tensor.unflatten(0, (len(subset), -1)) if subset.dim == 0 else None
            else:
                rows_first = tensor.movedim(subset.dim, 0) if size == len(subset) else None
            if rows_first is None:
                continue
            new = self._perturb_leaf(path, rows_first, subset.rows, level)
            if new is None:
                continue
            moved |= differing(rows_first, new).reshape(len(subset), -1).any(1).cpu()
            changed[path] = new.flatten(0, 1) if level == "blocks" else new.movedim(0, subset.dim)
        return changed, moved

    def _perturb_leaf(self, path: str, tensor: Tensor, rows: Tensor, level: str) -> Tensor | None:
        """``tensor`` [R, ...] changed in ``rows``; None where this level does not change it."""
        if tensor.is_floating_point():
            if level not in ("swap", "blocks") or "mask" in path:
                return None
            noise = torch.randn(tensor.shape, device=tensor.device, dtype=torch.float32).to(tensor.dtype)
            size = torch.where(torch.isfinite(tensor), tensor, 0.0).abs().mean().clamp_min(1e-3)
            here = rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            return torch.where(here, tensor + noise * size, tensor)
        masks = tensor.dtype == torch.bool or ("mask" in path and tensor.dim() == 2)
        if masks != (level == "mask") or level == "blocks":
            return None
        if "sizes" in path:  # of images: with other ones a row has another number of tokens, and takes its neighbour's
            return None
        new, chosen = tensor.cpu().clone(), rows.nonzero()[:, 0].tolist()
        if tensor.dim() == 1:
            values = [new[row].item() for row in chosen]
            for row, value in zip(chosen, values[1:] + values[:1], strict=True):
                new[row] = value
            return new.to(tensor.device)
        if tensor.dim() != 2:
            return None
        valid = self._valid(tensor)
        everything = new[valid].unique().tolist()
        for row in chosen:
            at = valid[row].nonzero()[:, 0].tolist()
            if level == "mask":
                attended = new[row].nonzero()[:, 0].tolist()
                if len(attended) > 1:
                    new[row, attended[0]] = 0
            elif level == "replace":
                if at and len(everything) > 1:
                    position = self._random.choice(at[: max(1, len(at) // 2)])
                    others = [value for value in everything if value != new[row, position].item()]
                    new[row, position] = self._random.choice(others)
            else:
                pairs = [(p, q) for p, q in pairwise(at) if q == p + 1 and new[row, p] != new[row, q]]
                if pairs:
                    p, q = self._random.choice(pairs)
                    new[row, p], new[row, q] = new[row, q].clone(), new[row, p].clone()
        return new.to(tensor.device)

    def _valid(self, tensor: Tensor) -> Tensor:
        """[R, L] bool on the CPU: the tokens that the mask (the micro-batch's, or an argument's) does not leave out."""
        masks = [leaf for path, leaf in self._leaves.items() if "mask" in path and leaf.shape == tensor.shape]
        if self._rows.mask is not None and self._rows.mask.shape == tensor.shape:
            masks.append(self._rows.mask)
        valid = torch.ones(tensor.shape, dtype=torch.bool, device="cpu")
        for mask in masks:
            valid &= (mask != 0).cpu()
        return valid


def alike(a: Seen, b: Seen) -> bool:
    """Whether two forwards showed the same."""
    if a.inputs.keys() != b.inputs.keys() or len(a.result) != len(b.result):
        return False
    pairs = [*((a.inputs[key], b.inputs[key]) for key in a.inputs), *zip(a.result, b.result, strict=True)]
    return all(one.shape == other.shape and not bool(differing(one, other).any()) for one, other in pairs)


def _fingerprint(layer: Layer, x: Tensor) -> Tensor:
    """One number per token: the ids, or a fixed random projection of the features."""
    x = x.detach()
    if layer.kind == "embedding":
        return x.clone()
    shape = token_shape(layer, x)
    wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    generator = torch.Generator(device="cpu").manual_seed(x.shape[-1])
    weights = torch.randn(x.shape[-1], generator=generator, dtype=torch.float32, device="cpu")
    return (x.reshape(-1, x.shape[-1]).to(wide) @ weights.to(x.device, wide)).reshape(shape)


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ by more than rounding.

    A row's rounding may depend on other rows: products over the tokens of one expert have a shape that the data decide,
    and kernels on a GPU may vary. The largest difference is the perturbation's.
    """
    if not a.is_floating_point():
        return a != b
    different = (a != b) & ~(a.isnan() & b.isnan())
    distance = torch.where(different, (a.double() - b.double()).abs(), 0.0)
    return distance > (1e-3 if a.is_cuda else 1e-5) * distance.nan_to_num(0.0, 0.0, 0.0).max()


def _candidates(
    before: Tensor, after: Tensor, rows: Tensor, per_sample: bool
) -> tuple[set[Placement], set[Placement]] | None:
    """Placements under which two inputs differ (in exactly these rows, in no other rows); None: they do not differ."""
    changed = differing(before, after).cpu()
    if not bool(changed.any()):
        return None
    exact: set[Placement] = set()
    possible: set[Placement] = set()
    count = len(rows)
    for dim, size in enumerate(changed.shape):
        along = changed.movedim(dim, 0).reshape(size, -1).any(1)
        readings = {}
        if size == count:
            readings[Placement(dim, per_sample=per_sample)] = along
        elif size > count and size % count == 0:
            flat = Placement(dim, whole=False, per_sample=per_sample)
            readings[flat] = along.view(count, -1).any(1)
            readings[replace(flat, interleaved=True)] = along.view(-1, count).any(0)
        for placement, moved in readings.items():
            if torch.equal(moved, rows):
                exact.add(placement)
            if not bool((moved & ~rows).any()):
                possible.add(placement)
    return exact, possible
