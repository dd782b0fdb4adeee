"""Held-out evaluation: one greedy completion of every held-out question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .metrics import Line
from .rollout import Prompter, completion_texts, generate
from .settings import Settings
from .tasks import Task


def evaluate(model: Any, tokenizer: Any, tasks: Sequence[Task], prompter: Prompter, settings: Settings) -> Line:
    """``eval/<task>/reward``, its standard error ``sqrt(var / n)`` and n, for every task."""
    line: Line = {}
    rows = settings.generation_batch_size or settings.completions_per_step
    for task in tasks:
        rewards: list[float] = []
        for first in range(0, len(task.held_out), rows):
            examples = task.held_out[first : first + rows]
            prompts = [prompter.ids(task.name, example) for example in examples]
            rollouts = generate(model, tokenizer, prompts, 1, settings, greedy=True)
            texts = completion_texts(tokenizer, rollouts)
            rewards += [task.score(text, example) for text, example in zip(texts, examples, strict=True)]
        n = len(rewards)
        if not n:
            continue
        mean = sum(rewards) / n
        variance = sum((reward - mean) ** 2 for reward in rewards) / (n - 1) if n > 1 else math.nan
        line[f"eval/{task.name}/reward"] = mean
        line[f"eval/{task.name}/reward_se"] = math.sqrt(variance / n)
        line[f"eval/{task.name}/n"] = n
    return line
