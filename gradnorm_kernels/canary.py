"""First use proves itself: ``"auto"`` takes a GPU kernel only after small calls of it agreed with the torch backend.

Compilers, drivers and chips that nobody has run these kernels on may give wrong numbers without an error. Before
``"auto"`` takes a backend for an operator, a device and a dtype for the first time in a process, :func:`passed` runs a
few calls of about 200 and 2,300 tokens with both and compares the results. Where the backend raises or disagrees, one
warning says so, and ``"auto"`` goes on with the next backend. A backend that is asked for by name is never replaced.

The calls go to the backends' functions directly, on the current stream of the tensors' device. Their inputs are
counted, not drawn: no random state changes. The results are read on the host, so the first use waits for the device;
while a CUDA graph is being captured nothing can be compared, and an unproven backend is refused.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, tolerances
from .backends import Plan, native
from .segments import to_device

#: What every other backend is compared with, and what is never in question itself.
TRUSTED = "torch"
# Multiples of 8, for tensor descriptors, but not of a tile: every tile of a row or column has a part outside.
_D_IN, _D_OUT = 136, 200
_WORKSPACE, _TILE = 1 << 20, 64

_Key = tuple[str, str, torch.device, torch.dtype]
_passed: set[_Key] = set()
_reasons: dict[_Key, str] = {}
_failed: dict[tuple[str, torch.device, torch.dtype], frozenset[str]] = {}
_lock = threading.RLock()
_running = threading.local()


def passed(name: str, op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``"auto"`` may take a backend for calls of an operator; its first call finds out.

    Anything but a compiled backend on a GPU passes without a trial. Raises RuntimeError if a trial is due while a CUDA
    graph is being captured. Running out of the device's memory is not the backend's fault: it is raised.
    """
    key = name, op, device, dtype
    if device.type != "cuda" or name == TRUSTED or key in _passed:
        return True
    if key in _reasons:
        return False
    if torch.compiler.is_compiling():
        return True  # traced, not run: the compiled code calls the operator, and that asks again
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"backend={name!r} was not used yet for {op} with {dtype} on {device}, and its first results cannot be "
                "compared with torch's while a CUDA graph is being captured: call the operator once before the "
                f"capture, or ask for backend={name!r}"
            )
    with _lock:
        if key in _passed or getattr(_running, "keys", None) == key:  # by another thread, or by this trial itself
            return True
        if key in _reasons:
            return False
        _running.keys = key
        try:
            reason = _trial(name, op, device, dtype)
        finally:
            _running.keys = None
        if reason is None:
            _passed.add(key)
            return True
        _reasons[key] = reason
        _failed[key[1:]] = failed(*key[1:]) | {name}
    warnings.warn(
        f"backend={name!r} failed its first use for {op} with {dtype} on {_chip(device)}: {reason}. {_versions()}. "
        f"backend='auto' goes on with the next backend; backend={name!r} still runs when it is asked for. "
        "`python -m gradnorm_kernels check` tries every backend",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def failed(op: str, device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """The backends whose trial failed for such calls in this process."""
    return _failed.get((op, device, dtype), frozenset())


def reason(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What was wrong in a backend's trial; None if nothing was, or if there was none."""
    return _reasons.get((name, op, device, dtype))


def forget() -> None:
    """Try every backend afresh: for tests that change what there is."""
    with _lock:
        for known in (_passed, _reasons, _failed):
            known.clear()


def _trial(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """How a backend's results differ from torch's, or what it raises; None if they agree."""
    with _reading(device):
        for what, tokens, arguments, plan in _calls(op, device, dtype):
            expected = backends.operator(TRUSTED, op)(*arguments, plan)
            try:
                found = backends.operator(name, op)(*arguments, plan)
                difference = _difference(found, expected, tolerances.norms(dtype, device, tokens))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler or a driver may raise anything
                return f"{what}: it raises {type(error).__name__}: {error}"
            if difference is not None:
                return f"{what}: {difference}"
    return None


@contextmanager
def _reading(device: torch.device) -> Iterator[None]:
    """The device as the current one, and a caller's ban on synchronisation lifted."""
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.device(device), torch.no_grad():
        torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _difference(found: Any, expected: Any, norms: float) -> str | None:
    """Where results differ by more than rounding: ``norms`` for norms and inner products, one rounding for dW."""
    pairs = [(found, expected)] if isinstance(expected, Tensor) else list(zip(found, expected, strict=True))
    for place, (one, other) in enumerate(pairs):
        if other is None:
            continue
        tolerance = norms if other.dtype in (torch.float64, torch.float32) else tolerances.WEIGHT_GRAD[other.dtype]
        difference = tolerances.difference(one.cpu(), other.cpu().double(), max(norms, tolerance))
        if difference is not None:
            return f"result {place + 1} of {len(pairs)} {difference}"
    return None


def _calls(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, int, tuple[Any, ...], Plan]]:
    """(what it is, tokens, what the backend's function takes, plan) of every call that an operator is tried on."""

    def plan(gram_tokens: int = 0, group_sums: str = "wgrad") -> Plan:
        return Plan(TRUSTED, gram_tokens, group_sums, _WORKSPACE, _TILE)

    def numbers(rows: int, columns: int, seed: int) -> Tensor:
        return counted(rows, columns, seed, device).to(dtype)

    def indices(*values: int) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int32, device="cpu"), device)

    options: dict[str, Any] = {"backend": TRUSTED, "backends": backends.NAMES}
    tokens = 198
    # Long samples and short, in pieces and in turns, an empty segment, and a sample without tokens.
    cu_seqlens, sample_ids, group_ids = indices(0, 70, 70, 103, 193, 198), indices(2, 1, 0, 2, 1), indices(2, 0, 1, 0)
    x, dy = numbers(tokens, _D_IN, 1), numbers(tokens, _D_OUT, 2)
    make: Callable[..., Any] = getattr(checks, op)
    segments = cu_seqlens, sample_ids
    if op == "fused_grad_norm":
        poisoned = x.clone()
        poisoned[75, 5:6] = torch.inf  # in sample 0, so in group 2: the others stay finite
        for one, groups, what in ((poisoned, (group_ids, 4, 3), "three groups"), (x, (None, 4, None), "one group")):
            batch = make(one, dy, *segments, *groups, True, what == "three groups", **options)
            yield f"segmented wgrad, {what}", tokens, (batch,), plan(40)
        batch = make(x, dy, *segments, group_ids, 4, 3, False, True, **options)
        yield "pairs of tokens", tokens, (batch,), plan(0, "gram")
        # One tile and many tokens: they are split, anywhere and between samples.
        for lengths in ((0, 700, 2200, 2264), tuple(range(0, 2265, 24))):
            few = numbers(lengths[-1], 40, 3), numbers(lengths[-1], 24, 4)
            batch = make(*few, indices(*lengths), weight_grad=True, num_samples=len(lengths) - 1, **options)
            yield f"split tokens, {len(lengths) - 1} samples", lengths[-1], (batch,), plan()
    elif op == "grad_gram":
        batch = make(x, dy, *segments, 4, "auto", **options)
        yield "segmented wgrad", tokens, (batch,), plan()
        yield "pairs of tokens", tokens, (batch,), plan(0, "gram")
    elif op == "grad_dot":
        v = numbers(_D_OUT, _D_IN, 5)
        yield "a matrix", _D_OUT * tokens, (make(x, dy, v, *segments, 4, **options), v), plan()
    elif op == "grad_sketch":
        c_in, c_out = numbers(_D_IN, 24, 6), numbers(_D_OUT, 16, 7)
        for sides in ((c_in, c_out), (None, c_out)):
            what = "both sides" if sides[0] is not None else "one side"
            yield what, _D_OUT * tokens, (make(x, dy, *sides, *segments, 4, **options), *sides), plan()
    else:
        words = (counted(1, tokens, 8, device)[0] * 8 + 8).to(torch.int64)  # 0 to 16, each several times
        words[::9] = -1
        if op == "embedding_grad_norm":
            batch = make(words, dy, *segments, group_ids, 4, 3, True, **options)
            yield "an embedding", tokens, (batch,), plan()
        else:
            e = numbers(tokens, _D_IN, 9)
            pair = make(x, dy, words, e, cu_seqlens, cu_seqlens, sample_ids, sample_ids, group_ids, 4, 3, **options)
            yield "a tied head", tokens, tuple(pair), plan()


def counted(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """[rows, columns] float32 of eighths from -1 to 1 without a visible pattern: every dtype holds them exactly."""
    i = torch.arange(rows, dtype=torch.int64, device=device)[:, None] + 11 * seed
    j = torch.arange(columns, dtype=torch.int64, device=device)[None, :] + 7 * seed
    mixed = (i * 7919 + j * 10_007 + i * j * 31 + i * i * 3 + j * j * 5) % 8191 % 17
    return (mixed - 8).to(torch.float32) / 8


def _chip(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}, {device})"


def _versions() -> str:
    """The versions that a wrong result may come from."""
    found = [("torch", str(torch.__version__)), ("CUDA of torch", str(torch.version.cuda))]
    for package in ("gradnorm_kernels", "triton"):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    info = native.build_info()
    found.append(("compiled module", "none" if info is None else f"CUDA {info['cuda']}, commit {info['commit']}"))
    return ", ".join(f"{name} {version}" for name, version in found)
