"""Which estimator of U, and what does a randomly projected sketch cost and lose? From estimators/seed<seed>.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ... import plots
from ...numbers import significant
from ..measurements import Measurements
from ..stats import ALPHA, LEVEL, known_median
from .common import Answer, count_of, number
from .drawing import AXIS, empty, sheet, stacked
from .reading import Reading, Row

QUESTION = "Which estimator, and what does a sketch of each prompt's gradient cost and lose?"
CLAIM = (
    "A randomly projected sketch of each prompt's gradient, at most 256 wide on either side, is enough for U: the "
    "error it adds is smaller than the error that the choice of prompts leaves. (The paper calls for more efficient "
    "estimation.)"
)
NAMES = {"cross_product": "cross-product", "plug_in": "plug-in", "two_batch": "two-batch split"}
TYPICAL = 8  # prompts of a task in a step of the tiny preset
WIDEST = 256


def answer(m: Measurements) -> Answer:
    """The estimators against the number of prompts, and each width of the sketches."""
    found = m.estimates
    by_n = _by_n(found)
    widths = sorted({row["width"] for entry in found for row in entry["sketches"] if not row["skipped"]})
    sketches = [_sketch(found, width) for width in widths]
    # The widest that the claim allows is judged, and no other: of several, one would be good by chance.
    judged = next((row for row in sketches[::-1] if row["width"] <= WIDEST), None)
    verdict = "undecided"
    if judged and judged["sd_over_se_high"] < 1:
        verdict = "supported"
    elif judged and judged["sd_over_se_low"] > 1:
        verdict = "contradicted"
    prompts = sorted({entry["prompts"] for entry in found})
    reference = f"U over all {' or '.join(map(str, prompts))} stored prompts of a task" if prompts else ""
    data = {"by_n": by_n, "sketches": sketches, "reference": reference}
    return Answer(verdict, _sentence(found, by_n, sketches, judged, verdict), _numbers(by_n, sketches, found), data)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _rows(found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(task, whether its U is significant, row) of every estimator, number of prompts, task and seed.

    An error can be expressed in units of U only where U is significant.
    """
    for entry in found:
        for task, own in entry["tasks"].items():
            for row in own["estimators"]:
                yield task, own["reference"]["significant"], row


def _trusted(entry: dict[str, Any]) -> list[str]:
    return [task for task, own in entry["tasks"].items() if own["reference"]["significant"]]


def _by_n(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each estimator at each n: per task, the mean over seeds; and (task None) the median over significant tasks."""
    rows: dict[tuple[str, int, str | None], list[dict[str, Any]]] = {}
    for task, trusted, row in _rows(found):
        for key in (task, None) if trusted else (task,):
            rows.setdefault((row["estimator"], row["n"], key), []).append(row)
    made = []
    for (name, n, key), own in sorted(rows.items(), key=lambda item: item[0][2] is None):
        middle = known_median if key is None else np.mean
        keys = ("bias", "sd_fresh", "bias_rel", "sd_fresh_rel")
        bias, sd, bias_rel, sd_rel = (float(middle([_number(row[field]) for row in own])) for field in keys)
        if key is None:
            bias = sd = math.nan
        # The biases are exact expectations over all subsets: they have no interval. Spreads are those of fresh
        # prompts: over subsets of the stored ones they shrink to zero when all are taken.
        exact = {"bias": bias, "bias_low": math.nan, "bias_high": math.nan, "sd": sd}
        row = {"estimator": NAMES.get(name, name), "n": n, "task": key, **exact}
        made.append(row | {"relative_bias": bias_rel, "relative_sd": sd_rel})
    return made


def _sketch(found: Sequence[dict[str, Any]], width: int) -> dict[str, Any]:
    """One width. ``sd_over_se``: spread of U over sketches by U's own standard error, the worst task of all seeds.

    Its interval is that of a standard deviation over the sketches drawn (chi-squared), Bonferroni over tasks and seeds.
    """
    pairs = [(e, own) for e in found for own in e["sketches"] if own["width"] == width and not own["skipped"]]
    trusted = [(entry["tasks"][task], own["tasks"][task]) for entry, own in pairs for task in _trusted(entry)]
    errors = [error for _, task in trusted if math.isfinite(error := abs(_number(task["u_sd_rel"])))]
    pairing = [
        _number(sketched["rmse_all_pairs"]) / apart
        for exact, sketched in trusted
        for row in exact["microbatches"]
        if row["size"] == TYPICAL and (apart := _number(row["sd"])) > 0
    ]

    def seconds(what: str) -> float:
        rows = [row for entry, _ in pairs for row in entry["cost"]["rows"]]
        return known_median(
            _number(row["seconds"]) for row in rows if row["what"] == what and row["width"] in (None, width)
        )

    ratios = [_number(task["u_sd_over_se"]) for _, own in pairs for task in own["tasks"].values()]
    worst = max(ratios, default=math.nan) if all(map(math.isfinite, ratios)) else math.nan
    low = high = math.nan
    free = min((entry["options"]["sketches"] for entry, _ in pairs), default=0) - 1
    if free > 0 and math.isfinite(worst):
        tail = ALPHA / 2 / len(ratios)
        low, high = (worst * math.sqrt(free / float(stats.chi2.ppf(q, free))) for q in (1 - tail, tail))
    return {
        "width": width,
        "relative_error": known_median(errors),
        "low": min(errors, default=math.nan),
        "high": max(errors, default=math.nan),
        "seconds": seconds("sketch_gram"),
        "exact_seconds": seconds("gram"),
        "norms_seconds": seconds("norms"),
        "size": known_median(own["bytes_per_prompt"] / own["exact_bytes_per_prompt"] for _, own in pairs),
        "error_by_microbatches": known_median(pairing),
        "sd_over_se": worst,
        "sd_over_se_low": low,
        "sd_over_se_high": high,
        "kendall_tau": known_median(_number(own["order"]["kendall_tau_mean"]) for _, own in pairs),
    }


def _numbers(
    by_n: Sequence[dict[str, Any]], sketches: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    numbers = []
    for row in by_n:
        if row["task"] is None and row["n"] == _typical(by_n):
            how = f"in units of U, at {row['n']} prompts; median over the tasks whose U is told apart from zero"
            numbers.append(number(f"bias of the {row['estimator']}", row["relative_bias"], how=f"{how}; exact"))
            numbers.append(number(f"spread of the {row['estimator']}", row["relative_sd"], how=how))
    numbers += _coverages(found)
    drawn = min((entry["options"]["sketches"] for entry in found), default=0)
    for row in sketches:
        of = f"sketch {row['width']} wide"
        how = f"largest over tasks and seeds; chi-squared over {drawn} sketches, Bonferroni over tasks and seeds"
        ends = (row["sd_over_se_low"], row["sd_over_se_high"])
        numbers.append(number(f"{of}: its error by U's standard error", row["sd_over_se"], *ends, how))
        how = "mean over sketches; median over seeds"
        numbers.append(number(f"{of}: Kendall's tau with the exact order of tasks", row["kendall_tau"], how=how))
        if row["exact_seconds"] > 0:
            share, how = row["seconds"] / row["exact_seconds"], "median times of one machine; the exact Gram is 1"
            numbers.append(number(f"{of}: its time by that of the exact Gram", share, how=how))
        how = f"all pairs of kept sketches by the pairs within micro-batches of {TYPICAL} prompts, of the same prompts"
        numbers.append(number(f"{of}: its error by that of micro-batches", row["error_by_microbatches"], how=how))
        numbers.append(number(f"{of}: its size by that of the gradients", row["size"], how="bytes a prompt"))
    return numbers


def _coverages(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often U +- 1.96 jackknife errors holds U of all stored prompts: median, lowest and highest of tasks.

    Shown at the n that is nearest to a step's, and at the largest that has a coverage.
    """
    shares: dict[int, list[float]] = {}
    for _, _, row in _rows(found):
        if row["coverage"] is not None:
            shares.setdefault(row["n"], []).append(row["coverage"])
    how = f"median, lowest and highest of tasks and seeds; {LEVEL:.0%} is meant, and groups of equal rewards lower it"
    name = "coverage of the cross-product's jackknife interval, {n} prompts"
    chosen = dict.fromkeys([_typical([{"n": n} for n in shares]), max(shares)]) if shares else {}
    return [
        number(name.format(n=n), known_median(shares[n]), min(shares[n]), max(shares[n]), how) | {"level": None}
        for n in chosen
    ]


def _typical(by_n: Sequence[dict[str, Any]]) -> int:
    """The n that is nearest to a step's."""
    return min((row["n"] for row in by_n), key=lambda n: (abs(n - TYPICAL), n), default=0)


def _sentence(
    found: Sequence[dict[str, Any]],
    by_n: Sequence[dict[str, Any]],
    sketches: Sequence[dict[str, Any]],
    judged: dict[str, Any] | None,
    verdict: str,
) -> str:
    if not found:
        return "Undecided: the estimators were not compared."
    n = _typical(by_n)
    at = {row["estimator"]: row for row in by_n if row["task"] is None and row["n"] == n}
    parts = []
    plug, cross, split = (at.get(NAMES[key]) for key in ("plug_in", "cross_product", "two_batch"))
    if plug and cross:
        parts.append(
            f"At {n} prompts a task the plug-in estimate is too large by {significant(plug['relative_bias'])} times U "
            "(median over the tasks whose U is told apart from zero), the cross-product by nothing"
        )
        if split and cross["relative_sd"] > 0:
            wider = significant(split["relative_sd"] / cross["relative_sd"])
            parts[-1] += f"; the two-batch split, unbiased too, spreads {wider} times as far"
    if judged is None or math.isnan(judged["sd_over_se_high"]):
        skipped = any(row["skipped"] for entry in found for row in entry["sketches"])
        why = (
            "no sketch is narrower than the layers" if skipped and not sketches else "the sketches' error is not known"
        )
        return ". ".join([*parts, f"Undecided: {why}."])
    ends = f"{significant(judged['sd_over_se_low'])} to {significant(judged['sd_over_se_high'])}"
    error = (
        f"A sketch {judged['width']} wide adds an error of {significant(judged['sd_over_se'])} times U's own standard "
        f"error to the task it treats worst (interval {ends}, {count_of(len(found), 'seed')})"
    )
    if judged["exact_seconds"] > 0:
        error += f", in {significant(judged['seconds'] / judged['exact_seconds'])} of the exact inner products' time"
    parts.append(error)
    if math.isfinite(judged["error_by_microbatches"]):
        size, ratio = significant(judged["size"]), significant(judged["error_by_microbatches"])
        parts.append(
            f"Kept sketches ({size} of the gradients' bytes) pair prompts of different micro-batches: U then has "
            f"{ratio} times the error of micro-batches of {TYPICAL} prompts"
        )
    if judged["seconds"] > 0 and judged["norms_seconds"] > 0:
        share = significant(judged["norms_seconds"] / judged["seconds"])
        parts.append(
            "Where a task's prompts are all in one micro-batch no sketch is needed: exact norms take "
            f"{share} of its time"
        )
    if verdict == "undecided":
        parts.append("Undecided: that is shown to be neither less nor more than the error of the prompts")
    return ". ".join(parts) + "."


# The figure

_HIGH = 190.0 + 28 + AXIS
_ZERO = 1e-9  # of the largest: a spread below it is rounding
#: What a sketch would replace: key of its seconds, label, colour.
_EXACT = (
    ("exact_seconds", "exact inner products of all prompts", plots.colour(0)),
    ("norms_seconds", "exact norms of one micro-batch", plots.colour(2)),
)
#: Colour and marker of an estimator, by how its name begins.
_STYLES = {
    "cross-product": (plots.colour(0), "o"),
    "plug-in": (plots.colour(1), "D"),
    "two-batch": (plots.colour(2), "s"),
}


def draw(a: Reading) -> Figure:
    """Bias and spread of the estimators against n, and what a sketch loses and costs."""
    by_n, sketches = a.rows("by_n", "relative_bias", "relative_sd"), a.rows("sketches", "sd_over_se", "seconds")
    names = list(dict.fromkeys(map(_name, by_n)))
    styles = {name: _style(name, place) for place, name in enumerate(names)}
    key: list[plots.Entry] = [(mark, shade, True, name) for name, (shade, mark) in styles.items()]
    if by_n:
        key.append(("-", plots.FAINT, True, "faint lines: single tasks"))
    if sketches:
        key += [("--", plots.FAINT, True, "as large as the prompts' own error"), ("o", plots.INK, True, "sketches")]
        key += [("--", shade, True, label) for field, label, shade in _EXACT if a.rows("sketches", field)]
    heights = [_HIGH if by_n else 60.0, _HIGH if sketches else 60.0]
    figure = sheet(a, _notes(a, by_n, sketches), sum(heights), key)
    upper, lower = stacked(figure, heights)
    if by_n:
        bias, spread = upper.subplots(1, 2)
        _curves(bias, by_n, styles, "relative_bias", "Bias", "bias")
        _curves(spread, by_n, styles, "relative_sd", "Spread", "standard deviation")
    else:
        empty(upper.subplots(), "The estimators were not compared.")
    if sketches:
        error, cost = lower.subplots(1, 2)
        _sketch_errors(error, sketches)
        _sketch_costs(cost, sketches)
    else:
        empty(lower.subplots(), "No sketch was measured.")
    return figure


def _name(row: Row) -> str:
    return str(row["estimator"]).replace("_", "-")


def _style(name: str, place: int) -> tuple[str, str]:
    """Colour and marker of an estimator; one that has no fixed ones takes them by its place."""
    fixed = next((style for start, style in _STYLES.items() if name.startswith(start)), None)
    return fixed or (plots.colour(3 + place), "^v<>"[place % 4])


def _powers(axes: Axes, title: str, name: str, label: str, x: plots.Array, room: float) -> None:
    """Title and names of a panel over sizes that double: a logarithmic axis with a tick at each of them."""
    axes.set_title(title)
    axes.set_xlabel(name)
    axes.set_ylabel(label)
    plots.logarithmic(axes, "x", x, room)
    plots.ticks(axes, "x", sorted(set(plots.finite(x))))


def _curves(
    axes: Axes, by_n: Sequence[Row], styles: dict[str, tuple[str, str]], field: str, title: str, label: str
) -> None:
    """One line per estimator and task over n; that over all tasks in front. A bias may be zero, a spread may not."""
    values, n = plots.numbers(r[field] for r in by_n), plots.numbers(r["n"] for r in by_n)
    _powers(axes, f"{title}, as a multiple of U", "n, prompts of the task", f"{label} / U", n, 1.15)
    if field == "relative_bias":
        plots.holding_zero(axes, "y", values, values)
    else:
        values = np.where(values > _ZERO * np.nanmax(values), values, np.nan)
        plots.logarithmic(axes, "y", values, 1.4)
    tasks = sorted({r.get("task") for r in by_n}, key=str)
    for under, (name, (shade, mark)) in enumerate(styles.items()):
        for task in tasks:
            own = [i for i, r in enumerate(by_n) if _name(r) == name and r.get("task") == task]
            own.sort(key=lambda i: n[i])
            if task is None or tasks == [task]:
                # The first named lies in front, thinner, so that what it lies on is seen behind it.
                style: dict[str, Any] = {"lw": 2.0 + 1.2 * under, "ms": 6.0 + 2.5 * under, "zorder": 9 - under}
                axes.plot(n[own], values[own], color=shade, marker=mark, mec=plots.PAPER, mew=0.8, **style)
            else:
                axes.plot(n[own], values[own], color=shade, lw=0.9, alpha=0.35, zorder=2)


def _sketch_errors(axes: Axes, sketches: Sequence[Row]) -> None:
    """The error that a sketch adds to the worst task's U, by U's own standard error: at 1 it is as large as that."""
    width = plots.numbers(s["width"] for s in sketches)
    title, label = "Error that a sketch adds, worst task", "error / standard error of U"
    _powers(axes, title, "width of the sketch", label, width, 1.3)
    value, low, high = np.transpose([s.interval("sd_over_se") for s in sketches])
    plots.logarithmic(axes, "y", np.concatenate([value, low, high, [1.0]]), 1.5)
    axes.axhline(1, color=plots.FAINT, lw=2, ls="--", zorder=2)
    axes.plot(width, value, color=plots.INK, lw=1.6, marker="o", ms=7, zorder=3)
    known = np.isfinite(value + low + high)
    axes.vlines(width[known], low[known], high[known], color=plots.INK, lw=2)


def _sketch_costs(axes: Axes, sketches: Sequence[Row]) -> None:
    """Seconds of each sketch on the same widths, and as lines those of what it would replace."""
    width = plots.numbers(s["width"] for s in sketches)
    _powers(axes, "Its cost", "width of the sketch", "seconds", width, 1.3)
    seconds, *exact = (plots.numbers(s[k] for s in sketches) for k in ("seconds", *(k for k, _, _ in _EXACT)))
    plots.logarithmic(axes, "y", np.concatenate([seconds, *exact]), 1.6)
    axes.plot(width, seconds, color=plots.INK, lw=1.6, marker="o", ms=7, zorder=3)
    for values, (_, _, shade) in zip(exact, _EXACT, strict=True):
        for value in plots.finite(values)[:1]:
            axes.axhline(value, color=shade, lw=2, ls="--", zorder=2)


def _notes(a: Reading, by_n: Sequence[Row], sketches: Sequence[Row]) -> list[str]:
    notes: list[str] = []
    if by_n and a.data.get("reference"):
        notes.append(f"What counts as the truth: {a.data['reference']}.")
    if by_n:
        notes.append("The axis of the bias is linear in the shaded part, logarithmic outside it.")
    if any(r.get("task") is None for r in by_n):
        notes.append("Bold lines: the median of the tasks whose U is significant at two standard errors.")
    if sketches:
        notes.append("Bars of the sketches: 95% intervals over the sketches drawn.")
    return notes or [a.sentence]
