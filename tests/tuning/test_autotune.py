"""The autotuner without a GPU: the runner and the timer are given. And the cache it writes."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import __main__ as main
from gradnorm_kernels.tuning import autotune, costs, tiles
from gradnorm_kernels.tuning.autotune import tune
from gradnorm_kernels.tuning.tiles import KernelConfig, TritonTile, candidates

BASE = KernelConfig("wgrad", 90, 2, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
GPU = "nvidia-h200"
TRUTH = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([9.0])]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder is a new one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget_tuned()
    yield tmp_path / "gradnorm_kernels" / GPU
    tiles.forget_tuned()


def configs(*block_ms: int) -> list[KernelConfig]:
    return [replace(BASE, block_m=block_m) for block_m in block_ms]


class Bench:
    """Runs and times without a kernel: block_m is the milliseconds, and says how a config behaves."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, config: KernelConfig) -> list[Tensor]:
        self.runs.append(config.block_m)
        if config.block_m == 13:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        found = [expected.clone() for expected in TRUTH]
        if config.block_m == 1:  # the fastest, and wrong
            found[0][1] *= 1.01
        if config.block_m == 2:
            found[1][0] = float("nan")
        if config.block_m == 3 and self.runs.count(3) > 2:  # adds to what it finds, from the second call on
            found[0] += TRUTH[0]
        return found

    def timer(self, call: Callable[[], object]) -> float:
        call()
        return float(self.runs[-1])


def test_the_fastest_right_config_wins() -> None:
    bench, told = Bench(), []
    trials = tune(configs(64, 13, 1, 16, 2, 3, 32), bench.run, TRUTH, bench.timer, better=told.append)
    assert [trial.config.block_m for trial in told] == [64, 16], "each that is the fastest so far, and no other"
    assert [trial.config.block_m for trial in trials[:3]] == [16, 32, 64]
    assert [trial.milliseconds for trial in trials] == [16.0, 32.0, 64.0, None, None, None, None]
    reasons = {trial.config.block_m: trial.reason for trial in trials if trial.milliseconds is None}
    assert reasons[13] == "RuntimeError: out of resource: shared memory"
    assert reasons[1] == "result 0 is off by 5.0e-03 of its largest element"
    assert "result 1 is off by nan" in (reasons[2] or "") and "result 0 is off by" in (reasons[3] or "")
    assert bench.runs.count(1) == bench.runs.count(2) == 1, "what is wrong is not timed"
    assert "16x128x64, 8 warps, 3 stages, rows of 8: 16.0000 ms" in autotune.line(trials[0])
    assert "out of resource" in autotune.line(next(t for t in trials if t.config.block_m == 13))


def test_nothing_is_kept_if_nothing_is_right(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench()
    trials = tune(configs(1, 2, 13), bench.run, TRUTH, bench.timer)
    assert autotune.keep(GPU, 64, 64, trials) is None and autotune.keep(GPU, 64, 64, []) is None
    assert not cache.exists()
    assert "no config is right" in capsys.readouterr().out


def test_what_is_kept_is_launched(cache: Path) -> None:
    frozen = tiles.kernel_config(GPU, 90, "wgrad", 2, 1000, 1000)
    bench = Bench()
    path = autotune.keep(GPU, 1024, 1024, tune(configs(16, 32), bench.run, TRUTH, bench.timer))
    assert path is not None and path.parent == cache
    kept = tiles.kernel_config(GPU, 90, "wgrad", 2, 1000, 1000)
    assert kept.block_m == 16 != frozen.block_m
    assert tiles.kernel_config(GPU, 90, "wgrad", 2, 10_000, 10_000).block_m != 16, "too far from what was tuned"
    assert tiles.kernel_config(GPU, 90, "gram", 2, 1000, 1000).kernel == "gram"
    assert tiles.kernel_config("another-gpu", 90, "wgrad", 2, 1000, 1000) == frozen
    assert tiles.kernel_config("", 90, "wgrad", 2, 1000, 1000) == frozen
    assert [p.name for p in cache.iterdir()] == [path.name], "nothing half-written stays"


def test_forced_configs_go_first_and_go_away() -> None:
    before = tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64)
    with tiles.forced(replace(BASE, block_m=16)):
        assert tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64).block_m == 16
        with pytest.raises(KeyError), tiles.forced(replace(BASE, block_m=32)):
            assert tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64).block_m == 32
            raise KeyError
        assert tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64).block_m == 16
        assert tiles.kernel_config(GPU, 90, "gram", 2, 64, 64).kernel == "gram"
    assert tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "",
        lambda text: json.dumps(json.loads(text) | {"format": 0}),
        lambda text: json.dumps(json.loads(text) | {"triton": "1.0.0"}),
        lambda text: json.dumps(json.loads(text) | {"entry": {"block_m": 16}}),
        lambda text: json.dumps(json.loads(text) | {"entry": 7}),
    ],
)
def test_a_damaged_or_foreign_entry_is_ignored_with_one_warning(damage: Callable[[str], str], cache: Path) -> None:
    frozen = tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64)
    for d in (64, 128):
        path = tiles.save_tuned(GPU, d, d, replace(BASE, block_m=16))
        path.write_text(damage(path.read_text()))
    good = tiles.save_tuned(GPU, 4096, 4096, replace(BASE, block_m=32))
    with pytest.warns(UserWarning, match=rf"2 tuned configs in .*{GPU} are ignored") as caught:
        assert tiles.kernel_config(GPU, 90, "wgrad", 2, 64, 64) == frozen
    assert len(caught) == 1 and good.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.kernel_config(GPU, 90, "wgrad", 2, 5000, 5000).block_m == 32


def _save_many(offset: int) -> None:
    for i in range(40):
        tiles.save_tuned(GPU, 100 + 2 * i + offset, 64, replace(BASE, block_m=16))
        tiles.save_tuned(GPU, 7, 7, replace(BASE, block_m=2 ** (4 + offset)))  # the same entry as the other's


def test_two_processes_lose_nothing(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_many, args=(offset,)) for offset in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    tiles.forget_tuned()
    entries = tiles.tuned(GPU)
    assert sorted(e["d_in"] for e in entries) == [7, *range(100, 180)]
    assert len(list(cache.iterdir())) == 81


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates(kernel: str, element_bytes: int, arch: int) -> None:
    found = candidates(kernel, arch, element_bytes)
    assert found[0] == tiles.kernel_config("", arch, kernel, element_bytes, 64, 64)
    assert 5 < len(found) == len(set(found)) < 16, "each takes seconds to compile and to time"
    for config in found:
        assert (config.kernel, config.element_bytes) == (kernel, element_bytes)
        assert config.arch in costs.lineage(arch)


def test_a_config_that_only_one_form_of_the_kernel_can_take_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages of 128 x 128 x 128 fit on Hopper until several groups need a tile of sums more."""
    too_large = TritonTile(128, 128, 128, 8, 3, "only some forms fit")
    monkeypatch.setitem(tiles.TRITON_TILES, ("wgrad", 2), [too_large])
    monkeypatch.setitem(tiles.TRITON_TILES, ("gram", 2), [too_large])
    assert all(config.block_k < 128 for config in candidates("wgrad", 90, 2))
    assert any(config.block_k == 128 for config in candidates("gram", 90, 2))
    assert all(config.block_k < 128 for config in candidates("gram", 80, 2))


def test_the_runner_launches_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the torch backend in Triton's place: every call makes new outputs, under the forced config."""
    seen = []
    real = autotune.ops.fused_grad_norm

    def spy(*args: object, backend: str, **kwargs: object) -> object:
        seen.append((backend, tiles.kernel_config("", 90, "wgrad", 2, 24, 16).block_m))
        return real(*args, backend="torch", **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(autotune.ops, "fused_grad_norm", spy)
    run, truth = autotune.runner("wgrad", 24, 16, 70, 32, torch.bfloat16, torch.device("cpu"))
    first, second = (run(replace(BASE, block_m=block_m)) for block_m in (16, 48))
    assert seen[1:] == [("triton", 16), ("triton", 48)] and seen[0][0] == "torch"
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))
    assert [len(t) for t in truth] == [3, 1], "70 tokens in samples of 32: the last is shorter"


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["tune", "--d_in", "64", "--d_out", "64", "--tokens"]
    for arguments, said in (
        ([*shape, "0"], "must be a whole number of at least 1, got '0'"),
        ([*shape, "9", "--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["tune", "--d_in", "64"], "required: --d_out, --tokens"),
    ):
        with pytest.raises(SystemExit) as raised:
            main.main(arguments)
        assert raised.value.code == 2
        assert said in capsys.readouterr().err
    assert main.main(["tuna"]) == 2
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as raised:
            main.main([*shape, "9"])
        assert raised.value.code == 2
        assert "nothing can be tuned here: backend 'triton' cannot run: " in capsys.readouterr().err
