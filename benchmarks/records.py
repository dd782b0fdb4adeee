"""Result files: one JSON a run, named by what was measured, where and at which commit; written as rows come in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

#: What a row must have, by the benchmark; a row that was measured must have the second as well.
_ROWS: dict[str, tuple[set[str], set[str]]] = {
    "ops": (
        {"layer", "d_in", "d_out", "length", "ragged", "tokens", "dtype", "provider", "status"},
        {"errors", "seconds", "yardstick_seconds", "ratio", "tflops", "gbps", "samples", "token_pairs"},
    ),
    "step": ({"variant", "status"}, {"seconds", "baseline_seconds", "ratio", "peak_bytes"}),
    "cpu_ratio": ({"d", "length", "ragged", "tokens", "provider"}, {"ratio", "lower_quartile", "upper_quartile"}),
}
#: ok: right and measured. wrong: its numbers are off, so it has no speed. failed: it raised, crashed or hung.
#: unable: it does not apply here.
STATUSES = ("ok", "wrong", "failed", "unable")


def default_path(benchmark: str, machine: Record) -> Path:
    """results/<benchmark>-<device>-<commit>-<date>.json"""
    device = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    date = re.sub(r"\D", "", machine["date"])[:12]
    parts = [benchmark, re.sub(r"\W+", "-", str(device)).strip("-").lower(), machine["commit"] or "no-commit", date]
    return RESULTS / f"{'-'.join(parts)}.json"


def write(path: Path, record: Record) -> None:
    """Write the whole record in one step: who reads it meanwhile sees the old or the new one.

    Raises:
        ValueError: the record is not as a record of its benchmark must be.
    """
    check(record, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> Record:
    """A result file.

    Raises:
        ValueError: it is not one; the text says what is missing.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    check(record, str(path))
    return dict(record)


def check(record: Any, name: str) -> None:
    """Raise ValueError unless the record has what its benchmark's records have; ``name`` is for the text."""
    if not isinstance(record, dict) or record.get("benchmark") not in _ROWS:
        raise ValueError(f"{name} is no result file: 'benchmark' must be one of {', '.join(_ROWS)}")
    if not {"machine", "rows"} <= set(record):
        raise ValueError(f"{name} has no {' or '.join(sorted({'machine', 'rows'} - set(record)))}")
    always, measured = _ROWS[record["benchmark"]]
    for number, row in enumerate(record["rows"]):
        status = row.get("status", "ok")
        if status not in STATUSES:
            raise ValueError(f"{name}: row {number} has status {status!r}, not one of {', '.join(STATUSES)}")
        missing = (always | (measured if status == "ok" else set())) - set(row)
        if missing:
            raise ValueError(f"{name}: row {number} ({status}) lacks {', '.join(sorted(missing))}")
        if status == "wrong" and "seconds" in row:
            raise ValueError(f"{name}: row {number} gives a speed for a wrong result")
