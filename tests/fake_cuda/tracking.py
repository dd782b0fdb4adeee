"""The tracker on CUDA tensors: what its hooks do on autograd's thread for a device, run by ``test_fake_cuda.py``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import nn

import gradnorm_kernels as gk
from gradnorm_kernels import backends
from gradnorm_kernels.tracking import recorder
from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.launches import other_defaults
from tests.tracking import brute_force

TASKS = ["a", "b", "a", "b", "a", "a", "b"]
SAMPLES = ["a0", "b0", "a0", "b1", "a1", "a2", "b2"]
LENGTHS = [3, 1, 4, 2, 5, 1, 2]


def put(fake: FakeCuda, model: nn.Module, device: str = "cuda:0") -> nn.Module:
    """The model on the device, with what is shared still shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = moved.setdefault(id(parameter), nn.Parameter(fake.put(parameter, device)))
                module._parameters[name] = own
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.put(buffer, device)
    return model


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = brute_force.small_model(name, dtype)
    model.config._attn_implementation = "eager"
    return model


def measured(
    model: nn.Module,
    ids: Any,
    mask: Any,
    watched: Callable[[], Any],
    row_scale: Any = None,
    given: Any = None,
    **options: Any,
) -> gk.StepStats:
    """One step of two micro-batches; only inside ``watched`` nothing may wait."""
    tracker = gk.GradNormTracker(model, **options)
    for part in range(2):
        loss_ids = ids.roll(part, 1)
        names = [f"{sample}.{part}" for sample in SAMPLES]
        with tracker.microbatch(TASKS, names, given, row_scale=row_scale):
            loss = brute_force.row_losses(model, loss_ids, mask).mean()
            with watched():
                loss.backward()
    stats = tracker.step()
    tracker.close()
    return stats


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "last attention": ("llama", {"layers": "last_attention"}),
    "last attention, fused": ("llama", {"layers": "last_attention", "fused": True}),
    "all": ("llama", {"layers": "all"}),
    "all, fused, tied": ("llama_tied", {"layers": "all", "fused": True}),
    "all, exact": ("llama_tied", {"layers": "all", "accumulate": "exact"}),
    "all, sketch": ("llama_tied", {"layers": "all", "accumulate": "sketch", "sketch_width": 8}),
    "all, fused, exact": ("gpt2", {"layers": "all", "fused": True, "accumulate": "exact"}),
}


def measured_packed(
    model: nn.Module, ids: Any, positions: Any, watched: Callable[[], Any], row_scale: Any = None, **options: Any
) -> gk.StepStats:
    """One step of two micro-batches of seven packed sequences with padding behind them."""
    offsets = [0, *accumulate(LENGTHS)]
    tracker = gk.GradNormTracker(model, **options)
    for part in range(2):
        names = [f"{sample}.{part}" for sample in SAMPLES]
        with tracker.microbatch(TASKS, names, row_scale=row_scale, cu_seqlens=offsets):
            logits = model(input_ids=ids.roll(part, 1), position_ids=positions, use_cache=False).logits[0]
            loss = torch.stack([logits[a:b].square().mean() for a, b in pairwise(offsets)]).mean()
            with watched():
                loss.backward()
    stats = tracker.step()
    tracker.close()
    return stats


def packed_row(padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, positions) [1, T]."""
    ids = torch.randint(
        1, brute_force.VOCABULARY, (1, sum(LENGTHS) + padding), generator=torch.Generator().manual_seed(4)
    )
    positions = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(padding, dtype=torch.long)])
    return ids, positions[None]


#: What another case goes through as well.
SLOW = ("last attention", "last attention, fused", "all", "all, exact", "all, sketch", "all, fused, exact")


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    """The threads and devices of hooks, and the backends that took an embedding's tokens."""
    seen: dict[str, set[Any]] = {"threads": set(), "devices": set(), "embedding": set()}
    make, operator = recorder.tokens_of, backends.operator

    def made(*args: Any) -> Any:
        seen["threads"].add(threading.get_ident())
        seen["devices"].add(torch.cuda.current_device())
        return make(*args)

    monkeypatch.setattr(recorder, "tokens_of", made)

    def chosen(name: str, op: str) -> Callable[..., Any]:
        if op == "embedding_grad_norm":
            seen["embedding"].add(name)
        return operator(name, op)

    monkeypatch.setattr(backends, "operator", chosen)
    return seen


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        pytest.param(torch.bfloat16, "cuda:0", id="bf16", marks=pytest.mark.slow),
        pytest.param(torch.float32, "cuda:1", id="fp32 on cuda:1"),
    ],
)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_nothing_waits(fake: FakeCuda, hooks: dict[str, set[Any]], name: str, dtype: torch.dtype, device: str) -> None:
    """By samples and folds, with and without a mask, under one factor and under a factor for each row."""
    fake.silent = True
    architecture, options = CASES[name]
    ids, mask = brute_force.batch(len(TASKS), 9, "right")
    ids, mask = fake.put(ids, device), fake.put(mask, device)
    model = put(fake, model_of(architecture, dtype), device)
    for given, scale in ((mask, None), (None, torch.arange(1.0, 8.0))):
        fake.waits.clear()
        measured(model, ids, mask, lambda: fake.forbidding(waits=True, any_order=True), scale, given, **options)
    # Autograd has a thread for each device; none of the hooks ran on this one.
    assert len(hooks["threads"]) == 1 and threading.get_ident() not in hooks["threads"]
    assert hooks["devices"] == {int(device[-1])} and torch.cuda.current_device() == 0
    pairs = options.get("accumulate") != "sketch"
    assert hooks["embedding"] == ({"triton"} if options["layers"] == "all" and pairs else set())
    assert {kernel[1:] for kernel in fake.launches} == {(int(device[-1]), int(device[-1]) + 1 << 16)}


@pytest.mark.parametrize("name", ["all, fused, exact", "all, sketch"])
def test_packed_rows_wait_for_nothing(fake: FakeCuda, name: str) -> None:
    fake.silent = True
    architecture, options = CASES[name]
    model = put(fake, model_of(architecture))
    ids, positions = map(fake.put, packed_row(3))
    for scale in (None, torch.arange(1.0, 8.0)):
        measured_packed(
            model,
            ids,
            positions,
            lambda: fake.forbidding(waits=True, any_order=True),
            scale,
            unverified="raise",
            **options,
        )


@pytest.mark.slow
def test_the_numbers_of_packed_rows(fake: FakeCuda) -> None:
    """Those of a CPU."""
    ids, positions = packed_row(3)
    options = {"layers": "all", "accumulate": "exact"}
    expected = measured_packed(model_of("llama"), ids, positions, contextlib.nullcontext, **options)
    model, ids, positions = put(fake, model_of("llama")), fake.put(ids), fake.put(positions)
    found = measured_packed(model, ids, positions, contextlib.nullcontext, **options)
    for task, value in expected.items():
        assert found[task].mean_sq_norm == pytest.approx(value.mean_sq_norm, rel=1e-4)
        assert found[task].sq_norm == pytest.approx(value.sq_norm, abs=1e-4 * value.mean_sq_norm)


@pytest.mark.parametrize("name", ["all, fused, tied", pytest.param("all, sketch", marks=pytest.mark.slow)])
def test_the_numbers(fake: FakeCuda, name: str) -> None:
    """Those of a CPU."""
    architecture, options = CASES[name]
    ids, mask = brute_force.batch(len(TASKS), 5, "right")
    expected = measured(model_of(architecture), ids, mask, contextlib.nullcontext, given=mask, **options)
    model, ids, mask = put(fake, model_of(architecture)), fake.put(ids), fake.put(mask)
    found = measured(model, ids, mask, contextlib.nullcontext, given=mask, **options)
    for task, value in expected.items():
        assert found[task].mean_sq_norm == pytest.approx(value.mean_sq_norm, rel=1e-4)
        assert found[task].sq_norm == pytest.approx(value.sq_norm, abs=1e-4 * value.mean_sq_norm)


@pytest.mark.parametrize(
    "name",
    [
        "last attention, fused",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("all", "all, exact", "all, sketch")),
    ],
)
def test_whatever_the_defaults_are(fake: FakeCuda, name: str) -> None:
    """The caller's default device and default dtype are not those of our tables."""
    fake.silent = True
    architecture, options = CASES[name]
    ids, mask = brute_force.batch(len(TASKS), 9, "right")
    model, ids, mask = put(fake, model_of(architecture)), fake.put(ids), fake.put(mask)
    with other_defaults():
        for row_scale in (None, torch.arange(1.0, 8.0, dtype=torch.float64, device="cpu")):
            measured(model, ids, mask, lambda: fake.forbidding(waits=True, any_order=True), row_scale, mask, **options)
