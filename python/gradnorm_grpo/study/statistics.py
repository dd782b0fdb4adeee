"""Statistics of the answers: pooled U, intervals over seeds, ratios of norms, correlations with tasks as units.

Seeds are the independent replications: an interval is Student's t over them. A statement about tasks has tasks as units
as well: a permutation of the tasks, the same in all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from .measurements import Array

LEVEL = 0.95
ALPHA = 1 - LEVEL
RESAMPLES = 9999  # permutations drawn where there are more than that
FEWEST_TASKS = 5  # of four, even a perfect order comes about by chance twice in 24 times


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95% interval and its two-sided p against ``null``; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def pool(values: Array, errors: Array, weights: Array) -> tuple[Array, Array]:
    """``sum_t U_t w_t / sum_t w_t`` over the last axis and its standard error, as RunningEstimate pools them.

    The error is ``sqrt(sum (w_t se_t)^2) / sum w_t``; where a step lacks one, it is taken from the spread between
    steps. Both are NaN where no step has a pair of samples, the error also where it cannot be had.
    """
    used = np.isfinite(values) & (np.nan_to_num(weights) > 0)
    w = np.where(used, weights, 0.0)
    u = np.where(used, values, 0.0)
    steps, total = used.sum(-1), w.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(total > 0, (w * u).sum(-1) / total, math.nan)
        own = np.sqrt((np.where(used, w * errors, 0.0) ** 2).sum(-1)) / total
        spread = ((w * (u - np.nan_to_num(mean)[..., None])) ** 2).sum(-1)
        between = np.where(steps >= 3, np.sqrt(spread * steps / (steps - 1)) / total, math.nan)
        error = np.where((used & ~np.isfinite(errors)).any(-1), between, own)
    return mean, np.where(total > 0, error, math.nan)


def t_interval(values: Sequence[float] | Array, null: float = 0.0) -> Interval:
    """``mean +- t_{0.975, n-1} s / sqrt(n)`` over the finite values, and the two-sided p of mean = ``null``.

    One value has no interval, and neither have values that are all alike: those of a coarse scale can be so by chance.
    """
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if len(x) == 0:
        return Interval(math.nan)
    mean = float(x.mean())
    if len(x) < 2 or np.ptp(x) <= 1e-12 * max(abs(mean), 1e-300):
        return Interval(mean)
    free, error = len(x) - 1, float(x.std(ddof=1)) / math.sqrt(len(x))
    reach = float(special.stdtrit(free, 1 - ALPHA / 2)) * error
    p = 2 * float(special.stdtr(free, -abs(mean - null) / error))
    return Interval(mean, mean - reach, mean + reach, p)


def fieller(a: float, b: float, var_a: float, var_b: float, cov: float, critical: float) -> tuple[float, float]:
    """All ratios r >= 0 with ``(a - r b)^2 <= critical^2 (var_a - 2 r cov + r^2 var_b)``, as (low, high).

    The interval of a ratio of two means that are not negative in truth. ``high`` is infinite where b is not told apart
    from zero: then only the lower bound is known. (0, inf) says nothing at all.
    """
    if not all(map(math.isfinite, (a, b, var_a, var_b, cov, critical))):
        return math.nan, math.nan
    squared = critical**2
    quadratic, linear, constant = b * b - squared * var_b, a * b - squared * cov, a * a - squared * var_a
    discriminant = linear**2 - quadratic * constant
    if quadratic > 0:
        if b < 0:  # a negative mean told apart from zero is no squared norm
            return math.nan, math.nan
        root = math.sqrt(max(discriminant, 0.0))
        return max((linear - root) / quadratic, 0.0), max((linear + root) / quadratic, 0.0)
    if discriminant <= 0 or constant <= 0 or a <= 0:
        return 0.0, math.inf
    # quadratic <= 0 < constant: r = 0 is refuted, and everything up to the one positive root.
    root = math.sqrt(discriminant)
    return constant / (linear + root) if linear + root > 0 else 0.0, math.inf


@dataclass(frozen=True)
class Ratio:
    """Loudest over quietest task: value, interval, how it was found and (loudest, quietest) of each seed."""

    value: float
    low: float
    high: float
    how: str
    picks: list[tuple[int, int]]


NO_RATIO = Ratio(math.nan, math.nan, math.nan, "not enough was measured", [])


def scaled(u: Array) -> Array:
    """Every row of [S, K] divided by its root mean square: a seed's overall scale says nothing about its tasks."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(u / np.sqrt((u**2).mean(1, keepdims=True)))


def ratio_over_seeds(u: Array, error: Array) -> Ratio:
    """Ratio of the loudest to the quietest task from U [S, K] and its errors, S >= 2, not picked on what is measured.

    The loudest and quietest of seed s are chosen on the other seeds and measured on s. Where both are more than two
    errors above zero in every seed: a t interval of the log ratio over seeds, else Fieller's over seeds. Tasks that
    lack a number in some seed are left out.
    """
    kept = np.flatnonzero(np.isfinite(u).all(0))
    if len(u) < 2 or len(kept) < 2:
        return NO_RATIO
    with np.errstate(invalid="ignore", divide="ignore"):  # a seed whose every U is zero has no scale, and no ratio
        share, relative = scaled(u[:, kept]), error[:, kept] / np.sqrt((u[:, kept] ** 2).mean(1, keepdims=True))
    seeds, picks = np.arange(len(u)), []
    for s in seeds:
        others = share[seeds != s].mean(0)
        picks.append((int(others.argmax()), int(others.argmin())))
    loud, quiet = (np.array([share[s, pick[side]] for s, pick in enumerate(picks)]) for side in (0, 1))
    errors = [np.array([relative[s, pick[side]] for s, pick in enumerate(picks)]) for side in (0, 1)]
    named = [(int(kept[a]), int(kept[b])) for a, b in picks]
    if (loud > 2 * errors[0]).all() and (quiet > 2 * errors[1]).all():
        log = t_interval(np.log(loud / quiet))
        how = f"loudest and quietest chosen on the other seeds; t interval of the log ratio over {len(u)} seeds"
        return Ratio(math.exp(log.value), math.exp(log.low), math.exp(log.high), how, named)
    cov = np.cov(loud, quiet) / len(u)
    low, high = fieller(
        loud.mean(), quiet.mean(), cov[0, 0], cov[1, 1], cov[0, 1], float(special.stdtrit(len(u) - 1, 1 - ALPHA / 2))
    )
    value = loud.mean() / quiet.mean() if loud.mean() > 0 and quiet.mean() > 0 else math.nan
    how = f"loudest and quietest chosen on the other seeds; Fieller's interval over {len(u)} seeds"
    return Ratio(float(value), low, high, how, named)


def ratio_within(halves: Array, error: Array) -> Ratio:
    """The same from one run: U [2, K] of two halves of its steps, chosen on one half and measured on the other.

    The interval is Fieller's with the errors of which prompts and answers were drawn: of this run, not of another seed.
    """
    kept = np.flatnonzero(np.isfinite(halves + error).all(0))
    if len(kept) < 2:
        return NO_RATIO
    u, e = halves[:, kept], error[:, kept]
    picks = [(int(u[1 - h].argmax()), int(u[1 - h].argmin())) for h in (0, 1)]
    (a, b), (var_a, var_b) = (
        [sum(x[h, picks[h][side]] ** power for h in (0, 1)) / 2**power for side in (0, 1)]
        for x, power in ((u, 1), (e, 2))
    )
    # A task chosen on both sides (once loudest, once quietest) is measured in different halves: no covariance.
    low, high = fieller(a, b, var_a, var_b, 0.0, stats.norm.ppf(1 - ALPHA / 2))
    how = "one seed: chosen on half of the steps, measured on the other; the error is that of the prompts drawn"
    return Ratio(
        a / b if a > 0 and b > 0 else math.nan, low, high, how, [(int(kept[i]), int(kept[j])) for i, j in picks]
    )


def tasks_alike(u: Array) -> float:
    """Permutation p that U [S, K] is exchangeable over the tasks of every seed: spread of the tasks' mean ranks."""
    kept = np.isfinite(u).all(0)
    if len(u) < 2 or kept.sum() < 2:
        return math.nan
    ranks = stats.rankdata(u[:, kept], axis=1)
    found = stats.permutation_test(
        tuple(ranks.T),
        lambda *samples, axis: np.var(np.stack([sample.mean(axis) for sample in samples]), axis=0),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def tasks_alike_within(u: Array, error: Array) -> float:
    """Cochran's homogeneity test of one run's U [K] with their errors: chi-squared with K - 1 degrees of freedom."""
    kept = np.isfinite(u) & (np.nan_to_num(error) > 0)
    if kept.sum() < 2:
        return math.nan
    weight = 1 / error[kept] ** 2
    spread = (weight * (u[kept] - (weight * u[kept]).sum() / weight.sum()) ** 2).sum()
    return float(stats.chi2.sf(spread, kept.sum() - 1))


def correlate(x: Array, y: Array, ranks: bool = True) -> float:
    """Spearman's (or Pearson's) correlation of the pairs that are finite; NaN for fewer than three or a constant."""
    kept = np.isfinite(x) & np.isfinite(y)
    if kept.sum() < 3:
        return math.nan
    a, b = (stats.rankdata(z[kept]) if ranks else z[kept] for z in (x, y))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1))


@dataclass(frozen=True)
class Correlation:
    """A rank correlation: mean over seeds, t interval over them, ``p`` with tasks as units, one value a seed."""

    value: float
    low: float
    high: float
    p: float
    per_seed: list[float]
    tasks: int

    @property
    def seeds(self) -> int:
        """How many seeds have a value."""
        return sum(map(math.isfinite, self.per_seed))

    @property
    def sign(self) -> int:
        """+1 or -1 where every seed agrees beyond their spread (alike to the last digit counts), else 0."""
        known = [r for r in self.per_seed if math.isfinite(r)]
        if len(known) < 2:
            return 0
        if not math.isfinite(self.low):
            return int(np.sign(known[0]))
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def _correlation(per_seed: list[float], p: float, tasks: int) -> Correlation:
    t = t_interval(per_seed)
    return Correlation(t.value, float(np.clip(t.low, -1, 1)), float(np.clip(t.high, -1, 1)), p, per_seed, tasks)


NO_CORRELATION = Correlation(math.nan, math.nan, math.nan, math.nan, [], 0)


def mean_by_seed(values: Array, seeds: Sequence[int]) -> list[float]:
    """Mean of one number a run within each seed (over its arms), in the seeds' order of appearance; NaN left out."""
    found = []
    for seed in dict.fromkeys(seeds):
        own = values[[s == seed for s in seeds] & np.isfinite(values)]
        found.append(float(own.mean()) if len(own) else math.nan)
    return found


def across(x: Array, y: Array, seeds: Sequence[int]) -> Correlation:
    """Spearman's correlation of x and y over the tasks (and windows) of every run, averaged over arms, then seeds.

    ``x`` and ``y`` are [R, K] or [R, K, W], ``seeds`` [R] the seed of each run. p is that of permuting the tasks of y
    against those of x, in all runs and windows alike: exact up to 7 tasks. Tasks and windows that lack a number in
    some run are left out.
    """
    if not len(x):
        return NO_CORRELATION
    x, y = (z.reshape(*z.shape[:2], -1) for z in (x, y))
    known = np.isfinite(x) & np.isfinite(y)
    tasks = known.any((0, 2)) & known.any(2).all(0)
    windows = known[:, tasks].all((0, 1))
    x, y = x[:, tasks][:, :, windows], y[:, tasks][:, :, windows]
    runs, count = x.shape[:2]
    if count * x.shape[2] < 3 or count < 2:
        return NO_CORRELATION
    each = np.array([correlate(a.ravel(), b.ravel()) for a, b in zip(x, y, strict=True)])
    per_seed = mean_by_seed(each, seeds)
    usable = np.isfinite(each)
    if not usable.any():
        return NO_CORRELATION
    ranks = [stats.rankdata(z.reshape(runs, -1), axis=1).reshape(z.shape)[usable] for z in (x, y)]
    a, b = (z - z.mean((1, 2), keepdims=True) for z in ranks)
    own = [seed for seed, use in zip(seeds, usable, strict=True) if use]
    # Runs weigh as in the estimate: alike within a seed, seeds alike.
    weight = np.array([1 / own.count(seed) / len(set(own)) for seed in own])
    weight /= np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))
    # cross[i, j]: what task i of x and task j of y bring when they meet; a permutation's correlation is a sum of these.
    cross = np.einsum("r,riw,rjw->ij", weight, a, b)
    return _correlation(per_seed, _permutation_p(cross), count)


def _orders(count: int) -> NDArray[np.int64]:
    """All orders of ``count`` things, or the identity and so many random ones."""
    if math.factorial(count) <= RESAMPLES:
        return np.array(list(permutations(range(count))))
    generator = np.random.default_rng(0)
    return np.stack([np.arange(count), *(generator.permutation(count) for _ in range(RESAMPLES))])


def _permutation_p(cross: Array) -> float:
    orders = _orders(len(cross))
    found = cross[np.arange(len(cross)), orders].sum(1)
    slack = 1e-12 * (1 + abs(found[0]))
    return float(min(1.0, 2 * min((found >= found[0] - slack).mean(), (found <= found[0] + slack).mean())))


def within(x: Array, y: Array, seeds: Sequence[int]) -> Correlation:
    """Spearman's correlation of x and y [R, K, W] over the windows of each task, averaged over tasks, arms, seeds.

    p is that of turning the signs of the tasks' mean correlations, with tasks as units (exact up to 13 tasks).
    """
    if not len(x):
        return NO_CORRELATION
    each = np.array([[correlate(a, b) for a, b in zip(*run, strict=True)] for run in zip(x, y, strict=True)])
    known = np.isfinite(each)
    if not known.any():
        return NO_CORRELATION
    by_run = np.array([row[use].mean() if use.any() else math.nan for row, use in zip(each, known, strict=True)])
    by_task = np.array([row[use].mean() for row, use in zip(each.T, known.T, strict=True) if use.any()])
    per_seed = mean_by_seed(by_run, seeds)
    p = math.nan
    if len(by_task) > 1:
        flipped: Any = stats.permutation_test(
            (by_task,),
            lambda d, axis: d.mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        )
        p = float(flipped.pvalue)
    return _correlation(per_seed, p, len(by_task))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each; NaN stays NaN and does not count."""
    p = np.asarray(values, np.float64)
    adjusted = np.full(len(p), math.nan)
    order = [i for i in np.argsort(p) if math.isfinite(p[i])]
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - place)))
        adjusted[i] = highest
    return [float(q) for q in adjusted]
