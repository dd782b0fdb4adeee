"""Measure every task of a model and a mixture without training: rollouts, one backward through the last block.

Only the attention of the last decoder layer asks for gradients, so the layers below run without a graph, and each
prompt runs once for its whole group. The numbers are those training would measure at its first step, pooled over many
prompts.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from .errors import UserError
from .folder import describe_run, new_folder
from .loop import Grpo
from .models import load_model
from .progress import Display
from .rollout import Prompter
from .runlog import RUN_FILE, SUMMARY_FILE, Line, RunLog, report_trackers, write_json
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
    grpo.model.requires_grad_(False)
    modules = dict(grpo.model.named_modules())
    for name in grpo.tracker.layers if grpo.tracker else []:
        modules[name].requires_grad_(True)


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
                record({"kind": "probe", "step": number, **grpo.describe(batch, stats)}, display)
    finally:
        log.close()
        grpo.close()
    write_json(folder / SUMMARY_FILE, summarize(log.lines, names, settings.gain_window, time.monotonic() - started))
    return folder
