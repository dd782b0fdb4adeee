"""The frozen constants: whole files, the nearest shape, the order in which files are asked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradnorm_kernels import backends
from gradnorm_kernels.backends.cuda import splits, wgrad
from gradnorm_kernels.backends.cuda.launch import Gpu
from gradnorm_kernels.tuning import costs, tiles
from gradnorm_kernels.tuning.costs import Chip, Costs
from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES, CudaConfig, KernelConfig

NOTES = Path(__file__).resolve().parents[2] / "docs" / "gpu-notes.md"
CPU, META, GPU = Chip("cpu"), Chip("meta"), Chip("cuda", "nvidia-h200", 90)
CACHED = (costs.frozen, costs.entries, costs.costs, costs.faster, tiles._kernel_config)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``files(name={...})``: for the test, the folder of frozen files holds these and default.json only."""
    default = costs.frozen("default")

    def put(**contents: dict[str, Any]) -> None:
        contents = {name.replace("_", "-"): block for name, block in contents.items()}
        monkeypatch.setattr(costs, "frozen", lambda name: default if name == "default" else contents.get(name, {}))
        for cached in CACHED[1:]:
            cached.cache_clear()

    yield put
    for cached in CACHED:
        cached.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    config = KernelConfig("wgrad", 90, 2, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    return {"d_in": 1024, "d_out": 1024} | dataclasses.asdict(config) | changes


def test_nearest_shape_and_default() -> None:
    assert costs.costs(CPU, "torch", 4, 600, 500).d_in == 576
    assert costs.costs(CPU, "torch", 4, 100_000, 100_000).d_in == 4096
    assert costs.costs(CPU, "torch", 4, 0, 7) in costs.entries(CPU, "torch")
    assert costs.entries(META, "torch") == costs.entries(CPU, "a backend nobody measured")
    assert costs.measured_on(META, "torch").startswith("nothing")


def test_frozen_files_are_whole() -> None:
    folder = resources.files("gradnorm_kernels.tuning") / "configs"
    names = [f.name for f in folder.iterdir() if f.name.endswith(".json")]
    assert {"default.json", "cpu.json", "sm80.json", "sm90.json"} <= set(names)
    for name in names:
        content = json.loads((folder / name).read_text())
        assert content.keys() <= {"costs", "kernels", "faster"}, name
        for block in [*content.get("costs", {}).values(), *(content[k] for k in ("kernels", "faster") if k in content)]:
            assert block["measured_on"] and block["entries"], name
        for backend, block in content.get("costs", {}).items():
            assert backend in (*backends.NAMES, "any"), name
            for prices in (Costs(**values) for values in block["entries"]):
                assert min(prices.epilogue, prices.gram, prices.pairs, prices.workspace, prices.gram_tile) > 0
                assert prices.gram_token >= 0 and prices.element_bytes in (0, 2, 4, 8)
        for values in content.get("kernels", {"entries": ()})["entries"]:
            assert values.keys() == {"d_in", "d_out"} | {f.name for f in dataclasses.fields(KernelConfig)}, name
            assert values["arch"] in (80, 90, 100) and values["element_bytes"] in (2, 4)
        for values in content.get("faster", {"entries": ()})["entries"]:
            assert values.keys() == {"d_in", "d_out", "element_bytes", "backend"}, name
            assert values["backend"] in backends.NAMES


def test_costs_by_file_backend_and_size_of_element(files: Callable[..., None]) -> None:
    price = {"d_in": 64, "d_out": 64, "epilogue": 1.0, "gram": 1.0, "gram_token": 0.0, "pairs": 1.0, "workspace": 9}

    def block(where: str, *sizes: tuple[int, int]) -> dict[str, Any]:
        return {"measured_on": where, "entries": [price | {"gram_tile": tile, "element_bytes": e} for tile, e in sizes]}

    files(
        nvidia_h200={"costs": {"triton": block("H200", (1, 2), (2, 4))}},
        sm90={"costs": {"triton": block("sm90", (3, 0)), "cuda": block("sm90", (4, 0), (5, 2))}},
        sm80={"costs": {"triton": block("sm80", (6, 0))}},
    )
    found = [
        costs.costs(GPU, *call, 64, 64).gram_tile for call in (("triton", 2), ("triton", 4), ("cuda", 4), ("cuda", 2))
    ]
    assert found == [1, 2, 4, 5]
    assert costs.costs(GPU, "torch", 4, 64, 64).gram_tile == 1024, "the default's"
    assert costs.costs(dataclasses.replace(GPU, gpu="another"), "triton", 2, 64, 64).gram_tile == 3
    assert costs.costs(dataclasses.replace(GPU, gpu="another", arch=80), "triton", 2, 64, 64).gram_tile == 6
    assert costs.measured_on(GPU, "triton") == "H200" and costs.measured_on(GPU, "cuda") == "sm90"


def test_kernel_config_takes_the_most_special_file(files: Callable[..., None]) -> None:
    files(
        nvidia_h200={"kernels": {"measured_on": "H200", "entries": [entry(block_m=1), entry(d_in=64, block_m=2)]}},
        sm90={"kernels": {"measured_on": "nothing", "entries": [entry(block_m=3), entry(kernel="gram", block_m=4)]}},
        sm80={"kernels": {"measured_on": "nothing", "entries": [entry(arch=80, block_m=5, element_bytes=4)]}},
    )

    def block_m(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int) -> int:
        config = tiles.kernel_config(gpu, arch, kernel, element_bytes, d_in, 1024)
        assert (config.arch, config.kernel, config.element_bytes) == (arch, kernel, element_bytes)
        return config.block_m

    assert [block_m("nvidia-h200", 90, "wgrad", 2, d_in) for d_in in (1, 200, 300, 10**6)] == [2, 2, 1, 1]
    assert block_m("nvidia-h200", 90, "gram", 2, 64) == 4, "its own file has no Gram"
    assert block_m("", 90, "wgrad", 2, 64) == 3
    assert block_m("nvidia-a100", 80, "wgrad", 4, 64) == 5
    with pytest.raises(ValueError, match=r"configs/sm80.json for element_bytes=2, got 'wgrad'"):
        tiles.kernel_config("", 80, "wgrad", 2, 64, 64)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("kernel", ["wgrad", "gram", "gram_norms", "dot"])
def test_every_kernel_has_a_config(kernel: str, element_bytes: int, arch: int) -> None:
    for d_in, d_out in ((1, 1), (576, 1536), (4096, 14336), (10**6, 3)):
        config = tiles.kernel_config("", arch, kernel, element_bytes, d_in, d_out)
        assert (config.kernel, config.element_bytes) == (kernel, element_bytes)
        assert config.arch in costs.lineage(arch)


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
    assert costs.gpu_name(name) == expected


#: GPU, compute capability, bytes of shared memory per block (CUDA C++ Programming Guide, compute capabilities), tiles.
GPUS = [
    ("NVIDIA A100", (8, 0), 166_912, 80),
    ("NVIDIA RTX A6000", (8, 6), 101_376, 80),
    ("NVIDIA Orin", (8, 7), 166_912, 80),
    ("NVIDIA L40S", (8, 9), 101_376, 80),
    ("NVIDIA H200", (9, 0), 232_448, 90),
    ("NVIDIA B200", (10, 0), 232_448, 100),
    ("NVIDIA B300", (10, 3), 232_448, 100),
    ("NVIDIA Thor", (11, 0), 232_448, 90),
    ("NVIDIA GeForce RTX 5090", (12, 0), 101_376, 80),
    ("NVIDIA GB10", (12, 1), 101_376, 80),
]


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int, int]]:
    """(name, shared memory, tiles) of a GPU from the table, which is then the machine's."""
    name, capability, shared_memory, arch = request.param
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    costs.chip.cache_clear()
    yield name, shared_memory, arch
    costs.chip.cache_clear()


every_gpu = pytest.mark.parametrize("gpu", GPUS, indirect=True, ids=[name for name, *_ in GPUS])


@every_gpu
def test_chip(gpu: tuple[str, int, int]) -> None:
    name, _, arch = gpu
    assert costs.chip(torch.device("cpu")) == CPU
    assert costs.chip(torch.device("cuda:0")) == Chip("cuda", costs.gpu_name(name), arch)


@pytest.mark.parametrize("capability, arch", [(capability, arch) for _, capability, _, arch in GPUS])
def test_architecture_where_the_shared_memory_was_not_recorded(capability: tuple[int, int], arch: int) -> None:
    assert costs.architecture(capability) == arch


@every_gpu
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_tiles_fit_the_shared_memory_of_every_gpu(gpu: tuple[str, int, int], kernel: str, element_bytes: int) -> None:
    """What is launched and what tuning tries. Hopper's tiles do not fit GPUs of compute capability 12.x."""
    _, shared_memory, _ = gpu
    chip = costs.chip(torch.device("cuda:0"))
    launched = tiles.kernel_config(chip.gpu, chip.arch, kernel, element_bytes, 4096, 4096)
    tried = tiles.candidates(kernel, chip.arch, element_bytes, costs.shared_memory(torch.device("cuda:0")))
    assert launched in tried and len(tried) > 3
    for config in (launched, *tried):
        assert tiles.shared_memory_needed(config) <= shared_memory, config
    if shared_memory < costs.SHARED_MEMORY[90] and (kernel, element_bytes) == ("wgrad", 2):
        hopper = tiles.kernel_config("", 90, kernel, element_bytes, 4096, 4096)
        assert tiles.shared_memory_needed(hopper) > shared_memory


def test_every_candidate_has_a_reason() -> None:
    found = [tile for tried in (*tiles.TRITON_TILES.values(), *tiles.NESTED_TILES.values()) for tile in tried]
    assert all(candidate.reason for candidate in (*found, *CUDA_CANDIDATES.values()))
    for tried in tiles.TRITON_TILES.values():
        assert len({tile[:5] for tile in tried}) == len(tried)


A100, A6000, H200 = (80, 108, 166_912), (80, 84, 101_376), (90, 132, 232_448)
"""Architecture, multiprocessors, shared memory."""


def tile_columns(gpu: tuple[int, int, int], widths: tuple[int, ...], d_in: int, d_out: int) -> int:
    """The width that is chosen where no tokens are split."""
    arch, multiprocessors, shared_memory = gpu

    def rounds(columns: int) -> float:
        return -(-(-(-d_in // columns) * -(-d_out // 128)) // multiprocessors)

    return tiles.cuda_config(arch, widths, shared_memory, rounds).columns


@pytest.mark.parametrize(
    ("d_in", "d_out", "columns"),
    [
        (4096, 4096, 256),  # four rounds of 384 elements of x and dy per token, instead of six of 320 and eight of 256
        (2048, 2048, 256),  # one round of 128 tiles
        (2048, 11008, 256),  # 6 rounds, where 192 columns take 8 and 128 take 11
        (576, 576, 128),  # one round whatever the width
        (128, 4096, 128),
    ],
)
def test_the_cuda_tile_on_hopper_is_chosen_by_rounds_and_bytes(d_in: int, d_out: int, columns: int) -> None:
    assert tile_columns(H200, (256, 128, 192), d_in, d_out) == columns


@pytest.mark.parametrize(
    ("gpu", "d_in", "d_out", "columns"),
    [
        (A100, 4096, 4096, 192),  # seven rounds of 24 cycles per token, instead of ten whose port is full: 17.8
        (A100, 1536, 1536, 192),  # one round instead of two
        (A100, 2048, 256, 128),
        (A6000, 4096, 4096, 128),  # 13 rounds of 32 cycles, instead of nine of 48
        (A6000, 1152, 1792, 192),  # one round instead of two
    ],
)
def test_the_cuda_tile_on_ampere_is_chosen_by_rounds_and_the_shared_memory_port(
    gpu: tuple[int, int, int], d_in: int, d_out: int, columns: int
) -> None:
    """GPUs with 99 KiB of shared memory per block have half the tensor cores for the same port: rounds alone count."""
    assert tile_columns(gpu, (128, 192), d_in, d_out) == columns


@pytest.mark.parametrize(("length", "columns"), [(2048, 256), (600, 256), (400, 192), (64, 192)])
def test_short_samples_take_the_tile_whose_ends_cost_less(length: int, columns: int) -> None:
    """Below about 450 tokens at 4096 x 4096: with 256 columns an end is five times as long as with 192."""
    arch, multiprocessors, shared_memory = H200
    gpu = Gpu(arch, (128, 192, 256), multiprocessors, shared_memory)
    assert wgrad.launch_config(gpu, 4096, 4096, 16384, 16384 // length).columns == columns


def forced_or_chosen(arch: int, *widths: int) -> CudaConfig:
    return tiles.cuda_config(arch, widths, costs.SHARED_MEMORY[arch], lambda columns: 1.0)


def test_a_forced_cuda_config_is_for_its_architecture_and_must_be_compiled() -> None:
    with tiles.forced(CudaConfig(90, 192, group_m=12)):
        assert forced_or_chosen(90, 128, 192) == CudaConfig(90, 192, group_m=12)
        assert forced_or_chosen(80, 128) == CudaConfig(80, 128)
    assert forced_or_chosen(90, 128, 192) == CudaConfig(90, 128) and not CudaConfig(90, 128).clusters
    with tiles.forced(CudaConfig(90, 256)), pytest.raises(ValueError, match=r"one of \[128, 192\] on sm_90.* got 256"):
        forced_or_chosen(90, 128, 192)


@pytest.mark.parametrize(
    ("clusters", "arch", "tile_rows", "work_tiles", "multiprocessors", "blocks"),
    [
        (True, 90, 32, 512, 132, 2),
        (False, 90, 32, 512, 132, 1),  # the default
        (True, 80, 32, 512, 132, 1),
        (True, 90, 33, 528, 132, 1),  # an odd number of rows of tiles
        (True, 90, 8, 128, 132, 1),  # fewer tiles than multiprocessors
        (True, 90, 8, 132, 132, 2),
        (True, 90, 2, 2, 1, 1),
    ],
)
def test_clusters_are_of_two_blocks_where_the_rule_says_so(
    clusters: bool, arch: int, tile_rows: int, work_tiles: int, multiprocessors: int, blocks: int
) -> None:
    config = CudaConfig(arch, 192, clusters=clusters)
    assert tiles.cluster_size(config, tile_rows, work_tiles, multiprocessors) == blocks


def test_the_notes_have_the_cuda_tile_of_every_layer() -> None:
    """Columns, tiles x parts, rounds and use in the table of ``docs/gpu-notes.md``, for 16384 tokens on an H200."""
    arch, multiprocessors, shared_memory = H200
    gpu = Gpu(arch, (128, 192, 256), multiprocessors, shared_memory)
    rows = re.findall(r"^\| \S+\.\w+ \| (\d+) → (\d+) \|.* \| (.*) \|$", NOTES.read_text(), re.M)
    assert len(rows) == 12
    for d_in, d_out, told in ((int(row[0]), int(row[1]), row[2]) for row in rows):
        columns = wgrad.launch_config(gpu, d_in, d_out, 16384).columns
        tile_rows, tile_columns = wgrad.tile_grid(d_in, d_out, columns)
        split = wgrad.choose_split(gpu, columns, d_in, d_out, 16384)
        counts = [split.whole_rows * tile_columns, (tile_rows - split.whole_rows) * tile_columns]
        busiest = splits.busiest(*counts, split.parts, split.share, multiprocessors)
        written = zip((f"{counts[0]} x 1", f"{counts[1]} x {split.parts}"), map(str, busiest), counts, strict=True)
        shown = [(tiles, rounds) for tiles, rounds, count in written if count]
        rounds = busiest[0] + busiest[1] * split.share
        use = d_in * d_out / (128 * columns * multiprocessors * rounds)
        assert told == f"{columns}, {' + '.join(s[0] for s in shown)}, {' + '.join(s[1] for s in shown)}, {use:.0%}"


def test_blackwell_takes_hopper_s_tiles_where_it_has_none() -> None:
    """Nested loops for wgrad on 16-bit inputs of B200 and B300 alone; costs and other kernels are Hopper's."""
    b200 = Chip("cuda", "", 100)
    nested = [
        (arch, kernel, element_bytes)
        for arch in (80, 90, 100)
        for kernel in tiles.KERNELS
        for element_bytes in (2, 4)
        if tiles.kernel_config("", arch, kernel, element_bytes, 4096, 4096).nested
    ]
    assert nested == [(100, "wgrad", 2)]
    assert costs.costs(b200, "triton", 2, 4096, 4096) == costs.costs(GPU, "triton", 2, 4096, 4096)
    assert costs.lineage(90) == (90,) and costs.lineage(100) == (100, 90)


def test_a_tuned_config_replaces_one_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On B200 tuning tries nested and flat loops: the faster is kept, and the nearer shape wins whatever its loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nested = tiles.kernel_config("", 100, "wgrad", 2, 1024, 1024)
    flat = tiles.kernel_config("", 90, "wgrad", 2, 1024, 1024)
    for saved in ((nested,), (nested, flat), (nested, flat, nested)):
        for config in saved:
            tiles.save_tuned("nvidia-b200", 1024, 1024, config)
        assert tiles.kernel_config("nvidia-b200", 100, "wgrad", 2, 1024, 1024) == saved[-1]
        assert len(tiles.tuned("nvidia-b200")) == 1
    tiles.save_tuned("nvidia-b200", 1536, 1536, flat)
    assert tiles.kernel_config("nvidia-b200", 100, "wgrad", 2, 1500, 1536) == flat
    assert tiles.kernel_config("nvidia-b200", 100, "wgrad", 2, 1024, 1024) == nested
    tiles.forget_tuned()
