"""Questions in rows: from a file of JSON lines, and which of any list of rows are held out."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError

# A prompt, its answer (or a function that finds it when it is first wanted), and what the verifier may look at.
Question = tuple[str, str | Callable[[], str], dict[str, Any]]


class HeldOutRows:
    """A list of rows in two parts that share no question: some to hold out, the others to train on.

    Up to ``count`` questions are held out, and never more than half of the different ones; a row goes where its
    question is, so that a question that occurs twice is on one side.
    """

    def __init__(self, questions: list[str], count: int, seed: int) -> None:
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        different = list(dict.fromkeys(questions[i] for i in order))
        self.held_out = set(different[: min(count, len(different) // 2)])
        self._parts = (
            [i for i in order if questions[i] in self.held_out],
            [i for i in order if questions[i] not in self.held_out],
        )
        self._turn = functools.lru_cache(maxsize=4)(self._order_of_turn)

    def row(self, stream: int, index: int, held_out: bool) -> int:
        """Row number ``index`` of a stream: round after round of the same rows, each in an order of its own."""
        held_out = held_out and bool(self._parts[0])
        turn, place = divmod(index, len(self._parts[not held_out]))
        return self._turn(stream, turn, held_out)[place]

    def _order_of_turn(self, stream: int, turn: int, held_out: bool) -> list[int]:
        order = list(self._parts[not held_out])
        random.Random(f"{stream} {turn}").shuffle(order)
        return order


def read_questions(path: Path, task: str) -> list[Question]:
    """(prompt, answer, the whole line) of every line ``{"prompt": ..., "answer": ...}``.

    Raises UserError for a file that cannot be read, holds fewer than two questions, or has a bad line, named by its
    number.
    """
    if not str(path) or path == Path():
        raise UserError(f"task {task!r} needs a path: the file of JSON lines to read")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"path of task {task!r}, {path}, cannot be read: {error}") from error
    rows: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: every line must be {{"prompt": text, "answer": text or number}}, '
                f"got {line[:80]!r}"
            ) from error
        if not isinstance(prompt, str) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise UserError(
                f"{path}, line {number}: prompt must be text and answer text or a number, got {line[:80]!r}"
            )
        rows.append((prompt, str(answer), row))
    if len(rows) < 2:
        raise UserError(
            f"path of task {task!r}, {path}, holds {len(rows)} questions: at least 2 are needed, one to hold out"
        )
    return rows
