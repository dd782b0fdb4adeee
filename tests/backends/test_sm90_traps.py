"""The cases that catch implementations out, through the cuda backend on a Hopper that the host plays.

The same cases as on every backend (``traps.py``), with the weight-gradient kernel of sm_90a; the other kernels of the
backend are those that ``test_cuda_host.py`` tries. Each check runs twice, in another order of warps and of arriving
copies, and must give the same bits.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gradnorm_kernels import traps
from gradnorm_kernels.backends.cuda import wgrad
from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES, forced
from tests.cuda_host.backend import HostContext, host_context, install
from tests.cuda_host.build import Host, Tree

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16, FP16 = torch.bfloat16, torch.float16
WANTED = ({"weight_grad": True}, {"weight_grad": True, "group_gram": True}, {})
# Every trap once, the variants and dtypes taking turns.
TURNS = [(trap, WANTED[i % 3], FP16 if i % 5 == 2 else BF16) for i, trap in enumerate(traps.TRAPS)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Host:
    objects = Path(pytestconfig.cache.mkdir("cuda_host"))  # type: ignore[union-attr]
    return Host(Tree(tmp_path_factory.mktemp("csrc"), objects).module())


@pytest.fixture
def launched(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launches, with ``backend="cuda"`` on a machine of compute capability 9.0."""
    names: list[str] = []
    original = HostContext.launch

    def launch(self: HostContext, name: str, **fields: object) -> None:
        names.append(name)
        original(self, name, **fields)

    monkeypatch.setattr(HostContext, "launch", launch)
    install(monkeypatch, host_context(host, arch=90))
    return names


@pytest.mark.parametrize(("trap", "wanted", "dtype"), TURNS, ids=[str(turn[0]) for turn in TURNS])
def test_traps(launched: list[str], trap: traps.Trap, wanted: dict[str, bool], dtype: torch.dtype) -> None:
    case = trap.build(dtype)
    traps.check(case, "cuda", "wgrad", **wanted)
    if case.x.numel() and case.dy.numel():
        assert "wgrad_norm_sm90" in launched
        assert "wgrad_norm_sm80" not in launched


def test_pairs(launched: list[str]) -> None:
    traps.check_pairs(traps.ODD.build(BF16), "cuda", "wgrad")
    assert "wgrad_norm_sm90" in launched


def test_every_tile_is_chosen(host: Host) -> None:
    """On the 132 multiprocessors of an H200, by rounds and bytes."""
    gpu = host_context(host, arch=90, multiprocessors=132).gpu
    shapes = {128: (128, 4096), 192: (576, 576), 256: (4096, 4096)}
    assert {columns: wgrad.launch_config(gpu, *shape, 16384).columns for columns, shape in shapes.items()} == {
        columns: columns for columns in shapes
    }


def test_candidates_are_compiled(host: Host) -> None:
    assert host.module.WGRAD_TILES == {80: [128, 192], 90: [128, 192, 256]}
    for candidate in CUDA_CANDIDATES.values():
        assert candidate.config.columns in host.module.WGRAD_TILES[candidate.config.arch]


@pytest.mark.parametrize("name", CUDA_CANDIDATES)
def test_tiles_that_are_asked_for_are_launched_and_right(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[tuple[object, ...]] = []
    original = HostContext.launch

    def launch(self: HostContext, name: str, **fields: object) -> None:
        if name.startswith("wgrad_norm_sm"):
            seen.append((name, fields["block_n"], fields["staggered"], fields["group_m"], fields["cluster"]))
        original(self, name, **fields)

    monkeypatch.setattr(HostContext, "launch", launch)
    config = CUDA_CANDIDATES[name].config
    install(monkeypatch, host_context(host, arch=config.arch))
    with forced(config):
        traps.check(traps.packed([40, 19, 40], 200, 136, BF16), "cuda", "wgrad", weight_grad=True)
    wanted = {f"columns_{width}": (width, True, 8, 1) for width in (128, 192, 256)}
    wanted |= {"columns_192_band_12": (192, True, 12, 1), "columns_256_band_16": (256, True, 16, 1)}
    wanted |= {f"columns_{width}_abreast": (width, False, 8, 1) for width in (128, 192, 256)}
    wanted["columns_192_unsplit"] = wanted["columns_192"]
    wanted |= {f"columns_{width}_clusters": (width, True, 8, 2) for width in (192, 256)}
    wanted |= {f"sm80_columns_{width}": (width, True, 8, 1) for width in (128, 192)}
    assert set(seen) == {(f"wgrad_norm_sm{config.arch}", *wanted[name])}
    assert wgrad.launch_config(host_context(host, arch=90).gpu, 128, 128, 99).columns == 128, (
        "the tiles stay as they were afterwards"
    )
