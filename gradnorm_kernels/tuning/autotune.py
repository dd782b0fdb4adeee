"""``python -m gradnorm_kernels tune``: tries the configs that a kernel may take at one shape, and keeps the fastest.

A config counts only if its results are right: each is run on its own, into outputs that were never written before (a
kernel that adds to its output would make the second config's results wrong and the first one's timing a lie), and
held to what the torch backend finds. Only then is it timed. What does not compile, does not run or is wrong is listed
with its reason. The fastest goes into the user's cache folder (:func:`gradnorm_kernels.tuning.costs.save_tuned`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from .. import backends, ops
from . import costs as tuning
from .costs import KernelConfig

KERNELS = ("wgrad", "gram", "gram_norms", "dot")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: How far a config's norms and inner products may be from the torch backend's, relative to the largest.
TOLERANCE = 1e-4
#: What is tried: (kernel, bytes an element) -> (block_m, block_n, block_k, warps, stages), few enough for minutes. On
#: Hopper a warpgroup takes 64 rows of a tile: with more, ptxas waits for each product of wgrad by itself.
TILES = {
    ("wgrad", 2): [
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 6),
        (128, 128, 32, 8, 4),
        (128, 128, 128, 8, 2),
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (64, 128, 64, 8, 4),
    ],
    ("wgrad", 4): [(64, 32, 32, 4, 3), (64, 32, 16, 4, 3), (64, 32, 16, 4, 4), (32, 64, 32, 4, 3), (64, 64, 16, 8, 3)],
    ("gram", 2): [
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 64, 4, 3),
    ],
    ("gram", 4): [(64, 64, 16, 4, 3), (64, 64, 32, 4, 3), (64, 64, 16, 8, 3), (32, 32, 32, 4, 3)],
    ("gram_norms", 2): [
        (64, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 2),
        (32, 32, 64, 4, 3),
        (128, 128, 64, 8, 3),
    ],
    ("gram_norms", 4): [(64, 64, 16, 4, 3), (64, 64, 32, 4, 3), (64, 64, 16, 8, 3), (32, 32, 32, 4, 3)],
    ("dot", 2): [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 32, 8, 4), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4)],
    ("dot", 4): [(64, 32, 16, 4, 3), (64, 32, 32, 4, 3), (64, 64, 16, 8, 3), (128, 32, 16, 8, 3)],
}


@dataclass(frozen=True)
class Trial:
    """One config: the median time in milliseconds, or why it has none."""

    config: KernelConfig
    milliseconds: float | None
    reason: str | None


def candidates(kernel: str, arch: int, element_bytes: int) -> list[KernelConfig]:
    """The configs to try, the frozen ones of the architecture first. Some may not compile: that is found out."""
    frozen = [
        tuning.kernel_config("", arch, kernel, element_bytes, d, d) for d in (64, 256, 1024, 2048, 4096, 8192, 16384)
    ]
    found = dict.fromkeys(frozen)
    found |= {replace(frozen[0], group_m=group_m): None for group_m in (4, 16)}
    for block_m, block_n, block_k, num_warps, num_stages in TILES[kernel, element_bytes]:
        tile = (block_m, block_n, block_k, num_warps, num_stages, 8, frozen[0].descriptors)
        config = KernelConfig(kernel, arch, element_bytes, *tile)
        if _fits(config):
            found[config] = None
    return list(found)


def _fits(config: KernelConfig) -> bool:
    """Whether every form of a kernel has the shared memory it needs; tuning runs only one of them.

    On Hopper a tile of sums on its way to memory (several groups, split lists) and the operand that clears an
    accumulator come on top of the stages.
    """
    needed = config.num_stages * config.block_k * (config.block_m + config.block_n) * config.element_bytes
    if config.arch < 90:
        return needed <= 166_912
    if config.kernel == "wgrad" and config.element_bytes == 2:
        needed += config.block_m * config.block_n * 4 + 16 * config.block_n * 2 + 1024
    return needed <= 232_448


def tune(
    configs: Iterable[KernelConfig],
    run: Callable[[KernelConfig], list[Tensor]],
    truth: list[Tensor],
    timer: Callable[[Callable[[], object]], float],
    tolerance: float = TOLERANCE,
    better: Callable[[Trial], object] | None = None,
) -> list[Trial]:
    """Try every config; the fastest right one comes first, the others after it, those without a time last.

    ``run(config)`` makes new outputs and returns them; ``truth`` is what they must be within ``tolerance`` of, relative
    to each one's largest element; ``timer(call)`` gives the milliseconds of a call. ``better`` is told of each trial
    that is the fastest so far: what it keeps outlives a run that is cut short.
    """
    trials, best = [], math.inf
    for config in configs:
        try:
            reason = _wrong(run(config), truth, tolerance)
            time = timer(partial(run, config)) if reason is None else None
            # Once more: a config may be right only as long as memory is what the first run found.
            reason = reason or _wrong(run(config), truth, tolerance)
        except Exception as error:  # a config that does not fit fails in Triton's, the driver's or ptxas' own ways
            reason, time = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", None
        trial = Trial(config, time if reason is None else None, reason)
        trials.append(trial)
        if trial.milliseconds is not None and trial.milliseconds < best:
            best = trial.milliseconds
            if better is not None:
                better(trial)
    return sorted(trials, key=lambda trial: (trial.milliseconds is None, trial.milliseconds or 0.0))


def _wrong(results: list[Tensor], truth: list[Tensor], tolerance: float) -> str | None:
    for place, (result, expected) in enumerate(zip(results, truth, strict=True)):
        error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not bool(error <= tolerance):  # NaN is not
            return f"result {place} is off by {float(error):.1e} of its largest element"
    return None


def cuda_timer(device: torch.device, repetitions: int = 20) -> Callable[[Callable[[], object]], float]:
    """Median of CUDA events around calls that each find the L2 cache cold."""
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def timer(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        times = []
        for _ in range(repetitions):
            cold.zero_()
            # About a millisecond, in which the host queues the call's launches: what is timed is the GPU, not the host.
            torch.cuda._sleep(2_000_000)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return median(times)

    return timer


def runner(
    kernel: str, d_in: int, d_out: int, tokens: int, sample_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[KernelConfig], list[Tensor]], list[Tensor]]:
    """(what runs a config on random tokens, in samples of ``sample_tokens``; what the torch backend finds for them)."""
    generator = torch.Generator(device=device).manual_seed(0)
    x, dy = (torch.randn(tokens, d, generator=generator, device=device).to(dtype) for d in (d_in, d_out))
    offsets = [*range(0, tokens, sample_tokens), tokens]
    cu_seqlens = torch.tensor(offsets, device=device)
    v = torch.randn(d_out, d_in, generator=generator, device=device).to(dtype)

    def call(backend: str) -> list[Tensor]:
        if kernel == "gram":
            return [ops.grad_gram(x, dy, cu_seqlens, algorithm="gram", backend=backend)]
        if kernel == "gram_norms":
            # With dW the sums come from its tiles, so that only the norms are left to the Gram.
            found = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, algorithm="gram", backend=backend)
            return [found.sample_sq_norms]
        if kernel == "dot":
            return [ops.grad_dot(x, dy, v, cu_seqlens, backend=backend)]
        found = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, algorithm="wgrad", backend=backend)
        return [found.sample_sq_norms, found.group_sq_norms]

    def run(config: KernelConfig) -> list[Tensor]:
        with tuning.forced(config):
            return call("triton")

    return run, call("torch")


def main(arguments: list[str]) -> int:
    """The command. 2 if Triton cannot run here or an argument is wrong, 1 if no config of a kernel is right."""
    parser = argparse.ArgumentParser(prog="python -m gradnorm_kernels tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d_in", type=_positive, required=True, help="the layer's input width")
    parser.add_argument("--d_out", type=_positive, required=True, help="the layer's output width")
    parser.add_argument("--tokens", type=_positive, required=True, help="rows of x and dy in a call")
    parser.add_argument("--sample_tokens", type=_positive, default=512, help="tokens a sample (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--limit", type=_positive, help="try at most so many configs a kernel")
    chosen = parser.parse_args(arguments)
    dtype = DTYPES[chosen.dtype]
    reason = backends.unavailable_reason("triton", "fused_grad_norm", "cuda", dtype)
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU that torch can use"
    if reason is not None:
        parser.error(f"nothing can be tuned here: backend 'triton' cannot run: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    chip, failed = tuning.chip(device), False
    timer = cuda_timer(device)
    for kernel in chosen.kernels:
        configs = candidates(kernel, chip.arch, dtype.itemsize)[: chosen.limit]
        shape = (chosen.d_in, chosen.d_out)
        run, truth = runner(kernel, *shape, chosen.tokens, chosen.sample_tokens, dtype, device)
        trials = tune(configs, run, truth, timer, better=partial(_save, chip.gpu, *shape))
        print(f"{kernel} {chosen.d_in} x {chosen.d_out}, {chosen.tokens} tokens, {chosen.dtype}, {chip.gpu}:")
        print("\n".join(f"  {line(trial)}" for trial in trials))
        failed |= keep(chip.gpu, *shape, trials) is None
    return int(failed)


def _save(gpu: str, d_in: int, d_out: int, trial: Trial) -> Path:
    return tuning.save_tuned(gpu, d_in, d_out, trial.config)


def keep(gpu: str, d_in: int, d_out: int, trials: list[Trial]) -> Path | None:
    """Save the first trial's config if it has a time; the file, or None."""
    if not trials or trials[0].milliseconds is None:
        print("  no config is right: nothing is kept")
        return None
    path = _save(gpu, d_in, d_out, trials[0])
    print(f"  kept in {path}")
    return path


def line(trial: Trial) -> str:
    """A trial for people."""
    config = trial.config
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.num_warps} warps, {config.num_stages} stages"
    tile += f", rows of {config.group_m}" + (", descriptors" if config.descriptors else "")
    return f"{tile}: " + (trial.reason or f"{trial.milliseconds:.4f} ms")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
