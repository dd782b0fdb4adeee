"""Every shipped kernel, compiled for sm_80 and sm_90 without a GPU: no spills, no stack, tensor cores where due.

The report is compiled for this file by several processes: one form per kernel, architecture and element, and all forms
in the slow tests.
"""

from __future__ import annotations

import ast
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from gradnorm_kernels.backends import native
from gradnorm_kernels.backends.triton import launch
from gradnorm_kernels.backends.triton.wgrad_sm100 import COMPILES
from gradnorm_kernels.tuning import tiles
from gradnorm_kernels.tuning.tiles import KernelConfig
from tests.compiled import report
from tests.compiled.report import NO_PRODUCTS, complaints

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"),
    pytest.mark.timeout(1200),  # the first test waits for the report: minutes on two cores, more on busy ones
]

#: The name of the instruction that multiplies matrices.
PRODUCTS = {"sm_80": "mma", "sm_90": "wgmma"}
KERNELS = Path(report.tuning.__file__).parents[1] / "backends" / "triton"

Lines = list[dict[str, Any]]
needs_nested_loops = pytest.mark.skipif(not COMPILES, reason="this Triton runs the flat kernels on sm_100 too")


@pytest.fixture(scope="module", params=["representative", pytest.param("all", marks=pytest.mark.slow)])
def lines(request: pytest.FixtureRequest) -> Lines:
    return list(
        report.triton_lines(None, report.representative() if request.param == "representative" else report.places())
    )


def test_nothing_spills(lines: Lines) -> None:
    assert len(lines) > 20
    bad = [(complaints(line), json.dumps(line)) for line in lines if complaints(line)]
    assert not bad, "\n".join(f"{what}: {line}" for what, line in bad)


def test_hoppers_form_with_the_fewest_registers_to_spare() -> None:
    """dW of several groups, whose tiles have parts outside the matrix: two running sums and a mask."""
    form = {"SPLIT": False, "ONE_GROUP": False, "WEIGHT_GRAD": True, "STORE_SUMS": False, "EDGES": True}
    jobs = [job for job in report._all_jobs() if job.kernel.fn.__name__ == "wgrad_sm90_kernel"]
    jobs = [job for job in jobs if (job.arch, job.element) == (90, "bf16") and form.items() <= job.constants.items()]
    assert jobs
    for job in jobs:
        line = report.compile_job(job)
        assert line["wgmma"] and not complaints(line), json.dumps(line)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in report.CHIPS if arch not in report.ARCHITECTURES])
def test_the_same_source_on_other_chips(arch: int) -> None:
    """Within that chip's shared memory and registers, without spills or stack, except for what is known."""
    lines = list(report.triton_lines(None, report.representative((arch,))))
    assert len(lines) > 10 and {line["arch"] for line in lines} == {f"sm_{arch}"}
    bad = [(report.unexpected(line), json.dumps(line)) for line in lines if report.unexpected(line)]
    assert not bad, "\n".join(f"{what}: {line}" for what, line in bad)
    spilling = {report.spot(line) for line in lines if complaints(line)}
    assert spilling == {spot for spot in report.KNOWN if spot[0] == arch}, "strike out what no longer spills"


def test_products_run_on_tensor_cores_and_float32_does_not(lines: Lines) -> None:
    """Kernels with a tile: mma on Ampere, wgmma on Hopper; float32 inputs are multiplied in float32, not in tf32."""
    assert NO_PRODUCTS <= {line["kernel"] for line in lines}
    tiled = [line for line in lines if "tile" in line and line["kernel"] not in NO_PRODUCTS]
    assert {(line["arch"], line["element"]) for line in tiled} >= {
        (arch, element) for arch in PRODUCTS for element in ("bf16", "fp16", "fp32")
    }
    for line in tiled:
        if line["element"] == "fp32":
            assert line["mma"] == line["wgmma"] == 0, json.dumps(line)
        else:
            assert line[PRODUCTS[line["arch"]]] > 0, json.dumps(line)


def test_loops_are_pipelined(lines: Lines) -> None:
    """Copies run ahead of the products, and on Hopper no product is waited for by itself: not where samples end either.

    float32 has no asynchronous products, but its copies are.
    """
    multiply = [line for line in lines if line["wgmma"] or line["mma"]]
    assert {line["kernel"] for line in multiply if line["wgmma"]} == {line["kernel"] for line in multiply}
    for line in (line for line in lines if "tile" in line and line["kernel"] not in NO_PRODUCTS):
        assert line["tma"] or line["copies_in_flight"], json.dumps(line)
    for line in multiply:
        assert not line["wgmma"] or not serialised(line), json.dumps(line)
    assert {line["kernel"] for line in lines if line["tma"]} == {"wgrad_sm90_kernel"}


def test_what_is_tried_on_hopper_compiles_as_well() -> None:
    """The form of several groups, which needs the most shared memory and which tuning does not run."""
    module = next(module for module in report.modules() if module.__name__.endswith("wgrad_kernels"))
    tried = tiles.candidates("wgrad", 90, 2)
    for config in {replace(config, group_m=8): None for config in tried}:
        jobs = report._jobs_of(module, 90, "bf16", config)
        jobs = [job for job in jobs if job.kernel.fn.__name__ == "wgrad_sm90_kernel"]
        job = next(job for job in jobs if job.constants["LANES"] and job.constants["WEIGHT_GRAD"])
        line = report.compile_job(job)
        assert not complaints(line) and not serialised(line), json.dumps(line)


@needs_nested_loops
def test_nested_loops_on_blackwell() -> None:
    """With dW, one tile per chip: the frozen one, and the one for widths that it does not divide."""
    for arch, columns, edges in ((100, 256, False), (103, 128, True)):
        check_nested(next(job for job in nested_jobs(arch) if is_form(job, columns, edges, weight_grad=True)))


@pytest.mark.slow
@needs_nested_loops
@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", [100, 103])
def test_every_form_of_nested_loops(arch: int, element: str) -> None:
    """What is frozen and what tuning tries, with and without dW, with and without edges."""
    assert len(nested_jobs(arch, element)) == 6
    tried = [job for config in tiles.candidates("wgrad", 100, 2) for job in nested_jobs(arch, element, config)]
    for job in {repr((job.constants, job.options)): job for job in tried}.values():
        check_nested(job)


def nested_jobs(arch: int, element: str = "bf16", config: KernelConfig | None = None) -> list[report.Job]:
    config = config or tiles.kernel_config("", 100, "wgrad", 2, 4096, 4096)
    module = next(module for module in report.modules() if module.__name__.endswith("wgrad_sm100"))
    return report._jobs_of(module, arch, element, config)


def is_form(job: report.Job, columns: int, edges: bool, weight_grad: bool) -> bool:
    return (job.constants["BLOCK_N"], job.constants["EDGES"], job.constants["WEIGHT_GRAD"]) == (
        columns,
        edges,
        weight_grad,
    )


def check_nested(job: report.Job) -> None:
    """Products of tcgen05 and copies of TMA in partitions beside the epilogues', in the memory that is promised."""
    line = report.compile_job(job)
    assert not complaints(line), json.dumps(line)
    assert line["kernel"] == "wgrad_sm100_kernel" and line["tcgen05"] and line["tma"], json.dumps(line)
    assert line["partitions"] == 2 and line["warps"] == job.options["num_warps"] + 4, json.dumps(line)
    assert job.config is not None
    sizes = {"block_n": job.constants["BLOCK_N"], "block_k": job.constants["BLOCK_K"]}
    config = replace(job.config, **sizes, num_stages=job.constants["STAGES"])
    assert line["shared"] <= tiles.shared_memory_needed(config), json.dumps(line)


@pytest.mark.parametrize("edges", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_masks_at_the_edges_leave_products_asynchronous(edges: bool) -> None:
    """A condition around the masks made ptxas wait for every product of wgmma by itself."""
    module = next(module for module in report.modules() if module.__name__.endswith("wgrad_kernels"))
    config = next(c for c in report.shipped(90) if c.kernel == "wgrad" and c.descriptors)
    form = {"SPLIT": False, "ONE_GROUP": True, "WEIGHT_GRAD": True, "STORE_SUMS": False, "EDGES": edges}
    jobs = [job for job in report._jobs_of(module, 90, "bf16", config) if job.constants.items() >= form.items()]
    (job,) = [job for job in jobs if job.kernel.fn.__name__ == "wgrad_sm90_kernel"]
    line = report.compile_job(job)
    assert not complaints(line) and not serialised(line), json.dumps(line)


def serialised(line: dict[str, Any]) -> bool:
    """Whether products are waited for by themselves, or all at every turn of the loop.

    One group for each loop of products, of which a kernel has two at most, or one and what clears its accumulator.
    """
    return line["grouped"] > 2 or line["in_flight"] == 0


def test_products_that_are_waited_for_one_by_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "arch = sm_90a\n Function first:\n  REG:32 STACK:0 SHARED:0 LOCAL:0\n"
    product = "        /*0000*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24{} ;\n"
    wait = "        /*0010*/   WARPGROUP.DEPBAR.LE gsb0, 0x{} ;\n"
    head = "arch = sm_90a\n\t\tFunction : first\n"
    good = product.format("") * 3 + product.format(", gsb0") + wait.format(1)
    one_by_one = (product.format(", gsb0") + wait.format(0)) * 4
    every_turn = product.format("") * 3 + product.format(", gsb0") + wait.format(0)
    found = []
    for code in (good, one_by_one, every_turn):
        dumps = {"--dump-resource-usage": usage, "-sass": head + code}
        monkeypatch.setattr(report, "_dump", lambda option, path, dumps=dumps: dumps[option])
        (line,) = report.inspect_binary("")
        found.append(serialised(line))
    assert found == [False, True, True]


@pytest.mark.parametrize(
    ("between", "count"),
    [
        ("", 0),
        ("IADD3 R92, R88, 0x1, RZ", 0),
        ("@P2 STG.E.128 desc[UR46][R88.64], R88", 0),
        ("ISETP.GE.AND P3, PT, R90, RZ, PT", 0),
        ("R2UR UR8, R88", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 0),
        ("SHFL.BFLY PT, R91, R9, 0x8, 0x1f", 1),
        ("@!P5 LDS.128 R84, [R112]", 0),
        ("@!P5 LDS.128 R88, [R112]", 1),
        ("IMAD.WIDE R90, R121, 0x2, R88", 1),
    ],
)
def test_registers_that_a_product_still_reads(between: str, count: int) -> None:
    code = [
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24",
        "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, RZ, !UPT, gsb0",
        *([between] if between else []),
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "FADD R88, R9, R88",
    ]
    assert (
        report.overwritten("\n".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(code)))
        == count
    )


def kernel_names(folder: Path) -> set[str]:
    """The functions named ``..._kernel`` under ``triton.jit`` in the files of a folder."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found |= {node.name for mark in node.decorator_list if "jit" in ast.unparse(mark)}
    return found


def test_every_kernel_is_in_the_report(lines: Lines, tmp_path: Path) -> None:
    """The nested loops are for sm_100 and 103 only, and have tests of their own."""
    (tmp_path / "new.py").write_text("@triton.jit\ndef new_kernel(x):\n    pass\n\ndef other_kernel():\n    pass\n")
    assert kernel_names(tmp_path) == {"new_kernel"}
    found = {line["kernel"] for line in lines} | {"wgrad_sm100_kernel"}
    assert found >= {name for name in kernel_names(KERNELS) if not name.startswith("_")}


def test_it_can_fail() -> None:
    """A tile too large for its registers spills, and the report says so."""
    config = next(c for c in report.shipped(80) if c.kernel == "gram" and c.element_bytes == 2)
    module = next(module for module in report.modules() if "gram" in module.CONFIGS)
    large = replace(config, block_m=256, block_n=256, num_warps=4, num_stages=2)
    line = report.compile_job(report._jobs_of(module, 80, "bf16", large)[0])
    assert {"spills", "stack"} <= set(complaints(line)), line


@pytest.mark.parametrize(("arch", "fences"), [(80, 0), (90, 1), (100, 0), (120, 0)])
def test_copies_are_seen_by_products_where_triton_forgets_the_fence(
    arch: int, fences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Triton 3.7.1: with a fence of our own on Hopper, and no copies that need one on B200."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # Triton does not know that this makes another kernel
    monkeypatch.setattr(launch, "UNFENCED", True)
    compiled: list[Any] = []
    compile_source = triton.compile

    def kept(*args: Any, **options: Any) -> Any:
        compiled.append(compile_source(*args, **options))
        return compiled[-1]

    monkeypatch.setattr(triton, "compile", kept)
    jobs = [job for job in report.jobs((arch,)) if job.kernel.fn.__name__ == "dot_kernel" and job.element == "bf16"]
    assert not complaints(report.compile_job(jobs[0]))
    ptx = compiled[0].asm["ptx"]
    assert len(re.findall(r"\{ fence\.proxy\.async", ptx)) == fences
    assert ("cp.async.cg" in ptx) == (arch != 100)


def test_a_fence_that_is_missing_is_noticed() -> None:
    wait, fence, product = "cp.async.wait_group \t2;\n", "fence.proxy.async.shared::cta;\n", "@%p tcgen05.mma.x;\n"
    good = fence + product + wait + "bar.sync 0;\n" + fence + product * 2 + "cp.async.wait_group 0;\n" + product
    assert report.unfenced(good) == 0
    assert report.unfenced(good.replace(wait + "bar.sync 0;\n" + fence, fence + wait)) == 3
    assert report.unfenced(wait + "wgmma.mma_async.sync.aligned;\n") == 1


def test_kernels_of_the_compiled_module() -> None:
    reason = native.cuda_unavailable_reason()
    if reason is not None:
        pytest.skip(f"no CUDA kernels to look at: {reason}")
    lines = report.cuda_lines()
    assert {line["arch"] for line in lines} == {"sm_80", "sm_90", "sm_90a"} & {line["arch"] for line in lines}
    assert len(lines) > 4
    bad = [line for line in lines if line["spills"] or line["stack"] or line["local"]]
    assert not bad, "\n".join(json.dumps(line) for line in bad)
    for arch, product in (("sm_80", "mma"), ("sm_90a", "wgmma")):
        assert any(line[product] for line in lines if line["arch"] == arch), f"no {product} for {arch}"


def test_the_disassembly_is_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = """
arch = sm_80
 Function first:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:404 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function first:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:404
"""
    code = """
arch = sm_80
\tcode for sm_80
\t\tFunction : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x00000a0000017a02 */
                                                                             /* 0x000fc40000000f00 */
        /*0010*/              @!P0 STL.64 [R1], R2 ;                         /* 0x0 */
        /*0018*/                   DEPBAR.LE SB0, 0x3 ;                      /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;     /* 0x0 */
        /*0030*/               @P1 LDL R1, [R2] ;                            /* 0x0 */
arch = sm_90a
\tcode for sm_90a
\t\tFunction : first
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ; /* 0x0 */
        /*0008*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspA, R24, gsb0 ; /* 0x0 */
        /*000c*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;           /* 0x0 */
        /*000e*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;           /* 0x0 */
        /*0010*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;              /* 0x0 */
"""
    monkeypatch.setattr(report, "_dump", lambda option, path: usage if "usage" in option else code)
    old, new = report.inspect_binary("")
    assert old == {
        "arch": "sm_80",
        "function": "first",
        "registers": 40,
        "stack": 8,
        "local": 0,
        "shared": 1024,
        "spills": 2,
        "mma": 1,
        "wgmma": 0,
        "tcgen05": 0,
        "instructions": 5,
        "grouped": 0,
        "in_flight": 0,
        "copies_in_flight": 3,
        "tma": 0,
        "overwritten": 0,
    }
    assert new["arch"] == "sm_90a" and (new["wgmma"], new["instructions"], new["spills"]) == (2, 5, 0)
    assert (new["grouped"], new["in_flight"], new["copies_in_flight"]) == (1, 1, 0)
