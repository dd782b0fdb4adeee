"""What the table of tiny models says about one architecture, and the sizes that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

VOCABULARY = 61
IMAGE_TOKEN = VOCABULARY + 3
ROWS, LENGTH, TARGETS = 5, 8, 6  # rows of a batch, tokens of a row, tokens of a sequence-to-sequence target
CLASSES = 3

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QKVO = "q_proj k_proj v_proj o_proj"
BERT = "self.query self.key self.value output.dense"
MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"

Task = Literal["causal", "seq2seq", "classification", "speech", "image"]


@dataclass(frozen=True)
class Architecture:
    """How to build one model, and the modules that ``layers="last_attention"`` is to choose.

    Attributes:
        model: the class in transformers. Its configuration's class has the same beginning unless ``config`` names it.
        at: the name of the attention in the last layer that has softmax attention; "" where there is none.
        parts: names of the projections inside ``at``, separated by spaces.
        sizes: arguments of the configuration besides ``SIZES``; with ``plain`` instead of them.
        task: which inputs the model gets and what its loss is.
        slow: left to the slow tests, as an architecture whose kind is tested by another one.
        dtype: float32 where the model's own code overflows in float64 (masks that are filled with the smallest float).
        fused: False where the linears have a forward of their own, which ``fused=True`` refuses by name.
        refused: why the default layers are refused by name in the first micro-batch; "" for most.
        reentrant: False where transformers' own reentrant checkpointing fails.
        build: builds what a configuration of one class cannot.
    """

    model: str
    config: str
    at: str = "model.layers.1.self_attn"
    parts: str = QKVO
    sizes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    task: Task = "causal"
    slow: bool = False
    dtype: torch.dtype = torch.float64
    fused: bool = True
    refused: str = ""
    reentrant: bool = True
    build: Callable[[], nn.Module] | None = None

    @property
    def default_layers(self) -> set[str]:
        return {f"{self.at}.{part}" for part in self.parts.split()} if self.at else set()


def enter(
    table: dict[str, Architecture],
    name: str,
    model: str = "",
    config: str | None = None,
    *,
    at: str = "model.layers.1.self_attn",
    parts: str = QKVO,
    plain: bool = False,
    task: Task = "causal",
    slow: bool = False,
    dtype: torch.dtype = torch.float64,
    fused: bool = True,
    refused: str = "",
    reentrant: bool = True,
    build: Callable[[], nn.Module] | None = None,
    **sizes: Any,
) -> None:
    """Put an :class:`Architecture` into a table; ``config`` is by default the class named like the model."""
    if config is None:
        stem = model
        for ending in (
            "ForCausalLM",
            "LMHeadModel",
            "ForConditionalGeneration",
            "ForSequenceClassification",
            "MTModel",
        ):
            stem = stem.removesuffix(ending)
        config = f"{stem}Config"
    table[name] = Architecture(
        model, config, at, parts, sizes, plain, task, slow, dtype, fused, refused, reentrant, build
    )
