"""The second kernels (``csrc/reduce.cu``): the split-K fix-up, and partial sums added in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tables
from .launch import LaunchContext


def split_fixup(
    context: LaunchContext,
    workspace: Tensor,
    split: tables.SplitSegments,
    groups: int,
    outer: Tensor,
    outer_groups: int,
    sums: Tensor | None,
    weight_grad: Tensor | None,
    element: int,
) -> tuple[Tensor, Tensor]:
    """Squared norms of the groups' sums over the splits, and of the outer groups': [groups], [outer_groups] float64.

    ``workspace`` holds each split's sums. ``sums`` and ``weight_grad``, if given, are overwritten.
    """
    elements = workspace.shape[1]
    rows = context.size("split_fixup_rows", elements=elements)
    group_sq = torch.zeros(rows, groups, dtype=torch.float32, device=workspace.device)
    outer_sq = torch.zeros(rows, outer_groups, dtype=torch.float32, device=workspace.device)
    first, last = tables.split_ranges(split, groups)
    context.launch(
        "split_fixup",
        workspace=workspace,
        elements=elements,
        split_first=first,
        split_last=last,
        outer=outer,
        groups=groups,
        outer_groups=outer_groups,
        group_sq=group_sq,
        outer_sq=outer_sq,
        sums=sums,
        type=element,
        weight_grad=weight_grad,
    )
    return column_sums(context, group_sq), column_sums(context, outer_sq)


def column_sums(context: LaunchContext, partial: Tensor) -> Tensor:
    """``out[c] = sum over r of partial[r, c]``: [columns] float64."""
    # Every column is written.
    out = torch.empty(partial.shape[1], dtype=torch.float64, device=partial.device)
    if partial.shape[1]:
        context.launch("column_sums", partial=partial, rows=partial.shape[0], columns=partial.shape[1], out=out)
    return out


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros in float64 on the device of ``like``."""
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
