"""``accumulate="sketch"`` and ``"auto"``: all pairs count, without bias; what is chosen; what stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.tracking import tracker as tracker_module
from gradnorm_kernels.tracking.accumulate import StepPlan
from gradnorm_kernels.tracking.sketch import default_width
from tests.tracking.brute_force import batch, jackknife, row_losses, sample_gradients, small_model, u_statistic
from tests.tracking.test_tracker_exact import measured

TASKS = ["a", "b", "a", "b", "a", "a", "b", "a", "b", "a"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2", "a1", "b0", "a3"]


def row_by_row(
    tracker: gk.GradNormTracker, model: nn.Module, ids: Tensor, mask: Tensor, parts: Sequence[Sequence[int]]
) -> None:
    """One micro-batch per part of the rows: the rows of a sample are spread over several."""
    whole = [SAMPLES.count(sample) for sample in SAMPLES]
    for part in parts:
        rows = list(part)
        with tracker.microbatch(
            [TASKS[r] for r in rows],
            [SAMPLES[r] for r in rows],
            mask[rows],
            row_scale=float(len(rows)),
            rows_per_sample=[whole[r] for r in rows],
        ):
            row_losses(model, ids[rows], mask[rows]).mean().backward()


@pytest.mark.parametrize("parts", [[[r] for r in range(10)], [[0, 1, 5], [2, 3, 4, 6], [7, 8, 9]]], ids=["1", "3"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gpt2"])
def test_without_projections_every_pair_counts_exactly(name: str, fused: bool, parts: list[list[int]]) -> None:
    """Sides no wider than r are kept whole: U, its error and the inner products are those of all pairs."""
    model = small_model(name)
    ids, mask = batch(10, 9, "right")
    tracker = gk.GradNormTracker(model, "all", fused=fused, accumulate="sketch", sketch_width=128)
    row_by_row(tracker, model, ids, mask, parts)
    stats = tracker.step()
    parameters = measured(tracker, model)
    tracker.close()
    truth = sample_gradients(row_losses(model, ids, mask), SAMPLES, parameters)
    by_task = {task: torch.stack([g for s, g in truth.items() if s[0] == task]) for task in "ab"}
    assert stats.accumulate == "sketch"
    for task, g in by_task.items():
        size = float(g.square().sum(1).mean())
        assert stats[task].n == len(g) and stats[task].pair_weight == pytest.approx(len(g) * (len(g) - 1))
        assert stats[task].sq_norm == pytest.approx(u_statistic(g), abs=1e-6 * size)
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=1e-6)
        assert stats[task].std_error == pytest.approx(jackknife(g), abs=1e-6 * size)
        assert stats[task].std_error_method == "jackknife over samples, sketched"
    inner = float(by_task["a"].mean(0) @ by_task["b"].mean(0))
    at = [stats.tasks.index(task) for task in "ab"]
    assert float(stats.inner_products[at[0], at[1]]) == pytest.approx(inner, abs=1e-6 * size)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_the_mean_over_projections_is_the_exact_estimate(name: str) -> None:
    """Narrow projections of every kind of parameter: over many steps of one batch, U of all pairs within its error."""
    model = small_model(name)
    ids, mask = batch(10, 5, "right")
    whole = gk.GradNormTracker(model, "all", accumulate="sketch", sketch_width=128)
    row_by_row(whole, model, ids, mask, [range(10)])
    right = whole.step()
    whole.close()
    tracker = gk.GradNormTracker(model, "all", accumulate="sketch", sketch_width=8)
    steps = []
    for _ in range(60):
        row_by_row(tracker, model, ids, mask, [range(5), range(5, 10)])
        steps.append(tracker.step())
    at = [right.tasks.index(task) for task in steps[0].tasks]
    for task in "ab":
        found = torch.tensor([step[task].sq_norm for step in steps], dtype=torch.float64)
        error = float(found.std()) / len(steps) ** 0.5
        assert error > 0 and abs(float(found.mean()) - right[task].sq_norm) < 4 * error
        # What a step says of its own error contains the projections' share.
        said = torch.tensor([step[task].std_error for step in steps], dtype=torch.float64)
        assert float(said.square().mean()) > 0.8 * float(found.var())
    inner = torch.stack([step.inner_products for step in steps])
    error = inner.std(0) / len(steps) ** 0.5
    assert ((inner.mean(0) - right.inner_products[at][:, at]).abs() < 4 * error).all()


class Known(nn.Module):
    """``loss = sum of targets * (W x)``: the gradient of a sample is ``target x^T``, and its mean is known."""

    def __init__(self, d_in: int = 40, d_out: int = 30) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)
        self.mean = 0.3 * torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)) / d_in**0.5

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of which ``E[target x^T]`` is ``mean``."""
        x = torch.randn(rows, self.mean.shape[1], generator=generator)
        noise = torch.randn(rows, self.mean.shape[0], generator=generator) / 4
        return x, x @ self.mean.T + noise


def known_step(tracker: gk.GradNormTracker, model: Known, generator: torch.Generator, samples: int) -> gk.StepStats:
    """A step of ``samples`` samples of two rows each, which lie in two micro-batches of different order."""
    x, target = model.draw(samples, generator)
    for order in (range(samples), range(samples - 1, -1, -1)):
        for first in range(0, samples, 2):
            rows = list(order)[first : first + 2]
            with tracker.microbatch(["t"] * len(rows), rows, row_scale=1.0, rows_per_sample=2):
                (model.linear(x[rows]) * target[rows]).sum().backward()
    return tracker.step()


def test_unbiased_and_covered_over_draws_of_samples() -> None:
    """U's mean over draws of spread samples is ||E G||^2, and intervals of two errors contain it."""
    model = Known()
    tracker = gk.GradNormTracker(model, "all", accumulate="sketch", sketch_width=16)
    generator = torch.Generator().manual_seed(2)
    truth = float(model.mean.double().square().sum())
    found = [known_step(tracker, model, generator, 8)["t"] for _ in range(200)]
    u = torch.tensor([one.sq_norm for one in found], dtype=torch.float64)
    error = torch.tensor([one.std_error for one in found], dtype=torch.float64)
    assert abs(float(u.mean()) - truth) < 4 * float(u.std()) / len(u) ** 0.5
    covered = float(((u - truth).abs() < 2 * error).double().mean())
    assert covered > 0.9
    assert float(u.std()) / 2 < float(error.square().mean().sqrt()) < 3 * float(u.std())


def test_pairs_exact_and_sketch_on_the_same_draws() -> None:
    """The more pairs count, the smaller the spread around the truth: exact and sketch beat pairs."""
    truth = float(Known().mean.double().square().sum())
    spread = {}
    for mode in ("pairs", "exact", "sketch"):
        model, generator, found = Known(), torch.Generator().manual_seed(3), []
        tracker = gk.GradNormTracker(model, "all", accumulate=mode, sketch_width=32)
        for _ in range(80):
            x, target = model.draw(8, generator)
            for first in range(0, 8, 2):
                rows = [first, first + 1]
                with tracker.microbatch(["t"] * 2, rows):
                    (model.linear(x[rows]) * target[rows]).sum(1).mean().backward()
            found.append(tracker.step()["t"].sq_norm)
        u = torch.tensor(found, dtype=torch.float64)
        assert abs(float(u.mean()) - truth) < 4 * float(u.std()) / len(u) ** 0.5
        spread[mode] = float(u.std())
    assert spread["exact"] <= 1.05 * spread["sketch"] < spread["pairs"]


def test_training_and_random_state_are_untouched() -> None:
    ids, mask = batch(4, 6)
    kept = []
    for mode in (None, "sketch", "auto"):
        model = small_model("llama", torch.float32)
        torch.manual_seed(5)
        if mode is None:
            row_losses(model, ids, mask).mean().backward()
        else:
            tracker = gk.GradNormTracker(model, "all", accumulate=mode, sketch_width=4)
            with tracker.microbatch(["a"] * 4):
                row_losses(model, ids, mask).mean().backward()
            tracker.step()
        kept.append(([p.grad.clone() for p in model.parameters() if p.grad is not None], torch.rand(3)))
    for grads, numbers in kept[1:]:
        assert all(map(torch.equal, kept[0][0], grads)) and torch.equal(kept[0][1], numbers)


def linear(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 6)), torch.randn(8, 3, 20)


def step(tracker: gk.GradNormTracker, model: nn.Module, x: Tensor, size: int = 1, **more: Any) -> gk.StepStats:
    for first in range(0, len(x), size):
        rows = range(first, first + size)
        with tracker.microbatch(["a" if r % 4 < 2 else "b" for r in rows], list(rows), **more):
            model(x[first : first + size]).square().mean((1, 2)).mean().backward()
    return tracker.step()


def test_projections_differ_between_steps_and_a_resume_goes_on_with_them() -> None:
    model, x = linear()
    make = lambda: gk.GradNormTracker(model, "all", accumulate="sketch", sketch_width=4)  # noqa: E731
    straight = make()
    found = [step(straight, model, x)["a"].sq_norm for _ in range(3)]
    assert len(set(found)) == 3
    straight.close()
    before = make()
    step(before, model, x)
    state = before.state_dict()
    before.close()
    resumed = make()
    resumed.load_state_dict(state)
    assert [step(resumed, model, x)["a"].sq_norm for _ in range(2)] == found[1:]


@pytest.mark.parametrize(
    ("size", "budget", "modes"),
    [
        (8, 1 << 20, ["pairs", "pairs", "pairs"]),
        (4, 1 << 20, ["pairs", "pairs", "pairs"]),
        (1, 1 << 20, ["sketch", "exact", "exact"]),
        (1, 0, ["sketch", "sketch", "sketch"]),
    ],
)
def test_auto_decides_at_the_end_of_the_first_step(size: int, budget: int, modes: list[str]) -> None:
    model, x = linear()
    pairs = gk.GradNormTracker(model, "all", accumulate="pairs")
    inside, every = (step(pairs, model, x, size)["a"].sq_norm for size in (size, 8))
    tracker = gk.GradNormTracker(model, "all", memory_budget=budget)
    assert tracker.accumulation == "undecided"
    found = [step(tracker, model, x, size) for _ in range(3)]
    assert [one.accumulate for one in found] == modes and tracker.accumulation.startswith(modes[-1])
    for one in found:
        # Sides of at most 128: the sketches are exact too.
        assert one["a"].sq_norm == pytest.approx(inside if one.accumulate == "pairs" else every, rel=1e-5)
        assert one["a"].std_error == one["a"].std_error
    if modes[-1] == "exact":
        assert found[-1]["a"].std_error == pytest.approx(found[0]["a"].std_error, rel=1e-5)
        assert found[-1]["a"].std_error_method == "jackknife over samples, sketched"


@pytest.mark.parametrize(
    ("plan", "mode"),
    [
        (StepPlan(samples=8, together=8, whole=True, tasks=6), "pairs"),
        (StepPlan(samples=16, together=2, whole=False, tasks=2), "pairs"),
        (StepPlan(samples=8, together=1, whole=True, tasks=2), "exact"),
        (StepPlan(samples=8, together=1, whole=True, tasks=10**6), "sketch"),
        (StepPlan(samples=8, together=1, whole=False, tasks=1), "sketch"),
    ],
)
def test_auto_decides_from_a_plan(plan: StepPlan, mode: str) -> None:
    model, x = linear()
    tracker = gk.GradNormTracker(model, "all", plan=plan)
    assert tracker.accumulation.startswith(mode)
    if mode == "exact":
        assert step(tracker, model, x).accumulate == "exact"


def test_auto_chooses_again_where_its_choice_no_longer_serves() -> None:
    model, x = linear()
    tracker = gk.GradNormTracker(model, "all")
    assert step(tracker, model, x, 8).accumulate == "pairs"
    with pytest.warns(UserWarning, match="no two samples of task 'a', 'b' were in one micro-batch, so that U is undef"):
        found = step(tracker, model, x, 1)
    assert found.accumulate == "pairs" and found["a"].sq_norm != found["a"].sq_norm, "as before: undefined"
    assert tracker.accumulation == "undecided"
    assert [step(tracker, model, x, 1).accumulate for _ in range(2)] == ["sketch", "exact"]


def every_pair(model: nn.Module, x: Tensor, rows: Sequence[int]) -> gk.StepStats:
    """The exact estimates of all pairs of these samples."""
    tracker = gk.GradNormTracker(model, "all", accumulate="pairs")
    with tracker.microbatch(["a" if r % 4 < 2 else "b" for r in rows], list(rows)):
        model(x[list(rows)]).square().mean((1, 2)).mean().backward()
    found = tracker.step()
    tracker.close()
    return found


@pytest.mark.parametrize("what", ["a failure", "a spread sample", "more tasks"])
def test_a_step_whose_exact_sums_do_not_serve_goes_on_with_its_sketches(what: str) -> None:
    """Nothing of the step is lost and nothing is raised: auto keeps sketches beside the exact sums."""
    model, x = linear()
    size = 4 * sum(p.numel() for p in model.parameters())
    tracker = gk.GradNormTracker(model, "all", memory_budget=2 * size)
    step(tracker, model, x)
    assert tracker.accumulation.startswith("exact")
    right = every_pair(model, x, range(8))
    if what == "a failure":
        with pytest.raises(KeyError), tracker.microbatch(["a"], [99]):
            model(x[:1]).square().mean().backward()
            raise KeyError
        found = step(tracker, model, x)
        assert tracker.accumulation.startswith("exact") and step(tracker, model, x).accumulate == "exact"
    elif what == "a spread sample":
        for row in [*range(7), 7, 7]:
            with tracker.microbatch(["a" if row % 4 < 2 else "b"], [row], rows_per_sample=2 if row == 7 else None):
                model(x[row : row + 1]).square().mean((1, 2)).mean().backward()
        found = tracker.step()
        assert tracker.accumulation.startswith("sketch")
    else:
        with tracker.microbatch(["c"], [99]):
            model(x[:1]).square().mean().backward()
        assert tracker._accumulation.exact is not None
        for task in "de":
            with tracker.microbatch([task], [task]):
                model(x[:1]).square().mean().backward()
        assert tracker._accumulation.exact is None, "three tasks' sums are more than the budget"
        found = step(tracker, model, x)
        assert tracker.accumulation.startswith("sketch") and "sums (5) take" in tracker.accumulation
    assert found.accumulate == "sketch"
    for task in "ab":
        assert found[task].n == 4 and found[task].sq_norm == pytest.approx(right[task].sq_norm, rel=1e-5)
        assert found[task].std_error == pytest.approx(right[task].std_error, rel=1e-4)


def test_a_resume_takes_what_auto_had_decided_unless_the_plan_is_another() -> None:
    model, x = linear()
    in_pairs = StepPlan(samples=8, together=2, whole=True, tasks=2)
    first = gk.GradNormTracker(model, "all", plan=in_pairs)
    decided = first.state_dict()
    with pytest.warns(UserWarning, match="no two samples of task"):
        step(first, model, x)
    undecided = first.state_dict()
    first.close()
    resumed = gk.GradNormTracker(model, "all", plan=in_pairs)
    resumed.load_state_dict(undecided)
    assert resumed.accumulation == "undecided" and step(resumed, model, x).accumulate == "sketch"
    resumed.close()
    other = gk.GradNormTracker(model, "all", plan=StepPlan(samples=8, together=1, whole=True, tasks=2))
    for state in (decided, undecided):
        other.load_state_dict(state)
        assert other.accumulation.startswith("exact")
    without = gk.GradNormTracker(model, "all")
    without.load_state_dict(decided)
    assert without.accumulation.startswith("pairs")


def test_a_step_without_pairs_of_samples_leaves_auto_undecided() -> None:
    model, x = linear()
    tracker = gk.GradNormTracker(model, "all")
    found = step(tracker, model, x[:1])
    assert found["a"].n == 1 and found["a"].sq_norm != found["a"].sq_norm and tracker.accumulation == "undecided"
    assert not tracker.step() and tracker.step().accumulate == ""


def test_nan_stays_in_its_task_and_an_interrupted_microbatch_is_left_out() -> None:
    model, x = linear()
    clean, poisoned = (gk.GradNormTracker(model, "all", accumulate="sketch", sketch_width=4) for _ in range(2))
    right = step(clean, model, x)
    clean.close()
    with pytest.raises(KeyError), poisoned.microbatch(["a"], [99]):
        model(x[:1]).square().mean().backward()
        raise KeyError
    bad = x.clone()
    bad[6, 1, 3] = float("nan")  # a sample of task "b"
    found = step(poisoned, model, bad)
    assert found["a"] == right["a"]
    assert found["b"].sq_norm != found["b"].sq_norm


def test_more_samples_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "MAX_BLOCKS", 6)
    model, x = linear()
    tracker = gk.GradNormTracker(model, "all", accumulate="sketch")
    found = step(tracker, model, x)
    pairs = gk.GradNormTracker(model, "all", accumulate="pairs")
    right = step(pairs, model, x, 8)
    assert found["a"].sq_norm == pytest.approx(right["a"].sq_norm, rel=1e-5)
    assert found["a"].std_error_method == "jackknife over folds, sketched"
    assert found["a"].std_error == pytest.approx(right["a"].std_error, rel=1e-4)


def test_default_width() -> None:
    assert [default_width(n) for n in (0, 1, 4, 5, 16, 64, 210, 10**6)] == [128, 128, 128, 128, 64, 32, 32, 16]
    assert gk.GradNormTracker(linear()[0], "all", accumulate="sketch")._accumulation._width == 128


def test_options_are_checked() -> None:
    model, _ = linear()
    for options, said in (
        ({"accumulate": "all"}, "accumulate must be one of 'auto', 'pairs', 'exact', 'sketch', got 'all'"),
        ({"sketch_width": 1}, "sketch_width must be an int of at least 2, got 1"),
        ({"memory_budget": -1}, "memory_budget must be an int of at least 0, got -1"),
        ({"memory_budget": 1.5}, "memory_budget must be an int of at least 0, got 1.5"),
    ):
        with pytest.raises(ValueError, match=said):
            gk.GradNormTracker(model, "all", **options)  # type: ignore[arg-type]
