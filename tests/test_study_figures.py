"""The study's pictures: made, valid, small, the same bytes twice, and saying so where there is nothing to draw."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from gradnorm_grpo.study.figures import draw
from gradnorm_grpo.study.figures.canvas import EDGE, WIDTH, fit, text_width
from gradnorm_grpo.study.figures.data import IDS

SVG = "{http://www.w3.org/2000/svg}"
FACTORS = {
    "reward": "mean reward",
    "abs_advantage": "mean |advantage|",
    "prompt_length": "prompt length",
    "response_length": "response length",
}
ARMS = ["uniform", "proportional", "inverse", "equal_pull", "arm_e", "arm_f"]
QUESTIONS = {
    "imbalance": "Do some tasks produce much larger gradients than others?",
    "last_block": "Does the last attention block stand for the whole model?",
    "gain": "Do tasks with larger gradients gain more?",
    "explain": "Do reward, advantages or lengths explain which gradients are large?",
    "arms": "Does drawing tasks by their gradients change what is learned?",
    "estimators": "Which estimator of U is best, and what does a sketch of the gradients cost?",
}


def around(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made_up(tasks: list[str], num_arms: int = 4, num_seeds: int = 3, spread: float = 30.0) -> dict[str, Any]:
    """Answers of the form of answers.json, drawn by chance, for so many tasks, arms and seeds."""
    rng = np.random.default_rng(len(tasks) * 10 + num_arms)
    arms, seeds = ARMS[:num_arms], list(range(1, num_seeds + 1))
    u = dict(zip(tasks, 0.02 * spread ** rng.permutation(np.linspace(0, 1, len(tasks))), strict=True))
    windows = [{"window": w, "first": 20 * w + 1, "last": 20 * w + 20} for w in range(3)]
    imbalance = {
        "unit": "last attention block",
        "overall": [
            {
                "task": t,
                **around(u[t], 0.3 * u[t] + 0.01),
                "plug_in": u[t] + 0.2,
                "per_seed": [{"seed": s, "value": u[t], "se": 0.02} for s in seeds],
                "full": 5 * u[t],
                "full_low": 3 * u[t],
                "full_high": 7 * u[t],
            }
            for t in tasks
        ],
        "windows": windows,
        "by_window": [
            {"task": t, "window": w, **around(u[t] * (1.2 - 0.4 * w) + rng.normal() * 0.01, 0.3 * u[t] + 0.02)}
            for t in tasks
            for w in range(3)
        ],
        "ratios": [
            {"where": "training", "value": 18.0, "low": 9.0, "high": 36.0},
            {"where": "all parameters", "value": None, "low": None, "high": None},
            *({"where": f"steps {w['first']}-{w['last']}", "value": 15.0, "low": 6.0, "high": None} for w in windows),
            *({"where": f"arm {a}", "value": 20.0, "low": 0.8, "high": 44.0} for a in arms),
        ],
        "paper": [15, 33],
    }

    def pair(t: str) -> dict[str, float]:
        last = u[t] * float(np.exp(rng.normal() * 0.4)) + rng.normal() * 0.02
        return {"last": last, "last_se": 0.015, "full": 5 * last * float(np.exp(rng.normal() * 0.3)), "full_se": 0.1}

    points = [
        {"arm": a, "seed": s, "task": t, "window": w, **pair(t)}
        for a in arms
        for s in seeds
        for t in tasks
        for w in range(3)
    ]
    disjoint = [{**p, **pair(p["task"]), "fold": f} for p in points for f in (0, 1)]
    last_block = {
        "points": points,
        "disjoint": disjoint,
        "fit": {"slope": 0.85, "intercept": -0.7},
        "not_positive": sum(p["last"] <= 0 or p["full"] <= 0 for p in disjoint),
        "correlations": [
            {"where": where, "kind": kind, "value": 0.9, "low": 0.7, "high": 0.97}
            for where in ("same rollouts", "disjoint rollouts")
            for kind in ("Spearman", "Pearson of logarithms")
        ],
    }
    gain = {
        "arms": arms[:1],
        "across": [
            {
                "task": t,
                "u": u[t],
                "u_low": u[t] * 0.6 - 0.01,
                "u_high": u[t] * 1.4 + 0.01,
                "gain": g,
                "gain_low": g - 0.08,
                "gain_high": g + 0.08,
                "training_gain": g,
                "per_seed": [
                    {"seed": s, "u": u[t] * (0.9 + 0.1 * s), "gain": g + 0.03 * rng.normal(), "training_gain": g}
                    for s in seeds
                ],
            }
            for t in tasks
            for g in [float(0.1 + 0.1 * rng.normal())]
        ],
        "within": [],
        "correlations": [
            {"where": "across tasks (held-out)", "kind": "Spearman", "value": 0.14, "low": -0.7, "high": 0.8},
            {"where": "across tasks (training)", "kind": "Spearman", "value": 0.11, "low": -0.7, "high": 0.8},
            {"where": "within tasks", "kind": "Spearman", "value": 0.05, "low": -0.1, "high": 0.2},
        ],
        "within_correlations": [
            {"arm": a, "seed": s, "task": t, "value": float(np.tanh(rng.normal() * 0.6)), "n": 6}
            for a in arms
            for s in seeds
            for t in tasks
        ],
    }
    explain = {
        "tasks": [
            {
                "task": t,
                "u": u[t],
                "reward": float(rng.uniform(0.1, 0.9)),
                "abs_advantage": float(rng.uniform(0.2, 0.7)),
                "prompt_length": float(rng.uniform(5, 300)),
                "response_length": float(rng.uniform(2, 9)),
            }
            for t in tasks
        ],
        "factors": [
            {
                "name": name,
                "label": label,
                "across": {**around(0.2, 0.7), "p": 0.4, "p_holm": 1.0},
                "within": {**around(0.35, 0.2), "p": 0.001, "p_holm": 0.004},
            }
            for name, label in FACTORS.items()
        ],
    }

    def compared(arm: str, task: str | None, when: str) -> dict[str, Any]:
        value = float(0.03 * rng.normal())
        seeded = [{"seed": s, "value": value + 0.01 * (s - 2)} for s in seeds]
        known = {"p": 0.4, "p_holm": 0.9} if task is None else {"p": None, "p_holm": None}
        half = 0.03 if task is None else 0.09
        return {"arm": arm, "task": task, "when": when, **around(value, half), **known, "per_seed": seeded}

    steps = [0, 20, 40, 60]
    comparison = {
        "baseline": "uniform",
        "final": [
            {"arm": a, "task": t, **around(float(rng.uniform(0.2, 0.9)), 0.06), "per_seed": []}
            for a in arms
            for t in [None, *tasks]
        ],
        "differences": [compared(a, t, when) for a in arms[1:] for when in ("end", "average") for t in [None, *tasks]],
        "curves": [
            {
                "arm": a,
                "task": None,
                "steps": steps,
                "value": [0.3, 0.4 + 0.01 * i, 0.45 + 0.02 * i, 0.5 + 0.02 * i],
                "low": [0.25, 0.33, 0.4, 0.42],
                "high": [0.35, 0.47, 0.5, 0.6],
            }
            for i, a in enumerate(arms)
        ],
        "rollouts": [{"arm": a, "seed": s, "rollouts": 23040} for a in arms for s in seeds],
    }
    sizes = [2, 4, 8, 16, 32, 64, 128, 256]
    estimators = {
        "by_n": [
            {
                "estimator": e,
                "n": n,
                "task": t,
                "bias": 0.0,
                "bias_low": -0.02,
                "bias_high": 0.02,
                "sd": 2.0 / n,
                "relative_bias": (6.0 * k / n if e == "plug_in" else 0.0),
                "relative_sd": {"cross_product": 5.0, "plug_in": 6.0, "two_batch": 9.0}[e] * k / n**0.8,
            }
            for e in ("cross_product", "plug_in", "two_batch")
            for n in sizes
            for t, k in [(None, 1.0), *((t, float(np.exp(i - 2))) for i, t in enumerate(tasks[:6]))]
        ],
        "sketches": [
            {
                "width": w,
                "relative_error": 4.0 / w,
                "low": 3.0 / w,
                "high": 5.0 / w,
                "sd_over_se": 100.0 / w,
                "sd_over_se_low": 60.0 / w,
                "sd_over_se_high": 180.0 / w,
                "seconds": w / 640,
                "exact_seconds": 0.2,
                "norms_seconds": 0.05,
            }
            for w in (64, 128, 256)
        ],
        "reference": "U over all stored prompts",
    }
    data = dict(zip(IDS, (imbalance, last_block, gain, explain, comparison, estimators), strict=True))
    verdicts = dict(
        zip(IDS, ("supported", "supported", "undecided", "undecided", "undecided", "supported"), strict=True)
    )
    return {
        "answers": [
            {
                "id": name,
                "question": QUESTIONS[name],
                "claim": f"The claim of {name}.",
                "verdict": verdicts[name],
                "sentence": f"Made up for {name}: 18 times <&> $x$ |y|.",
                "numbers": [
                    {
                        "name": f"ratio of {name}",
                        "value": 18.0,
                        "low": 9.0,
                        "high": 36.0,
                        "level": 0.95,
                        "how": "t, 3 seeds",
                    },
                    {"name": "unknown", "value": None, "low": None, "high": None, "level": None, "how": "one seed"},
                ],
                "data": data[name],
            }
            for name in IDS
        ],
        "runs": [
            {
                "arm": a,
                "seed": s,
                "steps": 60,
                "rollouts": 23040,
                "tasks": {t: {"u": u[t], "u_se": 0.02, "full_u": 5 * u[t], "full_u_se": 0.1} for t in tasks},
            }
            for a in arms
            for s in seeds
        ],
        "tasks": tasks,
        "arms": arms,
        "seeds": seeds,
        "missing": [],
        "gain_window": 10,
    }


SIX = ["copy", "reverse", "sort", "compare", "add", "maximum"]
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b `c` & d",
    "$x$ ünïcödé 数え上げ",
    "line\nbreak\x00\ud800",
    "--> ]]>",
    "z" * 90,
    "gcd",
    "countdown of numbers",
    "-0",
    "é",
    " ",
    "12",
]
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


@pytest.mark.parametrize(("tasks", "arms", "seeds"), [(["gcd", "countdown"], 2, 1), (HOSTILE, 6, 5), (["a"], 1, 1)])
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
        ("by_window", "disjoint", "within_correlations", "tasks", "differences", "sketches"),
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


@pytest.mark.parametrize("tasks", [SIX, HOSTILE])
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
    assert EDGE < WIDTH
