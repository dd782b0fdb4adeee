"""The table of segments from index tensors on the device: ``csrc/segment_table.cu`` checks and sorts them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segments import IndexTensors, Segments
from .launch import launch_context


def sort(given: IndexTensors) -> Segments:
    """Segments in the order of (group, sample). ``valid`` is False where a value is out of range."""
    table = given.empty_table()
    assert table.valid is not None

    def wide(ids: Tensor | None) -> bool:
        return ids is not None and ids.dtype == torch.int64

    with launch_context(given.device) as context:
        context.launch(
            "segment_table",
            offsets=given.cu_seqlens,
            sample_ids=given.sample_ids,
            group_ids=given.group_ids,
            offsets_wide=wide(given.cu_seqlens),
            samples_wide=wide(given.sample_ids),
            groups_wide=wide(given.group_ids),
            segments=given.segments,
            samples=given.samples,
            groups=given.groups,
            tokens=given.tokens,
            length=given.length,
            start=table.start,
            end=table.end,
            sample=table.sample,
            group=table.group,
            valid=table.valid,
        )
    return table
