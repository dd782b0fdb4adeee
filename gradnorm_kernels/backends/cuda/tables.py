"""Index tables that the kernels read, made from the segments on the device, without reading a value back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segments


class TokenOrder(NamedTuple):
    """Tokens in the order of a key (the sample or the group), which ascends by rank; see Gram in csrc/launchers.h.

    ``row``, ``rank``: [T] int32, -1 behind the last token. ``begin`` [R+1] int32: where each rank's tokens begin.
    ``key`` [R] int32: the sample or group of each rank, -1 for unused ranks.
    """

    row: Tensor
    rank: Tensor
    begin: Tensor
    key: Tensor


class SplitSegments(NamedTuple):
    """Segments and how they are split, see WgradNorm in csrc/launchers.h. All int32."""

    start: Tensor
    end: Tensor
    group: Tensor
    split_start: Tensor
    segment: Tensor | None  # the segment that each was cut from; None: they are as they were

    @property
    def splits(self) -> int:
        return len(self.split_start) - 1


def tokens(segments: Segments, key: Tensor, keys: int, count: int, lengths: Tensor | None = None) -> TokenOrder:
    """The tokens of segments in whose order ``key`` [S] groups equal values; there are ``keys`` possible values.

    ``count`` is T. ``lengths`` [S] replaces the segments' lengths: 0 leaves a segment's tokens out.
    """
    if lengths is None:
        lengths = segments.end - segments.start
    rank = ranks(key)
    bound = min(keys, len(key))
    begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    token = torch.arange(count, device=key.device)
    segment = torch.searchsorted(begins[1:], token, right=True).clamp_(max=len(key) - 1)
    inside = token < begins[-1]
    row = torch.where(inside, segments.start[segment] + token - begins[segment], -1)
    token_rank = torch.where(inside, rank[segment], -1)
    first = torch.searchsorted(rank, torch.arange(bound + 1, device=key.device))
    names = torch.full((bound,), -1, dtype=torch.int32, device=key.device).scatter_(0, rank, key.int())
    return TokenOrder(row.int(), token_rank.int(), begins[first].int(), names)


def ranks(key: Tensor) -> Tensor:
    """How many times ``key`` has changed before each place: [S] int64, from 0."""
    changes = torch.nn.functional.pad((key[1:] != key[:-1]).long(), (1, 0))
    return changes.cumsum(0)


def whole_samples(segments: Segments, splits: int, count: int) -> SplitSegments:
    """The segments, split between samples so that each split has about the same number of tokens."""
    start, end = segments.start.int(), segments.end.int()
    device = start.device
    if splits == 1:
        whole = torch.arange(0, len(start) + 1, len(start), dtype=torch.int32, device=device)  # [0, S]; S is at least 1
        return SplitSegments(start, end, segments.group, whole, None)
    ends = (segments.end - segments.start).cumsum(0)
    rank = ranks(segments.sample)
    # Where the sample of each segment begins: a split has the segments from the first that begins at or after its cut.
    begins = torch.nn.functional.pad(ends, (1, 0))[torch.searchsorted(rank, rank)]
    cuts = torch.arange(splits + 1, device=device) * count // splits
    cuts[-1:].fill_(count + 1)  # cuts[-1] = ... would copy the number from the host and wait
    return SplitSegments(start, end, segments.group, torch.searchsorted(begins, cuts).int(), None)


def anywhere(segments: Segments, splits: int, count: int) -> SplitSegments:
    """The segments, cut so that each split has T/splits tokens. Each sample is a group of its own: its rank."""
    device = segments.start.device
    begins = torch.nn.functional.pad((segments.end - segments.start).cumsum(0), (1, 0))
    cuts = torch.arange(1, splits, device=device) * count // splits
    starts = torch.cat([begins[:-1], cuts]).sort().values
    ends = torch.cat([starts[1:], begins[-1:]]).maximum(starts)
    segment = torch.searchsorted(begins[1:], starts, right=True).clamp_(max=len(segments.start) - 1)
    shift = segments.start[segment] - begins[segment]
    inside = torch.searchsorted(starts, cuts)
    split_start = torch.nn.functional.pad(torch.nn.functional.pad(inside, (1, 0)), (0, 1), value=len(starts))
    group = ranks(segments.sample)[segment]
    return SplitSegments((starts + shift).int(), (ends + shift).int(), group.int(), split_start.int(), segment)


def split_ranges(split: SplitSegments, groups: int) -> tuple[Tensor, Tensor]:
    """The first and the last split with segments of each group, [groups] int32 each; first > last if there is none."""
    names = torch.arange(groups, dtype=torch.int32, device=split.group.device)
    first = torch.searchsorted(split.group, names)
    last = torch.searchsorted(split.group, names, right=True) - 1
    none = last < first
    first, last = (torch.searchsorted(split.split_start[1:], index, right=True) for index in (first.int(), last.int()))
    return torch.where(none, 1, first).int(), torch.where(none, 0, last).int()
