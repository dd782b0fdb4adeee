"""Whose token is it: forwards that differ in some packed sequences show where a layer sees the tokens of which one.

Token ids, or embeddings, of some sequences are perturbed; positions, masks and boundaries are not, because they say
where sequences begin. Under the right reading of a layer's input the tokens of these sequences change, and those of the
others do not. Where the model's output changes in other sequences, the model does not keep the sequences apart: then no
layer is measured, because the gradient that passes through a sequence's tokens is not that of its own loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import not_tokens
from .packing import TokenPlacement, readings, token_arguments
from .probe import INJECTIONS, VARYING, Place, Probe, Seen, alike, differing
from .replay import Impossible

MOVED = "its input changes in other sequences too when some sequences change"
TOGETHER = (
    "the model does not keep packed sequences apart: when one changes, the model's output changes in others. With the "
    "eager and sdpa attention of transformers pass position_ids that restart at 0, no attention_mask and "
    "use_cache=False; else give sequences rows of their own"
)
TRAINING = (
    "in training mode the model does not keep packed sequences apart (a batch norm): when one changes, the model's "
    "output changes in others"
)
UNSEEN = "its input depends on no token, so that nothing shows which sequences it is of"


class PackedProbe(Probe):
    """The probe of a call with packed rows."""

    shared = UNSEEN
    unlucky = False  # no token could be exchanged for another one

    def _search(self) -> None:
        packing = self._rows.packing
        assert packing is not None and packing.grid is not None
        self._packing, self._grid = packing, packing.grid
        self._sequence = packing.sequence_of_tokens()
        self._base = self._forward()
        for key, inputs in self._base.inputs.items():
            if not readings(inputs.shape, self._grid):
                self._why[key] = not_tokens(packing)
        filled, moved_any = self._packing.lengths > 0, False
        some = self._some(filled)
        for level in ("swap", "replace"):
            for rows in (some, filled & ~some):
                done = self._perturbed_sequences(rows, level)
                if done is None:
                    continue
                moved_any = True
                seen, moved = done
                if self._together(seen, moved):
                    self._refuse_all(TOGETHER)
                    return
                self._compare_tokens(seen, moved)
        if not moved_any:
            self.unlucky = True
            raise Impossible("none of its arguments has tokens that could be exchanged")
        self._check_training_of(some)
        self._inject_tokens()

    def _check_training_of(self, some: Tensor) -> None:
        """Refuse what mixes sequences in training mode only."""
        if not self._modes:
            return
        if self._communicates():
            self._refuse_all(TRAINING)
            return
        evaluated = self._base
        self._trains = True
        try:
            base = self._forward()
            if alike(base, evaluated):
                return
            both = [self._perturbed_sequences(some, level) for level in ("swap", "replace")]
            shown = [done for done in both if done is not None]
            if not shown or not alike(self._forward(), base):
                return  # random numbers of its own: nothing is shown
            self._base = base
            together = any(self._together(*done) for done in shown)
            for done in shown:
                self._compare_tokens(*done)
        except Impossible:
            return
        finally:
            self._trains, self._base = False, evaluated
        for key, inputs in base.inputs.items():  # calls that are made in training mode only
            self._base.inputs.setdefault(key, inputs)
            self._base.layers.setdefault(key, base.layers[key])
        if together:
            self._refuse_all(TRAINING)

    def _some(self, filled: Tensor) -> Tensor:
        """[S] a random half of the sequences that have tokens (``filled``), with the first and without the last."""
        rows = torch.tensor([self._random.random() < 0.5 for _ in range(len(filled))], device="cpu") & filled
        at = filled.nonzero()[:, 0]
        rows[at[0]], rows[at[-1]] = True, False
        return rows

    # Perturbations

    def _perturbed_sequences(self, rows: Tensor, level: str) -> tuple[Seen, Tensor] | None:
        """(what a forward with perturbed sequences showed, [S] the sequences that changed)."""
        changed: dict[str, Tensor] = {}
        moved = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        for path, grid in token_arguments(self._leaves):
            tensor = self._leaves[path]
            if grid != self._grid or self._says_where(path, tensor):
                continue
            new = self._noisy(tensor, rows) if tensor.is_floating_point() else self._other_ids(tensor, rows, level)
            if new is not None:
                changed[path] = new
                own = self._own(tensor)
                assert own is not None
                moved |= self._sequences_of(differing(tensor, new), own)
        if not bool(moved.any()) or bool(moved.all()):
            return None
        try:
            return self._forward(changed), moved
        except Impossible:
            return None

    def _says_where(self, path: str, tensor: Tensor) -> bool:
        """Whether an argument is a mask, or the positions that restart in each sequence."""
        name = path.rpartition(".")[2]
        if tensor.dtype == torch.bool or any(
            word in name for word in ("mask", "position", "cu_seq", "seq_idx", "label")
        ):
            return True
        if tensor.is_floating_point():
            return False
        starts = torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), self._packing.lengths.cumsum(0)[:-1]])
        valid = self._sequence >= 0
        ends = torch.arange(int(valid.sum()), device="cpu")
        return torch.equal(tensor.cpu().reshape(-1)[valid].long(), ends - starts[self._sequence[valid]])

    def _noisy(self, tensor: Tensor, rows: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, device=tensor.device, dtype=torch.float32).to(tensor.dtype)
        size = torch.where(torch.isfinite(tensor), tensor, 0.0).abs().mean().clamp_min(1e-3)
        here = (rows[self._sequence.clamp_min(0)] & (self._sequence >= 0)).to(tensor.device)
        return torch.where(here.view(*tensor.shape[:-1], 1), tensor + noise * size, tensor)

    def _other_ids(self, tensor: Tensor, rows: Tensor, level: str) -> Tensor | None:
        """Token ids with two neighbours exchanged, or one replaced, in each of the sequences ``rows``."""
        new = tensor.cpu().reshape(-1).clone()
        everything = new[self._sequence >= 0].unique().tolist()
        for sequence in rows.nonzero()[:, 0].tolist():
            at = (self._sequence == sequence).nonzero()[:, 0].tolist()
            if level == "replace" and at and len(everything) > 1:
                position = self._random.choice(at[: max(1, len(at) // 2)])
                others = [value for value in everything if value != new[position].item()]
                new[position] = self._random.choice(others)
            elif level == "swap":
                pairs = [p for p in at[:-1] if new[p] != new[p + 1]]
                if pairs:
                    p = self._random.choice(pairs)
                    new[p], new[p + 1] = new[p + 1].clone(), new[p].clone()
        return new.view(tensor.shape).to(tensor.device)

    # What changed

    def _sequences_of(self, changed: Tensor, placement: TokenPlacement) -> Tensor:
        """[S] bool: the sequences of which a token changed, under one reading of ``changed``."""
        count = len(self._sequence)
        token = placement.split(changed.cpu(), count).reshape(count, -1).any(1)
        found = torch.zeros(len(self._packing), dtype=torch.bool, device="cpu")
        found[self._sequence[token & (self._sequence >= 0)]] = True
        return found

    def _readings(self, before: Tensor, after: Tensor, rows: Tensor) -> tuple[set[Place], set[Place]] | None:
        """Readings under which (exactly ``rows``, no other sequences) changed; None where nothing did."""
        changed = differing(before, after)
        if not bool(changed.any()):
            return None
        found = {place: self._sequences_of(changed, place) for place in readings(before.shape, self._grid)}
        exact = {place for place, moved in found.items() if torch.equal(moved, rows)}
        return set(exact), {place for place, moved in found.items() if not bool((moved & ~rows).any())}

    def _compare_tokens(self, seen: Seen, rows: Tensor) -> None:
        """Narrow down the placements of every call whose input changed."""
        for key, before in self._base.inputs.items():
            if key in self._why:
                continue
            after = seen.inputs.get(key)
            if after is None or after.shape != before.shape:
                self._why[key] = VARYING
                continue
            shown = self._readings(before, after, rows)
            if shown is not None:
                self._narrow(key, *shown, MOVED)

    def _together(self, seen: Seen, rows: Tensor) -> bool:
        """Whether the model's output changed in other sequences than ``rows``.

        Without an output of tokens the last measured call with the shape of the model's own tokens stands for it.
        """
        moved = [
            self._sequences_of(differing(before, after), own)
            for before, after in zip(self._base.result, seen.result, strict=False)
            if (own := self._own(before)) is not None and before.shape == after.shape
        ]
        if not moved:
            calls = [key for key, inputs in self._base.inputs.items() if self._own(inputs) is not None]
            for key in calls[-1:]:
                before, after, own = self._base.inputs[key], seen.inputs.get(key), self._own(self._base.inputs[key])
                if own is not None and after is not None and after.shape == before.shape:
                    moved.append(self._sequences_of(differing(before, after), own))
        return any(bool((sequences & ~rows).any()) for sequences in moved)

    def _own(self, tensor: Tensor) -> TokenPlacement | None:
        """The placement of a tensor whose leading dimensions are the model's own rows and tokens."""
        shape = tuple(tensor.shape)
        if shape[:2] == self._grid:
            return TokenPlacement((0, 1))
        return TokenPlacement((0,)) if shape[:1] == (len(self._sequence),) and self._grid[0] == 1 else None

    def _inject_tokens(self) -> None:
        """Perturb the outputs of calls whose inputs never changed, and look at what follows them."""
        budget = INJECTIONS
        for key in self._open():
            shape = self._base.outputs.get(key)
            if shape is None:
                continue
            rows = self._some(self._packing.lengths > 0)
            here = rows[self._sequence.clamp_min(0)] & (self._sequence >= 0)
            for place in readings(shape[:-1], self._grid):
                if budget == 0:
                    return
                budget -= 1
                token = place.split(torch.arange(math.prod(shape[:-1]), device="cpu").view(shape[:-1]), len(here))
                at = torch.zeros(math.prod(shape[:-1]), dtype=torch.bool, device="cpu")
                at[token.reshape(len(here), -1)[here]] = True
                self._inject = (key, at.view(*shape[:-1], 1))
                try:
                    seen = self._forward()
                except Impossible:
                    continue
                finally:
                    self._inject = None
                if seen.injected and self._followed(seen, rows):
                    self._possible.setdefault(key, set()).add(place)
                    self._exact.setdefault(key, set()).add(place)

    def _followed(self, seen: Seen, rows: Tensor) -> bool:
        """Whether exactly these sequences changed in the model's output and in the inputs that are already placed."""
        moved = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        for before, after in zip(self._base.result, seen.result, strict=False):
            own = self._own(before)
            if own is not None and before.shape == after.shape:
                moved |= self._sequences_of(differing(before, after), own)
        for key, before in self._base.inputs.items():
            places, now = self._found(key), seen.inputs.get(key)
            if len(places) == 1 and now is not None and now.shape == before.shape:
                (place,) = places
                assert isinstance(place, TokenPlacement)
                moved |= self._sequences_of(differing(before, now), place)
        return torch.equal(moved, rows)
