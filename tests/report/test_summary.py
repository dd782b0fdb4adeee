"""summary.json and the table of a run: the same numbers, whether they come from the log or from the summary."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from gradnorm_grpo.runlog import plain, read_log, read_run
from gradnorm_grpo.summary import cosines, gain_at, summarize, task_results
from tests.report.test_report_synthetic import NAMES, write_synthetic_run


@pytest.mark.parametrize(("steps", "prompts", "evals"), [(60, 36, True), (7, 3, True), (2, 9, False), (1, 1, True)])
def test_the_summary_holds_what_the_log_says(tmp_path: Path, steps: int, prompts: int, evals: bool) -> None:
    """A finished run's table, from summary.json, is that of the same run before it had one."""
    write_synthetic_run(tmp_path, NAMES[:4], steps=steps, prompts=prompts, evals=evals)
    unfinished = read_run(tmp_path)
    lines, _ = read_log(tmp_path / "metrics.jsonl")
    (tmp_path / "summary.json").write_text(json.dumps(plain(summarize(lines, NAMES[:4], 5, 777.0))))
    finished = read_run(tmp_path)
    assert finished.finished and not unfinished.finished
    before, after = task_results(unfinished), task_results(finished)
    for one, other in zip(before, after, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert a == b or (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, rel=1e-12), field.name
    for pair, cosine in cosines(unfinished, before).items():
        assert cosine.value == pytest.approx(cosines(finished, after)[pair].value, rel=1e-12, nan_ok=True)


def test_every_prompt_counts_also_one_drawn_alone(tmp_path: Path) -> None:
    """A step with one prompt of a task has no U, but n counts it: in the log's table and in summary.json."""
    write_synthetic_run(tmp_path, NAMES[:3], steps=30, prompts=4)
    run = read_run(tmp_path)
    assert any((run.series[task]["n"] == 1).any() for task in run.tasks)
    summary = summarize(read_log(tmp_path / "metrics.jsonl")[0], NAMES[:3], 5, 1.0)
    for result in task_results(run):
        assert result.n == summary["tasks"][result.name]["n"] == np.nansum(run.series[result.name]["n"])


def test_a_task_never_measured_has_no_share_of_the_pull(tmp_path: Path) -> None:
    line = {"kind": "train", "step": 1, "tasks/a/grad_norm_sq": 1.0, "tasks/a/n": 2, "tasks/a/pair_weight": 2.0}
    table = summarize([line], ["a", "b"], 2, 1.0)["tasks"]
    assert table["a"]["pull_share"] == 1.0 and math.isnan(table["b"]["pull_share"])
    assert table["b"]["n"] == 0 and list(table) == ["a", "b"]


def test_an_evaluation_in_the_middle_is_not_that_before_training() -> None:
    evals = [{"kind": "eval", "step": step, "eval/a/reward": 0.1 * step, "eval/a/n": 8} for step in (3, 6)]
    steps = [{"kind": "train", "step": step} for step in range(1, 7)]
    entry = summarize([*steps, *evals], ["a"], 2, 1.0)["tasks"]["a"]
    assert math.isnan(entry["eval_before"])
    assert (entry["eval_after"], entry["eval_n"]) == (pytest.approx(0.6), 8)


def test_the_gain_of_arrays_and_of_lists_is_the_same() -> None:
    rewards = [0.0, None, 1.0, 0.5, None, 0.25]
    array = np.array([math.nan if reward is None else reward for reward in rewards])
    for t in range(len(rewards)):
        assert gain_at(rewards, t, 2) == pytest.approx(gain_at(array, t, 2), nan_ok=True)
