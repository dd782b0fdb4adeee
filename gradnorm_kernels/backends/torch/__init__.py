"""The torch backend: chunked GEMMs through torch's own BLAS, on any device.

:mod:`.slabs` takes norms and sums from the weight-gradient GEMM, stopping at each sample's end; :mod:`.pairs` takes the
norms of short samples from inner products of their tokens, so that the GEMM crosses them without a stop, and in calls
with few tokens everything. Which is which is the plan's to say.

Products accumulate in float32 (float64 for float64 inputs), as do the squares within one slab; sums over slabs and
tiles are float64. The squares of a gradient's elements between about 1e-19 and 1e16 fit float32.

The integer tensors are read on the host: on a GPU a call synchronises, unless they are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from ... import checks
from ...layout import Stretch, read, to_device
from .. import Plan
from .gram import pair_gram, sample_norms
from .numerics import block_sums, exact_matmuls, inner, wide_dtype
from .wgrad import Step, Sums, slab_pass, steps

# Arguments and result of :func:`.wgrad.slab_pass`. The cpu backend brings a compiled one.
SlabPass = Callable[[Tensor, Tensor, list[list[Step]], int, Tensor | None, bool], Sums]


def missing() -> None:
    """Nothing is missing: the library is not imported without torch."""


def unsupported(device_type: str, dtype: torch.dtype) -> None:
    """Every device and dtype that the ops take is torch's too."""


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
    weight_grad: bool,
    group_gram: bool,
    slabs: SlabPass = slab_pass,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram); what was not asked for is None."""
    layout = read(x, cu_seqlens, sample_ids, group_ids, sizes)
    samples, groups = (_zeros(x, n) for n in (layout.samples, layout.groups))
    gram = _zeros(x, layout.groups, layout.groups) if group_gram else None
    if not layout.stretches or sizes.d_in == 0 or sizes.d_out == 0:
        return samples, groups, x.new_zeros(sizes.d_out, sizes.d_in) if weight_grad else None, gram

    total = x.new_empty(sizes.d_out, sizes.d_in) if weight_grad else None
    runs = [list(run) for _, run in groupby(layout.stretches, key=lambda stretch: stretch.group)]
    x, dy = layout.arrange(x), layout.arrange(dy)
    with exact_matmuls(x.device):
        if plan.sums == "gram" and not weight_grad:
            found = _from_pairs(x, dy, runs, plan.tile, group_gram)
        else:
            found = _from_slabs(x, dy, runs, plan, total, group_gram, slabs)
    present = _index(x, [run[0].group for run in runs])
    samples[_index(x, [stretch.sample for stretch in layout.stretches])] = found.sample_sq
    groups[present] = found.group_sq
    if gram is not None and found.gram is not None:
        gram[present[:, None], present] = found.gram
    return samples, groups, total, gram


def grad_gram(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
    slabs: SlabPass = slab_pass,
) -> Tensor:
    """``<G_i, G_j>`` [N, N] float64: the Gram of groups of one sample each."""
    layout = read(x, cu_seqlens, sample_ids, None, sizes)
    result = _zeros(x, layout.samples, layout.samples)
    if not layout.stretches or sizes.d_in == 0 or sizes.d_out == 0:
        return result
    x, dy = layout.arrange(x), layout.arrange(dy)
    gram: Tensor | None
    with exact_matmuls(x.device):
        if plan.sums == "gram":
            gram = pair_gram(x, dy, layout.stretches, plan.tile)
        else:
            runs = [[Step(s.hi - s.lo, measured=True)] for s in layout.stretches]
            gram = slabs(x, dy, runs, plan.slab, None, True).gram
    assert gram is not None
    present = _index(x, [stretch.sample for stretch in layout.stretches])
    result[present[:, None], present] = gram
    return result


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    sizes: checks.Sizes,
    plan: Plan,
) -> Tensor:
    """``<G_i, v> = sum over t in i of dy_t . (v x_t)`` [N] float64: one product with v, and no gradient is formed."""
    layout = read(x, cu_seqlens, sample_ids, None, sizes)
    dots = _zeros(x, layout.samples)
    if not layout.stretches or sizes.d_in == 0 or sizes.d_out == 0:
        return dots
    x, dy = layout.arrange(x), layout.arrange(dy)
    dtype = x.dtype if v.dtype == x.dtype else wide_dtype(x.dtype)
    v = v.to(dtype)
    tokens = _zeros(x, len(x))
    rows = max(1, plan.slab // max(sizes.d_in, sizes.d_out))
    with exact_matmuls(x.device):
        for lo in range(0, len(x), rows):
            block = slice(lo, lo + rows)
            tokens[block] = inner(x[block].to(dtype), v).mul_(dy[block]).sum(1, dtype=torch.float64)
    lengths = [stretch.hi - stretch.lo for stretch in layout.stretches]
    sums = torch.segment_reduce(tokens, "sum", lengths=_index(x, lengths), unsafe=True)
    dots[_index(x, [stretch.sample for stretch in layout.stretches])] = sums
    return dots


def _from_slabs(
    x: Tensor,
    dy: Tensor,
    runs: list[list[Stretch]],
    plan: Plan,
    weight_grad: Tensor | None,
    group_gram: bool,
    slabs: SlabPass,
) -> Sums:
    """Sums from the slab pass; norms of long samples from there too, of short ones from their Grams."""
    found = slabs(x, dy, [steps(run, plan.gram_tokens) for run in runs], plan.slab, weight_grad, group_gram)
    stretches = [stretch for run in runs for stretch in run]
    short = [i for i, stretch in enumerate(stretches) if stretch.hi - stretch.lo <= plan.gram_tokens]
    if not short:
        return found
    measured = [i for i, stretch in enumerate(stretches) if stretch.hi - stretch.lo > plan.gram_tokens]
    norms = _zeros(x, len(stretches))
    norms[_index(x, short)] = sample_norms(x, dy, [stretches[i] for i in short], plan.tile)
    norms[_index(x, measured)] = found.sample_sq
    return found._replace(sample_sq=norms)


def _from_pairs(x: Tensor, dy: Tensor, runs: list[list[Stretch]], tile: int, group_gram: bool) -> Sums:
    """Everything from pairs of tokens: of the whole batch if the groups' Gram is wanted, else within each group."""
    if group_gram:
        samples = pair_gram(x, dy, [stretch for run in runs for stretch in run], tile)
        sizes = [len(run) for run in runs]
        groups = block_sums(samples, sizes, sizes)
        return Sums(samples.diagonal(), groups.diagonal(), groups)
    blocks = [pair_gram(x, dy, run, tile) for run in runs]
    return Sums(torch.cat([block.diagonal() for block in blocks]), torch.stack([block.sum() for block in blocks]), None)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def _index(like: Tensor, values: list[int]) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), like.device)
