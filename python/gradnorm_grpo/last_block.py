"""Rollouts that keep what enters the last decoder layer: the last block is measured without running those below again.

A probe at fixed weights needs each prompt's completions and their gradient in the last block only. What enters it is
known once the completions are sampled. So the loop here is a sampler of its own beside HF's ``generate``, which also
gives up a completion's row as soon as it has ended, and draws tokens by their cumulative probabilities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint import same_random_state
from .loop import Grpo
from .models import decoder_layers, end_tokens
from .rollout import Rollouts, pad, positions, prompt_cache
from .settings import Settings

TOLERANCE = 1e-4  # of a log-probability in float32, between the last layer alone and the whole model


def applies(grpo: Grpo) -> bool:
    """Whether the last layer alone gives the log-probabilities of the whole model, tried on the tasks' first questions.

    It does not where the model treats embeddings that it is given in a way of its own, with dropout, or where prompts
    are not shared by their groups. Layers of several kinds are refused: masks are made for the kind of the first layer
    of those that run, and a sliding window shows its difference in long prompts only.
    """
    settings, model = grpo.settings, grpo.model
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if settings.bf16 or settings.dtype != "float32" or not settings.shares_prompt or len(set(kinds)) > 1:
        return False
    few = grpo.few_tokens(model.device).rollouts
    prompts = [row[mask.bool()].tolist() for row, mask in zip(few.prompt_ids, few.prompt_mask, strict=True)]
    try:
        with same_random_state(model.device), torch.no_grad():
            found = rollouts(model, grpo.tokenizer, prompts, settings.num_generations, settings)
            model.train()
            alone = grpo.logprobs(model, found)
            whole = grpo.logprobs(model, dataclasses.replace(found, below=None))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # an architecture whose forward does not allow it
    return bool(((alone - whole).abs() * found.completion_mask).max() <= TOLERANCE)


@torch.no_grad()
def rollouts(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], group: int, settings: Settings) -> Rollouts:
    """Sample ``group`` completions of each prompt, and keep what enters the last decoder layer."""
    model.eval()
    device, limit = model.device, settings.max_completion_length
    entered: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(model)[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, "left", device)
        cache = prompt_cache(model, prompt_ids, prompt_mask, group)
        of_prompts = entered.pop()
        rows = len(prompts) * group
        completion = torch.full((rows, limit), tokenizer.pad_token_id, device=device)
        mask = torch.zeros((rows, limit), dtype=torch.long, device=device)
        of_completions = of_prompts.new_zeros(rows, limit, of_prompts.shape[-1])
        ends = torch.tensor(end_tokens(model, tokenizer), device=device)
        going = torch.arange(rows, device=device)
        attended = prompt_mask.repeat_interleave(group, 0)
        current = prompt_ids[:, -1:].repeat_interleave(group, 0)
        for place in range(limit):
            logits = model(
                input_ids=current,
                attention_mask=attended,
                position_ids=positions(attended)[:, -1:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            of_completions[going, place] = entered.pop()[:, 0]
            tokens = draw(logits, settings)
            completion[going, place], mask[going, place] = tokens, 1
            goes_on = ~torch.isin(tokens, ends)
            if place + 1 == limit or not goes_on.any():
                break
            if not goes_on.all():
                cache.batch_select_indices(goes_on.nonzero()[:, 0])
                going, attended = going[goes_on], attended[goes_on]
            current = tokens[goes_on][:, None]
            attended = torch.cat([attended, attended.new_ones(len(attended), 1)], 1)
    finally:
        handle.remove()
    width = place + 1
    ended = torch.isin(completion, ends) & mask.bool()
    return Rollouts(
        prompt_ids,
        prompt_mask,
        completion[:, :width],
        mask[:, :width],
        ended.any(1),
        group,
        (of_prompts, of_completions[:, :width]),
    )


def draw(logits: Tensor, settings: Settings) -> Tensor:
    """[B] tokens drawn from logits [B, V] with the settings' temperature, top_k and top_p.

    A uniform number is looked up in the cumulative probabilities, in float64: one random number per row and not V.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores, none = logits.float(), torch.empty(0, device=logits.device)
    if settings.temperature != 1.0:
        scores = TemperatureLogitsWarper(settings.temperature)(none, scores)
    if settings.top_k:
        scores = TopKLogitsWarper(settings.top_k)(none, scores)
    if settings.top_p < 1.0:
        scores = TopPLogitsWarper(settings.top_p)(none, scores)
    sums = scores.softmax(-1).double().cumsum(-1)
    at = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).squeeze(1).clamp(max=sums.shape[1] - 1)
