"""confidence_interval: its parts against scipy and the jackknife, its coverage with few informative prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

import gradnorm_kernels as gk
from gradnorm_kernels.estimation.estimator import MIN_INFORMATIVE
from gradnorm_kernels.estimation.interval import student_quantile
from gradnorm_kernels.reference import grad_gram as reference_gram


def _gram(n: int = 12, seed: int = 0, dead: int = 0) -> torch.Tensor:
    """Inner products of n gradients, the first ``dead`` of them zero."""
    rows = torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    rows[:dead] = 0.0
    return rows @ rows.T


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 63, 255, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_students_quantile_is_scipys(degrees: int, probability: float) -> None:
    expected = float(special.stdtrit(degrees, probability))
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_value_is_u_and_the_error_at_least_the_jackknifes() -> None:
    gram = _gram(dead=3)
    ids = torch.zeros(12, dtype=torch.long)
    jackknife = gk.cross_product(gram.diagonal(), gram.sum()[None], ids, gram)
    found = gk.confidence_interval(gram)
    assert found.value == pytest.approx(float(jackknife.sq_norm), rel=1e-12)
    assert jackknife.std_error is not None and found.std_error >= float(jackknife.std_error) * (1 - 1e-12)
    assert (found.n, found.n_effective) == (12, 9)
    reach = float(special.stdtrit(8, 0.975)) * found.std_error
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach))
    assert gk.confidence_interval(gram, 0.5).high < found.high


def test_the_bootstrap_leaves_out_pairs_of_a_sample_with_itself() -> None:
    """Its mean is U and not the plug-in estimate: with large squared norms those are far apart."""
    from gradnorm_kernels.estimation.interval import _bootstrap

    gram = _gram(20) + 50 * torch.eye(20, dtype=torch.float64)
    drawn = _bootstrap(gram, 4000, 0)
    u = gk.confidence_interval(gram).value
    assert abs(float(drawn.mean()) - u) < 4 * float(drawn.std()) / math.sqrt(len(drawn)) < 1.0


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    gram = torch.diag(torch.linspace(1, 9, 30, dtype=torch.float64)) + _gram(30)
    assert gk.confidence_interval(gram) == gk.confidence_interval(gram)
    assert gk.confidence_interval(gram, seed=1).value == gk.confidence_interval(gram).value


def test_too_few_informative_samples_have_no_interval() -> None:
    found = gk.confidence_interval(_gram(dead=12 - MIN_INFORMATIVE + 1))
    assert found.n_effective == MIN_INFORMATIVE - 1 and math.isfinite(found.value)
    assert all(map(math.isnan, (found.low, found.high, found.std_error)))
    assert math.isfinite(gk.confidence_interval(_gram(dead=12 - MIN_INFORMATIVE)).low)
    assert math.isnan(gk.confidence_interval(torch.ones(1, 1)).value)


def test_a_gram_that_is_not_finite_has_no_finite_interval() -> None:
    gram = _gram()
    gram[3] = gram[:, 3] = math.nan
    found = gk.confidence_interval(gram)
    assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_it_takes_what_grad_gram_returns() -> None:
    x, dy = torch.randn(24, 5), torch.randn(24, 3)
    cu_seqlens = torch.arange(0, 25, 3)
    one, other = gk.grad_gram(x, dy, cu_seqlens), reference_gram(x, dy, cu_seqlens)
    assert gk.confidence_interval(one)[:4] == pytest.approx(gk.confidence_interval(other)[:4], rel=1e-5)


def _coverage(signal: float, share: float) -> tuple[float, float]:
    """How often this interval and the jackknife's hold U: 16 samples of exponential sizes, ``share`` not zero."""
    rng, mean = np.random.default_rng(0), np.full(30, signal)
    truth, ids = float((mean**2).sum()) * share**2, torch.zeros(16, dtype=torch.long)
    held, plain = [], []
    for _ in range(200):
        sizes = rng.exponential(1.0, 16) * (rng.random(16) < share)
        rows = (mean + rng.standard_normal((16, 30))) * sizes[:, None]
        gram = torch.from_numpy(rows @ rows.T)
        found = gk.confidence_interval(gram, resamples=199)
        if math.isfinite(found.low):
            held.append(found.low <= truth <= found.high)
            jackknife = gk.cross_product(gram.diagonal(), gram.sum()[None], ids, gram)
            assert jackknife.std_error is not None
            plain.append(abs(float(jackknife.sq_norm[0]) - truth) <= 1.96 * float(jackknife.std_error[0]))
    assert len(held) > 140
    return float(np.mean(held)), float(np.mean(plain))


def test_it_holds_u_as_often_as_it_says_with_few_informative_samples() -> None:
    """Six of sixteen samples have a gradient, whose mean is small beside its spread, as in training."""
    held, plain = _coverage(0.2, 0.4)
    assert held >= 0.94 and plain < 0.91


def test_it_holds_u_more_often_than_the_jackknife_where_neither_holds_it_often_enough() -> None:
    """A mean as large as the spread and sizes that differ: U is skewed, which no symmetric interval follows."""
    held, plain = _coverage(0.5, 0.4)
    assert 0.95 > held > plain + 0.05


@pytest.mark.parametrize(
    ("gram", "options", "said"),
    [
        (torch.ones(3), {}, r"gram must be \[n, n\].*got shape \(3,\)"),
        (torch.ones(3, 2), {}, r"got shape \(3, 2\)"),
        (torch.ones(3, 3).triu(), {}, "gram must be symmetric"),
        (-torch.eye(3), {}, "gram must have squared norms"),
        (torch.eye(3), {"level": "0.9"}, "level must lie strictly between 0 and 1, got '0.9'"),
        (torch.eye(3), {"level": 1.0}, "level must lie strictly between 0 and 1, got 1.0"),
        (torch.eye(3), {"resamples": 10}, "resamples must be an int of at least 99, got 10"),
        (torch.eye(3), {"seed": -1}, "seed must be an int of at least 0, got -1"),
        (torch.eye(3), {"seed": True}, "seed must be an int"),
    ],
)
def test_what_does_not_fit_is_refused(gram: torch.Tensor, options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gk.confidence_interval(gram, **options)  # type: ignore[arg-type]
