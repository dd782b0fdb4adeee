"""The float64 reference: every per-sample gradient is materialised. Never tuned; tests and benchmarks compare with it.

The functions named after operators take what those of :mod:`gradnorm_kernels.ops` take, without ``algorithm`` and
``backend``, and return the same in float64. The results of the operators for embeddings follow from
:func:`embedding_gradients`, :func:`sample_gradients` and :func:`group_sums`. Nothing here checks its arguments, and
nothing shares code with what it is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_gradients(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """``G_i = sum over the tokens t of sample i of dy_t x_t^T``: [N, d_out, d_in] float64."""
    if x.dim() == 3:
        offsets = [row * x.shape[1] for row in range(x.shape[0] + 1)]
    else:
        offsets = [0, x.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    ids = list(range(len(offsets) - 1)) if sample_ids is None else sample_ids.tolist()
    count = max(ids, default=-1) + 1 if num_samples is None else num_samples
    x, dy = x.detach().double().flatten(0, -2), dy.detach().double().flatten(0, -2)
    gradients = x.new_zeros(count, dy.shape[1], x.shape[1])
    for sample, lo, hi in zip(ids, offsets[:-1], offsets[1:], strict=True):
        gradients[sample] += dy[lo:hi].T @ x[lo:hi]
    return gradients


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weight_grad: bool = False,
    group_gram: bool = False,
    num_samples: int | None = None,
    num_groups: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sample_sq_norms, group_sq_norms, weight_grad, group_gram), all float64."""
    if num_samples is None and group_ids is not None:
        num_samples = len(group_ids)
    gradients = sample_gradients(x, dy, cu_seqlens, sample_ids=sample_ids, num_samples=num_samples)
    sums = group_sums(gradients, group_ids, num_groups)
    flat = sums.flatten(1)
    return (
        gradients.square().sum((1, 2)),
        flat.square().sum(1),
        sums.sum(0) if weight_grad else None,
        torch.mm(flat, flat.T) if group_gram else None,
    )


def grad_gram(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """``<G_i, G_j>``: [N, N] float64."""
    flat = sample_gradients(x, dy, cu_seqlens, sample_ids=sample_ids, num_samples=num_samples).flatten(1)
    return flat @ flat.T


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """``<G_i, v>``: [N] float64."""
    gradients = sample_gradients(x, dy, cu_seqlens, sample_ids=sample_ids, num_samples=num_samples)
    return (gradients * v.detach().double()).sum((1, 2))


def grad_sketch(
    x: Tensor,
    dy: Tensor,
    c_in: Tensor | None,
    c_out: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """``C_out^T G_i C_in``, None for the identity: [N, r_out, r_in] float64."""
    sketches = sample_gradients(x, dy, cu_seqlens, sample_ids=sample_ids, num_samples=num_samples)
    if c_in is not None:
        sketches = sketches @ c_in.double()
    return sketches if c_out is None else c_out.double().T @ sketches


def embedding_gradients(
    ids: Tensor,
    dy: Tensor,
    vocabulary: int,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """``G_i = sum over the tokens t of sample i of one_hot(id_t) dy_t^T``: [N, vocabulary, d] float64.

    ``vocabulary`` is the number of rows of the embedding matrix. Tokens with an id below 0 are left out.
    """
    if ids.dim() == 2:
        offsets = [row * ids.shape[1] for row in range(ids.shape[0] + 1)]
    else:
        offsets = [0, len(ids)] if cu_seqlens is None else cu_seqlens.tolist()
    samples = list(range(len(offsets) - 1)) if sample_ids is None else sample_ids.tolist()
    count = max(samples, default=-1) + 1 if num_samples is None else num_samples
    words, dy = ids.flatten().long(), dy.detach().double().flatten(0, -2)
    gradients = dy.new_zeros(count, vocabulary, dy.shape[1])
    for sample, lo, hi in zip(samples, offsets[:-1], offsets[1:], strict=True):
        kept = words[lo:hi] >= 0
        gradients[sample].index_add_(0, words[lo:hi][kept], dy[lo:hi][kept])
    return gradients


def group_sums(gradients: Tensor, group_ids: Tensor | None, num_groups: int | None = None) -> Tensor:
    """The sums of per-sample gradients [N, ...] over groups: [K, ...] float64; one group without ``group_ids``."""
    groups = [0] * len(gradients) if group_ids is None else group_ids.tolist()
    if num_groups is None:
        num_groups = 1 if group_ids is None else max(groups, default=-1) + 1
    sums = gradients.new_zeros(num_groups, *gradients.shape[1:])
    for gradient, group in zip(gradients, groups, strict=True):
        sums[group] += gradient
    return sums
