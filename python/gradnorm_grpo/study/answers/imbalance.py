"""Do some tasks produce much larger gradients than others?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ...numbers import clean
from ..measurements import Array, Measurements
from ..statistics import (
    ALPHA,
    NO_RATIO,
    Ratio,
    ratio_over_seeds,
    ratio_within,
    scaled,
    t_interval,
    tasks_alike,
    tasks_alike_within,
)
from .common import (
    Mask,
    Run,
    answer_of,
    by_seed,
    count_of,
    every_step,
    number,
    p_value,
    plug_in,
    pooled_runs,
    seeds_of,
    span,
    task_interval,
    thirds,
    times,
)

PAPER = (15, 33)  # the ratios of squared norms that Wu et al. 2025 report
ALIKE = 2.0  # all pairs of tasks within this factor: no imbalance worth the name
QUESTION = "Do some tasks produce much larger gradients than others?"
CLAIM = (
    "Some tasks produce larger gradients than others: the loudest task's squared gradient norm exceeds the quietest's."
)


def answer(m: Measurements) -> dict[str, Any]:
    """U of every task, pooled over training and its thirds, and the ratio of the loudest to the quietest."""
    runs, whole = m.runs, every_step(m)
    u, error = by_seed(m, runs, whole)
    found = _ratio(m, runs, whole)
    p = tasks_alike(u) if len(u) > 1 else tasks_alike_within(u[0], error[0]) if len(u) else math.nan
    rows: list[tuple[str, Ratio]] = [("training", found)]
    rows += [(_window(first, end), _ratio(m, runs, span(m, first, end))) for first, end in thirds(m)]
    rows += [
        (f"arm {arm}", _ratio(m, [r for r in runs if r[0] == arm], whole)) for arm in dict.fromkeys(a for a, _ in runs)
    ]
    full = _ratio(m, runs, whole, "full_")
    rows.append(("all parameters", full))
    numbers = [number(f"loudest / quietest, {where}", r.value, r.low, r.high, r.how) for where, r in rows]
    how = "permutation of the tasks within seeds" if len(u) > 1 else "chi-squared with the errors within the run"
    numbers.append(number("p that all tasks are alike", p, math.nan, math.nan, how))
    if found.low > 1 and p < ALPHA:
        verdict = "supported"
    else:
        verdict = "contradicted" if _all_alike(u, error) else "undecided"
    return answer_of("imbalance", QUESTION, CLAIM, verdict, _sentence(m, u, found, p, verdict), numbers, _data(m, rows))


def _ratio(m: Measurements, runs: Sequence[Run], steps: Mask, prefix: str = "") -> Ratio:
    if not runs or not steps.any():
        return NO_RATIO
    u, error = by_seed(m, runs, steps, prefix)
    if len(u) > 1:
        return ratio_over_seeds(u, error)
    # Every other step that was measured: with two halves of training the weights would differ.
    measured = steps & np.any([np.isfinite(m.array(*run, f"{prefix}grad_norm_sq")).any(0) for run in runs], axis=0)
    order = np.cumsum(measured) % 2
    halves = [pooled_runs(m, runs, measured & (order == h), prefix) for h in (1, 0)]
    return ratio_within(np.stack([h for h, _ in halves]), np.stack([e for _, e in halves]))


def _all_alike(u: Array, error: Array) -> bool:
    """Whether every task's U is shown to be less than ``ALIKE`` times every other's: each pair at 5%, one-sided."""
    if not len(u) or not np.isfinite(u).all() or u.shape[1] < 2:
        return False
    for a in range(u.shape[1]):
        for b in range(u.shape[1]):
            if a == b:
                continue
            if len(u) > 1:
                share = scaled(u)
                margin = ALIKE * share[:, b] - share[:, a]
                known = t_interval(margin)
                shown = known.value > 0 and known.p / 2 < ALPHA
            else:
                spread = math.hypot(ALIKE * error[0, b], error[0, a])
                shown = bool(ALIKE * u[0, b] - u[0, a] > stats.norm.ppf(1 - ALPHA) * spread)
            if not shown:
                return False
    return True


def _window(first: int, end: int) -> str:
    return f"steps {first + 1}-{end}"


def _sentence(m: Measurements, u: Array, found: Ratio, p: float, verdict: str) -> str:
    if math.isnan(found.low) and math.isnan(found.value):
        lacking = "no finished run" if not len(u) else f"{count_of(len(m.tasks), 'task')} with enough measured steps"
        return f"Undecided: there is {lacking} to compare."
    over = f"over {count_of(len(u), 'seed')}" if len(u) > 1 else "in the one seed (the error is that of its prompts)"
    picks = set(found.picks)
    if len(picks) == 1:
        loud, quiet = next(iter(picks))
        who = f"{clean(m.tasks[loud])} is the loudest task and {clean(m.tasks[quiet])} the quietest"
    else:
        who = "Which task is loudest and which quietest differs from part to part of the data"
    ratio = f"{who}; the squared norms are {times(found.value, found.low, found.high)} times apart {over}"
    first = f"{ratio} (p = {p_value(p)} that all are alike)."
    if verdict == "contradicted":
        return f"{first} All tasks are within a factor of {ALIKE:.0f} of one another."
    if verdict == "undecided":
        return f"{first} That is not told apart from no difference, nor shown to be small."
    low, high = PAPER
    if found.low > high or found.high < low:
        return f"{first} That is {'more' if found.low > high else 'less'} than the paper's {low} to {high}."
    if found.low >= low and found.high <= high:
        return f"{first} That is within the paper's {low} to {high}."
    return f"{first} The paper's {low} to {high} is not ruled out."


def _data(m: Measurements, rows: list[tuple[str, Ratio]]) -> dict[str, Any]:
    runs, whole = m.runs, every_step(m)
    seeds = seeds_of(runs)
    plug = plug_in(m, runs, whole)
    (u, error), (full, full_error) = by_seed(m, runs, whole), by_seed(m, runs, whole, "full_")
    overall, by_window = [], []
    for k, task in enumerate(m.tasks):
        own, all_of_it = (
            (task_interval(x[:, k], e[:, k]) if len(x) else t_interval([])) for x, e in ((u, error), (full, full_error))
        )
        per_seed = [{"seed": seed, "value": u[s, k], "se": error[s, k]} for s, seed in enumerate(seeds)]
        row = {"task": task, "value": own.value, "low": own.low, "high": own.high, "per_seed": per_seed}
        row["plug_in"] = t_interval(plug[:, k]).value
        overall.append(row | {"full": all_of_it.value, "full_low": all_of_it.low, "full_high": all_of_it.high})
    for w, (first, end) in enumerate(thirds(m)):
        x, e = by_seed(m, runs, span(m, first, end))
        plug = plug_in(m, runs, span(m, first, end))
        for k, task in enumerate(m.tasks):
            own = task_interval(x[:, k], e[:, k]) if len(x) else t_interval([])
            row = {"task": task, "window": w, "value": own.value, "low": own.low, "high": own.high}
            by_window.append(row | {"plug_in": t_interval(plug[:, k]).value})
    return {
        "unit": unit(m),
        "overall": overall,
        "windows": [{"window": w, "first": first + 1, "last": end} for w, (first, end) in enumerate(thirds(m))],
        "by_window": by_window,
        "ratios": [{"where": where, "value": r.value, "low": r.low, "high": r.high} for where, r in rows],
        "paper": list(PAPER),
    }


def unit(m: Measurements) -> str:
    """What U was measured on, in words."""
    return {"last_attention": "last attention block", "all": "all tracked layers"}.get(m.layers, m.layers)
