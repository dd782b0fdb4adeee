"""``python -m gradnorm_kernels tune``: tries the configs of the Triton kernels at one shape and keeps the fastest.

A config counts only if its results are right. Each is run on its own, into outputs that were never written before: a
kernel that adds to its output would make the second config's results wrong and the first one's timing meaningless. The
results are compared with the torch backend's, and only then is the config timed. What does not compile, does not run or
is wrong is listed with its reason. The fastest goes into the user's cache folder (:func:`.tiles.save_tuned`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import backends, ops
from . import costs, tiles
from .tiles import KERNELS, KernelConfig
from .timer import DeviceTimer, median_milliseconds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: How far a config's norms and inner products may be from the torch backend's, relative to the largest.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trial:
    """One config: the median time in milliseconds, or why it has none."""

    config: KernelConfig
    milliseconds: float | None
    reason: str | None


def tune(
    configs: Iterable[KernelConfig],
    run: Callable[[KernelConfig], list[Tensor]],
    truth: list[Tensor],
    timer: Callable[[Callable[[], object]], float],
    tolerance: float = TOLERANCE,
    better: Callable[[Trial], object] | None = None,
) -> list[Trial]:
    """Try every config. The fastest correct one comes first, then the others by time, those without a time last.

    ``run(config)`` makes new outputs and returns them. They must agree with ``truth`` within ``tolerance``, relative to
    the largest element of each. ``timer(call)`` gives the milliseconds of a call. ``better`` is called with each trial
    that is the fastest so far: what it saves survives a run that is cut short.
    """
    trials, best = [], math.inf
    for config in configs:
        try:
            reason = _wrong(run(config), truth, tolerance)
            time = timer(partial(run, config)) if reason is None else None
            # Once more: a config may be right only while memory holds what the first run found there.
            reason = reason or _wrong(run(config), truth, tolerance)
        except Exception as error:  # what does not fit may fail in Triton, in the driver or in ptxas
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


def runner(
    kernel: str, d_in: int, d_out: int, tokens: int, sample_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[KernelConfig], list[Tensor]], list[Tensor]]:
    """(a function that runs a config on random tokens in samples of ``sample_tokens``, the torch backend's results)."""
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
        with tiles.forced(config):
            return call("triton")

    return run, call("torch")


def main(arguments: list[str]) -> int:
    """The command. 2 if Triton cannot run here or an argument is wrong, 1 if no config of a kernel is right."""
    parser = argparse.ArgumentParser(prog="python -m gradnorm_kernels tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d_in", type=_positive, required=True, help="the layer's input width")
    parser.add_argument("--d_out", type=_positive, required=True, help="the layer's output width")
    parser.add_argument("--tokens", type=_positive, required=True, help="rows of x and dy in a call")
    parser.add_argument("--sample_tokens", type=_positive, default=512, help="tokens per sample (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and dy (default: bf16)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all of them")
    parser.add_argument("--limit", type=_positive, help="try at most this many configs per kernel (default: all)")
    chosen = parser.parse_args(arguments)
    dtype = DTYPES[chosen.dtype]
    reason = backends.unavailable_reason("triton", "fused_grad_norm", "cuda", dtype)
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU that torch can use"
    if reason is not None:
        parser.error(f"nothing can be tuned here: backend 'triton' cannot run: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    chip, failed = costs.chip(device), False
    timer = partial(median_milliseconds, DeviceTimer(device))
    for kernel in chosen.kernels:
        configs = tiles.candidates(kernel, chip.arch, dtype.itemsize, costs.shared_memory(device))[: chosen.limit]
        shape = (chosen.d_in, chosen.d_out)
        run, truth = runner(kernel, *shape, chosen.tokens, chosen.sample_tokens, dtype, device)
        trials = tune(configs, run, truth, timer, better=partial(_save, chip.gpu, *shape))
        print(f"{kernel} {chosen.d_in} x {chosen.d_out}, {chosen.tokens} tokens, {chosen.dtype}, {chip.gpu}:")
        print("\n".join(f"  {line(trial)}" for trial in trials))
        failed |= keep(chip.gpu, *shape, trials) is None
    return int(failed)


def _save(gpu: str, d_in: int, d_out: int, trial: Trial) -> Path:
    return tiles.save_tuned(gpu, d_in, d_out, trial.config)


def keep(gpu: str, d_in: int, d_out: int, trials: list[Trial]) -> Path | None:
    """Save the first trial's config if it has a time. Returns the file, or None."""
    if not trials or trials[0].milliseconds is None:
        print("  no config is right: nothing is kept")
        return None
    path = _save(gpu, d_in, d_out, trials[0])
    print(f"  kept in {path}")
    return path


def line(trial: Trial) -> str:
    """A trial as one line of text."""
    config = trial.config
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.num_warps} warps, {config.num_stages} stages"
    tile += f", rows of {config.group_m}" + (", descriptors" if config.descriptors else "")
    return f"{tile}: " + (trial.reason or f"{trial.milliseconds:.4f} ms")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
