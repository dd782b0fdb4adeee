"""Rewards: from a completion's text to 0 or 1. Nothing here, and nothing called from here, executes that text.

reasoning-gym's scores are made binary (1 where the score is at least 0.99): its small credit for the format would be
blown up to a full-size advantage by dividing by the group's standard deviation.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .errors import UserError

Verifier = Callable[[str, str, dict[str, Any]], bool]  # completion, reference answer, the example's data

MAX_LENGTH = 400  # characters of a completion a verifier will read
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def exact(text: str, answer: str, data: dict[str, Any]) -> bool:
    """Same text, up to white space."""
    return text.split() == answer.split()


def _number(text: str) -> Fraction | None:
    found = _NUMBER.findall(text[-MAX_LENGTH:])
    if not found or len(found[-1]) > 40:
        return None
    try:
        return Fraction(found[-1].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def numeric(text: str, answer: str, data: dict[str, Any]) -> bool:
    """The last number of the text is the answer's, to one part in a million."""
    value, target = _number(text), _number(answer)
    return value is not None and target is not None and math.isclose(value, target, rel_tol=1e-6, abs_tol=1e-9)


def math_verify(text: str, answer: str, data: dict[str, Any]) -> bool:
    """Equal as mathematics, by the math-verify package.

    Only its LaTeX grammar is used: its route for plain expressions goes through sympy's parse_expr, which evaluates
    Python. Text without LaTeX is read as if it were boxed. Long texts and towers of powers, which sympy would compute,
    are wrong.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    if len(text) > MAX_LENGTH or _expensive(text):
        return False
    if not re.search(r"\\boxed|\$|\\\(|\\\[", text):
        text = f"\\boxed{{{text.strip()}}}"
    latex = [LatexExtractionConfig()]
    gold = parse(answer if re.search(r"\\boxed|\$", answer) else f"\\boxed{{{answer}}}", latex)
    found = parse(text, latex, raise_on_error=False)
    return bool(gold and found and verify(gold, found, raise_on_error=False))


def _expensive(text: str) -> bool:
    """Cheap to write, endless to parse or compute: big or piled-up powers, factorials, long numbers, deep brackets."""
    power = r"(?:\^|\*\*)"
    return (
        "!" in text
        or len(re.findall(power, text)) > 3
        or len(re.findall(r"[(\[{]", text)) > 40
        or bool(re.search(rf"{power}\s*\{{?\s*-?\d{{3,}}|{power}[^a-zA-Z]*{power}|\d{{30,}}", text))
    )


def arithmetic_value(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression of whole numbers, + - * / and brackets, and the numbers in it; ValueError for
    others."""
    if len(text) > 120 or not re.fullmatch(r"[\d+\-*/() \t]+", text) or re.search(r"\d{10,}", text):
        raise ValueError("not a short arithmetic expression")
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
        raise ValueError("only whole numbers, + - * / and brackets are allowed")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def expression(text: str, answer: str, data: dict[str, Any]) -> bool:
    """An expression that uses each of metadata["numbers"] once and equals metadata["target"] (24 if there is none)."""
    try:
        result, used = arithmetic_value(text)
    except ValueError:
        return False
    metadata = data["metadata"]
    return sorted(used) == sorted(metadata["numbers"]) and result == metadata.get("target", 24)


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "numeric": numeric,
    "math_verify": math_verify,
    "expression": expression,
}

# Their own scores hand the completion to sympy's parse_expr, which evaluates Python; ours computes the same.
OWN_SCORE = {"countdown": expression, "puzzle24": expression}
# A score with one of these words in it that evaluates the data set's own answer, or is a parser of its own.
_HARMLESS = {"number_sorting", "propositional_logic"}


def executes_text(dataset: Any) -> bool:
    """Whether the score of a reasoning-gym data set evaluates the text it is given, going by its source."""
    source = inspect.getsource(type(dataset).score_answer)
    return bool(re.search(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\(", source))


def reasoning_gym_verifier(name: str, dataset: Any) -> Verifier:
    """The data set's own score, made binary; refuses one that would execute a completion."""
    if name in OWN_SCORE:
        return OWN_SCORE[name]
    if name not in _HARMLESS and executes_text(dataset):
        raise UserError(
            f"task {name!r} cannot be scored by reasoning-gym, which would execute what the model wrote: give the "
            f"task a "
            f"verifier of {', '.join(sorted(VERIFIERS))}"
        )

    def score(text: str, answer: str, data: dict[str, Any]) -> bool:
        if len(text) > MAX_LENGTH and len(text) > 4 * len(answer):
            return False
        try:
            return float(dataset.score_answer(text, data)) >= 0.99
        except Exception:  # the package's scorers are free to stumble over arbitrary text
            return False

    return score
