"""A short supervised warm start: a model that fails everything has groups of equal rewards and nothing to learn from.

The result is cached under a hash of everything it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import StorageError, UserError
from .models import adamw, mixed_precision, smollm2_file
from .rollout import Prompter, pad
from .runlog import whole
from .settings import Settings
from .tasks import Task
from .tasks.rows import data_hashes

_FORMAT = 3  # raise when the procedure below changes: it is part of the key
PADDING = 200  # tokens of padding that cost no more than another pass
Pair = tuple[list[int], list[int]]  # the token ids of a prompt, and of its answer
_SETTINGS = (
    *("model", "dtype", "bf16", "train_layers", "tiny_hidden_size", "tiny_layers", "seed"),
    *("tasks", "prompt_template", "system_prompt", "few_shot", "eval_prompts", "max_prompt_length"),
    *("warm_start_steps", "warm_start_examples", "warm_start_batch_size", "warm_start_learning_rate"),
    *("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
)


def cache_file(settings: Settings, model: Any) -> Path | None:
    """The cache file of the warm-started weights of these settings; None when nothing is cached."""
    if not settings.cache_dir:
        return None
    import reasoning_gym
    import transformers

    files = [smollm2_file()] if settings.model == "smollm2" else []
    if settings.model not in ("smollm2", "tiny"):
        files = sorted(path for path in Path(settings.model).glob("*") if path.is_file())
    parts = {
        "format": _FORMAT,
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name in _SETTINGS},
        "model": str(model.config),
        "device": model.device.type,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "data": data_hashes(settings.tasks),
        "versions": [torch.__version__, transformers.__version__, reasoning_gym.__version__],
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]
    return Path(settings.cache_dir) / f"warm-start-{key}.safetensors"


def warm_start(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    prompter: Prompter,
    settings: Settings,
    on_step: Callable[[int, float], int | None],
) -> bool:
    """Train on solved examples for ``warm_start_steps``; True if the weights came from the cache instead.

    ``on_step`` gets each step's number and loss. It may return a smaller number of steps to make in all: the learning
    rate then ends its cycle there, and the weights are not kept in the cache.
    """
    cached = cache_file(settings, model)
    if cached is not None and cached.is_file():
        try:
            weights = load_file(cached, device=str(model.device))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the cached warm start {cached} is damaged ({error}): delete it, and it is made again"
            ) from error
        model.load_state_dict(weights, strict=False)
        return True
    pairs = [
        (prompter.ids(task.name, example), prompter.target_ids(example))
        for task in tasks
        for example in task.solved_examples(settings.warm_start_examples)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, settings, settings.warm_start_learning_rate)

    def one_cycle(done: int, total: int) -> torch.optim.lr_scheduler.OneCycleLR:
        peak = settings.warm_start_learning_rate
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=total + 1, pct_start=0.2, last_epoch=done - 1
        )

    total = settings.warm_start_steps
    schedule = one_cycle(0, total)
    order = _batches(len(pairs), settings.warm_start_batch_size, settings.warm_start_steps, settings.seed)
    model.train()
    for step, batch in enumerate(order, 1):
        loss = 0.0
        for part in _by_length([pairs[i] for i in batch]):
            with mixed_precision(settings, model.device):
                part_loss = _answer_loss(model, part, tokenizer.pad_token_id) * (len(part) / len(batch))
            part_loss.backward()
            loss += float(part_loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        wanted = on_step(step, loss)
        if wanted is not None and max(step, wanted) < total:
            total = max(step, wanted)
            schedule = one_cycle(step, total)
        if step == total:
            break
    if cached is not None and total == settings.warm_start_steps:
        _store(model, cached)
    return False


def _batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Batches of indices that go through all examples, in a new order in each epoch."""
    rng = random.Random(seed)
    indices: list[int] = []
    while len(indices) < size * steps:
        indices += rng.sample(range(count), count)
    return [indices[i * size : (i + 1) * size] for i in range(steps)]


def _by_length(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in parts of similar length, each padded by itself: tasks differ in the length of their prompts."""
    parts: list[list[Pair]] = []
    room = 0
    for pair in sorted(pairs, key=_length, reverse=True):
        room -= _length(parts[-1][0]) - _length(pair) if parts else 0
        if not parts or room < 0:
            parts.append([])
            room = PADDING
        parts[-1].append(pair)
    return parts


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _answer_loss(model: Any, pairs: Sequence[Pair], pad_id: int) -> torch.Tensor:
    """Mean over the examples of the mean cross-entropy of the answer's tokens."""
    width = max(len(answer) for _, answer in pairs)
    ids, mask = pad([prompt + answer for prompt, answer in pairs], pad_id, "left", model.device)
    # Padded on the left, so that the answers end together: the logits that count are the last ones.
    logits = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
        use_cache=False,
        logits_to_keep=width,
    ).logits.float()
    targets, counts = ids[:, -width:], torch.zeros(len(pairs), width, device=model.device)
    for row, (_, answer) in enumerate(pairs):
        counts[row, width - len(answer) :] = 1.0 / len(answer)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * counts).sum() / len(pairs)


def _store(model: Any, path: Path) -> None:
    """Write the trained weights, whole or not at all."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            save_file(weights, temporary)
    except (OSError, SafetensorError) as error:
        # safetensors turns a full disk into an error of its own.
        raise StorageError(
            f"the warm start could not be kept in {path} ({error}): free some space, or give another --cache_dir "
            "(an empty one keeps nothing), and start again"
        ) from error
