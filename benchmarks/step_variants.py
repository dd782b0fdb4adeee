"""The training steps that are compared: the models, a batch of prompts, and the ways to take one step on it.

Models have random weights and the sizes of known ones. Every variant makes one optimizer step on the same batch with
the same total gradient, the mean over the rows: the plain step, the step with the tracker, and the rivals, which find
each prompt's norm without the tracker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradnorm_kernels as gk


@dataclass(frozen=True)
class Sizes:
    """As in the model's published configuration; ``bias``: of q, k and v; ``tied``: the head is the embedding."""

    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    bias: bool
    tied: bool


MODELS = {
    "qwen2.5-3b": Sizes(2048, 11008, 36, 16, 2, 151936, True, True),
    "qwen2.5-1.5b": Sizes(1536, 8960, 28, 12, 2, 151936, True, True),
    "qwen2.5-0.5b": Sizes(896, 4864, 24, 14, 2, 151936, True, True),
    "llama-3.1-8b": Sizes(4096, 14336, 32, 32, 8, 128256, False, False),
    "smollm2-135m": Sizes(576, 1536, 30, 9, 3, 49152, False, True),
    "tiny": Sizes(64, 176, 2, 4, 2, 512, True, True),
}


def build(
    name: str, layers: int | None, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> tuple[nn.Module, Sizes]:
    """The model on the device, all parameters trainable; ``layers`` overrides the number of decoder layers."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = MODELS[name]
    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.wide,
        "num_hidden_layers": layers or sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "tie_word_embeddings": sizes.tied,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if sizes.bias:
                model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**common))
            else:
                model = LlamaForCausalLM(LlamaConfig(**common))
    finally:
        torch.set_default_dtype(before)
    model.train()
    # The biases of a new model are zero, and products of zeros draw less power than those of a trained model.
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.02)
    if checkpointing:
        # Later releases of transformers renamed it, and the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:
            enable = model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, sizes


def linears(model: nn.Module) -> list[str]:
    """The names of all linear layers except the head, which is tied to the embedding in most models of this size."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


@dataclass(frozen=True)
class Prompts:
    """B rows of L tokens: n prompts with B / n adjacent completions each, and one advantage per row.

    ``sample_ids`` [B]: the prompt of each row. ``task_ids`` [B]: its task.
    """

    tokens: Tensor
    advantages: Tensor
    sample_ids: list[int]
    task_ids: list[int]

    @property
    def prompts(self) -> list[slice]:
        """The rows of each prompt."""
        each = self.sample_ids.count(0)
        return [slice(lo, lo + each) for lo in range(0, len(self.sample_ids), each)]


def make_prompts(
    prompts: int, completions: int, length: int, tasks: int, vocabulary: int, device: torch.device
) -> Prompts:
    """Random tokens and advantages."""
    generator = torch.Generator().manual_seed(1)
    rows = prompts * completions
    tokens = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    advantages = torch.randn(rows, generator=generator).to(device)
    sample_ids = [row // completions for row in range(rows)]
    return Prompts(tokens, advantages, sample_ids, [sample % tasks for sample in sample_ids])


def row_losses(model: nn.Module, tokens: Tensor, advantages: Tensor) -> Tensor:
    """[B] float32: each row's advantage times its mean negative log-likelihood per token, as in policy gradients."""
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)
    return losses.mean(1) * advantages


@dataclass
class Setting:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Prompts

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def losses(self, rows: slice = slice(None)) -> Tensor:
        return row_losses(self.model, self.batch.tokens[rows], self.batch.advantages[rows])


@dataclass(frozen=True)
class Variant:
    """``layers``: "last_attention", "linears" or "everything", with the tracker; ``rival``: a way without the tracker.

    ``accumulate``, ``errors``: the tracker's.
    """

    name: str
    what: str
    layers: str | None = None
    fused: bool = False
    rival: bool = False
    accumulate: str = "pairs"
    errors: str = "samples"

    @property
    def ours(self) -> bool:
        return self.layers is not None


PLAIN = "nothing"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(PLAIN, "forward, backward, optimizer step"),
        Variant("last_attention", "the last block's attention projections observed", "last_attention"),
        Variant("last_attention_fused", "the same, their backward replaced", "last_attention", True),
        Variant("linears", "all linear layers except the head observed", "linears"),
        Variant("linears_fused", "the same, their backward replaced", "linears", True),
        *(
            Variant(f"linears_fused_{errors}", f"the same, errors={errors!r}", "linears", True, errors=errors)
            for errors in ("tasks", "steps")
        ),
        Variant("everything", "all parameters observed: linear layers, norms, embedding and head", "everything"),
        Variant("everything_fused", "the same, the linear layers' backward replaced", "everything", True),
        *(
            Variant(f"everything_fused_{errors}", f"the same, errors={errors!r}", "everything", True, errors=errors)
            for errors in ("tasks", "steps")
        ),
        Variant(
            "last_attention_sketch",
            "the last block's attention projections, a sketch per prompt",
            "last_attention",
            accumulate="sketch",
        ),
        Variant(
            "linears_sketch", "all linear layers except the head, a sketch per prompt", "linears", accumulate="sketch"
        ),
        Variant("prompt_microbatches", "one micro-batch per prompt, its gradient's norm, accumulation", rival=True),
        Variant(
            "prompt_backwards", "one forward, one backward per prompt, its gradient's norm, accumulation", rival=True
        ),
    )
}


def layer_names(setting: Setting, layers: str) -> str | list[str]:
    """The tracker's ``layers`` argument for a variant's ``layers``."""
    return {"linears": linears(setting.model), "everything": "all"}.get(layers, layers)


def plain_step(setting: Setting) -> Callable[[], None]:
    def step() -> None:
        setting.optimizer.zero_grad()
        setting.losses().mean().backward()
        setting.optimizer.step()

    return step


def tracked_step(setting: Setting, tracker: gk.GradNormTracker) -> Callable[[], gk.StepStats]:
    batch = setting.batch

    def step() -> gk.StepStats:
        setting.optimizer.zero_grad()
        with tracker.microbatch(batch.task_ids, batch.sample_ids):
            setting.losses().mean().backward()
        setting.optimizer.step()
        return tracker.step()

    return step


#: The squared norm of one prompt's gradient in some of the parameters.
Norms = Callable[[list[Tensor]], Tensor]


def total_sq_norm(gradients: list[Tensor]) -> Tensor:
    """float64: one launch for all tensors; the squares of each tensor are summed in float32."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()


def prompt_microbatches(setting: Setting, norms: Norms = total_sq_norm) -> Callable[[], Tensor]:
    """One forward and backward per prompt; needs a second gradient buffer. The step returns ||G_p||^2 [n]."""
    parts, parameters = setting.batch.prompts, setting.parameters

    def step() -> Tensor:
        found, total = [], None
        for part in parts:
            setting.optimizer.zero_grad()
            (setting.losses(part).mean() / len(parts)).backward()
            gradients = _taken(parameters)
            found.append(norms(gradients))
            total = _accumulated(total, gradients)
        return _finish(setting, total, found)

    return step


def prompt_backwards(setting: Setting, norms: Norms = total_sq_norm) -> Callable[[], Tensor]:
    """One forward, then one backward per prompt through the whole graph. The step returns ||G_p||^2 [n]."""
    parts, parameters = setting.batch.prompts, setting.parameters

    def step() -> Tensor:
        setting.optimizer.zero_grad()
        losses = setting.losses()
        found, total = [], None
        for i, part in enumerate(parts):
            (losses[part].mean() / len(parts)).backward(retain_graph=i + 1 < len(parts))
            gradients = _taken(parameters)
            found.append(norms(gradients))
            total = _accumulated(total, gradients)
        return _finish(setting, total, found)

    return step


RIVALS = {"prompt_microbatches": prompt_microbatches, "prompt_backwards": prompt_backwards}


def _taken(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients, removed from the parameters."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def _accumulated(total: list[Tensor] | None, gradients: list[Tensor]) -> list[Tensor]:
    if total is None:
        return gradients
    torch._foreach_add_(total, gradients)
    return total


def _finish(setting: Setting, total: list[Tensor] | None, found: list[Tensor]) -> Tensor:
    assert total is not None
    for parameter, gradient in zip(setting.parameters, total, strict=True):
        parameter.grad = gradient
    setting.optimizer.step()
    # Each backward is of the prompt's share of the mean over n prompts.
    return torch.stack(found).cpu() * len(found) ** 2
