"""The benchmarks' clocks and quantiles, and the child process that providers run in."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import LostError, Worker


class FakeClock:
    """A clock that a function moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float):
        durations = list(seconds)

        def function() -> None:
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return function


def test_pairs_alternate_and_ratios_are_paired():
    clock = FakeClock()
    order: list[str] = []

    def noted(name, function):
        def call() -> None:
            order.append(name)
            function()

        return call

    run, base = noted("run", clock.takes(2.0, 4.0, 6.0, 8.0)), noted("base", clock.takes(1.0, 2.0, 3.0, 4.0))
    mine, plain = harness.pairs(run, base, 4, harness.HostClock(clock))
    assert order == ["base", "run", "run", "base", "base", "run", "run", "base"]
    assert mine == [2.0, 4.0, 6.0, 8.0]
    assert plain == [1.0, 2.0, 3.0, 4.0]


def test_ratios_leave_the_first_call_out():
    clock = FakeClock()
    assert harness.ratios(clock.takes(100.0, 3.0), clock.takes(100.0, 2.0), 3, clock) == [1.5, 1.5, 1.5]


def test_summary():
    found = harness.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0, "p90": 4.6, "max": 5.0}
    assert harness.quartiles([1.0, 3.0]) == (1.5, 2.0, 2.5)


def test_repeats_fit_the_budget():
    assert harness.repeats_for(0.01, 0.2) == 20
    assert harness.repeats_for(10.0, 0.2) == 5
    assert harness.repeats_for(1e-6, 0.2) == 100


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for CUDA: what is called, in which order; ``ahead`` says whether the host is."""
    seen = SimpleNamespace(calls=[], waits=[], ahead=True)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.calls.append("record")

        def query(self) -> bool:
            return not seen.ahead

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    class Properties:
        L2_cache_size = 1 << 20

    total = torch.sum

    def read(*args, **kwargs):
        seen.calls.append("flush")
        return total(*args, **kwargs)

    def sleep(cycles):
        seen.calls.append("sleep")
        seen.waits.append(cycles / harness._CYCLES)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.calls.append("synchronize"))
    monkeypatch.setattr(torch, "sum", read)
    return seen


def test_the_device_clock_flushes_waits_and_reads_events(gpu):
    clock = harness.DeviceClock(torch.device("cpu"))
    seconds = clock(lambda: gpu.calls.append("run"))
    clock.settle()
    assert gpu.calls == ["flush", "sleep", "record", "run", "record", "synchronize"]
    assert seconds() == 2.5e-3
    assert clock._buffer.numel() * 4 == 64 << 20


def test_the_device_waits_as_long_as_the_host_needs_to_launch(gpu, monkeypatch):
    host = FakeClock()
    monkeypatch.setattr(harness.time, "perf_counter", host)
    clock = harness.DeviceClock(torch.device("cpu"))
    slow, quick = host.takes(0.6e-3), host.takes(1e-5)
    for function in (quick, slow, quick, slow):
        clock(function)
    assert gpu.waits == pytest.approx([0.2e-3, 0.2e-3, 0.78e-3, 0.95 * 0.78e-3], rel=1e-5)
    for _ in range(100):
        clock(quick)
    assert gpu.waits[-1] == pytest.approx(0.2e-3, rel=1e-5)
    clock(host.takes(5.0))
    clock(quick)
    assert gpu.waits[-1] == pytest.approx(2e-3, rel=1e-5), "a call that synchronises does not make its own wait longer"


def test_calls_that_the_gpu_began_too_soon_are_counted(gpu):
    clock = harness.DeviceClock(torch.device("cpu"))
    mine, base = (lambda: None), (lambda: None)
    for gpu.ahead in (True, False, True, False):
        clock(mine)
        clock(base)
    assert clock.late(mine) == 0.5
    assert clock.late(mine) == clock.late(base) == 0.0


def jobs(greeting: str):
    """What the child of the tests below does."""

    def work(job):
        if job["do"] == "die":
            os._exit(3)
        if job["do"] == "hang":
            time.sleep(60)
        if job["do"] == "raise":
            raise ValueError("a wrong value")
        return {"said": f"{greeting} {job['do']}", "process": os.getpid()}

    return work


def test_a_child_that_dies_or_hangs_is_replaced():
    with Worker(jobs, ("hello",), patience=200) as worker:
        first = worker({"do": "this"})
        assert first["said"] == "hello this" and first["process"] != os.getpid()
        with pytest.raises(RuntimeError, match=r"ValueError: a wrong value \(test_bench_timing\.py:\d+\)"):
            worker({"do": "raise"})
        assert worker({"do": "that"})["process"] == first["process"]
        with pytest.raises(LostError, match="ended with status 3"):
            worker({"do": "die"})
        second = worker({"do": "more"})
        assert second["process"] != first["process"]
        worker._patience = 0.2
        with pytest.raises(LostError, match="no answer for 0 s; its process was ended"):
            worker({"do": "hang"})
        assert worker._process is None
