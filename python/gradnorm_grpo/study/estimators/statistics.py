"""What estimators of a squared gradient norm give on n of N stored prompts, from the prompts' inner products alone.

With the Gram ``G[i, j] = <G_i, G_j>`` of a task's prompts, n of them with indicator m (and halves a + b = m)::

    cross-product   U_n = (m'Gm - sum_i m_i G_ii) / (n (n - 1))
    plug-in         ||mean||^2 = m'Gm / n^2
    two batches     <mean_a, mean_b> = a'Gb / (n / 2)^2

Averaged over all subsets of n, the first and the last give U_N exactly, whatever n is; the plug-in estimate gives
``U_N + (Q - U_N) / n`` with Q the mean squared norm: the diagonal is n of its n^2 terms.

A subset of N prompts is not a fresh draw. The spread over subsets, ``sd``, is that around U_N, given the N prompts,
and shrinks to nothing at n = N. By the law of total variance, that of fresh prompts adds the variance of the
expectation given the N prompts, which the jackknife over all N estimates: ``sd_fresh``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats

import gradnorm_kernels as gk

Array = np.ndarray
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
    """U_N with its jackknife error, and what goes with it. NaN where N is too small (2 for U, 3 for its error)."""
    one_group, products = torch.zeros(len(gram), dtype=torch.long), torch.from_numpy(gram)
    found = gk.cross_product(products.diagonal(), products.sum()[None], one_group, products)
    assert found.std_error is not None
    u, u_se = float(found.sq_norm), float(found.std_error)
    return {
        "u": u,
        "u_se": u_se,
        "mean_sq_norm": float(products.diagonal().mean()),
        "plug_in": float(found.plug_in),
        "noise_scale": float(found.noise_scale),
        "significant": u > 2 * u_se,
    }


def expected_bias(estimator: str, gram: Array, n: int) -> float:
    """Mean over all subsets of n prompts, less U_N."""
    return float(np.diagonal(gram).mean() - cross_product(gram)) / n if estimator == "plug_in" else 0.0


def sizes(prompts: int) -> list[int]:
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


def compare(gram: Array, orders: Array, level: float = 0.95) -> list[dict[str, Any]]:
    """Bias, spread and coverage of every estimator at every n: the rows of the file's `estimators`."""
    prompts, u = len(gram), cross_product(gram)
    rows = []
    for n in sizes(prompts):
        found, errors = on_subsets(gram, orders, n)
        small = 4 * n <= prompts
        for estimator in ESTIMATORS:
            values, bias = found[estimator], expected_bias(estimator, gram, n)
            # All N prompts in any order are one subset, but they can be halved in many ways.
            sd = 0.0 if n == prompts and estimator != "two_batch" else float(values.std(ddof=1))
            sd_fresh = math.hypot(sd, _expectation_error(estimator, gram, n))
            rmse = math.hypot(bias, sd_fresh)
            row = {
                "estimator": estimator,
                "n": n,
                "small": small,
                "bias": bias,
                "mean": float(values.mean()),
                "mean_error": sd / math.sqrt(len(values)),
                "sd": sd,
                "sd_fresh": sd_fresh,
                "rmse": rmse,
                **relative({"bias": bias, "sd": sd, "sd_fresh": sd_fresh, "rmse": rmse}, u),
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
