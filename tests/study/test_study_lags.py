"""Products of gradients some steps apart: against made-up gradients, and against the tracker in a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import parse_lags
from gradnorm_grpo.study import lags

SMALL = [
    *("--preset", "tiny", "--cache_dir=", "--tiny_hidden_size", "32", "--warm_start_steps", "0"),
    *("--per_device_train_batch_size", "48", "--num_generations", "4", "--eval_prompts", "0", "--num_threads", "1"),
    *("--max_steps", "6", "--seeds", "1", "2"),
]


def made_up(keeps: float, noise: float = 0.0, seed: int = 0) -> dict:
    """A result of one task whose unit gradient keeps the share ``keeps`` of its direction from a step to the next."""
    rng, steps, d = np.random.default_rng(seed), 40, 4000
    rows = [rng.standard_normal(d) / d**0.5]
    for _ in range(steps - 1):
        rows.append(keeps * rows[-1] + (1 - keeps**2) ** 0.5 * rng.standard_normal(d) / d**0.5)
    u = [float(row @ row) for row in rows]
    seen = np.stack(rows) + noise * rng.standard_normal((steps, d)) / d**0.5
    return {"tasks": {"a": lags.products(seen.astype(np.float32), [(value, 8.0) for value in u])}}


def test_a_direction_that_decays_is_measured_through_the_noise_of_the_prompts() -> None:
    results = [made_up(0.8, noise=0.5, seed=seed) for seed in range(8)]
    for lag in (1, 2, 5):
        found = lags.shares(results, lag)
        assert found.low < 0.8**lag < found.high and found.high - found.low < 0.2
    share = [lags.shares(results, lag).value for lag in (1, 2)]
    expected = 128 * (share[0] - 1 + share[1] - 1) / (56 + 2 * 128)
    assert lags.bias(results, 2) == pytest.approx(expected) and lags.poolable(results) == 0


def test_a_direction_that_stays_may_be_pooled() -> None:
    results = [made_up(1.0, seed=seed) for seed in range(3)]
    assert lags.poolable(results) == 20 and abs(lags.bias(results, 20)) < 1e-3
    assert "up to 20 steps apart may be pooled" in lags.sentence(results)


def test_the_command_writes_a_file_per_seed_and_a_figure(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    arguments = [*SMALL, "--learning_rate", "1e-20", "--output_dir", str(folder)]
    assert lags.lags(arguments, Console(quiet=True)) == 0
    results = [json.loads((folder / f"seed{seed}.json").read_text()) for seed in (1, 2)]
    assert (folder / "lags.svg").stat().st_size > 1000
    for result in results:
        for found in result["tasks"].values():
            assert len(found["u"]) == 6 and [row["lag"] for row in found["lags"]] == [1, 2, 3]
            assert [row["products"] for row in found["lags"]] == [5, 4, 3]
    assert lags.table(results).count("\n") == 5


def test_the_mean_gradient_is_the_one_that_the_tracker_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    norms: list[tuple[str, float]] = []
    plain = lags.mean_gradient

    def kept(grpo, batch, task):
        vector = plain(grpo, batch, task)
        norms.append((task, float((vector.astype(np.float64) ** 2).sum())))
        return vector

    monkeypatch.setattr(lags, "mean_gradient", kept)
    lines: list[dict] = []
    plain_step = lags.Grpo.step

    def step(self, look=None):
        lines.append(plain_step(self, look))
        return lines[-1]

    plain_rollout = lags.Grpo.rollout

    def rollout(self, tasks):
        """Without a warm start all rewards are zero: the advantages are drawn."""
        batch = plain_rollout(self, tasks)
        batch.advantages.normal_()
        return batch

    monkeypatch.setattr(lags.Grpo, "step", step)
    monkeypatch.setattr(lags.Grpo, "rollout", rollout)
    settings, _, name = parse_lags([*SMALL, "--max_steps", "4"])
    lags.measure(settings, name, tmp_path, Console(quiet=True))
    tasks = list(dict.fromkeys(task for task, _ in norms))
    assert len(norms) == 4 * len(tasks) and sum(norm > 0 for _, norm in norms) > 12
    for i, (task, norm) in enumerate(norms):
        logged = lines[i // len(tasks)].get(f"tasks/{task}/plug_in", math.nan)  # a step may have no prompt of a task
        assert norm == pytest.approx(logged, rel=1e-4, abs=1e-12, nan_ok=True)


def test_what_lags_cannot_do_is_refused() -> None:
    for option, value in (("--loss_type", "dapo"), ("--gradient_accumulation_steps", "2"), ("--max_steps", "2")):
        with pytest.raises(UserError, match="lags needs"):
            lags.lags([*SMALL, option, value], Console(quiet=True))
