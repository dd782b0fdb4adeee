"""What every picture's axes share: how a tick is written, frames, bars and limits."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ..numbers import MINUS, power
from .reading import Array, Run


def tick_text(value: float, _position: object = None) -> str:
    """An axis number: plain between 0.001 and 9999, else with a power of ten."""
    if value == 0 or abs(value) < 1e-300:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if -4 < exponent < 4:
        return f"{value:.10g}".replace("-", MINUS)
    lead = f"{value / 10.0**exponent:.3g}".replace("-", MINUS)
    return lead[:-1] + power(exponent)[1:] if lead in ("1", f"{MINUS}1") else lead + power(exponent)


def frame(axes: Axes, run: Run, xlabel: str = "step") -> None:
    last = float(run.steps[-1])
    axes.set_xlim(0, last * 1.02 + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0, pad=4)
    axes.set_xlabel(xlabel, labelpad=2)


def thin(length: int, most: int = 400) -> NDArray[np.int64]:
    """Indices of at most so many evenly spaced points, the first and the last among them: a screen shows no more."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(np.int64))


def bars(axes: Axes, x: Array, low: Array, high: Array, colour: str, width: float, alpha: float) -> None:
    """Vertical bars as one line with gaps: one element of the SVG instead of one a step."""
    gap = np.full_like(x, np.nan)
    axes.plot(
        np.stack([x, x, gap], 1).ravel(),
        np.stack([low, high, gap], 1).ravel(),
        color=colour,
        lw=width,
        alpha=alpha,
        zorder=2,
    )


def shared_limits(parts: list[Array], least: tuple[float, float]) -> tuple[float, float]:
    """Common limits of several series with a little room, at least `least`."""
    known = np.concatenate([np.asarray(least, dtype=np.float64), *parts])
    known = known[np.isfinite(known)]
    pad = 0.05 * float(known.max() - known.min())
    return float(known.min()) - pad, float(known.max()) + pad
