"""Pictures of one task (and of the warm start): small and alike, so that the page can lay them out in a grid.

They keep their size on every screen; a phone shows them below each other.
"""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradnorm_kernels import RunningEstimate

from ..numbers import clean, significant
from .axes import bars, frame, shared_limits, thin, tick_text
from .reading import Array, EvalPoint, Run
from .results import ERRORS, TaskResult, estimate_steps, running_estimate
from .svg import INK, PAPER, inline_svg, new_figure, task_colour, theme

PANEL = (330, 190)
MAX_DOTS = 120  # more steps than this are pooled a few at a time: one picture stays readable and small


def steps_per_dot(run: Run) -> int:
    """How many steps one dot of pull_panel pools."""
    return max(1, math.ceil(len(run.steps) / MAX_DOTS))


def reward_limits(run: Run) -> tuple[float, float]:
    """Vertical limits that all tasks' rewards and evaluations share: at least 0 to 1."""
    points = [np.array([p.reward for p in run.evals[task]]) for task in run.tasks]
    return shared_limits([*(run.series[task]["reward"] for task in run.tasks), *points], (0.0, 1.0))


def gain_limits(run: Run) -> tuple[float, float]:
    """Vertical limits that all tasks' gains share, alike above and below zero; the wildest fiftieth runs off them."""
    gains = np.abs(np.concatenate([run.series[task]["learning_gain"] for task in run.tasks]))
    known = gains[np.isfinite(gains)]
    top = np.quantile(known, [0.98]) if known.size else known
    return shared_limits([top, -top], (-0.05, 0.05))


def binned_estimates(run: Run, task: str) -> tuple[Array, Array, Array, int]:
    """Per-step estimates, at most MAX_DOTS: step, U, standard error, and how many steps each pools."""
    size = max(1, math.ceil(len(run.steps) / MAX_DOTS))
    gradients = list(estimate_steps(run, task))
    rows = []
    for start in range(0, len(gradients), size):
        pooled = RunningEstimate()
        for gradient in gradients[start : start + size]:
            pooled.update(gradient)
        rows.append((float(run.steps[start : start + size].mean()), pooled.value, pooled.std_error))
    x, value, error = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return x, value, error, size


def pull_panel(run: Run, result: TaskResult) -> Markup:
    """U of one task at each step with its standard error, and the running pooled estimate with a band of two."""
    x, value, error, _ = binned_estimates(run, result.name)
    centre, spread, _ = running_estimate(run, result.name)
    colour = task_colour(result.index)
    with theme():
        figure = new_figure(*PANEL)
        axes = figure.add_axes((0.16, 0.19, 0.82, 0.75))
        frame(axes, run)
        known = np.isfinite(value)
        low, high = _limits(value[known], error[known], centre, spread)
        axes.set_ylim(low, high)
        axes.axhline(0, color=INK, lw=1, zorder=1.5)
        bars(axes, x, value - error, value + error, colour, 1.2, 0.35)
        axes.plot(x, value, ls="none", marker="o", ms=2.6, color=colour, mew=0, alpha=0.75, zorder=3)
        # Estimates off the scale are shown at the edge: dropping them would hide how heavy the tails are.
        for edge, marker, off in ((high, "^", value > high), (low, "v", value < low)):
            axes.plot(
                x[off],
                np.full(int(off.sum()), edge),
                ls="none",
                marker=marker,
                ms=5,
                color=colour,
                mew=0,
                clip_on=False,
            )
        at = thin(len(run.steps))
        steps, centre, spread = run.steps[at], centre[at], ERRORS * spread[at]
        axes.fill_between(steps, centre - spread, centre + spread, color=colour, alpha=0.22, lw=0, zorder=2.5)
        axes.plot(steps, centre, color=colour, lw=2.2, marker="o" if len(steps) == 1 else None, zorder=4)
        return inline_svg(figure, f"U of {clean(result.name)} over the steps; pooled {significant(result.sq_norm)}")


def _limits(value: Array, error: Array, centre: Array, spread: Array) -> tuple[float, float]:
    """Vertical limits that hold zero, the running estimate once it has settled, and all but the wildest steps."""
    settled = slice(len(centre) // 5, None)
    ends = [np.zeros(1), (centre - ERRORS * spread)[settled], (centre + ERRORS * spread)[settled], centre]
    if value.size:
        ends.append(np.quantile(value, [0.02, 0.98]))
        ends.append(np.quantile((value - error)[np.isfinite(error)], [0.1]) if np.isfinite(error).any() else value[:0])
        ends.append(np.quantile((value + error)[np.isfinite(error)], [0.9]) if np.isfinite(error).any() else value[:0])
    known = np.concatenate(ends)
    known = known[np.isfinite(known)]
    low, high = float(known.min()), float(known.max())
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def _moving_mean(values: Array, window: int) -> Array:
    """Mean of the known values among the last `window` steps; NaN where the step itself holds none."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    with np.errstate(invalid="ignore"):
        return np.where(known, (sums[end] - sums[start]) / (counts[end] - counts[start]), np.nan)


def reward_window(run: Run) -> int:
    """Steps that the reward's moving mean spans: a tenth of the run, three or more."""
    return max(3, len(run.steps) // 10)


def reward_panel(
    run: Run, result: TaskResult, reward_limits: tuple[float, float], gain_limits: tuple[float, float]
) -> Markup:
    """Reward of one task over the steps with its held-out evaluations, and below it the paper's gain."""
    series, colour = run.series[result.name], task_colour(result.index)
    reward, gain = series["reward"], series["learning_gain"]
    with theme():
        figure = new_figure(PANEL[0], 250)
        top, bottom = figure.add_axes((0.16, 0.44, 0.82, 0.53)), figure.add_axes((0.16, 0.145, 0.82, 0.22))
        for axes, limits in ((top, reward_limits), (bottom, gain_limits)):
            frame(axes, run)
            axes.set_ylim(*limits)
        left = -0.03 * float(run.steps[-1])  # room for the evaluation before the first step
        top.set_xlim(left, None)
        bottom.set_xlim(left, None)
        top.set_xlabel("")
        top.tick_params(labelbottom=False)
        bottom.yaxis.set_major_locator(MaxNLocator(2, symmetric=True))
        dots = thin(len(run.steps), 2 * MAX_DOTS)
        top.plot(run.steps[dots], reward[dots], ls="none", marker="o", ms=2.4, mew=0, color=colour, alpha=0.4)
        smooth = _moving_mean(reward, reward_window(run))
        drawn = np.flatnonzero(np.isfinite(smooth))
        drawn = drawn[thin(len(drawn))]
        top.plot(run.steps[drawn], smooth[drawn], color=colour, lw=2.2)
        points = run.evals[result.name]
        if points:
            _evaluations(top, points)
        bottom.axhline(0, color=INK, lw=1, zorder=1.5)
        known = np.flatnonzero(np.isfinite(gain))
        known = known[thin(len(known))]
        bottom.plot(run.steps[known], gain[known], color=colour, lw=1.8)
        return inline_svg(figure, f"Reward and gain of {clean(result.name)} over the steps")


def _evaluations(axes: Axes, points: list[EvalPoint]) -> None:
    x = np.array([p.step for p in points], dtype=np.float64)
    y, e = np.array([p.reward for p in points]), np.nan_to_num([ERRORS * p.error for p in points])
    bars(axes, x, y - e, y + e, INK, 1.2, 1.0)
    axes.plot(x, y, ls="none", marker="D", ms=5.5, color=PAPER, mec=INK, mew=1.3, clip_on=False, zorder=5)


def warm_start(steps: Array, loss: Array) -> Markup:
    """Loss of the supervised warm start."""
    with theme():
        figure = new_figure(420, 190)
        axes = figure.add_axes((0.14, 0.19, 0.83, 0.75))
        axes.plot(steps, loss, color=INK, lw=2, marker="o" if len(steps) < 2 else None)
        axes.set_ylim(0 if np.nanmin(loss) >= 0 else None, None)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.grid(axis="x", visible=False)
        axes.tick_params(length=0, pad=4)
        axes.set_xlabel("warm-start step", labelpad=2)
        return inline_svg(figure, "Loss of the supervised warm start")
