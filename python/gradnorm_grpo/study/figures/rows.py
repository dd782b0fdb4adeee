"""Pictures with a row a task (or a quantity, or an arm): names at the left, values with intervals along the row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from ...numbers import fixed, significant
from .canvas import GRID, INK, PAPER, SMALL, SOFT, TEXT, Sheet, colour, fit, marker, text_width, wrap

AXIS = 42.0  # room for the tick labels and the name of the axis under a panel
NAME = 230.0  # the widest a name may be
MARK = 20.0


def name_width(names: Sequence[str], most: float = NAME) -> float:
    """Pixels that the column of names takes, with the gap to the rows."""
    return min(max((text_width(n) for n in names), default=0.0), most) + 16


def rows(
    sheet: Sheet,
    left: float,
    top: float,
    width: float,
    names: Sequence[str],
    row: float,
    gutter: float,
    places: Sequence[int] = (),
) -> Axes:
    """Axes with a row a name, the first on top, `row` pixels high; names in a column of `gutter` pixels left of them.

    `width` is that of names and rows together; no names are written where `gutter` is 0. With `places`, those of the
    tasks in the study, each name is followed by the task's marker, which takes MARK pixels of the gutter. The panel is
    len(names) * row + AXIS pixels high.
    """
    axes = sheet.axes(left + gutter, top, width - gutter, row * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    end = left + gutter - 12 - (MARK if places else 0)
    for y, name in enumerate(names):
        middle = sheet.top + top + row * (y + 0.5)
        if gutter:
            sheet.text(end, middle, fit(name, end - left, TEXT), ha="right")
        if places:
            sheet.mark(left + gutter - 18, middle, marker(places[y]), colour(places[y]), True)
        if y:
            axes.axhline(y - 0.5, color=GRID, lw=0.8, zorder=0.5)
    return axes


def interval(
    axes: Axes,
    y: float,
    found: Sequence[float],
    shade: str = INK,
    *,
    mark: str = "o",
    size: float = 8.0,
    filled: bool = True,
    width: float = 2.0,
) -> None:
    """A value with its interval (value, low, high) on a row; an arrow where only the low end is known.

    Only what is known is drawn; the marker is hollow where `filled` is false.
    """
    value, low, high = found
    if math.isfinite(low):
        known = math.isfinite(high)
        end = high if known else axes.get_xlim()[1]
        axes.plot([low, end], [y, y], color=shade, lw=width, zorder=3)
        if not known:
            axes.plot([end], [y], ls="none", marker=">", ms=7, color=shade, clip_on=False, zorder=3)
    face = shade if filled else PAPER
    axes.plot([value], [y], ls="none", marker=mark, ms=size, color=face, mec=shade, mew=1.6, zorder=4)


def beside(axes: Axes, y: float, text: str, strong: bool = False) -> None:
    """Text right of a row, in the room that was left there."""
    axes.annotate(
        text,
        (1, y),
        xytext=(12, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset pixels",
        va="center_baseline",
        fontsize=SMALL,
        color=INK if strong else SOFT,
        fontweight="bold" if strong else "normal",
        annotation_clip=False,
    )


def spelled(found: Sequence[float], decimals: int | None = None) -> str:
    """value (low to high), with so many decimals or two significant digits; (over low) without a known high."""
    value, low, high = found

    def one(x: float) -> str:
        return significant(x) if decimals is None else fixed(x, decimals)

    if not math.isfinite(low):
        return one(value) if math.isfinite(value) else "not known"
    bounds = f"{one(low)} to {one(high)}" if math.isfinite(high) else f"over {one(low)}"
    return f"{one(value)} ({bounds})" if math.isfinite(value) else bounds


def empty(sheet: Sheet, left: float, top: float, width: float, height: float, text: str) -> None:
    """A panel without data: a frame that says so."""
    axes = sheet.axes(left, top, width, height)
    axes.set_axis_off()
    axes.patch.set_visible(False)
    lines = wrap(text, width - 40, TEXT)
    for i, line in enumerate(lines):
        middle = sheet.top + top + height / 2 + (i - (len(lines) - 1) / 2) * 18
        sheet.text(left + width / 2, middle, line, ha="center", color=SOFT)
