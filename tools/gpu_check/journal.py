"""A pytest plugin that keeps a journal: a line of JSON when a test begins or ends and when Triton compiles a kernel.

    python -m pytest -p tools.gpu_check.journal --journal FILE tests/gpu

A process that crashes or hangs leaves a test that began and did not end. Started again with the same journal, pytest
runs the tests that have not begun yet; tests of the same kind as one that ended a process come last. An illegal memory
access leaves the CUDA context of its process unusable, and every later test would fail for that reason. So the context
is checked after each test, and a process that has lost it records the test and ends at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: The exit status of a process that lost its GPU context.
LOST = 70
#: After this many tests of one kind have ended a process, the others of that kind are not run.
ENOUGH = 3
_LONGEST = 3000


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal. An incomplete last line is left out."""
    entries = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(text))
    return entries


def append(path: Path, **entry: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def device_is_lost() -> str | None:
    """The error that the device reports on synchronisation; None if there is none, or no device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        if torch.cuda.is_current_stream_capturing():
            return "the current stream is still captured"
    except Exception as error:  # torch raises several kinds, all of which mean the same here
        return f"{type(error).__name__}: {str(error).strip()}"
    return None


def kind_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """Tests of one kind run the same kernels: the same function, backend and algorithm."""
    parameters = entry["parameters"]
    function = entry["test"].partition("[")[0]
    return function, parameters.get("backend", ""), parameters.get("algorithm", "")


class Journal:
    """The plugin. ``kill -USR1`` of the process writes the stacks of its threads into ``<journal>.stacks``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reports: list[pytest.TestReport] = []
        self._stacks = path.with_suffix(".stacks").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._listening = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        before = read(self._path)
        begun = {entry["test"] for entry in before if entry["event"] == "began"}
        ends = [entry for entry in before if entry["event"] == "ended"]
        fatal = Counter(kind_of(entry) for entry in ends if entry["outcome"] == "died" or entry.get("lost"))
        append(self._path, event="collected", tests=len(items))
        left = [item for item in items if item.nodeid not in begun]
        given_up = [item for item in left if fatal[kind_of(_named(item))] >= ENOUGH]
        for item in given_up:
            why = f"{ENOUGH} tests of this kind have ended their process; this one was not begun"
            append(self._path, event="began", **_named(item))
            append(self._path, event="ended", **_named(item), outcome="not run", message=why, seconds=0.0)
        chosen = sorted(
            (item for item in left if item not in given_up), key=lambda item: bool(fatal[kind_of(_named(item))])
        )
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that cannot be imported as one failed test; by default pytest would stop there."""
        if report.failed:
            named = {"test": report.nodeid or "collection", "parameters": {}}
            append(self._path, event="began", **named)
            append(self._path, event="ended", **named, **_said(report), seconds=0.0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._listen()
        self._reports = []
        append(self._path, event="began", **_named(item))
        began = time.monotonic()
        result = yield
        entry = _named(item) | _outcome(self._reports) | {"seconds": round(time.monotonic() - began, 3)}
        lost = device_is_lost()
        if lost is None:
            append(self._path, event="ended", **entry)
            return result
        if entry["outcome"] != "failed":
            entry |= {"outcome": "failed", "message": f"it ended well, but then the device was lost: {lost}"}
        append(self._path, event="ended", **entry, lost=lost[:_LONGEST])
        # Not by print: pytest captures it, and this process ends here.
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            for report in self._reports:
                if report.failed:
                    terminal.write_line(f"\n{report.longreprtext}")
            terminal.write_line(f"\n{item.nodeid} lost the device ({lost}): its process ends here")
            terminal.flush()
        os._exit(LOST)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_sessionfinish(self) -> None:
        append(self._path, event="finished")

    def _listen(self) -> None:
        """Record compilations as signs of life, once a test has imported Triton."""
        triton = sys.modules.get("triton")
        if self._listening or triton is None or not hasattr(triton, "knobs"):
            return
        self._listening = True

        def compiled(*, src: Any, cache_hit: bool, **_: Any) -> None:
            append(self._path, event="compiled", kernel=getattr(src, "name", ""), cached=cache_hit)

        triton.knobs.compilation.listener = compiled


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="the file for a line per beginning and end of a test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None:
        config.option.continue_on_collection_errors = True
        config.pluginmanager.register(Journal(path), "journal-of-tests")


def _named(item: pytest.Item) -> dict[str, Any]:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return {"test": item.nodeid, "parameters": {name: str(value) for name, value in given.items()}}


def _outcome(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """The worst outcome of setup, call and teardown, with its message."""
    for report in reports:
        if report.failed:
            return _said(report) | {"phase": report.when}
    for report in reports:
        if report.skipped:
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            return {"outcome": "skipped", "message": said[:_LONGEST]}
    return {"outcome": "passed"}


def _said(report: pytest.TestReport | pytest.CollectReport) -> dict[str, Any]:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else crash.message
    where = "" if crash is None else f"{Path(crash.path).name}:{crash.lineno}"
    return {"outcome": "failed", "message": text[:_LONGEST], "where": where}
