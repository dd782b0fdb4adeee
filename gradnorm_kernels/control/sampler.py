"""Task sampler: draws the tasks of the next prompts by a power of their running gradient norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from ..estimation.estimator import RunningEstimate, TaskGradient

Task = TypeVar("Task", bound=Hashable)

#: strategy -> the exponent a of the norm in p ~ norm^a; "power" takes it from the caller.
STRATEGIES: dict[str, float | None] = {
    "uniform": 0.0,
    "proportional": 1.0,
    "proportional_sq": 2.0,
    "inverse": -1.0,
    "power": None,
}

#: With a negative exponent, each running U counts as at least this share of the largest one.
LOWER_CLAMP = 1e-2
#: LOWER_CLAMP to half of it is 1e300.
LOWEST_EXPONENT = -300


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether ``value`` is of one of the kinds; a bool, which Python counts as an int, is not."""
    return isinstance(value, kinds) and not isinstance(value, bool)


class TaskSampler(Generic[Task]):
    """Draws tasks with probabilities that follow a power of their gradient norms.

    ``p_k = (1 - floor) * s_k^(a/2) / sum_j s_j^(a/2) + floor/K``, with s_k the running average of task k's U (the
    unbiased estimate of its squared gradient norm), clamped for this use only:

    - ``a > 0``: ``s_k = max(U_k, 0)``. A task with U <= 0 keeps ``floor/K``.
    - ``a < 0``: ``s_k = max(U_k, LOWER_CLAMP * max_j U_j)``. Before the floor, a task with U near or below zero is
      drawn at most ``LOWER_CLAMP^(a/2)`` times as often as the task with the largest U (10 times for "inverse").
    - Where no measured task has U > 0, the measured tasks have equal probabilities.

    A task without an estimate has the uniform probability 1/K. The measured tasks share the rest by the formula above,
    so a new task neither starves nor dominates.

    Args:
        tasks: the K task names, ints or strings, each once. Their order is the order of ``probabilities``.
        strategy: "uniform" (a = 0), "proportional" (a = 1, by norm), "proportional_sq" (a = 2, by squared norm),
            "inverse" (a = -1) or "power" (a = ``exponent``).
        exponent: a, a finite number of at least -300; with strategy="power" only.
        floor: in [0, 1], the share of the draws that is spread evenly over all tasks. With 0 and a > 0, a task whose
            running U is at most 0 is never drawn again.
        decay: in (0, 1), the factor by which a task's past fades with each of its updates; None averages all of them.
        seed: int >= 0 for the sampler's own generator. The global random state is neither read nor changed.

    Raises:
        TypeError, ValueError: an argument outside the above.

    Source: sampling in proportion to the tasks' gradient norms is the intervention studied by Wu et al. 2025
    (arXiv 2510.19178).
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        strategy: str = "proportional",
        *,
        exponent: float | None = None,
        floor: float = 0.1,
        decay: float | None = 0.9,
        seed: int = 0,
    ) -> None:
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise TypeError(f"tasks must be a list of task names, got {tasks!r}")
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks must hold at least one name and each name once, got {list(tasks)!r}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        if (exponent is not None) != (strategy == "power"):
            raise ValueError(
                f"exponent goes with strategy='power' and with no other, got exponent={exponent!r} and "
                f"strategy={strategy!r}: the named strategies fix their own exponent"
            )
        if exponent is not None and not (_is_number(exponent, (int, float)) and math.isfinite(exponent)):
            raise ValueError(f"exponent must be a finite number, got {exponent!r}")
        if exponent is not None and exponent < LOWEST_EXPONENT:
            raise ValueError(f"exponent must be at least {LOWEST_EXPONENT}, got {exponent!r}: weights would overflow")
        if not (_is_number(floor, (int, float)) and 0.0 <= floor <= 1.0):
            raise ValueError(f"floor must be a number in [0, 1], got {floor!r}: 0.1 spreads a tenth evenly")
        if not (_is_number(seed, (int,)) and seed >= 0):
            raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
        fixed = STRATEGIES[strategy]
        self.tasks: tuple[Task, ...] = tuple(tasks)
        self.strategy = strategy
        self.exponent = float(exponent) if fixed is None and exponent is not None else float(fixed or 0.0)
        self.floor = float(floor)
        self.decay = decay
        self._estimates = {task: RunningEstimate(decay) for task in self.tasks}
        self._given: str | None = None  # whether the updates hold TaskGradients or bare numbers
        self._seed = seed
        self._drawn = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._warned = False

    def update(self, stats: Mapping[Any, TaskGradient | float]) -> None:
        """Add one step's estimates.

        A :class:`TaskGradient` enters with the weight of its pairs (``pair_weight``), a plain number U with weight one.
        A sampler accepts only one of the two kinds, because their weights do not compare. A task that is not in
        ``stats`` is unchanged. NaN means that the step has no estimate for the task (fewer than two samples), and the
        task is unchanged. So it is for an infinite U, as an overflowed fp16 backward gives; a warning says so once.

        Args:
            stats: task -> TaskGradient or U, U in the squared unit of the gradient and of either sign. What
                ``GradNormTracker.step()`` returns fits.

        Raises:
            ValueError: a task this sampler does not have, or numbers given after TaskGradients or the reverse.
            TypeError: stats is not a mapping, or a value is neither a TaskGradient nor a number.
            In either case the sampler is unchanged.
        """
        if not isinstance(stats, Mapping):
            raise TypeError(f"stats must map tasks to TaskGradients or numbers, got {type(stats).__name__}")
        unknown = [task for task in stats if task not in self._estimates]
        if unknown:
            raise ValueError(f"stats has tasks this sampler was not built with: {unknown!r}; it has {self.tasks!r}")
        given = self._given
        for task, value in stats.items():
            if not isinstance(value, TaskGradient) and not _is_number(value, (int, float)):
                raise TypeError(
                    f"stats[{task!r}] must be a TaskGradient or a number, got {type(value).__name__}: "
                    "for a tensor pass its .item()"
                )
            kind = "TaskGradients" if isinstance(value, TaskGradient) else "numbers"
            if given not in (None, kind):
                raise ValueError(
                    f"stats[{task!r}] is one of {kind} but this sampler was given {given} before: a TaskGradient "
                    "weighs as many pairs as it has and a number weighs one, so keep to one kind"
                )
            given = kind
        self._given = given
        for task, value in stats.items():
            sq_norm = value.sq_norm if isinstance(value, TaskGradient) else float(value)
            if math.isinf(sq_norm) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the squared gradient norm of task {task!r} is {sq_norm}: that step does not count for sampling; "
                    "later ones like it are left out without another warning",
                    stacklevel=2,
                )
            self._estimates[task].update(value if isinstance(value, TaskGradient) else _bare(sq_norm))

    @property
    def sq_norms(self) -> dict[Task, float]:
        """Task -> running average of U, not clamped; NaN for a task without an estimate."""
        return {task: estimate.value for task, estimate in self._estimates.items()}

    @property
    def probabilities(self) -> dict[Task, float]:
        """Task -> probability of the next draw, in the order of ``tasks``; they sum to 1 up to rounding."""
        measured = {task: value for task, value in self.sq_norms.items() if not math.isnan(value)}
        weights = self._weights(measured)
        total, count = sum(weights.values()), len(self.tasks)
        shares = {task: len(measured) / count * weight / total for task, weight in weights.items()}
        return {task: (1.0 - self.floor) * shares.get(task, 1.0 / count) + self.floor / count for task in self.tasks}

    def _weights(self, measured: Mapping[Task, float]) -> dict[Task, float]:
        """``(s_k / max s)^(a/2)``; the division prevents underflow and overflow for very small and very large U."""
        largest = max(measured.values(), default=0.0)
        if self.exponent == 0.0 or largest <= 0.0:
            return dict.fromkeys(measured, 1.0)
        lowest = LOWER_CLAMP if self.exponent < 0.0 else 0.0
        return {task: max(value / largest, lowest) ** (self.exponent / 2) for task, value in measured.items()}

    def draw(self, n: int) -> list[Task]:
        """Draw n tasks independently with the current ``probabilities``.

        Each draw uses one uniform number of the sampler's generator, so ``draw(2) + draw(3)`` equals ``draw(5)``.

        Args:
            n: int >= 0, how many.

        Returns:
            n tasks, in the order drawn.

        Raises:
            ValueError: n is not an int of at least 0.
        """
        if not (_is_number(n, (int,)) and n >= 0):
            raise ValueError(f"n must be an int of at least 0, got {n!r}: it is the number of tasks to draw")
        cumulative = torch.tensor(list(self.probabilities.values()), dtype=torch.float64).cumsum(0)
        uniform = torch.rand(n, generator=self._generator, dtype=torch.float64)
        self._drawn += n
        # The first task whose cumulative share exceeds u. It exists, as u < 1, and its probability is not 0.
        index = torch.searchsorted(cumulative / cumulative[-1], uniform, right=True)
        return [self.tasks[i] for i in index.tolist()]

    def _settings(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), "exponent": self.exponent, "floor": self.floor, "decay": self.decay}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue draw for draw, as lists, strings and numbers that JSON can hold."""
        estimates = [estimate.state_dict() for estimate in self._estimates.values()]
        return {
            **self._settings(),
            "seed": self._seed,
            "drawn": self._drawn,
            "given": self._given,
            "estimates": estimates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`: the same averages, and the same draws to come.

        Args:
            state: what :meth:`state_dict` returned, also after a round trip through JSON.

        Raises:
            ValueError: entries are missing or unknown, or the state is that of a sampler with other tasks, another
                order of tasks, or another exponent, floor or decay. The sampler is then unchanged.
        """
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"state must be what TaskSampler.state_dict() returned, got the entries {sorted(state)}")
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(
                    f"state was saved by a sampler with {name}={state[name]!r} and this one has {name}={own!r}: build "
                    "the sampler as it was when the state was saved"
                )
        loaded = {task: RunningEstimate(self.decay) for task in self.tasks}
        for estimate, saved in zip(loaded.values(), state["estimates"], strict=True):
            estimate.load_state_dict(saved)
        self._estimates, self._given = loaded, state["given"]
        self._seed, self._drawn = state["seed"], state["drawn"]
        # One uniform number per draw: skip those already used.
        self._generator.manual_seed(self._seed)
        torch.rand(self._drawn, generator=self._generator, dtype=torch.float64)


def _bare(sq_norm: float) -> TaskGradient:
    """A plain number as RunningEstimate takes it: weight one, no standard error."""
    return TaskGradient(
        sq_norm=sq_norm,
        std_error=math.nan,
        noise_scale=math.nan,
        plug_in=0.0,
        n=0,
        mean_sq_norm=0.0,
        pair_weight=1.0,
        std_error_method="none",
    )
