"""The outermost calls of a micro-batch: what their arguments say of the rows, and when a probe runs.

A probe shows where layers see the rows of one kind of call. A call is of another kind if it has other arguments, if one
of them holds different numbers for the first time (a mask with padding, lengths), or if the model was in another mode.
A layer that no probe has seen, or that gets an input of another form than the probe saw, is looked for while its
forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .calls import Placements, row_sizes, token_shape
from .layers import Layer
from .packed_probe import PackedProbe
from .packing import Packing, token_arguments
from .probe import Probe
from .quiet import is_quiet
from .replay import Impossible, copied, leaves, numbers
from .rows import Rows

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule")
_UNCALLED = "no forward of the probe called it"


def in_backward() -> bool:
    """True while autograd runs backward on this thread: a forward seen then is a recomputation by checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


class Entries:
    """The outermost calls, and what was probed.

    Attributes:
        entering: calls of all containers are watched, not only of those that were outermost before.
        depth: how many watched containers' forwards are running.
        probe: the one that runs; it takes the layers' calls.
        unprobed: why no probe could run.
    """

    def __init__(self, placements: Placements, layers: Iterable[Layer], hook: Callable[..., Any]) -> None:
        """``hook``: what makes a hook of a function."""
        self._placements, self._layers, self._make_hook = placements, list(layers), hook
        self._rows: Rows | None = None
        self.entering, self.depth = False, 0
        self.probe: Probe | None = None
        self.unprobed: str | None = None
        self._removers: list[Callable[[], None]] | None = None  # of the hooks of containers, where there are any
        self._watched: int | None = None  # how many containers were known as outermost; None: all are watched
        self._outermost: dict[int, nn.Module] = {}
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None  # the one that runs
        self._kinds: dict[Any, set[str]] = {}  # probed kinds of calls -> arguments that held different numbers
        self._shapes: set[Any] = set()  # probed in this micro-batch, if it looks for all rows
        self._packed: set[Any] = set()  # probed kinds of calls with packed rows
        self._impossible: set[Any] = set()  # kinds of calls
        self._looked: set[Any] = set()  # layers' calls that were looked for
        self._allowed = self._searching = False
        self._per_sample: dict[int, int] = {}  # calls in this micro-batch with a row per sample
        self._per_row = False
        self._called_directly: set[str] = (
            set()
        )  # layers that the caller itself called while all containers were watched
        self.strangers: set[str] = set()  # layers that were called in this micro-batch by no container that is watched

    def watch(self, model: nn.Module, leave: Callable[[Any], None], *, everywhere: bool) -> None:
        """Look at the arguments of the outermost calls until :meth:`stop`.

        ``leave(output)`` is called when an outermost call is over. ``everywhere``: watch all containers of measured
        layers; else those alone that were outermost before, whose arguments say whether a probe is to run again.
        """
        wanted = None if everywhere else len(self._outermost)
        if self._removers is not None and wanted == self._watched:
            return
        self.stop()
        self._watched = wanted
        measured = {id(layer.module) for layer in self._layers}
        names = [layer.name for layer in self._layers]
        removers = self._removers = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._rows is None or is_quiet() or in_backward():
                return
            self.depth += 1
            if self.depth == 1:
                self._outermost[id(module)] = module
                self._call = (module, args, kwargs)
                self._enter(module, args, kwargs, self._rows)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._rows is None or is_quiet() or in_backward():
                return
            self.depth -= 1
            if self.depth == 0:
                self._call = self._placements.sizes = None
                leave(output)

        for name, module in model.named_modules():
            inside = any(not name or other.startswith(f"{name}.") for other in names)
            wanted = everywhere or id(module) in self._outermost
            if inside and wanted and type(module).__name__ not in _WRAPPERS and id(module) not in measured:
                removers.append(module.register_forward_pre_hook(self._make_hook(before), with_kwargs=True).remove)
                removers.append(module.register_forward_hook(self._make_hook(after), always_call=True).remove)
        self.entering = everywhere

    def stop(self) -> None:
        """Take the hooks of containers out."""
        for undo in self._removers or ():
            undo()
        self._removers, self.entering = None, False

    def begin(self, rows: Rows, *, allowed: bool, searching: bool) -> None:
        """A micro-batch is open. ``allowed``: a probe may run. ``searching``: in each call, whatever is known."""
        self._rows, self._allowed, self._searching = rows, allowed, searching
        self.depth, self._call, self._shapes = 0, None, set()
        self._per_sample, self._per_row = {}, False
        self.strangers = set()
        self._placements.sizes = None

    def end(self) -> None:
        """The micro-batch is over."""
        self._rows = self._call = self._placements.sizes = None

    def refuse_pieces(self) -> None:
        """Raises RuntimeError where the rows of the micro-batch came in pieces that look like one row per sample."""
        rows = self._rows
        if rows is None or self._per_row or max(self._per_sample.values(), default=0) < 2:
            return
        raise RuntimeError(
            f"the model was called {max(self._per_sample.values())} times with {rows.num_samples} rows each in a "
            f"micro-batch of {rows.batch} rows from {rows.num_samples} samples, and never with all rows. Pieces of the "
            "batch cannot be told from a part that runs once per sample: give the model all rows at once, or open a "
            "tracker.microbatch(...) for each piece, with rows_per_sample= where a sample has rows in several"
        )

    # An outermost call

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows) -> None:
        """Before the caller's forward: find out where the layers' rows lie.

        Raises:
            ValueError: packed sequences do not lie in the model's tokens.
        """
        if rows.packing is not None:
            self._enter_packed(module, args, kwargs, rows.packing)
            return
        if rows.batch == 1 or not torch.is_grad_enabled():
            return
        found = dict(leaves((args, kwargs)))
        per_row = any(rows.batch in tensor.shape[:2] for tensor in found.values())
        self._per_row |= per_row
        self._placements.sizes = row_sizes(found, rows)
        if self._placements.sizes and not per_row:
            self._per_sample[id(module)] = self._per_sample.get(id(module), 0) + 1
        if not self._allowed:
            return
        kind = (
            id(module),
            module.training,
            (per_row, rows.num_samples == rows.batch),
            tuple((path, t.dim(), t.is_floating_point()) for path, t in found.items()),
        )
        known = self._kinds.get(kind)
        varied = {path for path, tensor in found.items() if path not in (known or ()) and _varies(tensor)}
        varied |= {path for path, listed in numbers((args, kwargs)) if len(set(listed)) > 1} - (known or set())
        shapes = (id(module), tuple((path, tuple(t.shape)) for path, t in found.items()))
        if kind in self._impossible:
            self._call = None
        if known is not None and not varied and not (self._searching and shapes not in self._shapes):
            return
        self._kinds[kind] = (known or set()) | varied
        self._shapes.add(shapes)
        training = module.training and (self._searching or _alone())
        if not self._run(Probe(module, args, kwargs, rows, training=training)):
            self._impossible.add(kind)
            self._call = None

    def _enter_packed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], packing: Packing) -> None:
        """Before the caller's forward: how many tokens there are, and where the layers see them.

        Each kind of call (of one row or several, with the same arguments) is probed once.
        """
        found: dict[str, Tensor] = {}

        def remember(path: str, tensor: Tensor) -> Tensor:
            found[path] = tensor
            return tensor

        complete = True
        try:
            copied((args, kwargs), remember)
        except Impossible as reason:
            complete, self.unprobed = False, str(reason)
        grids = [grid for _, grid in token_arguments(found)]
        if packing.grid is None and grids:
            packing.settle(next((grid for grid in grids if packing.why_not(grid) is None), grids[0]))
        several = packing.grid is not None and packing.grid[0] > 1
        key = (id(module), module.training, several, tuple((path, tensor.dim()) for path, tensor in found.items()))
        if not complete or key in self._impossible:
            self._call = None
        if not complete or not self._allowed or key in self._packed or packing.filled < 2:
            return
        assert self._rows is not None
        probe = PackedProbe(module, args, kwargs, self._rows, training=module.training and _alone())
        done = self._run(probe)
        if done or not probe.unlucky:  # else these tokens showed nothing; other ones may
            self._packed.add(key)
        if not done:
            self._call = None
            if not probe.unlucky:
                self._impossible.add(key)

    def _run(self, probe: Probe) -> bool:
        try:
            probe.run(self._placements, self._set_probe)
        except Impossible as reason:
            self.unprobed = str(reason)
            return False
        return True

    def _set_probe(self, probe: Probe | None) -> None:
        self.probe = probe

    # A layer's call inside

    @property
    def outside(self) -> bool:
        """Whether the caller itself calls the layer, not a container."""
        return self.entering and self.depth == 0

    def saw(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A layer's call in a forward that a tracker runs: this one's probe takes it."""
        return self.probe.saw(layer, args, kwargs, output) if self.probe is not None else None

    def look(self, layer: Layer, x: Tensor) -> None:
        """Inside the caller's forward: probe it for a layer's call of which no probe has shown the rows."""
        rows = self._rows
        if rows is None or rows.batch == 1 or not self._allowed or in_backward():
            return
        if self.depth == 0 and torch.is_grad_enabled():
            if self.entering:
                self._called_directly.add(layer.name)
            elif layer.name not in self._called_directly:
                self.strangers.add(layer.name)
        if self._call is None:
            return
        if rows.packing is not None and (rows.packing.grid is None or rows.packing.filled < 2):
            return
        if not self._placements.unseen(layer, x, rows):
            return
        key = (self._placements.key(layer, len(token_shape(layer, x)), rows), tuple(x.shape))
        if key in self._looked:
            return
        self._looked.add(key)
        module, args, kwargs = self._call
        kind = Probe if rows.packing is None else PackedProbe
        probe = kind(module, args, kwargs, rows, training=module.training and _alone())
        if self._run(probe) and key[0] not in {*self._placements.seen, *self._placements.unclear}:
            self._placements.unclear[key[0]] = _UNCALLED


def _alone() -> bool:
    """Whether there are no other ranks, which may meet a new kind of call at another time: some modules communicate in
    training mode.
    """
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _varies(tensor: Tensor) -> bool:
    """Whether an argument holds different values."""
    if not tensor.numel() or distributed.is_dtensor(tensor):
        return False
    return bool((tensor != tensor.reshape(-1)[0]).any())
