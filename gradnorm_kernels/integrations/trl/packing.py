"""Packing an SFTTrainer's training data so that tasks survive: TRL's own packing keeps token ids and labels only."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from typing import Any

from .validation import row_tasks

STRATEGIES = ("bfd", "wrapped")
_TOKENS = "_gradnorm_token_task"  # one entry per token: TRL cuts and joins it as it does the token ids


def pack_train_dataset(trainer: Any, max_length: int, strategy: str = "bfd", task_column: str = "task") -> None:
    """Pack ``trainer.train_dataset`` into rows of at most ``max_length`` tokens, with the tasks beside them.

    Call it after the trainer is built without packing and before :func:`attach`::

        args = SFTConfig(padding_free=True, max_length=None, ...)
        trainer = SFTTrainer(model, args, train_dataset=data)
        pack_train_dataset(trainer, max_length=2048)
        attached = attach(trainer)

    The rows are those of ``SFTConfig(packing=True, packing_strategy=strategy, max_length=max_length)``, made by TRL's
    ``pack_dataset``, and in the same order. per_device_train_batch_size then counts packed rows.

    Args:
        trainer: an SFTTrainer with packing=False, not yet training; "bfd" needs padding_free=True, "wrapped" False.
        max_length: the most tokens of a packed row.
        strategy: "bfd": whole sequences side by side; each is a sample, and longer ones are cut at max_length. The task
            column then holds one task per sequence. "wrapped": the tokens of each task one after another, cut every
            max_length tokens; documents attend across their boundaries, so the row is the sample. Unlike TRL's, a row
            holds tokens of one task only.
        task_column: the column that names a row's task (strings or ints).

    Raises:
        ValueError: settings that do not fit, by name; the trainer is unchanged.
    """
    from datasets import concatenate_datasets
    from trl import pack_dataset

    if strategy not in STRATEGIES:
        more = ": it cuts one sequence into several, which are not independent samples" if "split" in strategy else ""
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}{more}")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length must be an int of at least 1, got {max_length!r}")
    args = trainer.args
    wanted = strategy == "bfd"
    if args.packing or bool(trainer.padding_free) != wanted:
        raise ValueError(
            f"pack_train_dataset(strategy={strategy!r}) needs a trainer with packing=False and padding_free={wanted}, "
            f"got packing={args.packing} and padding_free={bool(trainer.padding_free)}: set them in SFTConfig, with "
            "max_length=None"
        )
    if getattr(trainer, "_gradnorm", None) is not None:
        raise ValueError("pack_train_dataset must come before attach(trainer), which has the tasks already")
    data, tasks = trainer.train_dataset, row_tasks(trainer, task_column)
    columns = getattr(data, "column_names", None) or []
    if tasks is None or "input_ids" not in columns or "labels" not in columns:
        raise ValueError(
            "pack_train_dataset needs a map-style training data set with input_ids and labels, as SFTTrainer prepares "
            f"it, got {type(data).__name__} with columns {sorted(columns)}"
        )
    if len(tasks) != len(data):
        raise ValueError("pack_train_dataset: the training data is packed already, its rows have several tasks")
    names = list(dict.fromkeys(tasks))
    if wanted:
        packed = _with_tasks_of_sequences(data, tasks, names, max_length, task_column)
    else:
        rows_of: dict[Hashable, list[int]] = {name: [] for name in names}
        for row, task in enumerate(tasks):
            rows_of[task].append(row)
        parts = []
        for name, rows in rows_of.items():
            part = pack_dataset(data.select(rows).select_columns(["input_ids", "labels"]), max_length, "wrapped")
            parts.append(part.add_column(task_column, [name] * len(part)))
        packed = concatenate_datasets(parts)
    trainer.train_dataset = packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


def _with_tasks_of_sequences(
    data: Any, tasks: list[Hashable], names: list[Hashable], max_length: int, task_column: str
) -> Any:
    """``data`` packed by best fit, with the tasks of each row's sequences in ``task_column``."""
    from trl import pack_dataset

    index = {name: i for i, name in enumerate(names)}
    own = [[index[task]] * len(ids) for task, ids in zip(tasks, data["input_ids"], strict=True)]
    packed = pack_dataset(data.select_columns(["input_ids", "labels"]).add_column(_TOKENS, own), max_length, "bfd")

    def of_sequences(row: dict[str, Any]) -> dict[str, Any]:
        starts = [0, *accumulate(row["seq_lengths"])][:-1]
        return {task_column: [names[row[_TOKENS][start]] for start in starts]}

    return packed.map(of_sequences, remove_columns=[_TOKENS])
