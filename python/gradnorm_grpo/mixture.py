"""The tasks of a run as a mixture: which are drawn next, and how far each has come in its data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from gradnorm_kernels import TaskSampler

from .settings import Settings
from .tasks import Task


class Mixture:
    """Draws the tasks of a step's prompts by the sampler's probabilities; the same on every process with the same seed.

    Raises:
        ValueError: the settings of the sampler do not fit.
    """

    def __init__(self, settings: Settings, tasks: Sequence[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._independent = settings.task_draws == "independent"
        self.sampler: TaskSampler[str] = TaskSampler(
            list(self.tasks),
            settings.sampling_strategy,
            exponent=settings.sampling_exponent,
            floor=settings.sampling_floor,
            decay=settings.sampling_decay,
            seed=settings.seed,
        )
        self._offsets = random.Random(settings.seed)

    def draw(self, n: int) -> list[str]:
        """The tasks of the next n prompts, those of one task together."""
        if self._independent:
            drawn = self.sampler.draw(n)
            return sorted(drawn, key=list(self.tasks).index)
        # Systematic sampling: one random offset, n evenly spaced points. Each task's count is n p rounded up or down.
        offset, total, drawn = self._offsets.random(), 0.0, []
        for task, p in self.sampler.probabilities.items():
            total += n * p
            drawn += [task] * (math.ceil(min(total, n) - offset) - len(drawn))
        return drawn + [list(self.tasks)[-1]] * (n - len(drawn))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw on, as JSON can hold it."""
        return {
            "sampler": self.sampler.state_dict(),
            "draws": self._offsets.getstate(),
            "positions": {name: task.position for name, task in self.tasks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; entries that are not of a mixture are left alone."""
        # Another strategy or floor changes the draws from here on; the averages they follow stay.
        sampler = {"exponent": self.sampler.exponent, "floor": self.sampler.floor}
        self.sampler.load_state_dict({**state["sampler"], **sampler})
        version, numbers, gauss = state["draws"]
        self._offsets.setstate((version, tuple(numbers), gauss))
        for name, task in self.tasks.items():
            task.position = state["positions"][name]
