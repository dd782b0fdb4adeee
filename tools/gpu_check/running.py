"""Runs commands with time limits, one after another or in parallel: the steps of ``check.py``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds.

    ``stage``: the part of the check that it belongs to. ``after``: the steps that must have ended before. ``needs``:
    those of them that must also have passed. ``program``: must be on PATH, or the step is not run. ``files``: further
    arguments, of which the existing ones are passed; if none exists, the step is not run. ``code``: the exit status
    that means success. ``reserve``: seconds that earlier steps leave for it. ``keep``: seconds that must be left when
    it ends. ``extra``: a failure counts, but not a timeout or that it was not run. ``trial``: a first try of a tool
    that a machine may refuse; a refusal counts as not run. ``show``: how many of its first lines the final report
    repeats.
    """

    name: str
    command: Sequence[str]
    limit: float
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    stage: str = ""
    program: str | None = None
    files: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    code: int = 0
    reserve: float = 0.0
    keep: float = 0.0
    extra: bool = False
    trial: bool = False
    show: int = 0


def run_step(step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run a step in its own process group, which is killed as a whole when the time is over."""
    files = [str(path) for path in step.files if path.exists()]
    command = [*step.command, *files]
    found: dict[str, Any] = {"name": step.name, "command": command, "limit": round(limit, 1), "extra": step.extra}
    if step.program is not None and shutil.which(step.program) is None:
        return found | {"status": "not run", "reason": f"{step.program} was not found on PATH", "seconds": 0.0}
    if step.files and not files:
        names = ", ".join(path.name for path in step.files)
        return found | {"status": "not run", "reason": f"there is no {names}", "seconds": 0.0}
    log, began = folder / f"{step.name}.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the step started and left behind
            # A process stuck in the driver may never end: the other steps do not wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    status = "timed out" if code is None else "passed" if code == step.code else "failed"
    found |= {"status": status, "returncode": code, "seconds": round(time.monotonic() - began, 1), "log": log.name}
    lines = log.read_text(errors="replace").strip().splitlines()
    found["last_line"] = lines[-1][:400] if lines else ""
    if step.trial:
        complaints = [line for line in lines if _COMPLAINT.match(line)]
        if complaints or status != "passed":
            said = complaints[0] if complaints else found["last_line"]
            return found | {
                "status": "not run",
                "reason": f"{step.program} on one kernel ({status}): {said[:400]}",
            }
    return found


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    facts: dict[str, Any],
    minutes: float,
    written: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Run all steps, each as soon as those before it have ended. Returns the results in the order of ending.

    ``written`` is called after every rewrite of ``summary.json``.
    """
    deadline = time.monotonic() + 60 * minutes
    waiting, ended = list(steps), {}
    running: dict[Future[dict[str, Any]], Step] = {}
    began = time.monotonic()

    def write() -> None:
        results = list(ended.values())
        summary = facts | {"seconds": round(time.monotonic() - began, 1), "steps": results}
        summary["passed"] = not waiting and not running and not any(map(counts, results))
        write_json(folder / "summary.json", summary)
        written()

    with ThreadPoolExecutor(max(1, len(steps))) as pool:
        while waiting or running:
            for step in [s for s in waiting if all(name in ended for name in s.after)]:
                waiting.remove(step)
                left = deadline - time.monotonic()
                lacking = [name for name in step.needs if ended[name]["status"] != "passed"]
                limit = min(step.limit, left - step.keep)
                reason = _lacks(ended[lacking[0]]) if lacking else "no time is left" if left - step.keep < 5 else None
                if reason is not None:
                    result = {"name": step.name, "status": "not run", "reason": reason, "seconds": 0.0}
                    result["extra"] = step.extra
                    ended[step.name] = result
                    report(result)
                else:
                    running[pool.submit(run_step, step, folder, limit)] = step
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended[running.pop(future).name] = future.result()
                report(future.result())
            write()
    write()
    return list(ended.values())


def write_json(path: Path, content: Any) -> None:
    """Write atomically, so that a reader sees either the old file or the new one."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(fresh, path)


def counts(result: dict[str, Any]) -> bool:
    """Whether a result makes the check fail."""
    return result["status"] != "passed" and not (result["extra"] and result["status"] != "failed")


def _lacks(result: dict[str, Any]) -> str:
    return f"{result['name']} has not passed" + (f": {result['reason']}" if "reason" in result else "")


_PRINTING = threading.Lock()
# How compute-sanitizer and ncu begin an error line.
_COMPLAINT = re.compile(r"==ERROR==|=+ (Internal Sanitizer )?Error\b")


def line(result: dict[str, Any]) -> str:
    """A result as one line of text."""
    why = result.get("reason") or result.get("last_line", "")
    return f"{result['status']:>9} {result['seconds']:6.1f} s  {result['name']}: {why[:110]}"


def report(result: dict[str, Any]) -> None:
    with _PRINTING:
        print(line(result), flush=True)
