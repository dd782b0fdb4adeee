"""Which pairs of samples count, and so what is kept of a step's micro-batches: pairs, exact sums or sketches.

- "pairs": pairs inside a micro-batch. Nothing is kept but a few numbers per sample.
- "exact": the tasks' gradient sums, so that all pairs count. A float32 copy of the measured parameters per task.
- "sketch": a random projection per sample, so that all pairs count, with an error of its own.
- "auto": the first of these that serves: pairs where every task has some, exact sums where whole samples meet in a
  micro-batch and the sums fit the memory budget, sketches otherwise. What was exact stays exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimation.moments import StepSums, add_up, merge
from .exact import TaskSums
from .rows import Rows, make_blocks
from .sketch import MicrobatchSketches, Projections, StepSketches, sketch_sums

ACCUMULATE = ("auto", "pairs", "exact", "sketch")
#: What the standard errors of pairs inside micro-batches come from, and so which inner products are computed: those of
#: all samples (a jackknife in each step), those of the tasks, or only the tasks' squares (both: the spread over steps).
ERRORS = ("samples", "tasks", "steps")
#: The default of ``memory_budget``: what exact sums may take, in bytes.
MEMORY_BUDGET = 256 << 20


@dataclass(frozen=True)
class StepPlan:
    """What an optimizer step looks like, where that is known beforehand.

    ``samples``: the most samples of one step, over all micro-batches and ranks. ``together``: the most samples of one
    micro-batch. ``whole``: the rows of a sample are all in one micro-batch. ``tasks``: the number of tasks. The numbers
    are ints of at least 1, ``whole`` is a bool.

    Raises:
        ValueError: a number below 1 or not an int, or ``whole`` no bool.
    """

    samples: int
    together: int
    whole: bool
    tasks: int

    def __post_init__(self) -> None:
        for name in ("samples", "together", "tasks"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {number!r}")
        if not isinstance(self.whole, bool):
            raise ValueError(f"whole must be True or False, got {self.whole!r}")


@dataclass(frozen=True)
class Choice:
    """``mode``: "pairs", "exact" or "sketch". ``why``: as the end of "accumulate: mode, ...".

    ``errors``: exact sums whose standard errors come from sketches.
    """

    mode: str
    why: str
    errors: bool = False

    def __str__(self) -> str:
        return f"{self.mode}: {self.why}"


def choose(*, paired: bool, whole: bool, tasks: int, parameter_bytes: int, budget: int) -> Choice:
    """What "auto" takes.

    Args:
        paired: every task with two samples in a step has two of them in one micro-batch.
        whole: the rows of a sample are all in one micro-batch.
        tasks: the number of tasks.
        parameter_bytes: a float32 copy of the measured parameters.
        budget: the most bytes of exact sums.
    """
    size, most = tasks * parameter_bytes / (1 << 20), budget / (1 << 20)
    if paired:
        return Choice("pairs", "two samples of a task meet in a micro-batch")
    apart = "no two samples of a task meet in a micro-batch"
    if not whole:
        return Choice("sketch", f"{apart}, and a sample's rows are in several")
    sums = f"the tasks' sums ({tasks}) take {size:.3g} MiB, and memory_budget allows {most:.3g} MiB"
    if tasks * parameter_bytes <= budget:
        return Choice("exact", f"{apart}; {sums}", errors=True)
    return Choice("sketch", f"{apart}; {sums}")


@dataclass(frozen=True)
class RankPart:
    """What one rank knows of a step, for the exchange at its end.

    ``sums``: of its pairs inside micro-batches, with its samples' tasks. ``folded``: whether its blocks are folds.
    ``skipped``: the parameters it leaves out. ``spoiled``: its exact sums are not those of its samples. ``mode``: of
    accumulation, None while undecided. ``step``: the step's number. ``shares``: {sample: share of its rows seen}.
    ``partial``: whether a micro-batch had only a part of a sample. ``layout``: of its sketches. ``errors``: what its
    standard errors come from.
    ``sharded``: {parameter: over how many groups it is sharded}, of those that are.
    """

    sums: StepSums
    folded: bool
    skipped: frozenset[str]
    spoiled: bool
    mode: str | None
    step: int
    shares: Mapping[Hashable, float]
    partial: bool
    layout: Mapping[str, tuple[Any, ...]]
    sharded: Mapping[str, int]
    errors: str


class StepResult(NamedTuple):
    """What :func:`~gradnorm_kernels.estimation.moments.moments` takes of a step, and how it came about.

    ``exact`` [K, K]: inner products of the tasks' sums, or None. ``variance`` [K, K]: what projections add to the sums
    over pairs, or None. ``mode``: "pairs", "exact" or "sketch". ``sketched``: whether errors come from sketches.
    ``errors``: one of :data:`ERRORS`.
    """

    sums: StepSums
    exact: Tensor | None
    variance: Tensor | None
    mode: str
    folded: bool
    sketched: bool
    errors: str = "samples"


class Accumulation:
    """What is kept of the micro-batches of a step, under the mode that was asked for or chosen.

    Attributes:
        choice: the mode and why; None while "auto" has not chosen. Until then pairs and sketches are both kept.
        exact, sketches: the step's sums and sketches so far; None where the mode does not need them.
        spoiled: the step's exact sums are not those of its samples.
        step: the number of the step, which the projections follow from.
    """

    def __init__(
        self,
        accumulate: str,
        budget: int,
        width: int,
        parameter_bytes: int,
        plan: StepPlan | None,
        errors: str = "samples",
    ) -> None:
        """``errors``: one of :data:`ERRORS`."""
        self._budget, self._width, self._bytes = budget, width, parameter_bytes
        self.errors = errors
        self.automatic = accumulate == "auto"
        self._plan = plan
        self.step = 0
        self.choice: Choice | None = None if self.automatic else Choice(accumulate, "as asked for")
        if self.automatic and plan is not None:
            self.choice = self._choose(plan.together > 1, plan.whole, plan.tasks)
        self.exact: TaskSums | None = None
        self.sketches: StepSketches | None = None
        self._reset_step()

    def _choose(self, paired: bool, whole: bool, tasks: int) -> Choice:
        found = choose(paired=paired, whole=whole, tasks=tasks, parameter_bytes=self._bytes, budget=self._budget)
        # Sketches that would only give a jackknife's errors to exact sums are not kept where nobody wants those.
        return replace(found, errors=found.errors and self.errors == "samples")

    def _reset_step(self) -> None:
        mode, errors = (None, True) if self.choice is None else (self.choice.mode, self.choice.errors)
        self.exact = TaskSums() if mode == "exact" else None
        self.spoiled = False
        if mode == "sketch" or errors:
            self.sketches = self.sketches or StepSketches()
            self.sketches.reset()
        else:
            self.sketches = None
        self._projections = Projections(self._width, self.step)

    @property
    def pairs(self) -> bool:
        """Whether pairs inside micro-batches are kept, or at least the samples' own squares."""
        return self.choice is None or self.choice.mode != "sketch"

    def reset(self, *, next_step: bool) -> None:
        """Forget the micro-batches so far; ``next_step``: the step is over."""
        self.step += next_step
        self._reset_step()

    def reconsider(self) -> None:
        """Choose again at the end of the next step."""
        self.choice = None
        self._reset_step()

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, and what "auto" chose under which plan."""
        if not self.automatic:
            return {"step": self.step}
        choice, plan = (None if value is None else vars(value) for value in (self.choice, self._plan))
        return {"step": self.step, "choice": choice, "plan": plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`: with the projections and the choice that would have come next.

        A choice that was made for steps of another plan does not replace that of this one's.
        """
        self.step = state.get("step", 0)
        planned = self._plan is None or state.get("plan") == vars(self._plan)
        if self.automatic and "choice" in state and planned:
            self.choice = None if state["choice"] is None else Choice(**state["choice"])
        self._reset_step()

    def microbatch(self, rows: Rows) -> MicrobatchSketches | None:
        """Where a micro-batch's sketches go; None where there are none."""
        return None if self.sketches is None else MicrobatchSketches(rows, self._projections)

    def admit(self, rows: Rows, tasks: int) -> str | None:
        """Before a micro-batch: the sample whose rows are spread, where the exact sums asked for need whole ones.

        Where "auto" chose exact sums and they cannot take the micro-batch, the step goes on with its sketches.
        ``tasks``: of the step so far, the micro-batch included.
        """
        if self.exact is None:
            return None
        spread = (rows.weight != 1).nonzero()
        if not self.automatic:
            return repr(rows.samples[int(spread[0])]) if len(spread) else None
        if len(spread) or tasks * self._bytes > self._budget:
            self.exact, self.spoiled = None, True
        return None

    def combine(
        self,
        parts: Sequence[RankPart],
        mine: Mapping[Hashable, Hashable],
        group: Any,
        shards: Mapping[str, tuple[Any, ...]],
        max_blocks: int,
    ) -> StepResult:
        """All ranks' parts as one step; a collective call. Then "auto" may choose, the same on every rank.

        ``mine``: {sample, named as in the parts: its name on this rank}. ``shards``: {parameter: the groups over which
        it is sharded}.

        Raises:
            ValueError: more rows of a sample were seen than it has.
            RuntimeError: the ranks' sketches do not belong together.
        """
        sums = merge([part.sums for part in parts]) if len(parts) > 1 else parts[0].sums
        folded = any(part.folded for part in parts)
        samples, tasks = list(sums.sample_task), list(sums.sample_task.values())
        shares = self._shares(samples, parts)
        undecided = self.choice is None
        if any(part.spoiled for part in parts):
            self.exact = None  # the sketches are those of the whole step
        self._decide(sums, any(part.partial for part in parts))
        exact = None if self.exact is None else self.exact.gram(sums.tasks, group, shards)
        if self.sketches is None or not samples or (undecided and (self.choice is None or self.choice.mode == "pairs")):
            return StepResult(sums, exact, None, "pairs" if exact is None else "exact", folded, False, self.errors)
        index, keys, _ = make_blocks(tasks, samples, max_blocks, 0)
        found = sketch_sums(
            self.sketches.whole([part.layout for part in parts], samples, mine, group, shards),
            shares,
            tasks,
            len(sums.tasks),
            (index, keys),
        )
        sketched = add_up([found.pairs], sums.tasks, sums.sample_task)
        # The operators' squares where there are any: a sketch of a gradient that is not zero may vanish.
        own = sums.sample_sq or dict(zip(samples, found.sample_sq.tolist(), strict=True))
        sketched = replace(sketched, sample_sq=own)
        folded = len(keys) < len(samples)
        if exact is None:
            return StepResult(sketched, None, found.variance, "sketch", folded, True)
        # The squares are exact as the sums are; only the errors come from the sketches.
        sketched = replace(sketched, self_sq=sums.self_sq)
        return StepResult(sketched, exact, None, "exact", folded, True)

    def _shares(self, samples: Sequence[Hashable], parts: Sequence[RankPart]) -> list[float]:
        found = [sum(part.shares.get(sample, 0.0) for part in parts) for sample in samples]
        for sample, share in zip(samples, found, strict=True):
            if share > 1.0 + 1e-9:
                raise ValueError(
                    f"rows_per_sample: {share:.3g} times the rows of sample {sample!r} were seen over all ranks: give "
                    "every sample one id that no other sample has on any rank"
                )
        return found

    def _decide(self, sums: StepSums, partial: bool) -> None:
        """Choose from a step that was seen, where "auto" has not chosen or pairs turn out not to suffice."""
        task = torch.tensor(list(sums.sample_task.values()), dtype=torch.long, device="cpu")
        several = torch.bincount(task, minlength=len(sums.tasks)) > 1
        if not self.automatic or not bool(several.any()):
            return
        paired = bool((_own_pairs(sums)[several] > 0).all())
        mode = None if self.choice is None else self.choice.mode
        over = len(sums.tasks) * self._bytes > self._budget
        if mode is None or (mode == "exact" and (partial or over)):
            self.choice = self._choose(paired, not partial, len(sums.tasks))
        elif mode == "pairs" and not paired:
            apart = [repr(sums.tasks[k]) for k in (several & (_own_pairs(sums) == 0)).nonzero()[:, 0].tolist()]
            warnings.warn(
                f"no two samples of task {', '.join(apart[:3])}{' ...' if len(apart) > 3 else ''} were in one "
                "micro-batch, so that U is undefined in this step; accumulate='auto' keeps sketches in the next one "
                "and chooses again",
                stacklevel=4,
            )
            self.choice = None


def _own_pairs(sums: StepSums) -> Tensor:
    """[K] the weight of the pairs of a task's own samples."""
    own = sums.pairs.gather(1, sums.block_task[:, None])[:, 0]
    return torch.zeros(len(sums.tasks), dtype=torch.float64, device="cpu").index_add_(0, sums.block_task, own)
