"""Reading what an answer gives its picture: lists that may be empty or missing, numbers that may not be known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
IDS = ("imbalance", "last_block", "gain", "explain", "arms", "estimators")


def answer_of(answers: Record, name: str) -> dict[str, Any]:
    """The answer with this id, or one that says that there is none."""
    for answer in answers.get("answers") or []:
        if answer.get("id") == name:
            return dict(answer)
    return {
        "id": name,
        "question": name.replace("_", " "),
        "verdict": "undecided",
        "sentence": "This question was not asked of these data.",
    }


def records(answer: Record, key: str) -> list[dict[str, Any]]:
    """A list of the answer's data; empty where there is none."""
    found = (answer.get("data") or {}).get(key)
    return [dict(r) for r in found if isinstance(r, Mapping)] if isinstance(found, list | tuple) else []


def some(part: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The records, or none where no record has a number under any of the keys: then nothing can be drawn."""
    return part if any(math.isfinite(number(r, key)) for r in part for key in keys) else []


def number(record: Record | None, key: str) -> float:
    """A number of the record, NaN where it is not known."""
    value = (record or {}).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def triple(record: Record | None, value: str = "value", low: str = "low", high: str = "high") -> tuple[float, ...]:
    """A value and its interval, NaN where they are not known."""
    return number(record, value), number(record, low), number(record, high)


def ordered(answers: Record, key: str, *found: Sequence[Record], name: str) -> list[str]:
    """The study's tasks (or arms) that occur in the records: those the study names, in its order, then any others."""
    present = list(dict.fromkeys(str(r[name]) for part in found for r in part if r.get(name) is not None))
    known = [str(n) for n in answers.get(key) or []]
    return [n for n in known if n in present] + [n for n in present if n not in known]


def index(answers: Record, key: str, name: str) -> int:
    """The place of a task (or arm) in the study, which fixes its colour in every picture."""
    known = [str(n) for n in answers.get(key) or []]
    return known.index(name) if name in known else len(known)
