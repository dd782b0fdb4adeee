"""Randomly projected sketches of per-prompt gradients, and what they keep of the tasks' numbers.

``S_p = P' G_p Q`` with P [d_out, w] and Q [d_in, w], whose entries are independent, of mean 0 and variance 1/w. Then
``<S_p, S_q> = tr(G_p' P P' G_q Q Q')``, and as P and Q are independent and ``E[P P'] = I``, ``E[Q Q'] = I`` (each entry
of the diagonal is a sum of w squares of mean 1/w, each other one of mean 0), ``E<S_p, S_q> = <G_p, G_q>``: whatever is
linear in the inner products, U and the mean squared norm among it, stays unbiased. With G = sum dy x' the sketch is
``S_p = sum (P' dy)(Q' x)'``, the gradient of a w by w layer, so that its Gram is the library's on projected tokens.

The entries are +-1/sqrt(w). A side of a layer that is no wider than w is left as it is, which loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..stats import Array, cross_product, on_subsets, root_mean_square
from .gradients import Layer, gram

#: P (of the outputs) and Q (of the inputs) of one layer; None where the side is not projected.
Projection = tuple[Tensor | None, Tensor | None]


def projections(layers: Sequence[Layer], width: int, seed: int) -> list[Projection]:
    """P and Q of every layer; the same for the same seed, width and sizes."""
    generator = torch.Generator().manual_seed(seed)

    def signs(layer: Layer, size: int) -> Tensor | None:
        if size <= width:
            return None
        drawn = torch.randint(0, 2, (size, width), generator=generator) * 2.0 - 1.0
        return (drawn / math.sqrt(width)).to(layer.x.device)

    return [(signs(layer, layer.d_out), signs(layer, layer.d_in)) for layer in layers]


def project(layers: Sequence[Layer], chosen: Sequence[Projection]) -> list[Layer]:
    """The layers with their tokens projected; products are taken in float32."""
    out = []
    for layer, (of_output, of_input) in zip(layers, chosen, strict=True):
        x, dy = layer.x.float(), layer.dy.float()
        x = x if of_input is None else x @ of_input
        dy = dy if of_output is None else dy @ of_output
        out.append(dataclasses.replace(layer, x=x, dy=dy))
    return out


def sketch_grams(layers: Sequence[Layer], width: int, seeds: Sequence[int]) -> Array:
    """[len(seeds), N, N] float64: the Gram of the sketches, for every draw of P and Q."""
    return np.stack([gram(project(layers, projections(layers, width, seed))).numpy() for seed in seeds])


def unprojected(layers: Sequence[Layer], width: int) -> list[str]:
    """The sides no wider than ``width``, in words."""
    sides = [(layer.name, kind, size) for layer in layers for kind, size in _sides(layer)]
    return [f"{name}: {kind} ({size})" for name, kind, size in sides if size <= width]


def _sides(layer: Layer) -> list[tuple[str, int]]:
    return [("output", layer.d_out), ("input", layer.d_in)]


def useless(layers: Sequence[Layer], width: int) -> str | None:
    """Why a width is left out: no side of any layer is wider; None if it is of use."""
    widest = max(size for layer in layers for _, size in _sides(layer))
    return None if width < widest else f"no side of a layer is wider than {width}: the widest has {widest}"


def bytes_per_prompt(layers: Sequence[Layer], width: int | None = None) -> int:
    """What one prompt's gradient in all layers takes in float32: as a sketch of ``width``, or whole."""

    def side(size: int) -> int:
        return size if width is None else min(size, width)

    return sum(4 * side(layer.d_in) * side(layer.d_out) for layer in layers)


def describe_task(exact: Array, sketched: Array, u_se: float, orders: Array, n: int) -> dict[str, float]:
    """Bias and spread over sketches of a task's U and mean squared norm.

    exact [N, N], sketched [S, N, N]; ``orders`` and ``n``: the subsets of n prompts whose pairs all count.
    """
    u, sq = cross_product(exact), float(np.diagonal(exact).mean())
    us = np.array([cross_product(one) for one in sketched])
    squares = np.array([np.diagonal(one).mean() for one in sketched])
    some = math.sqrt(len(sketched))
    pooled = np.concatenate([on_subsets(one, orders, n)[0]["cross_product"] for one in sketched])
    rmse = root_mean_square(pooled, u)
    u_sd, sq_sd = _sd(us), _sd(squares)
    positive = u if u > 0 else math.nan
    return {
        "u_mean": float(us.mean()),
        "u_bias": float(us.mean()) - u,
        "u_bias_se": u_sd / some,
        "u_sd": u_sd,
        "u_bias_rel": (float(us.mean()) - u) / positive,
        "u_sd_rel": u_sd / positive,
        "u_sd_over_se": u_sd / u_se if u_se > 0 else math.nan,
        "sq_bias_rel": float(squares.mean()) / sq - 1 if sq else math.nan,
        "sq_bias_rel_se": sq_sd / some / sq if sq else math.nan,
        "sq_sd_rel": sq_sd / sq if sq else math.nan,
        "rmse_all_pairs": rmse,
        "rmse_all_pairs_rel": rmse / positive,
    }


def _sd(values: Array) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def describe_order(exact: dict[str, Array], sketched: dict[str, Array]) -> dict[str, Any]:
    """The tasks' order and the ratio of the largest to the smallest, in U and in the mean squared norm, by sketch."""
    names = list(exact)
    u = np.array([cross_product(exact[name]) for name in names])
    sq = np.array([np.diagonal(exact[name]).mean() for name in names])
    us = np.array([[cross_product(one) for one in sketched[name]] for name in names])
    squares = np.array([np.diagonal(sketched[name], axis1=1, axis2=2).mean(1) for name in names])
    taus = [float(stats.kendalltau(u, one).statistic) if len(names) > 1 else math.nan for one in us.T]
    of_u, of_sq = _ratio(names, u, us), _ratio(names, sq, squares)
    return {
        "kendall_tau_mean": float(np.mean(taus)),
        "kendall_tau_min": min(taus),
        **of_u,
        **{f"sq_{key}": value for key, value in of_sq.items() if key not in ("largest", "smallest")},
    }


def _ratio(names: Sequence[str], exact: Array, sketched: Array) -> dict[str, Any]:
    """exact [K], sketched [K, S]. The ratio is that of the tasks which are largest and smallest exactly."""
    same = (np.argsort(sketched, 0) == np.argsort(exact)[:, None]).all(0)
    positive = np.flatnonzero(exact > 0)
    found: dict[str, Any] = {"same_order": float(same.mean()), "largest": None, "smallest": None}
    ratios = dict.fromkeys(("ratio_exact", "ratio_median", "ratio_low", "ratio_high"), math.nan)
    if len(positive):
        top, bottom = positive[exact[positive].argmax()], positive[exact[positive].argmin()]
        found |= {"largest": names[top], "smallest": names[bottom]}
        ratios["ratio_exact"] = float(exact[top] / exact[bottom])
        if (sketched[bottom] > 0).all():
            low, median, high = np.quantile(sketched[top] / sketched[bottom], (0.025, 0.5, 0.975))
            ratios |= {"ratio_low": float(low), "ratio_median": float(median), "ratio_high": float(high)}
    return found | ratios
