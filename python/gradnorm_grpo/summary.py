"""summary.json: what a run's lines add up to. Pooled gradient norms, gains, and the numbers of the final table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gradnorm_kernels.estimation.metrics import pool

from .runlog import STEP_KINDS, Line, eval_points, pair_column, task_column


def _mean(values: Iterable[float | None]) -> float:
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def gain_at(rewards: Sequence[float | None], t: int, window: int) -> float:
    """``Gain(t)`` = mean reward of the ``window`` steps from t on, minus that of the ``window`` steps before t.

    ``rewards[i]`` is the mean reward of the i-th step, None or NaN where the task was not drawn. NaN where either side
    is short or empty.
    """
    if t < window or t + window > len(rewards):
        return math.nan
    return _mean(rewards[t : t + window]) - _mean(rewards[t - window : t])


def _cosines(lines: Sequence[Line], tasks: Sequence[str], sq_norms: dict[str, float]) -> dict[str, Any]:
    """Cosines of pooled inner products; each step's is weighted by its number of pairs."""
    matrix = [[1.0 if a == b and sq_norms[a] > 0 else math.nan for b in tasks] for a in tasks]
    counts = {task: task_column(lines, task, "n").tolist() for task in tasks}
    for i, a in enumerate(tasks):
        for j, b in enumerate(tasks[i + 1 :], i + 1):
            total = weight = 0.0
            for value, n_a, n_b in zip(pair_column(lines, "inner_product", a, b), counts[a], counts[b], strict=True):
                if not math.isnan(value):
                    total, weight = total + n_a * n_b * float(value), weight + n_a * n_b
            if weight and sq_norms[a] > 0 and sq_norms[b] > 0:
                matrix[i][j] = matrix[j][i] = total / weight / math.sqrt(sq_norms[a] * sq_norms[b])
    return {"tasks": list(tasks), "matrix": matrix, "n_steps": len(lines)}


def summarize(lines: Sequence[Line], tasks: Sequence[str], gain_window: int, seconds: float) -> dict[str, Any]:
    """The content of summary.json."""
    steps = [line for line in lines if line["kind"] in STEP_KINDS]
    estimates = {task: pool(steps, task) for task in tasks}
    sq_norms = {task: estimate.value for task, estimate in estimates.items()}
    pull = {task: max(value, 0.0) if value == value else 0.0 for task, value in sq_norms.items()}
    third = max(1, len(steps) // 3)
    table: dict[str, Any] = {}
    for task, estimate in estimates.items():
        rewards = task_column(steps, task, "reward").tolist()
        base, evals = eval_points(lines, task, "eval_base"), eval_points(lines, task)
        table[task] = {
            "n": estimate.n,
            "grad_norm_sq": estimate.value,
            "grad_norm_sq_se": estimate.std_error,
            "plug_in": estimate.plug_in,
            "noise_scale": estimate.noise_scale,
            "pull_share": pull[task] / sum(pull.values()) if sum(pull.values()) > 0 else math.nan,
            "reward": _mean(rewards[-third:]),
            "reward_first": _mean(rewards[:third]),
            "gain": _mean(gain_at(rewards, t, gain_window) for t in range(len(rewards))),
            "eval_base": base[0].reward if base else math.nan,
            "eval_before": evals[0].reward if evals else math.nan,
            "eval_after": evals[-1].reward if len(evals) > 1 else math.nan,
            "eval_n": int(evals[-1].n) if evals else 0,
            **{
                name: _mean(task_column(steps, task, name).tolist())
                for name in ("abs_advantage", "prompt_length", "response_length")
            },
        }
    return {"tasks": table, "cosines": _cosines(steps, tasks, sq_norms), "steps": len(steps), "seconds": seconds}
