"""What one more digit of U costs in a training step: relative error against extra seconds, for each way to measure.

The model stays where GRPO begins. Stored rollouts are cut into steps as a training run has them: n prompts of every
task, in the run's micro-batches. Each way passes over the same steps, forward and backward, and reads one U per task
and step. With U the reference from all prompts, s the standard deviation of a way's U over the steps, and e its extra
seconds per step, by those of a plain step::

    relative error of one step = s / U
    steps for a relative error of r = (s / (r U))^2,    extra seconds for it = e (s / (r U))^2

The reference is the cross-product over all pairs of half steps: the mean gradients of n / 2 prompts each, in all
parameters, from backward passes of their own. Their products within a step are the two-batch estimate, which costs
those passes. Layers differ in U: a digit of the last attention block's U is not a digit of the whole model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from gradnorm_kernels import GradNormTracker, StepStats

from .. import plots
from ..checkpoint import same_random_state
from ..errors import UserError
from ..folder import describe_run
from ..loop import Batch, Grpo
from ..numbers import fixed, markdown_table, percent, significant
from ..parse import parse_cost
from ..probe import subset
from ..runlog import write_json
from ..settings import Settings
from .estimators.comparison import only_what_matters, warm_started
from .estimators.gradients import prompt_losses
from .estimators.rollouts import stored_rollouts
from .spec import CostSettings
from .stats import Array, known_median, reference

#: One digit: the relative error of U that the costs are for.
DIGIT = 0.1
LAYERS = ("last_attention", "linears", "everything")
TWO_BATCH = "two_batch"


@dataclass(frozen=True)
class Way:
    """A tracker's arguments. ``layers``: one of LAYERS, or "" for none."""

    name: str
    layers: str
    fused: bool = False
    accumulate: str = "pairs"
    errors: str = "samples"


#: "exact" takes its errors from the spread over steps, as this comparison does: its own would be those of sketches.
WAYS = tuple(
    Way(f"{layers}_{kind}", layers, layers != "last_attention", kind, "tasks" if kind == "exact" else "samples")
    for layers in LAYERS
    for kind in ("pairs", "exact", "sketch")
)


def cost(arguments: list[str], console: Console) -> int:
    """The command: one file per seed, and the table and figure of all of them; returns the exit code."""
    settings, options, seeds, name = parse_cost(arguments)
    folder = Path(settings.output_dir or f"runs/{name}-cost")
    results = [measure(dataclasses.replace(settings, seed=seed), name, options, folder, console) for seed in seeds]
    console.print(table(results), highlight=False, soft_wrap=True)
    with plots.theme():
        plots.save_svg(draw(results), folder / "cost.svg", sentence(results))
    return 0


def measure(settings: Settings, name: str, options: CostSettings, folder: Path, console: Console) -> dict[str, Any]:
    """Measure one seed and write ``seed<N>.json``, whose content returns."""
    started = time.monotonic()
    settings = dataclasses.replace(only_what_matters(settings), track=False)
    n, steps = _sizes(settings, options)
    grpo = warm_started(settings, console)
    try:
        batch, _ = stored_rollouts(grpo, options.prompts, folder / f"rollouts-seed{settings.seed}.safetensors")
        first = [batch.tasks.index(task) for task in grpo.tasks]
        parts = [
            subset(batch, torch.tensor([at + step * n + i for at in first for i in range(n)])) for step in range(steps)
        ]
        console.print(f"seed {settings.seed}: gradients of half steps", highlight=False)
        names = measured(grpo)
        grams = {task: half_steps(grpo, batch, names, at, n, steps) for task, at in zip(grpo.tasks, first, strict=True)}
        result = describe_run(settings, grpo.model, []) | {
            "name": name,
            "seed": settings.seed,
            "options": dataclasses.asdict(options),
            "prompts_per_step": n,
            "microbatches": settings.gradient_accumulation_steps,
            "reference": {layers: {task: reference(grams[task][layers]) for task in grams} for layers in LAYERS},
            **_in_rounds(grpo, parts, options.rounds, console),
        }
        for layers in LAYERS:
            u = {task: np.diagonal(grams[task][layers], 1)[::2].tolist() for task in grams}
            result["ways"].append({"name": f"{layers}_{TWO_BATCH}", "layers": layers, "kind": TWO_BATCH, "u": u})
            result["ways"][-1]["seconds"] = result["two_batch_seconds"]
        result["seconds"] = time.monotonic() - started
    finally:
        grpo.close()
    file = folder / f"seed{settings.seed}.json"
    write_json(file, result)
    console.print(f"cost: {file}, {result['seconds']:.0f} s", highlight=False, soft_wrap=True)
    return result


def _sizes(settings: Settings, options: CostSettings) -> tuple[int, int]:
    """Prompts of a task in a step, and steps."""
    n = settings.prompts_per_step // len(settings.tasks)
    steps = options.prompts // n if n else 0
    if n < 4 or n % 2 or steps < 2 * options.rounds or steps % options.rounds:
        raise UserError(
            "cost needs an even number of at least 4 prompts of every task in a step, and a number of steps that is a "
            f"multiple of rounds={options.rounds}, at least twice that; {settings.prompts_per_step} prompts per step "
            f"for {len(settings.tasks)} tasks, and {options.prompts} prompts of each, give {n} in each of {steps} "
            "steps: change per_device_train_batch_size, or prompts and rounds of `study: cost:`"
        )
    return n, steps


def half_steps(
    grpo: Grpo, batch: Batch, names: Mapping[str, Sequence[str]], first: int, n: int, steps: int
) -> dict[str, Array]:
    """{layers: [2 steps, 2 steps] float64} inner products of one task's mean gradients of n / 2 prompts.

    ``names``: the parameters of each choice of layers, as :func:`measured` gives them.
    Half h has prompts first + h n / 2 ... of ``batch``; two that follow each other make a step.
    """
    parameters = {name: p for name, p in grpo.model.named_parameters() if p.requires_grad}
    vectors: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for half in range(2 * steps):
        _half_backward(grpo, batch, first + half * n // 2, n // 2)
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            vectors[name].append(gradient.flatten().float().cpu())
        grpo.model.zero_grad(set_to_none=True)
    products = {}
    for name, found in vectors.items():
        stacked = torch.stack(found).double()
        products[name] = (stacked @ stacked.T).numpy()
    return {layers: np.sum([products[name] for name in own], axis=0) for layers, own in names.items()}


def _half_backward(grpo: Grpo, batch: Batch, first: int, count: int) -> None:
    """Accumulate the mean gradient of prompts first, ..., first + count - 1, in micro-batches of at most the run's."""
    settings = grpo.settings
    at_once = max(1, settings.per_device_train_batch_size // settings.num_generations)
    grpo.model.train()
    for start in range(first, first + count, at_once):
        losses = prompt_losses(grpo, batch, start, min(start + at_once, first + count))
        (losses.sum() / count).backward()


def measured(grpo: Grpo) -> dict[str, list[str]]:
    """{layers: names of the parameters that a tracker of them measures}."""
    trained = {id(p): name for name, p in grpo.model.named_parameters() if p.requires_grad}
    found = {}
    for layers in LAYERS:
        with _attached(grpo, Way(layers, layers)) as tracker:
            modules = [grpo.model.get_submodule(name) for name in tracker.layers]
            own = {trained[id(p)] for m in modules for p in m.parameters(recurse=False) if id(p) in trained}
            found[layers] = sorted(own - set(tracker.skipped))
    return found


@contextmanager
def _attached(grpo: Grpo, way: Way) -> Iterator[GradNormTracker]:
    """A tracker on the model that has verified its layers on a few tokens."""
    model: nn.Module = grpo.model
    head = grpo.model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    chosen = {"last_attention": "last_attention", "linears": linears, "everything": "all"}[way.layers]
    tracker = GradNormTracker(model, chosen, way.fused, accumulate=way.accumulate, errors=way.errors)
    device = next(model.parameters()).device
    try:
        with same_random_state(device):
            grpo.accumulate(grpo.few_tokens(device), [], [tracker])
        model.zero_grad(set_to_none=True)
        tracker.discard()
        yield tracker
    finally:
        tracker.close()


def _in_rounds(grpo: Grpo, parts: Sequence[Batch], rounds: int, console: Console) -> dict[str, Any]:
    """Seconds per step of the plain step, of two batches and of every way, round by round, and U of each way's steps.

    In a round all of them pass over the same steps, after a first step that does not count. Each round begins with
    another one, so that a slow moment of the machine is not always the same one's.
    """
    plain, two = Way("plain", ""), Way(TWO_BATCH, "")
    seconds: dict[str, list[float]] = {way.name: [] for way in (plain, two, *WAYS)}
    u: dict[str, dict[str, list[float]]] = {way.name: {task: [] for task in grpo.tasks} for way in WAYS}
    each = len(parts) // rounds
    for round_ in range(rounds):
        console.print(f"round {round_ + 1} of {rounds}", highlight=False)
        steps = parts[round_ * each : (round_ + 1) * each]
        everyone = [plain, two, *WAYS]
        turn = round_ * len(everyone) // rounds
        for way in everyone[turn:] + everyone[:turn]:
            with contextlib.ExitStack() as stack:
                tracker = stack.enter_context(_attached(grpo, way)) if way.layers else None
                run = _two_batches if way is two else _step
                run(grpo, steps[0], tracker)
                started = time.perf_counter()
                for part in steps:
                    stats = run(grpo, part, tracker)
                    if tracker is not None:
                        for task, values in u[way.name].items():
                            values.append(stats[task].sq_norm if task in stats else math.nan)
                seconds[way.name].append((time.perf_counter() - started) / each)
    ways = [
        {"name": way.name, "layers": way.layers, "kind": way.accumulate, "u": u[way.name], "seconds": seconds[way.name]}
        for way in WAYS
    ]
    return {"plain_seconds": seconds[plain.name], "two_batch_seconds": seconds[two.name], "ways": ways}


def _step(grpo: Grpo, part: Batch, tracker: GradNormTracker | None) -> StepStats:
    """The gradient of a step, with the tracker's estimates if there is one."""
    grpo.accumulate(part, [], [tracker] if tracker is not None else [])
    stats = tracker.step() if tracker is not None else StepStats()
    grpo.model.zero_grad(set_to_none=True)
    _synchronize(grpo)
    return stats


def _two_batches(grpo: Grpo, part: Batch, tracker: GradNormTracker | None) -> StepStats:
    """The same gradient in two passes per task, whose gradients are multiplied with each other, and added up."""
    assert tracker is None
    parameters = [p for p in grpo.model.parameters() if p.requires_grad]
    n, total = len(part.tasks) // len(grpo.tasks), [torch.zeros_like(p) for p in parameters]
    for first in range(0, len(part.tasks), n):
        halves = []
        for start in (first, first + n // 2):
            _half_backward(grpo, part, start, n // 2)
            halves.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            grpo.model.zero_grad(set_to_none=True)
        float(torch.stack([(a * b).sum() for a, b in zip(*halves, strict=True)]).sum())
        for half in halves:
            for added, gradient in zip(total, half, strict=True):
                added.add_(gradient)
    _synchronize(grpo)
    return StepStats()


def _synchronize(grpo: Grpo) -> None:
    device = next(grpo.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Reading the results


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way, from all seeds, layers by layers.

    ``extra``, ``low``, ``high``: median and quartiles over rounds of its seconds per step, less those of the plain step
    of the same round; ``share``: the median as a share of the plain step's. ``error``: relative, of one step, the
    median over seeds and the tasks whose U is significant at two standard errors, NaN if none is. ``steps``, ``price``:
    how many steps, and how many extra seconds with their quartiles, for a relative error of DIGIT.
    """
    plain = np.concatenate([result["plain_seconds"] for result in results])
    found = []
    for i, way in enumerate(results[0]["ways"]):
        own = [result["ways"][i] for result in results]
        extra = np.concatenate([one["seconds"] for one in own]) - plain
        low, middle, high = (float(np.quantile(extra, share)) for share in (0.25, 0.5, 0.75))
        error = known_median(
            float(np.nanstd(np.array(values, float), ddof=1)) / result["reference"][way["layers"]][task]["u"]
            for result, one in zip(results, own, strict=True)
            for task, values in one["u"].items()
            if result["reference"][way["layers"]][task]["significant"]
        )
        steps = (error / DIGIT) ** 2
        found.append(
            {key: way[key] for key in ("name", "layers", "kind")}
            | {"extra": middle, "low": low, "high": high, "share": middle / float(np.median(plain)), "error": error}
            | {"steps": steps, "price": middle * steps, "price_low": low * steps, "price_high": high * steps}
        )
    return sorted(found, key=lambda row: LAYERS.index(row["layers"]))


_LAYERS = {
    "last_attention": "last attention block",
    "linears": "all linear layers",
    "everything": "all parameters",
}
_KINDS = {
    "pairs": "pairs inside micro-batches",
    "exact": "all pairs, exact sums",
    "sketch": "all pairs, sketches",
    TWO_BATCH: "two batches per task",
}


def sentence(results: Sequence[dict[str, Any]]) -> str:
    """The price of a digit of the last attention block's U, and of all parameters', in one sentence."""
    found = {row["name"]: row for row in rows(results)}
    last, whole = found["last_attention_pairs"], found["everything_pairs"]
    by_halves = found[f"everything_{TWO_BATCH}"]
    return (
        f"Pairs inside micro-batches take {seconds(last['price'])} extra for a relative error of {DIGIT:g} in U of the "
        f"last attention block and {seconds(whole['price'])} in that of all parameters, where two batches per task "
        f"take {seconds(by_halves['price'])}."
    )


def seconds(value: float) -> str:
    """A duration in words; a dash where it is not known."""
    return f"{significant(value)} s"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per way."""
    heads = ["layers", "how", "extra seconds of a step (quartiles)", "share of a plain step"]
    heads += ["relative error of one step", f"steps for {DIGIT:g}", f"extra seconds for {DIGIT:g} (quartiles)"]
    cells = []
    for row in rows(results):
        own = f"{fixed(row['extra'], 3)} ({fixed(row['low'], 3)} to {fixed(row['high'], 3)})"
        price = f"{significant(row['price'])} ({significant(row['price_low'])} to {significant(row['price_high'])})"
        found = [_LAYERS[row["layers"]], _KINDS[row["kind"]], own, percent(row["share"])]
        cells.append([*found, significant(row["error"]), significant(row["steps"]), price])
    return markdown_table(heads, cells)


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Relative error against extra seconds: each way from one step on, along the line on which more steps lie."""
    found = [row for row in rows(results) if math.isfinite(row["error"]) and row["error"] > 0]
    shades = {layers: plots.colour(i) for i, layers in enumerate(LAYERS)}
    marks = dict(zip(_KINDS, ("o", "s", "^", "D"), strict=True))
    key: list[plots.Entry] = [("-", shade, True, _LAYERS[layers]) for layers, shade in shades.items()]
    key += [(mark, plots.INK, True, _KINDS[kind]) for kind, mark in marks.items()]
    n = results[0]["prompts_per_step"]
    notes = [
        f"Markers: one step, {n} prompts of a task. Lines: more steps, down to a relative error of {DIGIT:g}.",
        "Bars: quartiles of the extra seconds. Hollow: the median is not above zero, and the upper quartile is drawn.",
        "The U of different layers are different quantities.",
    ]
    figure = plots.sheet("What a digit of U costs", "", notes, 330, key)
    axes = figure.subplots()
    known = [row for row in found if row["high"] > 0]
    at = np.array([row["extra"] if row["extra"] > 0 else row["high"] for row in known])
    error = np.array([row["error"] for row in known])
    last = at * np.maximum(error / DIGIT, 1) ** 2
    plots.logarithmic(axes, "x", np.concatenate([at, last]), 1.5)
    plots.logarithmic(axes, "y", np.array([DIGIT, *error]), 1.3)
    for row, x, y, end in zip(known, at, error, last, strict=True):
        shade = shades[row["layers"]]
        axes.plot([x, end], [y, min(y, DIGIT)], color=shade, lw=1.2, alpha=0.6, zorder=2)
        plots.bars(axes, np.array([y]), np.array([row["low"]]), np.array([row["high"]]), shade, 2.0, which="x")
        face = shade if row["extra"] > 0 else plots.PAPER
        axes.plot([x], [y], ls="none", marker=marks[row["kind"]], ms=8, color=face, mec=shade, mew=1.6, zorder=4)
    axes.axhline(DIGIT, color=plots.FAINT, lw=2, ls="--", zorder=1)
    axes.set_xlabel("extra seconds")
    axes.set_ylabel("relative error of U")
    return figure
