"""What the application does differently on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from gradnorm_grpo import checkpoint, cli, folder, models
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Grpo
from gradnorm_grpo.models import device_of, load_model
from gradnorm_grpo.parse import parse_settings, parse_study
from gradnorm_grpo.rollout import Prompter
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer
from gradnorm_kernels import GradNormTracker
from tests.app.test_app_cli import SMALL

GPU = torch.device("cuda", 0)


def _train(*arguments: str) -> int:
    return cli.main(["train", *SMALL, "--output_dir", "run", *arguments])


def _lines(kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.replace("\n", " ")


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's answers about an H200."""
    properties = SimpleNamespace(total_memory=143_771 << 20, shared_memory_per_block_optin=232_448)
    answers = {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_what_was_asked_for_is_taken(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {name: device_of(Settings(device=name)).type for name in ("auto", "cuda", "cpu")}
    assert devices == {"auto": "cuda", "cuda": "cuda", "cpu": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Settings(device="auto")).type == "cpu"
    with pytest.raises(UserError, match="torch sees no CUDA device: use device 'cpu' or 'auto'"):
        device_of(Settings(device="cuda"))


def test_run_json_names_gpu_driver_and_cuda(one_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.159.04\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = folder.machine(GPU)
    gpu = {key: found[key] for key in ("device", "compute_capability", "device_memory_bytes", "cuda", "driver")}
    assert gpu == {
        "device": "NVIDIA H200",
        "compute_capability": "9.0",
        "device_memory_bytes": 143_771 << 20,
        "cuda": "13.0",
        "driver": "580.159.04",
    }
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert folder.machine(GPU)["driver"] is None
    assert folder.machine(torch.device("cpu")).keys() == {"platform", "processors", "threads", "device"}


def test_the_commit_can_be_given_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_tokenizer(), 32, 1, 0)
    given, none = Settings(commit="0123456789ab"), Settings()
    monkeypatch.setattr(folder, "commit", lambda: None)
    assert folder.describe_run(given, model, [])["commit"] == "0123456789ab"
    assert folder.describe_run(none, model, [])["commit"] is None
    monkeypatch.setattr(folder, "commit", lambda: "ba9876543210-dirty")
    assert folder.describe_run(given, model, [])["commit"] == "ba9876543210-dirty", "a checkout knows better"


def test_only_the_generators_of_the_run_s_own_device_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[tuple[list[int], torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7, device.index], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.append((state.tolist(), device)))
    on_gpu, on_cpu = checkpoint.random_state(GPU), checkpoint.random_state(torch.device("cpu"))
    assert [state.tolist() for state in on_gpu["cuda"]] == [[7, 0]] and on_cpu["cuda"] == []
    for state in (on_gpu, on_cpu):
        checkpoint.restore_random_state(state, torch.device("cpu"))
    checkpoint.restore_random_state(on_cpu, GPU)
    assert put == []
    checkpoint.restore_random_state(on_gpu, GPU)
    assert put == [([7, 0], GPU)]


def test_random_weights_leave_every_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError("the GPUs' generators were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed", fail)
    before = torch.random.get_rng_state()
    first, second = (tiny_model(tiny_tokenizer(), 32, 1, 5).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_on_a_gpu_attention_is_not_cudnn_s(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    own = torch.nn.Module.to

    def to(self: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        moved.append(device)
        return own(self, dtype)

    monkeypatch.setattr(models.torch.nn.Module, "to", to)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        load_model(Settings(device="cpu", tiny_hidden_size=32, tiny_layers=1))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        load_model(Settings(device="cuda", tiny_hidden_size=32, tiny_layers=1))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert [device.type for device in moved] == ["cpu", "cuda"]


@pytest.mark.parametrize("bf16", [False, True])
def test_every_forward_runs_in_the_precision_asked_for(
    bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm start, sampling, evaluation, training and the KL term's reference; the weights stay float32."""
    monkeypatch.chdir(tmp_path)
    seen: dict[str, set[torch.dtype]] = {"outputs": set(), "gradients": set(), "weights": set()}

    def watched(settings: Settings, place: Path | None = None) -> tuple[Any, Any]:
        model, tokenizer = load_model(settings, place)
        projection = model.model.layers[0].self_attn.q_proj

        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            seen["outputs"].add(output.dtype)
            seen["weights"].add(module.weight.dtype)
            if output.requires_grad:
                output.register_hook(lambda dy: seen["gradients"].add(dy.dtype))

        projection.register_forward_hook(hook)
        return model, tokenizer

    monkeypatch.setattr("gradnorm_grpo.train.load_model", watched)
    assert _train("--max_steps", "1", "--beta", "0.01", *(["--bf16"] if bf16 else [])) == 0
    computed = {torch.bfloat16 if bf16 else torch.float32}
    assert seen == {"outputs": computed, "gradients": computed, "weights": {torch.float32}}
    saved = torch.load(next(Path("run").glob("checkpoint-1/state.pt")), weights_only=True)
    moments = {entry["exp_avg"].dtype for entry in saved["grpo"]["optimizer"]["state"].values()}
    assert moments == {torch.float32}


def _gradients(bf16: bool) -> tuple[dict[str, float], dict[str, float]]:
    """U and mean squared norm of two tasks over all parameters, of one batch with made-up rewards."""
    tasks = [{"name": "copy", "source": "synthetic"}, {"name": "sort", "source": "synthetic"}]
    settings = Settings(
        prompt_template="{question} = ",
        tasks=tasks,
        num_generations=4,
        per_device_train_batch_size=32,
        max_completion_length=6,
        loss_type="grpo",
        tracker_layers="all",
        eval_prompts=1,
    )
    tokenizer, made = tiny_tokenizer(), build_tasks(tasks, 0, 1)
    model = tiny_model(tokenizer, 32, 2, seed=1)
    loop = Grpo(settings, model, tokenizer, made, Prompter(tokenizer, made, settings))
    torch.manual_seed(3)
    batch = loop.rollout(["copy"] * 4 + ["sort"] * 4)
    batch.advantages = torch.tensor([1.5, -0.5, -0.5, -0.5]).repeat(8, 1)
    loop.settings = dataclasses.replace(settings, bf16=bf16)
    stats = loop.backward(batch, [], measure=True)[1]
    loop.close()
    u, squares = ({task: getattr(g, name) for task, g in stats.items()} for name in ("sq_norm", "mean_sq_norm"))
    return u, squares


def test_bfloat16_products_measure_the_same_gradients() -> None:
    (u, squares), (u16, squares16) = _gradients(False), _gradients(True)
    for task, square in squares.items():
        assert squares16[task] == pytest.approx(square, rel=0.03) and squares16[task] != square
        assert u16[task] == pytest.approx(u[task], abs=0.03 * square)


def test_bf16_needs_float32_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--bf16", "--dtype", "bfloat16"]) == 2
    assert "bf16=true computes in bfloat16 with float32 weights" in capsys.readouterr().err


def test_a_run_out_of_time_is_whole_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _train("--max_steps", "4", "--max_minutes", "1e-6") == 0
    assert "max_minutes 1e-06 are over: the run ends with step 1" in _said(capsys)
    assert [line["step"] for line in _lines("train")] == [1]
    assert [line["step"] for line in _lines("eval")] == [0, 1], "evaluated where it ended"
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 1
    assert "max_minutes 1e-06 ended the run after 1 of 4 steps." in Path("run/report.html").read_text()
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert cli.main(["train", "--resume", "run", "--max_minutes", "0"]) == 0
    assert [line["step"] for line in _lines("train")] == [1, 2, 3, 4]
    assert "ended the run" not in Path("run/report.html").read_text()


def test_going_on_on_another_device_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _train("--max_steps", "1") == 0
    assert cli.main(["train", "--resume", "run", "--max_steps", "2"]) == 0
    assert "goes on on" not in _said(capsys)
    described = json.loads(Path("run/run.json").read_text())
    described["machine"]["device"] = "NVIDIA H200"
    Path("run/run.json").write_text(json.dumps(described))
    assert cli.main(["train", "--resume", "run", "--max_steps", "3"]) == 0
    assert "the run was on 'NVIDIA H200' and goes on on 'cpu'" in _said(capsys)


def test_the_gpu_s_preset() -> None:
    """One micro-batch a step, as many prompts of every task, every parameter measured, and no CPU by accident."""
    settings, _ = parse_settings(["--preset", "smollm2_gpu"])
    assert settings.device == "cuda" and settings.bf16 and settings.dtype == "float32" and settings.max_minutes > 0
    assert settings.train_layers == settings.tracker_layers == "all"
    assert settings.gradient_accumulation_steps == 1 and settings.shares_prompt
    assert settings.prompts_per_step % len(settings.tasks) == 0
    assert settings.lr_scheduler_type == "constant", "a run may end before max_steps"
    small = tiny_model(tiny_tokenizer(), 32, 2, 0)
    assert not GradNormTracker(small, settings.tracker_layers).skipped
    study, spec, _ = parse_study(["--preset", "smollm2_gpu"])
    assert study.full_steps == 1 and study.max_minutes == 0 and spec.seeds
