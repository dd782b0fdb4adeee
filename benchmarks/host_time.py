"""Host time of a call of the cuda backend: everything but the launches and the GPU, measured on a CPU.

    python -m benchmarks.host_time [--out FILE]

``fused_grad_norm(backend="cuda")`` runs on CPU tensors, and its launches return at once. Counted are the operator, the
checks, the plan, the allocations and the arguments of every launch; not counted are reading the arguments in C++, the
launches themselves and torch's questions to the driver. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gradnorm_kernels import backends, dispatch, ops, segments
from gradnorm_kernels.backends import cuda, native
from gradnorm_kernels.backends.cuda import launch, segment_table
from gradnorm_kernels.tuning import costs

from . import records

LAUNCHES = ("schedule", "segment_table", "wgrad_norm_sm90", "gram_sm80", "split_fixup", "finish")
TOKENS = 16384
WIDTHS, LENGTHS = (576, 4096), (64, 2048)
CALLS: dict[str, dict[str, Any]] = {
    "norms": {},
    "dW": {"weight_grad": True},
    "groups, dW": {"weight_grad": True, "num_groups": 4},
    "group Gram": {"group_gram": True, "num_groups": 4},
}
REPEATS, CALLS_PER_REPEAT = 60, 50


class Silent:
    """The compiled module, whose launches return at once and are counted."""

    def __init__(self) -> None:
        self.launches = 0
        for name in LAUNCHES:
            setattr(self, name, self._launch)

    def __getattr__(self, name: str) -> Any:
        return getattr(native.module(), name)

    def _launch(self, **fields: object) -> None:
        self.launches += 1


@contextlib.contextmanager
def silent() -> Iterator[Silent]:
    """Inside, ``backend="cuda"`` takes CPU tensors as those of an H200. The index tensors lie on the device."""
    module = Silent()
    gpu = launch.Gpu(90, tuple(module.WGRAD_TILES[90]), 132, costs.SHARED_MEMORY[90])
    context = launch.LaunchContext(module, gpu, 0)

    @contextlib.contextmanager
    def here(device: torch.device) -> Iterator[launch.LaunchContext]:
        yield context

    h200 = costs.Chip("cuda", costs.gpu_name("NVIDIA H200"), 90)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (cuda, "launch_context", here),
            (segment_table, "launch_context", here),
            (cuda, "BACKEND", replace(cuda.BACKEND, unavailable_reason=lambda: None)),
            (costs, "chip", lambda device: h200),
            (segments, "_on_host", lambda device: False),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        _forget()
        stack.callback(_forget)
        yield module


def _forget() -> None:
    backends.forget()
    dispatch.choose.cache_clear()


def measure(call: Callable[[], object]) -> list[float]:
    """Seconds per call, one number per repetition."""
    for _ in range(CALLS_PER_REPEAT):
        call()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(CALLS_PER_REPEAT):
            call()
        seconds.append((time.perf_counter() - began) / CALLS_PER_REPEAT)
    return seconds


def rows() -> Iterator[dict[str, Any]]:
    """One row per width, length and call."""
    with silent() as module:
        for d in WIDTHS:
            x, dy = (torch.zeros(TOKENS, d, dtype=torch.bfloat16) for _ in range(2))
            for length in LENGTHS:
                samples = TOKENS // length
                given: dict[str, Any] = {
                    "cu_seqlens": torch.arange(0, TOKENS + 1, length, dtype=torch.int32),
                    "num_samples": samples,
                }
                for name, options in CALLS.items():
                    ids = {"group_ids": torch.arange(samples) % 4} if "num_groups" in options else {}
                    call = partial(ops.fused_grad_norm, x, dy, backend="cuda", **given, **ids, **options)
                    module.launches = 0
                    call()
                    launches = module.launches
                    lower, median, upper = statistics.quantiles(measure(call), method="inclusive")
                    yield {
                        "d": d,
                        "length": length,
                        "call": name,
                        "launches": launches,
                        "seconds": median,
                        "lower_quartile": lower,
                        "upper_quartile": upper,
                    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.host_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="result file (default: a new one in benchmarks/results)")
    out = parser.parse_args(arguments).out
    reason = native.cuda_unavailable_reason()
    if reason is not None:
        raise SystemExit(f"benchmarks.host_time needs the module compiled with its CUDA kernels: {reason}")
    torch.set_num_threads(1)
    machine = records.machine()
    found = []
    for row in rows():
        found.append(row)
        print(
            f"d {row['d']}, {row['length']} tokens per sample, {row['call']}: {row['launches']} launches, "
            f"{1e6 * row['seconds']:.0f} us ({1e6 * row['lower_quartile']:.0f} to {1e6 * row['upper_quartile']:.0f})",
            flush=True,
        )
    path = out or records.default_path("host_time", machine)
    records.write(path, {"benchmark": "host_time", "machine": machine, "rows": found})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
