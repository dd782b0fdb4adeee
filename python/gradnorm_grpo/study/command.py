"""The command `study`: every run, the comparison of the estimators, and the answers, in one folder."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradnorm_kernels.__main__ import commit

from ..errors import UserError
from ..folder import machine, versions
from ..models import device_of
from ..parse import parse_study
from ..runlog import write_json
from ..settings import Settings
from .jobs import Job, drop_checkpoints, run_all, run_job, write_config
from .measurements import Measurements, read_study
from .spec import StudySpec

#: Settings that do not change what a run measures: a study may go on with others.
_FREE = (
    *("output_dir", "cache_dir", "num_threads", "report_to", "save_steps", "save_total_limit", "seed", "device"),
    "commit",
)


def study(arguments: list[str], console: Console) -> int:
    """Run what is missing of a study and write its answers; returns the exit code."""
    settings, spec, name = parse_study(arguments)
    folder = Path(settings.output_dir or Path("runs") / f"{name}-study")
    described = describe(settings, spec, name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", described)
    console.print(f"study folder: {folder}", highlight=False, soft_wrap=True)
    jobs = _jobs(settings, spec, folder)
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
            f"{len(failed)} of {len(jobs)} did not finish: {names}; the answers are of the others. Put right what "
            "their logs say, and the same command runs what is missing"
        )
    return 0


def _jobs(settings: Settings, spec: StudySpec, folder: Path) -> list[Job]:
    """An arm at a time, so that those side by side have different seeds and do not make the same warm start twice."""
    jobs = []
    for arm in spec.arms:
        for seed in spec.seeds:
            place = folder / "runs" / f"{arm}-seed{seed}"
            jobs.append(run_job(f"{arm} seed {seed}", spec.run_settings(settings, arm, seed, str(place))))
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
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    }
    before = read_study(folder) if (folder / "study.json").is_file() else None
    if before is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"output_dir {folder} holds something that is no study: name another folder")
        return described
    old, new = before.get("config", {}), json.loads(json.dumps(described["config"]))
    changed = [
        f"{key} {old[key]!r} -> {new[key]!r}"
        for key in new
        if key not in _FREE and old.get(key, new[key]) != new[key]  # a setting that is newer than the study
    ]
    changed += [
        f"arm {arm} {before['arms'][arm]!r} -> {own!r}"
        for arm, own in spec.arms.items()
        if before["arms"].get(arm, own) != own
    ]
    if changed:
        raise UserError(
            f"{folder} holds a study with other settings ({'; '.join(changed)[:400]}): give another --output_dir, or "
            "the settings it was begun with"
        )
    kept = {key: before[key] for key in ("started", "seconds") if key in before}
    return described | kept | {"continued": [*before.get("continued", []), now]}


def conclude(folder: Path, console: Console) -> dict[str, Any]:
    """Answers, figures and page from a study's runs, or, where they are not there, from its measurements.csv."""
    from .answers import answer
    from .figures import draw
    from .page import page

    described = read_study(folder)
    if (folder / "runs").is_dir():
        measured = Measurements.from_runs(folder)
        measured.write_csv(folder / "measurements.csv")
    elif (folder / "measurements.csv").is_file():
        measured = Measurements.from_csv(folder / "measurements.csv")
    else:
        raise UserError(f"{folder} holds neither runs/ nor measurements.csv: there is nothing to answer from")
    estimators = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "estimators").glob("seed*.json"))
    ]
    answers = answer(measured, estimators)
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
