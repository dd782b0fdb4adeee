"""Prompts and completions: rendering questions, sampling groups, log-probabilities, and held-out evaluation.

A prompt runs once for its whole group wherever that is possible: its keys and values are computed once and repeated. In
`generate` that saves the prefill, in training it saves forward and backward of all but one copy of the prompt.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .models import end_tokens, last_layer_alone, mixed_precision
from .runlog import Line, eval_metrics
from .settings import Settings
from .tasks import Example, Task

GENERATED_CHECKED = 128  # questions of a generator whose prompts are measured before the first step


class Prompter:
    """Turns examples into token ids, with the task's solved examples in front when few_shot asks for them."""

    def __init__(self, tokenizer: Any, tasks: Sequence[Task], settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        if settings.prompt_template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "prompt_template is 'chat' but the tokenizer has no chat template: give text that holds {question}"
            )
        self._shots = {task.name: task.solved_examples(settings.few_shot) for task in tasks if settings.few_shot}

    def text(self, task: str, example: Example) -> str:
        """The whole prompt as text."""
        shots = self._shots.get(task, [])
        template = self.settings.prompt_template
        if template != "chat":
            end = self.tokenizer.eos_token + "\n"
            solved = "".join(template.replace("{question}", shot.question) + shot.answer + end for shot in shots)
            return solved + template.replace("{question}", example.question)
        system = self.settings.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        for shot in shots:
            messages += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": shot.answer}]
        messages.append({"role": "user", "content": example.question})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def ids(self, task: str, example: Example) -> list[int]:
        """The prompt's token ids."""
        ids = self.tokens(task, example)
        if fault := self._fault(ids):
            raise UserError(f"a prompt of task {task!r} {fault}")
        return ids

    def tokens(self, task: str, example: Example) -> list[int]:
        """The prompt's token ids, however many they are."""
        ids: list[int] = self.tokenizer(self.text(task, example), add_special_tokens=False)["input_ids"]
        return ids

    def _fault(self, ids: list[int]) -> str | None:
        """What is wrong with a prompt's length, or None."""
        if len(ids) < 2:
            return f"has {len(ids)} tokens; at least 2 are needed"
        if len(ids) > self.settings.max_prompt_length:
            return (
                f"has {len(ids)} tokens, more than max_prompt_length={self.settings.max_prompt_length}: raise it, set "
                "overlong to drop, or lower few_shot or the task's config"
            )
        return None

    def check(self, tasks: Sequence[Task]) -> list[str]:
        """Hold the prompts of all tasks to max_prompt_length before the first step; returns remarks on what is dropped.

        Checked are all rows of a file or a data set, the held-out questions, and the first GENERATED_CHECKED of
        generated ones, whose later overlong ones are always passed over. Raises UserError where a prompt does not fit
        and ``overlong`` is "error", or fewer than two of a task's prompts fit.
        """
        remarks = []
        for task in tasks:

            def fits(example: Example, name: str = task.name) -> bool:
                return self._fault(self.tokens(name, example)) is None

            questions = list(dict.fromkeys(task.questions or task.preview(GENERATED_CHECKED)))
            faults: list[str] = []
            for first in range(0, len(questions), 1000):
                texts = [self.text(task.name, Example(question, "")) for question in questions[first : first + 1000]]
                batch = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
                faults += [fault for ids in batch if (fault := self._fault(ids))]
            total = f"{len(faults)} of {len(questions)} questions" + ("" if task.questions else " looked at")
            if faults and self.settings.overlong == "error":
                raise UserError(f"task {task.name!r}: {total} do not fit, the first {faults[0]}")
            if len(questions) < 2:
                raise UserError(
                    f"task {task.name!r} has a single question, {questions[0]!r:.80}: at least 2 are needed"
                )
            if len(questions) - len(faults) < 2:
                raise UserError(f"task {task.name!r}: {total} do not fit, too many: the first {faults[0]}")
            if faults:
                limit = f"max_prompt_length={self.settings.max_prompt_length}"
                remarks.append(f"task {task.name!r}: {total} are left out, as their prompts do not fit {limit}")
            if task.unfit:
                remarks.append(
                    f"task {task.name!r}: {len(task.unfit)} of its reference answers score 0 by its verifier, such as "
                    f"{task.unfit[0]!r:.80}: a reply that repeats such an answer counts as wrong"
                )
            task.leave_out(fits)
        return remarks

    def target_ids(self, example: Example) -> list[int]:
        """The reference answer and the end token."""
        ids: list[int] = self.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as [B, L] int64 with their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


@dataclass
class Rollouts:
    """n prompts with G completions each; row r belongs to prompt r // G.

    ``below``: what enters the last decoder layer at the current weights, where it was kept: [n, P - 1, H] at the
    prompts' tokens but the last, [n G, C, H] at the tokens that predict the completions. The layers below it do not run
    again then.
    """

    prompt_ids: Tensor  # [n, P], padded on the left
    prompt_mask: Tensor  # [n, P]
    completion_ids: Tensor  # [n G, C], padded on the right
    completion_mask: Tensor  # [n G, C]: 1 up to and with the end token
    ended: Tensor  # [n G] bool: has an end token
    group: int  # G
    below: tuple[Tensor, Tensor] | None = None

    def rows(self, first: int, last: int) -> Rollouts:
        """Prompts first..last-1 with their groups, without columns that are padding in all of them."""
        part = slice(first * self.group, last * self.group)
        longest = int(self.completion_mask[part].sum(1).max())
        skip = self.prompt_ids.shape[1] - int(self.prompt_mask[first:last].sum(1).max())
        below = self.below
        return Rollouts(
            self.prompt_ids[first:last, skip:],
            self.prompt_mask[first:last, skip:],
            self.completion_ids[part, :longest],
            self.completion_mask[part, :longest],
            self.ended[part],
            self.group,
            None if below is None else (below[0][first:last, skip:], below[1][part, :longest]),
        )


def positions(mask: Tensor) -> Tensor:
    """[B, L] the position of each token that the mask [B, L] does not leave out."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def prompt_cache(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, group: int, embeddings: Tensor | None = None
) -> Any:
    """Keys and values of all prompt tokens but the last, computed once per prompt and repeated for its group.

    ``embeddings`` [n, P - 1, H]: given to the model in the place of these tokens.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids, mask = prompt_ids[:, :-1], prompt_mask[:, :-1]
    tokens = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
    model(
        **tokens,
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(group)
    return cache


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], group: int, settings: Settings, greedy: bool = False
) -> Rollouts:
    """Sample ``group`` completions of each prompt (one each, greedily, for evaluation)."""
    model.eval()
    device = model.device
    batch = settings.generation_batch_size // settings.num_generations or len(prompts)
    if greedy:
        sampling: dict[str, Any] = {"do_sample": False}
    else:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, "left", device)
    ends = end_tokens(model, tokenizer)
    sampled: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        ids, mask = pad(prompts[first : first + batch], tokenizer.pad_token_id, "left", device)
        with mixed_precision(settings, device):
            cache = prompt_cache(model, ids, mask, group)
            output = _generate(
                model,
                input_ids=ids.repeat_interleave(group, 0),
                attention_mask=mask.repeat_interleave(group, 0),
                past_key_values=cache,
                max_new_tokens=settings.max_completion_length,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                repetition_penalty=1.0,  # some models ship another in their generation config
                **sampling,
            )
        sampled.append(output[:, ids.shape[1] :])
    width = max(part.shape[1] for part in sampled)
    completion = torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=tokenizer.pad_token_id) for part in sampled]
    )
    is_end = torch.isin(completion, torch.tensor(ends, device=device))
    # Tokens up to and with the first end token; pad and end token may be the same id.
    mask = ((is_end.cumsum(1) - is_end.long()) == 0).long()
    lengths = torch.cat([torch.full((part.shape[0],), part.shape[1]) for part in sampled]).to(device)
    mask = mask * (torch.arange(width, device=device)[None] < lengths[:, None])
    return Rollouts(prompt_ids, prompt_mask, completion, mask, is_end.any(1), group)


def _generate(model: Any, **arguments: Any) -> Tensor:
    """The model's ``generate``; UserError where its weights give no probabilities to draw from."""
    try:
        output: Tensor = model.generate(**arguments)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "the model gives probabilities that are not finite, so no completion can be drawn: its weights are "
            "spoiled, as by too large a learning_rate; go on from an earlier checkpoint, or start with a lower one"
        ) from error
    return output


@contextmanager
def _only_at(model: Any, kept: Tensor) -> Iterator[None]:
    """The output embedding sees the hidden states [B, W, H] at ``kept`` [B, W] alone: logits become [1, kept.sum(), V].

    The vocabulary is the widest layer of a small model by far, and most completions are shorter than the longest.
    """

    def select(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][kept][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def completion_logprobs(
    model: Any, rollouts: Rollouts, temperature: float, share_prompt: bool, pad_logits: bool = False
) -> Tensor:
    """[n G, C] float32 log-probabilities of the completions' tokens, differentiable; padding has arbitrary ones.

    ``pad_logits``: logits of the padding too, for a tracker that watches the output embedding's rows.
    """
    prompts = rollouts.prompt_ids.repeat_interleave(rollouts.group, 0)
    mask = torch.cat([rollouts.prompt_mask.repeat_interleave(rollouts.group, 0), rollouts.completion_mask], 1)[:, :-1]
    width = rollouts.completion_ids.shape[1]
    counted = torch.ones_like(rollouts.completion_mask) if pad_logits else rollouts.completion_mask
    counted = counted.bool()
    below = rollouts.below if share_prompt else None
    how: dict[str, Any]
    with contextlib.ExitStack() as stack:
        if below is not None:
            stack.enter_context(last_layer_alone(model))
        if share_prompt:
            given = None if below is None else below[0]
            cache = prompt_cache(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.group, given)
            ids = torch.cat([prompts[:, -1:], rollouts.completion_ids[:, :-1]], 1)
            how = {"input_ids": ids} if below is None else {"inputs_embeds": below[1]}
            how |= {"position_ids": positions(mask)[:, -width:], "past_key_values": cache, "use_cache": True}
        else:
            ids = torch.cat([prompts, rollouts.completion_ids], 1)[:, :-1]
            how = {"input_ids": ids, "position_ids": positions(mask), "use_cache": False, "logits_to_keep": width}
        if not pad_logits:
            stack.enter_context(_only_at(model, counted))
        logits = model(attention_mask=mask, **how).logits
    chosen = rollouts.completion_ids[counted]
    # log p = logit - logsumexp: half the memory of a log_softmax over the vocabulary.
    logits = logits.reshape(len(chosen), -1).float() / temperature
    found = logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return found.new_zeros(counted.shape).masked_scatter(counted, found)


def completion_texts(tokenizer: Any, rollouts: Rollouts) -> list[str]:
    """The completions as text, end and padding left out."""
    lengths = rollouts.completion_mask.sum(1) - rollouts.ended.to(rollouts.completion_mask)
    rows = zip(rollouts.completion_ids.tolist(), lengths.tolist(), strict=True)
    decoded: list[str] = [tokenizer.decode(ids[: int(n)], skip_special_tokens=True) for ids, n in rows]
    return decoded


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    prompter: Prompter,
    settings: Settings,
    questions: int | None = None,
) -> Line:
    """Reward of one greedy completion per held-out question: mean, ``sqrt(var / n)`` and n per task, by key.

    ``questions``: only so many of each task, the first ones.
    """
    line: Line = {}
    rows = settings.generation_batch_size or settings.completions_per_step
    for task in tasks:
        rewards: list[float] = []
        held_out = task.held_out[:questions]
        for first in range(0, len(held_out), rows):
            examples = held_out[first : first + rows]
            prompts = [prompter.ids(task.name, example) for example in examples]
            rollouts = generate(model, tokenizer, prompts, 1, settings, greedy=True)
            texts = completion_texts(tokenizer, rollouts)
            rewards += [task.score(text, example) for text, example in zip(texts, examples, strict=True)]
        line |= held_out_metrics(task.name, rewards)
    return line


def held_out_metrics(task: str, rewards: Sequence[float]) -> Line:
    """Mean, ``sqrt(var / n)`` and n of the rewards of a task's held-out questions, by key; none without rewards."""
    n = len(rewards)
    if not n:
        return {}
    mean = sum(rewards) / n
    variance = sum((reward - mean) ** 2 for reward in rewards) / (n - 1) if n > 1 else math.nan
    return eval_metrics(task, {"reward": mean, "reward_se": math.sqrt(variance / n), "n": n})
