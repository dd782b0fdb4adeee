"""One measurement of an operator: a provider on a batch, checked first, then timed against the yardstick.

Runs in a child process (see ``isolate``); the batch, its truth and the yardstick are kept while the case is the same.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.batches import Batch, Truth, make_batch, truth
from benchmarks.harness import Stopwatch, WrongResultError, gate, pairs, repeats_for, stopwatch, summary
from benchmarks.providers import PROVIDERS, YARDSTICK, Run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Where float64 runs at a small fraction of float32, so many samples a batch are checked, and the sums of all.
CHECKED_ON_SLOW_FLOAT64 = 8


@dataclass(frozen=True)
class Case:
    """One batch; ``layer`` is for the record. ``gram``: as the tracker calls, each sample a group, with their Gram."""

    layer: str
    d_in: int
    d_out: int
    length: int
    ragged: bool
    tokens: int
    dtype: str
    groups: int = 1
    gram: bool = False


@dataclass
class _Prepared:
    batch: Batch
    expected: Truth
    yardstick: Run


def op_jobs(device: str, seconds: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that measures: {"case": {...}, "provider": name} -> a row; {"ceilings": dtype} -> what they are."""
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
    """Keep a GPU at work until its clocks have risen: an idle one may be at a sixth of them."""
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
    yardstick = PROVIDERS[YARDSTICK].prepare(batch)
    gate(PROVIDERS[YARDSTICK], batch, expected, yardstick)
    return _Prepared(batch, expected, yardstick)


def _fast_float64(device: torch.device) -> bool:
    """CPUs, and the GPUs made for computing: A100 and H100 with their relatives."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(name: str, prepared: _Prepared, watch: Stopwatch, seconds: float) -> dict[str, Any]:
    """A row without the case's fields. A wrong result has the status "wrong" and no speed."""
    batch, provider = prepared.batch, PROVIDERS[name]
    row: dict[str, Any] = {"provider": name, "does": provider.does, "ours": provider.ours, "samples": batch.samples}
    row["tokens"] = len(batch.x)
    row["token_pairs"] = sum(length * length for length in batch.lengths)
    reason = provider.unable(batch)
    if reason is not None:
        return row | {"status": "unable", "reason": reason}
    if provider.ran is not None:
        row["ran"] = provider.ran(batch)
    _release(batch.x.device)
    run = provider.prepare(batch)
    try:
        row["errors"] = gate(provider, batch, prepared.expected, run)
        once = _seconds_once(run, prepared.yardstick, watch)
        memory = _peak(run, batch, "dW" in provider.does)
        watch.late(run)  # what was late while all was warmed up does not count
        mine, base = pairs(run, prepared.yardstick, repeats_for(once, seconds), watch)
        late = watch.late(run)
        row["host_seconds"] = _host_seconds(run, batch.x.device)
        # Again, after all those calls: a first call may be right and a later one not.
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
        # Of the weight-gradient product's work, whatever the provider really does: comparable between providers.
        "tflops": work / median / 1e12,
        "gbps": moved / median / 1e9,
        "flop_per_byte": work / moved,
        "repeats": len(mine),
        # The share of these calls that the GPU began before the host had launched all of it: then it waited for the
        # host, and the time is the host's in part.
        "late": late,
    }
    return row | memory


def _host_seconds(run: Run, device: torch.device) -> float:
    """What a call takes of the host's time, the GPU idle before: on a GPU the launches alone, if it does not wait."""
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _seconds_once(run: Run, yardstick: Run, watch: Stopwatch) -> float:
    """Warm both up, and say what a pair of calls takes."""
    for function in (run, yardstick):
        function()
    watch.settle()
    mine, base = pairs(run, yardstick, 1, watch)
    return mine[0] + base[0]


def _peak(run: Run, batch: Batch, returns_dw: bool) -> dict[str, int | None]:
    """Bytes that a call allocates at most beyond what was there, and what is left of them without its dW."""
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
    """The best this device reaches on a plain copy and on one large square product, both on random data."""
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
