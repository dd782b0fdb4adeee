"""Every verifier on pairs of a completion and a reference that must and must not match, from tests/data/verifiers."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from gradnorm_grpo.tasks.extraction import final_answer, last_number, without_emphasis
from gradnorm_grpo.tasks.verifiers import VERIFIERS

DATA = Path(__file__).resolve().parents[1] / "data" / "verifiers"
FEWEST = 150


def pairs(name: str) -> list[tuple[str, str, bool, dict]]:
    """(completion, reference, whether it matches, the row's data) of each line."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row[0], row[1], row[2], row[3] if len(row) > 3 else {}) for row in rows]


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_pairs_that_must_and_must_not_match(name: str) -> None:
    found = pairs(name)
    different = {json.dumps(pair) for pair in found}
    assert len(different) == len(found) >= FEWEST
    assert min(sum(pair[2] for pair in found), sum(not pair[2] for pair in found)) >= FEWEST // 3
    wrong = [pair for pair in found if VERIFIERS[name](pair[0].strip(), pair[1], pair[3]) is not pair[2]]
    assert wrong == []


@pytest.mark.parametrize("name", ["numeric", "financial", "math_verify"])
def test_what_stands_before_a_box_does_not_count(name: str) -> None:
    """Every pair whose completion marks nothing itself, behind reasoning of every kind and inside a box."""
    reasoning = [
        "First we add both sides and then we simplify. " * 25,
        "What a nice sum! So **7** of $a^2 + b^2 = c^2 + d^2 + e^2$, or 3 * 5. ",
        "Let me guess \\boxed{99}. No! ",
        "<think>It may be \\boxed{98}, 9**9**9 or 1,2,3.</think>",
    ]
    marks = ("box", "<", "####", "{", "}", "$")
    chosen = [(f"\\boxed{{{p[0]}}}", *p[1:]) for p in pairs(name) if p[0] and not any(m in p[0] for m in marks)]
    if name == "math_verify":
        chosen = [p for p in pairs(name) if re.fullmatch(r"\\boxed\{[^{}]+\}", p[0])][::3]
    assert len(chosen) > 15
    for text, answer, right, data in chosen:
        for before in reasoning:
            assert VERIFIERS[name](before + text, answer, data) is right, (before[:20], text, answer)


def test_every_verifier_accepts_its_own_references() -> None:
    for name in VERIFIERS:
        for text, answer, right, data in pairs(name):
            if right and answer and name != "expression":
                assert VERIFIERS[name](answer, answer, data), (name, text, answer)


@pytest.mark.parametrize(
    "form", ["**{}**", "*{}*", "***{}***", "__{}__", "_{}_", "`{}`", "**Total: {}**", "({})", "{}."]
)
@pytest.mark.parametrize("number", ["7", "-7", "1,234", "0.5", "7/2", "1e-5", "3,14", "\u22127"])
def test_a_number_is_the_same_in_every_dress(form: str, number: str) -> None:
    plain, dressed = last_number(number), last_number("12 - 5 = " + form.format(number))
    assert plain is not None and dressed is not None and plain.value == dressed.value


def test_numbers_survive_a_round_trip_through_every_notation() -> None:
    for value in (0, 1, 7, 12, 100, 999, 1000, 1234, 98765, 1234567, 2**40):
        plain, grouped = str(value), f"{value:,}"
        forms = [plain, grouped, grouped.replace(",", "\u202f"), grouped.replace(",", " "), grouped.replace(",", "'")]
        forms += [f"{grouped}.5", f"{plain},5"] if value < 1000 else [f"{grouped}.5", grouped.replace(",", ".") + ",5"]
        for form in forms:
            expected = Fraction(value) + (Fraction(1, 2) if form[-2:] in (".5", ",5") else 0)
            for sign in ("", "-", "\u2212"):
                found = last_number(f"x = {sign}{form}")
                assert found is not None and found.value == (-expected if sign else expected), (sign, form)


def test_emphasis_is_removed_and_arithmetic_is_not() -> None:
    assert without_emphasis("**a** and *b* and `c` and __d__") == "a and b and c and d"
    for text in ("3**2", "5*6*7", "a_b_c", "2 * 3 * 4", "10**10**10", "* item\n* item"):
        assert without_emphasis(text) == text


def test_a_truncated_answer_is_no_answer() -> None:
    for text in ("\\boxed{12", "so \\boxed{1} and \\boxed{12", "<answer>12", "<think>12"):
        assert final_answer(text) == ""


@pytest.mark.parametrize("text", ["\\boxed{" * 20_000, "$" * 20_000, "**" * 20_000, "1 " * 20_000, "</think>" * 9_000])
def test_long_text_is_read_quickly(text: str) -> None:
    begun = time.process_time()
    final_answer(text)
    last_number(text)
    VERIFIERS["math_verify"](text, "10", {})
    assert time.process_time() - begun < 3.0
