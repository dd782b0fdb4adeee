"""The pictures of result files: wrong and failed rows are gaps and are named, and small costs are visible."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.__main__ import main
from tests.benchmarks import bench_made_up as made_up
from tests.benchmarks.bench_made_up import not_ok, ops_record, ops_row, step_record, write

pytest.importorskip("matplotlib").use("Agg")
LENGTHS = (256, 512, 1024, 2048, 4096)


def panels(rows: list[dict], layer: str, near: bool = False) -> tuple[Any, Any]:
    """(the figure of all rows' layers, the axis of one layer)."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure = plots._ratio_panels(rows, plots._styles(names), "made up", True, near)
    return figure, next(axis for axis in figure.axes if axis.get_title().startswith(layer))


def line_of(axis: Any, name: str) -> dict[float, float]:
    bar = next(found for found in axis.containers if found.get_label() == name)
    x, y = bar.lines[0].get_data()
    return dict(zip(map(float, x), map(float, y), strict=True))


def test_a_row_without_a_speed_is_a_gap_and_is_named():
    rows = [ops_row("llama-3.1-8b.q", n, name, None, 1) for n in LENGTHS for name in ("weight_grad", "triton_wgrad")]
    at = next(i for i, row in enumerate(rows) if row["provider"] == "triton_wgrad" and row["length"] == 1024)
    rows[at] = not_ok(rows[at], "wrong", "norms off by 1")
    figure, axis = panels(rows, "llama-3.1-8b.q")
    line = line_of(axis, "triton_wgrad")
    assert math.isnan(line[1024]) and not any(math.isnan(value) for n, value in line.items() if n != 1024)
    assert "triton_wgrad wrong in 1" in figure.legends[0].get_title().get_text()
    unable = [not_ok(row, "unable", "not here") if row["provider"] == "triton_wgrad" else row for row in rows]
    assert not panels(unable, "llama-3.1-8b.q")[0].legends[0].get_title().get_text()


def test_a_layer_where_all_failed_keeps_its_panel():
    rows = [ops_row(layer, 256, "auto", None, 1) for layer in ("llama-3.1-8b.q", "llama-3.1-8b.kv")]
    rows[1] = not_ok(rows[1], "failed", "no answer for 60 s")
    for near in (False, True):
        axis = panels(rows, "llama-3.1-8b.kv", near)[1]
        assert [text.get_text() for text in axis.texts] == ["nothing here was right and measured"]


def test_near_axes_show_a_few_percent_and_say_where_they_are_cut():
    rows = [ops_row("llama-3.1-8b.q", n, name, None, 1) for n in LENGTHS for name in ("triton_wgrad", "triton_gram")]
    axis = panels(rows, "llama-3.1-8b.q", near=True)[1]
    assert axis.get_yscale() == "linear" and axis.get_ylim()[1] < 1.6 < max(line_of(axis, "triton_gram").values())
    assert "cut at 1.5" in axis.get_ylabel()
    assert "cut" not in panels(rows[::2], "llama-3.1-8b.q", near=True)[1].get_ylabel()


@pytest.mark.parametrize(
    ("layer", "lengths", "aims"),
    [
        ("llama-3.1-8b.q", LENGTHS, {256: 1.10, 1024: 1.05, 2048: 1.00, 4096: 1.00}),
        ("llama-3.1-8b.q", (256, 512), {256: 1.10, 512: 1.10}),
        ("smollm2-135m.q", LENGTHS, {256: 1.10, 4096: 1.10}),
        ("smollm2-135m.q", (64, 128), None),
        ("qwen2.5-3b.gate_up", LENGTHS, None),
    ],
)
def test_targets_are_drawn_only_where_there_is_one(layer, lengths, aims):
    axis = panels([ops_row(layer, n, "auto", None, 1) for n in lengths], layer)[1]
    found = [line for line in axis.lines if line.get_label() == "target of wgrad with dW"]
    assert [dict(zip(*line.get_data(), strict=True)) for line in found] == ([] if aims is None else [aims])


def test_a_complete_file_gives_both_pictures_and_a_roofline_of_few_providers(tmp_path, monkeypatch):
    kinds = [(256, False, False), (1000, True, False), (1000, True, True)]
    names = ("weight_grad", "auto", "triton_wgrad", "triton_gram", "cuda_wgrad", "bmm", "two_gram")
    rows = made_up.grid(("llama-3.1-8b.q", "llama-3.1-8b.kv"), kinds, names)
    record = ops_record([*rows, ops_row("llama-3.1-8b.q", 256, "auto", None, 1, tokens=65536)])
    files = [
        write(tmp_path / "ops.json", record),
        write(tmp_path / "step.json", step_record({"nothing": 1.0, "linears": 1.02})),
    ]
    seen: list[str] = []
    real = plots._roofline
    monkeypatch.setattr(
        plots, "_roofline", lambda r, rows, *a: seen.extend(x["provider"] for x in rows) or real(r, rows, *a)
    )
    assert main(["plot", *map(str, files), "--out", str(tmp_path / "plots")]) == 0
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    batches = {
        f"ops-llama-3.1-8b-bf16-{kind}{part}" for kind in ("uniform", "ragged", "gram") for part in ("", "-ours")
    }
    of_another_size = "ops-llama-3.1-8b-bf16-uniform-of-65536"
    assert drawn == {*batches, of_another_size, "ops-roofline-bf16", "step"}
    assert set(seen) == {"weight_grad", "auto", "triton_wgrad", "cuda_wgrad"}


def test_the_small_overheads_of_a_step_have_their_own_panel(tmp_path, monkeypatch):
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure) or tmp_path)
    record = step_record({"nothing": 1.0, "linears": 1.02, "prompt_backwards": 3.0})
    plots._draw_step(record, record["rows"], tmp_path / "step", "png")
    axis = figures[0].axes[-1]
    assert next(bar.get_width() for bar in axis.patches if bar.get_height() > 0.5) == pytest.approx(2.0)
    assert axis.get_xlim()[1] < 10, "a rival's bar would make ours too small to see"
    assert any(list(line.get_xdata()) == pytest.approx([3.0, 3.0]) for line in axis.lines), "the target"
