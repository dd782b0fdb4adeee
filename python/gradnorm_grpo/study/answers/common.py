"""What the answers share: U pooled over runs, windows of training, and how a verdict and its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...numbers import clean, fixed, significant
from ..measurements import Array, Measurements
from ..statistics import ALPHA, FEWEST_TASKS, LEVEL, Correlation, Interval, pool, t_interval

Run: TypeAlias = tuple[str, int]  # (arm, seed)
Mask: TypeAlias = NDArray[np.bool_]  # [T]: which steps
BASELINE = "uniform"
VERDICTS = ("supported", "contradicted", "undecided")


def answer_of(
    name: str,
    question: str,
    claim: str,
    verdict: str,
    sentence: str,
    numbers: list[dict[str, Any]],
    data: dict[str, Any],
) -> dict[str, Any]:
    """One entry of answers.json."""
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}")
    return {
        "id": name,
        "question": question,
        "claim": claim,
        "verdict": verdict,
        "sentence": sentence,
        "numbers": numbers,
        "data": data,
    }


def number(name: str, value: float, low: float, high: float, how: str) -> dict[str, Any]:
    """One entry of an answer's ``numbers``."""
    level = None if math.isnan(low) and math.isnan(high) else LEVEL
    return {"name": name, "value": float(value), "low": float(low), "high": float(high), "level": level, "how": how}


def over_seeds(name: str, values: Sequence[float], what: str = "", correlation: bool = False) -> dict[str, Any]:
    """Mean of one number a seed, with its t interval; that of a ``correlation`` ends at -1 and 1."""
    found = t_interval(values)
    low, high = np.clip((found.low, found.high), -1, 1) if correlation else (found.low, found.high)
    return number(name, found.value, low, high, "; ".join(filter(None, (what, interval_over(values)))))


def interval_over(values: Sequence[float]) -> str:
    """How the interval of :func:`t_interval` came about, or why there is none."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) > 1 and math.isnan(t_interval(values).low):
        return f"{len(known)} seeds, all with the same value: no spread to make an interval of"
    return f"t interval over {len(known)} seeds" if len(known) > 1 else f"{count_of(len(known), 'seed')}: no interval"


def count_of(n: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def correlation_number(name: str, found: Correlation, what: str) -> dict[str, Any]:
    """A correlation as an entry of ``numbers``; ``what`` says over which points and what p permutes."""
    p = f"; p = {p_value(found.p)} with {count_of(found.tasks, 'task')} as units" if math.isfinite(found.p) else ""
    return number(name, found.value, found.low, found.high, f"{what}; {interval_over(found.per_seed)}{p}")


def correlation_row(where: str, found: Correlation) -> dict[str, Any]:
    """A correlation for a figure's table."""
    return {"where": where, "kind": "Spearman", "value": found.value, "low": found.low, "high": found.high}


def p_value(p: float) -> str:
    """A probability for a sentence."""
    return "unknown" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def with_interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """0.62 (95% interval 0.31 to 0.93); says so where there is no interval or a lower bound only."""
    if math.isnan(low):
        return f"{fixed(value, digits)} (no interval)"
    return f"{fixed(value, digits)} ({LEVEL:.0%} interval {fixed(low, digits)} to {fixed(high, digits)})"


def names(tasks: Iterable[str]) -> str:
    """Task names as a list in a sentence."""
    found = [clean(task) for task in tasks]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else "none"


def scarce(m: Measurements, runs: Sequence[Run]) -> str:
    """Why no statement over seeds is possible, as a sentence; empty where one is."""
    seeds = {seed for _, seed in runs}
    if not runs:
        return "Undecided: no finished run was measured."
    if len(seeds) < 2:
        return "Undecided: with a single seed nothing is known about how far another seed would differ."
    if len(m.tasks) < FEWEST_TASKS:
        few = (
            f"Undecided: of {count_of(len(m.tasks), 'task')} even a perfect order comes about by chance more than once"
        )
        return f"{few} in twenty times; it takes {FEWEST_TASKS}."
    return ""


def seeds_of(runs: Iterable[Run]) -> list[int]:
    """The seeds of runs, each once."""
    return list(dict.fromkeys(seed for _, seed in runs))


def pooled(m: Measurements, run: Run, steps: Mask, prefix: str = "") -> tuple[Array, Array]:
    """U [K] and its error of one run over the chosen ``steps`` (bool [T]); ``prefix`` "full_": of all parameters."""
    return pooled_runs(m, [run], steps, prefix)


def pooled_runs(m: Measurements, runs: Sequence[Run], steps: Mask, prefix: str = "") -> tuple[Array, Array]:
    """U [K] and its error with the pairs of several runs in one sum: of the arms of one seed."""
    fields = (f"{prefix}grad_norm_sq", f"{prefix}grad_norm_sq_se", f"{prefix}pair_weight")
    return pool(*(np.concatenate([m.array(*run, name)[:, steps] for run in runs], 1) for name in fields))


def by_run(m: Measurements, runs: Sequence[Run], steps: Mask, prefix: str = "") -> tuple[Array, Array]:
    """U [R, K] of every run and its errors."""
    found = [pooled(m, run, steps, prefix) for run in runs]
    empty = np.zeros((0, len(m.tasks)))
    return (np.stack([u for u, _ in found]), np.stack([e for _, e in found])) if found else (empty, empty)


def plug_in(m: Measurements, runs: Sequence[Run], steps: Mask) -> Array:
    """The biased plug-in estimate [S, K] of every seed, pooled with the weights of U."""
    found = np.zeros((len(seeds_of(runs)), len(m.tasks)))
    for s, seed in enumerate(seeds_of(runs)):
        own = [run for run in runs if run[1] == seed]
        fields = [np.concatenate([m.array(*r, name)[:, steps] for r in own], 1) for name in ("plug_in", "pair_weight")]
        found[s], _ = pool(fields[0], np.full_like(fields[0], math.nan), fields[1])
    return found


def by_seed(m: Measurements, runs: Sequence[Run], steps: Mask, prefix: str = "") -> tuple[Array, Array]:
    """U [S, K] of every seed, the pairs of its arms in one sum, and its errors."""
    found = [pooled_runs(m, [r for r in runs if r[1] == seed], steps, prefix) for seed in seeds_of(runs)]
    empty = np.zeros((0, len(m.tasks)))
    return (np.stack([u for u, _ in found]), np.stack([e for _, e in found])) if found else (empty, empty)


def every_step(m: Measurements) -> Mask:
    """All steps, as a mask [T]."""
    return np.ones(m.steps, np.bool_)


def span(m: Measurements, first: int, last: int) -> Mask:
    """The steps first .. last-1, counted from 0, as a mask [T]."""
    steps = np.arange(m.steps)
    return np.asarray((steps >= first) & (steps < last))


def thirds(m: Measurements) -> list[tuple[int, int]]:
    """(first, end) of the thirds of training, counted from 0; fewer where there are fewer than three steps."""
    count = min(3, m.steps)
    return [(m.steps * w // count, m.steps * (w + 1) // count) for w in range(count)]


def task_interval(values: Array, errors: Array) -> Interval:
    """Mean over seeds with its t interval; of one seed the estimate with the error of the prompts drawn in it."""
    if len(values) == 1:
        reach = float(stats.norm.ppf(1 - ALPHA / 2) * errors[0])
        return Interval(float(values[0]), float(values[0]) - reach, float(values[0]) + reach)
    return t_interval(values)


def times(value: float, low: float, high: float) -> str:
    """A ratio for a sentence: 18 (95% interval 9.1 to 36), or what is known of it."""
    if math.isnan(low):
        return f"{significant(value)} (no interval)"
    if math.isinf(high):
        quiet = "the quietest is not told apart from zero"
        known = f"at least {significant(low)}, {1 - ALPHA / 2:.1%} sure; {quiet}" if low > 0 else f"no bound; {quiet}"
        return f"an unknown number of ({known})" if math.isnan(value) else f"{significant(value)} ({known})"
    return f"{significant(value)} ({LEVEL:.0%} interval {significant(low)} to {significant(high)})"
