"""Running a model's forward a second time without a trace: arguments copied, random and module state put back."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .quiet import quiet

#: Wrappers whose parameters are elsewhere while the model does not compute.
_SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, slice, range, type, nn.Module)


class Impossible(Exception):
    """The forward cannot be run a second time; the text says why."""


def refuse_sharded(model: nn.Module) -> None:
    """Raises Impossible where a forward is a collective call."""
    for module in model.modules():
        if type(module).__name__ in _SHARDING:
            raise Impossible(f"its parameters are sharded by {type(module).__name__}")
    for parameter in model.parameters():
        if distributed.is_dtensor(parameter) or hasattr(parameter, "ds_id"):
            raise Impossible("its parameters are sharded over ranks")


def copied(value: Any, leaf: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """A structure of arguments with ``leaf(path, tensor)`` in the place of its tensors.

    Objects other than containers (a cache of keys and values) are copied with their tensors, which are no leaves.

    Raises:
        Impossible: an object that cannot be copied.
    """
    if isinstance(value, Tensor):
        return leaf(path, value)
    if isinstance(value, _PLAIN) or callable(value):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(item, leaf, f"{path}.{i}") for i, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item, leaf, f"{path}.{i}") for i, item in enumerate(value))
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copied(item, leaf, f"{path}.{key}")) for key, item in value.items())
    inside = _items(value)
    if inside is not None:
        try:
            new = copy.copy(value)
            for key, item in inside.items():
                _put(new, key, copied(item, leaf, f"{path}.{key}"))
            return new
        except (TypeError, AttributeError, KeyError) as error:
            raise Impossible(f"an argument of type {type(value).__name__} cannot be copied ({error})") from error
    memo: dict[int, Any] = {}
    for tensor in tensors_in(value):
        memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # whatever another library's object raises
        raise Impossible(f"an argument of type {type(value).__name__} cannot be copied ({error})") from error


def _items(value: Any) -> dict[Any, Any] | None:
    """What a mapping or a dataclass holds; None of another object."""
    if isinstance(value, MutableMapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, MutableMapping):
        holder[key] = value
    else:
        object.__setattr__(holder, key, value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of what :func:`copied` calls leaves."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, _PLAIN) or callable(value):
        return
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}.{i}")
    else:
        for key, item in (_items(value) or {}).items():
            yield from leaves(item, f"{path}.{key}")


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Sequence[float]]]:
    """(path, list) of the lists and tuples of numbers in a structure of arguments, such as lengths."""
    if isinstance(value, (tuple, list)) and len(value) > 1 and all(type(item) in (int, float, bool) for item in value):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from numbers(item, f"{path}.{i}")
    elif not isinstance(value, (Tensor, *_PLAIN)) and not callable(value):
        for key, item in (_items(value) or {}).items():
            yield from numbers(item, f"{path}.{key}")


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor reachable from an object through containers and attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, _PLAIN):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            yield from tensors_in(item, seen)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item, seen)
    elif not callable(value):
        for item in list(getattr(value, "__dict__", {}).values()):
            yield from tensors_in(item, seen)


@contextmanager
def _random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextmanager
def module_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers, hooks and plain attributes are as they were afterwards.

    Flags are set directly: some modules override ``train()`` and do more than that there.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    # With its attributes: transformers adds hooks in a model's first forward and notes that in an attribute.
    hooks = [
        [(held, dict(held)) for name, held in own.items() if isinstance(held, dict) and "_hooks" in name]
        for own in attributes
    ]
    generators = [(g, g.get_state()) for own in attributes for g in own.values() if isinstance(g, torch.Generator)]
    buffers = [{name: (b, b.clone()) for name, b in module._buffers.items() if b is not None} for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        for held_hooks in hooks:
            for held, entries in held_hooks:
                if held.keys() != entries.keys():
                    held.clear()
                    held.update(entries)
        for module, before, held in zip(modules, attributes, buffers, strict=True):
            now = module.__dict__
            for name in [name for name in now if name not in before]:
                del now[name]
            for name, value in before.items():
                if now.get(name) is not value:
                    now[name] = value
            for name in [name for name in module._buffers if name not in held and module._buffers[name] is not None]:
                module._buffers.pop(name)
            for name, (buffer, value) in held.items():
                module._buffers[name] = buffer
                if not torch.equal(buffer, value) and not (buffer != buffer).any():
                    buffer.copy_(value)


@contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of the model leave neither gradients nor state behind, and no tracker takes them for real."""
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_random_state())
        stack.enter_context(module_state(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(quiet())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # A weight cast without a gradient must not stay in autocast's cache for the real forward.
        stack.callback(torch.set_autocast_cache_enabled, cached)
        torch.set_autocast_cache_enabled(False)
        yield
