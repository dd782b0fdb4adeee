"""``make gpu-check``: everything that only a GPU can show, in under nine minutes on a machine with a GPU.

Steps run one after another or in parallel, each with its own time limit. A step that fails or times out does not stop
the others, and a test that ends its process does not stop the tests after it. All output goes into one folder: a log
per step, JSON from the steps that write it, ``failures.md``, and ``summary.json``, rewritten after every step so that
an interrupted run keeps its results. The end of the output repeats the failures.

It needs Python with torch, triton and pytest, and for the cuda backend nvcc, cmake, ninja and pybind11. It installs and
downloads nothing. ``--stages``, ``--only`` and ``--skip`` select steps; ``--dry-run`` runs what works without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check import reporting
from tools.gpu_check.running import ROOT, Step, counts, line, run_steps, write_json
from tools.gpu_check.steps import DEFAULT, STAGES, choose, dry_steps, gpu_steps

MINUTES = 8.7
#: Files larger than this are left out of the archive, which must stay easy to copy.
LARGEST = 4 << 20


def machine() -> dict[str, Any]:
    """The summary's description of the machine and the versions."""
    import torch

    from gradnorm_kernels import __main__ as main
    from gradnorm_kernels.tuning import costs as tuning

    there = torch.cuda.is_available()
    gpu = tuning.chip(torch.device("cuda", 0)).gpu if there else "no-gpu"
    return {
        "gpu": gpu,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if there else None,
        "commit": main.commit() or "unknown",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def archive(folder: Path, path: Path) -> None:
    """Write the folder as one compressed file, atomically. Files larger than ``LARGEST`` are left out."""
    fresh = path.with_name(f".{path.name}")
    with tarfile.open(fresh, "w:gz", compresslevel=4) as tar:
        for file in sorted(folder.rglob("*")):
            # A running step may remove or extend its files while they are read.
            with contextlib.suppress(OSError):
                inside = file != path and not file.name.startswith(".") and file.is_file()
                if inside and file.stat().st_size <= LARGEST:
                    tar.add(file, f"{folder.name}/{file.relative_to(folder)}")
    os.replace(fresh, path)


class Keeper:
    """Writes the archive after each step, unless writing it would take more than a thirtieth of the time."""

    def __init__(self, folder: Path, path: Path | None) -> None:
        self._folder, self._path, self._next = folder, path, 0.0

    def __call__(self, last: bool = False) -> None:
        if self._path is None or (not last and time.monotonic() < self._next):
            return
        began = time.monotonic()
        archive(self._folder, self._path)
        now = time.monotonic()
        self._next = now + 30 * (now - began)


def conclude(folder: Path, steps: Sequence[Step], results: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Write the test report and return the end of the output, with the failed steps last."""
    found = reporting.collect(folder)
    (folder / "failures.md").write_text(reporting.markdown(found))
    write_json(folder / "summary.json", summary | {"tests": found.summary()})
    shown = []
    for step in steps:
        log = folder / f"{step.name}.log"
        if step.show and log.exists():
            shown += [f"--- {step.name}", *log.read_text(errors="replace").strip().splitlines()[: step.show]]
    shown += ["--- tests", reporting.text(found)]
    bad = [line(result) for result in results if result["status"] != "passed"]
    shown += ["--- steps", *(bad or ["all passed"])]
    return "\n".join(text[:200] for part in shown for text in part.splitlines())


def main(arguments: list[str]) -> int:
    """0 if every required step passed, 1 if one did not, 2 without a GPU and without --dry-run."""
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the results folder (default: benchmarks/results/<gpu>-<commit>)")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="also write the results folder into this .tar.gz")
    parser.add_argument("--commit", help="the commit, if this is no git checkout")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit for all steps together")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(DEFAULT), help=stages)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only steps whose names start with this")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="no steps whose names start with this")
    parser.add_argument("--profile", action="store_true", help="also the stage profile")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    parser.add_argument("--dry-run", action="store_true", help="run the steps that work without a GPU")
    parser.add_argument("--short", action="store_true", help="with --dry-run: only what takes a minute")
    chosen = parser.parse_args(arguments)
    facts = machine()
    if facts["gpu"] == "no-gpu" and not (chosen.dry_run or chosen.list):
        parser.error("there is no GPU that torch can use; --dry-run walks the steps without one")
    facts["commit"] = chosen.commit or facts["commit"]
    folder = (chosen.out or ROOT / "benchmarks" / "results" / f"{facts['gpu']}-{facts['commit']}").resolve()
    minutes = chosen.minutes
    try:
        if chosen.dry_run:
            steps, minutes = dry_steps(sys.executable, folder, facts["commit"], chosen.short), 90.0
        else:
            wanted = [*chosen.stages, *(["profile"] if chosen.profile else [])]
            steps = gpu_steps(sys.executable, folder, facts["commit"], facts["memory_bytes"])
            steps = choose(steps, wanted, chosen.only, chosen.skip)
    except ValueError as error:
        parser.error(str(error))
    if chosen.list:
        print("\n".join(f"{step.name}: {step.limit:.0f} s, keeps {step.keep:.0f} s" for step in steps))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(folder, chosen.archive.resolve() if chosen.archive else None)
    print(f"gpu-check: {facts['gpu']}, results in {folder}", flush=True)
    facts |= {"dry_run": chosen.dry_run}
    results = run_steps(steps, folder, facts, minutes, keeper)
    passed = not any(map(counts, results))
    print(conclude(folder, steps, results, facts | {"steps": results, "passed": passed}), flush=True)
    keeper(last=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
