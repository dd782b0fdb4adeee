"""Random-weight transformers with the sizes of known models, and a batch of prompts with completions for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    """The model on the device, trainable in every parameter; ``layers`` overrides the number of decoder layers."""
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
    # A fresh model's biases are zero, and products of zeros take less power than those of a trained model.
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.02)
    if checkpointing:
        # Renamed in later releases of transformers, where the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:
            enable = model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, sizes


def linears(model: nn.Module) -> list[str]:
    """The names of all linear layers but the head: in most models of this size the head is tied to the embedding."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


@dataclass(frozen=True)
class Prompts:
    """B rows of L tokens: n prompts with B / n completions each, next to each other, and an advantage a row.

    ``sample_ids`` [B]: a row's prompt. ``task_ids`` [B]: its task.
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
    """[B] float32: each row's advantage times its mean negative log-likelihood a token, as policy gradients have it."""
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)
    return losses.mean(1) * advantages
