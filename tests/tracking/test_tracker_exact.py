"""The tracker against brute-force per-sample gradients: architectures, paddings, layers, watching and fused."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.tracking.calls import Call, Placement
from gradnorm_kernels.tracking.layers import Layer
from gradnorm_kernels.tracking.parameter_gram import tokens_of
from tests.tracking.brute_force import CONFIGS, batch, jackknife, row_losses, sample_gradients, small_model, u_statistic

TASKS = ["a", "b", "a", "b", "a", "a", "b", "a", "b", "a"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2", "a1", "b0", "a3"]  # samples of several, not adjacent rows


def measured(tracker: gk.GradNormTracker, model: nn.Module) -> list[Tensor]:
    """The parameters that the tracker says it measures, each once."""
    modules = dict(model.named_modules())
    own = {id(p): p for name in tracker.layers for p in modules[name].parameters(recurse=False) if p.requires_grad}
    return list(own.values())


def check(
    model: nn.Module,
    layers,
    fused: bool,
    padding: str,
    rel: float,
    length: int = 9,
    weights: Sequence[float] | None = None,
) -> gk.StepStats:
    """One micro-batch, every published number against the truth."""
    rows = len(TASKS)
    ids, mask = batch(rows, length, padding)
    scale = torch.ones(rows, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    tracker = gk.GradNormTracker(model, layers, fused=fused)
    with tracker.microbatch(TASKS, SAMPLES, mask, row_scale=rows / scale):
        (row_losses(model, ids, mask) * scale.to(next(model.parameters()).dtype)).mean().backward()
    stats = tracker.step()
    parameters = measured(tracker, model)
    tracker.close()
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()  # torch.autograd.grad does not go through the reentrant kind
    truth = sample_gradients(row_losses(model, ids, mask), SAMPLES, parameters)
    by_task = {task: torch.stack([g for s, g in truth.items() if s[0] == task]) for task in "ab"}
    for task, g in by_task.items():
        got = stats[task]
        size = float(g.square().sum(1).mean())
        assert got.n == len(g)
        assert got.sq_norm == pytest.approx(u_statistic(g), abs=rel * size)
        assert got.mean_sq_norm == pytest.approx(size, rel=rel)
        assert got.plug_in == pytest.approx(float(g.mean(0).square().sum()), rel=rel * 10)
        assert got.std_error == pytest.approx(jackknife(g), abs=rel * size)
        assert got.std_error_method == "jackknife over samples"
    inner = float(by_task["a"].mean(0) @ by_task["b"].mean(0))
    at = [stats.tasks.index(task) for task in "ab"]
    assert float(stats.inner_products[at[0], at[1]]) == pytest.approx(inner, abs=rel * size)
    return stats


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_last_attention(name: str, padding: str, fused: bool) -> None:
    check(small_model(name), "last_attention", fused, padding, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_all_parameters(name: str, fused: bool) -> None:
    """Norms, biases, embeddings, heads, tied ones with their cross terms: the whole gradient."""
    model = small_model(name)
    check(model, "all", fused, "left", rel=1e-6)
    tracker = gk.GradNormTracker(model, "all")
    assert sum(p.numel() for p in measured(tracker, model)) == sum(p.numel() for p in model.parameters())
    assert tracker.skipped == {}
    tracker.close()


@pytest.mark.parametrize("layers", [r"layers\.0\.mlp", ["model.layers.1", "lm_head"], "lm_head", "norm"])
def test_other_choices(layers) -> None:
    check(small_model("llama_tied"), layers, False, "right", rel=1e-6)


def test_row_scale_differs_from_row_to_row() -> None:
    """Token-mean losses give every row its own factor: inside a sample too."""
    weights = [0.5, 1.0, 2.0, 0.25, 1.5, 3.0, 0.125, 1.0, 0.75, 1.25]
    for fused in (False, True):
        check(small_model("qwen2"), "all", fused, "right", rel=1e-6, weights=weights)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_fp32(fused: bool) -> None:
    check(small_model("qwen3", torch.float32), "all", fused, "left", rel=2e-5)


def gradients_after(
    model: nn.Module, tracker: gk.GradNormTracker | None, ids: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    with tracker.microbatch(TASKS, SAMPLES, mask) if tracker else contextlib.nullcontext():
        row_losses(model, ids, mask).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_watching_changes_no_bit_and_fusing_only_roundings(name: str) -> None:
    model = small_model(name, torch.float32)
    ids, mask = batch(len(TASKS), 9, "left")
    plain = gradients_after(model, None, ids, mask)
    watching = gk.GradNormTracker(model, "all")
    seen = gradients_after(model, watching, ids, mask)
    assert seen.keys() == plain.keys()
    assert all(torch.equal(seen[key], plain[key]) for key in plain)
    watching.close()
    fused = gk.GradNormTracker(model, "all", fused=True)
    swapped = gradients_after(model, fused, ids, mask)
    assert swapped.keys() == plain.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(swapped[key], grad, rtol=1e-4, atol=1e-6)
    outside = row_losses(model, ids, mask).mean()  # without a micro-batch a fused model is a plain one
    outside.backward()
    fused.close()
    again = gradients_after(model, None, ids, mask)
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", ["last_attention", "all"])
def test_gradient_checkpointing(layers: str, reentrant: bool, fused: bool) -> None:
    model = small_model("llama_tied")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(model, layers, fused, "right", rel=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_autocast(fused: bool) -> None:
    """bf16 products: the gradient measured is the one autocast computes, held to bf16's own error."""
    model = small_model("llama", torch.float32)
    ids, mask = batch(len(TASKS), 9, "right")
    tracker = gk.GradNormTracker(model, "last_attention", fused=fused)
    with tracker.microbatch(TASKS, SAMPLES, mask), torch.autocast("cpu", torch.bfloat16):
        loss = row_losses(model, ids, mask).mean()
        loss.backward()
    stats = tracker.step()
    parameters = measured(tracker, model)
    tracker.close()
    with torch.autocast("cpu", torch.bfloat16):
        truth = sample_gradients(row_losses(model, ids, mask), SAMPLES, parameters)
    g = torch.stack([g for s, g in truth.items() if s[0] == "a"])
    assert stats["a"].mean_sq_norm == pytest.approx(float(g.square().sum(1).mean()), rel=0.02)


def test_frozen_weights_are_left_out() -> None:
    model = small_model("qwen2")
    for name, parameter in model.named_parameters():
        if "k_proj.weight" in name or "q_proj.bias" in name or "layers.0" in name:
            parameter.requires_grad_(False)
    for fused in (False, True):
        check(model, "all", fused, "right", rel=1e-6)
        check(model, "last_attention", fused, "right", rel=1e-6)


class Reusing(nn.Module):
    """One linear called three times and a norm twice, the last time on another width of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 61, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for _ in range(3):
            h = h + torch.tanh(self.mix(self.norm(h)))
        return self.head(h)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_reused_layers_have_their_cross_terms(fused: bool) -> None:
    torch.manual_seed(0)
    model = Reusing().double()
    ids, _ = batch(len(TASKS), 7)
    ids[2, 3] = 0

    def losses() -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), ids.roll(1, 1), reduction="none").mean(1)

    tracker = gk.GradNormTracker(model, "all", fused=fused)
    model.zero_grad()
    with tracker.microbatch(TASKS, SAMPLES):
        losses().mean().backward()
    stats = tracker.step()
    grads = [p.grad.clone() for p in model.parameters()]
    tracker.close()
    truth = sample_gradients(losses(), SAMPLES, list(model.parameters()))
    g = torch.stack([v for s, v in truth.items() if s[0] == "b"])
    assert stats["b"].sq_norm == pytest.approx(u_statistic(g), rel=1e-6)
    model.zero_grad()
    losses().mean().backward()
    for got, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


@pytest.mark.parametrize("zeros", [0, 1, 6, 7, 30, 48])
def test_tokens_without_a_gradient_are_left_out_where_they_are_many(zeros: int) -> None:
    """Six of 48 are worth a copy. A row that is zero in front only has a gradient, and so has one with a NaN behind."""
    generator = torch.Generator().manual_seed(zeros)
    layer = Layer("linear", torch.nn.Linear(5, 3), "linear")
    x, dy = (torch.randn(4, 12, d, generator=generator) for d in (5, 3))
    flat = dy.view(48, 3)
    flat[torch.randperm(48, generator=generator)[:zeros]] = 0.0
    if zeros < 48:
        rest = (flat != 0).any(-1).nonzero()[:, 0]
        flat[rest[: len(rest) // 2], 0] = 0.0
        flat[rest[0], 1:] = torch.tensor([0.0, float("nan")])
    scale = torch.ones(4, dtype=torch.float64)
    call = Call(layer, x, (), {}, Placement(0), torch.tensor([0, 0, 1, 2]), scale)
    tokens = tokens_of(call, dy)
    left = 48 - zeros if zeros >= 6 else 48
    assert len(tokens.dy) == len(tokens.x) == int(tokens.lengths.sum()) == left
    first = 0
    for row, length in enumerate(tokens.lengths.tolist()):
        own = slice(first, first + length)
        first += length
        torch.testing.assert_close(tokens.dy[own].T @ tokens.x[own], dy[row].T @ x[row], equal_nan=True)
