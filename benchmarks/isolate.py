"""A child process that measures, so that a provider which crashes or hangs takes nothing else with it.

A kernel that reads out of bounds leaves the CUDA context of its process unusable, and one that waits for a barrier
nobody reaches never returns. The parent gives jobs to one child after another; a child that dies, or says nothing for
too long, is replaced, and its job is lost alone.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Job = dict[str, Any]
#: Makes the function that does jobs, inside the child; it and its arguments are pickled.
Factory = Callable[..., Callable[[Job], Job]]


class LostError(RuntimeError):
    """The child died or was silent for too long while it did a job."""


class Worker:
    """Does jobs in a child process, which starts with the first job and is replaced when it is lost.

    Args:
        factory: a function of a module; called once in each child with ``arguments``.
        patience: seconds without an answer after which the child is ended.
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
            RuntimeError: the job raised; the text is the error's, with where it was raised.
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
        """End the child, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join(20)  # stuck in the driver it may never go
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
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except Exception:  # torch raises several kinds, all of which mean the same here
        return False
    return True
