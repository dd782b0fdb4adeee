"""What a step returns: the tasks' estimates and their inner products; and reading back what was kept of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..estimation.estimator import RunningEstimate, TaskGradient
from ..estimation.moments import informative, moments
from .accumulate import StepResult


class StepStats(dict[Hashable, TaskGradient]):
    """``{task: TaskGradient}`` for one step, with the tasks' inner products beside it.

    Attributes:
        tasks: the K tasks, in the order of the matrices' rows.
        inner_products: [K, K] float64, ``<E G_a, E G_b>`` unbiased; the diagonal is U. NaN where no pair was seen
            together, and off the diagonal with ``errors="steps"``.
        inner_products_se: [K, K] float64, jackknife standard errors.
        cosines: [K, K] float64, ``M_ab / sqrt(U_a U_b)``; NaN where a U is not positive.
        cosines_se: [K, K] float64, jackknife standard errors (0 on the diagonal).
        accumulate: which pairs the estimates are of: "pairs", "exact" or "sketch"; "" for a step without estimates.
        errors: what standard errors come from: "samples", a jackknife in this step; "tasks" and "steps", none in this
            step: ``tracker.running`` has them from the spread over steps. Sketches always give "samples".
    """

    tasks: list[Hashable]
    inner_products: Tensor
    inner_products_se: Tensor
    cosines: Tensor
    cosines_se: Tensor
    accumulate: str = ""
    errors: str = "samples"


def step_stats(found: StepResult) -> StepStats:
    """The estimates of one step."""
    stats, sums = StepStats(), found.sums
    tasks = stats.tasks = list(sums.tasks)
    result = moments(sums, found.exact, found.variance)
    stats.inner_products, stats.inner_products_se = result.inner_products, result.inner_products_se
    stats.cosines, stats.cosines_se = result.cosines, result.cosines_se
    stats.accumulate, stats.errors = found.mode if tasks else "", found.errors
    samples = list(sums.sample_task)
    own_task = torch.tensor([sums.sample_task[p] for p in samples], dtype=torch.long, device="cpu")
    sq_norms = torch.tensor([sums.sample_sq[p] for p in samples], dtype=torch.float64, device="cpu")
    counts = torch.bincount(own_task, minlength=len(tasks)).tolist()
    with_gradient = informative(sq_norms, own_task, len(tasks)).tolist()
    method = "jackknife over folds" if found.folded else "jackknife over samples"
    if found.sketched:
        method += ", sketched"
    elif found.exact is not None:
        method += " inside micro-batches, an upper bound"
    for k, task in enumerate(tasks):
        error = float(result.std_error[k])
        stats[task] = TaskGradient(
            sq_norm=float(result.sq_norm[k]),
            std_error=error,
            noise_scale=float(result.noise_scale[k]),
            plug_in=float(result.plug_in[k]),
            n=counts[k],
            mean_sq_norm=float(result.mean_sq_norm[k]),
            pair_weight=float(result.pair_weight[k]),
            std_error_method="none" if error != error else method,
            n_effective=with_gradient[k],
        )
    return stats


def read_state(state: Any) -> tuple[dict[Hashable, RunningEstimate], dict[str, Any]]:
    """({task: its running estimate}, what the accumulation kept) of a tracker's ``state_dict()``.

    Raises:
        ValueError: it is the state of something else.
    """
    running: dict[Hashable, RunningEstimate] = {}
    try:
        for task, entry in state["running"]:
            running[task] = RunningEstimate()
            running[task].load_state_dict(entry)
        return running, dict(state.get("accumulation", {}))  # older states have none
    except (KeyError, TypeError, ValueError) as error:
        what = f"the entries {list(state)}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"state must be what GradNormTracker.state_dict() returned, got {what} ({error})") from error
