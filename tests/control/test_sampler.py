"""TaskSampler: the probability formula, its clamps, the draws and resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gradnorm_kernels.control.sampler import LOWER_CLAMP, STRATEGIES, TaskSampler
from gradnorm_kernels.estimation.estimator import TaskGradient

TASKS = ["gcd", "countdown", "syllogism", "sorting"]
SQ_NORMS = {"gcd": 1.0, "countdown": 4.0, "syllogism": 9.0, "sorting": 16.0}  # norms 1, 2, 3, 4


def gradient(sq_norm: float, pair_weight: float = 56.0, n: int = 8) -> TaskGradient:
    return TaskGradient(sq_norm, 0.1, 2.0, abs(sq_norm) + 1.0, n, 3.0, pair_weight, "jackknife over samples")


def close(probabilities: dict, expected: dict) -> None:
    assert list(probabilities) == list(expected)
    for task, p in expected.items():
        assert probabilities[task] == pytest.approx(p, rel=1e-12, abs=1e-15), task


@pytest.mark.parametrize(
    ("strategy", "exponent", "weights"),
    [
        ("uniform", None, [1, 1, 1, 1]),
        ("proportional", None, [1, 2, 3, 4]),
        ("proportional_sq", None, [1, 4, 9, 16]),
        ("inverse", None, [1, 1 / 2, 1 / 3, 1 / 4]),
        ("power", 3.0, [1, 8, 27, 64]),
        ("power", -2, [1, 1 / 4, 1 / 9, 1 / 16]),
        ("power", 0.0, [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_formula_against_hand_computation(strategy, exponent, weights, floor):
    sampler = TaskSampler(TASKS, strategy, exponent=exponent, floor=floor)
    sampler.update(SQ_NORMS)
    expected = {t: (1 - floor) * w / sum(weights) + floor / 4 for t, w in zip(TASKS, weights, strict=True)}
    close(sampler.probabilities, expected)
    assert math.fsum(sampler.probabilities.values()) == pytest.approx(1.0, abs=1e-12)


def test_uniform_and_proportional_differ():
    """The check above can tell the strategies apart: no two give the same probabilities."""
    seen = set()
    for strategy in STRATEGIES:
        sampler = TaskSampler(TASKS, strategy, exponent=3.0 if strategy == "power" else None)
        sampler.update(SQ_NORMS)
        seen.add(tuple(sampler.probabilities.values()))
    assert len(seen) == len(STRATEGIES)


@pytest.mark.parametrize("strategy", ["uniform", "proportional", "proportional_sq", "inverse"])
@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e150])
def test_only_ratios_matter(strategy, scale):
    """Also for values whose square or inverse would not be representable."""
    plain, scaled = TaskSampler(TASKS, strategy), TaskSampler(TASKS, strategy)
    plain.update(SQ_NORMS)
    scaled.update({task: value * scale for task, value in SQ_NORMS.items()})
    for task in TASKS:
        assert scaled.probabilities[task] == pytest.approx(plain.probabilities[task], rel=1e-9)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize(
    "values", [[-1.0, 0.0, 1e-9, 5.0], [-3.0, -2.0, -1.0, -0.5], [0.0] * 4, [1e-200, 1e200, 1, -1]]
)
def test_floor_and_sum_hold_for_any_sign(strategy, values):
    sampler = TaskSampler(TASKS, strategy, exponent=5.0 if strategy == "power" else None, floor=0.2)
    sampler.update(dict(zip(TASKS, values, strict=True)))
    probabilities = list(sampler.probabilities.values())
    assert all(p >= 0.2 / 4 - 1e-15 for p in probabilities)
    assert math.fsum(probabilities) == pytest.approx(1.0, abs=1e-12)


def test_negative_estimate_is_clamped_here_and_nowhere_else():
    sampler = TaskSampler(["a", "b"], "proportional", floor=0.1)
    sampler.update({"a": -4.0, "b": 4.0})
    close(sampler.probabilities, {"a": 0.05, "b": 0.95})
    assert sampler.sq_norms == {"a": -4.0, "b": 4.0}


def test_inverse_lower_clamp():
    """A task with U <= 0 is drawn at most 10 times as often as the loudest before the floor, not always."""
    sampler = TaskSampler(["quiet", "noise", "loud"], "inverse", floor=0.0)
    sampler.update({"quiet": 1e-12, "noise": -5.0, "loud": 4.0})
    top = LOWER_CLAMP**-0.5
    assert top == pytest.approx(10.0)
    close(
        sampler.probabilities, {"quiet": top / (2 * top + 1), "noise": top / (2 * top + 1), "loud": 1 / (2 * top + 1)}
    )
    # Just above the clamp the value itself counts.
    sampler = TaskSampler(["quiet", "loud"], "inverse", floor=0.0)
    sampler.update({"quiet": 0.04, "loud": 1.0})
    close(sampler.probabilities, {"quiet": 5 / 6, "loud": 1 / 6})


@pytest.mark.parametrize("strategy", ["proportional", "inverse"])
def test_nothing_positive_shares_alike(strategy):
    sampler = TaskSampler(TASKS, strategy)
    sampler.update(dict.fromkeys(TASKS, -1.0) | {"gcd": 0.0})
    close(sampler.probabilities, dict.fromkeys(TASKS, 0.25))


def test_unmeasured_task_has_the_uniform_share():
    sampler = TaskSampler(TASKS, "proportional", floor=0.1)
    close(sampler.probabilities, dict.fromkeys(TASKS, 0.25))
    sampler.update({"gcd": 1.0, "sorting": 9.0})
    close(
        sampler.probabilities,
        {
            "gcd": 0.9 * 0.5 * 0.25 + 0.025,
            "countdown": 0.25,
            "syllogism": 0.25,
            "sorting": 0.9 * 0.5 * 0.75 + 0.025,
        },
    )


def test_numbers_average_with_decay():
    sampler = TaskSampler(["a", "b"], decay=0.5)
    for value in (8.0, 2.0, 5.0):
        sampler.update({"a": value})
    assert sampler.sq_norms["a"] == pytest.approx((0.25 * 8 + 0.5 * 2 + 5) / 1.75)
    assert math.isnan(sampler.sq_norms["b"])
    plain = TaskSampler(["a"], decay=None)
    for value in (8.0, 2.0, 5.0):
        plain.update({"a": value})
    assert plain.sq_norms["a"] == pytest.approx(5.0)


def test_task_gradients_are_weighted_by_their_pairs():
    """Three prompts have 6 pairs and nine have 72: the mean of the ratios would be 5."""
    sampler = TaskSampler(["a"], decay=None)
    sampler.update({"a": gradient(10.0, pair_weight=6.0, n=3)})
    sampler.update({"a": gradient(0.0, pair_weight=72.0, n=9)})
    assert sampler.sq_norms["a"] == pytest.approx(60.0 / 78.0)


@pytest.mark.parametrize("missing", [math.nan, gradient(math.nan, pair_weight=0.0, n=1)])
def test_nan_is_no_measurement(missing):
    number = isinstance(missing, float)
    sampler = TaskSampler(["a", "b"])
    sampler.update({"a": 3.0 if number else gradient(3.0), "b": missing})
    assert sampler.sq_norms["a"] == 3.0
    assert math.isnan(sampler.sq_norms["b"])
    close(sampler.probabilities, {"a": 0.5, "b": 0.5})
    sampler.update({"a": missing})
    assert sampler.sq_norms["a"] == 3.0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("number", [True, False])
def test_infinite_is_left_out_and_warned_about_once(value, number, recwarn):
    sampler = TaskSampler(["a", "b"])
    wrap = (lambda u: u) if number else gradient
    with pytest.warns(UserWarning, match="task 'a' is -?inf"):
        sampler.update({"a": wrap(value), "b": wrap(1.0)})
    recwarn.clear()
    sampler.update({"a": wrap(value)})
    assert not recwarn.list
    assert math.isnan(sampler.sq_norms["a"])
    sampler.update({"a": wrap(3.0)})
    assert sampler.sq_norms == {"a": 3.0, "b": 1.0}


def test_draws_follow_the_probabilities():
    """Pearson's chi-square with 3 degrees of freedom: above 21.1 once in ten thousand seeds; this one is fixed."""
    sampler = TaskSampler(TASKS, "proportional", floor=0.1, seed=11)
    sampler.update(SQ_NORMS)
    n = 20_000
    draws = sampler.draw(n)

    def chi_square(probabilities: dict[str, float]) -> float:
        return sum((draws.count(t) - n * p) ** 2 / (n * p) for t, p in probabilities.items())

    assert chi_square(sampler.probabilities) < 21.1
    assert chi_square(dict.fromkeys(TASKS, 0.25)) > 1000, "the bound must tell these draws from uniform ones"


def test_draws_are_independent_of_each_other():
    """Pearson's chi-square over the nine kinds of neighbouring pairs."""
    sampler = TaskSampler(["a", "b", "c"], "uniform", seed=3)
    draws = sampler.draw(18_001)
    pairs = list(pairwise(draws))
    expected = len(pairs) / 9
    assert (
        sum((pairs.count((s, t)) - expected) ** 2 / expected for s in "abc" for t in "abc") < 31.8
    )  # 8 degrees of freedom at most, p 1e-4


def test_zero_probability_is_never_drawn():
    for tasks in (["never", "always"], ["always", "never"]):
        sampler = TaskSampler(tasks, "proportional", floor=0.0)
        sampler.update({"always": 1.0, "never": -1.0})
        assert set(sampler.draw(777)) == {"always"}


def test_one_task_and_no_draws():
    sampler = TaskSampler(["only"])
    assert sampler.probabilities == {"only": 1.0}
    assert sampler.draw(3) == ["only"] * 3
    assert sampler.draw(0) == []


def test_seeds():
    first, again, other = (TaskSampler(TASKS, seed=seed).draw(1000) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_own_generator():
    """Neither reads nor moves the global random state."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = TaskSampler(TASKS, seed=5).draw(100)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert TaskSampler(TASKS, seed=5).draw(100) == first


@pytest.mark.parametrize("sizes", [[1] * 37, [1, 0, 17, 19], [7] * 5 + [2]])
def test_draws_do_not_depend_on_how_they_are_split(sizes):
    whole, parts = TaskSampler(TASKS, seed=5), TaskSampler(TASKS, seed=5)
    assert sum((parts.draw(n) for n in sizes), []) == whole.draw(37)


@pytest.mark.parametrize("number", [True, False])
@pytest.mark.parametrize("names", [TASKS, [0, 1, 2, 777]])
def test_resume_draw_for_draw_through_json(number, names):
    def step(sampler, i):
        value = math.sin(i) + 0.5
        sampler.update({names[i % 4]: value if number else gradient(value, pair_weight=2.0 + i)})
        return sampler.draw(1 + i % 5)

    sampler = TaskSampler(names, "inverse", floor=0.05, decay=0.8, seed=9)
    for i in range(13):
        step(sampler, i)
    saved = json.loads(json.dumps(sampler.state_dict(), allow_nan=False))
    ahead = [step(sampler, i) for i in range(13, 60)]

    resumed = TaskSampler(names, "inverse", floor=0.05, decay=0.8, seed=1234)
    resumed.draw(7)
    resumed.load_state_dict(saved)
    assert [step(resumed, i) for i in range(13, 60)] == ahead
    assert resumed.state_dict() == sampler.state_dict()


def test_state_is_a_copy():
    sampler = TaskSampler(["a"])
    sampler.update({"a": 2.0})
    state = sampler.state_dict()
    before = json.dumps(state)
    sampler.update({"a": 5.0})
    sampler.draw(3)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: TaskSampler(["a", "b", "c"]), r"tasks=\['a', 'b'\] and this one has tasks=\['a', 'b', 'c'\]"),
        (lambda: TaskSampler(["b", "a"]), "tasks="),
        (lambda: TaskSampler(["a", "b"], "inverse"), "exponent=1.0 and this one has exponent=-1.0"),
        (lambda: TaskSampler(["a", "b"], floor=0.2), "floor=0.1"),
        (lambda: TaskSampler(["a", "b"], decay=None), "decay=0.9"),
    ],
)
def test_load_refuses_the_state_of_another_sampler(other, match):
    sampler = other()
    sampler.update({"a": 1.0})
    before = sampler.state_dict()
    saved = TaskSampler(["a", "b"])
    saved.update({"a": 7.0})
    with pytest.raises(ValueError, match=match):
        sampler.load_state_dict(saved.state_dict())
    assert sampler.state_dict() == before


def test_load_refuses_what_is_not_a_state():
    sampler = TaskSampler(["a", "b"])
    state = sampler.state_dict()
    with pytest.raises(ValueError, match="must be what TaskSampler.state_dict"):
        sampler.load_state_dict({"tasks": ["a", "b"]})
    with pytest.raises(ValueError, match="must be what RunningEstimate.state_dict"):
        sampler.load_state_dict(state | {"estimates": [{}, {}]})
    with pytest.raises(ValueError, match="shorter|longer"):
        sampler.load_state_dict(state | {"estimates": state["estimates"][:1]})
    assert sampler.state_dict() == state


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (["gcd"], {}, None, ""),
        ("gcd", {}, TypeError, "tasks must be a list"),
        ({"gcd", "sorting"}, {}, TypeError, "tasks must be a list"),
        ([], {}, ValueError, "tasks must hold at least one"),
        (["a", "a"], {}, ValueError, r"each name once, got \['a', 'a'\]"),
        (["a"], {"strategy": "loudest"}, ValueError, "strategy must be one of 'uniform', .* got 'loudest'"),
        (["a"], {"exponent": 1.0}, ValueError, "exponent goes with strategy='power'"),
        (["a"], {"strategy": "power"}, ValueError, "exponent=None and strategy='power'"),
        (["a"], {"strategy": "power", "exponent": math.inf}, ValueError, "exponent must be a finite number, got inf"),
        (["a"], {"strategy": "power", "exponent": math.nan}, ValueError, "exponent must be a finite number"),
        (["a"], {"strategy": "power", "exponent": -301}, ValueError, "exponent must be at least -300, got -301"),
        (["a"], {"strategy": "power", "exponent": "1"}, ValueError, "exponent must be a finite number, got '1'"),
        (["a"], {"floor": -0.1}, ValueError, r"floor must be a number in \[0, 1\], got -0.1"),
        (["a"], {"floor": 1.1}, ValueError, "floor"),
        (["a"], {"floor": math.nan}, ValueError, "floor"),
        (["a"], {"floor": True}, ValueError, "floor"),
        (["a"], {"decay": 1.0}, ValueError, "decay must be None or .* got 1.0"),
        (["a"], {"decay": -0.5}, ValueError, "decay"),
        (["a"], {"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
        (["a"], {"seed": 1.5}, ValueError, "seed"),
    ],
)
def test_constructor_validation(args, kwargs, error, match):
    if error is None:
        TaskSampler(args, **kwargs)
        return
    with pytest.raises(error, match=match):
        TaskSampler(args, **kwargs)


@pytest.mark.parametrize(
    ("stats", "error", "match"),
    [
        ({"a": 1.0, "chess": 2.0}, ValueError, r"not built with: \['chess'\]; it has \('a', 'b'\)"),
        ({"a": 1.0, "b": gradient(1.0)}, ValueError, r"stats\['b'\] is one of TaskGradients but .* given numbers"),
        ({"a": 1.0, "b": "2"}, TypeError, r"stats\['b'\] must be a TaskGradient or a number, got str"),
        ({"a": 1.0, "b": None}, TypeError, "got NoneType"),
        ({"a": 1.0, "b": True}, TypeError, "got bool"),
        ({"a": 1.0, "b": torch.tensor(2.0)}, TypeError, "for a tensor pass its .item()"),
        ([("a", 1.0)], TypeError, "stats must map tasks"),
    ],
)
def test_a_bad_update_takes_in_nothing(stats, error, match):
    sampler = TaskSampler(["a", "b"])
    before = sampler.state_dict()
    with pytest.raises(error, match=match):
        sampler.update(stats)
    assert sampler.state_dict() == before


def test_kinds_do_not_mix_over_updates():
    sampler = TaskSampler(["a"])
    sampler.update({"a": gradient(1.0)})
    with pytest.raises(ValueError, match="is one of numbers but this sampler was given TaskGradients"):
        sampler.update({"a": 1.0})
    resumed = TaskSampler(["a"])
    resumed.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="is one of numbers"):
        resumed.update({"a": 1.0})


@pytest.mark.parametrize("n", [-1, 1.0, "3", None, True])
def test_draw_validation(n):
    with pytest.raises(ValueError, match="n must be an int of at least 0"):
        TaskSampler(["a"]).draw(n)


def test_gradients_are_not_changed():
    g = gradient(2.0)
    copy = replace(g)
    TaskSampler(["a"]).update({"a": g})
    assert g == copy
