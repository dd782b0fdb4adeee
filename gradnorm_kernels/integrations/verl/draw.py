"""Prompts drawn by task in verl's V1 trainer: a sampler for its data loader, fed with U after each actor update.

verl 0.9 has no interface for samplers of one's own (``AbstractCurriculumSampler`` and ``data.sampler`` are gone since
0.8), so the trainer's ``create_rl_sampler`` and ``PPOTrainer._update_actor`` are replaced by name.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from ...control.draws import TaskDraws
from ...control.sampler import TaskSampler
from ...estimation.metrics import read_gradient, task_key

ACTOR = "actor/"  # what verl puts before the names of the actor's metrics


class DrawnRows(Sampler[int]):
    """Indices of rows, each drawn when the loader asks for it: the task by the running U, the row in shuffled passes.

    One pass of the iterator has as many rows as the data set. Its state is part of verl's data loader checkpoint
    (``data.pt``), and a resumed run continues draw for draw.

    Args:
        row_tasks: [rows] the task of every row.
        sampler: draws the tasks.
        seed: of the shuffling.

    Attributes:
        sampler: the TaskSampler.
    """

    def __init__(self, row_tasks: Sequence[Hashable], sampler: TaskSampler[Any], seed: int = 0) -> None:
        self.sampler = sampler
        self._draws = TaskDraws(row_tasks, sampler, seed)
        self._rows = len(row_tasks)
        self._given = 0  # of this pass
        self.fed = False  # whether an update was taken in

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        while self._given < self._rows:
            self._given += 1
            yield self._draws.draw(1)[0]
        self._given = 0

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Take in the estimates of one actor update.

        Args:
            metrics: of the update, by verl's names: ``actor/tasks/<task>/grad_norm_sq`` and so on.

        Raises:
            ValueError: a measured task that the data does not have.
        """
        line = {key.removeprefix(ACTOR): value for key, value in metrics.items() if key.startswith(ACTOR + "tasks/")}
        found = {task: read_gradient(line, task) for task in self.sampler.tasks}
        self.sampler.update({task: gradient for task, gradient in found.items() if gradient is not None})

    def metrics(self) -> dict[str, float]:
        """``actor/tasks/<task>/sampling_prob``: the probability that the next prompt is of the task."""
        shares = self.sampler.probabilities
        return {ACTOR + task_key(task, "sampling_prob"): share for task, share in shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue draw for draw."""
        return {"given": self._given, "draws": self._draws.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ValueError where :meth:`TaskSampler.load_state_dict` does."""
        self._draws.load_state_dict(state["draws"])
        self._given = state["given"]


def draw_tasks(
    strategy: str = "proportional",
    *,
    task_column: str = "data_source",
    exponent: float | None = None,
    floor: float = 0.1,
    decay: float | None = 0.9,
    seed: int | None = None,
) -> None:
    """Have verl's V1 trainer draw the task of each prompt by its running U.

    Call it beside :func:`measure_actor`, in the module that ``actor_rollout_ref.model.external_lib`` names: verl
    imports this module in the trainer's process before it builds the data loader. A draw happens when the loader asks
    for a row, so in ``trainer.v1.trainer_mode=sync`` it uses every update before it; the asynchronous modes
    ask earlier.

    Args:
        strategy, exponent, floor, decay: of :class:`TaskSampler`.
        task_column: the column of the training data that names a row's task; the same as measure_actor's task_key.
        seed: of the draws; default: ``data.seed``, or 0.

    Raises:
        AttributeError: this verl lacks a function or method that is replaced, which is named.
        ValueError: (when the trainer starts) ``data.dataloader_num_workers`` is not 0, or the data has no such column;
            (at the first update) the actor's metrics hold no estimates.
    """
    from verl.trainer.ppo.v1 import trainer_base

    TaskSampler(["any"], strategy, exponent=exponent, floor=floor, decay=decay)  # raises what does not fit, now
    trainer = trainer_base.PPOTrainer
    for owner, name in ((trainer_base, "create_rl_sampler"), (trainer, "_update_actor")):
        if not hasattr(owner, name):
            raise AttributeError(
                f"this verl has no {owner.__name__}.{name}, which draw_tasks(...) replaces: it is written for verl 0.9"
            )

    def create_rl_sampler(data_config: Any, dataset: Any) -> DrawnRows:
        if data_config["dataloader_num_workers"] != 0:
            raise ValueError(
                f"data.dataloader_num_workers={data_config['dataloader_num_workers']} draws rows long before they are "
                "used: set it to 0"
            )
        rows = _row_tasks(dataset, task_column)
        own_seed = seed if seed is not None else int(data_config.get("seed") or 0)
        tasks = sorted(set(rows), key=str)
        sampler = TaskSampler(tasks, strategy, exponent=exponent, floor=floor, decay=decay, seed=own_seed)
        return DrawnRows(rows, sampler, own_seed)

    inner = getattr(trainer._update_actor, "replaced", trainer._update_actor)

    @functools.wraps(inner)
    def update_actor(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        result = inner(self, batch, metrics)
        rows = self.train_dataloader.sampler
        if isinstance(rows, DrawnRows):
            if not rows.fed and not any(key.startswith(ACTOR + "tasks/") for key in metrics):
                raise ValueError(
                    "the actor's metrics hold no estimates to draw tasks by: call measure_actor(...) in the module "
                    "that actor_rollout_ref.model.external_lib names"
                )
            rows.fed = True
            rows.update(metrics)
            metrics.update(rows.metrics())
        return result

    update_actor.replaced = inner  # type: ignore[attr-defined]
    trainer_base.create_rl_sampler = create_rl_sampler
    trainer._update_actor = update_actor


def _row_tasks(dataset: Any, column: str) -> list[Hashable]:
    """The task of every row of verl's RLHFDataset.

    Raises:
        ValueError: it has no such column.
    """
    table: Any = getattr(dataset, "dataframe", None)
    names = getattr(table, "column_names", None)
    if names is None or column not in names:
        raise ValueError(
            f"task_column={column!r} is not a column of the training data ({type(dataset).__name__}), which has "
            f"{names}: name the one that says which task a prompt belongs to"
        )
    return [value if isinstance(value, int) else str(value) for value in table[column]]
