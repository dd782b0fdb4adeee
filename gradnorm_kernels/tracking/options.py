"""The options that a tracker is given, checked before anything is changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from .accumulate import ACCUMULATE, ERRORS, StepPlan
from .skipped import some

UNVERIFIED = (None, "raise", "skip")
VERIFY = ("once", "always")


def check_options(
    *,
    fused: Any,
    frozen: Any,
    accumulate: Any,
    errors: Any,
    unverified: Any,
    verify: Any,
    sketch_width: Any,
    memory_budget: Any,
    plan: Any,
) -> None:
    """Refuse a value that an option does not allow.

    Raises:
        ValueError: names the option and what it allows.
        TypeError: fused or frozen is not a bool, or plan is not a StepPlan.
    """
    for name, flag in (("fused", fused), ("frozen", frozen)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    for name, value, allowed in (
        ("accumulate", accumulate, ACCUMULATE),
        ("errors", errors, ERRORS),
        ("unverified", unverified, UNVERIFIED),
        ("verify", verify, VERIFY),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, number, low in (("sketch_width", sketch_width, 2), ("memory_budget", memory_budget, 0)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < low):
            raise ValueError(f"{name} must be an int of at least {low}, got {number!r}")
    if plan is not None and not isinstance(plan, StepPlan):
        raise TypeError(
            f"plan must be a gradnorm_kernels.StepPlan or None, got {type(plan).__name__}: "
            "StepPlan(samples=..., together=..., whole=..., tasks=...) says what a step holds"
        )
    if accumulate == "sketch" and errors != "samples":
        raise ValueError(
            f"errors={errors!r} is for accumulate='pairs', 'exact' or 'auto', got 'sketch', whose inner products "
            "of all samples cost nothing more: leave errors at 'samples'"
        )


def check_patterns(batch_dim: Any, layers: Sequence[str]) -> None:
    """Refuse a key of ``batch_dim`` that is neither the name of a measured layer nor a pattern that one fits.

    Raises:
        ValueError: names the key and some of the layers.
    """
    for pattern in batch_dim if isinstance(batch_dim, Mapping) else ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"batch_dim names {pattern!r}, which no measured layer matches; their names are for example "
                f"{some(layers)}"
            )
