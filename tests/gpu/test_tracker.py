"""The tracker on a GPU: a bfloat16 model against per-sample gradients by plain autograd, observing and fused."""

from __future__ import annotations

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels.traps import assert_same_bits

pytestmark = pytest.mark.gpu
brute_force = pytest.importorskip("tests.tracking.brute_force", reason="needs transformers", exc_type=ImportError)

TASKS = ["a", "b", "a", "b", "a", "a", "b", "a", "b", "a"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2", "a1", "b0", "a3"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layers", ["last_attention", "all"])
def test_against_brute_force(layers: str, fused: bool, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = brute_force.small_model("llama", dtype).to(device)
    ids, mask = (tensor.to(device) for tensor in brute_force.batch(len(TASKS), 24, "right"))
    tracker = gk.GradNormTracker(model, layers, fused=fused)
    with tracker.microbatch(TASKS, SAMPLES, mask):
        brute_force.row_losses(model, ids, mask).mean().backward()
    stats = tracker.step()
    modules = dict(model.named_modules())
    measured = {id(p): p for name in tracker.layers for p in modules[name].parameters(recurse=False)}
    tracker.close()
    truth = brute_force.sample_gradients(
        brute_force.row_losses(model, ids, mask), SAMPLES, [p for p in measured.values() if p.requires_grad]
    )
    # In bfloat16 the two backward passes round differently: each gradient is accurate to about one percent.
    rel = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for task in "ab":
        gradients = torch.stack([g for sample, g in truth.items() if sample[0] == task])
        size = float(gradients.square().sum(1).mean())
        assert stats[task].n == len(gradients), f"n: found {stats[task].n}, expected {len(gradients)}"
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=rel)
        assert stats[task].sq_norm == pytest.approx(brute_force.u_statistic(gradients), abs=rel * size)


@pytest.mark.usefixtures("repeatable_attention")
def test_training_is_the_same_to_the_last_bit_while_watched(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gradients: list[list[torch.Tensor]] = []
    for watched in (False, False, True):
        model = brute_force.small_model("llama", dtype).to(device)
        ids, mask = (tensor.to(device) for tensor in brute_force.batch(len(TASKS), 24, "right"))
        tracker = gk.GradNormTracker(model, "all") if watched else None
        if tracker is None:
            brute_force.row_losses(model, ids, mask).mean().backward()
        else:
            with tracker.microbatch(TASKS, SAMPLES, mask):
                brute_force.row_losses(model, ids, mask).mean().backward()
            tracker.step()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    try:
        assert_same_bits(gradients[0], gradients[1], names)
    except AssertionError as error:
        raise AssertionError(f"torch's own backward is not deterministic, so this shows nothing: {error}") from None
    assert_same_bits(gradients[0], gradients[2], names)
