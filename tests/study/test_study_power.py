"""The arithmetic of docs/study-design.md: functions against simulation, tables against the published studies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gradnorm_grpo.study import power
from gradnorm_grpo.study.decision import tost
from gradnorm_grpo.study.measurements import Measurements

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "docs" / "study" / name for name in ("tiny", "multi_domain")]


def test_the_pages_tables_follow_from_the_published_studies() -> None:
    page = (ROOT / "docs" / "study-design.md").read_text()
    for table in power.tables(FOLDERS).strip().split("\n\n"):
        assert table in page, table


def test_the_spread_is_that_of_the_published_differences() -> None:
    found = power.spread(Measurements.from_csv(FOLDERS[0] / "measurements.csv"), "end")
    assert found.free == 6 and found.sd == pytest.approx(0.0207, abs=1e-4) and found.high > found.sd
    empty = Measurements(["uniform"], [1], ["copy"], 0, 1)
    assert math.isnan(power.spread(empty, "end").sd)


def test_powers_are_those_of_simulated_studies() -> None:
    rng = np.random.default_rng(0)
    draws = 0.02 * rng.standard_normal((4000, 9))
    p = stats.ttest_1samp(draws + 0.02, 0.0, axis=1).pvalue
    assert power.power_of_difference(0.02, 0.02, 9) == pytest.approx((p < 0.05).mean(), abs=0.03)
    shown = np.mean([tost(row, 0.02) < 0.05 for row in draws[:2000]])
    assert power.power_of_equivalence(0.02, 0.02, 9) == pytest.approx(shown, abs=0.04)
    width = [np.diff(stats.t.interval(0.95, 8, row.mean(), stats.sem(row)))[0] / 2 for row in draws[:500]]
    assert power.half_width(0.02, 9) == pytest.approx(np.mean(width), rel=0.06)
    assert power.power_of_difference(1e-4, 0.02, 12) == pytest.approx(1.0)


def test_powers_of_correlations_are_those_of_simulated_tasks() -> None:
    rng = np.random.default_rng(1)
    tasks, rho = 24, 2 * math.sin(math.pi * 0.5 / 6)  # Pearson's for a Spearman of 0.5
    pairs = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(1500, tasks))
    p = [stats.spearmanr(draw).pvalue for draw in pairs]
    assert power.power_of_correlation(0.5, tasks) == pytest.approx(np.mean(np.array(p) < 0.05), abs=0.06)
    assert power.power_of_no_correlation(0.5, 8) == 0.0
    assert power.detectable(power.power_of_correlation, 31) < 0.5 < power.detectable(power.power_of_correlation, 30)
    assert power.smallest(lambda k: power.power_of_correlation(0.5, k), 4) == 31
    assert power.smallest(lambda k: 0.0, 4) == 0
