"""What does sampling tasks by their gradients do to held-out accuracy?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...numbers import clean, signed
from ..measurements import Array, Measurements
from ..statistics import ALPHA, LEVEL, Interval, holm, t_interval
from .common import BASELINE, answer_of, interval_over, number, p_value, scarce

QUESTION = "What does sampling tasks by their gradients do?"
ARM = "proportional"
CLAIM = (
    "Sampling tasks in proportion to their gradients gives a higher mean held-out accuracy at the end than uniform "
    "sampling, at an equal budget of rollouts."
)
WHEN = ("end", "average")
BUDGET = 1e-3  # relative difference of rollouts that still counts as the same budget


def answer(m: Measurements) -> dict[str, Any]:
    """Held-out accuracy of every arm and its difference from uniform, paired by seed."""
    arms = [arm for arm in m.arms if any(run[0] == arm for run in m.runs)]
    baseline = BASELINE if BASELINE in arms else None
    places: list[int | None] = [None, *range(len(m.tasks))]
    final, differences = [], []
    for arm in arms:
        for k in places:
            pairs = [(seed, _accuracy(m, arm, seed, k, "end")) for seed in m.seeds if (arm, seed) in m.runs]
            final.append({"arm": arm, "task": _name(m, k)} | _over(pairs))
    compared = [arm for arm in arms if baseline and arm != baseline]
    for when in WHEN:
        means = [_paired(m, arm, None, when) for arm in compared]
        adjusted = holm([t_interval([d for _, d in pairs]).p for pairs in means])
        for arm, pairs, p in zip(compared, means, adjusted, strict=True):
            found = t_interval([d for _, d in pairs])
            differences.append({"arm": arm, "task": None, "when": when} | _over(pairs) | {"p": found.p, "p_holm": p})
            for k, task in enumerate(m.tasks):
                row = {"arm": arm, "task": task, "when": when} | _over(_paired(m, arm, k, when))
                differences.append(row | {"p": math.nan, "p_holm": math.nan})
    rollouts = [{"arm": arm, "seed": seed, "rollouts": _rollouts(m, arm, seed)} for arm, seed in m.runs]
    equal = _equal(rollouts)
    numbers = _numbers(m, final, differences, equal, rollouts)
    own = next((row for row in differences if (row["arm"], row["task"], row["when"]) == (ARM, None, "end")), None)
    verdict = "undecided"
    if own and equal and own["p_holm"] < ALPHA:
        verdict = "supported" if own["value"] > 0 else "contradicted"
    data = {
        "baseline": baseline,
        "final": final,
        "differences": differences,
        "curves": [_curve(m, arm, k) for arm in arms for k in places],
        "rollouts": rollouts,
    }
    sentence = _sentence(m, arms, differences, own, equal)
    return answer_of("arms", QUESTION, CLAIM, verdict, sentence, numbers, data)


def _name(m: Measurements, k: int | None) -> str | None:
    return None if k is None else m.tasks[k]


def _points(m: Measurements, arm: str, seed: int, k: int | None) -> dict[int, float]:
    """Held-out accuracy by step: of one task, or the mean over tasks at the steps where all of them were evaluated."""
    each = [
        dict(zip(steps.tolist(), rewards.tolist(), strict=True))
        for steps, rewards, _ in (m.evaluation(arm, seed, task) for task in (m.tasks if k is None else [m.tasks[k]]))
    ]
    common = set.intersection(*(set(points) for points in each)) if each else set()
    return {step: sum(points[step] for points in each) / len(each) for step in sorted(common)}


def _accuracy(m: Measurements, arm: str, seed: int, k: int | None, when: str) -> float:
    """At the end, or the average of the evaluations after step 0; NaN where there is none."""
    after = [value for step, value in _points(m, arm, seed, k).items() if step > 0]
    if not after:
        return math.nan
    return after[-1] if when == "end" else sum(after) / len(after)


def _paired(m: Measurements, arm: str, k: int | None, when: str) -> list[tuple[int, float]]:
    """(seed, arm minus baseline) for the seeds that both arms have."""
    return [
        (seed, _accuracy(m, arm, seed, k, when) - _accuracy(m, BASELINE, seed, k, when))
        for seed in m.seeds
        if (arm, seed) in m.runs and (BASELINE, seed) in m.runs
    ]


def _over(pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    found = t_interval([value for _, value in pairs])
    per_seed = [{"seed": seed, "value": value} for seed, value in pairs]
    return {"value": found.value, "low": found.low, "high": found.high, "per_seed": per_seed}


def _curve(m: Measurements, arm: str, k: int | None) -> dict[str, Any]:
    points = [_points(m, arm, seed, k) for seed in m.seeds if (arm, seed) in m.runs]
    steps = sorted(set.intersection(*(set(own) for own in points))) if points else []
    found: list[Interval] = [t_interval([own[step] for own in points]) for step in steps]
    ends = {side: [getattr(interval, side) for interval in found] for side in ("value", "low", "high")}
    return {"arm": arm, "task": _name(m, k), "steps": steps, **ends}


def _rollouts(m: Measurements, arm: str, seed: int) -> float:
    found: Array = m.array(arm, seed, "rollouts")
    return float(np.nansum(found)) if np.isfinite(found).any() else math.nan


def _equal(rollouts: Sequence[dict[str, Any]]) -> bool:
    counts = [row["rollouts"] for row in rollouts]
    return bool(counts) and max(counts) - min(counts) <= BUDGET * max(counts)  # NaN compares as unequal


def _numbers(
    m: Measurements,
    final: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    equal: bool,
    rollouts: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    numbers = []
    words = {"end": "at the end", "average": "mean of the evaluations after step 0"}

    def spread(row: dict[str, Any]) -> str:
        return interval_over([entry["value"] for entry in row["per_seed"]])

    for row in final:
        what = "mean over tasks" if row["task"] is None else row["task"]
        numbers.append(
            number(
                f"accuracy of {row['arm']}, {what}", row["value"], row["low"], row["high"], f"at the end; {spread(row)}"
            )
        )
    for row in differences:
        if row["task"] is not None and row["when"] != "end":
            continue
        what = "mean over tasks" if row["task"] is None else row["task"]
        how = f"{words[row['when']]}, paired by seed; {spread(row)}"
        if math.isfinite(row["p"]):
            how += f"; p = {p_value(row['p'])}, {p_value(row['p_holm'])} after Holm for the arms"
        elif row["task"] is not None:
            how += "; one of many, not adjusted"
        name = f"{row['arm']} minus {BASELINE}, {what}, {row['when']}"
        numbers.append(number(name, row["value"], row["low"], row["high"], how))
    counts = [row["rollouts"] for row in rollouts]
    if counts:
        how = "fewest and most of all runs; " + ("the same budget" if equal else "not the same budget")
        numbers.append(
            number("rollouts of a run", sum(counts) / len(counts), min(counts), max(counts), how) | {"level": None}
        )
    return numbers


def _sentence(
    m: Measurements,
    arms: Sequence[str],
    differences: Sequence[dict[str, Any]],
    own: dict[str, Any] | None,
    equal: bool,
) -> str:
    if not m.runs:
        return scarce(m, m.runs)
    if BASELINE not in arms or ARM not in arms:
        lacking = " and ".join(arm for arm in (BASELINE, ARM) if arm not in arms)
        return f"Undecided: there is no finished run of {lacking}."
    shown = [
        f"{clean(row['arm'])} {_difference(row)}" for row in differences if row["task"] is None and row["when"] == "end"
    ]
    first = f"Mean held-out accuracy at the end, minus that of uniform, paired by seed: {'; '.join(shown)}."
    if own is None or math.isnan(own["value"]):
        return f"Undecided: the arms have no evaluation after step 0 in common. {first}"
    if not equal:
        return f"{first} Undecided: the runs did not have the same number of rollouts."
    if math.isnan(own["p"]):
        known = sum(math.isfinite(entry["value"]) for entry in own["per_seed"])
        if known < 2:
            return f"{first} Undecided: with one pair of runs nothing is known about how far another seed would differ."
        return (
            f"{first} Undecided: the seeds differ by exactly the same amount, so the evaluation is too coarse to tell."
        )
    if own["p_holm"] >= ALPHA:
        return f"{first} Undecided: proportional sampling is not told apart from uniform."
    word = "higher" if own["value"] > 0 else "lower"
    return f"{first} Proportional sampling ends {word} (p = {p_value(own['p_holm'])} after Holm for the arms)."


def _difference(row: dict[str, Any]) -> str:
    if math.isnan(row["low"]):
        return f"{signed(row['value'], 3)} (no interval)"
    return f"{signed(row['value'], 3)} ({LEVEL:.0%} interval {signed(row['low'], 3)} to {signed(row['high'], 3)})"
