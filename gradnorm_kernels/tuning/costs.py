"""Constants frozen in ``configs/``: what an algorithm costs, which tile a kernel takes, which backend is faster.

One JSON file a chip ("cpu", "nvidia-h200", ...), ``sm80.json`` and ``sm90.json`` for GPUs that have none, and
``default.json`` for the rest. Every block says in ``measured_on`` where its numbers come from, or that nothing was
measured. A shape (d_in, d_out) that has no entry takes the nearest one, by the distance of the logarithms.

A file holds up to three blocks, each with ``measured_on`` and ``entries``:

- ``costs``, one such block a backend: :class:`Costs`;
- ``kernels``: :class:`KernelConfig` and the shape it was found at;
- ``faster``: the name of the fastest backend at a shape.

What ``python -m gradnorm_kernels tune`` found on this machine goes before the frozen kernels, for shapes within a
factor of two of it. It lies in the user's cache folder, a file an entry: written whole under another name and renamed,
so that no process reads half a file and none overwrites what another has found.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

# A tuned config serves shapes within a factor of two of its own, in both widths.
_NEAR = math.hypot(math.log(2), math.log(2))


@dataclass(frozen=True)
class Chip:
    """What a call runs on: the kind of device, a GPU's normalised name, and the architecture kernels are chosen for."""

    type: str
    gpu: str = ""
    arch: int = 0


@dataclass(frozen=True)
class Costs:
    """Prices at the shape (d_in, d_out), in multiply-adds of a plain weight-gradient GEMM on the same device.

    ``boundary``: stopping at a sample's end, per element of the weight. ``gram``: a short sample's Gram, per pair of
    its tokens and element of a token's x and dy; ``gram_token``: the same, per token. ``pairs``: the tiles over all
    pairs of tokens, per pair of tokens and element. ``slab``: the most elements of a slab of the weight's gradient;
    ``tile``: the most tokens at a side of a Gram tile. ``element_bytes``: of the inputs it was found for, 0 for any.
    """

    d_in: int
    d_out: int
    boundary: float
    gram: float
    gram_token: float
    pairs: float
    slab: int
    tile: int
    element_bytes: int = 0


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is compiled and launched.

    ``kernel``: "wgrad", "gram", "dot", ... ``arch``: 80 or 90, the oldest architecture it is for. ``element_bytes``: 2
    or 4. ``block_m`` rows of d_out, ``block_n`` columns of d_in, ``block_k`` tokens. ``group_m``: how many rows of
    tiles are walked together, for the L2 cache. ``descriptors``: loads go through tensor descriptors (TMA).
    """

    kernel: str
    arch: int
    element_bytes: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptors: bool = False


_forced: dict[str, KernelConfig] = {}


@cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device. A GPU newer than Hopper takes what is frozen for Hopper (sm90)."""
    if device.type != "cuda":
        return Chip(device.type)
    major, _ = torch.cuda.get_device_capability(device)
    return Chip("cuda", gpu_name(torch.cuda.get_device_name(device)), 90 if major >= 9 else 80)


def gpu_name(name: str) -> str:
    """A GPU's name as files have it: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def frozen(name: str) -> dict[str, Any]:
    """What ``configs/<name>.json`` holds; empty where there is no such file."""
    path = resources.files(__package__) / "configs" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _files(chip: Chip) -> list[str]:
    """The files to look into for a chip, the most special first."""
    return [chip.gpu, f"sm{chip.arch}", "default"] if chip.type == "cuda" else [chip.type, "default"]


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
    """The entry nearest to the shape (d_in, d_out), among those for this size of element where there are any."""
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
    """Between two shapes: of their logarithms."""
    return math.hypot(math.log(max(a_in, 1) / max(b_in, 1)), math.log(max(a_out, 1) / max(b_out, 1)))


def nearest(
    found: Iterable[dict[str, Any]], kernel: str, arch: int, element_bytes: int, d_in: int, d_out: int
) -> KernelConfig | None:
    """The config of the entry nearest to the shape, of those for this kernel, architecture and size of element."""
    wanted = {"kernel": kernel, "arch": arch, "element_bytes": element_bytes}
    fitting = [entry for entry in found if all(entry.get(key) == value for key, value in wanted.items())]
    if not fitting:
        return None
    best = min(fitting, key=lambda entry: distance(entry["d_in"], entry["d_out"], d_in, d_out))
    return KernelConfig(**{field.name: best[field.name] for field in fields(KernelConfig) if field.name in best})


@cache
def _kernel_config(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int, d_out: int) -> KernelConfig:
    near = [entry for entry in tuned(gpu) if distance(entry["d_in"], entry["d_out"], d_in, d_out) <= _NEAR]
    for found in (near, *(frozen(name).get("kernels", {}).get("entries", ()) for name in (gpu, f"sm{arch}"))):
        config = nearest(found, kernel, arch, element_bytes, d_in, d_out)
        if config is not None:
            return config
    raise ValueError(
        f"kernel must be one with an entry in configs/sm{arch}.json for element_bytes={element_bytes}, got {kernel!r}"
    )


def kernel_config(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int, d_out: int) -> KernelConfig:
    """The config to launch a kernel with: of this machine's tuned ones, then the GPU's file, then the architecture's.

    ``gpu`` is the normalised name (:func:`gpu_name`), "" where there is none (the interpreter, a compile-only check).
    Raises ValueError where there is no config for the kernel at all.
    """
    return _forced.get(kernel) or _kernel_config(gpu, arch, kernel, element_bytes, d_in, d_out)


@contextmanager
def forced(config: KernelConfig) -> Iterator[None]:
    """Inside, the config's kernel is launched with it whatever the shape: for tuning and for tests."""
    before = _forced.get(config.kernel)
    _forced[config.kernel] = config
    try:
        yield
    finally:
        del _forced[config.kernel]
        if before is not None:
            _forced[config.kernel] = before


def tuned_folder() -> Path:
    """Where this machine's tuned configs lie: ``gradnorm_kernels/`` in the user's cache folder."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "gradnorm_kernels"


def _stamp() -> dict[str, Any]:
    """What an entry was found with: another format or another Triton makes it somebody else's."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"format": 1, "triton": triton}


@cache
def tuned(gpu: str) -> tuple[dict[str, Any], ...]:
    """What was tuned for a GPU on this machine. What cannot be read or is not for these versions: one warning."""
    found, ignored = [], []
    stamp, names = _stamp(), {"d_in", "d_out", *(field.name for field in fields(KernelConfig))}
    for path in sorted((tuned_folder() / gpu).glob("*.json")) if gpu else ():
        try:
            content = json.loads(path.read_text())
            if {key: content[key] for key in stamp} != stamp or content["entry"].keys() != names:
                raise ValueError(f"of {', '.join(f'{key} {content[key]}' for key in stamp)}")
            found.append(content["entry"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            ignored.append(f"{path.name} ({type(error).__name__}: {error})")
    if ignored:
        warnings.warn(
            f"{len(ignored)} tuned configs in {tuned_folder() / gpu} are ignored, because they are damaged or of other "
            f"versions than {stamp}: {'; '.join(ignored[:3])}. Tune again, or delete them",
            stacklevel=2,
        )
    return tuple(found)


def save_tuned(gpu: str, d_in: int, d_out: int, config: KernelConfig) -> Path:
    """Keep a config for the shape (d_in, d_out) on a GPU; returns the file. Other entries are not touched."""
    folder = tuned_folder() / gpu
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.kernel}-sm{config.arch}-{config.element_bytes}-{d_in}x{d_out}.json"
    content = _stamp() | {"entry": {"d_in": d_in, "d_out": d_out, **asdict(config)}}
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", suffix=".new", delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, path)
    forget_tuned()
    return path


def forget_tuned() -> None:
    """Read this machine's tuned configs again at the next call."""
    tuned.cache_clear()
    _kernel_config.cache_clear()
