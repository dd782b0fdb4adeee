"""Does the last attention block's gradient stand for that of the whole model? Correlations of the two U."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ... import plots
from ..measurements import Mask, Measurements, Run
from ..stats import NO_CORRELATION, Array, Correlation, across, correlate, mean_by_seed, within
from .common import Answer, correlation_number, count_of, direction, number, over_seeds, p_value, scarce, with_interval
from .drawing import AXIS, crosses, dots, empty, head_height, headed, nothing, sheet, task_key
from .imbalance import unit
from .reading import Reading, Row

QUESTION = "Does the last attention block stand for the whole model?"
CLAIM = (
    "Tasks and times at which the last attention block has a larger gradient are those at which the whole model has: "
    "the two squared norms go together."
)

#: One run's U: of the last block and its error, of all parameters and its error, each [K, W].
Point: TypeAlias = tuple[Array, Array, Array, Array]


def answer(m: Measurements) -> Answer:
    """Correlations of the last block's U with that of all parameters, over tasks and thirds of training."""
    runs = [run for run in m.runs if _measured(m, run, "full_").any()]
    same = [(run, 0, _point(m, run, *[_measured(m, run, "full_")] * 2)) for run in runs]
    apart = [(run, fold, _point(m, run, *steps)) for run in runs for fold, steps in enumerate(folds(m, run))]
    seeds = [run[1] for run, _, _ in apart]
    last, full = (np.array([point[side] for _, _, point in apart]) for side in (0, 2))
    found = across(last, full, seeds) if apart else NO_CORRELATION
    disjoint = _numbers(m, apart, "different steps") if apart else []
    shared = _numbers(m, same, "same steps, shared noise") if apart else []
    line = _fit(last, full) if apart else None
    data = {
        "correlations": [
            {"where": where, "kind": row["name"].partition(",")[0]}
            | {side: row[side] for side in ("value", "low", "high")}
            for where, rows in (("disjoint rollouts", disjoint), ("same rollouts", shared))
            for row in rows
        ],
        "points": [row for run, _, point in same for row in _rows(m, run, point)],
        "disjoint": [row | {"fold": fold} for run, fold, point in apart for row in _rows(m, run, point)],
        "fit": line and {"slope": line[0], "intercept": line[1]},
        "not_positive": int(((last <= 0) | (full <= 0)).sum()) if apart else 0,
    }
    verdict = direction(found)
    numbers = [*disjoint, *shared, *(_noise(m, runs, last, full, seeds) if apart else [])]
    return Answer(verdict, _sentence(m, runs, found, verdict), numbers, data)


def _measured(m: Measurements, run: Run, prefix: str = "") -> Mask:
    return np.asarray(np.isfinite(m.array(*run, f"{prefix}grad_norm_sq")).any(0))


def folds(m: Measurements, run: Run) -> list[tuple[Mask, Mask]]:
    """Pairs of steps without a common one: (for the last block, for all parameters).

    U of both at one step comes from the same rollouts, whose chance they share: that alone correlates them.
    """
    full = _measured(m, run, "full_")
    rest = _measured(m, run) & ~full
    if rest.sum() >= full.sum():
        return [(rest, full)]
    odd = full & (np.cumsum(full) % 2 == 1)
    return [(~odd, odd), (~(full & ~odd), full & ~odd)]


def _point(m: Measurements, run: Run, last: Mask, full: Mask) -> Point:
    found = []
    for window in m.thirds():
        inside = m.span(*window)
        found.append((*m.by_run([run], inside & last), *m.by_run([run], inside & full, "full_")))
    a, b, c, d = (np.concatenate(side).T for side in zip(*found, strict=True))
    return a, b, c, d


def _rows(m: Measurements, run: Run, point: Point) -> list[dict[str, Any]]:
    rows = []
    for k, task in enumerate(m.tasks):
        for w in range(point[0].shape[1]):
            u = dict(zip(("last", "last_se", "full", "full_se"), (float(side[k, w]) for side in point), strict=True))
            if math.isfinite(u["last"]) and math.isfinite(u["full"]):
                rows.append({"arm": run[0], "seed": run[1], "task": task, "window": w, **u})
    return rows


def _logs(x: Array) -> Array:
    """log10; what is not positive has none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(x > 0, np.log10(x), math.nan)


def _fit(last: Array, full: Array) -> tuple[float, float] | None:
    """Slope and intercept of log10 of the last block's U over log10 of the full one, by least squares."""
    x, y = _logs(full), _logs(last)
    kept = np.isfinite(x) & np.isfinite(y)
    if kept.sum() < 3 or np.ptp(x[kept]) == 0:
        return None
    line = stats.linregress(x[kept], y[kept])
    return float(line.slope), float(line.intercept)


def _numbers(m: Measurements, points: Sequence[tuple[Run, int, Point]], where: str) -> list[dict[str, Any]]:
    """Every measure of how the two go together, over seeds."""
    what = "tasks" if m.frozen else "tasks and thirds of training, mean over arms"
    seeds = [run[1] for run, _, _ in points]
    last, full = (np.array([point[side] for _, _, point in points]) for side in (0, 2))
    pairs = [(a.ravel(), b.ravel()) for a, b in zip(last, full, strict=True)]
    measures: dict[str, tuple[list[float], str]] = {
        "Pearson": ([correlate(a, b, ranks=False) for a, b in pairs], what),
        "Pearson of logarithms": (
            [correlate(_logs(a), _logs(b), ranks=False) for a, b in pairs],
            f"{what}; positive U only",
        ),
        "log-log slope": (
            [line[0] if (line := _fit(a, b)) else math.nan for a, b in pairs],
            "last block on all parameters, least squares, positive U only; noise in the latter flattens it",
        ),
    }
    return [correlation_number(f"Spearman, {where}", across(last, full, seeds), what)] + [
        over_seeds(f"{name}, {where}", mean_by_seed(np.array(values), seeds), how, correlation="slope" not in name)
        for name, (values, how) in measures.items()
    ]


def _noise(
    m: Measurements, runs: Sequence[Run], last: Array, full: Array, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """What a reader needs to judge the correlations by: over time alone, and how far noise lets them go."""
    moved = within(last, full, seeds)
    apart = [(run, steps) for run in runs for steps in folds(m, run)]
    whole = [
        np.concatenate([m.by_run([run], steps[side], prefix)[0] for run, steps in apart])
        for side, prefix in ((0, ""), (1, "full_"))
    ]
    numbers = [
        correlation_number("Spearman within tasks, different steps", moved, "thirds of training of one task"),
        correlation_number(
            "Spearman across tasks, different steps", across(whole[0], whole[1], seeds), "pooled over all of training"
        ),
    ]
    for name, prefix in (("last block", ""), ("all parameters", "full_")):
        halves = mean_by_seed(np.array([_halves(m, run, prefix) for run in runs]), [run[1] for run in runs])
        what = "its own two halves of the steps, over tasks and thirds: how much noise lets any correlation be"
        numbers.append(over_seeds(f"Spearman of {name} with itself", halves, what, correlation=True))
    how = f"of {last.size} points at different steps; they have a rank but no logarithm"
    missed = int(((last <= 0) | (full <= 0)).sum())
    return [*numbers, number("points with a U that is not positive", missed, how=how)]


def _halves(m: Measurements, run: Run, prefix: str) -> float:
    measured = _measured(m, run, prefix)
    odd = np.cumsum(measured) % 2 == 1
    sides = [
        np.concatenate([m.by_run([run], m.span(*window) & measured & half, prefix)[0] for window in m.thirds()])
        for half in (odd, ~odd)
    ]
    return correlate(sides[0].ravel(), sides[1].ravel())


def _sentence(m: Measurements, runs: Sequence[Run], found: Correlation, verdict: str) -> str:
    if not runs:
        return "Undecided: no run measured the gradient of all parameters (full_steps sets how often that is done)."
    where = f"over tasks and thirds of training, each U from steps of its own, {count_of(found.seeds, 'seed')}"
    p = f"p = {p_value(found.p)} with the {count_of(found.tasks, 'task')} as units"
    value = f"Spearman's correlation of the two is {with_interval(found)} ({where}; {p})"
    measured = "" if m.layers == "last_attention" else f" What stands for the last block here is: {unit(m)}."
    if math.isnan(found.value):
        return f"Undecided: too few tasks have both estimates in all runs.{measured}"
    if verdict == "undecided":
        why = scarce(m, runs) or "Undecided: that is not told apart from no relation in both ways."
        return f"{value}. {why}{measured}"
    end = "" if verdict == "supported" else " The two orders are opposite."
    return f"{value}.{end}{measured}"


# The figure

_MOST = 300  # points in one panel: more would only hide each other
_PANELS = (("points", "Same rollouts"), ("disjoint", "Disjoint rollouts"))


def draw(a: Reading) -> Figure:
    """U of the last attention block against that of all parameters, from the same and from disjoint rollouts."""
    parts = {name: a.rows(name) for name, _ in _PANELS}
    tasks = a.names("task", *parts.values())
    if not tasks:
        return nothing(a, "U of the last block and of all parameters were not measured together.")
    known = {name: [r for r in part if r["last"] > 0 and r["full"] > 0] for name, part in parts.items()}
    slope, intercept = (a.data.get("fit") or Row())["slope"], (a.data.get("fit") or Row())["intercept"]
    key = task_key(a, tasks)
    if math.isfinite(slope):
        key.append(("-", plots.INK, True, "least squares, disjoint rollouts"))
    heads = [(title, a.correlations(title.lower())) for _, title in _PANELS]
    body = 300 + AXIS
    figure = sheet(a, _notes(parts, known), head_height(max(len(lines) for _, lines in heads)) + body, key)
    full, last = (plots.numbers(r[side] for part in known.values() for r in part) for side in ("full", "last"))
    for axes, (name, _) in zip(headed(figure, heads, body), _PANELS, strict=True):
        if not known[name]:
            empty(axes, "No point with both U above zero.")
            continue
        low, high = plots.logarithmic(axes, "x", full, 1.6)
        limits = plots.logarithmic(axes, "y", last, 1.6)
        axes.set_xlabel("U of all parameters")
        axes.set_ylabel("U of the last attention block" if name == "points" else "")
        _cloud(axes, a, tasks, [known[name][k] for k in plots.thin(len(known[name]), _MOST)])
        if name == "disjoint" and math.isfinite(slope) and math.isfinite(intercept):
            ends = np.array([low, high])
            axes.plot(ends, 10.0 ** (intercept + slope * np.log10(ends)), color=plots.INK, lw=1.6, zorder=2.5)
            axes.set_ylim(*limits)
    return figure


def _cloud(axes: Axes, a: Reading, tasks: Sequence[str], points: Sequence[Row]) -> None:
    """The points of each task, with two standard errors."""
    for task in tasks:
        own = [r for r in points if r["task"] == task]
        x, dx, y, dy = (plots.numbers(r[key] for r in own) for key in ("full", "full_se", "last", "last_se"))
        across_x, up = np.stack([x - 2 * dx, x + 2 * dx]), np.stack([y - 2 * dy, y + 2 * dy])
        crosses(axes, x, y, across_x, up, plots.colour(a.place(task)), 0.8, 0.12)
        dots(axes, x, y, a.place(task), size=5.5)


def _notes(parts: dict[str, list[Row]], known: dict[str, list[Row]]) -> list[str]:
    notes = [
        "A point: one task in one part of one run, with two standard errors. Same rollouts: both U from the same "
        "prompts, whose chance they share. Disjoint rollouts: from different steps; the verdict is about these."
    ]
    for name, title in _PANELS:
        below = len(parts[name]) - len(known[name])
        facts = []
        if below:
            facts.append(
                f"{below} of {len(parts[name])} points have a U at or below zero, which these axes cannot show"
            )
        if len(known[name]) > _MOST:
            facts.append(f"{_MOST} of the {len(known[name])} others are drawn, evenly chosen")
        if facts:
            notes.append(f"{title}: {'; '.join(facts)}.")
    return notes
