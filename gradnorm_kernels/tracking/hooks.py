"""Seeing x and dy of the chosen layers: hooks that only watch, or a backward of our own for linears.

Watching leaves autograd alone: a forward hook keeps the layer's input and a hook on its *output tensor* sees dy, which
holds under both kinds of gradient checkpointing (the recomputed output's hook fires, or the original one does). The
fused backward takes dW and the norms from one operator call instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .distributed import is_dtensor
from .layers import Layer
from .recorder import Recorder

CurrentRecorder = Callable[[], Recorder | None]


def _in_backward() -> bool:
    """True while autograd runs backward on this thread: a forward seen then is a recomputation by checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


def _count_call(recorder: Recorder, layer: Layer) -> None:
    if not _in_backward():
        recorder.called(layer)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function, and have it look at hooks before it uses compiled code again.

    Without that guard, layers of one class share what was compiled for the first of them, which has no hook.
    """
    import torch._dynamo.config

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def observe(layer: Layer, current: CurrentRecorder) -> Callable[[], None]:
    """Watch one layer's calls; returns what removes the hook again.

    The kept input must not change before backward: it is the tensor itself, not a copy. A write to it is refused by
    name.
    """

    def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        recorder = current()
        if recorder is None or recorder.replaying:
            return None
        _count_call(recorder, layer)
        if not (torch.is_grad_enabled() and isinstance(output, Tensor)):
            return None
        if layer.frozen and not output.requires_grad:
            output.requires_grad_()  # below the first adapter nothing else asks for this gradient
        if not output.requires_grad:
            return None
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise RuntimeError(
                f"layer {layer.name!r} was called without a tensor, so its input is not known; leave it out of layers="
            )
        replaced = None
        if layer.kind == "embedding" and x.shape[0] == 1 and (rows := recorder.leading or recorder.rows.batch) > 1:
            # Positions come as one row for all: spread the output, so that dy keeps the rows apart. Autograd sums the
            # rows of an expanded tensor exactly as it sums those of a broadcast one.
            x = x.expand(rows, *x.shape[1:])
            output = replaced = output.expand(rows, *output.shape[1:])
        recorder.leading = x.shape[0]
        version = x._version

        def output_hook(dy: Tensor) -> None:
            if x._version != version:
                raise RuntimeError(
                    f"the input of layer {layer.name!r} was modified in place after the call, so its gradient can no "
                    f"longer be measured: "
                    "make that operation out of place, or leave the layer out of layers="
                )
            if current() is recorder:
                with torch.no_grad():
                    recorder.take(layer, x, dy)

        output.register_hook(output_hook)
        return replaced

    # Not traced by torch.compile: the hook keeps tensors of this very call. A compiled model has a graph break there.
    hook = _untraced(forward_hook)
    return layer.module.register_forward_hook(hook, with_kwargs=True).remove


class _FusedLinear(torch.autograd.Function):
    """y = x W^T (+ b) whose backward takes dW from the recorder, together with the norms."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Layer,
        recorder: Recorder,
        current: CurrentRecorder,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.recorder, ctx.current = layer, recorder, current
        return torch.nn.functional.linear(x, weight.T if layer.kind == "conv1d" else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        conv = ctx.layer.kind == "conv1d"
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight.T if conv else weight)
        if ctx.needs_input_grad[2]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        wants = ctx.needs_input_grad[1]
        if ctx.current() is ctx.recorder:
            dw = ctx.recorder.take(ctx.layer, x, dy, weight_grad=wants)
        elif wants:
            dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        if dw is not None and conv:
            dw = dw.T
        return dx, dw, db, None, None, None


def fuse(layer: Layer, current: CurrentRecorder) -> Callable[[], None]:
    """Swap one linear's forward for :class:`_FusedLinear` inside a micro-batch; returns what puts it back.

    Raises:
        ValueError: the module computes something of its own, which a swapped backward would get wrong.
    """
    module = layer.module
    own = type(module).forward
    if layer.kind == "linear" and own is not nn.Linear.forward:
        raise ValueError(
            f"fused=True cannot take over layer {layer.name!r}: {type(module).__name__} has a forward of its own; use "
            f"fused=False"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"fused=True cannot take over layer {layer.name!r}: its forward is already replaced by something else; "
            f"use fused=False"
        )

    def forward(x: Tensor) -> Tensor:
        recorder = current()
        if recorder is None:
            return own(module, x)
        _count_call(recorder, layer)
        recorder.leading = x.shape[0]
        weight: Tensor = module.get_parameter("weight")
        if is_dtensor(weight):
            raise ValueError(
                f"fused=True cannot take over layer {layer.name!r}: its weight is sharded over ranks while it "
                "computes (tensor parallel); use fused=False"
            )
        bias: Tensor | None = module._parameters.get("bias")
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _FusedLinear.apply(x, weight, bias, layer, recorder, current)

    def restore() -> None:
        del module.forward

    module.forward = _untraced(forward)  # type: ignore[method-assign]
    return restore
