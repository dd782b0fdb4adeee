"""The model `tiny`: a Llama of about a million parameters with random weights and a tokenizer of single characters."""

from __future__ import annotations

import string
from typing import Any

import torch

CHARACTERS = string.ascii_letters + string.digits + " .,:;?!'\"+-*/=()[]<>_\n"


def tiny_tokenizer() -> Any:
    """One token a character; <pad>, <bos>, <eos> and <unk> beside them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(tokenizer: Any, hidden_size: int, layers: int, seed: int) -> Any:
    """A LlamaForCausalLM with heads of 32, tied embeddings and weights drawn from ``seed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden_size // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # torch.manual_seed would reseed every GPU as well, and only the CPU's state is put back.
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    return model
