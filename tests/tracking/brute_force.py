"""The truth the tracker is held to: per-sample gradients by plain autograd, stored whole, and small models to try it
on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

VOCABULARY = 61
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "llama_tied": lambda: LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**DECODER),
    "qwen3": lambda: Qwen3Config(**DECODER, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def small_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random-weight model of that architecture, with biases and norms moved off their initial zeros and ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.use_cache = False
    return model.train()


def batch(
    rows: int, length: int, padding: str = "none", seed: int = 1, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and an attention mask with rows of different lengths: padding "none", "right" or "left"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    if padding != "none":
        for row in range(rows):
            pad = (row * 3) % (length - 3)
            mask[row, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
    return ids, mask


def row_losses(model: nn.Module, ids: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """[B] each row's own loss: its weighted mean next-token loss over unmasked targets."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    target = ids[:, 1:]
    keep = (mask[:, 1:] * mask[:, :-1]).to(logits.dtype)
    token = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none") * keep
    loss = token.sum(1) / keep.sum(1).clamp_min(1)
    return loss if weights is None else loss * weights


def sample_gradients(losses: Tensor, sample_ids: Sequence, parameters: Sequence[Tensor]) -> dict:
    """{sample: flat float64 gradient of the mean of its rows' losses}, by one autograd pass a sample."""
    out = {}
    for sample in dict.fromkeys(sample_ids):
        rows = torch.tensor([r for r, other in enumerate(sample_ids) if other == sample])
        grads = torch.autograd.grad(losses[rows].mean(), parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        out[sample] = torch.cat([g.flatten() for g in flat]).to(torch.float64)
    return out


def u_statistic(gradients: Tensor) -> float:
    """mean over ordered pairs i != j of <G_i, G_j> for [n, P] gradients."""
    gram = gradients @ gradients.T
    n = len(gram)
    return float((gram.sum() - gram.trace()) / (n * (n - 1)))


def jackknife(gradients: Tensor) -> float:
    """Standard error of :func:`u_statistic` by leaving one row out at a time."""
    n = len(gradients)
    values = torch.tensor(
        [u_statistic(gradients[[i for i in range(n) if i != out]]) for out in range(n)], dtype=torch.float64
    )
    return float(((n - 1) / n * (values - values.mean()).square().sum()).sqrt())
