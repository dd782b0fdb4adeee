"""The study's figures: one standalone SVG per question, and an overview for the project's README."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .. import plots
from .questions import arms, asked, gain, imbalance
from .questions.drawing import AXIS, empty, head_height, headed
from .questions.reading import Answers, Reading, reading

#: The questions in the overview, left to right.
OVERVIEW = ("imbalance", "gain", "arms")
_TITLE = "How hard each task pulls, what it gains, and what acting on it does"


def draw(answers: Answers, folder: Path | str) -> list[Path]:
    """Draw every answer, and the overview of three of them where the study asked all three.

    Arguments: answers, the content of answers.json; folder, where <id>.svg and overview.svg are written (it is made).
    An answer that is missing, or has no data, gives a figure that says so.
    Returns: the files, in the order of the questions, overview last. The same answers give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    questions = asked(answers)
    found = {name: reading(answers, name) for name in questions}
    files = []
    with plots.theme():
        for name, a in found.items():
            label = f"{a.question} {a.verdict}: {a.sentence}"
            files.append(plots.save_svg(questions[name].draw(a), folder / f"{name}.svg", label))
        if not questions.keys() >= set(OVERVIEW):
            return files
        shown = [found[name] for name in OVERVIEW]
        files.append(plots.save_svg(overview(*shown), folder / "overview.svg", " ".join(a.sentence for a in shown)))
    return files


def overview(pull: Reading, gained: Reading, compared: Reading) -> Figure:
    """U of each task, U against gain, and the arms, side by side."""
    found = (pull, gained, compared)
    tasks, others = imbalance.loudest_first(pull), arms.compared_arms(compared)
    baseline, seeds = compared.data.get("baseline"), len(pull.seeds)
    note = (
        f"{len(tasks)} tasks, {seeds} seed{'' if seeds == 1 else 's'}. {imbalance.bars(pull)} Small points and ticks: "
        "single seeds."
    )
    if any(math.isfinite(r["plug_in"]) for r in pull.rows("overall")):
        note += " Hollow diamonds: the plug-in estimate, which counts noise as signal."
    high = max(216.0, 26.0 * len(tasks), 44.0 * len(others))
    titles = ("U of each task", "U against gain", f"Accuracy minus {baseline}" if baseline else "Arms")
    widths = (292.0, 232.0, 216.0)
    claims = [plots.wrap(f"Claim: {_short(a)}", w - 24, plots.SMALL) for a, w in zip(found, widths, strict=True)]
    body = high + AXIS
    figure = plots.sheet(_TITLE, "", [note], body + head_height(max(map(len, claims)) + 1))
    heads = [(plots.fit(t, w - 24), claim) for t, w, claim in zip(titles, widths, claims, strict=True)]
    left, middle, right = headed(figure, heads, body, widths, [a.verdict or "undecided" for a in found])
    if tasks:
        plots.rows(left, tasks, 118)
        imbalance.pulls(left, pull, tasks, high / len(tasks))
    else:
        empty(left, "U of no task is known.")
    gain.cloud(middle, gained, gained.rows("across"))
    if others:
        plots.rows(right, others, 0)
        arms.mean_differences(right, compared, others, high / len(others))
        right.set_xlabel("difference of mean accuracy")
        for y, arm in enumerate(others):
            style: dict[str, Any] = {"va": "center_baseline", "fontsize": plots.SMALL, "bbox": plots.GROUND}
            place: dict[str, Any] = {"xycoords": right.get_yaxis_transform(), "textcoords": "offset points"}
            right.annotate(plots.fit(arm, widths[2] - 24, plots.SMALL), (0, y), xytext=(0, 16), **place, **style)
    else:
        empty(right, "No arm to compare.")
    return figure


def _short(a: Reading) -> str:
    """The claim without what follows a colon or stands in brackets: the page has all of it."""
    return re.split(r": | \(", a.claim or a.question)[0].rstrip(".") + "."
