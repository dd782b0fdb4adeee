"""The study's answers: planted truths are found, noise is not, and whatever is missing, every answer comes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradnorm_grpo.study.measurements import FIELDS, Measurements
from gradnorm_grpo.study.questions import QUESTIONS, answer, gain, imbalance
from gradnorm_grpo.study.questions.common import over_seeds
from gradnorm_grpo.study.stats import Ratio
from tests.study.study_planted import planted

U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.15)
IDS = ["imbalance", "last_block", "gain", "explain", "arms", "estimators"]
ARMS = ("uniform", "proportional", "inverse", "equal_pull")


def one(m: Measurements, name: str) -> dict[str, Any]:
    """One of the answers."""
    found: dict[str, Any] = next(a for a in answer(m)["answers"] if a["id"] == name)
    return found


def value(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of an answer's numbers whose name starts so."""
    return next(row for row in found["numbers"] if row["name"].startswith(name))


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ((18.0, 9.1, 36.0), "18 (95% interval 9.1 to 36)"),
        ((33.0, 16.0, math.inf), "33 (at least 16, 97.5% sure; the quietest is not told apart from zero)"),
        ((math.nan, 4.8, math.inf), "at least 4.8 (97.5% sure; the quietest is not distinguishable from zero)"),
        ((math.nan, 0.0, math.inf), "an unknown number of (the quietest is not distinguishable from zero)"),
    ],
)
def test_a_ratio_says_what_is_known_of_it(ratio: tuple[float, float, float], says: str) -> None:
    """Where the quietest task's U is not positive there is a bound at most."""
    assert imbalance._times(Ratio(*ratio, "", [])) == says


def test_a_ratio_without_a_bound_is_no_lack_of_measurements() -> None:
    m = planted(np.random.default_rng(0), U)
    nothing = Ratio(math.nan, math.nan, math.nan, "", [(0, 5)] * 3)
    said = imbalance._sentence(m, np.ones((3, 6)), nothing, 1e-4, "undecided")
    assert "the quietest is not distinguishable from zero, so their ratio has no bound over 3 seeds (p = 0.0001" in said
    nothing.picks.clear()
    assert "fewer than two tasks" in imbalance._sentence(m, np.ones((3, 6)), nothing, math.nan, "undecided")


def test_planted_truths_are_found() -> None:
    lengths = np.array([[0.5] * 6, [0.6, 0.5, 0.7, 0.4, 0.8, 0.3], [20, 9, 30, 14, 7, 11], U])
    m = planted(
        np.random.default_rng(0),
        U,
        gains=[0.4, 0.3, 0.22, 0.15, 0.08, 0.0],
        full=[9 * u for u in U],
        full_noise=1.0,
        noise=0.1,
        spread=0.05,
        better=0.06,
        statistics=lengths,
        arms=ARMS,
    )
    found = {a["id"]: a for a in answer(m)["answers"]}
    assert list(found) == IDS
    assert {name: found[name]["verdict"] for name in IDS[:5]} == dict.fromkeys(IDS[:5], "supported")
    ratio = value(found["imbalance"], "loudest / quietest, training")
    assert ratio["low"] < U[0] / U[-1] < ratio["high"] and ratio["low"] > 10
    assert "copy is the loudest task and maximum the quietest" in found["imbalance"]["sentence"]
    slope = value(found["last_block"], "log-log slope, different steps")
    assert slope["value"] == pytest.approx(1, abs=0.2) and slope["low"] < slope["value"] < slope["high"]
    assert "response length 1.00" in found["explain"]["sentence"]
    assert value(found["arms"], "proportional minus uniform, mean")["value"] == pytest.approx(0.06, abs=0.02)
    assert value(found["arms"], "rollouts")["value"] == 30 * 6 * 64


def test_the_other_way_round_is_contradicted() -> None:
    rng = np.random.default_rng(1)
    m = planted(rng, U, gains=U[::-1], full=U[::-1], full_noise=0.1, noise=0.1, spread=0.05, better=-0.1)
    assert one(m, "gain")["verdict"] == "contradicted" and one(m, "gain")["sentence"]
    assert one(m, "last_block")["verdict"] == "contradicted"
    assert one(m, "arms")["verdict"] == "contradicted" and "ends lower" in one(m, "arms")["sentence"]
    same = planted(rng, [1.0] * 6, noise=0.1, spread=0.01)
    assert one(same, "imbalance")["verdict"] == "contradicted"


def test_one_clear_pair_is_enough_against_the_rule() -> None:
    """Gains without any relation to U, but measured so well that single pairs of tasks are beyond chance."""
    m = planted(
        np.random.default_rng(2),
        U,
        gains=[0.2, 0.6, 0, 0.1, 0.5, 0.3],
        noise=0.01,
        spread=0.002,
        accuracy_noise=0.002,
    )
    found = one(m, "gain")
    assert abs(value(found, "Spearman of U and held-out gain")["value"]) < 0.3
    assert found["verdict"] == "contradicted" and "adjusted for all pairs" in found["sentence"]
    jitter = 0.01 * np.eye(3)
    pairs = gain.inversions(np.array([[3.0, 2.0, 1.0]] * 3) + jitter, np.array([[0, 0.5, 0.1]] * 3) + jitter)
    assert {(a, b) for a, b, p in pairs if p < 0.05} == {(0, 1), (0, 2)}


def test_null_data_stay_undecided() -> None:
    rng, wrong, studies = np.random.default_rng(3), Counter[str](), 40
    questions = {name: QUESTIONS[name] for name in IDS[:5]}
    for _ in range(studies):
        m = planted(rng, [0.05] * 6, full=[0.5] * 6, steps=6, window=1, spread=0.0, full_noise=3.0)
        for name, question in questions.items():
            wrong[name] += question.answer(m).verdict != "undecided"
    assert sum(wrong.values()) <= 0.08 * studies * len(questions), wrong
    assert max(wrong.values()) <= 0.15 * studies, wrong


def test_noise_shared_by_both_measures_is_not_taken_for_a_relation() -> None:
    m = planted(np.random.default_rng(4), [0.1] * 6, full=[0.1] * 6, noise=1.0, full_noise=1.0, spread=0.0)
    found = one(m, "last_block")
    assert value(found, "Spearman, same steps")["value"] > 0.95
    assert abs(value(found, "Spearman, different steps")["value"]) < 0.5
    assert found["verdict"] == "undecided"


def test_u_that_is_not_positive_is_counted_and_kept() -> None:
    m = planted(np.random.default_rng(5), [1, 0.5, 0.2, 0.1, -0.4], full=[9, 5, 2, 1, -3], noise=0.05, full_noise=0.3)
    found = one(m, "last_block")
    rows = found["data"]["disjoint"]
    assert found["data"]["not_positive"] == sum(row["last"] <= 0 or row["full"] <= 0 for row in rows) >= 36
    assert len(rows) == 2 * 3 * 2 * 5 * 3
    ratio = value(one(m, "imbalance"), "loudest / quietest, training")
    assert ratio["value"] is None  # no ratio to a norm that is not shown to be above zero


def test_one_seed_decides_only_what_its_own_errors_can() -> None:
    m = planted(np.random.default_rng(6), U, gains=U, full=[9 * u for u in U], noise=0.1, better=0.2, seeds=(7,))
    found = {a["id"]: a for a in answer(m)["answers"]}
    assert found["imbalance"]["verdict"] == "supported" and "in the one seed" in found["imbalance"]["sentence"]
    for name in IDS[1:]:
        assert found[name]["verdict"] == "undecided" and "ndecided" in found[name]["sentence"]
    assert "single seed" in found["gain"]["sentence"] and "one pair of runs" in found["arms"]["sentence"]
    assert all(row["low"] is None for row in found["gain"]["numbers"])


def test_too_few_tasks_say_so() -> None:
    m = planted(np.random.default_rng(7), U[:4], gains=[0.4, 0.3, 0.2, 0.0], full=U[:4], noise=0.05, spread=0.02)
    for name in ("last_block", "gain", "explain"):
        found = one(m, name)
        assert found["verdict"] == "undecided" and "perfect order" in found["sentence"]
    two = planted(np.random.default_rng(7), U[:1], full=U[:1])
    assert {a["verdict"] for a in answer(two)["answers"]} == {"undecided"}


def test_an_unequal_budget_decides_nothing() -> None:
    m = planted(np.random.default_rng(8), U, better=0.2, spread=0.05)
    assert one(m, "arms")["verdict"] == "supported"
    m.array("uniform", 2, "rollouts")[:, 3] = 0
    found = one(m, "arms")
    assert found["verdict"] == "undecided" and "did not have the same number" in found["sentence"]


def test_arms_are_paired_by_seed() -> None:
    rng = np.random.default_rng(9)
    m = planted(rng, U, better=0.05, accuracy_noise=0.005)
    for run in m.runs:  # seeds far apart: only the paired difference can tell
        for point in m._runs[run].evals["eval"].values():
            point["reward"] += 0.2 * run[1]
    assert one(m, "arms")["verdict"] == "supported"
    del m._runs["uniform", 3]
    assert len(one(m, "arms")["data"]["differences"][0]["per_seed"]) == 2


def _nothing(m: Measurements) -> None:
    m._runs.clear()


def _unmeasured(m: Measurements) -> None:
    for run in m.runs:
        for name in FIELDS:
            m.array(*run, name)[:] = math.nan


def _no_evaluation(m: Measurements) -> None:
    for run in m.runs:
        m._runs[run].evals.clear()


def _no_first_evaluation(m: Measurements) -> None:
    for run in m.runs:
        del m._runs[run].evals["eval"][0]


def _no_errors(m: Measurements) -> None:
    for run in m.runs:
        m.array(*run, "grad_norm_sq_se")[:] = math.nan


def _only_proportional(m: Measurements) -> None:
    for seed in (1, 2, 3):
        del m._runs["uniform", seed]


def _task_gone(m: Measurements) -> None:
    for name in FIELDS:
        m.array("uniform", 1, name)[2] = math.nan


def _all_alike(m: Measurements) -> None:
    for run in m.runs:
        for name in FIELDS:
            m.array(*run, name)[:] = 1.0
        for point in m._runs[run].evals["eval"].values():
            point["reward"][:] = 1.0


def _zero(m: Measurements) -> None:
    for run in m.runs:
        for name in FIELDS:
            m.array(*run, name)[:] = 0.0


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("window", [1, 10])
@pytest.mark.parametrize(
    "damage",
    [
        _nothing,
        _unmeasured,
        _no_evaluation,
        _no_first_evaluation,
        _no_errors,
        _only_proportional,
        _task_gone,
        _all_alike,
        _zero,
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_answer_comes_whatever_is_missing(
    damage: Callable[[Measurements], None], steps: int, window: int
) -> None:
    m = planted(np.random.default_rng(10), U, full=U, steps=steps, window=window, evaluations=(0.0, 1.0))
    damage(m)
    found = answer(m)
    text = json.dumps(found, allow_nan=False)
    assert "nan" not in text.lower().replace("nans", "")
    assert [a["id"] for a in found["answers"]] == IDS
    for a in found["answers"]:
        assert set(a) == {"id", "question", "claim", "verdict", "sentence", "numbers", "data"}
        assert a["verdict"] in ("supported", "contradicted", "undecided")
        assert a["verdict"] != "undecided" or "ndecided" in a["sentence"] or "not told apart" in a["sentence"]
        for row in a["numbers"]:
            assert set(row) == {"name", "value", "low", "high", "level", "how"}
    if damage in (_nothing, _unmeasured, _zero):
        assert {a["verdict"] for a in found["answers"]} == {"undecided"}


def _estimates(spread: float, sketches: int = 32) -> dict[str, Any]:
    def row(name: str, n: int) -> dict[str, Any]:
        bias = 20.0 / n if name == "plug_in" else 0.0
        return {
            "estimator": name,
            "n": n,
            "bias": bias,
            "sd_fresh": 4.0 / n,
            "bias_rel": bias / 2,
            "sd_fresh_rel": 2.0 / n,
            "coverage": 1 - 1.6 / n if name == "cross_product" else None,
        }

    tasks = {
        task: {
            "reference": {"u": 2.0, "u_se": 0.2, "significant": True},
            "estimators": [row(name, n) for n in (4, 8, 16) for name in ("cross_product", "plug_in", "two_batch")],
            "microbatches": [{"size": 8, "n": 64, "sd": 0.5}, {"size": 64, "n": 64, "sd": 0.1}],
        }
        for task in ("copy", "sort")
    }
    sketched = {task: {"u_sd_over_se": spread, "u_sd_rel": spread / 10, "rmse_all_pairs": 0.2} for task in tasks}
    return {
        "prompts": 256,
        "options": {"sketches": sketches},
        "tasks": tasks,
        "sketches": [
            {"width": 64, "skipped": False, "tasks": sketched, "order": {"kendall_tau_mean": 0.9}}
            | {"bytes_per_prompt": 100, "exact_bytes_per_prompt": 400},
            {"width": 512, "skipped": True, "reason": "wide"},
        ],
        "cost": {
            "rows": [
                {"what": "gram", "width": None, "seconds": 0.2},
                {"what": "norms", "width": None, "seconds": 0.02},
                {"what": "sketch_gram", "width": 64, "seconds": 0.05},
            ]
        },
    }


@pytest.mark.parametrize(
    ("spread", "sketches", "verdict"),
    [(0.3, 32, "supported"), (3.0, 32, "contradicted"), (0.9, 32, "undecided"), (0.3, 1, "undecided")],
)
def test_sketches_are_judged_by_the_error_they_add(spread: float, sketches: int, verdict: str) -> None:
    m = planted(np.random.default_rng(11), U)
    m.estimates = [_estimates(spread, sketches)]
    found = answer(m)["answers"][-1]
    assert found["verdict"] == verdict
    assert "At 8 prompts a task the plug-in estimate is too large by 1.2 times U" in found["sentence"]
    assert found["data"]["sketches"][0]["seconds"] == 0.05 and found["data"]["sketches"][0]["exact_seconds"] == 0.2
    if sketches > 1:
        assert "0.25 of the gradients' bytes" in found["sentence"] and "0.40 times the error" in found["sentence"]
        assert "exact norms take 0.40 of its time" in found["sentence"]
    assert found["data"]["reference"] == "U over all 256 stored prompts of a task"
    covered = {row["name"]: row["value"] for row in found["numbers"] if row["name"].startswith("coverage")}
    name = "coverage of the cross-product's jackknife interval,"
    assert covered == {f"{name} 8 prompts": 0.8, f"{name} 16 prompts": 0.9}


def test_the_interval_of_a_correlation_stays_within_one() -> None:
    values = [0.99, 0.9, 0.97]
    free, cut = over_seeds("slope", values), over_seeds("Pearson", values, correlation=True)
    assert free["high"] > 1 and cut["high"] == 1 and cut["low"] == free["low"] and cut["value"] == free["value"]
