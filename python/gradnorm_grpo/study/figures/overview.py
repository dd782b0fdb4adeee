"""The picture at the top of the project's README: U of each task, U against gain, and the arms, in one line."""

from __future__ import annotations

import math
import re

from .arms import mean_differences
from .canvas import EDGE, PAPER, SMALL, SOFT, VERDICT_COLOURS, WIDTH, Sheet, fit, wrap
from .data import Record, answer_of, number, ordered, records, some
from .gain import cloud
from .imbalance import bars, loudest_first, pulls
from .rows import AXIS, empty, name_width, rows

_TITLE = "How hard each task pulls, what it gains, and what acting on it does"


def draw(answers: Record) -> Sheet:
    """The picture of three answers together."""
    imbalance, gain, arms = (answer_of(answers, name) for name in ("imbalance", "gain", "arms"))
    first, second, third = EDGE, 338.0, 584.0
    tasks = loudest_first(answers, imbalance)
    baseline = (arms.get("data") or {}).get("baseline")
    differences = [
        d for d in some(records(arms, "differences"), "value") if d.get("task") is None and d.get("when") == "end"
    ]
    others = ordered(answers, "arms", [d for d in differences if d.get("arm") != baseline], name="arm")
    panels = (
        (first, 292.0, "U of each task", imbalance),
        (second, 220.0, "U against gain", gain),
        (third, WIDTH - EDGE - third, f"Accuracy minus {baseline}" if baseline else "Arms", arms),
    )
    claims = [wrap(f"Claim: {_short(answer)}", width, SMALL) for _, width, _, answer in panels]
    lines = max(map(len, claims))
    head = 22 + 15.0 * (lines + 1) + 12
    high = max(216.0, 26.0 * len(tasks), 44.0 * len(others))
    seeds = answers.get("seeds") or []
    notes = [
        f"{len(tasks)} tasks, {len(seeds)} seed{'' if len(seeds) == 1 else 's'}. {bars(answers)} Small points and "
        "ticks: single seeds."
    ]
    if any(math.isfinite(number(r, "plug_in")) for r in records(imbalance, "overall")):
        notes[0] += " Hollow diamonds: the plug-in estimate, which counts noise as signal."
    sheet = Sheet(_TITLE, "", notes, head + high + AXIS)
    for (left, width, title, answer), claim in zip(panels, claims, strict=True):
        sheet.subtitle(left, 0, title, width)
        for i, line in enumerate(claim):
            sheet.text(left, sheet.top + 22 + 15 * (i + 0.5), line, fontsize=SMALL, color=SOFT)
        verdict = str(answer.get("verdict") or "undecided")
        shade = VERDICT_COLOURS.get(verdict, SOFT)
        place = sheet.top + 22 + 15 * (len(claim) + 0.5)
        sheet.text(left, place, f"→ {verdict}", fontsize=SMALL, color=shade, fontweight="bold")
    if tasks:
        gutter = name_width(tasks, 118)
        axes = rows(sheet, first, head, 296, tasks, high / len(tasks), gutter)
        pulls(axes, answers, imbalance, tasks, windows=False, row=high / len(tasks))
        axes.set_xlabel("U (symmetric logarithmic)")
    else:
        empty(sheet, first, head, 290, high, "U of no task is known.")
    across = records(gain, "across")
    if any(math.isfinite(number(r, "gain")) and math.isfinite(number(r, "u")) for r in across):
        cloud(sheet.axes(second + 46, head, 178, high), answers, across)
    else:
        empty(sheet, second, head, 220, high, "No held-out gain is known.")
    if others:
        _arms(sheet, answers, arms, others, (third, head, WIDTH - EDGE - third, high))
    else:
        empty(sheet, third, head, 200, high, "No arm to compare.")
    return sheet


def _short(answer: Record) -> str:
    """The claim without what follows a colon or stands in brackets: the page has all of it."""
    return re.split(r": | \(", str(answer.get("claim") or answer.get("question")))[0].rstrip(".") + "."


def _arms(
    sheet: Sheet, answers: Record, answer: Record, arms: list[str], box: tuple[float, float, float, float]
) -> None:
    """A row an arm, its name above its interval."""
    left, top, width, high = box
    row = high / len(arms)
    axes = rows(sheet, left, top, width - 4, arms, row, 0)
    mean_differences(axes, answers, answer, arms, row)
    axes.set_xlabel("difference of mean accuracy")
    for y, arm in enumerate(arms):
        ground = {"fc": PAPER, "ec": "none", "pad": 1.5}  # over the line at zero
        sheet.text(left, sheet.top + top + row * (y + 0.5) - 16, fit(arm, width, SMALL), fontsize=SMALL, bbox=ground)
