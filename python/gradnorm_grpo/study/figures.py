"""The study's figures: one standalone SVG per question, and an overview for the project's README."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .. import plots
from .questions import QUESTIONS, arms, gain, imbalance
from .questions.common import Record, answer_of, records, value_of
from .questions.drawing import AXIS, empty, head_height, headed, row_panel

_TITLE = "How hard each task pulls, what it gains, and what acting on it does"


def draw(answers: Record, folder: Path | str) -> list[Path]:
    """Draw every answer, and the overview of three of them.

    Arguments: answers, the content of answers.json; folder, where <id>.svg and overview.svg are written (it is made).
    An answer that is missing, or has no data, gives a figure that says so.
    Returns: the files, in the order of the questions, overview last. The same answers give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with plots.theme():
        for name, question in QUESTIONS.items():
            answer = answer_of(answers, name)
            label = f"{answer.get('question')} {answer.get('verdict')}: {answer.get('sentence')}"
            files.append(plots.save_svg(question.draw(answers, answer), folder / f"{name}.svg", label))
        sentences = [str(answer_of(answers, name).get("sentence")) for name in ("imbalance", "gain", "arms")]
        files.append(plots.save_svg(overview(answers), folder / "overview.svg", " ".join(sentences)))
    return files


def overview(answers: Record) -> Figure:
    """U of each task, U against gain, and the arms, side by side."""
    found = [answer_of(answers, name) for name in ("imbalance", "gain", "arms")]
    tasks, others = imbalance.loudest_first(answers, found[0]), arms.compared_arms(answers, found[2])
    baseline = (found[2].get("data") or {}).get("baseline")
    seeds = answers.get("seeds") or []
    note = (
        f"{len(tasks)} tasks, {len(seeds)} seed{'' if len(seeds) == 1 else 's'}. {imbalance.bars(answers)} Small "
        "points and ticks: single seeds."
    )
    if any(math.isfinite(value_of(r, "plug_in")) for r in records(found[0], "overall")):
        note += " Hollow diamonds: the plug-in estimate, which counts noise as signal."
    high = max(216.0, 26.0 * len(tasks), 44.0 * len(others))
    titles = ("U of each task", "U against gain", f"Accuracy minus {baseline}" if baseline else "Arms")
    widths = (292.0, 232.0, 216.0)
    claims = [plots.wrap(f"Claim: {_short(a)}", w - 24, plots.SMALL) for a, w in zip(found, widths, strict=True)]
    body = high + AXIS
    figure = plots.sheet(_TITLE, "", [note], body + head_height(max(map(len, claims)) + 1))
    heads = [(plots.fit(t, w - 24), claim) for t, w, claim in zip(titles, widths, claims, strict=True)]
    panels = headed(figure, heads, body, widths, [str(answer.get("verdict") or "undecided") for answer in found])
    row = high / max(len(tasks), 1)
    if tasks:
        row_panel(panels[0], answers, tasks, 118)
        imbalance.pulls(panels[0], answers, found[0], tasks, row, windows=False)
    else:
        empty(panels[0], "U of no task is known.")
    gain.cloud(panels[1], answers, records(found[1], "across"))
    if others:
        row_panel(panels[2], answers, others, 0)
        arms.mean_differences(panels[2], answers, found[2], others, high / len(others))
        panels[2].set_xlabel("difference of mean accuracy")
        for y, arm in enumerate(others):
            ground = {"fc": plots.PAPER, "ec": "none", "pad": 1.5}  # over the line at zero
            style: dict[str, Any] = {"va": "center_baseline", "fontsize": plots.SMALL, "bbox": ground}
            place: dict[str, Any] = {"xycoords": panels[2].get_yaxis_transform(), "textcoords": "offset points"}
            panels[2].annotate(plots.fit(arm, widths[2] - 24, plots.SMALL), (0, y), xytext=(0, 16), **place, **style)
    else:
        empty(panels[2], "No arm to compare.")
    return figure


def _short(answer: Record) -> str:
    """The claim without what follows a colon or stands in brackets: the page has all of it."""
    return re.split(r": | \(", str(answer.get("claim") or answer.get("question")))[0].rstrip(".") + "."
