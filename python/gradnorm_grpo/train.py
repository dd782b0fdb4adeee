"""A whole training run: warm start, evaluation, GRPO with checkpoints, summary and report."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from .checkpoint import (
    find_checkpoint,
    load_state,
    random_state,
    restore_random_state,
    save_checkpoint,
    set_newer_aside,
)
from .errors import UserError
from .folder import describe_run, device_name, new_folder, newest_folder
from .loop import Grpo
from .models import load_model
from .numbers import duration
from .plan import Plan, Planner
from .probe import final_probe
from .progress import Display
from .rollout import Prompter, evaluate
from .runlog import (
    FINAL_PROBE,
    LOG_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Line,
    RunLog,
    check_log,
    read_info,
    report_trackers,
    task_column,
    task_metrics,
    write_json,
)
from .settings import Settings
from .summary import gain_at, summarize
from .tasks import build_tasks
from .tasks.rows import data_hashes
from .warm_start import warm_start

REFERENCE_FILE = "reference.safetensors"


class Interruption:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the step; the second stops at once."""

    requested = False

    def __init__(self, grace: float = 0.0) -> None:
        """``grace``: seconds after the first signal in which another counts as a copy of it, as launchers send."""
        self._grace, self._first = grace, 0.0

    @contextmanager
    def watch(self) -> Iterator[Interruption]:
        """Handle the two signals while the block runs."""

        def handle(number: int, frame: Any) -> None:
            if self.requested and time.monotonic() - self._first >= self._grace:
                raise KeyboardInterrupt
            self._first = self._first if self.requested else time.monotonic()
            self.requested = True

        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def remarks(settings: Settings, num_tasks: int, processes: int = 1) -> list[str]:
    """What the settings do to the run and its measurement that their reader should know, a sentence each."""
    found = []
    if settings.dtype == "bfloat16":
        found.append(
            "dtype 'bfloat16' holds the weights in it: an update of less than about 0.2% of a weight is rounded away; "
            "bf16=true keeps float32 weights and has the same fast products"
        )
    if not settings.track:
        return found
    prompts = settings.completions_per_step * processes // settings.num_generations
    least = prompts * settings.sampling_floor / num_tasks
    if settings.sampling_strategy != "uniform" and least < 2:
        found.append(
            f"sampling_floor {settings.sampling_floor} may leave a task with {least:.1f} of a step's "
            f"{prompts} prompts: a task drawn fewer than twice a step is not measured"
        )
    if settings.scale_rewards == "batch":
        found.append(
            "scale_rewards 'batch' divides by a standard deviation over all prompts: they depend on each other, so U "
            "and its error are no longer exact; 'group' or 'none' keep them so"
        )
    if settings.num_iterations > 1:
        found.append(
            f"num_iterations {settings.num_iterations}: U is measured in the first iteration of each step only, as the "
            "later weights have seen the same prompts"
        )
    return found


def check_resume(before: dict[str, Any], settings: Settings, fixed: Mapping[str, str] | None = None) -> list[str]:
    """What changes in a run that continues with other settings; UserError for one that cannot change.

    Args:
        before: the content of run.json.
        settings: those of the resumed run.
        fixed: setting -> why this engine cannot change it, beside those that no engine can.
    """
    refused: list[tuple[str, str]] = []
    used: list[str] = []
    unused: list[str] = []
    saved = before.get("config")
    if not isinstance(saved, dict):
        raise UserError("the run's run.json holds no settings, so a resume cannot be held to them: start a new run")
    for spec in dataclasses.fields(settings):
        old, new = saved.get(spec.name, dataclasses.MISSING), getattr(settings, spec.name)
        if old is dataclasses.MISSING or old == new or spec.name in ("resume_from_checkpoint", "output_dir"):
            continue
        policy, change = (fixed or {}).get(spec.name, spec.metadata["resume"]), f"{spec.name} {old!r} -> {new!r}"
        if policy not in ("used", ""):
            refused.append((spec.name if spec.name == "tasks" else change, policy))
        else:
            (used if policy else unused).append(change)
    if refused:
        raise UserError(
            f"a resumed run cannot change {'; '.join(f'{change} ({policy})' for change, policy in refused)}: resume "
            "without the change, or start a new run"
        )
    found = [f"settings changed since: {'; '.join(used)}"] if used else []
    return [*found, *([f"without effect on a resumed run: {'; '.join(unused)}"] if unused else [])]


def check_data(before: dict[str, Any], now: dict[str, str]) -> None:
    """Raise UserError where a task's data file is not the one the run began with, by its SHA-256 in run.json."""
    for task, old in before.get("data", {}).items():
        if now.get(task) != old:
            raise UserError(
                f"the data of task {task!r} changed since the run began (SHA-256 {old[:12]}..., now "
                f"{str(now.get(task))[:12]}...): put the file back, or start a new run, as the saved position and what "
                "is held out belong to the old one"
            )


class Training:
    """What every engine shares: settings, tasks, model and log of one run, whichever loop the steps are made by.

    After ``run``, ``interrupted`` tells whether it stopped early, and ``step_number`` after which step.
    """

    fixed: ClassVar[Mapping[str, str]] = {}  # setting -> why a resume of this engine cannot change it
    processes = 1
    model: Any
    tokenizer: Any
    prompter: Prompter
    log: RunLog
    folder: Path

    def __init__(self, settings: Settings, name: str, console: Console) -> None:
        """Reads what is there and what was asked for; nothing is written or changed."""
        self.settings, self.console = settings, console
        self.interrupted = self._told = False
        self.started = time.monotonic()
        self.checkpoint = self._checkpoint_to_resume(name)
        self.before = read_info(self.checkpoint.parent) if self.checkpoint else None
        if self.before:
            for remark in check_resume(self.before, settings, self.fixed):
                self._remark(remark)
        set_seed(settings.seed)
        self.tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
        self.data = data_hashes(settings.tasks)
        if self.before:
            check_data(self.before, self.data)

    @property
    def step_number(self) -> int:
        """Steps done."""
        raise NotImplementedError

    def run(self) -> Path:
        """Everything from the warm start to the summary; returns the run's folder."""
        raise NotImplementedError

    def _make_prompter(self) -> Prompter:
        """The prompts of the tasks, all checked; what is left out and what the settings do is said."""
        prompter = Prompter(self.tokenizer, self.tasks, self.settings)
        for remark in [*prompter.check(self.tasks), *remarks(self.settings, len(self.tasks), self.processes)]:
            self._remark(remark)
        return prompter

    def _open(self, name: str, keep_bytes: int | None) -> None:
        """The run's folder and log, the first that is written; ``keep_bytes``: of the log, for a resumed run."""
        self.folder = self.checkpoint.parent if self.checkpoint else new_folder(self.settings, name)
        self.console.print(f"run folder: {self.folder}", highlight=False, soft_wrap=True)
        self.console.print(f"device: {device_name(self.model.device)}", highlight=False, soft_wrap=True)
        trackers = report_trackers(self.settings.report_to, self.folder, dataclasses.asdict(self.settings))
        self.log = RunLog(self.folder, trackers, keep_bytes)
        if self.checkpoint and (moved := set_newer_aside(self.checkpoint)):
            self._remark(
                f"steps after {self.checkpoint.name} are done again: {', '.join(p.name for p in moved)} set aside"
            )

    def _summarize(self) -> None:
        names = [task.name for task in self.tasks]
        summary = summarize(self.log.lines, names, self.settings.gain_window, self.seconds)
        write_json(self.folder / SUMMARY_FILE, summary)

    def _remark(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def _remark_left_out(self) -> None:
        """Say once which generated questions did not fit."""
        long = [task.name for task in self.tasks if task.questions is None and task.left_out]
        if long and not self._told:
            self._told = True
            self._remark(f"generated questions longer than max_prompt_length are left out: {', '.join(long)}")

    def _checkpoint_to_resume(self, name: str) -> Path | None:
        wanted = self.settings.resume_from_checkpoint
        if not wanted:
            return None
        checkpoint, remark = find_checkpoint(wanted, newest_folder(self.settings, name) if wanted == "auto" else Path())
        if remark:
            self._remark(remark)
        self.console.print(f"resuming from {checkpoint}", highlight=False, soft_wrap=True)
        return checkpoint

    @property
    def seconds(self) -> float:
        """Since the run began, what came before a resume included."""
        return time.monotonic() - self.started

    def _log(self, line: Line) -> Line:
        line["time"] = round(self.seconds, 3)
        self.log.write(line)
        return line

    def _describe(self, tracked: list[str], more: dict[str, Any]) -> None:
        """Write run.json; ``more``: its entries of this engine."""
        run = describe_run(self.settings, self.model, tracked) | {"data": self.data} | more
        if self.before:
            devices = [content.get("machine", {}).get("device") for content in (self.before, run)]
            if devices[0] != devices[1]:
                self._remark(
                    f"the run was on {devices[0]!r} and goes on on {devices[1]!r}: from the same state, but with other "
                    "random draws and rounding"
                )
            resumed = [*self.before.get("resumed", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
            run |= {"started": self.before["started"], "command": self.before["command"], "resumed": resumed}
            if (before := self.before.get("commit")) != (now := run["commit"]):
                self._remark(f"the run began with the code's commit {before} and goes on with {now}")
                run["commits"] = [*self.before.get("commits", [before]), now]
            elif "commits" in self.before:
                run["commits"] = self.before["commits"]
        write_json(self.folder / RUN_FILE, run)

    def _warm_start(self) -> None:
        steps = self.settings.warm_start_steps
        if not steps:
            return
        began = time.monotonic()
        with Display(self.console, "warm start", [], steps) as display:

            def on_step(step: int, loss: float) -> int:
                display.show(self._log({"kind": "warm_start", "step": step, "loss": loss}))
                planned = self._plan_warm_start(step, time.monotonic() - began)
                display.expect(planned)
                return planned

            cached = warm_start(self.model, self.tokenizer, self.tasks, self.prompter, self.settings, on_step)
        if cached:
            self.console.print("warm start: weights from the cache", highlight=False)

    def _plan_warm_start(self, step: int, seconds: float) -> int:
        """How many steps of the warm start to make, after ``step`` of them took ``seconds``."""
        return self.settings.warm_start_steps

    def _add_gains(self, line: Line) -> None:
        """``learning_gain``: Gain(t) for the latest t with ``gain_window`` steps from it on, this one the last."""
        steps = [*(earlier for earlier in self.log.lines if earlier["kind"] == "train"), line]
        window = self.settings.gain_window
        for task in self.tasks:
            gain = gain_at(task_column(steps, task.name, "reward").tolist(), len(steps) - window, window)
            if not math.isnan(gain):
                line |= task_metrics(task.name, {"learning_gain": gain})


class LoopTraining(Training):
    """One run of the loop in its folder."""

    def __init__(self, settings: Settings, name: str, console: Console) -> None:
        """Everything that can be refused is, before the first line of a file of the run is written or changed."""
        super().__init__(settings, name, console)
        checkpoint = self.checkpoint
        self.state = load_state(checkpoint) if checkpoint else None
        self.model, self.tokenizer = load_model(settings, checkpoint)
        self.prompter = self._make_prompter()
        # Copied before the tracker's hooks; it gets its weights when GRPO begins.
        reference = copy.deepcopy(self.model).eval().requires_grad_(False) if settings.beta > 0.0 else None
        # Made before the warm start, so that a setting that does not fit is found out at once.
        self.grpo = Grpo(settings, self.model, self.tokenizer, self.tasks, self.prompter, reference)
        wanted = Plan(
            settings.max_steps, settings.eval_prompts, settings.final_probe_prompts, settings.warm_start_steps
        )
        self.planner = Planner(wanted, 60 * settings.plan_minutes, settings.eval_steps, settings.save_steps)
        if self.state and checkpoint:
            self._load_reference(checkpoint.parent)
            try:
                self.grpo.load_state_dict(self.state["grpo"])
            except (ValueError, KeyError) as error:
                raise UserError(f"{checkpoint} does not fit the settings: {error}") from error
            self.started -= self.state["seconds"]
            if "planner" in self.state and self.planner.load_state_dict(self.state["planner"]):
                self.grpo.plan_steps(self.planner.plan.steps)
            check_log(checkpoint.parent / LOG_FILE, self.state["metrics_bytes"])
        self._open(name, self.state["metrics_bytes"] if self.state else None)

    @property
    def step_number(self) -> int:
        """Steps done."""
        return self.grpo.step_number

    def run(self) -> Path:
        """Everything from the warm start to the summary; returns the run's folder."""
        try:
            plan = {"plan": dataclasses.asdict(self.planner.plan)} if self.planner.on else {}
            self._describe(self.grpo.tracker.layers if self.grpo.tracker else [], plan)
            if self.state is None:
                if self.settings.warm_start_steps and self.settings.eval_base:
                    self._evaluate(0, "eval_base")
                self._warm_start()
                self._keep_reference()
                self._evaluate(0)
                # Whatever came before, from the cache or not, GRPO starts from the same random state.
                set_seed(self.settings.seed)
            else:
                restore_random_state(self.state["random"], self.model.device)
            self._loop()
            if not self.interrupted:
                self._final_probe()
        finally:
            self.log.close()
            self.grpo.close()
        if not self.interrupted:
            self._summarize()
        return self.folder

    def _keep_reference(self) -> None:
        """With beta > 0: the reference gets the weights GRPO starts from, kept in the run's folder for a resume."""
        if self.grpo.reference is not None:
            trained = {n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, self.folder / REFERENCE_FILE)
            self.grpo.reference.load_state_dict(trained, strict=False)

    def _load_reference(self, folder: Path) -> None:
        if self.grpo.reference is not None:
            path = folder / REFERENCE_FILE
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: with beta={self.settings.beta} a run cannot continue without the model it "
                    "started from; a run that began with beta=0 keeps none"
                )
            self.grpo.reference.load_state_dict(load_file(path), strict=False)

    def _loop(self) -> None:
        settings, grpo, planner = self.settings, self.grpo, self.planner
        names = [task.name for task in self.tasks]
        stop, done = Interruption(), grpo.step_number >= planner.plan.steps
        with stop.watch(), Display(self.console, "step", names, planner.plan.steps, grpo.step_number) as display:
            while not done and not stop.requested:
                began = time.monotonic()
                line = grpo.step()
                self._add_gains(line)
                display.show(self._log(line))
                self._plan(line, time.monotonic() - began)
                display.expect(planner.plan.steps)
                self._remark_left_out()
                step, out_of_time = grpo.step_number, 0 < 60 * settings.max_minutes <= self.seconds
                done = step >= planner.plan.steps or out_of_time
                if out_of_time:
                    text = f"max_minutes {settings.max_minutes:g} are over: the run ends with step {step}"
                    self.console.print(text, highlight=False)
                if done or (settings.eval_steps and step % settings.eval_steps == 0):
                    self._evaluate(step)
                if done or stop.requested or (settings.save_steps and step % settings.save_steps == 0):
                    self._save()
        self.interrupted = not done

    def _plan_warm_start(self, step: int, seconds: float) -> int:
        if self.planner.fit_warm_start(step, seconds):
            self._tell_plan("plan changed in the warm start")
        return self.planner.plan.warm_start

    def _plan(self, line: Line, seconds: float) -> None:
        """Fit what is left of the run into the time that is left, after a step that took ``seconds``."""
        planner, step = self.planner, self.grpo.step_number
        # A probe prompt takes its rollout and a forward pass, about 0.4 of an update, until the probe has measured it.
        prompt = (line["rollout_seconds"] + 0.4 * line["update_seconds"]) / self.settings.prompts_per_step
        planner.costs.steps.append((seconds, prompt * len(self.tasks)))
        if planner.fit(step, self.seconds) or (planner.on and step == 1):
            self._tell_plan("plan" if step == 1 else "plan changed")

    def _tell_plan(self, title: str) -> None:
        """Print, log and keep the plan, and let the learning rate follow it."""
        planner, step = self.planner, self.grpo.step_number
        self.grpo.plan_steps(planner.plan.steps)
        self.console.print(
            f"{title} after step {step}, {duration(self.seconds)} of {duration(planner.budget)}: "
            f"{planner.plan.describe()}{', which is the least and takes longer' if planner.over else ''}",
            highlight=False,
            soft_wrap=True,
        )
        self._log(planner.line(step))
        info = read_info(self.folder)
        write_json(self.folder / RUN_FILE, info | {"plan": dataclasses.asdict(planner.plan)})

    def _final_probe(self) -> None:
        """Measure ``final_probe_prompts`` of each task with the weights fixed; a run killed here does it again."""
        planner, names = self.planner, [task.name for task in self.tasks]
        if not planner.plan.prompts:
            return
        with Display(self.console, "probe", names, planner.plan.prompts) as display:

            def on_round(done: int, seconds: float, line: Line) -> int:
                display.show({**line, "step": done, "time": self.seconds})
                planner.costs.prompt = seconds
                if planner.fit_prompts(done, self.seconds):
                    self._tell_plan("plan changed in the probe")
                    display.expect(planner.plan.prompts)
                return planner.plan.prompts

            measured = final_probe(self.grpo, planner.plan.prompts, on_round)
        self._log({"kind": FINAL_PROBE, "step": self.grpo.step_number, **measured})

    def _evaluate(self, step: int, kind: str = "eval") -> None:
        """``kind``: "eval_base" for the model as it was given, before the warm start."""
        planner, questions = self.planner, self.planner.plan.questions
        if questions:
            began = time.monotonic()
            line = evaluate(self.model, self.tokenizer, self.tasks, self.prompter, self.settings, questions)
            self._log({"kind": kind, "step": step, **line})
            planner.costs.question = (time.monotonic() - began) / questions
            if planner.fit_questions(2 if kind == "eval_base" else 1):
                self._tell_plan("plan changed")

    def _save(self) -> None:
        state = {
            "grpo": self.grpo.state_dict(),
            "random": random_state(self.model.device),
            "metrics_bytes": self.log.size,
            "seconds": self.seconds,
            "planner": self.planner.state_dict(),
        }
        began = time.monotonic()
        save_checkpoint(
            self.folder, self.grpo.step_number, self.model, self.tokenizer, state, self.settings.save_total_limit
        )
        self.planner.costs.save = time.monotonic() - began
