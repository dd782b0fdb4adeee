"""What the compiler makes of the kernels for sm_80 and of those that both architectures share, without a GPU.

Tensor-core instructions and asynchronous copies where they belong, nothing in local memory, no more registers than the
launch bounds leave.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit, on PATH")


class Source(NamedTuple):
    """``kernels``: how many a file has. ``registers``: the most one may use: 65536 over the threads of its blocks."""

    file: str
    arch: int
    kernels: int
    registers: int
    products: bool


SOURCES = (
    Source("wgrad_norm_sm80.cu", 80, 4, 255, True),
    Source("gram_sm80.cu", 80, 2, 168, True),  # three blocks of 128 threads
    Source("gram_sm80.cu", 90, 2, 168, True),
    Source("reduce.cu", 80, 4, 128, False),  # two blocks of 256
    Source("reduce.cu", 90, 4, 128, False),
    Source("schedule.cu", 80, 1, 128, False),
    Source("schedule.cu", 90, 1, 128, False),
    Source("segment_table.cu", 80, 1, 128, False),
)


def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one in triton's package. Skips where there is neither."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, and there is no triton to have one")
        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not packaged.exists():
            pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's package")
        found = str(packaged)
    return found


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: f"{source.file}-sm{source.arch}")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, str, str]:
    """(the source, what the compiler says, the machine code)."""
    source: Source = request.param
    target = tmp_path_factory.mktemp("sass") / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-DGRADNORM_WITH_CUDA", f"-arch=sm_{source.arch}", "-Xptxas=-v"]
    command += ["-Xcompiler=-Wall,-Wextra", "-cubin", str(ROOT / "csrc" / source.file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dump = subprocess.run([cuobjdump(), "--dump-sass", str(target)], capture_output=True, text=True, check=True)
    return source, done.stdout + done.stderr, dump.stdout


def complaints(report: str) -> list[str]:
    """Lines of a compiler's report that speak of local memory, or warn."""
    local = re.compile(r"[1-9]\d* bytes (stack frame|spill stores|spill loads|cumulative stack)|warning")
    return [line for line in report.splitlines() if local.search(line)]


def test_nothing_spills(compiled: tuple[Source, str, str]) -> None:
    source, report, _ = compiled
    assert complaints(report) == []
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == source.kernels
    assert max(registers) <= source.registers


def test_a_report_with_complaints_is_read() -> None:
    spills = "    16 bytes stack frame, 3676 bytes spill stores, 0 bytes spill loads"
    warns = 'x.cu(3): warning #177-D: variable "x" was declared but never referenced'
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert complaints("\n".join([clean, spills, warns])) == [spills, warns]


def test_instructions(compiled: tuple[Source, str, str]) -> None:
    source, _, sass = compiled
    functions = sass.split("Function :")[1:]
    assert len(functions) == source.kernels
    for function in functions:
        name = function.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", function), name
        products = re.findall(r"HMMA\.16816\.F32(\.BF16)?", function)
        if not source.products:
            assert not products, name
            continue
        # Template argument 1 is bfloat16, 2 is float16; products are nothing but 16 x 8 x 16 in fp32.
        assert set(products) == {".BF16" if "ILi1E" in name else ""}, name
        assert len(products) == len(re.findall(r"\bHMMA", function)), name
        assert re.search(r"LDGSTS\.E\.BYPASS(\.\w+)*\.128", function), name
        fragments = set(re.findall(r"LDSM\S*", function))
        assert fragments == {"LDSM.16.MT88.4" if "wgrad" in source.file else "LDSM.16.M88.4"}, name
