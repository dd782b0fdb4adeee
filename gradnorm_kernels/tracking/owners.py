"""Sums by owner: whose a row is, is known on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import to_device


def resident(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU, where a shape that depends on data would stall the host."""
    return tensor.is_cuda


def by_owner(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """``out[k] = sum over i with owner[i] == k of values[i]``, in a fixed order: [owners, ...] in values' dtype.

    values [n, ...] on any device, owner [n] int64 on the CPU. On a GPU by sorted segments: adding by index there is
    done by atomics, in whatever order they arrive.
    """
    if not resident(values):
        return values.new_zeros(owners, *values.shape[1:]).index_add_(0, owner, values)
    if owners == len(owner) and torch.equal(owner, torch.arange(owners, device="cpu")):
        return values
    order = to_device(torch.argsort(owner, stable=True), values.device)
    lengths = to_device(torch.bincount(owner, minlength=owners), values.device)
    return torch.segment_reduce(values[order], "sum", lengths=lengths, unsafe=True, initial=0.0)
