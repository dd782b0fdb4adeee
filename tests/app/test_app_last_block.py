"""Sampling that keeps what enters the last decoder layer: HF's tokens, the whole model's log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo import last_block
from gradnorm_grpo.loop import Grpo
from gradnorm_grpo.models import decoder_layers, last_layer_alone
from gradnorm_grpo.rollout import Prompter, Rollouts, generate
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer

TASKS = [{"name": "copy", "source": "synthetic"}, {"name": "maximum", "source": "synthetic"}]
CONFIG: dict[str, Any] = {
    "tasks": TASKS,
    "model": "tiny",
    "num_threads": 1,
    "prompt_template": "{question} = ",
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 6,
    "loss_type": "grpo",
    "eval_prompts": 2,
    "cache_dir": "",
}


def loop(model: Any = None, **more: Any) -> Grpo:
    settings, tokenizer, tasks = Settings(**CONFIG | more), tiny_tokenizer(), build_tasks(TASKS, 0, 2)
    model = tiny_model(tokenizer, 32, 3, 3) if model is None else model
    return Grpo(settings, model, tokenizer, tasks, Prompter(tokenizer, tasks, settings), None)


def often_ending(grpo: Grpo) -> list[list[int]]:
    """Prompts of different lengths, and a model for which a token that it often says ends a completion."""
    tasks = list(grpo.tasks.values())
    prompts = [grpo.prompter.ids(task.name, task.next_example()) for task in tasks for _ in range(4)]
    said = last_block.rollouts(grpo.model, grpo.tokenizer, prompts, 4, grpo.settings).completion_ids
    later = [set(row[1:].tolist()) - {int(row[0])} for row in said]
    counts = {token: sum(token in row for row in later) for token in set().union(*later)}
    chosen = min(counts, key=lambda token: abs(counts[token] - len(later) // 2))
    grpo.model.generation_config.eos_token_id = [grpo.tokenizer.eos_token_id, chosen]
    return prompts


def same(a: Rollouts, b: Rollouts) -> bool:
    width = min(a.completion_ids.shape[1], b.completion_ids.shape[1])
    return (
        torch.equal(a.completion_mask.sum(1), b.completion_mask.sum(1))
        and torch.equal(
            (a.completion_ids * a.completion_mask)[:, :width], (b.completion_ids * b.completion_mask)[:, :width]
        )
        and torch.equal(a.ended, b.ended)
    )


def test_where_one_token_is_possible_it_is_hfs_generate() -> None:
    grpo = loop(top_k=1)
    with torch.no_grad():
        for parameter in grpo.model.parameters():
            parameter.mul_(4)  # as it is, it says one token all the time
    prompts = often_ending(grpo)
    found = last_block.rollouts(grpo.model, grpo.tokenizer, prompts, 4, grpo.settings)
    truth = generate(grpo.model, grpo.tokenizer, prompts, 4, grpo.settings)
    assert same(found, truth)
    assert 0 < int(found.ended.sum()) < len(found.ended), "some rows end, others do not"
    lengths = found.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 1


def test_the_last_layer_alone_is_the_whole_model() -> None:
    grpo = loop()
    prompts = often_ending(grpo)
    found = last_block.rollouts(grpo.model, grpo.tokenizer, prompts, 4, grpo.settings)
    assert 0 < int(found.ended.sum()) < len(found.ended)
    first, last = 2, 7
    for part in (found, found.rows(first, last)):
        attention = decoder_layers(grpo.model)[-1].self_attn
        gradients, values = [], []
        for ran in (part, dataclasses.replace(part, below=None)):
            grpo.model.zero_grad(set_to_none=True)
            logprobs = grpo.logprobs(grpo.model, ran) * part.completion_mask
            (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in attention.parameters()]))
            values.append(logprobs.detach())
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert last_block.applies(grpo)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    for more in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.8}):
        settings = Settings(**CONFIG | more)
        scores = logits[0] / settings.temperature
        if settings.top_k:
            scores = scores.masked_fill(scores < scores.topk(2).values[-1], -torch.inf)
        if settings.top_p < 1.0:
            scores[torch.tensor([0, 4])] = -torch.inf  # the other two hold 0.87, the largest alone 0.64
        drawn = last_block.draw(logits.expand(20000, -1), settings)
        shares = torch.bincount(drawn, minlength=5) / 20000
        assert shares[2] == 0
        torch.testing.assert_close(shares, scores.softmax(0), rtol=0, atol=0.015)


def test_a_model_of_its_own_kind_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that scales what it is given as embeddings, and one whose forward raises on them."""
    grpo = loop()
    plain = grpo.model.model.forward

    def scaled(**kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * 2
        return plain(**kwargs)

    def refusing(**kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("no embeddings")
        return plain(**kwargs)

    assert last_block.applies(grpo)
    for forward in (scaled, refusing):
        monkeypatch.setattr(grpo.model.model, "forward", forward)
        assert not last_block.applies(grpo)
    monkeypatch.undo()
    grpo.model.config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    assert not last_block.applies(grpo), "the mask of the first layer's kind would be taken"
    assert not last_block.applies(loop(loss_type="dapo")), "prompts are not shared"
    assert not last_block.applies(loop(bf16=True))


def test_the_model_is_as_before_also_after_an_error() -> None:
    grpo = loop()
    before = [name for name, _ in grpo.model.named_parameters()]
    numbers = [layer.self_attn.layer_idx for layer in decoder_layers(grpo.model)]
    state = torch.get_rng_state()
    assert last_block.applies(grpo) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="x"), last_layer_alone(grpo.model):
        raise RuntimeError("x")
    assert [name for name, _ in grpo.model.named_parameters()] == before
    assert [layer.self_attn.layer_idx for layer in decoder_layers(grpo.model)] == numbers
    assert not decoder_layers(grpo.model)[-1]._forward_pre_hooks
