"""``python -m tools.sm_event_model``: what a segmented wgrad kernel costs on one multiprocessor, as a model of events.

Nothing here is measured. A kernel is described by its tile, stages, K tile, cluster, stagger and the arithmetic at a
sample's end (:class:`Kernel`), a GPU by what a multiprocessor does per cycle (:class:`Chip`). :func:`simulate` walks
the K tiles of one multiprocessor as events: a producer that fills stages through a link to L2, consumers that wait for
full stages and queue products, one tensor core unit that serves the consumers product by product, and one port of
shared memory that all reads of products, writes of copies, and sums kept in shared memory pass. :func:`layer` counts
the rounds of tiles of a whole layer, the split of the token axis and the launches.

The table's ratios are to a plain GEMM of the same model (``PLAIN``), the way cuBLAS is reported to work: tiles of
128 x 256 in clusters of two without ends of samples, or 128 x 128 where that is faster. Times that the model does not
know are left out on both sides: clocks under load, misses of L2, and the order of tiles.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

from gradnorm_kernels.backends.cuda import splits

#: Tokens in one product instruction of the tensor cores.
STEP = 16
ELEMENT = 2  # bytes of bfloat16
#: Cycles after which a block of a cluster sees what its peer released. Assumed.
REMOTE = 200.0
#: Seconds of a small kernel behind another one: 2 to 3 microseconds.
LAUNCH = 2.5e-6
#: The schedule kernel takes 5 microseconds, as docs/gpu-notes.md counts it, and the finishing kernel a launch.
THREE_LAUNCHES = 5e-6 + LAUNCH


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor does per cycle, and the GPU around it.

    ``products``: multiply-adds. ``port``: bytes of shared memory read or written. ``l2``: bytes from L2 while all
    multiprocessors read. ``latency``: cycles from a copy's request to its first byte. ``clock``: cycles per second
    under load; ``memory``: bytes per second for what is written and read again.
    """

    multiprocessors: int
    products: int
    l2: float
    port: float = 128.0
    latency: float = 800.0
    clock: float = 1.5e9
    memory: float = 4.3e12


@dataclass(frozen=True)
class Kernel:
    """How a kernel works on one tile.

    ``rows`` of d_out and ``columns`` of d_in, K tiles of ``k_tile`` tokens in ``stages`` stages. ``unit``: the part of
    a tile that is multiplied from one read of its operands, (rows, columns). ``consumers``: warpgroups that share the
    rows; on Ampere the block is one. ``cluster``: blocks that share a tile of x by multicast, or, if ``paired``, by
    tensor cores that read each other's half. ``stagger``: K tiles by which a consumer follows the one before it.
    ``end``: cycles without products at a sample's end, per consumer, and ``end_bytes`` of shared memory that pass the
    port there. ``accumulators``: with two, the next sample's products run meanwhile. ``issue``: cycles from a full
    stage to its first product. ``tile_end``: cycles at the end of a tile. ``launches``: beside the main kernel;
    ``prologue``: seconds of the kernels before and after it. ``splits``: the rule that splits the token axis: "triton",
    or the architecture of a CUDA kernel.
    """

    columns: int
    stages: int
    k_tile: int = 64
    rows: int = 128
    unit: tuple[int, int] | None = None
    consumers: int = 2
    cluster: int = 1
    paired: bool = False
    stagger: int = 0
    end: float = 0.0
    end_bytes: int = 0
    accumulators: int = 1
    issue: float = 70.0
    tile_end: float = 1500.0
    prologue: float = 0.0
    splits: str = "sm_90"

    @property
    def link_bytes(self) -> float:
        """From L2, per multiprocessor and token."""
        return (self.rows + self.columns / self.cluster) * ELEMENT

    @property
    def written_bytes(self) -> float:
        """Into shared memory by copies, per token."""
        return self.link_bytes if self.paired else (self.rows + self.columns) * ELEMENT

    @property
    def read_bytes(self) -> float:
        """From shared memory by products, per token."""
        rows, columns = self.unit or (self.rows // self.consumers, self.columns)
        return self.rows * self.columns * ELEMENT * (1 / rows + 1 / columns)

    def product_cycles(self, chip: Chip) -> float:
        """Of the tensor cores, per token."""
        return self.rows * self.columns / chip.products

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Cycles per token if one resource is the only limit, relative to the tensor cores'."""
        tensor = self.product_cycles(chip)
        port = (self.read_bytes + self.written_bytes) / chip.port
        return {"tensor cores": 1.0, "port": port / tensor, "L2": self.link_bytes / chip.l2 / tensor}


class _Gate:
    """Something that happens once: processes wait for it."""

    def __init__(self) -> None:
        self.opened = False
        self.waiting: list[_Process] = []


_Process = Generator["_Gate | float", None, None]


class _Server:
    """A resource that serves one request after the other, in the order in which they come."""

    def __init__(self) -> None:
        self.free = 0.0

    def take(self, now: float, cycles: float) -> float:
        """When a request of ``cycles`` made ``now`` is served."""
        self.free = max(now, self.free) + cycles
        return self.free


class _Clock:
    """Runs processes: generators that yield a gate to wait for, or the time at which they go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: list[tuple[float, int, _Process]] = []
        self._order = count()

    def start(self, process: _Process, at: float | None = None) -> None:
        """Run a process from now on, or from a later time on."""
        heapq.heappush(self._ready, (self.now if at is None else at, next(self._order), process))

    def open(self, gate: _Gate) -> None:
        """Let all go on that wait for the gate."""
        gate.opened = True
        for process in gate.waiting:
            self.start(process)
        gate.waiting.clear()

    def run(self) -> None:
        """Until no process is left that can go on."""
        while self._ready:
            self.now, _, process = heapq.heappop(self._ready)
            for wanted in process:
                if isinstance(wanted, _Gate):
                    if not wanted.opened:
                        wanted.waiting.append(process)
                        break
                elif wanted > self.now:
                    self.start(process, wanted)
                    break


@cache
def simulate(kernel: Kernel, chip: Chip, sample_tokens: int, samples: int) -> float:
    """Cycles of ``samples`` samples of ``sample_tokens`` tokens in one tile, from the first copy to the last end."""
    per_sample = -(-sample_tokens // kernel.k_tile)
    total, steps = per_sample * samples, kernel.k_tile // STEP
    clock, link, port, tensor = _Clock(), _Server(), _Server(), _Server()
    full, empty = ([_Gate() for _ in range(total)] for _ in range(2))
    consumers = range(kernel.consumers)
    done, released = ([[_Gate() for _ in range(total)] for _ in consumers] for _ in range(2))
    ended = [[_Gate() for _ in range(samples)] for _ in consumers]
    holders = [kernel.consumers] * total
    product = kernel.product_cycles(chip) * STEP / kernel.consumers
    reads = kernel.read_bytes * STEP / kernel.consumers / chip.port

    def producer() -> _Process:
        for k_tile in range(total):
            if k_tile >= kernel.stages:
                yield empty[k_tile - kernel.stages]
            clock.start(copy(k_tile))

    def copy(k_tile: int) -> _Process:
        first = clock.now + chip.latency
        for served in [link.take(clock.now, kernel.link_bytes * STEP / chip.l2) for _ in range(steps)]:
            yield max(first, served)
            yield port.take(clock.now, kernel.written_bytes * STEP / chip.port)
        clock.open(full[k_tile])

    def products(consumer: int, k_tile: int) -> _Process:
        if k_tile:
            yield done[consumer][k_tile - 1]
        for _ in range(steps):
            # The operands are read while earlier products run.
            read = port.take(clock.now, reads)
            tensor.free = max(tensor.take(clock.now, product), read)
            yield tensor.free
        clock.open(done[consumer][k_tile])

    def release(consumer: int, k_tile: int) -> None:
        clock.open(released[consumer][k_tile])
        holders[k_tile] -= 1
        if not holders[k_tile]:
            clock.start(emptied(k_tile), clock.now + (REMOTE if kernel.cluster > 1 else 0.0))

    def emptied(k_tile: int) -> _Process:
        clock.open(empty[k_tile])
        yield clock.now

    def end_of_sample(consumer: int, k_tile: int) -> _Process:
        yield done[consumer][k_tile]
        release(consumer, k_tile)
        parts = 16  # the other consumer's products take the port in between
        for _ in range(parts):
            yield max(clock.now + kernel.end / parts, port.take(clock.now, kernel.end_bytes / parts / chip.port))
        clock.open(ended[consumer][k_tile // per_sample])

    def consume(consumer: int) -> _Process:
        for k_tile in range(total):
            yield full[k_tile]
            if consumer and kernel.stagger:
                yield released[consumer - 1][min(k_tile + kernel.stagger - 1, total - 1)]
            sample, at = divmod(k_tile, per_sample)
            if at == 0 and sample >= kernel.accumulators:
                yield ended[consumer][sample - kernel.accumulators]
            yield clock.now + kernel.issue
            clock.start(products(consumer, k_tile))
            if at:
                yield done[consumer][k_tile - 1]
                release(consumer, k_tile - 1)
            if at == per_sample - 1:
                clock.start(end_of_sample(consumer, k_tile))

    clock.start(producer())
    for consumer in consumers:
        clock.start(consume(consumer))
    clock.run()
    stuck = [number for number, gate in enumerate(ended[-1]) if not gate.opened]
    if stuck:
        raise ValueError(
            f"stages must be enough for stagger={kernel.stagger}, got {kernel.stages}: sample {stuck[0]} never ends"
        )
    return clock.now


def cycles_per_token(kernel: Kernel, chip: Chip, sample_tokens: int) -> float:
    """In the middle of a long run of samples: what the second half of it adds."""
    half = max(2, -(-4096 // sample_tokens))
    more = simulate(kernel, chip, sample_tokens, 2 * half) - simulate(kernel, chip, sample_tokens, half)
    return more / (half * sample_tokens)


def layer(kernel: Kernel, chip: Chip, d_in: int, d_out: int, tokens: int, sample_tokens: int) -> float:
    """Seconds of a call: rounds of tiles, the split of the token axis and its fix-up, the kernels before and after.

    Where tokens are split, each part's tile is written and read again in float32.
    """
    split = split_of(kernel, chip, d_in, d_out, tokens, sample_tokens)
    seconds = _rounds(kernel, chip, d_in, d_out, tokens, sample_tokens, split) + kernel.prologue
    if split.parts > 1:
        _, rows, columns = _tiles(kernel, chip, d_in, d_out)
        stored = 4 * split.parts * (rows - split.whole_rows) * columns * kernel.cluster * kernel.rows * kernel.columns
        seconds += 2 * stored / chip.memory + LAUNCH
    return seconds


def split_of(kernel: Kernel, chip: Chip, d_in: int, d_out: int, tokens: int, sample_tokens: int) -> splits.Split:
    """How a kernel splits the tokens of a layer."""
    units, rows, columns = _tiles(kernel, chip, d_in, d_out)
    if kernel.splits != "triton":
        arch = int(kernel.splits.removeprefix("sm_"))
        return splits.choose(arch, rows, columns, d_in, tokens, units, samples=tokens // sample_tokens)
    parts = max(1, min(units // (rows * columns), tokens // (4 * kernel.k_tile)))
    return _even(rows, parts)


def _even(rows: int, parts: int) -> splits.Split:
    """All tiles in equal parts."""
    return splits.Split(0 if parts > 1 else rows, parts, True, 1 / parts, 0.0)


def plain(chip: Chip, kernels: Sequence[Kernel], d_in: int, d_out: int, tokens: int) -> float:
    """Seconds of dW alone by the fastest of plain kernels, whose samples end without arithmetic and without a wait.

    The tokens are split into the best number of parts, and adding them up costs nothing.
    """
    return min(
        _rounds(replace(kernel, accumulators=2), chip, d_in, d_out, tokens, 2048, _even(0, parts))
        for kernel in kernels
        for parts in range(1, 17)
    )


def _tiles(kernel: Kernel, chip: Chip, d_in: int, d_out: int) -> tuple[int, int, int]:
    """(how many blocks or clusters run at a time, rows and columns of the tiles that they take)."""
    return (
        chip.multiprocessors // kernel.cluster,
        -(-d_out // (kernel.rows * kernel.cluster)),
        -(-d_in // kernel.columns),
    )


def _rounds(
    kernel: Kernel, chip: Chip, d_in: int, d_out: int, tokens: int, sample_tokens: int, split: splits.Split
) -> float:
    """Seconds of all tiles, those of the whole rows and the parts of the others."""
    units, rows, columns = _tiles(kernel, chip, d_in, d_out)
    counts = split.whole_rows * columns, (rows - split.whole_rows) * columns
    whole, parts = splits.busiest(*counts, split.parts, split.share, units)
    cycles = cycles_per_token(kernel, chip, sample_tokens) * tokens
    return (whole * (cycles + kernel.tile_end) + parts * (cycles * split.share + kernel.tile_end)) / chip.clock


#: TFLOP/s that fast.cu reports for tiles of 128 x 256 in three stages, without clusters and with (docs/gpu-notes.md).
REPORTED = (777.5, 799.1)
# Without clusters these tiles need 48 bytes a cycle, with them 32: L2 delivers what slows the first down, 46.7. The
# A100's 5120 bytes a cycle are 47.4 for a multiprocessor.
HOPPER = Chip(132, 2048, 48 * REPORTED[0] / REPORTED[1])
AMPERE = Chip(108, 1024, 5120 / 108, latency=600.0, clock=1.4e9, memory=1.6e12)
#: L2's rate is not known: Hopper's is taken.
BLACKWELL = Chip(148, 4096, HOPPER.l2, clock=1.8e9, memory=6e12)

# Ends: counted in SASS for 128 and 192 columns; 256 by the same increase per accumulator, and half of the running sum
# is read from and written to shared memory.
_ENDS = {128: 430.0, 192: 500.0, 256: 570.0}


def hopper(columns: int, stages: int, k_tile: int = 64, cluster: int = 1, stagger: int = 0) -> Kernel:
    """The hand-written Hopper kernel with one of its tiles."""
    rest = 2 * 64 * columns // 2 * 4 if columns > 192 else 0
    return Kernel(
        columns,
        stages,
        k_tile,
        cluster=cluster,
        stagger=stagger,
        end=_ENDS[columns],
        end_bytes=rest,
        prologue=THREE_LAUNCHES,
    )


#: Triton's Hopper kernel: two warpgroups side by side.
TRITON = replace(hopper(128, 4), tile_end=3200.0, splits="triton")
#: 8 warps of 64 x 32 or 64 x 48 in step: the end of a sample is hidden by nothing.
AMPERE_128 = Kernel(128, 4, 32, unit=(64, 32), consumers=1, end=400.0, prologue=THREE_LAUNCHES, splits="sm_80")
AMPERE_192 = replace(AMPERE_128, columns=192, unit=(64, 48), end=500.0)
#: Two accumulators in tensor memory; one block per multiprocessor, without pairs.
BLACKWELL_TRITON = Kernel(
    256, 3, consumers=1, end=1000.0, accumulators=2, tile_end=3200.0, prologue=THREE_LAUNCHES, splits="triton"
)

#: What the ratios are to, by chip: the fastest of these.
PLAIN: dict[Chip, tuple[Kernel, ...]] = {
    HOPPER: (Kernel(256, 4, cluster=2), Kernel(128, 6, cluster=2)),
    AMPERE: (
        Kernel(256, 3, 32, unit=(64, 64), consumers=1),
        Kernel(128, 4, 32, unit=(64, 32), consumers=1),
    ),
    BLACKWELL: (
        Kernel(256, 5, unit=(256, 256), consumers=1, cluster=2, paired=True),
        Kernel(128, 6, unit=(256, 128), consumers=1, cluster=2, paired=True),
    ),
}


TOKENS = 16384
LENGTHS = (2048, 1024, 256)
SHAPES = ((4096, 4096), (2048, 11008), (1536, 1536), (576, 576))


def ratios(
    kernel: Kernel,
    chip: Chip,
    kernels: Sequence[Kernel],
    d_in: int,
    d_out: int,
    lengths: Sequence[int] = LENGTHS,
) -> list[float]:
    """The ratio of a call to plain dW for each length of a sample."""
    of_plain = plain(chip, kernels, d_in, d_out, TOKENS)
    return [layer(kernel, chip, d_in, d_out, TOKENS, length) / of_plain for length in lengths]


def forms() -> Iterator[tuple[str, Kernel, Chip]]:
    """What is predicted: name, kernel, chip."""
    for columns, stages, k_tile in ((128, 7, 64), (192, 5, 64), (256, 6, 32), (256, 3, 64)):
        for cluster in (1, 2) if stages > 3 else (1,):
            for stagger in (0, 1):
                kernel = hopper(columns, stages, k_tile, cluster, stagger)
                name = f"H200, CUDA, {columns} columns, {stages} x {k_tile} tokens"
                name += ", clusters of 2" * (cluster > 1) + ", staggered" * (stagger > 0)
                yield name, kernel, HOPPER
    yield "H200, Triton, 128 columns", TRITON, HOPPER
    yield "A100, CUDA, 128 columns", AMPERE_128, AMPERE
    yield "A100, CUDA, 192 columns", AMPERE_192, AMPERE
    yield "B200, Triton, 256 columns, tensor memory", BLACKWELL_TRITON, BLACKWELL


def predictions() -> list[str]:
    """The table of docs/gpu-notes.md, in lines of Markdown."""
    titles = [f"{d_in} x {d_out}" for d_in, d_out in SHAPES]
    lines = [f"| kernel | {' | '.join(titles)} | outcome |", f"|---|{'---|' * (len(titles) + 1)}"]
    for name, kernel, chip in forms():
        cells = []
        for shape in SHAPES:
            if kernel is BLACKWELL_TRITON and split_of(kernel, chip, *shape, TOKENS, TOKENS).parts > 1:
                cells.append("–")  # split tokens run other loops
            else:
                cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios(kernel, chip, PLAIN[chip], *shape)))
        lines.append(f"| {name} | {' | '.join(cells)} | not measured yet |")
    return lines


def sensitivity() -> list[str]:
    """The ratios at 4096 x 4096 in samples of 2048 tokens with other rates of L2, in lines of Markdown.

    Both sides of a ratio change.
    """
    rates = (5120 / 132, HOPPER.l2, 64.0)
    lines = [f"| kernel | {' | '.join(f'{rate:.1f} bytes' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    for name, kernel, chip in forms():
        if chip is not HOPPER or kernel.stagger:
            continue
        cells = []
        for rate in rates:
            other = replace(chip, l2=rate)
            cells.append(f"{ratios(kernel, other, PLAIN[chip], *SHAPES[0], LENGTHS[:1])[0]:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: one line per sample length, or what docs/gpu-notes.md holds."""
    parser = argparse.ArgumentParser(prog="python -m tools.sm_event_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--predictions", action="store_true", help="the tables of docs/gpu-notes.md")
    parser.add_argument("--columns", type=int, choices=_ENDS, default=256, help="of d_in in a tile (default: 256)")
    parser.add_argument("--stages", type=int, default=6, help="default: 6")
    parser.add_argument("--k_tile", type=int, default=32, help="tokens of a stage, a multiple of 16 (default: 32)")
    parser.add_argument("--cluster", type=int, choices=(1, 2), default=1, help="blocks that share x (default: 1)")
    parser.add_argument("--stagger", type=int, default=0, help="K tiles between the two consumers (default: 0)")
    parser.add_argument("--end", type=float, help="cycles of a sample's end (default: as counted for the columns)")
    parser.add_argument("--l2", type=float, default=HOPPER.l2, help="bytes a cycle and multiprocessor (default: 46.7)")
    parser.add_argument("--port", type=float, default=HOPPER.port, help="bytes a cycle (default: 128)")
    parser.add_argument("--d_in", type=int, default=4096)
    parser.add_argument("--d_out", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a call (default: {TOKENS})")
    parser.add_argument("--samples", type=int, nargs="+", default=LENGTHS, help="tokens per sample, one line each")
    given = parser.parse_args(arguments)
    if given.predictions:
        print("\n".join([*predictions(), "", *sensitivity()]))
        return 0
    if given.k_tile < STEP or given.k_tile % STEP:
        parser.error(f"--k_tile must be a multiple of {STEP}, got {given.k_tile}")
    kernel = hopper(given.columns, given.stages, given.k_tile, given.cluster, given.stagger)
    if given.end is not None:
        kernel = replace(kernel, end=given.end)
    chip = replace(HOPPER, l2=given.l2, port=given.port)
    limits = ", ".join(f"{what} {limit:.2f}" for what, limit in kernel.bounds(chip).items())
    print(f"each limit alone, of the tensor cores' cycles: {limits}")
    of_plain = plain(chip, PLAIN[HOPPER], given.d_in, given.d_out, given.tokens)
    print(f"plain dW, {given.d_in} x {given.d_out}, {given.tokens} tokens: {of_plain * 1e6:.0f} us")
    print("tokens per sample | cycles per token, of the tensor cores' | us of the call | ratio to plain dW")
    for length in given.samples:
        tensor = kernel.product_cycles(chip)
        seconds = layer(kernel, chip, given.d_in, given.d_out, given.tokens, length)
        share = cycles_per_token(kernel, chip, length) / tensor
        print(f"{length:17d} | {share:38.3f} | {seconds * 1e6:14.0f} | {seconds / of_plain:17.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
