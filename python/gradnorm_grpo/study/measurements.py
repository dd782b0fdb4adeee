"""What a study measured, as arrays: read from the folders of its runs, or from the one CSV file kept for later."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..runlog import Line, read_info, read_log

Array: TypeAlias = NDArray[np.float64]

#: What a training step logs of a task and an answer may need; "rollouts" is prompts times completions a prompt.
FIELDS = (
    *("sampling_prob", "loss_weight", "prompts", "rollouts"),
    *("reward", "reward_std", "abs_advantage", "prompt_length", "response_length"),
    *("grad_norm_sq", "grad_norm_sq_se", "plug_in", "mean_sq_norm", "pair_weight", "n"),
    *("full_grad_norm_sq", "full_grad_norm_sq_se", "full_plug_in", "full_mean_sq_norm", "full_pair_weight", "full_n"),
)
EVAL_FIELDS = ("reward", "reward_se", "n")
EVAL_KINDS = ("eval_base", "eval")  # the model as it was given; the trained one, at step 0 after the warm start
STEP_KINDS = ("train", "probe")
_KEYS = ("arm", "seed", "kind", "step", "task")
_COLUMNS = (*_KEYS, *FIELDS, "reward_se")


def _number(value: Any) -> float:
    """A number at the CSV file's nine digits, so that both sources give the same answers; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(f"{value:.9g}")


@dataclass
class _Run:
    """One run: ``series[field]`` is [K, T]; ``evals[kind][step][field]`` is [K]. NaN where nothing was measured."""

    series: dict[str, Array]
    evals: dict[str, dict[int, dict[str, Array]]]


@dataclass
class Measurements:
    """All numbers of a study that the answers are computed from.

    ``arms``, ``seeds`` and ``tasks`` are in the study's order, also those whose runs are missing; ``steps`` is T, the
    length of the longest run; ``gain_window`` the s of Gain(t), in steps; ``layers`` what U was measured on.
    ``missing`` names the runs that are not there or not finished, which are left out.
    """

    arms: list[str]
    seeds: list[int]
    tasks: list[str]
    steps: int
    gain_window: int
    layers: str = "last_attention"
    missing: list[str] = field(default_factory=list)
    _runs: dict[tuple[str, int], _Run] = field(default_factory=dict, repr=False)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run that is there, in the study's order."""
        return [(arm, seed) for arm in self.arms for seed in self.seeds if (arm, seed) in self._runs]

    def array(self, arm: str, seed: int, name: str) -> Array:
        """One field of a run, float64 [K, T]: all tasks by all training steps, NaN where not measured."""
        return self._runs[self._known(arm, seed)].series[_field(name)]

    def series(self, arm: str, seed: int, task: str, name: str) -> Array:
        """One field of a task, float64 [T] over the training steps, NaN where not measured."""
        return self.array(arm, seed, name)[self._index(task)]

    def evaluation(self, arm: str, seed: int, task: str, kind: str = "eval") -> tuple[NDArray[np.int64], Array, Array]:
        """Held-out reward of a task: steps int64 [E] ascending, mean reward [E] and its standard error [E]."""
        found, k = self._runs[self._known(arm, seed)].evals.get(kind, {}), self._index(task)
        steps = [step for step in sorted(found) if math.isfinite(found[step]["reward"][k])]
        rewards, errors = ([float(found[step][name][k]) for step in steps] for name in ("reward", "reward_se"))
        return np.array(steps, np.int64), np.array(rewards), np.array(errors)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise UserError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        return self.tasks.index(task)

    def _known(self, arm: str, seed: int) -> tuple[str, int]:
        if (arm, seed) not in self._runs:
            there = ", ".join(f"{a}-seed{s}" for a, s in self.runs) or "no run at all"
            raise UserError(f"the study has no finished run of arm {arm!r} with seed {seed!r}; there is {there}")
        return arm, seed

    @classmethod
    def from_runs(cls, folder: Path | str) -> Measurements:
        """Read study.json and the finished runs in runs/<arm>-seed<seed>/.

        Raises UserError where study.json is missing or is not a study's, or a run's log cannot be read.
        """
        folder = Path(folder)
        study = read_study(folder)
        found: dict[tuple[str, int], tuple[list[Line], float]] = {}
        missing, layers = [], ""
        for arm in study["arms"]:
            for seed in study["seeds"]:
                place = folder / "runs" / f"{arm}-seed{seed}"
                # summary.json is written last: without it a run has no evaluation at its end.
                if not (place / "summary.json").is_file() or not (place / "metrics.jsonl").is_file():
                    missing.append(place.name)
                    continue
                config = read_info(place).get("config", {})
                layers = layers or str(config.get("tracker_layers", ""))
                found[arm, seed] = read_log(place / "metrics.jsonl")[0], _number(config.get("num_generations"))
        made = cls(
            list(study["arms"]),
            list(study["seeds"]),
            [str(task) for task in study["tasks"]],
            max(
                (line["step"] for lines, _ in found.values() for line in lines if line["kind"] in STEP_KINDS), default=0
            ),
            int(study["gain_window"]),
            layers or "last_attention",
            missing,
        )
        for run, (lines, group) in found.items():
            made._runs[run] = _run_of(made._rows(lines, group), made.tasks, made.steps)
        return made

    def _rows(self, lines: Sequence[Line], group: float) -> list[dict[str, Any]]:
        """The lines of a log as rows of the CSV file."""
        rows: list[dict[str, Any]] = []
        for line in lines:
            train = line["kind"] in STEP_KINDS
            if not train and line["kind"] not in EVAL_KINDS:
                continue
            for task in self.tasks:
                names, key = (FIELDS, f"tasks/{task}") if train else (EVAL_FIELDS, f"eval/{task}")
                row = {name: _number(line.get(f"{key}/{name}")) for name in names}
                if train:
                    row["rollouts"] = row["prompts"] * group
                rows.append({"kind": "train" if train else line["kind"], "step": line["step"], "task": task, **row})
        return rows

    @classmethod
    def from_csv(cls, path: Path | str) -> Measurements:
        """Read what :meth:`write_csv` wrote. Raises UserError where the file is missing or is not such a file."""
        path = Path(path)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                first = file.readline()
                if not first.startswith("# "):
                    raise ValueError("its first line does not describe the study")
                made = cls(**json.loads(first[2:]))
                rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
                for row in csv.DictReader(file, strict=True):
                    if None in row or None in row.values():
                        raise ValueError(f"row {row} has not as many fields as its header")
                    if row["task"] not in made.tasks:
                        raise ValueError(f"there is no task {row['task']!r} in its first line")
                    numbers = {
                        name: _number(float(row[name])) if row[name] else math.nan for name in (*FIELDS, "reward_se")
                    }
                    place = {"kind": row["kind"], "step": int(row["step"]), "task": row["task"]}
                    rows.setdefault((row["arm"], int(row["seed"])), []).append({**place, **numbers})
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; give a study's measurements.csv") from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is not a measurements.csv: {error}; write it again from the runs") from error
        for run, own in rows.items():
            made._runs[run] = _run_of(own, made.tasks, made.steps)
        return made

    def write_csv(self, path: Path | str) -> None:
        """One row per (arm, seed, kind, step, task), numbers with nine digits, below a line on the study."""
        about = {
            name: getattr(self, name)
            for name in ("arms", "seeds", "tasks", "steps", "gain_window", "layers", "missing")
        }
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            file.write(f"# {json.dumps(about)}\n")
            writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            for arm, seed in self.runs:
                for row in _rows_of(self._runs[arm, seed], self.tasks):
                    written = {key: f"{value:.9g}" if isinstance(value, float) else value for key, value in row.items()}
                    writer.writerow({"arm": arm, "seed": seed, **written})


def _field(name: str) -> str:
    if name not in FIELDS:
        raise UserError(f"field must be one of {', '.join(FIELDS)}, got {name!r}")
    return name


def read_study(folder: Path) -> dict[str, Any]:
    """The content of study.json. Raises UserError where it is missing or is not a study's."""
    path = folder / "study.json"
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("arms", "seeds", "tasks", "gain_window") if key not in study]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a study's folder: its study.json is missing or not readable") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: start the study again, it goes on where it stopped")
    return dict(study)


def _run_of(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], steps: int) -> _Run:
    place = {task: k for k, task in enumerate(tasks)}
    run = _Run({name: np.full((len(tasks), steps), math.nan) for name in FIELDS}, {})
    for row in rows:
        k, step = place[row["task"]], row["step"]
        if row["kind"] == "train":
            for name in FIELDS:
                run.series[name][k, step - 1] = row[name]
        else:
            point = run.evals.setdefault(row["kind"], {}).setdefault(
                step, {name: np.full(len(tasks), math.nan) for name in EVAL_FIELDS}
            )
            for name in EVAL_FIELDS:
                point[name][k] = row[name]
    return run


def _rows_of(run: _Run, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The inverse of :func:`_run_of`; steps and tasks of which nothing was measured have no row."""
    rows: list[dict[str, Any]] = []

    def add(kind: str, step: int, k: int, values: Mapping[str, float]) -> None:
        known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if known:
            rows.append({"kind": kind, "step": step, "task": tasks[k], **known})

    for kind, points in sorted(run.evals.items()):
        for step, values in sorted(points.items()):
            for k in range(len(tasks)):
                add(kind, step, k, {name: values[name][k] for name in EVAL_FIELDS})
    for t in range(next(iter(run.series.values())).shape[1]):
        for k in range(len(tasks)):
            add("train", t + 1, k, {name: run.series[name][k, t] for name in FIELDS})
    return rows
