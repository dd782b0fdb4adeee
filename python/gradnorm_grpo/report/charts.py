"""Pictures of all tasks together, drawn twice, wide and narrow: the page shows the one that fits the screen.

So text keeps its size on a phone, and names stand above their rows where there is no room beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..numbers import clean, columns, shorten
from .axes import frame, shared_limits, thin, tick_text
from .reading import Array, Run
from .results import ERRORS, TaskResult
from .svg import GRID, INK, NUM_COLOURS, PAPER, SHADE, SOFT, inline_svg, new_figure, task_colour, theme

WIDE, NARROW = 860, 360


def both_widths(draw: Callable[[float], Markup]) -> Markup:
    """The picture drawn for a wide and for a narrow screen; style.css shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def _rows(width: float, results: list[TaskResult], extra: float = 36) -> tuple[Figure, Axes, float]:
    """Axes with a row a task, the first on top: names left of it on a wide picture, above the row on a narrow one.

    The last result says how far below a row's middle its data go, to stay clear of a name above.
    """
    narrow = width < 500
    row = 44.0 if narrow else 30.0
    height = row * len(results) + extra
    names = [shorten(clean(r.name), 34 if narrow else 30) for r in results]
    left = 14.0 if narrow else 24 + 6.9 * max(map(columns, names))
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, extra / height, 1 - (left + 20) / width, 1 - extra / height))
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", visible=False)
    for y, name in enumerate(names):
        if narrow:
            axes.annotate(name, (0, y - 0.27), xycoords=("axes fraction", "data"), va="center", fontsize=11, zorder=6)
        else:
            beside = axes.get_yaxis_transform()
            axes.text(-14 / (width - left - 20), y, name, transform=beside, ha="right", va="center", fontsize=12)
        if y:
            axes.axhline(y - 0.5, color=GRID, lw=0.8, zorder=0.5)
    return figure, axes, (0.17 if narrow else 0.0)


def pooled_pull(results: list[TaskResult], width: float) -> Markup:
    """Every task's pooled U with two standard errors, beside the plug-in estimate, on an axis that holds zero."""
    with theme():
        figure, axes, shift = _rows(width, results)
        u = np.array([r.sq_norm for r in results])
        error = np.nan_to_num(np.array([r.std_error for r in results])) * ERRORS
        plug = np.array([r.plug_in for r in results])
        threshold = _linear_below(u, error)
        ends = np.concatenate([u - error, u + error, plug, [0.0, threshold]])
        low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
        axes.set_xscale("symlog", linthresh=threshold, linscale=0.7)
        axes.set_xlim(low * 1.35 if low < 0 else -0.15 * threshold, high * 1.35)
        _decade_ticks(axes, threshold, width)
        axes.axvspan(max(-threshold, axes.get_xlim()[0]), threshold, color=SHADE, lw=0, zorder=0)
        axes.axvline(0, color=INK, lw=1, zorder=1.5)
        axes.set_xlabel(
            "squared gradient norm" + ("" if width < 500 else " (linear in the shaded part, logarithmic outside it)")
        )
        for y, r in enumerate(results):
            colour = task_colour(r.index)
            axes.plot([r.plug_in], [y + shift], ls="none", marker="D", ms=6, mfc="none", mec=SOFT, mew=1.4, zorder=3)
            if math.isnan(r.sq_norm):
                continue
            axes.plot([u[y] - error[y], u[y] + error[y]], [y + shift] * 2, color=colour, lw=2.6, zorder=3)
            axes.plot(
                [u[y]],
                [y + shift],
                marker="o",
                ms=9,
                color=colour if r.resolved else PAPER,
                mec=colour,
                mew=2,
                zorder=4,
            )
        return inline_svg(figure, "Pooled U of every task with two standard errors, and the plug-in estimate")


def _linear_below(u: Array, error: Array) -> float:
    """Where the axis turns from linear to logarithmic: the decade of the shortest row, |U| and its error bar together.

    At most three decades below the longest, so that the logarithmic part keeps its room.
    """
    sizes = np.abs(np.nan_to_num(u)) + error
    sizes = sizes[sizes > 0]
    if not sizes.size:
        return 1.0
    return float(10.0 ** math.floor(math.log10(max(sizes.min(), sizes.max() * 1e-3))))


def _decade_ticks(axes: Axes, threshold: float, width: float) -> None:
    """Zero and powers of ten, no two labels closer than their text is wide."""
    low, high = axes.get_xlim()
    decades = threshold * 10.0 ** np.arange(0, 12)
    wanted = [0.0, *(d for d in decades if d <= high), *(-d for d in decades if -d >= low)]
    pixels = axes.transData.transform([(v, 0.0) for v in wanted])[:, 0]
    kept: list[int] = []
    for i, pixel in enumerate(pixels):
        if all(abs(pixel - pixels[k]) > (34 if width < 500 else 44) for k in kept):
            kept.append(i)
    axes.set_xticks(sorted(wanted[i] for i in kept))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.minorticks_off()


def evaluations(results: list[TaskResult], width: float) -> Markup:
    """Held-out reward of every task, with two standard errors: of the model as given (diamond, where it was then
    warm-started), before GRPO (hollow) and after it (filled)."""
    shown = [r for r in results if r.base or r.before or r.after]
    with theme():
        figure, axes, shift = _rows(width, shown)
        points = [p for r in shown for p in (r.base, r.before, r.after) if p]
        spread = [np.array([p.reward - ERRORS * p.error, p.reward + ERRORS * p.error, p.reward]) for p in points]
        axes.set_xlim(*shared_limits(spread, (0.0, 1.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.set_xlabel("held-out reward")
        for y, r in enumerate(shown):
            colour = task_colour(r.index)
            middle = y + shift
            ends = [p.reward for p in (r.base, r.before, r.after) if p]
            axes.plot(ends, [middle] * len(ends), color=colour, lw=5, alpha=0.3, zorder=2)
            marks = ((r.base, 0.0, PAPER, "D"), (r.before, 0.13, PAPER, "o"), (r.after, -0.13, colour, "o"))
            for point, offset, fill, marker in marks:
                if point is None:
                    continue
                error = ERRORS * point.error
                if math.isfinite(error):
                    ends = [point.reward - error, point.reward + error]
                    axes.plot(ends, [middle + offset] * 2, color=colour, lw=1.6, zorder=3)
                axes.plot(
                    [point.reward], [middle + offset], marker=marker, ms=8, color=fill, mec=colour, mew=2, zorder=4
                )
        return inline_svg(figure, "Held-out reward of every task before and after training")


def sampling(run: Run, results: list[TaskResult], width: float) -> Markup:
    """Probability with which each task was drawn, stacked over the steps, with the tasks named at the right."""
    narrow = width < 500
    at = thin(len(run.steps), 300)
    steps = run.steps[at]
    stack = np.nan_to_num(np.array([run.series[r.name]["sampling_prob"][at] for r in results]))
    height = max(250.0, 18.0 * len(results) + 60)
    names = [shorten(clean(r.name), 14 if narrow else 30) for r in results]
    right = 24 + 6.9 * max(map(columns, names)) + (0 if narrow else 40)
    with theme():
        figure = new_figure(width, height)
        axes = figure.add_axes((40 / width, 38 / height, 1 - (40 + right) / width, 1 - 46 / height))
        frame(axes, run)
        edges = np.vstack([np.zeros_like(steps), np.cumsum(stack, axis=0)])
        if len(steps) == 1:  # one step has no width: draw it as if it lasted
            x, edges = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(edges, 2, axis=1)
        else:
            x = steps
        axes.set_xlim(x[0], x[-1])
        total = max(1.0, float(edges[-1].max()))
        axes.set_ylim(0, total)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        # Stacked from the top, so that the loudest task stands first as it does everywhere else.
        edges = total - edges
        for i, r in enumerate(results):
            hatch = "////" if r.index >= NUM_COLOURS else None  # where the palette has begun again
            axes.fill_between(
                x, edges[i + 1], edges[i], fc=task_colour(r.index), ec=PAPER, hatch=hatch, lw=0, alpha=0.78
            )
            axes.plot(x, edges[i + 1], color=PAPER, lw=1.2)
        middles = (edges[:-1, -1] + edges[1:, -1]) / 2
        pixels_per_unit = (height - 46) / total
        for r, name, y, label, p in zip(
            results, names, middles, _spread(middles, 17 / pixels_per_unit, total), stack[:, -1], strict=True
        ):
            beside = axes.get_yaxis_transform()  # across: widths of the picture; up: data
            pixel = 1 / (width - 40 - right)
            across, colour = 1 + pixel * np.array([0, 3, 11, 14]), task_colour(r.index)
            axes.plot(across, [y, y, label, label], transform=beside, color=colour, lw=1.5, clip_on=False)
            text = name if narrow else f"{name}  {p:.0%}"
            axes.text(1 + 18 * pixel, label, text, transform=beside, va="center", fontsize=11.5)
        axes.grid(visible=False)
        return inline_svg(figure, "Probability with which each task was drawn, over the steps")


def _spread(wanted: Array, gap: float, top: float) -> Array:
    """Heights as near to the wanted ones (descending) as labels of this height allow, inside [0, top]."""
    heights = np.minimum(wanted, top - gap / 2)
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    floor = gap / 2
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    return heights
