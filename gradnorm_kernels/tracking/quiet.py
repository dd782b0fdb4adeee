"""Keeping the tracker's own work and the caller's forward apart.

No tracker's hook may take a forward that a tracker runs itself for the caller's. And selective activation checkpointing
may not count the operations that a hook runs inside the caller's forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
_STATE = threading.local()


def is_quiet() -> bool:
    """Whether this thread is inside :func:`quiet`."""
    return bool(getattr(_STATE, "depth", 0))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, every tracker's hooks ignore the calls of this thread."""
    _STATE.depth = getattr(_STATE, "depth", 0) + 1
    try:
        yield
    finally:
        _STATE.depth -= 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, selective activation checkpointing of this thread sees no operation. Other modes stay.

    It finds the output of a saved operation by the number of operations of that kind before it. A hook verifies a layer
    in the forward and not again in the recomputation, so everything behind it would get another operation's output.
    """
    depth = torch._C._len_torch_dispatch_stack()
    if not depth or not any(isinstance(torch._C._get_dispatch_stack_at(place), _SELECTIVE) for place in range(depth)):
        yield
        return
    modes = [_pop_mode() for _ in range(depth)]
    kept = [mode for mode in reversed(modes) if not isinstance(mode, _SELECTIVE)]
    for mode in kept:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            _pop_mode()
        for mode in reversed(modes):
            _push_mode(mode)
