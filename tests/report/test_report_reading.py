"""Reading a run's folder: what is tolerated and noted, and what ends in one clear sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradnorm_grpo.report import print_table, write_report
from gradnorm_grpo.runlog import EvalPoint, read_run
from tests.report.test_report_synthetic import write_synthetic_run


def append(path: Path, *lines: object) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_arrays_hold_what_was_logged(tmp_path: Path) -> None:
    run = read_run(write_synthetic_run(tmp_path, ["gcd", "π/with a slash"], steps=7, prompts=5))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in logged if line["kind"] == "train"]
    assert run.tasks == ["gcd", "π/with a slash"]
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    for task in run.tasks:
        expected = [line.get(f"tasks/{task}/grad_norm_sq") for line in train]
        np.testing.assert_array_equal(run.series[task]["grad_norm_sq"], np.array(expected, dtype=float))
        assert [p.step for p in run.evals[task]] == [0, 7]
    inner = [line.get("tasks/inner_product/gcd/π/with a slash") for line in train]
    np.testing.assert_array_equal(run.inner_products["gcd", "π/with a slash"], np.array(inner, dtype=float))
    assert len(run.warm_start[0]) == 28
    assert not run.finished


def test_a_step_without_a_task_and_nulls_are_nan(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a", "b"], steps=0, evals=False, warm=0)
    append(
        tmp_path,
        {"kind": "train", "step": 1, "tasks/a/sampling_prob": 0.5, "tasks/b/grad_norm_sq": None, "tasks/b/n": 1},
        {"kind": "train", "step": 2, "tasks/a/grad_norm_sq": math.inf},
    )
    run = read_run(tmp_path)
    assert np.isnan(run.series["a"]["grad_norm_sq"]).all()  # infinity cannot be averaged or drawn
    assert np.isnan(run.series["b"]["grad_norm_sq"]).all()
    assert run.series["b"]["n"][0] == 1
    write_report(tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 17, 777])
def test_a_torn_last_line_is_left_out_and_mentioned(tmp_path: Path, keep: int) -> None:
    """Cut at several places, one of them inside a character of two bytes."""
    write_synthetic_run(tmp_path, ["γ"], steps=5, evals=False)
    torn = json.dumps({"kind": "train", "step": 6, "γγ": 1.0, "filler": "x" * 800}, ensure_ascii=False).encode()[:keep]
    if keep == 17:
        torn = '{"kind":"train","γ'.encode()[:-1]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run = read_run(tmp_path)
    assert len(run.steps) == 5
    assert "torn" in run.notes[0]
    assert "is torn, as a killed run leaves it" in write_report(tmp_path).read_text()


def test_a_last_line_without_its_newline_still_counts(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=5, evals=False)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    run = read_run(tmp_path)
    assert len(run.steps) == 5
    assert not any("torn" in note for note in run.notes)


def test_steps_done_again_after_a_resume_replace_the_first_ones(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=7, evals=False, warm=0)
    append(tmp_path, {"kind": "train", "step": 5, "loss": 777.0}, {"kind": "train", "step": 6, "loss": 778.0})
    run = read_run(tmp_path)
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.totals["loss"][-2:].tolist() == [777.0, 778.0]
    assert any("3 logged steps were done again" in note for note in run.notes)


def test_an_unreadable_summary_is_noted_and_the_log_used(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=3)
    (tmp_path / "summary.json").write_text('{"tasks": ')
    run = read_run(tmp_path)
    assert not run.finished
    assert "summary.json cannot be read" in run.notes[0]


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def break_line_two(path: Path) -> None:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (remove("run.json"), FileNotFoundError, "holds no run.json, so it is not a run's folder; give the folder"),
        (write("run.json", '{"tasks": ["a"'), ValueError, "run.json is not valid JSON .*; restore it or run"),
        (write("run.json", "[1]"), ValueError, "must be an object whose 'tasks' lists one or more"),
        (write("run.json", '{"tasks": []}'), ValueError, "lists one or more different names, got \\[\\]"),
        (write("run.json", '{"tasks": ["a", "a"]}'), ValueError, "different names, got \\['a', 'a'\\]"),
        (remove("metrics.jsonl"), FileNotFoundError, "metrics.jsonl is missing: .* run the training again"),
        (break_line_two, ValueError, "line 2 is not valid JSON; remove that line"),
        (
            write("metrics.jsonl", "[1, 2]\n{}\n"),
            ValueError,
            "line 1 must be an object with 'kind' and an integer 'step'",
        ),
        (write("metrics.jsonl", '{"kind": "train"}\n'), ValueError, "an integer 'step', got .*remove that line"),
        (
            write("metrics.jsonl", '{"kind": "train", "step": 1, "tasks/a/reward": "much"}\n'),
            ValueError,
            "line 1: 'tasks/a/reward' must be a number or null, got 'much'",
        ),
        (
            write("metrics.jsonl", '{"kind": "eval", "step": 0, "eval/a/reward": true}\n'),
            ValueError,
            "must be a number or null, got True",
        ),
    ],
)
def test_a_broken_folder_ends_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], words: str
) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=3)
    damage(tmp_path)
    for call in (write_report, print_table):
        with pytest.raises(error, match=words) as raised:
            call(tmp_path)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.html"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere; give the folder"):
        write_report(tmp_path / "nowhere")


def test_an_evaluation_of_nothing_but_failures_still_has_an_error() -> None:
    assert EvalPoint(0, 0.0, 0.0, 20).error == pytest.approx(math.sqrt(1 / 22 * 21 / 22 / 20))
    assert EvalPoint(0, 1.0, 0.0, 20).error == pytest.approx(EvalPoint(0, 0.0, 0.0, 20).error)
    assert EvalPoint(0, 0.5, 0.1, 20).error == 0.1
    assert EvalPoint(0, 3.0, 0.0, 20).error == 0.0  # not a success rate: nothing is known about its spread
