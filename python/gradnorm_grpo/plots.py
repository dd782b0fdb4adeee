"""One look for every picture of the application: palette, theme, text that fits, axes, marks and the SVG writer.

A point of matplotlib is a pixel of the picture. Pictures are drawn in the light theme's colours. `inline_svg` replaces
each colour by its CSS variable, so that a picture inside a page follows light, dark and print. `save_svg` keeps the
colours and adds white paper, for an image in a README. Text stays text, in whatever sans-serif font the reader has:
DejaVu Sans, in which the layout is measured, is wider than nearly all of them.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from .numbers import MINUS, clean, columns, power, shorten

Array: TypeAlias = NDArray[np.float64]

#: Colour name -> its value in the light and in the dark theme. A page declares them as CSS variables `--name`.
COLOURS = {
    "page": ("#f4f4f1", "#101214"),
    "paper": ("#ffffff", "#191c1f"),
    "ink": ("#1b1d20", "#e8e9ea"),
    "soft": ("#565b62", "#a9afb6"),
    "faint": ("#8c959f", "#7d858d"),
    "grid": ("#d9dadb", "#34393e"),
    "shade": ("#f0f1f2", "#22262a"),
    "accent": ("#0b62a4", "#7cc0f5"),
    "warn": ("#fff4d6", "#33290d"),
    "warn-edge": ("#d9a400", "#b98f14"),
    # Okabe and Ito's colours, which colour-blind readers can distinguish, darkened where they are pale on white.
    "task-0": ("#0072b2", "#4a9fdc"),
    "task-1": ("#d55e00", "#f08a45"),
    "task-2": ("#009e73", "#2cc295"),
    "task-3": ("#b8860b", "#e3b53c"),
    "task-4": ("#a8467f", "#dd8fbd"),
    "task-5": ("#2f9fd8", "#8fd3f7"),
    "task-6": ("#6b6f76", "#a4aab2"),
}
PAPER, INK, SOFT, FAINT, GRID, SHADE, BAND = (
    COLOURS[name][0] for name in ("paper", "ink", "soft", "faint", "grid", "shade", "warn")
)
PALETTE = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("task-"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")  # eleven: coprime to the seven colours
GROUND = {"fc": PAPER, "ec": "none", "pad": 1.5}  # behind text that stands over a line
VERDICT_COLOURS = {
    "supported": "#006b4f",
    "contradicted": "#a84300",
    "no difference larger than d": "#1f5f8b",
    "undecided": SOFT,
}
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}


def colour(index: int) -> str:
    """The colour of the task or arm at this place in the run or study."""
    return PALETTE[index % len(PALETTE)]


def marker(index: int) -> str:
    """The marker of the task at this place: together with its colour it differs from those of the next 76 tasks."""
    return MARKERS[index % len(MARKERS)]


def tint(shade: str, part: float) -> str:
    """The colour mixed with white: part 1 is the colour itself, 0 is white. For standalone pictures only."""
    return "#" + "".join(f"{round(255 - part * (255 - int(shade[i : i + 2], 16))):02x}" for i in (1, 3, 5))


def css_variables(dark: bool) -> Markup:
    """The palette as CSS declarations: ``--ink: #1b1d20; ...``."""
    return Markup(" ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items()))


TITLE, TEXT, SMALL = 15.0, 12.0, 11.0
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradnorm",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": TEXT,
    "text.parse_math": False,  # a task may be called $x$
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": SMALL,
    "axes.labelpad": 3,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT,
    "axes.titleweight": "bold",
    "axes.titlecolor": SOFT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.labelcolor": SOFT,
    "lines.solid_capstyle": "butt",  # an interval ends where its number says
    "path.simplify": False,  # it would join the gaps of steps in which a task was not drawn
}
_TICKS = {"color": FAINT, "labelcolor": SOFT, "labelsize": SMALL, "major.size": 0, "minor.size": 0, "major.pad": 5}
_RC |= {f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()}


@contextmanager
def theme() -> Iterator[None]:
    """Draw under the application's settings, whatever the user's matplotlibrc says."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        # The browser draws the text with the fonts that a name needs: that DejaVu Sans lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many pixels whose axes constrained layout places, with 4 pixels of free space around each."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=4 / 72, h_pad=4 / 72, wspace=0, hspace=0)
    return figure


SHEET_WIDTH = 800.0
SHEET_EDGE = 22.0  # free paper on the left and the right
_LINE = 1.4  # height of a line of text, in its size
_KEY = 19.0  # height of a line of the key


#: An entry of a key: marker ("-" and "--" for lines), colour, whether it is filled, text.
Entry: TypeAlias = tuple[str, str, bool, str]


def sheet(title: str, verdict: str, notes: Sequence[str], body: float, key: Sequence[Entry] = ()) -> Figure:
    """A standalone figure, 800 pixels wide, with a heading, a verdict, a key and notes.

    Arguments: title, wrapped where it is long; verdict, shown in a pill at the top right, or ""; notes, sentences below
    the panels that say how to read them; body, height of the panels in pixels; key, the entries of a legend of all
    panels, which stands under the heading.
    Returns: the figure. Axes that are added (`figure.subplots`, `figure.subplot_mosaic`) are laid out in the body
    together with their titles, tick labels and names: constrained layout.
    """
    inner = SHEET_WIDTH - 2 * SHEET_EDGE
    pill = text_width(verdict, SMALL, bold=True) + 22 if verdict else 0.0
    heading = wrap(title, inner - pill - 14, TITLE, bold=True)
    lines = [line for note in notes for line in wrap(note, inner, SMALL)]
    texts = [fit(text, inner - 40, SMALL) for *_, text in key]
    wide = max((text_width(text, SMALL) for text in texts), default=0.0) + 40
    columns = min(max(int(inner // wide), 1), max(len(key), 1))
    start = 16 + TITLE * _LINE * max(len(heading), 1) + 6
    above = start + _KEY * -(-len(key) // columns)
    below = SMALL * _LINE * len(lines) + 22 if lines else 10.0
    height = above + body + below
    figure = new_figure(SHEET_WIDTH, height)
    figure.set_facecolor(PAPER)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(
        w_pad=8 / 72, h_pad=6 / 72, rect=(SHEET_EDGE / SHEET_WIDTH, below / height, inner / SHEET_WIDTH, body / height)
    )

    def line(x: float, y: float, text: str, **style: Any) -> None:
        style = {"va": "center_baseline", "fontsize": SMALL, **style}
        figure.text(x / SHEET_WIDTH, 1 - y / height, text, **style).set_in_layout(False)

    for i, text in enumerate(heading):
        line(SHEET_EDGE, 16 + TITLE * _LINE * (i + 0.5), text, fontsize=TITLE, fontweight="bold")
    if verdict:
        box = {"boxstyle": "round,pad=0.45,rounding_size=0.9", "fc": VERDICT_COLOURS.get(verdict, SOFT), "ec": "none"}
        middle = SHEET_WIDTH - SHEET_EDGE - pill / 2
        line(middle, 16 + TITLE * _LINE / 2, verdict, fontweight="bold", color=PAPER, ha="center", bbox=box)
    # In the order of reading: along the rows, each entry in a column of its own.
    for i, ((mark, shade, filled, _), text) in enumerate(zip(key, texts, strict=True)):
        left, middle = SHEET_EDGE + wide * (i % columns), start + _KEY * (i // columns + 0.5)
        across = [left, left + 16] if mark in ("-", "--") else [left + 8]
        drawn = Line2D(
            [x / SHEET_WIDTH for x in across],
            [1 - middle / height] * len(across),
            transform=figure.transFigure,
            ls=mark if len(across) > 1 else "none",
            marker=None if len(across) > 1 else mark,
            lw=2.2,
            ms=7,
            color=shade if filled else PAPER,
            mec=shade,
            mew=1.5,
        )
        figure.add_artist(drawn).set_in_layout(False)
        line(left + 22, middle, text, color=SOFT)
    for i, text in enumerate(lines):
        line(SHEET_EDGE, above + body + 12 + SMALL * _LINE * (i + 0.5), text, color=SOFT)
    return figure


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
    return shorten(clean(name), width, lambda text: text_width(text, size))


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


def tick_text(value: float, _position: object = None) -> str:
    """An axis number: plain between 0.001 and 9999, else with a power of ten."""
    if value == 0 or abs(value) < 1e-300:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if -4 < exponent < 4:
        return f"{value:.10g}".replace("-", MINUS)
    lead = f"{value / 10.0**exponent:.3g}".replace("-", MINUS)
    return lead[:-1] + power(exponent)[1:] if lead in ("1", f"{MINUS}1") else lead + power(exponent)


def numbers(values: Iterable[object]) -> Array:
    """The values as float64; None and whatever else is not a number become NaN."""
    return np.array([float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in values])


def finite(*parts: Array) -> Array:
    """All finite numbers of the arrays, in one array."""
    joined = np.concatenate([np.ravel(p) for p in parts]) if parts else np.empty(0)
    return joined[np.isfinite(joined)]


def thin(length: int, most: int = 400) -> NDArray[np.int64]:
    """Indices of at most so many evenly spaced points, the first and the last among them: a screen shows no more."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(np.int64))


class _ClearTicks(FixedLocator):
    """Of the wanted ticks, in order of importance, those whose labels keep clear of the ones before.

    It chooses while the picture is drawn, since only then constrained layout has decided how long the axis is.
    """

    def __init__(self, axes: Axes, which: str, wanted: list[float]) -> None:
        super().__init__(wanted)
        self._axes, self._which, self._wanted = axes, which, wanted

    def __call__(self) -> list[float]:
        limits = {"x": self._axes.get_xlim(), "y": self._axes.get_ylim()}
        low, high = sorted(limits[self._which])
        wanted = [tick for tick in self._wanted if low <= tick <= high]
        cross = limits["y" if self._which == "x" else "x"][0]
        points = [(v, cross) if self._which == "x" else (cross, v) for v in wanted]
        pixels: Array = self._axes.transData.transform(np.reshape(points, (-1, 2)))
        at = pixels[:, 0 if self._which == "x" else 1]
        kept: list[int] = []
        for i, pixel in enumerate(at):
            if all(abs(pixel - at[k]) >= self._room(self._which, wanted[i], wanted[k]) for k in kept):
                kept.append(i)
        return sorted(wanted[i] for i in kept)

    @staticmethod
    def _room(which: str, one: float, other: float) -> float:
        if which == "y":
            return SMALL * 1.7
        return (text_width(tick_text(one), SMALL) + text_width(tick_text(other), SMALL)) / 2 + 12


def _axis(axes: Axes, which: str) -> Axis:
    return axes.xaxis if which == "x" else axes.yaxis


def _limits(axes: Axes, which: str, low: float, high: float) -> None:
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def ticks(axes: Axes, which: str, wanted: Iterable[float]) -> None:
    """Ticks at these places only, the important ones first, as far as their labels do not touch."""
    axis = _axis(axes, which)
    axis.set_major_locator(_ClearTicks(axes, which, [float(tick) for tick in wanted]))
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.set_minor_locator(NullLocator())


def zero_line(axes: Axes, which: str) -> None:
    """The line across the axes at zero of axis `which`."""
    (axes.axvline if which == "x" else axes.axhline)(0, color=INK, lw=1, zorder=1.5)


def linear(axes: Axes, which: str, ends: Array, *, zero: bool = False, most: int = 5, whole: bool = False) -> None:
    """A linear axis that holds the ends with some room, and zero, marked, if asked for; `whole`: ticks at integers."""
    known = finite(ends)
    if zero or not known.size:
        known = np.append(known, 0.0)
    low, high = float(known.min()), float(known.max())
    pad = 0.07 * (high - low) or 0.1 * abs(high) or 0.1
    _limits(axes, which, low - pad, high + pad)
    axis = _axis(axes, which)
    axis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(tick_text))
    if zero:
        zero_line(axes, which)


def logarithmic(axes: Axes, which: str, ends: Array, room: float = 1.25) -> tuple[float, float]:
    """A logarithmic axis that holds the positive ends with some room (0.1 to 10 if there are none); its limits."""
    known = finite(ends)
    known = known[known > 0]
    low, high = (float(known.min()) / room, float(known.max()) * room) if known.size else (0.1, 10.0)
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    _limits(axes, which, low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks(axes, which, (step * 10.0**e for step in steps for e in range(first, last + 1)))
    return low, high


def holding_zero(axes: Axes, which: str, ends: Array, sizes: Array) -> None:
    """A symmetric logarithmic axis from the least to the greatest end, with zero always on it and marked.

    Arguments: which, "x" or "y"; ends, everything that must be visible; sizes, magnitudes that should be
    distinguishable: the axis is linear below the decade of the smallest of them, at most three decades below the
    largest, so that the logarithmic part keeps its room. The linear part is shaded.
    """
    known, sizes = finite(ends), finite(np.abs(sizes))
    sizes = sizes[sizes > 0]
    threshold = 10.0 ** math.floor(math.log10(max(sizes.min(), sizes.max() * 1e-3))) if sizes.size else 1.0
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, threshold)
    low = low * 1.6 if low < -0.3 * threshold else -0.35 * threshold
    high = high * 1.6 if high > 0.3 * threshold else 0.35 * threshold
    (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=threshold, linscale=0.8)
    _limits(axes, which, low, high)
    span = axes.axvspan if which == "x" else axes.axhspan
    span(max(-threshold, low), min(threshold, high), color=SHADE, lw=0, zorder=0)
    zero_line(axes, which)
    decades = threshold * 10.0 ** np.arange(13)
    ticks(axes, which, [0.0, *decades[decades <= high], *(-decades[-decades >= low])])


def rows(axes: Axes, names: Sequence[str], width: float, places: Sequence[int] = ()) -> None:
    """Make the axes a list of rows, the first on top, with each name left of its row, cut to `width` pixels.

    With `places`, the tasks' places in the study, the task's marker stands between name and row. Names are left out
    where `width` is 0.
    """
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [fit(name, width) for name in names] if width else [])
    axes.tick_params(axis="y", labelsize=TEXT, labelcolor=INK, pad=28 if places else 10)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    for y in range(1, len(names)):
        axes.axhline(y - 0.5, color=GRID, lw=0.8, zorder=0.5)
    for y, place in enumerate(places):
        left = axes.get_yaxis_transform() + ScaledTranslation(-16 / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot([0], [y], ls="none", marker=marker(place), ms=7, color=colour(place), transform=left, clip_on=False)


def bars(
    axes: Axes, at: Array, low: Array, high: Array, shade: str, width: float, alpha: float = 1.0, which: str = "y"
) -> None:
    """Error bars from low to high along axis `which`, at these places of the other: one line with gaps in it, and so
    one element of the SVG. On a logarithmic axis an end at or below zero is drawn to the end of the axis."""
    if _axis(axes, which).get_scale() == "log":
        floor = (axes.get_xlim() if which == "x" else axes.get_ylim())[0]
        low, high = (np.where((v > 0) | np.isnan(v), v, floor) for v in (low, high))
    gap = np.full(np.shape(at), np.nan)
    across, along = np.stack([at, at, gap], 1).ravel(), np.stack([low, high, gap], 1).ravel()
    x, y = (along, across) if which == "x" else (across, along)
    axes.plot(x, y, color=shade, lw=width, alpha=alpha, zorder=2)


def interval(
    axes: Axes,
    y: float,
    found: Sequence[float],
    shade: str = INK,
    *,
    mark: str = "o",
    size: float = 8.0,
    filled: bool = True,
    width: float = 2.0,
) -> None:
    """A value with its interval (value, low, high) on a row; an arrow where only the low end is known.

    Only what is known is drawn; the marker is hollow where `filled` is false.
    """
    value, low, high = found
    if math.isfinite(low):
        known = math.isfinite(high)
        end = high if known else axes.get_xlim()[1]
        axes.plot([low, end], [y, y], color=shade, lw=width, zorder=3)
        if not known:
            axes.plot([end], [y], ls="none", marker=">", ms=7, color=shade, clip_on=False, zorder=3)
    if math.isfinite(value):
        face = shade if filled else PAPER
        axes.plot([value], [y], ls="none", marker=mark, ms=size, color=face, mec=shade, mew=1.6, zorder=4)


_SVG = "{http://www.w3.org/2000/svg}"
_ids = itertools.count()


def inline_svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element for a page; `label` is what a screen reader says of it.

    No namespaces, ids unlike those of other pictures, colours as CSS variables.
    """
    root = _drawn(figure)
    prefix = f"f{next(_ids)}-"
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _rewrite(key, value, prefix) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def save_svg(figure: Figure, path: Path, label: str) -> Path:
    """Write the figure as a standalone SVG; `label` is its title, for screen readers too.

    The same figure gives the same bytes. Returns the path.
    """
    root = _drawn(figure)
    box, text = root.attrib["viewBox"], clean(label)
    _, _, width, height = box.split()
    root.attrib = {"viewBox": box, "width": width, "height": height, "role": "img", "aria-label": text}
    title = ElementTree.Element(f"{_SVG}title")
    title.text = text
    root.insert(0, title)
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")
    return path


def _drawn(figure: Figure) -> ElementTree.Element:
    """matplotlib's SVG as XML, without metadata, indentation and what a screen cannot show."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for child in root.findall(f"{_SVG}metadata"):
        root.remove(child)
    ids: dict[str, str] = {}
    for element in root.iter():
        if element.text and not element.text.strip() and element.tag != f"{_SVG}text":
            element.text = None
        element.tail = None
        _share_style(element)
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        for key in element.attrib.keys() & {"d", "x", "y", "points", "transform"}:
            element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", element.attrib[key]))
        # matplotlib's ids hash exact coordinates, and the last bits of a layout differ from one time to the next.
        for key in element.attrib.keys() & {"id", "clip-path", "{http://www.w3.org/1999/xlink}href"}:
            short = re.sub(
                r"\b([a-z])[0-9a-f]{10}\b", lambda m: ids.setdefault(m[0], f"{m[1]}{len(ids)}"), element.attrib[key]
            )
            element.set(key, short)
    return root


def _share_style(element: ElementTree.Element) -> None:
    """Give the style that every dot of a series repeats to their group, once."""
    styles = {child.get("style") for child in element}
    if len(element) < 2 or len(styles) > 1 or not all(child.tag.endswith("use") for child in element):
        return
    (style,) = styles
    for child in element:
        child.attrib.pop("style", None)
    if style:
        element.set("style", style)


def _rewrite(key: str, value: str, prefix: str) -> str:
    name = key.rpartition("}")[2]
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{prefix}", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: _VARIABLES.get(m[0], m[0]), value)
