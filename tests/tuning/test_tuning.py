"""The frozen constants: whole files, the nearest shape, the order in which files are asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
import torch

from gradnorm_kernels import backends
from gradnorm_kernels.tuning import costs as tuning
from gradnorm_kernels.tuning.costs import Chip, KernelConfig

CPU, META, GPU = Chip("cpu"), Chip("meta"), Chip("cuda", "nvidia-h200", 90)
CACHED = (tuning.frozen, tuning.entries, tuning.costs, tuning.faster, tuning._kernel_config)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``files(name={...})``: for the test, the folder of frozen files holds these and default.json only."""
    default = tuning.frozen("default")

    def put(**contents: dict[str, Any]) -> None:
        contents = {name.replace("_", "-"): block for name, block in contents.items()}
        monkeypatch.setattr(tuning, "frozen", lambda name: default if name == "default" else contents.get(name, {}))
        for cached in CACHED[1:]:
            cached.cache_clear()

    yield put
    for cached in CACHED:
        cached.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    config = KernelConfig("wgrad", 90, 2, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    return {"d_in": 1024, "d_out": 1024} | dataclasses.asdict(config) | changes


def test_nearest_shape_and_default() -> None:
    assert tuning.costs(CPU, "torch", 4, 600, 500).d_in == 576
    assert tuning.costs(CPU, "torch", 4, 100_000, 100_000).d_in == 4096
    assert tuning.costs(CPU, "torch", 4, 0, 7) in tuning.entries(CPU, "torch")
    assert tuning.entries(META, "torch") == tuning.entries(CPU, "a backend nobody measured")
    assert tuning.measured_on(META, "torch").startswith("nothing")


def test_frozen_files_are_whole() -> None:
    folder = resources.files("gradnorm_kernels") / "configs"
    names = [f.name for f in folder.iterdir() if f.name.endswith(".json")]
    assert {"default.json", "cpu.json", "sm80.json", "sm90.json"} <= set(names)
    for name in names:
        content = json.loads((folder / name).read_text())
        assert content.keys() <= {"costs", "kernels", "faster"}, name
        for block in [*content.get("costs", {}).values(), *(content[k] for k in ("kernels", "faster") if k in content)]:
            assert block["measured_on"] and block["entries"], name
        for backend, block in content.get("costs", {}).items():
            assert backend in (*backends.NAMES, "any"), name
            for prices in (tuning.Costs(**values) for values in block["entries"]):
                assert min(prices.boundary, prices.gram, prices.pairs, prices.slab, prices.tile) > 0
                assert prices.gram_token >= 0 and prices.element_bytes in (0, 2, 4, 8)
        for values in content.get("kernels", {"entries": ()})["entries"]:
            assert values.keys() == {"d_in", "d_out"} | {f.name for f in dataclasses.fields(KernelConfig)}, name
            assert values["arch"] in (80, 90) and values["element_bytes"] in (2, 4)
        for values in content.get("faster", {"entries": ()})["entries"]:
            assert values.keys() == {"d_in", "d_out", "element_bytes", "backend"}, name
            assert values["backend"] in backends.NAMES


def test_costs_by_file_backend_and_size_of_element(files: Callable[..., None]) -> None:
    price = {"d_in": 64, "d_out": 64, "boundary": 1.0, "gram": 1.0, "gram_token": 0.0, "pairs": 1.0, "slab": 9}

    def block(where: str, *tiles: tuple[int, int]) -> dict[str, Any]:
        return {"measured_on": where, "entries": [price | {"tile": tile, "element_bytes": e} for tile, e in tiles]}

    files(
        nvidia_h200={"costs": {"triton": block("H200", (1, 2), (2, 4))}},
        sm90={"costs": {"triton": block("sm90", (3, 0)), "cuda": block("sm90", (4, 0), (5, 2))}},
        sm80={"costs": {"triton": block("sm80", (6, 0))}},
    )
    found = [tuning.costs(GPU, *call, 64, 64).tile for call in (("triton", 2), ("triton", 4), ("cuda", 4), ("cuda", 2))]
    assert found == [1, 2, 4, 5]
    assert tuning.costs(GPU, "torch", 4, 64, 64).tile == 1024, "the default's"
    assert tuning.costs(dataclasses.replace(GPU, gpu="another"), "triton", 2, 64, 64).tile == 3
    assert tuning.costs(dataclasses.replace(GPU, gpu="another", arch=80), "triton", 2, 64, 64).tile == 6
    assert tuning.measured_on(GPU, "triton") == "H200" and tuning.measured_on(GPU, "cuda") == "sm90"


def test_kernel_config_takes_the_most_special_file(files: Callable[..., None]) -> None:
    files(
        nvidia_h200={"kernels": {"measured_on": "H200", "entries": [entry(block_m=1), entry(d_in=64, block_m=2)]}},
        sm90={"kernels": {"measured_on": "nothing", "entries": [entry(block_m=3), entry(kernel="gram", block_m=4)]}},
        sm80={"kernels": {"measured_on": "nothing", "entries": [entry(arch=80, block_m=5, element_bytes=4)]}},
    )

    def block_m(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int) -> int:
        config = tuning.kernel_config(gpu, arch, kernel, element_bytes, d_in, 1024)
        assert (config.arch, config.kernel, config.element_bytes) == (arch, kernel, element_bytes)
        return config.block_m

    assert [block_m("nvidia-h200", 90, "wgrad", 2, d_in) for d_in in (1, 200, 300, 10**6)] == [2, 2, 1, 1]
    assert block_m("nvidia-h200", 90, "gram", 2, 64) == 4, "its own file has no Gram"
    assert block_m("", 90, "wgrad", 2, 64) == 3
    assert block_m("nvidia-a100", 80, "wgrad", 4, 64) == 5
    with pytest.raises(ValueError, match=r"configs/sm80.json for element_bytes=2, got 'wgrad'"):
        tuning.kernel_config("", 80, "wgrad", 2, 64, 64)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("kernel", ["wgrad", "gram", "gram_norms", "dot"])
def test_every_kernel_has_a_config(kernel: str, element_bytes: int, arch: int) -> None:
    for d_in, d_out in ((1, 1), (576, 1536), (4096, 14336), (10**6, 3)):
        config = tuning.kernel_config("", arch, kernel, element_bytes, d_in, d_out)
        assert (config.kernel, config.arch, config.element_bytes) == (kernel, arch, element_bytes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_gpu_names_are_file_names(name: str, expected: str) -> None:
    assert tuning.gpu_name(name) == expected


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90)])
def test_chip(capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.chip(torch.device("cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    tuning.chip.cache_clear()
    assert tuning.chip(torch.device("cuda:0")) == dataclasses.replace(GPU, arch=arch)
    tuning.chip.cache_clear()
