"""Estimators of a task's squared gradient norm side by side, on the same stored rollouts of the same model.

The model stands where GRPO would begin, after its warm start. All prompts of a task are measured in the last attention
block, and every inner product of two prompts' gradients is kept: from that one matrix a task, each estimator's value on
any subset of the prompts is arithmetic. The result is one JSON file a seed, with the stored rollouts beside it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import set_seed

from gradnorm_kernels.estimation.estimator import too_few_informative

from ...errors import UserError
from ...folder import describe_run
from ...loop import Batch, Grpo
from ...parse import parse_estimators
from ...probe import only_tracked, untrained
from ...runlog import write_json
from ...settings import Settings
from ...warm_start import warm_start
from .. import stats
from ..spec import EstimatorSettings
from .cost import cost
from .gradients import Layer, capture, gram
from .rollouts import stored_rollouts
from .sketches import bytes_per_prompt, describe_order, describe_task, sketch_grams, unprojected, useless

NOTES = (
    "U is that of the last attention block. A prompt with its whole group is one sample.",
    "A subset of the stored prompts is not a fresh draw: its spread, sd, is that around U of all N, and shrinks to "
    "nothing at n = N. sd_fresh adds the jackknife variance of what all N would give, and holds up to n = N.",
    "Coverage is that of U of all N, by intervals narrowed for the finite pool, at n of at most N / 4.",
    "Biases are exact: means over all subsets of n. Spreads and coverages are over random subsets.",
    "Times are of one machine and its thread count; multiply-adds are by formula.",
)


def estimators(arguments: list[str], console: Console) -> int:
    """The command: options and YAML to :func:`compare`; returns the exit code."""
    settings, block, name = parse_estimators(arguments)
    compare(settings, name, console, options=EstimatorSettings.read(block))
    return 0


def compare(
    settings: Settings,
    name: str,
    console: Console,
    folder: Path | None = None,
    options: EstimatorSettings | None = None,
) -> Path:
    """Compare the estimators for one seed; returns the JSON file.

    Args:
        settings: those of a run; its layers, its sampling and its weighting of tasks play no part.
        name: of the preset.
        console: where progress goes.
        folder: where the file and the stored rollouts go; default: ``output_dir`` or runs/<name>-estimators.
        options: see :class:`EstimatorSettings`.

    Raises:
        UserError: a setting that makes prompts depend on each other, or stored rollouts that do not fit.
    """
    options = options or EstimatorSettings()
    settings = only_what_matters(settings)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    folder = folder or Path(settings.output_dir or f"runs/{name}-estimators")
    grpo = where_grpo_begins(settings, console)
    try:
        with _timed(seconds, "rollouts"):
            path = folder / f"rollouts-seed{settings.seed}.safetensors"
            console.print(f"rollouts: {options.prompts} prompts of each of {len(grpo.tasks)} tasks", highlight=False)
            batch, reused = stored_rollouts(grpo, options.prompts, path)
        console.print(f"rollouts: {path}{' (stored before)' if reused else ''}", highlight=False, soft_wrap=True)
        assert grpo.tracker is not None
        result = describe_run(settings, grpo.model, grpo.tracker.layers) | {
            "name": name,
            "seed": settings.seed,
            "options": dataclasses.asdict(options),
            "group": settings.num_generations,
            "prompts": options.prompts,
            "rollouts": {"file": path.name, "reused": reused},
            **_measure(grpo, batch, options, seconds, console),
            "notes": list(NOTES),
        }
    finally:
        grpo.close()
    result["seconds"] = {**seconds, "total": time.monotonic() - started}
    file = folder / f"seed{settings.seed}.json"
    write_json(file, result)
    for line in _in_words(result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"estimators: {file}, {result['seconds']['total']:.0f} s", highlight=False, soft_wrap=True)
    return file


def _in_words(result: dict[str, Any]) -> list[str]:
    """The comparison in a line an estimator and a width, medians over the tasks."""
    n = stats.pooled_size(result["prompts"])
    lines = [f"at {n} prompts, in units of the mean squared norm, median over the tasks:"]
    for estimator in stats.ESTIMATORS:
        of_task = []
        for task in result["tasks"].values():
            row = next(row for row in task["estimators"] if row["estimator"] == estimator and row["n"] == n)
            scale = task["reference"]["mean_sq_norm"] or math.nan
            of_task.append([row[key] / scale for key in ("bias", "sd_fresh", "rmse")])
        bias, sd, rmse = np.median(of_task, 0)
        lines.append(f"  {estimator.replace('_', ' '):13} bias {bias:8.5f}  spread {sd:8.5f}  RMSE {rmse:8.5f}")
    seconds = {(row["what"], row["width"]): row["seconds"] for row in result["cost"]["rows"]}
    for sketch in result["sketches"]:
        if sketch["skipped"]:
            lines.append(f"sketch {sketch['width']}: left out, {sketch['reason']}")
            continue
        added = np.median([task["u_sd_over_se"] for task in sketch["tasks"].values()])
        lines.append(
            f"sketch {sketch['width']}: moves U by {added:.2f} of its standard error, keeps "
            f"{sketch['bytes_per_prompt'] / 1024:.0f} KiB a prompt instead of "
            f"{sketch['exact_bytes_per_prompt'] / 1024:.0f}, "
            f"{seconds.get(('sketch_gram', sketch['width']), math.nan):.3f} s instead of "
            f"{seconds.get(('gram', None), math.nan):.3f} s"
        )
    return lines


def only_what_matters(settings: Settings) -> Settings:
    """Without what training adds. Every loss type measures the same gradient; grpo's lets a group share its prompt.

    Raises:
        UserError: the settings make prompts depend on each other.
    """
    if settings.scale_rewards == "batch":
        raise UserError(
            "scale_rewards 'batch' makes all prompts depend on each other, and estimators of independent prompts "
            "cannot be compared on them: use 'group' or 'none'"
        )
    measuring: dict[str, Any] = {"track": True, "tracker_layers": "last_attention", "tracker_fused": False}
    training: dict[str, Any] = {"sampling_strategy": "uniform", "task_weighting": "none", "loss_type": "grpo"}
    return dataclasses.replace(settings, **measuring, **training, full_steps=0, gradient_checkpointing=False)


def warm_started(settings: Settings, console: Console) -> Grpo:
    """Model and tasks after the warm start, in the random state from which GRPO starts."""
    grpo = untrained(settings, console)
    if settings.warm_start_steps:
        tasks = list(grpo.tasks.values())
        cached = warm_start(grpo.model, grpo.tokenizer, tasks, grpo.prompter, settings, lambda step, loss: None)
        console.print(f"warm start: {'weights from the cache' if cached else 'done'}", highlight=False)
    set_seed(settings.seed)
    return grpo


def where_grpo_begins(settings: Settings, console: Console) -> Grpo:
    """The same, with gradients of the measured layers alone."""
    grpo = warm_started(settings, console)
    only_tracked(grpo)
    return grpo


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of a part."""
    started = time.monotonic()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.monotonic() - started


def _measure(
    grpo: Grpo, batch: Batch, options: EstimatorSettings, seconds: dict[str, float], console: Console
) -> dict[str, Any]:
    """The parts of the file that come from the gradients. One task's tokens are held at a time."""
    n, seed = stats.pooled_size(options.prompts), grpo.settings.seed
    orders = stats.shuffles(options.prompts, options.subsets, seed)
    tasks: dict[str, Any] = {}
    exact: dict[str, np.ndarray] = {}
    sketched: dict[int, dict[str, np.ndarray]] = {}
    timed: list[Layer] = []
    timed_task = ""
    for name in grpo.tasks:
        first = batch.tasks.index(name)
        with _timed(seconds, "gradients"):
            layers = capture(grpo, batch, first, first + options.prompts)
            exact[name] = gram(layers).numpy()
        tokens = sum(layer.tokens for layer in layers)
        with _timed(seconds, "statistics"):
            rewards = batch.rewards[first : first + options.prompts]
            tasks[name] = {
                "prompts": options.prompts,
                "tokens": tokens,
                "reward": float(rewards.mean()),
                "equal_groups": int((rewards == rewards[:, :1]).all(1).sum()),
                "reference": stats.reference(exact[name]),
                "estimators": stats.compare_estimators(exact[name], orders),
                "microbatches": stats.in_microbatches(exact[name], orders, n),
            }
        with _timed(seconds, "sketches"):
            seeds = [1000 * seed + k for k in range(options.sketches)]
            for width in sorted(options.widths):
                if useless(layers, width) is None:
                    sketched.setdefault(width, {})[name] = sketch_grams(layers, width, seeds)
        if tokens >= sum(layer.tokens for layer in timed):
            timed, timed_task = layers, name
        found = tasks[name]["reference"]
        few = too_few_informative(found["n_effective"], options.prompts)
        ends = few or f"{found['low']:.2e} to {found['high']:.2e}"
        text = f"{name}: U {found['u']:.2e} ({ends}), mean squared norm {found['mean_sq_norm']:.2e}"
        console.print(text, highlight=False, soft_wrap=True)
    sketches: list[dict[str, Any]] = []
    with _timed(seconds, "sketches"):
        for width in sorted(options.widths):
            if (reason := useless(timed, width)) is not None:
                sketches.append({"width": width, "skipped": True, "reason": reason})
                continue
            own = sketched[width]
            errors = {name: tasks[name]["reference"]["u_se"] for name in tasks}
            described = {name: describe_task(exact[name], own[name], errors[name], orders, n) for name in tasks}
            by_token = sum(4 * layer.tokens * (layer.d_in + layer.d_out) for layer in timed)
            sketches.append(
                {
                    "width": width,
                    "skipped": False,
                    "reason": None,
                    "unprojected": unprojected(timed, width),
                    "bytes_per_prompt": bytes_per_prompt(timed, width),
                    "exact_bytes_per_prompt": bytes_per_prompt(timed),
                    "token_bytes_per_prompt": by_token // timed[0].prompts,
                    "tasks": described,
                    "order": describe_order(exact, own),
                }
            )
    with _timed(seconds, "cost"):
        rows = cost(timed, sorted(sketched), options.repeats) if any(layer.tokens for layer in timed) else []
    return {
        "layers": [
            {"name": layer.name, "d_in": layer.d_in - layer.bias, "d_out": layer.d_out, "bias": layer.bias}
            for layer in timed
        ],
        "tasks": tasks,
        "sketches": sketches,
        "cost": {
            "task": timed_task,
            "prompts": options.prompts,
            "tokens": tasks[timed_task]["tokens"],
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "rows": rows,
        },
    }
