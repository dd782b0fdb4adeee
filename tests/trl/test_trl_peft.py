"""attach() on a GRPOTrainer with LoRA adapters: U of the adapters against brute force, and training left as it was."""

from __future__ import annotations

import pytest
import torch

from gradnorm_kernels.integrations.trl import attach
from tests.trl import trl_tiny as tiny
from tests.trl.test_trl_exact import Watched, many_ends, stand_still

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapters(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes})}


@pytest.mark.parametrize("changes", [{}, {"loss_type": "grpo", "beta": 0.2}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("fused", [False, True])
def test_u_of_the_adapters(tmp_path, changes, fused):
    trainer = stand_still(tmp_path, extra=adapters(), **changes)
    watched = Watched(trainer, fused=fused)
    trainer.train()
    layers = watched.attached.tracker.layers
    assert len(layers) == 4
    assert all("layers.1.self_attn" in name and ("lora_A" in name or "lora_B" in name) for name in layers)
    watched.check()


@pytest.mark.parametrize("fused", [False, True])
def test_u_of_the_dense_matrix_under_the_adapters(tmp_path, fused):
    """As if the matrix trained: the same run with the matrices under the adapters set free gives the truth."""
    trainer = stand_still(tmp_path, extra=adapters())
    watched = Watched(trainer, layers=r"layers\.1\.self_attn\.[qv]_proj\.base_layer", frozen=True, fused=fused)
    trainer.train()
    assert len(watched.attached.tracker.layers) == 2
    modules = dict(trainer.model.named_modules())
    assert not any(modules[name].weight.requires_grad for name in watched.attached.tracker.layers)
    for name in watched.attached.tracker.layers:
        modules[name].weight.requires_grad_(True)
    watched.check()


def test_watching_changes_no_bit(tmp_path):
    runs = []
    for watch in (False, True):
        trainer = tiny.grpo(tmp_path, trained=many_ends(), extra=adapters(), max_steps=3)
        if watch:
            attach(trainer, layers="all")
        trainer.train()
        runs.append(trainer)
    assert tiny.losses(runs[0]) == tiny.losses(runs[1])
    first, second = tiny.weights(runs[0]), tiny.weights(runs[1])
    assert all(torch.equal(first[key], second[key]) for key in first)
