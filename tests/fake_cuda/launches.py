"""What stands in for the driver: torch.cuda's answers of an H200, and launches, looked at and then run on the host.

A launch must get tensors of the current device only (Triton launches on the current device, whatever its tensors'),
and a grid that the hardware takes. Triton's kernels then run in its interpreter, the CUDA backend's as
tests/cuda_host compiles them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gradnorm_kernels import backends, canary
from gradnorm_kernels.backends import native, triton
from gradnorm_kernels.backends.cuda import launch
from gradnorm_kernels.tuning import costs as tuning
from tests.cuda_host.build import Host
from tests.fake_cuda.device import CudaTensor, FakeCuda

_GRID = (2**31 - 1, 65535, 65535)


def install(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, host: Host | None = None) -> FakeCuda:
    """A machine with two H200s, until the test is over. With ``host`` its cuda backend runs too."""
    fake = FakeCuda(library)
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448
    )

    def exchange(device: int) -> int:
        before = int(library.fake_device())
        if device >= 0:
            library.fake_set_device(device)
        return before

    def current_stream(device: Any = None) -> SimpleNamespace:
        index = library.fake_device() if device is None else torch.device(device).index
        return SimpleNamespace(cuda_stream=(index + 1) << 16 | library.fake_stream(index))

    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": library.fake_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "current_stream": current_stream,
        "is_current_stream_capturing": lambda: fake.capturing,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    # These two move what they have made out of sight of every mode: here in sight, and blocking as there.
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _then_moved(getattr(torch, name)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    # A first use reads its results. The tests of it in canary.py put the function back.
    monkeypatch.setattr(canary, "passed", lambda *call: True)
    _triton(monkeypatch, fake)
    if host is not None:
        monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: None)
        monkeypatch.setattr(native, "module", lambda: host.module)
        _cuda(monkeypatch, fake, host)
    backends.forget()
    for cached in (launch.unavailable_reason, tuning.chip):
        cached.cache_clear()
    return fake


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """A training script's: everything on a GPU and in bfloat16, unless it is said otherwise."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda:1")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def _then_moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None and not isinstance(data, Tensor):
            device = torch.get_default_device()
        return make(data, **options) if device is None else make(data, **options).to(device)

    return made


def _seen(fake: FakeCuda, kernel: str, tensors: dict[str, Any], stream: int) -> None:
    """Hold a launch to what the driver asks of it, and note it."""
    current = int(fake.library.fake_device())
    for name, tensor in tensors.items():
        if not isinstance(tensor, CudaTensor):
            raise AssertionError(f"{kernel}: {name} is on {tensor.device}, which a kernel cannot read")
        if tensor.device.index != current:
            raise AssertionError(f"{kernel}: {name} is on {tensor.device}, and the launch goes to cuda:{current}")
    fake.launches.append((kernel, current, stream))
    fake.operations.append(kernel)


def _triton(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    run = InterpretedFunction.run

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        bases = {k: v.base if isinstance(v, TensorDescriptor) else v for k, v in given.items()}
        _seen(
            fake,
            kernel.fn.__name__,
            {name: value for name, value in bases.items() if isinstance(value, Tensor)},
            int(torch.cuda.current_stream().cuda_stream),
        )
        if not all(1 <= size <= most for size, most in zip(grid, _GRID, strict=False)):
            raise AssertionError(f"{kernel.fn.__name__}: no GPU takes the grid {grid}")
        # Torch's operators take the numbers of the table of segments as indices.
        if fake.silent and kernel.fn.__name__ != "segment_table_kernel":
            return
        with _disable_current_modes():
            written: list[tuple[Tensor, Tensor]] = []
            plain = [_readable(value, written) for value in args]
            named = {name: _readable(value, written) for name, value in kwargs.items()}
            run(kernel, *plain, grid=grid, warmup=warmup, **named)
            for own, copy in written:
                own.copy_(copy)

    monkeypatch.setattr(InterpretedFunction, "run", launched)


def _readable(value: Any, written: list[tuple[Tensor, Tensor]]) -> Any:
    """An argument as the interpreter takes it, which multiplies the bit patterns of bfloat16: float32 in its place."""
    if isinstance(value, TensorDescriptor):
        base = _readable(value.base, written)
        return TensorDescriptor(base, value.shape, value.strides, value.block_shape, value.padding)
    if not isinstance(value, CudaTensor):
        return value
    inner = value.inner
    if inner.dtype != torch.bfloat16 or not inner.numel():
        return inner
    extent = 1 + sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    own = inner.as_strided((extent,), (1,), inner.storage_offset())
    copy = own.float()
    written.append((own, copy))
    return copy.as_strided(inner.shape, inner.stride())


def _cuda(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, host: Host) -> None:
    run = launch.LaunchContext.launch

    def launched(context: launch.LaunchContext, name: str, **fields: object) -> None:
        tables = {key: value for key, value in fields.items() if isinstance(value, launch.Table)}
        tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
        _seen(fake, name, tensors | {key: table.memory for key, table in tables.items()}, context.stream)
        assert context.stream == torch.cuda.current_stream().cuda_stream, f"{name} goes to another stream"
        if fake.silent and name != "segment_table":
            return
        host.reset(len(fake.launches))
        for table in tables.values():
            host.region(table.data_ptr(), 4 * table.size)
        for tensor in tensors.values():
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                host.region(tensor.data_ptr(), (last + 1) * tensor.element_size())
        run(context, name, **fields)

    monkeypatch.setattr(launch.LaunchContext, "launch", launched)
