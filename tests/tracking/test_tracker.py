"""The tracker's own rules: what counts as a sample, accumulation, refusals by name, state, and leaving no trace."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.brute_force import batch, row_losses, sample_gradients, small_model, u_statistic

ROWS = 6
TASKS = ["t"] * ROWS


def parameters_of_last_attention(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "layers.1.self_attn" in name and "norm" not in name]


def run(
    tracker: gk.GradNormTracker, model: nn.Module, ids: Tensor, mask: Tensor, tasks=TASKS, samples=None, **kwargs
) -> None:
    with tracker.microbatch(tasks, samples, mask, **kwargs):
        row_losses(model, ids, mask).mean().backward()


@pytest.fixture
def model() -> nn.Module:
    return small_model("llama")


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return batch(ROWS, 8, "right")


def test_accumulation_uses_pairs_inside_each_micro_batch(model: nn.Module) -> None:
    tracker = gk.GradNormTracker(model)
    u = []
    for seed in (1, 2):
        ids, mask = batch(ROWS, 8, "left", seed=seed)
        with tracker.microbatch(TASKS, [f"{seed}.{r}" for r in range(ROWS)], mask, row_scale=2 * ROWS):
            (row_losses(model, ids, mask).mean() / 2).backward()
        truth = sample_gradients(row_losses(model, ids, mask), list(range(ROWS)), parameters_of_last_attention(model))
        u.append(u_statistic(torch.stack(list(truth.values()))))
    stats = tracker.step()
    assert stats["t"].sq_norm == pytest.approx(sum(u) / 2, rel=1e-6)
    assert stats["t"].n == 2 * ROWS and stats["t"].pair_weight == 2 * ROWS * (ROWS - 1)
    assert tracker.step() == {}  # reset


def test_a_sample_spread_over_micro_batches(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Three samples of two rows each, a row of every sample in each micro-batch: w = 1/2."""
    ids, mask = data
    truth = sample_gradients(row_losses(model, ids, mask), list(range(ROWS)), parameters_of_last_attention(model))
    tracker = gk.GradNormTracker(model)
    num = den = 0.0
    for rows in ([0, 1, 2], [3, 4, 5]):
        run(tracker, model, ids[rows], mask[rows], ["t"] * 3, ["p", "q", "r"], rows_per_sample=2)
        g = torch.stack([truth[r] / 2 for r in rows])
        num += u_statistic(g) * 6
        den += 6 / 4
    got = tracker.step()["t"]
    assert got.n == 3
    assert got.sq_norm == pytest.approx(num / den, rel=1e-6)
    run(tracker, model, ids[:3], mask[:3], ["t"] * 3, ["p", "q", "r"])
    with pytest.raises(ValueError, match="pass rows_per_sample="):
        run(tracker, model, ids[:3], mask[:3], ["t"] * 3, ["p", "q", "r"])
    with pytest.raises(ValueError, match="belonged to task 't'"):
        run(tracker, model, ids[:3], mask[:3], ["u"] * 3, ["p", "q", "r"], rows_per_sample=2)
    with pytest.raises(ValueError, match="more than the 1 given"):
        run(tracker, model, ids[:3], mask[:3], ["t"] * 3, ["p", "q", "r"], rows_per_sample=1)


def test_zero_advantage_prompts_count(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    weights = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    tracker = gk.GradNormTracker(model)
    with tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask, weights).mean().backward()
    got = tracker.step()["t"]
    truth = sample_gradients(
        row_losses(model, ids, mask, weights), list(range(ROWS)), parameters_of_last_attention(model)
    )
    assert got.n == ROWS
    assert got.sq_norm == pytest.approx(u_statistic(torch.stack(list(truth.values()))), rel=1e-6)


def test_one_sample_is_nan_and_two_have_no_error(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    tracker = gk.GradNormTracker(model)
    run(tracker, model, ids[:3], mask[:3], ["one", "two", "two"])
    stats = tracker.step()
    assert stats["one"].n == 1 and math.isnan(stats["one"].sq_norm) and stats["one"].mean_sq_norm > 0
    assert stats["two"].n == 2 and math.isfinite(stats["two"].sq_norm) and math.isnan(stats["two"].std_error)
    assert stats["two"].std_error_method == "none"


def test_folds_stand_in_for_samples_when_there_are_many(
    model: nn.Module, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = batch(13, 8, "right")
    tasks = ["a"] * 7 + ["b"] * 6
    results = []
    for limit in (512, 8):
        monkeypatch.setattr("gradnorm_kernels.tracking.tracker.MAX_BLOCKS", limit)
        tracker = gk.GradNormTracker(model)
        run(tracker, model, ids, mask, tasks)
        results.append(tracker.step())
        tracker.close()
    for task in "ab":
        samples, folds = results[0][task], results[1][task]
        assert folds.std_error_method == "jackknife over folds"
        for name in ("sq_norm", "plug_in", "mean_sq_norm", "noise_scale", "pair_weight", "n"):
            assert getattr(folds, name) == pytest.approx(getattr(samples, name), rel=1e-6)
        assert folds.std_error > 0
    torch.testing.assert_close(results[0].inner_products, results[1].inner_products)


def test_a_shared_prefix_runs_once_a_sample() -> None:
    """A part that runs once per prompt has one row per sample; its output is expanded to the sample's rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"prefix": nn.Linear(5, 5), "rest": nn.Linear(5, 3)}).double()
    prompts, tails = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(6, 2, 5, dtype=torch.float64)

    def losses(shared: bool) -> Tensor:
        hidden = (
            model["prefix"](prompts).repeat_interleave(2, 0)
            if shared
            else model["prefix"](prompts.repeat_interleave(2, 0))
        )
        return (model["rest"](tails) * hidden.sum((1, 2), keepdim=True)).square().sum((1, 2))

    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(TASKS, [0, 0, 1, 1, 2, 2]):
        losses(shared=True).mean().backward()
    truth = sample_gradients(losses(shared=False), [0, 0, 1, 1, 2, 2], list(model.parameters()))
    assert tracker.step()["t"].sq_norm == pytest.approx(u_statistic(torch.stack(list(truth.values()))), rel=1e-6)
    with (
        pytest.raises(ValueError, match="a shared prefix needs one factor per sample"),
        tracker.microbatch(TASKS, [0, 0, 1, 1, 2, 2], row_scale=[1.0, 2, 3, 4, 5, 6]),
    ):
        losses(shared=True).mean().backward()


def test_an_exception_leaves_the_micro_batch_out(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    tracker = gk.GradNormTracker(model)
    with pytest.raises(KeyError), tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask).mean().backward()
        raise KeyError("user code")
    assert tracker.step() == {}
    run(tracker, model, ids, mask)
    assert tracker.step()["t"].n == ROWS


def test_refusals_name_what_to_do(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    tracker = gk.GradNormTracker(model)
    with pytest.raises(ValueError, match=r"leading size must be the 4 rows"):
        run_without_mask(tracker, model, ids, mask, ["t"] * 4)
    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) inside"), tracker.microbatch(TASKS):
        row_losses(model, ids, mask)
    with pytest.raises(RuntimeError, match="second gradient in one micro-batch"), tracker.microbatch(TASKS):
        row_losses(model, ids, mask).mean().backward()
        row_losses(model, ids, mask).mean().backward()
    with pytest.raises(RuntimeError, match="already open"), tracker.microbatch(TASKS), tracker.microbatch(TASKS):
        pass
    for kwargs, error, text in [
        ({"task_ids": []}, ValueError, "task_ids is empty"),
        ({"task_ids": "abc"}, TypeError, "task_ids must be a list"),
        ({"task_ids": [1.5, 2.5]}, TypeError, "task_ids must hold ints or strings, got 1.5"),
        ({"task_ids": ["a", None]}, TypeError, r"task_ids must hold ints or strings, got None \(NoneType\) for row 1"),
        ({"task_ids": ["a", True]}, TypeError, "task_ids must hold ints or strings, got True"),
        ({"task_ids": torch.tensor([True, False])}, ValueError, "task_ids must be a 1-D integer tensor"),
        ({"task_ids": TASKS, "sample_ids": [None] * ROWS}, TypeError, "sample_ids must hold ints or strings, got None"),
        (
            {"task_ids": TASKS, "sample_ids": [math.nan] * ROWS},
            TypeError,
            "sample_ids must hold ints or strings, got nan",
        ),
        ({"task_ids": torch.zeros(2)}, ValueError, "task_ids must be a 1-D integer tensor"),
        ({"task_ids": TASKS, "sample_ids": [1]}, ValueError, "sample_ids must have one entry per row"),
        ({"task_ids": ["a", "b"], "sample_ids": [1, 1]}, ValueError, "sample 1 has rows of two tasks"),
        (
            {"task_ids": TASKS, "sample_ids": [1] * ROWS, "rows_per_sample": [6, 6, 6, 7, 7, 7]},
            ValueError,
            "the same for all rows of a sample",
        ),
        ({"task_ids": TASKS, "row_scale": [1.0]}, ValueError, "row_scale must be a number or have one entry per row"),
        ({"task_ids": TASKS, "row_scale": math.inf}, ValueError, "row_scale must be finite"),
        ({"task_ids": TASKS, "row_scale": "B"}, TypeError, "row_scale must be a number"),
        (
            {"task_ids": TASKS, "sample_ids": [1] * ROWS, "rows_per_sample": 2},
            ValueError,
            "rows_per_sample must be whole numbers, at least",
        ),
        (
            {"task_ids": TASKS, "attention_mask": torch.ones(2, 3)},
            ValueError,
            r"attention_mask must be a \[B, L\] tensor",
        ),
        (
            {"task_ids": TASKS, "attention_mask": torch.full((ROWS, 3), -math.inf).triu(1)},
            ValueError,
            "attention_mask holds negative numbers, as an additive mask does",
        ),
    ]:
        with pytest.raises(error, match=text), tracker.microbatch(**kwargs):
            pass
    run(tracker, model, ids, mask)  # none of it left anything behind
    assert tracker.step()["t"].n == ROWS
    tracker.close()
    tracker.close()
    with pytest.raises(RuntimeError, match="was closed"), tracker.microbatch(TASKS):
        pass


def run_without_mask(
    tracker: gk.GradNormTracker, model: nn.Module, ids: Tensor, mask: Tensor, tasks: list[str]
) -> None:
    with tracker.microbatch(tasks):
        row_losses(model, ids, mask).mean().backward()


def test_choosing_layers_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        gk.GradNormTracker("model")
    with pytest.raises(ValueError, match="matches no module name"):
        gk.GradNormTracker(model, "no_such_layer")
    with pytest.raises(ValueError, match="names modules that the model does not have"):
        gk.GradNormTracker(model, ["model.layers.7"])
    with pytest.raises(ValueError, match="nor a regular expression"):
        gk.GradNormTracker(model, "(")
    with pytest.raises(TypeError, match="layers must be"):
        gk.GradNormTracker(model, 3)
    with pytest.raises(ValueError, match="list of decoder layers"):
        gk.GradNormTracker(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="found no attention"):
        gk.GradNormTracker(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        gk.GradNormTracker(model)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match="has a forward of its own"):
        gk.GradNormTracker(nn.Sequential(Own(2, 2)), "all", fused=True)


def test_what_cannot_be_measured_is_warned_about_once_with_its_share() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 2, bias=False), nn.Linear(3, 3, bias=False))
    with pytest.warns(UserWarning, match=r"not measured, 66\.67% of the trainable parameters: 0\.weight"):
        tracker = gk.GradNormTracker(model, "all")
    assert tracker.layers == ["1"] and tracker.skipped == {"0.weight": pytest.approx(2 / 3)}


def test_a_batch_norm_and_a_gain_on_a_whole_block_are_left_out_by_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.inner = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="not measured") as seen:
        tracker = gk.GradNormTracker(nn.Sequential(Block(), nn.BatchNorm1d(3)), "all")
    assert len(seen) == 1
    assert sorted(tracker.skipped) == ["0.gain", "1.bias", "1.weight"] and tracker.layers == ["0.inner"]


def test_a_norm_that_does_not_run_row_by_row_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * self.weight + y.mean(0)

    model = nn.ModuleDict({"odd": Odd()})
    x, y = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) ** 2
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with pytest.raises(RuntimeError, match=r"layer 'odd' \(Odd\) cannot be measured"), tracker.microbatch([0, 0]):
        model["odd"](x, y).sum().backward()
    tracker.close()
    tracker = gk.GradNormTracker(model, "all")
    nothing = pytest.raises(RuntimeError, match=r"nothing that layers= picks can be measured.*row by row")
    with nothing, tracker.microbatch([0, 0]):
        model["odd"](x, y).sum().backward()
    tracker.close()
    tracker = gk.GradNormTracker(model, "all", unverified="skip")
    with (
        pytest.warns(UserWarning, match=r"not measured, 100\.00% of the trainable parameters: odd\.weight"),
        tracker.microbatch([0, 0]),
    ):
        model["odd"](x, y).sum().backward()
    assert tracker.skipped == {"odd.weight": 1.0} and "row by row" in tracker.skipped_reasons["odd.weight"]
    assert tracker.step() == {}


def test_a_layer_that_is_never_called_is_warned_about_once() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    tracker = gk.GradNormTracker(model, "all")
    with (
        pytest.warns(UserWarning, match="never called in this micro-batch, so they count as zero: unused"),
        tracker.microbatch([0, 0]),
    ):
        model["used"](torch.ones(2, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracker.microbatch([0, 0]):
            model["used"](torch.ones(2, 3)).sum().backward()


def test_an_input_changed_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)  # autograd itself does not need x then, so it would not notice
    layer = gk.GradNormTracker(model, "all")
    x = torch.ones(2, 3)
    with layer.microbatch([0, 0]):
        y = model(x)
        y.sum().backward()
    with pytest.raises(RuntimeError, match="was modified in place"), layer.microbatch([0, 0]):
        y = model(x)
        x.add_(1)
        y.sum().backward()


def test_state_is_kept_between_steps(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    tracker = gk.GradNormTracker(model)
    run(tracker, model, ids, mask)
    with pytest.raises(RuntimeError, match=r"1 micro-batches wait for tracker\.step\(\)"):
        tracker.state_dict()
    tracker.step()
    state = tracker.state_dict()
    other = gk.GradNormTracker(model)
    other.load_state_dict(state)
    assert other.running["t"].value == tracker.running["t"].value
    assert other.running["t"].n == ROWS


@pytest.mark.parametrize("state", [None, {}, {"running": "x"}, {"running": [("a", {})]}, {"running": [("a", None)]}])
def test_a_state_of_something_else_is_refused(model: nn.Module, state) -> None:
    tracker = gk.GradNormTracker(model)
    before = tracker.state_dict()
    with pytest.raises(ValueError, match=r"state must be what GradNormTracker.state_dict\(\) returned, got"):
        tracker.load_state_dict(state)
    assert tracker.state_dict() == before


def test_the_same_batch_gives_the_same_bits(data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    model = small_model("llama", torch.float32)
    tracker = gk.GradNormTracker(model, "all")
    seen = []
    for _ in range(2):
        run(tracker, model, ids, mask)
        seen.append(tracker.step()["t"])
    assert seen[0] == seen[1]


def test_a_nan_row_stays_in_its_task(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    ids, mask = data
    weights = torch.ones(ROWS, dtype=torch.float64)
    weights[1] = math.nan
    tracker = gk.GradNormTracker(model, "all")
    tasks = ["x", "x", "x", "y", "y", "y"]
    with tracker.microbatch(tasks, attention_mask=mask):
        row_losses(model, ids, mask, weights).mean().backward()
    stats = tracker.step()
    assert math.isnan(stats["x"].sq_norm)
    assert math.isfinite(stats["y"].sq_norm) and math.isfinite(stats["y"].std_error)


@pytest.mark.parametrize("accumulate", ["pairs", "exact", "sketch", "auto"])
def test_what_is_discarded_leaves_nothing_but_the_verification(model: nn.Module, accumulate: str) -> None:
    """A small batch, discarded: the next step is as in a fresh tracker, and the model runs once per forward."""
    small, (ids, mask) = batch(4, 5, "right", seed=3), batch(ROWS, 8, "right")
    found = {}
    calls: list[str] = []
    for discards in (False, True):
        tracker = gk.GradNormTracker(model, accumulate=accumulate)
        if discards:
            run(tracker, model, *small, TASKS[:4], samples=["a", "b", "c", "d"])
            tracker.discard()
            assert tracker.running == {}
            tracker.state_dict()  # nothing waits for a step
        calls.clear()
        counter = model.register_forward_pre_hook(lambda *_: calls.append("forward"))
        run(tracker, model, ids, mask, samples=["a", "b", "c", "d", "e", "f"])
        counter.remove()
        found[discards] = tracker.step()["t"]
        tracker.close()
        assert (len(calls) == 1) is discards
    assert found[True] == found[False]


def test_a_layer_that_was_not_called_before_the_discard_is_looked_for_again() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, second: bool) -> Tensor:
            # The layer sees the rows in its second dimension, which only the probe finds out.
            return self.b(x.transpose(0, 1)).transpose(0, 1) if second else self.a(x)

    model = Branch()
    tracker = gk.GradNormTracker(model, "all")
    x = torch.randn(5, 3, 4)
    with warnings.catch_warnings(), tracker.microbatch(["t"] * 5):
        warnings.simplefilter("ignore")
        model(x, False).square().mean((1, 2)).mean().backward()
    tracker.discard()
    model.zero_grad()
    with tracker.microbatch(["t"] * 5):
        model(x, True).square().mean((1, 2)).mean().backward()
    rows = [
        torch.autograd.grad(model(x[r : r + 1], True).square().mean(), list(model.b.parameters())) for r in range(5)
    ]
    truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert tracker.step()["t"].sq_norm == pytest.approx(u_statistic(truth), rel=1e-5)


def test_discard_inside_a_micro_batch_is_refused(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    tracker = gk.GradNormTracker(model)
    with pytest.raises(RuntimeError, match="close the block before discard"), tracker.microbatch(TASKS):
        tracker.discard()
