"""Whether a layer computes what its kind says: its output, recomputed by the formula whose gradient is measured.

``linear``: ``x W^T + b``. ``conv1d``: ``x W + b``. ``embedding``: the rows of W at the ids. ``vector``: the module's
own forward, run for each row alone. A constant factor in front of the formula (an embedding scaled by the root of its
width) is found and folded into the output's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tolerances import relative
from . import distributed
from .calls import Call
from .layers import Layer
from .parameter_gram import RowReplay
from .quiet import quiet


class Mismatch(ValueError):
    """A layer's output is not what the formula of its kind gives."""


@dataclass(frozen=True)
class Formula:
    """How a layer's output follows from its formula.

    ``factor``: output = factor times the formula. ``output``: which element of a tuple it is; None: the output itself.
    ``ids_from_graph``: the embedding looks up ids that it computes itself; they are read from autograd's node.
    """

    factor: float = 1.0
    output: int | None = None
    ids_from_graph: bool = False

    def pick(self, output: Any) -> Any:
        """The tensor of a call's output that the formula gives."""
        return output if self.output is None else output[self.output]


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What a formula was verified for: a change of any of it asks for another verification."""
    return (
        type(module),
        type(module).forward,
        module.__dict__.get("forward"),
        tuple(module._forward_hooks),
        tuple(module._forward_pre_hooks),
        "parametrizations" in module._modules,
        getattr(getattr(module, "config", None), "_experts_implementation", None),
    )


def fixed(module: nn.Module, own_hook: int) -> bool:
    """Whether nothing can change what the module computes without a change of its :func:`signature`.

    A forward of its own, or a hook that runs before the tracker's (whose id is ``own_hook``), may depend on anything.
    """
    kind = type(module)
    plain = kind.forward in (nn.Linear.forward, nn.Embedding.forward) or kind.__module__ == "transformers.pytorch_utils"
    first = next(iter(module._forward_hooks), own_hook) == own_hook
    return plain and first and "forward" not in module.__dict__ and "parametrizations" not in module._modules


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A call's input: its first argument that is a tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def graph_ids(output: Any) -> Tensor | None:
    """The ids that an embedding looked up, from autograd's node of its output (or of a product with it)."""
    node = getattr(output, "grad_fn", None)
    if node is not None and node.name().startswith("MulBackward"):
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    ids = getattr(node, "_saved_indices", None) if node is not None and "EmbeddingBackward" in node.name() else None
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """``module.weight``, where a parametrization computes it, without letting it move its own state."""
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is None:
        value = getattr(module, name, None)
    else:
        training = [inner for inner in parametrizations.modules() if inner.training]
        for inner in training:
            inner.training = False
        try:
            value = getattr(module, name, None)
        finally:
            for inner in training:
                inner.training = True
    return value if isinstance(value, Tensor) else None


@contextmanager
def _recomputing() -> Iterator[None]:
    """No graph, no hook of a tracker, and no copy of a weight left in autocast's cache without its gradient."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), quiet():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _evaluate(layer: Layer, x: Tensor) -> Tensor:
    """The formula of a linear, Conv1D or embedding."""
    module = layer.module
    weight, bias = _tensor(module, "weight"), _tensor(module, "bias")
    if weight is None:
        raise Mismatch("it has no weight")
    if isinstance(module, nn.Embedding):
        return nn.functional.embedding(x, weight, module.padding_idx)
    if layer.kind == "router":
        x = x.reshape(-1, x.shape[-1])
    return nn.functional.linear(x, weight.T if layer.kind == "conv1d" else weight, bias)


def _compare(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(c, the relative distance of ``found`` from c times ``wanted``) for the best constant c."""
    dtype = torch.promote_types(torch.promote_types(found.dtype, wanted.dtype), torch.float32)
    a, b = found.detach().to(dtype), wanted.detach().to(dtype)
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = torch.where(finite, a, 0.0).double(), torch.where(finite, b, 0.0).double()
    square, size = float(b.square().sum()), float(a.norm())
    if square == 0.0 or size == 0.0:
        return 1.0, float((a - b).norm())
    plain = float((a - b).norm()) / size
    if plain <= relative(found.dtype, wanted.dtype):
        return 1.0, plain
    c = float((a * b).sum()) / square
    return c, float((a - c * b).norm()) / size


def _are_ids(layer: Layer, x: Tensor) -> bool:
    """Whether x can be looked up in an embedding; a GPU would not survive the attempt with other values."""
    if x.dtype not in (torch.int64, torch.int32) or not x.numel():
        return False
    return 0 <= int(x.min()) and int(x.max()) < layer.module.get_parameter("weight").shape[0]


def _matching(layer: Layer, x: Tensor, output: Any) -> Formula | None:
    """The formula of x that the output, or an element of it, agrees with."""
    wanted = _evaluate(layer, x)
    for index, value in enumerate(output) if isinstance(output, (tuple, list)) else [(None, output)]:
        fits = isinstance(value, Tensor) and (value.shape == wanted.shape or _same_logits(layer, value, wanted))
        if fits and value.is_floating_point():
            value = value.reshape(wanted.shape)
            factor, distance = _compare(value, wanted)
            if distance <= relative(value.dtype, wanted.dtype) and factor != 0.0:
                return Formula(factor, index)
    return None


def _same_logits(layer: Layer, value: Tensor, wanted: Tensor) -> bool:
    """Whether a router's output can be its logits, [T, E] or with more dimensions of tokens."""
    return layer.kind == "router" and value.numel() == wanted.numel() and value.shape[-1:] == wanted.shape[-1:]


def verify(layer: Layer, x: Tensor, output: Any) -> Formula:
    """The formula of a linear, Conv1D or embedding, held against one call of it.

    Raises:
        Mismatch: the module computes something else.
    """
    weight = layer.module._parameters.get("weight")
    if weight is not None and distributed.is_dtensor(weight):
        return Formula()  # sharded: not compared
    try:
        with _recomputing():
            found = _matching(layer, x, output) if layer.kind != "embedding" or _are_ids(layer, x) else None
            ids = graph_ids(output) if found is None and layer.kind == "embedding" else None
            if ids is not None and (looked_up := _matching(layer, ids, output)) is not None:
                found = Formula(looked_up.factor, looked_up.output, ids_from_graph=True)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Mismatch(f"its output cannot be recomputed from its input ({error})") from error
    if found is None:
        raise Mismatch(f"its output is not {_FORMULAS[layer.kind]}")
    return found


def still(layer: Layer, formula: Formula, x: Tensor, output: Any) -> bool:
    """Whether a few tokens of a later call are what the formula gives. On a GPU this waits."""
    weight, y = layer.module._parameters.get("weight"), formula.pick(output)
    if not isinstance(y, Tensor) or (weight is not None and distributed.is_dtensor(weight)):
        return isinstance(y, Tensor)
    try:
        with _recomputing():
            x = x.reshape(-1) if layer.kind == "embedding" else x.reshape(-1, x.shape[-1])
            y = y.reshape(len(x), -1)
            some = torch.linspace(0, len(x) - 1, min(len(x), _TOKENS), device="cpu").long().to(x.device)
            wanted = _evaluate(layer, x[some])
            wide = torch.promote_types(torch.promote_types(y.dtype, wanted.dtype), torch.float32)
            found, wanted = y[some].to(wide), wanted.to(wide) * formula.factor
            finite = torch.isfinite(found) & torch.isfinite(wanted)
            distance = torch.where(finite, found - wanted, 0.0).norm()
            return bool(distance <= relative(y.dtype, x.dtype) * torch.where(finite, found, 0.0).norm())
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False


_TOKENS = 16  # of a call that :func:`still` looks at
_FORMULAS = {
    "linear": "x W^T + b of its first argument, nor a constant times that",
    "conv1d": "x W + b of its first argument, nor a constant times that",
    "router": "x W^T + b of its first argument, nor a constant times that, and no element of it is",
    "embedding": "the rows of its weight at its ids, nor a constant times them",
}


def verify_rows(call: Call, output: Any) -> Formula:
    """A norm-like module's output, held against its forward run for each row alone.

    Raises:
        Mismatch: the output is not a tensor, or the rows depend on each other.
    """
    if not isinstance(output, Tensor):
        raise Mismatch(f"its output is a {type(output).__name__}, not a tensor")
    if distributed.is_dtensor(call.x) or any(map(distributed.is_dtensor, call.layer.module.parameters())):
        return Formula()  # sharded: not compared
    try:
        with _recomputing():
            wide = torch.promote_types(output.dtype, torch.float32)
            rows = RowReplay(call, wide).outputs()
            whole = call.split(output.detach())
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Mismatch(f"its forward does not run row by row ({error})") from error
    dtypes = [output.dtype, call.x.dtype] if call.x.is_floating_point() else [output.dtype]
    dtypes += [p.dtype for p in call.layer.module.parameters(recurse=False)]
    if rows.shape != whole.shape:
        raise Mismatch(f"its forward does not run row by row (a row gives {tuple(rows.shape[1:])})")
    distance = float((rows - whole.to(wide)).norm()), float(whole.to(wide).norm())
    if not distance[0] <= relative(*dtypes) * distance[1] and torch.isfinite(whole).all():
        raise Mismatch("its forward does not run row by row (rows alone give another output than together)")
    return Formula()
