"""What every picture of the study shares: size, colours, heading and notes, and how it becomes a standalone SVG.

A picture is 800 pixels wide, a point of matplotlib being a pixel. It stands in a README as an image, so it brings its
own white paper, which a dark page shows as a card. Text stays text, in whatever sans-serif font the reader has: DejaVu
Sans, by which the room is measured, is wider than nearly all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path

from ... import plots
from ...numbers import clean, columns

WIDTH = 800.0
EDGE = 22.0  # free paper on the left and the right
INK, SOFT, FAINT, GRID, PAPER, SHADE, BAND = "#1f2328", "#57606a", "#8c959f", "#e4e7eb", "#ffffff", "#f6f8fa", "#fdf0d5"
# Okabe and Ito's colours, told apart by the colour-blind; their yellow is too pale on white and is darkened.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a7a00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")  # eleven: shares no factor with the seven colours
VERDICT_COLOURS = {"supported": "#006b4f", "contradicted": "#a84300", "undecided": "#57606a"}
TEXT, SMALL, TITLE = 12.0, 11.0, 15.0
_LINE = 1.4  # height of a line of text, in its size
_KEY = 19.0  # height of a line of a key
#: An entry of a key: marker ("-" and "--" for lines), colour, whether it is filled, text.
Entry = tuple[str, str, bool, str]

theme = plots.theme


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = TEXT, bold: bool = False) -> float:
    """Width of one line of text in pixels, as DejaVu Sans has it; ideographs count as one em each."""
    text = clean(text)
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    return float(width) + 0.4 * size * max(columns(text) - len(text), 0)


def fit(name: object, width: float, size: float = TEXT) -> str:
    """The name as one clean line, cut with an ellipsis where it is wider than so many pixels."""
    text = clean(name)
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float, size: float = TEXT, bold: bool = False) -> list[str]:
    """The text in lines of at most so many pixels, broken at blanks; a single longer word is cut."""
    lines: list[str] = []
    for word in clean(text).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size, bold) <= width:
            lines[-1] = joined
        else:
            lines.append(fit(word, width, size))
    return lines


def tint(shade: str, part: float) -> str:
    """The colour mixed with white: part 1 is the colour itself, 0 is white."""
    return "#" + "".join(f"{round(255 - part * (255 - int(shade[i : i + 2], 16))):02x}" for i in (1, 3, 5))


def colour(index: int) -> str:
    """The colour of the task or arm at this place in the study."""
    return PALETTE[index % len(PALETTE)]


def marker(index: int) -> str:
    """The marker of the task at this place in the study: with its colour, unlike those of 76 others."""
    return MARKERS[index % len(MARKERS)]


def _flow(entries: Sequence[Entry], width: float) -> list[tuple[float, float]]:
    """Where the entries of a key stand, in lines of at most `width` pixels."""
    places: list[tuple[float, float]] = []
    x = y = 0.0
    for *_, text in entries:
        needed = 22 + text_width(fit(text, width - 28, SMALL), SMALL)
        if x > 0 and x + needed > width:
            x, y = 0.0, y + _KEY
        places.append((x, y))
        x += needed + 18
    return places


def legend_height(entries: Sequence[Entry], width: float) -> float:
    """Pixels that the key takes."""
    places = _flow(entries, width)
    return places[-1][1] + _KEY if places else 0.0


class Sheet:
    """A figure with a heading, a verdict and notes; panels are placed by pixels, counted from the top left.

    Arguments: title, one or two lines' worth; verdict, shown in a pill at the right, or ""; notes, sentences below the
    panels that say how to read them; body, height of what lies between, in pixels.
    """

    def __init__(self, title: str, verdict: str, notes: Sequence[str], body: float) -> None:
        pill = text_width(verdict, SMALL, bold=True) + 22 if verdict else 0.0
        heading = wrap(title, WIDTH - 2 * EDGE - pill - 14, TITLE, bold=True)
        lines = [line for note in notes for line in wrap(note, WIDTH - 2 * EDGE, SMALL)]
        self.top = 16 + TITLE * _LINE * max(len(heading), 1) + 8
        below = (SMALL * _LINE * len(lines) + 24) if lines else 12.0
        self.height = self.top + body + below
        self.figure = Figure(figsize=(WIDTH / 72, self.height / 72), dpi=72, facecolor=PAPER)
        for i, line in enumerate(heading):
            self.text(EDGE, 16 + TITLE * (_LINE * i + 0.5 * _LINE), line, fontsize=TITLE, fontweight="bold")
        if verdict:
            self._pill(verdict, pill)
        for i, line in enumerate(lines):
            self.text(EDGE, self.top + body + 12 + SMALL * _LINE * (i + 0.5), line, fontsize=SMALL, color=SOFT)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text with its middle at this height."""
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **{"va": "center_baseline", **style})

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at this place, `top` counted from the end of the heading."""
        return self.figure.add_axes(
            (left / WIDTH, 1 - (self.top + top + height) / self.height, width / WIDTH, height / self.height)
        )

    def subtitle(self, left: float, top: float, text: str, width: float = WIDTH) -> None:
        """A panel's own heading; it takes 20 pixels."""
        self.text(left, self.top + top + 8, fit(text, width, TEXT), fontsize=TEXT, fontweight="bold", color=SOFT)

    def legend(self, left: float, top: float, entries: Sequence[Entry], width: float) -> None:
        """A key in lines of at most `width` pixels; see legend_height() for the room it takes."""
        for (x, y), (shape, shade, filled, text) in zip(_flow(entries, width), entries, strict=True):
            middle = self.top + top + y + _KEY / 2
            self.mark(left + x + 8, middle, shape, shade, filled)
            self.text(left + x + 22, middle, fit(text, width - 28, SMALL), fontsize=SMALL, color=SOFT)

    def mark(self, x: float, y: float, shape: str, tint: str, filled: bool) -> None:
        """A marker, or for "-" and "--" a stretch of line, at this place of the whole figure."""
        across = [x - 8, x + 8] if shape in ("-", "--") else [x]
        mark = Line2D(
            [a / WIDTH for a in across],
            [1 - y / self.height] * len(across),
            transform=self.figure.transFigure,
            ls=shape if shape in ("-", "--") else "none",
            marker=None if shape in ("-", "--") else shape,
            lw=2.2,
            ms=7,
            color=tint if filled else PAPER,
            mec=tint,
            mew=1.5,
        )
        self.figure.add_artist(mark)

    def _pill(self, verdict: str, width: float) -> None:
        high, fill = 21.0, VERDICT_COLOURS.get(verdict, SOFT)
        left, middle = WIDTH - EDGE - width, 16 + TITLE * _LINE / 2
        box = FancyBboxPatch(
            (left, self.height - middle - high / 2),
            width,
            high,
            boxstyle=f"round,pad=0,rounding_size={high / 2}",
            transform=None,
            fc=fill,
            ec="none",
        )
        self.figure.add_artist(box)
        self.text(left + width / 2, middle, verdict, fontsize=SMALL, fontweight="bold", color=PAPER, ha="center")

    def save(self, path: Path, label: str) -> Path:
        """Write the figure as SVG; `label` is what a screen reader says of it. The same figure gives the same bytes."""
        return plots.save_svg(self.figure, path, clean(label))
