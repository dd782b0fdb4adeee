"""Question 4, explain: rank correlations of U with reward, |advantage| and lengths, and the means behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .canvas import EDGE, INK, SMALL, SOFT, WIDTH, Sheet, legend_height
from .data import Record, index, number, ordered, records, some, triple
from .points import dots, key
from .rows import AXIS, beside, empty, interval, name_width, rows, spelled
from .scales import at, finite, holding_zero, linear, numbers

_ROW, _SMALL, _GAP, _LEFT = 40.0, 150.0, 14.0, 52.0
_SIDES = (("across", "Across tasks"), ("within", "Within tasks"))


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    factors, means = records(answer, "factors"), some(records(answer, "tasks"), "u")
    if not any(math.isfinite(number(f.get(side), "value")) for f in factors for side, _ in _SIDES):
        factors = []
    tasks = ordered(answers, "tasks", means, name="task")
    entries = key(tasks, [index(answers, "tasks", t) for t in tasks])
    shown = [f for f in records(answer, "factors") if finite(numbers(r.get(str(f.get("name"))) for r in means)).size]
    upper = 24 + _ROW * len(factors) + AXIS if factors else 80.0
    lower = 36 + _SMALL + AXIS + legend_height(entries, WIDTH - 2 * EDGE) + 4 if shown else 0.0
    notes = [
        "Spearman's rank correlation with its 95% interval. Filled: p below 0.05 after Holm's correction for the "
        "number of quantities; hollow: not told apart from zero."
        if factors
        else str(answer.get("sentence") or "")
    ]
    if shown:
        notes.append("Below: a point a task. A correlation by itself explains nothing.")
    sheet = Sheet(str(answer.get("question")), str(answer.get("verdict") or ""), notes, upper + lower)
    if factors:
        _forest(sheet, factors)
    else:
        empty(sheet, EDGE, 5, WIDTH - 2 * EDGE, 70, "No correlation is known.")
    if shown:
        _clouds(sheet, answers, shown, means, upper + 8)
        sheet.legend(EDGE, upper + 36 + _SMALL + AXIS, entries, WIDTH - 2 * EDGE)
    return sheet


def _forest(sheet: Sheet, factors: Sequence[Record]) -> None:
    """Two columns of intervals, across and within tasks, on the rows of the quantities."""
    names = [_label(f) for f in factors]
    gutter, room = name_width(names, 150), 150.0
    wide = (WIDTH - 2 * EDGE - gutter - 2 * room - 8) / 2
    for i, (side, title) in enumerate(_SIDES):
        left = EDGE + gutter + i * (wide + room + 8)
        sheet.subtitle(left, 0, title)
        axes = rows(
            sheet, left - (0 if i else gutter), 24, wide + (0 if i else gutter), names, _ROW, 0 if i else gutter
        )
        axes.set_xlim(-1.06, 1.06)
        at(axes, "x", [0.0, -1.0, 1.0, -0.5, 0.5])
        axes.axvline(0, color=INK, lw=1, zorder=1.5)
        axes.set_xlabel("rank correlation with U")
        for y, factor in enumerate(factors):
            found = factor.get(side) or {}
            p = number(found, "p_holm")
            interval(axes, y, triple(found), INK, filled=p < 0.05, size=9, width=2.4)
            beside(axes, y - 0.2, spelled(triple(found), 2))
            if math.isfinite(p):
                beside(axes, y + 0.2, f"p = {p:.2f} (Holm)" if p >= 0.01 else "p < 0.01 (Holm)")


def _clouds(sheet: Sheet, answers: Record, factors: Sequence[Record], means: Sequence[Record], top: float) -> None:
    """U of every task against each quantity, side by side on one axis of U."""
    sheet.subtitle(EDGE, top, "U of each task against the means over its runs")
    wide = (WIDTH - 2 * EDGE - _LEFT - _GAP * (len(factors) - 1)) / max(len(factors), 1)
    u = numbers(r.get("u") for r in means)
    for i, factor in enumerate(factors):
        axes = sheet.axes(EDGE + _LEFT + i * (wide + _GAP), top + 28, min(wide, 240), _SMALL)
        x = numbers(r.get(str(factor.get("name"))) for r in means)
        linear(axes, "x", x, most=3)
        holding_zero(axes, "y", u, u)
        axes.set_xlabel(_label(factor), fontsize=SMALL)
        if i:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("U", color=SOFT)
        for j, record in enumerate(means):
            dots(axes, x[j : j + 1], u[j : j + 1], index(answers, "tasks", str(record.get("task"))), size=8.5)


def _label(factor: Record) -> str:
    return str(factor.get("label") or str(factor.get("name")).replace("_", " "))
