"""Requests, data and folders that would give a wrong number, or lose data, without a word: each is refused by name."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from gradnorm_grpo import cli
from gradnorm_grpo.checkpoint import checkpoints, fault, set_newer_aside
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.folder import new_folder
from gradnorm_grpo.parse import parse_settings, read_yaml
from gradnorm_grpo.rollout import Prompter
from gradnorm_grpo.runlog import RunLog, check_names, only_writer, read_run
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_tokenizer
from tests.app.test_app_objective import _batch, _loop, _rewards, _settings


def _rows(path: Path, *answers: Any) -> dict[str, Any]:
    """A task of JSON lines with these answers."""
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return {"name": "t", "source": "jsonl", "path": str(path), "verifier": "numeric"}


# Settings


@pytest.mark.parametrize("name", [spec for spec, kind in Settings.__annotations__.items() if kind.startswith("float")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} must .*, got {value}"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("top_p", 5.0, "a finite number above 0 and at most 1"),
        ("top_p", 0.0, "a finite number above 0"),
        ("top_k", -1, "at least 0"),
        ("epsilon_high", -0.1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("adam_beta1", 1.0, "at least 0.0 and below 1"),
        ("adam_beta2", -0.1, "at least 0"),
        ("adam_epsilon", -1e-8, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295"),
        ("learning_rate", 0.0, "a finite number above 0"),
        ("temperature", -1.0, "a finite number above 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(name: str, value: float, wanted: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be .*{wanted}.*, got {value}"):
        Settings(**{name: value})


@pytest.mark.parametrize("text", ["seed: 1\nmodel: tiny\nseed: 2\n", "tasks:\n- {name: a, config: {low: 1, low: 2}}\n"])
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="the key '(seed|low)' is there twice"):
        read_yaml(tmp_path / "c.yaml")


def test_a_key_that_overrides_a_merged_one_is_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


# Tasks


@pytest.mark.parametrize("name", [1, True, 2.5, ["a"], " "])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, name: object) -> None:
    task = {"name": name, "source": "synthetic", "dataset": "copy"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"prompt_template": "{question}", "tasks": [task]}))
    with pytest.raises(UserError, match="name must be text, got"):
        parse_settings(["--config", str(tmp_path / "c.yaml")])


def test_names_whose_numbers_would_share_a_key_are_refused() -> None:
    check_names(["a", "b/c", "a/b", "d"])
    with pytest.raises(UserError, match="'a', 'b/c' and 'a/b', 'c' would both log 'tasks/cosine/a/b/c'"):
        check_names(["a", "b/c", "a/b", "c"])
    with pytest.raises(UserError, match="'cosine/x' and 'x', 'reward' would both log 'tasks/cosine/x/reward'"):
        check_names(["x", "reward", "cosine/x"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rewrite": [" +", ""]}, "rewrite .* pairs: got ' \\+'"),
        ({"rewrite": ["co", "xy"]}, "rewrite .* pairs: got 'co'"),
        ({"rewrite": [["a", 1]]}, "rewrite .* pairs"),
        ({"rewrite": [["a", "\\2"]]}, "rewrite .* pairs: invalid group"),
        ({"rewrite": "ab"}, "rewrite .* pairs, got 'ab'"),
        ({"config": [1]}, "config .* must be a mapping"),
        ({"verifier": ["exact"]}, "verifier .* must be text"),
        ({"config": {"low": 5, "high": 2}}, "config .* does not fit 'copy'"),
        ({"config": {"low": 1.5}}, "config .* does not fit 'copy'"),
        ({"dataset": "maximum", "config": {"low": 0, "high": 0}}, "config .* does not fit 'maximum'"),
        ({"dataset": "swap", "config": {"low": 1}}, "low must be at least 2, got 1"),
        ({"source": "datasets", "path": "x.csv", "skip_bad_rows": "no"}, "skip_bad_rows .* must be true or false"),
        ({"source": "datasets", "path": 5}, "path .* must be text, got 5"),
        ({"name": "gcd", "source": "reasoning_gym", "template": 5}, "template .* must be text, got 5"),
    ],
)
def test_an_entry_that_would_be_misread_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tasks([{"name": "copy", "source": "synthetic", **entry}], 0, 1)


def test_null_in_an_entry_is_the_default() -> None:
    entry = {"name": "copy", "source": "synthetic", "config": None, "rewrite": None, "verifier": None}
    same = {"name": "copy", "source": "synthetic"}
    assert build_tasks([entry], 0, 1)[0].next_example() == build_tasks([same], 0, 1)[0].next_example()


def test_rows_with_a_single_question_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "q", "answer": 1}\n' * 3)
    task = {"name": "t", "source": "jsonl", "path": str(tmp_path / "d.jsonl"), "verifier": "numeric"}
    with pytest.raises(UserError, match="3 rows with the one question 'q': at least 2 different ones"):
        build_tasks([task], 0, 1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_an_answer_that_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    task = _rows(tmp_path / "d.jsonl", *range(40))
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write(f'{{"prompt": "x", "answer": {value}}}\n')
    with pytest.raises(UserError, match=f"line 41 holds {value} in answer"):
        build_tasks([task], 0, 1)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    answers = [*map(float, range(40)), float(value)]
    pq.write_table(pa.table({"q": [f"q{i}" for i in range(41)], "a": answers}), tmp_path / "d.parquet")
    columns = {"columns": {"prompt": "q", "answer": "a"}, "verifier": "numeric"}
    with pytest.raises(UserError, match=f"row 41 holds {value} in a"):
        build_tasks([{"name": "t", "source": "datasets", "path": str(tmp_path / "d.parquet"), **columns}], 0, 1)


def test_reference_answers_that_nothing_can_match_are_counted(tmp_path: Path) -> None:
    tasks = build_tasks([_rows(tmp_path / "d.jsonl", *range(60), "n/a", *range(60, 90), "unknown")], 3, 1)
    assert tasks[0].unfit == ["n/a", "unknown"]
    settings = _settings(tasks=[{"name": "t"}])
    (remark,) = Prompter(tiny_tokenizer(), tasks, settings).check(tasks)
    assert remark.startswith("task 't': 2 of its reference answers score 0 by its verifier, such as 'n/a'")


def test_a_name_with_brackets_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "[/red] [b]", "source": "synthetic", "dataset": "copy"}
    config = {"model": "tiny", "tiny_layers": 1, "tiny_hidden_size": 32, "num_threads": 1, "tasks": [task]}
    config |= {"prompt_template": "{question} = ", "num_generations": 2, "per_device_train_batch_size": 4}
    config |= {"max_completion_length": 2, "max_steps": 1, "eval_prompts": 0, "save_steps": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "[/o]")]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"run folder: {tmp_path}/[/o]" in said and "[/red] [b] 0.00" in said


# Weights


@pytest.mark.parametrize("share_prompt", ["auto", "false"])
def test_micro_batches_of_a_single_prompt_measure_what_a_whole_one_does(share_prompt: str) -> None:
    found = []
    for rows in (18, 3):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 18 // rows}
        loop = _loop(_settings(loss_type="grpo", share_prompt=share_prompt, **sizes))
        found.append(loop.backward(_batch(loop, _rewards(6, 3)), [], measure=True)[1])
    for task in ("copy", "sort"):
        assert found[1][task].sq_norm == pytest.approx(found[0][task].sq_norm, rel=1e-4)
        assert found[1][task].n == 3


@pytest.mark.parametrize(("group", "rows"), [(2, 2), (2, 4)])
@pytest.mark.parametrize("share_prompt", ["auto", "false"])
def test_few_rows_can_be_measured(share_prompt: str, group: int, rows: int) -> None:
    sizes = {"num_generations": group, "per_device_train_batch_size": rows}
    line = _loop(_settings(loss_type="grpo", share_prompt=share_prompt, **sizes)).step()
    assert sum(line.get(f"tasks/{task}/prompts", 0) for task in ("copy", "sort")) == rows // group


def test_a_gradient_that_is_not_finite_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = _loop(_settings(loss_type="grpo", learning_rate=1e-3))
    before = [p.detach().clone() for p in loop.parameters]
    backward = loop.backward

    def poisoned(*args: Any, **more: Any) -> Any:
        found = backward(*args, **more)
        loop.parameters[0].grad.view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(loop, "backward", poisoned)
    with pytest.raises(UserError, match=r"the gradient of step 1 is not finite .* lower learning_rate=0.001"):
        loop.step()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.parameters, strict=True)) and loop.step_number == 0


def test_weights_that_give_no_probabilities_are_named() -> None:
    loop = _loop(_settings(loss_type="grpo"))
    with torch.no_grad():
        loop.parameters[0].fill_(math.nan)
    with pytest.raises(UserError, match="probabilities that are not finite"):
        loop.step()


# Folders


def test_one_process_writes_a_log_at_a_time(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write({"kind": "train", "step": 1})
    content = log.path.read_bytes()
    for keep in (None, 0):
        with pytest.raises(UserError, match=f"another process is writing into {tmp_path}"):
            RunLog(tmp_path, keep_bytes=keep)
    assert log.path.read_bytes() == content and not (tmp_path / "metrics.superseded.jsonl").exists()
    log.close()
    RunLog(tmp_path).close()


def test_the_lock_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        file = (tmp_path / "log").open("ab")
        only_writer(file, tmp_path)
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    with (tmp_path / "log").open("ab") as file, pytest.raises(UserError, match="another process"):
        only_writer(file, tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with (tmp_path / "log").open("ab") as file:
        only_writer(file, tmp_path)


def test_a_folder_that_may_not_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x/metrics.jsonl")

    monkeypatch.setattr(cli, "_run", denied)
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "Permission denied while opening runs/x/metrics.jsonl" in said and "name another folder" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoint-30"])
def test_a_new_run_does_not_mix_with_what_another_left(tmp_path: Path, left: str) -> None:
    if left == "metrics.jsonl":
        (tmp_path / left).write_text('{"kind": "train", "step": 1}\n')
    else:
        (tmp_path / left).mkdir()
    with pytest.raises(UserError, match="holds checkpoints or a log of a run whose run.json is missing"):
        new_folder(Settings(output_dir=str(tmp_path)), "x")


def test_two_runs_never_take_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # each looks before the other has made its folder
    assert [new_folder(Settings(), "x").name for _ in range(3)] == ["x", "x-2", "x-3"]


def test_checkpoints_of_steps_that_are_done_again_are_set_aside(tmp_path: Path) -> None:
    for step in (2, 10, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in set_newer_aside(tmp_path / "checkpoint-2")] == [
        "checkpoint-10.superseded",
        "checkpoint-30.superseded",
    ]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    (tmp_path / "checkpoint-10").mkdir()
    assert [path.name for path in set_newer_aside(tmp_path / "checkpoint-2")] == ["checkpoint-10.superseded"]


@pytest.mark.parametrize("text", ['{"files": []}', '{"files": {"state.pt": 5}}', '{"files": {}}', "[]", "{"])
def test_a_manifest_that_says_nothing_is_no_intact_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert fault(tmp_path) == "its manifest.json is missing or not readable"


def test_a_log_of_other_tasks_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"tasks": ["a", "x"]}))
    line = {"kind": "train", "step": 1, "tasks/a/sampling_prob": 0.5, "tasks/b/c/sampling_prob": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    notes = read_run(tmp_path).notes
    assert "The log holds tasks that run.json does not name, and they are left out: b/c." in notes


@pytest.mark.parametrize("info", [{"tasks": ["a"]}, {"tasks": ["a"], "config": 5}])
def test_a_run_without_its_settings_is_not_resumed(tmp_path: Path, info: dict[str, Any]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="holds no settings of a run"):
        parse_settings(["--resume", str(tmp_path)])
