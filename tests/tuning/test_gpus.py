"""``docs/gpus.md`` says of each GPU what the code answers when its capability and shared memory are faked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gradnorm_kernels import backends, dispatch
from gradnorm_kernels.backends import native, triton
from gradnorm_kernels.backends.cuda import launch
from gradnorm_kernels.tuning import costs, tiles

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpus.md"
BF16 = torch.bfloat16


class Gpu(NamedTuple):
    """A GPU as torch describes it: shared memory per block from the CUDA C++ Programming Guide."""

    title: str
    name: str
    capability: tuple[int, int]
    shared_memory: int
    cuda: str | None = "13.0"  # torch.version.cuda


GPUS = (
    Gpu("A100", "NVIDIA A100-SXM4-80GB", (8, 0), 166_912),
    Gpu("RTX A6000, RTX 3090", "NVIDIA RTX A6000", (8, 6), 101_376),
    Gpu("RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), 101_376),
    Gpu("L40S", "NVIDIA L40S", (8, 9), 101_376),
    Gpu("H100", "NVIDIA H100 80GB HBM3", (9, 0), 232_448),
    Gpu("H200", "NVIDIA H200", (9, 0), 232_448),
    Gpu("B200", "NVIDIA B200", (10, 0), 232_448),
    Gpu("B300", "NVIDIA B300 SXM6 AC", (10, 3), 232_448),
    Gpu("Thor", "NVIDIA Thor", (11, 0), 232_448),
    Gpu("RTX 5090, RTX PRO 6000", "NVIDIA GeForce RTX 5090", (12, 0), 101_376),
    Gpu("GB10 (DGX Spark)", "NVIDIA GB10", (12, 1), 101_376),
    Gpu("V100", "Tesla V100-SXM2-32GB", (7, 0), 98_304),
    Gpu("MI300X", "AMD Instinct MI300X", (9, 4), 65_536, None),
)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The machine's only GPU, with a module that was built for CUDA."""
    found: Gpu = request.param
    properties = SimpleNamespace(shared_memory_per_block_optin=found.shared_memory)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: found.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: found.name,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "cuda", found.cuda)
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: None)
    module = SimpleNamespace(build_info=lambda: {"cuda": "13.0"}, driver_version=lambda: 13_000)
    monkeypatch.setattr(native, "module", lambda: module)
    for cached in (costs.chip, launch.unavailable_reason, dispatch.choose):
        cached.cache_clear()
    backends.forget()
    yield found
    for cached in (costs.chip, launch.unavailable_reason, dispatch.choose):
        cached.cache_clear()
    backends.forget()


def row(gpu: Gpu) -> str:
    """The row of the page, from the code."""
    device = torch.device("cuda:0")
    problem = dispatch.Problem(costs.chip(device), 65_536, 4096, 4096, 64, 4, weight_grad=True, dtype=BF16)
    auto = dispatch.choose(problem).plan.backend
    major, minor = gpu.capability
    reason = backends.unavailable_reason("triton", "fused_grad_norm", "cuda", BF16)
    of_triton, needs = f"no: {reason}", "–"
    if reason is None:
        chip = costs.chip(device)
        config = tiles.kernel_config(chip.gpu, chip.arch, "wgrad", 2, 4096, 4096)
        how = ("TMA" if config.descriptors else "cp.async") + ", nested loops" * config.nested
        of_triton = f"{config.block_m} x {config.block_n} x {config.block_k}, {config.num_stages} stages, {how}"
        needs = f"{tiles.shared_memory_needed(config):,}"
    reason = backends.unavailable_reason("cuda", "fused_grad_norm", "cuda", BF16)
    of_cuda = f"no: {reason}"
    if reason is None:
        of_cuda = f"the kernels of sm_{launch.architecture(gpu.capability)}"
    capability = f"{major}.{minor}" if gpu.cuda else "(gfx942)"
    return f"| {gpu.title} | {capability} | {auto} | {of_triton} | {needs} of {gpu.shared_memory:,} | {of_cuda} |"


@pytest.mark.parametrize("gpu", GPUS, indirect=True, ids=[gpu.title for gpu in GPUS])
def test_the_page_says_what_the_code_answers(gpu: Gpu) -> None:
    assert row(gpu) in PAGE.read_text().splitlines(), row(gpu)


def test_the_page_has_these_gpus_and_no_others() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == ["GPU", *(gpu.title for gpu in GPUS)]


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.cuda], indirect=True, ids=lambda gpu: gpu.title)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_no_tile_needs_more_than_the_gpu_has(gpu: Gpu, kernel: str) -> None:
    if gpu.capability < (8, 0):
        return
    chip = costs.chip(torch.device("cuda:0"))
    for element_bytes in (2, 4):
        config = tiles.kernel_config(chip.gpu, chip.arch, kernel, element_bytes, 4096, 4096)
        assert tiles.shared_memory_needed(config) <= gpu.shared_memory
