"""``python -m benchmarks freeze FILE...``: the constants that the library ships, from a GPU's result files.

    python -m benchmarks freeze benchmarks/results/ops-*.json                  # configs/<gpu>.json: costs and faster
    python -m benchmarks freeze ops.json --tuned tuned                         # and the kernels that `tune` has saved
    python -m benchmarks freeze ops.json --backends triton --out some.json

``costs`` are fitted to the rows of <backend>_wgrad, _gram and _gram_norms over lengths (benchmarks/cost_fit.py);
``faster`` names triton or cuda where the two were measured on the same batches and differ by more than their spread;
``kernels`` are the files that ``python -m gradnorm_kernels tune`` wrote. Blocks that the files do not cover stay as
they are. Wrong or failed rows, constants that do not fit, and too few lengths end the command with status 2 and a
message; nothing is written then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import cost_fit, records
from benchmarks.providers import TILES
from benchmarks.targets import Measured, Record, measured
from gradnorm_kernels import backends
from gradnorm_kernels.tuning import costs as tuning
from gradnorm_kernels.tuning.costs import Chip
from gradnorm_kernels.tuning.tiles import KernelConfig

CONFIGS = Path(tuning.__file__).parent / "configs"
Config = dict[str, Any]
#: The backends that ``faster`` compares.
_RIVALS = ("triton", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="results of `ops` on one device")
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, help="default: all that were measured")
    parser.add_argument("--tuned", type=Path, metavar="FOLDER", help="the folder of `gradnorm_kernels tune`")
    parser.add_argument("--out", type=Path, help="default, for a GPU: gradnorm_kernels/tuning/configs/<gpu>.json")


def run(options: argparse.Namespace) -> int:
    """Print the constants and write the file. Returns the exit status.

    Raises:
        ValueError: nothing can be frozen from the files; the text says what is missing or wrong.
        OSError: a file cannot be read or written.
    """
    found = {path: records.read(path) for path in options.files}
    where = _machine(found)
    chip = chip_of(where)
    if options.out is None and not chip.gpu:
        raise ValueError("--out must name the file if the results are not of a GPU: configs/cpu.json is made by hand")
    out = options.out or CONFIGS / f"{chip.gpu}.json"
    before: Config = json.loads(out.read_text()) if out.is_file() else {}
    rows, source = measured(found.values()), _source(found, where)
    names = options.backends or [name for name in backends.NAMES if any(cost_fit.by_shape(rows, name))]
    after = dict(before)
    prices, missing = {}, []
    for name in names:
        try:
            prices[name] = costs_block(name, rows, chip, source)
        except cost_fit.MissingError as error:
            missing.append(str(error))
    if missing and (options.backends or not prices):
        raise ValueError("; ".join(missing))
    for text in missing:
        print(f"left out: {text}")
    if prices:
        after["costs"] = before.get("costs", {}) | prices
    faster = faster_block(rows, source)
    if faster is not None:
        after["faster"] = faster
    if options.tuned is not None:
        after["kernels"] = kernels_block(options.tuned, chip, where, source)
    if after == before:
        raise ValueError(
            f"the files hold nothing to freeze: no rows of {', '.join(cost_fit.ways('triton'))} or of another backend "
            "(python -m benchmarks ops --costs), and no --tuned"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text_of(after))
    os.replace(partial, out)
    print(f"{out}: {', '.join(after)}" + (f"; kept as they were: {_kept(before, after)}" if before else ""))
    return 0


def _machine(found: dict[Path, Record]) -> dict[str, Any]:
    """The machine of all files, whose versions must agree."""
    machines: list[dict[str, Any]] = []
    for path, record in found.items():
        if record["benchmark"] != "ops":
            raise ValueError(f"{path} must be a result file of ops, it is one of {record['benchmark']}")
        if record["machine"].get("triton_interpreter"):
            raise ValueError(f"{path} is from Triton's interpreter, whose times are meaningless")
        machines.append(record["machine"])

    def named(machine: dict[str, Any]) -> tuple[str, str, str]:
        device = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
        return str(device), str(machine["torch"]), str(machine["triton"])

    if len({named(machine) for machine in machines}) > 1:
        raise ValueError(
            "the files must be of one device, torch and triton, not of "
            + " and ".join(sorted(", ".join(named(machine)) for machine in machines))
        )
    return machines[0]


def chip_of(machine: dict[str, Any]) -> Chip:
    """The chip of a result file's machine, as :func:`gradnorm_kernels.tuning.costs.chip` describes it."""
    if "gpu" not in machine:
        return Chip("cpu")
    major, minor = str(machine["gpu"]["sm"]).split(".")
    return Chip("cuda", tuning.gpu_name(machine["gpu"]["name"]), tuning.architecture((int(major), int(minor))))


def _source(found: dict[Path, Record], where: dict[str, Any]) -> str:
    """The beginning of ``measured_on``: device, versions, commits, files."""
    device = where["cpu"] if "gpu" not in where else where["gpu"]["name"]
    smi = where.get("gpu", {}).get("nvidia_smi")
    if isinstance(smi, dict) and "driver_version" in smi:
        device += f", driver {smi['driver_version']}"
    if "gpu" not in where:
        device += f", {where['threads']} threads"
    commits = dict.fromkeys(str(record["machine"]["commit"]) for record in found.values())
    names = ", ".join(path.name for path in found)
    return f"{device}, torch {where['torch']}, triton {where['triton']}, commit {', '.join(commits)}: {names}"


def _sound(rows: Iterable[Measured]) -> None:
    """Raise ValueError if a row of ours is wrong or failed."""
    for found in rows:
        if found.status in ("wrong", "failed"):
            row = found.row
            shape = f"{row['d_in']} x {row['d_out']} at {row['length']} tokens"
            raise ValueError(
                f"{found.name} was {found.status} for {shape}, {row['dtype']} ({row['reason']}): fix it and measure "
                "again, or name other --backends"
            )


def costs_block(backend: str, rows: list[Measured], chip: Chip, source: str) -> Config:
    """The backend's block of ``costs``.

    Raises:
        MissingError: there are too few rows for any shape.
        ValueError: rows are wrong or failed, or the constants do not fit them.
    """
    shapes = cost_fit.by_shape(rows, backend)
    _sound(found for own in shapes.values() for found in own)
    entries, losses, reasons, loose = [], [], [], []
    for (d_in, d_out, element_bytes), own in sorted(shapes.items()):
        now = tuning.costs(chip, backend, element_bytes, d_in, d_out)
        try:
            fit = cost_fit.fit(backend, [f.row for f in own], now.workspace, now.gram_tile, element_bytes)
        except cost_fit.MissingError as error:
            reasons.append(str(error))
            continue
        print(line(backend, fit, now))
        if fit.loss > cost_fit.MOST_LOSS:
            raise ValueError(
                f"the constants of {backend} at {d_in} x {d_out} do not fit: choosing by them loses {fit.loss:.0%} at "
                "a length that was measured; look at these rows before anything is frozen"
            )
        losses.append(fit.loss)
        loose += [
            f"{name} at {d_in} x {d_out}" for name in cost_fit.NAMES if getattr(fit.costs, name) < fit.errors[name]
        ]
        entries.append(asdict(fit.costs))
    for reason in reasons:
        print(f"left out: {reason}")
    if not entries:
        raise cost_fit.MissingError(
            f"nothing of {backend} can be frozen: "
            + ("; ".join(reasons) if reasons else f"no rows of {', '.join(cost_fit.ways(backend))}")
        )
    said = f"{source}; choosing by them loses at most {max(losses):.1%} at the lengths measured; "
    said += "workspace and gram_tile as before"
    if loose:
        said += f"; less than its own standard error: {', '.join(loose)}"
    return {"measured_on": said, "entries": entries}


def line(backend: str, fit: cost_fit.Fit, now: tuning.Costs) -> str:
    """A fit as one line of text, next to the values that are frozen now."""
    costs = fit.costs
    said = [
        f"{name} {getattr(costs, name):.3g} ± {fit.errors[name]:.2g} (was {getattr(now, name):g})"
        for name in cost_fit.NAMES
    ]
    said.append(f"pairs {costs.pairs:.3g} (was {now.pairs:g})")
    shape = f"{backend} {costs.d_in} x {costs.d_out}, {costs.element_bytes} bytes"
    return (
        f"{shape}: {', '.join(said)}; its pass {fit.base:.3f} of dW; {fit.rows} rows, off by at most {fit.residual:.1%}"
    )


def faster_block(rows: list[Measured], source: str) -> Config | None:
    """The faster backend per shape, by the mean over batches of each one's best, if the difference exceeds the spread.

    A shape has no entry if one of the two was wrong, failed or was not measured.
    """
    entries = []
    for shape, batches in _batches(rows).items():
        own = [found for ways in batches.values() for found in ways]
        if any(found.status in ("wrong", "failed") for found in own):
            print(f"faster: no entry for {shape[0]} x {shape[1]}, where rows are wrong or failed")
            continue
        differences, spreads = [], []
        for ways in batches.values():
            best = {
                name: min(
                    (f.row["ratio"] for f in ways if f.status == "ok" and f.name.split("_")[0] == name),
                    key=lambda ratio: float(ratio["median"]),
                    default=None,
                )
                for name in _RIVALS
            }
            if best["triton"] is not None and best["cuda"] is not None:
                differences.append(math.log(best["cuda"]["median"] / best["triton"]["median"]))
                half = [(ratio["q3"] - ratio["q1"]) / (2 * ratio["median"]) for ratio in best.values() if ratio]
                spreads.append(math.hypot(*half))
        if not differences:
            continue
        mean, spread = statistics.mean(differences), math.sqrt(statistics.mean(s * s for s in spreads))
        text = f"faster: {shape[0]} x {shape[1]}: cuda takes {math.exp(mean):.3f} of triton's time"
        text += f" in {len(differences)} batches"
        if abs(mean) <= spread:
            print(f"{text}, within the spread of {spread:.3f}: no entry")
            continue
        print(text)
        name = "triton" if mean > 0 else "cuda"
        entries.append({"d_in": shape[0], "d_out": shape[1], "element_bytes": shape[2], "backend": name})
    return {"measured_on": source, "entries": entries} if entries else None


def _batches(rows: list[Measured]) -> dict[tuple[int, int, int], dict[tuple[Any, ...], list[Measured]]]:
    """The two backends' rows by shape, then by batch and by whether dW is computed."""
    found: dict[tuple[int, int, int], dict[tuple[Any, ...], list[Measured]]] = {}
    for item in rows:
        # Candidate tiles are not what a call launches.
        if item.record["benchmark"] != "ops" or item.name.split("_")[0] not in _RIVALS or item.name in TILES:
            continue
        row = item.row
        shape = (row["d_in"], row["d_out"], cost_fit.element_bytes(row))
        names = ("layer", "length", "ragged", "gram", "groups", "tokens", "dtype", "does")
        found.setdefault(shape, {}).setdefault(tuple(row.get(name) for name in names), []).append(item)
    return found


def kernels_block(folder: Path, chip: Chip, where: dict[str, Any], source: str) -> Config:
    """The configs that ``tune`` saved for this GPU with the Triton of the result files.

    Raises:
        ValueError: a file is damaged or of another GPU or Triton, or there is no file.
    """
    names = {"d_in", "d_out", *(field.name for field in fields(KernelConfig))}
    entries: dict[tuple[Any, ...], Config] = {}
    for path in sorted(folder.rglob("*.json")):
        if path.parent.name != chip.gpu:
            raise ValueError(f"{path} must lie in a folder named {chip.gpu}, the GPU of the results")
        try:
            content = json.loads(path.read_text())
            triton, entry = content["triton"], content["entry"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no file of `tune`: {error}") from None
        if not isinstance(entry, dict) or entry.keys() != names:
            raise ValueError(f"{path} is no file of `tune`: its entry must have {', '.join(sorted(names))}")
        if triton != where["triton"]:
            raise ValueError(f"{path} was tuned with triton {triton}, the results are of {where['triton']}")
        if entry["arch"] not in tuning.lineage(chip.arch):
            raise ValueError(f"{path} is for sm_{entry['arch']}, the GPU of the results takes sm_{chip.arch}")
        key = tuple(entry[name] for name in ("kernel", "arch", "element_bytes", "d_in", "d_out"))
        if entries.setdefault(key, entry) != entry:
            raise ValueError(f"{path} and another file under {folder} have two configs for {key}")
    if not entries:
        raise ValueError(f"--tuned {folder} holds no file of `python -m gradnorm_kernels tune`")
    said = f"{source.rpartition(': ')[0]}: python -m gradnorm_kernels tune, the fastest that was right"
    return {"measured_on": said, "entries": [entries[key] for key in sorted(entries, key=str)]}


def _kept(before: Config, after: Config) -> str:
    kept = [name for name in ("kernels", "faster") if name in before and after[name] is before[name]]
    kept += [f"costs of {name}" for name in before.get("costs", {}) if after["costs"][name] is before["costs"][name]]
    return ", ".join(kept) or "nothing"


def text_of(config: Config) -> str:
    """The file's text, one entry per line."""

    def block(content: Config, indent: str) -> str:
        lines = ",\n".join(f"{indent}    {json.dumps(entry)}" for entry in content["entries"])
        said = json.dumps(content["measured_on"], ensure_ascii=False)
        return f'{{\n{indent}  "measured_on": {said},\n{indent}  "entries": [\n{lines}\n{indent}  ]\n{indent}}}'

    parts = []
    if config.get("costs"):
        inner = ",\n".join(f'    "{name}": {block(content, "    ")}' for name, content in config["costs"].items())
        parts.append(f'  "costs": {{\n{inner}\n  }}')
    parts += [f'  "{name}": {block(config[name], "  ")}' for name in ("kernels", "faster") if name in config]
    return "{\n" + ",\n".join(parts) + "\n}\n"
