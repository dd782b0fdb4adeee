"""The registry of backends: which exist, which functions they have, and why one cannot serve a call.

:mod:`.base` says what a backend is. Adding one is its package here and its name in ``NAMES``; the files of
``tuning/configs/`` have a block for it if it has costs of its own.

Packages are imported when they are first asked about, so that a missing compiler or GPU costs nothing where it is not
needed; one whose import fails gives that as its reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .base import OPERATORS, Backend, Plan

__all__ = [
    "NAMES",
    "OPERATORS",
    "Backend",
    "Plan",
    "declared",
    "forget",
    "implements",
    "operator",
    "status",
    "supports",
    "unavailable_reason",
]

NAMES = ("torch", "cpu", "triton", "cuda")


@cache
def _imported(name: str) -> ModuleType | str:
    """The backend's package, or why it cannot be imported."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # a broken installation of Triton or of a driver may raise anything
        return f"cannot be imported ({type(error).__name__}: {error})"
    # Python imports a folder that an upgrade left behind as an empty package.
    return module if module.__file__ else "its files are missing: install gradnorm_kernels again"


def declared(name: str) -> Backend | None:
    """What the backend declares; None where its package cannot be imported."""
    module = _imported(name)
    return None if isinstance(module, str) else module.BACKEND


@cache
def _process_reason(name: str) -> str | None:
    """Why the backend cannot run in this process at all. Asked once: devices do not come and go."""
    module = _imported(name)
    return module if isinstance(module, str) else module.BACKEND.unavailable_reason()


def implements(name: str, op: str) -> bool:
    """Whether the backend's package has a function for the operator."""
    return callable(getattr(_imported(name), op, None))


def unavailable_reason(
    name: str, op: str | None = None, device_type: str | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why a backend cannot serve a call; None if it can.

    Args:
        name: the backend's.
        op: the operator's name. Default: any.
        device_type, dtype: of the tensors, both or neither. Default: any; then only what holds for the whole process
            counts.
    """
    reason = _process_reason(name)
    if reason is None and op is not None and not implements(name, op):
        others = ", ".join(repr(other) for other in NAMES if implements(other, op))
        reason = f"it has no {op}: use backend='auto', or one that has it: {others}"
    if reason is None and device_type is not None and dtype is not None:
        backend = declared(name)
        assert backend is not None
        reason = backend.unsupported_reason(device_type, dtype)
    return reason


def supports(name: str, op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a backend can serve a call; :func:`unavailable_reason` says why not."""
    return unavailable_reason(name, op, device_type, dtype) is None


def status() -> dict[str, str | None]:
    """Each backend's name, with None if it can run on this machine or else the reason why it cannot."""
    return {name: unavailable_reason(name) for name in NAMES}


@cache
def operator(name: str, op: str) -> Callable[..., Any]:
    """The backend's function for an operator. Raises RuntimeError with the reason where there is none."""
    reason = unavailable_reason(name, op)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    function: Callable[..., Any] = getattr(_imported(name), op)
    return function


def forget() -> None:
    """Ask every backend afresh: for tests that change what there is."""
    for cached in (_imported, _process_reason, operator):
        cached.cache_clear()
