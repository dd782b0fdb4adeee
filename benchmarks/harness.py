"""What every benchmark shares: the correctness gate, interleaved timing on a CPU or a GPU, and quantiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from benchmarks.batches import Batch, Truth
from benchmarks.providers import Provider, Result
from gradnorm_kernels import tolerances
from gradnorm_kernels.tolerances import WEIGHT_GRAD


class WrongResultError(RuntimeError):
    """A provider's result is off: its speed means nothing and is not reported."""


def errors_of(result: Result, expected: Truth, batch: Batch) -> dict[str, float]:
    """How far each result is from the truth, relative to the truth's largest element: {what: error}."""
    norms = None if result.norms is None else result.norms[torch.tensor(expected.checked, device=batch.x.device)]
    compared = {
        "norms": (norms, expected.norms),
        "weight gradient": (result.weight_grad, expected.total),
        "group norms": (result.group_norms, expected.group_norms),
        "group gram": (result.group_gram, expected.gram),
    }
    return {
        what: float((actual.double() - right).abs().max() / right.abs().max())
        for what, (actual, right) in compared.items()
        if actual is not None and right is not None
    }


def gate(
    provider: Provider, batch: Batch, expected: Truth, run: Callable[[], Result] | None = None
) -> dict[str, float]:
    """The errors of the provider's result (``errors_of``), all within what is allowed.

    That is the tests' tolerances, which are wider for long chains of products on a GPU. What ``rounds`` on its way is
    allowed that: norms as far off as a weight gradient may be, and twice that for the weight gradient. Float32 inputs
    are not rounded.

    Raises:
        WrongResultError: one is not; NaN never is.
    """
    poison(batch.x.device)
    errors = errors_of((run or provider.prepare(batch))(), expected, batch)
    for what, error in errors.items():
        allowed = _allowed(provider, what, batch)
        if not error <= allowed:
            raise WrongResultError(f"{provider.name}: {what} off by {error:.1e} (allowed {allowed:.0e})")
    return errors


def _allowed(provider: Provider, what: str, batch: Batch) -> float:
    dtype = batch.x.dtype
    if not provider.rounds or dtype == torch.float32:
        # Sums over samples may go through one accumulator from the first token to the last.
        tokens = max(batch.lengths) if what == "norms" else len(batch.x)
        chain = max(tokens, batch.x.shape[1], batch.dy.shape[1])
        return WEIGHT_GRAD[dtype] if what == "weight gradient" else tolerances.norms(dtype, batch.x.device, chain)
    return WEIGHT_GRAD[dtype] * (2 if what == "weight gradient" else 1)


def poison(device: torch.device, size: int = 64 << 20) -> None:
    """Leave NaN in the memory that a GPU's caching allocator hands out next: an element not written will show."""
    if device.type == "cuda":
        for elements in (size // 4, 1 << 18, 1 << 8):  # the allocator keeps large, middle and small blocks apart
            torch.full((elements,), math.nan, device=device)


class Stopwatch(Protocol):
    """Runs a function once and returns what tells the seconds it took, to be asked after ``settle``.

    ``late``: the share of a function's calls, since it was last asked, that a GPU had begun before the host had
    launched all of it.
    """

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]: ...

    def settle(self) -> None: ...

    def late(self, function: Callable[[], object]) -> float: ...


class HostClock:
    """A clock of the host around the call: all there is on a CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        start = self._clock()
        function()
        seconds = self._clock() - start
        return lambda: seconds

    def settle(self) -> None:
        return None

    def late(self, function: Callable[[], object]) -> float:
        return 0.0


#: No GPU's clock is faster: a wait of so many cycles a second is never too short.
_CYCLES = 2.2e9
#: Least and longest wait. A call that synchronises takes longer on the host the longer the wait before it.
_SHORTEST, _LONGEST = 0.2e-3, 2e-3


class DeviceClock:
    """CUDA events around the call, with a cold L2 and the host ahead.

    Before each call a buffer of four times the L2 is read, so that no input is left in it, and the GPU is kept waiting
    for a moment, so that launches are queued before their time begins, as they are in the middle of a training step:
    somewhat longer than the host took for the calls before, which may make dozens of launches.
    What synchronises inside the call pays for it all the same.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.randn(max(4 * cache, 64 << 20) // 4, device=device)
        self._sink = torch.zeros((), device=device)
        self._device, self._wait = device, _SHORTEST
        self._late: dict[Callable[[], object], list[bool]] = {}

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        torch.sum(self._buffer, dim=0, out=self._sink)
        torch.cuda._sleep(int(self._wait * _CYCLES))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        function()
        end.record()
        self._late.setdefault(function, []).append(start.query())
        host = time.perf_counter() - began
        # It falls slowly, so that the two calls of a pair find the same.
        self._wait = min(max(1.3 * host, 0.95 * self._wait, _SHORTEST), _LONGEST)
        return lambda: start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def late(self, function: Callable[[], object]) -> float:
        calls = self._late.get(function, [])
        self._late.clear()  # functions hold on to their tensors
        return sum(calls) / max(len(calls), 1)


def stopwatch(device: torch.device) -> Stopwatch:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def pairs(
    run: Callable[[], object], base: Callable[[], object], repeats: int, watch: Stopwatch
) -> tuple[list[float], list[float]]:
    """Seconds of ``run`` and of ``base``, in pairs run back to back, the order swapped every time."""
    times: dict[Callable[[], object], list[Callable[[], float]]] = {run: [], base: []}
    for i in range(repeats):
        for function in (run, base) if i % 2 else (base, run):
            times[function].append(watch(function))
    watch.settle()
    return [read() for read in times[run]], [read() for read in times[base]]


def ratios(
    run: Callable[[], object], base: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Times of ``run`` over times of ``base`` by a clock of the host, in pairs; one of each goes before, unmeasured."""
    run(), base()
    return [a / b for a, b in zip(*pairs(run, base, repeats, HostClock(clock)), strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, lower quartile, median, upper quartile, ninth decile and greatest of at least two values."""
    low, middle, high = quartiles(values)
    ninth = statistics.quantiles(values, n=10, method="inclusive")[-1]
    return {"min": min(values), "q1": low, "median": middle, "q3": high, "p90": ninth, "max": max(values)}


def repeats_for(seconds: float, budget: float, least: int = 5, most: int = 100) -> int:
    """How many repetitions of something that takes ``seconds`` fit the budget, within bounds."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))
