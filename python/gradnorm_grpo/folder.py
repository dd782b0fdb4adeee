"""A run's folder: its name, and what run.json says about the run and its machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gradnorm_kernels.__main__ import commit

from .checkpoint import checkpoints
from .errors import UserError
from .runlog import LOG_FILE, RUN_FILE
from .settings import Settings
from .threads import choose_threads, waiting

_PACKAGES = (
    *("torch", "triton", "transformers", "trl", "accelerate", "peft", "vllm", "deepspeed"),
    *("reasoning_gym", "math_verify", "numpy"),
)


def new_folder(settings: Settings, name: str) -> Path:
    """The folder of a new run: ``output_dir``, or the first free one of runs/<name>, runs/<name>-2, ..."""
    if settings.output_dir:
        folder = Path(settings.output_dir)
        if (folder / RUN_FILE).exists():
            raise UserError(
                f"output_dir {folder} already holds a run: go on with --resume {folder}, or name another folder"
            )
        log = folder / LOG_FILE
        if checkpoints(folder) or (log.is_file() and log.stat().st_size):
            raise UserError(
                f"output_dir {folder} holds checkpoints or a log of a run whose {RUN_FILE} is missing: name another "
                "folder, so that two runs do not mix"
            )
        return _made(folder, exist_ok=True)
    number = 1
    while True:
        try:
            return _made(Path("runs") / (name if number == 1 else f"{name}-{number}"), exist_ok=False)
        except FileExistsError:  # also where another run has just taken the name
            number += 1


def _made(folder: Path, exist_ok: bool) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise UserError(f"output_dir {folder} cannot be made: {error.strerror}") from error
    return folder


def newest_folder(settings: Settings, name: str) -> Path:
    """The folder that `--resume auto` means: ``output_dir``, or the latest of the runs with that name."""
    if settings.output_dir:
        return Path(settings.output_dir)
    found = [path for path in (Path("runs") / name, *Path("runs").glob(f"{name}-*")) if (path / RUN_FILE).is_file()]
    if not found:
        raise UserError(
            f"--resume auto finds no run named {name!r} under runs/: start one without --resume, or give its folder"
        )
    return max(found, key=lambda path: (path / RUN_FILE).stat().st_mtime_ns)


def versions() -> dict[str, str]:
    """The versions of Python and the packages a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["gradnorm_kernels"] = sys.modules["gradnorm_kernels"].__version__
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def machine(device: torch.device) -> dict[str, Any]:
    """The machine of a run; ``device``: the model's."""
    found = {
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "compute_capability": f"{major}.{minor}",
            "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    """The version of the GPU's driver from nvidia-smi; None where it cannot be run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def command_line() -> str:
    """The command that started this process, as a shell reads it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def describe_run(settings: Settings, model: Any, tracked: list[str]) -> dict[str, Any]:
    """The content of run.json for a run that starts now."""
    return {
        "command": command_line(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit() or settings.commit or None,
        "machine": machine(model.device)
        | {"threads_from": choose_threads(settings.num_threads)[1], "openmp_waiting": waiting()},
        "config": dataclasses.asdict(settings),
        "tasks": [task["name"] for task in settings.tasks],
        "model": settings.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tracked_layers": tracked,
    }
