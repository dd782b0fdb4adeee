"""Question 2, last_block: U of the last attention block against that of all parameters, same and disjoint rollouts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...plots import thin
from ...runlog import Array
from .canvas import EDGE, INK, SMALL, SOFT, WIDTH, Entry, Sheet, colour, legend_height
from .data import Record, index, number, ordered, records, triple
from .points import MOST, crosses, dots, key
from .rows import AXIS, empty, spelled
from .scales import logarithmic, numbers

_PANELS = (("points", "Same rollouts", "same rollouts"), ("disjoint", "Disjoint rollouts", "disjoint rollouts"))
_LEFT, _HIGH, _LINE = 62.0, 300.0, 16.0


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    parts = {name: records(answer, name) for name, _, _ in _PANELS}
    tasks = ordered(answers, "tasks", *parts.values(), name="task")
    places = [index(answers, "tasks", task) for task in tasks]
    known = {name: [r for r in part if _positive(r)] for name, part in parts.items()}
    fit = (answer.get("data") or {}).get("fit") or {}
    texts = {name: _correlations(answer, where) for name, _, where in _PANELS}
    head = 30 + _LINE * max(len(t) for t in texts.values())
    entries = key(tasks, places) + _fit_entry(fit)
    body = head + _HIGH + AXIS + 6 + legend_height(entries, WIDTH - 2 * EDGE - _LEFT) if tasks else 90.0
    sheet = Sheet(str(answer.get("question")), str(answer.get("verdict") or ""), _notes(answer, parts, known), body)
    if not tasks:
        empty(
            sheet,
            EDGE,
            10,
            WIDTH - 2 * EDGE,
            70,
            "U of the last block and of all parameters were not measured together.",
        )
        return sheet
    wide = (WIDTH - 2 * EDGE - _LEFT - 34) / 2
    everything = [r for part in known.values() for r in part]
    for i, (name, title, _) in enumerate(_PANELS):
        left = EDGE + _LEFT + i * (wide + 34)
        sheet.subtitle(left, 0, title)
        for j, text in enumerate(texts[name]):
            sheet.text(left, sheet.top + 22 + _LINE * (j + 0.5), text, fontsize=SMALL, color=SOFT)
        if not known[name]:
            empty(sheet, left, head, wide, _HIGH, "No point with both U above zero.")
            continue
        axes = sheet.axes(left, head, wide, _HIGH)
        low, high = logarithmic(axes, "x", _column(everything, "full"), 1.6)
        logarithmic(axes, "y", _column(everything, "last"), 1.6)
        axes.set_xlabel("U of all parameters")
        if i == 0:
            axes.set_ylabel("U of the last attention block")
        else:
            axes.set_yticklabels([])
        chosen = [known[name][k] for k in thin(len(known[name]), MOST)]
        for task, place in zip(tasks, places, strict=True):
            own = [r for r in chosen if str(r.get("task")) == task]
            x, y = _column(own, "full"), _column(own, "last")
            dx, dy = 2 * _column(own, "full_se"), 2 * _column(own, "last_se")
            crosses(axes, x, y, np.stack([x - dx, x + dx]), np.stack([y - dy, y + dy]), colour(place), 0.8, 0.12)
            dots(axes, x, y, place, size=5.5)
        slope, intercept = number(fit, "slope"), number(fit, "intercept")
        if name == "disjoint" and math.isfinite(slope) and math.isfinite(intercept):
            ends = np.array([low, high])
            bounds = axes.get_ylim()
            axes.plot(ends, 10.0 ** (intercept + slope * np.log10(ends)), color=INK, lw=1.6, zorder=2.5)
            axes.set_ylim(*bounds)
    sheet.legend(EDGE + _LEFT, head + _HIGH + AXIS + 6, entries, WIDTH - 2 * EDGE - _LEFT)
    return sheet


def _column(part: list[dict[str, object]], name: str) -> Array:
    return numbers(r.get(name) for r in part)


def _fit_entry(fit: Record) -> list[Entry]:
    return [("-", INK, True, "least squares, disjoint rollouts")] if math.isfinite(number(fit, "slope")) else []


def _positive(record: Record) -> bool:
    return number(record, "last") > 0 and number(record, "full") > 0


def _correlations(answer: Record, where: str) -> list[str]:
    """What is known of the correlation of these points, a line each."""
    found = [r for r in records(answer, "correlations") if r.get("where") == where]
    return [f"{r.get('kind')}: {spelled(triple(r), 2)}" for r in found if math.isfinite(number(r, "value"))]


def _notes(answer: Record, parts: dict[str, list[dict[str, Any]]], known: dict[str, list[dict[str, Any]]]) -> list[str]:
    if not any(parts.values()):
        return [str(answer.get("sentence") or "")]
    notes = [
        "A point: one task in one part of one run, with two standard errors. Same rollouts: both U from the same "
        "prompts, whose chance they share. Disjoint rollouts: from different steps; the verdict is about these."
    ]
    for name, _, where in _PANELS:
        below = len(parts[name]) - len(known[name])
        facts = []
        if below:
            facts.append(
                f"{below} of {len(parts[name])} points have a U at or below zero, which these axes cannot show"
            )
        if len(known[name]) > MOST:
            facts.append(f"{MOST} of the {len(known[name])} others are drawn, evenly chosen")
        if facts:
            notes.append(f"{where.capitalize()}: {'; '.join(facts)}.")
    return notes
