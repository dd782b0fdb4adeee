"""The cuda backend on CPU tensors: its launches go to the module that build.py compiled for the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import backends
from gradnorm_kernels.backends import cuda
from gradnorm_kernels.backends.cuda import segment_table, wgrad
from gradnorm_kernels.backends.cuda.launch import Gpu, LaunchContext, Table
from gradnorm_kernels.tuning.costs import SHARED_MEMORY
from tests.cuda_host.build import Host


@dataclass(frozen=True)
class HostContext(LaunchContext):
    """A launch context whose kernels may touch their own launch's tensors only. Each launch has its own seed."""

    host: Any = None
    seeds: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    def launch(self, name: str, **fields: object) -> None:
        self.host.reset(next(self.seeds))
        for value in fields.values():
            if isinstance(value, Table):
                self.host.region(value.data_ptr(), 4 * value.size)
            elif isinstance(value, Tensor) and value.numel():
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                self.host.region(value.data_ptr(), (last + 1) * value.element_size())
        super().launch(name, **fields)


def host_context(host: Host, arch: int = 80, multiprocessors: int = 2) -> HostContext:
    """A GPU of few multiprocessors, so that blocks go from tile to tile."""
    gpu = Gpu(arch, tuple(host.module.WGRAD_TILES[arch]), multiprocessors, SHARED_MEMORY[arch])
    return HostContext(host.module, gpu, 0, host)


def install(monkeypatch: pytest.MonkeyPatch, context: HostContext) -> None:
    """Let ``backend="cuda"`` take CPU tensors and run in this launch context."""

    @contextlib.contextmanager
    def here(device: torch.device) -> Iterator[LaunchContext]:
        yield context

    anywhere = replace(
        cuda.BACKEND, unavailable_reason=lambda: None, unsupported_reason=lambda device_type, dtype: None
    )
    monkeypatch.setattr(cuda, "BACKEND", anywhere)
    before = backends._process_reason
    monkeypatch.setattr(backends, "_process_reason", lambda name: None if name == "cuda" else before(name))
    # The registry keeps the functions that it has given out: those of this launch context end with it.
    monkeypatch.setattr(backends, "operator", getattr(backends.operator, "__wrapped__", backends.operator))
    # Tests change what a choice depends on.
    monkeypatch.setattr(wgrad, "choose_launch", getattr(wgrad.choose_launch, "__wrapped__", wgrad.choose_launch))
    for module in (cuda, segment_table):
        monkeypatch.setattr(module, "launch_context", here)
