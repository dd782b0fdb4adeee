"""Which estimator of U, and what a randomly projected sketch costs and loses: from estimators/seed<seed>.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ...numbers import significant
from ..statistics import ALPHA, LEVEL
from .common import answer_of, count_of, number

QUESTION = "Which estimator, and what does a sketch of each prompt's gradient cost and lose?"
CLAIM = (
    "A randomly projected sketch of each prompt's gradient, at most 256 wide on either side, is enough for U: the "
    "error it adds is smaller than the error that the choice of prompts leaves. (The paper calls for more efficient "
    "estimation.)"
)
NAMES = {"cross_product": "cross-product", "plug_in": "plug-in", "two_batch": "two-batch split"}
_RELATIVE = ("bias_rel", "sd_fresh_rel")  # of fresh prompts: that of subsets shrinks to nothing when all are taken
TYPICAL = 8  # prompts of a task in a step of the tiny preset
WIDEST = 256


def answer(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``found``: the content of the files, one a seed; an empty list gives an undecided answer."""
    by_n = _by_n(found)
    sketches = [_sketch(found, width) for width in _widths(found)]
    numbers = _numbers(by_n, sketches, found)
    # The widest that the claim allows is judged, and no other: of several, one would be good by chance.
    judged = next((row for row in sketches[::-1] if row["width"] <= WIDEST), None)
    verdict = "undecided"
    if judged and judged["sd_over_se_high"] < 1:
        verdict = "supported"
    elif judged and judged["sd_over_se_low"] > 1:
        verdict = "contradicted"
    prompts = sorted({entry["prompts"] for entry in found})
    data = {
        "by_n": by_n,
        "sketches": sketches,
        "reference": f"U over all {' or '.join(map(str, prompts))} stored prompts of a task" if prompts else "",
    }
    sentence = _sentence(found, by_n, sketches, judged, verdict)
    return answer_of("estimators", QUESTION, CLAIM, verdict, sentence, numbers, data)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def _trusted(entry: dict[str, Any]) -> list[str]:
    """The tasks whose U is told apart from zero: only by these can an error be divided."""
    return [task for task, own in entry["tasks"].items() if own["reference"]["significant"]]


def _by_n(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every estimator at every n: of each task, mean over seeds; and (task None) the median over resolved tasks."""
    rows: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    relative: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in found:
        trusted = _trusted(entry)
        for task, own in entry["tasks"].items():
            for row in own["estimators"]:
                rows.setdefault((row["estimator"], row["n"], task), []).append(row)
                if task in trusted:
                    relative.setdefault((row["estimator"], row["n"]), []).append(row)
    made = []
    for (name, n, task), own in rows.items():
        means = {key: float(np.mean([_number(row[key]) for row in own])) for key in ("bias", "sd_fresh", *_RELATIVE)}
        made.append(_row(name, n, task, **means))
    for (name, n), own in relative.items():
        medians = {key: _median(_number(row[key]) for row in own) for key in _RELATIVE}
        made.append(_row(name, n, None, math.nan, math.nan, **medians))
    return made


def _row(
    name: str, n: int, task: str | None, bias: float, sd_fresh: float, bias_rel: float, sd_fresh_rel: float
) -> dict[str, Any]:
    # The biases are exact expectations over all subsets: they have no interval.
    exact = {"bias": bias, "bias_low": math.nan, "bias_high": math.nan, "sd": sd_fresh}
    row = {"estimator": NAMES.get(name, name), "n": n, "task": task, **exact}
    return row | {"relative_bias": bias_rel, "relative_sd": sd_fresh_rel}


def _widths(found: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["width"] for entry in found for row in entry["sketches"] if not row["skipped"]})


def _sketch(found: Sequence[dict[str, Any]], width: int) -> dict[str, Any]:
    """One width. ``sd_over_se``: spread of U over sketches by U's own standard error, the worst task of all seeds.

    Its interval is that of a standard deviation over the sketches drawn (chi-squared), Bonferroni over tasks and seeds.
    """
    errors, ratios, taus, drawn = [], [], [], []
    times: dict[str, list[float]] = {"sketch_gram": [], "gram": [], "norms": []}
    sizes, pairing = [], []
    for entry in found:
        own = next((row for row in entry["sketches"] if row["width"] == width and not row["skipped"]), None)
        if own is None:
            continue
        drawn.append(entry["options"]["sketches"])
        taus.append(_number(own["order"]["kendall_tau_mean"]))
        ratios += [_number(task["u_sd_over_se"]) for task in own["tasks"].values()]
        errors += [abs(_number(own["tasks"][task]["u_sd_rel"])) for task in _trusted(entry)]
        for row in entry["cost"]["rows"]:
            if row["what"] in times and row["width"] in (None, width):
                times[row["what"]].append(_number(row["seconds"]))
        sizes.append(own["bytes_per_prompt"] / own["exact_bytes_per_prompt"])
        for task in _trusted(entry):
            apart = [row["sd"] for row in entry["tasks"][task]["microbatches"] if row["size"] == TYPICAL]
            if apart and _number(apart[0]) > 0:
                pairing.append(_number(own["tasks"][task]["rmse_all_pairs"]) / apart[0])
    known = [error for error in errors if math.isfinite(error)]
    worst = max(ratios, default=math.nan) if all(map(math.isfinite, ratios)) else math.nan
    low = high = math.nan
    if drawn and min(drawn) > 1 and math.isfinite(worst):
        free, tail = min(drawn) - 1, ALPHA / 2 / len(ratios)
        low, high = (worst * math.sqrt(free / float(stats.chi2.ppf(q, free))) for q in (1 - tail, tail))
    return {
        "width": width,
        "relative_error": _median(known),
        "low": min(known, default=math.nan),
        "high": max(known, default=math.nan),
        "seconds": _median(times["sketch_gram"]),
        "exact_seconds": _median(times["gram"]),
        "norms_seconds": _median(times["norms"]),
        "size": _median(sizes),
        "error_by_microbatches": _median(pairing),
        "sd_over_se": worst,
        "sd_over_se_low": low,
        "sd_over_se_high": high,
        "kendall_tau": _median(taus),
    }


def _numbers(
    by_n: Sequence[dict[str, Any]], sketches: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    nan, numbers = math.nan, []
    for row in by_n:
        if row["task"] is None and row["n"] == _typical(by_n):
            how = f"in units of U, at {row['n']} prompts; median over the tasks whose U is told apart from zero"
            numbers.append(number(f"bias of the {row['estimator']}", row["relative_bias"], nan, nan, f"{how}; exact"))
            numbers.append(number(f"spread of the {row['estimator']}", row["relative_sd"], nan, nan, how))
    numbers += [_coverage(found, n) for n in _covered(found)]
    drawn = min((entry["options"]["sketches"] for entry in found), default=0)
    for row in sketches:
        of = f"sketch {row['width']} wide"
        how = f"largest over tasks and seeds; chi-squared over {drawn} sketches, Bonferroni over tasks and seeds"
        ends = (row["sd_over_se_low"], row["sd_over_se_high"])
        numbers.append(number(f"{of}: its error by U's standard error", row["sd_over_se"], *ends, how))
        how = "mean over sketches; median over seeds"
        numbers.append(number(f"{of}: Kendall's tau with the exact order of tasks", row["kendall_tau"], nan, nan, how))
        if row["exact_seconds"] > 0:
            share, how = row["seconds"] / row["exact_seconds"], "median times of one machine; the exact Gram is 1"
            numbers.append(number(f"{of}: its time by that of the exact Gram", share, nan, nan, how))
        how = f"all pairs of kept sketches by the pairs within micro-batches of {TYPICAL} prompts, of the same prompts"
        numbers.append(number(f"{of}: its error by that of micro-batches", row["error_by_microbatches"], nan, nan, how))
        numbers.append(number(f"{of}: its size by that of the gradients", row["size"], nan, nan, "bytes a prompt"))
    return numbers


def _covered(found: Sequence[dict[str, Any]]) -> list[int]:
    """The n at which coverage is shown: the nearest to a step's, and the largest that has one."""
    rows = [row for entry in found for own in entry["tasks"].values() for row in own["estimators"]]
    known = sorted({row["n"] for row in rows if row["coverage"] is not None})
    return list(dict.fromkeys([_typical([{"n": n} for n in known]), known[-1]])) if known else []


def _coverage(found: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """How often U +- 1.96 jackknife errors holds U of all stored prompts: median, lowest and highest of tasks."""
    shares = [
        row["coverage"]
        for entry in found
        for own in entry["tasks"].values()
        for row in own["estimators"]
        if row["n"] == n and row["coverage"] is not None
    ]
    how = f"median, lowest and highest of tasks and seeds; {LEVEL:.0%} is meant, and groups of equal rewards lower it"
    name = f"coverage of the cross-product's jackknife interval, {n} prompts"
    return number(name, _median(shares), min(shares), max(shares), how) | {"level": None}


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
