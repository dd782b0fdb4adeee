"""A study's runs as processes of their own, a few at a time: one that fails or is interrupted costs no other anything.

Each run is an ordinary ``train`` in its own folder. What is finished is not run again; what was interrupted goes on
from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..checkpoint import checkpoints
from ..settings import Settings

SCRIPT = Path(__file__).resolve().parents[2] / "train_grpo.py"


@dataclass(frozen=True)
class Job:
    """One process. ``folder`` takes its log; ``result`` is the file that is there once it is done."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    result: Path
    steps: int = 0

    @property
    def done(self) -> bool:
        """Whether it need not run (again)."""
        return self.result.is_file()

    @property
    def progress(self) -> int:
        """Training steps in its log so far."""
        with contextlib.suppress(OSError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
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
    """The process that makes, or goes on with, the run in ``settings.output_dir``."""
    folder = Path(settings.output_dir)
    if checkpoints(folder):
        arguments: tuple[str, ...] = ("train", "--resume", str(folder))
    else:
        if (folder / "run.json").is_file() and not (folder / "summary.json").is_file():
            set_aside(folder)  # it stopped before its first checkpoint: it starts again, and what it wrote is kept
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / "config.yaml", settings)
        arguments = ("train", "--config", str(folder / "config.yaml"))
    return Job(name, arguments, folder, folder / "summary.json", settings.max_steps)


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
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *job.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def run_all(jobs: Sequence[Job], at_a_time: int, console: Console) -> list[Job]:
    """Run what is not done, in order; returns the jobs that failed.

    A Ctrl-C, or a SIGTERM, lets the running ones finish their step and save, and goes on to the caller as a
    KeyboardInterrupt; a second one ends them.
    """
    waiting = [job for job in jobs if not job.done]
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} are done already", highlight=False)
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Job] = []
    told: list[int] = []  # the signal that stopped us, where it was no Ctrl-C

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    with _bars(console) as bars:
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
            # The terminal sends a Ctrl-C to all of its processes: the runs know, and a second signal would end them.
            _stop([process for process, _ in running.values()], console, tell=bool(told) or not os.isatty(0))
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return failed


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


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
