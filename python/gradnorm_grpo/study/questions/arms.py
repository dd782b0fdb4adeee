"""What does sampling tasks by their gradients do? Held-out accuracy of each arm, paired with uniform by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from ... import plots
from ...numbers import clean, signed
from ..decision import NO_DIFFERENCE, Decision, tost
from ..measurements import Measurements, Run
from ..stats import ALPHA, Interval, holm, t_interval
from .common import BASELINE, Answer, bounds, interval_over, number, p_value, scarce, with_interval
from .drawing import AXIS, nothing, sheet, stacked
from .reading import Reading, Row

QUESTION = "What does sampling tasks by their gradients do?"
ARM = "proportional"
CLAIM = (
    "Sampling tasks in proportion to their gradients gives a higher mean held-out accuracy at the end than uniform "
    "sampling, at an equal budget of rollouts."
)
#: The claim of a study that declared the average over training to be the primary accuracy.
CLAIM_AVERAGE = (
    "Sampling tasks in proportion to their gradients gives a higher mean held-out accuracy over training (the mean of "
    "the evaluations after step 0) than uniform sampling, at an equal budget of rollouts."
)
WHEN = {"end": "at the end", "average": "mean of the evaluations after step 0"}
BUDGET = 1e-3  # relative difference of rollouts that still counts as the same budget


def answer(m: Measurements) -> Answer:
    """Held-out accuracy of each arm and its difference from uniform, paired by seed."""
    arms = [arm for arm in m.arms if any(run[0] == arm for run in m.runs)]
    baseline = BASELINE if BASELINE in arms else None
    places: list[tuple[str | None, list[str]]] = [(None, list(m.tasks)), *((task, [task]) for task in m.tasks)]
    final = [
        {"arm": arm, "task": task} | _over({seed: _accuracy(m, (arm, seed), tasks, "end") for seed in _seeds(m, arm)})
        for arm in arms
        for task, tasks in places
    ]
    differences = []
    compared = [arm for arm in arms if baseline and arm != baseline]
    for when in WHEN:
        rows = {(arm, task): _over(paired(m, arm, tasks, when)) for arm in compared for task, tasks in places}
        p = {arm: t_interval(_values(rows[arm, None])).p for arm in compared}
        adjusted = _adjusted(p, m.decision)
        for (arm, task), row in rows.items():
            known = {"p": p[arm], "p_holm": adjusted[arm]} if task is None else {"p": math.nan, "p_holm": math.nan}
            differences.append({"arm": arm, "task": task, "when": when} | row | known)
    counts = [rollouts(m, run) for run in m.runs]
    equal = _equal(counts)
    primary = m.declared.primary
    own = next((row for row in differences if (row["arm"], row["task"], row["when"]) == (ARM, None, primary)), None)
    verdict = _verdict(own, equal, m.declared)
    data = {
        "baseline": baseline,
        "final": final,
        "differences": differences,
        "curves": [_curve(m, arm, task, tasks) for arm in arms for task, tasks in places],
        "rollouts": [{"arm": arm, "seed": seed, "rollouts": n} for (arm, seed), n in zip(m.runs, counts, strict=True)],
        **({"primary": primary} if m.decision else {}),
    }
    numbers = _numbers(final, differences, equal, counts, bool(m.decision)) + _equivalence(differences, m.declared)
    claim = CLAIM_AVERAGE if primary == "average" else CLAIM
    return Answer(verdict, _sentence(m, arms, differences, own, equal), numbers, data, claim)


def _adjusted(p: dict[str, float], decision: Mapping[str, Any]) -> dict[str, float]:
    """Holm's p of each arm, over all of them; where a decision was declared, ARM is tested by itself."""
    family = [arm for arm in p if not (decision and arm == ARM)]
    return p | dict(zip(family, holm([p[arm] for arm in family]), strict=True))


def _pairs(row: dict[str, Any]) -> int:
    """How many seeds have a difference."""
    return sum(map(math.isfinite, _values(row)))


def _verdict(own: dict[str, Any] | None, equal: bool, declared: Decision) -> str:
    """On ARM minus BASELINE: a direction first, then "no difference larger than d"."""
    if not (own and equal) or _pairs(own) < declared.seeds:
        return "undecided"
    if own["p_holm"] < ALPHA:
        return "supported" if own["value"] > 0 else "contradicted"
    return NO_DIFFERENCE if tost(_values(own), declared.margin("arms")) < ALPHA else "undecided"


def _equivalence(differences: Sequence[dict[str, Any]], declared: Decision) -> list[dict[str, Any]]:
    """p of "no difference larger than d" for every arm's mean accuracy; nothing where no d was declared."""
    margin = declared.margin("arms")
    if math.isnan(margin):
        return []
    how = f"larger p of two one-sided t tests over seeds, at -{margin:g} and {margin:g}; not adjusted"
    return [
        number(
            f"p that {row['arm']} differs from {BASELINE} by more than {margin:g}, {row['when']}",
            tost(_values(row), margin),
            how=how,
        )
        for row in differences
        if row["task"] is None
    ]


def _seeds(m: Measurements, *arms: str) -> list[int]:
    """The seeds that all of these arms have a run of."""
    return [seed for seed in m.seeds if all((arm, seed) in m.runs for arm in arms)]


def _points(m: Measurements, run: Run, tasks: Sequence[str]) -> dict[int, float]:
    """Held-out accuracy by step: the mean over the tasks at the steps where all of them were evaluated."""
    each = []
    for task in tasks:
        steps, rewards, _ = m.evaluation(*run, task)
        each.append(dict(zip(steps.tolist(), rewards.tolist(), strict=True)))
    common = set.intersection(*map(set, each)) if each else set()
    return {step: sum(points[step] for points in each) / len(each) for step in sorted(common)}


def _accuracy(m: Measurements, run: Run, tasks: Sequence[str], when: str) -> float:
    """At the end, or the average of the evaluations after step 0; NaN where there is none."""
    after = [value for step, value in _points(m, run, tasks).items() if step > 0]
    if not after:
        return math.nan
    return after[-1] if when == "end" else sum(after) / len(after)


def paired(m: Measurements, arm: str, tasks: Sequence[str], when: str) -> dict[int, float]:
    """Seed -> arm minus baseline, for the seeds that both arms have."""
    return {
        seed: _accuracy(m, (arm, seed), tasks, when) - _accuracy(m, (BASELINE, seed), tasks, when)
        for seed in _seeds(m, arm, BASELINE)
    }


def _over(by_seed: dict[int, float]) -> dict[str, Any]:
    per_seed = [{"seed": seed, "value": value} for seed, value in by_seed.items()]
    return {**bounds(t_interval(list(by_seed.values()))), "per_seed": per_seed}


def _values(row: dict[str, Any]) -> list[float]:
    return [entry["value"] for entry in row["per_seed"]]


def _curve(m: Measurements, arm: str, task: str | None, tasks: Sequence[str]) -> dict[str, Any]:
    points = [_points(m, (arm, seed), tasks) for seed in _seeds(m, arm)]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    found = [t_interval([own[step] for own in points]) for step in steps]
    ends = {side: [getattr(interval, side) for interval in found] for side in ("value", "low", "high")}
    return {"arm": arm, "task": task, "steps": steps, **ends}


def rollouts(m: Measurements, run: Run) -> float:
    """Completions sampled in a run; NaN where that was not measured."""
    found = m.array(*run, "rollouts")
    return float(np.nansum(found)) if np.isfinite(found).any() else math.nan


def _equal(counts: Sequence[float]) -> bool:
    return bool(counts) and max(counts) - min(counts) <= BUDGET * max(counts)  # NaN compares as unequal


def _numbers(
    final: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    equal: bool,
    counts: Sequence[float],
    declared: bool,
) -> list[dict[str, Any]]:
    numbers, others = [], "other " if declared else ""
    for row in final:
        name, how = f"accuracy of {row['arm']}, {row['task'] or 'mean over tasks'}", interval_over(_values(row))
        numbers.append(number(name, row["value"], row["low"], row["high"], f"at the end; {how}"))
    for row in differences:
        if row["task"] is not None and row["when"] != "end":
            continue
        how = f"{WHEN[row['when']]}, paired by seed; {interval_over(_values(row))}"
        if math.isfinite(row["p"]):
            alone = declared and row["arm"] == ARM
            how += f"; p = {p_value(row['p'])}"
            how += ", tested by itself" if alone else f", {p_value(row['p_holm'])} after Holm for the {others}arms"
        elif row["task"] is not None:
            how += "; one of many, not adjusted"
        name = f"{row['arm']} minus {BASELINE}, {row['task'] or 'mean over tasks'}, {row['when']}"
        numbers.append(number(name, row["value"], row["low"], row["high"], how))
    if counts:
        how = "fewest and most of all runs; " + ("the same budget" if equal else "not the same budget")
        mean = sum(counts) / len(counts)
        numbers.append(number("rollouts of a run", mean, min(counts), max(counts), how) | {"level": None})
    return numbers


def _sentence(
    m: Measurements,
    arms: Sequence[str],
    differences: Sequence[dict[str, Any]],
    own: dict[str, Any] | None,
    equal: bool,
) -> str:
    if not m.runs:
        return scarce(m, m.runs)
    if BASELINE not in arms or ARM not in arms:
        lacking = " and ".join(arm for arm in (BASELINE, ARM) if arm not in arms)
        return f"Undecided: there is no finished run of {lacking}."
    declared = m.declared
    shown = [f"{clean(row['arm'])} {_difference(row)}" for row in _means(differences, declared.primary)]
    where = "at the end" if declared.primary == "end" else "over training"
    first = f"Mean held-out accuracy {where}, minus that of uniform, paired by seed: {'; '.join(shown)}."
    if own is None or math.isnan(own["value"]):
        return f"Undecided: the arms have no evaluation after step 0 in common. {first}"
    if not equal:
        return f"{first} Undecided: the runs did not have the same number of rollouts."
    if math.isnan(own["p"]):
        if sum(map(math.isfinite, _values(own))) < 2:
            return f"{first} Undecided: with one pair of runs nothing is known about how far another seed would differ."
        return (
            f"{first} Undecided: the seeds differ by exactly the same amount, so the evaluation is too coarse to tell."
        )
    if _pairs(own) < declared.seeds:
        return f"{first} Undecided: {_pairs(own)} pairs of runs are finished, fewer than the declared {declared.seeds}."
    margin, p_tost = declared.margin("arms"), tost(_values(own), declared.margin("arms"))
    bound = f"no difference larger than {margin:g} (p = {p_value(p_tost)} of two one-sided tests)"
    if own["p_holm"] >= ALPHA:
        if p_tost < ALPHA:
            return f"{first} Proportional sampling makes {bound}."
        return f"{first} Undecided: proportional sampling is not told apart from uniform."
    word = "higher" if own["value"] > 0 else "lower"
    verb = "ends" if declared.primary == "end" else "is"
    how = "" if m.decision else " after Holm for the arms"
    small = f", by {bound}" if p_tost < ALPHA else ""
    return f"{first} Proportional sampling {verb} {word} (p = {p_value(own['p_holm'])}{how}){small}."


_Row = TypeVar("_Row", bound=dict[str, Any])


def _means(differences: Sequence[_Row], when: str = "end") -> list[_Row]:
    """The differences of mean accuracy, at the end or over training: what the verdict is about."""
    return [row for row in differences if row.get("task") is None and row.get("when") == when]


def _difference(row: dict[str, Any]) -> str:
    return with_interval(Interval(row["value"], row["low"], row["high"]), lambda x: signed(x, 3))


# The figure

_MEAN, _MEAN_AVERAGE = "mean, at the end", "mean, average over training"
_STEP = 12.0  # pixels between the arms of a row
_CURVES = 170.0


def draw(a: Reading) -> Figure:
    """Differences from uniform and accuracies, one row per task, and the mean accuracy over training."""
    final, differences, baseline = a.rows("final", "value"), a.rows("differences", "value"), a.data.get("baseline")
    curves = [c for c in a.rows("curves") if c.get("task") is None and np.isfinite(c.get("value") or []).any()]
    arms = a.names("arm", final, differences, curves)
    if not arms:
        return nothing(a, "No arm has a held-out accuracy.")
    tasks = a.names("task", final, differences)
    means = [_MEAN, *([_MEAN_AVERAGE] if any(d["when"] == "average" for d in differences) else [])]
    names = [*means, *tasks]
    row = 14 + _STEP * len(arms)
    upper, lower = 28 + row * len(names) + AXIS, 28 + _CURVES + AXIS if curves else 0.0
    key = [(mark(a, arm), shade(a, arm), True, arm) for arm in arms]
    counts = plots.finite(plots.numbers(r["rollouts"] for r in a.rows("rollouts")))
    budget = " to ".join(dict.fromkeys(f"{n:,.0f}" for n in (counts.min(), counts.max()))) if counts.size else ""
    note = "Bars are 95% intervals over seeds; none are drawn where there is one seed."
    figure = sheet(a, [f"{note} Rollouts per run: {budget}." if budget else note], upper + lower, key)
    top, *below = stacked(figure, [upper, lower]) if curves else [figure]
    left, right = top.subplots(1, 2)
    left.set_title(plots.fit(f"Minus {baseline}, paired by seed" if baseline else "Differences", 260))
    right.set_title("Held-out accuracy at the end")
    others = [arm for arm in arms if arm != baseline]
    for axes, width, shown, found in (
        (left, 190, others, [d for d in differences if d["arm"] in others]),
        (right, 0, arms, final),
    ):
        plots.rows(axes, names, width)
        if axes is left and not found:
            left.set_xticks([])
            left.spines["bottom"].set_visible(False)
            left.text(0.5, 0.5, "nothing to compare with", transform=left.transAxes, ha="center", color=plots.SOFT)
            continue
        plots.linear(axes, "x", np.ravel([d.interval() for d in found]), zero=axes is left)
        axes.set_xlabel("difference of held-out accuracy" if axes is left else "held-out accuracy")
        axes.axhspan(-0.5, len(means) - 0.5, color=plots.SHADE, lw=0, zorder=0)
        _fill(axes, a, found, shown, names, row)
    if curves:
        _curves(below[0].subplots(), a, curves)
    return figure


def mark(a: Reading, arm: str) -> str:
    """The arm's marker: a square for what the others are compared with."""
    return "s" if arm == a.data.get("baseline") else "o"


def shade(a: Reading, arm: str) -> str:
    """The arm's colour: ink for what the others are compared with."""
    return plots.INK if arm == a.data.get("baseline") else plots.colour(a.place(arm, "arm"))


def _primary(a: Reading) -> str:
    """The accuracy that the verdict is about."""
    return str(a.data.get("primary") or "end")


def compared_arms(a: Reading) -> list[str]:
    """The arms whose mean accuracy is compared with the baseline's."""
    found = _means(a.rows("differences", "value"), _primary(a))
    return a.names("arm", [d for d in found if d["arm"] != a.data.get("baseline")])


def mean_differences(axes: Axes, a: Reading, arms: Sequence[str], row: float) -> None:
    """One row of ``row`` pixels per arm: the difference of the primary mean accuracy, and below it each seed's."""
    found = {d["arm"]: d for d in _means(a.rows("differences"), _primary(a))}
    plots.linear(axes, "x", np.ravel([found[arm].interval() for arm in arms]), zero=True, most=4)
    for y, arm in enumerate(arms):
        seeds = plots.numbers(s["value"] for s in found[arm].rows("per_seed"))
        axes.plot(seeds, np.full(seeds.size, y + 12 / row), ls="none", marker="|", ms=7, color=plots.SOFT, mew=1.2)
        plots.interval(axes, y, found[arm].interval(), shade(a, arm), size=9, width=3)


def _fill(axes: Axes, a: Reading, found: Sequence[Row], arms: Sequence[str], names: Sequence[str], row: float) -> None:
    """The intervals of every record on its row, the arms below each other."""
    for record in found:
        task, average = record.get("task"), record.get("when") == "average"
        name = task or (_MEAN_AVERAGE if average else _MEAN)
        if (average and task) or record["arm"] not in arms:
            continue
        y = names.index(name) + (arms.index(record["arm"]) - (len(arms) - 1) / 2) * _STEP / row
        style: dict[str, Any] = {"size": 5.5, "width": 1.5} if task else {"size": 7, "width": 2.6}
        own, sign = shade(a, record["arm"]), mark(a, record["arm"])
        plots.interval(axes, y, record.interval(), own, mark=sign, **style)


def _curves(axes: Axes, a: Reading, curves: Sequence[Row]) -> None:
    """Mean held-out accuracy of each arm over training."""
    axes.set_title("Held-out accuracy over training, mean over tasks and seeds")
    parts = [[plots.numbers(curve[key]) for key in ("steps", "value", "low", "high")] for curve in curves]
    plots.linear(axes, "y", np.concatenate([values for part in parts for values in part[1:]]))
    plots.linear(axes, "x", np.concatenate([steps for steps, *_ in parts]), most=8)
    axes.set_xlabel("step")
    for i, (curve, (steps, value, low, high)) in enumerate(zip(curves, parts, strict=True)):
        own, sign = shade(a, curve["arm"]), mark(a, curve["arm"])
        # Beside each other by some pixels: the arms' intervals would hide one another.
        beside = ScaledTranslation((i - (len(curves) - 1) / 2) * 5 / 72, 0, axes.figure.dpi_scale_trans)
        place = axes.transData + beside
        axes.plot(steps, value, color=own, lw=1.8, marker=sign, ms=5, zorder=3, transform=place)
        axes.vlines(steps, low, high, color=own, lw=1.2, alpha=0.6, zorder=2, transform=place)
