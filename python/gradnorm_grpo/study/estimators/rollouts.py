"""Stored rollouts: prompts and their groups as the model samples them where GRPO begins, scored and kept in a file.

A measurement that is repeated on the same rollouts differs by the estimator alone. Two files hold them: the tensors
(safetensors), and beside them, in JSON, the questions, the settings and the weights they were sampled with. The JSON is
written last: where it is missing, there are no stored rollouts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from ...checkpoint import sha256
from ...errors import StorageError, UserError
from ...loop import Batch, Grpo
from ...rollout import Rollouts
from ...runlog import whole, write_json
from ...tasks import Example

_FORMAT = 1
_TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
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

    def joined(name: str) -> Tensor:
        tensors = [getattr(part.rollouts, name) for part in parts]
        fill = grpo.tokenizer.pad_token_id if name.endswith("ids") else 0
        room = [max(tensor.shape[1] for tensor in tensors) - tensor.shape[1] for tensor in tensors]
        sides = [(more, 0) if name.startswith("prompt") else (0, more) for more in room]
        return torch.cat([pad(tensor, side, value=fill) for tensor, side in zip(tensors, sides, strict=True)])

    ended = torch.cat([part.rollouts.ended for part in parts])
    fields: dict[str, Any] = {name: joined(name) for name in _TOKENS}
    rollouts = Rollouts(**fields, ended=ended, group=parts[0].rollouts.group)
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
    settings = {name: value for name, value in dataclasses.asdict(grpo.settings).items() if name in _SETTINGS}
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(grpo.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    made = {"format": _FORMAT, "prompts": prompts, **settings, "weights": weights.hexdigest()}
    return dict(json.loads(json.dumps(made)))


def store(batch: Batch, made: dict[str, Any], path: Path) -> None:
    """Write both files, each whole or not at all, the JSON last."""
    rollouts, names = batch.rollouts, list(dict.fromkeys(batch.tasks))
    tensors = {name: getattr(rollouts, name) for name in (*_TOKENS, "ended")}
    tensors |= {"rewards": batch.rewards, "advantages": batch.advantages}
    tensors["task"] = torch.tensor([names.index(task) for task in batch.tasks])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        text = {
            "made_with": made,
            "sha256": sha256(path),
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
        whole = text["sha256"] == sha256(path)
        tensors = load_file(path) if whole else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the stored rollouts cannot be read ({error}): {advice}") from error
    if not whole:
        raise UserError(f"{path} is not the file that {path.with_suffix('.json').name} describes: {advice}")
    if made is not None:
        _refuse_others(text["made_with"], made, path, advice)
    fields: dict[str, Any] = {name: tensors[name].to(device) for name in (*_TOKENS, "ended")}
    rollouts = Rollouts(**fields, group=text["group"])
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
