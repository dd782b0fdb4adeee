"""Segmented wgrad, compiled (``csrc/cpu``)."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .. import native
from ..torch.wgrad import Span, SquaredNorms, gram_of_sums

_SCRATCH = threading.local()
# Elements of a thread's scratch memory that are kept between calls at most: 128 MiB.
_MOST_KEPT = 1 << 25
# Elements of x and dy that are packed at once at most, for the groups' inner products: 64 MiB.
_MOST_PACKED = 1 << 24
# Rows of the weight for which packing x again is worth it.
_FEWEST_ROWS = 512


def segmented_wgrad(
    x: Tensor,
    dy: Tensor,
    groups: list[list[Span]],
    workspace: int,
    weight_grad: Tensor | None,
    group_gram: bool,
    order: Tensor | None = None,
    isa: int | None = None,
    threads: int | None = None,
) -> SquaredNorms:
    """What :func:`gradnorm_kernels.backends.torch.wgrad.segmented_wgrad` computes, compiled.

    ``order`` [T] int64 on the CPU: the row of x and dy of each token; None: token t is row t. ``isa``: a position
    in ``build_info()["cpu_isas"]`` that this processor runs (default: the newest).
    """
    module = native.module()
    isa = module.best_isa() if isa is None else isa
    threads = torch.get_num_threads() if threads is None else threads
    d_in, d_out = x.shape[1], dy.shape[1]
    held = len(groups) if group_gram else 1
    spans = [(span, group) for group, own in enumerate(groups) for span in own]
    samples = sum(span.measured for span, _ in spans)
    ends, slots, at, slot = [], [], 0, 0
    for span, _ in spans:
        at += span.tokens
        ends.append(at)
        slots.append(slot if span.measured else -1)
        slot += span.measured
    index = torch.tensor([ends, [group for _, group in spans], slots], device="cpu")

    # Few groups' inner products are taken inside a pass, whose packed operands are then those of all tokens: a wide
    # weight takes several passes over parts of its rows.
    paired, fitting = 0, min(d_out, _MOST_PACKED // max(1, len(x)) - d_in)
    if group_gram and len(groups) <= module.MOST_GRAM_GROUPS and samples + len(groups) <= module.MOST_GRAM_SQUARES:
        paired = len(groups) if fitting >= min(d_out, _FEWEST_ROWS) else 0
    # The sum over the groups is formed where it is returned if the dtype allows. A lone group's sum is that sum.
    in_place = weight_grad if weight_grad is not None and weight_grad.dtype == torch.float32 else None
    lone = in_place is not None and len(groups) == 1
    most = fitting if paired else d_out if lone else max(1, workspace // (d_in * held))
    rows = -(-d_out // -(-d_out // most))
    through = weight_grad is not None and in_place is None and (len(groups) > 1 or paired > 0)
    sizes = {
        "sums": 0 if lone or paired else held * rows * d_in,
        "total": rows * d_in if through else 0,
        "open": 0 if paired else rows * d_in,
        "packed": -(-module.segmented_wgrad_workspace(isa, len(x), d_in, rows, paired, len(spans)) // 4),
    }
    sums, total, unfinished, packed = _scratch(sum(sizes.values())).split(list(sizes.values()))
    sample_sq, group_sq = (torch.zeros(n, dtype=torch.float64, device="cpu") for n in (samples, len(groups)))
    gram = torch.zeros(held, held, dtype=torch.float64, device="cpu") if group_gram else None
    for lo in range(0, d_out, rows):
        height = min(rows, d_out - lo)
        result = 0 if in_place is None else in_place.data_ptr() + lo * d_in * 4
        module.segmented_wgrad(
            x=x.data_ptr(),
            dy=dy.data_ptr() + lo * dy.element_size(),
            x_stride=x.stride(0),
            dy_stride=dy.stride(0),
            type=native.TYPES[x.dtype],
            rows=0 if order is None else order.data_ptr(),
            tokens=len(x),
            d_in=d_in,
            d_out=height,
            ends=index[0].data_ptr(),
            groups=index[1].data_ptr(),
            slots=index[2].data_ptr(),
            stretches=len(spans),
            sums=result if lone and not paired else sums.data_ptr(),
            sums_kept=group_gram,
            open=unfinished.data_ptr(),
            total=0 if lone and not paired else result or (total.data_ptr() if through else 0),
            sample_sq=sample_sq.data_ptr(),
            group_sq=group_sq.data_ptr(),
            gram=gram.data_ptr() if gram is not None and paired else 0,
            workspace=packed.data_ptr(),
            isa=isa,
            threads=threads,
        )
        if weight_grad is not None and in_place is None:
            whole = total if through else sums
            weight_grad[lo : lo + height] = whole[: height * d_in].view(height, d_in)
        if gram is not None and not paired:
            gram += gram_of_sums(sums[: held * height * d_in].view(held, -1))
    if gram is not None:
        gram.diagonal().copy_(group_sq)
    return SquaredNorms(sample_sq, group_sq, gram)


def _scratch(size: int) -> Tensor:
    """``size`` float32 elements, not initialised, this thread's until the next call.

    They are kept from call to call: fresh pages for every call cost up to half the time of its products.
    """
    kept: Tensor | None = getattr(_SCRATCH, "kept", None)
    if kept is None or len(kept) < size:
        kept = torch.empty(size, dtype=torch.float32, device="cpu")
        if size <= _MOST_KEPT:
            _SCRATCH.kept = kept
    return kept[:size]
