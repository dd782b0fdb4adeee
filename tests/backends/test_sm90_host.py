"""The sm_90a wgrad kernel's own source, run on the host, against the float64 reference; and broken kernels, found.

``cuda_host/include/sm90_host.h`` says what mbarriers, tensor copies, wgmma and setmaxnreg mean there. A broken kernel
has one changed expression. All of them are in one build, and a number picks one: a defect costs a run, no compilation.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_host.build import Host, Patch, Tree
from tests.cuda_host.sm90_run import Case, differences, narrow, paired, random_case, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

INF = float("inf")
# Edges in both directions, an empty item, one token, whole blocks, two groups, several tiles for each of two blocks.
EDGES = Case((33, 1, 0, 64, 100), 200, 136, groups=(0, 0, 1, 1, 1))
CASES = {
    "edges": EDGES,
    "odd": Case((7, 5, 1, 64, 100), 13, 77),
    "long": Case((777, 1000), 40, 24),
    "one": Case((1,), 1, 1),
    "tiles": Case((65, 31), 400, 300, multiprocessors=3),
    "apart": Case((20, 130, 20, 7, 64), 19, 23, samples=(0, 0, 1, 1, 2), groups=(0, 0, 2, 2, 2), gap=3),
    "touching": Case((20, 30, 40, 7), 72, 23, samples=(0, 0, 1, 2), groups=(0, 0, 0, 1)),
    "unmeasured": Case((7, 5, 1, 64, 100), 264, 77, groups=(0, 0, 0, 0, 2), unmeasured=(0, 1, 2)),
    "only sums": Case((7, 65), 24, 40, weight_grad=False),
    "splits": Case((7, 5, 1, 64, 100), 210, 77, groups=(0, 0, 0, 1, 1), splits=3, parts=True, multiprocessors=4),
    "group sums": Case((70, 5, 9), 33, 130, groups=(0, 1, 3), parts=True),
    "last rows": Case(
        (7, 5, 1, 64, 100), 210, 300, groups=(0, 0, 0, 1, 1), splits=3, parts=True, whole_rows=2, multiprocessors=3
    ),
    "neighbour": Case((20, 64), 72, 40),
    "one at the end": Case((20, 1), 24, 40),
    "nan": Case((20, 20, 20, 130, 7), 72, 130, groups=(0, 0, 1, 1, 2), poison=(float("nan"), 1)),
    "inf": Case((20, 20, 20, 130, 7), 73, 130, groups=(0, 0, 1, 1, 2), poison=(INF, 1)),
    "far rows": Case((33, 40), 16, 40, stride=1 << 25),
    "far parts": Case((33,), 128, 128, groups=(131073,), parts=True, block_n=128),
    "pair": Case((33, 1, 0, 64, 300), 200, 200, groups=(0, 0, 1, 1, 1), multiprocessors=5, cluster=2),
    "widest": Case((33, 1, 0, 64, 100), 300, 136, groups=(0, 0, 1, 1, 1), block_n=256),
}


class Defect(NamedTuple):
    """What ``pattern`` matches in ``file`` (a statement or an expression) becomes ``broken``.

    ``found``: how ``case`` tells, by words of the error or, if it is "numbers", by results that are off.
    """

    file: str
    pattern: str
    broken: str
    found: str
    case: str = "edges"


KERNEL, TILES, LAUNCH = "device/sm90_wgrad.cuh", "device/sm90_tiles.cuh", "device/sm90_launch.cuh"
SEGMENTS = "device/segments.cuh"
SOURCES = ("wgrad_norm_sm90.cu", "wgrad_norm_sm90_clusters.cu")
FRAGMENT = "device/sm90_fragment.cuh"
# Two accesses that nothing orders, in the words of the host execution: which of them, is up to the schedule.
UNORDERED = "race|copy into it|nobody wrote|more arrivals"
# Expressions come before the statements they are part of.
DEFECTS = {
    "parity of a landed stage": Defect(
        KERNEL,
        r"(?<=full\(stage\), )ring\.parity(?=\);\n        multiply)",
        "ring.parity ^ 1",
        UNORDERED + "|ever",
        "long",
    ),
    "parity of a free stage": Defect(
        KERNEL, r"(?<=wait_free\(shared, stage, )ring\.parity \^ 1", "ring.parity", "waits for ever"
    ),
    "too few bytes announced": Defect(
        KERNEL,
        r"(?<=full\(stage\), )C::kStageBytes",
        "C::kStageBytes - C::kPanelBytes",
        UNORDERED + "|expects",
        "long",
    ),
    "bytes not announced": Defect(
        KERNEL,
        r"mbarrier_arrive_expect\([^;]*;",
        "mbarrier_arrive(shared.full(stage));",
        UNORDERED,
    ),
    "a neighbour's rows": Defect(KERNEL, r"rows - C::kTokens", "0", "numbers", "neighbour"),
    "a row behind the matrix": Defect(KERNEL, r"(?<=kPanelColumns, begin, )row(?=\))", "row + 1", "outside of its map"),
    "a row of a block lost": Defect(
        LAUNCH, r"(?<=\(columns\), )static_cast<uint64_t>\(box_rows\)", "uint64_t{63}", "numbers"
    ),
    "the last row lost": Defect(
        LAUNCH, r"static_cast<uint64_t>\(tokens\)(?=\};)", "tokens - uint64_t{1}", "numbers", "one at the end"
    ),
    "one row for all": Defect(
        LAUNCH, r"stride \* uint64_t\{2\}", "stride * uint64_t{0}", "the driver would refuse this tensor map"
    ),
    # A GPU may fault at the address alone, whatever is read through the map.
    "map begins before the matrix": Defect(
        LAUNCH,
        r"(?<=encode_tensor_map\()matrix",
        "static_cast<const char*>(matrix) - 64 * row_bytes",
        "begins outside of every buffer|outside of its map's buffer",
    ),
    "the first steps of a stage": Defect(
        KERNEL, r"(?<= x \+ )step(?= \*)", "step - C::kSteps + static_cast<int>(steps.value)", "numbers"
    ),
    "a step too few": Defect(KERNEL, r"\(rows - 1\) / kStepTokens \+ 1", "(rows + 14) / kStepTokens", "numbers"),
    "no wait for a sample's first copy": Defect(
        KERNEL, r"mbarrier_wait\(shared\.full[^;]*;(?=\n      tag)", ";", UNORDERED
    ),
    "no wait for later copies": Defect(
        KERNEL, r"mbarrier_wait\(shared\.full[^;]*;(?=\n        multiply)", ";", UNORDERED, "long"
    ),
    "no wait for a free stage": Defect(KERNEL, r"wait_free\(shared, stage, [^;]*;", ";", UNORDERED, "long"),
    "stage freed too early": Defect(KERNEL, r"wgmma_wait<1>\(\);", "wgmma_wait<2>();", UNORDERED, "long"),
    "products not waited for": Defect(KERNEL, r"wgmma_wait<0>\(\);", "wgmma_wait<1>();", UNORDERED + "|fence|numbers"),
    "written while in flight": Defect(
        KERNEL, r"ended_out = nullptr;(?=\n      for)", "ended_out = nullptr; product[0] = 0.0f;", "is written while"
    ),
    "the second is told nothing": Defect(
        KERNEL, r"if \(lane == 0 && group == 0\) mbarrier_arrive\([^;]*;", ";", "waits for ever", "long"
    ),
    "no wgmma.fence": Defect(KERNEL, r"wgmma_fence\(\);", ";", "without a wgmma.fence"),
    "group not committed": Defect(KERNEL, r"wgmma_commit\(\);", ";", "fence|numbers|flight"),
    "stride offset": Defect(TILES, r"kStride << 32", "uint64_t{512 >> 4} << 32", "numbers"),
    "leading offset": Defect(TILES, r"kLeading << 16", "uint64_t{1024 >> 4} << 16", "numbers"),
    "64-byte swizzle": Defect(TILES, r"kSwizzle128 << 62", "uint64_t{2} << 62", UNORDERED + "|numbers"),
    "address not masked": Defect(TILES, r"panel & 0x3FFFF", "panel | 1u << 18", "bits that nothing is said of"),
    "16 tokens further on": Defect(
        KERNEL, r"(?<=dy \+ step \* )kDescriptorStep", "(kDescriptorStep / 2)", "numbers|inside its swizzle"
    ),
    "K-major operands": Defect(
        KERNEL,
        r"Wgmma<C::kType, C::kColumns, kMnMajor>::multiply\((?P<rest>.*?)\);",
        r"Wgmma<C::kType, C::kColumns, 0>::multiply(\g<rest>);",
        UNORDERED + "|numbers",
    ),
    "sample not begun afresh": Defect(KERNEL, r"add = 0;(?=\n      \})", ";", "numbers"),
    "samples run together": Defect(KERNEL, r"following\.sample != segment\.sample", "false", "numbers"),
    "rows apart joined": Defect(KERNEL, r"here\.row == segment\.end", "true", "numbers", "apart"),
    "part of another split": Defect(
        KERNEL, r"segment\.group \+ max\(split, 0\)", "segment.group", "numbers|write the same", "splits"
    ),
    "a whole tile with the segments of a split": Defect(
        SEGMENTS, r"split < 0 \? splits : split \+ 1", "max(split, 0) + 1", "numbers", "last rows"
    ),
    "a tile of another split": Defect(
        SEGMENTS,
        r"\(item - whole_tiles\) / split_tiles",
        "(item - whole_tiles) / split_tiles % 2",
        "numbers|write the same",
        "last rows",
    ),
    "whole rows in the workspace": Defect(
        KERNEL, r"split < 0 \? 0 : kStored", "kStored", "outside of every buffer|numbers", "last rows"
    ),
    "rows above the workspace counted": Defect(
        KERNEL, r"in\.row - above", "in.row", "outside of every buffer|numbers|write the same", "last rows"
    ),
    "split tiles placed among the whole ones": Defect(
        SEGMENTS, r"whole \? 0 : whole_rows", "0", "numbers|write the same|outside of every buffer", "last rows"
    ),
    "running sum forgotten": Defect(KERNEL, r"first_group = 0;", ";", "numbers"),
    "columns behind the matrix": Defect(FRAGMENT, r"columns\(\) > 2 \* kCount - 7", "true", "numbers", "inf"),
    "columns behind a row": Defect(
        FRAGMENT, r"at < columns\(\)(?=\) visit)", "true", "write the same|outside of every buffer"
    ),
    "lanes exchange nothing": Defect(FRAGMENT, r"exchange_pairs\(pairs, lane\);", ";", "numbers"),
    "lanes store elsewhere": Defect(FRAGMENT, r"lane % 4 \* 6", "lane % 4 * 14", "write the same|numbers"),
    "rows behind the matrix": Defect(FRAGMENT, r"row \+ 8 < d_out", "true", "outside of every buffer|numbers"),
    # Half of the group's sum is in shared memory.
    "shared half not cleared": Defect(
        KERNEL, r"store_shared_float4\(place\(i\), [^;]*;", ";", "nobody wrote", "widest"
    ),
    "shared half not added": Defect(
        KERNEL, r"store_shared_float4\(place\(i \+ 4 \* j\)[^;]*;", ";", "numbers", "widest"
    ),
    "shared half without the sum before": Defect(
        KERNEL,
        r"load_shared_float4\(place\(i \+ 4 \* j\)\)",
        "make_float4(0.0f, 0.0f, 0.0f, 0.0f)",
        "numbers",
        "widest",
    ),
    "shared half out of order": Defect(
        KERNEL, r"(?<=four = load_shared_float4\(place\()i", "(i ^ 4)", "numbers", "widest"
    ),
    "next four too near": Defect(
        KERNEL, r"\(i - C::kHeld\) / 4(?= \* Shared)", "(i - C::kHeld) / 8", "numbers", "widest"
    ),
    "two threads share a place": Defect(
        TILES, r"consumer \* 128 \+ thread", "consumer * 128 + thread / 2", "race", "widest"
    ),
    "both consumers share a place": Defect(KERNEL, r"(?<=shared\.sums\()me\.group", "0", "race", "widest"),
    "a sum goes on into the next group": Defect(
        KERNEL, r"sum\.clear\(\);", "if (tile < 0) sum.clear();", "numbers", "widest"
    ),
    "one set of slots": Defect(KERNEL, r"turn \^= 1;", ";", "race"),
    "no barrier before the sum": Defect(KERNEL, r"barrier_wait\(1 \+ group, 128\);", ";", UNORDERED),
    "too many registers": Defect(
        KERNEL, r"registers_acquire<C::kConsumerRegisters>\(\);", "registers_acquire<240>();", "waits for ever"
    ),
    "barriers not fenced": Defect(KERNEL, r"mbarrier_init_fence\(\);", ";", "not fenced"),
    "barriers not shared": Defect(KERNEL, r"sync_block\(\);", ";", "initialis"),
    # Clusters of two blocks.
    "copies for this block alone": Defect(
        KERNEL, r"\(1 << C::kCluster\) - 1", "1 << rank", "waits for ever|still expects", "pair"
    ),
    "both blocks load the same half": Defect(
        KERNEL,
        r"i % C::kCluster == rank",
        "i % C::kCluster == 0",
        "copy into it|race|expects|nobody wrote|ever",
        "pair",
    ),
    "only this block's consumers are waited for": Defect(
        KERNEL,
        r"(?<=mbarrier_arrive_at\()static_cast<int>\(blockIdx\.x\) % C::kCluster \^ 1",
        "blockIdx.x % 2",
        UNORDERED,
        "pair",
    ),
    "the other block is told nothing": Defect(
        KERNEL, r"if \(C::kCluster > 1 && lane == 1\) mbarrier_arrive_at[^;]*;", ";", "waits for ever", "pair"
    ),
    "arrivals of one block counted": Defect(KERNEL, r"(?<=4 \* kConsumers \* )C::kCluster", "1", UNORDERED, "pair"),
    "too few arrivals counted": Defect(KERNEL, r"4 \* kConsumers", "2 * kConsumers", UNORDERED + "|ever", "long"),
    "no barrier of the cluster at the beginning": Defect(
        KERNEL, r"cluster_sync\(\);(?=\n  \} else)", "sync_block();", "initialis", "pair"
    ),
    "no barrier of the cluster at the end": Defect(
        KERNEL,
        r"if constexpr \(C::kCluster > 1\) cluster_sync\(\);",
        ";",
        "may end before another one|after the block has ended",
        "pair",
    ),
    "a wait for this block's arrivals": Defect(
        KERNEL, r"mbarrier_wait_cluster\([^;]*;", "mbarrier_wait(shared.empty(stage), parity);", "block's scope", "pair"
    ),
    "both blocks take one tile": Defect(KERNEL, r"rank(?=;\n  return place)", "0", "numbers|write the same", "pair"),
    "one warp frees a stage": Defect(KERNEL, r"lane == 0(?=\) mbarrier_arrive)", "lane == 0 && warp == 0", "ever"),
}


def switchable(number: int, defect: Defect) -> Patch:
    """The defect as a patch that ``host::defect == number`` turns on."""
    if defect.broken.endswith(";"):
        either = rf"if (host::defect == {number}) {{ {defect.broken} }} else {{ \g<0> }}"
    else:
        either = rf"(host::defect == {number} ? ({defect.broken}) : (\g<0>))"
    return Patch(defect.file, defect.pattern, either)


class Build(NamedTuple):
    """``choose`` turns one defect on. ``operand_at``: where the decoder of descriptors has an element."""

    host: Host
    choose: Callable[[int], None]
    operand_at: Callable[[int, int, int, int], int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> tuple[Path, Path]:
    """For copies of the sources, and for objects."""
    return tmp_path_factory.mktemp("sm90"), Path(pytestconfig.cache.mkdir("cuda_host"))  # type: ignore[union-attr]


def compiled(
    folders: tuple[Path, Path],
    name: str,
    patches: Iterable[Patch] = (),
    flags: tuple[str, ...] = ("-O2", "-march=native"),
) -> Path:
    """The module with the launcher of this kernel alone."""
    tree = Tree(folders[0] / name, folders[1], patches, flags)
    names = ("bindings.cpp", "build_info.cpp", "control.cpp", *SOURCES)
    return tree.link([tree.csrc / name for name in names])


@pytest.fixture(scope="module")
def host(folders: tuple[Path, Path]) -> Host:
    return Host(compiled(folders, "clean"))


EXPORTS = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void host_defect(int number) { host::defect = number; }
EXPORT int host_operand_at(uint64_t descriptor, int mn_major, int mn, int k) {
  return host::Operand(descriptor, mn_major).at(mn, k);
}
"""


@pytest.fixture(scope="module")
def broken(folders: tuple[Path, Path]) -> Build:
    """The module with every defect in it, without float16: no case of a defect has it, and compiling takes longest."""
    patches = [switchable(number, defect) for number, defect in enumerate(DEFECTS.values(), 1)]
    patches.append(Patch(LAUNCH, r"return start_typed<kFloat16, kCluster>\([^;]*;", "return false;"))
    path = compiled(folders, "broken", [*patches, Patch(SOURCES[0], r"\Z", EXPORTS)], flags=("-O1",))
    library = ctypes.CDLL(str(path))
    library.host_operand_at.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return Build(Host(path), library.host_defect, library.host_operand_at)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(host: Host, name: str) -> None:
    case = CASES[name]
    first, expected = run(host, case, seed=1)
    assert differences(case, first, expected) == []
    # Another order of warps and of arriving copies leaves the same bits.
    assert run(host, case, seed=2)[0].same(first)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].block_n == 192])
def test_the_widest_tile_agrees_with_the_reference(host: Host, name: str) -> None:
    case = replace(CASES[name], block_n=256)
    result, expected = run(host, case, seed=4)
    assert differences(case, result, expected) == []


PAIRED = [name for name in CASES if CASES[name].block_n == 192 and CASES[name].cluster == 1]
BRIEF = {("apart", 128), ("splits", 192), ("group sums", 256), ("inf", 256), ("last rows", 192)}
IN_CLUSTERS = [
    pytest.param(name, width, marks=[pytest.mark.slow] * ((name, width) not in BRIEF))
    for name in PAIRED
    for width in (128, 192, 256)
]


@pytest.mark.parametrize(("name", "width"), IN_CLUSTERS)
def test_clusters_agree_with_the_reference(host: Host, name: str, width: int) -> None:
    case = replace(paired(CASES[name]), block_n=width)
    result, expected = run(host, case, seed=5)
    assert differences(case, result, expected) == []
    # Another order of blocks, warps and arrivals leaves the same bits, and so do blocks without clusters.
    alone, _ = run(host, replace(case, cluster=1), seed=6)
    assert alone.same(result)


@pytest.mark.slow
def test_clusters_agree_on_random_cases(host: Host) -> None:
    for seed in range(60):
        case = paired(random_case(seed))
        result, expected = run(host, case, seed)
        assert differences(case, result, expected) == [], case


@pytest.mark.parametrize("name", ["edges", "odd", "unmeasured", "splits"])
def test_agrees_with_the_other_tile_and_type(host: Host, name: str) -> None:
    case = narrow(CASES[name])
    result, expected = run(host, case, seed=3)
    assert differences(case, result, expected) == []


@pytest.mark.parametrize("name", ["edges", "long", "tiles", "splits"])
def test_staggering_changes_no_bit(host: Host, name: str) -> None:
    together, expected = run(host, replace(CASES[name], staggered=False), seed=1)
    assert differences(CASES[name], together, expected) == []
    assert run(host, CASES[name], seed=2)[0].same(together)


def test_agrees_on_random_cases(host: Host) -> None:
    for seed in range(30):
        case = random_case(seed)
        result, expected = run(host, case, seed)
        assert differences(case, result, expected) == [], case


def test_refuses_what_the_copy_engine_cannot_take(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="wgrad_norm_sm90: x and dy must start at a multiple of 16 bytes"):
        run(host, replace(EDGES, stride=204), seed=1)
    with pytest.raises(RuntimeError, match="wgrad_norm_sm90: block_n must be 128 or 192 or 256"):
        run(host, replace(EDGES, block_n=64), seed=1)
    with pytest.raises(RuntimeError, match="wgrad_norm_sm90: cluster must be 1 or 2 blocks"):
        run(host, replace(EDGES, cluster=4), seed=1)
    with pytest.raises(RuntimeError, match="takes tiles in pairs, and the number of rows of tiles is odd"):
        run(host, replace(EDGES, d_out=100, cluster=2), seed=1)
    with pytest.raises(RuntimeError, match="a cluster needs as many multiprocessors as it has blocks"):
        run(host, replace(EDGES, multiprocessors=1, cluster=2), seed=1)
    with pytest.raises(RuntimeError, match="takes tiles in pairs, and whole_rows is odd"):
        run(host, replace(paired(CASES["last rows"]), whole_rows=1), seed=1)
    launch = host.module.wgrad_norm_sm90
    monkeypatch.setattr(host.module, "wgrad_norm_sm90", lambda **fields: launch(**{**fields, "x_stride": 0}))
    with pytest.raises(RuntimeError, match="with rows a positive multiple of 8 elements apart"):
        run(host, EDGES, seed=1)
    for wrong, text in (
        ({"whole_rows": 4}, "whole_rows must be 0 to the number of rows of tiles"),
        ({"workspace": 0}, "workspace must be given exactly where some rows of tiles are not whole"),
        ({"whole_rows": 3}, "workspace must be given exactly where some rows of tiles are not whole"),
        ({"whole_rows": 0}, "group_sq must be given exactly where some rows of tiles are whole"),
    ):
        monkeypatch.setattr(host.module, "wgrad_norm_sm90", lambda wrong=wrong, **fields: launch(**{**fields, **wrong}))
        with pytest.raises(RuntimeError, match=f"wgrad_norm_sm90: {text}"):
            run(host, CASES["last rows"], seed=1)


@pytest.mark.parametrize("name", DEFECTS)
def test_finds_a_broken_kernel(broken: Build, name: str) -> None:
    defect, number = DEFECTS[name], list(DEFECTS).index(name) + 1
    case = CASES[defect.case]
    broken.choose(number)
    try:
        result, expected = run(broken.host, case, seed=1)
    except RuntimeError as error:
        assert re.search(defect.found, str(error)), f"found by other words: {error}"
    else:
        assert "numbers" in defect.found and differences(case, result, expected), "nothing told"
    finally:
        broken.choose(0)


def test_the_build_with_all_defects_off_is_sound(broken: Build) -> None:
    result, expected = run(broken.host, EDGES, seed=4)
    assert differences(EDGES, result, expected) == []


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    """PTX ISA 9.0, 9.7.15.5.1.2.2."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def place(index: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Where a layout has an index: its digits in the mixed base ``shape``, times ``strides``."""
    total = 0
    for size, step in zip(shape, strides, strict=True):
        total += index % size * step
        index //= size
    return total


@pytest.mark.parametrize(
    ("mode", "swizzle", "leading", "stride", "mn_major", "rows", "columns"),
    [
        # Figures 168, 169 and 170 of the PTX ISA, for bf16: "exact layout", in elements.
        (0, 0, 256, 128, 1, ((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128))),
        (3, 1, 256, 512, 1, ((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256))),
        (2, 2, 512, 1024, 1, ((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512))),
        # Canonical layouts of 9.7.15.5.1.2.1.3. The first is this kernel's.
        (1, 3, 8192, 1024, 1, ((8, 8, 3), (1, 8, 4096)), ((8, 2), (64, 512))),
        (1, 3, 16, 1024, 0, ((8, 8), (64, 512)), ((8, 2), (1, 8))),
        (0, 0, 128, 256, 0, ((8, 8), (8, 128)), ((8, 2), (1, 64))),
    ],
)
def test_descriptors_are_decoded_as_the_isa_has_it(
    broken: Build,
    mode: int,
    swizzle: int,
    leading: int,
    stride: int,
    mn_major: int,
    rows: tuple[tuple[int, ...], tuple[int, ...]],
    columns: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    start = 8192
    for mn in range(0, math.prod(rows[0]), 8 if mn_major else 1):
        for k in range(0, 16, 1 if mn_major else 8):
            byte = start + 2 * (place(mn, *rows) + place(k, *columns))
            byte ^= (byte >> 7 & (1 << swizzle) - 1) << 4  # Swizzle<B, 4, 3> on byte addresses
            assert broken.operand_at(descriptor(start, leading, stride, mode), mn_major, mn, k) == byte
