"""From Gram matrices to the tasks' second moments: the cross-product estimates and their jackknife errors.

Everything here is small (one row a block of samples, one column a task) and in float64. A *block* is the unit the
jackknife leaves out: one sample where the [N, N] Gram is affordable, else a fold of several samples of one task.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAN = float("nan")
#: A sample whose squared norm is at most this share of the largest in its task does not count as informative. A group
#: of equal rewards has a zero gradient, but for the rounding of its mean reward.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class PairSums:
    """One micro-batch as the estimator needs it. ``b`` runs over its blocks, each of one task.

    gram [b, b] float64: inner products of the blocks' (weighted) gradient sums. self_sq [b] float64: the sum over the
    block's samples of their own squared norms. weight [b], weight_sq [b] float64: sums of w_p and of w_p squared.
    """

    gram: Tensor
    self_sq: Tensor
    weight: Tensor
    weight_sq: Tensor
    block_task: Tensor
    block_keys: Sequence[Hashable]


@dataclass(frozen=True)
class StepSums:
    """The micro-batches of a step added up over K tasks and D distinct blocks: small enough for ranks to exchange.

    inner, pairs [D, K] float64: each block's inner products, and pair weights, with every task's sum in its own
    micro-batches; the column of a block's own task leaves out samples paired with themselves. own_inner, own_pairs [D]:
    what deleting the block takes from its own task's numerator and denominator. self_sq, weight_sq, whole,
    whole_weight [K]: sums of the samples' own squares and squared weights, of ``||sum of a micro-batch||^2`` and of its
    squared weight. sample_task: the task's index of every sample seen. sample_sq: its squared norm, added up over the
    micro-batches that hold rows of it.
    """

    tasks: tuple[Hashable, ...]
    keys: tuple[Hashable, ...]
    block_task: Tensor
    inner: Tensor
    pairs: Tensor
    own_inner: Tensor
    own_pairs: Tensor
    self_sq: Tensor
    weight_sq: Tensor
    whole: Tensor
    whole_weight: Tensor
    sample_task: Mapping[Hashable, int] = field(default_factory=dict)
    sample_sq: Mapping[Hashable, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskMoments:
    """K tasks' estimates with jackknife standard errors; all tensors float64, the first six [K], the rest [K, K]."""

    sq_norm: Tensor
    std_error: Tensor
    plug_in: Tensor
    mean_sq_norm: Tensor
    pair_weight: Tensor
    noise_scale: Tensor
    inner_products: Tensor
    inner_products_se: Tensor
    cosines: Tensor
    cosines_se: Tensor


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, NAN)


def noise_scale(mean_sq_norm: Tensor, sq_norm: Tensor) -> Tensor:
    """``tr(Cov) / U``, NaN where U is zero."""
    return torch.where(sq_norm != 0, (mean_sq_norm - sq_norm) / sq_norm, NAN)


def informative(sq_norms: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """[K] int64: how many samples of each task have a gradient, ``||G_i||^2 > NEGLIGIBLE max_j ||G_j||^2``.

    sq_norms [N] float64, task [N] int64 in [0, K). A norm that is not finite counts, and is no scale for others.
    """
    finite = torch.where(sq_norms.isfinite(), sq_norms, 0.0)
    largest = torch.zeros(num_tasks, dtype=torch.float64, device="cpu").scatter_reduce_(0, task, finite, "amax")
    counts = ~(sq_norms <= NEGLIGIBLE * largest[task])
    return torch.bincount(task[counts], minlength=num_tasks)


def _cosine(inner: Tensor, sq_a: Tensor, sq_b: Tensor) -> Tensor:
    """inner / sqrt(sq_a sq_b), NaN where either estimate is not positive, as an unbiased estimate may be."""
    product = sq_a * sq_b
    return torch.where((sq_a > 0) & (sq_b > 0), inner / product.clamp_min(0).sqrt(), NAN)


def _by_task(values: Tensor, task: Tensor, num_tasks: int, dim: int = 0) -> Tensor:
    """Sum along ``dim`` what belongs to one task. Not by a one-hot product: 0 * NaN would carry NaN between tasks."""
    shape = list(values.shape)
    shape[dim] = num_tasks
    return torch.zeros(shape, dtype=torch.float64, device="cpu").index_add_(dim, task, values)


def add_up(
    parts: Sequence[PairSums], tasks: Sequence[Hashable], sample_task: Mapping[Hashable, int] | None = None
) -> StepSums:
    """One process's micro-batches as :class:`StepSums`; ``block_task`` of the parts indexes ``tasks``."""
    num_tasks = len(tasks)
    index: dict[Hashable, int] = {}
    block_task: list[int] = []
    for part in parts:
        for key, task in zip(part.block_keys, part.block_task.tolist(), strict=True):
            if key not in index:
                index[key] = len(block_task)
                block_task.append(task)
    count = len(block_task)
    inner, pairs = torch.zeros(2, count, num_tasks, dtype=torch.float64, device="cpu")
    own_inner, own_pairs = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    self_sq, weight_sq, whole, whole_weight = torch.zeros(4, num_tasks, dtype=torch.float64, device="cpu")
    for part in parts:
        at = torch.tensor([index[key] for key in part.block_keys], dtype=torch.long, device="cpu")
        task = part.block_task
        own = task[:, None]
        part_inner = _by_task(part.gram, task, num_tasks, dim=1)
        part_pairs = part.weight[:, None] * _by_task(part.weight, task, num_tasks)[None, :]
        mine, my_pairs = part_inner.gather(1, own)[:, 0], part_pairs.gather(1, own)[:, 0]
        # Deleting block b takes its row and its column of the task's sum, and gives its own square back once.
        own_inner.index_add_(0, at, 2 * mine - part.gram.diagonal() - part.self_sq)
        own_pairs.index_add_(0, at, 2 * my_pairs - part.weight**2 - part.weight_sq)
        inner.index_add_(0, at, part_inner.scatter(1, own, (mine - part.self_sq)[:, None]))
        pairs.index_add_(0, at, part_pairs.scatter(1, own, (my_pairs - part.weight_sq)[:, None]))
        self_sq += _by_task(part.self_sq, task, num_tasks)
        weight_sq += _by_task(part.weight_sq, task, num_tasks)
        whole += _by_task(part_inner, task, num_tasks).diagonal()
        whole_weight += _by_task(part.weight, task, num_tasks) ** 2
    return StepSums(
        tasks=tuple(tasks),
        keys=tuple(index),
        block_task=torch.tensor(block_task, dtype=torch.long, device="cpu"),
        inner=inner,
        pairs=pairs,
        own_inner=own_inner,
        own_pairs=own_pairs,
        self_sq=self_sq,
        weight_sq=weight_sq,
        whole=whole,
        whole_weight=whole_weight,
        sample_task=dict(sample_task or {}),
    )


def merge(sums: Sequence[StepSums]) -> StepSums:
    """Several processes' sums as one: their pairs are pooled, and a block known to several is one block.

    Raises:
        ValueError: processes put one sample into different tasks.
    """
    tasks = list(dict.fromkeys(task for part in sums for task in part.tasks))
    keys = list(dict.fromkeys(key for part in sums for key in part.keys))
    column, row = {task: i for i, task in enumerate(tasks)}, {key: i for i, key in enumerate(keys)}
    block_task = torch.zeros(len(keys), dtype=torch.long, device="cpu")
    total = torch.zeros(2, len(keys), len(tasks), dtype=torch.float64, device="cpu")
    own = torch.zeros(2, len(keys), dtype=torch.float64, device="cpu")
    by_task = torch.zeros(4, len(tasks), dtype=torch.float64, device="cpu")
    sample_task: dict[Hashable, int] = {}
    sample_sq: dict[Hashable, float] = {}
    for part in sums:
        columns = torch.tensor([column[task] for task in part.tasks], dtype=torch.long, device="cpu")
        rows = torch.tensor([row[key] for key in part.keys], dtype=torch.long, device="cpu")
        block_task[rows] = columns[part.block_task]
        wide = torch.zeros(2, len(part.keys), len(tasks), dtype=torch.float64, device="cpu")
        total.index_add_(1, rows, wide.index_add_(2, columns, torch.stack([part.inner, part.pairs])))
        own.index_add_(1, rows, torch.stack([part.own_inner, part.own_pairs]))
        by_task.index_add_(1, columns, torch.stack([part.self_sq, part.weight_sq, part.whole, part.whole_weight]))
        for sample, sq_norm in part.sample_sq.items():
            sample_sq[sample] = sample_sq.get(sample, 0.0) + sq_norm
        for sample, task in part.sample_task.items():
            if sample_task.setdefault(sample, int(columns[task])) != int(columns[task]):
                raise ValueError(
                    f"sample_ids: sample {sample!r} has rows of two tasks, {tasks[sample_task[sample]]!r} on one rank "
                    f"and {part.tasks[task]!r} on another; a sample belongs to one task"
                )
    inner, pairs, (own_inner, own_pairs) = total[0], total[1], own
    self_sq, weight_sq, whole, whole_weight = by_task
    return StepSums(
        tuple(tasks),
        tuple(keys),
        block_task,
        inner,
        pairs,
        own_inner,
        own_pairs,
        self_sq,
        weight_sq,
        whole,
        whole_weight,
        sample_task,
        sample_sq,
    )


def task_moments(parts: Sequence[PairSums], num_tasks: int) -> TaskMoments:
    """:func:`moments` of one process's micro-batches, whose tasks are numbered."""
    return moments(add_up(parts, range(num_tasks)))


def moments(sums: StepSums, exact: Tensor | None = None, variance: Tensor | None = None) -> TaskMoments:
    """Estimate every task's squared gradient norm and all cross-task inner products.

    ``U_k = sum_m sum_{p != q in k} <G_p, G_q> / sum_m sum_{p != q in k} w_p w_q``,
    ``M_ab = sum_m <S_a, S_b> / sum_m w_a w_b`` for a != b (S: a task's sum inside a micro-batch m).
    Standard errors leave out one block at a time: ``se^2 = (D - 1)/D sum_d (theta_{-d} - mean)^2``, and for a quantity
    of two tasks the sum of both tasks' terms. They are NaN for a task of fewer than three blocks.

    ``exact`` [K, K] float64: inner products of the tasks' sums over *all* micro-batches, of whole samples; then every
    pair counts, ``U_k = (||S_k||^2 - sum ||G_p||^2) / (n (n - 1))``, and the standard errors, still those of the pairs
    inside micro-batches, are upper bounds.

    ``variance`` [K, K] float64: that of the numerators by something besides the choice of samples (random projections);
    it is added to the squared standard errors of U and of the inner products.
    """
    num_tasks = len(sums.tasks)
    inner, pairs, block_task = sums.inner, sums.pairs, sums.block_task
    num, den = _by_task(inner, block_task, num_tasks), _by_task(pairs, block_task, num_tasks)  # [K, K]
    blocks = torch.bincount(block_task, minlength=num_tasks).to(torch.float64)[:, None]
    estimates = ratio(num, den)
    sq_norm = estimates.diagonal().clone()

    # Leave one block d (of task a) out: row a of the matrix changes. loo[d, k] = M_{-d}[a, k].
    loo_num, loo_den = num[block_task] - inner, den[block_task] - pairs
    own = block_task[:, None]
    loo_num.scatter_(1, own, (num.diagonal()[block_task] - sums.own_inner)[:, None])
    loo_den.scatter_(1, own, (den.diagonal()[block_task] - sums.own_pairs)[:, None])
    loo = ratio(loo_num, loo_den)
    loo_sq = loo.gather(1, own)[:, 0]
    loo_cos = _cosine(loo, loo_sq[:, None], sq_norm[None, :])

    def jackknife(left_out: Tensor) -> Tensor:
        """[D, K] leave-one-out values -> [K, K] variance from the blocks of each row's task."""
        mean = _by_task(left_out, block_task, num_tasks) / blocks
        deviation = (left_out - mean[block_task]) ** 2
        return torch.where(blocks > 2, (blocks - 1) / blocks * _by_task(deviation, block_task, num_tasks), NAN)

    var_inner, var_cos = jackknife(loo), jackknife(loo_cos)
    more = torch.zeros_like(den) if variance is None else ratio(variance, den**2)
    inner_se, cos_se = (var_inner + var_inner.T + more).sqrt(), (var_cos + var_cos.T).sqrt()
    std_error = (var_inner + more).diagonal().sqrt()
    inner_se.diagonal().copy_(std_error)

    plug_in, pair_weight = ratio(sums.whole, sums.whole_weight), den.diagonal().clone()
    if exact is not None:
        n = sums.weight_sq  # whole samples: every weight is one
        pair_weight = n * (n - 1)
        estimates = ratio(exact, n[:, None] * n[None, :])
        sq_norm = ratio(exact.diagonal() - sums.self_sq, pair_weight)
        plug_in = ratio(exact.diagonal(), n * n)
        estimates.diagonal().copy_(sq_norm)
    cosines = _cosine(estimates, sq_norm[:, None], sq_norm[None, :])
    cos_se.diagonal().zero_()
    mean_sq_norm = ratio(sums.self_sq, sums.weight_sq)
    return TaskMoments(
        sq_norm=sq_norm,
        std_error=std_error,
        plug_in=plug_in,
        mean_sq_norm=mean_sq_norm,
        pair_weight=pair_weight,
        noise_scale=noise_scale(mean_sq_norm, sq_norm),
        inner_products=estimates,
        inner_products_se=inner_se,
        cosines=cosines,
        cosines_se=cos_se,
    )
