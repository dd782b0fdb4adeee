"""The backends: which exist, which can run here, and the plan that dispatch hands to one.

A backend is a module of this package with ``fused_grad_norm``, ``grad_gram`` and ``grad_dot`` (the same arguments in
each, see :mod:`gradnorm_kernels.backends.torch`). Adding one is one entry in ``_BACKENDS`` here and, if it has
measured costs, one file in ``configs/``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

_ABSENT = "not part of this version of gradnorm_kernels; use backend='torch', or backend='auto' to have it chosen"
# Name -> why it cannot run, or None. In the order in which "auto" prefers them.
_BACKENDS: dict[str, str | None] = {"cuda": _ABSENT, "triton": _ABSENT, "torch": None}

NAMES = ("torch", "triton", "cuda")


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


def status() -> dict[str, str | None]:
    """Each backend's name, with None if it can run here or else the reason why it cannot."""
    return {name: _BACKENDS[name] for name in NAMES}


def preferred() -> str:
    """The backend that "auto" takes: the first that can run."""
    return next(name for name, reason in _BACKENDS.items() if reason is None)


def load(name: str) -> ModuleType:
    """The backend's module. Raises RuntimeError with the reason when it cannot run here."""
    reason = _BACKENDS[name]
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    return importlib.import_module(f"{__name__}.{name}")
