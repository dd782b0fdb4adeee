"""Forwards that a tracker runs itself, which no tracker's hook may take for the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
