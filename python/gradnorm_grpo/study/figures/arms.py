"""Question 5, arms: what each way of drawing and weighing the tasks does to held-out accuracy, paired with uniform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from .canvas import EDGE, INK, PALETTE, SHADE, SMALL, SOFT, WIDTH, Entry, Sheet, legend_height
from .data import Record, index, number, ordered, records, some, triple
from .rows import AXIS, empty, interval, name_width, rows
from .scales import finite, linear, numbers

_MEAN, _MEAN_AVERAGE = "mean, at the end", "mean, average over training"
_STEP = 12.0  # pixels between the arms of a row
_CURVES = 170.0


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    final, differences = (some(records(answer, part), "value") for part in ("final", "differences"))
    baseline = (answer.get("data") or {}).get("baseline")
    curves = [
        c for c in records(answer, "curves") if c.get("task") is None and finite(numbers(c.get("value") or [])).size
    ]
    arms = ordered(answers, "arms", final, differences, curves, name="arm")
    others = [a for a in arms if a != baseline]
    tasks = ordered(answers, "tasks", final, differences, name="task")
    names = [_MEAN, *([_MEAN_AVERAGE] if any(d.get("when") == "average" for d in differences) else []), *tasks]
    row = 14 + _STEP * max(len(arms), 1)
    entries = key(answers, arms, baseline)
    above = legend_height(entries, WIDTH - 2 * EDGE) + 4
    top = above + 24
    upper = top + row * len(names) + AXIS if arms else 90.0
    lower = 30 + _CURVES + AXIS if curves else 0.0
    sheet = Sheet(str(answer.get("question")), str(answer.get("verdict") or ""), _notes(answer, arms), upper + lower)
    if not arms:
        empty(sheet, EDGE, 10, WIDTH - 2 * EDGE, 70, "No arm has a held-out accuracy.")
        return sheet
    sheet.legend(EDGE, 0, entries, WIDTH - 2 * EDGE)
    gutter = name_width(names, 190)
    wide = (WIDTH - 2 * EDGE - gutter - 46) / 2
    against = f"Minus {baseline}" if baseline else "Differences"
    sheet.subtitle(EDGE + gutter, above, f"{against}, paired by seed" if baseline else against)
    sheet.subtitle(EDGE + gutter + wide + 30, above, "Held-out accuracy at the end")
    axes = rows(sheet, EDGE, top, gutter + wide, names, row, gutter)
    found = [d for d in differences if d.get("arm") in others]
    if found:
        linear(axes, "x", np.array([triple(d) for d in found]).ravel(), zero=True)
        axes.set_xlabel("difference of held-out accuracy")
        _fill(axes, answers, found, others, names, row, baseline)
    else:
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.text(0.5, 0.5, "nothing to compare with", transform=axes.transAxes, ha="center", color=SOFT)
    axes = rows(sheet, EDGE + gutter + wide + 30, top, wide, names, row, 0)
    linear(axes, "x", np.array([triple(f) for f in final]).ravel())
    axes.set_xlabel("held-out accuracy")
    _fill(axes, answers, final, arms, names, row, baseline)
    if curves:
        _curves(sheet, answers, curves, upper, baseline)
    return sheet


def shade(answers: Record, arm: str, baseline: object) -> str:
    """The arm's colour: ink for what the others are compared with."""
    return INK if arm == baseline else PALETTE[index(answers, "arms", arm) % len(PALETTE)]


def key(answers: Record, arms: Sequence[str], baseline: object) -> list[Entry]:
    """The entries of a legend of the arms."""
    return [("s" if a == baseline else "o", shade(answers, a, baseline), True, a) for a in arms]


def mean_differences(axes: Axes, answers: Record, answer: Record, arms: Sequence[str], row: float) -> None:
    """A row of so many pixels an arm: the difference of mean held-out accuracy at the end, and below it each seed's."""
    found = {
        d.get("arm"): d for d in records(answer, "differences") if d.get("task") is None and d.get("when") == "end"
    }
    linear(axes, "x", np.array([triple(found.get(a)) for a in arms]).ravel(), zero=True, most=4)
    for y, arm in enumerate(arms):
        record = found.get(arm) or {}
        values = numbers(s.get("value") for s in record.get("per_seed") or [])
        axes.plot(
            values, np.full(values.size, y + 12 / row), ls="none", marker="|", ms=7, color=SOFT, mew=1.2, zorder=3
        )
        interval(axes, y, triple(record), shade(answers, arm, None), size=9, width=3)


def _shaded(axes: Axes, names: Sequence[str]) -> None:
    """A ground behind the rows of the means, which the verdict is about."""
    means = sum(name in (_MEAN, _MEAN_AVERAGE) for name in names)
    axes.axhspan(-0.5, means - 0.5, color=SHADE, lw=0, zorder=0)


def _fill(
    axes: Axes,
    answers: Record,
    found: Sequence[Record],
    arms: Sequence[str],
    names: Sequence[str],
    row: float,
    baseline: object,
) -> None:
    """The intervals of every record on its row, the arms below each other in it."""
    _shaded(axes, names)
    for record in found:
        task, arm = record.get("task"), str(record.get("arm"))
        average = record.get("when") == "average"
        if task is not None and average:
            continue
        name = str(task) if task is not None else _MEAN_AVERAGE if average else _MEAN
        if name not in names or arm not in arms:
            continue
        y = names.index(name) + (list(arms).index(arm) - (len(arms) - 1) / 2) * _STEP / row
        strong = task is None
        mark = "s" if arm == baseline else "o"
        interval(
            axes,
            y,
            triple(record),
            shade(answers, arm, baseline),
            mark=mark,
            size=7 if strong else 5.5,
            width=2.6 if strong else 1.5,
        )


def _curves(sheet: Sheet, answers: Record, curves: Sequence[Record], top: float, baseline: object) -> None:
    """Mean held-out accuracy of every arm over training."""
    sheet.subtitle(EDGE + 52, top, "Held-out accuracy over training, mean over tasks and seeds")
    axes = sheet.axes(EDGE + 52, top + 28, WIDTH - 2 * EDGE - 70, _CURVES)
    parts = [numbers(c.get(k) or []) for c in curves for k in ("value", "low", "high")]
    linear(axes, "y", np.concatenate(parts))
    linear(axes, "x", np.concatenate([numbers(c.get("steps") or []) for c in curves]), most=8)
    for i, curve in enumerate(curves):
        steps, value, low, high = (numbers(curve.get(k) or []) for k in ("steps", "value", "low", "high"))
        arm = str(curve.get("arm"))
        if not steps.size == value.size == low.size == high.size:
            continue
        own = shade(answers, arm, baseline)
        # Beside each other by some pixels: the arms' intervals would hide one another.
        beside = ScaledTranslation((i - (len(curves) - 1) / 2) * 5 / 72, 0, sheet.figure.dpi_scale_trans)
        place = axes.transData + beside
        axes.plot(
            steps, value, color=own, lw=1.8, marker="s" if arm == baseline else "o", ms=5, zorder=3, transform=place
        )
        axes.vlines(steps, low, high, color=own, lw=1.2, alpha=0.6, zorder=2, transform=place)
    axes.set_xlabel("step", fontsize=SMALL)


def _notes(answer: Record, arms: Sequence[str]) -> list[str]:
    if not arms:
        return [str(answer.get("sentence") or "")]
    rollouts = [number(r, "rollouts") for r in records(answer, "rollouts")]
    known = [r for r in rollouts if math.isfinite(r)]
    budget = ""
    if known:
        low, high = min(known), max(known)
        budget = f" Rollouts a run: {low:,.0f}." if low == high else f" Rollouts a run: {low:,.0f} to {high:,.0f}."
    return ["Bars are 95% intervals over seeds; none are drawn where there is one seed." + budget]
