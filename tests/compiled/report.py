"""``make kernels-report``: every shipped kernel compiled for each kind of GPU without one, one JSON line each.

The exit status is 1 if a form does not compile, spills, or asks for more than its GPU has (:func:`complaints`), unless
that is known (``KNOWN``, ``KNOWN_FORMS``).

A line has the kernel, the architecture, the tile, warps, stages, registers, stack and shared memory in bytes, how many
instructions of the machine code spill (LDL and STL), and how many multiply matrices (HMMA, HGMMA of Hopper's wgmma, and
UTCHMMA of Blackwell's tcgen05). ``partitions`` are those that Triton gives to warps of their own. How well the loops
are pipelined is read from the waits: ``grouped`` counts the wgmma that something waits for by themselves (all of them
where ptxas serialises them, its advice C7515), ``in_flight`` is how many groups of wgmma the most patient wait leaves
running, ``copies_in_flight`` the same for groups of cp.async. ``overwritten`` counts the wgmma with an operand in
registers that are written too early, ``unfenced`` the products that may read memory before copies to it are seen
(:func:`overwritten`, :func:`unfenced`). Triton's kernels are compiled in the form in which they
are launched, for each entry of the frozen configs; the CUDA kernels are read from the module ``gradnorm_kernels._C``.
Triton's package brings the disassembler.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from gradnorm_kernels.tuning import costs as tuning
from gradnorm_kernels.tuning.tiles import KernelConfig

ELEMENTS = {2: ("bf16", "fp16"), 4: ("fp32",)}
#: Compute capability -> (the architecture whose tiles it takes, bytes of shared memory that a block may have).
CHIPS = {
    80: (80, 166_912),
    86: (80, 101_376),
    89: (80, 101_376),
    90: (90, 232_448),
    100: (100, 232_448),
    103: (100, 232_448),
    120: (80, 101_376),
}
#: Those that have tiles of their own. The others run the same source.
ARCHITECTURES = (80, 90)
#: (compute capability, kernel, element) that spill there and are not mended yet: docs/gpus.md says so.
KNOWN = {
    (100, "wgrad_sm90_kernel", "bf16"),
    (103, "wgrad_sm90_kernel", "bf16"),
    (120, "wgrad_sm80_kernel", "fp32"),
}
#: The same, but their :func:`representative` form spills nothing.
KNOWN_FORMS = {(100, "wgrad_sm80_kernel", "fp32"), (103, "wgrad_sm80_kernel", "fp32")}

#: Compute capabilities with tensor memory: an operand of fewer bits is widened before the launch there (``widened``),
#: and torch multiplies the sums of groups.
TENSOR_MEMORY = (100, 103)
#: Kernels that are compiled for a config, but multiply nothing.
NO_PRODUCTS = {
    *("schedule_kernel", "split_fixup_kernel", "finish_kernel", "position_sums_kernel", "row_sums_kernel"),
    *("token_order_kernel", "segment_table_kernel"),
}


@dataclass(frozen=True)
class Job:
    """One kernel in one form for one architecture. ``kernel`` is a function of Triton's."""

    kernel: Any
    arch: int
    element: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    config: KernelConfig | None


def shipped(arch: int) -> list[KernelConfig]:
    """The configs of every frozen file for an architecture, or for one that serves it, each once."""
    folder = Path(tuning.__file__).parent / "configs"
    names = {field.name for field in fields(KernelConfig)}
    found = {}
    for path in sorted(folder.glob("*.json")):
        for entry in tuning.frozen(path.stem).get("kernels", {}).get("entries", ()):
            config = KernelConfig(**{name: value for name, value in entry.items() if name in names})
            if config.arch in tuning.lineage(arch):
                found[config] = None
    return list(found)


def modules() -> Iterator[Any]:
    """The modules of the triton backend that define kernels."""
    package = importlib.import_module("gradnorm_kernels.backends.triton")
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, "signatures"):
            yield module


def jobs(architectures: Sequence[int] = tuple(CHIPS)) -> list[Job]:
    """Everything that is shipped, for these compute capabilities, in a fixed order, each once.

    float16 is compiled like bfloat16 but for the name of its products: of a kernel's forms for it, only the first.
    """
    found: dict[str, Job] = {}
    for module in modules():
        for arch in architectures:
            configs = [c for c in shipped(CHIPS[arch][0]) if c.kernel in module.CONFIGS] if module.CONFIGS else [None]
            for config in configs:
                for element in ELEMENTS[config.element_bytes] if config else ("bf16", "fp16", "fp32"):
                    forms = _jobs_of(module, arch, element, config)
                    if element == "fp16":
                        forms = list({job.kernel.fn.__name__: job for job in reversed(forms)}.values())
                    for job in forms:
                        # Small kernels may not depend on the element, or on all of the config.
                        same = (job.kernel.fn.__name__, arch, job.types, job.constants, job.options)
                        found.setdefault(repr(same), job)
    return list(found.values())


def _jobs_of(module: Any, arch: int, element: str, config: KernelConfig | None) -> list[Job]:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    return [
        Job(kernel, arch, element, types, constants, options | (more[0] if more else {}), config)
        for kernel, types, constants, *more in module.signatures(config, element)
        if arch not in TENSOR_MEMORY
        or not (constants.get("LANES") or (element == "fp32" and types.get("x_ptr") in ("*bf16", "*fp16")))
    ]


def compile_job(job: Job) -> dict[str, Any]:
    """The line of a job. Raises what Triton raises where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(job.kernel.fn).parameters)
    types = {name: "constexpr" if name in job.constants else job.types[name] for name in names}
    aligned = [
        (names.index(name),)
        for name, kind in types.items()
        if kind.startswith("*") or (kind != "constexpr" and (name.endswith("_stride") or name.startswith("d_")))
    ]
    source = ASTSource(
        fn=job.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in job.constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", job.arch, 32)
    with _on(target):
        compiled = triton.compile(source, target=target, options=dict(job.options))
    line: dict[str, Any] = {"kernel": job.kernel.fn.__name__, "arch": f"sm_{job.arch}", "element": job.element}
    if job.config is not None:
        line["tile"] = [job.config.block_m, job.config.block_n, job.config.block_k]
    line |= {"warps": compiled.metadata.num_warps, "stages": compiled.metadata.num_stages}
    line["partitions"] = len(re.findall(r"^\s*partition\d+\(", compiled.asm["ttgir"], re.M))
    line |= {"form": {k: v for k, v in job.constants.items() if isinstance(v, bool)}, "triton": triton.__version__}
    line["unfenced"] = unfenced(compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (measured,) = inspect_binary(cubin.name)
    # Shared memory is asked for at launch; the binary knows only of what is static.
    return (
        line
        | {key: value for key, value in measured.items() if key not in ("arch", "function", "shared")}
        | {"shared": compiled.metadata.shared}
    )


@contextmanager
def _on(target: Any) -> Iterator[None]:
    """What a kernel learns of its GPU while it is compiled is ``target``'s."""
    import triton

    driver = triton.runtime.driver
    with patch.object(driver, "_active", SimpleNamespace(get_current_target=lambda: target)):
        yield


def tool(name: str) -> str:
    """The path of one of NVIDIA's binary tools: the toolkit's where there is one, else the one that Triton brings."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def _dump(option: str, path: str) -> str:
    result = subprocess.run([tool("cuobjdump"), option, path], capture_output=True, text=True, check=False)
    if result.returncode and "does not contain device code" not in result.stdout + result.stderr:
        raise RuntimeError(f"cuobjdump {option} {path} failed: {result.stdout}{result.stderr}")
    return result.stdout if result.returncode == 0 else ""


def inspect_binary(path: str) -> list[dict[str, Any]]:
    """Of every kernel in a cubin or a module: registers, stack, static shared memory, spills and matrix products."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    arch = ""
    for line in _dump("--dump-resource-usage", path).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):  # in a module; a cubin is for one architecture
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[arch, name] = {"registers": registers, "stack": stack, "local": local, "shared": shared}
    for (arch, name), code in _machine_code(path).items():
        # The part behind the dot says what kind: LDL.64, HGMMA.64x128x16.F32.BF16.
        words = [match[1] for match in re.finditer(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", code, re.M)]
        counted = {"spills": sum(w in ("LDL", "STL") for w in words), "mma": words.count("HMMA")}
        found[arch, name] |= counted | {"wgmma": words.count("HGMMA"), "tcgen05": words.count("UTCHMMA")}
        found[arch, name]["instructions"] = len(words)
        found[arch, name] |= {
            "grouped": len(re.findall(r"HGMMA\b[^;\n]*\bgsb0", code)),
            "in_flight": _largest(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", code),
            "copies_in_flight": _largest(r"\bDEPBAR\.LE SB0, (\w+)", code),
            "tma": words.count("UTMALDG"),
            "overwritten": overwritten(code),
        }
    return [{"arch": arch, "function": name, **facts} for (arch, name), facts in sorted(found.items())]


def _largest(pattern: str, code: str) -> int:
    """The largest number that a pattern finds; 0 if it finds none."""
    return max((int(number, 16) for number in re.findall(pattern, code)), default=0)


def overwritten(code: str) -> int:
    """How many wgmma have an operand in registers that are written before all wgmma are waited for.

    They are read while the product is made. Before CUDA 13.3 ptxas may give them to something else too early (NVIDIA's
    release notes of 13.3; triton pull request 11781): then the product is wrong now and then. Triton brings 12.8.
    """
    lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", code, re.M)
    count = 0
    for place, line in enumerate(lines):
        if match := re.match(r"HGMMA\S* R\d+, R(\d+)", line):
            operand = range(int(match[1]), int(match[1]) + 4)
            ends = (at for at in range(place, len(lines)) if re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", lines[at]))
            between = lines[place + 1 : next(ends, len(lines))]
            count += any(register in operand for line in between for register in _written(line))
    return count


def unfenced(ptx: str) -> int:
    """How many products of wgmma or tcgen05 have no fence between them and the copies that they wait for.

    cp.async writes shared memory by the generic proxy, those products read it by the async proxy. The copies of a
    pipelined loop are waited for with some left in flight; a wait for all of them follows its last product.
    """
    waits, count = False, 0
    for line in ptx.splitlines():
        if re.search(r"cp\.async\.wait_group\s+[1-9]", line):
            waits = True
        elif "fence.proxy.async" in line:
            waits = False
        elif re.search(r"wgmma\.mma_async|tcgen05\.mma", line):
            count += waits
    return count


def _written(line: str) -> range:
    """The registers that an instruction of the machine code writes."""
    match = re.match(r"([A-Z0-9_.]+)\s+(?:U?P\w+, )*R(\d+)", line)
    if match is None or "SETP" in match[1] or match[1].startswith("HGMMA"):
        return range(0)
    wide = 4 if ".128" in match[1] else 2 if re.search(r"64|WIDE|^CS2R$|^D[A-Z]", match[1]) else 1
    return range(int(match[2]), int(match[2]) + wide)


def _machine_code(path: str) -> dict[tuple[str, str], str]:
    """(architecture, function) -> its machine code, as the disassembler prints it."""
    found, arch = {}, ""
    for part in re.split(r"^(?=arch = |\s*Function : )", _dump("-sass", path), flags=re.M):
        if match := re.match(r"arch = (sm_\w+)", part):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", part):
            found[arch, match[1]] = part
    return found


def cuda_lines() -> list[dict[str, Any]]:
    """The kernels of ``gradnorm_kernels._C``; none where it was built without CUDA."""
    from gradnorm_kernels.backends import native

    if native.cuda_unavailable_reason() is not None:
        return []
    lines = inspect_binary(native.module().__file__)
    return [{"kernel": _demangled(line["function"]), **line} for line in lines]


def _demangled(name: str) -> str:
    command = shutil.which("c++filt") or shutil.which("cu++filt")
    if command is None:
        return name
    return subprocess.run([command, "-p", name], capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _all_jobs() -> list[Job]:
    return jobs()


def _compile_numbered(number: int) -> dict[str, Any]:
    job = _all_jobs()[number]
    line: dict[str, Any]
    try:
        return compile_job(job)
    except Exception as error:
        line = {"kernel": job.kernel.fn.__name__, "arch": f"sm_{job.arch}", "element": job.element}
        line["config"] = asdict(job.config) if job.config else None
        return line | {"error": f"{type(error).__name__}: {error}"}


def complaints(line: dict[str, Any]) -> list[str]:
    """What a shipped kernel must not have, by name."""
    if "error" in line:
        return ["does not compile"]
    found = [name for name in ("spills", "stack", "local") if line[name]]
    if line["shared"] > CHIPS[int(line["arch"].removeprefix("sm_"))][1]:
        found.append("more shared memory than there is")
    if line["element"] == "fp32" and (line["mma"] or line["wgmma"] or line["tcgen05"]):
        found.append("float32 multiplied as tf32")
    if line["unfenced"]:
        found.append("a product that may not see what it waits for")
    if line["overwritten"]:
        found.append("a product's operand that is written too early")
    if line["registers"] * line["warps"] * 32 > 65536:
        found.append("more registers than there are")
    return found


def spot(line: dict[str, Any]) -> tuple[int, str, str]:
    """What ``KNOWN`` and ``KNOWN_FORMS`` call a line: (compute capability, kernel, element)."""
    return int(line["arch"].removeprefix("sm_")), line["kernel"], line["element"]


def unexpected(line: dict[str, Any]) -> list[str]:
    """The complaints about a kernel that are not known."""
    return [
        what for what in complaints(line) if what not in ("spills", "stack") or spot(line) not in KNOWN | KNOWN_FORMS
    ]


def places(architectures: Sequence[int] = ARCHITECTURES) -> list[int]:
    """Places in :func:`jobs` of what is compiled for these compute capabilities."""
    return [place for place, job in enumerate(_all_jobs()) if job.arch in architectures]


def representative(architectures: Sequence[int] = ARCHITECTURES) -> list[int]:
    """Places in :func:`jobs` of one form per kernel, architecture and element: the last, which does the most.

    Elements that change little are left out: float16, except for the products of wgrad, and for kernels without
    products all but the first element.
    """
    found: dict[tuple[str, int, str], int] = {}
    for place in places(architectures):
        job = _all_jobs()[place]
        name = job.kernel.fn.__name__
        first = next((key for key in found if key[:2] == (name, job.arch)), (name, job.arch, job.element))
        alike = job.element == "fp16" and not name.startswith("wgrad")
        alike = alike or (name in NO_PRODUCTS and job.element != first[2])
        if not alike:
            found[name, job.arch, job.element] = place
    return list(found.values())


def triton_lines(processes: int | None, chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The lines of the :func:`jobs` at these places, in order, compiled afresh by several processes."""
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache  # inherited by the processes: nothing comes from an earlier run
        try:
            workers = processes or min(4, os.cpu_count() or 1)
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                yield from pool.map(_compile_numbered, chosen)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def main() -> int:
    """Print the report; 1 if something does not compile, or there is an unknown complaint about it."""
    parser = argparse.ArgumentParser(prog="python -m tests.compiled.report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(CHIPS), help="only for these")
    parser.add_argument("--processes", type=int, help="compile in so many processes (default: the cores, at most 4)")
    options = parser.parse_args()
    failed = False
    for line in triton_lines(options.processes, places(options.arch)):
        found = complaints(line)
        print(json.dumps(line | ({"complaints": found} if found else {})), flush=True)
        failed |= bool(unexpected(line))
    lines = cuda_lines()
    for line in lines:
        print(json.dumps(line), flush=True)
    if not lines:
        print("kernels-report: gradnorm_kernels._C holds no CUDA kernels here", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
