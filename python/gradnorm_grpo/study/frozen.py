"""`study --frozen`: every task measured at fixed weights, after the warm start, in several layers side by side.

A run is one seed: its warm start, then ``steps`` rounds of ``prompts`` prompts of every task. A round of one task is
one part: rollouts, one forward and backward, U of every choice of layers over all pairs of the part's prompts. Parts
are kept in parts.jsonl as they are measured, each with random numbers of its own, so that an interrupted run continues
with the next part and ends with the same numbers. At the end the parts become a log of "probe" steps, which the study's
questions read as they read training steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from gradnorm_kernels import GradNormTracker, StepStats
from gradnorm_kernels.estimation.metrics import gradient_metrics, task_key

from ..errors import UserError
from ..folder import describe_run
from ..loop import Batch, Grpo, describe
from ..numbers import fixed, significant
from ..probe import untrained
from ..runlog import FULL, LOG_FILE, RUN_FILE, SUMMARY_FILE, Line, RunLog, plain, read_log, write_json
from ..settings import Settings
from ..summary import summarize
from ..warm_start import warm_start
from .estimators.gradients import prompt_losses
from .spec import FrozenSettings

PARTS_FILE = "parts.jsonl"


def measure(settings: Settings, options: FrozenSettings, console: Console) -> Path:
    """One run: measure what its folder still lacks; returns the folder.

    Raises:
        UserError: the folder holds a run with other settings, or prompts that depend on each other.
    """
    started, folder = time.monotonic(), Path(settings.output_dir)
    if settings.scale_rewards == "batch":
        raise UserError("scale_rewards 'batch' makes all prompts depend on each other: use 'group' or 'none'")
    measuring: dict[str, Any] = {"track": True, "tracker_layers": "last_attention", "tracker_fused": False}
    settings = dataclasses.replace(settings, **measuring, full_steps=0)
    grpo = untrained(settings, console)
    trackers: dict[str, GradNormTracker] = {}
    try:
        assert grpo.tracker is not None
        described = describe_run(settings, grpo.model, grpo.tracker.layers) | {"frozen": dataclasses.asdict(options)}
        _refuse_another(folder, described)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, described)
        if settings.warm_start_steps:
            tasks = list(grpo.tasks.values())
            cached = warm_start(grpo.model, grpo.tokenizer, tasks, grpo.prompter, settings, lambda step, loss: None)
            console.print(f"warm start: {'weights from the cache' if cached else 'done'}", highlight=False)
        # Measured is every parameter's gradient, also of layers that the warm start left as they were.
        grpo.model.requires_grad_(True)
        trackers[""] = grpo.tracker
        for name, layers in options.proxies.items():
            trackers[f"{name}_"] = GradNormTracker(grpo.model, layers, accumulate="pairs")
        if options.full_steps:
            trackers[FULL] = GradNormTracker(grpo.model, "all", accumulate="pairs")
        described["layers"] = {key.rstrip("_") or "last": tracker.layers for key, tracker in trackers.items()}
        write_json(folder / RUN_FILE, described)
        parts = _parts(grpo, options, trackers, folder / PARTS_FILE, console)
    finally:
        for tracker in trackers.values():
            tracker.close()
        grpo.close()
    _write_log(folder, parts, list(grpo.tasks), settings, time.monotonic() - started)
    return folder


def _refuse_another(folder: Path, described: dict[str, Any]) -> None:
    if not (folder / RUN_FILE).is_file():
        return
    before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    new = json.loads(json.dumps(described))
    free = ("output_dir", "cache_dir", "num_threads", "commit")
    for key in ("config", "frozen"):
        for name, value in new[key].items():
            if name not in free and before.get(key, {}).get(name, value) != value:
                raise UserError(
                    f"{folder} holds a run with another {name} ({before[key][name]!r}, now {value!r}): give another "
                    "--output_dir, or the settings it was started with"
                )


def _parts(
    grpo: Grpo, options: FrozenSettings, trackers: Mapping[str, GradNormTracker], path: Path, console: Console
) -> dict[tuple[int, str], Line]:
    """{(step from 1, task): its numbers by metric key}, those in the file and those measured now."""
    found: dict[tuple[int, str], Line] = {}
    if path.is_file():
        lines, _ = read_log(path)  # without a last line that was cut off
        found = {(line["step"], line["task"]): line["values"] for line in lines}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    names = list(grpo.tasks)
    with path.open("a", encoding="utf-8") as file:
        for step in range(1, options.steps + 1):
            for place, name in enumerate(names):
                if (step, name) in found:
                    continue
                began = time.monotonic()
                set_seed((grpo.settings.seed * 1009 + step) * 1009 + place)
                grpo.tasks[name].position = (step - 1) * options.prompts
                batch = grpo.rollout([name] * options.prompts)
                active = {key: t for key, t in trackers.items() if key != FULL or step <= options.full_steps}
                values = _part(grpo, batch, active)
                found[step, name] = values
                line = {"kind": "part", "step": step, "task": name, "values": values}
                file.write(json.dumps(line) + "\n")
                file.flush()
                u, reward = values[task_key(name, "grad_norm_sq")], values[task_key(name, "reward")]
                text = f"{step}/{options.steps} {name}: reward {fixed(reward)}, U {significant(u)}"
                console.print(f"{text}, {time.monotonic() - began:.0f} s", highlight=False, soft_wrap=True)
    return found


def _part(grpo: Grpo, batch: Batch, trackers: Mapping[str, GradNormTracker]) -> Line:
    """One task's numbers of one round. The loss is the sum of the prompts' own; a row's own is G times its share."""
    group, count = batch.rollouts.group, len(batch.tasks)
    rows = [prompt for prompt in range(count) for _ in range(group)]
    with contextlib.ExitStack() as stack:
        for tracker in trackers.values():
            stack.enter_context(
                tracker.microbatch([batch.tasks[prompt] for prompt in rows], rows, row_scale=float(group))
            )
        grpo.model.train()
        prompt_losses(grpo, batch, 0, count, list(trackers.values())).sum().backward()
    grpo.model.zero_grad(set_to_none=True)
    task = batch.tasks[0]
    own = dataclasses.replace(batch, sampling={task: batch.sampling[task]})
    line = describe(own, StepStats())
    values = {key: value for key, value in line.items() if key.startswith("tasks/")}
    for prefix, tracker in trackers.items():
        for name, gradient in tracker.step().items():
            values |= gradient_metrics(name, gradient, prefix)
    return dict(plain(values))


def _write_log(
    folder: Path, parts: Mapping[tuple[int, str], Line], tasks: list[str], settings: Settings, seconds: float
) -> None:
    """metrics.jsonl with a line a round, and the summary, which says that the run is finished."""
    (folder / LOG_FILE).unlink(missing_ok=True)
    log = RunLog(folder)
    try:
        for step in sorted({step for step, _ in parts}):
            line: Line = {"kind": "probe", "step": step}
            for name in tasks:
                line |= parts[step, name]
            log.write(line)
    finally:
        log.close()
    write_json(folder / SUMMARY_FILE, summarize(log.lines, tasks, settings.gain_window, seconds))
