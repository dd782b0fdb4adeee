"""The steps of ``make gpu-check``: what runs on a GPU, in which order, and which steps were requested."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES
from tools.gpu_check.isolated import SILENCE
from tools.gpu_check.running import Step

#: The stages; the first four are the default.
STAGES = {
    "check": "the build and all tests in tests/gpu",
    "speed": "every provider at the shapes of the performance targets, in up to four minutes",
    "step": "a whole training step at the sizes of a 3B model, or of a 0.5B one on a GPU with less than 64 GiB",
    "sanitize": "compute-sanitizer on both backends: memcheck, racecheck, synccheck",
    "tune": "the tiles of the Triton and CUDA kernels at four shapes",
    "costs": "the rows that the cost model is fitted to, with the tuned tiles",
    "full": "every layer and length, as far as the time allows, with the tuned tiles",
    "profile": "ncu on the weight-gradient kernels at 4096 x 4096",
}
DEFAULT = tuple(STAGES)[:4]
#: One kernel, on any GPU.
ONE_KERNEL = "import torch; assert torch.ones(1000, device='cuda').sum().item() == 1000"
#: The (d_in, d_out) that are tuned: square 4096, a wide layer, one with too few tiles to fill a GPU and one that just
#: fills it.
TUNED = ((4096, 4096), (2048, 11008), (576, 576), (1536, 1536))
# The CUDA kernel has few tiles: all are timed at each shape, and the choice is then made by hand.
_CUDA_TILES = ("--providers", "weight_grad", *(f"cuda_{name}" for name in CUDA_CANDIDATES))
_CUDA_TILES += ("--lengths", "2048", "256", "--ragged", "--gram", "--shapes")
_CUDA_TILES += ("llama-3.1-8b.q", "qwen2.5-3b.gate_up", "qwen2.5-1.5b.q", "smollm2-135m.gate_up")
# The whole step at its default sizes needs about 60 GiB, and at these 12 (both estimated, not measured).
_STEP_BYTES = 64 << 30
_SMALLER_STEP = ("--model", "qwen2.5-0.5b", "--length", "256")
# NVIDIA's profiler locks the clocks by default.
_NCU = ("ncu", "--clock-control", "none")
# Errors of API calls are not reported: CUDA's own libraries probe for features.
_SANITIZER = ("--report-api-errors", "no", "--error-exitcode", "9")


def pytest_command(python: str, *arguments: str) -> list[str]:
    """pytest on a machine where plugins may be missing: pyproject.toml's settings for them would be errors."""
    settings = ["-o", "addopts=-ra --strict-markers --import-mode=importlib", "-p", "no:cacheprovider"]
    return [python, "-m", "pytest", *settings, "-q", "--tb=short", *arguments]


def isolated(python: str, folder: Path, name: str, *arguments: str, silence: float = SILENCE) -> list[str]:
    """The same in isolation: a test that ends its process costs only itself. The journal is <name>.jsonl."""
    own = ["--silence", str(silence), str(folder / f"{name}.jsonl")]
    return [python, "-m", "tools.gpu_check.isolated", *own, "--", *pytest_command(python, *arguments)]


def parts_of_the_tests() -> dict[str, str]:
    """The steps of the tests with their ``-k`` expressions: every test is in exactly one.

    They run in parallel: a process spends its time on compilation, on the references and on waiting for the GPU.
    """
    found = {"tests-others": "not cuda and not bf16 and not fp16 and not fp32"}
    kinds = {f"triton-{dtype}": f"triton and {dtype}" for dtype in ("bf16", "fp16", "fp32")} | {"cuda": "cuda"}
    for name, chosen in kinds.items():
        found[f"tests-{name}-wgrad"] = f"{chosen} and wgrad"
        found[f"tests-{name}-gram"] = f"{chosen} and gram and not wgrad"
        found[f"tests-{name}"] = f"{chosen} and not gram and not wgrad"
    return found


def gpu_steps(python: str, folder: Path, commit: str, memory: int | None = None) -> list[Step]:
    """All steps: the build and the tests in parallel, then the timed steps, each alone, then the slow tools.

    ``memory``: of the GPU, in bytes; None: enough for every step.
    """
    checks = _checks(python, folder)
    timed = _timed(python, folder, commit, tuple(step.name for step in checks), memory)
    return [*checks, *timed, *_tools(python, folder, commit, timed[-1].name)]


def _checks(python: str, folder: Path) -> list[Step]:
    steps = [
        Step("environment", [python, "-m", "gradnorm_kernels"], 60, stage="check"),
        Step("nvidia-smi", ["nvidia-smi"], 20, stage="check", program="nvidia-smi", extra=True),
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            240,
            stage="check",
            program="cmake",
            environment={"GRADNORM_BUILD_CUDA": "1"},
        ),
    ]
    # There are many processes. Each would use one thread per core for its references, and torch.compile would start
    # a pool of as many workers for one small kernel.
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for name, chosen in parts_of_the_tests().items():
        # torch.compile and the references of large layers, which are silent longest, are in the other steps.
        silence = 45.0 if name.endswith(("wgrad", "gram")) else SILENCE
        command = isolated(python, folder, name, "tests/gpu", "-k", chosen, silence=silence)
        # The tracker takes any available backend, which must not depend on the progress of the build.
        after = ("build",) if name == "tests-others" or name.startswith("tests-cuda") else ()
        needs = after if name.startswith("tests-cuda") else ()
        steps.append(Step(name, command, 240, after, needs, stage="check", environment=few))
    # Shows that the command works. Its times are meaningless while tests run, so they are kept separate.
    shape = ["--d_in", "1024", "--d_out", "1024", "--tokens", "4096", "--limit", "2"]
    command = [python, "-m", "gradnorm_kernels", "tune", *shape]
    apart = {"XDG_CACHE_HOME": str(folder / "tuned-once")}
    return [*steps, Step("tune-once", command, 90, stage="check", environment=apart)]


def _timed(python: str, folder: Path, commit: str, checked: tuple[str, ...], memory: int | None) -> list[Step]:
    """The timed steps, one after another."""
    sizes = _SMALLER_STEP if memory is not None and memory < _STEP_BYTES else ()
    bench = [python, "-m", "benchmarks"]
    tuned = {"XDG_CACHE_HOME": str(folder / "tuned")}

    def measure(name: str, benchmark: str, *arguments: str) -> list[str]:
        return [*bench, benchmark, *arguments, "--commit", commit, "--out", str(folder / f"{name}.json")]

    ops = ["--patience", "60"]
    steps = [
        Step("ops", measure("ops", "ops", "--quick", *ops, "--minutes", "3.5"), 240, stage="speed", reserve=165),
        Step(
            "step",
            measure("step", "step", "--pairs", "12", "--patience", "90", "--minutes", "2", *sizes),
            180,
            stage="step",
            reserve=120,
        ),
        *(
            Step(
                f"tune-{d_in}x{d_out}",
                [
                    *(python, "-m", "gradnorm_kernels", "tune", "--d_in", str(d_in), "--d_out", str(d_out)),
                    *("--tokens", "16384", "--kernels", "wgrad", "gram_norms"),
                ],
                # The first compiles the kernels that the others find in Triton's cache.
                60 if number else 150,
                stage="tune",
                environment=tuned,
                reserve=20 if number else 100,
            )
            for number, (d_in, d_out) in enumerate(TUNED)
        ),
        Step(
            "tune-cuda",
            measure("tiles-cuda", "ops", *_CUDA_TILES, *ops, "--minutes", "1.5"),
            120,
            stage="tune",
            reserve=60,
        ),
        Step(
            "costs",
            measure("costs", "ops", "--costs", *ops, "--minutes", "3"),
            240,
            stage="costs",
            environment=tuned,
            reserve=120,
        ),
        Step(
            "full",
            measure("full", "ops", "--full", *ops, "--minutes", "8"),
            540,
            stage="full",
            environment=tuned,
            reserve=60,
        ),
    ]
    files = tuple(folder / f"{name}.json" for name in ("ops", "step", "full"))
    steps += [
        Step("table", [*bench, "table"], 30, stage="speed", files=files, reserve=5, extra=True, show=28),
        Step("plots", [*bench, "plot", "--out", str(folder)], 40, stage="speed", files=files, reserve=10, extra=True),
    ]
    before, found = checked, []
    for step in steps:
        found.append(replace(step, after=before))
        before = (step.name,)
    return found


def _tools(python: str, folder: Path, commit: str, alone: str) -> list[Step]:
    """NVIDIA's tools, each with a trial: they may be missing, or lack permission for counters or the debugger."""
    profiler = Step("profiler", [*_NCU, python, "-c", ONE_KERNEL], 60, (alone,), stage="profile", program="ncu")
    one = ["compute-sanitizer", "--tool", "memcheck", *_SANITIZER, python, "-c", ONE_KERNEL]
    sanitizer = Step("sanitizer", one, 90, (alone,), stage="sanitize", program=one[0])
    steps = [replace(step, extra=True, trial=True) for step in (profiler, sanitizer)]
    before = "profiler"
    for backend in ("cuda", "triton"):
        name = f"profile-{backend}"
        case = ["--shapes", "llama-3.1-8b.q", "--lengths", "1024", "--ragged", "--gram", "--seconds", "0.001"]
        case += ["--providers", f"{backend}_wgrad", "--patience", "300", "--commit", commit]
        ncu = [*_NCU, "--set", "full", "--kernel-name", "regex:(wgrad|norms)", "--launch-count", "8"]
        ncu += ["--export", str(folder / name), "--force-overwrite"]
        # Times under the profiler are no results, so they go into a separate folder.
        command = [*ncu, python, "-m", "benchmarks", "ops", *case, "--out", str(folder / "under-ncu" / f"{name}.json")]
        step = Step(name, command, 150, (before, "profiler"), ("profiler",), stage="profile", program="ncu", extra=True)
        pages = ["ncu", "--import", str(folder / f"{name}.ncu-rep"), "--page", "details"]
        before = f"{name}-text"
        text = Step(before, pages, 40, (name,), stage="profile", program="ncu", extra=True, reserve=5)
        steps += [step, text]
    few = "(primes or turns)"  # samples that end within a tile, and samples and groups that alternate
    # No initcheck: the tests fill all new memory with NaN, so no memory is uninitialised.
    for tools in (("memcheck", "synccheck"), ("racecheck",)):
        for backend in ("triton", "cuda"):
            after = before
            for tool in tools:
                inner = pytest_command(python, "tests/gpu/test_traps.py", "-x", "-k", f"{backend} and fp16 and {few}")
                needed = ("sanitizer", "build") if backend == "cuda" else ("sanitizer",)
                name = f"{tool}-{backend}"
                steps.append(
                    Step(
                        name,
                        ["compute-sanitizer", "--tool", tool, *_SANITIZER, *inner],
                        200,
                        (after, *needed),
                        needed,
                        stage="sanitize",
                        program="compute-sanitizer",
                        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                        extra=True,
                    )
                )
                after = name
    return steps


def choose(
    steps: list[Step], stages: Iterable[str] = DEFAULT, only: Iterable[str] = (), skip: Iterable[str] = ()
) -> list[Step]:
    """The steps of these stages; ``only`` and ``skip`` take prefixes of names.

    A chosen step brings the steps that it needs, the environment record and the build. A step that followed one that is
    left out follows that one's predecessors instead. Each step keeps the time that later ones reserve.

    Raises:
        ValueError: no step's name starts with one of ``only`` or ``skip``.
    """
    stages, only, skip = set(stages), tuple(only), tuple(skip)
    for text in (*only, *skip):
        if not any(step.name.startswith(text) for step in steps):
            raise ValueError(f"no step begins with {text!r}; there are {', '.join(step.name for step in steps)}")
    chosen = {step.name for step in steps if (step.name.startswith(only) if only else step.stage in stages)}
    if chosen & {"full", "step"} and not only:
        chosen |= {"table", "plots"}
    for step in reversed(steps):
        if step.name in chosen:
            chosen |= set(step.needs) | {"environment", "build"}
    chosen -= {step.name for step in steps if skip and step.name.startswith(skip)}
    before: dict[str, tuple[str, ...]] = {}
    found: list[Step] = []
    for step in steps:
        after = tuple(dict.fromkeys(name for other in step.after for name in before[other]))
        before[step.name] = (step.name,) if step.name in chosen else after
        if step.name in chosen:
            found.append(replace(step, after=after, needs=tuple(name for name in step.needs if name in chosen)))
    return [replace(step, keep=sum(later.reserve for later in found[place + 1 :])) for place, step in enumerate(found)]


def dry_steps(python: str, folder: Path, commit: str, short: bool) -> list[Step]:
    """The steps of a dry run: what can be built, compiled, collected, interpreted and started without a GPU."""
    interpreted = {"TRITON_INTERPRET": "1"}
    bench = [python, "-m", "benchmarks"]
    shape = ["--d_in", "64", "--d_out", "64", "--tokens", "999", "--limit", "1"]
    steps = [
        Step("environment", [python, "-m", "gradnorm_kernels"], 60),
        Step("collect", pytest_command(python, "tests/gpu", "--collect-only"), 120),
        # It accepts its arguments and reports why it cannot run.
        Step("tune", [python, "-m", "gradnorm_kernels", "tune", *shape], 60, code=2),
    ]
    few = ["tests/gpu", "--rehearse", "-k", "(primes or tracker or share) and not wgrad"]
    if short:
        return [
            *steps,
            Step("rehearsal", isolated(python, folder, "rehearsal", *few, silence=200), 200, environment=interpreted),
        ]
    cache = folder / "build"
    build = [python, "setup.py", "build_ext", "--build-lib", str(cache / "lib"), "--build-temp", str(cache / "temp")]
    ops, step = ([*bench, name, "--dry-run", "--commit", commit] for name in ("ops", "step"))
    rehearsal = isolated(python, folder, "rehearsal", "tests/gpu", "--rehearse", silence=600)
    return [
        *steps,
        Step("build", build, 900, program="cmake"),
        Step("compile", [python, "-m", "tests.compiled.report", "--arch", "80", "90"], 900),
        Step("rehearsal", rehearsal, 1800, environment=interpreted),
        Step("ops", [*ops, "--out", str(folder / "ops.json")], 300),
        Step("step", [*step, "--out", str(folder / "step.json")], 300),
    ]
