"""Seeing x and dy of the chosen layers: hooks that only watch, or a backward of our own for linears.

Watching leaves autograd and the layer's output alone: a forward hook keeps the layer's input and a hook on its *output
tensor* sees dy. That holds under both kinds of gradient checkpointing (the hook of the recomputed output fires, or that
of the original). The fused backward takes dW and the norms from one operator call instead. Its forward is the module's
own: only the node of its output in the graph is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd.function import once_differentiable

from .calls import Ambiguous, Call, Placements, Unreadable, whose_rows
from .distributed import is_dtensor
from .entries import Entries, in_backward
from .experts import ExpertsTrace, Product, experts_input
from .formula import Formula, Mismatch, first_tensor, fixed, graph_ids, signature, still, verify, verify_rows
from .layers import Layer, Parameters
from .packing import TokenPlacement
from .quiet import is_quiet, uncounted
from .recorder import Recorder
from .replay import tensors_in
from .shared import SharedOutput, watch_rows
from .skipped import Skipped, some


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function, and have it look at hooks before it uses compiled code again.

    Without that guard, layers of one class share what was compiled for the first of them, which has no hook.
    """
    import torch._dynamo.config

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What a hook is in a copy of the model: nothing."""


def _ignoring() -> Callable[..., None]:
    return _ignore


class _Hook:
    """A hook of one module. In copies of the module, pickled ones too, it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # Not traced by torch.compile: the hook keeps tensors of this call. A compiled model has a graph break there.
        self._function = _untraced(uncounted()(function))

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _ignore

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _ignoring, ()


class _CompiledHook(_Hook):
    """A hook that is told first whether torch.compile compiles the code that calls it, and so the module's forward."""

    def __call__(self, *args: Any) -> Any:
        return self._function(torch.compiler.is_compiling() or get_eval_frame_callback() is not None, *args)


class Watcher:
    """The hooks of one tracker and what they know: which formula a layer follows, and where its rows lie."""

    def __init__(
        self, layers: list[Layer], parameters: Parameters, skipped: Skipped, placements: Placements, *, lenient: bool
    ) -> None:
        """``lenient``: leave out what cannot be verified instead of refusing it."""
        self.recorder: Recorder | None = None
        self.layers, self.placements = layers, placements
        self._parameters, self._skipped, self._lenient = parameters, skipped, lenient
        self._formulas: dict[str, Formula] = {}
        self._signatures: dict[str, tuple[Any, ...]] = {}
        self._hook_ids: dict[str, int] = {}
        self._layouts: dict[str, set[tuple[Any, ...]]] = {}  # of calls that were seen to run row by row
        self._traces: dict[str, ExpertsTrace] = {}  # of experts whose forward runs
        self.entries = Entries(placements, layers, _Hook)
        self._shared: list[SharedOutput] = []
        self.shares_outputs = False  # some embedding's rows are read where its output is spread over them

    # Installing and removing

    def install(self, layer: Layer, fused: bool) -> Callable[[], None]:
        """Watch one layer's calls; returns what removes the hook.

        Raises:
            ValueError: ``fused``, and the module computes something of its own.
        """
        if fused:
            _refuse_own_forward(layer)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._called(layer, fused, args, kwargs, output) if module is layer.module else None

        if layer.kind == "experts":
            return self._install_experts(layer)
        handle = layer.module.register_forward_hook(_Hook(hook), with_kwargs=True)
        self._hook_ids[layer.name] = handle.id
        return handle.remove

    def _install_experts(self, layer: Layer) -> Callable[[], None]:
        """Follow the forward of a module of experts from its beginning to its end, also where it raises."""

        def before(compiled: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is layer.module:
                self._begin_experts(layer, args, kwargs, compiled)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._end_experts(layer, args, kwargs, output) if module is layer.module else None

        removers = [
            layer.module.register_forward_pre_hook(_CompiledHook(before), with_kwargs=True).remove,
            layer.module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True).remove,
        ]

        def remove() -> None:
            for undo in removers:
                undo()

        return remove

    def watch_entries(self, model: nn.Module, *, everywhere: bool) -> None:
        """Look at the arguments of the outermost calls, as :meth:`.Entries.watch` does."""
        self.entries.watch(model, self._left, everywhere=everywhere)

    def _left(self, output: Any) -> None:
        if self._shared:
            self._read_shared(output)

    def begin(self, recorder: Recorder, *, allowed: bool, searching: bool) -> None:
        """A micro-batch is open. ``allowed``, ``searching``: as :meth:`.Entries.begin` takes them."""
        self.recorder, self._shared = recorder, []
        self.entries.begin(recorder.rows, allowed=allowed, searching=searching)

    def end(self) -> None:
        """The micro-batch is over, whatever ended it."""
        self.recorder = None
        self.entries.end()
        for name in reversed(list(self._traces)):
            self._abandon(name)

    def changed(self) -> list[Layer]:
        """Layers whose class, forward, hooks or parametrizations are others than when their formula was verified."""
        found = [
            layer
            for layer in self.layers
            if layer.name in self._formulas and self._signatures[layer.name] != signature(layer.module)
        ]
        for layer in found:
            del self._formulas[layer.name]
        return found

    def check_parameters(self) -> set[str]:
        """Parameters that were replaced or thawed since the last micro-batch, to be compared with autograd's again.

        Raises:
            RuntimeError: one can no longer be measured, and nobody asked to leave it out.
        """
        new, wrong = self._parameters.news()
        wrong = {name: reason for name, reason in wrong.items() if name not in self._skipped}
        if wrong and not self._lenient:
            name, reason = next(iter(wrong.items()))
            raise RuntimeError(
                f'{name!r} cannot be measured: {reason}, or pass unverified="skip" to leave it out ({len(wrong)} '
                f"such parameters: {some(wrong)})"
            )
        for name, reason in wrong.items():
            self._skipped.add([name], reason)
        return new

    # A layer's call

    def _called(self, layer: Layer, fused: bool, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_quiet():
            return self.entries.saw(layer, args, kwargs, output)
        recorder = self.recorder
        if recorder is None:
            return None
        x = first_tensor(args, kwargs)
        if not in_backward():
            recorder.called(layer)
            if x is not None and not self.left_out(layer):
                self.entries.look(layer, x)
        if not torch.is_grad_enabled() or self.left_out(layer):
            return None
        if layer.frozen and isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_()  # below the first adapter nothing else asks for this gradient
        if x is None:
            self._refuse(layer, "it was called without a tensor, so its input is not known")
            return None
        try:
            call, y = self._call(recorder, layer, x, args, kwargs, output)
        except Mismatch as reason:
            self._refuse(layer, str(reason), reason)
            return None
        except Unreadable as reason:
            self._refuse_unread(layer, x, output, reason)
            return None
        if call is None:
            return None
        if fused:
            return self._fuse(recorder, call, y)
        self._watch(recorder, call, y)
        return None

    def _call(
        self,
        recorder: Recorder,
        layer: Layer,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> tuple[Call | None, Tensor]:
        """The call as it is measured, and the tensor whose gradient is its dy; None where no gradient is wanted."""
        formula = self._formulas.get(layer.name)
        if layer.kind != "vector" and (formula is None or self._may_differ(layer, formula, x, output)):
            formula = self._learn(layer, verify(layer, x, output))
        y = output if formula is None else formula.pick(output)
        if not isinstance(y, Tensor):
            raise Mismatch(f"its output is a {type(y).__name__}, not a tensor")
        if not y.requires_grad:
            return None, y
        if formula is not None and formula.ids_from_graph:
            ids = graph_ids(y)
            if ids is None:
                raise Mismatch("the ids that it looks up are not to be found in autograd's graph")
            x = ids
        placement = self.placements.of(layer, x, recorder.rows, self.entries.outside)
        row_sample, scale = whose_rows(layer, placement, recorder.rows)
        whole = layer.kind == "vector"
        call = Call(layer, x, args if whole else (), kwargs if whole else {}, placement, row_sample, scale)
        call.packing = recorder.rows.packing if isinstance(placement, TokenPlacement) else None
        if whole and (formula is None or call.layout not in self._layouts.get(layer.name, ())):
            formula = self._learn(layer, verify_rows(call, output))
            self._layouts.setdefault(layer.name, set()).add(call.layout)
        assert formula is not None
        call.factor = formula.factor
        call.padding_idx = getattr(layer.module, "padding_idx", None) if layer.kind == "embedding" else None
        return call, y

    def _may_differ(self, layer: Layer, formula: Formula, x: Tensor, output: Any) -> bool:
        """Whether a call does not follow the formula of an earlier one."""
        if fixed(layer.module, self._hook_ids[layer.name]):
            return False
        ids = graph_ids(formula.pick(output)) if formula.ids_from_graph else x
        return ids is None or not still(layer, formula, ids, output)

    # A call of experts

    def _begin_experts(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> None:
        if is_quiet() or self.recorder is None:
            return
        x = first_tensor(args, kwargs)
        if x is None or not torch.is_grad_enabled() or self.left_out(layer):
            return
        self._abandon(layer.name)
        trace = self._traces[layer.name] = ExpertsTrace(layer, x, verify=layer.name not in self._formulas)
        if compiled:
            trace.unreadable = "torch.compile compiles its forward, which cannot be followed"
        else:
            trace.__enter__()

    def _abandon(self, name: str) -> None:
        """Stop following a call of experts that ended with something other than an ``Exception``.

        Hooks with ``always_call`` run for exceptions alone: not for a KeyboardInterrupt or a SystemExit.
        """
        trace = self._traces.pop(name, None)
        if trace is not None:
            trace.leave()

    def _end_experts(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        trace = self._traces.pop(layer.name, None)
        if trace is not None:
            trace.leave()
        if output is None:  # its forward raised
            return None
        if is_quiet():
            return self.entries.saw(layer, args, kwargs, output)
        recorder = self.recorder
        if recorder is None:
            return None
        if not in_backward():
            recorder.called(layer)
        x = experts_input(layer, args, kwargs)
        if trace is None or x is None:
            return None
        self.entries.look(layer, x)
        try:
            trace.finish()
            placement = self.placements.of(layer, x, recorder.rows, self.entries.outside)
        except Mismatch as reason:
            self._refuse(layer, str(reason), reason)
            return None
        except Unreadable as reason:
            self._refuse_unread(layer, x, output, reason)
            return None
        self._learn(layer, Formula())
        call = Call(layer, x.detach(), (), {}, placement, *whose_rows(layer, placement, recorder.rows))
        call.packing = recorder.rows.packing if isinstance(placement, TokenPlacement) else None
        overlapping = trace.overlapping()

        def take(product: Product, dy: Tensor) -> None:
            if self._counts(recorder, call):
                recorder.take_experts(call, product, dy, overlapping=overlapping)

        trace.take = take
        return None

    def _learn(self, layer: Layer, formula: Formula) -> Formula:
        self._formulas[layer.name], self._signatures[layer.name] = formula, signature(layer.module)
        return formula

    def _watch(self, recorder: Recorder, call: Call, y: Tensor) -> None:
        """The kept input must not change before backward: it is the tensor itself, not a copy."""
        kept = [call.x, *(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))]
        versions = [tensor._version for tensor in kept]

        def output_hook(dy: Tensor | None) -> None:
            if dy is None:
                return  # compiled code uses another copy of the output
            if not self._counts(recorder, call):
                return
            if [tensor._version for tensor in kept] != versions:
                raise RuntimeError(
                    f"the input of layer {call.layer.name!r} was modified in place after the call, so its gradient "
                    "can no longer be measured: make that operation out of place, or leave the layer out of layers="
                )
            with torch.no_grad():
                recorder.take(call, dy)

        y.register_hook(output_hook)

    def _counts(self, recorder: Recorder, call: Call) -> bool:
        """In backward: whether a gradient that arrived at a call of the recorder's micro-batch is a part of it."""
        name = call.layer.name
        if not call.in_this_pass:
            if torch.is_grad_enabled():
                recorder.differentiated.add(name)
            return False
        if self.recorder is not recorder:
            if self.recorder is not None:
                self._refuse(
                    call.layer,
                    "a gradient came to a call of it in an earlier micro-batch (a state that is carried over with its "
                    "graph: detach it)",
                )
            return False
        if name in recorder.differentiated:
            self._refuse(call.layer, "its gradient has second derivatives (torch.autograd.grad with create_graph=True)")
        return True

    def _fuse(self, recorder: Recorder, call: Call, y: Tensor) -> Tensor | None:
        """The same output under a node whose backward takes dW from the recorder."""
        layer = call.layer
        _refuse_computed_weight(layer)  # it may be since the tracker was made
        weight = layer.module.get_parameter("weight")
        if is_dtensor(weight):
            raise ValueError(
                f"fused=True cannot take over layer {layer.name!r}: its weight is sharded over ranks while it "
                "computes (tensor parallel); use fused=False"
            )
        bias = layer.module._parameters.get("bias")
        if call.factor != 1.0:
            raise ValueError(
                f"fused=True cannot take over layer {layer.name!r}: its output is {call.factor:.6g} times x W^T; use "
                "fused=False"
            )
        out: Tensor = _FusedLinear.apply(call.x, weight, bias, y.detach(), call, recorder, self)
        return out

    # What is refused or left out

    def names_of(self, layer: Layer) -> list[str]:
        """The measured parameters of a layer."""
        own = layer.module._parameters
        leaves = tuple(own) if layer.kind in ("vector", "experts") else ("weight", "bias")
        return [
            self._parameters.name(layer, leaf)
            for leaf in leaves
            if own.get(leaf) is not None and (own[leaf].requires_grad or (layer.frozen and leaf == "weight"))  # type: ignore[union-attr]
        ]

    def left_out(self, layer: Layer) -> bool:
        """Whether all parameters of a layer are skipped."""
        if not self._skipped.reasons:
            return False
        names = self.names_of(layer)
        return all(name in self._skipped for name in names)

    def _refuse(self, layer: Layer, reason: str, cause: Exception | None = None) -> None:
        """Leave a layer out, or raise where the caller named it."""
        if self._lenient:
            self._skipped.add(self.names_of(layer), f"{type(layer.module).__name__}: {reason}")
            return
        raise RuntimeError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) cannot be measured: {reason}; leave it out of "
            'layers=, or pass unverified="skip" to leave it out wherever it occurs'
        ) from cause

    def _read_shared(self, output: Any) -> None:
        """The outermost call is over: read the rows of outputs that all rows share, where they are spread."""
        recorder, found = self.recorder, self._shared
        self._shared = []
        assert recorder is not None

        def take(call: Call, dy: Tensor) -> None:
            if self.recorder is recorder:
                recorder.take(call, dy)

        results = list(tensors_in(output))
        for shared in found:
            refuse = partial(self._refuse_gradient, shared.layer, shared.reason)
            if watch_rows(shared, results, recorder.rows, take, refuse):
                self.shares_outputs = True
            elif output is not None:  # else the call ended with an exception
                self._refuse_dy(shared.layer, shared.output, shared.reason)

    def _refuse_unread(self, layer: Layer, x: Tensor, output: Any, reason: Unreadable) -> None:
        """A call whose rows are unknown. It matters only if a gradient comes through it, which other calls of the same
        layer may not need: what a layer computes from a table, detached, is none of the micro-batch's rows.
        """
        formula = self._formulas.get(layer.name)
        padded = self.recorder is not None and self.recorder.rows.packing is None
        padded = padded and not isinstance(reason, Ambiguous)
        shareable = layer.kind == "embedding" and padded and self.entries.depth > 0
        if shareable and isinstance(output, Tensor) and formula is not None:
            ids = graph_ids(output) if formula.ids_from_graph else x
            if ids is not None and not in_backward():
                self._shared.append(SharedOutput(layer, ids, output, formula.factor, reason))
                return
        self._refuse_dy(layer, output, reason)

    def _refuse_gradient(self, layer: Layer, reason: Unreadable) -> None:
        if not self._lenient:
            raise reason
        self._skipped.add(self.names_of(layer), str(reason))

    def _refuse_dy(self, layer: Layer, output: Any, reason: Unreadable) -> None:
        if not self._lenient and not self.placements.knows(layer):
            raise reason

        def output_hook(dy: Tensor) -> None:
            self._refuse_gradient(layer, reason)

        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(output_hook)


class _FusedLinear(torch.autograd.Function):
    """The output y = x W^T (+ b) that the module computed, with a backward that takes dW from the recorder."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        call: Call,
        recorder: Recorder,
        watcher: Watcher,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call, ctx.recorder, ctx.watcher = call, recorder, watcher
        call.x = x.new_empty(0)  # the saved one counts: it may be kept elsewhere until backward
        # Given back as it is: a view of it could not be modified in place by what follows the layer.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        conv = ctx.call.layer.kind == "conv1d"
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight.T if conv else weight).to(dy.dtype)
        if ctx.needs_input_grad[2]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        wants = ctx.needs_input_grad[1]
        if ctx.watcher._counts(ctx.recorder, ctx.call):
            ctx.call.x = x
            dw = ctx.recorder.take(ctx.call, dy, weight_grad=wants)
        elif wants:
            dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
        if dw is not None and conv:
            dw = dw.T
        return dx, dw, db, None, None, None, None


def _refuse_own_forward(layer: Layer) -> None:
    """Raises ValueError where a linear computes something that a swapped backward would get wrong."""
    module = layer.module
    _refuse_computed_weight(layer)
    if layer.kind == "linear" and type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"fused=True cannot take over layer {layer.name!r}: {type(module).__name__} has a forward of its own; use "
            "fused=False"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"fused=True cannot take over layer {layer.name!r}: its forward is already replaced by something else; "
            "use fused=False"
        )


def _refuse_computed_weight(layer: Layer) -> None:
    """Raises ValueError where a linear's weight is no parameter, so that its gradient cannot be handed to autograd."""
    if "weight" not in layer.module._parameters:
        raise ValueError(
            f"fused=True cannot take over layer {layer.name!r}: its weight is computed from other parameters (a "
            "parametrization, weight_norm or spectral_norm); use fused=False"
        )
