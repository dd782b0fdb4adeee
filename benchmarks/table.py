"""``python -m benchmarks table FILE...``: result files as Markdown: the targets, and all ratios to dW alone.

    python -m benchmarks table benchmarks/results/ops-*.json benchmarks/results/step-*.json
    python -m benchmarks table ops.json step.json --into README.md       # replaces the text between its two markers
    python -m benchmarks table ops.json --all                            # every layer, length and provider

Files of ``ops``, ``step`` and ``cpu_ratio``, all of one GPU. Of two rows for the same batch and provider the later one
counts. Without --all the layers and lengths are those of ``ops --quick``. A result that was wrong or failed is named
and has no speed.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.batches import choose
from benchmarks.ops import PRESETS
from benchmarks.providers import BASELINE, PEERS, PROVIDERS
from benchmarks.targets import Measured, Record, Row, measured, verdicts

README = records.RESULTS.parent.parent / "README.md"
MARKERS = ("<!-- performance: begin", "<!-- performance: end -->")
#: The text between the markers as long as no GPU has measured anything.
NOTHING = (
    "The kernels are not measured on a GPU yet. [docs/gpu-notes.md](docs/gpu-notes.md) has the predictions,\n"
    "and [docs/benchmarks.md](docs/benchmarks.md) the commands that measure the kernels and write this section."
)
#: The columns without --all.
_SHORT = ("auto", "triton_wgrad", "cuda_wgrad", "triton_norms", "cuda_norms", *PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="every layer, length and provider of the files")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the text between its two marker comments")


def run(options: argparse.Namespace) -> int:
    """Print the tables, or write them into a file. Returns the exit status.

    Raises:
        ValueError: a file is no result file, the files are of different GPUs, or the file of ``--into`` lacks the
            markers; for README.md, a file that does not lie in benchmarks/results/.
        OSError: a file cannot be read or written.
    """
    outside = [path for path in options.files if path.resolve().parent != records.RESULTS]
    if options.into is not None and options.into.resolve() == README and outside:
        raise ValueError(
            f"{outside[0]} must lie in {records.RESULTS}, like all files that README is made from: copy it there under "
            "a name with GPU and commit, and commit it"
        )
    text = section(options.files, options.all)
    if options.into is None:
        print(text)
        return 0
    replace(options.into, text)
    print(f"{options.into}: the text between its markers is made from {', '.join(p.name for p in options.files)}")
    return 0


def replace(path: Path, text: str) -> None:
    """Put the text between the file's markers.

    Raises:
        ValueError: the file does not have each marker once, in order.
    """
    begin, _, end = _parts(path.read_text(), str(path))
    path.write_text(f"{begin}\n\n{text}\n\n{end}")


def between(path: Path) -> str:
    """The text between the file's markers."""
    return _parts(path.read_text(), str(path))[1].strip()


def _parts(text: str, name: str) -> tuple[str, str, str]:
    """(text up to the end of the first marker, text between the markers, text from the second marker on)."""
    first, last = MARKERS
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ValueError(f"{name} must have one comment '{first} ... -->' and after it one '{last}'")
    start = text.index("-->", text.index(first)) + len("-->")
    stop = text.index(last)
    return text[:start], text[start:stop], text[stop:]


def section(paths: list[Path], everything: bool = False) -> str:
    """The Markdown of these files; for no files, the text that nothing was measured.

    Raises:
        ValueError: a file is no result file or one of Triton's interpreter, or they are of different GPUs.
        OSError: a file cannot be read.
    """
    if not paths:
        return NOTHING
    found = {path: records.read(path) for path in paths}
    gpus = {record["machine"]["gpu"]["name"] for record in found.values() if "gpu" in record["machine"]}
    if len(gpus) > 1:
        raise ValueError(f"the files must be of one GPU, not of {' and '.join(sorted(gpus))}: give one GPU's at a time")
    for path, record in found.items():
        if record["machine"].get("triton_interpreter"):
            raise ValueError(f"{path} is from Triton's interpreter, whose times are meaningless")
    rows = measured(found.values())
    parts = [_sources(found), _targets(rows, found), _ratios(rows, everything), _unshown(rows)]
    return "\n\n".join(part for part in parts if part)


def _sources(found: dict[Path, Record]) -> str:
    lines = []
    for path, record in found.items():
        where = record["machine"]
        gpu = where.get("gpu")
        smi = gpu["nvidia_smi"] if gpu else {}
        driver = f", driver {smi['driver_version']}" if isinstance(smi, dict) and "driver_version" in smi else ""
        device = f"{gpu['name']}{driver}" if gpu else f"{where['cpu']}, {where['threads']} threads"
        left = record.get("left")
        count = left if isinstance(left, int) else len(left or [])
        cut = f"; {count} of its measurements were not made for lack of time" if count else ""
        versions = f"torch {where['torch']}"
        versions += f", triton {where['triton']}" if where.get("triton") else ""
        versions += f", commit {where['commit']}, {where['date'][:10]}"
        lines.append(f"- `benchmarks/results/{path.name}`: {device}, {versions}{cut}.")
    return "\n".join(lines)


def _grid(head: list[str], lines: list[list[str]]) -> str:
    shown = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in shown)


def _targets(rows: list[Measured], found: dict[Path, Record]) -> str:
    wanted = {record["benchmark"] for record in found.values()}
    if any("gpu" in record["machine"] for record in found.values()):
        wanted |= {"ops", "step"}
    lines = [
        [
            verdict.target.what,
            f"{verdict.target.limit:g} MiB" if verdict.target.memory else f"{verdict.target.limit:.3f}",
            verdict.way,
            verdict.measured,
            verdict.noise,
            verdict.text,
        ]
        for verdict in verdicts(rows, wanted)
    ]
    text = (
        "The targets, on a GPU in bfloat16. Costs are times over the same work without norms: dW by torch's BLAS, or\n"
        "the plain training step. Median of pairs run back to back, quartiles in brackets; noise: the quartiles of\n"
        "that work against itself."
    )
    return f"{text}\n\n{_grid(['target', 'at most', 'way', 'measured', 'noise', 'verdict'], lines)}"


def _ratios(rows: list[Measured], everything: bool) -> str:
    """The ratios to dW alone by layer and length, one column per provider."""
    own = [found for found in rows if found.record["benchmark"] == "ops"]
    preset = PRESETS["quick"]
    if not everything:
        layers = {layer.name for layer in (*choose(list(preset.shapes)), *(layer for layer, _, _ in preset.more))}
        kinds = {(length, False, False) for length in preset.lengths}
        kinds |= {(length, True, False) for length in preset.ragged} | {(length, True, True) for length in preset.gram}
        own = [f for f in own if f.row["layer"] in layers and _kind(f.row) in kinds and f.name in (*_SHORT, BASELINE)]
    order = [name for name in PROVIDERS if name != BASELINE] if everything else list(_SHORT)
    columns = [name for name in order if any(found.name == name and found.status != "unable" for found in own)]
    if not columns:
        return ""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for found in own:
        row = found.row
        case = (row["dtype"], row["layer"], row["d_in"], row["d_out"], *_kind(row), row["tokens"], row.get("groups", 1))
        cases.setdefault(case, {})[found.name] = row
    dtypes = {case[0] for case in cases}
    # Samples of one length may not fill a batch exactly.
    usual = Counter(case[7] for case in cases).most_common(1)[0][0]
    lines = []
    for case in sorted(cases, key=_order(own)):
        dtype, layer, d_in, d_out, length, ragged, gram, tokens, groups = case
        samples = f"{'gram ' if gram else ''}{'~' if ragged else ''}{length}"
        samples += f", {groups} groups" if groups > 1 else ""
        shape = f"{layer}, {d_in} → {d_out}" + (f", {dtype}" if len(dtypes) > 1 else "")
        samples += f", batch of {tokens}" if abs(tokens - usual) >= length else ""
        lines.append([shape, samples, *(_cell(cases[case].get(name)) for name in columns)])
    blas = "cuBLAS'" if all(found.on_gpu for found in own) else "torch's"
    text = (
        f"Time over that of {blas} dW alone, median (quartiles), by tokens per sample in batches of {usual}; `~`:\n"
        "ragged, half to one and a half times the length; `gram`: every sample is a group, with all inner products.\n"
        "`norms` columns return no dW; `two_gram`, `bmm`, `vmap_grad` and `grouped_mm` are other ways to the same\n"
        "norms. –: not applicable."
    )
    return f"{text}\n\n{_grid(['layer', 'tokens per sample', *columns], lines)}"


def _kind(row: Row) -> tuple[int, bool, bool]:
    return row["length"], bool(row["ragged"]), bool(row.get("gram"))


def _order(own: list[Measured]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Layers in the order of the files; then plain, ragged and gram batches, by length."""
    layers = list(dict.fromkeys(found.row["layer"] for found in own))
    return lambda case: (case[0], layers.index(case[1]), case[6], case[5], case[4], case[7:])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return "–" if row["status"] == "unable" else str(row["status"])
    ratio = row["ratio"]
    digits = 2 if ratio["median"] < 10 else 1 if ratio["median"] < 100 else 0
    low, middle, high = (f"{ratio[key]:.{digits}f}" for key in ("q1", "median", "q3"))
    return f"{middle} ({low}–{high})"


def _unshown(rows: list[Measured]) -> str:
    """The wrong and failed rows, each reason once."""
    reasons: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for found in rows:
        if found.status in ("wrong", "failed"):
            key = (found.name, found.status)
            counts[key] += 1
            reasons.setdefault(key, re.sub(r"\s+", " ", str(found.row["reason"]))[:200])
    if not counts:
        return ""
    lines = [
        f"- `{name}` {status} in {count} rows: {reasons[name, status]}" for (name, status), count in counts.items()
    ]
    return "Without a speed, because wrong or failed:\n\n" + "\n".join(lines)
