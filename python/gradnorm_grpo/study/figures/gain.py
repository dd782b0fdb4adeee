"""Question 3, gain: U against the held-out gain across tasks, and how U goes with Gain(t) within each task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from .canvas import EDGE, FAINT, GRID, INK, PAPER, SMALL, SOFT, WIDTH, Sheet, colour
from .data import Record, index, number, ordered, records, triple
from .points import crosses, dots
from .rows import AXIS, MARK, empty, name_width, rows, spelled
from .scales import at, holding_zero, linear, numbers

_LEFT, _GAP, _LINE = 58.0, 34.0, 16.0


def draw(answers: Record, answer: Record) -> Sheet:
    """The picture of this answer."""
    across, within = records(answer, "across"), records(answer, "within_correlations")
    tasks = ordered(answers, "tasks", across, within, name="task")
    texts = {where: _correlations(answer, where) for where in ("across tasks", "within tasks")}
    head = 30 + _LINE * max(len(t) for t in texts.values())
    high = max(250.0, 24.0 * len(tasks))
    sheet = Sheet(
        str(answer.get("question")), str(answer.get("verdict") or ""), _notes(answer, tasks), head + high + AXIS
    )
    if not tasks:
        empty(sheet, EDGE, 10, WIDTH - 2 * EDGE, head + high, "No task's U and gain are both known.")
        return sheet
    wide = (WIDTH - 2 * EDGE - _GAP) / 2
    second = EDGE + wide + _GAP
    for left, title, where in ((EDGE, "Across tasks", "across tasks"), (second, "Within tasks", "within tasks")):
        sheet.subtitle(left, 0, title)
        for i, text in enumerate(texts[where]):
            sheet.text(left, sheet.top + 22 + _LINE * (i + 0.5), text, fontsize=SMALL, color=SOFT)
    if any(math.isfinite(number(r, "gain")) and math.isfinite(number(r, "u")) for r in across):
        axes = sheet.axes(EDGE + _LEFT, head, wide - _LEFT, high)
        cloud(axes, answers, across)
    else:
        empty(sheet, EDGE, head, wide, high, "No held-out gain is known.")
    _strips(sheet, answers, within, tasks, (second, head, wide, high))
    return sheet


def _correlations(answer: Record, where: str) -> list[str]:
    """What is known of the correlations there, a line each: "Spearman, held-out: 0.14 (-0.70 to 0.80)"."""
    lines = []
    for record in records(answer, "correlations"):
        place = str(record.get("where"))
        if place.startswith(where) and math.isfinite(number(record, "value")):
            which = place[len(where) :].strip(" ()")
            kind = f"{record.get('kind')}, {which}:" if which else f"{record.get('kind')}:"
            lines.append(f"{kind} {spelled(triple(record), 2)}")
    return lines


def cloud(axes: Axes, answers: Record, across: Sequence[Record]) -> None:
    """A point a task: its U and its held-out gain with their intervals, and faintly those of each seed."""
    x, y = (np.array([triple(r, n, f"{n}_low", f"{n}_high") for r in across]) for n in ("u", "gain"))
    seeds = [[s for s in r.get("per_seed") or [] if isinstance(s, dict)] for r in across]
    some = [s for part in seeds for s in part]
    every = numbers(s.get("u") for s in some), numbers(s.get("gain") for s in some)
    holding_zero(axes, "x", np.concatenate([x.ravel(), every[0]]), np.max(np.abs(np.nan_to_num(x)), axis=1))
    linear(axes, "y", np.concatenate([y.ravel(), every[1]]), zero=True)
    axes.set_xlabel("U (symmetric logarithmic)")
    axes.set_ylabel("gain in held-out accuracy")
    for i, record in enumerate(across):
        place = index(answers, "tasks", str(record.get("task")))
        own = numbers(s.get("u") for s in seeds[i]), numbers(s.get("gain") for s in seeds[i])
        dots(axes, *own, place, size=5, alpha=0.35)
        crosses(axes, x[i : i + 1, 0], y[i : i + 1, 0], x[i, 1:, None], y[i, 1:, None], colour(place), 1.4, 0.7)
        dots(axes, x[i : i + 1, 0], y[i : i + 1, 0], place, size=9)


def _strips(
    sheet: Sheet,
    answers: Record,
    within: Sequence[Record],
    tasks: list[str],
    box: tuple[float, float, float, float],
) -> None:
    """A row a task with the correlations of its runs; the names, with the tasks' markers, serve the other panel too."""
    left, top, wide, high = box
    row = high / len(tasks)
    gutter = name_width(tasks, 150) + MARK
    places = [index(answers, "tasks", task) for task in tasks]
    axes = rows(sheet, left, top, wide - 10, tasks, row, gutter, places)
    axes.set_xlim(-1.06, 1.06)
    at(axes, "x", [0.0, -1.0, 1.0, -0.5, 0.5])
    axes.axvline(0, color=INK, lw=1, zorder=1.5)
    axes.set_xlabel("rank correlation, by run")
    for y, (task, place) in enumerate(zip(tasks, places, strict=True)):
        values = numbers(r.get("value") for r in within if str(r.get("task")) == task)
        values = values[np.isfinite(values)]
        if not values.size:
            ground = {"fc": PAPER, "ec": "none", "pad": 1.5}  # over the line at zero
            axes.annotate(
                "not known", (0, y), ha="center", va="center_baseline", fontsize=SMALL, color=FAINT, bbox=ground
            )
            continue
        # Equal values would hide each other: each run has its own height in the row, in the study's order.
        heights = y + 0.5 * (np.linspace(-0.5, 0.5, values.size) if values.size > 1 else np.zeros(1))
        dots(axes, values, heights, place, size=5.5, alpha=0.75)
        middle = float(np.median(values))
        axes.plot([middle, middle], [y - 0.36, y + 0.36], color=INK, lw=2, zorder=4)
    axes.spines["bottom"].set_color(GRID)


def _notes(answer: Record, tasks: list[str]) -> list[str]:
    if not tasks:
        return [str(answer.get("sentence") or "")]
    arms = ", ".join(str(a) for a in (answer.get("data") or {}).get("arms") or [])
    of = f" Runs of the arm{'s' if ',' in arms else ''} {arms}." if arms else ""
    return [
        "Left: mean over seeds with 95% intervals; small points are single seeds. Right: a point a run, the bar is "
        f"their median.{of} Gain within a task: mean training reward after a step minus that before it."
    ]
