"""The study's statistics: pooled U, intervals over seeds, ratios of norms, correlations, and estimators on subsets.

Seeds are the independent replications: an interval is Student's t over them. A statement about tasks has tasks as units
as well: a permutation of the tasks, the same in all seeds.

Estimators of a squared gradient norm are compared on n of N stored prompts, from the prompts' inner products alone.
With the Gram matrix ``G[i, j] = <G_i, G_j>`` of a task's prompts and n of them with indicator m (halves a + b = m)::

    cross-product   U_n = (m'Gm - sum_i m_i G_ii) / (n (n - 1))
    plug-in         ||mean||^2 = m'Gm / n^2
    two batches     <mean_a, mean_b> = a'Gb / (n / 2)^2

Averaged over all subsets of n, the first and the last give U_N exactly for every n. The plug-in estimate gives
``U_N + (Q - U_N) / n`` with Q the mean squared norm: the diagonal is n of its n^2 terms.

A subset of N prompts is not a fresh draw. The spread over subsets, ``sd``, is that around U_N, given the N prompts,
and shrinks to zero at n = N. By the law of total variance, the spread over fresh prompts adds the variance of the
expectation given the N prompts, which the jackknife over all N estimates: ``sd_fresh``.

Student's t, Spearman's and Pearson's correlation are written out, not taken from scipy: scipy's differ in the last
digit, and a recomputed study should equal the published one. tests/study/test_study_statistics.py compares both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats

import gradnorm_kernels as gk

Array: TypeAlias = NDArray[np.float64]
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

    The error is ``sqrt(sum (w_t se_t)^2) / sum w_t``; where a step lacks one, it comes from the spread between steps.
    Both are NaN where no step has a pair of samples, the error also where it cannot be computed. A study pools tens of
    thousands of steps, so this is the library's RunningEstimate as an array expression; a test holds them equal.
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

    One value has no interval. Neither do values that are all equal: on a coarse scale they can be so by chance.
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

    The interval of a ratio of two means whose true values are not negative. ``high`` is infinite where b is not
    distinguishable from zero: then only the lower bound is known. (0, inf) excludes nothing.
    """
    if not all(map(math.isfinite, (a, b, var_a, var_b, cov, critical))):
        return math.nan, math.nan
    squared = critical**2
    quadratic, linear, constant = b * b - squared * var_b, a * b - squared * cov, a * a - squared * var_a
    discriminant = linear**2 - quadratic * constant
    if quadratic > 0:
        if b < 0:  # significantly negative: not a squared norm
            return math.nan, math.nan
        root = math.sqrt(max(discriminant, 0.0))
        return max((linear - root) / quadratic, 0.0), max((linear + root) / quadratic, 0.0)
    if discriminant <= 0 or constant <= 0 or a <= 0:
        return 0.0, math.inf
    # quadratic <= 0 < constant: every ratio from 0 to the one positive root is rejected.
    root = math.sqrt(discriminant)
    return constant / (linear + root) if linear + root > 0 else 0.0, math.inf


def task_interval(values: Array, errors: Array) -> Interval:
    """Mean over seeds with its t interval; for one seed, its estimate with the error of the prompts drawn in it."""
    if len(values) != 1:
        return t_interval(values)
    reach = float(stats.norm.ppf(1 - ALPHA / 2) * errors[0])
    return Interval(float(values[0]), float(values[0]) - reach, float(values[0]) + reach)


def known_mean(values: Sequence[float] | Array) -> float:
    """Mean of the finite values; NaN if there is none."""
    x = np.asarray(values, np.float64)
    return float(x[np.isfinite(x)].mean()) if np.isfinite(x).any() else math.nan


def known_median(values: Iterable[float]) -> float:
    """Median of the finite values; NaN if there is none."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


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
    """Each row of [S, K] divided by its root mean square: the overall scale of a seed says nothing about its tasks."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(u / np.sqrt((u**2).mean(1, keepdims=True)))


def ratio_over_seeds(u: Array, error: Array) -> Ratio:
    """Ratio of the loudest to the quietest task from U [S, K] and its errors, S >= 2, without selection bias.

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

    def spread(*samples: Array, axis: int) -> Array:
        return np.var(np.stack([sample.mean(axis) for sample in samples]), axis=0)

    return permutation_p(tuple(ranks.T), spread, "samples", alternative="greater")


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
        """+1 or -1 where the interval over seeds excludes zero (or all seeds are equal), else 0."""
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
    # p of the identity among the orders of the tasks; ties are ties.
    places = np.arange(count)
    p = permutation_p((places,), lambda order, axis: cross[places, order].sum(axis).round(12), "pairings")
    return _correlation(per_seed, p, count)


def permutation_p(
    data: tuple[Array, ...],
    statistic: Callable[..., Array],
    kind: str,
    resamples: int = RESAMPLES,
    alternative: str = "two-sided",
) -> float:
    """p of ``statistic(*data, axis)`` among its values under permutation: all of them, or as many as ``resamples``.

    ``kind``: scipy's permutation_type. What is drawn is drawn with a fixed seed.
    """
    found: Any = stats.permutation_test(
        data,
        statistic,
        permutation_type=kind,
        vectorized=True,
        n_resamples=resamples,
        alternative=alternative,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def within(x: Array, y: Array, seeds: Sequence[int]) -> Correlation:
    """Spearman's correlation of x and y [R, K, W] over the windows of each task, averaged over tasks, arms, seeds.

    p flips the signs of the tasks' mean correlations, with tasks as units (exact up to 13 tasks).
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
    p = permutation_p((by_task,), lambda d, axis: d.mean(axis), "samples") if len(by_task) > 1 else math.nan
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


# Estimators on subsets of stored prompts

ESTIMATORS = ("cross_product", "plug_in", "two_batch")


def cross_product(gram: Array) -> float:
    """U over all pairs; NaN for fewer than two prompts. ``gram``: [N, N] float64."""
    n = len(gram)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1))) if n > 1 else math.nan


def left_out(gram: Array) -> tuple[Array, Array]:
    """[N] U and [N] mean squared norm of all prompts but one."""
    n, diagonal = len(gram), np.diagonal(gram)
    others = gram.sum(1) - diagonal
    return (others.sum() - 2 * others) / ((n - 1) * (n - 2)), (diagonal.sum() - diagonal) / (n - 1)


def jackknife_variance(values: Array) -> float:
    """``(n - 1)/n sum (theta_{-i} - mean)^2`` of [n] leave-one-out values."""
    return float((len(values) - 1) * values.var())


def reference(gram: Array) -> dict[str, Any]:
    """U_N, its jackknife error, the library's 95% interval and related numbers.

    NaN where N is too small (2 for U, 3 for its error) or, for the interval, too few prompts have a gradient.
    """
    one_group, products = torch.zeros(len(gram), dtype=torch.long), torch.from_numpy(gram)
    found = gk.cross_product(products.diagonal(), products.sum()[None], one_group, products)
    assert found.std_error is not None
    u, u_se = float(found.sq_norm), float(found.std_error)
    interval = gk.confidence_interval(products)
    return {
        "u": u,
        "u_se": u_se,
        "low": interval.low,
        "high": interval.high,
        "n_effective": interval.n_effective,
        "mean_sq_norm": float(products.diagonal().mean()),
        "plug_in": float(found.plug_in),
        "noise_scale": float(found.noise_scale),
        "significant": u > 2 * u_se,
    }


def expected_bias(estimator: str, gram: Array, n: int) -> float:
    """Mean over all subsets of n prompts, less U_N."""
    return float(np.diagonal(gram).mean() - cross_product(gram)) / n if estimator == "plug_in" else 0.0


def subset_sizes(prompts: int) -> list[int]:
    """2, 4, 8, ... and ``prompts``, its largest even number if it is odd: two batches need halves."""
    powers = [2**k for k in range(1, prompts.bit_length()) if 2**k <= prompts]
    return [*powers, *([prompts - prompts % 2] if prompts - prompts % 2 not in powers else [])]


def shuffles(prompts: int, count: int, seed: int) -> Array:
    """[count, prompts] random orders; the first n of each are a subset of n, and those of every size are nested."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(prompts), (count, 1)), axis=1)


def _indicators(chosen: Array, prompts: int) -> Array:
    marks = np.zeros((len(chosen), prompts))
    np.put_along_axis(marks, chosen, 1.0, axis=1)
    return marks


def on_subsets(gram: Array, orders: Array, n: int) -> tuple[dict[str, Array], Array]:
    """Every estimator on the first n prompts of each order, and the jackknife error of U_n there.

    gram [N, N], orders [R, N]; results [R]. The error is NaN for n < 3.
    """
    prompts, half, diagonal = len(gram), n // 2, np.diagonal(gram)
    a, b = _indicators(orders[:, :half], prompts), _indicators(orders[:, half : 2 * half], prompts)
    a_gram, b_gram = a @ gram, b @ gram
    members = a + b
    inner = (a_gram + b_gram) * members  # [R, N]: each member's inner product with the subset's sum
    total, own = inner.sum(1), members @ diagonal
    estimates = {
        "cross_product": (total - own) / (n * (n - 1)),
        "plug_in": total / n**2,
        "two_batch": (a_gram * b).sum(1) / half**2,
    }
    if n < 3:
        return estimates, np.full(len(orders), math.nan)
    # U without i is (sum_j r_j - 2 r_i) / ((n - 1)(n - 2)) with r_i = <G_i, the others' sum>.
    others = inner - members * diagonal
    spread = (others**2).sum(1) - (total - own) ** 2 / n
    return estimates, 2 / (n - 2) * np.sqrt(np.maximum(spread, 0.0) / (n * (n - 1)))


def compare_estimators(gram: Array, orders: Array, level: float = LEVEL) -> list[dict[str, Any]]:
    """Bias, spread and coverage of every estimator at every n: the rows of the file's `estimators`."""
    prompts, u = len(gram), cross_product(gram)
    rows = []
    for n in subset_sizes(prompts):
        found, errors = on_subsets(gram, orders, n)
        small = 4 * n <= prompts
        for estimator in ESTIMATORS:
            values, bias = found[estimator], expected_bias(estimator, gram, n)
            # All N prompts in any order are one subset, but they can be halved in many ways.
            sd = 0.0 if n == prompts and estimator != "two_batch" else float(values.std(ddof=1))
            sd_fresh = math.hypot(sd, _expectation_error(estimator, gram, n))
            spreads = {"sd": sd, "sd_fresh": sd_fresh, "rmse": math.hypot(bias, sd_fresh)}
            row = {
                "estimator": estimator,
                "n": n,
                "small": small,
                "bias": bias,
                "mean": float(values.mean()),
                "mean_error": sd / math.sqrt(len(values)),
                **spreads,
                **relative({"bias": bias, **spreads}, u),
                "negative": float((values < 0).mean()),
                "coverage": math.nan,
                "coverage_t": math.nan,
            }
            if estimator == "cross_product" and small and n > 2:
                # Around U_N the subset's U varies less than around the truth, by about this factor.
                width = errors * math.sqrt(1 - n / prompts)
                tail = (1 + level) / 2
                for name, quantile in (("", stats.norm.ppf(tail)), ("_t", stats.t.ppf(tail, n - 1))):
                    row[f"coverage{name}"] = float((np.abs(values - u) <= quantile * width).mean())
            rows.append(row)
    return rows


def _expectation_error(estimator: str, gram: Array, n: int) -> float:
    """Standard error, over draws of the N prompts, of the estimator's mean over their subsets; NaN for N < 3."""
    if len(gram) < 3:
        return math.nan
    u, mean_sq = left_out(gram)
    return math.sqrt(jackknife_variance(u + (mean_sq - u) / n if estimator == "plug_in" else u))


def relative(values: dict[str, float], u: float) -> dict[str, float]:
    """``values`` over U_N; NaN where U_N is not positive, so that it is no scale."""
    return {f"{name}_rel": value / u if u > 0 else math.nan for name, value in values.items()}


def pooled_size(prompts: int) -> int:
    """The prompts that are spread over micro-batches: the largest power of two of at most a quarter of all, or 2."""
    return max(2, 2 ** (max(prompts // 4, 1).bit_length() - 1))


def in_microbatches(gram: Array, orders: Array, n: int) -> list[dict[str, Any]]:
    """U of n prompts in micro-batches of 2, 4, ... n, with pairs inside them only: the file's `microbatches`.

    A mean of fewer pairs is unbiased too; ``variance_ratio`` is what their number costs, against all pairs of n.
    """
    u, diagonal = cross_product(gram), np.diagonal(gram)
    error = _expectation_error("cross_product", gram, n)
    rows: list[dict[str, Any]] = []
    for size in [2**k for k in range(1, n.bit_length()) if 2**k <= n]:
        total = np.zeros(len(orders))
        for first in range(0, n, size):
            members = _indicators(orders[:, first : first + size], len(gram))
            total += ((members @ gram) * members).sum(1) - members @ diagonal
        pairs = n * (size - 1)
        sd = float((total / pairs).std(ddof=1))
        sd_fresh = math.hypot(sd, error)
        rows.append({"size": size, "n": n, "pairs": pairs, "sd": sd, "sd_fresh": sd_fresh, **relative({"sd": sd}, u)})
    for row in rows:
        row["variance_ratio"] = (row["sd_fresh"] / rows[-1]["sd_fresh"]) ** 2 if rows[-1]["sd_fresh"] else math.nan
    return rows


def root_mean_square(values: Array, truth: float) -> float:
    """``sqrt(mean (value - truth)^2)``."""
    return float(np.sqrt(((values - truth) ** 2).mean()))
