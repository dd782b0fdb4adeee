"""Does a task's gradient keep its direction from step to step? Inner products of prompts that are some steps apart.

With ``g_t`` the mean gradient of a task's n prompts of step t, at the weights of that step, and U_t their cross-product
estimate of the squared gradient norm::

    L(0) = mean over t of U_t,    L(k) = mean over t of <g_t, g_(t+k)>,    share(k) = L(k) / L(0)

A product of two steps needs no correction: their prompts are different ones. If the gradient kept its direction and
size, share would be 1, and the pairs of several steps could be pooled for a smaller error. Pooling all lags up to m as
estimates of U_t has the relative bias ``sum_k w_k (share(k) - 1)``, w_k the weight of lag k: n (n - 1) ordered pairs
within a step, 2 n^2 with each earlier one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from gradnorm_kernels.estimation.metrics import task_key

from .. import plots
from ..errors import UserError
from ..folder import describe_run
from ..loop import Batch, Grpo
from ..numbers import fixed, markdown_table, percent
from ..parse import parse_lags
from ..probe import subset
from ..progress import Display
from ..runlog import write_json
from ..settings import Settings
from .estimators.comparison import warm_started
from .stats import Array, Interval, t_interval

#: The lags that are recorded: up to this, and to half of the steps.
LONGEST = 40
#: The lags of the table.
SHOWN = (1, 2, 3, 5, 10, 20, 40)
#: A relative bias of U that pooling may have, beside an error that is rarely below a quarter of U.
ALLOWED = 0.1


def lags(arguments: list[str], console: Console) -> int:
    """The command: one training run per seed, each in a file of its own, and the table and figure of all of them."""
    settings, seeds, name = parse_lags(arguments)
    if settings.max_steps < 4 or not settings.track:
        raise UserError("lags needs track=true and max_steps of at least 4: products are taken between steps")
    if settings.loss_type != "grpo" or settings.gradient_accumulation_steps > 1:
        raise UserError(
            "lags needs loss_type='grpo' and gradient_accumulation_steps=1, so that the loss of a task's prompts is "
            f"their mean; got {settings.loss_type!r} and {settings.gradient_accumulation_steps}"
        )
    folder = Path(settings.output_dir or f"runs/{name}-lags")
    folder.mkdir(parents=True, exist_ok=True)
    results = [measure(dataclasses.replace(settings, seed=seed), name, folder, console) for seed in seeds]
    console.print(table(results), highlight=False, soft_wrap=True)
    with plots.theme():
        plots.save_svg(draw(results), folder / "lags.svg", sentence(results))
    return 0


def measure(settings: Settings, name: str, folder: Path, console: Console) -> dict[str, Any]:
    """Train with one seed and write the products of its steps' gradients to ``seed<N>.json``, whose content returns."""
    started = time.monotonic()
    grpo = warm_started(settings, console)
    vectors: dict[str, list[Array]] = {task: [] for task in grpo.tasks}
    found: dict[str, list[tuple[float, float]]] = {task: [] for task in grpo.tasks}
    assert grpo.tracker is not None
    try:
        with Display(console, f"seed {settings.seed}", list(grpo.tasks), settings.max_steps) as display:

            def look(batch: Batch) -> None:
                for task, kept in vectors.items():
                    kept.append(mean_gradient(grpo, batch, task))

            for _ in range(settings.max_steps):
                line = grpo.step(look)
                display.show({**line, "time": time.monotonic() - started})
                for task, kept in found.items():
                    kept.append(tuple(line.get(task_key(task, key), math.nan) for key in ("grad_norm_sq", "n")))
        result = describe_run(settings, grpo.model, grpo.tracker.layers) | {
            "name": name,
            "seed": settings.seed,
            "seconds": time.monotonic() - started,
            "tasks": {task: products(np.stack(vectors[task]), found[task]) for task in grpo.tasks},
        }
    finally:
        grpo.close()
    write_json(folder / f"seed{settings.seed}.json", result)
    return result


def mean_gradient(grpo: Grpo, batch: Batch, task: str) -> Array:
    """[d] float32: the mean of the gradients of the task's prompts in the measured layers; NaN where it has none."""
    assert grpo.tracker is not None
    layers = [grpo.model.get_submodule(name) for name in grpo.tracker.layers]
    measured = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]
    prompts = torch.tensor([i for i, name in enumerate(batch.tasks) if name == task], dtype=torch.long)
    if not len(prompts):
        return np.full(sum(p.numel() for p in measured), np.nan, np.float32)
    part = dataclasses.replace(subset(batch, prompts), weights=None)
    grpo.optimizer.zero_grad(set_to_none=True)
    grpo.accumulate(part, [], [])
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in measured]
    vector = torch.cat([gradient.flatten() for gradient in zero]).float().cpu().numpy().copy()
    grpo.optimizer.zero_grad(set_to_none=True)
    return vector


def products(vectors: Array, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One task: U and the number of prompts of each step, and for each lag how many products, and their mean.

    vectors: [T, d], the mean gradient of each step. found: (U, n) of each step.
    """
    gram = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    rows = []
    for lag in range(1, min(LONGEST, len(gram) // 2) + 1):
        values = np.diagonal(gram, lag)
        values = values[np.isfinite(values)]
        rows.append({"lag": lag, "products": len(values), "mean": float(values.mean()) if len(values) else None})
    u = [value for value, _ in found]
    return {"u": u, "n": [n for _, n in found], "lags": rows}


# Reading the results


def shares(results: Sequence[dict[str, Any]], lag: int, tasks: Sequence[str] | None = None) -> Interval:
    """share(lag) with its interval over seeds: of each seed, the sum of L(lag) over ``tasks`` by that of L(0)."""
    each = []
    for result in results:
        chosen = [found for task, found in result["tasks"].items() if tasks is None or task in tasks]
        rows = [next((row for row in found["lags"] if row["lag"] == lag), None) for found in chosen]
        within = sum(float(np.nanmean(np.array(found["u"], float))) for found in chosen)
        if within > 0 and all(row is not None and row["mean"] is not None for row in rows):
            each.append(sum(row["mean"] for row in rows if row is not None) / within)
    return t_interval(each)


def bias(results: Sequence[dict[str, Any]], longest: int) -> float:
    """The relative bias of U when all pairs up to ``longest`` steps apart are pooled, from the shares of all tasks."""
    n = float(np.nanmean([float(np.nanmean(t["n"])) for result in results for t in result["tasks"].values()]))
    weights = [2 * n * n] * longest
    total = n * (n - 1) + sum(weights)
    return sum(w * (shares(results, lag).value - 1) for lag, w in enumerate(weights, 1)) / total


def poolable(results: Sequence[dict[str, Any]]) -> int:
    """The longest lag up to which pooling is biased by at most ALLOWED; 0 where one step apart is too far."""
    last = _last(results)
    return next((lag - 1 for lag in range(1, last + 1) if not abs(bias(results, lag)) <= ALLOWED), last)


def _last(results: Sequence[dict[str, Any]]) -> int:
    return min((len(found["lags"]) for result in results for found in result["tasks"].values()), default=0)


def sentence(results: Sequence[dict[str, Any]]) -> str:
    """What the products say, in one sentence."""
    one, lag = shares(results, 1), poolable(results)
    may = f"pairs up to {lag} steps apart may be pooled" if lag else "pairs of different steps may not be pooled"
    return (
        f"One step apart the inner product is {percent(one.value)} of U, so {may}: one step would bias U by "
        f"{percent(bias(results, 1))}."
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each lag of SHOWN the share of all tasks and of each, and the bias of pooling up to it."""
    tasks = list(results[0]["tasks"])
    cells = []
    for lag in (lag for lag in SHOWN if lag <= _last(results)):
        found = shares(results, lag)
        each = [fixed(shares(results, lag, [task]).value) for task in tasks]
        ends = f"{fixed(found.low)} to {fixed(found.high)}" if math.isfinite(found.low) else "–"
        cells.append([str(lag), fixed(found.value), ends, percent(bias(results, lag)), *each])
    heads = ["steps apart", "share of U", "95% interval over seeds", "bias of pooling", *tasks]
    return markdown_table(heads, cells)


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """share against the lag: all tasks with the interval over seeds, and each seed as a thin line."""
    x = list(range(1, _last(results) + 1))
    found = [shares(results, lag) for lag in x]
    notes = [
        "Inner products of the mean gradients of two steps, by U within a step; all tasks together. Thin lines: single "
        "seeds. Bars: 95% intervals over seeds."
    ]
    figure = plots.sheet("How long a gradient keeps its direction", "", notes, 260)
    axes = figure.subplots()
    for result in results:
        axes.plot(x, [shares([result], lag).value for lag in x], color=plots.COLOURS["task-0"][0], alpha=0.3, lw=0.8)
    axes.plot(x, [point.value for point in found], color=plots.COLOURS["task-0"][0], lw=1.6)
    for lag, point in zip(x, found, strict=True):
        if math.isfinite(point.low):
            axes.plot([lag, lag], [point.low, point.high], color=plots.COLOURS["task-0"][0], lw=0.8)
    ends = [end for point in found for end in (point.low, point.high) if math.isfinite(end)]
    plots.linear(axes, "y", np.array([0.0, 1.0, *ends]))
    plots.zero_line(axes, "y")
    axes.set_xlabel("steps apart")
    axes.set_ylabel("share of U")
    return figure
