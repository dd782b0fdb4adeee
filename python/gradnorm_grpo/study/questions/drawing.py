"""What the questions' figures share: sheets and heads, text beside a row, points with error bars, empty panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from ... import plots
from ..stats import Array
from .reading import Reading

AXIS = 48.0  # height of the tick labels and the name of an axis under a panel
NAME = 230.0  # the widest a name of a row may be


def beside(axes: Axes, y: float, text: str, strong: bool = False) -> None:
    """Text to the right of a row; constrained layout makes room for it."""
    axes.annotate(
        text,
        (1, y),
        xytext=(12, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center_baseline",
        fontsize=plots.SMALL,
        color=plots.INK if strong else plots.SOFT,
        fontweight="bold" if strong else "normal",
        annotation_clip=False,
    )


def empty(axes: Axes, text: str) -> None:
    """A panel without data: a sentence that says so."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=plots.SOFT)


def stacked(figure: Figure, heights: Sequence[float]) -> list[FigureBase]:
    """Parts of the figure below each other, so many pixels high, whose axes need not line up."""
    return list(np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights)))


def sheet(answer: Reading, notes: Sequence[str], body: float, key: Sequence[plots.Entry] = ()) -> Figure:
    """The sheet of an answer, headed by its question and its verdict; the arguments are those of `plots.sheet`."""
    return plots.sheet(answer.question, answer.verdict, notes, body, key)


def nothing(answer: Reading, text: str) -> Figure:
    """The figure of an answer without data: a sentence that says so, and the answer's own."""
    figure = sheet(answer, [answer.sentence], 90)
    empty(figure.subplots(), text)
    return figure


def head_height(lines: int) -> float:
    """Pixels that :func:`headed` needs above the panels, for so many lines under their titles."""
    return 24.0 + 16 * lines


def headed(
    figure: Figure,
    heads: Sequence[tuple[str, Sequence[str]]],
    body: float,
    widths: Sequence[float] = (),
    verdicts: Sequence[str] = (),
) -> list[Axes]:
    """Axes side by side, ``body`` pixels high, each under its own title and lines of small text.

    A head starts at the left of its panel, names of rows included. With ``verdicts``, each head ends with one.
    """
    high = head_height(max(len(lines) for _, lines in heads) + bool(verdicts))
    parts: Any = figure.subfigures(2, len(heads), height_ratios=[high, body], width_ratios=widths or None)
    tops, bottoms = parts
    for i, (top, (title, lines)) in enumerate(zip(tops, heads, strict=True)):
        shown: list[tuple[str, dict[str, Any]]] = [(title, {"fontsize": plots.TEXT, "fontweight": "bold"})]
        shown += [(line, {}) for line in lines]
        if verdicts:
            shade = plots.VERDICT_COLOURS.get(verdicts[i], plots.SOFT)
            shown.append((f"→ {verdicts[i]}", {"fontweight": "bold", "color": shade}))
        for j, (text, style) in enumerate(shown):
            style = {"fontsize": plots.SMALL, "color": plots.SOFT, "va": "center_baseline", **style}
            top.text(8 / plots.SHEET_WIDTH * len(heads), 1 - (14 + 16 * j if j else 10) / high, text, **style)
    return [bottom.subplots() for bottom in bottoms]


def correlation_axis(axes: Axes, name: str) -> None:
    """An axis of x from -1 to 1 with zero marked."""
    axes.set_xlim(-1.06, 1.06)
    plots.ticks(axes, "x", [0.0, -1.0, 1.0, -0.5, 0.5])
    plots.zero_line(axes, "x")
    axes.set_xlabel(name)


def crosses(axes: Axes, x: Array, y: Array, across: Array, up: Array, shade: str, width: float, alpha: float) -> None:
    """Error bars of points x, y [n]: from across[0] to across[1] along x, from up[0] to up[1] along y."""
    plots.bars(axes, y, across[0], across[1], shade, width, alpha, which="x")
    plots.bars(axes, x, up[0], up[1], shade, width, alpha)


def dots(axes: Axes, x: Array, y: Array, place: int, size: float = 6.0, alpha: float = 1.0) -> None:
    """Points in the colour and shape of the task at this place in the study, each rimmed in white."""
    style: dict[str, Any] = {"marker": plots.marker(place), "color": plots.colour(place), "mec": plots.PAPER}
    axes.plot(np.atleast_1d(x), np.atleast_1d(y), ls="none", ms=size, mew=0.6, alpha=alpha, zorder=3, **style)


def task_key(answer: Reading, tasks: Sequence[str]) -> list[plots.Entry]:
    """The entries of a legend of the tasks."""
    return [
        (plots.marker(p), plots.colour(p), True, task) for task, p in zip(tasks, map(answer.place, tasks), strict=True)
    ]
