"""Which few layers stand best for the whole model? U of several choices of layers beside that of all parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ... import plots
from ..decision import split_half
from ..measurements import Mask, Measurements, Run
from ..stats import ALPHA, FEWEST_TASKS, NO_CORRELATION, Array, across, t_interval
from .common import Answer, bounds, correlation_number, count_of, number, over_seeds, scarce
from .drawing import AXIS, beside, correlation_axis, nothing, sheet
from .last_block import folds
from .reading import Reading, spelled

QUESTION = "Is the last attention block the best proxy of the whole model?"
CLAIM = (
    "U of the last attention block goes with U of all parameters across tasks more closely than U of every other "
    "choice of layers that was measured."
)
LAST = "last attention"


def answer(m: Measurements) -> Answer:
    """Spearman's correlation over the tasks of each choice's U with that of all parameters, from different steps."""
    runs = [run for run in m.runs if np.isfinite(m.array(*run, "full_grad_norm_sq")).any()]
    choices = {LAST: "", **{name: f"{name}_" for name in m.proxies}}
    apart = [(run, *steps) for run in runs for steps in folds(m, run)]
    seeds = [run[1] for run, _, _ in apart]
    full = _u(m, [(run, b) for run, _, b in apart], "full_")
    own = {name: _u(m, [(run, a) for run, a, _ in apart], prefix) for name, prefix in choices.items()}
    found = {name: across(u, full, seeds) if apart else NO_CORRELATION for name, u in own.items()}
    numbers, rows, better = [], [], {}
    for name, prefix in choices.items():
        numbers.append(
            correlation_number(f"Spearman of U, {name} and all parameters", found[name], "tasks, different steps")
        )
        halves = [_u(m, [(run, half) for run in runs], prefix) for half in m.halves()]
        how = "its own odd and even steps, Spearman and Brown's formula: how much noise lets any correlation be"
        numbers.append(number(f"reliability of U, {name}", split_half(*halves), how=how))
        if name != LAST:
            each = [a - b for a, b in zip(found[LAST].per_seed, found[name].per_seed, strict=True)]
            better[name] = t_interval(each)
            numbers.append(over_seeds(f"Spearman of {LAST} less that of {name}", each))
        rows.append({"name": name, **bounds(found[name]), "p": found[name].p})
    known = [t for t in better.values() if math.isfinite(t.p)]
    enough = found[LAST].tasks >= FEWEST_TASKS and len(known) == len(better) > 0
    verdict = "undecided"
    if enough and all(t.low > 0 for t in known):
        verdict = "supported"
    elif enough and any(t.p / 2 * len(known) < ALPHA / 2 and t.value < 0 for t in known):
        verdict = "contradicted"
    whole = [(run, m.every_step()) for run in runs]
    u = {name: _u(m, whole, prefix) for name, prefix in {**choices, "full": "full_"}.items()}
    tasks = [
        {"task": task, **{name: float(np.nanmean(values[:, k])) for name, values in u.items() if _known(values[:, k])}}
        for k, task in enumerate(m.tasks)
    ]
    return Answer(verdict, _sentence(m, runs, rows, verdict), numbers, {"choices": rows, "tasks": tasks})


def _known(values: Array) -> bool:
    return bool(np.isfinite(values).any())


def _u(m: Measurements, chosen: Sequence[tuple[Run, Mask]], prefix: str) -> Array:
    """[R, K] U of each run over its chosen steps."""
    found = [m.by_run([run], steps, prefix)[0][0] for run, steps in chosen]
    return np.array(found).reshape(len(chosen), len(m.tasks))


def _sentence(m: Measurements, runs: Sequence[Run], rows: Sequence[dict[str, Any]], verdict: str) -> str:
    if not runs:
        return scarce(m, runs) or "Undecided: all parameters were not measured."
    ordered = sorted(rows, key=lambda row: -row["value"] if math.isfinite(row["value"]) else math.inf)
    parts = "; ".join(f"{row['name']} {spelled((row['value'], row['low'], row['high']), 2)}" for row in ordered)
    first = f"Spearman's correlation with U of all parameters over {count_of(len(m.tasks), 'task')}, by layers: {parts}"
    if verdict == "supported":
        return f"{first}. The last attention block is closer than each of the others."
    if verdict == "contradicted":
        return f"{first}. The last attention block is not the closest."
    return f"{first}. {scarce(m, runs) or 'Undecided: the choices are not distinguishable from each other.'}"


# The figure


def draw(a: Reading) -> Figure:
    """The correlation of every choice of layers with all parameters."""
    rows = a.rows("choices", "value")
    if not rows:
        return nothing(a, "No choice of layers was measured beside all parameters.")
    note = "Spearman's rank correlation over the tasks with its 95% interval over seeds, from different prompts."
    figure = sheet(a, [note], 28 + 40.0 * len(rows) + AXIS)
    axes = figure.subplots()
    plots.rows(axes, [str(row["name"]) for row in rows], 150)
    correlation_axis(axes, "rank correlation with U of all parameters")
    for y, row in enumerate(rows):
        plots.interval(axes, y, row.interval(), filled=row["p"] < ALPHA, size=9, width=2.4)
        beside(axes, y, spelled(row.interval(), 2))
    return figure
