"""Stored rollouts: prompts and their groups as the model samples them where GRPO begins, scored and kept in a file.

A measurement that is repeated on the same rollouts differs by the estimator alone. Two files hold them: the tensors
(safetensors), and beside them, in JSON, the questions, the settings and the weights they were sampled with. The JSON is
written last: where it is missing, there are no stored rollouts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from ...errors import StorageError, UserError
from ...loop import Batch, Grpo
from ...rollout import Rollouts
from ...runlog import write_json
from ...settings import Settings
from ...tasks import Example

_FORMAT = 1
# What the rollouts depend on, beside the model's weights.
_SETTINGS = (
    *("model", "dtype", "bf16", "seed", "tasks", "prompt_template", "system_prompt", "few_shot", "eval_prompts"),
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "scale_rewards"),
)


def stored_rollouts(grpo: Grpo, prompts: int, path: Path) -> tuple[Batch, bool]:
    """The rollouts in ``path``, sampled and written if they are not there; and whether they were.

    Args:
        grpo: where training stands; its random states and its tasks' positions move if rollouts are sampled.
        prompts: of every task. Those of one task follow each other, in the tasks' order.
        path: the safetensors file.

    Raises:
        UserError: the stored rollouts were made otherwise (the text says what differs) or are damaged.
        StorageError: they could not be written.
    """
    made = made_with(grpo, prompts)
    if path.with_suffix(".json").is_file():
        return load(path, made, grpo.model.device), True
    batch = sample(grpo, prompts)
    store(batch, made, path)
    # Read back, so that a first measurement sees what a second one will.
    return load(path, made, grpo.model.device), False


def sample(grpo: Grpo, prompts: int) -> Batch:
    """``prompts`` prompts of every task with their groups, about a training step's worth at a time."""
    step = max(1, grpo.settings.prompts_per_step)
    parts = [
        grpo.rollout([task] * min(step, prompts - done)) for task in grpo.tasks for done in range(0, prompts, step)
    ]
    longest_prompt = max(part.rollouts.prompt_ids.shape[1] for part in parts)
    longest = max(part.rollouts.completion_ids.shape[1] for part in parts)
    fill = grpo.tokenizer.pad_token_id

    def left(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, (longest_prompt - tensor.shape[1], 0), value=value)

    def right(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, (0, longest - tensor.shape[1]), value=value)

    rollouts = Rollouts(
        torch.cat([left(part.rollouts.prompt_ids, fill) for part in parts]),
        torch.cat([left(part.rollouts.prompt_mask, 0) for part in parts]),
        torch.cat([right(part.rollouts.completion_ids, fill) for part in parts]),
        torch.cat([right(part.rollouts.completion_mask, 0) for part in parts]),
        torch.cat([part.rollouts.ended for part in parts]),
        parts[0].rollouts.group,
    )
    return Batch(
        [task for part in parts for task in part.tasks],
        [example for part in parts for example in part.examples],
        rollouts,
        torch.cat([part.rewards for part in parts]),
        torch.cat([part.advantages for part in parts]),
        {task: 1.0 / len(grpo.tasks) for task in grpo.tasks},
    )


def made_with(grpo: Grpo, prompts: int) -> dict[str, Any]:
    """Everything that rollouts depend on, by name, as JSON holds it."""
    settings = _plain(grpo.settings)
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(grpo.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return {"format": _FORMAT, "prompts": prompts, **settings, "weights": weights.hexdigest()}


def _plain(settings: Settings) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name in _SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def store(batch: Batch, made: dict[str, Any], path: Path) -> None:
    """Write both files, each whole or not at all, the JSON last."""
    rollouts, names = batch.rollouts, list(dict.fromkeys(batch.tasks))
    tensors = {
        "prompt_ids": rollouts.prompt_ids,
        "prompt_mask": rollouts.prompt_mask,
        "completion_ids": rollouts.completion_ids,
        "completion_mask": rollouts.completion_mask,
        "ended": rollouts.ended,
        "rewards": batch.rewards,
        "advantages": batch.advantages,
        "task": torch.tensor([names.index(task) for task in batch.tasks]),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
        text = {
            "made_with": made,
            "sha256": _digest(path),
            "group": rollouts.group,
            "tasks": names,
            "questions": [example.question for example in batch.examples],
            "answers": [example.answer for example in batch.examples],
        }
        write_json(path.with_suffix(".json"), text)
    except (OSError, SafetensorError) as error:
        # safetensors turns a full disk into an error of its own.
        raise StorageError(
            f"the rollouts could not be kept in {path} ({error}): free some space or name another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, made: dict[str, Any] | None = None, device: torch.device | str = "cpu") -> Batch:
    """The stored rollouts. Their examples hold question and answer only, as nothing is scored again.

    Args:
        path: the safetensors file.
        made: what they must have been made with (:func:`made_with`); None takes them as they are.
        device: where the token ids go; rewards and advantages stay on the CPU.

    Raises:
        UserError: a file is damaged, or the rollouts were made otherwise.
    """
    advice = f"delete {path} and {path.with_suffix('.json').name} to sample new ones, or name another folder"
    try:
        text = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = text["sha256"] == _digest(path)
        tensors = load_file(path) if whole else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the stored rollouts cannot be read ({error}): {advice}") from error
    if not whole:
        raise UserError(f"{path} is not the file that {path.with_suffix('.json').name} describes: {advice}")
    if made is not None:
        _refuse_others(text["made_with"], made, path, advice)
    ids = {name: tensors[name].to(device) for name in ("prompt_ids", "prompt_mask", "completion_ids")}
    rollouts = Rollouts(
        **ids,
        completion_mask=tensors["completion_mask"].to(device),
        ended=tensors["ended"].to(device),
        group=text["group"],
    )
    return Batch(
        [text["tasks"][index] for index in tensors["task"].tolist()],
        [Example(question, answer) for question, answer in zip(text["questions"], text["answers"], strict=True)],
        rollouts,
        tensors["rewards"],
        tensors["advantages"],
        {task: 1.0 / len(text["tasks"]) for task in text["tasks"]},
    )


def _refuse_others(stored: dict[str, Any], made: dict[str, Any], path: Path, advice: str) -> None:
    different = [name for name in dict.fromkeys([*made, *stored]) if stored.get(name) != made.get(name)]
    if different:
        said = ", ".join(f"{name} {_short(stored.get(name))}, now {_short(made.get(name))}" for name in different)
        raise UserError(f"the rollouts in {path} were made with other settings ({said}): {advice}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
