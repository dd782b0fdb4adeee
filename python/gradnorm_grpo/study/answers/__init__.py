"""The study's six questions answered from its measurements: a verdict, a sentence, numbers and a figure's data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...runlog import plain
from ..measurements import Measurements
from . import arms, estimators, explain, gain, imbalance, last_block
from .common import Run, every_step, pooled, thirds


def answer(measurements: Measurements, estimates: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of answers.json, as strict JSON can hold it: what is not known is None.

    ``estimates``: the content of estimators/seed<seed>.json, one entry a seed; may be empty.
    """
    questions = (imbalance, last_block, gain, explain, arms)
    answers = [question.answer(measurements) for question in questions] + [estimators.answer(estimates)]
    found: dict[str, Any] = plain(
        {
            "answers": answers,
            "runs": [_run(measurements, run) for run in measurements.runs],
            "tasks": measurements.tasks,
            "arms": measurements.arms,
            "seeds": measurements.seeds,
            "missing": measurements.missing,
            "gain_window": measurements.gain_window,
        }
    )
    return found


def _run(m: Measurements, run: Run) -> dict[str, Any]:
    """One run in a few numbers a task: pooled U, reward in the first and last third, accuracy before and after."""
    (u, error), (full, full_error) = pooled(m, run, every_step(m)), pooled(m, run, every_step(m), "full_")
    table = {}
    for k, task in enumerate(m.tasks):
        rewards = m.series(*run, task, "reward")
        early, late = (
            ([r for r in rewards[first:end] if math.isfinite(r)] for first, end in (thirds(m)[:1] + thirds(m)[-1:]))
            if m.steps
            else ([], [])
        )
        _, accuracy, _ = m.evaluation(*run, task)
        table[task] = {
            "u": float(u[k]),
            "u_se": float(error[k]),
            "full_u": float(full[k]),
            "full_u_se": float(full_error[k]),
            "reward_first": float(np.mean(early)) if early else math.nan,
            "reward_last": float(np.mean(late)) if late else math.nan,
            "eval_first": float(accuracy[0]) if len(accuracy) else math.nan,
            "eval_last": float(accuracy[-1]) if len(accuracy) > 1 else math.nan,
        }
    steps = int(np.isfinite(m.array(*run, "prompts")).any(0).sum())
    rollouts = m.array(*run, "rollouts")
    total = float(np.nansum(rollouts)) if np.isfinite(rollouts).any() else math.nan
    return {"arm": run[0], "seed": run[1], "steps": steps, "rollouts": total, "tasks": table}
