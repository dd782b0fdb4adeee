"""The backends: which exist, why one cannot serve a call, and the plan that dispatch hands to one.

A backend is a module of this package. It has ``fused_grad_norm``, ``grad_gram`` and ``grad_dot`` (the same arguments in
each, see :mod:`gradnorm_kernels.backends.torch`) and says for itself where it can run:

- ``missing() -> str | None``: why it cannot run in this process at all, None if it can;
- ``unsupported(device_type, dtype) -> str | None``: why it cannot take tensors of that kind, given that it can run.

Modules are imported when they are first asked about, so that a missing compiler or GPU costs nothing where it is not
needed; one whose import fails gives that as its reason. Adding a backend is its name here, and one more block in the
files of ``configs/`` if it has costs of its own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

NAMES = ("torch", "cpu", "triton", "cuda")
# What a float64 call is told by the backends that accumulate in float32.
NO_FLOAT64 = "takes float32, bfloat16 and float16, not float64: use backend='torch', or convert: x.float(), dy.float()"


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    ``gram_tokens``: samples of at most so many tokens get their norm from the Gram, longer ones from segmented wgrad.
    ``sums``: "wgrad" takes the groups' sums from weight-gradient slabs, "gram" everything from pairs of tokens.
    ``slab``: the most elements of a weight-gradient slab. ``tile``: the most tokens at a side of a Gram tile.
    """

    backend: str
    gram_tokens: int
    sums: str
    slab: int
    tile: int


@cache
def _imported(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # a broken installation of Triton or of a driver may raise anything
        return f"cannot be imported ({type(error).__name__}: {error})"
    # Python imports a folder that an upgrade left behind as an empty package.
    return module if module.__file__ else "its files are missing: install gradnorm_kernels again"


@cache
def missing(name: str) -> str | None:
    """Why the backend cannot run in this process at all; None if it can. Asked once: devices do not come and go."""
    module = _imported(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.missing()
    return reason


def unable(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the backend cannot take tensors of this dtype on this kind of device here; None if it can."""
    reason = missing(name)
    if reason is None:
        module = _imported(name)
        assert isinstance(module, ModuleType)
        reason = module.unsupported(device_type, dtype)
    return reason


def status() -> dict[str, str | None]:
    """Each backend's name, with None if it can run on this machine or else the reason why it cannot."""
    return {name: missing(name) for name in NAMES}


def load(name: str) -> ModuleType:
    """The backend's module. Raises RuntimeError with the reason when it cannot run here."""
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    module = _imported(name)
    assert isinstance(module, ModuleType)
    return module
