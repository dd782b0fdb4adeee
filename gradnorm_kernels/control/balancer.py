"""Loss weights from the tasks' measured gradients: equal pull, GradNorm, FAMO, Nash-MTL, and torchjd's weightings.

An aggregation such as PCGrad or MGDA combines the rows of a Jacobian with weights that depend on its Gram matrix alone,
so the K x K matrix of the tasks' inner products is all it needs. The weights multiply a task's loss, or its advantages,
which is the same for a policy gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracking.tracker import StepStats
from .sampler import LOWER_CLAMP

#: Strategy -> the class in torchjd.aggregation, and the options without which it cannot be built.
GRAMIAN_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pcgrad": ("PCGradWeighting", {}),
    "mgda": ("MGDAWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
    "fairgrad": ("FairGradWeighting", {"alpha": 1.0}),
}
#: Solved here: torchjd's Nash-MTL starts from equal weights, and returns them where they hurt a task.
OWN_METHODS = ("nash_mtl",)
#: Added to the diagonal of a Gram matrix scaled to a largest diagonal of one, so that cancelling tasks have a solution.
RIDGE = 1e-6

#: Strategies that need norms or rewards only, and those that need the tasks' rewards.
OWN = ("equal_pull", "gradnorm", "famo")
NEED_REWARDS = ("gradnorm", "famo")
STRATEGIES = (*OWN, *OWN_METHODS, *GRAMIAN_METHODS)
#: Losses are clamped to at least this, because FAMO and GradNorm divide by them.
LOWEST_LOSS = 1e-2


def psd_projection(gram: Tensor) -> Tensor:
    """[K, K] float64: the nearest positive semidefinite matrix in Frobenius norm; negative eigenvalues become zero."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    projected = (vectors * values.clamp(min=0.0)) @ vectors.T
    return (projected + projected.T) / 2


def bargain(gram: Tensor, iterations: int = 60) -> Tensor:
    """[K] float64 with ``a_k (gram a)_k = 1``: Nash-MTL's solution (Navon et al. 2022).

    It minimises ``a^T gram a / 2 - sum log a_k``, which is convex and self-concordant for a positive semidefinite gram:
    Newton steps damped by ``1 / (1 + decrement)`` stay positive and converge from anywhere.
    """
    gram = gram + RIDGE * torch.eye(gram.shape[0], dtype=gram.dtype)
    a = gram.diagonal().rsqrt()
    for _ in range(iterations):
        gradient = gram @ a - 1 / a
        direction = torch.linalg.solve(gram + torch.diag(a**-2), gradient)
        decrement = float((gradient @ direction).clamp(min=0.0).sqrt())
        a = a - direction / (1 + decrement if decrement > 0.25 else 1.0)
        if decrement < 1e-12:
            break
    return a


def weigh(method: str, gram: Tensor, seed: int, options: Mapping[str, Any]) -> Tensor:
    """[K] float64: the weights of the tasks' gradients, on the method's own scale.

    Args:
        method: a key of ``GRAMIAN_METHODS``, or of ``OWN_METHODS``.
        gram: [K, K] float64.
        seed: for methods that visit the tasks in random order; the global random state is restored.
        options: of torchjd's class.

    Raises:
        ImportError: torchjd or a package that the method needs is not installed.
        ValueError: options that the method does not take.
    """
    # Scaled, so that the solvers' absolute tolerances do not depend on the gradients' unit.
    largest = float(gram.diagonal().max())
    scaled = gram / largest if largest > 0 else gram
    if method == "nash_mtl":
        if options:
            raise ValueError(f"strategy 'nash_mtl' takes no options, got {sorted(options)}")
        return bargain(psd_projection(scaled))
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            f"strategy {method!r} is computed by torchjd, which is not installed: pip install torchjd (0.18 was tested)"
        ) from error
    name, defaults = GRAMIAN_METHODS[method]
    settings = {**defaults, **options}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        try:
            return torch.as_tensor(getattr(aggregation, name)(**settings)(scaled)).double()
        except TypeError as error:
            raise ValueError(f"strategy {method!r} was given options that torchjd does not take: {error}") from error


class RunningGram:
    """The tasks' inner products pooled over steps, ``M_ab = sum_t num_ab / sum_t weight_ab``: unbiased entry by entry.

    Args:
        tasks: the K tasks, the order of the matrix.
        decay: in (0, 1), the factor by which the past fades at each update; None weights all steps equally.
    """

    def __init__(self, tasks: Sequence[Hashable], decay: float | None) -> None:
        self.tasks, self.decay = tuple(tasks), decay
        self._num, self._den = torch.zeros(2, len(self.tasks), len(self.tasks), dtype=torch.float64)

    def update(self, stats: StepStats) -> None:
        """Add one step. Pairs of tasks without an estimate in it are unchanged."""
        fade = 1.0 if self.decay is None else self.decay
        index = {task: i for i, task in enumerate(self.tasks)}
        known = [(i, task) for i, task in enumerate(stats.tasks) if task in index]
        for i, a in known:
            for j, b in known:
                # About the number of pairs between the two tasks; U is unbiased under any weight.
                weight = math.sqrt(stats[a].pair_weight * stats[b].pair_weight)
                value = float(stats.inner_products[i, j])
                if math.isfinite(value) and weight > 0:
                    at = index[a], index[b]
                    self._num[at] = fade * self._num[at] + value * weight
                    self._den[at] = fade * self._den[at] + weight

    def adopt(self, other: RunningGram) -> None:
        """Add the sums of a matrix of some of the same tasks, in any order."""
        index = torch.tensor([self.tasks.index(task) for task in other.tasks])
        self._num[index[:, None], index] += other._num
        self._den[index[:, None], index] += other._den

    @property
    def matrix(self) -> Tensor:
        """[K, K] float64; NaN where nothing was seen. The diagonal is U."""
        return torch.where(self._den > 0, self._num / self._den, math.nan)

    @property
    def pair_weights(self) -> Tensor:
        """[K, K] float64: the pooled weight of each entry; 0 where nothing was seen."""
        return self._den.clone()

    def state_dict(self) -> dict[str, Any]:
        """The sums, as lists that JSON can hold."""
        return {"num": self._num.tolist(), "den": self._den.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._num = torch.tensor(state["num"], dtype=torch.float64)
        self._den = torch.tensor(state["den"], dtype=torch.float64)


class TaskBalancer:
    """Weights of the tasks' losses, ``w_k = a_k / share_k``, with a_k the strategy's weight of task k's gradient.

    share_k is the task's share of the samples: the update is along ``sum_k a_k E[G_k]`` however often a task is drawn.
    ``sum_k share_k w_k = 1``: the mean weight over samples is one, so the learning rate keeps its meaning. With s_k the
    running U of task k, clamped to at least a hundredth of the largest:

    - "equal_pull": ``a_k ~ 1 / sqrt(s_k)``: every task pulls with the same norm.
    - "gradnorm": ``a_k ~ r_k^alpha / sqrt(s_k)``, r_k the task's loss relative to its first one, divided by the tasks'
      mean (Chen et al. 2018; solved for the weights instead of descending to them). Option alpha (1.5).
    - "famo": ``a_k ~ z_k / l_k``, z = softmax(xi), ``xi -= beta (J_z (log l_before - log l_now) + gamma xi)`` (Liu et
      al. 2023). Options beta (0.025) and gamma (0.001).
    - "nash_mtl": ``a_k (M a)_k = 1`` with M the tasks' Gram matrix (Navon et al. 2022).
    - "pcgrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "cagrad", "fairgrad": torchjd's weighting of M,
      with torchjd's options. The last four need more packages, which torchjd's error names.

    A GRPO loss is about zero, so "gradnorm" and "famo" use ``l_k = reward_max - reward`` (a running mean).
    A task without an estimate has a_k = 1/K, and the others share the rest.

    Args:
        tasks: the K task names, each once.
        strategy: one of the above.
        decay: in (0, 1), the factor by which the past fades in the running averages; None averages everything.
        bounds: (lowest, highest) weight before the weights are scaled to mean one. The lowest must be above zero: a
            weight of zero could not be divided out of the measurement, so the task could never be measured again.
        psd: project the Gram matrix onto the positive semidefinite ones first. The unbiased estimate need not be one,
            and the Gram methods assume it.
        reward_max: the highest reward, at which a task's loss is zero. A mean reward above it is warned about.
        seed: of the order in which "pcgrad" visits the tasks; the global random state is unchanged.
        options: of the strategy.

    Raises:
        ValueError: a name, a number or an option outside the above.
        ImportError: a torchjd method whose packages are not installed; the message names them.
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
        if not isinstance(psd, bool):
            raise ValueError(f"psd must be True or False, got {psd!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
        if not (isinstance(bounds, Sequence) and len(bounds) == 2 and 0.0 < bounds[0] <= 1.0 <= bounds[1] < math.inf):
            raise ValueError(f"bounds must be (lowest, highest) with 0 < lowest <= 1 <= highest, got {bounds!r}")
        defaults = {"gradnorm": {"alpha": 1.5}, "famo": {"beta": 0.025, "gamma": 0.001}}.get(strategy, {})
        if strategy in OWN and set(options) - set(defaults):
            raise ValueError(f"strategy {strategy!r} takes the options {sorted(defaults)}, got {sorted(options)}")
        for name, number in {"reward_max": reward_max, **(options if strategy in OWN else {})}.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number!r}")
        self.tasks, self.strategy, self.decay = tuple(tasks), strategy, decay
        self.bounds, self.psd, self.reward_max, self.seed = bounds, psd, reward_max, seed
        self.options: dict[str, Any] = {**defaults, **options}
        self.gram = RunningGram(self.tasks, decay)
        self._counts = dict.fromkeys(self.tasks, 0.0)
        self._losses: dict[Hashable, float] = {}
        self._first: dict[Hashable, float] = {}
        self._xi = dict.fromkeys(self.tasks, 0.0)
        self._updates = 0
        self._warned = self._warned_above = False
        self._weights: dict[Hashable, float] | None = None
        if strategy not in OWN:
            weigh(strategy, torch.eye(len(self.tasks), dtype=torch.float64), seed, self.options)

    @property
    def needs_inner_products(self) -> bool:
        """Whether the weights follow from the tasks' inner products, and not from their norms or rewards alone."""
        return self.strategy not in OWN and len(self.tasks) > 1

    def update(self, stats: StepStats, rewards: Mapping[Any, float] | None = None) -> None:
        """Add one step.

        Args:
            stats: what ``GradNormTracker.step()`` returned.
            rewards: the mean reward of each task in the step, for "gradnorm" and "famo". A task that is left out keeps
                its running mean.

        Raises:
            TypeError: stats is not a StepStats.
            ValueError: the strategy needs rewards, or the tasks' inner products, and there are none.
        """
        if not isinstance(stats, StepStats):
            raise TypeError(f"stats must be what GradNormTracker.step() returned, got {type(stats).__name__}")
        if self.strategy in NEED_REWARDS and rewards is None:
            raise ValueError(f"strategy {self.strategy!r} needs rewards=, the mean reward of each task of the step")
        if self.needs_inner_products and stats.errors == "steps" and stats.accumulate == "pairs":
            raise ValueError(
                f"strategy {self.strategy!r} needs the tasks' inner products, which a tracker with errors='steps' does "
                "not compute: make the tracker with errors='tasks' or 'samples', or take one of "
                f"{', '.join(map(repr, OWN))}"
            )
        fade = 1.0 if self.decay is None else self.decay
        self.gram.update(stats)
        if stats:
            new = {task: gradient.n for task, gradient in stats.items()}
            self._counts = {task: fade * n + new.get(task, 0) for task, n in self._counts.items()}
        before = dict(self._losses)
        for task, reward in (rewards or {}).items():
            if task in self._counts and math.isfinite(reward):
                self._warn_above(task, float(reward))
                loss = max(self.reward_max - float(reward), LOWEST_LOSS)
                self._first.setdefault(task, loss)
                past = self._losses.get(task, loss)
                self._losses[task] = loss if self.decay is None else self.decay * past + (1 - self.decay) * loss
        if self.strategy == "famo":
            self._descend(before)
        self._updates += 1
        self._weights = None

    def _warn_above(self, task: Hashable, reward: float) -> None:
        """A reward above reward_max has no loss: clamped, the task looks solved."""
        if self.strategy in NEED_REWARDS and reward > self.reward_max and not self._warned_above:
            self._warned_above = True
            warnings.warn(
                f"task {task!r} has a mean reward of {reward:.6g}, above reward_max={self.reward_max:g}, so its loss "
                f"reward_max - reward is {LOWEST_LOSS:g} and strategy {self.strategy!r} takes it for solved; pass "
                f"TaskBalancer(tasks, {self.strategy!r}, reward_max=...) with the highest reward that a task can have",
                stacklevel=3,
            )

    def _descend(self, before: Mapping[Hashable, float]) -> None:
        """FAMO's step on xi: it moves weight to the tasks whose log-loss fell least."""
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
                    f"strategy {self.strategy!r} finds no direction that helps the tasks in the current Gram matrix: "
                    "the tasks are weighted equally until it does",
                    stacklevel=4,
                )
            raw = torch.ones_like(raw)
        return dict(zip(measured, (raw / raw.sum()).tolist(), strict=True))

    def _settings(self) -> dict[str, Any]:
        """What the running averages and the tasks' first losses were made with."""
        return {
            "tasks": list(self.tasks),
            "strategy": self.strategy,
            "decay": self.decay,
            "reward_max": self.reward_max,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same weights, as lists and numbers that JSON can hold."""
        return {
            **self._settings(),
            "gram": self.gram.state_dict(),
            "counts": list(self._counts.values()),
            "losses": [[task, loss] for task, loss in self._losses.items()],
            "first": [[task, loss] for task, loss in self._first.items()],
            "xi": list(self._xi.values()),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: entries are missing, or the state is that of other tasks or another strategy, decay or
                reward_max; the balancer is unchanged.
        """
        missing = set(self.state_dict()) - set(state) - {"decay", "reward_max"}  # older states lack these two
        if missing:
            raise ValueError(f"state must be what TaskBalancer.state_dict() returned; it lacks {sorted(missing)}")
        for name, own in self._settings().items():
            if state.get(name, own) != own:
                raise ValueError(
                    f"state was saved with {name}={state[name]!r} and this balancer has {own!r}: build the balancer as "
                    "it was when the state was saved"
                )
        self.gram.load_state_dict(state["gram"])
        self._counts = dict(zip(self.tasks, state["counts"], strict=True))
        self._losses, self._first = dict(state["losses"]), dict(state["first"])
        self._xi = dict(zip(self.tasks, state["xi"], strict=True))
        self._updates, self._weights = state["updates"], None
