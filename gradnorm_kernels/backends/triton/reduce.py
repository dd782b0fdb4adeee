"""The partial sums of squares of segmented wgrad, added up in float64 and in a fixed order."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .rows import on_device
from .wgrad_table import CUT, WHOLE

_COLUMNS, _ROWS, _WARPS = 32, 32, 4

#: No kernel of the configs has a say here.
CONFIGS: tuple[str, ...] = ()


def norms(state: Tensor, partials: Tensor, joined: Tensor | None, samples: int, onto: Tensor | None) -> Tensor:
    """Squared norms of samples and groups: [N + K] float64, added to ``onto`` if given.

    ``state`` [N + K] int32 says where each is (:mod:`.wgrad_table`); ``partials`` [rows, N + K] float64; ``joined``
    [splits, 2, programs] float64 of those that splits have cut.
    """
    columns = state.shape[0]
    result = partials.new_empty(columns) if onto is None else onto
    if columns:
        with on_device(partials):
            norms_kernel[(triton.cdiv(columns, _COLUMNS),)](
                state,
                partials,
                partials if joined is None else joined,
                result,
                samples,
                columns,
                partials.shape[0],
                0 if joined is None else joined.shape[2],
                ACCUMULATE=onto is not None,
                SPLIT=joined is not None,
                COLUMNS=_COLUMNS,
                ROWS=_ROWS,
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
    return result


@triton.jit(do_not_specialize=["samples", "columns", "rows", "programs"])
def norms_kernel(
    state_ptr,  # [N + K] int32
    partial_ptr,  # [rows, N + K] float64
    joined_ptr,  # [splits, 2, programs] float64; read if SPLIT
    out_ptr,  # [N + K] float64
    samples,  # N
    columns,  # N + K
    rows,
    programs,
    ACCUMULATE: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    state = tl.load(state_ptr + column, mask=inside, other=0)
    total = tl.zeros([COLUMNS], tl.float64)
    whole = inside & (state == WHOLE)
    for base in range(0, rows, ROWS):
        row = base + tl.arange(0, ROWS)
        places = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(places, mask=(row < rows)[:, None] & whole[None, :], other=0.0), 0)
    if SPLIT:
        cut = inside & (state >= CUT)
        line = (state - CUT).to(tl.int64) * 2 + (column >= samples).to(tl.int64)
        for base in range(0, programs, ROWS):
            row = base + tl.arange(0, ROWS)
            places = joined_ptr + line[None, :] * programs + row[:, None]
            total += tl.sum(tl.load(places, mask=(row < programs)[:, None] & cut[None, :], other=0.0), 0)
    if ACCUMULATE:
        total += tl.load(out_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + column, total, mask=inside)


def signatures(config: None, element: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What is launched: (kernel, argument -> type, constexpr -> value, options), for a compile-only check."""
    types = {"state_ptr": "*i32", "partial_ptr": "*fp64", "joined_ptr": "*fp64", "out_ptr": "*fp64"}
    types |= dict.fromkeys(("samples", "columns", "rows", "programs"), "i32")
    found = []
    for accumulate, split in product((False, True), repeat=2):
        form = {"ACCUMULATE": accumulate, "SPLIT": split, "COLUMNS": _COLUMNS, "ROWS": _ROWS}
        found.append((norms_kernel, types, form, {"num_warps": _WARPS}))
    return found
