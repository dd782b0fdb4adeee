"""What a run says about its tasks: pooled estimates, what may be told apart from zero, the imbalance, the cosines."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradnorm_kernels import RunningEstimate, TaskGradient

from .reading import Array, EvalPoint, Run

NAN = math.nan
# How many standard errors make a difference: the two-sided 95% of a normal, as error bars are commonly read.
ERRORS = 2.0
# Errors found from less than this are themselves too uncertain to build on: prompts for U, steps for a cosine.
MIN_PROMPTS = 10
MIN_STEPS = 10


def _difference(first: EvalPoint | None, second: EvalPoint | None) -> tuple[float, float]:
    if first is None or second is None:
        return NAN, NAN
    return second.reward - first.reward, math.hypot(first.error, second.error)


@dataclass(frozen=True)
class TaskResult:
    """One task over the whole run. Numbers are NaN where the run does not hold them."""

    name: str
    index: int  # place in run.json's tasks: fixes the task's colour
    n: float
    sq_norm: float
    std_error: float
    plug_in: float
    noise_scale: float
    pull_share: float
    reward_first: float
    reward_last: float
    gain: float
    base: EvalPoint | None  # the model as it was given, before the warm start
    before: EvalPoint | None
    after: EvalPoint | None
    abs_advantage: float
    prompt_length: float
    response_length: float

    @property
    def resolved(self) -> bool:
        """Whether U lies more than two standard errors above zero; false where either is unknown or of few prompts."""
        return self.n >= MIN_PROMPTS and self.sq_norm > ERRORS * self.std_error

    @property
    def eval_change(self) -> tuple[float, float]:
        """Held-out reward after - before, and its standard error with both evaluations taken as independent."""
        return _difference(self.before, self.after)

    @property
    def warm_start_change(self) -> tuple[float, float]:
        """The same for the supervised warm start: held-out reward before GRPO - that of the model as it was given."""
        return _difference(self.base, self.before)


@dataclass(frozen=True)
class Imbalance:
    """U of the loudest task over U of the quietest, among the tasks told apart from zero, with Fieller's interval."""

    loudest: TaskResult
    quietest: TaskResult
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Cosine:
    """Pooled cosine of two tasks' expected gradients; `trusted` when both tasks' U are told apart from zero."""

    value: float
    std_error: float
    trusted: bool


def estimate_steps(run: Run, task: str) -> Iterable[TaskGradient]:
    """The steps' estimates of one task as the library's own type, in order."""
    s = run.series[task]
    rows = zip(
        *(
            s[k]
            for k in ("grad_norm_sq", "grad_norm_sq_se", "noise_scale", "plug_in", "mean_sq_norm", "n", "pair_weight")
        ),
        strict=True,
    )
    for u, se, noise, plug, mean, n, pairs in rows:
        count = int(n) if math.isfinite(n) else 0
        # A log without pair weights held whole prompts: n (n - 1) ordered pairs.
        weight = pairs if math.isfinite(pairs) else float(count * (count - 1))
        yield TaskGradient(float(u), float(se), float(noise), float(plug), count, float(mean), float(weight), "none")


def running_estimate(run: Run, task: str) -> tuple[Array, Array, RunningEstimate]:
    """The estimate pooled up to each step: value [steps], standard error [steps], and the final state."""
    pooled = RunningEstimate()
    value, error = np.full((2, len(run.steps)), NAN)
    for i, gradient in enumerate(estimate_steps(run, task)):
        pooled.update(gradient)
        value[i], error[i] = pooled.value, pooled.std_error
    return value, error, pooled


def mean(values: Array) -> float:
    """Mean over what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else NAN


def task_results(run: Run) -> list[TaskResult]:
    """Every task's numbers, loudest first (unknown U last): summary.json's where it holds a key, else the log's."""
    pooled = {task: running_estimate(run, task)[2] for task in run.tasks}
    results = []
    for index, task in enumerate(run.tasks):
        estimate, series, points = pooled[task], run.series[task], run.evals[task]
        before = points[0] if points and points[0].step == 0 else None
        after = points[-1] if points and points[-1].step > 0 else None
        third = len(run.steps) // 3  # no thirds of a run shorter than three steps
        given = _summary_of(run, task)
        results.append(
            TaskResult(
                name=task,
                index=index,
                n=given.get("n", float(np.nansum(series["n"]))),
                sq_norm=given.get("grad_norm_sq", estimate.value),
                std_error=given.get("grad_norm_sq_se", estimate.std_error),
                plug_in=given.get("plug_in", estimate.plug_in),
                noise_scale=given.get("noise_scale", estimate.noise_scale),
                pull_share=NAN,
                reward_first=given.get("reward_first", mean(series["reward"][:third])),
                reward_last=given.get("reward", mean(series["reward"][len(run.steps) - third :])),
                gain=given.get("gain", mean(series["learning_gain"])),
                base=run.base[task][0] if run.base[task] else _summary_eval(given, "eval_base", 0),
                before=before or _summary_eval(given, "eval_before", 0),
                after=after or _summary_eval(given, "eval_after", len(run.steps)),
                abs_advantage=given.get("abs_advantage", mean(series["abs_advantage"])),
                prompt_length=given.get("prompt_length", mean(series["prompt_length"])),
                response_length=given.get("response_length", mean(series["response_length"])),
            )
        )
    results.sort(key=lambda r: (math.isnan(r.sq_norm), -r.sq_norm if math.isfinite(r.sq_norm) else 0.0, r.index))
    total = sum(max(r.sq_norm, 0.0) for r in results if math.isfinite(r.sq_norm))
    return [_with_share(r, total) for r in results]


def _with_share(result: TaskResult, total: float) -> TaskResult:
    share = max(result.sq_norm, 0.0) / total if total > 0 and math.isfinite(result.sq_norm) else NAN
    return TaskResult(**{**result.__dict__, "pull_share": share})


def _summary_of(run: Run, task: str) -> dict[str, float]:
    entry: Any = run.summary["tasks"].get(task) if run.summary else None
    if not isinstance(entry, dict):
        return {}
    numbers = {k: NAN if v is None else v for k, v in entry.items()}
    return {k: float(v) for k, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _summary_eval(given: dict[str, float], key: str, step: int) -> EvalPoint | None:
    reward = given.get(key, NAN)
    return EvalPoint(step, reward, NAN, given.get("eval_n", NAN)) if math.isfinite(reward) else None


def imbalance(results: list[TaskResult]) -> Imbalance | None:
    """The loudest against the quietest of the resolved tasks; None where fewer than two are resolved.

    Fieller's 2-standard-error interval of a ratio a/b of independent normal estimates: the roots r of
    (a - r b)^2 = z^2 (se_a^2 + r^2 se_b^2), finite because b is resolved (b > z se_b).
    """
    resolved = [r for r in results if r.resolved]
    if len(resolved) < 2:
        return None
    top, low = max(resolved, key=lambda r: r.sq_norm), min(resolved, key=lambda r: r.sq_norm)
    a, b = top.sq_norm, low.sq_norm
    va, vb = (ERRORS * top.std_error) ** 2, (ERRORS * low.std_error) ** 2
    spread = math.sqrt(max((a * b) ** 2 - (a * a - va) * (b * b - vb), 0.0))
    return Imbalance(top, low, a / b, (a * b - spread) / (b * b - vb), (a * b + spread) / (b * b - vb))


def cosines(run: Run, results: list[TaskResult]) -> dict[tuple[str, str], Cosine]:
    """Pooled cosines <a, b> / sqrt(U_a U_b) of every pair of tasks (both orders), NaN where a U is not positive.

    Inner products are pooled over the steps where both tasks were drawn, weighted by n_a n_b; their standard error is
    that of the spread between those steps (MIN_STEPS or more). The cosine's adds the two U's by the delta method.
    """
    by_name = {r.name: r for r in results}
    matrix = _summary_cosines(run)
    table = {}
    for (a, b), inner in run.inner_products.items():
        ra, rb = by_name[a], by_name[b]
        weight = run.series[a]["n"] * run.series[b]["n"]
        value, error = _weighted_mean(inner, weight)
        scale = math.sqrt(ra.sq_norm * rb.sq_norm) if ra.sq_norm > 0 and rb.sq_norm > 0 else NAN
        cosine = matrix.get((a, b), value / scale)
        relative = math.hypot(ra.std_error / ra.sq_norm, rb.std_error / rb.sq_norm) if scale > 0 else NAN
        pair = Cosine(cosine, math.hypot(error / scale, cosine / 2 * relative), ra.resolved and rb.resolved)
        table[a, b] = table[b, a] = pair
    return table


def _weighted_mean(values: Array, weight: Array) -> tuple[float, float]:
    known = np.isfinite(values) & (weight > 0)
    if not known.any():
        return NAN, NAN
    v, w = values[known], weight[known] / weight[known].sum()
    centre = float(w @ v)
    count = len(v)
    error = math.sqrt(count / (count - 1) * float(w**2 @ (v - centre) ** 2)) if count >= MIN_STEPS else NAN
    return centre, error


def _summary_cosines(run: Run) -> dict[tuple[str, str], float]:
    entry: Any = (run.summary or {}).get("cosines")
    try:
        names, rows = entry["tasks"], entry["matrix"]
        return {
            (a, b): NAN if rows[i][j] is None else float(rows[i][j])
            for i, a in enumerate(names)
            for j, b in enumerate(names)
        }
    except (TypeError, KeyError, IndexError, ValueError):
        return {}  # no matrix in the summary: the log's inner products stand


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float]:
    """Spearman's rank correlation of two equally long lists and its two-sided permutation p-value.

    The p-value is (1 + permutations at least as correlated) / (1 + permutations) over 20,000 seeded permutations.
    """
    rx, ry = _ranks(x), _ranks(y)
    rx, ry = rx - rx.mean(), ry - ry.mean()
    norm = math.sqrt(float(rx @ rx) * float(ry @ ry))
    if norm == 0:
        return NAN, NAN
    rho = float(rx @ ry) / norm
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(ry, (20_000, 1)), axis=1) @ rx / norm
    return rho, (1 + int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())) / 20_001


def _ranks(values: list[float]) -> Array:
    _, inverse, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
