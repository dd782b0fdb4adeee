"""The measured constants of the cost model, frozen in ``configs/``: what an algorithm costs, which backend is faster.

One JSON file per chip ("cpu", "nvidia-h200", ...), ``sm80.json``, ``sm90.json`` and ``sm100.json`` for GPUs that have
none, and ``default.json`` for the rest. Every block says in ``measured_on`` where its numbers come from, or that
nothing was measured. A shape (d_in, d_out) that has no entry takes the nearest one, by the distance of the logarithms.

A file holds up to three blocks, each with ``measured_on`` and ``entries``:

- ``costs``, one such block per backend: :class:`Costs`;
- ``kernels``: :class:`.tiles.KernelConfig` and the shape it was found at;
- ``faster``: the name of the fastest backend at a shape.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

#: Bytes of shared memory that a block may have on an A100, an H100 and a B200, for whose tiles the kernels are built.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Chip:
    """What a call runs on: the kind of device, a GPU's normalised name, and the architecture whose tiles fit it."""

    type: str
    gpu: str = ""
    arch: int = 0


@dataclass(frozen=True)
class Costs:
    """Prices at the shape (d_in, d_out), in multiply-adds of a plain weight-gradient GEMM on the same device.

    ``epilogue``: the end of a sample, per element of the weight. ``gram``: a short sample's Gram, per pair of its
    tokens and element of a token's x and dy; ``gram_token``: the same, per token. ``pairs``: the tiles over all pairs
    of tokens, per pair of tokens and element. ``workspace``: the most elements of the groups' sums held at a time;
    ``gram_tile``: the most tokens at a side of a Gram tile. ``element_bytes``: of the inputs it was found for, 0: any.
    """

    d_in: int
    d_out: int
    epilogue: float
    gram: float
    gram_token: float
    pairs: float
    workspace: int
    gram_tile: int
    element_bytes: int = 0


@cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device."""
    if device.type != "cuda":
        return Chip(device.type)
    arch = architecture(torch.cuda.get_device_capability(device), shared_memory(device))
    return Chip("cuda", gpu_name(torch.cuda.get_device_name(device)), arch)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub does not list this property
    return int(properties.shared_memory_per_block_optin)


def architecture(capability: tuple[int, int], shared_memory: int | None = None) -> int:
    """100, 90 or 80: the newest whose tiles fit. ``shared_memory``: bytes per block, None where it is not known.

    Compute capability 10.x (B200, B300) has tensor memory: tiles of 100. A newer GPU may have less shared memory per
    block than Hopper: 12.x (GeForce RTX 50, RTX PRO, GB10) has 99 KiB. Hopper's tiles fail at launch there, and
    Ampere's fit.
    """
    fits = capability < (12, 0) if shared_memory is None else shared_memory >= SHARED_MEMORY[90]
    if capability < (9, 0) or not fits:
        return 80
    return 100 if capability[0] == 10 else 90


def lineage(arch: int) -> tuple[int, ...]:
    """The architectures whose tiles and costs serve one, its own first: Hopper's serve what 100 has none for."""
    return (100, 90) if arch == 100 else (arch,)


def gpu_name(name: str) -> str:
    """A GPU's name as files have it: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def frozen(name: str) -> dict[str, Any]:
    """What ``configs/<name>.json`` holds; empty where there is no such file."""
    path = resources.files(__package__) / "configs" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _files(chip: Chip) -> list[str]:
    """The files to look into for a chip, the most specific first."""
    if chip.type != "cuda":
        return [chip.type, "default"]
    return [chip.gpu, *(f"sm{arch}" for arch in lineage(chip.arch)), "default"]


@cache
def entries(chip: Chip, backend: str) -> tuple[Costs, ...]:
    """The entries of costs for a backend on a chip: the first of its files that has any, else the default's."""
    for name in _files(chip):
        block = frozen(name).get("costs", {}).get(backend)
        if block:
            return tuple(Costs(**entry) for entry in block["entries"])
    return tuple(Costs(**entry) for entry in frozen("default")["costs"]["any"]["entries"])


def measured_on(chip: Chip, backend: str) -> str:
    """Where the costs of a backend on a chip come from, as its file says it."""
    for name in _files(chip):
        block = frozen(name).get("costs", {}).get(backend)
        if block:
            return str(block["measured_on"])
    return str(frozen("default")["costs"]["any"]["measured_on"])


@cache
def costs(chip: Chip, backend: str, element_bytes: int, d_in: int, d_out: int) -> Costs:
    """The entry nearest to the shape (d_in, d_out), among those for this element size where there are any."""
    found = entries(chip, backend)
    fitting = [entry for entry in found if entry.element_bytes == element_bytes]
    fitting = fitting or [entry for entry in found if entry.element_bytes == 0] or list(found)
    return min(fitting, key=lambda entry: distance(entry.d_in, entry.d_out, d_in, d_out))


@cache
def faster(chip: Chip, element_bytes: int, d_in: int, d_out: int) -> tuple[str, str] | None:
    """(the backend measured fastest at the nearest shape, where it was measured); None where nothing was measured."""
    for name in _files(chip):
        block = frozen(name).get("faster")
        if block:
            fitting = [entry for entry in block["entries"] if entry["element_bytes"] == element_bytes]
            if fitting:
                best = min(fitting, key=lambda entry: distance(entry["d_in"], entry["d_out"], d_in, d_out))
                return best["backend"], block["measured_on"]
    return None


def distance(a_in: int, a_out: int, b_in: int, b_out: int) -> float:
    """The distance between two shapes, of the logarithms of their widths."""
    return math.hypot(math.log(max(a_in, 1) / max(b_in, 1)), math.log(max(a_out, 1) / max(b_out, 1)))
