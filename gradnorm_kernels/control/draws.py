"""Rows of a data set, drawn by the tasks that a TaskSampler chooses."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from .sampler import TaskSampler


class TaskDraws:
    """Draws rows by task: the task from ``sampler``, the row from a shuffled pass over the task's rows.

    Each row of a task is used once before any is used again. The passes have a random generator of their own, and the
    global random state is neither read nor changed: every process that holds the same sampler draws the same rows.

    Args:
        row_tasks: [rows] the task of every row of the data set. Rows of tasks that the sampler lacks are never drawn.
        sampler: draws the tasks; each of its tasks must have a row.
        seed: int >= 0 of the shuffling.

    Raises:
        ValueError: a task of the sampler has no row.
    """

    def __init__(self, row_tasks: Sequence[Hashable], sampler: TaskSampler[Any], seed: int = 0) -> None:
        self.sampler = sampler
        self._seed = seed
        self._rows: dict[Hashable, list[int]] = {task: [] for task in sampler.tasks}
        for row, task in enumerate(row_tasks):
            if task in self._rows:
                self._rows[task].append(row)
        empty = [task for task, rows in self._rows.items() if not rows]
        if empty:
            raise ValueError(f"the data set has no row of the tasks {empty!r}: give the sampler only tasks it has")
        self._used = dict.fromkeys(self._rows, 0)
        self._passes: dict[Hashable, tuple[int, list[int]]] = {}

    def draw(self, n: int) -> list[int]:
        """The next n rows, in the order drawn."""
        return [self._next(task) for task in self.sampler.draw(n)]

    def _next(self, task: Hashable) -> int:
        rows, used = self._rows[task], self._used[task]
        number, position = divmod(used, len(rows))
        if self._passes.get(task, (-1, []))[0] != number:
            seed = (self._seed * 1_000_003 + list(self._rows).index(task)) * 1_000_003 + number
            generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger seed
            self._passes[task] = (number, torch.randperm(len(rows), generator=generator).tolist())
        self._used[task] = used + 1
        return rows[self._passes[task][1][position]]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue draw for draw, the sampler included, as JSON can hold it."""
        return {"seed": self._seed, "used": list(self._used.values()), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ValueError where :meth:`TaskSampler.load_state_dict` does."""
        self.sampler.load_state_dict(state["sampler"])
        self._seed, self._passes = state["seed"], {}
        self._used = dict(zip(self._rows, state["used"], strict=True))
