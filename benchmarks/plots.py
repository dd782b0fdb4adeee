"""``python -m benchmarks plot FILE...``: pictures of result files, as PNG or SVG.

    python -m benchmarks plot benchmarks/results/ops-*.json --out plots
    python -m benchmarks plot step.json --providers linears linears_fused

A file of ``ops`` gives, per model, dtype and kind of batch, the time relative to dW alone against the tokens per
sample, with quartiles and one panel per layer: one picture with all providers, and one of ours on a linear axis around
1. Then the rates under the device's measured ceilings. A file of ``step`` gives time and peak memory of each variant
relative to the plain step, a file of ``cpu_ratio`` the ratios by width, one of ``host_time`` the time of each call. A
wrong or failed row is a gap in its line and is named below.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.providers import BASELINE
from benchmarks.targets import BY_LENGTH, SMALL, SMALL_LENGTH, WAYS, is_small

#: The largest ratio in the pictures of ours alone; the pictures of all providers show larger ones.
_NEAR = 1.5
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder; default: plots")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these; default: all that were measured")
    parser.add_argument("--format", choices=["png", "svg"], default="png")


def run(options: argparse.Namespace) -> int:
    """Draw every file. Returns the exit status, 1 if a file has nothing to draw.

    Raises:
        ValueError: matplotlib is missing, or a file is no result file.
        OSError: a file cannot be read, or a picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}): pip install 'gradnorm_kernels[bench]'") from None
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    empty = False
    draw: dict[str, Callable[..., list[Path]]] = {
        "ops": _draw_ops,
        "step": _draw_step,
        "cpu_ratio": _draw_cpu_ratio,
        "host_time": _draw_host_time,
    }
    for path in options.files:
        record = records.read(path)
        record["rows"] = [row for row in record["rows"] if _asked_for(row, options.providers)]
        rows = [row for row in record["rows"] if row.get("status", "ok") == "ok"]
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
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """One colour and marker per name, the same in every picture of a file."""
    from matplotlib import colormaps

    colours, markers = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]], "os^Dv<>Pp*"
    return {
        name: {"color": colours[i % 20], "marker": markers[i % len(markers)], "markersize": 4, "label": name}
        for i, name in enumerate(names)
    }


def _lines(axis: Any, rows: list[Row], styles: dict[str, dict[str, Any]], ratio: Callable[[Row], list[float]]) -> None:
    """One line per provider over tokens per sample, bars from quartile to quartile; a row without a speed is a gap."""
    for name in _unique(row["provider"] for row in rows if _drawn(row)):
        own = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["length"])
        low, middle, high = zip(*(ratio(row) if _drawn(row) else [math.nan] * 3 for row in own), strict=True)
        bars = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        axis.errorbar([row["length"] for row in own], middle, yerr=bars, linewidth=1.2, capsize=2, **styles[name])
    if not any(map(_drawn, rows)):
        axis.text(0.5, 0.5, "nothing here was right and measured", ha="center", transform=axis.transAxes, fontsize=8)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = _unique(sorted(row["length"] for row in rows))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    axis.minorticks_off()
    low, high = axis.get_ylim()
    fine, coarse = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4), (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    marks = [mark for mark in (fine if high < 6 * low else coarse) if low <= mark <= high]
    axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_xlabel("tokens per sample")
    axis.grid(alpha=0.3)


def _drawn(row: Row) -> bool:
    return bool(row.get("status", "ok") == "ok")


def _draw_ops(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    styles = _styles(_unique(row["provider"] for row in rows))
    written = []

    usual = Counter(row["tokens"] for row in record["rows"]).most_common(1)[0][0]

    def batches(row: Row) -> str:
        # Batches of another size have their own pictures. Samples of one length may not fill the usual size exactly.
        size = f"-of-{row['tokens']}" if abs(row["tokens"] - usual) >= row["length"] else ""
        return ("gram" if row.get("gram") else "ragged" if row["ragged"] else "uniform") + size

    for model, dtype, sort in _unique((row["model"], row["dtype"], batches(row)) for row in rows):
        chosen = [row for row in record["rows"] if (row["model"], row["dtype"], batches(row)) == (model, dtype, sort)]
        near = [row for row in chosen if row.get("ours") or row["provider"] == BASELINE]
        for suffix, own in (("", chosen), ("-ours", near)):
            if any(map(_drawn, own)) and (own is chosen or 1 < len(near) < len(chosen)):
                title = f"{model}, {dtype}, {sort} samples\n{_title(record)}"
                figure = _ratio_panels(
                    own, styles, title, "gpu" in record["machine"] and sort.startswith("uniform"), own is near
                )
                written.append(_save(figure, stem, f"{model}-{dtype}-{sort}{suffix}", kind))
    for dtype in _unique(row["dtype"] for row in rows):
        if record.get("ceilings", {}).get(dtype):
            own = [row for row in rows if row["dtype"] == dtype]
            # A dozen providers at as many shapes would be indistinguishable.
            few = [row for row in own if row["provider"] in (BASELINE, *WAYS)]
            written.append(_roofline(record, few or own, record["ceilings"][dtype], styles, stem, kind))
    return written


def _ratio_panels(rows: list[Row], styles: dict[str, dict[str, Any]], title: str, aims: bool, near: bool) -> Any:
    """One panel per layer, with the targets if ``aims``; ``near``: on a linear axis around 1, for small costs."""
    layers = _unique(row["layer"] for row in rows)
    figure, axes = _panels(len(layers))
    for axis, layer in zip(axes, layers, strict=True):
        own = [row for row in rows if row["layer"] == layer]
        _lines(axis, own, styles, lambda row: [row["ratio"][key] for key in ("q1", "median", "q3")])
        axis.set_ylabel("time over dW alone")
        if near:
            _look_near(axis, own)
        if aims:
            _aims(axis, own)
        also = f" (= {', '.join(name.rsplit('.', 1)[-1] for name in own[0]['also'])})" if own[0]["also"] else ""
        axis.set_title(f"{layer}{also}: {own[0]['d_in']} to {own[0]['d_out']}", fontsize=9)
    without = Counter((row["provider"], row["status"]) for row in rows if row.get("status") in ("wrong", "failed"))
    said = ", ".join(f"{name} {status} in {count}" for (name, status), count in without.items())
    note = textwrap.fill(f"without a speed: {said} of the batches", 140) if said else None
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, title=note, title_fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _look_near(axis: Any, rows: list[Row]) -> None:
    """Make the axis linear and cut it at ``_NEAR``, so that a few percent are visible."""
    found = [row["ratio"][key] for row in rows if _drawn(row) for key in ("q1", "q3")]
    low, high = min([*found, 0.95]), min(max([*found, 1.15]), _NEAR)
    axis.set_yscale("linear")
    axis.set_ylim(low - 0.02, high + 0.02)
    axis.locator_params(axis="y", nbins=8)
    axis.yaxis.set_major_formatter("{x:.2f}")
    if max(found, default=0.0) > _NEAR:
        axis.set_ylabel(f"time over dW alone, cut at {_NEAR:g}")


def _aims(axis: Any, rows: list[Row]) -> None:
    """Draw the target of wgrad with dW in this layer, if there is one, at the lengths it applies to."""
    d_in, d_out, longest = rows[0]["d_in"], rows[0]["d_out"], max(row["length"] for row in rows)
    limits = BY_LENGTH if d_in == d_out == 4096 else {SMALL_LENGTH: SMALL} if is_small(d_in, d_out) else {}
    aims = {length: limit for length, limit in limits.items() if length <= longest}
    if not aims:
        return
    aims[longest] = aims[max(aims)]
    style = {"color": "black", "linewidth": 1.0, "linestyle": ":"}
    axis.step(list(aims), list(aims.values()), where="post", label="target of wgrad with dW", **style)


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
    axis.set_xlabel("floating-point operations of dW per byte of x, dy and dW")
    axis.set_ylabel("TFLOP/s of dW's work")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"{rows[0]['dtype']}, all layers and lengths\n{_title(record)}", fontsize=9)
    return _save(figure, stem, f"roofline-{rows[0]['dtype']}", kind)


def _draw_step(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    measured = [row for row in rows if row["variant"] != "nothing"] or rows
    ours = [row for row in measured if row.get("ours")]
    has_memory = all(row["peak_bytes"] is not None for row in measured)
    figure, axes = _panels((2 if has_memory else 1) + bool(ours), 5.2, 0.5 * len(measured) + 1.5)
    _bars(axes[0], measured, lambda ratio: ratio, "{:.3f}")
    axes[0].axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes[0].set_xlabel("time over the plain step's")
    if has_memory:
        more = [(row["peak_bytes"] - row["baseline_peak_bytes"]) / 2**30 for row in measured]
        bars = axes[1].barh([row["variant"] for row in measured], more, color="tab:orange")
        axes[1].bar_label(bars, [f"{m:.2f}" for m in more], padding=4, fontsize=8)
        axes[1].set_xlabel("peak memory beyond the plain step's, GiB")
        axes[1].margins(x=0.2)
    if ours:
        # A few percent are invisible in a bar that begins at 0.
        _bars(axes[-1], ours, lambda ratio: 100 * (ratio - 1), "{:+.2f}%")
        axes[-1].axvline(0.0, color="black", linewidth=0.8, linestyle="--")
        for place, row in enumerate(ours):
            if "target" in row:
                limit = 100 * (row["target"] - 1)
                axes[-1].plot([limit, limit], [place - 0.4, place + 0.4], color="tab:red", linewidth=1.5)
        noise = [row["ratio"] for row in rows if row["variant"] == "nothing"]
        if noise:
            axes[-1].axvspan(100 * (noise[0]["q1"] - 1), 100 * (noise[0]["q3"] - 1), color="grey", alpha=0.3)
        axes[-1].set_xlabel("more time than the plain step, %; red: target, grey: noise", fontsize=9)
    for axis in axes:
        axis.invert_yaxis()
    settings = record["settings"]
    what = f"{settings['model']}, {settings['dtype']}, {settings['prompts']} prompts x {settings['completions']} rows"
    figure.suptitle(f"{what} x {settings['length']} tokens, {settings['optimizer']}\n{_title(record)}", fontsize=9)
    return [_save(figure, stem, "", kind)]


def _bars(axis: Any, rows: list[Row], of: Callable[[float], float], text: str) -> None:
    """One bar per row: the ratio's median, with its quartiles."""
    low, middle, high = ([of(row["ratio"][key]) for row in rows] for key in ("q1", "median", "q3"))
    errors = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
    bars = axis.barh([row["variant"] for row in rows], middle, xerr=errors, capsize=2, color="tab:blue")
    axis.bar_label(bars, [text.format(m) for m in middle], padding=12, fontsize=8)
    axis.margins(x=0.35)


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
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(_title(record), fontsize=9)
    return [_save(figure, stem, "", kind)]


def _draw_host_time(record: dict[str, Any], rows: list[Row], stem: Path, kind: str) -> list[Path]:
    calls, widths = _unique(row["call"] for row in rows), _unique(row["d"] for row in rows)
    figure, axes = _panels(len(widths))
    for axis, d in zip(axes, widths, strict=True):
        for length in _unique(row["length"] for row in rows):
            own = [row for row in rows if (row["d"], row["length"]) == (d, length)]
            middle = [1e6 * row["seconds"] for row in own]
            below = [1e6 * (row["seconds"] - row["lower_quartile"]) for row in own]
            above = [1e6 * (row["upper_quartile"] - row["seconds"]) for row in own]
            at = [calls.index(row["call"]) for row in own]
            axis.errorbar(at, middle, (below, above), fmt="o", label=f"{length} tokens per sample")
        axis.set_xticks(range(len(calls)), calls, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_title(f"d_in = d_out = {d}", fontsize=9)
        axis.set_ylabel("host time of a call, microseconds")
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(_title(record), fontsize=9)
    return [_save(figure, stem, "", kind)]
