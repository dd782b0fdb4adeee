"""Calling the compiled CUDA launchers: on which device and stream, with which tensors, for which GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...segments import rows
from ...tuning.costs import shared_memory
from .. import native

#: Major compute capability -> the architecture whose kernels run on it.
ARCHITECTURES = {8: 80, 9: 90}


class Table(NamedTuple):
    """``size`` int32 elements of ``memory`` from ``start`` on: a view for launches.

    A tensor of its own would take the host ten times longer to make, and a call has up to eighteen.
    """

    memory: Tensor
    start: int
    size: int

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self.memory.data_ptr() + 4 * self.start

    def part(self, start: int, size: int) -> Table:
        """``size`` elements from ``start`` on."""
        return Table(self.memory, self.start + start, size)

    def tensor(self) -> Tensor:
        """The elements as a tensor."""
        return self.memory[self.start : self.start + self.size]


class Gpu(NamedTuple):
    """What the choice of a launch depends on.

    ``arch`` says which weight-gradient kernel runs (80 or 90). ``columns``: of the tiles that it is compiled for.
    ``shared_memory``: bytes that a block may have.
    """

    arch: int
    columns: tuple[int, ...]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class LaunchContext:
    """The device and stream of one call. ``module`` is ``gradnorm_kernels._C``."""

    module: Any
    gpu: Gpu
    stream: int

    def launch(self, name: str, **fields: object) -> None:
        """Start a launch of ``csrc/launchers.h``: fields by name, a tensor or table for its address, None for null.

        Raises RuntimeError that names the launch if the device refuses it. The tensors need not outlive the call: torch
        reuses their memory in the order of the stream.
        """
        getattr(self.module, name)(**fields, stream=self.stream)

    def size(self, name: str, **sizes: int) -> int:
        """The number of rows of a launch's results."""
        return int(getattr(self.module, name)(**sizes))


@contextmanager
def launch_context(device: torch.device) -> Iterator[LaunchContext]:
    """The launch context of ``device``, which is current inside. Raises RuntimeError for a GPU without kernels."""
    gpu = _gpu(device)
    with torch.cuda.device(device):
        yield LaunchContext(native.module(), gpu, torch.cuda.current_stream(device).cuda_stream)


@cache
def _gpu(device: torch.device) -> Gpu:
    arch = architecture(torch.cuda.get_device_capability(device))
    if arch is None:
        raise RuntimeError(f"backend='cuda' cannot run on {device}: {_no_kernels(torch.cuda.get_device_name(device))}")
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Gpu(arch, tuple(native.module().WGRAD_TILES[arch]), count, shared_memory(device))


def architecture(capability: tuple[int, int]) -> int | None:
    """80 or 90 for the compute capabilities that have kernels, else None."""
    return ARCHITECTURES.get(capability[0])


@cache
def unavailable_reason() -> str | None:
    """Why no launch can run in this process; None if one can."""
    reason = native.cuda_unavailable_reason()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; use backend='torch', or backend='auto' to have one chosen"
    if torch.version.cuda is None:  # an AMD GPU has a capability too: MI300's is 9.4
        return "it is for NVIDIA GPUs, and this torch is built for others; use backend='torch'"
    devices = range(torch.cuda.device_count())
    if not any(architecture(torch.cuda.get_device_capability(device)) for device in devices):
        return _no_kernels(torch.cuda.get_device_name(0))
    module = native.module()
    return old_driver(module.build_info()["cuda"], module.driver_version())


def old_driver(built: str, driver: int) -> str | None:
    """Why a driver (13020 for CUDA 13.2) cannot run what was built with a toolkit ("13.0"); None if it can.

    The module holds its own CUDA runtime, which runs on drivers of its major version or newer.
    """
    if driver // 1000 >= int(built.partition(".")[0]):
        return None
    supported = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"gradnorm_kernels was built with CUDA {built} and the driver is for CUDA {supported}: update the driver, or "
        "install gradnorm_kernels again with an nvcc of the driver's CUDA version or older"
    )


def _no_kernels(name: str) -> str:
    return (
        f"its kernels are for compute capability 8.x and 9.x (A100, H100 and their kin), and {name} has another; "
        "use backend='triton' or backend='torch'"
    )


def operand(tensor: Tensor) -> Tensor:
    """``tensor`` [T, d] or [B, L, d] of 2-byte elements as [T, d] whose rows start at multiples of 16 bytes.

    Copied if they do not: a row width that is no multiple of 8, or a view that starts in between. Rows that overlap are
    copied too, such as one row expanded over all tokens: it is not documented whether a tensor map may have such
    strides.
    """
    tensor = rows(tensor)
    spaced = tensor.stride(0) % 8 == 0 and tensor.stride(0) >= tensor.shape[1]
    if tensor.data_ptr() % 16 == 0 and (spaced or len(tensor) == 1):
        return tensor
    tokens, width = tensor.shape
    padded = tensor.new_empty(tokens, (width + 7) // 8 * 8)[:, :width]
    return padded.copy_(tensor)
