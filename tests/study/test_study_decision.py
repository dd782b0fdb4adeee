"""Equivalence: "no difference larger than d" is found where it is planted, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.study.decision import (
    NO_DIFFERENCE,
    beyond_noise,
    correlation_tost,
    read_decision,
    spearman_error,
    split_half,
    tost,
)
from gradnorm_grpo.study.figures import draw
from gradnorm_grpo.study.measurements import Measurements
from gradnorm_grpo.study.page import page
from gradnorm_grpo.study.questions import QUESTIONS, answer, arms, explain, gain
from gradnorm_grpo.study.questions.common import Answer
from gradnorm_grpo.study.spec import StudySpec, read_spec
from gradnorm_grpo.study.stats import Correlation
from tests.study.study_planted import planted

U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.15)
DECISION: dict[str, Any] = {"primary": "average", "margins": {"arms": 0.02, "gain": 0.5, "explain": 0.5}, "seeds": 6}


def test_two_one_sided_tests_are_scipys() -> None:
    values = np.array([0.01, -0.004, 0.006, 0.002, -0.001])
    low = scipy_stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    high = scipy_stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert tost(values, 0.02) == pytest.approx(max(low, high), rel=1e-9)
    assert tost(values + 0.05, 0.02) > 0.5 and tost(values - 0.05, 0.02) > 0.5
    assert all(math.isnan(tost(v, d)) for v, d in (([0.1], 0.2), ([0.1, 0.1], 0.2), (values.tolist(), math.nan)))


def test_the_level_is_held_at_the_margin() -> None:
    """With a true mean of exactly d, five in a hundred claim that it is smaller."""
    rng = np.random.default_rng(0)
    claimed = np.mean([tost(0.02 + 0.01 * rng.standard_normal(8), 0.02) < 0.05 for _ in range(2000)])
    assert 0.035 < claimed < 0.065


def _correlation(value: float, tasks: int, spread: float = 0.02) -> Correlation:
    seeds = [value - spread, value, value + spread]
    return Correlation(value, value - 0.05, value + 0.05, 0.5, seeds, tasks)


def test_a_correlation_needs_tasks_seeds_and_measurements_that_are_not_noise() -> None:
    assert correlation_tost(_correlation(0.0, 40), 0.5, 1.0) < 0.01
    assert correlation_tost(_correlation(0.0, 12), 0.5, 1.0) > 0.05  # 12 tasks cannot tell 0 from 0.5
    assert correlation_tost(_correlation(0.0, 40, spread=1.5), 0.5, 1.0) > 0.05
    assert correlation_tost(_correlation(0.0, 40), 0.5, 0.05) > 0.05
    assert correlation_tost(_correlation(0.6, 40), 0.5, 1.0) > 0.5
    for reliability in (0.0, math.nan):
        assert math.isnan(correlation_tost(_correlation(0.0, 40), 0.5, reliability))
    assert math.isnan(correlation_tost(_correlation(0.0, 3), 0.5, 1.0))


def test_the_error_of_spearmans_z_is_that_of_draws() -> None:
    rng = np.random.default_rng(1)
    z = [math.atanh(scipy_stats.spearmanr(rng.random(20), rng.random(20)).statistic) for _ in range(3000)]
    assert np.std(z) == pytest.approx(spearman_error(20), rel=0.05)


def test_reliabilities_are_those_that_were_planted() -> None:
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((40, 60))
    noisy = [truth + rng.standard_normal(truth.shape) for _ in range(2)]
    assert split_half(*noisy) == pytest.approx(2 / 3, abs=0.05)  # of both halves together: variance 1, noise 1/2
    assert split_half(*rng.standard_normal((2, 40, 60))) < 0.1
    assert beyond_noise(noisy[0], np.ones_like(truth)) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(split_half(truth[:0], truth[:0])) and math.isnan(beyond_noise(truth[:0], truth[:0]))


def _study(decision: dict[str, Any], seed: int = 3, **more: Any) -> Measurements:
    options: dict[str, Any] = {"seeds": range(1, 9), "accuracy_noise": 0.005, "evaluations": (0.0, 0.5, 1.0)} | more
    m = planted(np.random.default_rng(seed), U, **options)
    m.decision = decision
    return m


def test_arms_that_do_not_differ_are_equivalent_where_a_margin_was_declared() -> None:
    found = arms.answer(_study(DECISION))
    assert found.verdict == NO_DIFFERENCE and "no difference larger than 0.02" in found.sentence
    assert "over training" in found.claim and found.data["primary"] == "average"
    assert any(row["name"].startswith("p that proportional differs") and row["value"] < 0.05 for row in found.numbers)
    assert arms.answer(_study({})).verdict == "undecided"
    assert arms.answer(_study({**DECISION, "seeds": 9})).verdict == "undecided"
    assert "fewer than the declared 9" in arms.answer(_study({**DECISION, "seeds": 9})).sentence
    assert arms.answer(_study(DECISION, accuracy_noise=0.2)).verdict == "undecided"


def test_a_difference_is_named_first_and_its_bound_beside_it() -> None:
    found = arms.answer(_study(DECISION, better=0.1))
    assert found.verdict == "supported" and "no difference larger" not in found.sentence
    small = arms.answer(_study(DECISION, better=0.012, accuracy_noise=0.001))
    assert small.verdict == "supported" and "by no difference larger than 0.02" in small.sentence
    assert arms.answer(_study(DECISION, better=-0.1)).verdict == "contradicted"


def test_the_declared_arm_is_tested_by_itself() -> None:
    names = ("uniform", "proportional", "inverse", "equal_pull")
    found = arms.answer(_study(DECISION, arms=names, better=0.01))
    row = next(
        r for r in found.data["differences"] if (r["arm"], r["task"], r["when"]) == ("proportional", None, "end")
    )
    assert row["p_holm"] == row["p"]
    others = arms.answer(_study({}, arms=names, better=0.01)).data["differences"]
    row = next(r for r in others if (r["arm"], r["task"], r["when"]) == ("proportional", None, "end"))
    assert row["p_holm"] == pytest.approx(3 * row["p"]) or row["p_holm"] == 1.0


def _unrelated(decision: dict[str, Any], noise: float) -> tuple[Answer, Answer]:
    """Gains and statistics without a rank correlation with U."""
    gains = (0.2, 0.32, 0.14, 0.26, 0.08, 0.3)
    order = np.array([gains, gains, gains, gains]) * 10
    # The gains differ from seed to seed by more than the pairs of tasks do: no single pair is beyond chance.
    more: dict[str, Any] = {"gains": gains, "statistics": order, "noise": noise, "spread": 0.02, "accuracy_noise": 0.15}
    m = _study(decision, **more)
    return gain.answer(m), explain.answer(m)


def test_relations_that_are_not_there_need_a_margin_that_the_tasks_can_tell() -> None:
    wide = {**DECISION, "margins": {"gain": 0.98, "explain": 0.98}}
    for found in _unrelated(wide, 0.01):
        assert abs(found.numbers[0]["value"]) < 0.3
        assert found.verdict == NO_DIFFERENCE and "larger than 0.98" in found.sentence
    for decision, noise in (({}, 0.01), (DECISION, 0.01), (wide, 1000.0)):
        assert NO_DIFFERENCE not in [found.verdict for found in _unrelated(decision, noise)]


def test_a_declared_decision_travels_with_the_measurements(tmp_path: Path) -> None:
    m = _study(DECISION)
    m.write_csv(tmp_path / "m.csv")
    again = Measurements.from_csv(tmp_path / "m.csv")
    assert again.decision == DECISION and answer(again)["decision"] == DECISION
    plain = _study({})
    plain.write_csv(tmp_path / "plain.csv")
    assert "decision" not in (tmp_path / "plain.csv").read_text().splitlines()[0] and "decision" not in answer(plain)


def test_a_declared_study_names_what_it_was_not_made_to_answer(tmp_path: Path) -> None:
    def ids(found: dict[str, Any]) -> list[str]:
        return [entry["id"] for entry in found["answers"]]

    two, one = answer(_study(DECISION)), answer(_study(DECISION, arms=("uniform",)))
    assert two["not_asked"] == ["estimators"] and ids(two) == [name for name in QUESTIONS if name != "estimators"]
    assert one["not_asked"] == ["arms", "estimators"] and ids(one) == ["imbalance", "last_block", "gain", "explain"]
    assert "not_asked" not in answer(_study({}, arms=("uniform",)))
    assert [path.stem for path in draw(one, tmp_path)] == ids(one)
    text = page({}, one)
    assert "not made to answer: What does sampling" in text and "overview" not in text and "figures/arms" not in text
    assert "overview" in page({}, two)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"primary": "middle"}, "primary of a study's decision must be one of average, end"),
        ({"margins": {"imbalance": 0.1}}, "a margin of a study's decision must be one of"),
        ({"margins": {"arms": 2}}, "must be a number between 0 and 1"),
        ({"margins": {"arms": True}}, "must be a number between 0 and 1"),
        ({"margins": [0.1]}, "margins of a study's decision must be a mapping"),
        ({"seeds": 1}, "must be a whole number from 2"),
        ({"level": 0.1}, "a key of a study's decision"),
        ([], "must be a mapping"),
    ],
)
def test_a_decision_that_cannot_be_is_refused(block: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_decision(block)


def test_stages_finish_the_same_seeds_of_all_their_arms_first() -> None:
    block = {"seeds": [1, 2, 3], "jobs": 2, "stages": [["uniform", "proportional"], ["inverse", "equal_pull"]]}
    order = StudySpec(**block).order()
    first = [("uniform", 1), ("uniform", 2), ("proportional", 1), ("proportional", 2), ("uniform", 3)]
    assert order[:5] == first and order[5] == ("proportional", 3) and len(set(order)) == len(order) == 12
    assert StudySpec(seeds=[1, 2]).order()[:3] == [("uniform", 1), ("uniform", 2), ("proportional", 1)]
    chosen = read_spec(block, {"arms": ["uniform", "inverse"]})
    assert chosen.stages == [["uniform"], ["inverse"]]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([["uniform"]], "must name every arm once; proportional, inverse, equal_pull"),
        ([["uniform", "uniform"]], "lists of different arms"),
        (["uniform"], "lists of different arms"),
        ([["uniform", "sideways"]], "an arm of the study's stages"),
    ],
)
def test_stages_that_leave_arms_out_are_refused(stages: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        StudySpec(stages=stages)
