"""``attach(trainer)``: measure every task's gradient inside TRL's own training, and act on it where asked to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ...control.balancer import TaskBalancer
from ...control.sampler import TaskSampler
from ...tracking.layers import LayerChoice
from .attachment import Attachment
from .grpo import GrpoAttachment
from .sft import SftAttachment

#: task_sampling -> TaskSampler's strategy; "uniform" leaves TRL's own sampler alone.
SAMPLINGS = {
    "uniform": None,
    "equal": "uniform",
    "proportional": "proportional",
    "proportional_sq": "proportional_sq",
    "inverse": "inverse",
    "power": "power",
}


def attach(
    trainer: Any,
    task_column: str = "task",
    layers: LayerChoice = "last_attention",
    fused: bool = False,
    every: int = 1,
    task_sampling: str = "uniform",
    *,
    exponent: float | None = None,
    floor: float = 0.1,
    decay: float | None = 0.9,
    seed: int | None = None,
    correction: str | TaskBalancer | None = None,
    keep_groups_together: bool = False,
    row_scale: Callable[..., Any] | None = None,
    gain_window: int = 4,
    **tracker_options: Any,
) -> Attachment:
    """Measure ``U_k``, every task's squared gradient norm, at each optimizer step of a TRL trainer.

    Call it before ``trainer.train()``, on a GRPOTrainer, a subclass of it, or an SFTTrainer. In GRPO a sample is a
    prompt with all its completions, in SFT a row. A sample's loss is the mean over its rows of the mean over a row's
    tokens, whatever the trainer's loss_type makes of it. With ``fused=False``, ``task_sampling="uniform"`` and neither
    correction nor keep_groups_together the run is the trainer's own to the last bit on one device.

    The trainer's logs get, for each task: ``tasks/<task>/grad_norm_sq`` (U), ``.../grad_norm_sq_se``,
    ``.../noise_scale``, ``.../n`` (samples), and ``tasks/cosine/<a>/<b>``; in GRPO also ``.../reward``,
    ``.../learning_gain``, ``.../abs_advantage``, ``.../response_length``, ``.../sampling_prob`` and ``.../weight``.
    With logging_steps above 1 they are pooled over the steps since the last line.

    Args:
        trainer: the trainer, built and not yet training.
        task_column: the column of the training data that names a row's task (strings or ints).
        layers, fused: as in :class:`GradNormTracker`. The output head is left out by name: TRL's fused head does not
            call its module.
        every: measure one in so many of the optimizer steps that can be measured. In GRPO these are the first on each
            generation.
        task_sampling: GRPO only. "uniform": TRL's own sampler, every row alike. Else tasks are drawn by their running
            U: "proportional" (to the norm), "proportional_sq", "inverse", "power" (``exponent``), or "equal": every
            task alike. Rows of a task come in shuffled passes. The draw happens when the generation begins, so it
            knows every step before it, and it is the same on every process.
        exponent, floor, decay: of :class:`TaskSampler`; decay also of the correction's running averages.
        seed: of the draws; default: ``trainer.args.seed``.
        correction: GRPO only. A strategy of :class:`TaskBalancer` ("equal_pull", "mgda", "pcgrad" ...) or a balancer:
            its weights multiply the tasks' advantages; U stays that of the unweighted loss.
        keep_groups_together: GRPO only. Shuffle a generation by whole prompts, so that a prompt's completions meet in
            one micro-batch and every pair counts in full. The order of rows then differs from TRL's.
        row_scale: GRPO only, for a trainer with a loss of its own: ``row_scale(trainer, inputs)`` gives the [B] factors
            from a row's share of the differentiated loss to its own loss.
        gain_window: generations on each side of ``learning_gain``.
        tracker_options: any other argument of :class:`GradNormTracker`.

    Returns:
        the attachment: ``.tracker``, ``.sampler``, ``.balancer``, ``.last`` (the latest StepStats), ``.detach()``.
        Averages, draws and weights are saved in the trainer's checkpoints and restored by resume_from_checkpoint.

    Raises:
        TypeError: not a trainer this works on.
        ValueError: settings that cannot be measured or do not fit together, by name.
    """
    from trl import GRPOTrainer, SFTTrainer

    if not isinstance(trainer, (GRPOTrainer, SFTTrainer)):
        raise TypeError(
            f"trainer must be a GRPOTrainer (or a subclass) or an SFTTrainer, got {type(trainer).__name__}: for a loop "
            "of your own use GradNormTracker"
        )
    kind: type[GrpoAttachment] | type[SftAttachment] = (
        GrpoAttachment if isinstance(trainer, GRPOTrainer) else SftAttachment
    )
    missing = [name for name in kind.NEEDS if not hasattr(trainer, name)]
    missing = [name for name in missing if name != "current_gradient_accumulation_steps"]  # made by train()
    if missing:
        raise ValueError(
            f"{type(trainer).__name__} of the installed TRL lacks {', '.join(missing)}, which attach(...) hooks into: "
            "it was written for TRL 1.16"
        )
    if getattr(trainer, "_gradnorm", None) is not None:
        raise ValueError("attach(...) was already called on this trainer: call .detach() on what it returned first")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an int of at least 1, got {every!r}: 1 measures each step that can be")
    if task_sampling not in SAMPLINGS:
        raise ValueError(f"task_sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {task_sampling!r}")
    seed = trainer.args.seed if seed is None else seed
    tracker_options["fused"] = fused
    rows = _row_tasks(trainer, task_column)
    attachment: Attachment
    if kind is SftAttachment:
        if task_sampling != "uniform" or correction is not None or keep_groups_together or row_scale is not None:
            raise ValueError(
                "task_sampling, correction, keep_groups_together and row_scale act on GRPO's generations; with an "
                "SFTTrainer attach(...) measures only"
            )
        if rows is None:
            raise ValueError("an SFTTrainer needs a map-style training data set, whose tasks can be listed beforehand")
        attachment = SftAttachment(trainer, task_column, layers, every, tracker_options, rows)
    else:
        tasks = list(dict.fromkeys(rows or []))
        strategy = SAMPLINGS[task_sampling]
        if rows is None and (strategy is not None or correction is not None):
            raise ValueError(
                "task_sampling and correction need a map-style training data set, whose tasks and rows can be listed; "
                "this one is a stream"
            )
        if strategy is None and exponent is not None:
            raise ValueError(f"exponent goes with task_sampling='power', got task_sampling={task_sampling!r}")
        sampler = (
            None
            if strategy is None
            else TaskSampler(tasks, strategy, exponent=exponent, floor=floor, decay=decay, seed=seed)
        )
        if isinstance(correction, str):
            correction = TaskBalancer(tasks, correction, decay=decay, seed=seed)
        if correction is not None and set(correction.tasks) != set(tasks):
            raise ValueError(
                f"the balancer in correction= knows the tasks {list(correction.tasks)!r}, the data has {tasks!r}"
            )
        attachment = GrpoAttachment(
            trainer,
            task_column,
            layers,
            every,
            tracker_options,
            sampler=sampler,
            row_tasks=rows,
            balancer=correction,
            keep_groups_together=keep_groups_together,
            row_scale=row_scale,
            gain_window=gain_window,
            seed=seed,
        )
    trainer._gradnorm = attachment
    return attachment


def _row_tasks(trainer: Any, task_column: str) -> list[Hashable] | None:
    """The task of every row of the training data; None for a stream."""
    from datasets import IterableDataset

    data = trainer.train_dataset
    columns = getattr(data, "column_names", None)
    if columns is not None and task_column not in columns:
        raise ValueError(
            f"task_column={task_column!r} is not a column of the training data, which has {sorted(columns)}: name the "
            "one that says which task a row belongs to (an SFTTrainer that packs drops all others)"
        )
    if data is None or isinstance(data, IterableDataset):
        return None
    tasks = list(data[task_column])
    wrong = next((task for task in tasks if isinstance(task, bool) or not isinstance(task, (str, int))), None)
    if wrong is not None or None in tasks:
        raise ValueError(f"column {task_column!r} must hold a string or an int in every row, got {wrong!r}")
    return tasks
