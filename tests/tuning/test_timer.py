"""The GPU timer without a GPU: what it calls, in which order, and how long it keeps the GPU waiting."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradnorm_kernels.tuning import timer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for CUDA. ``ahead``: whether the host queues a call before the GPU reaches it."""
    seen = SimpleNamespace(calls=[], waits=[], ahead=True, now=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.calls.append("record")

        def query(self) -> bool:
            return not seen.ahead

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    total = torch.sum

    def read(*args: Any, **kwargs: Any) -> Any:
        seen.calls.append("flush")
        return total(*args, **kwargs)

    def sleep(cycles: int) -> None:
        seen.calls.append("sleep")
        seen.waits.append(cycles / timer.CYCLES_PER_SECOND)

    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.calls.append("synchronize"))
    monkeypatch.setattr(torch, "sum", read)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: seen.now)
    return seen


def takes(gpu: SimpleNamespace, seconds: float) -> Callable[[], None]:
    def call() -> None:
        gpu.now += seconds

    return call


def test_a_call_finds_the_cache_cold_and_its_launches_queued(gpu: SimpleNamespace) -> None:
    device_timer = timer.DeviceTimer(torch.device("cpu"))
    read = device_timer(lambda: gpu.calls.append("run"))
    device_timer.settle()
    assert gpu.calls == ["flush", "sleep", "record", "run", "record", "synchronize"]
    assert read() == 2.5e-3
    assert device_timer._buffer.numel() * 4 == 64 << 20


def test_the_wait_follows_the_host(gpu: SimpleNamespace) -> None:
    device_timer = timer.DeviceTimer(torch.device("cpu"))
    slow, quick = takes(gpu, 0.6e-3), takes(gpu, 1e-5)
    for function in (quick, slow, quick, slow):
        device_timer(function)
    assert gpu.waits == pytest.approx([0.2e-3, 0.2e-3, 0.78e-3, 0.95 * 0.78e-3], rel=1e-5)
    for _ in range(100):
        device_timer(quick)
    assert gpu.waits[-1] == pytest.approx(timer.SHORTEST_WAIT, rel=1e-5)
    device_timer(takes(gpu, 5.0))
    device_timer(quick)
    assert gpu.waits[-1] == pytest.approx(timer.LONGEST_WAIT, rel=1e-5)


def test_calls_that_began_too_early_are_counted(gpu: SimpleNamespace) -> None:
    device_timer = timer.DeviceTimer(torch.device("cpu"))
    mine, base = (lambda: None), (lambda: None)
    for gpu.ahead in (True, False, True, False):
        device_timer(mine)
        device_timer(base)
    assert device_timer.late(mine) == 0.5
    assert device_timer.late(mine) == device_timer.late(base) == 0.0


def test_the_median_leaves_out_the_first_calls(gpu: SimpleNamespace) -> None:
    assert timer.median_milliseconds(timer.DeviceTimer(torch.device("cpu")), lambda: gpu.calls.append("run"), 5) == 2.5
    assert gpu.calls.count("run") == 8 and gpu.calls.count("record") == 10
