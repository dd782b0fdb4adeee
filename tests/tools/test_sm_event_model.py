"""The event model's limits follow from arithmetic, and docs/gpu-notes.md holds the tables that it prints."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gradnorm_kernels.tuning.tiles import end_cycles
from tools import sm_event_model as model
from tools.sm_event_model import HOPPER, Chip, Kernel, cycles_per_token, hopper, layer, simulate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-notes.md"
#: Nothing but the tensor cores is a limit.
IDLE = replace(HOPPER, l2=1e9, port=1e9)
PLAIN = [Kernel(columns, 4, cluster=cluster) for columns in (128, 192, 256) for cluster in (1, 2)]


def ratio(kernel: Kernel, chip: Chip, sample_tokens: int = 16384) -> float:
    """Cycles, relative to the tensor cores'."""
    return cycles_per_token(kernel, chip, sample_tokens) / kernel.product_cycles(chip)


@pytest.mark.parametrize("kernel", PLAIN, ids=lambda kernel: f"{kernel.columns} columns, clusters of {kernel.cluster}")
def test_one_limit_alone_sets_the_pace(kernel: Kernel) -> None:
    assert ratio(kernel, IDLE) == pytest.approx(1.0, rel=1e-6)
    port = (kernel.read_bytes + kernel.written_bytes) / 64 / kernel.product_cycles(HOPPER)
    assert port > 1.9 and ratio(kernel, replace(IDLE, port=64.0)) == pytest.approx(port, rel=5e-3)
    l2 = kernel.link_bytes / 20 / kernel.product_cycles(HOPPER)
    assert l2 > 1.2 and ratio(kernel, replace(IDLE, l2=20.0)) == pytest.approx(l2, rel=5e-3)


def test_the_limits_are_those_of_the_page() -> None:
    """Bytes a cycle of a stage: from L2, read by products, and the port's 128 with the copies' writes."""
    cycles = {columns: columns * 128 * 64 / 2048 for columns in (128, 192, 256)}
    kernels = {columns: Kernel(columns, 4) for columns in cycles}
    assert [kernels[c].link_bytes * 64 / cycles[c] for c in cycles] == pytest.approx([64, 53.33, 48], rel=1e-3)
    assert [kernels[c].read_bytes * 64 / cycles[c] for c in cycles] == pytest.approx([96, 85.33, 80], rel=1e-3)
    assert [kernels[c].bounds(HOPPER)["port"] for c in cycles] == pytest.approx([1.25, 1.083, 1.0], rel=1e-3)
    assert Kernel(256, 4, cluster=2).link_bytes * 64 / cycles[256] == 32
    # Ampere's warps of 64 x 32 and 64 x 48, and tensor cores that are paired.
    assert model.AMPERE_128.bounds(model.AMPERE)["port"] == pytest.approx(1.0)
    assert model.AMPERE_192.bounds(model.AMPERE)["port"] == pytest.approx(0.79, abs=5e-3)
    assert model.PLAIN[model.BLACKWELL][0].bounds(model.BLACKWELL)["port"] == pytest.approx(1.0)


def test_the_model_gives_the_ratio_that_its_rate_of_l2_was_taken_from() -> None:
    """fast.cu's kernels 6 and 7: three stages of 128 x 256, alone and in clusters. Latency and port add nothing."""
    alone, in_clusters = (ratio(Kernel(256, 3, cluster=cluster), HOPPER) for cluster in (1, 2))
    assert in_clusters == pytest.approx(1.0, abs=0.01)
    assert alone / in_clusters == pytest.approx(model.REPORTED[1] / model.REPORTED[0], abs=0.005)


def test_an_end_that_nothing_hides_is_paid_in_full() -> None:
    """One consumer: the products, the wait for the first one, and the end."""
    kernel = Kernel(128, 4, consumers=1, end=400.0, issue=50.0)
    per_sample = cycles_per_token(kernel, IDLE, 256) * 256
    assert per_sample == pytest.approx(256 * 8 + 400 + 50, rel=1e-3)
    # Two accumulators hide an end that is shorter than the next sample.
    assert ratio(replace(kernel, accumulators=2), IDLE, 256) == pytest.approx(1.0, rel=1e-3)
    long_end = replace(kernel, accumulators=2, end=9000.0)
    assert cycles_per_token(long_end, IDLE, 256) * 256 == pytest.approx((9000 + 256 * 8 + 50) / 2, rel=1e-2)


def test_sums_in_shared_memory_take_the_port() -> None:
    """64 KiB for each of two consumers at every end, where the port is full already."""
    kernel = replace(hopper(256, 3), end=0.0)
    without = replace(kernel, end_bytes=0)
    chip = replace(HOPPER, l2=1e9)
    more = (cycles_per_token(kernel, chip, 256) - cycles_per_token(without, chip, 256)) * 256
    assert kernel.end_bytes == 65536 and 1024 <= more < 1.5 * 1024  # the port's cycles, and waits until it is free


@pytest.mark.parametrize("kernel", [hopper(128, 7, stagger=1), hopper(256, 6, 32, cluster=2), model.BLACKWELL_TRITON])
def test_more_bandwidth_and_longer_samples_are_never_worse(kernel: Kernel) -> None:
    """Within half a percent: events in another order may cost a little."""
    for name, values in (("l2", (20, 30, 46.7, 64, 200)), ("port", (64, 96, 128, 160, 500))):
        found = [cycles_per_token(kernel, replace(HOPPER, **{name: value}), 512) for value in values]
        assert all(later <= 1.005 * earlier for earlier, later in pairwise(found)), (name, found)
        assert found[-1] < 0.9 * found[0]
    found = [cycles_per_token(kernel, HOPPER, tokens) for tokens in (64, 128, 256, 512, 1024, 4096)]
    assert all(later <= 1.005 * earlier for earlier, later in pairwise(found)), found


def test_a_stagger_hides_one_consumer_s_end_behind_the_other_s_products() -> None:
    together, apart = (hopper(128, 7, stagger=stagger) for stagger in (0, 1))
    assert cycles_per_token(apart, IDLE, 256) < cycles_per_token(together, IDLE, 256)


def test_tiles_fit_and_a_stagger_needs_stages() -> None:
    for _, kernel, chip in model.forms():
        if chip is HOPPER:
            sums = kernel.end_bytes // 2 * kernel.consumers  # read and written once, by each consumer
            assert kernel.stages * kernel.k_tile * kernel.written_bytes + sums <= 227 * 1024
    with pytest.raises(ValueError, match="stages must be enough for stagger=3, got 2"):
        simulate(hopper(128, 2, stagger=3), HOPPER, 1024, 2)


def test_a_layer_s_rounds() -> None:
    """4096 x 4096: 1024 tiles of 128 columns in 8 rounds of 132, 512 of 256 in 4, 704 of 192 in 6; pairs alike.

    One sample has no ends at which its tokens could be split.
    """
    for columns, rounds in ((128, 8), (192, 6), (256, 4)):
        kernel = Kernel(columns, 4, tile_end=0.0)
        expected = rounds * kernel.product_cycles(IDLE) * 16384 / IDLE.clock
        assert layer(kernel, IDLE, 4096, 4096, 16384, 16384) == pytest.approx(expected, rel=1e-6)
        in_pairs = model._rounds(replace(kernel, cluster=2), IDLE, 4096, 4096, 16384, 16384, model._even(16, 1))
        assert in_pairs == pytest.approx(expected, rel=1e-6)
    # With 256 samples 192 columns are five full rounds, and the other 44 tiles in three parts of up to 86 samples.
    kernel = Kernel(192, 4, tile_end=0.0)
    stored = 2 * 132 * 128 * 192 * 4 / IDLE.memory + model.LAUNCH
    expected = (5 + 86 / 256) * cycles_per_token(kernel, IDLE, 64) * 16384 / IDLE.clock + stored
    assert layer(kernel, IDLE, 4096, 4096, 16384, 64) == pytest.approx(expected, rel=1e-6)
    # 25 tiles: Triton splits the tokens in 5, and stores and reads 125 tiles of float32.
    small = Kernel(128, 4, tile_end=0.0, splits="triton")
    stored = 2 * 125 * 128 * 128 * 4 / IDLE.memory + model.LAUNCH
    expected = small.product_cycles(IDLE) * 16384 / 5 / IDLE.clock + stored
    assert layer(small, IDLE, 576, 576, 16384, 16384) == pytest.approx(expected, rel=1e-6)


def test_the_choice_of_a_tile_has_the_model_s_ends() -> None:
    """What an end costs samples of 128 tokens beside their products; Ampere's two tiles are within 4% of one number."""
    kernels = [model.hopper(128, 7, stagger=1), model.hopper(192, 5, stagger=1), model.hopper(256, 6, 32, stagger=1)]
    cases = [(90, kernel, HOPPER) for kernel in kernels]
    for arch, kernel, chip in (
        *cases,
        *((80, kernel, model.AMPERE) for kernel in (model.AMPERE_128, model.AMPERE_192)),
    ):
        end = 128 * (cycles_per_token(kernel, chip, 128) - cycles_per_token(kernel, chip, 4096))
        assert end_cycles(arch, kernel.columns) == pytest.approx(end, rel=0.04), (arch, kernel.columns)


@pytest.mark.parametrize("table", [model.predictions, model.sensitivity], ids=["predictions", "sensitivity"])
def test_the_page_has_the_model_s_table(table) -> None:  # type: ignore[no-untyped-def]
    """`python -m tools.sm_event_model --predictions` prints it. An outcome goes beside a prediction, not over it."""
    page = PAGE.read_text().splitlines()
    for line in table():
        told = line.removesuffix("not measured yet |")
        assert any(row.startswith(told) for row in page), line


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--columns", "128", "--stages", "7", "--k_tile", "64", "--samples", "1024", "--port", "64"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "port 2.50" in said[0] and "4096 x 4096" in said[1]
    assert float(said[-1].split("|")[1]) == pytest.approx(2.5, rel=0.05)
    with pytest.raises(SystemExit):
        model.main(["--k_tile", "24"])
    assert "--k_tile must be a multiple of 16, got 24" in capsys.readouterr().err
