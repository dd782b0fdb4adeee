"""A resume with other settings or data: used from there on, or refused by name with nothing changed on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("trl")

from gradnorm_grpo import cli
from gradnorm_grpo.checkpoint import load_state
from gradnorm_grpo.parse import parse_settings
from gradnorm_grpo.settings import Settings

CONFIG: dict[str, Any] = {
    "model": "tiny",
    "tiny_layers": 1,
    "tiny_hidden_size": 32,
    "num_threads": 1,
    "prompt_template": "{question} = ",
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 4,
    "loss_type": "grpo",
    "max_steps": 3,
    "save_steps": 1,
    "save_total_limit": 3,
    "eval_prompts": 2,
    "cache_dir": "",
    "sampling_strategy": "proportional",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose last checkpoint is gone; one of its tasks reads a file."""
    place = tmp_path_factory.mktemp("resume")
    data = place / "sums.jsonl"
    data.write_text("".join(f'{{"prompt": "{i} + 1", "answer": {i + 1}}}\n' for i in range(12)))
    tasks = [
        {"name": "add", "source": "synthetic"},
        {"name": "sums", "source": "jsonl", "path": str(data), "verifier": "numeric"},
    ]
    (place / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "tasks": tasks}))
    assert cli.main(["train", "--config", str(place / "config.yaml"), "--output_dir", str(place / "run")]) == 0
    shutil.rmtree(place / "run" / "checkpoint-3")
    return place / "run"


@pytest.fixture
def again(run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(run, tmp_path / "again"))


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def resume(folder: Path, *arguments: str) -> int:
    return cli.main(["train", "--resume", str(folder), *arguments])


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("model", "smollm2", "the saved weights and optimizer"),
        ("dtype", "float16", "the saved weights and optimizer"),
        ("tiny_hidden_size", "64", "the saved weights and optimizer"),
        ("tiny_layers", "2", "the saved weights and optimizer"),
        ("train_layers", "1", "the saved weights and optimizer"),
        ("only_tasks", "add", "the saved positions in the data"),
        ("seed", "7", "the saved positions in the data"),
        ("eval_prompts", "3", "the saved positions in the data"),
        ("warm_start_steps", "5", "the warm start is over"),
        ("warm_start_examples", "5", "the warm start is over"),
        ("warm_start_batch_size", "5", "the warm start is over"),
        ("warm_start_learning_rate", "1e-2", "the warm start is over"),
        ("track", "false", "the saved averages of the gradients"),
        ("tracker_layers", "all", "the saved averages of the gradients"),
        ("sampling_decay", "0.5", "the saved averages of the gradients"),
        ("task_weighting", "equal_pull", "the saved averages of the gradients"),
        ("task_weighting_decay", "0.5", "the saved averages of the gradients"),
        ("beta", "0.1", "reference.safetensors is missing"),
        ("tracker_fused", "perhaps", "must be of type bool"),
        ("lr_scheduler_type", "lineer", "lineer"),
        ("sampling_floor", "2", "floor"),
        ("report_to", "comet_ml", "not installed"),
        ("max_prompt_length", "6", "overlong"),
    ],
)
def test_what_cannot_change_is_refused_by_name_and_nothing_changes_on_disk(
    again: Path, capsys: pytest.CaptureFixture[str], setting: str, value: str, why: str
) -> None:
    before = tree(again)
    assert resume(again, f"--{setting}", value) == 2
    said = capsys.readouterr().err
    assert why in said and (setting in said or setting in ("lr_scheduler_type", "sampling_floor"))
    assert said.count("\n") == 1 and "Traceback" not in said
    assert tree(again) == before


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sampling_floor", "0.3"),
        ("sampling_strategy", "inverse"),
        ("max_steps", "4"),
        ("learning_rate", "0.002"),
        ("adam_beta1", "0.5"),
        ("weight_decay", "0.1"),
        ("num_generations", "2"),
        ("per_device_train_batch_size", "24"),
        ("loss_type", "dapo"),
        ("temperature", "0.5"),
        ("max_completion_length", "6"),
        ("full_steps", "1"),
        ("eval_steps", "1"),
        ("save_steps", "2"),
        ("num_iterations", "2"),
        ("lr_scheduler_type", "linear"),
        ("overlong", "drop"),
        ("tracker_fused", "true"),
        ("gain_window", "1"),
        ("prompt_template", "{question}: "),
    ],
)
def test_what_can_change_is_used_and_said(
    again: Path, capsys: pytest.CaptureFixture[str], setting: str, value: str
) -> None:
    assert resume(again, f"--{setting}", value) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"settings changed since: {setting} " in said
    steps = 4 if setting == "max_steps" else 3
    assert [line["step"] for line in lines(again)] == list(range(1, steps + 1))
    described = json.loads((again / "run.json").read_text())
    assert str(described["config"][setting]).lower() == value


def test_a_changed_learning_rate_is_the_one_that_the_next_step_takes(again: Path) -> None:
    assert resume(again, "--learning_rate", "0.25", "--adam_beta1", "0.5", "--weight_decay", "0.125") == 0
    assert [line["lr"] for line in lines(again)] == [1e-3, 1e-3, 0.25]
    group = load_state(again / "checkpoint-3")["grpo"]["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.999), 0.125)


def test_a_longer_run_has_the_schedule_of_its_own_length(again: Path) -> None:
    assert resume(again, "--lr_scheduler_type", "linear", "--max_steps", "5") == 0
    assert [line["lr"] for line in lines(again)] == pytest.approx([1e-3, 1e-3, 6e-4, 4e-4, 2e-4])


def test_settings_that_are_over_are_said_to_have_no_effect(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(again, "--eval_base", "false", "--probe_prompts", "8") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "without effect on a resumed run: eval_base True -> False; probe_prompts 64 -> 8" in said


def test_a_resume_without_changes_repeats_the_run(run: Path, again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(again) == 0
    assert "changed" not in capsys.readouterr().out
    for first, second in zip(lines(run), lines(again), strict=True):
        timed = {"time", "rollout_seconds", "update_seconds"}
        assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}


def test_a_data_file_that_changed_is_noticed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path(shutil.copytree(run.parent, tmp_path / "place"))
    described = json.loads((place / "run" / "run.json").read_text())
    data = Path(described["config"]["tasks"][1]["path"])
    assert described["data"] == {"sums": hashlib.sha256(f"{data.name}\n".encode() + data.read_bytes()).hexdigest()}
    before, content = tree(place), data.read_bytes()
    try:
        data.write_bytes(content.replace(b'"answer": 3', b'"answer": 4'))
        assert resume(place / "run") == 2
    finally:
        data.write_bytes(content)
    assert "the data of task 'sums' changed since the run began" in capsys.readouterr().err
    assert tree(place) == before
    assert resume(place / "run") == 0


def test_a_checkpoint_of_a_shorter_log_is_refused_before_anything_changes(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = again / "metrics.jsonl"
    log.write_text(log.read_text()[:100])
    before = tree(again)
    assert resume(again) == 2
    assert "was cut or replaced" in capsys.readouterr().err and tree(again) == before


def test_every_setting_says_what_a_resume_does_with_it() -> None:
    settings = Settings(tasks=[{"name": "add", "source": "synthetic"}])
    policies = {name: spec.metadata["resume"] for name, spec in settings.__dataclass_fields__.items()}
    assert all(isinstance(policy, str) for policy in policies.values())
    assert {name for name, policy in policies.items() if policy == ""} == {
        *("cache_dir", "eval_base", "output_dir", "commit", "resume_from_checkpoint", "probe_prompts"),
    }


def test_checkpoints_are_written_by_default() -> None:
    assert Settings().save_steps == 10
    for name in ("tiny", "smollm2"):
        assert parse_settings(["--preset", name])[0].save_steps > 0
    assert torch.get_num_threads() >= 1


def test_another_commit_is_said_and_kept(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(info | {"commit": "0123456789ab"}))
    assert resume(again) == 0
    now = json.loads((again / "run.json").read_text())
    assert now["commits"] == ["0123456789ab", info["commit"]] and now["commit"] == info["commit"]
    assert f"began with the code's commit 0123456789ab and goes on with {info['commit']}" in capsys.readouterr().out


def test_an_older_checkpoint_leaves_none_of_the_steps_done_again(again: Path) -> None:
    assert resume(again / "checkpoint-1", "--save_total_limit", "1", "--max_steps", "2") == 0
    assert sorted(path.name for path in again.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-2.superseded"]
