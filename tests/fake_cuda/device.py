"""CUDA tensors without a GPU: they say that they are on "cuda:0" and hold a CPU tensor, on which the work is done.

Every operator is looked at before it runs. What CUDA refuses raises as it does there (tensors of two devices in one
expression); what makes the host wait, and what adds in no fixed order, raises where that is forbidden and is noted
otherwise. Memory that is not initialised is NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from gradnorm_kernels import ops
from tests.fake_cuda import rules

aten = torch.ops.aten
#: An operator of ours runs its own kernel, operator by operator.
_OURS: dict[str, Callable[..., Any]] = {
    "fused_grad_norm": ops._fused_grad_norm,
    "grad_gram": ops._grad_gram,
    "grad_dot": ops._grad_dot,
    "grad_sketch": ops._grad_sketch,
    "embedding_grad_norm": ops._embedding_grad_norm,
    "tied_grad_gram": ops._tied_grad_gram,
}


class Waited(RuntimeError):
    """The host would wait for the device."""


class Unordered(RuntimeError):
    """The result may have other bits the next time."""


class CudaTensor(Tensor):
    """A tensor on a device that is not there. ``inner``: the CPU tensor with its values, shape and strides."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran where no FakeCuda was active")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.device}, {self.inner})"


class FakeCuda(TorchDispatchMode):
    """While it is active, "cuda" is a device.

    ``waits``: what the host waited for so far. ``operations``: the names of torch's operators that took a kernel or a
    copy on the device, and of the kernels launched besides, in order.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library
        self.waits: list[str] = []
        self.operations: list[str] = []
        self.launches: list[tuple[str, int, int]] = []  # kernel, device, stream
        self.silent = False  # launches are looked at and not run: fast, and every result is NaN
        self._strict = self.capturing = self._ordered = False

    @contextlib.contextmanager
    def forbidding(self, waits: bool = False, capture: bool = False, any_order: bool = False) -> Iterator[None]:
        """Inside, raise for what makes the host wait, for what a graph cannot hold, for sums in no fixed order."""
        before = self._strict, self.capturing, self._ordered
        self._strict, self.capturing, self._ordered = waits or capture, capture, any_order
        try:
            yield
        finally:
            self._strict, self.capturing, self._ordered = before

    @contextlib.contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """Another current stream of the current device."""
        device = self.library.fake_device()
        before = self.library.fake_stream(device)
        self.library.fake_set_stream(device, number)
        try:
            yield
        finally:
            self.library.fake_set_stream(device, before)

    def put(self, tensor: Tensor, device: str = "cuda:0") -> CudaTensor:
        """A CPU tensor as one on the device, with the same strides; nothing is copied."""
        with _disable_current_modes():
            return CudaTensor(tensor.detach(), torch.device(device))

    def waited(self, what: str) -> None:
        if self._strict:
            raise Waited(f"synchronizing operation: {what}")
        self.waits.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "gradnorm_kernels":
            with self:
                return _OURS[func.overloadpacket.__name__](*args, **kwargs)
        if func._can_decompose():  # below autograd, composite operators come whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        target = self._target(kwargs.get("device"))
        if not ours and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        target = self._checked(func, args, kwargs, tensors, ours, target)
        if not (func.is_view or "empty" in rules.name_of(func)):
            self.operations.append(rules.name_of(func))

        plain = {id(tensor): tensor.inner for tensor in ours}
        owners = {id(tensor.inner): tensor for tensor in ours}
        inner_args, inner_kwargs = tree_map(lambda v: plain.get(id(v), v), (args, kwargs))
        if kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        inner_kwargs.pop("pin_memory", None)
        result = rules.with_wide_result(func, inner_args, inner_kwargs)
        if result is NotImplemented:
            result = func(*inner_args, **inner_kwargs)
        for tensor in ours:
            if tensor.shape != tensor.inner.shape or tensor.stride() != tensor.inner.stride():
                raise NotImplementedError(f"{func} changes a tensor's shape in place")
        if "empty" in rules.name_of(func):
            tree_map(_spoil, result)

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in owners:
                return owners[id(value)]
            if any(value is tensor for tensor in tensors):
                return value
            return CudaTensor(value, target) if target.type == "cuda" else value

        return tree_map(wrapped, result)

    def _target(self, device: Any) -> torch.device | None:
        if device is None:
            return None
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.library.fake_device())
        return device

    def _checked(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], ours: list[CudaTensor], target: Any
    ) -> torch.device:
        """Refuse what CUDA refuses and what is forbidden here; the device of the results."""
        if func is aten.copy_.default:
            free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._copies(func, args[1].device, args[0].device, free)
            return args[0].device
        if func is aten._to_copy.default:
            to = args[0].device if target is None else target
            self._copies(func, args[0].device, to, kwargs.get("non_blocking", False))
            return to
        devices = {tensor.device for tensor in ours}
        hosts = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
        numbers = all(tensor.dim() == 0 for tensor in hosts)
        name = rules.name_of(func)
        indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(args[0], CudaTensor)
        if len(devices) > 1 or (hosts and ours and not (indexed or (numbers and rules.takes_a_number(func)))):
            found = sorted({str(tensor.device) for tensor in tensors})
            raise RuntimeError(f"{func}: expected all tensors on one device, found {', '.join(found)}")
        why = rules.waits(func, args, kwargs)
        if why is not None:
            self.waited(why)
        why = rules.any_order(func, args, kwargs)
        if why is not None and self._ordered and _from_here():
            raise Unordered(why)
        why = rules.lacking(func, args)
        if why is not None:
            raise NotImplementedError(why)
        if target is None:
            target = next(iter(devices))
        return target

    def _copies(self, func: Any, source: torch.device, to: torch.device, free: bool) -> None:
        if source.type == to.type:
            return
        if to.type == "cpu":
            if free:
                raise Waited(f"{func} to the host without waiting: the host may read it before it is there")
            self.waited(f"{func} copies from {source} to the host")
        elif not free:
            self.waited(f"{func} copies from the host to {to} and waits for the copy")
        elif self.capturing:
            raise Waited(f"{func} copies from the host's memory inside a graph, which would read it at every replay")


def _from_here() -> bool:
    """Whether the library is what called: a model's own backward may add as it likes."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if "/gradnorm_kernels/" in frame.f_code.co_filename:
            return True
    return False


def _spoil(value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() and value.is_floating_point():
        value.fill_(float("nan"))
    elif isinstance(value, Tensor) and value.numel() and value.dtype in (torch.int32, torch.int64):
        value.fill_(-(1 << 29))
