"""Where each sample's rows are: cu_seqlens, sample_ids and group_ids as stretches of rows, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks


class Stretch(NamedTuple):
    """Rows ``lo`` to ``hi`` belong to ``sample``, whose group is ``group``."""

    lo: int
    hi: int
    sample: int
    group: int


@dataclass(frozen=True)
class Layout:
    """One stretch for each sample that has rows, those of a group together, in the order of the rows.

    ``rows`` is the reordering of the input's rows that makes this so, or None if they already lie that way.
    """

    stretches: list[Stretch]
    rows: Tensor | None
    samples: int
    groups: int

    def arrange(self, tensor: Tensor) -> Tensor:
        """``tensor`` [T, d] or [B, L, d] as [T, d] in the layout's order, rows contiguous; copied only if need be."""
        tensor = tensor.flatten(0, -2)
        if self.rows is not None:
            return tensor.index_select(0, to_device(self.rows, tensor.device))
        dense = tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
        return tensor if dense else tensor.contiguous()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the host's memory on ``device``, in the order of the device's stream.

    CUDA takes a copy of pageable memory before it returns, so that not waiting is safe. A graph would keep the address
    and read there again at every replay: that is refused.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and whose rows they are is known on the host only: put cu_seqlens, "
            "sample_ids and group_ids on x's device, and pass num_samples and num_groups"
        )
    return tensor.to(device, non_blocking=True)


def read(
    x: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    sizes: checks.Sizes,
) -> Layout:
    """Read and check the integer tensors (a synchronisation where they are on a GPU) and lay the samples out."""
    if x.dim() == 3:
        offsets = [row * x.shape[1] for row in range(sizes.segments + 1)]
    else:
        offsets = [0, sizes.tokens] if cu_seqlens is None else checks.read_offsets(cu_seqlens, sizes.tokens)
    if sample_ids is None and group_ids is None:
        ends = enumerate(pairwise(offsets))
        stretches = [Stretch(lo, hi, sample, 0) for sample, (lo, hi) in ends if hi > lo]
        return Layout(stretches, None, sizes.segments, 1)
    sample_of, samples = list(range(sizes.segments)), sizes.segments
    if sample_ids is not None:
        sample_of, samples = checks.read_ids("sample_ids", sample_ids, sizes.samples, "samples")
    group_of, groups = [0] * samples, 1
    if group_ids is not None:
        group_of, groups = checks.read_ids("group_ids", group_ids, sizes.groups, "groups")

    # Groups and samples keep the order in which they first appear: a batch that is already sorted is not copied.
    parts: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for segment, sample in enumerate(sample_of):
        lo, hi = offsets[segment], offsets[segment + 1]
        if hi > lo:
            parts.setdefault(group_of[sample], {}).setdefault(sample, []).append((lo, hi))
    stretches = []
    runs, at, in_place = [], 0, True
    for group, members in parts.items():
        for sample, pieces in members.items():
            start = at
            for lo, hi in pieces:
                in_place &= lo == at
                runs.append((lo, hi))
                at += hi - lo
            stretches.append(Stretch(start, at, sample, group))
    rows = None if in_place else torch.cat([torch.arange(lo, hi, device="cpu") for lo, hi in runs])
    return Layout(stretches, rows, samples, groups)
