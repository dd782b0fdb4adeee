"""``python -m benchmarks ops``: every provider on the same tensors, checked, then timed against the dW product alone.

    python -m benchmarks ops --quick                   # a few layers and lengths: minutes on a GPU
    python -m benchmarks ops --full                    # three models, 64 to 8192 tokens: 20 minutes on a GPU, estimated
    python -m benchmarks ops --costs                   # the rows that the cost model is fitted to
    python -m benchmarks ops --dry-run                 # every step on tiny sizes, on a CPU
    python -m benchmarks ops --shapes llama-3.1-8b.q --lengths 512 --ragged 777 --providers triton cuda bmm

Status 0: every provider of ours that can run here ran and was right. Status 1: one of ours, or the baseline, was wrong,
raised, crashed or hung. A peer's failure is in the table and does not change the status.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.batches import LAYERS, Batch, Layer, Truth, choose, make_batch, truth
from benchmarks.harness import LostError, Stopwatch, Worker, pairs, repeats_for, stopwatch, summary
from benchmarks.providers import BASELINE, PEERS, PROVIDERS, Run, WrongResultError, gate
from benchmarks.records import machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Preset:
    """``more``: (layer, tokens per sample, tokens per batch), measured first unless shapes are requested."""

    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    ragged: tuple[int, ...]
    gram: tuple[int, ...]
    tokens: int
    seconds: float
    more: tuple[tuple[Layer, int, int], ...] = ()


@dataclass(frozen=True)
class Case:
    """One batch; ``layer`` is for the record. ``gram``: the tracker's call, every sample a group, with their Gram."""

    layer: str
    d_in: int
    d_out: int
    length: int
    ragged: bool
    tokens: int
    dtype: str
    groups: int = 1
    gram: bool = False


# 144 tiles of 128 x 128: slightly more than the multiprocessors of an H100.
_SMALL = Layer("qwen2.5-1.5b.q", 1536, 1536)
#: On a GPU the cases of the targets come first: 4096 x 4096, both widths 576 to 1536, memory at 65536 tokens.
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
#: The default providers. A backend that cannot run on the machine is in the table with its reason.
DEFAULT = (BASELINE, "auto", "torch", "triton_wgrad", "triton_gram", "triton_norms")
DEFAULT += ("cuda_wgrad", "cuda_gram", "cuda_norms", *PEERS)
#: Of those, the providers that the targets are about: measured on every batch before the others.
FIRST = (BASELINE, "auto", "triton_wgrad", "cuda_wgrad")
ON_CPU = (BASELINE, "auto", "torch_wgrad", "torch_gram", "torch_norms", "cpu", "cpu_wgrad", "cpu_gram", "cpu_norms")
ON_CPU += ("triton", "cuda", *PEERS)
#: The providers that the cost model is fitted to, on each backend of a device.
COSTS = ("wgrad", "gram", "gram_norms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="preset", action="store_const", const="quick", help="the default")
    size.add_argument("--full", dest="preset", action="store_const", const="full", help="all shapes and lengths")
    size.add_argument("--costs", dest="preset", action="store_const", const="costs", help="for the cost model")
    size.add_argument("--dry-run", dest="preset", action="store_const", const="dry_run", help="tiny sizes on a CPU")
    parser.set_defaults(preset="quick")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="layers, models or 'all' (see benchmarks/batches.py)"
    )
    parser.add_argument("--lengths", type=int, nargs="*", metavar="L", help="tokens per sample")
    parser.add_argument(
        "--ragged",
        type=int,
        nargs="*",
        metavar="L",
        help="mean tokens per sample, within half of it either way",
    )
    parser.add_argument(
        "--gram",
        type=int,
        nargs="*",
        metavar="L",
        help="the same lengths in the tracker's call: every sample is a group, with all inner products",
    )
    parser.add_argument("--tokens", type=int, help="tokens per batch; default 16384")
    parser.add_argument("--groups", type=int, default=1, help="groups of samples per batch")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU, both in a dry run"
    )
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--seconds", type=float, help="time budget of one provider on one batch")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a provider counts as hung")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long; what was measured is written")
    parser.add_argument("--commit", help="for the record, if this is no git checkout")
    parser.add_argument("--out", type=Path, help="result file; default: one in benchmarks/results/")


def device_of(choice: str, dry_run: bool) -> str:
    """ "cpu" or "cuda".

    Raises:
        ValueError: "cuda" was requested and torch can use no CUDA device.
    """
    if dry_run or choice == "cpu":
        return "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch can use no CUDA device here; leave --device out, or use --dry-run")
    return "cuda" if torch.cuda.is_available() else "cpu"


def out_of(given: Path | None, benchmark: str, where: dict[str, Any], dry_run: bool) -> Path:
    """The result file. A dry run's, or one of Triton's interpreter, never goes into benchmarks/results/ by default."""
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
    # Lengths that are common in training come before the extremes: --minutes may cut the end off.
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
    """The providers' names, in rounds: a round ends before the next begins."""
    if options.providers:
        return [tuple(options.providers)]
    if options.preset == "costs":
        names = ("triton", "cuda") if device == "cuda" else ("torch", "cpu")
        return [(BASELINE, *(f"{name}_{way}" for name in names for way in COSTS))]
    if device != "cuda":
        return [ON_CPU]
    return [FIRST, tuple(name for name in DEFAULT if name not in FIRST)]


def run(options: argparse.Namespace) -> int:
    """Measure, print and write. Returns the exit status.

    Raises:
        ValueError: an unknown shape, a size below 1, or a device that is not available.
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
        print("TRITON_INTERPRET=1: Triton runs in its interpreter, and its times are meaningless")
    print(f"{len(cases)} batches, {sum(map(len, rounds))} providers; results in {out}")
    print(_HEAD)

    seconds = options.seconds or PRESETS[options.preset].seconds
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    jobs = [
        (layer, case, name)
        for names in rounds
        for layer, case in cases
        for name in names
        # Of the calls with algorithm="gram" and no dW, only the tracker's has a cost of its own.
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
        # Again: at the beginning the clocks may have been low, or the machine busy.
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
    """The error of the norms; the baseline has none, so its weight gradient's."""
    return float(row["errors"].get("norms", row["errors"].get("weight gradient")))


def _conclude(rows: list[dict[str, Any]], left: int, out: Path) -> int:
    reasons = Counter((row["provider"], row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    for (name, status, reason), count in reasons.items():
        print(f"{name}: {status} on {count} of the batches: {reason}")
    bad = [row for row in rows if row["status"] in ("wrong", "failed") and (row["ours"] or row["provider"] == BASELINE)]
    counts = Counter(row["status"] for row in rows)
    print(
        f"{', '.join(f'{counts[status]} {status}' for status in records.STATUSES)}, "
        f"{left} not measured for lack of time: {out}"
    )
    return 1 if bad or not counts["ok"] else 0


#: How many samples per batch are checked where float64 runs at a small fraction of float32. The sums cover all samples.
CHECKED_ON_SLOW_FLOAT64 = 8


@dataclass
class _Prepared:
    batch: Batch
    expected: Truth
    baseline: Run


def op_jobs(device: str, seconds: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that measures, in the child process: {"case": {...}, "provider": name} -> a row.

    {"ceilings": dtype} -> the rates of the device. The batch, its truth and the baseline are kept until the case
    changes.
    """
    where = torch.device(device)
    warm_up(where)
    watch = stopwatch(where)
    kept: dict[Case, _Prepared] = {}

    def work(job: dict[str, Any]) -> dict[str, Any]:
        if "ceilings" in job:
            return ceilings(where, DTYPES[job["ceilings"]], watch)
        case = Case(**job["case"])
        if case not in kept:
            kept.clear()
            _release(where)
            kept[case] = _prepare(case, where)
        return measure(job["provider"], kept[case], watch, seconds)

    return work


def warm_up(device: torch.device, seconds: float = 0.7) -> None:
    """Keep a GPU busy until its clocks have risen: an idle GPU may run at a sixth of them."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize(device)


def _prepare(case: Case, device: torch.device) -> _Prepared:
    batch = make_batch(
        case.d_in,
        case.d_out,
        case.length,
        max(case.tokens, case.length),
        case.ragged,
        device=device,
        dtype=DTYPES[case.dtype],
        groups=case.groups,
        gram=case.gram,
    )
    expected = truth(batch, None if _fast_float64(device) else CHECKED_ON_SLOW_FLOAT64)
    baseline = PROVIDERS[BASELINE].prepare(batch)
    gate(PROVIDERS[BASELINE], batch, expected, baseline)
    return _Prepared(batch, expected, baseline)


def _fast_float64(device: torch.device) -> bool:
    """Whether float64 is fast: on CPUs and on data-center GPUs (A100, H100, B200 and relatives)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(name: str, prepared: _Prepared, watch: Stopwatch, seconds: float) -> dict[str, Any]:
    """A row without the fields of the case. A wrong result has the status "wrong" and no speed."""
    batch, provider = prepared.batch, PROVIDERS[name]
    row: dict[str, Any] = {"provider": name, "does": provider.does, "ours": provider.ours, "samples": batch.samples}
    row["tokens"] = len(batch.x)
    row["token_pairs"] = sum(length * length for length in batch.lengths)
    reason = provider.unavailable_reason(batch)
    if reason is not None:
        return row | {"status": "unable", "reason": reason}
    if provider.ran is not None:
        row["ran"] = provider.ran(batch)
    _release(batch.x.device)
    run = provider.prepare(batch)
    try:
        row["errors"] = gate(provider, batch, prepared.expected, run)
        once = _seconds_once(run, prepared.baseline, watch)
        memory = _peak(run, batch, "dW" in provider.does)
        watch.late(run)  # late calls of the warm-up do not count
        mine, base = pairs(run, prepared.baseline, repeats_for(once, seconds), watch)
        late = watch.late(run)
        row["host_seconds"] = _host_seconds(run, batch.x.device)
        # Again, after all those calls: a first call may be right and a later one wrong.
        gate(provider, batch, prepared.expected, run)
    except WrongResultError as error:
        row.pop("errors", None)
        return row | {"status": "wrong", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        return row | {"status": "failed" if provider.ours else "unable", "reason": f"out of memory: {error}"[:300]}
    median = summary(mine)["median"]
    work = 2 * len(batch.x) * batch.x.shape[1] * batch.dy.shape[1]
    moved = (batch.x.numel() + batch.dy.numel() + batch.x.shape[1] * batch.dy.shape[1]) * batch.x.element_size()
    row |= {
        "status": "ok",
        "seconds": summary(mine),
        "yardstick_seconds": summary(base),
        "ratio": summary([a / b for a, b in zip(mine, base, strict=True)]),
        # Rates of the weight-gradient product's work, whatever the provider does, so that providers are comparable.
        "tflops": work / median / 1e12,
        "gbps": moved / median / 1e9,
        "flop_per_byte": work / moved,
        "repeats": len(mine),
        # The share of these calls that the GPU began before the host had launched all of the call. The GPU then waited
        # for the host, and part of the time is the host's.
        "late": late,
    }
    return row | memory


def _host_seconds(run: Run, device: torch.device) -> float:
    """The host's time per call, with an idle GPU before it: only the launches, unless the call synchronises."""
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _seconds_once(run: Run, baseline: Run, watch: Stopwatch) -> float:
    """Warm both up and return the seconds of one pair of calls."""
    for function in (run, baseline):
        function()
    watch.settle()
    mine, base = pairs(run, baseline, 1, watch)
    return mine[0] + base[0]


def _peak(run: Run, batch: Batch, returns_dw: bool) -> dict[str, int | None]:
    """Peak bytes that a call allocates beyond what was allocated before, and the same without its dW."""
    device = batch.x.device
    if device.type != "cuda":
        return {"peak_bytes": None, "extra_bytes": None}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    own = batch.x.shape[1] * batch.dy.shape[1] * batch.x.element_size() if returns_dw else 0
    return {"peak_bytes": peak, "extra_bytes": max(peak - own, 0)}


def ceilings(device: torch.device, dtype: torch.dtype, watch: Stopwatch) -> dict[str, Any]:
    """The rates this device reaches on a plain copy and on one large square product, both on random data."""
    side, elements = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = {}
    for name, function in {"copy": lambda: target.copy_(source), "product": lambda: a @ b}.items():
        for _ in range(3):
            function()
        reads = [watch(function) for _ in range(10)]
        watch.settle()
        found[name] = min(read() for read in reads)
    return {
        "copy_gbps": 2 * elements / found["copy"] / 1e9,
        "product_tflops": 2 * side**3 / found["product"] / 1e12,
        "product_side": side,
        "dtype": str(dtype).removeprefix("torch."),
    }
