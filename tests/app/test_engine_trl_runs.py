"""Engine 'trl' as it runs: two gloo processes against one, resume after SIGKILL, and the end of all when one ends.

tests/app/trl_launch.py runs the scenarios once, in forks of one process; the tests here read what they left.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from gradnorm_grpo import cli
from gradnorm_grpo.checkpoint import checkpoints, fault
from gradnorm_grpo.runlog import read_run

from .trl_launch import lines

pytestmark = pytest.mark.timeout(900)  # for the first, which waits for the runs
ROOT = Path(__file__).resolve().parents[2]
TASKS = ("compare", "maximum")
TIMED = ("time", "rollout_seconds", "update_seconds")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.app.trl_launch", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def codes(runs: Path, name: str) -> list[int]:
    return list(json.loads((runs / f"{name}.json").read_text()))


def said(runs: Path, name: str, rank: int, stream: str = "err") -> str:
    return (runs / f"{name}.{rank}.{stream}").read_text()


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMED}


def test_two_processes_do_the_step_of_one_with_the_same_global_batch(runs: Path) -> None:
    assert codes(runs, "one") == [0] and codes(runs, "two") == [0, 0], said(runs, "two", 0)
    one, two = lines(runs / "one"), lines(runs / "two")
    assert [line["step"] for line in two] == [1, 2, 3]
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for task in TASKS:  # the same questions and rewards, to the last bit
            for name in ("prompts", "reward", "prompt_length", "response_length", "sampling_prob", "n"):
                assert first[f"tasks/{task}/{name}"] == second[f"tasks/{task}/{name}"], name
        assert first["tokens"] == second["tokens"] and first["tasks/compare/prompts"] == 6
        for task in TASKS:  # the same prompts, in other micro-batches and another order: rounding
            for name in ("mean_sq_norm", "abs_advantage", "reward_std"):
                assert second[f"tasks/{task}/{name}"] == pytest.approx(first[f"tasks/{task}/{name}"], rel=1e-3), name
            # U is of the pairs in a process's micro-batch: 6 pairs of a task's 15.
            error = math.hypot(*(line[f"tasks/{task}/grad_norm_sq_se"] for line in (first, second)))
            assert abs(first[f"tasks/{task}/grad_norm_sq"] - second[f"tasks/{task}/grad_norm_sq"]) <= 3 * error
            assert second[f"tasks/{task}/mean_sq_norm"] > 0
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
        assert second["tasks/inner_product/compare/maximum"] is not None
    evals = [[untimed(line) for line in lines(runs / name, "eval")] for name in ("one", "two")]
    assert evals[0] == evals[1] and [line["step"] for line in evals[0]] == [0, 3]


def test_a_run_folder_is_as_the_loop_writes_it(runs: Path) -> None:
    folder = runs / "two"
    described = json.loads((folder / "run.json").read_text())
    assert (described["engine"], described["processes"]) == ("trl", 2)
    assert (described["prompts_per_step"], described["completions_per_step"]) == (12, 48)
    assert described["tasks"] == list(TASKS) and described["tracked_layers"]
    read = read_run(folder)
    assert read.finished and len(read.steps) == 3 and (folder / "report.html").is_file()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert all(fault(path) is None for path in checkpoints(folder))
    assert not (folder / ".unfinished").exists() and not (folder / "README.md").exists()
    assert "2 processes, 12 prompts and 48 completions per step" in said(runs, "two", 0, "out")
    assert said(runs, "two", 1, "out") == ""


def test_a_run_killed_between_checkpoints_goes_on_bit_for_bit(runs: Path) -> None:
    assert codes(runs, "whole") == [0] and codes(runs, "killed") == [-9] and codes(runs, "again") == [0]
    whole, again = lines(runs / "whole"), lines(runs / "killed")
    assert [line["step"] for line in again] == list(range(1, 7))
    assert [untimed(line) for line in again] == [untimed(line) for line in whole]
    # There is something to restore: the sampler's averages and the model that the warm start ended with.
    assert len({line["tasks/compare/sampling_prob"] for line in whole}) > 1
    assert whole[-1]["trl/kl"] > 0 and (runs / "killed" / "reference.safetensors").is_file()
    assert [path.name for path in checkpoints(runs / "whole")] == ["checkpoint-6", "checkpoint-12"]
    assert untimed(lines(runs / "killed", "eval")[-1]) == untimed(lines(runs / "whole", "eval")[-1])
    assert "settings changed since: max_steps 40 -> 6" in said(runs, "again", 0, "out")


def test_an_error_of_one_process_ends_all_with_one_message(runs: Path) -> None:
    assert codes(runs, "wrong") == [2, 2]
    assert said(runs, "wrong", 0).count("train_grpo.py: error:") == 1 and "missing.jsonl" in said(runs, "wrong", 0)
    assert said(runs, "wrong", 1) == ""
    assert not (runs / "wrong").exists()


def test_a_process_that_dies_ends_the_others_with_a_message(runs: Path) -> None:
    assert codes(runs, "lost") == [1, -9]
    assert "another process of the run ended" in said(runs, "lost", 0) and "--resume" in said(runs, "lost", 0)


def test_sigterm_stops_after_the_step_with_a_checkpoint(runs: Path) -> None:
    assert codes(runs, "stopped") == [130, 130]
    last = lines(runs / "stopped")[-1]["step"]
    assert checkpoints(runs / "stopped")[-1].name == f"checkpoint-{last}" and last < 40
    assert f"stopped after step {last}" in said(runs, "stopped", 0, "out")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--num_generations", "8"), "num_generations 4 -> 8"),
        (("--learning_rate", "1e-4"), "learning_rate 0.001 -> 0.0001"),
        (("--engine", "loop"), "engine 'trl' -> 'loop'"),
        (("--trl", "{top_entropy_quantile: 0.5}"), "trl {} -> "),
        ((), "the run was on 2 processes and cannot go on with 1"),
    ],
)
def test_a_resume_that_cannot_be_is_refused_by_name(
    runs: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], what: str
) -> None:
    before = (runs / "two" / "metrics.jsonl").read_bytes()
    assert cli.main(["train", "--resume", str(runs / "two"), *more]) == 2
    assert what in capsys.readouterr().err
    assert (runs / "two" / "metrics.jsonl").read_bytes() == before


def test_probe_and_report_work_on_its_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(runs / "two")]) == 0
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(runs / "config.yaml"), "--model", str(checkpoints(runs / "two")[-1])]
    assert cli.main(["probe", *config, "--output_dir", "probe", "--probe_prompts", "4"]) == 0
    assert read_run(tmp_path / "probe").probe
