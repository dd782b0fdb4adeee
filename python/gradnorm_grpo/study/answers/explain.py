"""Do rewards, advantages or lengths explain which task has the larger gradient?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..measurements import Array, Measurements
from ..statistics import ALPHA, FEWEST_TASKS, NO_CORRELATION, Correlation, across, holm, within
from .common import (
    answer_of,
    by_run,
    correlation_number,
    count_of,
    every_step,
    p_value,
    pooled,
    scarce,
    span,
    with_interval,
)

QUESTION = "Do rewards, advantages or lengths explain the imbalance?"
CLAIM = (
    "One of the typical training statistics (reward, |advantage|, prompt length, response length) explains which tasks "
    "have larger gradients. (The paper says that none does.)"
)
FACTORS = {
    "reward": "reward",
    "abs_advantage": "|advantage|",
    "prompt_length": "prompt length",
    "response_length": "response length",
}


def answer(m: Measurements) -> dict[str, Any]:
    """Spearman's correlation of U with each statistic, across tasks and within them over time."""
    runs = m.runs
    seeds = [seed for _, seed in runs]
    u, _ = by_run(m, runs, every_step(m))
    means = {name: _means(m, name) for name in FACTORS}
    moving = _blocks(m)
    over_time = (
        np.array([np.stack([pooled(m, run, span(m, *w))[0] for w in moving], 1) for run in runs]) if moving else u
    )
    between, inside = {}, {}
    for name in FACTORS:
        between[name] = across(means[name], u, seeds)
        inside[name] = within(_means_over(m, name, moving), over_time, seeds) if moving and runs else NO_CORRELATION
    p_between, p_inside = (dict(zip(FACTORS, holm([x[n].p for n in FACTORS]), strict=True)) for x in (between, inside))
    numbers = []

    def adjust(p: float) -> str:
        return f"after Holm for {len(FACTORS)} statistics {p_value(p)}"

    for name, label in FACTORS.items():
        numbers.append(
            correlation_number(
                f"Spearman of U and {label}, across tasks",
                between[name],
                f"means over training, mean over arms; p {adjust(p_between[name])}",
            )
        )
    for name, label in FACTORS.items():
        what = f"blocks of {count_of(_width(m), 'step')}, from the same rollouts; p {adjust(p_inside[name])}"
        numbers.append(correlation_number(f"Spearman of U and {label}, within tasks over time", inside[name], what))
    shown = [
        name
        for name, found in between.items()
        if p_between[name] < ALPHA and found.tasks >= FEWEST_TASKS and found.sign * found.value > 0
    ]
    data = {
        "tasks": [
            {"task": task, "u": _mean(u[:, k])} | {name: _mean(means[name][:, k]) for name in FACTORS}
            for k, task in enumerate(m.tasks)
        ],
        "factors": [
            {"name": name, "label": label}
            | {"across": _row(between[name], p_between[name]), "within": _row(inside[name], p_inside[name])}
            for name, label in FACTORS.items()
        ],
    }
    verdict = "supported" if shown else "undecided"
    sentence = _sentence(m, between, inside, p_between, p_inside, shown)
    return answer_of("explain", QUESTION, CLAIM, verdict, sentence, numbers, data)


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _width(m: Measurements) -> int:
    """Steps of a block: the window of Gain(t), or less, so that there are at least three blocks."""
    return max(1, min(m.gain_window, m.steps // 3))


def _blocks(m: Measurements) -> list[tuple[int, int]]:
    width = _width(m)
    return [(first, first + width) for first in range(0, m.steps - width + 1, width)]


def _means(m: Measurements, name: str) -> Array:
    """[R, K]: the mean of a field over the steps at which a task was drawn."""
    return np.array([[_mean(row) for row in m.array(*run, name)] for run in m.runs]).reshape(len(m.runs), len(m.tasks))


def _means_over(m: Measurements, name: str, blocks: Sequence[tuple[int, int]]) -> Array:
    """[R, K, W]: the same within each block of steps."""
    return np.array(
        [[[_mean(row[first:end]) for first, end in blocks] for row in m.array(*run, name)] for run in m.runs]
    )


def _row(found: Correlation, adjusted: float) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high, "p": found.p, "p_holm": adjusted}


def _sentence(
    m: Measurements,
    between: dict[str, Correlation],
    inside: dict[str, Correlation],
    p_between: dict[str, float],
    p_inside: dict[str, float],
    shown: list[str],
) -> str:
    if not m.runs:
        return scarce(m, m.runs)
    known = [name for name in FACTORS if math.isfinite(between[name].value)]
    if not known:
        return "Undecided: too few tasks have both U and the statistics in all runs."
    largest = max(known, key=lambda name: abs(between[name].value))
    named = shown or [largest]
    parts = [
        f"{FACTORS[name]} {with_interval(between[name].value, between[name].low, between[name].high)}, "
        f"p = {p_value(p_between[name])} after Holm"
        for name in named
    ]
    over = f"over {count_of(between[largest].tasks, 'task')} and {count_of(between[largest].seeds, 'seed')}"
    if shown:
        first = f"Across tasks U goes with {'; '.join(parts)} (Spearman {over}). That is a relation, not a cause."
    else:
        first = f"The strongest relation of U across tasks is with {parts[0]} (Spearman {over})."
        why = scarce(m, m.runs)
        if not why and between[largest].tasks < FEWEST_TASKS + 1:
            why = (
                f"Undecided: with {count_of(between[largest].tasks, 'task')} and {len(FACTORS)} statistics even a "
                "perfect order is not beyond chance."
            )
        if not why and p_between[largest] < ALPHA:
            why = "Undecided: the tasks' order is beyond chance, but the seeds do not agree that there is a relation."
        first += (
            f" {why or 'Undecided: none is beyond chance, and with so few tasks that does not show that none matters.'}"
        )
    moving = [name for name in FACTORS if p_inside[name] < ALPHA and inside[name].sign * inside[name].value > 0]
    if moving:
        shown_inside = "; ".join(
            f"{FACTORS[name]} {with_interval(inside[name].value, inside[name].low, inside[name].high)}"
            for name in moving
        )
        first += f" Within tasks over time U moves with {shown_inside}; both come from the same rollouts."
    return first
