"""The estimator: against definitions written out, statistically, and where nothing can be said."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels.estimation.moments import PairSums, add_up, merge, moments, task_moments
from tests.tracking.brute_force import jackknife, u_statistic


def gradients(sizes: list[int], dim: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids))]
    means = torch.randn(len(sizes), dim, dtype=torch.float64) * 0.5
    return means[ids] + torch.randn(len(ids), dim, dtype=torch.float64), ids


def sums_of(
    g: torch.Tensor, ids: torch.Tensor, keys: list | None = None, weight: torch.Tensor | None = None
) -> PairSums:
    gram = g @ g.T
    w = torch.ones(len(g), dtype=torch.float64) if weight is None else weight
    return PairSums(gram, gram.diagonal().clone(), w, w**2, ids, keys or list(range(len(g))))


@pytest.mark.parametrize("sizes", [[2], [3, 7], [11, 2, 5]])
def test_cross_product_is_its_definition(sizes: list[int]) -> None:
    g, ids = gradients(sizes)
    gram = g @ g.T
    group_sq = torch.stack([g[ids == k].sum(0).square().sum() for k in range(len(sizes))])
    r = gk.cross_product(gram.diagonal(), group_sq, ids, gram)
    for k, n in enumerate(sizes):
        own = g[ids == k]
        assert r.n[k] == n
        assert float(r.sq_norm[k]) == pytest.approx(u_statistic(own))
        assert float(r.plug_in[k]) == pytest.approx(float(own.mean(0).square().sum()))
        trace = float(own.square().sum(1).mean()) - u_statistic(own)
        assert float(r.noise_scale[k]) == pytest.approx(trace / u_statistic(own))
        if n > 2:
            assert float(r.std_error[k]) == pytest.approx(jackknife(own))
        else:
            assert math.isnan(r.std_error[k])


def test_small_groups_are_nan_with_their_n() -> None:
    r = gk.cross_product([2.0, 3.0, 4.0], [2.0, 9.0, 0.0], [0, 1, 1])
    assert r.n.tolist() == [1, 2, 0]
    assert math.isnan(r.sq_norm[0]) and math.isnan(r.sq_norm[2])
    assert float(r.sq_norm[1]) == pytest.approx((9 - 7) / 2)
    assert r.std_error is None


def test_a_nan_sample_stays_in_its_group() -> None:
    g, ids = gradients([5, 6])
    g[int((ids == 0).nonzero()[0])] = math.nan
    moments = task_moments([sums_of(g, ids)], 2)
    assert math.isnan(moments.sq_norm[0])
    assert float(moments.sq_norm[1]) == pytest.approx(u_statistic(g[ids == 1]))
    assert float(moments.std_error[1]) == pytest.approx(jackknife(g[ids == 1]))


def test_u_is_unbiased_and_the_plug_in_is_not() -> None:
    """Over many draws from a known distribution the mean of U is the true squared norm within its error."""
    torch.manual_seed(3)
    draws, n, dim = 4000, 6, 30
    mean = torch.randn(dim, dtype=torch.float64) * 0.3
    truth = float(mean.square().sum())
    g = mean + torch.randn(draws, n, dim, dtype=torch.float64)
    whole, own = g.sum(1).square().sum(1), g.square().sum(2)
    ids = torch.arange(draws).repeat_interleave(n)
    r = gk.cross_product(own.flatten(), whole, ids)
    error = float(r.sq_norm.std()) / math.sqrt(draws)
    assert abs(float(r.sq_norm.mean()) - truth) < 4 * error
    plug_error = float(r.plug_in.std()) / math.sqrt(draws)
    assert float(r.plug_in.mean()) - truth > 20 * plug_error
    assert float(r.plug_in.mean()) - truth == pytest.approx(dim / n, rel=0.05)  # tr(Cov)/n


def test_the_standard_error_is_the_spread_of_u() -> None:
    torch.manual_seed(4)
    n, dim, values, errors = 16, 10, [], []
    mean = torch.randn(dim, dtype=torch.float64)
    ids = torch.zeros(n, dtype=torch.long)
    for _ in range(400):
        moments = task_moments([sums_of(mean + torch.randn(n, dim, dtype=torch.float64), ids)], 1)
        values.append(float(moments.sq_norm[0]))
        errors.append(float(moments.std_error[0]))
    spread = float(torch.tensor(values).std())
    assert float(torch.tensor(errors).square().mean().sqrt()) == pytest.approx(spread, rel=0.15)


def test_inner_products_and_cosines() -> None:
    g, ids = gradients([6, 9], dim=400)
    moments = task_moments([sums_of(g, ids)], 2)
    a, b = g[ids == 0], g[ids == 1]
    inner = float(a.mean(0) @ b.mean(0))
    assert float(moments.inner_products[0, 1]) == pytest.approx(inner)
    assert torch.equal(moments.inner_products, moments.inner_products.T)
    assert float(moments.cosines[1, 0]) == pytest.approx(inner / math.sqrt(u_statistic(a) * u_statistic(b)))

    def left_out(value) -> float:
        total = 0.0
        for own, other, first in ((a, b, True), (b, a, False)):
            n = len(own)
            loo = [
                value(own[[i for i in range(n) if i != d]], other)
                if first
                else value(other, own[[i for i in range(n) if i != d]])
                for d in range(n)
            ]
            v = torch.tensor(loo, dtype=torch.float64)
            total += float((n - 1) / n * (v - v.mean()).square().sum())
        return math.sqrt(total)

    assert float(moments.inner_products_se[0, 1]) == pytest.approx(left_out(lambda p, q: float(p.mean(0) @ q.mean(0))))
    assert float(moments.cosines_se[0, 1]) == pytest.approx(
        left_out(lambda p, q: float(p.mean(0) @ q.mean(0)) / math.sqrt(u_statistic(p) * u_statistic(q)))
    )


def test_pairs_are_taken_inside_a_micro_batch() -> None:
    g, _ = gradients([7])
    first, second = g[:3], g[3:]
    one = [
        sums_of(part, torch.zeros(len(part), dtype=torch.long), keys)
        for part, keys in ((first, [0, 1, 2]), (second, [3, 4, 5, 6]))
    ]
    moments = task_moments(one, 1)
    assert float(moments.sq_norm[0]) == pytest.approx((6 * u_statistic(first) + 12 * u_statistic(second)) / 18)
    assert float(moments.pair_weight[0]) == 18
    assert float(moments.std_error[0]) > 0


def test_split_samples_keep_u_unbiased() -> None:
    """Two micro-batches hold 3 and 5 of each sample's 8 rows: weights w_p w_q, pairs of different samples only."""
    torch.manual_seed(5)
    draws, n, dim = 1500, 4, 12
    mean = torch.randn(dim, dtype=torch.float64) * 0.5
    values = []
    for _ in range(draws):
        centre = mean + torch.randn(
            n, dim, dtype=torch.float64
        )  # a sample's own gradient differs from sample to sample
        rows = centre[:, None] + torch.randn(n, 8, dim, dtype=torch.float64)
        ids = torch.zeros(n, dtype=torch.long)
        parts = [
            sums_of(rows[:, span].sum(1) / 8, ids, [10, 11, 12, 13], torch.full((n,), size / 8, dtype=torch.float64))
            for span, size in ((slice(0, 3), 3), (slice(3, 8), 5))
        ]
        values.append(float(task_moments(parts, 1).sq_norm[0]))
    v = torch.tensor(values)
    assert abs(float(v.mean()) - float(mean.square().sum())) < 4 * float(v.std()) / math.sqrt(draws)


def test_ranks_merged_are_one_process_with_their_micro_batches() -> None:
    """Tasks in another order on each rank, a task that one rank lacks, and a sample that lies on two of them."""
    g, _ = gradients([24])
    halves = torch.full((6,), 0.5, dtype=torch.float64)
    layout = [(slice(0, 6), [0, 0, 1, 1, 1, 0]), (slice(6, 14), [1, 1, 0, 0, 0, 1, 1, 1]), (slice(14, 20), [0] * 6)]
    keys = [list(range(6)), list(range(6, 14)), [0, 1, 5, 20, 21, 22]]
    weights = [None, None, halves]
    names = [["a", "b"], ["b", "a"], ["a"]]
    parts = [
        sums_of(g[rows], torch.tensor(ids), own, weight)
        for (rows, ids), own, weight in zip(layout, keys, weights, strict=True)
    ]
    ranks = []
    for part, own in zip(parts, names, strict=True):
        column = torch.tensor([own.index("ab"[task]) for task in part.block_task.tolist()])
        samples = {key: int(task) for key, task in zip(part.block_keys, column, strict=True)}
        ranks.append(add_up([replace(part, block_task=column)], own, samples))
    merged, whole = moments(merge(ranks)), task_moments(parts, 2)
    assert merge(ranks).tasks == ("a", "b")
    for field in fields(whole):
        torch.testing.assert_close(
            getattr(merged, field.name), getattr(whole, field.name), rtol=1e-12, atol=1e-12, msg=field.name
        )
    table = merge(ranks).sample_task
    assert len(table) == 17 and [table[key] for key in (0, 2, 6, 8, 22)] == [0, 1, 1, 0, 0]


def test_a_sample_in_two_tasks_on_two_ranks_is_refused() -> None:
    g, _ = gradients([6])
    part = sums_of(g[:3], torch.zeros(3, dtype=torch.long), [0, 1, 2])
    ranks = [add_up([part], [task], dict.fromkeys([0, 1, 2], 0)) for task in ("a", "b")]
    with pytest.raises(ValueError, match=r"sample 0 has rows of two tasks, 'a' on one rank and 'b' on another"):
        merge(ranks)


def test_exact_sums_make_every_pair_count() -> None:
    g, ids = gradients([9, 5])
    half = len(g) // 2
    parts = [sums_of(g[:half], ids[:half], list(range(half))), sums_of(g[half:], ids[half:], list(range(half, len(g))))]
    sums = torch.stack([g[ids == k].sum(0) for k in range(2)])
    found = moments(add_up(parts, ["a", "b"]), sums @ sums.T)
    for k in range(2):
        own = g[ids == k]
        n = len(own)
        assert float(found.sq_norm[k]) == pytest.approx(u_statistic(own))
        assert float(found.plug_in[k]) == pytest.approx(float(own.mean(0).square().sum()))
        assert float(found.pair_weight[k]) == n * (n - 1)
    assert float(found.inner_products[0, 1]) == pytest.approx(float(g[ids == 0].mean(0) @ g[ids == 1].mean(0)))
    assert float(found.std_error[0]) == float(task_moments(parts, 2).std_error[0]), "that of the pairs inside"


def test_bad_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_ids must have one entry a sample"):
        gk.cross_product([1.0, 2.0], [3.0], [0])
    with pytest.raises(ValueError, match="group_ids must hold ints, got torch.float32"):
        gk.cross_product([1.0, 2.0], [3.0], [0.0, 0.5])
    with pytest.raises(ValueError, match=r"group_ids must lie in \[0, 1\)"):
        gk.cross_product([1.0, 2.0], [3.0], [0, 1])
    with pytest.raises(ValueError, match="gram must be"):
        gk.cross_product([1.0, 2.0], [3.0], [0, 0], torch.zeros(3, 3))
    with pytest.raises(ValueError, match="decay must"):
        gk.RunningEstimate(decay=1.0)


def test_numbers_that_no_gradients_have_are_refused() -> None:
    """Mixed-up arguments would give a number all the same: another order, other layers, norms instead of squares."""
    g = torch.randn(7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gram, ids = g @ g.T, torch.tensor([0, 0, 0, 1, 1, 1, 1])
    own = gram.diagonal()
    whole = torch.stack([gram[ids == k][:, ids == k].sum() for k in range(2)])
    assert torch.isfinite(gk.cross_product(own, whole, ids, gram).sq_norm).all()
    with pytest.raises(ValueError, match="gram must be symmetric"):
        gk.cross_product(own, whole, ids, gram.triu())
    with pytest.raises(ValueError, match="gram must have squared norms"):
        gk.cross_product(own, whole, ids, -gram)
    for other in (gram.flip(0, 1), 2 * gram, gram / (own[:, None] * own).sqrt()):
        with pytest.raises(ValueError, match="gram's diagonal must be sample_sq_norms"):
            gk.cross_product(own, whole, ids, other)
    with pytest.raises(ValueError, match="sample_sq_norms must not be negative"):
        gk.cross_product(-own, whole, ids)
    with pytest.raises(ValueError, match=r"group_sq_norms\[0\] = .* 3 samples"):
        gk.cross_product(own, whole + 1000, ids)
    poisoned = g.clone()
    poisoned[2, 3] = torch.nan
    gram = poisoned @ poisoned.T
    whole[0] = torch.nan
    assert gk.cross_product(gram.diagonal(), whole, ids, gram).sq_norm.isnan().tolist() == [True, False]


def task_gradient(u: float, pairs: float = 12.0, se: float = 0.5, n: int = 4) -> gk.TaskGradient:
    return gk.TaskGradient(u, se, 1.0, u + 1, n, u + 2, pairs, "jackknife over samples")


def test_running_estimate_pools_numerators_and_denominators() -> None:
    running = gk.RunningEstimate()
    assert math.isnan(running.value) and math.isnan(running.std_error)
    running.update(task_gradient(1.0, pairs=2.0))
    running.update(task_gradient(-4.0, pairs=6.0))
    running.update(task_gradient(math.nan, pairs=0.0, n=1))
    assert running.value == pytest.approx((2 - 24) / 8)
    assert running.std_error == pytest.approx(math.sqrt((0.5 * 2) ** 2 + (0.5 * 6) ** 2) / 8)
    assert running.n == 9 and running.steps == 2
    copy = gk.RunningEstimate()
    copy.load_state_dict(running.state_dict())
    copy.update(task_gradient(3.0))
    running.update(task_gradient(3.0))
    assert copy.value == running.value and copy.std_error == running.std_error
    with pytest.raises(ValueError, match="state must be"):
        copy.load_state_dict({"n": 1})


def test_running_estimate_decays_and_takes_errors_from_the_spread_where_steps_have_none() -> None:
    fading = gk.RunningEstimate(decay=0.5)
    for u in (8.0, 0.0):
        fading.update(task_gradient(u))
    assert fading.value == pytest.approx(8 * 0.5 / 1.5)
    spread = gk.RunningEstimate()
    values = [1.0, 2.0, 4.0, 5.0]
    for u in values:
        spread.update(task_gradient(u, se=math.nan, n=2))
    assert spread.std_error == pytest.approx(float(torch.tensor(values).std()) / 2)
