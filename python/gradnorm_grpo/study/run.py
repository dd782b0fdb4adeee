"""The command `study`: its runs as processes of their own, the comparison of the estimators, and the answers.

Each run is an ordinary ``train`` in its own folder, a few at a time, and one that fails or is interrupted does not
affect the others. What is finished is not run again, nor is a run in measurements.csv whose folder is gone; what was
interrupted continues from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradnorm_kernels.__main__ import commit

from ..checkpoint import checkpoints
from ..errors import UserError
from ..folder import command_line, machine, versions
from ..models import device_of
from ..parse import parse_study
from ..runlog import LOG_FILE, RUN_FILE, SUMMARY_FILE, only_writer, write_json
from ..settings import Settings
from .measurements import CSV_FILE, Measurements, Run, is_finished, read_study, run_folder, run_name
from .spec import FREE, StudySpec

LOCK_FILE = ".lock"  # locked while a command runs the study


def study(arguments: list[str], console: Console) -> int:
    """Run what a study still lacks and write its answers; returns the exit code."""
    settings, spec, name = parse_study(arguments)
    folder = Path(settings.output_dir or Path("runs") / f"{name}-study")
    for arm, seed in spec.order():  # a setting that does not fit is found before anything is written
        spec.run_settings(settings, arm, seed, str(folder))
    described = describe(settings, spec, name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("ab") as lock:
        only_writer(lock, folder)
        return _continue(settings, spec, folder, described, console)


def _continue(settings: Settings, spec: StudySpec, folder: Path, described: dict[str, Any], console: Console) -> int:
    """The study whose folder is ours alone."""
    kept = _kept(folder, spec)
    write_json(folder / "study.json", described)
    console.print(f"study folder: {folder}", highlight=False, soft_wrap=True)
    if kept:
        text = f"{len(kept)} of the runs are in {CSV_FILE} and not in runs/: they are not run again"
        console.print(text, highlight=False, soft_wrap=True)
    jobs = _jobs(settings, spec, folder, kept)
    began = time.monotonic()
    try:
        failed = run_all(jobs, spec.jobs, console)
    except KeyboardInterrupt:
        console.print(f"interrupted: the same command goes on in {folder}", highlight=False, soft_wrap=True)
        return 130
    finally:
        described["seconds"] = round(described.get("seconds", 0.0) + time.monotonic() - began, 1)
        write_json(folder / "study.json", described)
    if not spec.keep_checkpoints:
        for job in jobs:
            if job.done:
                drop_checkpoints(job.folder)
    conclude(folder, console)
    if failed:
        names = ", ".join(job.name for job in failed)
        raise UserError(
            f"{len(failed)} of {len(jobs)} did not finish: {names}; the answers use the others. Fix what their logs "
            "say; the same command then runs what is missing"
        )
    return 0


def _kept(folder: Path, spec: StudySpec) -> list[Run]:
    """The runs whose numbers are in measurements.csv and whose folder is gone or not finished."""
    stored = folder / CSV_FILE
    runs = Measurements.from_csv(stored).runs if stored.is_file() else []
    kept = [run for run in runs if not is_finished(run_folder(folder, *run))]
    if lost := [run_name(*run) for run in kept if run not in spec.order()]:
        raise UserError(
            f"--arms and --seeds leave out {', '.join(lost)}, whose numbers are in {stored} alone and would be lost: "
            "name these arms and seeds too, or move the file away"
        )
    return kept


def _jobs(settings: Settings, spec: StudySpec, folder: Path, kept: Sequence[Run]) -> list[Job]:
    """The runs in the spec's order that are not kept, then the comparisons of the estimators."""
    jobs = []
    for arm, seed in spec.order():
        if (arm, seed) in kept:
            continue
        place = run_folder(folder, arm, seed)
        own = spec.run_settings(settings, arm, seed, str(place))
        jobs.append(run_job(f"{arm} seed {seed}", own) if spec.frozen is None else frozen_job(own, spec.frozen))
    place = folder / "estimators"
    for seed in spec.seeds[: spec.estimator_seeds]:
        own = dataclasses.replace(settings, seed=seed, output_dir=str(place))
        place.mkdir(parents=True, exist_ok=True)
        config = place / f"seed{seed}.yaml"
        write_config(config, own, study={"estimators": spec.estimators})
        arguments = ("estimators", "--config", str(config))
        jobs.append(Job(f"estimators seed {seed}", arguments, place, place / f"seed{seed}.json"))
    return jobs


def describe(settings: Settings, spec: StudySpec, name: str, folder: Path) -> dict[str, Any]:
    """The content of study.json; UserError where the folder holds a study with other settings."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    described: dict[str, Any] = {
        "name": name,
        "command": command_line(),
        "started": now,
        "versions": versions(),
        "commit": commit() or settings.commit or None,
        "machine": machine(device_of(settings)),
        "config": {
            key: value for key, value in dataclasses.asdict(settings).items() if key not in ("seed", "output_dir")
        },
        "arms": spec.arms,
        "seeds": spec.seeds,
        "tasks": [task["name"] for task in settings.tasks],
        "gain_window": settings.gain_window,
        **({"decision": spec.decision} if spec.decision else {}),
        **({"frozen": spec.frozen} if spec.frozen is not None else {}),
    }
    before = read_study(folder) if (folder / "study.json").is_file() else None
    if before is None:
        if folder.exists() and any(path.name != LOCK_FILE for path in folder.iterdir()):
            raise UserError(f"output_dir {folder} holds something that is no study: name another folder")
        return described
    new = {key: value for key, value in json.loads(json.dumps(described["config"])).items() if key not in FREE}
    changed = [
        f"{prefix}{key} {old[key]!r} -> {value!r}"
        for prefix, old, given in (("", before.get("config", {}), new), ("arm ", before["arms"], spec.arms))
        for key, value in given.items()
        if old.get(key, value) != value  # a setting or an arm that is newer than the study is no change
    ]
    if (declared := before.get("decision", {})) != described.get("decision", {}):
        changed.append(f"decision {declared!r} -> {spec.decision!r}")
    if (frozen := before.get("frozen")) != json.loads(json.dumps(described.get("frozen"))):
        changed.append(f"frozen {frozen!r} -> {spec.frozen!r}")
    if changed:
        raise UserError(
            f"{folder} holds a study with other settings ({'; '.join(changed)[:400]}): give another --output_dir, or "
            "the settings it was started with"
        )
    kept: dict[str, Any] = {key: before[key] for key in ("started", "seconds") if key in before}
    kept["continued"] = [*before.get("continued", []), now]
    # Where earlier runs were made, if that was elsewhere: each commit with its versions and machine once.
    here, last = ({key: of.get(key) for key in ("commit", "versions", "machine")} for of in (described, before))
    known: list[Any] = [json.loads(json.dumps(here))]
    for place in (*before.get("earlier", []), last):
        if place not in known:
            known.append(place)
    return described | kept | ({"earlier": known[1:]} if known[1:] else {})


def conclude(folder: Path, console: Console) -> dict[str, Any]:
    """Answers, figures and page from a study's runs, or, where they are not there, from its measurements.csv."""
    from .figures import draw
    from .page import page
    from .questions import answer

    described = read_study(folder)
    stored = folder / CSV_FILE
    if (folder / "runs").is_dir():
        measured = Measurements.from_runs(folder)
        measured.write_csv(stored)
    elif stored.is_file():
        measured = Measurements.from_csv(stored)
    else:
        raise UserError(f"{folder} holds neither runs/ nor {CSV_FILE}: there is nothing to answer from")
    files = sorted((folder / "estimators").glob("seed*.json"))
    measured.estimates = [_estimates(path) for path in files]
    answers = answer(measured)
    write_json(folder / "answers.json", answers)
    draw(answers, folder / "figures")
    (folder / "README.md").write_text(page(described, answers), encoding="utf-8")
    table = Table(title="What these data say", box=None, pad_edge=False)
    for column in ("question", "verdict", "answer"):
        table.add_column(column, overflow="fold")
    for entry in answers["answers"]:
        table.add_row(entry["question"], entry["verdict"], entry["sentence"])
    console.print(table, highlight=False, markup=False)
    console.print(f"answers: {folder / 'README.md'}", highlight=False, soft_wrap=True)
    return answers


def _estimates(path: Path) -> dict[str, Any]:
    """The content of estimators/seed<seed>.json."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "tasks" not in found or "sketches" not in found:
            raise ValueError("it lacks tasks or sketches")
    except ValueError as error:
        raise UserError(
            f"{path} is no comparison of estimators ({error}): delete it, and the study makes it again"
        ) from error
    return found


# Runs as processes

SCRIPT = Path(__file__).resolve().parents[2] / "train_grpo.py"


@dataclass(frozen=True)
class Job:
    """One process. Its log goes into ``folder``; the file ``result`` exists once it is done."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    result: Path
    steps: int = 0

    @property
    def done(self) -> bool:
        """Whether its result exists."""
        return self.result.is_file()

    @property
    def progress(self) -> int:
        """Training steps in its log so far."""
        with contextlib.suppress(OSError):
            return (self.folder / LOG_FILE).read_bytes().count(b'"kind": "train"')
        return 0

    def failure(self) -> str:
        """The last line of its log."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[-1] if lines else "it printed nothing"
        return "it has no log"


def write_config(path: Path, settings: Settings, **more: Any) -> None:
    """A YAML file that `train --config` reads back to the same settings; ``more``: its other top-level keys."""
    values = {**dataclasses.asdict(settings), **more}
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def run_job(name: str, settings: Settings) -> Job:
    """The process that starts, or continues, the run in ``settings.output_dir``."""
    folder = Path(settings.output_dir)
    if checkpoints(folder):
        arguments: tuple[str, ...] = ("train", "--resume", str(folder))
    else:
        if (folder / RUN_FILE).is_file() and not (folder / SUMMARY_FILE).is_file():
            set_aside(folder)  # it stopped before its first checkpoint: start again, keep what it wrote
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / "config.yaml", settings)
        arguments = ("train", "--config", str(folder / "config.yaml"))
    return Job(name, arguments, folder, folder / SUMMARY_FILE, settings.max_steps)


def frozen_job(settings: Settings, frozen: dict[str, Any]) -> Job:
    """The process that measures at fixed weights what ``settings.output_dir`` still lacks."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "config.yaml", settings, study={"frozen": frozen, "arms": {"uniform": {}}})
    arguments = ("frozen", "--config", str(folder / "config.yaml"))
    return Job(f"frozen seed {settings.seed}", arguments, folder, folder / SUMMARY_FILE)


def set_aside(folder: Path) -> None:
    """Rename to the first free name of <folder>.interrupted-1, -2, ..."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.interrupted-{number}")).exists():
        number += 1
    folder.rename(aside)


def drop_checkpoints(folder: Path) -> None:
    """Delete the weights of a finished run; its measurements stay."""
    for path in checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def _start(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), *job.arguments]
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def run_all(jobs: Sequence[Job], at_a_time: int, console: Console) -> list[Job]:
    """Run what is not done, in order; returns the jobs that failed.

    After Ctrl-C or SIGTERM the running jobs finish their step and save, and the caller gets a KeyboardInterrupt. A
    second one kills them.
    """
    waiting = [job for job in jobs if not job.done]
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} are done already", highlight=False)
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Job] = []
    told: list[int] = []  # the signal that stopped us, if it was not Ctrl-C

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        raise KeyboardInterrupt

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    before = signal.signal(signal.SIGTERM, stop)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown = {job: bars.add_task(job.name, total=job.steps or None, visible=False) for job in waiting}
        overall = bars.add_task("all", total=len(jobs), completed=len(jobs) - len(waiting))
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    job = waiting.pop(0)
                    running[job] = (_start(job), time.monotonic())
                    bars.update(shown[job], visible=True)
                    bars.reset(shown[job], visible=True)
                for job, (process, started) in list(running.items()):
                    if not bars.disable:
                        bars.update(shown[job], completed=job.progress)
                    if process.poll() is None:
                        continue
                    del running[job]
                    bars.update(shown[job], visible=False)
                    if process.returncode or not job.done:
                        failed.append(job)
                        text = f"{job.name} failed ({job.failure()}): see {job.folder / 'log.txt'}"
                        console.print(text, style="red", highlight=False, soft_wrap=True, markup=False)
                    else:
                        bars.update(overall, advance=1)
                        console.print(f"{job.name}: {time.monotonic() - started:.0f} s", highlight=False)
                time.sleep(0.2)
        except KeyboardInterrupt:
            # The terminal sends Ctrl-C to all of its processes: the runs have it, and a second signal would kill them.
            _stop([process for process, _ in running.values()], console, tell=bool(told) or not os.isatty(0))
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return failed


def _stop(processes: Sequence[subprocess.Popen[bytes]], console: Console, tell: bool) -> None:
    """Wait for runs that end after their step; ``tell``: ask them to."""
    console.print("stopping: the runs finish their step and save; Ctrl-C again ends them at once", highlight=False)
    try:
        for process in processes:
            if tell:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
