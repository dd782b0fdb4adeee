"""The studies in docs/study: their answers follow from the measurements beside them; the README shows one of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

pytest.importorskip("trl")

from gradnorm_grpo.numbers import fixed, signed, significant
from gradnorm_grpo.study import cost, lags
from gradnorm_grpo.study.figures import draw
from gradnorm_grpo.study.measurements import Measurements, read_study
from gradnorm_grpo.study.page import page
from gradnorm_grpo.study.questions import answer

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.parent for path in (ROOT / "docs" / "study").glob("*/study.json"))


def _same_but_for_rounding(new: Any, old: Any) -> bool:
    """Equal keys, lists, words and None; numbers to nine digits, in the last of which processors may differ."""
    if isinstance(old, dict):
        return list(new) == list(old) and all(_same_but_for_rounding(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(_same_but_for_rounding, new, old))
    if isinstance(old, float) and isinstance(new, (int, float)):
        return bool(new == old or math.isclose(new, old, rel_tol=1e-6, abs_tol=1e-9))
    return bool(new == old)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_answers_figures_and_page_follow_from_the_measurements(folder: Path, tmp_path: Path) -> None:
    """To nine digits: another processor may sum in another order."""
    measured = Measurements.from_csv(folder / "measurements.csv")
    measured.estimates = [json.loads(path.read_text()) for path in sorted((folder / "estimators").glob("seed*.json"))]
    found, kept = answer(measured), json.loads((folder / "answers.json").read_text())
    assert measured.missing == [] and bool(measured.estimates) == (folder / "estimators").is_dir()
    # A study that declared no decision keeps its answers: no key, number or word more or less.
    assert _same_but_for_rounding(found, kept)
    for new, old in zip(found["answers"], kept["answers"], strict=True):
        assert (new["id"], new["verdict"], new["sentence"]) == (old["id"], old["verdict"], old["sentence"])
        numbers = [[row["name"], row["how"]] for row in old["numbers"]]
        assert [[row["name"], row["how"]] for row in new["numbers"]] == numbers
        for key in ("value", "low", "high"):
            pairs = [(a[key], b[key]) for a, b in zip(new["numbers"], old["numbers"], strict=True)]
            assert all(a == b or a == pytest.approx(b, rel=1e-6, abs=1e-9) for a, b in pairs), (old["id"], key)
    assert (folder / "README.md").read_text() == page(read_study(folder), kept)
    names = {path.name for path in draw(kept, tmp_path)}
    assert names == {path.name for path in (folder / "figures").glob("*.svg")}


@pytest.mark.parametrize(
    ("command", "stored", "seeds"), [(cost, "cost", 3), (lags, "lags", 3), (lags, "lags_smollm2", 4)]
)
def test_a_commands_page_follows_from_its_stored_results(command: Any, stored: str, seeds: int) -> None:
    name = command.__name__.rpartition(".")[2]
    folder = ROOT / "docs" / "study" / stored
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))]
    written = (ROOT / "docs" / "study" / f"{name}.md").read_text()
    assert len(results) == seeds and command.table(results) in written and command.sentence(results) in written
    assert command.sentence(results) in (folder / f"{name}.svg").read_text()
    assert len({result["commit"] for result in results}) == 1 and results[0]["commit"][:12] in written


def test_three_seeds_and_four_arms_at_one_budget() -> None:
    kept = json.loads((ROOT / "docs" / "study" / "tiny" / "answers.json").read_text())
    assert len(kept["arms"]) == 4 and len(kept["seeds"]) == 3 and len(kept["runs"]) == 12
    assert len({run["rollouts"] for run in kept["runs"]}) == 1


def test_the_readmes_table_has_the_studies_numbers() -> None:
    """Row by row: the verdict, and the number of each study with its interval."""
    best = "Spearman of U, last attention and all parameters"
    of_rows = [
        ("imbalance", "loudest / quietest, training", significant),
        ("last_block", "Spearman, different steps", fixed),
        ("proxy", best, fixed),
        ("gain", "Spearman of U and held-out gain, across tasks", fixed),
        ("explain", "", fixed),
        ("arms", None, lambda value: signed(value, 3)),
    ]
    text = (ROOT / "README.md").read_text()
    rows = text[text.index("| claim | six tasks") :].splitlines()[2 : 2 + len(of_rows)]
    for place, study in ((2, "tiny"), (3, "tiny_decided"), (4, "tiny_tasks"), (5, "smollm2_frozen")):
        kept = json.loads((ROOT / "docs" / "study" / study / "answers.json").read_text())
        answers = {entry["id"]: entry for entry in kept["answers"]}
        margins = kept.get("decision", {}).get("margins", {})
        for row, (question, name, written) in zip(rows, of_rows, strict=True):
            cell = row.split("|")[place].strip()
            if question not in answers:
                assert cell == "not asked", (study, question)
                continue
            found, numbers = answers[question], {entry["name"]: entry for entry in answers[question]["numbers"]}
            statistic = ""
            if question == "explain":  # the strongest of the four
                across = [
                    entry for key, entry in numbers.items() if re.fullmatch("Spearman of U and .*, across tasks", key)
                ]
                name = max(across, key=lambda entry: abs(entry["value"]))["name"]
                statistic = name[18:-14].replace("|advantage|", "absolute advantage") + " "
            if name is None:  # the primary accuracy: at the end, or the average over training where that was declared
                when = kept.get("decision", {}).get("primary", "end")
                name = f"proportional minus uniform, mean over tasks, {when}"
            value, low, high = (numbers[name][key] for key in ("value", "low", "high"))
            ends = f"at least {written(low)}" if low else "no bound"
            ends = ends if high is None else f"{written(low)} to {written(high)}"
            verdict = re.sub(" d$", f" {margins.get(question, math.nan):g}", found["verdict"])
            known = "no bound" if low is None else f"{statistic}{written(value)} ({ends})"
            assert cell == f"{verdict}: {known}", (study, question)
        described = json.loads((ROOT / "docs" / "study" / study / "study.json").read_text())
        assert described["commit"] in text


def test_what_the_design_page_says_of_means_over_seeds() -> None:
    """Tasks as units, after U and the other measure were averaged over the seeds."""
    text = " ".join((ROOT / "docs" / "study-design.md").read_text().split())
    names = ("tiny_tasks", "tiny_decided")
    read = {name: Measurements.from_csv(ROOT / "docs" / "study" / name / "measurements.csv") for name in names}

    def said(m: Measurements, of: str) -> str:
        runs = [run for run in m.runs if run[0] == "uniform"]
        if of == "gain":
            points = [[m.evaluation(*run, task)[1] for task in m.tasks] for run in runs]
            others = np.array([[point[-1] - point[0] for point in row] for row in points])
        elif of == "full":
            others = m.by_run(runs, m.every_step(), "full_")[0]
        else:
            others = np.array([np.nanmean(m.array(*run, of), 1) for run in runs])
        found = scipy_stats.spearmanr(m.by_run(runs, m.every_step())[0].mean(0), others.mean(0))
        return f"{found.statistic:.2f} (p = {found.pvalue:.2g})"

    for study, of, words in (
        ("tiny_tasks", "gain", "over the 34 tasks is {}"),
        ("tiny_tasks", "abs_advantage", "that of U and |advantage| {}"),
        ("tiny_tasks", "full", "that of the last block and all parameters {}"),
        ("tiny_decided", "gain", "the same way gives {} for gain"),
        ("tiny_decided", "reward", "and {} for reward"),
    ):
        assert words.format(said(read[study], of)) in text, (study, of, said(read[study], of))


def test_the_readmes_picture_is_a_studys() -> None:
    assert "(docs/study/tiny/figures/overview.svg)" in (ROOT / "README.md").read_text()
