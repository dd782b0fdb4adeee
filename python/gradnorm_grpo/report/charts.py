"""The report's pictures: of all tasks together, of one task over the steps, and of the warm start.

Pictures of all tasks are drawn twice, wide and narrow, and the page shows the one that fits the screen: text keeps its
size on a phone, and names stand above their rows where there is no room beside them. Pictures of one task are small
and alike, so that the page can lay them out in a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from gradnorm_kernels import RunningEstimate

from .. import plots
from ..numbers import clean, significant
from ..runlog import Array, EvalPoint, Run
from ..summary import ERRORS, TaskResult, running_estimate

WIDE, NARROW = 860.0, 360.0
PANEL = 330.0
MAX_DOTS = 120  # more steps than this are pooled a few at a time: one picture stays readable and small


def both_widths(draw: Callable[[float], Markup]) -> Markup:
    """The picture drawn for a wide and for a narrow screen; style.css shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def _rows(width: float, results: list[TaskResult]) -> tuple[Figure, Axes, float]:
    """Axes with a row per task: names left of it on a wide picture, above the row on a narrow one.

    The last result says how far below the middle of a row its data go, to stay clear of a name above.
    """
    narrow = width < 500
    figure = plots.new_figure(width, (44 if narrow else 30) * len(results) + 36)
    axes = figure.subplots()
    plots.rows(axes, [r.name for r in results], 0 if narrow else 210)
    for y, result in enumerate(results if narrow else ()):
        name, place = plots.fit(result.name, width - 60, plots.SMALL), (0, y - 0.27)
        axes.annotate(name, place, xycoords=("axes fraction", "data"), va="center", fontsize=plots.SMALL, zorder=6)
    return figure, axes, 0.17 if narrow else 0.0


def pooled_pull(results: list[TaskResult], width: float) -> Markup:
    """Every task's pooled U with two standard errors, beside the plug-in estimate, on an axis that holds zero."""
    with plots.theme():
        figure, axes, shift = _rows(width, results)
        u = np.array([r.sq_norm for r in results])
        error = np.nan_to_num(np.array([r.std_error for r in results])) * ERRORS
        plug = np.array([r.plug_in for r in results])
        plots.holding_zero(axes, "x", np.concatenate([u - error, u + error, plug]), np.abs(np.nan_to_num(u)) + error)
        axes.set_xlabel(
            "squared gradient norm" + ("" if width < 500 else " (linear in the shaded part, logarithmic outside it)")
        )
        for y, r in enumerate(results):
            axes.plot(
                [r.plug_in], [y + shift], ls="none", marker="D", ms=6, mfc="none", mec=plots.SOFT, mew=1.4, zorder=3
            )
            found = (u[y], u[y] - error[y], u[y] + error[y])
            plots.interval(axes, y + shift, found, plots.colour(r.index), size=9, width=2.6, filled=r.resolved)
        return plots.inline_svg(figure, "Pooled U of every task with two standard errors, and the plug-in estimate")


def evaluations(results: list[TaskResult], width: float) -> Markup:
    """Held-out reward of every task, with two standard errors: of the model as given (diamond, where it was then
    warm-started), before GRPO (hollow) and after it (filled)."""
    shown = [r for r in results if r.base or r.before or r.after]
    with plots.theme():
        figure, axes, shift = _rows(width, shown)
        points = [p for r in shown for p in (r.base, r.before, r.after) if p]
        reach = [p.reward + side * ERRORS * np.nan_to_num(p.error) for p in points for side in (-1, 1)]
        plots.linear(axes, "x", np.array([0.0, 1.0, *reach]))
        axes.set_xlabel("held-out reward")
        for y, r in enumerate(shown):
            ends = [p.reward for p in (r.base, r.before, r.after) if p]
            axes.plot(ends, [y + shift] * len(ends), color=plots.colour(r.index), lw=5, alpha=0.3, zorder=2)
            for point, offset, filled, mark in (
                (r.base, 0.0, False, "D"),
                (r.before, 0.13, False, "o"),
                (r.after, -0.13, True, "o"),
            ):
                if point:
                    found = (point.reward, *(point.reward + side * ERRORS * point.error for side in (-1, 1)))
                    plots.interval(
                        axes, y + shift + offset, found, plots.colour(r.index), mark=mark, filled=filled, width=1.6
                    )
        return plots.inline_svg(figure, "Held-out reward of every task before and after training")


def sampling(run: Run, results: list[TaskResult], width: float) -> Markup:
    """Probability with which each task was drawn, stacked over the steps, with the tasks named at the right."""
    narrow = width < 500
    at = plots.thin(len(run.steps), 300)
    x = run.steps[at]
    stack = np.nan_to_num(np.array([run.series[r.name]["sampling_prob"][at] for r in results]))
    height = max(250.0, 18.0 * len(results) + 60)
    with plots.theme():
        figure = plots.new_figure(width, height)
        axes = figure.subplots()
        _over_steps(axes, run)
        edges = np.vstack([np.zeros_like(x), np.cumsum(stack, axis=0)])
        if len(x) == 1:  # one step has no width: draw it as if it lasted
            x, edges = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(edges, 2, axis=1)
        axes.set_xlim(x[0], x[-1])
        total = max(1.0, float(edges[-1].max()))
        axes.set_ylim(0, total)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.grid(visible=False)
        # Stacked from the top, so that the loudest task stands first as it does everywhere else.
        edges = total - edges
        for i, r in enumerate(results):
            ground = axes.fill_between(
                x, edges[i + 1], edges[i], fc=plots.colour(r.index), ec=plots.PAPER, lw=0, alpha=0.78
            )
            if r.index >= len(plots.PALETTE):
                ground.set_hatch("////")  # the palette has begun again
            axes.plot(x, edges[i + 1], color=plots.PAPER, lw=1.2)
        middles = (edges[:-1, -1] + edges[1:, -1]) / 2
        gap = 17 * total / (height - 50)  # the axes are that much lower than the picture
        for r, y, label, p in zip(results, middles, spread(middles, gap, total), stack[:, -1], strict=True):
            beside = axes.get_yaxis_transform() + ScaledTranslation(18 / 72, 0, figure.dpi_scale_trans)
            axes.annotate(
                plots.fit(r.name, 90 if narrow else 210, plots.SMALL) + ("" if narrow else f"  {p:.0%}"),
                (1, y),
                xytext=(1, label),
                xycoords=axes.get_yaxis_transform(),
                textcoords=beside,
                va="center",
                fontsize=plots.SMALL,
                arrowprops={"arrowstyle": "-", "color": plots.colour(r.index), "lw": 1.5, "shrinkA": 1, "shrinkB": 0}
                | {"relpos": (0, 0.5)},
                annotation_clip=False,
            )
        return plots.inline_svg(figure, "Probability with which each task was drawn, over the steps")


def spread(wanted: Array, gap: float, top: float) -> Array:
    """Heights as near to the wanted ones (descending) as labels of height `gap` allow, inside [0, top]."""
    heights = np.minimum(wanted, top - gap / 2)
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    floor = gap / 2
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    return heights


def _over_steps(axes: Axes, run: Run, low: float = 0.0) -> None:
    """An axis of steps from `low` to the last, with few ticks."""
    plots.linear(axes, "x", run.steps, whole=True)
    axes.set_xlim(low, float(run.steps[-1]) * 1.02 + 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("step")


def steps_per_dot(run: Run) -> int:
    """How many steps one dot of pull_panel pools."""
    return max(1, math.ceil(len(run.steps) / MAX_DOTS))


def _binned_estimates(run: Run, task: str) -> tuple[Array, Array, Array]:
    """Per-step estimates, pooled to at most MAX_DOTS: step, U and standard error."""
    size, gradients = steps_per_dot(run), run.gradients(task)
    points = []
    for start in range(0, len(gradients), size):
        pooled = RunningEstimate()
        for gradient in gradients[start : start + size]:
            pooled.update(gradient)
        points.append((float(run.steps[start : start + size].mean()), pooled.value, pooled.std_error))
    x, value, error = np.array(points, dtype=np.float64).reshape(-1, 3).T
    return x, value, error


def pull_panel(run: Run, result: TaskResult) -> Markup:
    """U of one task at each step with its standard error, and the running pooled estimate with a band of two."""
    x, value, error = _binned_estimates(run, result.name)
    centre, spread, _ = running_estimate(run, result.name)
    shade = plots.colour(result.index)
    with plots.theme():
        figure = plots.new_figure(PANEL, 190)
        axes = figure.subplots()
        _over_steps(axes, run)
        plots.linear(axes, "y", _visible(value, error, centre, ERRORS * spread), zero=True, most=4)
        low, high = axes.get_ylim()
        plots.bars(axes, x, value - error, value + error, shade, 1.2, 0.35)
        axes.plot(x, value, ls="none", marker="o", ms=2.6, color=shade, mew=0, alpha=0.75, zorder=3)
        # Estimates off the scale are shown at the edge: dropping them would hide how heavy the tails are.
        for edge, mark, off in ((high, "^", value > high), (low, "v", value < low)):
            at_edge = np.full(int(off.sum()), edge)
            axes.plot(x[off], at_edge, ls="none", marker=mark, ms=5, color=shade, mew=0, clip_on=False)
        at = plots.thin(len(run.steps))
        steps, centre, spread = run.steps[at], centre[at], ERRORS * spread[at]
        axes.fill_between(steps, centre - spread, centre + spread, color=shade, alpha=0.22, lw=0, zorder=2.5)
        axes.plot(steps, centre, color=shade, lw=2.2, marker="o" if len(steps) == 1 else None, zorder=4)
        return plots.inline_svg(
            figure, f"U of {clean(result.name)} over the steps; pooled {significant(result.sq_norm)}"
        )


def _visible(value: Array, error: Array, centre: Array, reach: Array) -> Array:
    """What the axis of U must hold: the running estimate, its band once it has settled, all but the wildest steps."""
    settled = slice(len(centre) // 5, None)
    parts = [(value, (0.02, 0.98)), (value - error, (0.1,)), (value + error, (0.9,))]
    wild = [np.quantile(plots.finite(part), at) for part, at in parts if plots.finite(part).size]
    return np.concatenate([centre, (centre - reach)[settled], (centre + reach)[settled], *wild])


def reward_panel(run: Run, result: TaskResult) -> Markup:
    """Reward of one task over the steps with its held-out evaluations, and below it the paper's gain.

    All tasks' panels share their scales; of the gains, the wildest fiftieth runs off them.
    """
    shade = plots.colour(result.index)
    reward, gain = (run.series[result.name][name] for name in ("reward", "learning_gain"))
    held_out = [point.reward for points in run.evals.values() for point in points]
    gains = plots.finite(np.abs(run.array("learning_gain")))
    most = float(np.quantile(gains, 0.98)) if gains.size else 0.0
    left = -0.03 * float(run.steps[-1])  # room for the evaluation before the first step
    with plots.theme():
        figure = plots.new_figure(PANEL, 250)
        top, bottom = figure.subplots(2, 1, height_ratios=(5, 2), sharex=True)
        plots.linear(top, "y", np.array([0.0, 1.0, *held_out, *run.array("reward").ravel()]), most=4)
        plots.linear(bottom, "y", np.array([-most, most, -0.05, 0.05]), zero=True)
        for axes in (top, bottom):
            _over_steps(axes, run, left)
        top.set_xlabel("")
        bottom.yaxis.set_major_locator(MaxNLocator(2, symmetric=True))
        dots = plots.thin(len(run.steps), 2 * MAX_DOTS)
        top.plot(run.steps[dots], reward[dots], ls="none", marker="o", ms=2.4, mew=0, color=shade, alpha=0.4)
        for axes, values, width in ((top, _moving_mean(reward, reward_window(run)), 2.2), (bottom, gain, 1.8)):
            known = np.flatnonzero(np.isfinite(values))
            known = known[plots.thin(len(known))]
            axes.plot(run.steps[known], values[known], color=shade, lw=width)
        _held_out(top, run.evals[result.name])
        return plots.inline_svg(figure, f"Reward and gain of {clean(result.name)} over the steps")


def _held_out(axes: Axes, points: list[EvalPoint]) -> None:
    x, y = (np.array([getattr(p, name) for p in points], dtype=np.float64) for name in ("step", "reward"))
    reach = np.nan_to_num([ERRORS * p.error for p in points])
    plots.bars(axes, x, y - reach, y + reach, plots.INK, 1.2)
    axes.plot(x, y, ls="none", marker="D", ms=5.5, color=plots.PAPER, mec=plots.INK, mew=1.3, clip_on=False, zorder=5)


def reward_window(run: Run) -> int:
    """Steps that the reward's moving mean spans: a tenth of the run, three or more."""
    return max(3, len(run.steps) // 10)


def _moving_mean(values: Array, window: int) -> Array:
    """Mean of the known values among the last `window` steps; NaN where the step itself holds none."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    with np.errstate(invalid="ignore"):
        return np.where(known, (sums[end] - sums[start]) / (counts[end] - counts[start]), np.nan)


def warm_start(run: Run) -> Markup:
    """Loss of the supervised warm start."""
    steps, loss = run.warm_start
    with plots.theme():
        figure = plots.new_figure(420, 190)
        axes = figure.subplots()
        axes.plot(steps, loss, color=plots.INK, lw=2, marker="o" if len(steps) < 2 else None)
        plots.linear(axes, "x", steps, whole=True)
        plots.linear(axes, "y", np.append(loss, 0.0), most=4)
        if np.nanmin(loss) >= 0:
            axes.set_ylim(0, None)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("warm-start step")
        return plots.inline_svg(figure, "Loss of the supervised warm start")
