"""The study's page: what it says comes from its data, it links its pictures, and names cannot become markup."""

from __future__ import annotations

import re
from typing import Any

import pytest
from markdown_it import MarkdownIt

from gradnorm_grpo.study.page import code, escape, page
from tests.study.study_made_up import HOSTILE, IDS, QUESTIONS, SIX, made_up


def described(tasks: list[str] = SIX, **changes: Any) -> dict[str, Any]:
    """The content of a study.json."""
    return {
        "name": "tiny",
        "command": "train_grpo.py study --preset tiny --seeds 1 2 3",
        "started": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "commit": "0123456789ab",
        "machine": {"platform": "Linux-6", "processors": 2, "threads": 1, "device": "cpu"},
        "config": {
            "model": "tiny",
            "max_steps": 60,
            "num_generations": 8,
            "per_device_train_batch_size": 384,
            "gradient_accumulation_steps": 1,
            "tasks": [{"name": task, "source": "synthetic"} for task in tasks],
        },
        "arms": {"uniform": {}, "proportional": {"sampling_strategy": "proportional"}},
        "seeds": [1, 2, 3],
        "tasks": tasks,
        "gain_window": 10,
    } | changes


def rendered(markdown: str) -> str:
    """The page as HTML, by the rules of CommonMark and GitHub's tables."""
    return str(MarkdownIt("commonmark").enable("table").render(markdown))


def tables(html: str) -> list[list[list[str]]]:
    """Every table as rows of cells, their text."""
    return [
        [
            [re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall("<table>(.*?)</table>", html, re.DOTALL)
    ]


def unescaped(html: str) -> str:
    text = re.sub("<[^>]*>", "", html)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def test_the_facts_of_the_study_stand_at_the_top() -> None:
    text = page(described(), made_up(SIX))
    top = text[: text.index("## Answers")]
    for fact in (
        "# The study tiny",
        "`train_grpo.py study --preset tiny --seeds 1 2 3`",
        "`0123456789ab`",
        "3 seeds (1, 2, 3)",
        "60 steps a run, 48 prompts of 8 completions in each",
        "torch 2.13.0+cpu",
        "12 finished",
        *(f"`{task}`" for task in SIX),
    ):
        assert fact in top, fact


def test_every_answer_has_its_verdict_sentence_picture_and_numbers() -> None:
    answers = made_up(SIX)
    html = rendered(page(described(), answers))
    found = tables(html)
    assert [row[1] for row in found[0][1:]] == [a["verdict"] for a in answers["answers"]]
    assert [unescaped(row[0]) for row in found[0][1:]] == [QUESTIONS[name] for name in IDS]
    assert [unescaped(row[2]) for row in found[0][1:]] == [a["sentence"] for a in answers["answers"]]
    for name, table in zip(IDS, found[1:7], strict=True):
        assert table[0] == ["number", "value", "interval", "how"]
        assert table[1] == [f"ratio of {name}", "18.0", "9.00 to 36.0 (95%)", "t, 3 seeds"]
        assert table[2] == ["unknown", "–", "–", "one seed"]
    assert re.findall('<img src="([^"]*)"', html) == [f"figures/{n}.svg" for n in ("overview", *IDS)]


def test_the_links_of_the_first_table_lead_to_the_sections() -> None:
    text = page(described(), made_up(SIX))
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) == len(IDS) and set(links) <= set(anchors)


def test_only_pictures_that_exist_are_linked() -> None:
    text = page(described(), made_up(SIX), figures=["gain"])
    assert re.findall(r"figures/\w+\.svg", text) == ["figures/gain.svg"]


def test_whole_numbers_keep_their_digits_and_long_tables_are_folded() -> None:
    answers = made_up(SIX)
    counts = {
        "name": "rollouts of a run",
        "value": 23040.0,
        "low": 23040.0,
        "high": 23041.0,
        "level": None,
        "how": "all",
    }
    bound = {"name": "bound", "value": 0.25, "low": 0.125, "high": None, "level": 0.95, "how": "t"}
    answers["answers"][4]["numbers"] = [counts, bound] * 10
    answers["answers"][4]["numbers"].append({"name": "points", "value": 76.0, "low": None, "high": None, "level": None})
    text = page(described(), answers)
    assert "| rollouts of a run | 23,040 | 23,040 to 23,041 | all |" in text
    assert "| points | 76 | – |  |" in text
    assert "| bound | 0.250 | over 0.125 (95%) | t |" in text
    assert "<summary>21 numbers</summary>\n\n| number |" in text


def test_names_show_as_they_are_and_cannot_become_markup() -> None:
    answers = made_up(HOSTILE, 2, 2)
    answers["answers"][0]["sentence"] = "*a* [b](http://c) <img src=x> | @d $e$ `f` www.g.h"
    html = rendered(page(described(HOSTILE), answers))
    assert "<script" not in html and 'src="x"' not in html and "<img src=x" not in html
    assert "http://c" not in re.findall('href="([^"]*)"', html)
    found = tables(html)
    assert all(len(row) == len(table[0]) for table in found for row in table)
    assert unescaped(found[0][1][2]) == answers["answers"][0]["sentence"]
    shown = {unescaped(row[2]) for row in found[-1][1:]}
    assert {"a|b `c` & d", "<script>alert(1)</script>", "$x$ ünïcödé 数え上げ", "-0", "12"} <= shown


@pytest.mark.parametrize(
    "text", ["# a", "1. a", "- a", "a | b", "a\nb", "__a__", "<b>", "a`b", "&lt;", "~~a~~", "    a", "\\*"]
)
def test_escaped_text_renders_as_itself(text: str) -> None:
    assert unescaped(rendered(escape(text))).strip() == " ".join(text.split())
    assert unescaped(rendered(code(text))).strip() == " ".join(text.split())


def test_tasks_made_by_a_program_are_named_as_stand_ins() -> None:
    answers = made_up(SIX)
    assert "- All tasks are made by a program. They stand in" in page(described(), answers)
    mixed = described()
    mixed["config"]["tasks"] = [{"name": "gcd"}, {"name": "own", "source": "jsonl"}]
    assert "- gcd: made by a program." in page(mixed, answers)
    mixed["config"]["tasks"] = [{"name": "own", "source": "jsonl"}]
    assert "made by a program" not in page(mixed, answers)


def test_what_only_github_reads_is_taken_apart() -> None:
    for text in ("http://c.d", "www.c.d", "@someone", "$x$"):
        assert text not in escape(text)
    assert escape("letter_counting") == "letter_counting"  # and what needs no escape stays readable


def test_a_page_without_answers_says_so() -> None:
    text = page({}, {})
    assert "No question is answered yet." in text and "No run is finished." in text
    assert text.count("was not asked of these data") == 2 * len(IDS)
    assert "nan" not in text.lower().split()


def test_runs_that_are_missing_and_what_is_undecided_are_named() -> None:
    answers = made_up(SIX, num_seeds=1) | {"missing": ["inverse-seed1"]}
    text = page(described(seeds=[1]), answers)
    assert "not finished: `inverse-seed1`" in text
    limits = text[text.index("## What is not claimed") :]
    assert "fewer than two seeds" in limits and "6 tasks and 1 seed." in limits
    for answer in answers["answers"]:
        assert (escape(answer["question"]) in limits) == (answer["verdict"] == "undecided")
