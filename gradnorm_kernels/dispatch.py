"""Which algorithm on which backend for a call: a cost model over the call's shape, and ``explain()`` to say why.

The model sees sizes, dtype and device only, never tensor data: it costs no synchronisation, and the same shapes always
run the same way. It knows three costs (:mod:`gradnorm_kernels.tuning.costs`): the end of a sample in segmented wgrad, a
short sample's Gram, and the tiles over all pairs of tokens. Which backends it may choose from is what they declare
(:mod:`gradnorm_kernels.backends.base`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import backends, canary, checks
from .backends import Backend, Plan
from .batch import GradBatch
from .tuning import costs as tuning
from .tuning.costs import Chip

# Operators that the cost model chooses an algorithm for; the others have one.
_WITH_ALGORITHMS = ("fused_grad_norm", "grad_gram", "grad_dot")
# More tokens than any sample can have: every norm from a Gram.
ALL_TOKENS = 1 << 62
# On a GPU the host does not know the samples' lengths, so the Gram of the short ones is launched whether there are any
# or not: 14 more operations with triton, 47 with cuda (counted). Where samples have on average at least so many times
# the crossover's tokens, few are short, and what their ends cost in segmented wgrad is small. Estimated, not measured.
PAST_CROSSOVER = 2


@dataclass(frozen=True)
class Problem:
    """What a choice depends on. ``groups`` is the number of sums taken: for ``grad_gram`` each sample is its own."""

    chip: Chip
    tokens: int
    d_in: int
    d_out: int
    samples: int
    groups: int
    weight_grad: bool = False
    group_gram: bool = False
    dtype: torch.dtype = torch.float32
    op: str = "fused_grad_norm"


@dataclass(frozen=True)
class Choice:
    """The plan for a call, why its backend, and the estimated cost of the two algorithms, in multiply-adds of a GEMM.

    Operators with one algorithm have no estimate: both costs are 0.
    """

    plan: Plan
    why: str
    wgrad_cost: float
    gram_cost: float


@dataclass(frozen=True)
class Explanation:
    """What would run, why, and for each backend why it cannot serve this call (None if it can).

    ``str()`` is for people.
    """

    plan: Plan
    reasons: tuple[str, ...]
    backends: dict[str, str | None]

    def __str__(self) -> str:
        states = []
        for name, why in self.backends.items():
            can = "chosen" if name == self.plan.backend else f"can serve this call when asked for: backend={name!r}"
            states.append(f"  {name}: {can if why is None else why}")
        return "\n".join([*self.reasons, *states])


@lru_cache(maxsize=4096)
def choose(
    problem: Problem, algorithm: str = "auto", backend: str = "auto", without: frozenset[str] = frozenset()
) -> Choice:
    """The plan for a call. Raises RuntimeError if an explicit ``backend`` cannot run.

    ``without``: backends that ``backend="auto"`` leaves out, because their first use failed (:mod:`.canary`).
    """
    name, why = _backend(problem, backend, without)
    # An embedding has no d_in: its costs are those of a square layer.
    d_in = problem.d_in if problem.op in (*_WITH_ALGORITHMS, "grad_sketch") else problem.d_out
    prices = tuning.costs(problem.chip, name, problem.dtype.itemsize, d_in, problem.d_out)
    if problem.op not in _WITH_ALGORITHMS:
        return Choice(Plan(name, 0, "wgrad", prices.workspace, prices.gram_tile), why, 0.0, 0.0)
    weight, tokens = problem.d_in * problem.d_out, problem.tokens
    width = problem.d_in + problem.d_out
    samples, groups = max(problem.samples, 1), max(problem.groups, 1)

    crossover = _crossover(prices, weight / width) if width else 0
    mean = tokens / samples
    past = problem.chip.type == "cuda" and mean >= PAST_CROSSOVER * crossover
    gram_tokens = {"wgrad": 0, "gram": ALL_TOKENS, "auto": 0 if past else crossover}[algorithm]
    norm_cost = min(prices.epilogue * weight, (prices.gram * mean + prices.gram_token) * mean * width)
    if groups >= samples:
        # Every sample is a group of its own: its sum is formed anyway, and with it the norm.
        gram_tokens, norm_cost = 0, prices.epilogue * weight
    wgrad_cost = tokens * weight + norm_cost * samples + (groups * groups * weight if problem.group_gram else 0)
    pairs = tokens * tokens if problem.group_gram else tokens * tokens / groups
    gram_cost = prices.pairs * pairs * width
    by_pairs = algorithm != "wgrad" and not problem.weight_grad and gram_cost < wgrad_cost
    if algorithm == "gram" and groups >= samples and not problem.weight_grad:
        by_pairs = True

    plan = Plan(name, gram_tokens, "gram" if by_pairs else "wgrad", prices.workspace, prices.gram_tile)
    return Choice(plan, why, wgrad_cost, gram_cost)


def _backend(problem: Problem, asked: str, without: frozenset[str]) -> tuple[str, str]:
    """(the backend that serves the call, why it). Raises RuntimeError if the one that was asked for cannot."""
    kind, op, dtype = problem.chip.type, problem.op, problem.dtype
    if asked != "auto":
        reason = backends.unavailable_reason(asked, op, kind, dtype)
        if reason is not None:
            raise RuntimeError(f"backend={asked!r} cannot run: {reason}")
        return asked, "is asked for"
    candidates = [candidate for candidate in _candidates(kind) if candidate.name not in without]
    measured = tuning.faster(problem.chip, dtype.itemsize, problem.d_in, problem.d_out)
    fastest, where = measured if measured is not None and op in _WITH_ALGORITHMS else ("", "")
    candidates.sort(key=lambda candidate: candidate.name != fastest)
    able = [backends.supports(candidate.name, op, kind, dtype) for candidate in candidates]
    if True not in able:
        raise RuntimeError(f"no backend can run {op} for {dtype} on {kind!r}")
    place = able.index(True)
    name, why = candidates[place].name, candidates[place].why
    others = [other for other in backends.NAMES if other != name and other not in without]
    later = [c.name for c in candidates[place + 1 :] if c.devices is not None and backends.implements(c.name, op)]
    if name == fastest:
        why = f"was measured fastest at the nearest shape, on {where}"
    elif not any(backends.supports(other, op, kind, dtype) for other in others):
        why = "is the only one that can serve this call"
    elif later:
        before = " and ".join(map(repr, later))
        why = f"is taken before {before}: no measurement of both on {problem.chip.gpu or 'this device'} is frozen"
    elif place:
        why += f", and {' and '.join(c.name for c in candidates[:place])} cannot serve this call"
    return name, why


def _candidates(kind: str) -> list[Backend]:
    """The backends that "auto" considers on a type of device, the preferred one first."""
    declared = [backend for backend in map(backends.declared, backends.NAMES) if backend is not None]
    fitting = [backend for backend in declared if backend.devices is None or kind in backend.devices]
    return sorted(fitting, key=lambda backend: -backend.priority)


def _crossover(prices: tuning.Costs, ratio: float) -> int:
    """The longest sample whose Gram costs no more than its end in segmented wgrad.

    ``ratio`` is d_in d_out / (d_in + d_out). Solves ``gram L^2 + gram_token L = epilogue ratio``.
    """
    half = prices.gram_token / (2 * prices.gram)
    return int(math.sqrt(half * half + prices.epilogue * ratio / prices.gram) - half)


def _reasons(problem: Problem, algorithm: str, choice: Choice) -> tuple[str, ...]:
    plan, plain = choice.plan, max(problem.tokens * problem.d_in * problem.d_out, 1)
    wgrad, gram = (f"{cost / plain:.2f} of a plain GEMM" for cost in (choice.wgrad_cost, choice.gram_cost))
    first = f"backend {plan.backend!r} {choice.why}"
    if plan.group_sums == "gram":
        return first, f"norms and sums from all pairs of tokens ({gram}), not from segmented wgrad ({wgrad})"
    why = "the weight's gradient is wanted" if problem.weight_grad else f"all pairs of tokens: {gram}"
    sums = f"sums from segmented wgrad ({wgrad}; {why})"
    if plan.gram_tokens >= ALL_TOKENS:
        norms = "samples' norms from Grams: algorithm='gram'"
    elif plan.gram_tokens == 0:
        norms = "samples' norms from segmented wgrad"
        if algorithm == "wgrad":
            norms += ": algorithm='wgrad'"
        elif problem.groups < problem.samples:
            norms += f": they have {problem.tokens / problem.samples:.0f} tokens on average, well past the crossover"
    else:
        norms = f"samples of at most {plan.gram_tokens} tokens: norm from the Gram; longer ones: from segmented wgrad"
    return first, sums, norms


def explain(x: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Explanation:
    """What ``fused_grad_norm`` would run for these arguments, and why. Reads no data.

    The arguments are those of :func:`gradnorm_kernels.fused_grad_norm`; tensors on the device "meta" will do.

    Raises what ``fused_grad_norm`` would raise.
    """
    batch = checks.fused_grad_norm(x, dy, cu_seqlens, **options, backends=backends.NAMES)
    problem = problem_of(batch)
    call = batch.op, batch.dy.device, problem.dtype
    without = canary.failed(*call) if batch.backend == "auto" else frozenset()
    choice = choose(problem, batch.algorithm, batch.backend, without)
    kind = problem.chip.type
    reasons = {name: backends.unavailable_reason(name, batch.op, kind, problem.dtype) for name in backends.NAMES}
    left_out = tuple(
        f"backend {name!r} is left out: its first use failed: {canary.reason(name, *call)}" for name in sorted(without)
    )
    return Explanation(choice.plan, _reasons(problem, batch.algorithm, choice) + left_out, reasons)


def plan(batch: GradBatch) -> Plan:
    """How a checked call runs, for ``backend="auto"`` on a backend whose first use agreed with torch's.

    Raises RuntimeError if an explicit ``backend`` cannot run, or if a first use is due while a CUDA graph is captured.
    """
    problem = problem_of(batch)
    if batch.backend != "auto":
        return choose(problem, batch.algorithm, batch.backend).plan
    op, device, dtype = batch.op, batch.dy.device, problem.dtype
    while True:
        found = choose(problem, batch.algorithm, "auto", canary.failed(op, device, dtype)).plan
        if canary.passed(found.backend, op, device, dtype):
            return found


def problem_of(batch: GradBatch) -> Problem:
    """The problem of a checked call; sizes that only the ids' values determine are taken from the segments."""
    samples = batch.segments if batch.samples is None else batch.samples
    pairwise = batch.op == "grad_gram"  # each sample is a group of its own
    dtype = batch.dy.dtype
    if batch.op == "tied_grad_gram":
        dtype = torch.promote_types(batch.x.dtype, dtype)
    return Problem(
        tuning.chip(batch.dy.device),
        batch.tokens,
        batch.d_in,
        batch.d_out,
        samples,
        samples if pairwise else 1 if batch.groups is None else batch.groups,
        batch.weight_grad,
        batch.group_gram or pairwise,
        dtype,
        batch.op,
    )
