"""The table of segments: which rows belong to which sample and group.

A segment is a run of consecutive rows of x and dy; ``cu_seqlens``, ``sample_ids`` and ``group_ids`` describe all of
them. The table has three forms:

- :class:`HostSegments`, Python numbers, for backends that walk the samples on the host. Making it reads the integer
  tensors, which synchronises where they are on a GPU.
- :class:`PlainSegments`, of a call without sample_ids and group_ids: cu_seqlens is the table. For kernels that read it.
- :class:`Segments`, tensors on x's device, for backends whose kernels read it. Values that are on the CPU are checked
  there and raise. Values on a GPU are never read back: they are clamped so that no kernel leaves its arrays, and
  ``Segments.valid`` turns every result into NaN where they were wrong (dW in its first row). Only sizes that nothing
  but the values determine (N from ``sample_ids`` alone, K from ``group_ids``) are read, which synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .batch import GradBatch


class Segment(NamedTuple):
    """Rows ``start`` to ``end`` belong to ``sample``, whose group is ``group``."""

    start: int
    end: int
    sample: int
    group: int

    @property
    def tokens(self) -> int:
        """The number of rows."""
        return self.end - self.start


@dataclass(frozen=True)
class HostSegments:
    """The host form: one segment per sample that has rows, the samples of a group together, covering all rows in order.

    ``order`` [T] int64 on the CPU is the reordering of the input's rows that makes this so, or None if they already lie
    that way. ``samples`` N, ``groups`` K.
    """

    segments: list[Segment]
    order: Tensor | None
    samples: int
    groups: int

    def arrange(self, tensor: Tensor) -> Tensor:
        """``tensor`` [T, d] or [B, L, d] as [T, d] in the table's order, rows contiguous; copied only where needed."""
        if self.order is not None:
            return tensor.flatten(0, -2).index_select(0, to_device(self.order, tensor.device))
        return self.dense(tensor)

    @staticmethod
    def dense(tensor: Tensor) -> Tensor:
        """``tensor`` [T, d] or [B, L, d] as [T, d] in its own order, rows contiguous; copied only where needed."""
        tensor = tensor.flatten(0, -2)
        dense = tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
        return tensor if dense else tensor.contiguous()


@dataclass(frozen=True)
class Segments:
    """The device form: rows ``start[s]`` to ``end[s]`` belong to ``sample[s]``, which belongs to ``group[s]``.

    The order is that of (group, sample), and that of the rows within a sample: a sample's segments are neighbours, and
    so are a group's samples. Segments may be empty; samples and groups may have none.

    ``start``, ``end``: [S] int64, ``sample``, ``group``: [S] int32, all contiguous on x's device. Each starts at a
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
        """The same for dW, in place and in its first row only: all of it would cost one more pass over dW."""
        if self.valid is not None:
            weight_grad[:1].masked_fill_(~self.valid, torch.nan)
        return weight_grad

    def each_alone(self) -> Segments:
        """The same segments with every sample as a group of its own, in the order of the samples."""
        order = torch.argsort(self.sample, stable=True)
        start, end, sample = self.start[order], self.end[order], self.sample[order]
        return Segments(start, end, sample, sample, self.samples, self.samples, self.valid)

    def groups_as_samples(self) -> Segments:
        """The same segments with every group as one sample."""
        return Segments(self.start, self.end, self.group, self.group, self.groups, self.groups, self.valid)

    def by_token(self, of_segment: Tensor, tokens: int) -> Tensor:
        """``of_segment`` [S] (``sample`` or ``group``) for each of the ``tokens`` rows of x: [T]."""
        if not len(of_segment):
            return of_segment.new_zeros(tokens)
        order = torch.argsort(self.start, stable=True)
        lengths = (self.end - self.start)[order]
        return torch.repeat_interleave(of_segment[order], lengths, output_size=tokens)


class IndexTensors(NamedTuple):
    """What a backend's own kernel sorts into :class:`Segments`: index tensors on x's device, not checked yet.

    ``cu_seqlens`` [S+1]; None: every segment has ``length`` rows. ``sample_ids`` [S]; None: segment s is sample s.
    ``group_ids`` [N]; None: one group. int32 or int64, contiguous. ``segments`` S, ``samples`` N and ``groups`` K are
    at least 1. ``tokens`` T.
    """

    cu_seqlens: Tensor | None
    sample_ids: Tensor | None
    group_ids: Tensor | None
    segments: int
    samples: int
    groups: int
    tokens: int
    length: int

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return next(ids.device for ids in self[:3] if ids is not None)

    def empty_table(self) -> Segments:
        """A table to be written: not initialised, ``valid`` included."""
        start, end = vectors([self.segments] * 2, torch.int64, self.device)
        sample, group = vectors([self.segments] * 2, torch.int32, self.device)
        valid = torch.empty((), dtype=torch.bool, device=self.device)
        return Segments(start, end, sample, group, self.samples, self.groups, valid)


@dataclass(frozen=True)
class PlainSegments:
    """The form of a call without sample_ids and group_ids: segment s is sample s, and all samples are one group.

    ``offsets`` [S+1] int32 or int64 on x's device, not checked where it was given there; None: every segment has
    ``length`` rows. ``tokens`` T, ``samples`` S, at least one.
    """

    offsets: Tensor | None
    length: int
    tokens: int
    samples: int
    groups: int = 1


def plain_segments(batch: GradBatch) -> PlainSegments | None:
    """The plain form for a checked call; None where the call has no such form.

    Raises ValueError for cu_seqlens on the CPU that do not ascend from 0 to T.
    """
    if batch.sample_ids is not None or batch.group_ids is not None or not batch.segments:
        return None
    offsets = batch.cu_seqlens
    if offsets is None:
        length = batch.tokens if batch.dy.dim() == 2 else batch.dy.shape[1]
        return PlainSegments(None, length, batch.tokens, batch.segments)
    if _on_host(offsets.device):
        rows_of, name, _ = batch.names
        checks.read_offsets(offsets, batch.tokens, name, rows_of)
        offsets = _moved(offsets, offsets.dtype, batch.dy.device)
    return PlainSegments(offsets.contiguous(), 0, batch.tokens, batch.segments)


def host_segments(batch: GradBatch) -> HostSegments:
    """The host form for a checked call; a synchronisation where the integer tensors are on a GPU.

    Raises ValueError for values that do not ascend from 0 to T or are out of range.
    """
    rows_of, offsets_name, samples_name = batch.names
    if batch.cu_seqlens is not None:
        offsets = checks.read_offsets(batch.cu_seqlens, batch.tokens, offsets_name, rows_of)
    elif batch.dy.dim() == 2:
        offsets = [0, batch.tokens]
    else:
        offsets = [row * batch.dy.shape[1] for row in range(batch.segments + 1)]
    if batch.sample_ids is None and batch.group_ids is None:
        own = [Segment(start, end, sample, 0) for sample, (start, end) in enumerate(pairwise(offsets)) if end > start]
        return HostSegments(own, None, batch.segments, 1)
    sample_of, samples = list(range(batch.segments)), batch.segments
    if batch.sample_ids is not None:
        sample_of, samples = checks.read_ids(samples_name, batch.sample_ids, batch.samples, "samples")
    group_of, groups = [0] * samples, 1
    if batch.group_ids is not None:
        group_of, groups = checks.read_ids("group_ids", batch.group_ids, batch.groups, "groups")

    # Groups and samples keep the order in which they first appear: a batch that is already sorted is not copied.
    rows_by_sample: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for segment, sample in enumerate(sample_of):
        start, end = offsets[segment], offsets[segment + 1]
        if end > start:
            rows_by_sample.setdefault(group_of[sample], {}).setdefault(sample, []).append((start, end))
    segments, ranges, at, in_place = [], [], 0, True
    for group, members in rows_by_sample.items():
        for sample, own_rows in members.items():
            first = at
            for start, end in own_rows:
                in_place &= start == at
                ranges.append((start, end))
                at += end - start
            segments.append(Segment(first, at, sample, group))
    order = None if in_place else torch.cat([torch.arange(start, end, device="cpu") for start, end in ranges])
    return HostSegments(segments, order, samples, groups)


def device_segments(batch: GradBatch, sort: Callable[[IndexTensors], Segments] | None = None) -> Segments:
    """The device form for a checked call. ``sort`` makes it from values on the device; without, torch's operators do.

    Raises ValueError for values on the CPU that do not ascend from 0 to T or are out of range.
    """
    given = [tensor for tensor in (batch.cu_seqlens, batch.sample_ids, batch.group_ids) if tensor is not None]
    # Without any, or with values already there, everything is made on x's device; else on the host, and copied once.
    target = batch.dy.device
    device = target if not given or any(tensor.device == target for tensor in given) else given[0].device
    checked = _on_host(device)
    if sort is not None and given and not checked:
        unsorted = _index_tensors(batch)
        if min(unsorted.segments, unsorted.samples, unsorted.groups) > 0:
            return sort(unsorted)
    count = batch.segments
    flags: list[Tensor] = []

    sample, samples = _ids(batch.names[2], batch.sample_ids, batch.samples, "samples", device, flags)
    group, groups = _ids("group_ids", batch.group_ids, batch.groups, "groups", device, flags)
    samples = count if batch.sample_ids is None else samples
    groups = 1 if batch.group_ids is None else groups
    if (count and not samples) or (samples and not groups):
        # Segments of no sample, or samples of no group: their ids cannot have been in range.
        count = 0
        flags.append(torch.zeros((), dtype=torch.bool, device=device))
    start, end = _rows(batch, device, flags)
    start, end = start[:count], end[:count]
    sample = torch.arange(count, dtype=torch.int32, device=device) if sample is None else sample[:count]
    of = torch.zeros_like(sample) if group is None else group[sample] if count else sample
    if batch.sample_ids is not None or batch.group_ids is not None:
        order = torch.argsort(of.long() * samples + sample, stable=True)
        start, end, sample, of = start[order], end[order], sample[order], of[order]

    if device != target:
        # One copy for all four; a stream takes it from memory that is not pinned without being waited for.
        parts = [torch.nn.functional.pad(part, (0, -count % 4)).view(torch.int32) for part in (start, end, sample, of)]
        packed = to_device(torch.cat(parts), target)
        start, end, sample, of = packed.split([len(part) for part in parts])
        start, end = (part.view(torch.int64)[:count] for part in (start, end))
        sample, of = sample[:count], of[:count]
    valid = None
    if flags and not checked:
        valid = torch.stack(flags).all() if len(flags) > 1 else flags[0]
    return Segments(start, end, sample, of, samples, groups, valid)


def one_sample_per_group(batch: GradBatch) -> bool:
    """Whether group k is known, without reading a device, to hold sample k and no other."""
    ids = batch.group_ids
    if ids is None or not _on_host(ids.device) or batch.groups != len(ids):
        return False
    return torch.equal(ids, torch.arange(len(ids), dtype=ids.dtype, device=ids.device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the host's memory on ``device``, in the order of the device's stream.

    CUDA takes a copy of pageable memory before it returns, so that not waiting is safe. A graph would keep the address
    and read there again at every replay: that is refused.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and the segments are known on the host only: put cu_seqlens, "
            "sample_ids and group_ids on x's device, and pass num_samples and num_groups"
        )
    return tensor.to(device, non_blocking=True)


def vectors(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Vectors of these sizes in one allocation, not initialised, each starting at a multiple of 16 bytes."""
    step = 16 // dtype.itemsize
    parts = [length for size in sizes for length in (size, -size % step)]
    # One call that makes all views: a slice each would take the host longer than the launch.
    return list(torch.empty(sum(parts), dtype=dtype, device=device).split_with_sizes(parts)[::2])


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


def _rows(batch: GradBatch, device: torch.device, flags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(start, end) of each segment, [S] int64 each."""
    cu_seqlens, tokens, count = batch.cu_seqlens, batch.tokens, batch.segments
    if cu_seqlens is None:
        length = tokens if batch.dy.dim() == 2 else batch.dy.shape[1]
        start = torch.arange(count, dtype=torch.int64, device=device) * length
        return start, start + length
    if _on_host(cu_seqlens.device):
        rows_of, name, _ = batch.names
        checks.read_offsets(cu_seqlens, tokens, name, rows_of)
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
    # A copy, because a view would start 8 bytes later.
    return offsets[:-1], offsets[1:].clone()


def _index_tensors(batch: GradBatch) -> IndexTensors:
    """The index tensors of a call on x's device; those on the host are checked."""
    cu_seqlens, sample_ids, group_ids = batch.cu_seqlens, batch.sample_ids, batch.group_ids
    rows_of, offsets_name, samples_name = batch.names
    samples, groups = batch.segments, 1
    if sample_ids is not None:
        samples = _count(samples_name, sample_ids, batch.samples, "samples")
    if group_ids is not None:
        groups = _count("group_ids", group_ids, batch.groups, "groups")
    if cu_seqlens is not None and _on_host(cu_seqlens.device):
        checks.read_offsets(cu_seqlens, batch.tokens, offsets_name, rows_of)

    def there(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dtype not in (torch.int32, torch.int64):
            tensor = tensor.long()
        on_host = _on_host(tensor.device)
        return (_moved(tensor, tensor.dtype, batch.dy.device) if on_host else tensor).contiguous()

    given = there(cu_seqlens), there(sample_ids), there(group_ids)
    length = 0 if cu_seqlens is not None else batch.tokens if batch.dy.dim() == 2 else batch.dy.shape[1]
    return IndexTensors(*given, batch.segments, samples, groups, batch.tokens, length)


def _count(name: str, ids: Tensor, count: int | None, of: str) -> int:
    """The number of samples or groups: the largest id plus one where it was not given.

    Raises ValueError for ids on the host that are out of range.
    """
    if _on_host(ids.device):
        return checks.read_ids(name, ids, count, of)[1]
    if count is None:
        count = int(ids.max()) + 1 if len(ids) else 0
    return max(count, 0)


def _ids(
    name: str, ids: Tensor | None, count: int | None, of: str, device: torch.device, flags: list[Tensor]
) -> tuple[Tensor | None, int]:
    """(ids as int32 in [0, count) on ``device``, count); a missing count is the largest id plus one."""
    if ids is None:
        return None, 0
    on_host, count = _on_host(ids.device), _count(name, ids, count, of)
    if on_host:
        return _moved(ids, torch.int32, device), count
    flags.append(((ids >= 0) & (ids < count)).all())
    return ids.clamp(0, max(count - 1, 0)).to(torch.int32), count
