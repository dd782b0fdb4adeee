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

    kept, whole = bytes_per_prompt(layers), _weight_grad_products(layers)
    runs: list[tuple[str, int | None, Callable[[], Any], float, int | None]] = [
        ("weight_grad", None, lambda: [layer.dy.T @ layer.x for layer in layers], whole, None),
        ("norms", None, lambda: norms(False), whole + _squares(layers), None),
        ("norms_with_weight_grad", None, lambda: norms(True), whole + _squares(layers), None),
        ("gram", None, lambda: gram(layers), sum(map(_gram_products, layers)), kept),
    ]
    for width in widths:
        products = sum(_sketch_products(layer, width) for layer in layers)
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


def _weight_grad_products(layers: Sequence[Layer]) -> float:
    """``T d_in d_out``."""
    return float(sum(layer.tokens * layer.d_in * layer.d_out for layer in layers))


def _squares(layers: Sequence[Layer]) -> float:
    """``(N + 1) d_in d_out``: every prompt's gradient squared, and their sum's."""
    return float(sum((layer.prompts + 1) * layer.d_in * layer.d_out for layer in layers))


def _pairwise(tokens: int, prompts: int, d_in: int, d_out: int) -> float:
    """Of a Gram, the cheaper way: over pairs of tokens, or of gradients that are formed."""
    by_tokens = tokens * (tokens + 1) / 2 * (d_in + d_out)
    return float(min(by_tokens, (tokens + prompts * (prompts + 1) / 2) * d_in * d_out))


def _gram_products(layer: Layer) -> float:
    return _pairwise(layer.tokens, layer.prompts, layer.d_in, layer.d_out)


def _sketch_products(layer: Layer, width: int) -> float:
    """The projections, ``T d w`` a side, and the Gram of the narrower tokens."""
    sides = (layer.d_in, layer.d_out)
    narrow = tuple(min(size, width) for size in sides)
    projected = sum(size * width for size in sides if size > width)
    return layer.tokens * projected + _pairwise(layer.tokens, layer.prompts, *narrow)
