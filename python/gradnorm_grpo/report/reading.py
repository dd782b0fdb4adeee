"""Reads a run's folder (run.json, metrics.jsonl, summary.json) into one typed object, or says in one sentence why not.

metrics.jsonl is the truth; summary.json is what the training loop made of it at the end. A run that was killed has no
summary and may end in half a line: both are tolerated and noted, since the finished part is still worth reading.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

TASK_METRICS = (
    "grad_norm_sq",
    "grad_norm_sq_se",
    "noise_scale",
    "plug_in",
    "mean_sq_norm",
    "n",
    "pair_weight",
    "reward",
    "reward_std",
    "abs_advantage",
    "prompt_length",
    "response_length",
    "sampling_prob",
    "learning_gain",
)
STEP_KINDS = ("train", "probe")  # a probe measures like a training step, without the update
STEP_METRICS = ("time", "loss", "grad_norm", "lr", "tokens")


@dataclass(frozen=True)
class EvalPoint:
    """Held-out reward of one task after `step` steps: mean, its standard error and the number of prompts."""

    step: int
    reward: float
    std_error: float
    n: float

    @property
    def error(self) -> float:
        """Standard error, never zero for a reward in [0, 1].

        Twenty failures out of twenty have a sample variance of zero, yet do not prove a success rate of zero: there the
        error is sqrt(p (1 - p) / n) with one success and one failure added, p = (n r + 1) / (n + 2).
        """
        if self.std_error == 0 and self.n > 0 and 0 <= self.reward <= 1:
            p = (self.n * self.reward + 1) / (self.n + 2)
            return math.sqrt(p * (1 - p) / self.n)
        return self.std_error


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it. Every array is float64 of length len(steps), NaN where nothing was logged."""

    path: Path
    info: dict[str, Any]
    tasks: list[str]
    steps: Array
    totals: dict[str, Array]  # STEP_METRICS
    series: dict[str, dict[str, Array]]  # task -> TASK_METRICS
    inner_products: dict[tuple[str, str], Array]  # (a, b), a before b in `tasks`
    cosines: dict[tuple[str, str], Array]
    evals: dict[str, list[EvalPoint]]  # task -> points, ascending in step
    base: dict[str, list[EvalPoint]]  # task -> the model as it was given, before the warm start: one point or none
    warm_start: tuple[Array, Array]  # steps, loss
    summary: dict[str, Any] | None
    probe: bool  # measured step after step with the weights left alone
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the training loop reached its end and wrote its summary."""
        return self.summary is not None


def read_run(run_dir: Path | str) -> Run:
    """Load a run's folder.

    Arguments: run_dir, the folder that train_grpo.py wrote (it holds run.json and metrics.jsonl).
    Returns: a Run. A missing summary.json, a torn last line and steps logged twice by a resumed run end up in `notes`.
    Raises: FileNotFoundError if the folder or one of the two files is missing; ValueError if one cannot be understood.
    """
    path = Path(run_dir)
    info = _read_info(path)
    tasks = [str(task) for task in info["tasks"]]
    notes: list[str] = []
    lines = _read_metrics(path / "metrics.jsonl", notes)
    train = _train_lines(lines, notes)
    summary = _read_summary(path / "summary.json", notes)
    probe = any(line["kind"] == "probe" for _, line in train)
    config = info.get("config")
    limit, wanted = (config.get(key) if isinstance(config, dict) else None for key in ("max_minutes", "max_steps"))
    if summary is not None and limit and train and isinstance(wanted, int) and train[-1][1]["step"] < wanted:
        notes.append(f"max_minutes {limit} ended the run after {train[-1][1]['step']} of {wanted} steps.")
    if probe:
        notes.append("A probe: the model was measured, not trained, so rewards early and late differ by chance alone.")

    def column(key: str) -> Array:
        return np.array([_number(line, key, number, path) for number, line in train], dtype=np.float64)

    pairs = [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    return Run(
        path=path,
        info=info,
        tasks=tasks,
        steps=column("step"),
        totals={key: column(key) for key in STEP_METRICS},
        series={task: {key: column(f"tasks/{task}/{key}") for key in TASK_METRICS} for task in tasks},
        inner_products={(a, b): column(f"tasks/inner_product/{a}/{b}") for a, b in pairs},
        cosines={(a, b): column(f"tasks/cosine/{a}/{b}") for a, b in pairs},
        evals=_eval_points(lines, tasks, path, "eval"),
        base=_eval_points(lines, tasks, path, "eval_base"),
        warm_start=_warm_start(lines, path),
        summary=summary,
        probe=probe,
        notes=notes,
    )


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"run_dir: there is no folder {path}; give the folder that train_grpo.py wrote")
    file = path / "run.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"run_dir: {path} holds no run.json, so it is not a run's folder; give the folder that train_grpo.py wrote"
        )
    try:
        info = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it or run the training again") from None
    tasks = info.get("tasks") if isinstance(info, dict) else None
    if not isinstance(tasks, list) or not tasks or len(set(map(str, tasks))) < len(tasks):
        raise ValueError(f"{file} must be an object whose 'tasks' lists one or more different names, got {tasks!r:.80}")
    return dict(info)


def _read_metrics(file: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line of the log; the last may be torn, since a killed process stops mid-write."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: nothing was logged there; run the training again")
    raw = [(number, line) for number, line in enumerate(file.read_bytes().split(b"\n"), start=1) if line.strip()]
    lines = []
    for number, text in raw:
        try:
            line = json.loads(text)
        except ValueError:  # also what undecodable bytes raise
            if number == raw[-1][0]:
                notes.append(
                    f"The last line of metrics.jsonl ({number}) is torn, as a killed run leaves it, and left out."
                )
                continue
            raise ValueError(f"{file}, line {number} is not valid JSON; remove that line to read the rest") from None
        if not isinstance(line, dict) or "kind" not in line or not isinstance(line.get("step"), int):
            raise ValueError(
                f"{file}, line {number} must be an object with 'kind' and an integer 'step', got {text[:60]!r}; "
                "give a log written by train_grpo.py or remove that line"
            )
        lines.append((number, line))
    return lines


def _train_lines(lines: list[tuple[int, dict[str, Any]]], notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The train lines that count: a resumed run repeats steps, and its later lines replace the earlier."""
    kept: list[tuple[int, dict[str, Any]]] = []
    dropped = 0
    for number, line in lines:
        if line["kind"] not in STEP_KINDS:
            continue
        while kept and kept[-1][1]["step"] >= line["step"]:
            kept.pop()
            dropped += 1
        kept.append((number, line))
    if dropped:
        notes.append(f"The run was resumed: {dropped} logged steps were done again, and only the later ones are used.")
    return kept


def _read_summary(file: Path, notes: list[str]) -> dict[str, Any] | None:
    if not file.is_file():
        notes.append("The run is unfinished: there is no summary.json, so every number here comes from metrics.jsonl.")
        return None
    try:
        summary = json.loads(file.read_bytes())
        if not isinstance(summary, dict) or not isinstance(summary.get("tasks"), dict):
            raise ValueError("no object named 'tasks'")
    except ValueError as error:
        notes.append(f"summary.json cannot be read ({error}); every number here comes from metrics.jsonl.")
        return None
    return summary


def _number(line: dict[str, Any], key: str, number: int, path: Path) -> float:
    value = line.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{path / 'metrics.jsonl'}, line {number}: {key!r} must be a number or null, got {value!r:.60}; "
            "correct or remove that line"
        )
    # An infinite value cannot be drawn or averaged; to the reader it is as unknown as a missing one.
    return float(value) if math.isfinite(value) else math.nan


def _eval_points(
    lines: list[tuple[int, dict[str, Any]]], tasks: list[str], path: Path, kind: str
) -> dict[str, list[EvalPoint]]:
    points: dict[str, dict[int, EvalPoint]] = {task: {} for task in tasks}
    for number, line in lines:
        if line["kind"] != kind:
            continue
        for task in tasks:
            reward, error, n = (
                _number(line, f"eval/{task}/{key}", number, path) for key in ("reward", "reward_se", "n")
            )
            if math.isfinite(reward):
                points[task][line["step"]] = EvalPoint(line["step"], reward, error, n)
    return {task: [by_step[step] for step in sorted(by_step)] for task, by_step in points.items()}


def _warm_start(lines: list[tuple[int, dict[str, Any]]], path: Path) -> tuple[Array, Array]:
    losses = {
        line["step"]: _number(line, "loss", number, path) for number, line in lines if line["kind"] == "warm_start"
    }
    steps = sorted(losses)
    return np.array(steps, dtype=np.float64), np.array([losses[step] for step in steps], dtype=np.float64)
