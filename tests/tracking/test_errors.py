"""``errors=``: what the standard errors come from, and how few inner products are computed for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import gradnorm_kernels as gk
from gradnorm_kernels.control.balancer import TaskBalancer
from gradnorm_kernels.tracking import parameter_gram
from tests.tracking.brute_force import batch, row_losses, small_model

TASKS = ["a", "b", "a", "b", "a", "a", "b", "a", "b", "a", "c"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2", "a1", "b0", "a3", "c0"]  # task c: one sample, without a pair
SCALE = [11.0, 22.0, 11.0, 22.0, 5.5, 11.0, 11.0, 5.5, 22.0, 33.0, 11.0]  # one factor per sample, several in a task
PLAIN = ("sq_norm", "plug_in", "mean_sq_norm", "noise_scale", "pair_weight")


def measure(tracker: gk.GradNormTracker, model: nn.Module, seed: int = 0, **more: Any) -> None:
    """One micro-batch of all rows."""
    ids, mask = batch(len(TASKS), 7, "left")
    ids = (ids + seed) % int(ids.max() + 1)
    with tracker.microbatch(TASKS, SAMPLES, mask, **more):
        row_losses(model, ids, mask).mean().backward()


def step(model: nn.Module, errors: str, *, micro_batches: int = 1, **options: Any) -> gk.StepStats:
    tracker = gk.GradNormTracker(model, **{"layers": "all", "errors": errors, **options})
    for seed in range(micro_batches):
        more = {} if micro_batches == 1 else {"rows_per_sample": [micro_batches * SAMPLES.count(s) for s in SAMPLES]}
        measure(tracker, model, seed, row_scale=SCALE, **more)
    stats = tracker.step()
    tracker.close()
    return stats


def same_estimates(found: gk.StepStats, right: gk.StepStats) -> None:
    assert found.tasks == right.tasks and found.accumulate == right.accumulate
    for task in right.tasks:
        assert found[task].n == right[task].n
        for name in PLAIN:
            expected = getattr(right[task], name)
            assert getattr(found[task], name) == pytest.approx(expected, rel=1e-9, nan_ok=True), (task, name)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
def test_u_is_that_of_the_jackknife_without_its_errors(name: str, fused: bool) -> None:
    model = small_model(name)
    right = step(model, "samples", fused=fused)
    assert right.errors == "samples" and right["a"].std_error > 0
    for errors in ("tasks", "steps"):
        found = step(model, errors, fused=fused)
        same_estimates(found, right)
        assert found.errors == errors
        assert all(math.isnan(g.std_error) and g.std_error_method == "none" for g in found.values())
        assert bool(found.cosines_se.fill_diagonal_(torch.nan).isnan().all())
        apart = ~torch.eye(3, dtype=torch.bool)
        if errors == "tasks":
            for table in ("inner_products", "cosines"):
                torch.testing.assert_close(
                    getattr(found, table), getattr(right, table), rtol=1e-9, atol=1e-12, equal_nan=True
                )
        else:
            assert bool(found.inner_products[apart].isnan().all() and found.cosines[apart].isnan().all())
            torch.testing.assert_close(
                found.inner_products.diagonal(), right.inner_products.diagonal(), rtol=1e-9, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("errors", ["tasks", "steps"])
def test_samples_spread_over_micro_batches(errors: str) -> None:
    model = small_model("llama_tied")
    same_estimates(
        step(model, errors, micro_batches=3, accumulate="pairs"),
        step(model, "samples", micro_batches=3, accumulate="pairs"),
    )


@pytest.mark.parametrize("errors", ["tasks", "steps"])
def test_packed_rows(errors: str) -> None:
    model = small_model("qwen3")
    ids = torch.arange(12)[None] % 7
    lengths = [5, 4, 3]
    found = []
    for how in ("samples", errors):
        tracker = gk.GradNormTracker(model, "all", errors=how)
        with tracker.microbatch(["a", "a", "b"], cu_seqlens=[0, 5, 9, 12]):
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            logits = model(input_ids=ids, position_ids=positions).logits
            losses = -torch.log_softmax(logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            loss: Tensor = sum(part[:-1].mean() for part in losses.split([5, 4, 2]))  # type: ignore[assignment]
            (loss / 3).backward()
        found.append(tracker.step())
        tracker.close()
    same_estimates(found[1], found[0])


@pytest.mark.parametrize("errors", ["tasks", "steps"])
def test_experts(errors: str) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        output_router_logits=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).double()
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    same_estimates(step(model, errors), step(model, "samples"))


def test_exact_sums_keep_the_inner_products_of_tasks() -> None:
    model = small_model("llama_tied")
    right = step(model, "samples", accumulate="exact")
    for errors in ("tasks", "steps"):
        found = step(model, errors, accumulate="exact")
        same_estimates(found, right)
        torch.testing.assert_close(found.cosines, right.cosines, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_auto_keeps_no_sketches_for_the_errors_of_exact_sums_only() -> None:
    plan = gk.StepPlan(samples=8, together=1, whole=True, tasks=2)
    model = small_model("llama_tied")
    kept = {}
    for errors in ("samples", "tasks", "steps"):
        tracker = gk.GradNormTracker(model, errors=errors, plan=plan)
        assert tracker.accumulation.startswith("exact")
        kept[errors] = tracker._accumulation.sketches is not None
        tracker.close()
    assert kept == {"samples": True, "tasks": False, "steps": False}


def test_running_errors_are_the_spread_over_steps() -> None:
    model = small_model("llama_tied", torch.float64)
    tracker = gk.GradNormTracker(model, "last_attention", errors="steps")
    found = []
    for seed in range(4):
        measure(tracker, model, seed)
        found.append(tracker.step()["a"])
    tracker.close()
    u = torch.tensor([g.sq_norm for g in found], dtype=torch.float64)
    assert len({g.pair_weight for g in found}) == 1, "equal weights, so that the formula below is the whole one"
    assert tracker.running["a"].value == pytest.approx(float(u.mean()))
    assert tracker.running["a"].std_error == pytest.approx(float(u.std() / 2))


@pytest.mark.parametrize(("errors", "blocks", "gram"), [("samples", 8, True), ("tasks", 3, True), ("steps", 3, False)])
def test_the_operator_is_asked_for_no_more_than_is_used(
    errors: str, blocks: int, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    operator = parameter_gram.fused_grad_norm

    def count(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["num_groups"], kwargs["group_gram"]))
        return operator(*args, **kwargs)

    monkeypatch.setattr(parameter_gram, "fused_grad_norm", count)
    step(small_model("llama_tied"), errors, layers="last_attention")
    assert set(asked) == {(blocks, gram)} and len(asked) == 4


def test_what_does_not_go_together_is_refused() -> None:
    model = small_model("llama_tied")
    with pytest.raises(ValueError, match="errors must be one of 'samples', 'tasks', 'steps', got 'none'"):
        gk.GradNormTracker(model, errors="none")
    with pytest.raises(ValueError, match="errors='tasks' is for accumulate='pairs', 'exact' or 'auto', got 'sketch'"):
        gk.GradNormTracker(model, errors="tasks", accumulate="sketch")
    stats = step(model, "steps")
    with pytest.raises(ValueError, match="'nash_mtl' needs the tasks' inner products, which a tracker with errors="):
        TaskBalancer(["a", "b"], "nash_mtl").update(stats)
    TaskBalancer(["a", "b"], "equal_pull").update(stats)
    TaskBalancer(["a", "b"], "nash_mtl").update(step(model, "tasks"))
