"""SFTTrainer: every row, or packed sequence, is a sample, and its task goes through the collator with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from ...tracking.skipped import some
from ...tracking.tracker import StepStats
from .loss_scale import loss_factor, sft_row_scale
from .validation import refuse_sft, sft_remarks

TASK = "_gradnorm_task"  # the underscore keeps GOLDTrainer from passing it on to model.generate
OFFSETS = "_gradnorm_cu_seqlens"  # a list of ints: what is not a tensor stays on the host


class SftHooks:
    """What :func:`attach` adds to an SFTTrainer; see there for the settings.

    Raises:
        ValueError: settings that cannot be measured, by name; the trainer is unchanged.
    """

    NEEDS = ("data_collator", "_set_signature_columns_if_needed")
    ENTRIES = (TASK, OFFSETS)
    REQUIRED = (TASK,)
    sampler = balancer = None

    def __init__(
        self,
        trainer: Any,
        task_column: str,
        row_tasks: Sequence[Hashable] | None,
        *,
        row_scale: Callable[..., Any] | None,
    ) -> None:
        refuse_sft(trainer, own_row_scale=row_scale is not None)
        if row_tasks is None:
            raise ValueError("an SFTTrainer needs a map-style training data set, whose tasks can be listed beforehand")
        self.remarks = sft_remarks(trainer)
        self.methods: dict[str, Callable[..., Any]] = {}
        self.trainer, self.task_column = trainer, task_column
        self._row_scale = sft_row_scale if row_scale is None else row_scale
        self._tasks = list(dict.fromkeys(row_tasks))

    def install(self) -> None:
        """Let the task column through to the collator, and the collator add the tasks to the batch."""
        trainer = self.trainer
        trainer._set_signature_columns_if_needed()
        self._columns_before = trainer._signature_columns
        trainer._signature_columns = [*trainer._signature_columns, self.task_column]
        self._collator_before = trainer.data_collator
        trainer.data_collator = _Collator(
            trainer.data_collator,
            self.task_column,
            {task: i for i, task in enumerate(self._tasks)},
            padding_free=bool(getattr(trainer, "padding_free", False)),
        )

    def uninstall(self) -> None:
        """Put the trainer's own columns and collator back."""
        self.trainer._signature_columns = self._columns_before
        self.trainer.data_collator = self._collator_before

    def measurable(self) -> bool:
        """Every training step is."""
        return True

    def explain_missing(self) -> str:
        """Why a micro-batch without its tasks cannot be measured."""
        return (
            f"a training micro-batch came without its tasks: column {self.task_column!r} is missing in it or holds "
            f"another task than those of the training data when attach(...) was called ({some(map(repr, self._tasks))})"
            ", or data_collator was replaced since. Set trainer.train_dataset and trainer.data_collator first, then "
            "call attach(...)"
        )

    def loss_factor(self, num_items: Any) -> float | None:
        """What the loss is multiplied by before backward; None where row_scale= is the caller's own."""
        if self._row_scale is not sft_row_scale:
            return None
        # Trainer divides a loss that did not count the step's label tokens.
        steps = self.trainer.current_gradient_accumulation_steps if num_items is None else 1
        return loss_factor(self.trainer) / steps

    def microbatch(self, inputs: dict[str, Any], entries: Mapping[str, Any], num_items: Any) -> dict[str, Any]:
        """The arguments of :meth:`GradNormTracker.microbatch`."""
        offsets: list[int] | None = entries.get(OFFSETS)
        known = {"cu_seqlens": offsets} if self._row_scale is sft_row_scale else {}
        return {
            "task_ids": [self._tasks[index] for index in entries[TASK].tolist()],
            "attention_mask": inputs.get("attention_mask"),
            "row_scale": self._row_scale(self.trainer, inputs, num_items, **known),
            "cu_seqlens": offsets,
        }

    def end_micro_batch(self) -> None:
        """Nothing is counted."""

    def end_step(self) -> None:
        """Every step has rows of its own."""

    def end_line(self) -> None:
        """There are no metrics beside the estimates."""

    def update(self, stats: StepStats) -> None:
        """Nothing acts on the estimates."""

    def metrics(self) -> dict[str, float]:
        """Nothing beside the estimates."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the attachment's own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing beside the attachment's own."""


class _Collator:
    """The trainer's collator, with the rows' tasks as numbers beside what it returns. Workers can pickle it.

    Without padding it joins all rows into one, and a row may be several packed sequences with a list of their tasks.
    """

    def __init__(
        self, inner: Callable[..., Any], column: str, tasks: dict[Hashable, int], *, padding_free: bool
    ) -> None:
        self.inner, self.column, self.tasks, self.padding_free = inner, column, tasks, padding_free

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner([{name: value for name, value in row.items() if name != self.column} for row in rows])
        if all(self.column in row for row in rows):  # evaluation data may have no such column
            names = [row[self.column] if isinstance(row[self.column], list) else [row[self.column]] for row in rows]
            known = [self.tasks.get(name, -1) for own in names for name in own]
            if -1 not in known:
                if not self.padding_free:  # TRL takes no collator of the caller's own there
                    self._check_order(rows, batch.get("input_ids"), batch.get("attention_mask"))
                batch[TASK] = torch.tensor(known)
                if self.padding_free:
                    lengths = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
                    batch[OFFSETS] = [0, *accumulate(length for own in lengths for length in own)]
        return batch

    def _check_order(self, rows: list[dict[str, Any]], input_ids: Any, attention_mask: Any) -> None:
        """That a collator of the caller's own gives one row for each row, in their order.

        Raises:
            ValueError: it does not. Tokens that it changes are not compared.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            return
        kind = type(self.inner).__name__
        if len(input_ids) != len(rows):
            raise ValueError(
                f"data_collator ({kind}) makes {len(input_ids)} rows of {len(rows)}, so which task a row belongs to is "
                "not known: attach(...) needs one that gives a row for each row"
            )
        if not isinstance(attention_mask, torch.Tensor) or not all("input_ids" in row for row in rows):
            return
        own = [list(row["input_ids"]) for row in rows]
        for at, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            tokens = ids[mask.bool()].tolist()
            if _cut_from(tokens, own[at]):
                continue
            origin = next((i for i, other in enumerate(own) if _cut_from(tokens, other)), None)
            if origin is not None:
                raise ValueError(
                    f"data_collator ({kind}) moves row {origin} to row {at}, so rows would be counted for other rows' "
                    "tasks: attach(...) needs one that keeps the order (sort in the data set or by a sampler)"
                )


def _cut_from(tokens: list[int], row: list[int]) -> bool:
    """Whether ``tokens`` are the row's, or what is left of it cut at one end."""
    return bool(tokens) and (tokens == row[: len(tokens)] or tokens == row[-len(tokens) :])
