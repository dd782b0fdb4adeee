"""Do some tasks produce much larger gradients than others? U of each task, and the loudest task over the quietest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ... import plots
from ...numbers import clean, significant
from ..measurements import Mask, Measurements, Run, seeds_of
from ..stats import (
    ALPHA,
    NO_RATIO,
    Array,
    Ratio,
    ratio_over_seeds,
    ratio_within,
    scaled,
    t_interval,
    task_interval,
    tasks_alike,
    tasks_alike_within,
)
from .common import Answer, bounds, count_of, number, p_value, with_interval
from .drawing import AXIS, NAME, beside, empty, sheet
from .reading import Reading, Row, spelled

QUESTION = "Do some tasks produce much larger gradients than others?"
CLAIM = (
    "Some tasks produce larger gradients than others: the loudest task's squared gradient norm exceeds the quietest's."
)
PAPER = (15, 33)  # the ratios of squared norms that Wu et al. 2025 report
ALIKE = 2.0  # all pairs of tasks within this factor: no imbalance worth the name


def answer(m: Measurements) -> Answer:
    """U of each task, pooled over training and its thirds, and the ratio of the loudest to the quietest."""
    runs, whole = m.runs, m.every_step()
    u, error = m.by_seed(runs, whole)
    found = _ratio(m, runs, whole)
    p = tasks_alike(u) if len(u) > 1 else tasks_alike_within(u[0], error[0]) if len(u) else math.nan
    rows: list[tuple[str, Ratio]] = [("training", found)]
    rows += [(f"steps {first + 1}-{end}", _ratio(m, runs, m.span(first, end))) for first, end in m.thirds()]
    for arm in dict.fromkeys(arm for arm, _ in runs):
        rows.append((f"arm {arm}", _ratio(m, [run for run in runs if run[0] == arm], whole)))
    rows.append(("all parameters", _ratio(m, runs, whole, "full_")))
    numbers = [number(f"loudest / quietest, {where}", r.value, r.low, r.high, r.how) for where, r in rows]
    how = "permutation of the tasks within seeds" if len(u) > 1 else "chi-squared with the errors within the run"
    numbers.append(number("p that all tasks are alike", p, how=how))
    if found.low > 1 and p < ALPHA:
        verdict = "supported"
    else:
        verdict = "contradicted" if _all_alike(u, error) else "undecided"
    return Answer(verdict, _sentence(m, u, found, p, verdict), numbers, _data(m, rows))


def _ratio(m: Measurements, runs: Sequence[Run], steps: Mask, prefix: str = "") -> Ratio:
    if not runs or not steps.any():
        return NO_RATIO
    u, error = m.by_seed(runs, steps, prefix)
    if len(u) > 1:
        return ratio_over_seeds(u, error)
    # Every other measured step: two halves of training would have different weights.
    measured = steps & np.any([np.isfinite(m.array(*run, f"{prefix}grad_norm_sq")).any(0) for run in runs], axis=0)
    order = np.cumsum(measured) % 2
    halves = [m.pooled([runs], measured & (order == half), prefix) for half in (1, 0)]
    return ratio_within(*(np.concatenate(side) for side in zip(*halves, strict=True)))


def _all_alike(u: Array, error: Array) -> bool:
    """Whether each task's U is shown to be less than ``ALIKE`` times each other's: every pair at 5%, one-sided."""
    if not len(u) or not np.isfinite(u).all() or u.shape[1] < 2:
        return False
    return all(_less(u, error, a, b) for a, b in permutations(range(u.shape[1]), 2))


def _less(u: Array, error: Array, a: int, b: int) -> bool:
    """Whether U of task a is shown to be less than ``ALIKE`` times U of task b."""
    if len(u) > 1:
        share = scaled(u)
        margin = t_interval(ALIKE * share[:, b] - share[:, a])
        return margin.value > 0 and margin.p / 2 < ALPHA
    spread = math.hypot(ALIKE * error[0, b], error[0, a])
    return bool(ALIKE * u[0, b] - u[0, a] > stats.norm.ppf(1 - ALPHA) * spread)


def _sentence(m: Measurements, u: Array, found: Ratio, p: float, verdict: str) -> str:
    if not found.picks:
        lacking = "no run is finished" if not len(u) else "fewer than two tasks have enough measured steps"
        return f"Undecided: {lacking}, so there is nothing to compare."
    over = f"over {count_of(len(u), 'seed')}" if len(u) > 1 else "in the one seed (the error is that of its prompts)"
    picks = set(found.picks)
    if len(picks) == 1:
        loud, quiet = next(iter(picks))
        who = f"{clean(m.tasks[loud])} is the loudest task and {clean(m.tasks[quiet])} the quietest"
    else:
        who = "Which task is loudest and which quietest differs from part to part of the data"
    alike = f"(p = {p_value(p)} that all are alike)"
    if math.isnan(found.low) and math.isnan(found.value):
        text = f"{who}; the quietest is not distinguishable from zero, so their ratio has no bound {over} {alike}."
        return text if verdict == "contradicted" else f"{text} Undecided: the verdict needs a bound above 1."
    first = f"{who}; the squared norms are {_times(found)} times apart {over} {alike}."
    if verdict == "contradicted":
        return f"{first} All tasks are within a factor of {ALIKE:.0f} of one another."
    if verdict == "undecided":
        return f"{first} That is not told apart from no difference, nor shown to be small."
    low, high = PAPER
    if found.low > high or found.high < low:
        return f"{first} That is {'more' if found.low > high else 'less'} than the paper's {low} to {high}."
    if found.low >= low and found.high <= high:
        return f"{first} That is within the paper's {low} to {high}."
    return f"{first} The paper's {low} to {high} is not ruled out."


def _times(found: Ratio) -> str:
    """A ratio for a sentence: 18 (95% interval 9.1 to 36), or what is known of it."""
    if math.isnan(found.low) or math.isfinite(found.high):
        return with_interval(found, significant)
    least, sure = f"at least {significant(found.low)}", f"{1 - ALPHA / 2:.1%} sure"
    if math.isnan(found.value):
        why = "the quietest is not distinguishable from zero"
        return f"{least} ({sure}; {why})" if found.low > 0 else f"an unknown number of ({why})"
    bound = f"{least}, {sure}" if found.low > 0 else "no bound"
    return f"{significant(found.value)} ({bound}; the quietest is not told apart from zero)"


def unit(m: Measurements) -> str:
    """What U was measured on, in words."""
    return {"last_attention": "last attention block", "all": "all tracked layers"}.get(m.layers, m.layers)


def _data(m: Measurements, rows: list[tuple[str, Ratio]]) -> dict[str, Any]:
    seeds, (full, full_error) = seeds_of(m.runs), m.by_seed(m.runs, m.every_step(), "full_")
    overall, by_window = [], []
    for w, window in enumerate([(0, m.steps), *m.thirds()], -1):
        u, error = m.by_seed(m.runs, m.span(*window))
        plug, _ = m.by_seed(m.runs, m.span(*window), name="plug_in")
        for k, task in enumerate(m.tasks):
            found = bounds(task_interval(u[:, k], error[:, k]))
            plug_in = {"plug_in": t_interval(plug[:, k]).value}
            if w < 0:
                per_seed = [{"seed": seed, "value": u[s, k], "se": error[s, k]} for s, seed in enumerate(seeds)]
                of_all = bounds(task_interval(full[:, k], full_error[:, k]), "full")
                overall.append({"task": task, **found, "per_seed": per_seed, **plug_in, **of_all})
            else:
                by_window.append({"task": task, "window": w, **found, **plug_in})
    return {
        "unit": unit(m),
        "overall": overall,
        "windows": [{"window": w, "first": first + 1, "last": end} for w, (first, end) in enumerate(m.thirds())],
        "by_window": by_window,
        "ratios": [{"where": where, **bounds(r)} for where, r in rows],
        "paper": list(PAPER),
    }


# The figure

_PLUG_IN = "D"


def draw(a: Reading) -> Figure:
    """U of each task over training beside the plug-in estimate, and below it the ratios."""
    tasks, windows, overall = loudest_first(a), a.rows("windows"), a.rows("overall")
    ratios = [r for r in a.rows("ratios", "value", "low") if r.get("where")]
    plug_in = any(math.isfinite(r["plug_in"]) for r in overall)
    row = 26.0 + 9.0 * len(windows)
    upper = 24 + row * len(tasks) + AXIS if tasks else 90.0
    lower = 44 + 24.0 * len(ratios) + AXIS if ratios else 70.0
    notes = [bars(a)]
    key: list[plots.Entry] = []
    if plug_in:
        notes.append("The plug-in estimate is the squared norm of the mean gradient: it counts noise as signal.")
    if any(math.isfinite(r["low"]) and math.isnan(r["high"]) for r in ratios):
        notes.append("An arrow: only the lower end is known, since the quietest task's U may be zero.")
    if tasks:
        shades = [plots.tint(plots.SOFT, _strength(i, len(windows))) for i in range(len(windows))]
        key = [("o", plots.SOFT, True, "whole training")]
        key += [("o", s, True, f"steps {w['first']} to {w['last']}") for s, w in zip(shades, windows, strict=True)]
        key += [(_PLUG_IN, plots.SOFT, False, "plug-in, whole training")] if plug_in else []
    figure = sheet(a, notes, upper + lower, key)
    first, second = figure.subplots(2, 1, height_ratios=[upper, lower])
    measured = a.data.get("unit") or "measured layers"
    first.set_title(f"U, the squared norm of the expected gradient: {clean(measured)}")
    if tasks:
        plots.rows(first, tasks, NAME)
        pulls(first, a, tasks, row, windows)
    else:
        empty(first, "U of no task is known.")
    second.set_title("Loudest over quietest task", pad=20 if ratios else None)
    if ratios:
        _ratios(second, a, ratios)
    else:
        empty(second, "No ratio of two tasks is known.")
    return figure


def loudest_first(a: Reading) -> list[str]:
    """The tasks by U over training, those without one last."""
    overall = a.rows("overall", "value", "plug_in")
    size = {r["task"]: -r["value"] for r in overall if math.isfinite(r["value"])}
    return sorted(a.names("task", overall, a.rows("by_window", "value")), key=lambda t: size.get(t, math.inf))


def pulls(axes: Axes, a: Reading, tasks: list[str], row: float, windows: Sequence[Row] | None = None) -> None:
    """U of each task along its row, on an axis that holds zero; below it those of the windows of training."""
    overall = {r["task"]: r for r in a.rows("overall")}
    order = [window["window"] for window in windows or ()]
    parts = {(r["task"], r["window"]): r.interval() for r in a.rows("by_window") if r["window"] in order}
    found = np.array([overall.get(task, Row()).interval() for task in tasks])
    plug_in = np.array([overall.get(task, Row())["plug_in"] for task in tasks])
    sizes = np.concatenate([np.max(np.abs(np.nan_to_num(found)), axis=1), plug_in])
    plots.holding_zero(axes, "x", np.concatenate([found.ravel(), np.ravel(list(parts.values())), plug_in]), sizes)
    scale = "symmetric logarithmic" if windows is None else "linear in the shaded part, logarithmic outside it"
    axes.set_xlabel(f"U ({scale})")
    for y, task in enumerate(tasks):
        shade, mark = plots.colour(a.place(task)), plots.marker(a.place(task))
        top = y - 0.5 + 15 / row if order else float(y)
        axes.plot(plug_in[y], top, ls="none", marker=_PLUG_IN, ms=6.5, mfc="none", mec=plots.SOFT, mew=1.4, zorder=3.5)
        plots.interval(axes, top, found[y], shade, mark=mark, size=9, width=3)
        for i, window in enumerate(order):
            pale, place = plots.tint(shade, _strength(i, len(order))), top + (13 + 9 * i) / row
            plots.interval(axes, place, parts.get((task, window), Row().interval()), pale, size=5, width=1.6)


def bars(a: Reading) -> str:
    """What the bars of U are, in a sentence."""
    if len(a.seeds) == 1:
        return "Bars are 95% intervals of the one seed: of its prompts, not of other seeds."
    return "Bars are 95% intervals over seeds."


def _strength(place: int, count: int) -> float:
    """How dark a window of training is drawn: the later the darker."""
    return 0.45 + 0.45 * (place / (count - 1) if count > 1 else 1.0)


def _ratios(axes: Axes, a: Reading, ratios: list[Row]) -> None:
    """One row per ratio on a logarithmic axis, the paper's range behind them."""
    found = [r.interval() for r in ratios]
    plots.rows(axes, [r["where"] for r in ratios], NAME)
    paper = plots.numbers(a.data.get("paper") or [])
    plots.logarithmic(axes, "x", np.concatenate([np.ravel(found), paper, [1.0]]))
    axes.set_xlabel("ratio of U")
    axes.axvline(1, color=plots.INK, lw=1, zorder=1.5)
    if len(paper) == 2 and np.isfinite(paper).all():
        axes.axvspan(*paper, color=plots.BAND, lw=0, zorder=0)
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": plots.SOFT, "fontsize": plots.SMALL}
        where: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points"}
        axes.annotate(f"the paper: {paper[0]:g} to {paper[1]:g}", (math.sqrt(paper.prod()), -0.5), **where, **style)
    for y, one in enumerate(found):
        strong = y == 0
        shade, size = (plots.INK, 9.0) if strong else (plots.SOFT, 7.0)
        plots.interval(axes, y, one, shade, size=size, width=2.6 if strong else 1.8)
        beside(axes, y, spelled(one), strong)
