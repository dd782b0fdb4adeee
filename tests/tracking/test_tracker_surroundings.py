"""The tracker inside what training code wraps around a model: torch.compile, loss scaling, offload, adapters, experts,
and sums kept over micro-batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.brute_force import DECODER, batch, row_losses, sample_gradients, small_model, u_statistic

ROWS = 6
TASKS = ["a", "b", "a", "b", "a", "a"]


def last_attention(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "layers.1.self_attn" in name and "norm" not in name]


def truth(model: nn.Module, ids: Tensor, mask: Tensor, parameters: list[Tensor]) -> dict[str, Tensor]:
    """{task: [n, P] gradients}, every row a sample."""
    found = sample_gradients(row_losses(model, ids, mask), list(range(ROWS)), parameters)
    return {task: torch.stack([found[r] for r in range(ROWS) if TASKS[r] == task]) for task in "ab"}


def check(stats: gk.StepStats, right: dict[str, Tensor], rel: float = 1e-6) -> None:
    for task, g in right.items():
        size = float(g.square().sum(1).mean())
        assert stats[task].sq_norm == pytest.approx(u_statistic(g), abs=rel * size)
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=rel)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize(
    "whole", [pytest.param(True, id="whole model"), pytest.param(False, id="each layer", marks=pytest.mark.slow)]
)
def test_compiled_models(fused: bool, whole: bool) -> None:
    """Compiled before or after the tracker was made, as a whole or layer by layer; gradients are those without it."""
    torch._dynamo.reset()
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    right = truth(model, ids, mask, last_attention(model))
    tracker = gk.GradNormTracker(model, fused=fused)
    run: Any = model
    if whole:
        run = torch.compile(model, backend="aot_eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        with tracker.microbatch(TASKS, attention_mask=mask):
            row_losses(run, ids, mask).mean().backward()
        check(tracker.step(), right)
    watched = [p.grad.clone() / 2 for p in model.parameters()]
    tracker.close()
    model.zero_grad()
    row_losses(run, ids, mask).mean().backward()
    for p, with_tracker in zip(model.parameters(), watched, strict=True):
        torch.testing.assert_close(p.grad, with_tracker, rtol=1e-9, atol=1e-12)


def test_a_tracker_made_for_the_compiled_wrapper() -> None:
    torch._dynamo.reset()
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    right = truth(model, ids, mask, last_attention(model))
    compiled = torch.compile(model, backend="aot_eager")
    tracker = gk.GradNormTracker(compiled)
    with tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(compiled, ids, mask).mean().backward()
    check(tracker.step(), right)


def test_loss_scaling_is_taken_out_by_row_scale() -> None:
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    tracker = gk.GradNormTracker(model)
    with tracker.microbatch(TASKS, attention_mask=mask, row_scale=ROWS / scaler.get_scale()):
        scaler.scale(row_losses(model, ids, mask).mean()).backward()
    check(tracker.step(), truth(model, ids, mask, last_attention(model)))


def test_activations_offloaded_to_the_cpu() -> None:
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    tracker = gk.GradNormTracker(model)
    with tracker.microbatch(TASKS, attention_mask=mask), torch.autograd.graph.save_on_cpu():
        row_losses(model, ids, mask).mean().backward()
    check(tracker.step(), truth(model, ids, mask, last_attention(model)))


@pytest.mark.parametrize("lower", [True, False], ids=["below too", "lowest trainable"])
def test_the_frozen_matrix_under_an_adapter(lower: bool) -> None:
    """frozen=True: the gradient that the dense matrix would get, also where no adapter lies below it."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
            self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    model = small_model("llama").requires_grad_(False)
    for i in (0, 1) if lower else (1,):
        attention = model.model.layers[i].self_attn
        attention.v_proj = Adapted(attention.v_proj)
    ids, mask = batch(ROWS, 8, "right")
    base = model.model.layers[1].self_attn.v_proj.base_layer
    with pytest.raises(ValueError, match="frozen=True measures linears"):
        gk.GradNormTracker(model, [r for r, m in model.named_modules() if m is base])
    tracker = gk.GradNormTracker(model, r"layers\.1\..*v_proj\.base_layer$", frozen=True)
    with tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask).mean().backward()
    stats = tracker.step()
    adapters = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert base.weight.grad is None
    tracker.close()
    model.zero_grad()
    row_losses(model, ids, mask).mean().backward()
    assert all(map(torch.equal, adapters, [p.grad for p in model.parameters() if p.requires_grad]))
    base.requires_grad_(True)
    check(stats, truth(model, ids, mask, [base.weight]))


def test_experts_that_cannot_be_followed_are_named_with_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def by_einsum(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up = torch.einsum("td,tkod->tko", x, self.gate_up_proj[index])
        return torch.einsum("tko,tkdo,tk->td", self._apply_gate(up), self.down_proj[index], weights)

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config)  # its experts take no float64
    ids, mask = batch(ROWS, 8, "none")
    experts = [name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    for followed in (True, False):
        if not followed:
            monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "by_einsum", by_einsum)
            model.config._experts_implementation = "by_einsum"
        tracker = gk.GradNormTracker(model, "all")
        with warnings.catch_warnings(record=True) as caught, tracker.microbatch(TASKS, attention_mask=mask):
            warnings.simplefilter("always")
            row_losses(model, ids, mask).mean().backward()
        stats = tracker.step()
        assert experts and set(tracker.skipped) == (set() if followed else set(experts))
        assert followed or "'by_einsum'" in tracker.skipped_reasons[experts[0]]
        assert followed or any("not measured" in str(warning.message) for warning in caught)
        total = sum(p.numel() for p in model.parameters())
        size = sum(p.numel() for name, p in model.named_parameters() if name in tracker.skipped)
        assert sum(tracker.skipped.values()) == pytest.approx(size / total)
        tracker.close()
        rest = [p for name, p in model.named_parameters() if name not in tracker.skipped]
        check(stats, truth(model, ids, mask, rest), rel=1e-4)
        tracker = gk.GradNormTracker(model)
        with tracker.microbatch(TASKS, attention_mask=mask):
            row_losses(model, ids, mask).mean().backward()
        check(tracker.step(), truth(model, ids, mask, last_attention(model)), rel=1e-4)
        tracker.close()


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_exact_sums_count_the_pairs_across_micro_batches(name: str, fused: bool) -> None:
    """A prompt a micro-batch, where pairs inside micro-batches know nothing: U is that of one micro-batch of all."""
    model = small_model(name)
    ids, mask = batch(ROWS, 8, "right")
    pairs = gk.GradNormTracker(model, "all")
    with pairs.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask).mean().backward()
    right = pairs.step()
    pairs.close()
    tracker = gk.GradNormTracker(model, "all", fused=fused, accumulate="exact")
    for _ in range(2):
        for row in range(ROWS):
            with tracker.microbatch([TASKS[row]], [row], mask[row : row + 1]):
                row_losses(model, ids[row : row + 1], mask[row : row + 1]).mean().backward()
        sums = tracker.step()
        for task in "ab":
            for number in ("sq_norm", "plug_in", "mean_sq_norm", "pair_weight", "noise_scale", "n"):
                assert getattr(sums[task], number) == pytest.approx(getattr(right[task], number), rel=1e-5), number
            assert sums[task].std_error_method == "none"
        torch.testing.assert_close(sums.inner_products, right.inner_products, rtol=1e-5, atol=1e-7)


def test_exact_sums_carry_an_upper_bound_of_their_error() -> None:
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    stats = []
    for accumulate in ("pairs", "exact"):
        tracker = gk.GradNormTracker(model, accumulate=accumulate)
        for rows in (slice(0, 3), slice(3, 6)):
            with tracker.microbatch(["a"] * 3, attention_mask=mask[rows]):
                row_losses(model, ids[rows], mask[rows]).mean().backward()
        stats.append(tracker.step()["a"])
        tracker.close()
    assert stats[1].std_error == stats[0].std_error > 0 and stats[1].sq_norm != stats[0].sq_norm
    assert stats[1].std_error_method == "jackknife over samples inside micro-batches, an upper bound"
    assert (stats[0].pair_weight, stats[1].pair_weight) == (12, 30)


def test_exact_sums_refuse_what_would_bend_them() -> None:
    model = small_model("llama")
    ids, mask = batch(ROWS, 8, "right")
    with pytest.raises(ValueError, match="accumulate must be one of 'auto', 'pairs', 'exact', 'sketch', got 'sum'"):
        gk.GradNormTracker(model, accumulate="sum")
    tracker = gk.GradNormTracker(model, accumulate="exact")
    with (
        pytest.raises(ValueError, match="whole samples in each micro-batch"),
        tracker.microbatch(TASKS, attention_mask=mask, rows_per_sample=2),
    ):
        pass
    with pytest.raises(KeyError), tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask).mean().backward()
        raise KeyError("user code")
    with pytest.raises(RuntimeError, match="a micro-batch failed halfway, so this step has no estimate"):
        tracker.step()
    with tracker.microbatch(TASKS, attention_mask=mask):
        row_losses(model, ids, mask).mean().backward()
    check(tracker.step(), truth(model, ids, mask, last_attention(model)))
