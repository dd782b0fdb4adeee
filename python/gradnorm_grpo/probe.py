"""Measure every task of a mixture with the weights fixed: rollouts, one backward through the last block.

Only the attention of the last decoder layer asks for gradients, so the layers below run without a graph, and each
prompt runs once for its whole group. The command `probe` measures a model before training: what training would
measure at its first step, pooled over many prompts. :func:`final_probe` measures at the end of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from gradnorm_kernels import GradNormTracker, StepStats

from . import last_block
from .errors import UserError
from .folder import describe_run, new_folder
from .loop import Batch, Grpo, describe, estimates
from .models import load_model
from .progress import Display
from .rollout import Prompter, Rollouts, generate
from .runlog import RUN_FILE, SUMMARY_FILE, Line, RunLog, report_trackers, task_metrics, task_values, write_json
from .settings import Settings
from .summary import summarize
from .tasks import build_tasks
from .warm_start import warm_start


def untrained(settings: Settings, console: Console) -> Grpo:
    """The settings' tasks and model before any training, in the seed's random state."""
    set_seed(settings.seed)
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    model, tokenizer = load_model(settings)
    prompter = Prompter(tokenizer, tasks, settings)
    for remark in prompter.check(tasks):
        console.print(remark, style="yellow", highlight=False, soft_wrap=True)
    return Grpo(settings, model, tokenizer, tasks, prompter)


def only_tracked(grpo: Grpo) -> None:
    """Ask for gradients of the measured layers alone: autograd then starts at the lowest of them."""
    _only(grpo.model, grpo.tracker.layers if grpo.tracker else [])


def _only(model: Any, layers: list[str]) -> None:
    model.requires_grad_(False)
    for name in layers:
        model.get_submodule(name).requires_grad_(True)


#: Width of the sketches that pair prompts of different rounds: 0.6 MB per prompt and four projections, however wide the
#: model. The error that they add to U is part of its standard error.
SKETCH_WIDTH = 192
#: Prompts of a task in one round: few enough to show progress and to plan by, many enough to fill a processor.
ROUND = 16


@contextmanager
def last_block_alone(model: Any, layers: list[str]) -> Iterator[None]:
    """Ask for gradients of the modules ``layers`` alone while the block runs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    _only(model, layers)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def final_probe(grpo: Grpo, prompts: int, on_round: Callable[[int, float, Line], int]) -> Line:
    """U of the last attention block, over all pairs of ``prompts`` new prompts of each task at the weights as they are.

    A round has equally many prompts of every task, each task by itself: completions of one task have similar lengths.
    Sketches of the prompts' gradients pair those of different rounds; the standard errors contain what they add.

    Args:
        grpo: of a run whose training is over; its weights stay as they are, its positions in the data go on.
        prompts: of each task, at least 2.
        on_round: called after every round with the prompts measured so far of each task, the seconds that one prompt of
            every task took in this round, and the round's numbers; returns how many prompts of each to measure.

    Returns:
        TASK_METRICS of all prompts by key, and the tasks' inner products and cosines.
    """
    names, model = list(grpo.tasks), grpo.model
    # Decoders have the rows first. Said here, because the shapes of prompts of one token are not enough to tell.
    tracker = GradNormTracker(model, "last_attention", accumulate="sketch", sketch_width=SKETCH_WIDTH, batch_dim=0)
    together = min(ROUND, max(2, grpo.settings.per_device_train_batch_size // grpo.settings.num_generations))
    done = 0
    found: list[Line] = []
    try:
        with last_block_alone(model, tracker.layers):
            sampler = last_block.rollouts if last_block.applies(grpo) else generate
            while done < prompts:
                started, count = time.perf_counter(), min(together, prompts - done)
                line: Line = {}
                for i, name in enumerate(names):
                    batch = dataclasses.replace(grpo.rollout([name] * count, sampler), weights=None)
                    sample = done * len(names) + i * count
                    for part in _parts(batch, grpo.settings.beta):
                        grpo.accumulate(part, [], [tracker], first_sample=sample)
                        model.zero_grad(set_to_none=True)
                        sample += len(part.tasks)
                    line |= task_metrics(name, task_values(describe(batch, StepStats()), name))
                found.append(line)
                done += count
                seconds = (time.perf_counter() - started) / count
                prompts = max(2, on_round(done, seconds, line))
        stats = tracker.step()
    finally:
        tracker.close()
    total = {key: value for name in names for key, value in task_metrics(name, _pooled(found, name)).items()}
    return total | estimates(stats, names)


def _parts(batch: Batch, beta: float) -> list[Batch]:
    """The prompts with a gradient, and the others with their first tokens alone.

    Where all advantages of a prompt are zero, so is its gradient, whatever its tokens: they need not run. It stays a
    sample. A KL term (``beta``) has a gradient of its own.
    """
    has_gradient = (batch.advantages != 0).any(1)
    if beta > 0 or has_gradient.all() or not has_gradient.any():
        return [batch]
    others = subset(batch, (~has_gradient).nonzero()[:, 0])
    ran = others.rollouts
    first = Rollouts(
        ran.prompt_ids[:, -2:],
        ran.prompt_mask[:, -2:],
        ran.completion_ids[:, :1],
        ran.completion_mask[:, :1],
        ran.ended,
        ran.group,
    )
    return [subset(batch, has_gradient.nonzero()[:, 0]), dataclasses.replace(others, rollouts=first)]


def subset(batch: Batch, prompts: Tensor) -> Batch:
    """The part of a batch that has these prompts, [m] int64 positions among its n."""
    ran, at = batch.rollouts, prompts.tolist()
    prompts = prompts.to(ran.prompt_ids.device)
    rows = (prompts[:, None] * ran.group + torch.arange(ran.group, device=prompts.device)).flatten()
    return dataclasses.replace(
        batch,
        tasks=[batch.tasks[i] for i in at],
        examples=[batch.examples[i] for i in at],
        rollouts=Rollouts(
            ran.prompt_ids[prompts],
            ran.prompt_mask[prompts],
            ran.completion_ids[rows],
            ran.completion_mask[rows],
            ran.ended[rows],
            ran.group,
            None if ran.below is None else (ran.below[0][prompts], ran.below[1][rows]),
        ),
        rewards=batch.rewards[at],
        advantages=batch.advantages[at],
    )


def _pooled(lines: list[Line], task: str) -> Line:
    """One task's numbers over all rounds: counts are added, means weighted by the prompts."""
    rounds_ = [task_values(line, task) for line in lines]
    prompts = sum(values["prompts"] for values in rounds_)
    means = {key for values in rounds_ for key in values} - {"prompts", "sampling_prob", "loss_weight"}
    pooled = {key: sum(values[key] * values["prompts"] for values in rounds_) / prompts for key in sorted(means)}
    return {"prompts": prompts, **pooled}


def rounds(prompts: int, each: int) -> list[int]:
    """``prompts`` in parts of about ``each``; no part of one, which would have no partner to be paired with."""
    parts = [min(each, prompts - done) for done in range(0, prompts, each)]
    if len(parts) > 1 and parts[-1] == 1:
        parts[-2:] = [parts[-2] + 1]
    return parts


def probe(settings: Settings, name: str, console: Console) -> Path:
    """Measure ``probe_prompts`` prompts of every task, equally many of each at a time; returns the run's folder."""
    started = time.monotonic()
    # Only the tracked layers will ask for gradients; the rollouts are the loop's, whatever engine trained the model.
    settings = dataclasses.replace(settings, full_steps=0, engine="loop", trl={})
    grpo = untrained(settings, console)
    model, tasks, names = grpo.model, list(grpo.tasks.values()), list(grpo.tasks)
    if grpo.tracker is None:
        raise UserError("track is false: a probe has nothing to measure")
    folder = new_folder(settings, f"{name}-probe")
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    write_json(folder / RUN_FILE, describe_run(settings, model, grpo.tracker.layers))
    log = RunLog(folder, report_trackers(settings.report_to, folder, {}))

    def record(line: Line, display: Display) -> None:
        line["time"] = round(time.monotonic() - started, 3)
        log.write(line)
        display.show(line)

    try:
        if settings.warm_start_steps:
            with Display(console, "warm start", [], settings.warm_start_steps) as display:

                def on_step(step: int, loss: float) -> None:
                    record({"kind": "warm_start", "step": step, "loss": loss}, display)

                warm_start(model, grpo.tokenizer, tasks, grpo.prompter, settings, on_step)
        only_tracked(grpo)
        set_seed(settings.seed)
        parts = rounds(settings.probe_prompts, max(2, settings.prompts_per_step // len(names)))
        with Display(console, "probe", names, len(parts)) as display:
            for number, count in enumerate(parts, 1):
                batch = grpo.rollout([task for task in names for _ in range(count)])
                _, stats = grpo.backward(batch, [], measure=True)
                model.zero_grad(set_to_none=True)
                record({"kind": "probe", "step": number, **describe(batch, stats)}, display)
    finally:
        log.close()
        grpo.close()
    write_json(folder / SUMMARY_FILE, summarize(log.lines, names, settings.gain_window, time.monotonic() - started))
    return folder
