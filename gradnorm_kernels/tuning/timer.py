"""Timing on a GPU: CUDA events around a call, with a cold L2 cache and with the host's launches queued beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

#: No GPU's clock is faster: a wait of so many cycles per second is never too short.
CYCLES_PER_SECOND = 2.2e9
#: The shortest and the longest wait in seconds. A call that synchronises takes the host longer the longer the wait is.
SHORTEST_WAIT, LONGEST_WAIT = 0.2e-3, 2e-3


class DeviceTimer:
    """CUDA events around the call, with a cold L2 and the host ahead.

    Before each call a buffer of four times the L2 is read, so that no input is left in the cache. Then the GPU is kept
    waiting for a moment, so that the call's launches are queued before its time begins, as they are in the middle of a
    training step. The wait is slightly longer than the host took for the calls before, which may make dozens of
    launches. A call that synchronises still pays for it.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.randn(max(4 * cache, 64 << 20) // 4, device=device)
        self._sink = torch.zeros((), device=device)
        self._device, self._wait = device, SHORTEST_WAIT
        self._late: dict[Callable[[], object], list[bool]] = {}

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        """Run ``function`` once. The result, called after :meth:`settle`, gives the seconds it took on the GPU."""
        torch.sum(self._buffer, dim=0, out=self._sink)
        torch.cuda._sleep(int(self._wait * CYCLES_PER_SECOND))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        function()
        end.record()
        self._late.setdefault(function, []).append(start.query())
        host = time.perf_counter() - began
        # The wait falls slowly, so that both calls of a compared pair find the same one.
        self._wait = min(max(1.3 * host, 0.95 * self._wait, SHORTEST_WAIT), LONGEST_WAIT)
        return lambda: start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        """Wait until every timed call has ended."""
        torch.cuda.synchronize(self._device)

    def late(self, function: Callable[[], object]) -> float:
        """The share of ``function``'s calls that the GPU began before the host had queued them; forgets all calls."""
        calls = self._late.get(function, [])
        self._late.clear()  # functions hold on to their tensors
        return sum(calls) / max(len(calls), 1)


def median_milliseconds(timer: DeviceTimer, call: Callable[[], object], repetitions: int = 20) -> float:
    """The median time of ``repetitions`` calls on the GPU, in milliseconds, after three calls that are not timed."""
    for _ in range(3):
        call()
    reads = [timer(call) for _ in range(repetitions)]
    timer.settle()
    return 1e3 * median(read() for read in reads)
