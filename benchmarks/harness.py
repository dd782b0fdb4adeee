"""What every benchmark shares: batches, the correctness gate, interleaved timing, and the record of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

import gradnorm_kernels as gk
from benchmarks.providers import Batch, Provider
from gradnorm_kernels import reference
from gradnorm_kernels.__main__ import commit
from tests.tolerances import NORMS, WEIGHT_GRAD


class WrongResultError(RuntimeError):
    """A provider's result is off: its speed means nothing and is not reported."""


def make_batch(d_in: int, d_out: int, length: int, tokens: int, ragged: bool, seed: int = 0) -> Batch:
    """Random x and dy; samples of ``length`` tokens, or ragged: of half to one and a half times as many."""
    generator = torch.Generator().manual_seed(seed)
    if ragged:
        lengths = torch.randint(length // 2, length + length // 2 + 1, (2 * tokens // length + 1,), generator=generator)
        ends = lengths.cumsum(0)
        ends = torch.cat([ends[ends < tokens], torch.tensor([tokens])])
    else:
        ends = torch.arange(length, tokens + 1, length)
        tokens = int(ends[-1])
    x, dy = (torch.randn(tokens, d, generator=generator) for d in (d_in, d_out))
    return Batch(x, dy, torch.cat([torch.zeros(1, dtype=torch.int64), ends]))


def truth(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms and their gradients' sum by the float64 reference, one sample at a time for memory's sake."""
    norms, total = [], torch.zeros(batch.dy.shape[1], batch.x.shape[1], dtype=torch.float64)
    offsets = batch.offsets
    for lo, hi in pairwise(offsets):
        norm, _, gradient, _ = reference.fused_grad_norm(batch.x[lo:hi], batch.dy[lo:hi], weight_grad=True)
        norms.append(norm)
        assert gradient is not None
        total += gradient
    return torch.cat(norms), total


def gate(provider: Provider, batch: Batch, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raise WrongResultError unless the provider agrees with ``truth(batch)`` within the tests' tolerances."""
    tolerances = (NORMS[batch.x.dtype], WEIGHT_GRAD[batch.x.dtype])
    for what, actual, right, tolerance in zip(
        ("norms", "weight gradient"), provider.prepare(batch)(), expected, tolerances, strict=True
    ):
        if actual is None:
            continue
        error = float((actual.double() - right).abs().max() / right.abs().max())
        if not error <= tolerance:
            raise WrongResultError(f"{provider.name}: {what} off by {error:.1e} (allowed {tolerance:.0e})")


def ratios(
    run: Callable[[], object], base: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Times of ``run`` over times of ``base``, in pairs run back to back, the order swapped every time."""
    run(), base()
    found = []
    for i in range(repeats):
        times = {}
        for function in (run, base) if i % 2 else (base, run):
            start = clock()
            function()
            times[function] = clock() - start
        found.append(times[run] / times[base])
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> dict[str, object]:
    """What the numbers were measured on, and with what."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradnorm_kernels": gk.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
