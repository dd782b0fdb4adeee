"""``python -m benchmarks ops``: every provider on the same tensors, checked, then timed against the dW product alone.

    python -m benchmarks ops --quick                   # a few layers and lengths: minutes on a GPU
    python -m benchmarks ops --full                    # three models, 64 to 8192 tokens: reckoned 20 minutes on a GPU
    python -m benchmarks ops --costs                   # what the cost model's constants are made from
    python -m benchmarks ops --dry-run                 # every step on tiny sizes, on a CPU
    python -m benchmarks ops --shapes llama-3.1-8b.q --lengths 512 --ragged 777 --providers triton cuda bmm

Status 0: everything of ours that can run here ran and was right. Status 1: something of ours was wrong, raised, crashed
or hung, or the yardstick did. What a peer does is in the table and changes no status.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.isolate import LostError, Worker
from benchmarks.machine import machine
from benchmarks.op_jobs import DTYPES, Case, op_jobs
from benchmarks.providers import PEERS, PROVIDERS, YARDSTICK
from benchmarks.shapes import LAYERS, Layer, choose


@dataclass(frozen=True)
class Preset:
    """``more``: a layer, tokens a sample and tokens a batch, before all others and where no shapes are asked for."""

    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    ragged: tuple[int, ...]
    gram: tuple[int, ...]
    tokens: int
    seconds: float
    more: tuple[tuple[Layer, int, int], ...] = ()


# 144 tiles of 128 x 128: a few more than an H100 has multiprocessors.
_SMALL = Layer("qwen2.5-1.5b.q", 1536, 1536)
#: On a GPU what has a target of its own comes first: 4096 x 4096, both widths 576 to 1536, memory at 65536 tokens.
PRESETS = {
    "quick": Preset(
        ("llama-3.1-8b.q", "smollm2-135m.q", "smollm2-135m.gate_up", "qwen2.5-3b.gate_up", "llama-3.1-8b.kv"),
        (1024, 256, 2048),
        (1000,),
        (1000,),
        16384,
        0.15,
        (
            (LAYERS["llama-3.1-8b.q"], 1024, 65536),
            (LAYERS["llama-3.1-8b.gate_up"], 1024, 65536),
            *((_SMALL, length, 16384) for length in (1024, 256, 2048)),
        ),
    ),
    "costs": Preset(
        ("smollm2-135m.q", "smollm2-135m.gate_up", "qwen2.5-3b.q", "llama-3.1-8b.q"),
        (1024, 64, 256, 128, 512, 2048),
        (400, 1000, 100),
        (400,),
        8192,
        0.15,
    ),
    "full": Preset(("all",), (64, 128, 256, 512, 1024, 2048, 4096, 8192), (250, 1000, 4000), (500, 2000), 16384, 0.2),
    "dry_run": Preset(("tiny.kv", "tiny.gate_up"), (1, 33), (13,), (13,), 66, 0.005),
}
#: What is measured where nothing else is asked for; the same table names on a machine without a backend say so.
DEFAULT = (YARDSTICK, "auto", "torch", "triton_wgrad", "triton_gram", "triton_norms")
DEFAULT += ("cuda_wgrad", "cuda_gram", "cuda_norms", *PEERS)
#: Of those, what the targets are about: on every batch before the others have their turn.
FIRST = (YARDSTICK, "auto", "triton_wgrad", "cuda_wgrad")
ON_CPU = (YARDSTICK, "auto", "torch_wgrad", "torch_gram", "torch_norms", "cpu", "cpu_wgrad", "cpu_gram", "cpu_norms")
ON_CPU += ("triton", "cuda", *PEERS)
#: What each of the cost model's prices is taken from, on each backend of a device.
COSTS = ("wgrad", "gram", "gram_norms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="preset", action="store_const", const="quick", help="the default")
    size.add_argument("--full", dest="preset", action="store_const", const="full", help="all shapes and lengths")
    size.add_argument("--costs", dest="preset", action="store_const", const="costs", help="for the cost model")
    size.add_argument("--dry-run", dest="preset", action="store_const", const="dry_run", help="tiny sizes on a CPU")
    parser.set_defaults(preset="quick")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="layers, models or 'all' (see benchmarks/shapes.py)"
    )
    parser.add_argument("--lengths", type=int, nargs="*", metavar="L", help="tokens a sample")
    parser.add_argument(
        "--ragged", type=int, nargs="*", metavar="L", help="mean tokens a sample, lengths within half of it either way"
    )
    parser.add_argument(
        "--gram",
        type=int,
        nargs="*",
        metavar="L",
        help="the same lengths, called as the tracker calls: every sample a group, with their inner products",
    )
    parser.add_argument("--tokens", type=int, help="tokens a batch")
    parser.add_argument("--groups", type=int, default=1, help="groups of samples, whose sums are squared as well")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU, both in a dry run"
    )
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, help="timing budget of one provider on one batch")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a provider counts as hung")
    parser.add_argument("--minutes", type=float, help="stop after so long; what was measured is written")
    parser.add_argument("--commit", help="for the record, where this is no git checkout")
    parser.add_argument("--out", type=Path, help="result file; default: one in benchmarks/results/")


def device_of(choice: str, dry_run: bool) -> str:
    """ "cpu" or "cuda".

    Raises:
        ValueError: "cuda" was asked for and there is none.
    """
    if dry_run or choice == "cpu":
        return "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch can use no CUDA device here; leave --device out, or use --dry-run")
    return "cuda" if torch.cuda.is_available() else "cpu"


def out_of(given: Path | None, benchmark: str, where: dict[str, Any], dry_run: bool) -> Path:
    """Where the results go: a dry run's, or those of Triton's interpreter, never into the results that are kept."""
    if given is not None:
        return given
    if dry_run or where["triton_interpreter"]:
        return Path(tempfile.mkdtemp(prefix="gradnorm-")) / f"{benchmark}-dry-run.json"
    return records.default_path(benchmark, where)


def cases_of(options: argparse.Namespace, device: str) -> Iterator[tuple[Layer, Case]]:
    preset = PRESETS[options.preset]
    layers = choose(options.shapes or list(preset.shapes))
    uniform = preset.lengths if options.lengths is None else options.lengths
    ragged = preset.ragged if options.ragged is None else options.ragged
    gram = preset.gram if options.gram is None else options.gram
    if options.preset == "dry_run":
        dtypes = options.dtypes or ["fp32", "bf16"]
    else:
        dtypes = options.dtypes or ["bf16" if device == "cuda" else "fp32"]
    tokens = options.tokens or preset.tokens
    # A case whose samples are most of what training sees comes before the extremes: --minutes may cut the end off.
    kinds = [(n, False, False) for n in uniform] + [(n, True, False) for n in ragged] + [(n, True, True) for n in gram]
    if options.preset == "full":
        kinds.sort(key=lambda kind: abs(kind[0] - 1000))
    if device == "cuda" and not (options.shapes or options.lengths is not None or options.tokens):
        for dtype, (layer, length, whole) in itertools.product(dtypes, preset.more):
            yield layer, Case(layer.name, layer.d_in, layer.d_out, length, False, whole, dtype, options.groups)
    for dtype, (length, is_ragged, has_gram), layer in itertools.product(dtypes, kinds, layers):
        shape = (layer.name, layer.d_in, layer.d_out, length, is_ragged)
        yield layer, Case(*shape, tokens, dtype, options.groups, has_gram)


def providers_of(options: argparse.Namespace, device: str) -> list[tuple[str, ...]]:
    """The providers' names, in the rounds in which they are measured: a round is over before the next begins."""
    if options.providers:
        return [tuple(options.providers)]
    if options.preset == "costs":
        names = ("triton", "cuda") if device == "cuda" else ("torch", "cpu")
        return [(YARDSTICK, *(f"{name}_{way}" for name in names for way in COSTS))]
    if device != "cuda":
        return [ON_CPU]
    return [FIRST, tuple(name for name in DEFAULT if name not in FIRST)]


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; the status to exit with.

    Raises:
        ValueError: a shape that is not known, sizes that are no sizes, or a device that is not there.
    """
    dry_run = options.preset == "dry_run"
    device = device_of(options.device, dry_run)
    lengths = [length for given in (options.lengths, options.ragged, options.gram) for length in given or []]
    smallest = min([*lengths, options.groups, 1 if options.tokens is None else options.tokens])
    if smallest < 1:
        raise ValueError(f"--lengths, --ragged, --gram, --tokens and --groups must be at least 1, got {smallest}")
    cases = list(cases_of(options, device))
    rounds = providers_of(options, device)
    where = machine(device, options.commit)
    out = out_of(options.out, "ops", where, dry_run)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "run"}
    record: dict[str, Any] = {"benchmark": "ops", "machine": where, "settings": settings, "ceilings": {}, "rows": []}
    print(f"{where.get('gpu', {}).get('name') or where['cpu']}, torch {where['torch']}, triton {where['triton']}")
    if where["triton_interpreter"]:
        print("TRITON_INTERPRET=1: Triton runs in its interpreter, and its times mean nothing")
    print(f"{len(cases)} batches, {sum(map(len, rounds))} providers; results in {out}")
    print(_HEAD)

    seconds = options.seconds or PRESETS[options.preset].seconds
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    jobs = [
        (layer, case, name)
        for names in rounds
        for layer, case in cases
        for name in names
        # Without dW and algorithm="gram" only the tracker's kind of call has a price of its own.
        if options.preset != "costs" or case.gram or not name.endswith("gram_norms")
    ]
    done, written = 0, 0.0
    with Worker(op_jobs, (device, seconds), options.patience) as worker:
        dtypes = list(dict.fromkeys(case.dtype for _, case in cases))
        _raise_ceilings(worker, dtypes, record["ceilings"])
        for layer, case, name in jobs:
            if time.monotonic() > deadline:
                break
            row = asdict(case) | {"also": list(layer.also), "model": layer.model}
            row |= _measure(worker, case, name)
            record["rows"].append(row)
            done += 1
            if row["status"] != "unable":
                print(_line(row), flush=True)
            if time.monotonic() - written > 5:
                records.write(out, record | {"left": len(jobs) - done})
                written = time.monotonic()
        # Once more: clocks may have been low, or the machine busy, at the beginning.
        _raise_ceilings(worker, dtypes, record["ceilings"])
    if device == "cuda":
        record["machine_after"] = machine(device, options.commit)
    records.write(out, record | {"left": len(jobs) - done})
    return _conclude(record["rows"], len(jobs) - done, out)


def _raise_ceilings(worker: Worker, dtypes: list[str], ceilings: dict[str, dict[str, Any]]) -> None:
    """Measure the device's ceilings and keep the higher of each rate."""
    for dtype in dtypes:
        try:
            found = worker({"ceilings": dtype})
        except (LostError, RuntimeError) as error:
            print(f"no ceilings for {dtype}: {error}")
            continue
        known = ceilings.setdefault(dtype, found)
        for rate in ("copy_gbps", "product_tflops"):
            known[rate] = max(known[rate], found[rate])


def _measure(worker: Worker, case: Case, name: str) -> dict[str, Any]:
    try:
        return worker({"case": asdict(case), "provider": name})
    except (LostError, RuntimeError) as error:
        provider = PROVIDERS[name]
        return {
            "provider": name,
            "does": provider.does,
            "ours": provider.ours,
            "status": "failed",
            "reason": str(error),
        }


_HEAD = (
    f"{'layer':<21} {'tokens':>10} {'dtype':>5} {'provider':<13} {'of dW':>6} {'quartiles':>13} "
    f"{'us':>9} {'TFLOP/s':>7} {'GB/s':>6} {'extra MiB':>9} {'norms off':>10}"
)


def _line(row: dict[str, Any]) -> str:
    length = f"{'gram ' if row['gram'] else ''}{'~' if row['ragged'] else ''}{row['length']}"
    first = f"{row['layer']:<21} {length:>10} {row['dtype']:>5} {row['provider']:<13} "
    if row["status"] != "ok":
        return first + f"{row['status'].upper()}: {row['reason']}"
    ratio, extra = row["ratio"], row["extra_bytes"]
    memory = "" if extra is None else f"{extra / 2**20:.1f}"
    return first + (
        f"{ratio['median']:>6.3f} {ratio['q1']:>6.3f} {ratio['q3']:>6.3f} {row['seconds']['median'] * 1e6:>9.1f} "
        f"{row['tflops']:>7.2f} {row['gbps']:>6.0f} {memory:>9} {_error(row):>10.0e}"
    )


def _error(row: dict[str, Any]) -> float:
    """Of the norms; the yardstick has none."""
    return float(row["errors"].get("norms", row["errors"].get("weight gradient")))


def _conclude(rows: list[dict[str, Any]], left: int, out: Path) -> int:
    reasons = Counter((row["provider"], row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    for (name, status, reason), count in reasons.items():
        print(f"{name}: {status} on {count} of the batches: {reason}")
    bad = [
        row for row in rows if row["status"] in ("wrong", "failed") and (row["ours"] or row["provider"] == YARDSTICK)
    ]
    counts = Counter(row["status"] for row in rows)
    print(
        f"{', '.join(f'{counts[status]} {status}' for status in records.STATUSES)}, {left} left for want of time: {out}"
    )
    return 1 if bad or not counts["ok"] else 0
