"""``python -m gradnorm_kernels tune``: tries the configs that a kernel may take at one shape, and keeps the fastest.

A config counts only if its results are right: each is run on its own, into outputs that were never written before (a
kernel that adds to its output would make the second config's results wrong and the first one's timing a lie), and
held to what the torch backend finds. Only then is it timed. What does not compile, does not run or is wrong is listed
with its reason. The fastest goes into the user's cache folder (:func:`gradnorm_kernels.tuning.save_tuned`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from . import backends, ops, tuning
from .tuning import KernelConfig

KERNELS = ("wgrad", "gram", "gram_norms", "dot")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: How far a config's norms and inner products may be from the torch backend's, relative to the largest.
TOLERANCE = 1e-4


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
    square = [(64, 64), (128, 128), (32, 32)]
    sides = {"wgrad": [(128, 128), (64, 128), (128, 64), (64, 64)], "gram": square, "gram_norms": square}
    depths = {2: (32, 64, 128), 4: (16, 32, 64)}[element_bytes]
    found = dict.fromkeys(frozen)
    tiles = itertools.product(sides.get(kernel, [(64, 64), (128, 64), (32, 128)]), depths, (4, 8), (2, 3, 4))
    for (block_m, block_n), block_k, num_warps, num_stages in tiles:
        stages = num_stages * block_k * (block_m + block_n) * element_bytes
        # Beyond what a multiprocessor has of shared memory, or less than a warp's share of a tile.
        if stages > (232_448 if arch >= 90 else 166_912) or block_m * block_n < num_warps * 512:
            continue
        for group_m, descriptors in {(8, c.descriptors) for c in frozen} | {(4, c.descriptors) for c in frozen}:
            tile = (block_m, block_n, block_k, num_warps, num_stages, group_m, descriptors)
            found[KernelConfig(kernel, arch, element_bytes, *tile)] = None
    return list(found)


def tune(
    configs: Iterable[KernelConfig],
    run: Callable[[KernelConfig], list[Tensor]],
    truth: list[Tensor],
    timer: Callable[[Callable[[], object]], float],
    tolerance: float = TOLERANCE,
) -> list[Trial]:
    """Try every config; the fastest right one comes first, the others after it, those without a time last.

    ``run(config)`` makes new outputs and returns them; ``truth`` is what they must be within ``tolerance`` of, relative
    to each one's largest element; ``timer(call)`` gives the milliseconds of a call.
    """
    trials = []
    for config in configs:
        try:
            reason = _wrong(run(config), truth, tolerance)
            time = timer(partial(run, config)) if reason is None else None
            # Once more: a config may be right only as long as memory is what the first run found.
            reason = reason or _wrong(run(config), truth, tolerance)
        except Exception as error:  # a config that does not fit fails in Triton's, the driver's or ptxas' own ways
            reason, time = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", None
        trials.append(Trial(config, time if reason is None else None, reason))
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
    reason = backends.unable("triton", "cuda", dtype)
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
        trials = tune(configs, run, truth, timer)
        print(f"{kernel} {chosen.d_in} x {chosen.d_out}, {chosen.tokens} tokens, {chosen.dtype}, {chip.gpu}:")
        print("\n".join(f"  {line(trial)}" for trial in trials))
        failed |= keep(chip.gpu, *shape, trials) is None
    return int(failed)


def keep(gpu: str, d_in: int, d_out: int, trials: list[Trial]) -> Path | None:
    """Save the first trial's config if it has a time; the file, or None."""
    if not trials or trials[0].milliseconds is None:
        print("  no config is right: nothing is kept")
        return None
    path = tuning.save_tuned(gpu, d_in, d_out, trials[0].config)
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
