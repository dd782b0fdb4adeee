"""Does the last attention block's gradient stand for that of the whole model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from ..measurements import Array, Measurements
from ..statistics import ALPHA, FEWEST_TASKS, NO_CORRELATION, Correlation, across, correlate, mean_by_seed, within
from .common import (
    Mask,
    Run,
    answer_of,
    correlation_number,
    count_of,
    number,
    over_seeds,
    p_value,
    pooled,
    scarce,
    span,
    thirds,
    with_interval,
)
from .imbalance import unit

QUESTION = "Does the last attention block stand for the whole model?"
CLAIM = (
    "Tasks and times at which the last attention block has a larger gradient are those at which the whole model has: "
    "the two squared norms go together."
)

#: One run's U: of the last block and its error, of all parameters and its error, each [K, W].
Point: TypeAlias = tuple[Array, Array, Array, Array]


def answer(m: Measurements) -> dict[str, Any]:
    """Correlations of the last block's U with that of all parameters, over tasks and thirds of training."""
    runs = [run for run in m.runs if np.isfinite(m.array(*run, "full_grad_norm_sq")).any()]
    windows = thirds(m)
    same = [(run, 0, _points(m, run, windows, *[_measured(m, run)] * 2)) for run in runs]
    apart = [
        (run, fold, _points(m, run, windows, last, full))
        for run in runs
        for fold, (last, full) in enumerate(_folds(m, run))
    ]
    seeds = [run[1] for run, _, _ in apart]
    last, full = (np.array([point[side] for _, _, point in apart]) for side in (0, 2))
    found = across(last, full, seeds) if apart else NO_CORRELATION
    disjoint = _numbers(apart, "different steps") if apart else []
    shared = _numbers(same, "same steps, shared noise") if apart else []
    numbers = [*disjoint, *shared, *(_noise(m, runs, last, full, seeds) if apart else [])]
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
    verdict = "undecided"
    if found.sign and found.p < ALPHA and found.tasks >= FEWEST_TASKS:
        verdict = "supported" if found.sign > 0 and found.value > 0 else "contradicted"
    return answer_of("last_block", QUESTION, CLAIM, verdict, _sentence(m, runs, found, verdict), numbers, data)


def _measured(m: Measurements, run: Run) -> Mask:
    return np.asarray(np.isfinite(m.array(*run, "full_grad_norm_sq")).any(0))


def _folds(m: Measurements, run: Run) -> list[tuple[Mask, Mask]]:
    """Pairs of steps without a common one: (for the last block, for all parameters).

    U of both at one step comes from the same rollouts, whose chance they share: that alone correlates them.
    """
    full = _measured(m, run)
    rest = np.isfinite(m.array(*run, "grad_norm_sq")).any(0) & ~full
    if rest.sum() >= full.sum():
        return [(rest, full)]
    odd = full & (np.cumsum(full) % 2 == 1)
    return [(~odd, odd), (~(full & ~odd), full & ~odd)]


def _points(m: Measurements, run: Run, windows: Sequence[tuple[int, int]], last: Mask, full: Mask) -> Point:
    found = []
    for first, end in windows:
        inside = span(m, first, end)
        found.append((*pooled(m, run, inside & last), *pooled(m, run, inside & full, "full_")))
    a, b, c, d = (np.stack(side, 1) for side in zip(*found, strict=True))
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


def _numbers(points: Sequence[tuple[Run, int, Point]], where: str) -> list[dict[str, Any]]:
    """Every measure of how the two go together, over seeds."""
    what = "tasks and thirds of training, mean over arms"
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
    numbers = [correlation_number("Spearman within tasks, different steps", moved, "thirds of training of one task")]
    whole = [
        np.array([pooled(m, run, steps[side], prefix)[0] for run in runs for steps in _folds(m, run)])
        for side, prefix in ((0, ""), (1, "full_"))
    ]
    pooled_all = across(whole[0], whole[1], seeds)
    numbers.append(
        correlation_number("Spearman across tasks, different steps", pooled_all, "pooled over all of training")
    )
    for name, prefix in (("last block", ""), ("all parameters", "full_")):
        halves = mean_by_seed(np.array([_halves(m, run, prefix) for run in runs]), [run[1] for run in runs])
        what = "its own two halves of the steps, over tasks and thirds: how much noise lets any correlation be"
        numbers.append(over_seeds(f"Spearman of {name} with itself", halves, what, correlation=True))
    missed = int(((last <= 0) | (full <= 0)).sum())
    how = f"of {last.size} points at different steps; they have a rank but no logarithm"
    return [*numbers, number("points with a U that is not positive", missed, math.nan, math.nan, how)]


def _halves(m: Measurements, run: Run, prefix: str) -> float:
    measured = np.isfinite(m.array(*run, f"{prefix}grad_norm_sq")).any(0)
    odd = np.cumsum(measured) % 2 == 1
    sides = [
        [pooled(m, run, span(m, *window) & measured & half, prefix)[0] for window in thirds(m)] for half in (odd, ~odd)
    ]
    return correlate(np.stack(sides[0]).ravel(), np.stack(sides[1]).ravel())


def _sentence(m: Measurements, runs: Sequence[Run], found: Correlation, verdict: str) -> str:
    if not runs:
        return "Undecided: no run measured the gradient of all parameters (full_steps sets how often that is done)."
    value = f"Spearman's correlation of the two is {with_interval(found.value, found.low, found.high)}"
    where = f"over tasks and thirds of training, each U from steps of its own, {count_of(found.seeds, 'seed')}"
    p = f"p = {p_value(found.p)} with the {count_of(found.tasks, 'task')} as units"
    measured = "" if m.layers == "last_attention" else f" What stands for the last block here is: {unit(m)}."
    if math.isnan(found.value):
        return f"Undecided: too few tasks have both estimates in all runs.{measured}"
    if verdict == "undecided":
        why = scarce(m, runs) or "Undecided: that is not told apart from no relation in both ways."
        return f"{value} ({where}; {p}). {why}{measured}"
    end = "" if verdict == "supported" else " The two orders are opposite."
    return f"{value} ({where}; {p}).{end}{measured}"
