"""A report from the journals of the tests: counts by backend, dtype and algorithm, and failures grouped by cause.

One cause fails many tests. Failures of one function whose messages differ only in numbers form one group, shown with
the numbers of one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check import journal

#: The bad outcomes, in the order in which groups are shown.
BAD = ("died", "failed", "unfinished", "not run")
_COLUMNS = ("passed", *BAD, "skipped")


@dataclass
class Group:
    """Tests that failed in the same way. ``first``: one of their entries."""

    outcome: str
    function: str
    first: dict[str, Any]
    tests: list[dict[str, Any]] = field(default_factory=list)

    def where(self) -> str:
        """Counts by backend, dtype and algorithm, as text."""
        found = Counter(_kind(test) for test in self.tests)
        return ", ".join(f"{' '.join(filter(None, kind)) or 'any'} {count}" for kind, count in sorted(found.items()))


@dataclass
class Report:
    """``ends``: one entry per test that began. ``unreached``: the number of tests per step that did not begin."""

    ends: list[dict[str, Any]]
    unreached: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "counts": dict(Counter(test["outcome"] for test in self.ends)),
            "unreached": self.unreached,
            "by_kind": [{"kind": list(kind), **counts} for kind, counts in self.by_kind().items()],
            "failures": [
                {
                    "outcome": group.outcome,
                    "function": group.function,
                    "where": group.where(),
                    "message": group.first["message"],
                    "tests": [test["test"] for test in group.tests],
                }
                for group in self.groups()
            ],
        }

    def by_kind(self) -> dict[tuple[str, str, str], Counter[str]]:
        """(backend, dtype, algorithm) -> number of tests by outcome."""
        found: dict[tuple[str, str, str], Counter[str]] = {}
        for test in self.ends:
            found.setdefault(_kind(test), Counter())[test["outcome"]] += 1
        return dict(sorted(found.items()))

    def groups(self) -> list[Group]:
        """The failures by cause, in the order of ``BAD`` and by number of tests."""
        found: dict[tuple[str, str, str], Group] = {}
        for test in self.ends:
            if test["outcome"] in BAD:
                function = test["test"].partition("[")[0]
                key = (test["outcome"], function, _cause(test["message"]))
                found.setdefault(key, Group(test["outcome"], function, test)).tests.append(test)
        return sorted(found.values(), key=lambda group: (BAD.index(group.outcome), -len(group.tests)))


def collect(folder: Path) -> Report:
    """The report of all journals in a folder."""
    ends, unreached = [], {}
    for path in sorted(folder.glob("*.jsonl")):
        entries = journal.read(path)
        began = {entry["test"]: entry for entry in entries if entry["event"] == "began"}
        ended = {entry["test"]: entry for entry in entries if entry["event"] == "ended"}
        for name, entry in began.items():
            open_end = entry | {"outcome": "unfinished", "message": "was running when the time of its step was over"}
            ends.append(ended.get(name, open_end) | {"step": path.stem})
        collected = [entry["tests"] for entry in entries if entry["event"] == "collected"]
        if collected and collected[0] > len(began):
            unreached[path.stem] = collected[0] - len(began)
    return Report(ends, unreached)


def text(report: Report, most: int = 4500) -> str:
    """The failures, cut to about ``most`` characters, then the counts."""
    groups, shown = report.groups(), []
    room = most
    for number, group in enumerate(groups):
        entry = _group_text(group, 5)
        if len(entry) > room:
            shown.append(f"... and {len(groups) - number} more kinds of failure: see failures.md")
            break
        shown.append(entry)
        room -= len(entry)
    lines = [*shown, _table(report)]
    lines += [f"{step}: {count} tests were not reached" for step, count in report.unreached.items()]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The full report, with the name of every failed test."""
    parts = ["# What the tests on the GPU said", "", "```", _table(report), "```", ""]
    for group in report.groups():
        parts += [f"## {len(group.tests)} {group.outcome}: {group.function}", "", group.where(), ""]
        parts += ["```", group.first["test"], group.first.get("where", ""), group.first["message"], "```", ""]
        parts += [f"- {test['test']}: {_first_line(test['message'])}" for test in group.tests]
        parts.append("")
    return "\n".join(parts)


def _group_text(group: Group, lines: int) -> str:
    said = [line for line in group.first["message"].splitlines() if line.strip()][:lines]
    head = f"[{len(group.tests)} {group.outcome}] {group.function.rpartition('::')[2]}: {group.where()[:300]}"
    example = group.first["test"].rpartition("::")[2]
    where = group.first.get("where")
    return "\n".join([head, f"    {example}" + (f" ({where})" if where else ""), *(f"    {s[:240]}" for s in said)])


def _table(report: Report) -> str:
    rows = [["backend", "dtype", "algorithm", *_COLUMNS]]
    for kind, counts in report.by_kind().items():
        rows.append([part or "-" for part in kind] + [str(counts[column] or "") for column in _COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _kind(test: dict[str, Any]) -> tuple[str, str, str]:
    parameters = test["parameters"]
    return parameters.get("backend", ""), parameters.get("dtype", ""), parameters.get("algorithm", "")


def _cause(message: str) -> str:
    """The first line without its numbers, which differ between tests that fail for one cause."""
    return re.sub(r"[-+]?\b(\d[\d.,]*(e[-+]?\d+)?|nan|inf)\b", "#", _first_line(message))[:160]


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "")
