"""Which interval of U holds it: coverage and width on stored rollouts, with few informative prompts and with many.

At the state where GRPO begins, N prompts of every task are measured. Many times n of them are drawn, each interval is
computed from the n alone, and it is counted how often it holds U of all N. Ends are moved towards the estimate by
``sqrt(1 - n / N)``: around U of all N an estimate varies less than around the truth, by about this factor.

The intervals, with se the jackknife's error and k the drawn prompts that have a gradient::

    normal            U +- 1.96 se
    student           U +- t_{n-1} se
    student_informative   U +- t_{k-1} se
    chosen            U +- t_{k-1} max(se, spread of U over bootstrap resamples): the library's confidence_interval
    bootstrap_t       U - q se, with the quantiles q of (U* - U) / se* over bootstrap resamples
    percentile        the quantiles of U* over bootstrap resamples
    asinh, sqrt       the jackknife of asinh(U / s), s the mean squared norm by n, and of sign(U) sqrt(|U|), t_{k-1}
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import special

import gradnorm_kernels as gk
from gradnorm_kernels.estimation.estimator import MIN_INFORMATIVE

from ..folder import describe_run
from ..numbers import fixed, markdown_table, percent
from ..parse import parse_intervals
from ..runlog import write_json
from ..settings import Settings
from .estimators.comparison import only_what_matters, where_grpo_begins
from .estimators.gradients import capture, gram
from .estimators.rollouts import stored_rollouts
from .spec import IntervalSettings
from .stats import ALPHA, Array, cross_product, jackknife_variance, left_out, subset_sizes

METHODS = ("normal", "student", "student_informative", "chosen", "bootstrap_t", "percentile", "asinh", "sqrt")
LARGEST = 64  # prompts drawn at most: with more, all intervals agree
#: Draws are grouped by how many of their prompts have a gradient: the least of every group.
INFORMATIVE = (0, 1, 2, 3, 4, 5, 7, 10, 15, 25)


def intervals(arguments: list[str], console: Console) -> int:
    """The command: the comparison for every seed, each in a file of its own; returns the exit code."""
    settings, options, seeds, name = parse_intervals(arguments)
    folder = Path(settings.output_dir or f"runs/{name}-intervals")
    for seed in seeds:
        compare(dataclasses.replace(settings, seed=seed), name, options, folder, console)
    return 0


def compare(settings: Settings, name: str, options: IntervalSettings, folder: Path, console: Console) -> Path:
    """Compare the intervals for one seed; returns the JSON file."""
    started = time.monotonic()
    settings = only_what_matters(settings)
    grpo = where_grpo_begins(settings, console)
    try:
        batch, _ = stored_rollouts(grpo, options.prompts, folder / f"rollouts-seed{settings.seed}.safetensors")
        assert grpo.tracker is not None
        tasks: dict[str, Any] = {}
        for task in grpo.tasks:
            first = batch.tasks.index(task)
            products = gram(capture(grpo, batch, first, first + options.prompts)).numpy()
            tasks[task] = measure(products, options, settings.seed)
            found = tasks[task]["whole"]
            text = f"{task}: U {found['value']:.2e}, {found['n_effective']} of {found['n']} prompts have a gradient"
            console.print(text, highlight=False, soft_wrap=True)
        result = describe_run(settings, grpo.model, grpo.tracker.layers) | {
            "name": name,
            "seed": settings.seed,
            "options": dataclasses.asdict(options),
            "tasks": tasks,
        }
    finally:
        grpo.close()
    file = folder / f"seed{settings.seed}.json"
    write_json(file, result)
    console.print(f"intervals: {file}, {time.monotonic() - started:.0f} s", highlight=False, soft_wrap=True)
    return file


def measure(gram: Array, options: IntervalSettings, seed: int) -> dict[str, Any]:
    """One task: the interval of all N prompts, and by n and method how often those of n prompts hold U of all N.

    The rows of "draws" have, for each n, group of INFORMATIVE and method: the draws with an interval, how many of those
    ended below U and above it, and the median width by that of the normal interval (null where that is zero).
    """
    rng, prompts, truth = np.random.default_rng(seed), len(gram), cross_product(gram)
    counts: dict[tuple[int, int, str], list[tuple[bool, bool, float]]] = {}
    for n in (size for size in subset_sizes(prompts) if 8 <= size <= min(prompts // 4, LARGEST)):
        narrow = math.sqrt(1 - n / prompts)
        for _ in range(options.draws):
            chosen = rng.permutation(prompts)[:n]
            u, known, found = ends(gram[np.ix_(chosen, chosen)], options.resamples, rng)
            group = max(least for least in INFORMATIVE if least <= known)
            width = found["normal"][1] - found["normal"][0]
            for method, (low, high) in found.items():
                if not math.isfinite(low):
                    continue  # the library gives no interval for so few informative prompts
                relative = (high - low) / width if width > 0 else math.nan
                below, above = u + (high - u) * narrow < truth, u + (low - u) * narrow > truth
                counts.setdefault((n, group, method), []).append((below, above, relative))
    whole = gk.confidence_interval(torch.from_numpy(gram))
    rows = [
        {"n": n, "informative": group, "method": method, "draws": len(found)}
        | {"below": sum(b for b, _, _ in found), "above": sum(a for _, a, _ in found)}
        | {"width": float(np.median([w for _, _, w in found]))}
        for (n, group, method), found in counts.items()
    ]
    return {"whole": whole._asdict(), "draws": rows}


def ends(gram: Array, resamples: int, rng: np.random.Generator) -> tuple[float, int, dict[str, tuple[float, float]]]:
    """U, the prompts with a gradient, and both ends of each method's interval."""
    n, u, others = len(gram), cross_product(gram), left_out(gram)[0]
    library = gk.confidence_interval(torch.from_numpy(gram), 1 - ALPHA, resamples=resamples)
    error, known = math.sqrt(jackknife_variance(others)), library.n_effective
    normal = float(special.ndtri(1 - ALPHA / 2))
    student, informative = (float(special.stdtrit(max(free - 1, 1), 1 - ALPHA / 2)) for free in (n, known))
    resampled, errors = bootstrap(gram, resamples, rng)
    usable = errors > 0
    pivots = (resampled[usable] - u) / errors[usable]
    low, high = np.quantile(pivots, (ALPHA / 2, 1 - ALPHA / 2)) if usable.any() else (0.0, 0.0)
    quantiles = np.quantile(resampled, (ALPHA / 2, 1 - ALPHA / 2))
    found = {
        "normal": (u - normal * error, u + normal * error),
        "student": (u - student * error, u + student * error),
        "student_informative": (u - informative * error, u + informative * error),
        "chosen": (library.low, library.high),
        "bootstrap_t": (u - float(high) * error, u - float(low) * error),
        "percentile": (float(quantiles[0]), float(quantiles[1])),
    }
    scale = float(np.diagonal(gram).mean()) / n
    scales = {
        "asinh": (lambda x: np.arcsinh(x / scale), lambda x: scale * np.sinh(x)),
        "sqrt": (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2),
    }
    for name, (there, back) in scales.items():
        if not scale > 0:
            found[name] = (u, u)
            continue
        middle, spread = there(u), informative * math.sqrt(jackknife_variance(there(others)))
        found[name] = (float(back(middle - spread)), float(back(middle + spread)))
    return u, known, found


def bootstrap(gram: Array, resamples: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """[resamples] U of n prompts drawn with replacement, without pairs of a prompt with itself, and errors."""
    n, diagonal = len(gram), np.diagonal(gram)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    counts = counts[(counts > 0).sum(1) > 2]  # of two different prompts, leaving one out leaves no pair
    inner = counts @ gram - counts * diagonal
    total, pairs = (counts * inner).sum(1), n * n - (counts**2).sum(1)
    without = (total[:, None] - 2 * inner) / (pairs[:, None] - 2 * (n - counts))
    centre = (counts * without).sum(1, keepdims=True) / n
    variance = (n - 1) / n * (counts * (without - centre) ** 2).sum(1)
    return total / pairs, np.sqrt(variance)


# The table


def coverage(
    results: Sequence[dict[str, Any]], informative: tuple[float, float] = (0, math.inf)
) -> list[dict[str, Any]]:
    """A row per method over the draws of all results, tasks and n whose group of INFORMATIVE lies in [low, high).

    ``draws`` with an interval; ``held``: the share of them that held U; ``lowest``: the lowest such share of one seed's
    task and n, of those with at least 50 draws; ``width``: by the normal interval's, the mean over seeds, tasks, n and
    groups of the medians, weighted by draws.
    """
    low, high = informative
    rows = []
    for method in METHODS:
        cells: dict[tuple[int, str, int], list[int]] = {}
        widths: list[tuple[int, float]] = []
        for result in results:
            for task, found in result["tasks"].items():
                for row in found["draws"]:
                    if row["method"] != method or not low <= row["informative"] < high:
                        continue
                    cell = cells.setdefault((result["seed"], task, row["n"]), [0, 0])
                    cell[0] += row["draws"]
                    cell[1] += row["below"] + row["above"]
                    if row["width"] is not None and math.isfinite(row["width"]):
                        widths.append((row["draws"], row["width"]))
        draws, missed = (sum(cell[i] for cell in cells.values()) for i in (0, 1))
        weight = sum(count for count, _ in widths)
        rows.append(
            {
                "method": method,
                "draws": draws,
                "held": 1 - missed / draws if draws else math.nan,
                "lowest": min((1 - lost / count for count, lost in cells.values() if count >= 50), default=math.nan),
                "width": sum(count * width for count, width in widths) / weight if weight else math.nan,
            }
        )
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """The page's two tables in Markdown: by method, where enough prompts are informative, and by their number."""
    by_method = [
        [row["method"], percent(row["held"]), percent(row["lowest"]), fixed(row["width"])]
        for row in coverage(results, (MIN_INFORMATIVE, math.inf))
    ]
    bounds = [*INFORMATIVE, math.inf]
    names = [str(a) if b == a + 1 else f"from {a}" if math.isinf(b) else f"{a} to {b - 1}" for a, b in pairwise(bounds)]
    groups = [coverage(results, group) for group in pairwise(bounds)]
    by_number = [["draws", *(str(group[0]["draws"]) for group in groups)]]
    by_number += [[m, *(percent(group[place]["held"]) for group in groups)] for place, m in enumerate(METHODS)]
    first = markdown_table(["interval", "holds U", "lowest of a task and n", "width by the normal one's"], by_method)
    return first + "\n" + markdown_table(["informative prompts", *names], by_number)
