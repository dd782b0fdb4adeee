"""The record of what the numbers were measured on, and with what."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import gradnorm_kernels as gk
from gradnorm_kernels.__main__ import commit

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw")
_QUERY += ("power.limit", "temperature.gpu", "utilization.gpu", "memory.used", "mig.mode.current")


def machine(device: torch.device | str = "cpu", at_commit: str | None = None) -> dict[str, Any]:
    """Processor, versions, commit and date; for a CUDA device the GPU as it was found as well."""
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
    """Driver, clocks, power and load of the first GPU of that name as nvidia-smi reads them; or why it does not."""
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
