"""How a figure or the page reads an answer again: whatever is missing or unknown is an empty list, "" or NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...numbers import clean, fixed, significant

Answers: TypeAlias = Mapping[str, Any]  # the content of answers.json


class Row(dict[str, Any]):
    """A record of an answer's data: ``row[key]`` is NaN where the key is missing or null, ``row.get(key)`` None."""

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        return math.nan if value is None else value

    def rows(self, key: str) -> list[Row]:
        """A list of records; empty where there is none."""
        return self.get(key) or []

    def interval(self, name: str = "") -> tuple[float, float, float]:
        """The numbers value, low and high; with a ``name`` those under it, name_low and name_high."""
        value, low, high = (f"{name}{end}" for end in ("", "_low", "_high")) if name else ("value", "low", "high")
        return self[value], self[low], self[high]


@dataclass(frozen=True)
class Reading:
    """One answer, and the study's tasks, arms and seeds, in the study's order."""

    id: str
    question: str
    verdict: str
    sentence: str
    claim: str
    numbers: list[Row]
    data: Row
    tasks: list[str]
    arms: list[str]
    seeds: list[int]

    def rows(self, key: str, *known: str) -> list[Row]:
        """A list of the data; with ``known``, an empty one where no record has a number under any of these keys."""
        found = self.data.rows(key)
        return found if not known or any(math.isfinite(row[k]) for row in found for k in known) else []

    def names(self, key: str, *found: Sequence[Row]) -> list[str]:
        """The tasks (key "task") or arms ("arm") of the records: those the study names, in its order, then others."""
        present = list(dict.fromkeys(row[key] for part in found for row in part if row.get(key) is not None))
        known = self.tasks if key == "task" else self.arms
        return [n for n in known if n in present] + [n for n in present if n not in known]

    def place(self, name: str, key: str = "task") -> int:
        """The place of a task or an arm in the study, which determines its colour in every figure."""
        known = self.tasks if key == "task" else self.arms
        return known.index(name) if name in known else len(known)

    def correlations(self, where: str) -> list[str]:
        """What is known of the correlations there, a line each: "Spearman, held-out: 0.14 (-0.70 to 0.80)"."""
        lines = []
        for row in self.rows("correlations"):
            place = str(row["where"])
            if place.startswith(where) and math.isfinite(row["value"]):
                which = place[len(where) :].strip(" ()")
                kind = f"{row['kind']}, {which}:" if which else f"{row['kind']}:"
                lines.append(clean(f"{kind} {spelled(row.interval(), 2)}"))
        return lines


def reading(answers: Answers, name: str) -> Reading:
    """The answer with this id, or one that says that there is none."""
    missing = {"verdict": "undecided", "sentence": "This question was not asked of these data."}
    found = next((a for a in answers.get("answers") or [] if a.get("id") == name), missing)
    texts = {key: str(found.get(key) or "") for key in ("verdict", "sentence", "claim")}
    return Reading(
        id=name,
        question=str(found.get("question") or name.replace("_", " ")),
        **texts,
        numbers=_read(found.get("numbers") or []),
        data=_read(found.get("data") or {}),
        tasks=[str(task) for task in answers.get("tasks") or []],
        arms=[str(arm) for arm in answers.get("arms") or []],
        seeds=list(answers.get("seeds") or []),
    )


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Row({key: _read(own) for key, own in value.items()})
    if isinstance(value, (list, tuple)):
        return [math.nan if own is None else _read(own) for own in value]
    return value


def spelled(found: Sequence[float], decimals: int | None = None) -> str:
    """value (low to high), with so many decimals or two significant digits; (over low) without a known high."""
    value, low, high = found

    def one(x: float) -> str:
        return significant(x) if decimals is None else fixed(x, decimals)

    if not math.isfinite(low):
        return one(value) if math.isfinite(value) else "not known"
    ends = f"{one(low)} to {one(high)}" if math.isfinite(high) else f"over {one(low)}"
    return f"{one(value)} ({ends})" if math.isfinite(value) else ends
