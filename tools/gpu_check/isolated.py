"""Runs pytest so that a test which crashes, hangs or loses the GPU costs only that test.

    python -m tools.gpu_check.isolated FILE.jsonl [--silence SECONDS] -- python -m pytest tests/gpu -k cuda

pytest runs in a child process and keeps a journal (:mod:`tools.gpu_check.journal`). If that process ends early, or
writes nothing for ``--silence`` seconds, its last test is recorded as the cause, and a new process continues with the
other tests. This needs only pytest, and costs nothing if nothing goes wrong.

Status 0: every test passed or was skipped, and at least one passed; 1: not so; other values: pytest's own status when
it ran no test.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tools.gpu_check import journal

#: Seconds without a new line in the journal: for a test, and for import and collection.
SILENCE, START = 90.0, 150.0
#: Seconds for a process to write its stacks, and to end after it is killed.
_STACKS, _GONE = 2.0, 20.0


def run(command: list[str], path: Path, silence: float = SILENCE, start: float = START) -> int:
    """Run the command with the journal's plugin until every test has begun once. Returns the exit status."""
    path.unlink(missing_ok=True)
    began = time.monotonic()
    while True:
        before = len(journal.read(path))
        code = _one_life([*command, "-p", "tools.gpu_check.journal", "--journal", str(path)], path, silence, start)
        entries = journal.read(path)
        fresh = entries[before:]
        culprit = _open(entries)
        if culprit is not None:
            why = _why(code, path, silence)
            print(f"\n{culprit['test']}: {why}\na fresh process goes on with the tests after it", flush=True)
            journal.append(path, event="ended", **culprit, outcome="died", message=why, seconds=None)
        elif not any(entry["event"] == "began" for entry in fresh) or fresh[-1]["event"] == "finished":
            break
    ends = [entry["outcome"] for entry in entries if entry["event"] == "ended"]
    if not ends:
        print(f"pytest ended with status {code} and began no test", flush=True)
        return code if code is not None and 1 < code < 128 else 3
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(ends).items()))
    print(f"{said} in {time.monotonic() - began:.0f} s", flush=True)
    return int(not {"passed"} <= set(ends) <= {"passed", "skipped"})


def _one_life(command: list[str], path: Path, silence: float, start: float) -> int | None:
    """The exit status of one process; None if it was silent for too long and was killed."""
    path.with_suffix(".stacks").unlink(missing_ok=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    size, heard, began = path.stat().st_size if path.exists() else 0, time.monotonic(), False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.25)
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, heard, began = now, time.monotonic(), True
        if time.monotonic() - heard > (silence if began else start):
            break
    with contextlib.suppress(ProcessLookupError):
        # Without the plugin's handler the signal ends the process, which is fine too.
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STACKS)
        process.kill()
    # A process stuck in the driver may never end: the next one does not wait for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GONE)
    return None


def _open(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The test that began and did not end, if there is one."""
    ended = {entry["test"] for entry in entries if entry["event"] == "ended"}
    for entry in entries:
        if entry["event"] == "began" and entry["test"] not in ended:
            return {key: entry[key] for key in ("test", "parameters")}
    return None


def _why(code: int | None, path: Path, silence: float) -> str:
    if code is not None:
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        return f"its process ended with {how}"
    file = path.with_suffix(".stacks")
    stacks = file.read_text(errors="replace").strip() if file.exists() else ""
    # The thread that runs the tests comes last; its innermost frame is where it waits.
    main = stacks.split("\n\n")[-1].splitlines()
    frames = [line.strip() for line in main if line.strip().startswith("File ")]
    own = [line for line in frames if "/site-packages/" not in line and "/lib/python" not in line]
    where = [*frames[:1], *own[:2]]
    return f"no sign of life for {silence:.0f} s; its process was ended" + "".join(f"\n{line}" for line in where)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check.isolated", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("journal", type=Path, help="the file for the beginning and end of each test")
    parser.add_argument("--silence", type=float, default=SILENCE, help="seconds after which a test counts as hung")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- python -m pytest ...")
    chosen = parser.parse_args(arguments)
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("there is no command: give it after --, as in -- python -m pytest tests/gpu")
    return run(command, chosen.journal, chosen.silence)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
