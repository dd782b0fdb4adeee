"""The metric schema of a run, and the files that hold it: run.json, metrics.jsonl and summary.json.

Everything that writes or reads these files does it through this module. A line of metrics.jsonl is a JSON object with
``kind``, an integer ``step`` and ``time`` (seconds since the run began)::

    kind               what else the line holds
    train, probe       STEP_METRICS; TASK_METRICS as tasks/<task>/<name>; tasks/<pair metric>/<a>/<b>
    final_probe        the same of all prompts measured at the end, at the weights after ``step`` steps
    plan               PLAN_METRICS: made or changed after ``step`` steps
    eval, eval_base    EVAL_METRICS as eval/<task>/<name>; eval_base: the model as given, before the warm start
    warm_start         loss

Every other value is a number, or null where the number is not defined. The names of gradient metrics come from
:mod:`gradnorm_kernels.estimation.metrics`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradnorm_kernels import TaskGradient
from gradnorm_kernels.estimation.metrics import GRADIENT_FIELDS, PAIR_FIELDS, pair_key, task_key

from .errors import UserError, one_of

Array: TypeAlias = NDArray[np.float64]
Line: TypeAlias = dict[str, Any]

RUN_FILE, LOG_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.json"
STEP_KINDS = ("train", "probe")  # a probe measures like a training step, without the update
EVAL_KINDS = ("eval_base", "eval")  # the model as given; the trained one, at step 0 after the warm start
WARM_START, FINAL_PROBE, PLAN = "warm_start", "final_probe", "plan"

#: Numbers of a whole step, with the label a table or an axis gives them.
STEP_METRICS = {
    "time": "time (s)",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens": "completion tokens",
    "truncated": "share of truncated completions",
    "rollout_seconds": "rollout (s)",
    "update_seconds": "update (s)",
    "peak_memory_bytes": "peak GPU memory (bytes)",
}
FULL = "full_"  # prefix of the gradient metrics of all trained parameters, beside those of the tracked layers
_GRADIENT_LABELS = {
    "grad_norm_sq": "U",
    "grad_norm_sq_se": "standard error of U",
    "noise_scale": "noise scale",
    "plug_in": "plug-in estimate",
    "n": "prompts measured",
    "n_effective": "prompts with a gradient",
    "mean_sq_norm": "mean squared norm per prompt",
    "pair_weight": "weight of the pairs",
}
#: Numbers of one task in one step, with their labels.
TASK_METRICS = {
    "sampling_prob": "sampling probability",
    "loss_weight": "loss weight",
    "prompts": "prompts",
    "reward": "reward",
    "reward_std": "standard deviation of the reward within a group",
    "abs_advantage": "|advantage|",
    "prompt_length": "prompt tokens",
    "response_length": "response tokens",
    "learning_gain": "Gain(t)",
    **_GRADIENT_LABELS,
    **{FULL + name: f"{label}, all parameters" for name, label in _GRADIENT_LABELS.items()},
}
#: Numbers of one task in one evaluation.
EVAL_METRICS = {"reward": "held-out reward", "reward_se": "standard error", "n": "held-out prompts"}

#: Numbers of a plan by time, with their labels.
PLAN_METRICS = {
    "planned_steps": "steps",
    "planned_questions": "held-out questions per task and evaluation",
    "planned_prompts": "prompts per task in the final probe",
    "planned_warm_start": "steps of the warm start",
    "step_seconds": "seconds per step",
    "question_seconds": "seconds per held-out question of every task",
    "prompt_seconds": "seconds per probe prompt of every task",
    "save_seconds": "seconds per checkpoint",
}


# Writing


def task_metrics(task: Hashable, values: Mapping[str, float]) -> Line:
    """One task's numbers of one step by metric key; ``values`` is keyed by names of TASK_METRICS."""
    return {task_key(task, _known(name, TASK_METRICS)): value for name, value in values.items()}


def pair_metrics(a: Hashable, b: Hashable, values: Mapping[str, float]) -> Line:
    """Two tasks' numbers of one step by metric key; ``values`` is keyed by "cosine" and "inner_product"."""
    return {pair_key(_known(name, PAIR_FIELDS), a, b): value for name, value in values.items()}


def eval_metrics(task: Hashable, values: Mapping[str, float]) -> Line:
    """One task's held-out numbers by metric key; ``values`` is keyed by names of EVAL_METRICS."""
    return {f"eval/{task}/{_known(name, EVAL_METRICS)}": value for name, value in values.items()}


def _known(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"metric must be one of {', '.join(names)}, got {name!r}")
    return name


def check_names(tasks: Sequence[str]) -> None:
    """Raise UserError where two numbers of these tasks would have one key, as names with a slash can make them."""
    pairs = itertools.combinations(tasks, 2)
    keys = [(task_key(task, name), (task,)) for task in tasks for name in TASK_METRICS]
    owners: dict[str, tuple[str, ...]] = {}
    for key, owner in [*keys, *((pair_key(name, *pair), pair) for pair in pairs for name in PAIR_FIELDS)]:
        if owners.setdefault(key, owner) != owner:
            said = " and ".join(", ".join(map(repr, names)) for names in (owners[key], owner))
            raise UserError(f"the tasks {said} would both log {key!r}: rename one, without a slash")


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends; an error leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or leave the old one."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, default=str) + "\n", encoding="utf-8")


def check_log(path: Path, keep_bytes: int) -> None:
    """Raise UserError where a log is shorter than it was when a checkpoint was written."""
    size = path.stat().st_size if path.exists() else 0
    if size < keep_bytes:
        raise UserError(
            f"{path} has {size} bytes but the checkpoint was written after {keep_bytes}: it was cut or replaced; start "
            "a new run, or put the file back"
        )


def only_writer(file: IO[bytes], folder: Path) -> None:
    """Lock an open file of a folder until it is closed or the process ends; UserError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process is writing into {folder}: wait until it has ended, stop it, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        return


class RunLog:
    """Appends lines to metrics.jsonl; ``lines`` holds all of them, including those before a resume."""

    def __init__(self, folder: Path, trackers: Sequence[Any] = (), keep_bytes: int | None = None) -> None:
        """``keep_bytes``: continue after that many bytes; what lies beyond moves to metrics.superseded.jsonl."""
        self.path = folder / LOG_FILE
        self._trackers = list(trackers)
        if keep_bytes is not None:
            check_log(self.path, keep_bytes)
        self._file = self.path.open("ab")
        only_writer(self._file, folder)
        if keep_bytes is not None:
            self._cut(keep_bytes)
        self.lines: list[Line] = read_log(self.path)[0]

    def _cut(self, keep_bytes: int) -> None:
        content = self.path.read_bytes()
        if len(content) > keep_bytes:
            with self.path.with_name("metrics.superseded.jsonl").open("ab") as kept:
                kept.write(content[keep_bytes:])
            os.truncate(self.path, keep_bytes)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def write(self, line: Line) -> None:
        """Append one line and flush it. A write that fails (a full disk) leaves the lines before it whole."""
        line = plain(line)
        before = self.size
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError:
            # Drop the torn line: the buffer with the file object, its written part by cutting the file back.
            with contextlib.suppress(OSError):
                self._file.close()
            if self.path.is_file():
                os.truncate(self.path, before)
            raise
        self.lines.append(line)
        for tracker in self._trackers:
            numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
            tracker.log(numbers, step=line["step"])

    def close(self) -> None:
        """Finish the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def report_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """accelerate's trackers by name; one that is asked for and not installed is an error."""
    wanted = [name for name in names if name != "none"]
    if not wanted:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState()  # accelerate's trackers log through its own logger, which needs this state
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in wanted:  # all names before the first tracker starts and writes
        if name not in LOGGER_TYPE_TO_CLASS:
            raise one_of("report_to", name, [*LOGGER_TYPE_TO_CLASS, "none"])
        if name not in available:
            raise UserError(
                f"report_to asks for {name!r}, which is not installed: run `pip install {name}` or leave it out"
            )
    trackers = []
    for name in wanted:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        try:
            tracker = kind(folder.name, **place)
            if hasattr(tracker, "start"):
                tracker.start()
        except Exception as error:  # a login, a server or a disk that is missing: each tracker has errors of its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"report_to: {name!r} could not start ({reason}): fix that or leave it out") from error
        tracker.store_init_configuration(
            {
                key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
                for key, value in config.items()
            }
        )
        trackers.append(tracker)
    return trackers


# Reading


class LogError(UserError, ValueError):
    """A file of a run that cannot be understood."""


class MissingError(UserError, FileNotFoundError):
    """A run's folder, or one of its files, that is not there."""


def read_info(folder: Path) -> dict[str, Any]:
    """The content of run.json; its ``tasks`` are names. Raises MissingError and LogError."""
    if not folder.is_dir():
        raise MissingError(f"run_dir: there is no folder {folder}; give the folder that train_grpo.py wrote")
    file = folder / RUN_FILE
    if not file.is_file():
        raise MissingError(
            f"run_dir: {folder} holds no run.json, so it is not a run's folder; give the folder that train_grpo.py "
            "wrote"
        )
    try:
        info = json.loads(file.read_bytes())
    except ValueError as error:
        raise LogError(f"{file} is not valid JSON ({error}); restore it or run the training again") from None
    tasks = info.get("tasks") if isinstance(info, dict) else None
    if not isinstance(tasks, list) or not tasks or len(set(map(str, tasks))) < len(tasks):
        raise LogError(f"{file} must be an object whose 'tasks' lists one or more different names, got {tasks!r:.80}")
    return dict(info)


def read_log(file: Path) -> tuple[list[Line], int]:
    """The lines of a metrics.jsonl, and the number of a torn last line that is left out, or 0.

    A killed process can stop in the middle of a write, so the last line may be torn. Raises MissingError, and LogError
    for any other line that is not an object of this schema.
    """
    if not file.is_file():
        raise MissingError(f"{file} is missing: nothing was logged there; run the training again")
    raw = [(number, text) for number, text in enumerate(file.read_bytes().split(b"\n"), start=1) if text.strip()]
    lines: list[Line] = []
    for number, text in raw:
        try:
            line = json.loads(text)
        except ValueError:  # also what undecodable bytes raise
            if number == raw[-1][0]:
                return lines, number
            raise LogError(f"{file}, line {number} is not valid JSON; remove that line to read the rest") from None
        if not isinstance(line, dict) or "kind" not in line or not isinstance(line.get("step"), int):
            raise LogError(
                f"{file}, line {number} must be an object with 'kind' and an integer 'step', got {text[:60]!r}; "
                "give a log written by train_grpo.py or remove that line"
            )
        for key, value in line.items():
            number_or_null = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
            if not number_or_null and (key in STEP_METRICS or key.startswith(("tasks/", "eval/"))):
                raise LogError(
                    f"{file}, line {number}: {key!r} must be a number or null, got {value!r:.60}; "
                    "correct or remove that line"
                )
        lines.append(line)
    return lines, 0


def step_lines(lines: Sequence[Line]) -> list[Line]:
    """The training (or probe) steps that count: after a resume, steps done again replace the earlier ones."""
    kept: list[Line] = []
    for line in lines:
        if line["kind"] in STEP_KINDS:
            while kept and kept[-1]["step"] >= line["step"]:
                kept.pop()
            kept.append(line)
    return kept


def column(lines: Sequence[Line], key: str) -> Array:
    """One number of each line, float64 [len(lines)].

    NaN where it is missing, null or infinite: an infinite value can be neither drawn nor averaged.
    """
    values = np.array([math.nan if line.get(key) is None else line[key] for line in lines], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def task_column(lines: Sequence[Line], task: Hashable, name: str) -> Array:
    """One of TASK_METRICS of a task in each line, as :func:`column`."""
    return column(lines, task_key(task, _known(name, TASK_METRICS)))


def pair_column(lines: Sequence[Line], name: str, a: Hashable, b: Hashable) -> Array:
    """The cosine or inner product of two tasks in each line, as :func:`column`; ``a`` comes before ``b`` in the run."""
    return column(lines, pair_key(_known(name, PAIR_FIELDS), a, b))


def task_values(line: Line, task: Hashable) -> Line:
    """One task's numbers in one line, keyed by the names of TASK_METRICS."""
    return {name: line[key] for name in TASK_METRICS if (key := task_key(task, name)) in line}


@dataclass(frozen=True)
class EvalPoint:
    """Held-out reward of one task after ``step`` steps: mean, its standard error and the number of prompts."""

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


def eval_points(lines: Sequence[Line], task: Hashable, kind: str = "eval") -> list[EvalPoint]:
    """A task's evaluations of one of EVAL_KINDS, ascending in step; of two at one step the later."""
    chosen = [line for line in lines if line["kind"] == _known(kind, EVAL_KINDS)]
    columns = [column(chosen, f"eval/{task}/{name}").tolist() for name in EVAL_METRICS]
    points = [EvalPoint(line["step"], *values) for line, *values in zip(chosen, *columns, strict=True)]
    by_step = {point.step: point for point in points if math.isfinite(point.reward)}
    return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True)
class Run:
    """A run's folder as read. Every array is float64 of length len(steps), NaN where nothing was logged."""

    path: Path
    info: dict[str, Any]
    tasks: list[str]
    steps: Array
    totals: dict[str, Array]  # STEP_METRICS
    series: dict[str, dict[str, Array]]  # task -> TASK_METRICS
    inner_products: dict[tuple[str, str], Array]  # (a, b), a before b in `tasks`
    cosines: dict[tuple[str, str], Array]
    evals: dict[str, list[EvalPoint]]  # task -> points, ascending in step
    base: dict[str, list[EvalPoint]]  # task -> the model as given, before the warm start: one point or none
    warm_start: tuple[Array, Array]  # steps, loss
    summary: dict[str, Any] | None
    probe: bool  # measured step after step with the weights left alone
    final_probe: Run | None = None  # what was measured at the end with the weights fixed: one step
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run reached its end and wrote its summary."""
        return self.summary is not None

    @property
    def config(self) -> dict[str, Any]:
        """The settings in run.json."""
        config = self.info.get("config")
        return config if isinstance(config, dict) else {}

    def array(self, name: str) -> Array:
        """One of TASK_METRICS of all tasks, float64 [len(tasks), len(steps)]."""
        return np.array([self.series[task][_known(name, TASK_METRICS)] for task in self.tasks])

    def gradients(self, task: str, prefix: str = "") -> list[TaskGradient]:
        """A task's estimate in each step, NaN where nothing was measured; ``prefix``: "" or FULL."""
        fields = {name: self.series[task][prefix + key] for name, key in GRADIENT_FIELDS.items()}
        found = []
        for values in zip(*fields.values(), strict=True):
            numbers = dict(zip(fields, map(float, values), strict=True))
            n, k = numbers.pop("n"), numbers.pop("n_effective")
            count = int(n) if math.isfinite(n) else 0
            if not math.isfinite(numbers["pair_weight"]):
                # A log without pair weights held whole prompts: n (n - 1) ordered pairs.
                numbers["pair_weight"] = float(count * (count - 1))
            known = int(k) if math.isfinite(k) else None
            found.append(TaskGradient(**numbers, n=count, std_error_method="none", n_effective=known))
        return found


def read_run(run_dir: Path | str) -> Run:
    """Load a run's folder.

    Args:
        run_dir: the folder that train_grpo.py wrote (it holds run.json and metrics.jsonl).

    Returns:
        A Run. A missing summary.json, a torn last line and steps logged twice by a resumed run end up in ``notes``.

    Raises:
        MissingError: (a FileNotFoundError) if the folder or one of the two files is missing.
        LogError: (a ValueError) if one of them cannot be understood.
    """
    path = Path(run_dir)
    info = read_info(path)
    lines, torn = read_log(path / LOG_FILE)
    run = run_of(lines, [str(task) for task in info["tasks"]], path, info)
    steps, notes = step_lines(lines), run.notes
    if torn:
        notes.append(f"The last line of metrics.jsonl ({torn}) is torn, as a killed run leaves it, and left out.")
    if again := sum(line["kind"] in STEP_KINDS for line in lines) - len(steps):
        notes.append(f"The run was resumed: {again} logged steps were done again, and only the later ones are used.")
    end = "/sampling_prob"  # every line of a step has it for every task
    logged = dict.fromkeys(key[len("tasks/") : -len(end)] for line in steps for key in line if key.endswith(end))
    if others := [task for task in logged if task not in run.tasks]:
        notes.append(f"The log holds tasks that run.json does not name, and they are left out: {', '.join(others)}.")
    summary = _read_summary(path / SUMMARY_FILE, notes)
    limit, wanted = run.config.get("max_minutes"), run.config.get("max_steps")
    if summary is not None and limit and steps and isinstance(wanted, int) and steps[-1]["step"] < wanted:
        notes.append(f"max_minutes {limit} ended the run after {steps[-1]['step']} of {wanted} steps.")
    if plans := [line for line in lines if line["kind"] == PLAN]:
        notes.append(_plan_note(plans[-1], run.config))
    if run.probe:
        notes.append("A probe: the model was measured, not trained, so rewards early and late differ by chance alone.")
    last = run.final_probe
    if last is not None and summary is not None:
        last = replace(last, summary=summary.get("final_probe"))
    return replace(run, summary=summary, final_probe=last)


def _plan_note(line: Line, config: dict[str, Any]) -> str:
    """What the last plan left of what the settings asked for."""
    wanted = {
        "planned_warm_start": "warm_start_steps",
        "planned_steps": "max_steps",
        "planned_questions": "eval_prompts",
        "planned_prompts": "final_probe_prompts",
    }
    parts = [
        f"{setting} {line.get(key)} of {config[setting]}" for key, setting in wanted.items() if config.get(setting)
    ]
    return f"plan_minutes {config.get('plan_minutes')} had room for {', '.join(parts)}."


def run_of(lines: Sequence[Line], tasks: Sequence[str], path: Path | None = None, info: Line | None = None) -> Run:
    """The lines of a log as a Run without a summary and without notes; ``path`` and ``info`` are kept in it."""
    steps = step_lines(lines)
    pairs = [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    warm = {line["step"]: line for line in lines if line["kind"] == WARM_START}
    warm_lines = [warm[step] for step in sorted(warm)]
    return Run(
        path=path or Path(),
        info=info or {},
        tasks=list(tasks),
        steps=column(steps, "step"),
        totals={name: column(steps, name) for name in STEP_METRICS},
        series={task: {name: task_column(steps, task, name) for name in TASK_METRICS} for task in tasks},
        inner_products={pair: pair_column(steps, "inner_product", *pair) for pair in pairs},
        cosines={pair: pair_column(steps, "cosine", *pair) for pair in pairs},
        evals={task: eval_points(lines, task) for task in tasks},
        base={task: eval_points(lines, task, "eval_base") for task in tasks},
        warm_start=(column(warm_lines, "step"), column(warm_lines, "loss")),
        summary=None,
        probe=any(line["kind"] == "probe" for line in steps),
        final_probe=_final_probe(lines, tasks),
    )


def _final_probe(lines: Sequence[Line], tasks: Sequence[str]) -> Run | None:
    """The latest final probe as a Run of one step, whose number is that of the steps before it; None without one."""
    found = [line for line in lines if line["kind"] == FINAL_PROBE]
    return run_of([{**found[-1], "kind": "probe"}], tasks) if found else None


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
