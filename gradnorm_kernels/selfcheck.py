"""``python -m gradnorm_kernels check``: every backend that runs on this machine, held to float64 on the traps.

:mod:`.traps` has the inputs and what they are held to. Each backend runs on the devices that it is for, with each dtype
that it takes: every operator that it has, every algorithm, twice where the same bits are promised. One line per
backend, device and dtype says whether all results were right, or which trap was wrong first and by how much.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, ops, reference, traps


@dataclass(frozen=True)
class Verdict:
    """One backend with one dtype on one device: how many calls were compared, and what was wrong, in order."""

    backend: str
    device: str
    dtype: torch.dtype
    compared: int
    wrong: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        what = f"{self.backend} on {self.device}, {str(self.dtype).removeprefix('torch.')}"
        if not self.wrong:
            return f"{what}: right ({self.compared} comparisons, {self.seconds:.1f} s)"
        return f"{what}: WRONG in {len(self.wrong)} of {self.compared} comparisons, first {self.wrong[0]}"


def devices() -> list[str]:
    """The CPU, and the current GPU where torch can use one."""
    return ["cpu", *([f"cuda:{torch.cuda.current_device()}"] if torch.cuda.is_available() else [])]


def verdicts(names: tuple[str, ...] = backends.NAMES) -> Iterator[Verdict]:
    """The verdict on every backend of ``names`` that can run, as soon as it is known."""
    for name in names:
        for device in devices():
            for dtype in checks.DTYPES:
                kind = torch.device(device).type
                if backends.supports(name, "fused_grad_norm", kind, dtype):
                    yield verdict(name, device, dtype)


def verdict(name: str, device: str, dtype: torch.dtype) -> Verdict:
    """Run every trap. What a backend raises is wrong as well: it is no reason to stop."""
    start, compared, wrong = time.perf_counter(), 0, []
    for what, compare in _comparisons(name, device, dtype):
        compared += 1
        try:
            compare()
        except Exception as error:  # a compiler or a driver may raise anything
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            wrong.append(f"{what}: {said}")
    return Verdict(name, device, dtype, compared, tuple(wrong), time.perf_counter() - start)


def _comparisons(name: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, what raises unless the results are right) of everything that a backend is tried on."""
    cases = traps.TRAPS if device == "cpu" else (*traps.TRAPS, traps.ALIGNED, traps.LARGE)
    for trap in cases:
        case = trap.build(dtype)
        moved = case.to(device)
        # Two groups' inner products and dW in one call: the form that needs the most of the chip.
        for algorithm in traps.ALGORITHMS:
            what = f"fused_grad_norm, {trap}, algorithm={algorithm!r}"
            wanted: dict[str, Any] = {"weight_grad": algorithm != "gram", "group_gram": True}
            yield what, partial(traps.check, moved, name, algorithm, **wanted)
        if trap is not traps.LARGE:
            yield f"grad_gram and grad_dot, {trap}", partial(traps.check_pairs, moved, name, "auto")
    yield "grad_gram from segmented wgrad", lambda: traps.check_pairs(traps.ODD.build(dtype).to(device), name, "wgrad")
    if backends.supports(name, "grad_sketch", torch.device(device).type, dtype):
        yield "grad_sketch", lambda: traps.check_sketches(traps.ODD.build(dtype).to(device), name)
    if backends.supports(name, "embedding_grad_norm", torch.device(device).type, dtype):
        yield "embedding_grad_norm", lambda: _embedding(name, device, dtype)
    if backends.supports(name, "tied_grad_gram", torch.device(device).type, dtype):
        yield "tied_grad_gram", lambda: _tied(name, device, dtype)


_VOCABULARY = 61


def _words(tokens: int) -> Tensor:
    """Token ids below 61, each several times, and padding."""
    ids = torch.randint(_VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2))
    ids[::7] = -1
    return ids


def _embedding(name: str, device: str, dtype: torch.dtype) -> None:
    case = traps.ODD.build(dtype)
    assert case.cu_seqlens is not None and case.sample_ids is not None and case.group_ids is not None
    ids = _words(len(case.dy))
    gradients = reference.embedding_gradients(
        ids, case.dy, _VOCABULARY, case.cu_seqlens, sample_ids=case.sample_ids, num_samples=len(case.group_ids)
    )
    sums = reference.group_sums(gradients, case.group_ids).flatten(1)
    moved = case.to(device)
    found = ops.embedding_grad_norm(
        ids.to(device),
        moved.dy,
        moved.cu_seqlens,
        sample_ids=moved.sample_ids,
        group_ids=moved.group_ids,
        group_gram=True,
        backend=name,
    )
    norms = traps.NORMS[dtype]
    assert found.group_gram is not None
    traps.assert_close(found.sample_sq_norms, gradients.square().sum((1, 2)), norms, what="sample_sq_norms")
    traps.assert_close(found.group_sq_norms, sums.square().sum(1), norms, what="group_sq_norms")
    traps.assert_close(found.group_gram, sums @ sums.T, norms, what="group_gram")


def _tied(name: str, device: str, dtype: torch.dtype) -> None:
    lengths, width = [70, 0, 33, 90, 5], 40
    head = traps.packed(lengths, width, _VOCABULARY, dtype, sample_ids=[2, 1, 0, 2, 1], group_ids=[2, 0, 2, 1])
    other = traps.packed(lengths, width, 3, dtype)
    ids = _words(len(head.x))
    call: dict[str, Any] = {"sample_ids": head.sample_ids, "num_samples": 4}
    of_head = reference.sample_gradients(head.x, head.dy, head.cu_seqlens, **call)
    of_words = reference.embedding_gradients(ids, other.x, _VOCABULARY, head.cu_seqlens, **call)
    sums = [reference.group_sums(gradients, head.group_ids).flatten(1) for gradients in (of_head, of_words)]
    moved, e = head.to(device), other.x.to(device)
    found = ops.tied_grad_gram(
        moved.x,
        moved.dy,
        ids.to(device),
        e,
        moved.cu_seqlens,
        moved.cu_seqlens,
        sample_ids=moved.sample_ids,
        e_sample_ids=moved.sample_ids,
        group_ids=moved.group_ids,
        backend=name,
    )
    # Inner products may be small differences: they are held to the norms of what is multiplied.
    scale = (of_head.flatten(1).norm(dim=1) * of_words.flatten(1).norm(dim=1)).max()
    traps.assert_close(found.sample_dots, (of_head * of_words).sum((1, 2)), traps.NORMS[dtype], scale, "sample_dots")
    scale = sums[0].norm(dim=1).max() * sums[1].norm(dim=1).max()
    traps.assert_close(found.group_gram, sums[0] @ sums[1].T, traps.NORMS[dtype], scale, "group_gram")


def main(arguments: list[str]) -> int:
    """Print a verdict per backend, device and dtype, and why the other backends cannot run; 1 if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m gradnorm_kernels check",
        description="Hold every backend that runs on this machine to float64 on small, difficult inputs. The exit "
        "status is 1 if a result is wrong.",
    )
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help="only these (default: all)")
    names = tuple(parser.parse_args(arguments).backends) or backends.NAMES
    unknown = [name for name in names if name not in backends.NAMES]
    if unknown:
        parser.error(f"BACKEND must be among {', '.join(backends.NAMES)}, got {', '.join(unknown)}")
    wrong = False
    for name in names:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            print(f"{name}: not checked, it cannot run here: {reason}", flush=True)
            continue
        for found in verdicts((name,)):
            print(found, flush=True)
            wrong |= bool(found.wrong)
    return int(wrong)
