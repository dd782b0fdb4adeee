"""Which algorithm on which backend for a call: a cost model over the call's shape, and ``explain()`` to say why.

The model sees sizes, dtype and device only, never tensor data: it costs no synchronisation, and the same shapes always
run the same way. It knows three prices (:mod:`gradnorm_kernels.tuning.costs`): a stop at a sample's end in the
weight-gradient pass, a short sample's Gram, and the tiles over all pairs of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import backends, checks
from .backends import Plan
from .tuning import costs as tuning
from .tuning.costs import Chip

# More tokens than any sample can have: every norm from a Gram.
ALL_TOKENS = 1 << 62


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


@dataclass(frozen=True)
class Choice:
    """The plan for a call, why its backend, and what the two ways were reckoned to cost, in multiply-adds of a GEMM."""

    plan: Plan
    why: str
    wgrad_cost: float
    gram_cost: float


@dataclass(frozen=True)
class Explanation:
    """What would run, why, and of each backend why it cannot serve this call (None if it can).

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
def choose(problem: Problem, algorithm: str = "auto", backend: str = "auto") -> Choice:
    """The plan for a call. Raises RuntimeError if an explicit ``backend`` cannot run."""
    name, why = _backend(problem, backend)
    prices = tuning.costs(problem.chip, name, problem.dtype.itemsize, problem.d_in, problem.d_out)
    weight, tokens = problem.d_in * problem.d_out, problem.tokens
    width = problem.d_in + problem.d_out
    samples, groups = max(problem.samples, 1), max(problem.groups, 1)

    crossover = _crossover(prices, weight / width) if width else 0
    gram_tokens = {"wgrad": 0, "gram": ALL_TOKENS, "auto": crossover}[algorithm]
    mean = tokens / samples
    norm_cost = min(prices.epilogue * weight, (prices.gram * mean + prices.gram_token) * mean * width)
    if groups >= samples:
        # Every sample is a group of its own: its slab is formed anyway, and with it the norm.
        gram_tokens, norm_cost = 0, prices.epilogue * weight
    wgrad_cost = tokens * weight + norm_cost * samples + (groups * groups * weight if problem.group_gram else 0)
    pairs = tokens * tokens if problem.group_gram else tokens * tokens / groups
    gram_cost = prices.pairs * pairs * width
    by_pairs = algorithm != "wgrad" and not problem.weight_grad and gram_cost < wgrad_cost
    if algorithm == "gram" and groups >= samples and not problem.weight_grad:
        by_pairs = True

    plan = Plan(name, gram_tokens, "gram" if by_pairs else "wgrad", prices.workspace, prices.gram_tile)
    return Choice(plan, why, wgrad_cost, gram_cost)


def _backend(problem: Problem, asked: str) -> tuple[str, str]:
    """(the backend that serves the call, why it). Raises RuntimeError if the one that was asked for cannot."""
    kind = problem.chip.type
    if asked != "auto":
        reason = backends.unable(asked, kind, problem.dtype)
        if reason is not None:
            raise RuntimeError(f"backend={asked!r} cannot run: {reason}")
        return asked, "is asked for"
    for name, why in _preferred(problem):
        if backends.unable(name, kind, problem.dtype) is None:
            return name, why
    return "torch", "is the only one that can serve this call"


def _preferred(problem: Problem) -> list[tuple[str, str]]:
    """The compiled backends for a kind of device, each with why it goes before the next."""
    kind, size = problem.chip.type, problem.dtype.itemsize
    if kind == "cpu":
        order = [("cpu", "is compiled for this CPU"), ("torch", "runs everywhere")]
    elif kind == "cuda":
        unmeasured = f"is taken before 'cuda': no measurement of both on {problem.chip.gpu or 'this GPU'} is frozen"
        order = [("triton", unmeasured), ("cuda", "is compiled for this GPU, and triton cannot serve this call")]
    else:
        return []
    found = tuning.faster(problem.chip, size, problem.d_in, problem.d_out)
    if found is not None:
        first, where = found
        order = [
            (first, f"was measured fastest at the nearest shape, on {where}"),
            *(o for o in order if o[0] != first),
        ]
    return order


def _crossover(prices: tuning.Costs, ratio: float) -> int:
    """The longest sample whose Gram costs no more than a stop at its end; ``ratio`` is d_in d_out / (d_in + d_out).

    Solves ``gram L^2 + gram_token L = epilogue ratio``.
    """
    half = prices.gram_token / (2 * prices.gram)
    return int(math.sqrt(half * half + prices.epilogue * ratio / prices.gram) - half)


def _reasons(problem: Problem, algorithm: str, choice: Choice) -> tuple[str, ...]:
    plan, plain = choice.plan, max(problem.tokens * problem.d_in * problem.d_out, 1)
    wgrad, gram = (f"{cost / plain:.2f} of a plain GEMM" for cost in (choice.wgrad_cost, choice.gram_cost))
    first = f"backend {plan.backend!r} {choice.why}"
    if plan.sums == "gram":
        return (
            first,
            f"norms and sums from all pairs of tokens ({gram}), not from slabs of the weight's gradient ({wgrad})",
        )
    why = "the weight's gradient is wanted" if problem.weight_grad else f"all pairs of tokens: {gram}"
    sums = f"sums from slabs of the weight's gradient ({wgrad}; {why})"
    if plan.gram_tokens >= ALL_TOKENS:
        norms = "samples' norms from Grams: algorithm='gram'"
    elif plan.gram_tokens == 0:
        norms = "samples' norms from the slabs" + (": algorithm='wgrad'" if algorithm == "wgrad" else "")
    else:
        norms = f"samples of at most {plan.gram_tokens} tokens: norm from the Gram; longer ones: from the slabs"
    return first, sums, norms


def explain(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weight_grad: bool = False,
    group_gram: bool = False,
    algorithm: str = "auto",
    backend: str = "auto",
    num_samples: int | None = None,
    num_groups: int | None = None,
) -> Explanation:
    """What ``fused_grad_norm`` would run for these arguments (tensors on "meta" will do), and why. Reads no data.

    Raises what ``fused_grad_norm`` would raise.
    """
    sizes = checks.fused_grad_norm(
        x, dy, cu_seqlens, sample_ids, group_ids, num_samples, num_groups, algorithm, backend, backends.NAMES
    )
    problem = problem_of(sizes, x, weight_grad, group_gram)
    choice = choose(problem, algorithm, backend)
    unable = {name: backends.unable(name, problem.chip.type, problem.dtype) for name in backends.NAMES}
    return Explanation(choice.plan, _reasons(problem, algorithm, choice), unable)


def problem_of(
    sizes: checks.Sizes,
    x: Tensor,
    weight_grad: bool = False,
    group_gram: bool = False,
    pairwise: bool = False,
) -> Problem:
    """The problem that checked arguments make; sizes that only the ids' values tell are taken from the segments.

    ``pairwise`` is for ``grad_gram``: each sample is a group of its own.
    """
    samples = sizes.segments if sizes.samples is None else sizes.samples
    groups = samples if pairwise else 1 if sizes.groups is None else sizes.groups
    shape = (tuning.chip(x.device), sizes.tokens, sizes.d_in, sizes.d_out)
    return Problem(*shape, samples, groups, weight_grad, group_gram or pairwise, x.dtype)
