"""The study's pictures: made, valid, small, the same bytes twice, and saying so where there is nothing to draw."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gradnorm_grpo.plots import SHEET_WIDTH as WIDTH
from gradnorm_grpo.plots import fit, text_width
from gradnorm_grpo.study.figures import draw
from tests.study.study_made_up import FACTORS, HOSTILE, IDS, SIX, made_up

SVG = "{http://www.w3.org/2000/svg}"
FILES = [*(f"{name}.svg" for name in IDS), "overview.svg"]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of six tasks, four arms and three seeds."""
    folder = tmp_path_factory.mktemp("six")
    draw(made_up(SIX), folder)
    return folder


def texts(path: Path) -> list[str]:
    """Every text of a picture; fails where it is no XML."""
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def without(answers: dict[str, Any], *empty: str) -> dict[str, Any]:
    """The answers with every list of their data emptied, or only those named."""
    found = copy.deepcopy(answers)
    for answer in found["answers"]:
        for key, value in answer["data"].items():
            if not empty or key in empty:
                answer["data"][key] = [] if isinstance(value, list) else None
    return found


def unknown(value: Any) -> Any:
    """The same with every number that is not a count or a place unknown."""
    if isinstance(value, dict):
        kept = {"seed", "n", "window", "first", "last", "steps", "width", "paper"}
        return {k: v if k in kept and not isinstance(v, float) else unknown(v) for k, v in value.items()}
    if isinstance(value, list):
        return [unknown(v) for v in value]
    return None if isinstance(value, int | float) else value


@pytest.mark.parametrize(
    ("tasks", "arms", "seeds"),
    [(["gcd", "countdown"], 2, 1), pytest.param(HOSTILE, 6, 5, marks=pytest.mark.slow), (["a"], 1, 1)],
)
def test_every_picture_is_made_small_and_valid(tmp_path: Path, tasks: list[str], arms: int, seeds: int) -> None:
    answers = made_up(tasks, arms, seeds)
    assert draw(answers, tmp_path / "figures") == [tmp_path / "figures" / name for name in FILES]
    for answer, name in zip(answers["answers"], FILES, strict=False):
        shown = texts(tmp_path / "figures" / name)
        assert answer["verdict"] in shown
        assert answer["question"] in " ".join(shown)
    for name in FILES:
        path = tmp_path / "figures" / name
        assert path.stat().st_size < 150_000
        assert "<script" not in path.read_text(encoding="utf-8")


def test_task_and_arm_names_stand_in_the_pictures_that_show_them(six: Path) -> None:
    for name in ("imbalance", "last_block", "gain", "explain", "arms", "overview"):
        assert set(SIX) <= set(texts(six / f"{name}.svg")), name
    for name in ("arms", "overview"):
        assert {"proportional", "inverse", "equal_pull"} <= set(texts(six / f"{name}.svg"))
    assert {"cross-product", "plug-in", "two-batch"} <= set(texts(six / "estimators.svg"))
    assert set(FACTORS.values()) <= set(texts(six / "explain.svg"))


def test_the_papers_band_the_ratio_and_the_lower_bound_are_told(six: Path) -> None:
    shown = texts(six / "imbalance.svg")
    assert {"the paper: 15 to 33", "18 (9.0 to 36)", "15 (over 6.0)", "not known"} <= set(shown)
    assert any(line.startswith("An arrow") for line in shown)


def test_a_ratio_of_which_only_the_lower_end_is_known_is_drawn(tmp_path: Path) -> None:
    answers = made_up(SIX)
    answers["answers"][0]["data"]["ratios"] = [{"where": "training", "value": None, "low": 6.0, "high": None}]
    draw(answers, tmp_path)
    assert "over 6.0" in texts(tmp_path / "imbalance.svg")


def test_the_same_answers_give_the_same_bytes(six: Path, tmp_path: Path) -> None:
    draw(made_up(SIX), tmp_path)
    for name in FILES:
        assert (six / name).read_bytes() == (tmp_path / name).read_bytes()
        assert b"metadata" not in (six / name).read_bytes()  # where matplotlib puts the date


def test_tasks_stand_loudest_first_in_the_imbalance(six: Path) -> None:
    overall = made_up(SIX)["answers"][0]["data"]["overall"]
    loud = [r["task"] for r in sorted(overall, key=lambda r: -r["value"])]
    assert [t for t in texts(six / "imbalance.svg") if t in SIX] == loud


def test_points_that_logarithmic_axes_cannot_show_are_counted(tmp_path: Path) -> None:
    answers = made_up(SIX)
    data = answers["answers"][1]["data"]
    for i, point in enumerate(data["points"]):
        point["last"], point["full"] = (-0.1, 1.0) if i < 7 else (0.1, 1.0)
    draw(answers, tmp_path)
    shown = " ".join(texts(tmp_path / "last_block.svg"))
    assert f"7 of {len(data['points'])} points have a U at or below zero" in shown
    assert "300 of the" in shown  # of the disjoint ones, which are more than a picture can hold


@pytest.mark.parametrize("kind", ["no lists", "no data", "unknown numbers", "no answers", "nothing"])
def test_missing_data_gives_pictures_that_say_so(tmp_path: Path, kind: str) -> None:
    answers = made_up(SIX)
    if kind == "no lists":
        answers = without(answers)
    elif kind == "no data":
        for answer in answers["answers"]:
            answer["data"] = None
            answer["verdict"] = "undecided"
    elif kind == "unknown numbers":
        answers = {**answers, "answers": [{**a, "data": unknown(a["data"])} for a in answers["answers"]]}
    elif kind == "no answers":
        answers["answers"] = []
    else:
        answers = {}
    for path in draw(answers, tmp_path):
        shown = " ".join(texts(path))
        assert "nan" not in shown.lower().split()
        assert "known" in shown or "No " in shown or "not " in shown, path.name


@pytest.mark.parametrize(
    "keys",
    [
        ("overall", "points", "across", "factors", "final", "by_n"),
        pytest.param(
            ("by_window", "disjoint", "within_correlations", "tasks", "differences", "sketches"), marks=pytest.mark.slow
        ),
        ("windows", "ratios", "fit", "correlations", "curves", "rollouts", "paper", "unit", "reference"),
    ],
)
def test_any_part_may_be_missing(tmp_path: Path, keys: tuple[str, ...]) -> None:
    files = draw(without(made_up(SIX[:3]), *keys), tmp_path)
    assert [f.name for f in files] == FILES


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    answers = made_up(SIX)
    answers["answers"][0]["data"]["ratios"][0]["high"] = math.inf
    answers["answers"][0]["data"]["overall"][0] |= {"value": math.nan, "low": math.nan, "high": math.nan}
    draw(answers, tmp_path)
    assert "18 (over 9.0)" in texts(tmp_path / "imbalance.svg")


def test_a_study_without_uniform_has_nothing_to_compare_with(tmp_path: Path) -> None:
    answers = without(made_up(SIX), "baseline", "differences")
    draw(answers, tmp_path)
    assert "nothing to compare with" in texts(tmp_path / "arms.svg")
    assert "No arm to compare." in texts(tmp_path / "overview.svg")


@pytest.mark.parametrize("tasks", [pytest.param(SIX, marks=pytest.mark.slow), HOSTILE])
def test_no_text_runs_off_the_paper(tmp_path: Path, tasks: list[str]) -> None:
    """Measured from the picture itself: every text that stands level, by its anchor and its width in DejaVu Sans."""
    for path in draw(made_up(tasks, 6, 5), tmp_path):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        for element in root.iter(f"{SVG}text"):
            style = element.get("style", "")
            if "rotate" in element.get("transform", ""):
                continue
            x = float(element.get("x") or 0)
            size = next(float(part.split("px")[0].split()[-1]) for part in style.split(";") if "px" in part)
            width = text_width("".join(element.itertext()), size, bold="700" in style or "bold" in style)
            left = x - (width if "anchor: end" in style else width / 2 if "anchor: middle" in style else 0)
            assert 0 <= left + 1 and left + width <= WIDTH + 1, (path.name, "".join(element.itertext()), left, width)


def test_a_name_is_cut_to_its_room() -> None:
    assert fit("gcd", 200) == "gcd"
    cut = fit("z" * 90, 100)
    assert cut.endswith("…") and text_width(cut) <= 100 < text_width(cut + "zz")
