"""What a run's lines add up to: pooled gradient norms, gains, and the numbers of the final table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradnorm_kernels import RunningEstimate, TaskGradient

from .metrics import Line


def _mean(values: Sequence[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else math.nan


def gain_at(rewards: Sequence[float | None], t: int, window: int) -> float:
    """``Gain(t)`` = mean reward of the ``window`` steps from t on, minus that of the ``window`` steps before t.

    ``rewards[i]`` is the mean reward of the i-th step, None where the task was not drawn. NaN where either side is
    short or empty.
    """
    if t < window or t + window > len(rewards):
        return math.nan
    return _mean(rewards[t : t + window]) - _mean(rewards[t - window : t])


def series(lines: Sequence[Line], task: str, name: str) -> list[float | None]:
    """One number of a task over the training steps; None where the task was not drawn or the number is not defined."""
    return [line.get(f"tasks/{task}/{name}") for line in lines]


def pooled(lines: Sequence[Line], task: str) -> RunningEstimate:
    """A task's gradient statistics over all lines: numerator and denominator summed apart."""
    estimate = RunningEstimate()
    for line in lines:
        fields = {
            name: line.get(f"tasks/{task}/{key}")
            for name, key in (
                ("sq_norm", "grad_norm_sq"),
                ("std_error", "grad_norm_sq_se"),
                ("noise_scale", "noise_scale"),
                ("plug_in", "plug_in"),
                ("mean_sq_norm", "mean_sq_norm"),
                ("pair_weight", "pair_weight"),
            )
        }
        if fields["sq_norm"] is not None:
            numbers = {name: math.nan if value is None else float(value) for name, value in fields.items()}
            estimate.update(TaskGradient(**numbers, n=int(line[f"tasks/{task}/n"]), std_error_method="none"))
    return estimate


def _cosines(lines: Sequence[Line], tasks: Sequence[str], sq_norms: dict[str, float]) -> dict[str, Any]:
    """Cosines of pooled inner products; each step's is weighed by the number of its pairs."""
    matrix = [[1.0 if a == b and sq_norms[a] > 0 else math.nan for b in tasks] for a in tasks]
    for i, a in enumerate(tasks):
        for j in range(i + 1, len(tasks)):
            b = tasks[j]
            total = weight = 0.0
            for line in lines:
                value = line.get(f"tasks/inner_product/{a}/{b}")
                if value is not None:
                    pairs = line[f"tasks/{a}/n"] * line[f"tasks/{b}/n"]
                    total, weight = total + pairs * value, weight + pairs
            if weight and sq_norms[a] > 0 and sq_norms[b] > 0:
                matrix[i][j] = matrix[j][i] = total / weight / math.sqrt(sq_norms[a] * sq_norms[b])
    return {"tasks": list(tasks), "matrix": matrix, "n_steps": len(lines)}


def _evaluation(evals: Sequence[Line], task: str, place: int) -> float:
    value = evals[place].get(f"eval/{task}/reward") if evals else None
    return math.nan if value is None else float(value)


def summarize(lines: Sequence[Line], tasks: Sequence[str], gain_window: int, seconds: float) -> dict[str, Any]:
    """The content of summary.json."""
    steps = [line for line in lines if line["kind"] in ("train", "probe")]
    evals = [line for line in lines if line["kind"] == "eval"]
    base = [line for line in lines if line["kind"] == "eval_base"]
    estimates = {task: pooled(steps, task) for task in tasks}
    sq_norms = {task: estimate.value for task, estimate in estimates.items()}
    pull = {task: max(value, 0.0) if value == value else 0.0 for task, value in sq_norms.items()}
    third = max(1, len(steps) // 3)
    table: dict[str, Any] = {}
    for task, estimate in estimates.items():
        rewards = series(steps, task, "reward")
        table[task] = {
            "n": estimate.n,
            "grad_norm_sq": estimate.value,
            "grad_norm_sq_se": estimate.std_error,
            "plug_in": estimate.plug_in,
            "noise_scale": estimate.noise_scale,
            "pull_share": pull[task] / sum(pull.values()) if sum(pull.values()) > 0 else math.nan,
            "reward": _mean(rewards[-third:]),
            "reward_first": _mean(rewards[:third]),
            "gain": _mean(
                [gain for t in range(len(rewards)) if not math.isnan(gain := gain_at(rewards, t, gain_window))]
            ),
            "eval_base": _evaluation(base, task, 0),
            "eval_before": _evaluation(evals, task, 0),
            "eval_after": _evaluation(evals, task, -1) if len(evals) > 1 else math.nan,
            "eval_n": evals[-1].get(f"eval/{task}/n", 0) if evals else 0,
            **{
                name: _mean(series(steps, task, name)) for name in ("abs_advantage", "prompt_length", "response_length")
            },
        }
    return {"tasks": table, "cosines": _cosines(steps, tasks, sq_norms), "steps": len(steps), "seconds": seconds}
