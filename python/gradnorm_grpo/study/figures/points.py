"""Clouds of points with error bars, small enough to stand in a README."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ...runlog import Array
from .canvas import PAPER, colour, marker

MOST = 300  # points in one panel: more would only hide each other


def crosses(axes: Axes, x: Array, y: Array, across: Array, up: Array, shade: str, width: float, alpha: float) -> None:
    """Error bars from across[0] to across[1] and from up[0] to up[1], as two lines with gaps: two elements in all.

    On a logarithmic axis an end at or below zero is drawn to the axis' own end.
    """
    if axes.get_xscale() == "log":
        across = np.where(across > 0, across, np.where(np.isnan(across), np.nan, axes.get_xlim()[0]))
    if axes.get_yscale() == "log":
        up = np.where(up > 0, up, np.where(np.isnan(up), np.nan, axes.get_ylim()[0]))
    gap = np.full_like(x, np.nan)
    for a, b in (((across[0], across[1], gap), (y, y, gap)), ((x, x, gap), (up[0], up[1], gap))):
        axes.plot(np.stack(a, 1).ravel(), np.stack(b, 1).ravel(), color=shade, lw=width, alpha=alpha, zorder=2)


def dots(axes: Axes, x: Array, y: Array, place: int, size: float = 6.0, alpha: float = 1.0) -> None:
    """Points in the colour and shape of the task at this place in the study, each rimmed in white."""
    axes.plot(
        x, y, ls="none", marker=marker(place), ms=size, color=colour(place), mec=PAPER, mew=0.6, alpha=alpha, zorder=3
    )


def key(tasks: Sequence[str], places: Sequence[int]) -> list[tuple[str, str, bool, str]]:
    """The entries of a legend of the tasks."""
    return [(marker(p), colour(p), True, task) for task, p in zip(tasks, places, strict=True)]
