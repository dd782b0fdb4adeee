"""The study's runs: what a spec allows, what is run again and what is not, failures, interruption, and a whole one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

pytest.importorskip("trl")

from gradnorm_grpo import cli
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import PRESETS, parse_settings, parse_study
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.study import run
from gradnorm_grpo.study.page import page
from gradnorm_grpo.study.spec import ARMS, StudySpec, read_spec
from tests.study.study_planted import planted

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--preset", "tiny", "--cache_dir=", "--tiny_hidden_size", "32", "--warm_start_steps", "2"),
    *("--warm_start_examples", "40", "--per_device_train_batch_size", "48", "--num_generations", "4"),
    *("--eval_prompts", "4", "--eval_steps", "2", "--gain_window", "1", "--num_threads", "1", "--max_steps", "2"),
]


def test_the_default_arms_are_the_papers_and_a_correction() -> None:
    settings, spec, name = parse_study(["--preset", "tiny"])
    assert name == "tiny" and list(spec.arms) == ["uniform", "proportional", "inverse", "equal_pull"]
    made = {arm: spec.run_settings(settings, arm, 7, "x") for arm in spec.arms}
    assert [made[arm].sampling_strategy for arm in made] == ["uniform", "proportional", "inverse", "uniform"]
    assert made["equal_pull"].task_weighting == "equal_pull" and made["uniform"].task_weighting == "none"
    budgets = {(run.max_steps, run.per_device_train_batch_size, run.num_generations, run.seed) for run in made.values()}
    assert len(budgets) == 1, "arms differ in nothing but how tasks are drawn and weighed"


def test_the_block_goes_over_the_preset_and_options_over_both() -> None:
    plain, _ = parse_settings(["--preset", "tiny"])
    settings, spec, _ = parse_study(["--preset", "tiny", "--max_steps", "9", "--seeds", "4", "5", "--arms", "inverse"])
    assert plain.full_steps == 0 and settings.full_steps == 1
    assert settings.max_steps == 9 and spec.seeds == [4, 5] and list(spec.arms) == ["inverse"]


def test_every_presets_block_is_one() -> None:
    for path in PRESETS.glob("*.yaml"):
        if yaml.safe_load(path.read_text()).get("engine", "loop") != "loop":
            with pytest.raises(UserError, match="a study runs with engine 'loop'"):
                parse_study(["--config", str(path)])
            continue
        settings, spec, name = parse_study(["--config", str(path)])
        assert spec.arms.keys() >= {"uniform"} and name == path.stem
        assert settings.eval_prompts > 0, "the arms are compared on held-out questions"


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"seeds": [1, 1]}, "seeds must be a list of different whole numbers from 0, got [1, 1]"),
        ({"seeds": []}, "seeds must be a list"),
        ({"jobs": 0}, "jobs must be a whole number from 1, got 0"),
        ({"arms": {}}, "must name at least one arm"),
        ({"arms": {"../x": {}}}, "an arm's name must be letters"),
        ({"arms": {"more": {"max_steps": 99}}}, "a setting of arm 'more' must be one of"),
        ({"settings": {"sed": 1}}, "a setting of the study must be one of"),
        ({"settings": {"seed": 1}}, "a setting of the study must be one of"),
        ({"keep_checkpoints": "no"}, "keep_checkpoints must be true or false, got 'no'"),
        ({"armz": {}}, "did you mean 'arms'?"),
        ([], "study must be a mapping"),
    ],
)
def test_a_wrong_block_is_one_sentence(block: object, says: str) -> None:
    with pytest.raises(UserError) as error:
        read_spec(block, {})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "3"], "a study has --seeds"),
        (["--seeds", "x"], "invalid int value"),
        (["--arms", "uniformly"], "did you mean 'uniform'?"),
        (["--max_stepz", "3"], "did you mean '--max_steps'?"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "--preset", "tiny", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_config_survives_the_file(tmp_path: Path) -> None:
    settings, spec, _ = parse_study(["--preset", "smollm2"])
    settings = spec.run_settings(settings, "equal_pull", 5, str(tmp_path / "run"))
    run.write_config(tmp_path / "config.yaml", settings)
    assert parse_settings(["--config", str(tmp_path / "config.yaml")])[0] == settings


def _settings(folder: Path) -> Settings:
    return dataclasses.replace(parse_study(SMALL)[0], output_dir=str(folder))


def test_what_an_unfinished_run_is_given_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "uniform-seed1"
    fresh = run.run_job("a", _settings(folder))
    assert fresh.arguments[:2] == ("train", "--config") and not fresh.done
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"kind": "train"}\n')
    again = run.run_job("a", _settings(folder))
    assert again.arguments[:2] == ("train", "--config") and again.progress == 0
    assert (tmp_path / "uniform-seed1.interrupted-1" / "metrics.jsonl").is_file(), "what it wrote is kept"
    (folder / "checkpoint-2").mkdir()
    assert run.run_job("a", _settings(folder)).arguments == ("train", "--resume", str(folder))
    (folder / "summary.json").write_text("{}")
    assert run.run_job("a", _settings(folder)).done
    run.drop_checkpoints(folder)
    assert not (folder / "checkpoint-2").exists() and (folder / "config.yaml").is_file()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of train_grpo.py: `ok FILE` writes the file, `bad` fails, `slow FILE` waits for a SIGTERM."""
    path = tmp_path / "script.py"
    path.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path(sys.argv[2]).write_text('stopped')\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "if sys.argv[1] == 'bad':\n    sys.exit('no such luck')\n"
        "if sys.argv[1] == 'slow':\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "pathlib.Path(sys.argv[2]).write_text('{}')\n"
    )
    monkeypatch.setattr(run, "SCRIPT", path)


def _job(folder: Path, name: str, what: str) -> run.Job:
    place = folder / name
    place.mkdir()
    return run.Job(name, (what, str(place / "result")), place, place / "result")


def test_a_failure_costs_the_others_nothing(tmp_path: Path, script: None, capsys: pytest.CaptureFixture[str]) -> None:
    work = [_job(tmp_path, "one", "ok"), _job(tmp_path, "two", "bad"), _job(tmp_path, "three", "ok")]
    assert run.run_all(work, 2, Console()) == [work[1]]
    assert work[0].done and work[2].done
    assert "two failed (no such luck)" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "one" / "result").write_text("before")
    run.run_all([work[0]], 1, Console())
    assert (tmp_path / "one" / "result").read_text() == "before", "what is done is not run again"


def test_an_interruption_lets_the_running_ones_end(
    tmp_path: Path, script: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [_job(tmp_path, "one", "slow"), _job(tmp_path, "two", "ok")]
    log = tmp_path / "one" / "log.txt"

    def interrupt(_seconds: float) -> None:
        deadline = time.monotonic() + 20
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            os.sched_yield()
        raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", interrupt)
    monkeypatch.setattr(run.os, "isatty", lambda _: False)  # no terminal that would have told them itself
    with pytest.raises(KeyboardInterrupt):
        run.run_all(work, 1, Console())
    assert (tmp_path / "one" / "result").read_text() == "stopped" and not work[1].done


def test_a_folder_keeps_to_the_study_it_was_begun_with(tmp_path: Path) -> None:
    settings, spec, name = parse_study(SMALL)
    first = run.describe(settings, spec, name, tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(first))
    more = dataclasses.replace(spec, seeds=[1, 2, 3, 4])
    again = run.describe(dataclasses.replace(settings, num_threads=2), more, name, tmp_path)
    assert again["seeds"] == [1, 2, 3, 4] and again["started"] == first["started"] and again["continued"]
    with pytest.raises(UserError, match="max_steps 2 -> 3"):
        run.describe(dataclasses.replace(settings, max_steps=3), spec, name, tmp_path)
    other = dataclasses.replace(spec, arms={"inverse": {**ARMS["inverse"], "sampling_floor": 0.9}})
    with pytest.raises(UserError, match="arm inverse"):
        run.describe(settings, other, name, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds something that is no study"):
        run.describe(settings, StudySpec(), name, tmp_path / "other")


def test_what_only_the_csv_has_is_not_run_again_and_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, spec, name = parse_study([*SMALL, "--seeds", "1", "2", "--arms", "uniform", "proportional"])
    first = run.describe(settings, spec, name, tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(first))
    made = planted(np.random.default_rng(0), [1.0] * 6, seeds=(1, 2))
    made.write_csv(tmp_path / "measurements.csv")
    assert run._kept(tmp_path, spec) == made.runs
    folder = tmp_path / "runs" / "uniform-seed2"
    folder.mkdir(parents=True)
    for file in ("metrics.jsonl", "summary.json"):
        (folder / file).write_text("{}")  # it has been run here after all
    kept = run._kept(tmp_path, spec)
    assert kept == [found for found in made.runs if found != ("uniform", 2)]
    more = dataclasses.replace(spec, seeds=[1, 2, 3], estimator_seeds=0)
    assert [job.folder.name for job in run._jobs(settings, more, tmp_path, kept)] == [
        *("uniform-seed2", "uniform-seed3", "proportional-seed3")
    ]
    with pytest.raises(
        UserError, match="leave out uniform-seed1, proportional-seed1, whose numbers are in .* alone and would be lost"
    ):
        run._kept(
            tmp_path,
            dataclasses.replace(spec, seeds=[2]),
        )
    # The page says where the earlier runs were made.
    monkeypatch.setattr(run, "commit", lambda: "fedcba987654")
    again = run.describe(settings, more, name, tmp_path)
    assert again["commit"] == "fedcba987654" and [own["commit"] for own in again["earlier"]] == [first["commit"]]
    (tmp_path / "study.json").write_text(json.dumps(again))
    assert run.describe(settings, more, name, tmp_path)["earlier"] == again["earlier"]
    assert f"Earlier runs: commit `{first['commit']}`, cpu" in page(again, {})
    assert "on another machine" not in page(again, {})
    elsewhere = again | {"earlier": [again["earlier"][0] | {"machine": {"device": "cuda"}}]}
    assert "made on another machine or with other versions" in page(elsewhere, {})


def test_a_whole_study_stops_goes_on_and_answers(tmp_path: Path) -> None:
    """Killed in its second run; the same command goes on, and ends with every answer, figure and the page."""
    config = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
    config["study"] |= {"estimators": {"prompts": 8, "subsets": 50, "sketches": 2, "widths": [8]}, "estimator_seeds": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    options = [*SMALL[2:], "--seeds", "1", "--arms", "uniform", "inverse", "--jobs", "1", "--output_dir", "out"]
    arguments = [
        *(sys.executable, str(ROOT / "python" / "train_grpo.py"), "study", "--config", str(tmp_path / "small.yaml")),
        *options,
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # packages may have been put on it
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    runs = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 120
    while not (runs / "uniform-seed1" / "summary.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=120)[0]
    assert started.returncode == 130 and "the same command goes on" in said
    first = (runs / "uniform-seed1" / "metrics.jsonl").read_bytes()
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done already" in done.stdout
    assert (runs / "uniform-seed1" / "metrics.jsonl").read_bytes() == first
    assert len(list(runs.glob("*-seed1/summary.json"))) == 2
    assert not list(runs.glob("*-seed1/checkpoint-*")), "weights of finished runs are not kept"
    out = tmp_path / "out"
    answers = json.loads((out / "answers.json").read_text())
    ids = [entry["id"] for entry in answers["answers"]]
    assert ids == ["imbalance", "last_block", "gain", "explain", "arms", "estimators"]
    assert {entry["verdict"] for entry in answers["answers"]} <= {"supported", "contradicted", "undecided"}
    page = (out / "README.md").read_text()
    assert json.loads((out / "study.json").read_text())["seconds"] > 5 and "for all runs and the estimators" in page
    for figure in (out / "figures").glob("*.svg"):
        assert f"figures/{figure.name}" in page or figure.name == "overview.svg"
    lines = [json.loads(line) for line in (runs / "inverse-seed1" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all("tasks/copy/full_grad_norm_sq" in line and "tasks/copy/grad_norm_sq" in line for line in steps)
    before = (out / "answers.json").read_text()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "answers.json").read_text() == before, "answering again from the same runs changes nothing"
