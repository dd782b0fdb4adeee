"""The comparison of intervals: its methods against closed forms, its page against the stored results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

import gradnorm_kernels as gk
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import parse_intervals
from gradnorm_grpo.study import intervals
from gradnorm_grpo.study.spec import IntervalSettings
from gradnorm_grpo.study.stats import cross_product
from gradnorm_kernels.estimation.estimator import MIN_INFORMATIVE

ROOT = Path(__file__).resolve().parents[2]


def _gram(prompts: int, share: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = (0.3 + rng.standard_normal((prompts, 6))) * (rng.random(prompts) < share)[:, None]
    return np.asarray(rows @ rows.T)


def test_the_pages_tables_follow_from_the_stored_results() -> None:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "docs/study/intervals").glob("seed*.json"))]
    assert len(results) == 3
    page = (ROOT / "docs" / "study" / "intervals.md").read_text()
    for table in intervals.table(results).strip().split("\n\n"):
        assert table in page


def test_the_page_says_what_the_repeated_run_found() -> None:
    results = [
        json.loads(path.read_text()) for path in sorted((ROOT / "docs/study/intervals_repeat").glob("seed*.json"))
    ]
    page = " ".join((ROOT / "docs" / "study" / "intervals.md").read_text().partition("## Repeated")[2].split())
    assert len(results) == 3 and {result["commit"] for result in results} == {"367d0a2d72eb"}

    def shares(low: float, high: float, key: str = "held") -> dict[str, str]:
        return {row["method"]: f"{row[key]:.0%}" for row in intervals.coverage(results, (low, high))}

    held, lowest = shares(MIN_INFORMATIVE, math.inf), shares(MIN_INFORMATIVE, math.inf, "lowest")
    assert f"`normal` holds U in {held['normal']} of draws and `chosen` in {held['chosen']}" in page
    assert f"in the worst task and n they do in {lowest['normal']} and {lowest['chosen']}" in page
    assert f"`bootstrap_t` holds it least often again, in {held['bootstrap_t']}" in page
    assert min(held.values(), key=lambda share: float(share[:-1])) == held["bootstrap_t"]
    assert f"`normal` holds U in {shares(3, 4)['normal']}, with four in {shares(4, 5)['normal']}" in page


def test_the_bound_is_where_the_jackknifes_interval_holds_u_in_nine_of_ten_draws() -> None:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "docs/study/intervals").glob("seed*.json"))]

    def held(low: int) -> float:
        later = [bound for bound in intervals.INFORMATIVE if bound > low]
        rows = intervals.coverage(results, (low, min(later, default=math.inf)))
        return float(next(row["held"] for row in rows if row["method"] == "normal"))

    assert all((held(low) >= 0.9) == (low >= MIN_INFORMATIVE) for low in intervals.INFORMATIVE)


def test_the_normal_and_the_chosen_interval_are_the_librarys() -> None:
    gram = _gram(20)
    u, known, found = intervals.ends(gram, 299, np.random.default_rng(0))
    jackknife = gk.cross_product(
        torch.from_numpy(gram).diagonal(), torch.tensor([gram.sum()]), [0] * 20, torch.from_numpy(gram)
    )
    assert jackknife.std_error is not None and u == pytest.approx(float(jackknife.sq_norm)) and known == 20
    error = float(jackknife.std_error)
    assert found["normal"] == pytest.approx((u - 1.959964 * error, u + 1.959964 * error), rel=1e-5)
    library = gk.confidence_interval(torch.from_numpy(gram), resamples=299)
    assert found["chosen"] == (library.low, library.high)
    assert set(found) == set(intervals.METHODS)
    assert all(low <= u <= high for method, (low, high) in found.items() if method != "bootstrap_t")


def test_a_resample_of_every_prompt_once_has_u_and_its_jackknife_error() -> None:
    gram = _gram(9)

    class Once:
        """Draws each prompt once."""

        def multinomial(self, n: int, shares: np.ndarray, size: int) -> np.ndarray:
            return np.ones((size, n), dtype=int)

    u, error = intervals.bootstrap(gram, 2, Once())  # type: ignore[arg-type]
    ids, products = [0] * 9, torch.from_numpy(gram)
    expected = gk.cross_product(products.diagonal(), products.sum()[None], ids, products)
    assert expected.std_error is not None
    assert u == pytest.approx(cross_product(gram)) and error == pytest.approx(float(expected.std_error))


def test_draws_are_counted_by_their_informative_prompts() -> None:
    found = intervals.measure(_gram(64, 0.3), IntervalSettings(prompts=64, draws=40, resamples=99), 1)
    rows = found["draws"]
    assert {row["n"] for row in rows} == {8, 16}
    for n in (8, 16):
        assert sum(row["draws"] for row in rows if (row["n"], row["method"]) == (n, "normal")) == 40
    chosen = [row for row in rows if row["method"] == "chosen"]
    assert chosen and min(row["informative"] for row in chosen) >= MIN_INFORMATIVE
    assert found["whole"]["n"] == 64 and found["whole"]["n_effective"] < 40
    assert all(row["below"] + row["above"] <= row["draws"] for row in rows)


def test_a_task_without_any_gradient_holds_nothing_and_breaks_nothing() -> None:
    found = intervals.measure(np.zeros((64, 64)), IntervalSettings(prompts=64, draws=3, resamples=99), 1)
    assert {row["informative"] for row in found["draws"]} == {0} and found["whole"]["value"] == 0.0


def test_options_of_the_command() -> None:
    settings, options, seeds, name = parse_intervals(["--preset", "tiny", "--seeds", "4"])
    assert (settings.warm_start_steps, options, seeds, name) == (120, IntervalSettings(), [4], "tiny")
    with pytest.raises(UserError, match="draws of the study's intervals must be a whole number from 1"):
        IntervalSettings.read({"draws": 0})
    with pytest.raises(UserError, match="a key of the study's intervals"):
        IntervalSettings.read({"level": 0.9})
