"""The study's pictures: one standalone SVG a question, and one for the project's README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import arms, estimators, explain, gain, imbalance, last_block, overview
from .canvas import Sheet, theme
from .data import IDS, answer_of

_DRAWERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Sheet]] = {
    "imbalance": imbalance.draw,
    "last_block": last_block.draw,
    "gain": gain.draw,
    "explain": explain.draw,
    "arms": arms.draw,
    "estimators": estimators.draw,
}


def draw(answers: Mapping[str, Any], folder: Path | str) -> list[Path]:
    """Draw every answer, and the overview of three of them.

    Arguments: answers, the content of answers.json; folder, where <id>.svg and overview.svg are written (it is made).
    An answer that is missing, or has no data, gives a picture that says so.
    Returns: the files, in the order of the questions, overview last. The same answers give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with theme():
        for name in IDS:
            answer = answer_of(answers, name)
            label = f"{answer.get('question')} {answer.get('verdict')}: {answer.get('sentence')}"
            files.append(_DRAWERS[name](answers, answer).save(folder / f"{name}.svg", label))
        sentences = [str(answer_of(answers, name).get("sentence")) for name in ("imbalance", "gain", "arms")]
        files.append(overview.draw(answers).save(folder / "overview.svg", " ".join(sentences)))
    return files
