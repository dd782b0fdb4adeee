"""Loss weights from the tasks' measured gradients: equal pull, GradNorm, FAMO, and torchjd's weightings of a Gramian.

Framework-free. The weights multiply a task's loss, or its advantages, which is the same for a policy gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracking.tracker import StepStats
from .gramian import GRAMIAN_METHODS, OWN_METHODS, psd_projection, weigh
from .sampler import LOWER_CLAMP

#: Strategies that look at norms or rewards only, and those that are fed the tasks' rewards.
OWN = ("equal_pull", "gradnorm", "famo")
FED_REWARDS = ("gradnorm", "famo")
STRATEGIES = (*OWN, *OWN_METHODS, *GRAMIAN_METHODS)
#: A loss below this is taken to be this: FAMO and GradNorm divide by losses.
LOWEST_LOSS = 1e-2


class RunningGram:
    """The tasks' inner products pooled over steps, numerators and pair weights apart: [K, K], unbiased entry by entry.

    Args:
        tasks: the K tasks, the order of the matrix.
        decay: in (0, 1), the factor by which the past fades at each update; None pools all steps alike.
    """

    def __init__(self, tasks: Sequence[Hashable], decay: float | None) -> None:
        self.tasks, self.decay = tuple(tasks), decay
        self._num, self._den = torch.zeros(2, len(self.tasks), len(self.tasks), dtype=torch.float64)

    def update(self, stats: StepStats) -> None:
        """Add one step; pairs of tasks without an estimate in it keep what they had."""
        fade = 1.0 if self.decay is None else self.decay
        place = {task: i for i, task in enumerate(self.tasks)}
        known = [(i, task) for i, task in enumerate(stats.tasks) if task in place]
        for i, a in known:
            for j, b in known:
                # Pairs of two tasks are about the geometric mean of their own pairs; any weight keeps it unbiased.
                weight = math.sqrt(stats[a].pair_weight * stats[b].pair_weight)
                value = float(stats.inner_products[i, j])
                if math.isfinite(value) and weight > 0:
                    at = place[a], place[b]
                    self._num[at] = fade * self._num[at] + value * weight
                    self._den[at] = fade * self._den[at] + weight

    def adopt(self, other: RunningGram) -> None:
        """Take over the sums of a matrix of some of the same tasks, in any order."""
        place = torch.tensor([self.tasks.index(task) for task in other.tasks])
        self._num[place[:, None], place] += other._num
        self._den[place[:, None], place] += other._den

    @property
    def matrix(self) -> Tensor:
        """[K, K] float64; NaN where nothing was seen. The diagonal is U."""
        return torch.where(self._den > 0, self._num / self._den, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """As plain lists that JSON can hold."""
        return {"num": self._num.tolist(), "den": self._den.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._num = torch.tensor(state["num"], dtype=torch.float64)
        self._den = torch.tensor(state["den"], dtype=torch.float64)


class TaskBalancer:
    """Weights w_k of the tasks' losses, ``w_k = a_k / share_k``: a_k is the part the strategy gives task k's gradient.

    share_k is the task's share of the samples, so that the update is along ``sum_k a_k E[G_k]`` however often a task
    is drawn, and ``sum_k share_k w_k = 1``: the mean weight over samples is one, which leaves the learning rate alone.
    With s_k the running U of task k, clamped below at a hundredth of the largest:

    - "equal_pull": ``a_k ~ 1 / sqrt(s_k)``: every task pulls with the same norm.
    - "gradnorm": ``a_k ~ r_k^alpha / sqrt(s_k)``, r_k the task's loss relative to its first one, over the tasks' mean
      (Chen et al. 2018; solved for the weights instead of descended). Option alpha (1.5).
    - "famo": ``a_k ~ z_k / l_k``, z = softmax(xi), ``xi -= beta (J_z (log l_before - log l_now) + gamma xi)`` (Liu et
      al. 2023). Options beta (0.025) and gamma (0.001).
    - "nash_mtl": ``a_k (M a)_k = 1`` with M the tasks' Gram matrix (Navon et al. 2022).
    - "pcgrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "cagrad", "fairgrad": torchjd's weighting of M,
      with torchjd's options. The last four need further packages, which torchjd's error names.

    A GRPO loss is about zero, so "gradnorm" and "famo" take ``l_k = reward_max - reward`` (a running mean).
    A task that has no estimate has a_k = 1/K, and the others share the rest.

    Args:
        tasks: the K task names, each once.
        strategy: one of the above.
        decay: in (0, 1), how the running averages forget; None averages everything.
        bounds: (lowest, highest) weight before they are brought to mean one. The lowest must be above zero: a weight of
            zero could not be divided out of the measurement again, and the task would never be seen to change.
        psd: project the Gram matrix on the positive semidefinite ones first (an unbiased estimate need not be one, and
            the Gramian methods are made for those).
        reward_max: the reward at which a task's loss is zero.
        seed: of "pcgrad"'s order of tasks; the global random state is left alone.
        options: of the strategy.

    Raises:
        ValueError: a name, a number or an option outside what is said above.
        ImportError: a torchjd method whose packages are not installed; it names them.
    """

    def __init__(
        self,
        tasks: Sequence[Hashable],
        strategy: str = "equal_pull",
        *,
        decay: float | None = 0.9,
        bounds: tuple[float, float] = (0.1, 10.0),
        psd: bool = True,
        reward_max: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks must hold at least one name and each name once, got {tasks!r}")
        if decay is not None and not 0.0 < decay < 1.0:
            raise ValueError(f"decay must be None or lie strictly between 0 and 1, got {decay!r}")
        if not (len(bounds) == 2 and 0.0 < bounds[0] <= 1.0 <= bounds[1] < math.inf):
            raise ValueError(f"bounds must be (lowest, highest) with 0 < lowest <= 1 <= highest, got {bounds!r}")
        defaults = {"gradnorm": {"alpha": 1.5}, "famo": {"beta": 0.025, "gamma": 0.001}}.get(strategy, {})
        if strategy in OWN and set(options) - set(defaults):
            raise ValueError(f"strategy {strategy!r} takes the options {sorted(defaults)}, got {sorted(options)}")
        self.tasks, self.strategy, self.decay = tuple(tasks), strategy, decay
        self.bounds, self.psd, self.reward_max, self.seed = bounds, psd, reward_max, seed
        self.options: dict[str, Any] = {**defaults, **options}
        self.gram = RunningGram(self.tasks, decay)
        self._counts = dict.fromkeys(self.tasks, 0.0)
        self._losses: dict[Hashable, float] = {}
        self._first: dict[Hashable, float] = {}
        self._xi = dict.fromkeys(self.tasks, 0.0)
        self._updates = 0
        self._warned = False
        self._weights: dict[Hashable, float] | None = None
        if strategy not in OWN:
            weigh(strategy, torch.eye(len(self.tasks), dtype=torch.float64), seed, self.options)

    def update(self, stats: StepStats, rewards: Mapping[Any, float] | None = None) -> None:
        """Take in one step: what ``GradNormTracker.step()`` returned, and the tasks' mean rewards for the two that
        need them.

        Raises:
            TypeError: stats is not a StepStats.
            ValueError: no rewards where the strategy is fed them.
        """
        if not isinstance(stats, StepStats):
            raise TypeError(f"stats must be what GradNormTracker.step() returned, got {type(stats).__name__}")
        if self.strategy in FED_REWARDS and rewards is None:
            raise ValueError(f"strategy {self.strategy!r} needs rewards=, the mean reward of each task of the step")
        fade = 1.0 if self.decay is None else self.decay
        self.gram.update(stats)
        if stats:
            new = {task: gradient.n for task, gradient in stats.items()}
            self._counts = {task: fade * n + new.get(task, 0) for task, n in self._counts.items()}
        before = dict(self._losses)
        for task, reward in (rewards or {}).items():
            if task in self._counts and math.isfinite(reward):
                loss = max(self.reward_max - float(reward), LOWEST_LOSS)
                self._first.setdefault(task, loss)
                past = self._losses.get(task, loss)
                self._losses[task] = loss if self.decay is None else self.decay * past + (1 - self.decay) * loss
        if self.strategy == "famo":
            self._descend(before)
        self._updates += 1
        self._weights = None

    def _descend(self, before: Mapping[Hashable, float]) -> None:
        """FAMO's step on xi: weight moves to the tasks whose log-loss fell least."""
        z = torch.tensor(list(self._xi.values()), dtype=torch.float64).softmax(0)
        fall = [math.log(before[task] / self._losses[task]) if task in before else 0.0 for task in self.tasks]
        delta = torch.tensor(fall, dtype=torch.float64)
        gradient = z * (delta - z @ delta)
        for task, own in zip(self.tasks, gradient.tolist(), strict=True):
            self._xi[task] -= self.options["beta"] * (own + self.options["gamma"] * self._xi[task])

    @property
    def weights(self) -> dict[Any, float]:
        """Task -> the factor of its loss or advantages; 1 for all before the first estimate."""
        if self._weights is None:
            self._weights = self._compute()
        return dict(self._weights)

    def _compute(self) -> dict[Hashable, float]:
        matrix = self.gram.matrix
        measured = [i for i, task in enumerate(self.tasks) if not math.isnan(float(matrix[i, i]))]
        if self.strategy == "famo":
            measured = [i for i, task in enumerate(self.tasks) if task in self._losses]
        count, total = len(self.tasks), sum(self._counts.values())
        if not measured or total == 0:
            return dict.fromkeys(self.tasks, 1.0)
        parts = self._parts(measured, matrix)
        share = {task: n / total for task, n in self._counts.items()}
        low, high = self.bounds
        weights = {}
        for i, task in enumerate(self.tasks):
            part = len(measured) / count * parts[i] if i in parts else 1.0 / count
            weights[task] = min(max(part / share[task], low), high) if share[task] > 0 else 1.0
        mean = sum(share[task] * weight for task, weight in weights.items())
        return {task: weight / mean for task, weight in weights.items()}

    def _parts(self, measured: list[int], matrix: Tensor) -> dict[int, float]:
        """Index of a measured task -> a_k, at least 0, summing to one."""
        names = [self.tasks[i] for i in measured]
        if self.strategy == "famo":
            z = torch.tensor(list(self._xi.values()), dtype=torch.float64).softmax(0)
            raw = torch.tensor([float(z[i]) / self._losses[self.tasks[i]] for i in measured], dtype=torch.float64)
        elif self.strategy in OWN:
            sq_norms = matrix.diagonal()[measured]
            largest = float(sq_norms.max())
            if largest <= 0:
                raw = torch.ones(len(measured), dtype=torch.float64)
            else:
                raw = (sq_norms / largest).clamp(min=LOWER_CLAMP).rsqrt()
            if self.strategy == "gradnorm":
                rates = [self._losses[task] / self._first[task] if task in self._losses else 1.0 for task in names]
                rate = torch.tensor(rates, dtype=torch.float64)
                raw = raw * (rate / rate.mean()) ** self.options["alpha"]
        else:
            gram = matrix[measured][:, measured].nan_to_num(0.0)
            raw = weigh(
                self.strategy, psd_projection(gram) if self.psd else gram, self.seed + self._updates, self.options
            )
        raw = raw.nan_to_num(0.0).clamp(min=0.0)
        if float(raw.sum()) <= 0.0:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"strategy {self.strategy!r} finds no direction that serves the tasks from the present Gram matrix:"
                    " they are weighted alike until it does",
                    stacklevel=4,
                )
            raw = torch.ones_like(raw)
        return dict(zip(measured, (raw / raw.sum()).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on with the same weights, as plain lists and numbers that JSON can hold."""
        return {
            "tasks": list(self.tasks),
            "strategy": self.strategy,
            "gram": self.gram.state_dict(),
            "counts": list(self._counts.values()),
            "losses": [[task, loss] for task, loss in self._losses.items()],
            "first": [[task, loss] for task, loss in self._first.items()],
            "xi": list(self._xi.values()),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the state is that of other tasks or another strategy; nothing was taken in.
        """
        for name, own in (("tasks", list(self.tasks)), ("strategy", self.strategy)):
            if state[name] != own:
                raise ValueError(f"state was saved with {name}={state[name]!r} and this balancer has {own!r}")
        self.gram.load_state_dict(state["gram"])
        self._counts = dict(zip(self.tasks, state["counts"], strict=True))
        self._losses, self._first = dict(state["losses"]), dict(state["first"])
        self._xi = dict(zip(self.tasks, state["xi"], strict=True))
        self._updates, self._weights = state["updates"], None
