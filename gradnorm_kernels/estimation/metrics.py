"""The names and values of logged metrics: one schema for every log that holds task gradients.

``tasks/<task>/<field>`` is one number of one task, ``tasks/<pair>/<a>/<b>`` one number of two tasks. The training
application and the TRL integration write these keys, and whatever reads a log takes them from here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .estimator import RunningEstimate, TaskGradient

#: Fields of :class:`TaskGradient` as a log names them. ``n`` and ``n_effective`` count samples and are integers.
GRADIENT_FIELDS = {
    "sq_norm": "grad_norm_sq",
    "std_error": "grad_norm_sq_se",
    "noise_scale": "noise_scale",
    "plug_in": "plug_in",
    "n": "n",
    "n_effective": "n_effective",
    "mean_sq_norm": "mean_sq_norm",
    "pair_weight": "pair_weight",
}
PAIR_FIELDS = ("cosine", "inner_product")


def task_key(task: Hashable, field: str) -> str:
    """The key of one number of one task: ``tasks/<task>/<field>``."""
    return f"tasks/{task}/{field}"


def pair_key(field: str, a: Hashable, b: Hashable) -> str:
    """The key of one number of two tasks, field "cosine" or "inner_product": ``tasks/<field>/<a>/<b>``."""
    return f"tasks/{field}/{a}/{b}"


def gradient_metrics(task: Hashable, gradient: TaskGradient, prefix: str = "") -> dict[str, float]:
    """A task's estimate by metric key; ``prefix`` goes before the field, as in ``tasks/<task>/full_grad_norm_sq``.

    A count of informative samples that is not known has no key.
    """
    values = {field: getattr(gradient, field) for field in GRADIENT_FIELDS}
    return _keyed(task, values, prefix)


def _keyed(task: Hashable, values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    return {task_key(task, prefix + GRADIENT_FIELDS[field]): v for field, v in values.items() if v is not None}


def pooled_metrics(task: Hashable, estimate: RunningEstimate) -> dict[str, float]:
    """A task's estimate pooled over steps, by the same keys: U, its standard error, the noise scale and both counts."""
    values = {
        "sq_norm": estimate.value,
        "std_error": estimate.std_error,
        "noise_scale": estimate.noise_scale,
        "n": estimate.n,
        "n_effective": estimate.n_effective,
    }
    return _keyed(task, values)


def read_gradient(line: Mapping[str, Any], task: Hashable, prefix: str = "") -> TaskGradient | None:
    """The inverse of :func:`gradient_metrics`: None where the line has no estimate of the task; null becomes NaN."""
    values = {field: line.get(task_key(task, prefix + key)) for field, key in GRADIENT_FIELDS.items()}
    if values["sq_norm"] is None:
        return None
    n, k = values.pop("n"), values.pop("n_effective")
    numbers = {field: math.nan if value is None else float(value) for field, value in values.items()}
    return TaskGradient(**numbers, n=int(n or 0), std_error_method="none", n_effective=None if k is None else int(k))


def pool(lines: Sequence[Mapping[str, Any]], task: Hashable, prefix: str = "") -> RunningEstimate:
    """A task's estimates over log lines: numerators and denominators are summed apart, U is their ratio."""
    estimate = RunningEstimate()
    for line in lines:
        gradient = read_gradient(line, task, prefix)
        if gradient is not None:
            estimate.update(gradient)
    return estimate
