"""Launching the Gram kernels: norms of short samples, of groups, and the whole matrix of inner products.

All index work stays on the device, grids come from sizes alone, nothing is read back: a call can be captured into a
CUDA graph. Results are not yet guarded against index values out of range: ``Segments.guard`` is the caller's to apply.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...segments import Segments, rows
from ...tuning import costs as tuning
from ...tuning.costs import KernelConfig
from .gram_kernels import LANES, gram_norms_kernel, gram_pairs_kernel
from .gram_order import Order, order
from .rows import on_device, place_sums, row_sums

# Programs that keep every multiprocessor of a large GPU busy: few blocks of tokens are split over the blocks they meet.
_PROGRAMS = 512
_INT32_MAX = (1 << 31) - 1


def config_for(kernel: str, x: Tensor, d_in: int, d_out: int) -> KernelConfig:
    """The config of a kernel for x's GPU; under the interpreter, where x is on the CPU, that of sm_80."""
    chip = tuning.chip(x.device)
    return tuning.kernel_config(chip.gpu, chip.arch or 80, kernel, x.element_size(), d_in, d_out)


def sample_norms(x: Tensor, dy: Tensor, segments: Segments, longest: int, config: KernelConfig | None = None) -> Tensor:
    """``||G_i||^2`` of each sample of at most ``longest`` tokens, 0 for the others: [N] float64."""
    config = config or config_for("gram_norms", x, x.shape[-1], dy.shape[-1])
    x, dy = even_rows(x, config.block_k), even_rows(dy, config.block_k)
    tokens = checked(x, dy)
    places = order(segments, tokens)
    if not _any(x, dy, places):
        return x.new_zeros(segments.samples, dtype=torch.float64)
    longest = min(longest, tokens)
    blocks = triton.cdiv(tokens, config.block_m)
    # A block meets at most as many blocks as the longest sample reaches back to.
    splits = max(1, min(blocks, triton.cdiv(longest, config.block_m) + 1, _PROGRAMS // blocks))
    parts = x.new_empty(splits, tokens, dtype=torch.float64)
    with on_device(x):
        gram_norms_kernel[(blocks, splits)](
            x,
            dy,
            places.row,
            places.sample,
            places.sample_span,
            parts,
            tokens,
            x.stride(0),
            dy.stride(0),
            x.shape[1],
            dy.shape[1],
            longest,
            BLOCK=config.block_m,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return place_sums(parts, places.sample_span)


def pair_sums(
    x: Tensor, dy: Tensor, segments: Segments, group_gram: bool, config: KernelConfig | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Everything from pairs of tokens, float64: sample_sq_norms [N], group_sq_norms [K], group_gram [K, K] or None.

    ``config`` is that of the pairs. Without ``group_gram`` only pairs within a group are looked at.
    """
    samples = sample_norms(x, dy, segments, x.shape[0])
    groups = _gram(x, dy, segments, config, groups=True, within=not group_gram)
    # A diagonal is a view with another stride, and results of an operator must not share memory.
    return samples, groups.diagonal().clone(), groups if group_gram else None


def pair_gram(x: Tensor, dy: Tensor, segments: Segments, config: KernelConfig | None = None) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64, symmetric. The segments must have one group, or every sample its own."""
    return _gram(x, dy, segments, config, groups=False, within=False)


def _gram(
    x: Tensor, dy: Tensor, segments: Segments, config: KernelConfig | None, *, groups: bool, within: bool
) -> Tensor:
    """The Gram of samples or groups; ``within``: only its diagonal is defined."""
    config = config or config_for("gram", x, x.shape[-1], dy.shape[-1])
    x, dy = even_rows(x, config.block_k), even_rows(dy, config.block_k)
    tokens = checked(x, dy)
    places = order(segments, tokens)
    ids, spans = (places.group, places.group_span) if groups else (places.sample, places.sample_span)
    count = spans.shape[0]
    if not _any(x, dy, places):
        return x.new_zeros(count, count, dtype=torch.float64)
    blocks = triton.cdiv(tokens, config.block_m)
    pieces = triton.cdiv(blocks + count, 16) * 16  # rows begin at multiples of 16 bytes
    pairs = x.new_empty(pieces, pieces, dtype=torch.float32)
    with on_device(x):
        gram_pairs_kernel[(blocks * blocks,)](
            x,
            dy,
            places.row,
            ids,
            pairs,
            tokens,
            x.stride(0),
            dy.stride(0),
            x.shape[1],
            dy.shape[1],
            pieces,
            WITHIN=within,
            BLOCK=config.block_m,
            BLOCK_K=config.block_k,
            GROUP=config.group_m,
            LANES=LANES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    half = row_sums(pairs, spans, pieces=config.block_m)
    gram = row_sums(half.T, spans, pieces=config.block_m)
    # The two triangles add the same numbers in different orders.
    return (gram + gram.T) / 2


def even_rows(tensor: Tensor, block_k: int) -> Tensor:
    """``tensor`` [T, d] or [B, L, d] as rows that a kernel reads without masks: [T, d] of a width that block_k divides.

    Copied, with zeros behind, where the width needs it, or where rows do not begin at a multiple of 16 bytes.
    """
    tensor = rows(tensor)
    missing = -tensor.shape[1] % block_k
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing))
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def checked(x: Tensor, dy: Tensor) -> int:
    """The number of tokens, if it and the widths are within what the kernels count in."""
    if max(*x.shape, dy.shape[1]) > _INT32_MAX:
        raise ValueError(
            f"x and dy must have fewer than 2^31 tokens and features for backend='triton', got {x.shape[0]} tokens, "
            f"d_in={x.shape[1]}, d_out={dy.shape[1]}; split the call"
        )
    return x.shape[0]


def _any(x: Tensor, dy: Tensor, places: Order) -> bool:
    """Whether there is anything to add up."""
    return bool(x.numel() and dy.numel() and places.sample_span.numel())
