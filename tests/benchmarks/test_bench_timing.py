"""The benchmarks' pairs and quantiles, and the child process that providers run in."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks import harness
from benchmarks.harness import LostError, Worker


class FakeClock:
    """A clock that advances when a function says so."""

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


def jobs(greeting: str):
    """The jobs of the child process in the tests below."""

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
