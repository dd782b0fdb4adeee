"""Segmented wgrad, compiled (``csrc/cpu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..torch.wgrad import Span, SquaredNorms, gram_of_sums


def segmented_wgrad(
    x: Tensor,
    dy: Tensor,
    groups: list[list[Span]],
    workspace: int,
    weight_grad: Tensor | None,
    group_gram: bool,
    isa: int | None = None,
    threads: int | None = None,
) -> SquaredNorms:
    """What :func:`gradnorm_kernels.backends.torch.wgrad.segmented_wgrad` computes, compiled.

    ``isa`` is a position in ``build_info()["cpu_isas"]`` that this processor runs (default: the newest).
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

    # A lone group's sum is the total: it is formed where it is returned if the dtype allows.
    in_place = weight_grad is not None and weight_grad.dtype == torch.float32 and len(groups) == 1
    rows = d_out if in_place else -(-d_out // -(-d_out // max(1, workspace // (d_in * held))))
    sums = weight_grad if weight_grad is not None and in_place else _scratch(held, rows, d_in)
    total = None if weight_grad is None or len(groups) == 1 else _scratch(rows, d_in)
    unfinished = _scratch(rows, d_in)
    packed = _scratch(-(-module.segmented_wgrad_workspace(isa, len(x), d_in, rows) // 4))
    sample_sq, group_sq = (torch.zeros(n, dtype=torch.float64, device="cpu") for n in (samples, len(groups)))
    gram = torch.zeros(held, held, dtype=torch.float64, device="cpu") if group_gram else None
    for lo in range(0, d_out, rows):
        height = min(rows, d_out - lo)
        module.segmented_wgrad(
            x=x.data_ptr(),
            dy=dy.data_ptr() + lo * dy.element_size(),
            x_stride=x.stride(0),
            dy_stride=dy.stride(0),
            type=native.TYPES[x.dtype],
            tokens=len(x),
            d_in=d_in,
            d_out=height,
            ends=index[0].data_ptr(),
            groups=index[1].data_ptr(),
            slots=index[2].data_ptr(),
            stretches=len(spans),
            sums=sums.data_ptr(),
            sums_kept=group_gram,
            open=unfinished.data_ptr(),
            total=0 if total is None else total.data_ptr(),
            sample_sq=sample_sq.data_ptr(),
            group_sq=group_sq.data_ptr(),
            workspace=packed.data_ptr(),
            isa=isa,
            threads=threads,
        )
        if weight_grad is not None and not in_place:
            whole = sums[0] if total is None else total
            weight_grad[lo : lo + height] = whole[:height]
        if gram is not None:
            gram += gram_of_sums(sums.view(-1)[: held * height * d_in].view(held, -1))
    if gram is not None:
        gram.diagonal().copy_(group_sq)
    return SquaredNorms(sample_sq, group_sq, gram)


def _scratch(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
