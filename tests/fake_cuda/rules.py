"""What CUDA's operators do that the CPU's do not: which wait for the device, which add in no fixed order.

From torch's documentation of ``set_sync_debug_mode`` and ``use_deterministic_algorithms`` and from its sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Operators whose CUDA kernels read something back, whatever their arguments.
_READS_BACK = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "equal",
    "bincount",
    "histogram",
    "isin",
    "multinomial",
    "tensor_split",
    "_linalg_check_errors",
    "linalg_inv_ex",
    "linalg_cholesky_ex",
    "_linalg_eigh",
    "_linalg_svd",
}
#: Adding by atomics, or a scan of floating-point numbers: other bits from run to run.
_ANY_ORDER = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
    "cumsum",
    "cumsum_",
    "cumprod",
    "put",
    "put_",
    "bincount",
    "histc",
    "embedding_dense_backward",
    "_embedding_bag",
}
#: Matrix products, which CUDA has for floating-point numbers alone.
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "dot", "addmv", "mv"}
#: Operators besides the pointwise ones that take a number on the host for a tensor without dimensions.
_TAKES_A_NUMBER = {"fill_", "fill", "masked_fill", "masked_fill_", "where"}


def name_of(func: Any) -> str:
    """ "add" for ``aten.add.Tensor``."""
    return str(func.overloadpacket.__name__)


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why an operator on CUDA tensors makes the host wait; None if it does not. Copies are looked at elsewhere."""
    name = name_of(func)
    if name in _READS_BACK:
        return f"{func} reads a value or a size from the device"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return f"{func} without output_size reads the size from the device"
    if name == "segment_reduce" and not kwargs.get("unsafe", False):
        return f"{func} without unsafe=True checks the lengths on the host"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.device.type == "cpu" for index in indices):
            return f"{func} copies an index from the host and waits for the copy"
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            # A mask and a single number are a masked_fill.
            filled = name.startswith("index_put") and args[2].numel() == 1 and len(indices) == 1
            return None if filled else f"{func} with a mask reads from the device how many elements it picks"
    if name == "where" and any(isinstance(arg, Tensor) and arg.device.type == "cpu" for arg in args):
        return f"{func} copies a number from the host and waits for the copy"
    return None


def any_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why an operator on CUDA tensors may give other bits from run to run; None if it gives the same ones."""
    name = name_of(func)
    if name not in _ANY_ORDER or not any(t.is_floating_point() for t in args if isinstance(t, Tensor)):
        return None
    if name in ("put", "put_") and not kwargs.get("accumulate", False):
        return None
    return f"{func} adds floating-point numbers in no fixed order on CUDA"


def lacking(func: Any, args: tuple[Any, ...]) -> str | None:
    """Why CUDA does not have an operator for these dtypes, which a CPU has; None if it does."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    if name_of(func) in _PRODUCTS and any(not (t.is_floating_point() or t.is_complex()) for t in tensors):
        return f"{func} is not implemented on CUDA for {tensors[-1].dtype}"
    return None


def takes_a_number(func: Any) -> bool:
    """Whether a tensor without dimensions on the host may stand among tensors on a GPU."""
    return torch.Tag.pointwise in func.tags or name_of(func) in _TAKES_A_NUMBER


def with_wide_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``mm`` and ``bmm`` with ``out_dtype``, which the CPU does not have; NotImplemented for any other operator."""
    if func not in (aten.mm.dtype, aten.bmm.dtype):
        return NotImplemented
    a, b, dtype = (*args, *kwargs.values())[:3]
    if dtype not in (a.dtype, torch.float32) or a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"{func}: {a.dtype} and {b.dtype} cannot give {dtype} on CUDA")
    return a.to(dtype) @ b.to(dtype)
