"""Checks before anything is attached: settings that cannot be measured are refused by name, biased ones remarked on."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

from ...tracking.accumulate import StepPlan
from ...tracking.layers import Layer
from ...tracking.skipped import some
from .loss_scale import GRPO_LOSSES, LOSS_TYPES, SFT_LOSSES, own_grpo_loss, own_sft_loss

#: The first and the last minor version of TRL under which the integration tests pass. Before 1.9 the losses divide by
#: other numbers of micro-batches, so the row scales would be wrong without an error.
OLDEST_TRL, NEWEST_TRL = (1, 9), (1, 16)
#: What attach(task_sampling=...) takes -> TaskSampler's strategy; None leaves TRL's own sampler alone.
TASK_SAMPLING = {
    "off": None,
    "uniform": "uniform",
    "proportional": "proportional",
    "proportional_sq": "proportional_sq",
    "inverse": "inverse",
    "power": "power",
}
PACK_WITH_TASKS = (
    "Set packing=False, padding_free=True and max_length=None in SFTConfig, and before attach(trainer) call "
    "gradnorm_kernels.integrations.trl.pack_train_dataset(trainer, max_length=...), which packs into the same rows and "
    'keeps the tasks (for packing_strategy="wrapped": padding_free=False, and strategy="wrapped")'
)
SAME_LOSS = (
    "row_scale=, a function of (trainer, inputs{more}) that returns the [B] factors from a row's share of the loss to "
    "the row's own loss (gradnorm_kernels.integrations.trl.loss_scale.{scale} if the average is still {base}'s)"
)


def check_version(version: str) -> None:
    """Refuse a version of TRL whose losses were not read and compared.

    Raises:
        ValueError: names the version, what is allowed and what to install.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST_TRL <= tuple(map(int, numbers.groups())) <= NEWEST_TRL:
        oldest, newest = (".".join(map(str, minor)) for minor in (OLDEST_TRL, NEWEST_TRL))
        raise ValueError(
            f"TRL {version} is installed; attach(...) knows how the losses of TRL {oldest} to {newest} average over "
            f"rows and tokens, and with another version U could be off by a factor: install 'trl>={oldest},<"
            f"{NEWEST_TRL[0]}.{NEWEST_TRL[1] + 1}'"
        )


def check_trainer(trainer: Any, needs: Sequence[str]) -> None:
    """Refuse a trainer that lacks a method or attribute which attach(...) uses, or that is already attached to.

    Raises:
        ValueError: names what is missing.
    """
    missing = [name for name in needs if not hasattr(trainer, name)]
    if missing:
        raise ValueError(
            f"{type(trainer).__name__} of the installed TRL lacks {', '.join(missing)}, which attach(...) uses: attach "
            f"is tested with TRL {'.'.join(map(str, OLDEST_TRL))} to {'.'.join(map(str, NEWEST_TRL))}"
        )
    if getattr(trainer, "_gradnorm", None) is not None:
        raise ValueError("attach(...) was already called on this trainer: call .detach() on what it returned first")


def check_count(name: str, value: Any, low: int, meaning: str) -> None:
    """Refuse anything but an int of at least ``low``.

    Raises:
        ValueError: says what the value means.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}: {meaning}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but a bool: a text such as "no" counts as true.

    Raises:
        ValueError: names the argument.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def sampling_strategy(task_sampling: str) -> str | None:
    """TaskSampler's strategy for ``task_sampling``; None for "off".

    "uniform" used to mean "off", and "equal" what "uniform" means now. "equal" keeps its meaning. "uniform" has the
    new one, and both warn, so that no run changes silently.

    Raises:
        ValueError: an unknown word.
    """
    if task_sampling == "equal":
        warnings.warn(
            "task_sampling='equal' is now called 'uniform': every task is drawn with the same probability, as before",
            FutureWarning,
            stacklevel=3,
        )
        return "uniform"
    if task_sampling == "uniform":
        warnings.warn(
            "task_sampling='uniform' draws every task with the same probability. It used to leave TRL's own sampler "
            "alone: for that, leave task_sampling out or pass 'off'",
            FutureWarning,
            stacklevel=3,
        )
    if task_sampling not in TASK_SAMPLING:
        raise ValueError(f"task_sampling must be one of {', '.join(map(repr, TASK_SAMPLING))}, got {task_sampling!r}")
    return TASK_SAMPLING[task_sampling]


def row_tasks(trainer: Any, task_column: str) -> list[Hashable] | None:
    """The task of every row of the training data; None for a stream, whose rows cannot be listed.

    Packed rows have a list of tasks, one per sequence; then the tasks of all sequences are returned.

    Raises:
        ValueError: there is no such column, or a row in it holds neither a string nor an int.
    """
    from datasets import IterableDataset

    data = trainer.train_dataset
    columns = getattr(data, "column_names", None)
    if columns is not None and task_column not in columns:
        raise ValueError(_missing_column(trainer, task_column, sorted(columns)))
    if data is None or isinstance(data, IterableDataset):
        return None
    tasks = list(data[task_column])
    if hasattr(trainer, "padding_free") and any(isinstance(task, list) for task in tasks):
        tasks = _sequence_tasks(trainer, task_column, tasks, columns or ())
    wrong = next((task for task in tasks if isinstance(task, bool) or not isinstance(task, (str, int))), None)
    if wrong is not None or None in tasks:
        raise ValueError(f"column {task_column!r} must hold a string or an int in every row, got {wrong!r}")
    return tasks


def _sequence_tasks(trainer: Any, task_column: str, tasks: list[Any], columns: Sequence[str]) -> list[Any]:
    """The tasks of all sequences of packed rows."""
    if not getattr(trainer, "padding_free", False) or "seq_lengths" not in columns:
        raise ValueError(
            f"column {task_column!r} holds lists, one task per packed sequence: that needs padding_free=True and a "
            "column seq_lengths; pack_train_dataset(trainer, max_length=...) makes both"
        )
    for row, (own, lengths) in enumerate(zip(tasks, trainer.train_dataset["seq_lengths"], strict=True)):
        if not isinstance(own, list) or len(own) != len(lengths):
            raise ValueError(
                f"column {task_column!r} must hold one task per packed sequence: row {row} has {own!r} for the "
                f"{len(lengths)} sequences of seq_lengths"
            )
    return [task for own in tasks for task in own]


def _missing_column(trainer: Any, task_column: str, columns: Sequence[str]) -> str:
    found = f"task_column={task_column!r} is not a column of the training data, which has {list(columns)}"
    if getattr(trainer, "environment_factories", None) is not None and list(columns) == ["prompt"]:
        return (
            f"{found}. The environment owns the data of this trainer and its rows are placeholders, so no row names a "
            "task: pass train_dataset= with a task column (its columns are passed on to the environment's reset)"
        )
    if getattr(trainer.args, "packing", False):
        return f"{found}: an SFTTrainer that packs drops all others. {PACK_WITH_TASKS}"
    return f"{found}: name the one that says which task a row belongs to"


def refuse_common(trainer: Any, own_group: bool) -> None:
    """Refuse what the tracker cannot follow under any trainer. ``own_group``: the caller names the process group.

    Raises:
        ValueError: names the setting.
    """
    args, accelerator = trainer.args, trainer.accelerator
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
        raise ValueError(
            "parallelism_config splits a sequence's tokens over devices (cp_size or sp_size above 1), so no device "
            "sees a sample's whole gradient: attach(...) cannot measure that; set both to 1"
        )
    if trainer.get_tp_size() > 1 and not own_group:
        raise ValueError(
            f"the ranks of a tensor-parallel group (of {trainer.get_tp_size()}) train on the same rows, which would be "
            "counted as different samples: pass process_group=, the group of data-parallel ranks (None if there is one)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"this process sees {args.n_gpu} GPUs, and Trainer would split every batch over copies of the model "
            "(nn.DataParallel), which have no hooks: start one process per GPU (accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    if getattr(args, "torch_compile", False):
        raise ValueError(
            "torch_compile=True compiles the model around the tracker's hooks, which is not supported under a Trainer: "
            "set torch_compile=False, or compile single layers that are not in layers="
        )
    if str(accelerator.distributed_type).endswith("DEEPSPEED") and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "DeepSpeed does not reveal its fp16 loss scale, so gradients could not be measured in their own unit: use "
            "bf16"
        )


def refuse_zero3(trainer: Any, layers: Sequence[Layer], fused: bool) -> None:
    """Refuse what cannot be measured where DeepSpeed's ZeRO-3 takes a layer's weights away after its forward.

    Raises:
        ValueError: names the argument, and the layers that are not linear.
    """
    plugin = getattr(trainer.accelerator, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return
    if fused:
        raise ValueError("fused=True needs a layer's weight in backward, which ZeRO-3 has taken away: use fused=False")
    others = [layer.name for layer in layers if layer.kind != "linear"]
    if others:
        raise ValueError(
            f"under DeepSpeed's ZeRO-3 only nn.Linear layers can be measured; layers= also picks {some(others)}, whose "
            "weights are not there when their gradients arrive: choose other layers (the default picks the "
            "projections of the last attention), or use ZeRO-2 or FSDP2"
        )


def refuse_grpo(
    trainer: Any, task_column: str, *, own_row_scale: bool, keep_groups_together: bool, accumulate: str | None
) -> None:
    """Refuse GRPO settings that cannot be measured.

    Raises:
        ValueError: names the setting or the class, and what to do.
    """
    args, kind = trainer.args, type(trainer).__name__
    own = own_grpo_loss(trainer)
    advice = SAME_LOSS.format(more="", scale="grpo_row_scale", base="GRPOTrainer")
    if not own_row_scale and own is None and trainer.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type={trainer.loss_type!r} is not one whose average is known here ({', '.join(LOSS_TYPES)}): pass "
            f"{advice}"
        )
    if not own_row_scale and own is not None and own not in GRPO_LOSSES:
        raise ValueError(
            f"{kind} computes a loss of its own (in {own}), and how it averages over rows and tokens is not known: "
            f"pass {advice}"
        )
    if not own_row_scale and getattr(trainer, "use_liger_kernel", False) and hasattr(trainer, "compute_liger_loss"):
        raise ValueError(
            "use_liger_kernel=True computes Liger's GRPO loss in this version of TRL, and how it averages over rows "
            f"and tokens is not known: set it to False, or pass {advice}"
        )
    if args.remove_unused_columns:
        raise ValueError(
            f"remove_unused_columns=True drops the column {task_column!r} before training sees it: set it to False in "
            "GRPOConfig (its default)"
        )
    if keep_groups_together and args.per_device_train_batch_size % trainer.num_generations:
        raise ValueError(
            f"keep_groups_together=True needs per_device_train_batch_size to be a multiple of "
            f"num_generations={trainer.num_generations}, got {args.per_device_train_batch_size}: otherwise a "
            "micro-batch cannot hold whole groups"
        )
    if accumulate == "exact" and not keep_groups_together:
        raise ValueError(
            "accumulate='exact' needs keep_groups_together=True: it adds up whole prompts, and TRL's shuffle spreads a "
            "prompt over micro-batches"
        )
    shuffles = getattr(inspect.unwrap(type(trainer)._prepare_inputs), "__globals__", {})
    if keep_groups_together and "shuffle_sequence_dict" not in shuffles:
        raise ValueError(
            f"keep_groups_together=True replaces the shuffle inside _prepare_inputs, but _prepare_inputs of {kind} "
            "does not use TRL's shuffle: leave it False"
        )


def refuse_sft(trainer: Any, *, own_row_scale: bool) -> None:
    """Refuse SFT settings that cannot be measured.

    Raises:
        ValueError: names the setting or the class, and what to do.
    """
    args, kind = trainer.args, type(trainer).__name__
    if getattr(args, "packing", False):
        raise ValueError(f"packing=True drops the tasks of the sequences that it packs. {PACK_WITH_TASKS}")
    if getattr(args, "padding_free", False) and own_sft_loss(trainer) is not None:
        raise ValueError(
            f"padding_free=True puts several samples into one row, and how {kind} does that is not known: set "
            "padding_free=False to measure"
        )
    if getattr(trainer, "_vlm_collator", None) is not None:
        raise ValueError(f"{kind} collates images after its batches were drawn, and the rows' tasks would be lost")
    if getattr(trainer, "num_generations", 1) > 1:
        raise ValueError(
            f"num_generations={trainer.num_generations} makes several rows from one prompt, which are not independent "
            "samples: set it to 1 to measure"
        )
    if own_row_scale:
        return
    own = own_sft_loss(trainer)
    advice = SAME_LOSS.format(more=", num_items_in_batch", scale="sft_row_scale", base="SFTTrainer")
    if own is not None and (own not in SFT_LOSSES or getattr(trainer, "use_uld_loss", False)):
        what = "use_uld_loss=True is" if own in SFT_LOSSES else f"{kind} computes"
        raise ValueError(f"{what} a loss of its own (in {own}), and how it averages rows is not known: pass {advice}")
    if trainer.compute_loss_func is not None:
        raise ValueError(f"how compute_loss_func averages over rows and tokens is not known: pass {advice}")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} selects another loss whose average is not known "
            f"here: set it to 0, or pass {advice}"
        )


def grpo_remarks(trainer: Any, keep_groups_together: bool, correction: bool) -> list[str]:
    """What biases the measurement under these settings, one sentence each, by the setting's name."""
    args, remarks = trainer.args, []
    if trainer.scale_rewards == "batch":
        remarks.append(
            "scale_rewards='batch' divides every advantage by a standard deviation over all prompts: prompts are no "
            "longer independent, which biases U; 'group' and 'none' keep them independent"
        )
    if trainer.multi_objective_aggregation == "normalize_then_sum":
        remarks.append(
            "multi_objective_aggregation='normalize_then_sum' normalises rewards over all prompts of the batch: "
            "prompts are no longer independent"
        )
    if getattr(trainer, "_entropy_bonus_enabled", False):  # older versions have no entropy bonus
        remarks.append(
            "entropy_coef or use_adaptive_entropy adds an entropy term averaged over the micro-batch's tokens: it "
            "couples the prompts and enters U with another weight than the policy loss"
        )
    if getattr(trainer, "aux_loss_enabled", False):  # older versions never add it
        remarks.append(
            "router_aux_loss_coef adds a load-balancing loss over all tokens: it couples the prompts, and U counts it"
        )
    if trainer.top_entropy_quantile < 1.0:
        remarks.append("top_entropy_quantile masks tokens by a quantile over all prompts: it couples them slightly")
    if own_grpo_loss(trainer) is None and trainer.loss_type == "cispo" and trainer.epsilon_high < 1.0:
        remarks.append(
            f"loss_type='cispo' with epsilon_high={trainer.epsilon_high} clamps every ratio to it, also on-policy "
            f"ones: gradients are {trainer.epsilon_high:.3g} times, and U {trainer.epsilon_high**2:.3g} times, those "
            "of the other losses"
        )
    cycle, steps = args.steps_per_generation * trainer.num_iterations, args.gradient_accumulation_steps
    if cycle > steps:
        remarks.append(
            f"num_iterations={trainer.num_iterations} and steps_per_generation={args.steps_per_generation} make "
            f"{-(-cycle // steps)} optimizer steps from one generation: only the first is measured, because later "
            "weights have seen these prompts"
        )
    if correction and trainer.beta != 0.0:
        remarks.append(
            f"beta={trainer.beta} with a correction: the weights scale advantages and not the KL term, and U counts "
            "the KL term's gradient divided by the task's weight"
        )
    for setting, term, on in (
        ("entropy_coef or use_adaptive_entropy", "entropy", "_entropy_bonus_enabled"),
        ("router_aux_loss_coef", "load-balancing", "aux_loss_enabled"),
    ):
        if correction and getattr(trainer, on, False):
            remarks.append(
                f"{setting} with a correction: the weights scale advantages and not the {term} term, and U counts that "
                "term's gradient divided by the task's weight, so it depends on the weights"
            )
    return remarks


def sft_remarks(trainer: Any) -> list[str]:
    """What biases the measurement under these settings, one sentence each, by the setting's name."""
    remarks = []
    if trainer.aux_loss_enabled:
        remarks.append(
            "router_aux_loss_coef adds a load-balancing loss over all tokens: it couples the samples, and U counts it"
        )
    return remarks


def grpo_plan(trainer: Any, keep_groups_together: bool, tasks: int) -> StepPlan:
    """What an optimizer step of a GRPOTrainer holds. A sample is a prompt with its ``num_generations`` rows."""
    args, group = trainer.args, trainer.num_generations
    rows, ranks = args.per_device_train_batch_size, trainer.accelerator.num_processes
    generated = rows * args.steps_per_generation  # on this rank
    # A step may be longer than a generation with its iterations, and then holds the prompts of several.
    generations = -(-args.gradient_accumulation_steps // (args.steps_per_generation * trainer.num_iterations))
    whole = rows % group == 0 and (keep_groups_together or args.steps_per_generation == 1)
    return StepPlan(
        samples=min(rows * args.gradient_accumulation_steps * ranks, generations * max(1, generated * ranks // group)),
        together=rows // group if whole else min(rows, -(-generated // group)),
        whole=whole,
        tasks=max(tasks, 1),
    )


def sft_plan(trainer: Any, tasks: int) -> StepPlan:
    """What an optimizer step of an SFTTrainer holds. A sample is a row, or a sequence of a packed row."""
    args, data = trainer.args, trainer.train_dataset
    rows = args.per_device_train_batch_size
    if getattr(trainer, "padding_free", False) and "seq_lengths" in (getattr(data, "column_names", None) or ()):
        rows *= max(map(len, data["seq_lengths"]), default=1)
    return StepPlan(
        samples=rows * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        together=rows,
        whole=True,
        tasks=max(tasks, 1),
    )


def undefined_remark(trainer: Any, plan: StepPlan, accumulate: str) -> str | None:
    """Why U cannot be defined in any step, with the arithmetic and what would mend it; None where it can."""
    args, group = trainer.args, getattr(trainer, "num_generations", 1)
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    ranks, kind = trainer.accelerator.num_processes, "prompt" if group > 1 else "sample"
    if plan.samples < 2:
        wanted = 2 * plan.tasks * group  # rows of a step with two samples of every task
        counted = (
            f"per_device_train_batch_size={rows} x gradient_accumulation_steps={steps} x {ranks} "
            f"process{'es' if ranks > 1 else ''} = {rows * steps * ranks} rows"
        )
        counted += f", num_generations={group} rows per prompt" if group > 1 else ""
        return (
            f"U stays undefined: an optimizer step holds one {kind} ({counted}), and a task's U needs two of its own. "
            f"For two {kind}s per task on average ({plan.tasks} task{'s' * (plan.tasks > 1)}) set "
            f"gradient_accumulation_steps={-(-wanted // (rows * ranks))} or "
            f"per_device_train_batch_size={-(-wanted // (steps * ranks))}"
        )
    if accumulate == "pairs" and plan.together < 2:
        return (
            f"U stays undefined under accumulate='pairs': no micro-batch of per_device_train_batch_size={rows} rows "
            f"holds two {kind}s; raise it to {2 * group}, or leave accumulate at 'auto', which pairs the {kind}s of "
            f"a whole step (up to {plan.samples})"
        )
    return None
