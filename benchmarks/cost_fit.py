"""The cost model's constants from measured ratios: the costs of a sample's end, of a Gram and of the pairs of tokens.

With the multiply-adds of a plain product as the unit (:class:`gradnorm_kernels.tuning.costs.Costs`), the ratios to dW
alone are
    r of wgrad       = a + epilogue N / T
    r of gram        = a + (gram S / T + gram_token) (d_in + d_out) / (d_in d_out)
    r of gram_norms  = pairs T (d_in + d_out) / (d_in d_out)        every sample a group, with all inner products

for N samples in T tokens, where S is the sum of their squared lengths. ``a`` is the cost of our pass over the tokens,
the same in both lines. Least squares over lengths; each row is weighted by its spread and
by one percent of its ratio, which is the effect of tile sizes at single lengths. All batches have one size, the size
with the most lengths: the cost of launches is part of ``a``, that of the Gram's own launches part of ``gram_token``, as
shares of such a batch.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.targets import Measured, Row
from gradnorm_kernels.tuning.costs import Costs

#: The constants with standard errors.
NAMES = ("epilogue", "gram", "gram_token")
#: The number of different lengths that each of the two lines needs: one more than it has constants.
LEAST = 3
#: The largest loss that choosing by the fitted constants may cause at a measured length, relative to the faster way.
MOST_LOSS = 0.05
#: A constant at most this many standard errors below zero counts as zero.
_ERRORS = 2.0


class MissingError(ValueError):
    """Rows are missing; the text says which."""


@dataclass(frozen=True)
class Fit:
    """``costs`` at one shape; ``base`` is a; ``residual``: the largest relative residual of a row; ``loss``: the
    largest loss of choosing by the costs at a measured length; ``errors``: standard errors by name."""

    costs: Costs
    base: float
    residual: float
    loss: float
    errors: dict[str, float]
    rows: int


def ways(backend: str) -> tuple[str, str, str]:
    """The providers that a backend's constants are fitted to: for sample ends, Grams and pairs of tokens."""
    return f"{backend}_wgrad", f"{backend}_gram", f"{backend}_gram_norms"


def usable(found: Measured) -> bool:
    """Whether the constants can be fitted to a row of such a batch."""
    row = found.row
    if found.name.endswith("_gram_norms"):
        return bool(row.get("gram"))
    # With one group per sample no norm is computed by a Gram, whatever the algorithm.
    return not row.get("gram") and row.get("groups", 1) == 1 and row.get("samples", 2) > 1


def fit(backend: str, rows: list[Row], workspace: int, gram_tile: int, element_bytes: int) -> Fit:
    """The constants of a backend from right and usable rows of one shape.

    Raises:
        MissingError: rows are missing; the text says which.
        ValueError: a constant is negative; the text says which measurement to add.
    """
    stops, grams, pairs = ([row for row in rows if row["provider"] == name] for name in ways(backend))
    size = max(
        {_size(row) for row in rows}, key=lambda size: min(_lengths(own, size) for own in (stops, grams)), default=0
    )
    # The fixed cost per call is a different share of a batch of another size.
    stops, grams = ([row for row in own if _size(row) == size] for own in (stops, grams))
    shape = f"{rows[0]['d_in']} x {rows[0]['d_out']}" if rows else "any shape"
    for name, own in zip(ways(backend), (stops, grams, pairs), strict=True):
        lengths = sorted({row["length"] for row in own})
        least = 1 if own is pairs else LEAST
        if len(lengths) < least:
            kind = "a batch of the kind gram" if own is pairs else f"{LEAST} lengths"
            raise MissingError(f"{name} must be measured at {kind} for {shape}, there is {lengths or 'none'}")
    width, weight = stops[0]["d_in"] + stops[0]["d_out"], stops[0]["d_in"] * stops[0]["d_out"]
    lines = [([1.0, row["samples"] / row["tokens"], 0.0, 0.0], row) for row in stops]
    for row in grams:
        lines.append(([1.0, 0.0, row["token_pairs"] / row["tokens"] * width / weight, width / weight], row))
    names = ("base", *NAMES)
    found, errors = _least_squares(lines, [0, 1, 2, 3])
    if found[3] < 0:
        # The cost of a Gram may be entirely in its pairs.
        if found[3] < -_ERRORS * errors[3]:
            raise ValueError(_negative(names[3], found[3], errors[3], backend, shape))
        found, errors = _least_squares(lines, [0, 1, 2])
    for place, name in enumerate(names[:3]):
        if found[place] <= 0:
            raise ValueError(_negative(name, found[place], errors[place], backend, shape))
    base, epilogue, gram, gram_token = (float(f"{value:.3g}") for value in found)
    price = statistics.median(row["ratio"]["median"] * weight / (row["tokens"] * width) for row in pairs)
    first = stops[0]
    prices = (epilogue, gram, gram_token, float(f"{price:.3g}"))
    costs = Costs(first["d_in"], first["d_out"], *prices, workspace, gram_tile, element_bytes)
    residual = max(
        abs(sum(c * f for c, f in zip(line, found, strict=True)) / row["ratio"]["median"] - 1) for line, row in lines
    )
    result = dict(zip(names, errors, strict=True))
    return Fit(costs, base, residual, _loss(costs, stops, grams), result, len(lines) + len(pairs))


def _size(row: Row) -> int:
    """The exponent of the power of two nearest to the tokens: samples of one length may not fill a batch exactly."""
    return round(math.log2(row["tokens"]))


def _lengths(rows: list[Row], size: int) -> int:
    return len({row["length"] for row in rows if _size(row) == size})


def _least_squares(lines: list[tuple[list[float], Row]], places: list[int]) -> tuple[list[float], list[float]]:
    """The unknowns at ``places`` (the others are 0) and their standard errors from the scatter of the rows."""
    spread = [
        math.hypot((row["ratio"]["q3"] - row["ratio"]["q1"]) / 1.35, 0.01 * row["ratio"]["median"]) for _, row in lines
    ]
    weights = 1 / torch.tensor(spread, dtype=torch.float64)
    matrix = (
        torch.tensor([[line[place] for place in places] for line, _ in lines], dtype=torch.float64) * weights[:, None]
    )
    right = torch.tensor([row["ratio"]["median"] for _, row in lines], dtype=torch.float64) * weights
    # The columns differ by orders of magnitude.
    scale = matrix.norm(dim=0)
    inverse = torch.linalg.pinv(matrix / scale)
    solved = inverse @ right
    left = right - (matrix / scale) @ solved
    variance = max(float(left.square().sum()) / max(len(lines) - len(places), 1), 1.0)
    deviations = (inverse @ inverse.T).diagonal().mul(variance).sqrt() / scale
    found, errors = [0.0] * 4, [0.0] * 4
    for place, value, error in zip(places, (solved / scale).tolist(), deviations.tolist(), strict=True):
        found[place], errors[place] = value, error
    return found, errors


def _negative(name: str, value: float, error: float, backend: str, shape: str) -> str:
    advice = {
        "base": "the two ways do not share one pass over the tokens: look at the rows",
        "epilogue": f"sample ends do not show: add rows of {backend}_wgrad with shorter samples (64 and 128 tokens)",
        "gram": f"Grams do not grow with length: add rows of {backend}_gram with longer samples (2048 and 4096 tokens)",
        "gram_token": f"add rows of {backend}_gram with shorter samples (64 and 128 tokens)",
    }[name]
    return f"{name} of {backend} at {shape} must be positive, the rows give {value:.3g} ± {error:.2g}: {advice}"


def _loss(costs: Costs, stops: list[Row], grams: list[Row]) -> float:
    """The largest loss of choosing by the costs, at lengths where both ways were measured on samples of one length.

    A difference within the two rows' quartiles counts as no loss.
    """
    width, weight = costs.d_in + costs.d_out, costs.d_in * costs.d_out
    worst = 0.0
    for stop in stops:
        for gram in grams:
            same = all(stop.get(key) == gram.get(key) for key in ("length", "tokens", "dtype", "layer"))
            if same and not stop["ragged"] and not gram["ragged"]:
                length = stop["length"]
                takes_gram = (costs.gram * length + costs.gram_token) * length * width <= costs.epilogue * weight
                taken, other = (gram, stop) if takes_gram else (stop, gram)
                worst = max(worst, taken["ratio"]["q1"] / other["ratio"]["q3"] - 1)
    return worst


def by_shape(rows: list[Measured], backend: str) -> dict[tuple[int, int, int], list[Measured]]:
    """The backend's rows for its constants, by (d_in, d_out, bytes per element)."""
    found: dict[tuple[int, int, int], list[Measured]] = {}
    for item in rows:
        if (
            item.record["benchmark"] == "ops"
            and item.name in ways(backend)
            and usable(item)
            and item.status != "unable"
        ):
            found.setdefault((item.row["d_in"], item.row["d_out"], element_bytes(item.row)), []).append(item)
    return found


def element_bytes(row: dict[str, Any]) -> int:
    """Bytes per element of a row's inputs."""
    return {"bf16": 2, "fp16": 2, "fp32": 4}[str(row["dtype"])]
