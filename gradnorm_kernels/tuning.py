"""Measured constants, frozen in ``configs/``: one JSON file a kind of device, and ``default.json`` for the rest.

A file's entries are measurements at shapes (d_in, d_out); a shape that was not measured takes the nearest entry, by the
distance of the logarithms. Costs are in multiply-adds of a plain weight-gradient GEMM on the same device:

- ``boundary``: stopping at a sample's end, per element of the weight;
- ``gram``: a short sample's Gram, per pair of its tokens and element of a token's x and dy; ``gram_token``: the same,
  per token;
- ``pairs``: the tiles over all pairs of tokens, per pair of tokens and element;
- ``slab``: the most elements of a slab of the weight's gradient; ``tile``: the most tokens at a side of a Gram tile.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Costs:
    """The constants that were measured at the shape (d_in, d_out); the fields are the module's list."""

    d_in: int
    d_out: int
    boundary: float
    gram: float
    gram_token: float
    pairs: float
    slab: int
    tile: int


@cache
def entries(device: str) -> tuple[Costs, ...]:
    """Every measured entry for a kind of device ("cpu", "cuda", ...), the default's if it has no file."""
    folder = resources.files(__package__) / "configs"
    path = folder / f"{device}.json"
    if not path.is_file():
        path = folder / "default.json"
    return tuple(Costs(**entry) for entry in json.loads(path.read_text())["entries"])


@cache
def costs(device: str, d_in: int, d_out: int) -> Costs:
    """The entry measured nearest to the shape (d_in, d_out)."""

    def distance(entry: Costs) -> float:
        return math.hypot(math.log(entry.d_in / max(d_in, 1)), math.log(entry.d_out / max(d_out, 1)))

    return min(entries(device), key=distance)
