"""What TRL's losses do to a row, what undoes it for the measurement, and which settings couple the prompts.

Read from TRL 1.16. A row's own loss is the mean of the losses of its completion tokens; ``row_scale`` is the factor
from the row's share of the differentiated loss to that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: loss_type -> how TRL averages it: over rows, over the micro-batch's tokens, over B x the longest completion, over the
#: generation batch's tokens, or as sums of rows.
AVERAGES = {
    "grpo": "rows",
    "sapo": "rows",
    "bnpo": "tokens",
    "dr_grpo": "constant",
    "dapo": "items",
    "vespo": "items",
    "cispo": "items",
    "luspo": "sums",
}


def loss_factor(trainer: Any) -> float:
    """What accelerate multiplies a loss by before backward: the loss scale, over its own accumulation steps."""
    accelerator = trainer.accelerator
    deepspeed = str(accelerator.distributed_type).endswith("DEEPSPEED")
    factor = 1.0 if deepspeed else 1.0 / accelerator.gradient_accumulation_steps
    return factor if accelerator.scaler is None else factor * float(accelerator.scaler.get_scale())


def grpo_row_scale(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """[B] float64: from row i's share of GRPOTrainer's loss to its own mean-token loss.

    With B rows and M loss tokens in the micro-batch, L_i in row i, GA micro-batches in this step, SPG in a generation::

        grpo, sapo          B GA
        bnpo                M GA / L_i
        dr_grpo             B max_completion_length GA / L_i
        dapo, vespo, cispo  (num_items_in_batch / processes) (GA / SPG) / L_i
        luspo               B GA / L_i

    divided by the loss scale of mixed precision.
    """
    mask = inputs["completion_mask"]
    if inputs.get("tool_mask") is not None:
        mask = mask * inputs["tool_mask"]
    lengths = mask.sum(1).clamp(min=1).double().cpu()
    rows, steps = mask.shape[0], trainer.current_gradient_accumulation_steps
    average = AVERAGES[trainer.loss_type]
    if average == "rows":
        scale = lengths.new_full((rows,), rows * steps)
    elif average == "tokens":
        scale = max(float(mask.sum()), 1.0) * steps / lengths
    elif average == "constant":
        scale = rows * trainer.max_completion_length * steps / lengths
    elif average == "items":
        items = max(float(inputs["num_items_in_batch"]), 1.0) / trainer.accelerator.num_processes
        scale = items * steps / trainer.args.steps_per_generation / lengths
    else:
        scale = rows * steps / lengths
    return scale / loss_factor(trainer)


def sft_row_scale(trainer: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
    """[B] float64: from row i's share of SFTTrainer's loss, a mean over tokens, to its own mean-token loss.

    ``N / (processes L_i)`` with N the label tokens of the step over all processes where Trainer counts them, else
    ``M GA / L_i``. L_i counts labels after the shift.
    """
    counted = (inputs["labels"][:, 1:] != -100).sum(1)
    lengths = counted.clamp(min=1).double().cpu()
    if num_items_in_batch is None:
        total = max(float(counted.sum()), 1.0) * trainer.current_gradient_accumulation_steps
    else:
        total = max(float(num_items_in_batch), 1.0)
        if trainer.args.average_tokens_across_devices:
            total /= trainer.accelerator.num_processes
    return total / lengths / loss_factor(trainer)


def refuse_common(trainer: Any) -> None:
    """Raise ValueError for what the tracker cannot follow under any trainer."""
    args, accelerator = trainer.args, trainer.accelerator
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
        raise ValueError(
            "parallelism_config splits a sequence's tokens over devices (cp_size or sp_size above 1), and no device "
            "then sees a sample's whole gradient: attach(...) cannot measure that; set both to 1"
        )
    if getattr(args, "torch_compile", False):
        raise ValueError(
            "torch_compile=True compiles the model around the tracker's hooks, which is not supported under a Trainer: "
            "set torch_compile=False, or compile single layers that are not in layers="
        )
    if str(accelerator.distributed_type).endswith("DEEPSPEED") and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "DeepSpeed keeps the loss scale of fp16 to itself, so gradients could not be measured in their own unit: "
            "use bf16"
        )


def refuse_grpo(trainer: Any) -> None:
    """Raise ValueError for GRPO settings whose row scale is not known."""
    if trainer.loss_type not in AVERAGES:
        raise ValueError(
            f"loss_type={trainer.loss_type!r} is not one whose averaging is known here ({', '.join(AVERAGES)}): pass "
            "row_scale=, a function of (trainer, inputs) that gives the [B] factors from a row's share of the loss to "
            "its own loss"
        )


def grpo_remarks(trainer: Any, own_loss: bool, keep_groups_together: bool) -> list[str]:
    """What bends the measurement under these settings, one sentence each, by the setting's name."""
    args, remarks = trainer.args, []
    if trainer.scale_rewards == "batch":
        remarks.append(
            "scale_rewards='batch' divides every advantage by a standard deviation over all prompts: prompts are no "
            "longer independent, and U is biased by as much; 'group' and 'none' keep them apart"
        )
    if trainer.multi_objective_aggregation == "normalize_then_sum":
        remarks.append(
            "multi_objective_aggregation='normalize_then_sum' normalises rewards over all prompts of the batch: "
            "prompts are no longer independent"
        )
    if trainer._entropy_bonus_enabled:
        remarks.append(
            "entropy_coef or use_adaptive_entropy adds an entropy term averaged over the micro-batch's tokens: it "
            "couples the prompts and enters U with another weight than the policy loss"
        )
    if trainer.aux_loss_enabled:
        remarks.append(
            "router_aux_loss_coef adds a load-balancing loss over all tokens: it couples the prompts, and U counts it"
        )
    if trainer.top_entropy_quantile < 1.0:
        remarks.append("top_entropy_quantile masks tokens by a quantile over all prompts: it couples them slightly")
    if trainer.loss_type == "cispo" and trainer.epsilon_high < 1.0:
        remarks.append(
            f"loss_type='cispo' with epsilon_high={trainer.epsilon_high} clamps every ratio to it, on-policy ones "
            f"included: gradients are {trainer.epsilon_high:.3g} times, and U {trainer.epsilon_high**2:.3g} times, "
            "those of the other losses"
        )
    cycle, steps = args.steps_per_generation * trainer.num_iterations, args.gradient_accumulation_steps
    if cycle > steps:
        remarks.append(
            f"num_iterations={trainer.num_iterations} and steps_per_generation={args.steps_per_generation} make "
            f"{-(-cycle // steps)} optimizer steps from one generation: only the first is measured, because later "
            "weights have seen these prompts"
        )
    if own_loss:
        remarks.append(
            f"{type(trainer).__name__} computes a loss of its own; its rows are taken to be averaged as GRPOTrainer's "
            f"loss_type={trainer.loss_type!r} does: if they are not, pass row_scale="
        )
    if keep_groups_together and args.per_device_train_batch_size == trainer.num_generations:
        remarks.append(
            "per_device_train_batch_size equals num_generations and groups are kept together: no two prompts ever "
            "meet in a micro-batch, so U stays undefined; raise it"
        )
    return remarks
