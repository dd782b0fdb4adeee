"""Result files: one JSON file per run, named by benchmark, device and commit, and the machine that it was made on."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import gradnorm_kernels as gk
from gradnorm_kernels.__main__ import commit

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

#: The keys of a row, by benchmark: those of every row, and those that a measured row has as well.
_ROWS: dict[str, tuple[set[str], set[str]]] = {
    "ops": (
        {"layer", "d_in", "d_out", "length", "ragged", "tokens", "dtype", "provider", "status"},
        {"errors", "seconds", "yardstick_seconds", "ratio", "tflops", "gbps", "samples", "token_pairs"},
    ),
    "step": ({"variant", "status"}, {"seconds", "baseline_seconds", "ratio", "peak_bytes"}),
    "cpu_ratio": ({"d", "length", "ragged", "tokens", "provider"}, {"ratio", "lower_quartile", "upper_quartile"}),
    "host_time": ({"d", "length", "call", "launches"}, {"seconds", "lower_quartile", "upper_quartile"}),
}
#: ok: right and measured. wrong: its numbers are wrong, so it has no speed. failed: it raised, crashed or hung.
#: unable: it does not apply here.
STATUSES = ("ok", "wrong", "failed", "unable")
_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw")
_QUERY += ("power.limit", "temperature.gpu", "utilization.gpu", "memory.used", "mig.mode.current")


def default_path(benchmark: str, machine: Record) -> Path:
    """results/<benchmark>-<device>-<commit>-<date>.json"""
    device = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    date = re.sub(r"\D", "", machine["date"])[:12]
    parts = [benchmark, re.sub(r"\W+", "-", str(device)).strip("-").lower(), machine["commit"] or "no-commit", date]
    return RESULTS / f"{'-'.join(parts)}.json"


def write(path: Path, record: Record) -> None:
    """Write the whole record in one step, so that a reader sees either the old file or the new one.

    Raises:
        ValueError: the record lacks a key that its benchmark requires.
    """
    check(record, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> Record:
    """A result file.

    Raises:
        ValueError: it is no result file; the text says what is missing.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    check(record, str(path))
    return dict(record)


def check(record: Any, name: str) -> None:
    """Raise ValueError unless the record has the keys that its benchmark requires; ``name`` is for the message."""
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


def machine(device: torch.device | str = "cpu", at_commit: str | None = None) -> dict[str, Any]:
    """Processor, versions, commit and date; for a CUDA device also the GPU and its state."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "gradnorm_kernels": gk.__version__,
        "commit": at_commit or commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    device = torch.device(device)
    if device.type == "cuda":
        found["gpu"] = _gpu(device)
    return found


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "sm": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(properties.name),
    }


def nvidia_smi(name: str) -> dict[str, str] | str:
    """Driver, clocks, power and load of the first GPU of that name as nvidia-smi reports them; or why it cannot."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi was not found"
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi did not answer: {error}"
    rows = [dict(zip(_QUERY, map(str.strip, line.split(",")), strict=False)) for line in result.stdout.splitlines()]
    rows = [row for row in rows if row.get("name") == name] or rows
    return rows[0] if rows else f"nvidia-smi said nothing (status {result.returncode}): {result.stderr.strip()[:200]}"


def _version_of(package: str) -> str | None:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
