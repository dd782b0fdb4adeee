"""What the compiler makes of the sm_90a kernels: tensor-core and tensor-copy instructions, nothing in local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TILES = len(re.findall(r"\{\d+, \d+, \d+, \d+\}", (ROOT / "csrc" / "tiles.h").read_text().split("kSm90WgradTiles")[1]))
KERNELS = 2 * TILES  # two types
# 65536 registers of a multiprocessor for 384 threads, in steps of 8; and what setmaxnreg makes of them. It shares
# out what the launch took: of 160 a thread the second consumer would wait for ever for its share.
REGISTERS_AT_START = 168
REGISTERS = {128: (40, 232), 192: (40, 232), 256: (24, 240)}  # columns -> of a producer, of a consumer

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one in triton's package. Skips where there is neither."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not packaged.exists():
            pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's package")
        found = str(packaged)
    return found


@pytest.fixture(
    scope="module",
    params=["wgrad_norm_sm90", pytest.param("wgrad_norm_sm90_clusters", marks=pytest.mark.slow)],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the compiler says, and the object file."""
    target = tmp_path_factory.mktemp("sass") / f"{request.param}.o"
    command = ["nvcc", "-std=c++17", "-O3", "-DGRADNORM_WITH_CUDA", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-Xptxas=-v", "-c", str(ROOT / "csrc" / f"{request.param}.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, target


def complaints(report: str) -> list[str]:
    """Lines of a compiler's report that speak of local memory, of serialised products or of an ignored setmaxnreg."""
    spilled = re.compile(r"[1-9]\d* bytes (stack frame|spill stores|spill loads|cumulative stack)")
    return [line for line in report.splitlines() if spilled.search(line) or re.search(r"\(C75\d\d\)|warning", line)]


def test_nothing_spills_and_no_product_is_serialised(compiled: tuple[str, Path]) -> None:
    report, _ = compiled
    assert complaints(report) == []
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert registers == [REGISTERS_AT_START] * KERNELS


def test_a_report_with_complaints_is_read() -> None:
    spills = "    16 bytes stack frame, 3676 bytes spill stores, 0 bytes spill loads"
    serial = "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert complaints("\n".join([clean, spills, serial])) == [spills, serial]


def most_registers(code: str) -> int:
    """The highest number of a register in this machine code."""
    return max(int(number) for number in re.findall(r"\bR(\d+)\b", code))


def test_instructions(compiled: tuple[str, Path]) -> None:
    dump = subprocess.run(
        [cuobjdump(), "--dump-sass", str(compiled[1])], capture_output=True, text=True, check=True
    ).stdout
    functions = dump.split("Function :")[1:]
    assert len(functions) == KERNELS
    for function in functions:
        name = function.split()[0]
        config = re.search(r"ConfigILi\dELi(\d+)ELi(\d+)ELi\d+ELi(\d+)ELi(\d)E", name)
        assert config is not None, name
        columns, tokens, shared_sum, cluster = map(int, config.groups())
        assert cluster == (2 if "clusters" in compiled[1].name else 1)
        # A segment's first K tile has one product or more, up to those of a whole one; both operands transposed, that
        # is MN-major, and one group left in flight.
        products = re.findall(r"HGMMA\.(\S+) (.*)", function)
        steps = tokens // 16
        assert len(products) == sum(range(1, steps + 1)) + steps, name
        for shape, operands in products:
            assert shape.startswith(f"64x{columns}x16.F32"), name
            assert ".tnspA.tnspB" in operands, name
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in function, name
        # Two boxes of dy and one of x for each 64 columns a stage.
        assert len(re.findall(r"UTMALDG\.3D", function)) % (2 + columns // 64) == 0, name
        assert "UTMALDG.3D" in function, name
        # In clusters the boxes of x go to both blocks, and blocks wait for each other at the beginning and at the end.
        multicast = re.findall(r"UTMALDG\.3D\.MULTICAST", function)
        assert len(multicast) * (2 + columns // 64) == (cluster - 1) * len(re.findall("UTMALDG", function)) * (
            columns // 64
        )
        assert len(re.findall("UCGABAR_WAIT", function)) == (3 if cluster == 2 else 0), name
        assert {"USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"} == set(re.findall(r"USETMAXREG\.[A-Z_]+", function)), name
        assert not re.search(r"\b(LDL|STL)\b", function), name
        of_producer, of_consumer = REGISTERS[columns]
        shares = {f"DEALLOC.CTAPOOL 0x{of_producer:x}", f"TRY_ALLOC.CTAPOOL UP0, 0x{of_consumer:x}"}
        assert set(re.findall(r"USETMAXREG\.(.*?) ;", function)) == shares, name
        assert most_registers(function) < of_consumer, name
        # The producer's part: from where it gives registers away to its end.
        produce = re.search(r"USETMAXREG\.DEALLOC.*?\n\s+/\*\w+\*/\s+EXIT", function, re.S)
        assert produce is not None and "UTMALDG" in produce[0] and "HGMMA" not in produce[0], name
        assert most_registers(produce[0]) < of_producer, name
        # A sum in shared memory is read where a sample and where a group ends, 16 bytes at a time; nothing else is.
        if shared_sum:
            consume = function.replace(produce[0], "")
            assert len(re.findall(r"\bLDS\.128\b", consume)) >= 2 * shared_sum // 8, name
