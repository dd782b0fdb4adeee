"""A tiny Llama, a generated tokenizer and TRL trainers on them: seconds on a CPU, and nothing is downloaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from packaging.version import Version  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

#: Before TRL 1.15 this loss is a compute_loss_func, which attach refuses by name.
knows_dft = pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="SFT's dft loss is refused here")
WORDS = [f"w{i}" for i in range(28)]
TASKS = ("up", "down", "loud")


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def prompts(rows: int = 24) -> Dataset:
    """Every row is another prompt; the tasks alternate, "loud" less often than the others."""
    order = ["up", "down", "up", "loud", "down", "up", "down"]
    tasks = [order[i % len(order)] for i in range(rows)]
    texts = [" ".join(WORDS[(i * 5 + j * (1 + i % 3)) % 28] for j in range(2 + i % 3)) for i in range(rows)]
    return Dataset.from_dict({"prompt": texts, "task": tasks})


def reward(completion_ids: list[list[int]], task: list[str], **_: Any) -> list[float]:
    """Rewards even tokens for "up", odd ones for "down", a long answer for "loud"; rarely all equal."""
    scores = []
    for ids, name in zip(completion_ids, task, strict=True):
        even = sum(i % 2 == 0 for i in ids) / len(ids)
        scores.append({"up": even, "down": 1 - even, "loud": len(ids) + 0.25 * even}[name])
    return scores


def grpo(folder: Path, *, trained: Any = None, data: Any = None, kind: Any = None, extra: Any = None, **changes: Any):
    """A GRPOTrainer: 8 rows per micro-batch, 2 micro-batches per step, groups of 4, completions of up to 5 tokens."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (kind or trl.GRPOTrainer)(
            model=model() if trained is None else trained,
            reward_funcs=reward,
            args=trl.GRPOConfig(**settings),
            train_dataset=prompts() if data is None else data,
            processing_class=tokenizer(),
            **(extra or {}),
        )


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]
