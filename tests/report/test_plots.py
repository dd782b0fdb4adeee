"""The plot theme: palette, text that fits, ticks that do not touch, and SVG that is the same every time."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from gradnorm_grpo.plots import (
    COLOURS,
    INK,
    MARKERS,
    PALETTE,
    SHEET_WIDTH,
    SMALL,
    bars,
    colour,
    css_variables,
    fit,
    holding_zero,
    inline_svg,
    interval,
    linear,
    logarithmic,
    marker,
    new_figure,
    rows,
    save_svg,
    sheet,
    text_width,
    theme,
    thin,
    tick_text,
    wrap,
)

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["gcd", "a name that is much longer than the room it has " * 3, "$x$ 数え上げ", "z\n\ud800"]


def draw() -> Figure:
    """A sheet with rows, an axis that holds zero, a logarithmic axis and a key."""
    key = [(marker(i), colour(i), i % 2 == 0, name) for i, name in enumerate(NAMES)] + [("--", INK, True, "line")]
    figure = sheet(
        "A question that is long enough to need a second line of the heading? " * 2, "supported", ["n."], 400, key
    )
    axes = figure.subplot_mosaic([["left", "right"], ["below", "below"]])
    u = np.array([0.04, 0.01, -0.002, np.nan])
    rows(axes["left"], NAMES, 150, range(4))
    holding_zero(axes["left"], "x", np.concatenate([u - 0.01, u + 0.01]), u)
    for y, value in enumerate(u):
        interval(axes["left"], y, (value, value - 0.01, value + 0.01 if y else np.nan), colour(y))
    logarithmic(axes["right"], "y", np.array([1.0, 2e6]))
    x = np.arange(1.0, 30.0)
    bars(axes["right"], x, x - 3, x * 9, INK, 1.0)
    linear(axes["below"], "x", x, zero=True, whole=True)
    return figure


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with theme():
            save_svg(draw(), tmp_path / name, "label")
    drawn = (tmp_path / "a").read_bytes()
    assert drawn == (tmp_path / "b").read_bytes()
    assert b"metadata" not in drawn and b"<dc:date>" not in drawn  # where matplotlib puts the date


def test_a_users_own_settings_do_not_reach_the_picture(tmp_path: Path) -> None:
    with theme():
        save_svg(draw(), tmp_path / "a", "label")
    matplotlib.rcParams.update({"font.size": 40.0, "axes.grid": False, "text.usetex": True, "svg.hashsalt": "mine"})
    try:
        with theme():
            save_svg(draw(), tmp_path / "b", "label")
        assert matplotlib.rcParams["font.size"] == 40.0
    finally:
        matplotlib.rcdefaults()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_standalone_picture_has_text_a_title_and_its_colours(tmp_path: Path) -> None:
    with theme():
        root = ElementTree.fromstring(save_svg(draw(), tmp_path / "a.svg", 'say "<hi>"').read_text(encoding="utf-8"))
    assert root.attrib["aria-label"] == 'say "<hi>"' and root.attrib["role"] == "img"
    assert root[0].tag == f"{SVG}title" and root[0].text == 'say "<hi>"'
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    assert {"gcd", "$x$ 数え上げ", "supported", "line", "n."} <= set(texts)
    assert any(text.endswith("…") for text in texts)
    assert "var(--" not in ElementTree.tostring(root, encoding="unicode")


def test_no_text_of_a_sheet_runs_off_the_paper(tmp_path: Path) -> None:
    with theme():
        root = ElementTree.fromstring(save_svg(draw(), tmp_path / "a.svg", "").read_text(encoding="utf-8"))
    for element in root.iter(f"{SVG}text"):
        style = element.get("style", "")
        size = float(re.search(r"([\d.]+)px", style)[1])  # type: ignore[index]
        width = text_width("".join(element.itertext()), size, bold="700" in style or "bold" in style)
        x = float(element.get("x") or 0)
        left = x - (width if "anchor: end" in style else width / 2 if "anchor: middle" in style else 0)
        assert left > -1 and left + width < SHEET_WIDTH + 1


def test_an_inline_picture_has_only_the_themes_variables_and_its_own_ids() -> None:
    with theme():
        pictures = [inline_svg(draw(), "a <label>") for _ in range(2)]
    ids = [set(re.findall(r'id="([^"]+)"', picture)) for picture in pictures]
    assert ids[0] and not ids[0] & ids[1]
    for picture in pictures:
        assert not re.search(r"xmlns|xlink", picture)
        # What is no colour of the theme: tint() and verdicts, which stand on white paper only.
        assert set(re.findall(r"#[0-9a-f]{6}\b", picture)) <= {"#006b4f"}
        assert set(re.findall(r"var\(--([\w-]+)\)", picture)) <= set(COLOURS)
        assert 'aria-label="a &lt;label&gt;"' in picture


def test_the_palette_is_declared_for_both_themes() -> None:
    assert len(set(PALETTE)) == len(PALETTE) == 7
    for dark in (False, True):
        declared = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css_variables(dark)))
        assert declared == {name: pair[dark] for name, pair in COLOURS.items()}
    pairs = {(colour(i), marker(i)) for i in range(77)}
    assert len(pairs) == 77 == len(PALETTE) * len(MARKERS)


@pytest.mark.parametrize("width", [300, 800])
def test_tick_labels_do_not_touch(width: float) -> None:
    with theme():
        figure = new_figure(width, 120)
        axes = figure.subplots()
        holding_zero(axes, "x", np.array([-1e-7, 3.0]), np.array([1e-3, 3.0]))
        figure.draw_without_rendering()
        labels = [(axes.transData.transform((tick, 0))[0], tick_text(tick)) for tick in axes.get_xticks()]
    assert 0.0 in axes.get_xticks()
    for (x, text), (following, other) in itertools.pairwise(labels):
        assert following - x > (text_width(text, SMALL) + text_width(other, SMALL)) / 2


def test_constrained_layout_makes_room_for_the_names() -> None:
    lefts = []
    for name in ("a", "a much longer name"):
        with theme():
            figure = new_figure(400, 100)
            axes = figure.subplots()
            rows(axes, [name], 300)
            figure.draw_without_rendering()
        lefts.append(axes.get_position().x0 * 400)
    assert lefts[1] - lefts[0] == pytest.approx(text_width("a much longer name") - text_width("a"), abs=3)


def test_text_is_cut_and_wrapped_to_its_room() -> None:
    assert fit("gcd", 200) == "gcd" and fit("a\nb", 200) == "a\ufffdb"
    cut = fit("z" * 90, 100)
    assert cut.endswith("…") and text_width(cut) <= 100 < text_width(cut + "zz")
    lines = wrap("several words and one_that_is_much_too_long_for_any_line", 120)
    assert len(lines) > 1 and all(text_width(line) <= 120 for line in lines)
    assert text_width("数") > 0.9 * 12


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (-3.0, "−3"), (1e4, "10⁴"), (-1e-5, "−10⁻⁵"), (2.5e6, "2.5×10⁶"), (0.001, "0.001")],
)
def test_axis_numbers(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_a_long_series_is_thinned_evenly() -> None:
    kept = thin(10_000, 50)
    assert (kept[0], kept[-1], len(kept)) == (0, 9_999, 50)
    assert np.ptp(np.diff(kept)) <= 1
    assert thin(3, 50).tolist() == [0, 1, 2]
