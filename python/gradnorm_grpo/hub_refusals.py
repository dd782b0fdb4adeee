"""Rewards that would run what a model wrote are refused, whatever words ask for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import UserError

# Whole words, so that "format: r1_code" and "dataset: codeio" are no reason; these two are names of ours.
_RUNNING = {
    *("exec", "execute", "executes", "executed", "execution", "executor", "eval", "evaluate", "run", "runs", "runner"),
    *("sandbox", "sandboxed", "firejail", "docker", "container", "subprocess", "interpreter", "interpret", "jupyter"),
    *("unittest", "unittests", "unit", "pytest", "test", "tests", "testcase", "testcases", "functional", "stdio"),
    *("python", "javascript", "bash", "shell", "code", "coding", "program", "compile", "compiler", "judge"),
}
_NOT_RUNNING = {"use_eval"}  # arc_agi's choice of its evaluation questions
INSTEAD = (
    "no reward here runs text a model wrote. Use a task whose answer is compared instead: codeio or bf of "
    "reasoning_gym, or source datasets with format r1_code, whose rows carry a program, an input and its output, so "
    "that the model predicts the output"
)


def asks_to_run(text: str) -> bool:
    """Whether one of the words of ``text`` (split at case changes, digits and signs) means running a program."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())
    return any(word in _RUNNING for word in words)


def refuse_running(task: str, raw: Mapping[str, Any], known_keys: set[str], names: set[str]) -> None:
    """Raise UserError if a task's entry in YAML asks for a completion to be run.

    Looked at: its verifier and format unless they are among ``names`` (ours), keys that are not among ``known_keys``,
    and the keys of its config, at any depth.
    """
    for key in ("verifier", "format"):
        value = raw.get(key)
        if isinstance(value, str) and value not in names and asks_to_run(value):
            raise UserError(f"{key} {value!r} of task {task!r} is refused: {INSTEAD}")
        if isinstance(value, Mapping):
            raise UserError(f"{key} of task {task!r} must be a name, got a mapping; {INSTEAD}")
    for key in raw:
        if key not in known_keys and (asks_to_run(str(key)) or _runs_inside(raw[key]) or key == "reward_model"):
            raise UserError(f"{key!r} of task {task!r} is refused: {INSTEAD}")
    if (found := _runs_inside(raw.get("config"))) is not None:
        raise UserError(f"{found!r} in the config of task {task!r} is refused: {INSTEAD}")


def _runs_inside(value: Any) -> str | None:
    """The first key, at any depth of mappings, that asks for something to be run."""
    if not isinstance(value, Mapping):
        return None
    for key, inner in value.items():
        if asks_to_run(str(key)) and key not in _NOT_RUNNING:
            return str(key)
        if (found := _runs_inside(inner)) is not None:
            return found
    return None
