"""The estimators' arithmetic: subsets of stored prompts, micro-batches, sketches, costs; no model is needed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

import gradnorm_kernels as gk
from gradnorm_grpo.study import stats
from gradnorm_grpo.study.estimators import sketches
from gradnorm_grpo.study.estimators.cost import cost
from gradnorm_grpo.study.estimators.gradients import Layer, gram

# Subsets


def _random_gram(prompts: int, mean: float = 0.5, size: int = 5, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(prompts, size)) + mean
    return vectors @ vectors.T


def test_expectations_over_all_subsets_are_the_closed_forms() -> None:
    for odd, prompts in ((0, 6), (1, 7)):
        g = _random_gram(prompts)
        orders = np.array(list(itertools.permutations(range(prompts))))
        u, q = stats.cross_product(g), float(np.diagonal(g).mean())
        assert stats.subset_sizes(prompts) == [2, 4, 6]
        for n in (2, 4, 6):
            found, _ = stats.on_subsets(g, orders, n)
            for estimator in stats.ESTIMATORS:
                expected = u + stats.expected_bias(estimator, g, n)
                assert found[estimator].mean() == pytest.approx(expected, rel=1e-10)
            assert found["plug_in"].mean() - u == pytest.approx((q - u) / n)
            if n == 6 and not odd:
                assert found["cross_product"].std() < 1e-12 < found["two_batch"].std()
        rows = stats.compare_estimators(g, orders)
        assert [row["bias"] == 0 for row in rows] == [row["estimator"] != "plug_in" for row in rows]
        for row in rows:
            assert row["mean"] - u == pytest.approx(row["bias"], abs=1e-12)
            assert row["bias_rel"] == row["bias"] / u and row["rmse_rel"] == row["rmse"] / u


def test_a_subsets_numbers_are_those_of_its_own_gram() -> None:
    g = _random_gram(12)
    orders = stats.shuffles(12, 20, seed=1)
    assert (np.sort(orders, 1) == np.arange(12)).all() and (stats.shuffles(12, 20, 1) == orders).all()
    assert (orders != stats.shuffles(12, 20, 2)).any()
    found, errors = stats.on_subsets(g, orders, 8)
    for r, order in enumerate(orders):
        own = torch.tensor(g[np.ix_(order[:8], order[:8])])
        expected = gk.cross_product(own.diagonal(), own.sum()[None], [0] * 8, own)
        assert found["cross_product"][r] == pytest.approx(float(expected.sq_norm), rel=1e-9)
        assert found["plug_in"][r] == pytest.approx(float(expected.plug_in), rel=1e-9)
        assert errors[r] == pytest.approx(float(expected.std_error), rel=1e-9)
        assert found["two_batch"][r] == pytest.approx(float(own[:4, 4:].mean()), rel=1e-9)
    whole = stats.reference(g)
    expected = gk.cross_product(np.diagonal(g).copy(), [g.sum()], [0] * 12, torch.tensor(g))
    assert whole["u"] == pytest.approx(float(expected.sq_norm)) and whole["u_se"] == pytest.approx(
        float(expected.std_error)
    )
    assert whole["noise_scale"] == pytest.approx(float(expected.noise_scale))


def test_spread_of_fresh_prompts() -> None:
    """sd_fresh, from one pool of prompts, is the spread over pools; sd, given the pool, is less near n = N."""
    pools, drawn = [], []
    for seed in range(300):
        g = _random_gram(24, seed=seed)
        pools.append(stats.compare_estimators(g, stats.shuffles(24, 200, seed)))
        drawn.append(stats.on_subsets(g, np.arange(24)[None], 16)[0])
    for estimator in stats.ESTIMATORS:
        truth = np.std([one[estimator][0] for one in drawn])
        rows = [row for pool in pools for row in pool if row["n"] == 16 and row["estimator"] == estimator]
        fresh, given = (math.sqrt(np.mean([row[key] ** 2 for row in rows])) for key in ("sd_fresh", "sd"))
        assert fresh == pytest.approx(truth, rel=0.15), estimator
        assert given < 0.9 * truth, estimator
        assert not any(row["small"] for row in rows)
    held = [
        row["coverage_t"] for pool in pools for row in pool if row["n"] == 4 and row["estimator"] == "cross_product"
    ]
    assert 0.85 < np.mean(held) < 1.0
    wide = [row["coverage"] for row in stats.compare_estimators(_random_gram(24), stats.shuffles(24, 200, 0), 0.5)]
    assert np.nanmean(wide) < 0.8, "an interval of level 0.5 covers less"


def test_what_fresh_prompts_add_is_the_jackknife_of_the_expectation() -> None:
    g, n = _random_gram(9), 4
    rest = [np.delete(np.delete(g, i, 0), i, 1) for i in range(9)]
    rows = [row for row in stats.compare_estimators(g, stats.shuffles(9, 30, 0)) if row["n"] == n]
    for row in rows:
        means = [stats.cross_product(one) + stats.expected_bias(row["estimator"], one, n) for one in rest]
        added = 8 / 9 * sum((mean - np.mean(means)) ** 2 for mean in means)
        assert row["sd_fresh"] ** 2 - row["sd"] ** 2 == pytest.approx(added)
        assert row["rmse"] ** 2 == pytest.approx(row["bias"] ** 2 + row["sd_fresh"] ** 2)


def test_micro_batches_see_fewer_pairs() -> None:
    g = _random_gram(6)
    for row in stats.in_microbatches(g, np.array(list(itertools.permutations(range(6)))), 4):
        assert row["pairs"] == 4 * (row["size"] - 1)
    noise = _random_gram(512, mean=0.0, size=2000)
    rows = stats.in_microbatches(noise, stats.shuffles(512, 1500, 0), stats.pooled_size(512))
    assert [row["size"] for row in rows] == [2, 4, 8, 16, 32, 64, 128] and rows[0]["n"] == 128
    for row in rows[:4]:  # of pure noise, the variance goes with one over the number of pairs
        assert row["variance_ratio"] == pytest.approx(127 / (row["size"] - 1), rel=0.25)
    assert [stats.pooled_size(n) for n in (8, 9, 96, 128, 256)] == [2, 2, 16, 32, 64]


def test_numbers_that_do_not_exist_are_null() -> None:
    zero = stats.reference(np.zeros((8, 8)))
    assert (zero["u"], zero["u_se"], zero["significant"]) == (0.0, 0.0, False) and math.isnan(zero["noise_scale"])
    rows = stats.compare_estimators(np.zeros((8, 8)), stats.shuffles(8, 10, 0))
    assert all(math.isnan(row["sd_rel"]) and row["sd"] == 0 for row in rows)
    negative = -_random_gram(8) + 20 * np.eye(8)
    assert all(math.isnan(row["rmse_rel"]) for row in stats.compare_estimators(negative, stats.shuffles(8, 10, 0)))


# Sketches


def _layers(prompts: int = 6, sizes: tuple[tuple[int, int], ...] = ((20, 12), (9, 20))) -> list[Layer]:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (2 * prompts,), generator=rng)
    owners = torch.arange(2 * prompts) % prompts
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return [
        Layer(
            f"layer{i}",
            torch.randn(int(lengths.sum()), d_in, generator=rng) + 0.3,
            torch.randn(int(lengths.sum()), d_out, generator=rng) + 0.3,
            offsets,
            owners,
            prompts,
            False,
        )
        for i, (d_in, d_out) in enumerate(sizes)
    ]


def _far_from_exact(layers: list[Layer], width: int, count: int = 300) -> float:
    """The largest deviation of the sketches' mean Gram from the exact one, in standard errors."""
    exact = gram(layers).numpy()
    found = sketches.sketch_grams(layers, width, range(count))
    return float((np.abs(found.mean(0) - exact) / (found.std(0) / math.sqrt(count))).max())


def test_sketches_are_unbiased_and_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _layers()
    assert _far_from_exact(layers, 4) < 4.5 and _far_from_exact(layers, 10) < 4.5
    right = sketches.projections

    def wrong(layers: list[Layer], width: int, seed: int) -> list[sketches.Projection]:
        chosen = right(layers, width, seed)
        return [tuple(None if m is None else m * math.sqrt(width / (width + 1)) for m in pair) for pair in chosen]

    monkeypatch.setattr(sketches, "projections", wrong)
    assert _far_from_exact(layers, 4) > 6


def test_sketches_are_smaller_repeatable_and_exact_where_nothing_is_projected() -> None:
    layers = _layers()
    seeds = [5, 6, 5]
    found = sketches.sketch_grams(layers, 4, seeds)
    assert (found[0] == found[2]).all() and (found[0] != found[1]).any()
    assert [
        (one.x.shape[1], one.dy.shape[1]) for one in sketches.project(layers, sketches.projections(layers, 10, 0))
    ] == [
        (10, 10),
        (9, 10),
    ]
    assert sketches.unprojected(layers, 10) == ["layer1: input (9)"]
    assert sketches.useless(layers, 19) is None
    assert sketches.useless(layers, 20) == "no side of a layer is wider than 20: the widest has 20"
    np.testing.assert_allclose(sketches.sketch_grams(layers, 20, [1])[0], gram(layers).numpy(), rtol=1e-6)
    assert sketches.bytes_per_prompt(layers) == 4 * (20 * 12 + 9 * 20)
    assert sketches.bytes_per_prompt(layers, 10) == 4 * (10 * 10 + 9 * 10)
    spread = [sketches.sketch_grams(layers, width, range(40))[:, 0, 0].std() for width in (2, 8)]
    assert spread[1] < 0.7 * spread[0]


def test_what_sketches_keep_of_the_tasks() -> None:
    exact = {name: _random_gram(8, mean, seed=4) for name, mean in (("quiet", 0.6), ("loud", 3.0), ("middle", 1.5))}
    copies = {name: np.stack([one * 0.9, one, one * 1.1]) for name, one in exact.items()}
    orders = stats.shuffles(8, 50, 0)
    of_task = sketches.describe_task(exact["loud"], copies["loud"], 2.0, orders, 2)
    assert of_task["u_bias"] == pytest.approx(0) and of_task["u_sd_rel"] == pytest.approx(0.1)
    assert of_task["sq_sd_rel"] == pytest.approx(0.1) and of_task["u_sd_over_se"] == pytest.approx(of_task["u_sd"] / 2)
    assert of_task["rmse_all_pairs"] > of_task["u_sd"]
    order = sketches.describe_order(exact, copies)
    assert (order["largest"], order["smallest"], order["same_order"]) == ("loud", "quiet", 1.0)
    assert order["kendall_tau_min"] == pytest.approx(1.0) and order["ratio_median"] == pytest.approx(
        order["ratio_exact"]
    )
    copies["loud"][0] *= 0.001
    order = sketches.describe_order(exact, copies)
    assert order["same_order"] == pytest.approx(2 / 3) and order["kendall_tau_min"] < 0.5
    nothing = {name: np.zeros((8, 8)) for name in exact}
    order = sketches.describe_order(nothing, {name: np.zeros((3, 8, 8)) for name in exact})
    assert order["largest"] is None and math.isnan(order["ratio_exact"])


def test_cost_rows() -> None:
    layers = _layers()
    rows = {(row["what"], row["width"]): row for row in cost(layers, [4, 10], repeats=2)}
    assert list(rows) == [
        *((what, None) for what in ("weight_grad", "norms", "norms_with_weight_grad", "gram")),
        ("sketch_gram", 4),
        ("sketch_gram", 10),
    ]
    tokens = layers[0].tokens
    assert rows["weight_grad", None]["multiply_adds"] == tokens * (20 * 12 + 9 * 20)
    assert rows["weight_grad", None]["ratio"] == 1.0 and all(row["seconds"] > 0 for row in rows.values())
    pairs = 6 * 7 / 2  # here gradients are cheaper formed than tokens paired
    assert rows["gram", None]["multiply_adds"] == (tokens + pairs) * (20 * 12 + 9 * 20)
    assert rows["sketch_gram", 10]["multiply_adds"] == tokens * (20 + 12 + 20) * 10 + (tokens + pairs) * (100 + 90)
    assert rows["sketch_gram", 4]["bytes_per_prompt"] == 4 * 2 * 16
