"""What a study measured, as arrays: read from the folders of its runs, or from the one CSV file kept for later."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradnorm_kernels.estimation.metrics import task_key

from ..errors import UserError
from ..runlog import EVAL_METRICS, FULL, LOG_FILE, SUMMARY_FILE, column, read_log, read_run, step_lines
from ..runlog import Run as FinishedRun
from .decision import Decision, read_decision
from .spec import ARM_SETTINGS, FREE
from .stats import Array, pool

Run: TypeAlias = tuple[str, int]  # (arm, seed)
Mask: TypeAlias = NDArray[np.bool_]  # [T]: which steps

_GRADIENT = ("grad_norm_sq", "grad_norm_sq_se", "plug_in", "mean_sq_norm", "pair_weight", "n")
#: What an answer may need of a task's training step; "rollouts" is prompts times completions per prompt.
FIELDS = (
    *("sampling_prob", "loss_weight", "prompts", "rollouts"),
    *("reward", "reward_std", "abs_advantage", "prompt_length", "response_length"),
    *_GRADIENT,
    *(FULL + name for name in _GRADIENT),
)
CSV_FILE = "measurements.csv"  # in the study's folder
_ABOUT = ("arms", "seeds", "tasks", "steps", "gain_window", "layers", "missing")


def run_name(arm: str, seed: int) -> str:
    """What a run is called, in messages and as a folder below runs/."""
    return f"{arm}-seed{seed}"


def run_folder(study: Path, arm: str, seed: int) -> Path:
    """The folder of a run."""
    return study / "runs" / run_name(arm, seed)


def is_finished(run: Path) -> bool:
    """Whether a run's folder holds a whole run: summary.json is written last, after the evaluation at the end."""
    return (run / SUMMARY_FILE).is_file() and (run / LOG_FILE).is_file()


def _nine(value: Any) -> float:
    """A number at the CSV file's nine digits, so that both sources give the same answers; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(f"{value:.9g}")


@dataclass
class _Run:
    """One run: ``series[field]`` is [K, T]; ``evals[kind][step][field]`` is [K]. NaN where nothing was measured."""

    series: dict[str, Array]
    evals: dict[str, dict[int, dict[str, Array]]]

    def put(self, kind: str, step: int, k: int, values: Mapping[str, float]) -> None:
        """Take in one row of the CSV file: what was measured of task k at a step."""
        if kind == "train":
            for name, series in self.series.items():
                series[k, step - 1] = values[name]
            return
        empty = {name: np.full(len(self.series["reward"]), math.nan) for name in EVAL_METRICS}
        point = self.evals.setdefault(kind, {}).setdefault(step, empty)
        for name in EVAL_METRICS:
            point[name][k] = values[name]

    def rows(self) -> Iterator[tuple[str, int, int, dict[str, float]]]:
        """The inverse of :meth:`put`; steps and tasks of which nothing was measured have no row."""
        tasks, steps = self.series["reward"].shape
        points = [
            (kind, step, self.evals[kind][step]) for kind in sorted(self.evals) for step in sorted(self.evals[kind])
        ]
        points += [("train", t + 1, {name: own[:, t] for name, own in self.series.items()}) for t in range(steps)]
        for kind, step, values in points:
            for k in range(tasks):
                known = {name: float(own[k]) for name, own in values.items() if math.isfinite(own[k])}
                if known:
                    yield kind, step, k, known


@dataclass
class Measurements:
    """All numbers of a study that the answers are computed from.

    ``arms``, ``seeds`` and ``tasks`` are in the study's order, including those whose runs are missing; ``steps`` is T,
    the length of the longest run; ``gain_window`` the s of Gain(t), in steps; ``layers`` what U was measured on.
    ``missing`` names the runs that do not exist or are unfinished, which are left out. ``estimates`` holds the content
    of estimators/seed<seed>.json, one entry per seed; it may be empty. ``decision``: what the study declared before its
    runs, as study.json has it; empty where it declared nothing. ``frozen``: the weights were fixed, and a step is a
    round of prompts. ``proxies``: names of the choices of layers that were measured beside the last attention block.
    """

    arms: list[str]
    seeds: list[int]
    tasks: list[str]
    steps: int
    gain_window: int
    layers: str = "last_attention"
    missing: list[str] = field(default_factory=list)
    decision: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    proxies: list[str] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _runs: dict[Run, _Run] = field(default_factory=dict, repr=False)

    @property
    def runs(self) -> list[Run]:
        """(arm, seed) of every finished run, in the study's order."""
        return [(arm, seed) for arm in self.arms for seed in self.seeds if (arm, seed) in self._runs]

    @property
    def fields(self) -> tuple[str, ...]:
        """FIELDS, and the gradient's numbers of every proxy."""
        return (*FIELDS, *(f"{proxy}_{name}" for proxy in self.proxies for name in _GRADIENT))

    def array(self, arm: str, seed: int, name: str) -> Array:
        """One field of a run, float64 [K, T]: all tasks by all training steps, NaN where not measured."""
        if name not in self.fields:
            raise UserError(f"field must be one of {', '.join(self.fields)}, got {name!r}")
        return self._run(arm, seed).series[name]

    def series(self, arm: str, seed: int, task: str, name: str) -> Array:
        """One field of a task, float64 [T] over the training steps, NaN where not measured."""
        return self.array(arm, seed, name)[self._index(task)]

    def evaluation(self, arm: str, seed: int, task: str, kind: str = "eval") -> tuple[NDArray[np.int64], Array, Array]:
        """Held-out reward of a task: steps int64 [E] ascending, mean reward [E] and its standard error [E]."""
        found, k = self._run(arm, seed).evals.get(kind, {}), self._index(task)
        steps = [step for step in sorted(found) if math.isfinite(found[step]["reward"][k])]
        rewards, errors = ([float(found[step][name][k]) for step in steps] for name in ("reward", "reward_se"))
        return np.array(steps, np.int64), np.array(rewards), np.array(errors)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise UserError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        return self.tasks.index(task)

    def _run(self, arm: str, seed: int) -> _Run:
        if (arm, seed) not in self._runs:
            there = ", ".join(run_name(*run) for run in self.runs) or "no run at all"
            raise UserError(f"the study has no finished run of arm {arm!r} with seed {seed!r}; there is {there}")
        return self._runs[arm, seed]

    @property
    def declared(self) -> Decision:
        """What the study declared before its runs; the defaults, without margins, where it declared nothing."""
        return read_decision(self.decision)

    # Steps and pooled U

    def every_step(self) -> Mask:
        """All steps, as a mask [T]."""
        return np.ones(self.steps, np.bool_)

    def span(self, first: int, end: int) -> Mask:
        """The steps first .. end - 1, counted from 0, as a mask [T]."""
        steps = np.arange(self.steps)
        return np.asarray((steps >= first) & (steps < end))

    def halves(self) -> tuple[Mask, Mask]:
        """Odd and even steps, as two masks [T]: the same quantity twice, from rollouts of its own each time."""
        odd = np.arange(self.steps) % 2 == 0
        return odd, ~odd

    def thirds(self) -> list[tuple[int, int]]:
        """(first, end) of the thirds of training, counted from 0; fewer where there are fewer than three steps.

        At fixed weights there is one window, of all steps.
        """
        count = min(1 if self.frozen else 3, self.steps)
        return [(self.steps * w // count, self.steps * (w + 1) // count) for w in range(count)]

    def pooled(
        self, groups: Sequence[Sequence[Run]], steps: Mask, prefix: str = "", name: str = "grad_norm_sq"
    ) -> tuple[Array, Array]:
        """U [G, K] and its standard error: for each group of runs, their pairs over the chosen steps in one sum.

        ``prefix`` "full_": of all parameters; ``name`` "plug_in": the biased estimate with the same weights.
        """
        found = np.full((2, len(groups), len(self.tasks)), math.nan)
        for g, runs in enumerate(groups):
            fields = (f"{prefix}{field}" for field in (name, "grad_norm_sq_se", "pair_weight"))
            found[:, g] = pool(*(np.concatenate([self.array(*run, f)[:, steps] for run in runs], 1) for f in fields))
        return found[0], found[1]

    def by_run(self, runs: Sequence[Run], steps: Mask, prefix: str = "") -> tuple[Array, Array]:
        """U [R, K] of each run and its errors."""
        return self.pooled([[run] for run in runs], steps, prefix)

    def by_seed(
        self, runs: Sequence[Run], steps: Mask, prefix: str = "", name: str = "grad_norm_sq"
    ) -> tuple[Array, Array]:
        """U [S, K] of each seed, the pairs of its arms in one sum, and its errors."""
        groups = [[run for run in runs if run[1] == seed] for seed in seeds_of(runs)]
        return self.pooled(groups, steps, prefix, name)

    # Files

    @classmethod
    def from_runs(cls, folder: Path | str) -> Measurements:
        """Read study.json and the finished runs: in runs/<arm>-seed<seed>/, else in measurements.csv.

        The file keeps the numbers of a run whose folder is gone, or is on another machine.
        Raises UserError where study.json is missing or is not a study's, or a run's log or measurements.csv cannot be
        read.
        """
        folder = Path(folder)
        study = read_study(folder)
        found, missing = {}, list[Run]()
        for arm in study["arms"]:
            for seed in study["seeds"]:
                place = run_folder(folder, arm, seed)
                if is_finished(place):
                    found[arm, seed] = read_run(place)
                    _refuse_foreign(found[arm, seed], study, arm, seed)
                else:
                    missing.append((arm, seed))
        stored = cls.from_csv(folder / CSV_FILE) if missing and (folder / CSV_FILE).is_file() else None
        kept = [key for key in missing if stored and key in stored._runs]
        lengths = [int(run.steps[-1]) for run in found.values() if len(run.steps)]
        steps = max([*lengths, *([stored.steps] if stored and kept else [])], default=0)
        layers = next((name for run in found.values() if (name := str(run.config.get("tracker_layers", "")))), "")
        made = cls(
            list(study["arms"]),
            list(study["seeds"]),
            [str(task) for task in study["tasks"]],
            steps,
            int(study["gain_window"]),
            layers or (stored.layers if stored and kept else "last_attention"),
            [run_name(*key) for key in missing if key not in kept],
            dict(study.get("decision", {})),
            "frozen" in study,
            list(study.get("frozen", {}).get("proxies", {})),
        )
        if stored and kept:
            made._adopt(stored, kept, folder / CSV_FILE)
        logged = [name for name in FIELDS if name != "rollouts"]
        beside = [name for name in made.fields if name not in FIELDS]
        for key, run in found.items():
            own, group = made._add(key), _nine(run.config.get("num_generations"))
            lines = step_lines(read_log(run.path / LOG_FILE)[0]) if beside else []
            more = {t: {name: column(lines, task_key(t, name)) for name in beside} for t in made.tasks}
            for k, task in enumerate(made.tasks):
                if task not in run.tasks:
                    continue
                for t, step in enumerate(run.steps):
                    values = {name: _nine(float(run.series[task][name][t])) for name in logged}
                    values |= {name: _nine(float(series[t])) for name, series in more[task].items()}
                    own.put("train", int(step), k, {**values, "rollouts": values["prompts"] * group})
                for kind, points in (("eval", run.evals[task]), ("eval_base", run.base[task])):
                    for point in points:
                        numbers = {"reward": point.reward, "reward_se": point.std_error, "n": point.n}
                        own.put(kind, point.step, k, {name: _nine(value) for name, value in numbers.items()})
        return made

    def _adopt(self, stored: Measurements, keys: Sequence[Run], path: Path) -> None:
        """Take in the runs that only the file has."""
        if (stored.tasks, stored.fields) != (self.tasks, self.fields):
            raise UserError(
                f"{path} has other tasks or layers than study.json: put the study's own file back, or delete it and "
                "run its runs again"
            )
        for key in keys:
            run = stored._runs[key]
            more = ((0, 0), (0, self.steps - stored.steps))
            series = {name: np.pad(own, more, constant_values=math.nan) for name, own in run.series.items()}
            self._runs[key] = _Run(series, run.evals)

    def _add(self, key: Run) -> _Run:
        empty = {name: np.full((len(self.tasks), self.steps), math.nan) for name in self.fields}
        return self._runs.setdefault(key, _Run(empty, {}))

    @classmethod
    def from_csv(cls, path: Path | str) -> Measurements:
        """Read what :meth:`write_csv` wrote. Raises UserError where the file is missing or is not such a file.

        It is read by the csv module: pandas fills a row that was cut off with NaN, and this must refuse it.
        """
        path = Path(path)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                first = file.readline()
                if not first.startswith("# "):
                    raise ValueError("its first line does not describe the study")
                made = cls(**json.loads(first[2:]))
                for row in csv.DictReader(file, strict=True):
                    if None in row or None in row.values():
                        raise ValueError(f"row {row} has not as many fields as its header")
                    if row["task"] not in made.tasks:
                        raise ValueError(f"there is no task {row['task']!r} in its first line")
                    names = (*made.fields, "reward_se")
                    values = {name: _nine(float(row[name])) if row[name] else math.nan for name in names}
                    run = made._runs.get((row["arm"], int(row["seed"]))) or made._add((row["arm"], int(row["seed"])))
                    run.put(row["kind"], int(row["step"]), made.tasks.index(row["task"]), values)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; give a study's measurements.csv") from error
        except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
            raise UserError(
                f"{path} is not a measurements.csv: {error}; put the study's own file back, or delete it where "
                "runs/ has every run: it is written again"
            ) from error
        return made

    def write_csv(self, path: Path | str) -> None:
        """One row per (arm, seed, kind, step, task), numbers with nine digits, below a line on the study."""
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            declared: dict[str, Any] = {"decision": self.decision} if self.decision else {}
            declared |= {"frozen": True, "proxies": self.proxies} if self.frozen else {}
            about = {name: getattr(self, name) for name in _ABOUT} | declared
            file.write(f"# {json.dumps(about)}\n")
            columns = ("arm", "seed", "kind", "step", "task", *self.fields, "reward_se")
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            for arm, seed in self.runs:
                for kind, step, k, values in self._runs[arm, seed].rows():
                    written = {name: f"{value:.9g}" for name, value in values.items()}
                    place = {"arm": arm, "seed": seed, "kind": kind, "step": step, "task": self.tasks[k]}
                    writer.writerow({**place, **written})


def seeds_of(runs: Sequence[Run]) -> list[int]:
    """The seeds of runs, each once."""
    return list(dict.fromkeys(seed for _, seed in runs))


def _refuse_foreign(run: FinishedRun, study: Mapping[str, Any], arm: str, seed: int) -> None:
    """Raise UserError where a run's folder holds another run than its place in the study says.

    Compared are the tasks, the seed and the settings that both know; at fixed weights a run has some of its own.
    """
    common = {} if "frozen" in study else study.get("config", {})
    wanted = {key: value for key, value in common.items() if key not in (*FREE, *ARM_SETTINGS)}
    wanted |= {**study["arms"][arm], "seed": seed}
    other = [
        f"{key} {run.config[key]!r:.80}"
        for key, value in wanted.items()
        if key in run.config and run.config[key] not in (value, _number(value))
    ]
    if other or set(run.tasks) - {str(task) for task in study["tasks"]}:
        raise UserError(
            f"{run.path} is not the run that its place in the study says: it has "
            f"{', '.join(other) or 'the tasks ' + ', '.join(run.tasks)}; move it away, or put the study's own run there"
        )


def _number(value: Any) -> Any:
    """The number that YAML reads as text, as it does 1e-4."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_study(folder: Path) -> dict[str, Any]:
    """The content of study.json. Raises UserError where it is missing or is not a study's."""
    path = folder / "study.json"
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"arms": dict, "seeds": list, "tasks": list, "gain_window": int}
        missing = [key for key in kinds if key not in study]
        wrong = [key for key, kind in kinds.items() if key in study and not isinstance(study[key], kind)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a study's folder: its study.json is missing or not readable") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: start the study again, it continues where it stopped")
    if wrong:
        raise UserError(
            f"{path} is not a study's: {wrong[0]} is {study[wrong[0]]!r:.80}; put the study's own file back"
        )
    return dict(study)
