"""TaskBalancer: what each strategy promises, on Gram matrices whose answer is known, and its state."""

from __future__ import annotations

import json
import math
import sys
import warnings

import pytest
import torch

from gradnorm_kernels import StepStats, TaskGradient
from gradnorm_kernels.control.balancer import (
    GRAMIAN_METHODS,
    OWN_METHODS,
    STRATEGIES,
    RunningGram,
    TaskBalancer,
    psd_projection,
    weigh,
)

NEEDS = {
    "upgrad": ("quadprog", "qpsolvers"),
    "dualproj": ("quadprog", "qpsolvers"),
    "cagrad": ("cvxpy", "clarabel"),
    "fairgrad": ("scipy",),
}


def needed(strategy: str) -> None:
    if strategy in GRAMIAN_METHODS:
        for package in ("torchjd", *NEEDS.get(strategy, ())):
            pytest.importorskip(package)


def step(gram, counts=None, tasks="abc") -> StepStats:
    """One step's statistics with this [K, K] matrix of inner products and so many samples a task."""
    gram = torch.as_tensor(gram, dtype=torch.float64)
    counts = counts or [4] * len(gram)
    stats = StepStats()
    stats.tasks, stats.inner_products = list(tasks[: len(gram)]), gram
    for k, task in enumerate(stats.tasks):
        n = counts[k]
        stats[task] = TaskGradient(float(gram[k, k]), 0.0, 0.0, 0.0, n, 0.0, float(n * (n - 1)), "none")
    return stats


def parts(balancer: TaskBalancer, counts) -> torch.Tensor:
    """[K] what each task's expected gradient is multiplied by in the update."""
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return share * torch.tensor(list(balancer.weights.values()), dtype=torch.float64)


def gram_of(rows) -> torch.Tensor:
    jacobian = torch.tensor(rows, dtype=torch.float64)
    return jacobian @ jacobian.T


CONFLICT = [[3.0, 0.0, 1.0], [-0.5, 0.8, 0.3], [0.2, 0.4, -0.6]]


def test_equal_pull_gives_every_task_the_same_norm():
    gram, counts = gram_of([[3.0, 0.0], [0.0, 0.7], [0.5, 0.5]]), [3, 5, 8]
    balancer = TaskBalancer([*"abc"], decay=None)
    assert balancer.weights == {"a": 1.0, "b": 1.0, "c": 1.0}
    balancer.update(step(gram, counts))
    share = parts(balancer, counts)
    assert float(share.sum()) == pytest.approx(1.0)
    pull = share * gram.diagonal().sqrt()
    torch.testing.assert_close(pull, pull[:1].expand(3))


def test_a_silent_task_is_clamped_and_weights_stay_in_bounds():
    balancer = TaskBalancer([*"abc"], bounds=(0.5, 2.0))
    balancer.update(step(torch.diag(torch.tensor([4.0, -1.0, 0.0]))))
    weights = balancer.weights
    assert weights["b"] == weights["c"] > weights["a"] > 0
    assert weights["b"] / weights["a"] <= 4.0 + 1e-12
    nothing = TaskBalancer([*"ab"])
    nothing.update(step(-torch.eye(2)))
    assert nothing.weights == pytest.approx({"a": 1.0, "b": 1.0})


def test_an_unseen_task_keeps_its_uniform_part():
    balancer = TaskBalancer([*"abc"])
    balancer.update(step([[4.0, 0.0], [0.0, 1.0]], tasks="ab"))
    weights = balancer.weights
    assert weights["c"] > 0
    assert weights["b"] / weights["a"] == pytest.approx(2.0)


def test_gradnorm_leans_to_the_tasks_that_learn_least():
    balancer = TaskBalancer([*"abc"], "gradnorm", alpha=1.0, decay=None)
    balancer.update(step(torch.eye(3)), {"a": 0.2, "b": 0.2, "c": 0.2})
    balancer.update(step(torch.eye(3)), {"a": 0.2, "b": 0.6, "c": 0.9})
    rate = torch.tensor([1.0, 0.5, 0.125], dtype=torch.float64)
    torch.testing.assert_close(parts(balancer, [4, 4, 4]), rate / rate.sum())
    with pytest.raises(ValueError, match="needs rewards="):
        balancer.update(step(torch.eye(3)))


def test_famo_steps_along_its_gradient():
    """xi's gradient is that of sum_k softmax(xi)_k times the fall of log loss k, by autograd."""
    balancer = TaskBalancer([*"abc"], "famo", decay=None, beta=0.5, gamma=0.01)
    rewards = [{"a": 0.2, "b": 0.5, "c": 0.7}, {"a": 0.3, "b": 0.5, "c": 0.6}, {"a": 0.5, "b": 0.4, "c": 0.6}]
    xi = torch.zeros(3, dtype=torch.float64)
    for k, reward in enumerate(rewards):
        balancer.update(step(torch.eye(3)), reward)
        if k:
            leaf = xi.clone().requires_grad_()
            before, now = (torch.tensor([1 - r for r in rewards[i].values()], dtype=torch.float64) for i in (k - 1, k))
            (leaf.softmax(0) * (before.log() - now.log())).sum().backward()
            xi = xi - 0.5 * (leaf.grad + 0.01 * xi)
    part = xi.softmax(0) / torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64)
    torch.testing.assert_close(parts(balancer, [4, 4, 4]), part / part.sum())
    assert xi[0] < xi[1]  # "a" fell most


def test_mgda_is_the_shortest_convex_combination():
    needed("mgda")
    gram = gram_of([[3.0, 0.5], [-0.5, 1.0]])
    balancer = TaskBalancer([*"ab"], "mgda", bounds=(1e-6, 1e6), max_iters=1000, epsilon=1e-9)
    balancer.update(step(gram))
    first = float((gram[1, 1] - gram[0, 1]) / (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]))
    assert 0 < first < 1
    assert parts(balancer, [4, 4]).tolist() == pytest.approx([first, 1 - first], rel=1e-3)


def test_pcgrad_projects_conflicting_tasks():
    needed("pcgrad")
    gram = gram_of([[3.0, 0.5], [-0.5, 1.0]])
    assert gram[0, 1] < 0
    expected = torch.stack([1 - gram[0, 1] / gram[0, 0], 1 - gram[0, 1] / gram[1, 1]])
    balancer = TaskBalancer([*"ab"], "pcgrad", bounds=(1e-6, 1e6))
    balancer.update(step(gram))
    torch.testing.assert_close(parts(balancer, [4, 4]), expected / expected.sum())


def test_imtl_g_has_equal_projections():
    needed("imtl_g")
    gram = gram_of(CONFLICT)
    weights = weigh("imtl_g", gram, 0, {})
    projection = gram @ weights / gram.diagonal().sqrt()
    torch.testing.assert_close(projection, projection[:1].expand(3), rtol=1e-6, atol=1e-9)


def test_nash_mtl_is_the_bargaining_solution():
    gram = gram_of(CONFLICT)
    weights = weigh("nash_mtl", gram, 0, {})
    product = weights * (gram @ weights)
    torch.testing.assert_close(product, product[:1].expand(3), rtol=1e-3, atol=0)
    opposed = weigh("nash_mtl", gram_of([[1.0, 0.0], [-2.0, 0.0]]), 0, {})
    assert float(opposed[0] / opposed[1]) == pytest.approx(2.0, rel=1e-2)  # they cancel: no task is helped or hurt


@pytest.mark.parametrize("strategy", [*OWN_METHODS, *GRAMIAN_METHODS])
def test_the_unit_of_the_gradient_and_the_random_state_do_not_matter(strategy):
    needed(strategy)
    gram = gram_of(CONFLICT)
    shares = []
    for factor in (1.0, 1e-9, 1e6):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        balancer = TaskBalancer([*"abc"], strategy, seed=1)
        balancer.update(step(gram * factor))
        shares.append(parts(balancer, [4, 4, 4]))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert float(shares[0].sum()) == pytest.approx(1.0)
    for other in shares[1:]:
        torch.testing.assert_close(other, shares[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["nash_mtl", "upgrad", "mgda", "dualproj", "cagrad"])
def test_the_update_hurts_no_task(strategy):
    """What these methods promise to first order: a step along sum_k a_k g_k decreases every loss."""
    needed(strategy)
    gram = gram_of(CONFLICT)
    options = {"mgda": {"max_iters": 2000, "epsilon": 1e-9}, "cagrad": {"c": 1.5}}.get(strategy, {})
    weights = weigh(strategy, gram, 0, options)
    assert float((gram @ weights).min()) >= -1e-2 * float(gram.diagonal().max())
    assert float((gram @ torch.ones(3, dtype=torch.float64)).min()) < -0.01


def test_an_indefinite_gram_is_projected():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    projected = psd_projection(gram)
    assert float(torch.linalg.eigvalsh(projected).min()) >= -1e-12
    torch.testing.assert_close(projected, torch.full((2, 2), 1.5, dtype=torch.float64))
    torch.testing.assert_close(psd_projection(projected), projected)
    needed("mgda")
    for psd in (True, False):
        balancer = TaskBalancer([*"ab"], "mgda", psd=psd)
        balancer.update(step(gram))
        assert all(math.isfinite(weight) and weight > 0 for weight in balancer.weights.values())


def test_no_direction_is_said_once():
    needed("imtl_g")
    balancer = TaskBalancer([*"ab"], "imtl_g")
    with pytest.warns(UserWarning, match="no direction"):
        balancer.update(step(torch.zeros(2, 2)))
        assert balancer.weights == pytest.approx({"a": 1.0, "b": 1.0})


def test_the_running_gram_pools_by_pairs():
    gram = RunningGram("abc", None)
    gram.update(step([[1.0, 2.0], [2.0, 4.0]], [2, 2], tasks="ab"))
    gram.update(step([[3.0, 0.0, 0.0], [0.0, 1.0, math.nan], [0.0, math.nan, 5.0]], [3, 2, 1]))
    matrix = gram.matrix
    assert float(matrix[0, 0]) == pytest.approx((1 * 2 + 3 * 6) / 8)
    assert float(matrix[0, 1]) == pytest.approx(2 * 2 / (2 + math.sqrt(12)))
    assert math.isnan(float(matrix[2, 2]))  # one sample has no pair
    assert math.isnan(float(matrix[1, 2]))
    wider = RunningGram("cba", None)
    wider.adopt(gram)
    torch.testing.assert_close(wider.matrix, matrix.flip(0, 1), equal_nan=True)
    fading = RunningGram("ab", 0.5)
    for value in (8.0, 2.0):
        fading.update(step([[value, 0.0], [0.0, value]]))
    assert float(fading.matrix[0, 0]) == pytest.approx((0.5 * 8 + 2) / 1.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_saved_balancer_goes_on_alike(strategy):
    needed(strategy)
    balancer, other = (TaskBalancer([*"abc"], strategy, seed=3) for _ in range(2))
    rewards = [{"a": 0.1, "b": 0.5}, {"a": 0.4, "b": 0.5, "c": 0.2}, {"c": 0.6}]
    grams = [gram_of(torch.randn(3, 4, generator=torch.Generator().manual_seed(k)).tolist()) for k in range(3)]
    for gram, reward in zip(grams[:2], rewards[:2], strict=True):
        balancer.update(step(gram), reward)
    other.load_state_dict(json.loads(json.dumps(balancer.state_dict())))
    assert other.weights == balancer.weights
    for each in (balancer, other):
        each.update(step(grams[2]), rewards[2])
    assert other.weights == balancer.weights
    assert other.state_dict() == balancer.state_dict()
    with pytest.raises(ValueError, match="saved with tasks="):
        TaskBalancer([*"abd"], strategy).load_state_dict(balancer.state_dict())


def test_a_state_of_other_losses_or_averages_is_refused():
    """The first losses were made with reward_max, so a rate of two of them would be neither's."""
    saved = TaskBalancer([*"ab"], "gradnorm")
    saved.update(step([[1.0, 0.0], [0.0, 2.0]]), {"a": 0.1, "b": 0.5})
    for changes, message in (
        ({"reward_max": 4.0}, r"saved with reward_max=1.0 and this balancer has 4.0"),
        ({"decay": None}, "saved with decay=0.9 and this balancer has None"),
    ):
        other = TaskBalancer([*"ab"], "gradnorm", **changes)
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved.state_dict())
        assert other.state_dict() == before
    older = {name: value for name, value in saved.state_dict().items() if name not in ("reward_max", "decay")}
    (again := TaskBalancer([*"ab"], "gradnorm")).load_state_dict(older)
    assert again.weights == saved.weights
    del older["gram"]
    with pytest.raises(ValueError, match=r"it lacks \['gram'\]"):
        TaskBalancer([*"ab"], "gradnorm").load_state_dict(older)


@pytest.mark.parametrize("strategy", ["famo", "gradnorm", "equal_pull"])
def test_rewards_above_the_highest_one_are_warned_about(strategy):
    """Their tasks look solved; strategies that go by no reward have nothing to say."""
    balancer = TaskBalancer([*"ab"], strategy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for reward in (1.0, 3.0, 4.0):
            balancer.update(step([[1.0, 0.0], [0.0, 2.0]]), {"a": reward, "b": 0.5})
    found = [str(one.message) for one in said]
    assert len(found) == (strategy != "equal_pull")
    assert all("task 'a' has a mean reward of 3, above reward_max=1" in text for text in found)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "loudest"}, ValueError, "strategy must be one of 'equal_pull'"),
        ({"tasks": ["a", "a"]}, ValueError, "tasks must hold"),
        ({"tasks": []}, ValueError, "tasks must hold"),
        ({"decay": 1.0}, ValueError, "decay must be None or lie strictly"),
        ({"bounds": (0.0, 2.0)}, ValueError, "bounds must be"),
        ({"bounds": (2.0, 3.0)}, ValueError, "bounds must be"),
        ({"bounds": 3}, ValueError, "bounds must be"),
        ({"psd": "no"}, ValueError, "psd must be True or False, got 'no'"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
        ({"reward_max": "1"}, ValueError, "reward_max must be a finite number, got '1'"),
        ({"strategy": "gradnorm", "alpha": "a"}, ValueError, "alpha must be a finite number, got 'a'"),
        ({"strategy": "famo", "alpha": 1}, ValueError, r"takes the options \['beta', 'gamma'\], got \['alpha'\]"),
        ({"strategy": "mgda", "alpha": 1}, ValueError, "options that torchjd does not take"),
        ({"strategy": "nash_mtl", "max_norm": 1}, ValueError, "takes no options"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    needed(arguments.get("strategy", ""))
    with pytest.raises(error, match=message):
        TaskBalancer(**{"tasks": ["a", "b"], **arguments})


def test_without_torchjd_its_strategies_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match="pip install torchjd"):
        TaskBalancer([*"ab"], "mgda")
    TaskBalancer([*"ab"], "equal_pull")
    with pytest.raises(TypeError, match="stats must be what"):
        TaskBalancer([*"ab"]).update({"a": 1.0})
