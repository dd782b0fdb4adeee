"""What TRL's losses do to a row, and the row scale that undoes it for the measurement.

Written against TRL 1.16. A row's own loss is the mean of the losses of its completion tokens. ``row_scale`` is the
factor from the row's share of the differentiated loss to the row's own loss.

To add a loss type of GRPOTrainer, add a line to ``LOSS_TYPES``; for an average that is not there yet, also to
``AVERAGES``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class GrpoMicroBatch:
    """The numbers that GRPOTrainer's averages divide by, for one micro-batch on one process.

    Attributes:
        lengths: [B] float64, L_i: the loss tokens of row i, at least 1.
        tokens: M, the loss tokens of the micro-batch, at least 1.
        steps: GA, the micro-batches of this optimizer step.
    """

    def __init__(self, trainer: Any, inputs: dict[str, Any]) -> None:
        mask = inputs["completion_mask"]
        if inputs.get("tool_mask") is not None:
            mask = mask * inputs["tool_mask"]
        lengths = mask.sum(1).double().cpu()
        self._trainer, self._inputs = trainer, inputs
        self.lengths, self.tokens = lengths.clamp(min=1), max(float(lengths.sum()), 1.0)
        self.steps: int = trainer.current_gradient_accumulation_steps

    @property
    def max_length(self) -> int:
        """L_max: ``max_completion_length``."""
        return int(self._trainer.max_completion_length)

    @property
    def items(self) -> float:
        """N / W: the loss tokens of the generation over the number of processes."""
        return max(float(self._inputs["num_items_in_batch"]), 1.0) / int(self._trainer.accelerator.num_processes)

    @property
    def steps_per_generation(self) -> int:
        """SPG: ``steps_per_generation``."""
        return int(self._trainer.args.steps_per_generation)


@dataclass(frozen=True)
class Average:
    """How a loss averages over rows and tokens: ``formula`` is the row scale as the documentation prints it."""

    formula: str
    row_scale: Callable[[GrpoMicroBatch], Tensor]  # -> [B] float64


#: The ways in which GRPOTrainer averages its token losses.
AVERAGES = {
    "rows": Average("B GA", lambda b: b.lengths.new_full(b.lengths.shape, len(b.lengths) * b.steps)),
    "tokens": Average("M GA / L_i", lambda b: b.tokens * b.steps / b.lengths),
    "constant": Average("B L_max GA / L_i", lambda b: len(b.lengths) * b.max_length * b.steps / b.lengths),
    "items": Average("(N / W) (GA / SPG) / L_i", lambda b: b.items * b.steps / b.steps_per_generation / b.lengths),
    "sums": Average("B GA / L_i", lambda b: len(b.lengths) * b.steps / b.lengths),
}
#: GRPOConfig.loss_type -> its average.
LOSS_TYPES = {
    "grpo": "rows",
    "sapo": "rows",
    "bnpo": "tokens",
    "dr_grpo": "constant",
    "dapo": "items",
    "vespo": "items",
    "cispo": "items",
    "luspo": "sums",
}
#: TRL's own subclasses of GRPOTrainer with another loss -> its average, whatever their loss_type says.
GRPO_LOSSES = {"trl.experimental.gmpo.gmpo_trainer.GMPOTrainer": "rows"}
#: TRL's own subclasses of SFTTrainer with another loss: also a sum of token losses over N, but never over N / W.
SFT_LOSSES = ("trl.experimental.gkd.gkd_trainer.GKDTrainer", "trl.experimental.gold.gold_trainer.GOLDTrainer")


def own_loss(trainer: Any, base: type, methods: tuple[str, ...]) -> str | None:
    """The qualified name of what replaces one of TRL's loss ``methods``: a class below ``base``, or a function that was
    put into ``base`` itself; None: nothing does.
    """
    for kind in type(trainer).__mro__:
        if kind is base:
            break
        if any(name in vars(kind) for name in methods):
            return f"{kind.__module__}.{kind.__qualname__}"
    for name in methods:
        # A package that replaces TRL's class or method leaves no subclass to see.
        method = getattr(base, name, None)
        if method is not None and not _of_trl(method):
            return f"{getattr(method, '__module__', None)}.{getattr(method, '__qualname__', name)}"
    return None


def _of_trl(function: Any) -> bool:
    """Whether a function, and every one that it wraps, is defined in TRL's own files."""
    import trl

    folder = os.path.join(os.path.dirname(os.path.realpath(trl.__file__)), "")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not os.path.realpath(code.co_filename).startswith(folder):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def own_grpo_loss(trainer: Any) -> str | None:
    """The qualified name of the class that replaces GRPOTrainer's loss; None where the loss is GRPOTrainer's."""
    from trl import GRPOTrainer

    return own_loss(trainer, GRPOTrainer, ("_compute_loss", "compute_loss"))


def own_sft_loss(trainer: Any) -> str | None:
    """The qualified name of the class that replaces SFTTrainer's loss; None where the loss is SFTTrainer's."""
    from trl import SFTTrainer

    return own_loss(trainer, SFTTrainer, ("compute_loss",))


def loss_factor(trainer: Any) -> float:
    """The factor that accelerate multiplies a loss by before backward: the loss scale, over its accumulation steps."""
    accelerator = trainer.accelerator
    deepspeed = str(accelerator.distributed_type).endswith("DEEPSPEED")
    factor = 1.0 if deepspeed else 1.0 / accelerator.gradient_accumulation_steps
    return factor if accelerator.scaler is None else factor * float(accelerator.scaler.get_scale())


def grpo_row_scale(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """[B] float64: the factor from row i's share of the trainer's loss to row i's own mean-token loss.

    The formula is that of the loss type's average (see ``AVERAGES``), divided by :func:`loss_factor`. In it, the
    micro-batch has B rows and M loss tokens, L_i in row i; the optimizer step has GA micro-batches; the generation has
    SPG of them and N loss tokens over W processes; L_max is ``max_completion_length``.

    Args:
        trainer: a GRPOTrainer that is training.
        inputs: the micro-batch, as ``compute_loss`` gets it.
    """
    own = own_grpo_loss(trainer)
    average = GRPO_LOSSES[own] if own in GRPO_LOSSES else LOSS_TYPES[trainer.loss_type]
    return AVERAGES[average].row_scale(GrpoMicroBatch(trainer, inputs)) / loss_factor(trainer)


def sft_row_scale(
    trainer: Any, inputs: dict[str, Any], num_items_in_batch: Any, cu_seqlens: Sequence[int] | None = None
) -> Tensor:
    """[B] float64: the factor from row i's share of SFTTrainer's loss to row i's own mean-token loss.

    SFTTrainer's loss is a mean over label tokens. Where Trainer counts them, the factor is ``N / (W L_i)`` with N the
    label tokens of the optimizer step on all W processes (``N / L_i`` for ``SFT_LOSSES``, which do not multiply by W).
    Where it does not, the factor is ``M GA / L_i`` with M the label tokens of the micro-batch and GA the micro-batches
    of the step. L_i counts the labels of row i after the shift.

    Args:
        trainer: an SFTTrainer that is training.
        inputs: the micro-batch, as ``compute_loss`` gets it.
        num_items_in_batch: N, as ``compute_loss`` gets it; None where it is not counted.
        cu_seqlens: [S+1] boundaries of a padding-free micro-batch, whose S sequences are then the rows: the result is
            [S]. Without it a padding-free micro-batch counts as one row.
    """
    labels = inputs["labels"]
    if cu_seqlens is None:
        counted = (labels[:, 1:] != -100).sum(1)
    else:
        # The first token of a sequence is predicted by nothing, and TRL has no label there.
        valid = (labels.reshape(-1) != -100).cpu()
        counted = torch.stack([valid[start + 1 : end].sum() for start, end in pairwise(cu_seqlens)])
    lengths = counted.clamp(min=1).double().cpu()
    if num_items_in_batch is None:
        total = max(float(counted.sum()), 1.0) * trainer.current_gradient_accumulation_steps
    else:
        total = max(float(num_items_in_batch), 1.0)
        if trainer.args.average_tokens_across_devices and own_sft_loss(trainer) not in SFT_LOSSES:
            # Ranks of one tensor-parallel group share their rows; Trainer's N and TRL's W count them once.
            total /= trainer.accelerator.num_processes // trainer.get_tp_size()
    return total / lengths / loss_factor(trainer)
