"""Questions from a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError


def read_questions(path: Path, task: str) -> list[tuple[str, str, dict[str, Any]]]:
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
    rows: list[tuple[str, str, dict[str, Any]]] = []
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
