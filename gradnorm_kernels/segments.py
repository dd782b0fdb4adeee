"""Where each sample's rows are, as tensors on x's device: what the GPU backends read instead of numbers on the host.

Values that lie on the CPU are checked there and raise. Values on a GPU are never read back: they are clamped so that no
kernel leaves its arrays, and ``Segments.valid`` turns every result into NaN where they were wrong (dW in its first
row). Only sizes that nothing but the values tell (N from ``sample_ids`` alone, K from ``group_ids``) are read, which
synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import checks
from .layout import to_device


@dataclass(frozen=True)
class Segments:
    """Rows ``start[s]`` to ``end[s]`` belong to ``sample[s]``, which is of ``group[s]``.

    The order is that of (group, sample), and of the rows' order in cu_seqlens within a sample: a sample's segments are
    neighbours, and so are a group's samples. Segments may be empty; samples and groups may have none.

    ``start``, ``end``: [S] int64, ``sample``, ``group``: [S] int32, all contiguous on x's device. Each begins at a
    multiple of 16 bytes, whatever the sizes: Triton compiles a kernel anew for pointers that do not.
    ``valid``: bool [], False where values on the device were out of range; None where they were checked on the host.
    """

    start: Tensor
    end: Tensor
    sample: Tensor
    group: Tensor
    samples: int
    groups: int
    valid: Tensor | None

    def guard(self, result: Tensor) -> Tensor:
        """``result``, or NaN throughout if the index tensors' values were out of range."""
        return result if self.valid is None else torch.where(self.valid, result, torch.nan)

    def guard_weight_grad(self, weight_grad: Tensor) -> Tensor:
        """The same for dW, in place and in its first row alone: all of it would cost one more pass over it."""
        if self.valid is not None:
            weight_grad[:1].masked_fill_(~self.valid, torch.nan)
        return weight_grad

    def lengths(self) -> Tensor:
        """The tokens of each sample: [N] int64."""
        return self._lengths

    @cached_property
    def _lengths(self) -> Tensor:
        return self.start.new_zeros(self.samples).index_add_(0, self.sample, self.end - self.start)

    def each_alone(self) -> Segments:
        """The same segments with every sample as a group of its own, in the order of the samples."""
        order = torch.argsort(self.sample, stable=True)
        start, end, sample = self.start[order], self.end[order], self.sample[order]
        return Segments(start, end, sample, sample, self.samples, self.samples, self.valid)


def prepare(
    x: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    sizes: checks.Sizes,
) -> Segments:
    """The segments of a call whose shapes :mod:`gradnorm_kernels.checks` has passed.

    Raises ValueError for values on the CPU that do not ascend from 0 to T or are out of range.
    """
    given = [tensor for tensor in (cu_seqlens, sample_ids, group_ids) if tensor is not None]
    # Without any, or with values already there, everything is made on x's device; else on the host, and copied once.
    device = x.device if not given or any(tensor.device == x.device for tensor in given) else given[0].device
    checked = _on_host(device)
    tokens, count = sizes.tokens, sizes.segments
    flags: list[Tensor] = []

    sample, samples = _ids("sample_ids", sample_ids, sizes.samples, "samples", device, flags)
    group, groups = _ids("group_ids", group_ids, sizes.groups, "groups", device, flags)
    samples = count if sample_ids is None else samples
    groups = 1 if group_ids is None else groups
    if (count and not samples) or (samples and not groups):
        # Segments of no sample, or samples of no group: their ids cannot have been in range.
        count = 0
        flags.append(torch.zeros((), dtype=torch.bool, device=device))
    start, end = _rows(x, cu_seqlens, tokens, sizes.segments, device, flags)
    start, end = start[:count], end[:count]
    sample = torch.arange(count, dtype=torch.int32, device=device) if sample is None else sample[:count]
    of = torch.zeros_like(sample) if group is None else group[sample] if count else sample
    if sample_ids is not None or group_ids is not None:
        order = torch.argsort(of.long() * samples + sample, stable=True)
        start, end, sample, of = start[order], end[order], sample[order], of[order]

    if device != x.device:
        # One copy for all four; a stream takes it from memory that is not pinned without being waited for.
        parts = [torch.nn.functional.pad(part, (0, -count % 4)).view(torch.int32) for part in (start, end, sample, of)]
        packed = to_device(torch.cat(parts), x.device)
        start, end, sample, of = packed.split([len(part) for part in parts])
        start, end = (part.view(torch.int64)[:count] for part in (start, end))
        sample, of = sample[:count], of[:count]
    valid = None
    if flags and not checked:
        valid = torch.stack(flags).all() if len(flags) > 1 else flags[0]
    return Segments(start, end, sample, of, samples, groups, valid)


def vectors(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Vectors of these sizes in one allocation, not initialised, each from a multiple of 16 bytes on."""
    step = 16 // dtype.itemsize
    rooms = [-(-size // step) * step for size in sizes]
    whole = torch.empty(sum(rooms), dtype=dtype, device=device)
    return [room[:size] for room, size in zip(whole.split(rooms), sizes, strict=True)]


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` [T, d] or [B, L, d] as [T, d] whose rows are contiguous; a copy only where strides leave no view.

    Rows may lie anywhere, also all in the same place (a tensor expanded over its tokens).
    """
    tensor = tensor.flatten(0, -2)
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _on_host(device: torch.device) -> bool:
    """Whether reading values there costs nothing."""
    return device.type == "cpu"


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the host as ``dtype`` on ``device``, without a wait where that is a GPU.

    The copy is taken from memory of its own that is not pinned, which CUDA has read before the call returns: the
    caller may write to a pinned tensor as soon as it has the results.
    """
    return to_device(tensor.to(dtype, copy=device.type != "cpu"), device)


def _rows(
    x: Tensor, cu_seqlens: Tensor | None, tokens: int, count: int, device: torch.device, flags: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(start, end) of each segment, [S] int64 each."""
    if cu_seqlens is None:
        length = tokens if x.dim() == 2 else x.shape[1]
        start = torch.arange(count, dtype=torch.int64, device=device) * length
        return start, start + length
    if _on_host(cu_seqlens.device):
        checks.read_offsets(cu_seqlens, tokens)
        offsets = _moved(cu_seqlens, torch.int64, device)
    else:
        given = cu_seqlens.long()
        # Whatever the values, the starts and ends ascend from 0 to T, so that no segment is of negative length; one
        # comparison with what was given is the whole check.
        offsets = given.clamp(0, tokens).cummax(0).values
        offsets[:1].zero_()
        if count or not tokens:
            offsets[-1:].fill_(tokens)
            flags.append((offsets == given).all())
        else:  # rows, and no segment for them
            flags.append(torch.zeros((), dtype=torch.bool, device=device))
    # A copy, because a view would begin 8 bytes later.
    return offsets[:-1], offsets[1:].clone()


def _ids(
    name: str, ids: Tensor | None, count: int | None, of: str, device: torch.device, flags: list[Tensor]
) -> tuple[Tensor | None, int]:
    """(ids as int32 in [0, count) on ``device``, count); a missing count is the largest id plus one."""
    if ids is None:
        return None, 0
    if _on_host(ids.device):
        _, count = checks.read_ids(name, ids, count, of)
        return _moved(ids, torch.int32, device), count
    if count is None:
        count = int(ids.max()) + 1 if len(ids) else 0
        count = max(count, 0)
    flags.append(((ids >= 0) & (ids < count)).all())
    return ids.clamp(0, max(count - 1, 0)).to(torch.int32), count
