"""Measuring a micro-batch on a GPU does not wait for the GPU and gives the same bits every time."""

from __future__ import annotations

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels import backends
from gradnorm_kernels.traps import assert_same_bits

pytestmark = pytest.mark.gpu
brute_force = pytest.importorskip("tests.tracking.brute_force", reason="needs transformers", exc_type=ImportError)

TASKS = ["a", "b", "a", "b", "a", "a", "b", "a"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2", "a1"]


@pytest.mark.usefixtures("repeatable_attention")
@pytest.mark.parametrize("blocks", [512, 4])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_all_layers(name: str, fused: bool, blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradnorm_kernels.tracking.tracker.MAX_BLOCKS", blocks)
    chosen = []
    operator = backends.operator
    monkeypatch.setattr(backends, "operator", lambda *call: chosen.append(call) or operator(*call))
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = brute_force.small_model(name, dtype).to(device)
    ids, mask = (tensor.to(device) for tensor in brute_force.batch(len(TASKS), 24, "right"))
    tracker = gk.GradNormTracker(model, "all", fused=fused)
    names = [name for name, _ in model.named_parameters()]
    gradients, seen = [], []
    for _ in range(3):
        model.zero_grad()
        with tracker.microbatch(TASKS, SAMPLES, mask):
            loss = brute_force.row_losses(model, ids, mask).mean()
            # In the first step kernels are compiled and loaded, which may wait.
            if on_gpu and seen:
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        seen.append({task: (value.sq_norm, value.mean_sq_norm) for task, value in tracker.step().items()})
        gradients.append([p.grad.clone() for p in model.parameters()])
    # First the gradients: if they differ, the norms cannot agree.
    for other in gradients[1:]:
        assert_same_bits(gradients[0], other, names)
    assert seen[1] == seen[0] and seen[2] == seen[0], f"later norms differ: {seen}"
    if on_gpu:
        assert ("triton", "embedding_grad_norm") in chosen
