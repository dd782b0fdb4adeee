"""Measure every task of a model and a mixture without training: rollouts, one backward through the last block, no update.

Only the attention of the last decoder layer asks for gradients, so the layers below run without a graph, and each prompt runs
once for its whole group. The numbers are those training would measure at its first step, pooled over many prompts.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from .errors import UserError
from .folder import describe_run, new_folder, write_run
from .loop import Grpo
from .metrics import RunLog, report_trackers, write_json
from .models import load_model
from .progress import Display
from .rollout import Prompter
from .settings import Settings
from .summary import summarize
from .tasks import build_tasks
from .warm_start import warm_start


def only_tracked(grpo: Grpo) -> None:
    """Ask for gradients of the measured layers alone: autograd then starts at the lowest of them."""
    if grpo.tracker is None:
        raise UserError("track is false: a probe has nothing to measure")
    grpo.model.requires_grad_(False)
    modules = dict(grpo.model.named_modules())
    for name in grpo.tracker.layers:
        modules[name].requires_grad_(True)


def probe(settings: Settings, name: str, console: Console) -> Path:
    """Measure ``probe_prompts`` prompts of every task, equally many of each in a micro-batch; returns the run's folder."""
    started = time.monotonic()
    set_seed(settings.seed)
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    model, tokenizer = load_model(settings)
    prompter = Prompter(tokenizer, tasks, settings)
    folder = new_folder(settings, f"{name}-probe")
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    log = RunLog(folder, report_trackers(settings.report_to, folder, {}))
    if settings.warm_start_steps:
        with Display(console, "warm start", [], settings.warm_start_steps) as display:

            def show(step: int, loss: float) -> None:
                line = {"kind": "warm_start", "step": step, "loss": loss, "time": round(time.monotonic() - started, 3)}
                log.write(line)
                display.show(line)

            warm_start(model, tokenizer, tasks, prompter, settings, show)
    grpo = Grpo(settings, model, tokenizer, tasks, prompter)
    only_tracked(grpo)
    assert grpo.tracker is not None
    write_run(folder, describe_run(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), settings, model, grpo.tracker.layers))
    set_seed(settings.seed)
    names = [task.name for task in tasks]
    each = max(2, settings.prompts_per_step // len(names))
    rounds = [min(each, settings.probe_prompts - done) for done in range(0, settings.probe_prompts, each)]
    if rounds[-1] == 1 and len(rounds) > 1:  # one prompt has no partner to be paired with
        rounds[-2:] = [rounds[-2] + 1]
    with Display(console, "probe", names, len(rounds)) as display:
        for number, count in enumerate(rounds, 1):
            batch = grpo.rollout([task for task in names for _ in range(count)])
            _, stats = grpo.backward(batch, [], measure=True)
            model.zero_grad(set_to_none=True)
            line = {"kind": "probe", "step": number, **grpo.describe(batch, stats)}
            line["time"] = round(time.monotonic() - started, 3)
            log.write(line)
            display.show(line)
    log.close()
    grpo.tracker.close()
    summary = summarize(log.lines, names, settings.gain_window, time.monotonic() - started)
    write_json(folder / "summary.json", summary)
    return folder
