"""The HTML report: what it shows, that it loads nothing, that data cannot become markup, and both themes."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from gradnorm_grpo.plots import PALETTE
from gradnorm_grpo.report import write_report
from gradnorm_grpo.report.charts import spread
from gradnorm_grpo.report.table import footnotes, table_rows
from gradnorm_grpo.report.verdict import imbalance_sentence
from gradnorm_grpo.runlog import read_run
from gradnorm_grpo.summary import task_results
from tests.report.test_report_synthetic import NAMES, write_synthetic_run

HOSTILE = [
    "<script>alert(1)</script>",
    "q\"uo'te & <b>",
    "$x$ ünïcödé 数え上げ",
    "a/b",
    "cosine",
    "line\nbreak\x00\ufffe\ud800",
    "--> ]]> {{ 7 * 7 }}",
    "x" * 120,
    "</style></svg>",
    " ",
    "é",
    "z",
]
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Every start tag with its attributes, the text outside style and script, and whether tags nest as they should."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]

    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "six"
    write_synthetic_run(path)
    assert write_report(path) == path / "report.html"
    return path


def test_every_number_of_every_task_is_on_the_page(six: Path) -> None:
    text = Page((six / "report.html").read_text(encoding="utf-8")).text
    results = task_results(read_run(six))
    for row in table_rows(results):
        assert all(cell in text for cell in row.cells)
    for sentence in (*footnotes(results), imbalance_sentence(results), *read_run(six).notes):
        assert sentence in text
    assert "134,515,008" in text and "synthetic/invented-numbers" in text
    assert "sampling.strategy" in text and "proportional" in text and "0.0 (synthetic)" in text


def test_every_section_is_there(six: Path) -> None:
    sections = Page((six / "report.html").read_text(encoding="utf-8")).sections()
    expected = "verdict table pull pull-steps reward evaluation cosines sampling warm-start words settings"
    assert sections == expected.split()


def test_the_page_loads_nothing(six: Path) -> None:
    html = (six / "report.html").read_text(encoding="utf-8")
    for tag, attrs in Page(html).tags:
        assert tag not in {"img", "iframe", "object", "embed", "image"}
        assert "src" not in attrs and "srcset" not in attrs
        if "href" in attrs:
            assert attrs["href"].startswith("#") or attrs["href"] == "data:,"
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_resolve(six: Path) -> None:
    html = (six / "report.html").read_text(encoding="utf-8")
    parsed = Page(html)
    ids = parsed.ids()
    assert len(ids) == len(set(ids)) > 50
    wanted = {attrs["href"][1:] for _, attrs in parsed.tags if attrs.get("href", "").startswith("#")}
    assert wanted | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_every_colour_is_a_variable_of_both_themes(six: Path) -> None:
    html = (six / "report.html").read_text(encoding="utf-8")
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert pictures.count("<svg") == 2 * 3 + 2 * len(NAMES) + 1
    assert not re.search(r"#[0-9a-f]{6}", pictures)
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    light, *dark = re.findall(r":root[^{]*\{(.*?)\}", style[1], re.DOTALL)
    assert len(dark) == 2
    assert dark[0].split() == dark[1].split()  # the system's choice and the button's must look alike
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in (light, *dark)]
    assert used - {"--c", "--s", "--p"} <= names[0]
    assert names[0] - {"--font"} == names[1]
    assert "prefers-color-scheme: dark" in style[1] and "@media print" in style[1] and 'id="theme"' in html


def test_a_task_has_one_colour_everywhere(six: Path) -> None:
    html = (six / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure>.*?--c:var\(--task-(\d)\)".*?<span>(.*?)</span>(.*?)</figure>', html, re.DOTALL)
    assert len(figures) == 2 * len(NAMES)
    for swatch, name, picture in figures:
        assert int(swatch) == NAMES.index(name)
        assert set(re.findall(r"--task-(\d)", picture)) == {swatch}


def test_names_from_the_data_stay_text(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, HOSTILE, steps=30, prompts=48)
    matplotlib.rcParams["text.usetex"] = True  # the user's own settings must not reach the pictures
    try:
        html = write_report(tmp_path).read_text(encoding="utf-8")
    finally:
        matplotlib.rcdefaults()
    parsed = Page(html)  # also: every tag is closed where it was opened
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 1
    assert not any(tag == "b" and not attrs for tag, attrs in parsed.tags[-1:])
    assert "<script>alert(1)" not in html
    for name in (
        "<script>alert(1)</script>",
        "q\"uo'te & <b>",
        "$x$ ünïcödé 数え上げ",
        "--> ]]> {{ 7 * 7 }}",
        "line�break���",
    ):
        assert name in parsed.text
    assert "</style></svg>" in unescape(parsed.text)
    swatches = [attrs for tag, attrs in parsed.tags if tag == "i" and "swatch" in attrs.get("class", "")]
    assert {attrs["style"] for attrs in swatches} == {f"--c:var(--task-{i})" for i in range(len(PALETTE))}
    assert any("striped" in attrs["class"] for attrs in swatches)  # the palette has begun again


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, NAMES[:2], steps=3000, prompts=6, evals=False)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(html) < 600_000
    assert "U of 25 steps pooled" in html


@pytest.mark.parametrize(("steps", "prompts"), [(1, 1), (1, 7), (2, 3), (5, 777)])
def test_one_task_and_very_short_runs(tmp_path: Path, steps: int, prompts: int) -> None:
    write_synthetic_run(tmp_path, ["gcd"], steps=steps, prompts=prompts, evals=False, warm=1)
    parsed = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "cosines" not in parsed.sections() and "evaluation" not in parsed.sections()
    assert ("pull" in parsed.sections()) == (prompts > 1)
    assert "undecided, since there is only one task" in parsed.text


def test_a_run_without_steps_still_shows_its_evaluation(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, steps=0, warm=0)
    parsed = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert parsed.sections() == ["verdict", "table", "evaluation", "words", "settings"]
    assert "No training step was finished" in parsed.text and "The run is unfinished" in parsed.text


def test_an_empty_log_is_an_unfinished_run(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=0, evals=False, warm=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert "No training step was finished" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_run(tmp_path, ["a"], steps=2)
    first = write_report(tmp_path).read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a", "b"], steps=5)
    numbered = [re.sub(r"\bf\d+-", "f-", write_report(tmp_path).read_text(encoding="utf-8")) for _ in range(2)]
    assert numbered[0] == numbered[1]


def test_labels_keep_their_distance_and_order() -> None:
    heights = spread(np.array([0.9, 0.5, 0.02, 0.015, 0.01]), 0.1, 1.0)
    assert (np.diff(heights) <= -0.1 + 1e-12).all()
    assert heights.min() >= 0.05 and heights.max() <= 0.95
    assert heights[:2] == pytest.approx([0.9, 0.5])
