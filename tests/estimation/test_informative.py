"""The number of informative samples, n_effective: by operator, by tracker and mode, pooled, logged and read again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels.estimation.estimator import MIN_INFORMATIVE, too_few_informative
from gradnorm_kernels.estimation.metrics import gradient_metrics, pool, pooled_metrics, read_gradient
from gradnorm_kernels.estimation.moments import NEGLIGIBLE, StepSums, add_up, informative, merge
from gradnorm_kernels.tracking import tracker as tracker_module

NAN = math.nan


def test_counts_by_task_with_rounding_left_out_and_what_is_not_finite_kept() -> None:
    squares = torch.tensor(
        [4.0, 0.0, 4 * NEGLIGIBLE, 5 * NEGLIGIBLE, 0.0, 0.0, NAN, 1e-30, math.inf], dtype=torch.float64
    )
    task = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert informative(squares, task, 4).tolist() == [2, 0, 3, 0]


def test_the_public_estimate_counts_too() -> None:
    ids = torch.tensor([0, 0, 0, 1])
    found = gk.cross_product(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0]), ids)
    assert found.n.tolist() == [3, 1] and found.n_effective.tolist() == [2, 0]


def _measure(microbatches: int, **options: Any) -> gk.StepStats:
    """12 samples of two rows in two tasks; every third row has no gradient, so that samples 1 of 3 lose one or none."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    tracker = gk.GradNormTracker(model, "all", **options)
    x = torch.randn(24, 5)
    samples = torch.arange(24) % 12  # the two rows of a sample are 12 rows apart
    zero = samples % 3 == 0
    for rows in torch.arange(24).chunk(microbatches):
        ids = samples[rows].tolist()
        how: dict[str, Any] = {"rows_per_sample": 2} if microbatches > 1 else {}
        with tracker.microbatch(["a" if i < 6 else "b" for i in ids], ids, **how):
            losses = model(x[rows]).square().sum(1)
            torch.where(zero[rows], 0.0, losses).mean().backward()
    stats = tracker.step()
    tracker.close()
    return stats


@pytest.mark.parametrize(
    ("microbatches", "accumulate"),
    [(1, "pairs"), (1, "exact"), (1, "sketch"), (2, "pairs"), (2, "sketch"), (2, "auto")],
)
def test_the_tracker_counts_whatever_it_accumulates(microbatches: int, accumulate: str) -> None:
    stats = _measure(microbatches, accumulate=accumulate)
    assert {task: (g.n, g.n_effective) for task, g in stats.items()} == {"a": (6, 4), "b": (6, 4)}


def test_folds_count_samples_and_not_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "MAX_BLOCKS", 6)
    stats = _measure(1, accumulate="pairs")
    assert stats["a"].std_error_method == "jackknife over folds"
    assert {task: (g.n, g.n_effective) for task, g in stats.items()} == {"a": (6, 4), "b": (6, 4)}


def test_a_sample_spread_over_ranks_counts_once() -> None:
    def part(samples: dict[str, float]) -> StepSums:
        empty = add_up([], ["a"])
        return StepSums(**{**vars(empty), "sample_task": dict.fromkeys(samples, 0), "sample_sq": samples})

    merged = merge([part({"p": 1.0, "q": 0.0}), part({"p": 2.0, "r": 0.5})])
    assert merged.sample_sq == {"p": 3.0, "q": 0.0, "r": 0.5}


def _gradient(n: int, n_effective: int | None) -> gk.TaskGradient:
    return gk.TaskGradient(1.0, 0.1, 2.0, 1.5, n, 3.0, float(n * (n - 1)), "jackknife over samples", n_effective)


def test_pooled_over_steps_and_through_a_log() -> None:
    steps = [_gradient(8, 3), _gradient(8, 5)]
    lines = [gradient_metrics("t", step) for step in steps]
    assert lines[0]["tasks/t/n_effective"] == 3
    assert read_gradient(lines[0], "t") == gk.TaskGradient(1.0, 0.1, 2.0, 1.5, 8, 3.0, 56.0, "none", 3)
    pooled = pool(lines, "t")
    assert (pooled.n, pooled.n_effective) == (16, 8)
    assert pooled_metrics("t", pooled)["tasks/t/n_effective"] == 8
    again = gk.RunningEstimate()
    again.load_state_dict(pooled.state_dict())
    assert again.n_effective == 8


def test_logs_and_states_of_older_versions_say_not_known() -> None:
    line = gradient_metrics("t", _gradient(8, None))
    assert "tasks/t/n_effective" not in line and read_gradient(line, "t").n_effective is None  # type: ignore[union-attr]
    pooled = pool([line, gradient_metrics("t", _gradient(8, 3))], "t")
    assert pooled.n == 16 and pooled.n_effective is None and pooled.caution == ""
    state = pooled.state_dict()
    del state["n_effective"]
    older = gk.RunningEstimate()
    older.load_state_dict(state)
    assert older.n == 16 and older.n_effective is None


def test_the_caution_names_both_counts() -> None:
    few = MIN_INFORMATIVE - 1
    assert too_few_informative(few, 64) == f"too few informative prompts ({few} of 64)" == _gradient(64, few).caution
    assert too_few_informative(MIN_INFORMATIVE, 64) == too_few_informative(None, 64) == ""
    running = gk.RunningEstimate()
    running.update(_gradient(64, 2))
    assert running.caution == "too few informative prompts (2 of 64)"
