"""The application from its command line: a whole run, interruption and resume, and errors of one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from gradnorm_grpo import cli
from gradnorm_grpo.parse import PRESETS, parse_settings, preset_names
from gradnorm_grpo.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--preset", "tiny", "--cache_dir=", "--tiny_hidden_size", "32", "--warm_start_steps", "3"),
    *("--warm_start_examples", "40", "--per_device_train_batch_size", "48", "--num_generations", "4"),
    *("--eval_prompts", "6", "--gain_window", "2", "--num_threads", "1"),
]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "python" / "train_grpo.py"), *arguments]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # packages may have been put on it
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), cwd=folder, env=_environment(), capture_output=True, text=True, timeout=200, check=False
    )


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for seconds in ("time", "rollout_seconds", "update_seconds"):
            line.pop(seconds, None)
    return lines


def test_a_whole_run(tmp_path: Path) -> None:
    done = _run(tmp_path, "train", *SMALL, "--max_steps", "4", "--eval_steps", "2", "--report_to", "tensorboard")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert (run / "report.html").is_file() and f"report: {Path('runs/tiny/report.html')}" in done.stdout
    tasks = ["copy", "reverse", "sort", "compare", "add", "maximum"]
    assert all(task in done.stdout for task in tasks)
    described = json.loads((run / "run.json").read_text())
    assert described["tasks"] == tasks and described["config"]["max_steps"] == 4
    assert all(".self_attn." in name for name in described["tracked_layers"]) and len(described["tracked_layers"]) == 4
    lines = _lines(run)
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] != "warm_start"] == [
        *(
            ("eval_base", 0),
            ("eval", 0),
            ("train", 1),
            ("train", 2),
            ("eval", 2),
            ("train", 3),
            ("train", 4),
            ("eval", 4),
        ),
    ]
    assert sum(line["kind"] == "warm_start" for line in lines) == 3
    for line in lines:
        if line["kind"] in ("eval_base", "eval"):
            assert all(line[f"eval/{task}/n"] == 6 and 0 <= line[f"eval/{task}/reward"] <= 1 for task in tasks)
        if line["kind"] == "train":
            assert {"loss", "grad_norm", "lr", "tokens"} <= line.keys()
            assert sum(line[f"tasks/{task}/sampling_prob"] for task in tasks) == pytest.approx(1)
            drawn = [task for task in tasks if f"tasks/{task}/n" in line]
            assert sum(line[f"tasks/{task}/n"] for task in drawn) == 12
            names = "grad_norm_sq grad_norm_sq_se noise_scale plug_in mean_sq_norm pair_weight reward reward_std"
            for name in [*names.split(), "abs_advantage", "prompt_length", "response_length"]:
                assert all(f"tasks/{task}/{name}" in line for task in drawn), name
            assert f"tasks/cosine/{drawn[0]}/{drawn[1]}" in line
    assert f"tasks/{drawn[0]}/learning_gain" in lines[-2]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["tasks"]) == tasks and summary["steps"] == 4
    assert sum(entry["n"] for entry in summary["tasks"].values()) == 48
    assert list((run).glob("events.*")) or list(run.rglob("events.out.tfevents*"))
    # The report again, from the folder alone.
    (run / "report.html").unlink()
    again = _run(tmp_path, "report", "runs/tiny")
    assert again.returncode == 0 and (run / "report.html").is_file()


def _kill_when(process: subprocess.Popen[str], metrics: Path, step: int, number: signal.Signals) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if metrics.is_file() and any(f'"train", "step": {step}' in line for line in metrics.read_text().splitlines()):
            process.send_signal(number)
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    raise AssertionError("the run did not get that far")


def test_sigkill_and_resume_repeat_the_trajectory_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the steps come after the kill, which lands between two checkpoints.
    arguments = [*SMALL, "--max_steps", "16", "--save_steps", "3", "--beta", "0.01", "--eval_steps", "7"]
    with subprocess.Popen(
        _command("train", *arguments, "--output_dir", "killed"),
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _kill_when(process, tmp_path / "killed" / "metrics.jsonl", 8, signal.SIGKILL)
        process.wait(timeout=60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments, "--output_dir", "whole"]) == 0
    resumed = _run(tmp_path, "train", "--resume", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert _lines(tmp_path / "killed") == _lines(tmp_path / "whole")
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole"))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    weights = [next((tmp_path / name).glob("checkpoint-16/model.safetensors")) for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        _command("train", *SMALL, "--max_steps", "500", "--output_dir", "run"),
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _kill_when(process, tmp_path / "run" / "metrics.jsonl", 2, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "go on with: train_grpo.py train --resume run" in output
    step = _lines(tmp_path / "run")[-1]["step"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]


def test_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["probe", *SMALL, "--probe_prompts", "5"]) == 0
    run = tmp_path / "runs" / "tiny-probe"
    summary = json.loads((run / "summary.json").read_text())
    assert {entry["n"] for entry in summary["tasks"].values()} == {5}
    assert "report:" in capsys.readouterr().out and (run / "report.html").is_file()
    assert not list(run.glob("checkpoint-*"))


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert cli.main(list(arguments)) == code
    errors = capsys.readouterr().err
    assert errors.startswith("train_grpo.py: error: ") and errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "--preset NAME, --config FILE or --resume RUN_DIR is needed"),
        (["train", "--preset", "tini"], "did you mean 'tiny'"),
        (["train", "--preset"], "--preset needs a value"),
        (["train", "--config", "missing.yaml"], "cannot be read"),
        ([*["train", "--preset", "tiny"], "--max_stepps", "3"], "did you mean '--max_steps'"),
        ([*["train", "--preset", "tiny"], "--max_steps", "many"], "max_steps"),
        ([*["train", "--preset", "tiny"], "--loss_type", "gpro"], "did you mean 'grpo'"),
        ([*["train", "--preset", "tiny"], "--num_generations", "7"], "multiple of num_generations=7"),
        ([*["train", "--preset", "tiny"], "--num_generations", "1"], "num_generations must be at least 2"),
        ([*["train", "--preset", "tiny"], "--only_tasks", "copi"], "did you mean 'copy'"),
        ([*["train", "--preset", "tiny"], "--train_layers", "some"], "train_layers must be"),
        ([*["train", "--preset", "tiny"], "--train_layers", "9"], "at most 2"),
        ([*["train", "--preset", "tiny"], "--model", "./no-such-model"], "is not a folder"),
        ([*["train", "--preset", "tiny"], "--sampling_floor", "2"], "floor"),
        ([*["train", "--preset", "tiny"], "--lr_scheduler_type", "lineer"], "lineer"),
        ([*["train", "--preset", "tiny"], "--tracker_layers", "no_such_layer"], "no_such_layer"),
        ([*["train", "--preset", "tiny"], "--report_to", "tensorbord"], "did you mean 'tensorboard'"),
        ([*["train", "--preset", "tiny"], "--report_to", "comet_ml"], "not installed"),
        ([*["train", "--preset", "tiny"], "--loss_type", "dapo", "--share_prompt", "true"], "share_prompt"),
        ([*["train", "--preset", "tiny"], "--learning_rate", "nan"], "learning_rate"),
        ([*["train", "--preset", "tiny"], "--resume", "nowhere"], "nowhere does not exist"),
        ([*["train", "--preset", "tiny"], "--resume", "auto"], "finds no run"),
        (["train", "--resume", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "has no run.json"),
        (["report"], "needs one argument"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train" and "tiny" in arguments:
        arguments = [arguments[0], *SMALL, *arguments[3:]]
    assert message in _fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stepps: 3\ntasks: [{name: gcd}]", "did you mean 'max_steps'"),
        ("tasks: []", "tasks is empty"),
        ("model: tiny", "tasks is empty"),
        ("tasks: gcd", "tasks must be a list"),
        ("tasks: [{name: gcd}, {name: gcd}]", "2 times"),
        ("tasks: [{name: gdc}]", "did you mean 'gcd'"),
        ("- a", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("tasks: [{name: gcd}]\nmax_steps: [3]", "max_steps"),
        ("tasks: [{name: gcd}]\ntrack: perhaps", "track"),
        ("tasks: [{name: gcd}]\nprompt_template: hello", "prompt_template"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    assert message in _fails(capsys, "train", "--config", "mine.yaml")


def test_a_folder_that_holds_a_run_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "already holds a run" in _fails(capsys, "train", *SMALL, "--output_dir", "run")
    assert cli.main(["train", *SMALL, "--max_steps", "1"]) == 0
    assert (tmp_path / "runs" / "tiny-2" / "report.html").is_file()


def test_a_damaged_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--eval_prompts", "0", "--output_dir", "run"]
    assert cli.main(["train", *SMALL, *short, "--max_steps", "2", "--save_steps", "1"]) == 0
    os.truncate(tmp_path / "run" / "checkpoint-2" / "state.pt", 1000)
    capsys.readouterr()
    message = _fails(capsys, "train", "--resume", "run")
    assert "state.pt has 1000 bytes" in message and "checkpoint-1" in message
    assert cli.main(["train", *SMALL, *short, "--max_steps", "3", "--resume", "auto"]) == 0
    output = capsys.readouterr().out
    assert "resuming from the older" in output and "settings changed since: max_steps 2 -> 3" in output.replace(
        "\n", " "
    )
    assert [line["step"] for line in _lines(tmp_path / "run") if line["kind"] == "train"] == [1, 2, 3]


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file-size limit makes the system itself refuse to write the checkpoint, as a full disk does."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = _fails(capsys, "train", *SMALL, "--max_steps", "2", "--output_dir", "run", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "checkpoint-2 could not be written" in message
    assert [line["step"] for line in _lines(tmp_path / "run") if line["kind"] == "train"] == [1, 2]
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_task_that_may_starve_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *SMALL, "--max_steps", "0", "--sampling_floor", "0.6", "--warm_start_steps", "0"]) in (
        0,
        2,
    )
    assert "sampling_floor 0.6 may leave a task with 1.2" in capsys.readouterr().out


def test_every_preset_parses_and_options_override_it() -> None:
    assert {"tiny", "smollm2"} <= set(preset_names())
    for name in preset_names():
        settings, run_name = parse_settings(["--preset", name, "--max_steps=3", "--no_track", "--save_steps", "2"])
        assert (run_name, settings.max_steps, settings.track, settings.save_steps) == (name, 3, False, 2)
        values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        assert [task["name"] for task in settings.tasks] == [task["name"] for task in values["tasks"]]
        assert settings.learning_rate == values.get("learning_rate", Settings().learning_rate)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["train", "--help"]) == 0
    assert "--num_generations [8]" in capsys.readouterr().out
