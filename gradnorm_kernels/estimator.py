"""From Gram matrices to published numbers: the cross-product estimate, its standard error and its companions.

Everything here is small (one row per block of samples, one per task) and in float64. A *block* is the unit the
jackknife leaves out: one sample where the [N, N] Gram is affordable, else a fold of several samples of one task.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAN = float("nan")


class CrossProduct(NamedTuple):
    """What :func:`cross_product` returns; every tensor is [K], one entry a group."""

    sq_norm: Tensor
    plug_in: Tensor
    noise_scale: Tensor
    n: Tensor
    std_error: Tensor | None


@dataclass(frozen=True)
class TaskGradient:
    """One task's gradient over one optimizer step, or pooled over several.

    ``sq_norm = sum_{p != q} <G_p, G_q> / sum_{p != q} w_p w_q`` (w = 1 for a sample that is whole in its micro-batch),
    in the squared unit of the loss per unit of the parameters; NaN where no pair was seen, and it may be negative.
    """

    sq_norm: float
    std_error: float
    noise_scale: float
    plug_in: float
    n: int
    mean_sq_norm: float
    pair_weight: float
    std_error_method: str


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


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, NAN)


def _cosine(inner: Tensor, sq_a: Tensor, sq_b: Tensor) -> Tensor:
    """inner / sqrt(sq_a sq_b), NaN where either estimate is not positive, as an unbiased estimate may be."""
    product = sq_a * sq_b
    return torch.where((sq_a > 0) & (sq_b > 0), inner / product.clamp_min(0).sqrt(), NAN)


def _noise_scale(mean_sq_norm: Tensor, sq_norm: Tensor) -> Tensor:
    return torch.where(sq_norm != 0, (mean_sq_norm - sq_norm) / sq_norm, NAN)


def _by_task(values: Tensor, task: Tensor, num_tasks: int, dim: int = 0) -> Tensor:
    """Sum along ``dim`` what belongs to one task. Not by a one-hot product: 0 * NaN would carry NaN between tasks."""
    shape = list(values.shape)
    shape[dim] = num_tasks
    return torch.zeros(shape, dtype=torch.float64).index_add_(dim, task, values)


def _pair_sums(
    parts: Sequence[PairSums], num_tasks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Hashable], Tensor]:
    """Per block, over all micro-batches: its row of inner products with every task's sum, and of pair weights.

    Returns inner [D, K] and pairs [D, K] (D distinct blocks; the column of a block's own task leaves out the block's
    samples paired with themselves), then twice_inner and twice_pairs [D]: what deleting the block takes from its own
    task's numerator and denominator; the block keys and their tasks [D].
    """
    index: dict[Hashable, int] = {}
    tasks: list[int] = []
    for part in parts:
        for key, task in zip(part.block_keys, part.block_task.tolist(), strict=True):
            if key not in index:
                index[key] = len(tasks)
                tasks.append(task)
    count = len(tasks)
    inner, pairs = torch.zeros(2, count, num_tasks, dtype=torch.float64)
    twice_inner, twice_pairs = torch.zeros(2, count, dtype=torch.float64)
    for part in parts:
        at = torch.tensor([index[key] for key in part.block_keys])
        own = part.block_task[:, None]
        part_inner = _by_task(part.gram, part.block_task, num_tasks, dim=1)
        part_pairs = part.weight[:, None] * _by_task(part.weight, part.block_task, num_tasks)[None, :]
        own_inner, own_pairs = part_inner.gather(1, own)[:, 0], part_pairs.gather(1, own)[:, 0]
        # Deleting block b takes its row and its column of the task's sum, and gives its own square back once.
        twice_inner.index_add_(0, at, 2 * own_inner - part.gram.diagonal() - part.self_sq)
        twice_pairs.index_add_(0, at, 2 * own_pairs - part.weight**2 - part.weight_sq)
        inner.index_add_(0, at, part_inner.scatter(1, own, (own_inner - part.self_sq)[:, None]))
        pairs.index_add_(0, at, part_pairs.scatter(1, own, (own_pairs - part.weight_sq)[:, None]))
    return inner, pairs, twice_inner, twice_pairs, list(index), torch.tensor(tasks, dtype=torch.long)


def task_moments(parts: Sequence[PairSums], num_tasks: int) -> TaskMoments:
    """Estimate every task's squared gradient norm and all cross-task inner products from micro-batches' Grams.

    ``U_k = sum_m sum_{p != q in k} <G_p, G_q> / sum_m sum_{p != q in k} w_p w_q``,
    ``M_ab = sum_m <S_a, S_b> / sum_m w_a w_b`` for a != b (S: a task's sum inside a micro-batch m).
    Standard errors leave out one block at a time:
    ``se^2 = (D - 1)/D sum_d (theta_{-d} - mean)^2``, and for a quantity of two tasks the sum of both tasks' terms.
    They are
    NaN for a task of fewer than three blocks.
    """
    inner, pairs, own_inner, own_pairs, _, block_task = _pair_sums(parts, num_tasks)
    num, den = _by_task(inner, block_task, num_tasks), _by_task(pairs, block_task, num_tasks)  # [K, K]
    blocks = torch.bincount(block_task, minlength=num_tasks).to(torch.float64)[:, None]
    moments = _ratio(num, den)
    sq_norm = moments.diagonal().clone()

    # Leave one block d (of task a) out: row a of the matrix changes. loo[d, k] = M_{-d}[a, k].
    loo_num, loo_den = num[block_task] - inner, den[block_task] - pairs
    own = block_task[:, None]
    loo_num.scatter_(1, own, (num.diagonal()[block_task] - own_inner)[:, None])
    loo_den.scatter_(1, own, (den.diagonal()[block_task] - own_pairs)[:, None])
    loo = _ratio(loo_num, loo_den)
    loo_sq = loo.gather(1, own)[:, 0]
    loo_cos = _cosine(loo, loo_sq[:, None], sq_norm[None, :])

    def jackknife(left_out: Tensor) -> Tensor:
        """[D, K] leave-one-out values -> [K, K] variance from the blocks of each row's task."""
        mean = _by_task(left_out, block_task, num_tasks) / blocks
        deviation = (left_out - mean[block_task]) ** 2
        return torch.where(blocks > 2, (blocks - 1) / blocks * _by_task(deviation, block_task, num_tasks), NAN)

    var_inner, var_cos = jackknife(loo), jackknife(loo_cos)
    inner_se, cos_se = (var_inner + var_inner.T).sqrt(), (var_cos + var_cos.T).sqrt()
    std_error = var_inner.diagonal().sqrt()
    inner_se.diagonal().copy_(std_error)
    cosines = _cosine(moments, sq_norm[:, None], sq_norm[None, :])
    cos_se.diagonal().zero_()

    self_sq, weight_sq, whole, whole_weight = torch.zeros(4, num_tasks, dtype=torch.float64)
    for part in parts:
        task = part.block_task
        self_sq += _by_task(part.self_sq, task, num_tasks)
        weight_sq += _by_task(part.weight_sq, task, num_tasks)
        whole += _by_task(_by_task(part.gram, task, num_tasks), task, num_tasks, dim=1).diagonal()
        whole_weight += _by_task(part.weight, task, num_tasks) ** 2
    mean_sq_norm = _ratio(self_sq, weight_sq)
    return TaskMoments(
        sq_norm=sq_norm,
        std_error=std_error,
        plug_in=_ratio(whole, whole_weight),
        mean_sq_norm=mean_sq_norm,
        pair_weight=den.diagonal().clone(),
        noise_scale=_noise_scale(mean_sq_norm, sq_norm),
        inner_products=moments,
        inner_products_se=inner_se,
        cosines=cosines,
        cosines_se=cos_se,
    )


def cross_product(
    sample_sq_norms: Tensor, group_sq_norms: Tensor, group_ids: Tensor | Sequence[int], gram: Tensor | None = None
) -> CrossProduct:
    """Unbiased estimate of each group's squared expected gradient norm.

    ``U_k = (||sum_i G_i||^2 - sum_i ||G_i||^2) / (n (n - 1))`` over the n samples i of group k;
    ``plug_in = ||sum_i G_i||^2 / n^2`` (biased up by tr(Cov)/n); ``noise_scale = tr(Cov)/U`` with
    ``tr(Cov) = sum_i ||G_i||^2 / n - U``; ``std_error`` is the jackknife over samples.

    Args:
        sample_sq_norms: [N] float, ||G_i||^2 in the squared unit of the gradient.
        group_sq_norms: [K] float, ||sum over the group's samples of G_i||^2.
        group_ids: [N] int, the group of each sample, each in [0, K).
        gram: [N, N] float, all <G_i, G_j>; with it the standard error is computed, without it it is None.

    Returns:
        :class:`CrossProduct` of float64 (n: int64) [K] tensors on the CPU. A group of one sample has NaN and n = 1, an
        empty group NaN and n = 0; nothing is clamped: U may be negative.

    Raises:
        ValueError: shapes that do not fit together or a group id outside [0, K).

    Source: the two-sample U-statistic of degree 2; the noise scale is that of McCandlish et al. 2018 (arXiv
        1812.06162).
    """
    sample_sq = torch.as_tensor(sample_sq_norms, dtype=torch.float64).detach().cpu()
    group_sq = torch.as_tensor(group_sq_norms, dtype=torch.float64).detach().cpu()
    ids = torch.as_tensor(group_ids, dtype=torch.long).detach().cpu()
    if sample_sq.dim() != 1 or group_sq.dim() != 1:
        raise ValueError(
            f"sample_sq_norms and group_sq_norms must be one-dimensional, got shapes {tuple(sample_sq.shape)} and "
            f"{tuple(group_sq.shape)}: pass the [N] and [K] results of fused_grad_norm"
        )
    if ids.shape != sample_sq.shape:
        raise ValueError(
            f"group_ids must have one entry a sample: got shape {tuple(ids.shape)} for {sample_sq.numel()} samples"
        )
    groups = group_sq.numel()
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < groups):
        raise ValueError(
            f"group_ids must lie in [0, {groups}) (the length of group_sq_norms), got values from {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    n = torch.bincount(ids, minlength=groups)
    count = n.to(torch.float64)
    own = torch.zeros(groups, dtype=torch.float64).index_add_(0, ids, sample_sq)
    sq_norm = _ratio(group_sq - own, count * (count - 1))
    std_error = None
    if gram is not None:
        gram = torch.as_tensor(gram, dtype=torch.float64).detach().cpu()
        if gram.shape != (ids.numel(), ids.numel()):
            raise ValueError(
                f"gram must be [N, N] with N = {ids.numel()} samples, got shape {tuple(gram.shape)}: pass grad_gram's "
                f"result"
            )
        ones = torch.ones(ids.numel(), dtype=torch.float64)
        part = PairSums(gram, gram.diagonal(), ones, ones, ids, range(ids.numel()))
        std_error = task_moments([part], groups).std_error
    return CrossProduct(
        sq_norm=sq_norm,
        plug_in=_ratio(group_sq, count**2),
        noise_scale=_noise_scale(_ratio(own, count), sq_norm),
        n=n,
        std_error=std_error,
    )


class RunningEstimate:
    """One task's estimate pooled over steps: ``sum_t d^(T-t) num_t / sum_t d^(T-t) den_t`` with num_t = U_t den_t.

    Numerators and denominators are kept apart, so a step with few pairs counts for little and nothing is clamped. The
    standard error pools the steps' own, ``sqrt(sum (den_t se_t)^2) / sum den_t``; where a step has none (fewer than
    three samples) it is taken from the spread between steps, which then holds the drift of training too.

    Args:
        decay: None pools all steps alike; else the factor in (0, 1) by which the past fades at each update.

    Raises:
        ValueError: decay outside (0, 1).
    """

    _SUMS = ("den", "num", "var", "plug", "mean", "den_sq", "num_sq", "cross")

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ValueError(
                f"decay must be None or lie strictly between 0 and 1, got {decay!r}: 0.9 remembers about ten steps"
            )
        self.decay = decay
        self.n = 0
        self.steps = 0
        self._every_step_has_error = True
        self._sum = dict.fromkeys(self._SUMS, 0.0)

    def update(self, g: TaskGradient) -> None:
        """Add one step. A step without a pair of samples (pair_weight 0, or U not finite) adds to n only."""
        self.n += g.n
        if not (g.pair_weight > 0 and math.isfinite(g.sq_norm)):
            return
        self.steps += 1
        s, den = self._sum, g.pair_weight
        fade = 1.0 if self.decay is None else self.decay
        for name in ("den", "num", "plug", "mean"):
            s[name] *= fade
        for name in ("var", "den_sq", "num_sq", "cross"):
            s[name] *= fade**2
        num = g.sq_norm * den
        s["den"] += den
        s["num"] += num
        s["plug"] += g.plug_in * den
        s["mean"] += g.mean_sq_norm * den
        s["den_sq"] += den * den
        s["num_sq"] += num * num
        s["cross"] += num * den
        if math.isfinite(g.std_error):
            s["var"] += (g.std_error * den) ** 2
        else:
            self._every_step_has_error = False

    def _mean(self, name: str) -> float:
        return self._sum[name] / self._sum["den"] if self._sum["den"] > 0 else NAN

    @property
    def value(self) -> float:
        """Pooled U; NaN before the first step that had a pair of samples."""
        return self._mean("num")

    @property
    def plug_in(self) -> float:
        """Pooled plug-in estimate ||mean G||^2 (biased up), at the steps' own n."""
        return self._mean("plug")

    @property
    def mean_sq_norm(self) -> float:
        """Pooled mean of ||G_i||^2."""
        return self._mean("mean")

    @property
    def noise_scale(self) -> float:
        """tr(Cov)/U from the pooled sums."""
        return (self.mean_sq_norm - self.value) / self.value if self.value else NAN

    @property
    def std_error(self) -> float:
        """Standard error of ``value``; see the class for how it is pooled."""
        s = self._sum
        if s["den"] <= 0:
            return NAN
        if self._every_step_has_error:
            return math.sqrt(s["var"]) / s["den"]
        if self.steps < 3:
            return NAN
        residual = s["num_sq"] - 2 * self.value * s["cross"] + self.value**2 * s["den_sq"]
        return math.sqrt(max(residual, 0.0) * self.steps / (self.steps - 1)) / s["den"]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as plain numbers (JSON can hold it)."""
        return {
            "decay": self.decay,
            "n": self.n,
            "steps": self.steps,
            "every_step_has_error": self._every_step_has_error,
            "sum": dict(self._sum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises ValueError when the entries are not those of this class."""
        if set(state) != set(self.state_dict()) or set(state["sum"]) != set(self._SUMS):
            raise ValueError(
                f"state must be what RunningEstimate.state_dict() returned, got the entries {sorted(state)}"
            )
        self.decay, self.n, self.steps = state["decay"], state["n"], state["steps"]
        self._every_step_has_error, self._sum = state["every_step_has_error"], dict(state["sum"])
