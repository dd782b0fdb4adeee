"""What the questions share: the form of an answer, its numbers and its words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...numbers import fixed
from ..decision import NO_DIFFERENCE
from ..measurements import Measurements, Run
from ..stats import ALPHA, FEWEST_TASKS, LEVEL, Correlation, Interval, Ratio, t_interval

BASELINE = "uniform"
VERDICTS = ("supported", "contradicted", NO_DIFFERENCE, "undecided")


@dataclass(frozen=True)
class Answer:
    """What a question's data say: verdict on its claim, a sentence, numbers with intervals, and a figure's data.

    ``claim``: what the verdict is about, where that is not the question's CLAIM.
    """

    verdict: str
    sentence: str
    numbers: list[dict[str, Any]]
    data: dict[str, Any]
    claim: str = ""

    def __post_init__(self) -> None:
        """Refuse a verdict that is not one of VERDICTS."""
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")


# Numbers


def number(name: str, value: float, low: float = math.nan, high: float = math.nan, how: str = "") -> dict[str, Any]:
    """One entry of an answer's ``numbers``; ``how``: over which points, and where the interval comes from."""
    level = None if math.isnan(low) and math.isnan(high) else LEVEL
    return {"name": name, "value": float(value), "low": float(low), "high": float(high), "level": level, "how": how}


def over_seeds(name: str, values: Sequence[float], what: str = "", correlation: bool = False) -> dict[str, Any]:
    """Mean of one number per seed, with its t interval; that of a ``correlation`` ends at -1 and 1."""
    found = t_interval(values)
    low, high = np.clip((found.low, found.high), -1, 1) if correlation else (found.low, found.high)
    return number(name, found.value, low, high, "; ".join(filter(None, (what, interval_over(values)))))


def correlation_number(name: str, found: Correlation, what: str) -> dict[str, Any]:
    """A correlation as an entry of ``numbers``; ``what`` says over which points and what p permutes."""
    p = f"; p = {p_value(found.p)} with {count_of(found.tasks, 'task')} as units" if math.isfinite(found.p) else ""
    return number(name, found.value, found.low, found.high, f"{what}; {interval_over(found.per_seed)}{p}")


def equivalence_numbers(
    question: str, margin: float, p: float, reliabilities: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The entries of "no correlation larger than d": its p, and the reliabilities that d is corrected by."""
    how = "odd against even steps, Spearman and Brown's formula; of gains one less their noise by their variance"
    rows = [number(f"reliability of {name}", value, how=how) for name, value in reliabilities.items()]
    how = (
        "largest p of two one-sided tests over seeds (t) and over tasks (Fisher's z), d times the root of reliabilities"
    )
    return [*rows, number(f"p that the correlation is beyond {margin:g}, {question}", p, how=how)]


def bounds(found: Interval | Ratio | Correlation, value: str = "value") -> dict[str, float]:
    """An Interval, Ratio or Correlation as a row's three numbers, under the key ``value`` and, from it, of the ends."""
    low, high = ("low", "high") if value == "value" else (f"{value}_low", f"{value}_high")
    return {value: found.value, low: found.low, high: found.high}


# Words


def interval_over(values: Sequence[float]) -> str:
    """How the interval of :func:`t_interval` was computed, or why there is none."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) > 1 and math.isnan(t_interval(values).low):
        return f"{len(known)} seeds, all with the same value: no spread to make an interval of"
    return f"t interval over {len(known)} seeds" if len(known) > 1 else f"{count_of(len(known), 'seed')}: no interval"


def count_of(n: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def p_value(p: float) -> str:
    """A probability for a sentence."""
    return "unknown" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def with_interval(found: Interval | Ratio | Correlation, write: Callable[[float], str] = fixed) -> str:
    """0.62 (95% interval 0.31 to 0.93); says so where there is no interval."""
    if math.isnan(found.low):
        return f"{write(found.value)} (no interval)"
    return f"{write(found.value)} ({LEVEL:.0%} interval {write(found.low)} to {write(found.high)})"


def scarce(m: Measurements, runs: Sequence[Run]) -> str:
    """Why no statement over seeds is possible, as a sentence; empty where one is."""
    if not runs:
        return "Undecided: no finished run was measured."
    if len({seed for _, seed in runs}) < 2:
        return "Undecided: with a single seed nothing is known about how far another seed would differ."
    if len(m.tasks) < FEWEST_TASKS:
        return (
            f"Undecided: of {count_of(len(m.tasks), 'task')} even a perfect order comes about by chance more than once "
            f"in twenty times; it takes {FEWEST_TASKS}."
        )
    return ""


def direction(found: Correlation) -> str:
    """The verdict on "the two go together": it takes seeds that agree, and p with enough tasks as units."""
    if not (found.sign and found.p < ALPHA and found.tasks >= FEWEST_TASKS):
        return "undecided"
    return "supported" if found.sign > 0 and found.value > 0 else "contradicted"
