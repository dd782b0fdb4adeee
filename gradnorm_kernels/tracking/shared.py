"""Embeddings whose output all rows share: per-row gradients are read where the output is spread over the rows.

A position embedding that is looked up once, [1, L] or [L], gets one gradient for all rows. Before autograd adds the
rows up, the node that spreads the output over them (a broadcasting sum, ``expand`` or ``repeat``) receives the gradient
of every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Placement, Unreadable
from .layers import Layer
from .rows import Rows

_SPREADING = ("AddBackward", "ExpandBackward", "RepeatBackward")
_VIEWS = ("SqueezeBackward", "UnsqueezeBackward", "SelectBackward", "ViewBackward", "AliasBackward", "ToCopyBackward")


@dataclass
class SharedOutput:
    """An embedding's call that no row owns: its ids, its output and why it was not placed."""

    layer: Layer
    ids: Tensor
    output: Tensor
    factor: float
    reason: Unreadable


def _nodes(results: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs of some tensors."""
    waiting = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)


def watch_rows(
    shared: SharedOutput,
    results: Iterable[Tensor],
    rows: Rows,
    take: Callable[[Call, Tensor], None],
    refuse: Callable[[], None],
) -> bool:
    """Let ``take(call, dy)`` see the gradients of all rows; False where some use of the output cannot be read.

    ``results``: tensors that the output led to. ``refuse()`` is called in backward where a gradient has no rows.
    """
    nodes = list(_nodes(results))
    uses = list(_uses(shared.output.grad_fn, tuple(shared.output.shape), nodes))
    if not uses or not all(node.name().startswith(_SPREADING) for node, _, _ in uses):
        return False
    for node, index, shape in uses:
        second = node.name().startswith("AddBackward") and index == 1
        node.register_prehook(_hook(shared, shape, rows, float(node._saved_alpha) if second else 1.0, take, refuse))
    return True


def _uses(target: Any, shape: tuple[int, ...], nodes: list[Any]) -> Iterator[tuple[Any, int, tuple[int, ...]]]:
    """(node, index of its input, that input's shape) wherever an output is used, through views of all of it."""
    for node in nodes:
        for index, (to, _) in enumerate(node.next_functions):
            if to is not target:
                continue
            view = tuple(node._input_metadata[0].shape) if node.name().startswith(_VIEWS) else ()
            if view and math.prod(view) == math.prod(shape) and view[-1] == shape[-1]:
                yield from _uses(node, view, nodes)
            else:
                yield node, index, shape


def _hook(
    shared: SharedOutput,
    shape: tuple[int, ...],
    rows: Rows,
    alpha: float,
    take: Callable[[Call, Tensor], None],
    refuse: Callable[[], None],
) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(grads: tuple[Tensor | None, ...]) -> None:
        dy = grads[0]
        if dy is None:
            return
        dim = _row_dim(shape, tuple(dy.shape), rows.batch)
        if dim is None:
            refuse()
            return
        layer = shared.layer
        ids = shared.ids.reshape(1, -1).expand(rows.batch, -1)
        call = Call(layer, ids, (), {}, Placement(0), rows.row_sample, rows.scale, shared.factor * alpha)
        call.padding_idx = getattr(layer.module, "padding_idx", None)
        with torch.no_grad():
            take(call, dy.movedim(dim, 0).reshape(rows.batch, -1, dy.shape[-1]))

    return hook


def _row_dim(shape: tuple[int, ...], spread: tuple[int, ...], batch: int) -> int | None:
    """The one dimension in which a shape was spread, if its size is the number of rows."""
    if len(spread) < len(shape):
        return None
    padded = (1,) * (len(spread) - len(shape)) + shape
    wider = [dim for dim, (before, after) in enumerate(zip(padded, spread, strict=True)) if before != after]
    return wider[0] if len(wider) == 1 and padded[wider[0]] == 1 and spread[wider[0]] == batch else None
