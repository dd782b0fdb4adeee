"""Do larger gradients mean larger learning gains? U against held-out and training gain, across and within tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ... import plots
from ...numbers import clean, significant
from ...summary import gain_at
from ..decision import NO_DIFFERENCE, beyond_noise, correlation_tost, split_half
from ..measurements import Measurements, Run, seeds_of
from ..stats import ALPHA, Array, Correlation, across, correlate, holm, scaled, t_interval, task_interval, within
from .common import (
    BASELINE,
    Answer,
    bounds,
    correlation_number,
    count_of,
    direction,
    equivalence_numbers,
    number,
    p_value,
    scarce,
    with_interval,
)
from .drawing import AXIS, correlation_axis, crosses, dots, empty, head_height, headed, nothing, sheet
from .reading import Reading, Row

QUESTION = "Do larger gradients mean larger learning gains?"
CLAIM = (
    "Larger gradients mean larger learning gains: of two tasks, the one with the larger gradient gains more held-out "
    "accuracy. (The paper says that they do not.)"
)


def answer(m: Measurements) -> Answer:
    """U against the gain in held-out accuracy and in training reward, across tasks and within them over time."""
    # Where tasks are drawn or weighed by U, U makes the gain: only uniform draws can tell.
    runs = [run for run in m.runs if run[0] == BASELINE] or m.runs
    seeds = [seed for _, seed in runs]
    u, _ = m.by_run(runs, m.every_step())
    held_out, trained = (
        np.array([[gain(m, run, task) for task in m.tasks] for run in runs]).reshape(u.shape)
        for gain in (held_out_gain, _training_gain)
    )
    found, other = across(u, held_out, seeds), across(u, trained, seeds)
    steps, moving, errors, gains = _over_time(m, runs)
    inside = within(moving, gains, seeds)
    reversed_pairs = inversions(m.by_seed(runs, m.every_step())[0], _by_seed(held_out, seeds))
    p_inversion = min((p for _, _, p in reversed_pairs), default=math.nan)
    windows = f"windows of {count_of(m.gain_window, 'step')} that do not overlap, centred on t"
    numbers = [
        correlation_number(
            "Spearman of U and held-out gain, across tasks", found, "held-out accuracy, end minus step 0"
        ),
        correlation_number(
            "Spearman of U and mean Gain(t), across tasks", other, "training reward; shares its rollouts with U"
        ),
        correlation_number("Spearman of U and Gain(t), within tasks over time", inside, windows),
        number(
            "p of the clearest pair where the louder task gains less",
            p_inversion,
            how="one-sided t tests over seeds, of U and of the gain, the larger p of the two; Holm over all ordered "
            "pairs",
        ),
    ]
    margin = m.declared.margin("gain")
    p_tost = correlation_tost(found, margin, math.nan)
    if math.isfinite(margin):
        of_u = split_half(*(m.by_run(runs, half)[0] for half in m.halves()))
        of_gain = beyond_noise(held_out, np.array([[_gain_error(m, run, t) for t in m.tasks] for run in runs]))
        p_tost = correlation_tost(found, margin, of_u * of_gain)
        numbers += equivalence_numbers("gain", margin, p_tost, {"U": of_u, "held-out gain": of_gain})
    verdict = "contradicted" if p_inversion < ALPHA else direction(found)
    if verdict == "undecided" and p_tost < ALPHA:
        verdict = NO_DIFFERENCE
    places = [(r, run, k, task) for r, run in enumerate(runs) for k, task in enumerate(m.tasks)]
    data = {
        "arms": list(dict.fromkeys(arm for arm, _ in runs)),
        "correlations": [
            {"where": where, "kind": "Spearman", **bounds(correlation)}
            for where, correlation in (
                ("across tasks (held-out)", found),
                ("across tasks (training)", other),
                ("within tasks", inside),
            )
        ],
        "within_correlations": [
            {"arm": run[0], "seed": run[1], "task": task}
            | {"value": correlate(moving[r, k], gains[r, k])}
            | {"n": int((np.isfinite(moving[r, k]) & np.isfinite(gains[r, k])).sum())}
            for r, run, k, task in places
        ],
        "across": _across_rows(m, runs, held_out, trained),
        "within": [
            {"arm": run[0], "seed": run[1], "task": task, "step": t, "u": moving[r, k, w], "u_se": errors[r, k, w]}
            | {"gain": gains[r, k, w]}
            for r, run, k, task in places
            for w, t in enumerate(steps)
            if math.isfinite(moving[r, k, w]) and math.isfinite(gains[r, k, w])
        ],
    }
    sentence = _sentence(m, runs, found, inside, reversed_pairs, verdict)
    if verdict == NO_DIFFERENCE:
        sentence += f" The correlation is not larger than {margin:g} (p = {p_value(p_tost)} of two one-sided tests)."
    return Answer(verdict, sentence, numbers, data)


def held_out_gain(m: Measurements, run: Run, task: str) -> float:
    """Held-out accuracy at the last evaluation minus that at step 0; NaN where one of them is missing."""
    steps, rewards, _ = m.evaluation(*run, task)
    return float(rewards[-1] - rewards[0]) if len(steps) > 1 and steps[0] == 0 else math.nan


def _gain_error(m: Measurements, run: Run, task: str) -> float:
    """Standard error of the held-out gain, both evaluations taken as independent; NaN where one is missing."""
    steps, _, errors = m.evaluation(*run, task)
    return math.hypot(errors[-1], errors[0]) if len(steps) > 1 and steps[0] == 0 else math.nan


def _training_gain(m: Measurements, run: Run, task: str) -> float:
    rewards = m.series(*run, task, "reward")
    gains = [gain_at(rewards, t, m.gain_window) for t in range(m.gain_window, m.steps - m.gain_window + 1)]
    known = [gain for gain in gains if not math.isnan(gain)]
    return sum(known) / len(known) if known else math.nan


def _over_time(m: Measurements, runs: Sequence[Run]) -> tuple[list[int], Array, Array, Array]:
    """The t, and at each t U, its error and Gain(t), arrays [R, K, W].

    U is pooled over the s steps around t, half of them on either side: U and reward of a step share their rollouts,
    so their chance falls on both sides of Gain(t) alike.
    """
    s = m.gain_window
    steps = list(range(s, m.steps - s + 1, s)) if s > 0 else []
    u, error, gains = np.full((3, len(runs), len(m.tasks), len(steps)), math.nan)
    for w, t in enumerate(steps):
        u[:, :, w], error[:, :, w] = m.by_run(runs, m.span(t - s // 2, t - s // 2 + s))
    for r, run in enumerate(runs):
        for k, task in enumerate(m.tasks):
            gains[r, k] = [gain_at(m.series(*run, task, "reward"), t, s) for t in steps]
    return steps, u, error, gains


def _by_seed(values: Array, seeds: Sequence[int]) -> Array:
    """[R, K] averaged over the runs of each seed."""
    return np.array([values[[s == seed for s in seeds]].mean(0) for seed in dict.fromkeys(seeds)])


def inversions(u: Array, gain: Array) -> list[tuple[int, int, float]]:
    """Pairs (a, b, p) of tasks where a has the larger U and b the larger gain; arrays [S, K], S seeds.

    p is the larger of the two one-sided p of paired t tests over seeds, adjusted by Holm for all ordered pairs.
    """
    if len(u) < 2:
        return []
    share, pairs, found = scaled(u), [], []
    for a, b in permutations(range(u.shape[1]), 2):
        differences = (share[:, a] - share[:, b], gain[:, b] - gain[:, a])
        if all(np.isfinite(d).all() and np.ptp(d) > 1e-12 for d in differences):
            pairs.append((a, b))
            found.append(max(t.p / 2 if t.value > 0 else 1 - t.p / 2 for t in map(t_interval, differences)))
    return [(a, b, p) for (a, b), p in zip(pairs, holm(found), strict=True)]


def _across_rows(m: Measurements, runs: Sequence[Run], held_out: Array, trained: Array) -> list[dict[str, Any]]:
    seeds, rows = [seed for _, seed in runs], []
    u, error = m.by_seed(runs, m.every_step())
    gain, training = (_by_seed(x, seeds) if runs else x for x in (held_out, trained))
    for k, task in enumerate(m.tasks):
        unknown = np.full(len(gain), math.nan)
        per_seed = [
            {"seed": seed, "u": u[s, k], "gain": gain[s, k], "training_gain": training[s, k]}
            for s, seed in enumerate(seeds_of(runs))
        ]
        rows.append(
            {"task": task}
            | bounds(task_interval(u[:, k], error[:, k]), "u")
            | bounds(task_interval(gain[:, k], unknown), "gain")
            | {"training_gain": task_interval(training[:, k], unknown).value, "per_seed": per_seed}
        )
    return rows


def _sentence(
    m: Measurements,
    runs: Sequence[Run],
    found: Correlation,
    inside: Correlation,
    reversed_pairs: list[tuple[int, int, float]],
    verdict: str,
) -> str:
    if not runs:
        return scarce(m, runs)
    if math.isnan(found.value):
        return (
            "Undecided: the tasks' held-out gains are not known or do not differ (they take an evaluation at step 0 "
            "and one later)."
        )
    uniform = runs[0][0] == BASELINE
    arm = f"arm {BASELINE}" if uniform else "no uniform arm: U itself decided what was drawn"
    where = f"{count_of(found.tasks, 'task')}, {count_of(found.seeds, 'seed')}, {arm}"
    first = (
        f"Across tasks, U and the gain in held-out accuracy correlate by {with_interval(found)} (Spearman; {where}; "
        f"p = {p_value(found.p)} with tasks as units)"
    )
    if math.isfinite(inside.value):
        first += f"; within tasks over time U and Gain(t) by {with_interval(inside)}"
    shown = [(a, b, p) for a, b, p in reversed_pairs if p < ALPHA]
    if shown:
        a, b, p = min(shown, key=lambda pair: pair[2])
        pair = f"{clean(m.tasks[a])} has the larger gradient of the two and yet gains less than {clean(m.tasks[b])}"
        return f"{first}. {pair} (p = {significant(p)}, adjusted for all pairs)."
    if verdict == NO_DIFFERENCE:
        return f"{first}."
    if verdict == "undecided":
        why = scarce(m, runs) or "Undecided: no relation is shown, and with so few tasks that is no proof of none."
        return f"{first}. {why}"
    return f"{first}. {'Louder' if verdict == 'supported' else 'Quieter'} tasks gain more here."


# The figure


def draw(a: Reading) -> Figure:
    """U against the held-out gain across tasks, and how U goes with Gain(t) within each task."""
    rows, inside = a.rows("across"), a.rows("within_correlations")
    tasks = a.names("task", rows, inside)
    if not tasks:
        return nothing(a, "No task's U and gain are both known.")
    heads = [(title, a.correlations(title.lower())) for title in ("Across tasks", "Within tasks")]
    body = max(250.0, 24.0 * len(tasks)) + AXIS
    arms = a.data.get("arms") or []
    of = f" Runs of the arm{'s' if len(arms) > 1 else ''} {', '.join(arms)}." if arms else ""
    note = (
        "Left: mean over seeds with 95% intervals; small points are single seeds. Right: one point per run, the bar is "
        f"their median.{of} Gain within a task: mean training reward after a step minus that before it."
    )
    figure = sheet(a, [note], head_height(max(len(lines) for _, lines in heads)) + body)
    left, right = headed(figure, heads, body)
    cloud(left, a, rows)
    _strips(right, a, inside, tasks)
    return figure


def cloud(axes: Axes, a: Reading, rows: Sequence[Row]) -> None:
    """A point per task: its U and its held-out gain with their intervals, and faintly those of each seed."""
    if not any(math.isfinite(r["gain"]) and math.isfinite(r["u"]) for r in rows):
        empty(axes, "No held-out gain is known.")
        return
    x, y = (np.array([r.interval(name) for r in rows]) for name in ("u", "gain"))
    seeds = [[plots.numbers(s[name] for s in r.rows("per_seed")) for r in rows] for name in ("u", "gain")]
    sizes = np.max(np.abs(np.nan_to_num(x)), axis=1)
    plots.holding_zero(axes, "x", np.concatenate([x.ravel(), *seeds[0]]), sizes)
    plots.linear(axes, "y", np.concatenate([y.ravel(), *seeds[1]]), zero=True)
    axes.set_xlabel("U (symmetric logarithmic)")
    axes.set_ylabel("gain in held-out accuracy")
    for i, row in enumerate(rows):
        place = a.place(row["task"])
        dots(axes, seeds[0][i], seeds[1][i], place, size=5, alpha=0.35)
        one, other = x[i : i + 1, 0], y[i : i + 1, 0]
        crosses(axes, one, other, x[i, 1:, None], y[i, 1:, None], plots.colour(place), 1.4, 0.7)
        dots(axes, one, other, place, size=9)


def _strips(axes: Axes, a: Reading, inside: Sequence[Row], tasks: list[str]) -> None:
    """One row per task with the correlations of its runs; its names and markers explain the other panel too."""
    plots.rows(axes, tasks, 150, list(map(a.place, tasks)))
    correlation_axis(axes, "rank correlation, by run")
    for y, task in enumerate(tasks):
        values = plots.finite(plots.numbers(r["value"] for r in inside if r["task"] == task))
        if not values.size:
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": plots.SMALL}
            axes.text(0, y, "not known", color=plots.FAINT, bbox=plots.GROUND, **style)
            continue
        # Equal values would hide each other: each run has its own height in the row, in the study's order.
        heights = y + 0.5 * (np.linspace(-0.5, 0.5, values.size) if values.size > 1 else np.zeros(1))
        dots(axes, values, heights, a.place(task), size=5.5, alpha=0.75)
        axes.vlines(float(np.median(values)), y - 0.36, y + 0.36, color=plots.INK, lw=2, zorder=4)
