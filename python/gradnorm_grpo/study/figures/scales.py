"""Axes that hold what the study measures: zero and six decades at once, ratios, and differences around zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...plots import tick_text
from ...runlog import Array
from .canvas import INK, SHADE, SMALL, text_width


def numbers(values: Iterable[object]) -> Array:
    """The values as float64, None and whatever is not a number as NaN."""
    return np.array([float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in values])


def finite(*parts: Array) -> Array:
    """All finite numbers of the arrays, in one."""
    joined = np.concatenate([np.ravel(p) for p in parts]) if parts else np.empty(0)
    return joined[np.isfinite(joined)]


def holding_zero(axes: Axes, which: str, ends: Array, sizes: Array) -> None:
    """A symmetric logarithmic axis from the ends' least to their greatest, zero always on it and marked.

    Arguments: which, "x" or "y"; ends, everything that must be visible; sizes, magnitudes that should be told apart:
    the axis is linear below the decade of the smallest of them, at most three decades below the largest. That part is
    shaded.
    """
    known, sizes = finite(ends), finite(np.abs(sizes))
    sizes = sizes[sizes > 0]
    threshold = 10.0 ** math.floor(math.log10(max(sizes.min(), sizes.max() * 1e-3))) if sizes.size else 1.0
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, threshold)
    low = low * 1.6 if low < -0.3 * threshold else -0.35 * threshold
    high = high * 1.6 if high > 0.3 * threshold else 0.35 * threshold
    span = axes.axvspan if which == "x" else axes.axhspan
    line = axes.axvline if which == "x" else axes.axhline
    (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=threshold, linscale=0.8)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    span(max(-threshold, low), min(threshold, high), color=SHADE, lw=0, zorder=0)
    line(0, color=INK, lw=1, zorder=1.5)
    decades = threshold * 10.0 ** np.arange(13)
    _fixed(axes, which, [0.0, *decades[decades <= high], *(-decades[-decades >= low])])


def logarithmic(axes: Axes, which: str, ends: Array, room: float = 1.25) -> tuple[float, float]:
    """A logarithmic axis that holds the positive ends with some room (0.1 to 10 if there are none); its limits."""
    known = finite(ends)
    known = known[known > 0]
    low, high = (float(known.min()) / room, float(known.max()) * room) if known.size else (0.1, 10.0)
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks = [step * 10.0**e for step in steps for e in range(first, last + 1)]
    _fixed(axes, which, [t for t in ticks if low <= t <= high])
    return low, high


def linear(axes: Axes, which: str, ends: Array, *, zero: bool = False, most: int = 5) -> None:
    """A linear axis that holds the ends with some room, and zero, marked, if asked for."""
    known = finite(ends)
    if zero or not known.size:
        known = np.append(known, 0.0)
    low, high = float(known.min()), float(known.max())
    pad = 0.07 * (high - low) or 0.1 * abs(high) or 0.1
    (axes.set_xlim if which == "x" else axes.set_ylim)(low - pad, high + pad)
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(tick_text))
    if zero:
        (axes.axvline if which == "x" else axes.axhline)(0, color=INK, lw=1, zorder=1.5)


def at(axes: Axes, which: str, ticks: Iterable[float]) -> None:
    """Ticks at these places only, as far as their labels do not touch."""
    _fixed(axes, which, list(ticks))


def _fixed(axes: Axes, which: str, wanted: list[float]) -> None:
    """Of the wanted ticks, in their order of importance, those whose labels keep clear of the ones before."""
    points = [(v, axes.get_ylim()[0]) if which == "x" else (axes.get_xlim()[0], v) for v in wanted]
    pixels: Array = axes.transData.transform(points)[:, 0 if which == "x" else 1] if points else np.empty(0)
    kept: list[int] = []
    for i, pixel in enumerate(pixels):
        room = [_room(which, wanted[i], wanted[k]) for k in kept]
        if all(abs(pixel - pixels[k]) >= r for k, r in zip(kept, room, strict=True)):
            kept.append(i)
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(sorted(wanted[i] for i in kept)))
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.set_minor_locator(NullLocator())


def _room(which: str, one: float, other: float) -> float:
    if which == "y":
        return SMALL * 1.7
    return (text_width(tick_text(one), SMALL) + text_width(tick_text(other), SMALL)) / 2 + 12
