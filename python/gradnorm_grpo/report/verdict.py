"""The report's conclusions in plain words: each sentence is chosen by a test, and is "undecided" where the test is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np
from scipy import stats

from ..numbers import clean, fixed, percent, signed, significant
from ..runlog import Array, Run
from ..study.stats import correlate, fieller, permutation_p
from ..summary import ERRORS, NAN, Cosine, TaskResult, few_with_gradient, task_results


@dataclass(frozen=True)
class Imbalance:
    """U of the loudest task over U of the quietest, among the tasks distinguishable from zero."""

    loudest: TaskResult
    quietest: TaskResult
    ratio: float
    low: float  # Fieller's interval
    high: float


def imbalance(results: list[TaskResult]) -> Imbalance | None:
    """The loudest against the quietest of the resolved tasks; None where fewer than two are resolved.

    The interval is Fieller's of a ratio of independent normal estimates, at two standard errors. It is finite because
    the quietest task is resolved.
    """
    resolved = [r for r in results if r.resolved]
    if len(resolved) < 2:
        return None
    top, low = max(resolved, key=lambda r: r.sq_norm), min(resolved, key=lambda r: r.sq_norm)
    interval = fieller(top.sq_norm, low.sq_norm, top.std_error**2, low.std_error**2, 0.0, ERRORS)
    return Imbalance(top, low, top.sq_norm / low.sq_norm, *interval)


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float]:
    """Spearman's rank correlation of two equally long lists and its two-sided permutation p-value.

    All orders of y are compared where there are at most 20,000, else so many that are drawn with a fixed seed. NaN for
    a constant list.
    """
    ranks = [stats.rankdata(values) for values in (x, y)]
    rho = correlate(*ranks)
    if math.isnan(rho):
        return NAN, NAN
    first = ranks[0] - ranks[0].mean()

    def strength(permuted: Array, axis: int) -> Array:
        return np.abs((permuted * first).sum(axis))

    return rho, permutation_p((ranks[1],), strength, "pairings", 20_000, "greater")


def imbalance_sentence(results: list[TaskResult]) -> str:
    """How far apart the loudest and the quietest task are, as far as the data can tell."""
    found = imbalance(results)
    if len(results) < 2:
        return "Imbalance: undecided, since there is only one task."
    if found is None:
        resolved = [clean(r.name) for r in results if r.resolved]
        only = f"only {resolved[0]} is" if resolved else "no task is"
        return f"Imbalance: undecided, since {only} distinguishable from zero; a ratio needs two such tasks."
    left_out = sum(not r.resolved for r in results)
    quietest = "quietest of those distinguishable from zero" if left_out else "quietest"
    sentence = (
        f"Imbalance: {clean(found.loudest.name)} (loudest) against {clean(found.quietest.name)} ({quietest}) is "
        f"{significant(found.ratio)} to 1 in squared norm ({significant(found.low)} to {significant(found.high)} "
        f"within {ERRORS:.0f} standard errors), {significant(math.sqrt(found.ratio))} to 1 in norm"
    )
    if left_out:
        sentence += f"; {left_out} {'task is' if left_out == 1 else 'tasks are'} left out"
    return sentence + "."


def _names(results: list[TaskResult]) -> str:
    names = [clean(r.name) for r in results]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _threshold(comparisons: int) -> float:
    """Standard errors that keep the chance of any false finding among so many comparisons at 5% (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.025 / max(comparisons, 1))


def loudness(results: list[TaskResult]) -> list[str]:
    """Which tasks pull at all, how unequally, and how far the plug-in estimate would have misled."""
    resolved = [r for r in results if r.resolved]
    undecided = [r for r in results if math.isfinite(r.sq_norm) and not r.resolved]
    unknown = [r for r in results if math.isnan(r.sq_norm)]
    sentences = []
    if resolved:
        sentences.append(
            f"The pull on the shared weights is distinguishable from zero for {len(resolved)} of {len(results)} "
            f"{'task' if len(results) == 1 else 'tasks'}: {_names(resolved)}."
        )
    else:
        sentences.append("No task's pull is distinguishable from zero: more prompts per step or more steps are needed.")
    if undecided:
        sentences.append(
            f"For {_names(undecided)} these data cannot distinguish U from zero. The pull may be small or absent; "
            "that stays undecided."
        )
    if unknown:
        sentences.append(f"For {_names(unknown)} there is no estimate: no step drew two of its prompts.")
    sentences.append(imbalance_sentence(results))
    found = imbalance(results)
    if found and found.low <= 1:
        sentences.append("That interval includes 1: these data do not show that the two differ.")
    elif found and len(resolved) > 2:
        sentences.append("The two were selected as the extremes, so their ratio tends to be too high.")
    if resolved and len(results) > 1 and len(resolved) == len(results):
        top = resolved[0]
        sentences.append(f"{clean(top.name)} alone has {percent(top.pull_share)} of the sum of all U (the total pull).")
    factors = [r.plug_in / r.sq_norm for r in resolved if math.isfinite(r.plug_in)]
    if len(factors) == 1:
        sentences.append(
            f"The plug-in estimate is {significant(factors[0])} times U for the one task distinguishable from zero."
        )
    elif factors:
        sentences.append(
            f"The plug-in estimate is {significant(median(factors))} times U at the median of the tasks "
            f"distinguishable from zero ({significant(min(factors))} to {significant(max(factors))})."
        )
    return sentences


def _changes(found: list[tuple[TaskResult, tuple[float, float]]], phase: str) -> list[str]:
    """Which of the changes (difference, its standard error) are beyond chance, up and down, and which are not."""
    z = _threshold(len(found))
    changed = [(r, d, e) for r, (d, e) in found if abs(d) > z * e]
    sentences = []
    for word, sign in (("rose", 1), ("fell", -1)):
        which = "; ".join(f"{clean(r.name)} {signed(d)} ± {fixed(e)}" for r, d, e in changed if d * sign > 0)
        if which:
            sentences.append(f"Held-out reward {word}{phase}: {which}.")
    same = [r for r, (d, e) in found if abs(d) <= z * e]
    if same:
        sentences.append(f"No change of held-out reward beyond chance was seen{phase} for {_names(same)}.")
    return sentences


def learning(results: list[TaskResult]) -> list[str]:
    """Whose held-out reward changed, and whether a larger U goes with a larger gain."""
    measured = [r for r in results if r.before and r.after]
    warm = [r for r in results if all(map(math.isfinite, r.warm_start_change))]
    tested = [r for r in measured if all(map(math.isfinite, r.eval_change))]
    sentences = _changes([(r, r.warm_start_change) for r in warm], " in the supervised warm start")
    if not measured:
        sentences.append(
            "Whether the tasks got better is undecided: there is no held-out evaluation both before and after."
        )
    elif not tested:
        sentences.append("Whether the tasks got better is undecided: the evaluations have no standard errors.")
    else:
        sentences += _changes([(r, r.eval_change) for r in tested], " under GRPO" if warm else "")
    pairs = [(r.sq_norm, r.eval_change[0]) for r in results if r.resolved and math.isfinite(r.eval_change[0])]
    if len(pairs) < 5:  # of four, even a perfect order comes about by chance twice in 24 times
        sentences.append(
            "Whether louder tasks gain more is undecided: that takes at least five tasks that are distinguishable from "
            "zero and evaluated twice."
        )
        return sentences if len(results) > 1 else sentences[:-1]
    rho, p = rank_correlation([u for u, _ in pairs], [g for _, g in pairs])
    if math.isnan(rho):
        sentences.append("Whether louder tasks gain more is undecided: all of them changed alike.")
    elif p < 0.05:
        more = "more" if rho > 0 else "less"
        sentences.append(
            f"Louder tasks gained {more} in held-out reward (rank correlation {signed(rho)} over {len(pairs)} tasks, "
            f"p = {p:.2g})."
        )
    else:
        sentences.append(
            f"These data do not show that louder tasks gain more, or less (rank correlation {signed(rho)} over "
            f"{len(pairs)} tasks, p = {p:.2f}). With so few tasks only a strong relation would show, so there may "
            "still be one."
        )
    return sentences


def directions(results: list[TaskResult], table: dict[tuple[str, str], Cosine]) -> list[str]:
    """Which tasks pull the same way and which against each other."""
    pairs = [(a, b) for i, a in enumerate(results) for b in results[i + 1 :]]
    known = {
        (a.name, b.name): c
        for a, b in pairs
        if (c := table.get((a.name, b.name))) and c.trusted and math.isfinite(c.value) and math.isfinite(c.std_error)
    }
    if not pairs:
        return ["There is only one task."]
    if not known:
        return ["Whether tasks help or hinder one another is undecided: no pair has a cosine with a known error."]
    z = _threshold(len(known))
    sentences = []
    for words, sign in (("pull the same way", 1), ("pull against each other", -1)):
        found = [(k, c) for k, c in known.items() if c.value * sign > z * c.std_error]
        found.sort(key=lambda kc: -abs(kc[1].value))
        if found:
            shown = "; ".join(
                f"{clean(a)} and {clean(b)} {signed(c.value)} ± {fixed(c.std_error)}" for (a, b), c in found[:3]
            )
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            sentences.append(f"{len(found)} of {len(known)} pairs of tasks {words} (cosine): {shown}{more}.")
    return sentences or [f"Of {len(known)} pairs, none has a cosine distinguishable from zero."]


def limits(run: Run) -> list[str]:
    """What no number here can tell."""
    layers = run.info.get("tracked_layers")
    what = f"the {len(layers)} tracked layers" if isinstance(layers, list) and layers else "the tracked layers"
    held = "belongs to the weights as they were" if run.probe else "is an average over a time in which they changed"
    return [
        f"All of this is about the weights of {what} of one model in one run with one seed. U {held}; error bars cover "
        "the chance of which prompts and answers were drawn, not what another run would bring."
    ]


def probe_title(probe: Run) -> str:
    """When and from how many prompts of each task a final probe was measured."""
    prompts = probe.array("prompts")
    return f"At the end: {prompts.max():.0f} new prompts per task at the weights after step {probe.steps[-1]:.0f}"


def verdict(run: Run, results: list[TaskResult], table: dict[tuple[str, str], Cosine]) -> list[tuple[str, list[str]]]:
    """Headings and sentences, in reading order. A run without a training step only says so."""
    if not len(run.steps):
        return [("Nothing to judge", ["No training step was finished, so nothing can be said about the tasks."])]
    nothing = ["Nothing was trained in this probe, so it says nothing about learning."]
    pulls = [("Who pulls hardest", [*loudness(results), *few_with_gradient(results)])]
    if run.final_probe:
        probed = task_results(run.final_probe)
        pulls = [
            (f"Who pulled hardest while training (steps 1 to {len(run.steps)})", pulls[0][1]),
            (probe_title(run.final_probe), [*loudness(probed), *few_with_gradient(probed)]),
        ]
    return [
        *pulls,
        ("Who learned", nothing if run.probe else learning(results)),
        ("Do they get in each other's way", directions(results, table)),
        ("What this cannot tell", limits(run)),
    ]
