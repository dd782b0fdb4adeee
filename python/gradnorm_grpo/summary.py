"""What a run's log says about its tasks: pooled estimates of U, gains, held-out rewards and cosines.

The training loop writes these numbers to summary.json; the terminal's table and the report show them, taken from
summary.json where the run has one, else computed from the log in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradnorm_kernels import RunningEstimate
from gradnorm_kernels.estimation.estimator import too_few_informative

from .numbers import clean
from .runlog import Array, EvalPoint, Line, Run, run_of

NAN = math.nan
# How many standard errors make a difference: the two-sided 95% of a normal, as error bars are commonly read.
ERRORS = 2.0
# Errors estimated from less than this are themselves too uncertain to build on: prompts for U, steps for a cosine.
MIN_PROMPTS = 10
MIN_STEPS = 10


@dataclass(frozen=True)
class TaskResult:
    """One task over the whole run. Numbers are NaN where the run does not hold them."""

    name: str
    index: int  # place in run.json's tasks: fixes the task's colour
    n: float  # prompts
    sq_norm: float  # U, pooled over the steps
    std_error: float
    plug_in: float
    noise_scale: float
    pull_share: float  # max(U, 0) over its sum over the tasks
    reward_first: float  # mean training reward of the first third of the steps
    reward_last: float  # ... of the last third
    gain: float  # mean of Gain(t) over the steps
    base: EvalPoint | None  # the model as given, before the warm start
    before: EvalPoint | None
    after: EvalPoint | None
    abs_advantage: float
    prompt_length: float
    response_length: float
    n_effective: float = NAN  # prompts with a gradient; NaN where the log does not tell

    @property
    def resolved(self) -> bool:
        """Whether U is distinguishable from zero: more than two standard errors above it, from enough prompts."""
        return self.n >= MIN_PROMPTS and not self.caution and self.sq_norm > ERRORS * self.std_error

    @property
    def caution(self) -> str:
        """ "too few informative prompts (3 of 64)" where the standard error of U means little; else ""."""
        return too_few_informative(int(self.n_effective), int(self.n)) if math.isfinite(self.n_effective) else ""

    @property
    def eval_change(self) -> tuple[float, float]:
        """Held-out reward after - before, and its standard error with both evaluations taken as independent."""
        return _difference(self.before, self.after)

    @property
    def warm_start_change(self) -> tuple[float, float]:
        """The same for the supervised warm start: held-out reward before GRPO - that of the model as given."""
        return _difference(self.base, self.before)


def few_with_gradient(results: Sequence[TaskResult]) -> list[str]:
    """A sentence on the tasks whose U is undecided while under a third of their prompts have a gradient.

    It leaves out those of which ``caution`` tells. The other prompts count in n: leaving them out would bias U.
    """
    few = [
        f"{r.n_effective:.0f} of {r.n:.0f} in {clean(r.name)}"
        for r in results
        if math.isfinite(r.sq_norm) and not r.resolved and not r.caution and r.n_effective < r.n / 3
    ]
    what = "Few prompts have a gradient, that is, rewards that are not all equal"
    return [f"{what}: {', '.join(few)}."] if few else []


#: Fields of TaskResult and their keys in summary.json.
_NUMBERS = {
    "n": "n",
    "n_effective": "n_effective",
    "sq_norm": "grad_norm_sq",
    "std_error": "grad_norm_sq_se",
    "plug_in": "plug_in",
    "noise_scale": "noise_scale",
    "reward_last": "reward",
    "reward_first": "reward_first",
    "gain": "gain",
    "abs_advantage": "abs_advantage",
    "prompt_length": "prompt_length",
    "response_length": "response_length",
}
_EVALUATIONS = {"base": "eval_base", "before": "eval_before", "after": "eval_after"}


def _difference(first: EvalPoint | None, second: EvalPoint | None) -> tuple[float, float]:
    if first is None or second is None:
        return NAN, NAN
    return second.reward - first.reward, math.hypot(first.error, second.error)


def _mean(values: Sequence[float | None] | Array) -> float:
    """Mean of what is known; NaN where nothing is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(sum(known) / len(known)) if known else NAN


def gain_at(rewards: Sequence[float | None] | Array, t: int, window: int) -> float:
    """``Gain(t)`` = mean reward of the ``window`` steps from t on, minus that of the ``window`` steps before t.

    ``rewards[i]`` is the mean reward of the i-th step, None or NaN where the task was not drawn. NaN where either side
    is short or empty.
    """
    if t < window or t + window > len(rewards):
        return NAN
    return _mean(rewards[t : t + window]) - _mean(rewards[t - window : t])


def running_estimate(run: Run, task: str) -> tuple[Array, Array, RunningEstimate]:
    """The estimate pooled up to each step: value [steps], standard error [steps], and the final state."""
    pooled = RunningEstimate()
    value, error = np.full((2, len(run.steps)), NAN)
    for i, gradient in enumerate(run.gradients(task)):
        pooled.update(gradient)
        value[i], error[i] = pooled.value, pooled.std_error
    return value, error, pooled


def task_results(run: Run) -> list[TaskResult]:
    """Every task's numbers, loudest first (unknown U last): summary.json's where it holds a key, else the log's."""
    results = [_with_summary(run, _from_log(run, index)) for index in range(len(run.tasks))]
    results.sort(key=lambda r: (math.isnan(r.sq_norm), -r.sq_norm if math.isfinite(r.sq_norm) else 0.0, r.index))
    total = sum(max(r.sq_norm, 0.0) for r in results if math.isfinite(r.sq_norm))
    return [
        replace(r, pull_share=max(r.sq_norm, 0.0) / total if total > 0 and math.isfinite(r.sq_norm) else NAN)
        for r in results
    ]


def _from_log(run: Run, index: int) -> TaskResult:
    task = run.tasks[index]
    series, points, base = run.series[task], run.evals[task], run.base[task]
    pooled = running_estimate(run, task)[2]
    third = max(1, len(run.steps) // 3)
    return TaskResult(
        name=task,
        index=index,
        n=float(pooled.n),
        n_effective=NAN if pooled.n_effective is None or not pooled.n else float(pooled.n_effective),
        sq_norm=pooled.value,
        std_error=pooled.std_error,
        plug_in=pooled.plug_in,
        noise_scale=pooled.noise_scale,
        pull_share=NAN,
        reward_first=_mean(series["reward"][:third]),
        reward_last=_mean(series["reward"][-third:]),
        gain=_mean(series["learning_gain"]),
        base=base[0] if base else None,
        before=points[0] if points and points[0].step == 0 else None,
        after=points[-1] if points and points[-1].step > 0 else None,
        abs_advantage=_mean(series["abs_advantage"]),
        prompt_length=_mean(series["prompt_length"]),
        response_length=_mean(series["response_length"]),
    )


def _with_summary(run: Run, found: TaskResult) -> TaskResult:
    """The result with the numbers that summary.json gives the task; null is NaN."""
    entry: Any = run.summary["tasks"].get(found.name) if run.summary else None
    if not isinstance(entry, dict):
        return found
    numbers = {k: NAN if v is None else v for k, v in entry.items() if not isinstance(v, bool)}
    given = {k: float(v) for k, v in numbers.items() if isinstance(v, (int, float))}
    changes: dict[str, Any] = {field: given[key] for field, key in _NUMBERS.items() if key in given}
    for field, key in _EVALUATIONS.items():
        if getattr(found, field) is None and math.isfinite(given.get(key, NAN)):
            step = len(run.steps) if field == "after" else 0
            changes[field] = EvalPoint(step, given[key], NAN, given.get("eval_n", NAN))
    return replace(found, **changes)


@dataclass(frozen=True)
class Cosine:
    """Pooled cosine of two tasks' expected gradients; `trusted` when both tasks' U are distinguishable from zero."""

    value: float
    std_error: float
    trusted: bool


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
        value, error = _weighted_mean(inner, run.series[a]["n"] * run.series[b]["n"])
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


def summarize(lines: Sequence[Line], tasks: Sequence[str], gain_window: int, seconds: float) -> dict[str, Any]:
    """The content of summary.json.

    Arguments: lines, of metrics.jsonl; tasks, the names in the run's order; gain_window, steps on either side of t in
    Gain(t); seconds, duration of the run.
    """
    run = run_of(lines, tasks)
    by_name = {result.name: result for result in task_results(run)}
    pairs = cosines(run, list(by_name.values()))
    table: dict[str, Any] = {}
    for task in tasks:
        result, points, rewards = by_name[task], run.evals[task], run.series[task]["reward"]
        entry: dict[str, Any] = {key: getattr(result, field) for field, key in _NUMBERS.items()}
        entry |= {"n": int(result.n), "pull_share": result.pull_share}
        # A log of the loop alone, as of a probe, holds no Gain(t).
        entry["gain"] = _mean([gain_at(rewards, t, gain_window) for t in range(len(rewards))])
        held_out = {key: getattr(result, field) for field, key in _EVALUATIONS.items()}
        entry |= {key: point.reward if point else NAN for key, point in held_out.items()}
        entry["eval_n"] = int(points[-1].n) if points and math.isfinite(points[-1].n) else 0
        table[task] = entry

    def cosine(a: str, b: str) -> float:
        return (1.0 if by_name[a].sq_norm > 0 else NAN) if a == b else pairs[a, b].value

    matrix = [[cosine(a, b) for b in tasks] for a in tasks]
    return {
        "tasks": table,
        "cosines": {"tasks": list(tasks), "matrix": matrix, "n_steps": len(run.steps)},
        "steps": len(run.steps),
        **({"final_probe": _summarize_probe(run.final_probe)} if run.final_probe else {}),
        "seconds": seconds,
    }


#: What a final probe has of _NUMBERS: at fixed weights there is neither a first third of the steps nor a gain.
_PROBED = {k: v for k, v in _NUMBERS.items() if k not in ("reward_first", "gain")}


def _summarize_probe(run: Run) -> dict[str, Any]:
    """The entry ``final_probe`` of summary.json: the steps before it, and every task's numbers."""
    tasks = {
        result.name: {key: getattr(result, field) for field, key in _PROBED.items()}
        | {"n": int(result.n), "pull_share": result.pull_share}
        for result in task_results(run)
    }
    return {"step": int(run.steps[-1]), "tasks": tasks}
