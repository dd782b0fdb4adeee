"""The study's measurements: read from run folders and from the CSV file, with the same answers from both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.study.measurements import FIELDS, Measurements
from gradnorm_grpo.study.questions import answer
from tests.study.study_planted import planted, write_runs


def study(seed: int = 0) -> Measurements:
    """A small study with holes: a task not drawn for some steps, a full measurement every third step only."""
    m = planted(np.random.default_rng(seed), [3, 1, 0.7, 0.4, 0.2], full=[30, 9, 6, 5, 1], gains=[0.1, 0, 0.2, 0, 0.1])
    for run in m.runs:
        m.array(*run, "grad_norm_sq")[2, 4:9] = math.nan
        for name in FIELDS:
            if name.startswith("full_"):
                m.array(*run, name)[:, np.arange(m.steps) % 3 > 0] = math.nan
    return m


def test_runs_and_csv_give_the_same_numbers_and_the_same_answers(tmp_path: Path) -> None:
    planned = study()
    write_runs(planned, tmp_path)
    read = Measurements.from_runs(tmp_path)
    read.write_csv(tmp_path / "measurements.csv")
    again = Measurements.from_csv(tmp_path / "measurements.csv")
    assert (again.arms, again.seeds, again.tasks, again.steps) == (planned.arms, planned.seeds, planned.tasks, 30)
    assert (again.gain_window, again.layers, again.missing) == (5, "last_attention", [])
    assert again.runs == read.runs == planned.runs
    for run in planned.runs:
        for name in FIELDS:
            np.testing.assert_array_equal(read.array(*run, name), again.array(*run, name))
            np.testing.assert_allclose(again.array(*run, name), planned.array(*run, name), rtol=1e-8)
        for task in planned.tasks:
            for one, two in zip(read.evaluation(*run, task), again.evaluation(*run, task), strict=True):
                np.testing.assert_array_equal(one, two)
            for one, two in zip(read.evaluation(*run, task), planned.evaluation(*run, task), strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-8)
    assert json.dumps(answer(read)) == json.dumps(answer(again))
    again.write_csv(tmp_path / "twice.csv")
    assert (tmp_path / "twice.csv").read_bytes() == (tmp_path / "measurements.csv").read_bytes()


def test_values_are_those_of_the_log(tmp_path: Path) -> None:
    planned = study()
    write_runs(planned, tmp_path)
    log = (tmp_path / "runs/proportional-seed2/metrics.jsonl").read_text().splitlines()
    line = next(found for text in log if (found := json.loads(text))["kind"] == "train" and found["step"] == 7)
    read = Measurements.from_runs(tmp_path)
    logged = line["tasks/reverse/grad_norm_sq"]
    assert read.series("proportional", 2, "reverse", "grad_norm_sq")[6] == pytest.approx(logged, rel=1e-8)
    assert read.series("proportional", 2, "reverse", "rollouts")[6] == 8 * 8
    assert math.isnan(read.series("proportional", 2, "sort", "grad_norm_sq")[6])
    steps, rewards, errors = read.evaluation("proportional", 2, "reverse")
    assert steps.tolist() == [0, 15, 30] and len(rewards) == len(errors) == 3


def test_runs_that_are_missing_or_unfinished_are_named(tmp_path: Path) -> None:
    write_runs(study(), tmp_path)
    (tmp_path / "runs/uniform-seed2/summary.json").unlink()
    (tmp_path / "runs/proportional-seed3/metrics.jsonl").unlink()
    read = Measurements.from_runs(tmp_path)
    assert read.missing == ["uniform-seed2", "proportional-seed3"]
    assert ("uniform", 2) not in read.runs and len(read.runs) == 4
    assert read.seeds == [1, 2, 3]
    read.write_csv(tmp_path / "m.csv")
    assert Measurements.from_csv(tmp_path / "m.csv").missing == read.missing
    assert answer(read)["missing"] == read.missing


def test_a_run_whose_folder_is_gone_is_read_from_the_csv(tmp_path: Path) -> None:
    planned = study()
    write_runs(planned, tmp_path)
    whole = Measurements.from_runs(tmp_path)
    whole.write_csv(tmp_path / "measurements.csv")
    before = (tmp_path / "measurements.csv").read_bytes()
    shutil.rmtree(tmp_path / "runs/uniform-seed2")
    (tmp_path / "runs/proportional-seed3/summary.json").unlink()
    read = Measurements.from_runs(tmp_path)
    assert read.missing == [] and read.runs == whole.runs and json.dumps(answer(read)) == json.dumps(answer(whole))
    read.write_csv(tmp_path / "measurements.csv")
    assert (tmp_path / "measurements.csv").read_bytes() == before
    log = tmp_path / "runs/uniform-seed1/metrics.jsonl"  # a run there counts, whatever the file says of it
    log.write_text(log.read_text().replace('/reward": ', '/reward": 1'))
    assert json.dumps(answer(Measurements.from_runs(tmp_path))) != json.dumps(answer(whole))
    header, rows = before.decode().split("\n", 1)
    (tmp_path / "measurements.csv").write_text(
        header.replace("reverse", "other") + "\n" + rows.replace("reverse", "other")
    )
    with pytest.raises(UserError, match="has other tasks or layers than study.json"):
        Measurements.from_runs(tmp_path)


def test_runs_from_the_csv_may_be_shorter_than_those_beside_it(tmp_path: Path) -> None:
    write_runs(study(), tmp_path)
    Measurements.from_runs(tmp_path).write_csv(tmp_path / "measurements.csv")
    shutil.rmtree(tmp_path / "runs/uniform-seed2")
    log = tmp_path / "runs/uniform-seed1/metrics.jsonl"
    last = json.loads([line for line in log.read_text().splitlines() if json.loads(line)["kind"] == "train"][-1])
    with log.open("a") as file:
        file.write(json.dumps({**last, "step": last["step"] + 1}) + "\n")
    read = Measurements.from_runs(tmp_path)
    assert read.steps == 31 and read.array("uniform", 2, "reward").shape[1] == 31
    assert np.isnan(read.array("uniform", 2, "reward")[:, 30]).all()
    assert np.isfinite(read.array("uniform", 1, "reward")[:, 30]).any()


@pytest.mark.parametrize(
    ("run", "study_config", "message"),
    [
        ({"seed": 7}, {}, "it has seed 7"),
        ({"sampling_strategy": "inverse"}, {}, "it has sampling_strategy 'inverse'"),
        ({"learning_rate": 0.5}, {"learning_rate": 0.1}, "it has learning_rate 0.5"),
    ],
)
def test_a_run_of_another_study_is_refused(
    tmp_path: Path, run: dict[str, object], study_config: dict[str, object], message: str
) -> None:
    write_runs(study(), tmp_path)
    about = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(about | {"config": {"num_threads": 1, **study_config}}))
    file = tmp_path / "runs" / "proportional-seed2" / "run.json"
    info = json.loads(file.read_text())
    own = {"seed": 2, "sampling_strategy": "proportional", "learning_rate": 0.1, "num_threads": 4}
    file.write_text(json.dumps(info | {"config": info["config"] | own}))
    assert ("proportional", 2) in Measurements.from_runs(tmp_path).runs
    file.write_text(json.dumps(info | {"config": info["config"] | own | run}))
    with pytest.raises(UserError, match=message):
        Measurements.from_runs(tmp_path)
    file.write_text(json.dumps(info | {"tasks": [*info["tasks"], "another"]}))
    with pytest.raises(UserError, match="it has the tasks .*another"):
        Measurements.from_runs(tmp_path)


def test_names_that_need_quoting_survive(tmp_path: Path) -> None:
    planned = study()
    planned.tasks[0] = 'a "b", c\nd\u2028e'
    planned.write_csv(tmp_path / "m.csv")
    again = Measurements.from_csv(tmp_path / "m.csv")
    assert again.tasks == planned.tasks
    mine, theirs = (m.series("uniform", 1, planned.tasks[0], "grad_norm_sq") for m in (planned, again))
    np.testing.assert_allclose(theirs, mine, rtol=1e-8)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a study's folder"):
        Measurements.from_runs(tmp_path)
    (tmp_path / "study.json").write_text('{"arms": {}, "seeds": []}')
    with pytest.raises(UserError, match="lacks tasks, gain_window"):
        Measurements.from_runs(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        Measurements.from_csv(tmp_path / "none.csv")
    for wrong in ('{"arms": 5, "seeds": [], "tasks": [], "gain_window": 1}', '{"arms": {}, "seeds": null, "tasks": []'):
        (tmp_path / "study.json").write_text(wrong)
        with pytest.raises(UserError, match="arms is 5|not a study's folder"):
            Measurements.from_runs(tmp_path)
    planned = study()
    planned.write_csv(tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text()
    for broken in ("", "arm,seed\n", text.replace("reverse", "other", 1), text[: len(text) // 2], text + "uniform,1\n"):
        (tmp_path / "broken.csv").write_text(broken)
        with pytest.raises(UserError, match="not a measurements.csv"):
            Measurements.from_csv(tmp_path / "broken.csv")
    with pytest.raises(UserError, match=r"no finished run of arm 'uniform' with seed 9; there is uniform-seed1"):
        planned.series("uniform", 9, "copy", "reward")
    with pytest.raises(UserError, match="task must be one of copy"):
        planned.series("uniform", 1, "cppy", "reward")
    with pytest.raises(UserError, match="field must be one of"):
        planned.series("uniform", 1, "copy", "rewrad")
