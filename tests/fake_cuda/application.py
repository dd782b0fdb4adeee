"""The application's loops on CUDA tensors: a whole run, a probe and the estimators, against the same on the CPU.

Sampling draws from the CPU's generator either way, so that both see the same completions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from rich.console import Console

from gradnorm_grpo import probe as probe_module
from gradnorm_grpo import train as train_module
from gradnorm_grpo.models import load_model
from gradnorm_grpo.parse import parse_settings
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.study.estimators import compare
from gradnorm_grpo.study.spec import EstimatorSettings
from gradnorm_grpo.tasks import Example, Task
from gradnorm_grpo.train import LoopTraining
from gradnorm_kernels import backends
from tests.fake_cuda.device import CudaTensor, FakeCuda
from tests.fake_cuda.tracking import put

SMALL = [
    *("--preset", "tiny", "--cache_dir=", "--tiny_hidden_size", "32", "--tiny_layers", "1", "--eval_prompts", "1"),
    *("--only_tasks", "copy", "maximum", "--warm_start_steps", "2", "--warm_start_examples", "40"),
    *("--warm_start_batch_size", "4", "--per_device_train_batch_size", "16", "--num_generations", "2"),
    *("--max_completion_length", "3", "--max_steps", "1", "--probe_prompts", "4"),
]
CASES: dict[str, list[str]] = {
    "last attention": [],
    "everything, bf16": ["--bf16", "--tracker_layers", "all"],
    "no shared prompt, fused": ["--loss_type", "dapo", "--tracker_fused"],
    "reference, iterations, full": ["--num_iterations", "2", "--full_steps", "1", "--beta", "0.1"],
    "weights": ["--task_weighting", "equal_pull", "--gradient_accumulation_steps", "2", "--few_shot", "1"],
}
SLOW = ("last attention", "no shared prompt, fused", "reference, iterations, full", "weights")
MEASURED = ("tokens", "loss", "grad_norm", "tasks/copy/reward", "tasks/copy/mean_sq_norm", "tasks/maximum/mean_sq_norm")


def a_score(task: Task, text: str, example: Example) -> float:
    """Half of all completions are right, whatever the model writes: groups with a gradient."""
    return float(text == example.answer or zlib.crc32(f"{text} {example.question}".encode()) & 1)


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "score", a_score)


Place = Callable[[], None]


@pytest.fixture
def on_gpu(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Called, it puts what is loaded from then on onto the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def load(settings: Settings, folder: Path | None = None) -> tuple[Any, Any]:
        model, tokenizer = load_model(dataclasses.replace(settings, device="cpu"), folder)
        model.config._attn_implementation = "eager"
        return (put(fake, model) if settings.device == "cuda" else model), tokenizer

    def given() -> None:
        properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1)
        properties.shared_memory_per_block_optin = 232_448
        answers: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "get_device_properties": lambda device=None: properties,
            "manual_seed_all": lambda seed: None,
            "synchronize": lambda device: None,
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: 12345,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        backends.forget()  # the run on the CPU may have asked them, while there was no GPU

    def copied(model: Any) -> Any:
        """What copies the model for the KL term: a storage that is nowhere cannot be copied."""
        if not isinstance(next(model.parameters()), CudaTensor):
            return copy.deepcopy(model)
        return load(parse_settings([*SMALL, "--device", "cuda"])[0])[0]

    for module in (train_module, probe_module):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(train_module, "copy", SimpleNamespace(deepcopy=copied))
    monkeypatch.setattr(train_module, "save_file", lambda tensors, path: None)
    return given


def settings_of(device: str, folder: Path, extra: list[str]) -> Settings:
    return parse_settings([*SMALL, *extra, "--device", device, "--output_dir", str(folder / device)])[0]


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    for name in MEASURED:
        if name in expected:
            assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-6), name
    for task in ("copy", "maximum"):
        size = expected[f"tasks/{task}/mean_sq_norm"]
        assert size > 0, "a test of nothing: no group has mixed rewards"
        assert found[f"tasks/{task}/grad_norm_sq"] == pytest.approx(
            expected[f"tasks/{task}/grad_norm_sq"], abs=rel * size
        )


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_run(case: str, fake: FakeCuda, on_gpu: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopTraining, "_save", lambda self: None)  # files take no tensors that are nowhere
    runs: dict[str, LoopTraining] = {}
    for device in ("cpu", "cuda"):
        if device == "cuda":
            on_gpu()
        runs[device] = LoopTraining(settings_of(device, tmp_path, CASES[case]), "tiny", Console(quiet=True))
        runs[device].run()
    line, expected = (lines_of(tmp_path / device, "train")[0] for device in ("cuda", "cpu"))
    same(line, expected, 2e-2 if "--bf16" in CASES[case] else 2e-4)
    assert line["peak_memory_bytes"] == 12345 and "peak_memory_bytes" not in expected
    machine = json.loads((tmp_path / "cuda/run.json").read_text())["machine"]
    assert machine["device"] == "NVIDIA H200" and machine["compute_capability"] == "9.0"
    assert fake.launches, "the kernels ran"


def test_a_resumed_state_goes_back_to_the_device(fake: FakeCuda, on_gpu: Place, tmp_path: Path) -> None:
    on_gpu()
    training = LoopTraining(settings_of("cuda", tmp_path, []), "tiny", Console(quiet=True))
    grpo = training.grpo
    grpo.step()
    state = tree_map(lambda v: v.cpu() if isinstance(v, CudaTensor) else v, grpo.state_dict())  # as load_state has it
    grpo.load_state_dict(state)
    moments = [entry["exp_avg"].device.type for entry in grpo.optimizer.state.values()]
    assert set(moments) == {"cuda"} and grpo.step()["step"] == 2
    training.log.close()
    grpo.close()


def test_a_probe(fake: FakeCuda, on_gpu: Place, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        if device == "cuda":
            on_gpu()
        probe_module.probe(settings_of(device, tmp_path, []), "tiny", Console(quiet=True))
    same(lines_of(tmp_path / "cuda", "probe")[0], lines_of(tmp_path / "cpu", "probe")[0], 2e-4)


@pytest.mark.slow
def test_the_estimators(fake: FakeCuda, on_gpu: Place, tmp_path: Path) -> None:
    options = EstimatorSettings(prompts=8, subsets=20, sketches=2, widths=[16], repeats=1)
    found = {}
    for device in ("cpu", "cuda"):
        if device == "cuda":
            on_gpu()
        path = compare(settings_of(device, tmp_path, []), "tiny", Console(quiet=True), options=options)
        found[device] = json.loads(path.read_text())
    for task, entry in found["cpu"]["tasks"].items():
        reference = found["cuda"]["tasks"][task]["reference"]
        assert entry["reference"]["mean_sq_norm"] > 0
        assert reference["mean_sq_norm"] == pytest.approx(entry["reference"]["mean_sq_norm"], rel=1e-3)
    assert fake.launches
