"""Which tile a kernel is launched with: the candidates of every backend with their reasons, and the choice among them.

- Triton's kernels are compiled for the config that :func:`kernel_config` chooses: this machine's tuned configs first,
  for shapes within a factor of two of theirs, then the GPU's frozen file in ``configs/``, then the architecture's.
  ``TRITON_TILES`` lists what ``python -m gradnorm_kernels tune`` tries.
- The CUDA kernels are compiled for the tiles of ``csrc/tiles.h``, each with its reason there. :func:`cuda_config`
  chooses among them at launch. ``CUDA_CANDIDATES`` lists what the benchmarks time against each other.

:func:`forced` overrides the choice of either backend. Tuned configs lie in the user's cache folder, one file per
config, written under another name and renamed: no process reads half a file, and none overwrites another's result.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from . import costs
from .costs import SHARED_MEMORY, distance, lineage

KERNELS = ("wgrad", "gram", "gram_norms", "dot")
# A tuned config serves shapes within a factor of two of its own, in both widths.
_NEAR = math.hypot(math.log(2), math.log(2))


@dataclass(frozen=True)
class KernelConfig:
    """How one Triton kernel is compiled and launched.

    ``kernel``: one of ``KERNELS``. ``arch``: 80, 90 or 100, the oldest it is for. ``element_bytes``: 2 or 4.
    ``block_m`` rows of d_out, ``block_n`` columns of d_in, ``block_k`` tokens. ``group_m``: rows of tiles that are
    walked together, for the L2 cache. ``descriptors``: loads go through tensor descriptors (TMA).
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

    @property
    def key(self) -> str:
        """What a forced config replaces: every launch of this kernel."""
        return self.kernel

    @property
    def nested(self) -> bool:
        """Whether wgrad runs as nested loops, whose accumulators are in tensor memory (sm_100)."""
        return self.arch >= 100

    def edges(self, d_in: int, d_out: int) -> bool:
        """Whether some tiles have a part outside a matrix: then sums are masked, a third more of a sample's end."""
        return d_in % self.block_n != 0 or d_out % self.block_m != 0


@dataclass(frozen=True)
class CudaConfig:
    """How the CUDA segmented wgrad is launched. All configs give the same numbers up to the order of sums.

    ``arch``: 80 or 90. ``columns``: of d_in per tile, one of the tiles in ``csrc/tiles.h``. ``group_m``: rows of tiles
    that are walked together. ``staggered``: on Hopper the second consumer of a block stays a stage behind the first.
    ``clusters``: on Hopper two blocks take tiles below each other and each loads half of x for both, by multicast, if
    :func:`cluster_size` allows it. Off by default: no GPU has run it. ``split_last``: the tokens of the last rows of
    tiles may be split while those of the others are not.
    """

    arch: int
    columns: int
    group_m: int = 8
    staggered: bool = True
    clusters: bool = False
    split_last: bool = True

    @property
    def key(self) -> str:
        """What a forced config replaces: launches on this architecture."""
        return f"cuda sm_{self.arch}"


class TritonTile(NamedTuple):
    """A tile to try in tuning, and why."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    reason: str


class CudaCandidate(NamedTuple):
    """A launch of the CUDA kernel to time against the others, and why."""

    config: CudaConfig
    reason: str


#: What tuning tries: (kernel, bytes per element) -> tiles, few enough for minutes. Wgrad holds two float32 accumulators
#: per tile, which is why its tiles stop at 128 x 128: 128 x 256 spills. On Hopper a warpgroup takes 64 rows of a tile:
#: with more, ptxas waits for every product of wgrad by itself.
TRITON_TILES: dict[tuple[str, int], list[TritonTile]] = {
    ("wgrad", 2): [
        TritonTile(128, 128, 64, 8, 4, "Hopper's frozen tile: the largest whose accumulators stay in registers"),
        TritonTile(128, 128, 64, 8, 3, "a stage less, for a GPU or a form with less shared memory"),
        TritonTile(128, 128, 32, 8, 6, "shorter steps: less padding at the ends of samples of few tokens"),
        TritonTile(128, 128, 32, 8, 4, "Ampere's frozen tile: 64 KiB of operands"),
        TritonTile(128, 128, 128, 8, 2, "longer steps: fewer waits in long samples"),
        TritonTile(64, 128, 64, 4, 3, "two programs per multiprocessor: one multiplies while the other ends a sample"),
        TritonTile(64, 128, 64, 4, 4, "the same with a stage more"),
        TritonTile(128, 64, 64, 8, 4, "twice the tiles, for small layers; narrow in d_in"),
        TritonTile(64, 128, 64, 8, 4, "twice the tiles, for small layers; narrow in d_out"),
    ],
    ("wgrad", 4): [
        TritonTile(64, 32, 32, 4, 3, "the frozen tile: float32 products run without tensor cores, in registers"),
        TritonTile(64, 32, 16, 4, 3, "shorter steps"),
        TritonTile(64, 32, 16, 4, 4, "shorter steps, a stage more"),
        TritonTile(32, 64, 32, 4, 3, "wide in d_in"),
        TritonTile(64, 64, 16, 8, 3, "a larger tile: fewer reads of x and dy"),
    ],
    ("gram", 2): [
        TritonTile(128, 128, 64, 8, 4, "Hopper's frozen tile"),
        TritonTile(128, 128, 64, 8, 3, "Ampere's frozen tile: a stage less fits 99 KiB of shared memory"),
        TritonTile(128, 128, 32, 8, 4, "shorter steps, for small d_in and d_out"),
        TritonTile(64, 64, 64, 4, 4, "less waste where samples are short: work per tile grows with the square"),
        TritonTile(64, 64, 64, 4, 3, "the same with a stage less"),
    ],
    ("gram", 4): [
        TritonTile(64, 64, 16, 4, 3, "the frozen tile"),
        TritonTile(64, 64, 32, 4, 3, "longer steps"),
        TritonTile(64, 64, 16, 8, 3, "twice the threads per tile"),
        TritonTile(32, 32, 32, 4, 3, "less waste where samples are short"),
    ],
    ("gram_norms", 2): [
        TritonTile(64, 64, 64, 4, 3, "the frozen tile: a short sample meets one or two of them"),
        TritonTile(64, 64, 64, 4, 4, "a stage more"),
        TritonTile(64, 64, 128, 4, 2, "longer steps, for wide layers"),
        TritonTile(32, 32, 64, 4, 3, "less waste for samples of about 32 tokens"),
        TritonTile(128, 128, 64, 8, 3, "fewer reads for samples of several hundred tokens"),
    ],
    ("gram_norms", 4): [
        TritonTile(64, 64, 16, 4, 3, "the frozen tile"),
        TritonTile(64, 64, 32, 4, 3, "longer steps"),
        TritonTile(64, 64, 16, 8, 3, "twice the threads per tile"),
        TritonTile(32, 32, 32, 4, 3, "less waste for samples of about 32 tokens"),
    ],
    ("dot", 2): [
        TritonTile(128, 64, 64, 8, 3, "the frozen tile"),
        TritonTile(128, 64, 64, 8, 4, "a stage more"),
        TritonTile(128, 64, 32, 8, 4, "shorter steps, for small d_in"),
        TritonTile(64, 64, 64, 4, 3, "twice the programs, for few tokens"),
        TritonTile(64, 64, 64, 4, 4, "the same with a stage more"),
    ],
    ("dot", 4): [
        TritonTile(64, 32, 16, 4, 3, "the frozen tile"),
        TritonTile(64, 32, 32, 4, 3, "longer steps"),
        TritonTile(64, 64, 16, 8, 3, "a larger tile: fewer reads of x"),
        TritonTile(128, 32, 16, 8, 3, "more tokens per tile: fewer reads of v"),
    ],
}

#: What tuning tries besides on B200 and B300: wgrad by nested loops, whose accumulators are in tensor memory. Where
#: 256 columns do not divide d_in, or 128 rows d_out, the launch takes 128 columns (``wgrad_sm100.fitting_config``).
NESTED_TILES: dict[tuple[str, int], list[TritonTile]] = {
    ("wgrad", 2): [
        TritonTile(128, 256, 64, 8, 3, "the frozen tile: two accumulators fill tensor memory"),
        TritonTile(128, 256, 32, 8, 6, "shorter steps: less padding at the ends of samples of few tokens"),
        TritonTile(128, 128, 64, 8, 5, "twice the tiles, for small layers"),
    ],
}

#: What the benchmarks time, by name; each on its architecture.
CUDA_CANDIDATES = {
    "columns_128": CudaCandidate(CudaConfig(90, 128), "1024 tiles at 4096 x 4096: 7.8 rounds of 132 multiprocessors"),
    "columns_192": CudaCandidate(
        CudaConfig(90, 192), "fewer bytes from L2 per product; 704 tiles: five rounds, and 44 tiles in parts"
    ),
    "columns_256": CudaCandidate(CudaConfig(90, 256), "the fewest bytes from L2; 512 tiles: 3.9 rounds"),
    "columns_128_abreast": CudaCandidate(CudaConfig(90, 128, staggered=False), "what staggering the consumers costs"),
    "columns_192_abreast": CudaCandidate(CudaConfig(90, 192, staggered=False), "what staggering the consumers costs"),
    "columns_256_abreast": CudaCandidate(CudaConfig(90, 256, staggered=False), "what staggering the consumers costs"),
    "columns_192_band_12": CudaCandidate(CudaConfig(90, 192, group_m=12), "another order of tiles in the L2 cache"),
    "columns_256_band_16": CudaCandidate(
        CudaConfig(90, 256, group_m=16), "a round of 132 tiles is 2048 rows by 2112 columns, the squarest band"
    ),
    "columns_192_unsplit": CudaCandidate(
        CudaConfig(90, 192, split_last=False), "704 tiles in six rounds: what splitting the last rows gains"
    ),
    "columns_192_clusters": CudaCandidate(CudaConfig(90, 192, clusters=True), "x from L2 once for two blocks"),
    "columns_256_clusters": CudaCandidate(CudaConfig(90, 256, clusters=True), "x from L2 once for two blocks"),
    "sm80_columns_128": CudaCandidate(
        CudaConfig(80, 128), "an A100: ten rounds at 4096 x 4096, the port of shared memory full"
    ),
    "sm80_columns_192": CudaCandidate(CudaConfig(80, 192), "an A100: six and a half longer rounds, the port at 79%"),
}

_forced: dict[str, Any] = {}


@contextmanager
def forced(config: KernelConfig | CudaConfig) -> Iterator[None]:
    """Inside, what ``config`` is for is launched with it whatever the shape: to time and test configs."""
    before = _forced.get(config.key)
    _forced[config.key] = config
    try:
        yield
    finally:
        del _forced[config.key]
        if before is not None:
            _forced[config.key] = before


def all_forced() -> tuple[Any, ...]:
    """The configs that are forced now, for the key of a cached choice."""
    return tuple(_forced.values())


def tile_cycles(arch: int, columns: int, shared_memory: int) -> float:
    """Estimated cycles of a multiprocessor per token of a tile of 128 x ``columns``, by the slowest of its parts.

    Hopper: ``max(128 columns / 2048, 2 (128 + columns) / 46.6)``, the products, and the bytes of x and dy from L2.
    Ampere: ``max(128 columns / rate, port / (0.9 * 128))``, the products, and the bytes through the port of shared
    memory, ``port = 8 * 2 (64 + columns / 4) + 2 (128 + columns)``: eight warps read operands, and copies write them.

    ``shared_memory``: bytes that a block may have on the GPU. It tells an A100, with a ``rate`` of 1024 multiply-adds a
    cycle, from the GPUs of 8.6 and 8.9, which have 99 KiB and a rate of at most 512. The bytes a cycle from L2 and the
    share of the port, 0.9, that can be kept busy are estimates. No GPU has run any of this.
    """
    if arch >= 90:
        return max(128 * columns / 2048, 2 * (128 + columns) / 46.6)
    rate = 1024 if shared_memory >= SHARED_MEMORY[80] else 512
    port = 8 * 2 * (64 + columns / 4) + 2 * (128 + columns)
    return max(128 * columns / rate, port / (0.9 * 128))


def end_cycles(arch: int, columns: int) -> float:
    """Estimated cycles of a multiprocessor that a sample's end costs beside the products, for samples of 128 tokens.

    By ``tools/sm_event_model.py`` (a test compares them). Hopper's second consumer multiplies while the first ends a
    sample, but with 256 columns half of the group's sum passes the port of shared memory, which is full already.
    """
    if arch < 90:
        return 535.0
    return {128: 239.0, 192: 203.0, 256: 1161.0}.get(columns, 0.0)


def cuda_config(
    arch: int, columns: Sequence[int], shared_memory: int, rounds: Callable[[int], float], ends: float = 0.0
) -> CudaConfig:
    """The launch of the CUDA wgrad, from the ``columns`` that tiles are compiled for.

    ``argmin over columns of rounds(columns) (tile_cycles(columns) + ends end_cycles(columns))``, the estimated time per
    token; the narrowest of equals. ``rounds``: how many tiles of that width the busiest multiprocessor takes, as a
    share of all tokens. ``ends``: ends of samples per token. ``shared_memory``: see :func:`tile_cycles`.

    No GPU has run this choice. On an H200 it takes 256 columns at 4096 x 4096 and long samples: four rounds of 16.5
    cycles per token, where 192 columns take 5.4 of 13.7 (the last rows of tiles are split) and 128 take eight of 11.
    For samples below about 450 tokens it takes 192.

    Raises ValueError if a forced config names a tile that is not compiled.
    """
    chosen: CudaConfig | None = _forced.get(CudaConfig(arch, 0).key)
    if chosen is None:

        def time(width: int) -> float:
            return rounds(width) * (tile_cycles(arch, width, shared_memory) + ends * end_cycles(arch, width))

        chosen = CudaConfig(arch, min(sorted(columns), key=time))
    if chosen.columns not in columns:
        raise ValueError(
            f"columns must be one of {sorted(columns)} on sm_{arch}, the tiles of csrc/tiles.h, got {chosen.columns}"
        )
    return chosen


def cluster_size(config: CudaConfig, tile_rows: int, work_tiles: int, multiprocessors: int) -> int:
    """Blocks per cluster of a launch: 2 where ``config.clusters`` is set and every condition holds, else 1.

    The architecture is Hopper's. ``tile_rows``, the number of rows of tiles of the weight, is even, because a cluster
    takes two tiles below each other. ``work_tiles``, tiles times splits, is at least ``multiprocessors``: with fewer
    blocks at a time L2 is not the bottleneck. The results have the same bits either way.
    """
    fits = config.arch >= 90 and tile_rows % 2 == 0 and work_tiles >= multiprocessors >= 2
    return 2 if config.clusters and fits else 1


def candidates(kernel: str, arch: int, element_bytes: int, shared_memory: int | None = None) -> list[KernelConfig]:
    """The configs to try, the architecture's frozen ones first. Some may not compile: tuning finds out.

    ``shared_memory``: bytes that a block may have on the GPU; None: those of an A100, an H100 or a B200.
    """
    limit = SHARED_MEMORY[arch] if shared_memory is None else shared_memory
    found = dict.fromkeys(
        kernel_config("", arch, kernel, element_bytes, d, d) for d in (64, 256, 1024, 2048, 4096, 8192, 16384)
    )
    first = next(iter(found))
    found |= {replace(first, group_m=group_m): None for group_m in (4, 16)}
    for own in lineage(arch):
        for tile in (NESTED_TILES if own == 100 else TRITON_TILES).get((kernel, element_bytes), ()):
            config = KernelConfig(kernel, own, element_bytes, *tile[:5], first.group_m, first.descriptors)
            if shared_memory_needed(config) <= limit:
                found[config] = None
    return list(found)


def shared_memory_needed(config: KernelConfig) -> int:
    """Bytes of shared memory that every form of a kernel needs at most; tuning runs only one of the forms.

    On Hopper a tile of sums on its way to memory (several groups, split token axis) and the operand that clears an
    accumulator come on top of the stages; with nested loops, a quarter of dW's tile and the barriers.
    """
    needed = config.num_stages * config.block_k * (config.block_m + config.block_n) * config.element_bytes
    if config.nested:
        needed += config.block_m * config.block_n // 2 + 256
    elif config.arch >= 90 and config.kernel == "wgrad" and config.element_bytes == 2:
        needed += config.block_m * config.block_n * 4 + 16 * config.block_n * 2 + 1024
    return needed


def nearest(
    found: Iterable[dict[str, Any]], kernel: str, arch: int, element_bytes: int, d_in: int, d_out: int
) -> KernelConfig | None:
    """The config of the entry nearest to the shape, of those for this kernel, architecture (or one that serves it) and
    element size; of equally near ones that of the architecture itself."""
    wanted, served_by = {"kernel": kernel, "element_bytes": element_bytes}, lineage(arch)
    fitting = [entry for entry in found if all(entry.get(key) == value for key, value in wanted.items())]
    fitting = [entry for entry in fitting if entry.get("arch") in served_by]
    if not fitting:
        return None
    best = min(
        fitting,
        key=lambda entry: (distance(entry["d_in"], entry["d_out"], d_in, d_out), served_by.index(entry["arch"])),
    )
    return KernelConfig(**{field.name: best[field.name] for field in fields(KernelConfig) if field.name in best})


@cache
def _kernel_config(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int, d_out: int) -> KernelConfig:
    near = [entry for entry in tuned(gpu) if distance(entry["d_in"], entry["d_out"], d_in, d_out) <= _NEAR]
    files = (gpu, *(f"sm{older}" for older in lineage(arch)))
    for found in (near, *(costs.frozen(name).get("kernels", {}).get("entries", ()) for name in files)):
        config = nearest(found, kernel, arch, element_bytes, d_in, d_out)
        if config is not None:
            return config
    raise ValueError(
        f"kernel must be one with an entry in configs/sm{arch}.json for element_bytes={element_bytes}, got {kernel!r}"
    )


def kernel_config(gpu: str, arch: int, kernel: str, element_bytes: int, d_in: int, d_out: int) -> KernelConfig:
    """The config to launch a Triton kernel with: of this machine's tuned ones, the GPU's file, the architecture's.

    ``gpu`` is the normalised name (:func:`.costs.gpu_name`), "" where there is none (the interpreter, a compile-only
    check). Raises ValueError if there is no config for the kernel at all.
    """
    return _forced.get(kernel) or _kernel_config(gpu, arch, kernel, element_bytes, d_in, d_out)


def tuned_folder() -> Path:
    """Where this machine's tuned configs lie: ``gradnorm_kernels/`` in the user's cache folder."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "gradnorm_kernels"


def _stamp() -> dict[str, Any]:
    """What an entry was found with. An entry of another format or another Triton is not used."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"format": 2, "triton": triton}


@cache
def tuned(gpu: str) -> tuple[dict[str, Any], ...]:
    """What was tuned for a GPU on this machine. One warning names what cannot be read or is for other versions."""
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
    """Keep a config for the shape (d_in, d_out) on a GPU; returns the file. Other entries are not touched, but for one
    of the same kernel and shape with tiles of another architecture."""
    folder = tuned_folder() / gpu
    folder.mkdir(parents=True, exist_ok=True)
    shape = f"{config.element_bytes}-{d_in}x{d_out}.json"
    path = folder / f"{config.kernel}-sm{config.arch}-{shape}"
    content = _stamp() | {"entry": {"d_in": d_in, "d_out": d_out, **asdict(config)}}
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", suffix=".new", delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, path)
    for other in SHARED_MEMORY.keys() - {config.arch}:
        (folder / f"{config.kernel}-sm{other}-{shape}").unlink(missing_ok=True)
    forget_tuned()
    return path


def forget_tuned() -> None:
    """Read this machine's tuned configs again at the next call."""
    tuned.cache_clear()
    _kernel_config.cache_clear()
