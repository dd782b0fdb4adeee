"""The published numbers: one call's cross-product estimate, one task's gradient, and its average over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import PairSums, informative, noise_scale, ratio, task_moments

NAN = float("nan")
#: With fewer samples that have a gradient, U +- 1.96 jackknife errors holds U in less than nine draws of ten
#: (docs/study/intervals.md).
MIN_INFORMATIVE = 5
#: Squared norms and inner products that differ by more than this share of the largest are not those of one set of
#: gradients. Far above the rounding of any dtype or algorithm, since what it catches are mixed-up arguments.
WRONG = 0.02


class CrossProduct(NamedTuple):
    """What :func:`cross_product` returns; every tensor is [K], one entry per group, on the CPU.

    Attributes:
        sq_norm: float64, U in the squared unit of the gradient; NaN for a group of fewer than two samples.
        plug_in: float64, the biased ``||mean G||^2`` in the same unit.
        noise_scale: float64, tr(Cov)/U, in samples.
        n: int64, the samples.
        std_error: float64, of ``sq_norm`` and in its unit; NaN for fewer than three samples. None without a gram.
        n_effective: int64, the samples with a gradient (see :class:`TaskGradient`).
    """

    sq_norm: Tensor
    plug_in: Tensor
    noise_scale: Tensor
    n: Tensor
    std_error: Tensor | None
    n_effective: Tensor


@dataclass(frozen=True)
class TaskGradient:
    """One task's gradient over one optimizer step, or pooled over several.

    ``sq_norm = sum_{p != q} <G_p, G_q> / sum_{p != q} w_p w_q`` (w = 1 for a sample that is whole in its micro-batch),
    in the squared unit of the loss per unit of the parameters; NaN where no pair was seen, and it may be negative.

    Attributes:
        sq_norm: U.
        std_error: its standard error, in its unit; NaN for fewer than three samples, and in a single step under the
            tracker's ``errors="tasks"`` and ``"steps"``.
        noise_scale: tr(Cov)/U, in samples: the batch size at which noise and signal are equal.
        plug_in: the biased ``||mean G||^2``, in the unit of ``sq_norm``.
        n: the samples.
        mean_sq_norm: the mean of ``||G_i||^2``, in the unit of ``sq_norm``.
        pair_weight: ``sum_{p != q} w_p w_q``, the denominator of U; n (n - 1) where all pairs of whole samples count.
        std_error_method: what ``std_error`` comes from, in words.
        n_effective: the samples with a gradient (``||G_i||^2`` above a millionth of the task's largest; a prompt whose
            completions all have the same reward has none). None: not known, as in older logs.
    """

    sq_norm: float
    std_error: float
    noise_scale: float
    plug_in: float
    n: int
    mean_sq_norm: float
    pair_weight: float
    std_error_method: str
    n_effective: int | None = None

    @property
    def caution(self) -> str:
        """ "too few informative prompts (3 of 64)" where the standard error means little; else ""."""
        return too_few_informative(self.n_effective, self.n)


def too_few_informative(n_effective: int | None, n: int) -> str:
    """ "too few informative prompts (k of n)" where k < MIN_INFORMATIVE of n samples have a gradient; else "".

    The jackknife's interval then holds U far less often than it says (docs/study/intervals.md has the coverage by k).
    Also "" where k is not known (None).
    """
    if n_effective is None or n_effective >= MIN_INFORMATIVE:
        return ""
    return f"too few informative prompts ({n_effective} of {n})"


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that should be equal differ by more than any rounding. What is not finite is not compared."""
    finite = one.isfinite() & other.isfinite()
    one, other = one[finite], other[finite]
    return other.numel() > 0 and bool((one - other).abs().max() > WRONG * other.abs().max())


def check_gram(gram: Tensor) -> None:
    """Refuse a square float64 matrix that holds no inner products. What is not finite is not looked at.

    Raises:
        ValueError: the matrix is not symmetric, or has a negative number on its diagonal.
    """
    if _differ(gram, gram.T):
        raise ValueError("gram must be symmetric, as inner products <G_i, G_j> are: pass grad_gram's result")
    diagonal = gram.diagonal()
    if _differ(diagonal, diagonal.abs()):
        raise ValueError(
            f"gram must have squared norms ||G_i||^2 on its diagonal, got {float(diagonal.nan_to_num(0.0).min()):.3g}: "
            "pass grad_gram's result"
        )


def _check_norms(sample_sq: Tensor, group_sq: Tensor, own: Tensor, count: Tensor) -> None:
    """Refuse squared norms that are no gradients': ``0 <= ||sum_i G_i||^2 <= n sum_i ||G_i||^2`` (Cauchy-Schwarz)."""
    for name, norms in (("sample_sq_norms", sample_sq), ("group_sq_norms", group_sq)):
        if _differ(norms, norms.abs()):
            raise ValueError(f"{name} must not be negative, got {float(norms.nan_to_num(0.0).min()):.3g}")
    most = count * own
    above = group_sq.isfinite() & (group_sq > (1 + WRONG) * most)
    if above.any():
        k = int(above.nonzero()[0])
        raise ValueError(
            f"group_sq_norms[{k}] = {float(group_sq[k]):.6g} is more than n times the sum of its {int(count[k])} "
            f"samples' squared norms allows ({float(most[k]):.6g}): pass both results of one call of fused_grad_norm, "
            "and the group_ids of that call"
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
        group_sq_norms: [K] float, ||sum over the group's samples of G_i||^2, in the same unit.
        group_ids: [N] int, the group of each sample, each in [0, K).
        gram: [N, N] float, all <G_i, G_j>, in the same unit; with it the standard error is computed, without it it is
            None.

    Returns:
        :class:`CrossProduct` of float64 (n and n_effective: int64) [K] tensors on the CPU. ``n_effective`` counts the
        samples with a gradient (see :class:`TaskGradient`). A group of one sample has NaN and n = 1, an empty group NaN
        and n = 0; nothing is clamped: U may be negative.

    Raises:
        ValueError: shapes that do not fit together, group ids that are not ints, or one outside [0, K). Numbers that
            no gradients have: a negative squared norm, a group's squared norm above n times the sum of its samples',
            a gram that is not symmetric or whose diagonal is not ``sample_sq_norms``.

    Source: a U-statistic of degree 2 (Hoeffding 1948); the noise scale is that of McCandlish et al. 2018 (arXiv
        1812.06162).
    """
    sample_sq = torch.as_tensor(sample_sq_norms, dtype=torch.float64).detach().cpu()
    group_sq = torch.as_tensor(group_sq_norms, dtype=torch.float64).detach().cpu()
    ids = torch.as_tensor(group_ids).detach().cpu()
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"group_ids must hold ints, got {ids.dtype}: a fraction would be cut off")
    ids = ids.to(torch.long)
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
    own = torch.zeros(groups, dtype=torch.float64, device="cpu").index_add_(0, ids, sample_sq)
    _check_norms(sample_sq, group_sq, own, count)
    sq_norm = ratio(group_sq - own, count * (count - 1))
    std_error = None
    if gram is not None:
        gram = torch.as_tensor(gram, dtype=torch.float64).detach().cpu()
        if gram.shape != (ids.numel(), ids.numel()):
            raise ValueError(
                f"gram must be [N, N] with N = {ids.numel()} samples, got shape {tuple(gram.shape)}: pass grad_gram's "
                f"result"
            )
        check_gram(gram)
        if _differ(gram.diagonal(), sample_sq):
            raise ValueError(
                "gram's diagonal must be sample_sq_norms, and it is not: pass both of the same samples, in one order, "
                "and of the same layers"
            )
        ones = torch.ones(ids.numel(), dtype=torch.float64, device="cpu")
        part = PairSums(gram, gram.diagonal(), ones, ones, ids, range(ids.numel()))
        std_error = task_moments([part], groups).std_error
    return CrossProduct(
        sq_norm=sq_norm,
        plug_in=ratio(group_sq, count**2),
        noise_scale=noise_scale(ratio(own, count), sq_norm),
        n=n,
        std_error=std_error,
        n_effective=informative(sample_sq, ids, groups),
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
        self.n_effective: int | None = 0  # None once a step did not tell
        self.steps = 0
        self._every_step_has_error = True
        self._sum = dict.fromkeys(self._SUMS, 0.0)

    def update(self, g: TaskGradient) -> None:
        """Add one step. A step without a pair of samples (pair_weight 0, or U not finite) adds to n only."""
        self.n += g.n
        if g.n:
            known = self.n_effective is not None and g.n_effective is not None
            self.n_effective = (self.n_effective or 0) + (g.n_effective or 0) if known else None
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
    def caution(self) -> str:
        """As :attr:`TaskGradient.caution`, of the samples of all steps."""
        return too_few_informative(self.n_effective, self.n)

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
            "n_effective": self.n_effective,
            "steps": self.steps,
            "every_step_has_error": self._every_step_has_error,
            "sum": dict(self._sum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises ValueError when the entries are not those of this class.

        A state of an older version lacks ``n_effective``, which then stays unknown.
        """
        state = {"n_effective": None, **state}
        if set(state) != set(self.state_dict()) or set(state["sum"]) != set(self._SUMS):
            raise ValueError(
                f"state must be what RunningEstimate.state_dict() returned, got the entries {sorted(state)}"
            )
        self.decay, self.n, self.steps = state["decay"], state["n"], state["steps"]
        self.n_effective = state["n_effective"]
        self._every_step_has_error, self._sum = state["every_step_has_error"], dict(state["sum"])
