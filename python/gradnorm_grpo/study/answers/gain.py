"""Do larger gradients mean larger learning gains?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...numbers import clean, significant
from ...summary import gain_at
from ..measurements import Array, Measurements
from ..statistics import ALPHA, FEWEST_TASKS, Correlation, across, correlate, holm, scaled, t_interval, within
from .common import (
    BASELINE,
    Run,
    answer_of,
    by_run,
    by_seed,
    correlation_number,
    correlation_row,
    count_of,
    every_step,
    number,
    p_value,
    pooled,
    scarce,
    seeds_of,
    span,
    task_interval,
    with_interval,
)

QUESTION = "Do larger gradients mean larger learning gains?"
CLAIM = (
    "Larger gradients mean larger learning gains: of two tasks, the one with the larger gradient gains more held-out "
    "accuracy. (The paper says that they do not.)"
)


def answer(m: Measurements) -> dict[str, Any]:
    """U against the gain in held-out accuracy and in training reward, across tasks and within them over time."""
    # Where tasks are drawn or weighed by U, U makes the gain: only uniform draws can tell.
    runs = [run for run in m.runs if run[0] == BASELINE] or m.runs
    arms, seeds = list(dict.fromkeys(arm for arm, _ in runs)), [seed for _, seed in runs]
    u, _ = by_run(m, runs, every_step(m))
    held_out, trained = (
        np.array([[gain(m, run, task) for task in m.tasks] for run in runs]).reshape(u.shape)
        for gain in (held_out_gain, _training_gain)
    )
    found, other = across(u, held_out, seeds), across(u, trained, seeds)
    times, moving, gains = _over_time(m, runs)
    inside = within(moving, gains, seeds)
    seed_u, _ = by_seed(m, runs, every_step(m))
    seed_gain = _by_seed(held_out, seeds)
    reversed_pairs = inversions(seed_u, seed_gain)
    p_inversion = min((p for _, _, p in reversed_pairs), default=math.nan)
    numbers = [
        correlation_number(
            "Spearman of U and held-out gain, across tasks", found, "held-out accuracy, end minus step 0"
        ),
        correlation_number(
            "Spearman of U and mean Gain(t), across tasks", other, "training reward; shares its rollouts with U"
        ),
        correlation_number(
            "Spearman of U and Gain(t), within tasks over time",
            inside,
            f"windows of {count_of(m.gain_window, 'step')} that do not overlap, centred on t",
        ),
        number(
            "p of the clearest pair where the louder task gains less",
            p_inversion,
            math.nan,
            math.nan,
            "one-sided t tests over seeds, of U and of the gain, the larger p of the two; Holm over all ordered pairs",
        ),
    ]
    verdict = "undecided"
    if p_inversion < ALPHA:
        verdict = "contradicted"
    elif found.sign and found.p < ALPHA and found.tasks >= FEWEST_TASKS:
        verdict = "supported" if found.sign > 0 and found.value > 0 else "contradicted"
    data = {
        "arms": arms,
        "correlations": [
            correlation_row("across tasks (held-out)", found),
            correlation_row("across tasks (training)", other),
            correlation_row("within tasks", inside),
        ],
        "within_correlations": [
            {"arm": run[0], "seed": run[1], "task": task}
            | {"value": correlate(moving[r, k], gains[r, k])}
            | {"n": int((np.isfinite(moving[r, k]) & np.isfinite(gains[r, k])).sum())}
            for r, run in enumerate(runs)
            for k, task in enumerate(m.tasks)
        ],
        "across": _across_rows(m, runs, held_out, trained),
        "within": [
            {"arm": run[0], "seed": run[1], "task": task, "step": t, "u": moving[r, k, w], "u_se": times[1][r, k, w]}
            | {"gain": gains[r, k, w]}
            for r, run in enumerate(runs)
            for k, task in enumerate(m.tasks)
            for w, t in enumerate(times[0])
            if math.isfinite(moving[r, k, w]) and math.isfinite(gains[r, k, w])
        ],
    }
    sentence = _sentence(m, runs, found, inside, reversed_pairs, verdict)
    return answer_of("gain", QUESTION, CLAIM, verdict, sentence, numbers, data)


def held_out_gain(m: Measurements, run: Run, task: str) -> float:
    """Held-out accuracy at the last evaluation minus that at step 0; NaN where one of them is missing."""
    steps, rewards, _ = m.evaluation(*run, task)
    return float(rewards[-1] - rewards[0]) if len(steps) > 1 and steps[0] == 0 else math.nan


def _rewards(m: Measurements, run: Run, task: str) -> list[float | None]:
    return [None if math.isnan(r) else float(r) for r in m.series(*run, task, "reward")]


def _training_gain(m: Measurements, run: Run, task: str) -> float:
    rewards = _rewards(m, run, task)
    gains = [gain_at(rewards, t, m.gain_window) for t in range(m.gain_window, m.steps - m.gain_window + 1)]
    known = [gain for gain in gains if not math.isnan(gain)]
    return sum(known) / len(known) if known else math.nan


def _over_time(m: Measurements, runs: Sequence[Run]) -> tuple[tuple[list[int], Array], Array, Array]:
    """(the t, errors of U), U and Gain(t), the arrays [R, K, W].

    U is pooled over the s steps around t, half of them on either side: U and reward of a step share their rollouts,
    and so the chance of these falls on both sides of Gain(t) alike.
    """
    s = m.gain_window
    places = list(range(s, m.steps - s + 1, s)) if s > 0 else []
    shape = (len(runs), len(m.tasks), len(places))
    u, error, gains = (np.full(shape, math.nan) for _ in range(3))
    for r, run in enumerate(runs):
        for w, t in enumerate(places):
            u[r, :, w], error[r, :, w] = pooled(m, run, span(m, t - s // 2, t - s // 2 + s))
        for k, task in enumerate(m.tasks):
            rewards = _rewards(m, run, task)
            gains[r, k] = [gain_at(rewards, t, s) for t in places]
    return (places, error), u, gains


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
    for a in range(u.shape[1]):
        for b in range(u.shape[1]):
            differences = (share[:, a] - share[:, b], gain[:, b] - gain[:, a])
            if a == b or not all(np.isfinite(d).all() and np.ptp(d) > 1e-12 for d in differences):
                continue
            pairs.append((a, b))
            found.append(max(t.p / 2 if t.value > 0 else 1 - t.p / 2 for t in map(t_interval, differences)))
    return [(a, b, p) for (a, b), p in zip(pairs, holm(found), strict=True)]


def _across_rows(m: Measurements, runs: Sequence[Run], held_out: Array, trained: Array) -> list[dict[str, Any]]:
    seeds = [seed for _, seed in runs]
    rows = []
    u, error = by_seed(m, runs, every_step(m))
    gain, training = (_by_seed(x, seeds) if runs else x for x in (held_out, trained))
    for k, task in enumerate(m.tasks):
        loud = task_interval(u[:, k], error[:, k])
        learned, reward = (task_interval(x[:, k], np.full(len(x), math.nan)) for x in (gain, training))
        rows.append(
            {"task": task, "u": loud.value, "u_low": loud.low, "u_high": loud.high}
            | {"gain": learned.value, "gain_low": learned.low, "gain_high": learned.high, "training_gain": reward.value}
            | {
                "per_seed": [
                    {"seed": seed, "u": u[s, k], "gain": gain[s, k], "training_gain": training[s, k]}
                    for s, seed in enumerate(seeds_of(runs))
                ]
            }
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
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    where = f"{count_of(found.tasks, 'task')}, {count_of(found.seeds, 'seed')}, arm {arms[0]}"
    if BASELINE not in arms:
        where = f"{where.rsplit(', ', 1)[0]}, no uniform arm: U itself decided what was drawn"
    value = with_interval(found.value, found.low, found.high)
    first = (
        f"Across tasks, U and the gain in held-out accuracy correlate by {value} (Spearman; {where}; "
        f"p = {p_value(found.p)} with tasks as units)"
    )
    if math.isfinite(inside.value):
        first += f"; within tasks over time U and Gain(t) by {with_interval(inside.value, inside.low, inside.high)}"
    shown = [(a, b, p) for a, b, p in reversed_pairs if p < ALPHA]
    if shown:
        a, b, p = min(shown, key=lambda pair: pair[2])
        pair = f"{clean(m.tasks[a])} has the larger gradient of the two and yet gains less than {clean(m.tasks[b])}"
        return f"{first}. {pair} (p = {significant(p)}, adjusted for all pairs)."
    if verdict == "undecided":
        why = scarce(m, runs) or "Undecided: no relation is shown, and with so few tasks that is no proof of none."
        return f"{first}. {why}"
    return f"{first}. {'Louder' if verdict == 'supported' else 'Quieter'} tasks gain more here."
