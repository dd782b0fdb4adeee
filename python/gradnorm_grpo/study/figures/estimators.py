"""Question 6, estimators: bias and spread of three estimates of U against n, and what a sketch loses and costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from .canvas import EDGE, FAINT, INK, PALETTE, PAPER, WIDTH, Entry, Sheet, legend_height
from .data import Record, records, some, triple
from .rows import AXIS, empty
from .scales import at, finite, holding_zero, logarithmic, numbers

_HIGH, _LEFT, _GAP, _HEAD = 190.0, 58.0, 26.0, 24.0
#: What a sketch would replace: key of its seconds, label, colour.
_EXACT = (
    ("exact", "exact inner products of all prompts", PALETTE[0]),
    ("norms", "exact norms of one micro-batch", PALETTE[2]),
)
_OWN_ERROR = [("--", PALETTE[0], True, "as large as the prompts' own error")]
_ZERO = 1e-9  # of the largest: a spread below it is rounding
_SHADES = {"cross-product": PALETTE[0], "plug-in": PALETTE[1], "two-batch": PALETTE[2]}
_MARKS = {"cross-product": "o", "plug-in": "D", "two-batch": "s"}


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    by_n = some(records(answer, "by_n"), "relative_bias", "relative_sd")
    sketches = some(records(answer, "sketches"), "sd_over_se", "seconds")
    names = list(dict.fromkeys(_plain(r) for r in by_n))
    panel = _HEAD + _HIGH + AXIS + 8
    first = 24 + panel if by_n else 60.0
    wide = (WIDTH - 2 * EDGE - 2 * _LEFT - _GAP) / 2
    costs = _costs(sketches)
    second = panel + legend_height(costs, wide) if sketches else 60.0
    sheet = Sheet(
        str(answer.get("question")), str(answer.get("verdict") or ""), _notes(answer, by_n, sketches), first + second
    )
    left, right = EDGE + _LEFT, EDGE + 2 * _LEFT + _GAP + wide
    if by_n:
        sheet.legend(EDGE, 0, _key(names), WIDTH - 2 * EDGE)
        for x, title, field, low, high in (
            (left, "Bias", "relative_bias", True, "bias"),
            (right, "Spread", "relative_sd", False, "standard deviation"),
        ):
            sheet.subtitle(x, 24, f"{title}, as a multiple of U")
            axes = sheet.axes(x, 24 + _HEAD, wide, _HIGH)
            _curves(axes, by_n, names, field, zero=low)
            axes.set_xlabel("n, prompts of the task")
            axes.set_ylabel(f"{high} / U")
    else:
        empty(sheet, EDGE, 0, WIDTH - 2 * EDGE, 60, "The estimators were not compared.")
    if sketches:
        sheet.subtitle(left, first, "Error that a sketch adds, worst task")
        _sketch_errors(sheet.axes(left, first + _HEAD, wide, _HIGH), sketches)
        sheet.legend(left, first + _HEAD + _HIGH + AXIS, _OWN_ERROR, wide)
        sheet.subtitle(right, first, "Its cost")
        sheet.legend(right, first + _HEAD + _HIGH + AXIS, costs, wide)
        _sketch_costs(sheet.axes(right, first + _HEAD, wide, _HIGH), sketches)
    else:
        empty(sheet, EDGE, first, WIDTH - 2 * EDGE, 60, "No sketch was measured.")
    return sheet


def _plain(record: Record) -> str:
    return str(record.get("estimator")).replace("_", "-")


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of an estimator; one that has no fixed ones takes them by its place."""
    kind = next((k for k in _SHADES if name.startswith(k)), None)
    if kind:
        return _SHADES[kind], _MARKS[kind]
    place = list(names).index(name)
    return PALETTE[(3 + place) % len(PALETTE)], "^v<>"[place % 4]


def _key(names: Sequence[str]) -> list[Entry]:
    entries: list[Entry] = []
    for name in names:
        shade, mark = _style(name, names)
        entries.append((mark, shade, True, name))
    return [*entries, ("-", FAINT, True, "faint lines: single tasks")]


def _curves(axes: Axes, by_n: Sequence[Record], names: Sequence[str], field: str, *, zero: bool) -> None:
    """A line an estimator and task over n; that over all tasks in front."""
    values = numbers(r.get(field) for r in by_n)
    n = numbers(r.get("n") for r in by_n)
    logarithmic(axes, "x", n, 1.15)
    at(axes, "x", sorted(set(finite(n))))
    if zero:
        holding_zero(axes, "y", values, values)
    else:
        values = np.where(values > _ZERO * np.nanmax(values), values, np.nan)
        logarithmic(axes, "y", values, 1.4)
    tasks = list(dict.fromkeys(r.get("task") for r in by_n))
    for name in names:
        shade, mark = _style(name, names)
        for task in sorted(tasks, key=str):
            own = [i for i, r in enumerate(by_n) if _plain(r) == name and r.get("task") == task]
            own.sort(key=lambda i: n[i])
            x, y = n[own], values[own]
            strong = task is None or tasks == [task]
            if strong:  # the first named lies in front, thinner, so that what it lies on is seen behind it
                under = list(names).index(name)
                size, line = 6.0 + 2.5 * under, 2.0 + 1.2 * under
                axes.plot(x, y, color=shade, lw=line, marker=mark, ms=size, mec=PAPER, mew=0.8, zorder=9 - under)
            else:
                axes.plot(x, y, color=shade, lw=0.9, alpha=0.35, zorder=2)


def _sketch_errors(axes: Axes, sketches: Sequence[Record]) -> None:
    """The error that a sketch adds to the worst task's U, by U's own standard error: at 1 it is as large as that."""
    width = numbers(s.get("width") for s in sketches)
    found = np.array([triple(s, "sd_over_se", "sd_over_se_low", "sd_over_se_high") for s in sketches])
    logarithmic(axes, "x", width, 1.3)
    at(axes, "x", sorted(set(finite(width))))
    logarithmic(axes, "y", np.append(found.ravel(), 1.0), 1.5)
    axes.axhline(1, color=PALETTE[0], lw=2, ls="--", zorder=2)
    axes.plot(width, found[:, 0], color=INK, lw=1.6, marker="o", ms=7, zorder=3)
    known = np.isfinite(found).all(axis=1)
    axes.vlines(width[known], found[known, 1], found[known, 2], color=INK, lw=2)
    axes.set_xlabel("width of the sketch")
    axes.set_ylabel("error / standard error of U")


def _costs(sketches: Sequence[Record]) -> list[Entry]:
    """The key of the panel of costs: what of _EXACT was timed."""
    timed = [(label, shade) for key, label, shade in _EXACT if some(list(map(dict, sketches)), f"{key}_seconds")]
    return [("o", INK, True, "sketches"), *(("--", shade, True, label) for label, shade in timed)]


def _sketch_costs(axes: Axes, sketches: Sequence[Record]) -> None:
    """Seconds of each sketch on the same widths, and as lines those of what it would replace."""
    width, seconds = (numbers(s.get(k) for s in sketches) for k in ("width", "seconds"))
    exact = {key: numbers(s.get(f"{key}_seconds") for s in sketches) for key, _, _ in _EXACT}
    logarithmic(axes, "x", width, 1.3)
    at(axes, "x", sorted(set(finite(width))))
    logarithmic(axes, "y", np.concatenate([seconds, *exact.values()]), 1.6)
    axes.plot(width, seconds, color=INK, lw=1.6, marker="o", ms=7, zorder=3)
    for key, _, shade in _EXACT:
        known = finite(exact[key])
        if known.size:
            axes.axhline(known[0], color=shade, lw=2, ls="--", zorder=2)
    axes.set_xlabel("width of the sketch")
    axes.set_ylabel("seconds")


def _notes(answer: Record, by_n: Sequence[Record], sketches: Sequence[Record]) -> list[str]:
    notes: list[str] = []
    data = answer.get("data") or {}
    if data.get("reference") and by_n:
        notes.append(f"What counts as the truth: {data['reference']}.")
    if by_n:
        notes.append("The axis of the bias is linear in the shaded part, logarithmic outside it.")
    if by_n and any(r.get("task") is None for r in by_n):
        notes.append("Bold lines: the median of the tasks whose U is told apart from zero.")
    if sketches:
        notes.append("Bars of the sketches: 95% intervals over the sketches drawn.")
    return notes or [str(answer.get("sentence") or "")]
