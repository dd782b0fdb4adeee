"""``python -m benchmarks plot FILE...``: pictures of result files, as PNG or SVG.

    python -m benchmarks plot benchmarks/results/ops-*.json --out plots
    python -m benchmarks plot step.json --providers linears linears_fused

A file of ``ops`` gives, for each model, dtype and kind of batch, the time over that of dW alone against the tokens a
sample, with quartiles, one panel a layer, and beside it the rate against the device's measured ceilings. A file of
``step`` gives time and peak memory of each variant over the plain step's, a file of ``cpu_ratio`` the ratios by width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import records

#: Of dW alone, by tokens a sample: what segmented wgrad with dW aims at on a GPU.
AIM = {256: 1.10, 1024: 1.05, 2048: 1.00}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder; default: plots")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these; default: all that were measured")
    parser.add_argument("--format", choices=["png", "svg"], default="png")


def run(options: argparse.Namespace) -> int:
    """Draw every file; the status to exit with: 1 if a file has nothing to draw.

    Raises:
        ValueError: matplotlib is missing, or a file is no result file.
        OSError: a file cannot be read or a picture not be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}): pip install 'gradnorm_kernels[bench]'") from None
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    empty = False
    draw: dict[str, Callable[..., list[Path]]] = {"ops": _draw_ops, "step": _draw_step, "cpu_ratio": _draw_cpu_ratio}
    for path in options.files:
        record = records.read(path)
        rows = [row for row in record["rows"] if row.get("status", "ok") == "ok" and _asked_for(row, options.providers)]
        written = draw[record["benchmark"]](record, rows, options.out / path.stem, options.format) if rows else []
        for picture in written:
            print(picture)
        if not written:
            empty = True
            print(f"{path}: no measured row to draw")
    return 1 if empty else 0


def _asked_for(row: Row, names: list[str] | None) -> bool:
    return names is None or row.get("provider", row.get("variant")) in names


def _title(record: dict[str, Any]) -> str:
    where = record["machine"]
    device = where.get("gpu", {}).get("name") or f"{where['cpu']}, {where['threads']} threads"
    return f"{device}, torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}"


def _save(figure: Any, stem: Path, suffix: str, kind: str) -> Path:
    from matplotlib import pyplot

    path = stem.with_name(f"{stem.name}-{suffix}.{kind}" if suffix else f"{stem.name}.{kind}")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """One colour and marker a name, the same in every picture of a file."""
    from matplotlib import colormaps

    colours, markers = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]], "os^Dv<>Pp*"
    return {
        name: {"color": colours[i % 20], "marker": markers[i % len(markers)], "markersize": 4, "label": name}
        for i, name in enumerate(names)
    }


def _lines(axis: Any, rows: list[Row], styles: dict[str, dict[str, Any]], ratio: Callable[[Row], list[float]]) -> None:
    """One line a provider over tokens a sample, bars from quartile to quartile."""
    for name in _unique(row["provider"] for row in rows):
        own = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["length"])
        low, middle, high = zip(*(ratio(row) for row in own), strict=True)
        bars = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        axis.errorbar([row["length"] for row in own], middle, yerr=bars, linewidth=1.2, capsize=2, **styles[name])
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = _unique(sorted(row["length"] for row in rows))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    fine, coarse = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4), (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    marks = [mark for mark in (fine if high < 6 * low else coarse) if low <= mark <= high]
    axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_xlabel("tokens a sample")
    axis.grid(alpha=0.3)


def _draw_ops(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    styles = _styles(_unique(row["provider"] for row in rows))
    written = []

    def batches(row: Row) -> str:
        return "gram" if row.get("gram") else "ragged" if row["ragged"] else "uniform"

    for model, dtype, sort in _unique((row["model"], row["dtype"], batches(row)) for row in rows):
        chosen = [row for row in rows if (row["model"], row["dtype"], batches(row)) == (model, dtype, sort)]
        layers = _unique(row["layer"] for row in chosen)
        figure, axes = _panels(len(layers))
        for axis, layer in zip(axes, layers, strict=True):
            own = [row for row in chosen if row["layer"] == layer]
            _lines(axis, own, styles, lambda row: [row["ratio"][key] for key in ("q1", "median", "q3")])
            if "gpu" in record["machine"]:
                axis.step(
                    list(AIM),
                    list(AIM.values()),
                    where="post",
                    color="grey",
                    linewidth=0.9,
                    linestyle=":",
                    label="aim of wgrad with dW",
                )
            also = f" (= {', '.join(name.rsplit('.', 1)[-1] for name in own[0]['also'])})" if own[0]["also"] else ""
            axis.set_title(f"{layer}{also}: {own[0]['d_in']} to {own[0]['d_out']}", fontsize=9)
            axis.set_ylabel("time over dW alone")
        handles, labels = _legend(axes)
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, fontsize=8)
        figure.suptitle(f"{model}, {dtype}, {sort} samples\n{_title(record)}", fontsize=9)
        figure.tight_layout()
        written.append(_save(figure, stem, f"{model}-{dtype}-{sort}", kind))
    for dtype in _unique(row["dtype"] for row in rows):
        if record.get("ceilings", {}).get(dtype):
            own = [row for row in rows if row["dtype"] == dtype]
            written.append(_roofline(record, own, record["ceilings"][dtype], styles, stem, kind))
    return written


def _legend(axes: list[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _roofline(
    record: dict[str, Any], rows: list[Row], ceiling: Row, styles: dict[str, dict[str, Any]], stem: Path, kind: str
) -> Path:
    """Rate of the weight-gradient product's work against its arithmetic intensity, under the measured ceilings."""
    figure, (axis,) = _panels(1, 7, 5)
    for name in _unique(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == name]
        axis.plot([row["flop_per_byte"] for row in own], [row["tflops"] for row in own], linestyle="", **styles[name])
    intensities = [row["flop_per_byte"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    points = [low * (high / low) ** (i / 200) for i in range(201)]
    roof = [min(ceiling["product_tflops"], point * ceiling["copy_gbps"] / 1e3) for point in points]
    axis.plot(points, roof, color="black", linewidth=1, label="measured copy and product")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("floating-point operations of dW a byte of x, dy and dW")
    axis.set_ylabel("TFLOP/s of dW's work")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"{rows[0]['dtype']}, all layers and lengths\n{_title(record)}", fontsize=9)
    return _save(figure, stem, f"roofline-{rows[0]['dtype']}", kind)


def _draw_step(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    measured = [row for row in rows if row["variant"] != "nothing"] or rows
    has_memory = all(row["peak_bytes"] is not None for row in measured)
    figure, axes = _panels(2 if has_memory else 1, 6, 0.5 * len(measured) + 1.5)
    names = [row["variant"] for row in measured]
    middle = [row["ratio"]["median"] for row in measured]
    low = [m - row["ratio"]["q1"] for m, row in zip(middle, measured, strict=True)]
    high = [row["ratio"]["q3"] - m for m, row in zip(middle, measured, strict=True)]
    bars = axes[0].barh(names, middle, xerr=[low, high], capsize=2, color="tab:blue")
    axes[0].bar_label(bars, [f"{m:.3f}" for m in middle], padding=12, fontsize=8)
    axes[0].axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes[0].set_xlabel("time over the plain step's")
    axes[0].margins(x=0.2)
    if has_memory:
        more = [(row["peak_bytes"] - row["baseline_peak_bytes"]) / 2**30 for row in measured]
        bars = axes[1].barh(names, more, color="tab:orange")
        axes[1].bar_label(bars, [f"{m:.2f}" for m in more], padding=4, fontsize=8)
        axes[1].set_xlabel("peak memory beyond the plain step's, GiB")
        axes[1].margins(x=0.2)
    for axis in axes:
        axis.invert_yaxis()
    settings = record["settings"]
    what = f"{settings['model']}, {settings['dtype']}, {settings['prompts']} prompts x {settings['completions']} rows"
    figure.suptitle(f"{what} x {settings['length']} tokens, {settings['optimizer']}\n{_title(record)}", fontsize=9)
    figure.tight_layout()
    return [_save(figure, stem, "", kind)]


def _draw_cpu_ratio(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    styles = _styles(_unique(row["provider"] for row in rows))
    widths = _unique(row["d"] for row in rows)
    figure, axes = _panels(len(widths))
    for axis, d in zip(axes, widths, strict=True):
        own = [row for row in rows if row["d"] == d]
        _lines(axis, own, styles, lambda row: [row[key] for key in ("lower_quartile", "ratio", "upper_quartile")])
        axis.set_title(f"d_in = d_out = {d}", fontsize=9)
        axis.set_ylabel("time over dW alone")
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, fontsize=8)
    figure.suptitle(_title(record), fontsize=9)
    figure.tight_layout()
    return [_save(figure, stem, "", kind)]
