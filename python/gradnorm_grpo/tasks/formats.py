r"""The columns of well-known data sets: from a row to a question, its reference answer and what its verifier looks at.

A format reads the columns as they are published:

math         hendrycks' competition MATH (arXiv 2103.03874) and its mirrors: EleutherAI/hendrycks_math (a subset a
             subject), DigitalLearningGmbH/MATH-lighteval, HuggingFaceH4/MATH-500. problem, solution with \boxed{...} at
             its end, level ("Level 3", or 3), type or subject; answer where there is one.
deepscaler   agentica-org/DeepScaleR-Preview-Dataset. problem, answer, solution.
finqa        FinQA (arXiv 2109.00122): the files of the repository czyssrs/FinQA, where `qa` holds question, answer and
             exe_ans, and flat copies with question, answer and final_result. pre_text and post_text, lists of
             sentences; table, a list of rows of cells.
countdown    Jiayi-Pan/Countdown-Tasks-3to4. nums, target. Its reference expressions are searched for here.
r1_code      ganler/code-r1-12k. prompt (chat messages), reward_model with a ground_truth in JSON, extra_info with a
             reference program; or the columns program, input, output. What the program prints is to be predicted.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

from .extraction import boxed
from .rows import BadRow, own_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a format takes from a row: texts for a template, the answer (or how to find it), data for the verifier."""

    texts: dict[str, str]
    answer: str | Callable[[], str]
    data: dict[str, Any] = field(default_factory=dict)
    level: int | None = None


@dataclass(frozen=True)
class Format:
    """``read`` raises BadRow for a row that does not fit."""

    read: Callable[[Row], Parts]
    template: str
    verifier: str
    levels: bool = False  # whether rows have a level


def _text(row: Row, *names: str) -> str:
    """The first of the columns that is there and not blank."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and own_text(row, name).strip():
            return own_text(row, name).strip()
    raise BadRow(f"needs {' or '.join(names)}, got the columns {', '.join(map(str, row)) or 'none'}")


def read_math(row: Row) -> Parts:
    """A problem of MATH; its answer is the one in the box."""
    answer = own_text(row, "answer").strip() if isinstance(row.get("answer"), (str, int, float)) else ""
    answer = answer or boxed(_text(row, "solution"))
    if not answer:
        raise BadRow(f"has no \\boxed{{...}} in its solution: {_text(row, 'solution')[-60:]!r}")
    found = re.search(r"\d+", str(row.get("level", "")))
    return Parts({"problem": _text(row, "problem")}, answer, {}, int(found.group()) if found else None)


def read_deepscaler(row: Row) -> Parts:
    """A problem of DeepScaleR-Preview."""
    return Parts({"problem": _text(row, "problem")}, _text(row, "answer"))


def render_table(table: Any) -> str:
    """A table as lines of cells, the columns' heads first, each row's head at its left: ``net sales | 12.3 | 11.1``."""
    if not isinstance(table, list) or not table or not all(isinstance(line, list) for line in table):
        raise BadRow(f"needs a table, a list of rows of cells, got {str(table)[:60]!r}")
    return "\n".join(" | ".join(str(cell).strip() for cell in line).strip() for line in table)


def read_finqa(row: Row) -> Parts:
    """A question about a page of a financial report: the text, the table, the question; data["result"] is the exact
    result where the row has it."""
    qa = row.get("qa")
    question = qa if isinstance(qa, Mapping) else row
    texts = {
        "pre_text": _sentences(row, "pre_text"),
        "table": render_table(_decoded(row.get("table"))),
        "post_text": _sentences(row, "post_text"),
        "question": _text(question, "question"),
    }
    result = next((question[key] for key in ("exe_ans", "final_result") if question.get(key) not in (None, "")), None)
    names = ("answer", "answers", "exe_ans", "final_result")
    return Parts(texts, _text(question, *names), {"result": None if result is None else str(result)})


def _sentences(row: Row, name: str) -> str:
    value = _decoded(row.get(name))
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list):
        raise BadRow(f"needs {name}, a list of sentences, got {str(value)[:60]!r}")
    return " ".join(str(sentence).strip() for sentence in value if str(sentence).strip() not in ("", "."))


def _decoded(value: Any) -> Any:
    """Lists that a csv file can only hold as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def read_countdown(row: Row) -> Parts:
    """Numbers and a target; the reference is any expression that hits it."""
    numbers, target = _decoded(row.get("nums")), _decoded(row.get("target"))
    if isinstance(target, str) and re.fullmatch(r"\d{1,9}", target.strip()):
        target = int(target)
    whole = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 10**9 for number in numbers)
    if not whole or not 1 <= len(numbers) <= 5 or type(target) is not int:
        raise BadRow(f"needs nums, 1 to 5 whole numbers, and a whole target, got {numbers!r} and {target!r}")
    texts = {"nums": ", ".join(map(str, numbers)), "target": str(target)}
    metadata = {"numbers": numbers, "target": target}
    return Parts(texts, functools.partial(countdown_solution, tuple(numbers), target), {"metadata": metadata})


@functools.lru_cache(maxsize=100_000)
def countdown_solution(numbers: tuple[int, ...], target: int) -> str:
    """An expression of all ``numbers``, each once, with + - * / that equals ``target``; empty if there is none."""
    found = _search([(Fraction(number), str(number)) for number in numbers], target)
    return found[1:-1] if found.startswith("(") else found


def _search(terms: list[tuple[Fraction, str]], target: int) -> str:
    if len(terms) == 1:
        return terms[0][1] if terms[0][0] == target else ""
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for (a, left), (b, right) in ((terms[i], terms[j]), (terms[j], terms[i])):
            options = [(a - b, f"({left} - {right})")]
            if b:
                options.append((a / b, f"({left} / {right})"))
            if a >= b:  # the two that do not care for the order, once
                options += [(a + b, f"({left} + {right})"), (a * b, f"({left} * {right})")]
            for option in options:
                if found := _search([*rest, option], target):
                    return found
    return ""


def read_r1_code(row: Row) -> Parts:
    """A program, an input and what the program prints for it: to be predicted and compared as text, never run."""
    if any(row.get(name) for name in ("program", "code")):
        return _prediction(_text(row, "program", "code"), str(row.get("input") or ""), _text(row, "output"))
    reward, extra = row.get("reward_model"), row.get("extra_info")
    truth = _decoded(reward.get("ground_truth")) if isinstance(reward, Mapping) else None
    if not isinstance(truth, Mapping):
        raise BadRow(
            "needs program, input and output, or reward_model with a ground_truth in JSON, got the columns "
            + (", ".join(map(str, row)) or "none")
        )
    inputs, outputs = truth.get("inputs"), truth.get("outputs")
    program = str(extra.get("reference") or "").strip() if isinstance(extra, Mapping) else ""
    if not program or not isinstance(inputs, list) or not isinstance(outputs, list) or not (inputs and outputs):
        raise BadRow(
            "is scored by running unit tests on what the model writes, which is refused: only rows with a program "
            "(extra_info.reference), an input and its output can be used, as output prediction; skip_bad_rows: true "
            "leaves the others out, and codeio and bf of reasoning_gym make such questions without a data set"
        )
    return _prediction(program, str(inputs[0]), str(outputs[0]))


def _prediction(program: str, given: str, output: str) -> Parts:
    if not output.strip():
        raise BadRow("has an empty output: there is nothing to predict")
    return Parts({"program": program.strip("\n"), "input": given.strip()}, output.strip())


FORMATS: dict[str, Format] = {
    "math": Format(read_math, "{problem}", "math_verify", levels=True),
    "deepscaler": Format(read_deepscaler, "{problem}", "math_verify"),
    "finqa": Format(read_finqa, "{pre_text}\n\n{table}\n\n{post_text}\n\n{question}", "financial"),
    "countdown": Format(
        read_countdown,
        "Using the numbers {nums}, write an expression that equals {target}. Use + - * / and every number once.",
        "expression",
    ),
    "r1_code": Format(
        read_r1_code, "What does this program print?\n\n{program}\n\nInput:\n{input}\n\nOutput:", "exact"
    ),
}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """``template`` with every {name} replaced; other braces stay. Raises BadRow for a name that is not there."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in texts:
            raise BadRow(f"has no {{{match[1]}}} for the template, only {', '.join(sorted(texts)) or 'nothing'}")
        return texts[match[1]]

    return re.sub(r"\{([A-Za-z_]\w*)\}", replace, template).strip()
