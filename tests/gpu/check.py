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
import re
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
    what must be on PATH; without it the step is not run. ``code``: the exit status that means success. ``keep``:
    seconds of the time for all that must be left when the step ends. ``extra``: only a failure counts, not that it was
    not run or not finished. ``trial``: a first try of a tool that a machine may refuse, which then was not run.
    """

    name: str
    command: Sequence[str]
    limit: float
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    program: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    code: int = 0
    keep: float = 0.0
    extra: bool = False
    trial: bool = False


def run_step(step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run a step in a process group of its own, which is ended as a whole when its time is over."""
    found: dict[str, Any] = {"name": step.name, "command": list(step.command), "limit": round(limit, 1)}
    found["extra"] = step.extra
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
    found["last_line"] = lines[-1][:400] if lines else ""
    if step.trial:
        complaints = [line for line in lines if _COMPLAINT.match(line)]
        if complaints or status != "passed":
            said = complaints[0] if complaints else found["last_line"]
            return found | {
                "status": "not run",
                "reason": f"{step.program} on one kernel ({status}): {said[:400]}",
            }
    return found


def run_steps(steps: Sequence[Step], folder: Path, facts: dict[str, Any], minutes: float) -> list[dict[str, Any]]:
    """Run all steps, each as soon as those before it have ended; the results in the order in which they ended."""
    deadline = time.monotonic() + 60 * minutes
    waiting, ended = list(steps), {}
    running: dict[Future[dict[str, Any]], Step] = {}
    began = time.monotonic()

    def write() -> None:
        results = list(ended.values())
        summary = facts | {"seconds": round(time.monotonic() - began, 1), "steps": results}
        summary["passed"] = not waiting and not running and not any(map(counts, results))
        fresh = folder / ".summary.json"
        fresh.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(fresh, folder / "summary.json")

    with ThreadPoolExecutor(max(1, len(steps))) as pool:
        while waiting or running:
            for step in [s for s in waiting if all(name in ended for name in s.after)]:
                waiting.remove(step)
                left = deadline - time.monotonic()
                lacking = [name for name in step.needs if ended[name]["status"] != "passed"]
                limit = min(step.limit, left - step.keep)
                reason = _lacks(ended[lacking[0]]) if lacking else "no time is left" if left - step.keep < 5 else None
                if reason is not None:
                    result = {"name": step.name, "status": "not run", "reason": reason, "seconds": 0.0}
                    result["extra"] = step.extra
                    ended[step.name] = result
                    report(result)
                else:
                    running[pool.submit(run_step, step, folder, limit)] = step
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended[running.pop(future).name] = future.result()
                report(future.result())
            write()
    write()
    return list(ended.values())


def counts(result: dict[str, Any]) -> bool:
    """Whether a result makes the whole a failure."""
    return result["status"] != "passed" and not (result["extra"] and result["status"] != "failed")


def _lacks(result: dict[str, Any]) -> str:
    return f"{result['name']} has not passed" + (f": {result['reason']}" if "reason" in result else "")


_PRINTING = threading.Lock()
# How compute-sanitizer and ncu begin a line about what they cannot do.
_COMPLAINT = re.compile(r"==ERROR==|=+ (Internal Sanitizer )?Error\b")


def report(result: dict[str, Any]) -> None:
    """One line for people."""
    why = result.get("reason") or result.get("last_line", "")
    with _PRINTING:
        print(f"{result['status']:>9} {result['seconds']:6.1f} s  {result['name']}: {why[:110]}", flush=True)


def pytest_command(python: str, *arguments: str) -> list[str]:
    """pytest where plugins may be missing: under pyproject.toml's own rules, its settings for them would be errors."""
    settings = ["-o", "addopts=-ra --strict-markers --import-mode=importlib", "-p", "no:cacheprovider"]
    return [python, "-m", "pytest", *settings, "-q", *arguments]


#: Seconds for what is timed: with less, the tests stop where they are.
TIMED = 280.0
#: One kernel, on whatever GPU there is.
ONE_KERNEL = "import torch; assert torch.ones(1000, device='cuda').sum().item() == 1000"


def parts_of_the_tests() -> dict[str, str]:
    """The tests' steps and what pytest's ``-k`` picks for each: every test is in one of them.

    Nearly all of the time goes into compiling, which one process does one kernel after the other.
    """
    found = {"tests-triton": "not cuda and not bf16 and not fp16 and not fp32", "tests-cuda": "cuda"}
    for dtype in ("bf16", "fp16", "fp32"):
        found[f"tests-triton-{dtype}-wgrad"] = f"triton and {dtype} and wgrad"
        found[f"tests-triton-{dtype}-gram"] = f"triton and {dtype} and gram and not wgrad"
        found[f"tests-triton-{dtype}"] = f"triton and {dtype} and not gram and not wgrad"
    return found


def gpu_steps(python: str, folder: Path, commit: str, profile: bool) -> list[Step]:
    """What runs on a GPU: the build and tests side by side, then what is timed, alone, then what runs slowly.

    NVIDIA's tools may be missing, or be refused the GPU's counters or debugger: each is tried first.
    """
    # Errors of API calls are left out: CUDA's own libraries probe for what there is.
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    sanitizer = {tool: ["compute-sanitizer", "--tool", tool, *options] for tool in ("memcheck", "racecheck")}
    trials = {"sanitizer": sanitizer["memcheck"], **({"profiler": ["ncu"]} if profile else {})}
    steps = [
        Step("environment", [python, "-m", "gradnorm_kernels"], 40),
        Step("nvidia-smi", ["nvidia-smi"], 20, program="nvidia-smi", extra=True),
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            200,
            program="cmake",
            environment={"GRADNORM_BUILD_CUDA": "1"},
            keep=TIMED,
        ),
        *(
            Step(name, [*tool, python, "-c", ONE_KERNEL], 60, program=tool[0], keep=TIMED, extra=True, trial=True)
            for name, tool in trials.items()
        ),
    ]
    # Many processes, whose references on the CPU would else take a thread a core each.
    few_threads = {"OMP_NUM_THREADS": "2"}
    for name, chosen in parts_of_the_tests().items():
        built = ("build",) if name == "tests-cuda" else ()
        command = pytest_command(python, "tests/gpu", "-k", chosen, f"--junitxml={folder / name}.xml")
        steps.append(Step(name, command, 200, built, built, environment=few_threads, keep=TIMED))
    checked = tuple(step.name for step in steps)
    bench = [python, "-m", "benchmarks"]
    ops, whole = ["--quick", "--minutes", "2", "--patience", "60"], ["--quick", "--minutes", "1.5"]
    out = [str(folder / f"{name}.json") for name in ("ops", "step")]
    shape = ["--d_in", "2048", "--d_out", "2048", "--tokens", "16384", "--limit", "4"]
    steps += [
        Step("ops", [*bench, "ops", *ops, "--commit", commit, "--out", out[0]], 200, checked, keep=TIMED - 150),
        Step("step", [*bench, "step", *whole, "--commit", commit, "--out", out[1]], 130, ("ops",), keep=15),
        Step(
            "tune",
            [python, "-m", "gradnorm_kernels", "tune", *shape],
            60,
            ("step",),
            environment={"XDG_CACHE_HOME": str(folder / "tuned")},
            keep=10,
        ),
        Step("plots", [*bench, "plot", *out, "--out", str(folder)], 30, ("tune",)),
    ]
    if profile:
        inner = pytest_command(python, "tests/gpu/test_traps.py", "-k", "real_layers and bf16")
        ncu = ["ncu", "--set", "full", "--launch-count", "40", "--kernel-name", "regex:(wgrad|gram|dot|norms)"]
        command = [*ncu, "--export", str(folder / "profile"), "--force-overwrite", *inner]
        steps.append(Step("profile", command, 180, ("plots", "profiler"), ("profiler",), program="ncu", extra=True))
    alone = steps[-1].name
    few = "(primes or turns)"  # samples and groups that end within a tile, and between tokens of others
    for tool, command in sanitizer.items():
        for backend in ("triton", "cuda"):
            inner = pytest_command(python, "tests/gpu/test_traps.py", "-x", "-k", f"{backend} and fp16 and {few}")
            needed = ("sanitizer", "build") if backend == "cuda" else ("sanitizer",)
            steps.append(
                Step(
                    f"{tool}-{backend}",
                    [*command, *inner],
                    90,
                    (alone, *needed),
                    needed,
                    program="compute-sanitizer",
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    extra=True,
                )
            )
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
    """0 if every step passed that had to, 1 if one did not, 2 where there is no GPU and no --dry-run."""
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
    return int(any(map(counts, results)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
