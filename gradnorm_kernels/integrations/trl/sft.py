"""SFTTrainer: the task column rides along through the collator, and every row is a sample of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from ...tracking.layers import LayerChoice
from .attachment import Attachment
from .loss_scale import refuse_common, sft_row_scale

TASK = "gradnorm_task"


class SftAttachment(Attachment):
    """See :func:`gradnorm_kernels.integrations.trl.attach`."""

    NEEDS = (*Attachment.NEEDS, "data_collator", "_set_signature_columns_if_needed")

    def __init__(
        self,
        trainer: Any,
        task_column: str,
        layers: LayerChoice,
        every: int,
        tracker_options: Mapping[str, Any],
        row_tasks: list[Hashable],
    ) -> None:
        args = trainer.args
        refuse_common(trainer)
        for name in ("packing", "padding_free"):
            if getattr(args, name, False):
                raise ValueError(
                    f"{name}=True puts several samples into one row, so a row has no task: set {name}=False to measure"
                )
        if trainer.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func averages a row's loss in a way that is not known here: use the trainer's own loss, "
                "or GradNormTracker with a row_scale in a loop of your own"
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} takes another loss whose averaging is not known "
                "here: set it to 0"
            )
        super().__init__(trainer, task_column, layers, every, tracker_options)
        for task in row_tasks:
            self._index(task)
        trainer._set_signature_columns_if_needed()
        self._columns_before = trainer._signature_columns
        trainer._signature_columns = [*trainer._signature_columns, task_column]
        self._collator_before = trainer.data_collator
        trainer.data_collator = _Collator(trainer.data_collator, task_column, dict(self._tasks))
        if trainer.aux_loss_enabled:
            warnings.warn(
                "router_aux_loss_coef adds a load-balancing loss over all tokens: it couples the samples, and U counts "
                "it",
                stacklevel=4,
            )
        if args.per_device_train_batch_size == 1:
            warnings.warn(
                "per_device_train_batch_size=1: no two samples ever meet in a micro-batch, so U stays undefined; "
                "raise it",
                stacklevel=4,
            )

    def detach(self) -> None:
        if self._before:
            self.trainer._signature_columns = self._columns_before
            self.trainer.data_collator = self._collator_before
        super().detach()

    def _compute_loss(self, inner: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        tasks = inputs.pop(TASK, None)
        if self._stack is not None and tasks is not None and self._is_due():
            self._open(
                task_ids=[self._name(index) for index in tasks.tolist()],
                attention_mask=inputs.get("attention_mask"),
                row_scale=sft_row_scale(self.trainer, inputs, kwargs.get("num_items_in_batch")),
            )
        return inner(model, inputs, *args, **kwargs)


class _Collator:
    """The trainer's collator, with the rows' tasks as numbers beside what it returns. Workers can pickle it."""

    def __init__(self, inner: Callable[..., Any], column: str, tasks: dict[Hashable, int]) -> None:
        self.inner, self.column, self.tasks = inner, column, tasks

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner([{name: value for name, value in row.items() if name != self.column} for row in rows])
        if all(self.column in row for row in rows):  # evaluation data may have no such column
            known = [self.tasks.get(row[self.column], -1) for row in rows]
            if -1 not in known:
                batch[TASK] = torch.tensor(known)
        return batch
