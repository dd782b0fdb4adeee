"""How a function is measured: interleaved pairs of calls, quantiles, and a child process that may crash."""

from __future__ import annotations

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from gradnorm_kernels.tuning.timer import DeviceTimer

Job = dict[str, Any]
#: Makes, inside the child, the function that does jobs; the factory and its arguments are pickled.
Factory = Callable[..., Callable[[Job], Job]]


class Stopwatch(Protocol):
    """What :class:`HostClock` and :class:`gradnorm_kernels.tuning.timer.DeviceTimer` share.

    A call runs a function once and returns a function that gives the seconds, to be called after ``settle``.

    ``late``: the share of a function's calls, since the last question, that a GPU began before the host had launched
    all of the call.
    """

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]: ...

    def settle(self) -> None: ...

    def late(self, function: Callable[[], object]) -> float: ...


class HostClock:
    """The host's clock around the call: all that a CPU needs."""

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


def stopwatch(device: torch.device) -> Stopwatch:
    return DeviceTimer(device) if device.type == "cuda" else HostClock()


def pairs(
    run: Callable[[], object], base: Callable[[], object], repeats: int, watch: Stopwatch
) -> tuple[list[float], list[float]]:
    """Seconds of ``run`` and of ``base``, in pairs run back to back, in alternating order."""
    times: dict[Callable[[], object], list[Callable[[], float]]] = {run: [], base: []}
    for i in range(repeats):
        for function in (run, base) if i % 2 else (base, run):
            times[function].append(watch(function))
    watch.settle()
    return [read() for read in times[run]], [read() for read in times[base]]


def ratios(
    run: Callable[[], object], base: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Times of ``run`` over times of ``base`` by a host clock, in pairs, after one untimed call of each."""
    run(), base()
    return [a / b for a, b in zip(*pairs(run, base, repeats, HostClock(clock)), strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles, 90th percentile and maximum of at least two values."""
    low, middle, high = quartiles(values)
    ninth = statistics.quantiles(values, n=10, method="inclusive")[-1]
    return {"min": min(values), "q1": low, "median": middle, "q3": high, "p90": ninth, "max": max(values)}


def repeats_for(seconds: float, budget: float, least: int = 5, most: int = 100) -> int:
    """How many repetitions of a call that takes ``seconds`` fit the budget, within bounds."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


class LostError(RuntimeError):
    """The child process died or did not answer in time."""


class Worker:
    """Does jobs in a child process, so that a provider which crashes or hangs takes nothing else with it.

    A kernel that reads out of bounds leaves the CUDA context of its process unusable, and one that waits for a barrier
    nobody reaches never returns. The child starts with the first job. One that dies, or does not answer in time, is
    replaced; only its own job is lost.

    Args:
        factory: a module-level function or class, called once in each child with ``arguments``.
        patience: seconds without an answer after which the child is killed.
    """

    def __init__(self, factory: Factory, arguments: tuple[Any, ...], patience: float) -> None:
        self._factory, self._arguments, self._patience = factory, arguments, patience
        self._context = multiprocessing.get_context("spawn")  # a forked child cannot use CUDA
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, job: Job) -> Job:
        """The child's answer.

        Raises:
            LostError: there was none; the next call starts a new child.
            RuntimeError: the job raised an error; the text is the error's, with the place that raised it.
        """
        if self._connection is None:
            self._connection, end = self._context.Pipe()
            self._process = self._context.Process(
                target=_serve, args=(end, self._factory, self._arguments), daemon=True
            )
            self._process.start()
            end.close()
        try:
            self._connection.send(job)
            if not self._connection.poll(self._patience):
                self.close()
                raise LostError(f"no answer for {self._patience:.0f} s; its process was ended")
            kind, answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            raise LostError(f"its process ended with status {code}") from None
        if kind == "answer":
            return dict(answer)
        text, usable = answer
        if not usable:
            self.close()
        raise RuntimeError(text)

    def close(self) -> None:
        """Kill the child, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join(20)  # a process stuck in the driver may never end
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, factory: Factory, arguments: tuple[Any, ...]) -> None:
    work: Callable[[Job], Job] | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            if work is None:
                work = factory(*arguments)
            message: tuple[str, Any] = ("answer", work(job))
        except Exception as error:
            message = ("error", (describe(error), work is not None and _device_works()))
        connection.send(message)


def describe(error: BaseException) -> str:
    """One paragraph: the error's type and text, and the place in the code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"


def _device_works() -> bool:
    """Whether the CUDA context, if there is one, survived the error."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except Exception:  # torch raises several kinds, all of which mean the same here
        return False
    return True
