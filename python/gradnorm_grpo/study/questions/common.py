"""What the questions share: the form of an answer, its words, and how a figure or the page reads it again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ...numbers import clean, fixed, significant
from ..measurements import Measurements, Run
from ..stats import ALPHA, FEWEST_TASKS, LEVEL, Correlation, t_interval

BASELINE = "uniform"
VERDICTS = ("supported", "contradicted", "undecided")
Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a question's data say: verdict on its claim, a sentence, numbers with intervals, and a figure's data."""

    verdict: str
    sentence: str
    numbers: list[dict[str, Any]]
    data: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse a verdict that is not one of the three."""
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


def bounds(found: Any, value: str = "value") -> dict[str, float]:
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


def with_interval(found: Correlation) -> str:
    """0.62 (95% interval 0.31 to 0.93); says so where there is no interval."""
    if math.isnan(found.low):
        return f"{fixed(found.value)} (no interval)"
    return f"{fixed(found.value)} ({LEVEL:.0%} interval {fixed(found.low)} to {fixed(found.high)})"


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


# Reading an answer again: lists may be empty or missing, numbers may be unknown


def answer_of(answers: Record, name: str) -> dict[str, Any]:
    """The answer with this id, or one that says that there is none."""
    for answer in answers.get("answers") or []:
        if answer.get("id") == name:
            return dict(answer)
    missing = {"verdict": "undecided", "sentence": "This question was not asked of these data."}
    return {"id": name, "question": name.replace("_", " "), **missing}


def records(answer: Record, key: str) -> list[dict[str, Any]]:
    """A list of the answer's data; empty where there is none."""
    found = (answer.get("data") or {}).get(key)
    return [dict(r) for r in found if isinstance(r, Mapping)] if isinstance(found, list | tuple) else []


def some(part: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The records, or none where no record has a number under any of the keys: then nothing can be drawn."""
    return list(part) if any(math.isfinite(value_of(r, key)) for r in part for key in keys) else []


def value_of(record: Record | None, key: str = "value") -> float:
    """A number of the record, NaN where it is not known."""
    value = (record or {}).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def triple(record: Record | None, value: str = "value", low: str = "low", high: str = "high") -> tuple[float, ...]:
    """A value and its interval, NaN where they are not known."""
    return value_of(record, value), value_of(record, low), value_of(record, high)


def ordered(answers: Record, key: str, *found: Iterable[Record], name: str) -> list[str]:
    """The study's tasks (or arms) that occur in the records: those the study names, in its order, then any others."""
    present = list(dict.fromkeys(str(r[name]) for part in found for r in part if r.get(name) is not None))
    known = [str(n) for n in answers.get(key) or []]
    return [n for n in known if n in present] + [n for n in present if n not in known]


def index(answers: Record, key: str, name: object) -> int:
    """The place of a task (or arm) in the study, which determines its colour in every figure."""
    known = [str(n) for n in answers.get(key) or []]
    return known.index(str(name)) if str(name) in known else len(known)


def spelled(found: Sequence[float], decimals: int | None = None) -> str:
    """value (low to high), with so many decimals or two significant digits; (over low) without a known high."""
    value, low, high = found

    def one(x: float) -> str:
        return significant(x) if decimals is None else fixed(x, decimals)

    if not math.isfinite(low):
        return one(value) if math.isfinite(value) else "not known"
    ends = f"{one(low)} to {one(high)}" if math.isfinite(high) else f"over {one(low)}"
    return f"{one(value)} ({ends})" if math.isfinite(value) else ends


def correlations(answer: Record, where: str) -> list[str]:
    """What is known of the correlations there, one line each: "Spearman, held-out: 0.14 (-0.70 to 0.80)"."""
    lines = []
    for record in records(answer, "correlations"):
        place = str(record.get("where"))
        if place.startswith(where) and math.isfinite(value_of(record)):
            which = place[len(where) :].strip(" ()")
            kind = f"{record.get('kind')}, {which}:" if which else f"{record.get('kind')}:"
            lines.append(clean(f"{kind} {spelled(triple(record), 2)}"))
    return lines
