"""``make gpu-check``: on a machine with a GPU, everything that only a GPU can show, in under nine minutes.

Steps run one after the other or side by side, each with a limit of its own; one that fails or runs out of time does
not stop the others. All output goes into one folder: a log a step, JSON where a step makes it, and ``summary.json``,
written anew after every step, so that a run that is cut short leaves what it had.

It needs Python with torch, triton and pytest, and for the cuda backend nvcc, cmake, ninja and pybind11; it installs
nothing and fetches nothing. ``--dry-run`` walks every step as far as it goes without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MINUTES = 8.7


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds.

    ``after``: the steps that must have ended before. ``needs``: those of them that must also have passed. ``program``:
    what must be on PATH; without it the step is not run. ``code``: the exit status that means success.
    """

    name: str
    command: Sequence[str]
    limit: float
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    program: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    code: int = 0


def run_step(step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run a step in a process group of its own, which is ended as a whole when its time is over."""
    found: dict[str, Any] = {"name": step.name, "command": list(step.command), "limit": round(limit, 1)}
    if step.program is not None and shutil.which(step.program) is None:
        return found | {"status": "not run", "reason": f"{step.program} was not found on PATH", "seconds": 0.0}
    log, began = folder / f"{step.name}.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(step.command),
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
                os.killpg(process.pid, signal.SIGKILL)  # what the step started and left behind goes as well
            process.wait()
    status = "timed out" if code is None else "passed" if code == step.code else "failed"
    found |= {"status": status, "returncode": code, "seconds": round(time.monotonic() - began, 1), "log": log.name}
    lines = log.read_text(errors="replace").strip().splitlines()
    return found | {"last_line": lines[-1][:400] if lines else ""}


def run_steps(steps: Sequence[Step], folder: Path, facts: dict[str, Any], minutes: float) -> list[dict[str, Any]]:
    """Run all steps, each as soon as those before it have ended; the results in the order in which they ended."""
    deadline = time.monotonic() + 60 * minutes
    waiting, ended = list(steps), {}
    running: dict[Future[dict[str, Any]], Step] = {}
    began = time.monotonic()

    def write() -> None:
        results = list(ended.values())
        summary = facts | {"seconds": round(time.monotonic() - began, 1), "steps": results}
        summary["passed"] = not waiting and not running and all(r["status"] == "passed" for r in results)
        fresh = folder / ".summary.json"
        fresh.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(fresh, folder / "summary.json")

    with ThreadPoolExecutor(max(1, len(steps))) as pool:
        while waiting or running:
            for step in [s for s in waiting if all(name in ended for name in s.after)]:
                waiting.remove(step)
                left = deadline - time.monotonic()
                lacking = [name for name in step.needs if ended[name]["status"] != "passed"]
                reason = f"{lacking[0]} has not passed" if lacking else "no time is left" if left < 5 else None
                if reason is not None:
                    result = {"name": step.name, "status": "not run", "reason": reason, "seconds": 0.0}
                    ended[step.name] = result
                    report(result)
                else:
                    running[pool.submit(run_step, step, folder, min(step.limit, left))] = step
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended[running.pop(future).name] = future.result()
                report(future.result())
            write()
    write()
    return list(ended.values())


_PRINTING = threading.Lock()


def report(result: dict[str, Any]) -> None:
    """One line for people."""
    why = result.get("reason") or result.get("last_line", "")
    with _PRINTING:
        print(f"{result['status']:>9} {result['seconds']:6.1f} s  {result['name']}: {why[:110]}", flush=True)


def pytest_command(python: str, *arguments: str) -> list[str]:
    """pytest where plugins may be missing: under pyproject.toml's own rules, its settings for them would be errors."""
    settings = ["-o", "addopts=-ra --strict-markers --import-mode=importlib", "-p", "no:cacheprovider"]
    return [python, "-m", "pytest", *settings, "-q", *arguments]


def gpu_steps(python: str, folder: Path, commit: str, profile: bool) -> list[Step]:
    """What runs on a GPU. Tests side by side, then what is timed, alone."""
    tests = {
        **{f"tests-triton-{dtype}": f"triton and {dtype}" for dtype in ("bf16", "fp16", "fp32")},
        "tests-triton": "not cuda and not bf16 and not fp16 and not fp32",
        "tests-cuda": "cuda",
    }
    steps = [
        Step("environment", [python, "-m", "gradnorm_kernels"], 40),
        Step("nvidia-smi", ["nvidia-smi"], 20, program="nvidia-smi"),
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            200,
            program="cmake",
            environment={"GRADNORM_BUILD_CUDA": "1"},
        ),
    ]
    for name, chosen in tests.items():
        cuda = name == "tests-cuda"
        command = pytest_command(python, "tests/gpu", "-k", chosen, f"--junitxml={folder / name}.xml")
        steps.append(Step(name, command, 150, ("build",) if cuda else (), ("build",) if cuda else ()))
    for tool in ("memcheck", "racecheck"):
        for backend in ("triton", "cuda"):
            inner = pytest_command(python, "tests/gpu/test_traps.py", "-x", "-k", f"{backend} and fp16 and primes")
            steps.append(
                Step(
                    f"{tool}-{backend}",
                    ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *inner],
                    90,
                    (*tests, "build"),
                    ("build",) if backend == "cuda" else (),
                    program="compute-sanitizer",
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
            )
    checked = tuple(step.name for step in steps)
    bench = [python, "-m", "benchmarks"]
    ops, whole = ["--quick", "--minutes", "2", "--patience", "60"], ["--quick", "--minutes", "1.5"]
    out = [str(folder / f"{name}.json") for name in ("ops", "step")]
    shape = ["--d_in", "2048", "--d_out", "2048", "--tokens", "16384", "--limit", "10"]
    steps += [
        Step("ops", [*bench, "ops", *ops, "--commit", commit, "--out", out[0]], 200, checked),
        Step("step", [*bench, "step", *whole, "--commit", commit, "--out", out[1]], 130, ("ops",)),
        Step(
            "tune",
            [python, "-m", "gradnorm_kernels", "tune", *shape],
            60,
            ("step",),
            environment={"XDG_CACHE_HOME": str(folder / "tuned")},
        ),
        Step("plots", [*bench, "plot", *out, "--out", str(folder)], 30, ("tune",)),
    ]
    if profile:
        inner = pytest_command(python, "tests/gpu/test_traps.py", "-k", "real_layers and bf16")
        ncu = ["ncu", "--set", "full", "--launch-count", "40", "--kernel-name", "regex:(wgrad|gram|dot|norms)"]
        command = [*ncu, "--export", str(folder / "profile"), "--force-overwrite", *inner]
        steps.append(Step("profile", command, 180, ("plots",), program="ncu"))
    return steps


def dry_steps(python: str, folder: Path, commit: str, short: bool) -> list[Step]:
    """The same walk without a GPU: what can be built, compiled, collected, interpreted and started."""
    interpreted = {"TRITON_INTERPRET": "1"}
    bench = [python, "-m", "benchmarks"]
    shape = ["--d_in", "64", "--d_out", "64", "--tokens", "999", "--limit", "1"]
    steps = [
        Step("environment", [python, "-m", "gradnorm_kernels"], 60),
        Step("collect", pytest_command(python, "tests/gpu", "--collect-only"), 120),
        # Its arguments are right, and it says why it cannot go on.
        Step("tune", [python, "-m", "gradnorm_kernels", "tune", *shape], 60, code=2),
    ]
    few = pytest_command(python, "tests/gpu", "--rehearse", "-k", "(primes or tracker or share) and not wgrad")
    if short:
        return [*steps, Step("rehearsal", few, 200, environment=interpreted)]
    cache = folder / "build"
    build = [python, "setup.py", "build_ext", "--build-lib", str(cache / "lib"), "--build-temp", str(cache / "temp")]
    return [
        *steps,
        Step("build", build, 900, program="cmake"),
        Step("compile", [python, "-m", "tests.compiled.report"], 900),
        Step("rehearsal", pytest_command(python, "tests/gpu", "--rehearse"), 1800, environment=interpreted),
        Step("ops", [*bench, "ops", "--dry-run", "--commit", commit, "--out", str(folder / "ops.json")], 300),
        Step("step", [*bench, "step", "--dry-run", "--commit", commit, "--out", str(folder / "step.json")], 300),
    ]


def machine() -> dict[str, Any]:
    """What the summary says of where it ran."""
    import torch

    from gradnorm_kernels import __main__ as main
    from gradnorm_kernels import tuning

    there = torch.cuda.is_available()
    gpu = tuning.chip(torch.device("cuda", 0)).gpu if there else "no-gpu"
    return {
        "gpu": gpu,
        "commit": main.commit() or "unknown",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def main(arguments: list[str]) -> int:
    """0 if every step passed, 1 if one did not, 2 where there is no GPU and no --dry-run."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the results folder (default: benchmarks/results/<gpu>-<commit>)")
    parser.add_argument("--commit", help="what the results are of, where there is no checkout to ask")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the time for all steps together")
    parser.add_argument("--profile", action="store_true", help="also profile the kernels with ncu")
    parser.add_argument("--dry-run", action="store_true", help="walk the steps as far as they go without a GPU")
    parser.add_argument("--short", action="store_true", help="of a dry run, only what takes a minute")
    chosen = parser.parse_args(arguments)
    facts = machine()
    if facts["gpu"] == "no-gpu" and not chosen.dry_run:
        parser.error("there is no GPU that torch can use; --dry-run walks the steps without one")
    facts["commit"] = chosen.commit or facts["commit"]
    folder = (chosen.out or ROOT / "benchmarks" / "results" / f"{facts['gpu']}-{facts['commit']}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"gpu-check: {facts['gpu']}, results in {folder}", flush=True)
    if chosen.dry_run:
        steps, minutes = dry_steps(sys.executable, folder, facts["commit"], chosen.short), 90.0
    else:
        steps = gpu_steps(sys.executable, folder, facts["commit"], chosen.profile)
        minutes = chosen.minutes + (3 if chosen.profile else 0)
    results = run_steps(steps, folder, facts | {"dry_run": chosen.dry_run}, minutes)
    return 0 if all(result["status"] == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
