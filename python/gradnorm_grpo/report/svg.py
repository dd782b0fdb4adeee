"""Turns a matplotlib figure into SVG that may stand inline in the page: no namespaces, own ids, colours from the theme.

Figures are drawn in placeholder colours. Each is replaced by a CSS variable, so one picture follows light, dark and
print, and a task has the same colour in every picture. Text stays text: it can be searched, and takes the page's font.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholder -> CSS variable. Any colours would do, as long as no two are alike.
INK, SOFT, GRID, PAPER, SHADE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", PAPER: "--paper", SHADE: "--shade"}
# Okabe and Ito's palette (their yellow, too pale on white, is darkened in style.css), told apart by the colour-blind.
NUM_COLOURS = 7
_VARIABLES |= {f"#0101{16 + i:02x}": f"--task-{i}" for i in range(NUM_COLOURS)}

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradnorm",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,  # a task may be called $x$
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "lines.solid_capstyle": "round",
    "path.simplify": False,  # it would join the gaps of steps in which a task was not drawn
}
_ids = itertools.count()


def task_colour(index: int) -> str:
    """The placeholder colour of the task at this place in run.json."""
    return f"#0101{16 + index % NUM_COLOURS:02x}"


@contextmanager
def theme(settings: Mapping[str, Any] = _RC) -> Iterator[None]:
    """Draw under these settings (the report's), whatever the user's matplotlibrc says."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        # The browser draws the text, with whatever fonts a name needs: that matplotlib's own lacks a glyph is no news.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many CSS pixels (a point of the picture is one pixel of the page)."""
    return Figure(figsize=(width / 72, height / 72), dpi=72)


def inline_svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element for the page; `label` is what a screen reader says of it."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    prefix = f"f{next(_ids)}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _rewrite(key, value, prefix) for key, value in element.attrib.items()}
        _slim(element)
        # Whitespace between elements is only matplotlib's indentation.
        if element.text and not element.text.strip():
            element.text = None
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _slim(element: ElementTree.Element) -> None:
    """Leave out what a screen cannot show: hundredths of a pixel, and a style repeated on every dot of a series."""
    for key in element.attrib.keys() & {"d", "x", "y", "points"}:
        element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", element.attrib[key]))
    if element.tag == "g" and share_style(element):
        element.set("style", _rewrite("style", element.attrib["style"], ""))


def share_style(element: ElementTree.Element) -> bool:
    """Give the style that every dot of a series repeats to their group, once; whether the group has it now."""
    styles = {child.get("style") for child in element}
    if len(element) < 2 or len(styles) > 1 or not all(child.tag.endswith("use") for child in element):
        return False
    (style,) = styles
    for child in element:
        child.attrib.pop("style", None)
    if style:
        element.set("style", style)
    return bool(style)


def _rewrite(key: str, value: str, prefix: str) -> str:
    name = key.rpartition("}")[2]
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{prefix}", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], value)
