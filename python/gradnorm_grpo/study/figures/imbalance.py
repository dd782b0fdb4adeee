"""Question 1, imbalance: every task's U over training beside the plug-in, and the loudest task over the quietest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .canvas import BAND, EDGE, INK, SMALL, SOFT, WIDTH, Sheet, colour, marker, text_width, tint
from .data import Record, index, number, ordered, records, some, triple
from .rows import AXIS, beside, empty, interval, name_width, rows, spelled
from .scales import holding_zero, logarithmic, numbers

_PLUG_IN = "D"


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    overall, windows = some(records(answer, "overall"), "value", "plug_in"), records(answer, "windows")
    tasks = loudest_first(answers, answer)
    ratios = some([r for r in records(answer, "ratios") if r.get("where")], "value", "low")
    row = 26.0 + 9.0 * len(windows)
    upper = 48 + row * len(tasks) + AXIS if tasks else 90.0
    lower = 44 + 24 * len(ratios) + AXIS - 10 if ratios else 60.0
    notes = [bars(answers)]
    if any(math.isfinite(number(r, "plug_in")) for r in overall):
        notes.append("The plug-in estimate is the squared norm of the mean gradient: it counts noise as signal.")
    if any(math.isfinite(number(r, "low")) and math.isnan(number(r, "high")) for r in ratios):
        notes.append("An arrow: only the lower end is known, since the quietest task's U cannot be told from zero.")
    sheet = Sheet(str(answer.get("question")), str(answer.get("verdict") or ""), notes, upper + lower)
    unit = (answer.get("data") or {}).get("unit")
    sheet.subtitle(EDGE, 0, f"U, the squared norm of the expected gradient: {unit or 'measured layers'}")
    if tasks:
        sheet.legend(EDGE, 22, _key(windows, overall), WIDTH - 2 * EDGE)
        gutter = name_width(tasks)
        axes = rows(sheet, EDGE, 48, WIDTH - 2 * EDGE - 12, tasks, row, gutter)
        pulls(axes, answers, answer, tasks, windows=bool(windows), row=row)
    else:
        empty(sheet, EDGE, 20, WIDTH - 2 * EDGE, 60, "U of no task is known.")
    sheet.subtitle(EDGE, upper, "Loudest over quietest task")
    if ratios:
        _ratios(sheet, answer, ratios, upper + 24 + 20)
    else:
        empty(sheet, EDGE, upper + 10, WIDTH - 2 * EDGE, 50, "No ratio of two tasks is known.")
    return sheet


def loudest_first(answers: Record, answer: Record) -> list[str]:
    """The tasks by U over training, those without one last."""
    overall = some(records(answer, "overall"), "value", "plug_in")
    found = {str(r.get("task")): number(r, "value") for r in overall}
    tasks = ordered(answers, "tasks", overall, some(records(answer, "by_window"), "value"), name="task")
    return sorted(tasks, key=lambda t: -found[t] if math.isfinite(found.get(t, math.nan)) else math.inf)


def pulls(axes: Axes, answers: Record, answer: Record, tasks: list[str], *, windows: bool, row: float) -> None:
    """U of every task along its row, on an axis that holds zero; with the windows of training below it if asked for."""
    overall = {str(r.get("task")): r for r in records(answer, "overall")}
    order = [r.get("window") for r in records(answer, "windows")] if windows else []
    parts = [r for r in records(answer, "by_window") if r.get("window") in order]
    found = {task: triple(overall.get(task)) for task in tasks}
    plug_in = numbers(overall.get(task, {}).get("plug_in") for task in tasks)
    steps = np.array([triple(r) for r in parts]).reshape(-1, 3)
    pooled = np.array([found[task] for task in tasks])
    sizes = np.concatenate([np.max(np.abs(np.nan_to_num(pooled)), axis=1), plug_in])
    holding_zero(axes, "x", np.concatenate([pooled.ravel(), steps.ravel(), plug_in]), sizes)
    axes.set_xlabel("U (linear in the shaded part, logarithmic outside it)" if row > 30 or not windows else "U")
    for y, task in enumerate(tasks):
        place = index(answers, "tasks", task)
        own, shape = colour(place), marker(place)
        top = y - 0.5 + 15 / row if order else float(y)
        axes.plot([plug_in[y]], [top], ls="none", marker=_PLUG_IN, ms=6.5, mfc="none", mec=SOFT, mew=1.4, zorder=3.5)
        interval(axes, top, found[task], own, mark=shape, size=9, width=3)
        for place, window in enumerate(order):
            part = next((r for r in parts if r.get("task") == task and r.get("window") == window), None)
            shade = tint(own, _strength(place, len(order)))
            interval(axes, top + (13 + 9 * place) / row, triple(part), shade, size=5, width=1.6)


def bars(answers: Record) -> str:
    """What the bars of U are, in a sentence."""
    if len(answers.get("seeds") or []) == 1:
        return "Bars are 95% intervals of the one seed: of its prompts, not of other seeds."
    return "Bars are 95% intervals over seeds."


def _strength(place: int, count: int) -> float:
    """How dark a window of training is drawn: the later the darker."""
    return 0.45 + 0.45 * (place / (count - 1) if count > 1 else 1.0)


def _key(windows: list[dict[str, Any]], overall: list[dict[str, Any]]) -> list[tuple[str, str, bool, str]]:
    entries = [("o", SOFT, True, "whole training")]
    for place, window in enumerate(windows):
        shade = tint(SOFT, _strength(place, len(windows)))
        entries.append(("o", shade, True, f"steps {window.get('first')} to {window.get('last')}"))
    if any(math.isfinite(number(r, "plug_in")) for r in overall):
        entries.append((_PLUG_IN, SOFT, False, "plug-in, whole training"))
    return entries


def _ratios(sheet: Sheet, answer: Record, ratios: list[dict[str, Any]], top: float) -> None:
    """A row a ratio on a logarithmic axis, the paper's range behind them."""
    names = [str(r["where"]) for r in ratios]
    found = [triple(r) for r in ratios]
    texts = [spelled(f) for f in found]
    room = max(text_width(t) for t in texts) + 12
    axes = rows(sheet, EDGE, top, WIDTH - 2 * EDGE - room, names, 24, name_width(names))
    paper = numbers((answer.get("data") or {}).get("paper") or [])
    logarithmic(axes, "x", np.concatenate([np.array(found).ravel(), paper, [1.0]]))
    axes.set_xlabel("ratio of U")
    axes.axvline(1, color=INK, lw=1, zorder=1.5)
    if len(paper) == 2 and np.isfinite(paper).all():
        axes.axvspan(paper[0], paper[1], color=BAND, lw=0, zorder=0)
        label = f"the paper: {paper[0]:g} to {paper[1]:g}"
        middle = math.sqrt(paper[0] * paper[1])
        axes.annotate(
            label,
            (middle, -0.5),
            xytext=(0, 9),
            textcoords="offset pixels",
            ha="center",
            va="center",
            color=SOFT,
            fontsize=SMALL,
        )
    for y, (one, text) in enumerate(zip(found, texts, strict=True)):
        first = y == 0
        interval(axes, y, one, INK if first else SOFT, size=9 if first else 7, width=2.6 if first else 1.8)
        beside(axes, y, text, strong=first)
