"""What the measurements cost on one task's stored tokens: seconds on this machine, multiply-adds by formula, bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import gradnorm_kernels as gk

from .gradients import Layer, gram
from .sketches import bytes_per_prompt, project, projections


def cost(layers: Sequence[Layer], widths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row a measurement, timed in turn ``repeats`` times after a first time that does not count.

    dW alone, the exact norms without and with dW, the Gram of all prompts, and that of their sketches, the projection
    of the tokens included (P and Q are drawn once, as they would be for a whole run).
    """

    def norms(weight_grad: bool) -> None:
        for layer in layers:
            gk.fused_grad_norm(
                layer.x,
                layer.dy,
                layer.cu_seqlens,
                sample_ids=layer.sample_ids,
                group_ids=torch.zeros(layer.prompts, dtype=torch.long),
                num_groups=1,
                weight_grad=weight_grad,
            )

    def sketch(width: int) -> Callable[[], Any]:
        chosen = projections(layers, width, 0)
        return lambda: gram(project(layers, chosen))

    kept = bytes_per_prompt(layers)
    whole = float(sum(layer.tokens * layer.d_in * layer.d_out for layer in layers))
    # Every prompt's gradient squared, and their sum's.
    squares = float(sum((layer.prompts + 1) * layer.d_in * layer.d_out for layer in layers))
    runs: list[tuple[str, int | None, Callable[[], Any], float, int | None]] = [
        ("weight_grad", None, lambda: [layer.dy.T @ layer.x for layer in layers], whole, None),
        ("norms", None, lambda: norms(False), whole + squares, None),
        ("norms_with_weight_grad", None, lambda: norms(True), whole + squares, None),
        ("gram", None, lambda: gram(layers), sum(map(_gram_products, layers)), kept),
    ]
    for width in widths:
        products = sum(_gram_products(layer, width) for layer in layers)
        runs.append(("sketch_gram", width, sketch(width), products, bytes_per_prompt(layers, width)))
    seconds = _in_turn([run for _, _, run, _, _ in runs], repeats, layers[0].x.device)
    base = float(np.median(seconds[0]))
    rows = []
    for (what, of_width, _, products, size), times in zip(runs, seconds, strict=True):
        low, median, high = (float(np.quantile(times, share)) for share in (0.25, 0.5, 0.75))
        rows.append(
            {
                "what": what,
                "width": of_width,
                "seconds": median,
                "low": low,
                "high": high,
                "ratio": median / base,
                "multiply_adds": products,
                "bytes_per_prompt": size,
            }
        )
    return rows


def _in_turn(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of every run; the runs take turns, so that a slow moment of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, own in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                own.append(time.perf_counter() - started)
    return times


def _gram_products(layer: Layer, width: int | None = None) -> float:
    """A Gram the cheaper way: over pairs of tokens, or of gradients that are formed.

    With a ``width``, that of the narrower tokens and, before it, the projections: ``T d w`` a side.
    """
    sides = (layer.d_in, layer.d_out)
    d_in, d_out = sides if width is None else (min(size, width) for size in sides)
    projected = 0 if width is None else sum(size * width for size in sides if size > width)
    by_tokens = layer.tokens * (layer.tokens + 1) / 2 * (d_in + d_out)
    by_gradients = (layer.tokens + layer.prompts * (layer.prompts + 1) / 2) * d_in * d_out
    return layer.tokens * projected + float(min(by_tokens, by_gradients))
