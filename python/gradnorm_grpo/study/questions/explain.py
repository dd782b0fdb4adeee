"""Do rewards, advantages or lengths explain which task has the larger gradient? Rank correlations with U."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ... import plots
from ..decision import NO_DIFFERENCE, correlation_tost, split_half
from ..measurements import Measurements
from ..stats import ALPHA, FEWEST_TASKS, NO_CORRELATION, Array, Correlation, across, holm, known_mean, within
from .common import (
    Answer,
    bounds,
    correlation_number,
    count_of,
    equivalence_numbers,
    p_value,
    scarce,
    with_interval,
)
from .drawing import AXIS, beside, correlation_axis, dots, empty, sheet, stacked, task_key
from .reading import Reading, Row, spelled

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


def answer(m: Measurements) -> Answer:
    """Spearman's correlation of U with each statistic, across tasks and within them over time."""
    runs, seeds = m.runs, [seed for _, seed in m.runs]
    u, _ = m.by_run(runs, m.every_step())
    means = {name: _means(m, name, [(0, m.steps)])[:, :, 0] for name in FACTORS}
    # Blocks as long as the window of Gain(t), or shorter, so that there are at least three.
    width = max(1, min(m.gain_window, m.steps // 3))
    blocks = [(first, first + width) for first in range(0, m.steps - width + 1, width)]
    over_time = np.stack([m.by_run(runs, m.span(*block))[0] for block in blocks], 2) if blocks else u
    between = {name: across(means[name], u, seeds) for name in FACTORS}
    inside = {
        name: within(_means(m, name, blocks), over_time, seeds) if blocks and runs else NO_CORRELATION
        for name in FACTORS
    }
    sides = (
        ("across", between, "across tasks", "means over training, mean over arms"),
        ("within", inside, "within tasks over time", f"blocks of {count_of(width, 'step')}, from the same rollouts"),
    )
    p = {side: dict(zip(FACTORS, holm([found[n].p for n in FACTORS]), strict=True)) for side, found, _, _ in sides}
    numbers = [
        correlation_number(
            f"Spearman of U and {label}, {where}",
            found[name],
            f"{how}; p after Holm for {len(FACTORS)} statistics {p_value(p[side][name])}",
        )
        for side, found, where, how in sides
        for name, label in FACTORS.items()
    ]
    data = {
        "tasks": [
            {"task": task, "u": known_mean(u[:, k])} | {name: known_mean(means[name][:, k]) for name in FACTORS}
            for k, task in enumerate(m.tasks)
        ],
        "factors": [
            {"name": name, "label": label}
            | {side: bounds(found[name]) | {"p": found[name].p, "p_holm": p[side][name]} for side, found, _, _ in sides}
            for name, label in FACTORS.items()
        ],
    }
    shown = [name for name in _beyond_chance(between, p["across"]) if between[name].tasks >= FEWEST_TASKS]
    sentence = _sentence(m, between, p["across"], shown)
    if moving := _beyond_chance(inside, p["within"]):
        parts = "; ".join(f"{FACTORS[name]} {with_interval(inside[name])}" for name in moving)
        sentence += f" Within tasks over time U moves with {parts}; both come from the same rollouts."
    verdict = "supported" if shown else "undecided"
    margin = m.declared.margin("explain")
    if math.isfinite(margin):
        p_tost = _equivalence(m, between, margin, numbers)
        if verdict == "undecided" and p_tost < ALPHA:
            verdict = NO_DIFFERENCE
            sentence = _related(between, p["across"], list(FACTORS)) + (
                f" None of these correlations is larger than {margin:g} (p = {p_value(p_tost)}, the largest of two "
                "one-sided tests of each)."
            )
    return Answer(verdict, sentence, numbers, data)


def _equivalence(
    m: Measurements, between: dict[str, Correlation], margin: float, numbers: list[dict[str, Any]]
) -> float:
    """p that one of the correlations is beyond the margin, the largest of the statistics'; adds to ``numbers``.

    All of them have to be shown to be small, so nothing is adjusted for their number.
    """
    halves = m.halves()
    of_u = split_half(*(m.by_run(m.runs, half)[0] for half in halves))
    largest = 0.0
    for name, label in FACTORS.items():
        means = [
            np.array([[known_mean(row[half]) for row in m.array(*run, name)] for run in m.runs]) for half in halves
        ]
        reliability = split_half(*(part.reshape(len(m.runs), len(m.tasks)) for part in means))
        p = correlation_tost(between[name], margin, of_u * reliability)
        numbers += equivalence_numbers(f"U and {label}", margin, p, {label: reliability})
        largest = max(largest, p) if math.isfinite(p) else math.nan
        if math.isnan(largest):
            return math.nan
    return largest


def _means(m: Measurements, name: str, blocks: Sequence[tuple[int, int]]) -> Array:
    """[R, K, W]: the mean of a field over the steps of each block at which the task was drawn."""
    found = [[[known_mean(row[a:b]) for a, b in blocks] for row in m.array(*run, name)] for run in m.runs]
    return np.array(found).reshape(len(m.runs), len(m.tasks), len(blocks))


def _beyond_chance(found: dict[str, Correlation], p: dict[str, float]) -> list[str]:
    """The statistics whose correlation is significant after Holm, with seeds that agree on its sign."""
    return [name for name, one in found.items() if p[name] < ALPHA and one.sign * one.value > 0]


def _sentence(m: Measurements, between: dict[str, Correlation], p: dict[str, float], shown: list[str]) -> str:
    if not m.runs:
        return scarce(m, m.runs)
    known = [name for name in FACTORS if math.isfinite(between[name].value)]
    if not known:
        return "Undecided: too few tasks have both U and the statistics in all runs."
    largest = max(known, key=lambda name: abs(between[name].value))
    tasks = count_of(between[largest].tasks, "task")
    over = f"over {tasks} and {count_of(between[largest].seeds, 'seed')}"
    parts = _parts(between, p, shown or [largest])
    if shown:
        return f"Across tasks U goes with {parts} (Spearman {over}). That is a relation, not a cause."
    why = scarce(m, m.runs)
    if not why and between[largest].tasks < FEWEST_TASKS + 1:
        why = f"Undecided: with {tasks} and {len(FACTORS)} statistics even a perfect order is not beyond chance."
    if not why and p[largest] < ALPHA:
        why = "Undecided: the tasks' order is beyond chance, but the seeds do not agree that there is a relation."
    if not why:
        why = "Undecided: none is beyond chance, and with so few tasks that does not show that none matters."
    return f"The strongest relation of U across tasks is with {parts} (Spearman {over}). {why}"


def _parts(between: dict[str, Correlation], p: dict[str, float], names: Sequence[str]) -> str:
    return "; ".join(f"{FACTORS[n]} {with_interval(between[n])}, p = {p_value(p[n])} after Holm" for n in names)


def _related(between: dict[str, Correlation], p: dict[str, float], names: Sequence[str]) -> str:
    tasks, seeds = (max(getattr(found, part) for found in between.values()) for part in ("tasks", "seeds"))
    over = f"over {count_of(tasks, 'task')} and {count_of(seeds, 'seed')}"
    return f"Across tasks U correlates with {_parts(between, p, names)} (Spearman {over})."


# The figure

_SIDES = (("across", "Across tasks"), ("within", "Within tasks"))


def draw(a: Reading) -> Figure:
    """Rank correlations of U with each statistic, and the means behind them."""
    factors, means = a.rows("factors"), a.rows("tasks", "u")
    shown = [f for f in factors if any(math.isfinite(row[f["name"]]) for row in means)]
    if not any(math.isfinite(f[side]["value"]) for f in factors for side, _ in _SIDES):
        factors = []
    tasks = a.names("task", means)
    upper = 28 + 40.0 * len(factors) + AXIS if factors else 80.0
    lower = 28 + 150.0 + AXIS if shown else 0.0
    notes = [
        "Spearman's rank correlation with its 95% interval. Filled: p below 0.05 after Holm's correction for the "
        "number of quantities; hollow: not significant."
        if factors
        else a.sentence
    ]
    if shown:
        notes.append("Below: one point per task. A correlation by itself explains nothing.")
    figure = sheet(a, notes, upper + lower, task_key(a, tasks) if shown else ())
    top, *below = stacked(figure, [upper, lower]) if shown else [figure]
    if factors:
        for i, (axes, (side, title)) in enumerate(zip(top.subplots(1, 2), _SIDES, strict=True)):
            _forest(axes, factors, side, title, 0 if i else 150)
    else:
        empty(top.subplots(), "No correlation is known.")
    if shown:
        _clouds(below[0].subplots(1, len(shown), sharey=True, squeeze=False)[0], a, shown, means)
    return figure


def _forest(axes: Axes, factors: Sequence[Row], side: str, title: str, width: float) -> None:
    """The intervals of one side on the rows of the quantities."""
    plots.rows(axes, [f["label"] for f in factors], width)
    axes.set_title(title)
    correlation_axis(axes, "rank correlation with U")
    for y, factor in enumerate(factors):
        found, p = factor[side].interval(), factor[side]["p_holm"]
        plots.interval(axes, y, found, filled=p < ALPHA, size=9, width=2.4)
        beside(axes, y - 0.2, spelled(found, 2))
        if math.isfinite(p):
            beside(axes, y + 0.2, f"p = {p:.2f} (Holm)" if p >= 0.01 else "p < 0.01 (Holm)")


def _clouds(panels: Any, a: Reading, factors: Sequence[Row], means: Sequence[Row]) -> None:
    """U of each task against each quantity, side by side on one axis of U."""
    u = plots.numbers(row["u"] for row in means)
    for i, (axes, factor) in enumerate(zip(panels, factors, strict=True)):
        x = plots.numbers(row[factor["name"]] for row in means)
        plots.linear(axes, "x", x, most=3)
        plots.holding_zero(axes, "y", u, u)
        axes.set_xlabel(plots.fit(factor["label"], 170, plots.SMALL))
        axes.set_ylabel("" if i else "U")
        for j, row in enumerate(means):
            dots(axes, x[j], u[j], a.place(row["task"]), size=8.5)
    panels[0].set_title("U of each task against the means over its runs")
