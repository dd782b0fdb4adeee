"""The confidence interval of U from the samples' Gram matrix, for tasks in which few samples carry the gradient.

``U +- 1.96 jackknife errors`` holds U too rarely in two cases: where most samples have no gradient (a prompt whose
completions are all right or all wrong), and where few samples are much larger than the rest. The interval here takes
Student's t with as many degrees of freedom as there are samples with a gradient, less one, and the larger of two
standard errors: the jackknife's, and the spread of U over bootstrap resamples of the samples. Of the intervals that
were compared on stored rollouts it is the one that holds U as often as it says (docs/study/intervals.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .estimator import MIN_INFORMATIVE, NAN, check_gram
from .moments import informative

_CHUNK = 1 << 22  # weights of bootstrap resamples in one product


class ConfidenceInterval(NamedTuple):
    """What :func:`confidence_interval` returns.

    ``value`` is U, ``low`` and ``high`` the ends, ``std_error`` the standard error that they use, all in the squared
    unit of the gradient; ``n`` samples, of which ``n_effective`` have a gradient.
    """

    value: float
    low: float
    high: float
    std_error: float
    n: int
    n_effective: int


def confidence_interval(
    gram: Tensor, level: float = 0.95, *, resamples: int = 999, seed: int = 0
) -> ConfidenceInterval:
    """Interval of the squared norm of a task's expected gradient from the inner products of its samples' gradients.

    ``U +- t_{(1 + level)/2, k - 1} max(se_jackknife, sd_bootstrap)`` with
    ``U = sum_{i != j} <G_i, G_j> / (n (n - 1))`` and k the samples with a gradient, ``||G_i||^2`` above a millionth of
    the largest. ``sd_bootstrap`` is the standard deviation of U over ``resamples`` draws of n samples with replacement;
    pairs of a sample with itself are left out there, as they would bias it.

    Args:
        gram: [n, n] float, all <G_i, G_j> of one task's samples, in the squared unit of the gradient.
        level: the share of intervals that hold U, strictly between 0 and 1.
        resamples: at least 99.
        seed: of the resamples; the same seed gives the same interval.

    Returns:
        :class:`ConfidenceInterval`. ``low``, ``high`` and ``std_error`` are NaN where fewer than MIN_INFORMATIVE
        samples have a gradient: too few to say how much they differ. ``value`` is NaN for fewer than two samples.

    Raises:
        ValueError: a gram that is not square or not symmetric, or whose diagonal is negative; or a level, resamples or
            seed outside its range.
    """
    gram = torch.as_tensor(gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(
            f"gram must be [n, n], the inner products of one task's samples, got shape {tuple(gram.shape)}: pass "
            "grad_gram's result, or the task's rows and columns of it"
        )
    if not isinstance(level, (int, float)) or not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}: 0.95 is usual")
    for name, number, least in (("resamples", resamples, 99), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {number!r}")
    g = gram.detach().to("cpu", torch.float64)
    check_gram(g)
    n, diagonal = len(g), g.diagonal()
    if n < 2:
        return ConfidenceInterval(NAN, NAN, NAN, NAN, n, int((diagonal != 0).sum()))
    known = int(informative(diagonal, torch.zeros(n, dtype=torch.long, device="cpu"), 1))
    others = g.sum(1) - diagonal  # [n]: each sample's inner product with the sum of the others
    value = float(others.sum()) / (n * (n - 1))
    if known < MIN_INFORMATIVE:
        return ConfidenceInterval(value, NAN, NAN, NAN, n, known)
    left_out = (others.sum() - 2 * others) / ((n - 1) * (n - 2))
    jackknife = (n - 1) / n * (left_out - left_out.mean()).square().sum()
    error = float(torch.maximum(jackknife, _bootstrap(g, resamples, seed).var()).sqrt())
    reach = student_quantile((1 + level) / 2, known - 1) * error
    return ConfidenceInterval(value, value - reach, value + reach, error, n, known)


def _bootstrap(gram: Tensor, resamples: int, seed: int) -> Tensor:
    """[resamples] ``sum_{i != j} w_i w_j G_ij / sum_{i != j} w_i w_j``, w the counts of n draws from n samples.

    A resample of one sample alone has no pair and is left out.
    """
    n, diagonal = len(gram), gram.diagonal()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    found = []
    for first in range(0, resamples, step := max(1, _CHUNK // n)):
        count = min(step, resamples - first)
        drawn = torch.randint(0, n, (count, n), generator=generator, device="cpu")
        ones = torch.ones(count, n, dtype=torch.float64, device="cpu")
        weights = torch.zeros(count, n, dtype=torch.float64, device="cpu").scatter_add_(1, drawn, ones)
        pairs = n * n - weights.square().sum(1)
        total = ((weights @ gram - weights * diagonal) * weights).sum(1)
        found.append((total / pairs)[pairs > 0])
    return torch.cat(found)


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, for a probability from 0.5 to below 1 and whole degrees of freedom from 1.

    By bisection of the distribution, which for whole degrees of freedom is a finite sum of powers of cosines.
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(degrees))
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, degrees) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student(angle: float, degrees: int) -> float:
    """P(T < t) with t = sqrt(degrees) tan(angle), angle in [0, pi / 2] (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2
