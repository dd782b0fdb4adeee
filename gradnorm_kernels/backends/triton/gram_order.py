"""The order of tokens that the Gram kernels walk: sample after sample (group after group), without moving x or dy.

Segments arrive sorted by (group, sample). Concatenated they give every token a *place*; the kernels cut the places into
blocks and look up which row of x and dy a place stands for. A gather of whole rows costs nothing extra: along a row the
loads are as wide as ever. One launch fills everything, and nothing is read back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments, vectors
from .rows import on_device

#: No config chooses among forms of these kernels.
CONFIGS = ()
_BLOCK = 256
_WARPS = 4


@dataclass(frozen=True)
class Order:
    """``row``, ``sample``, ``group``: [T] int32, of each place. Ids ascend with the places as the segments' do.

    ``sample_span`` [N, 2] and ``group_span`` [K, 2] int32: first place and the one after the last; (0, 0) for none.
    """

    row: Tensor
    sample: Tensor
    group: Tensor
    sample_span: Tensor
    group_span: Tensor


@triton.jit
def _segment_of(end_ptr, place, segments, steps):
    """The first segment that ends after a place, at most the last one; ``end_ptr``: see :func:`order_kernel`."""
    low = tl.zeros_like(place)
    high = low + (segments - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        after = tl.load(end_ptr + middle) <= place
        low = tl.minimum(tl.where(after, middle + 1, low), high)
        high = tl.where(after, high, middle)
    return low


@triton.jit
def _write_span(span_ptr, own, before, after, place, tokens):
    """First and last place of a run of equal ids; each is written by the one token that sits there."""
    inside = place < tokens
    tl.store(span_ptr + 2 * own, place, mask=inside & ((place == 0) | (own != before)))
    tl.store(span_ptr + 2 * own + 1, place + 1, mask=inside & ((place == tokens - 1) | (own != after)))


@triton.jit(do_not_specialize=["tokens", "segments", "steps"])
def order_kernel(
    start_ptr,  # [S] int: first row of each segment
    end_ptr,  # [S] int64: place after each segment's last one (running sum of the lengths)
    length_ptr,  # [S] int: rows of each segment
    segment_sample_ptr,  # [S] int32
    segment_group_ptr,  # [S] int32
    row_ptr,  # [T] int32, out
    sample_ptr,  # [T] int32, out
    group_ptr,  # [T] int32, out
    sample_span_ptr,  # [N, 2] int32, out, zero before
    group_span_ptr,  # [K, 2] int32, out, zero before
    tokens,
    segments,
    steps,  # of the binary search: the bits of ``segments``
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    own = _segment_of(end_ptr, place, segments, steps)
    before = _segment_of(end_ptr, place - 1, segments, steps)
    after = _segment_of(end_ptr, place + 1, segments, steps)
    row = tl.load(start_ptr + own) + place - (tl.load(end_ptr + own) - tl.load(length_ptr + own))
    # Segments that do not cover the rows make nonsense of a row: kept inside the tensors, and reported elsewhere.
    row = tl.minimum(tl.maximum(row, 0), tokens - 1)
    tl.store(row_ptr + place, row.to(tl.int32), mask=inside)
    sample = tl.load(segment_sample_ptr + own)
    group = tl.load(segment_group_ptr + own)
    tl.store(sample_ptr + place, sample, mask=inside)
    tl.store(group_ptr + place, group, mask=inside)
    _write_span(
        sample_span_ptr,
        sample,
        tl.load(segment_sample_ptr + before),
        tl.load(segment_sample_ptr + after),
        place,
        tokens,
    )
    _write_span(
        group_span_ptr, group, tl.load(segment_group_ptr + before), tl.load(segment_group_ptr + after), place, tokens
    )


def order(segments: Segments, tokens: int) -> Order:
    """The order of ``tokens`` rows that ``segments`` describe, on the segments' device."""
    device = segments.start.device
    row, sample, group = vectors([tokens] * 3, torch.int32, device)
    room = segments.samples + segments.samples % 2  # both begin at a multiple of 16 bytes
    spans = torch.zeros(room + segments.groups, 2, dtype=torch.int32, device=device)
    sample_span, group_span = spans[: segments.samples], spans[room:]
    count = segments.start.shape[0]
    if tokens and count:
        length = segments.end - segments.start
        with on_device(row):
            order_kernel[(triton.cdiv(tokens, _BLOCK),)](
                segments.start,
                length.cumsum(0),
                length,
                segments.sample,
                segments.group,
                row,
                sample,
                group,
                sample_span,
                group_span,
                tokens,
                count,
                count.bit_length(),
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
    return Order(row, sample, group, sample_span, group_span)


def signatures(config: None, element: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, argument -> type, constexpr -> value, options) of what is launched, for a compile-only check."""
    types = dict.fromkeys(("start_ptr", "end_ptr", "length_ptr"), "*i64")
    types |= dict.fromkeys(("segment_sample_ptr", "segment_group_ptr", "row_ptr", "sample_ptr", "group_ptr"), "*i32")
    types |= dict.fromkeys(("sample_span_ptr", "group_span_ptr"), "*i32")
    types |= dict.fromkeys(("tokens", "segments", "steps"), "i32")
    return [(order_kernel, types, {"BLOCK": _BLOCK}, {"num_warps": _WARPS})]
