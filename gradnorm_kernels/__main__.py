"""``python -m gradnorm_kernels``: what is installed here, which backends can run, and why the others cannot.

``python -m gradnorm_kernels tune --d_in .. --d_out .. --tokens ..``: the fastest tiles of the Triton kernels for a
shape on this machine's GPU (:mod:`gradnorm_kernels.tuning.autotune`).

``python -m gradnorm_kernels check``: every backend that runs here, held to float64 (:mod:`gradnorm_kernels.selfcheck`).
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, backends, selfcheck
from .backends import native
from .tuning import autotune, costs, tiles


def _version_of(package: str) -> str:
    """A package's version, or why there is none: triton is missing on purpose where there is no Linux."""
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError as error:
        return f"not importable ({error})"


def commit() -> str | None:
    """The commit this file was checked out at, with a mark for uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return result.stdout.strip() or f"unknown ({result.stderr.strip()})"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _compiled() -> str:
    """What the compiled module was built with, or why there is none."""
    info = native.build_info()
    if info is None:
        return f"none: {native.unavailable_reason()}"
    return ", ".join(f"{key} {value}" for key, value in info.items())


def _tuned() -> str:
    """How many tuned configs this machine's GPU has, and where."""
    if not torch.cuda.is_available():
        return f"none: there is no GPU (they would be in {tiles.tuned_folder()})"
    chip = costs.chip(torch.device("cuda", torch.cuda.current_device()))
    return f"{len(tiles.tuned(chip.gpu))} configs for {chip.gpu} in {tiles.tuned_folder()}"


def describe() -> str:
    """The text this module prints: one "name: value" per line, then one line per backend."""
    facts = {"gradnorm_kernels": __version__, "commit": commit(), "python": platform.python_version()}
    facts |= {"platform": platform.platform(), "torch": torch.__version__, "triton": _version_of("triton")}
    facts |= {"cuda (torch built for)": torch.version.cuda or "none: a CPU build", "gpu": _gpus()}
    facts |= {"compiled module": _compiled(), "tuned": _tuned()}
    lines = [f"{name}: {value}" for name, value in facts.items() if value is not None]
    lines.append("backends:")
    for name, reason in backends.status().items():
        lines.append(f"  {name}: " + ("can run here" if reason is None else f"cannot run here: {reason}"))
    return "\n".join(lines)


USAGE = """usage: python -m gradnorm_kernels [check | tune] [--help]

without a command  print versions, and which backends can run here and why the others cannot
check              hold every backend that runs here to float64 on small, difficult inputs
tune               try tiles of the Triton kernels for one shape on this GPU and keep the fastest

`check --help` and `tune --help` list their arguments."""


def main(arguments: list[str]) -> int:
    """Print the facts, tune, check, or say how it is called; 2 for anything else."""
    if not arguments:
        print(describe())
        return 0
    if arguments[0] == "tune":
        return autotune.main(arguments[1:])
    if arguments[0] == "check":
        return selfcheck.main(arguments[1:])
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    print(f"{USAGE}\n\nno command is called {arguments[0]!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
