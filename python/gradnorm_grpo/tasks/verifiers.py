"""Rewards: from a completion's text to 0 or 1. Nothing here, and nothing called from here, executes that text.

reasoning-gym's scores are made binary (1 where the score is at least 0.99): its small credit for the format would be
blown up to a full-size advantage by dividing by the group's standard deviation.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ..errors import UserError

Verifier = Callable[[str, str, dict[str, Any]], bool]  # completion, reference answer, the example's data

MAX_LENGTH = 400  # characters of a completion a verifier will read
# Not a number that is part of a word or of a computation, such as the last one of 10**10**10.
_NUMBER = re.compile(r"(?<![\w.*^/])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![\w*^/]|\.\d)", re.ASCII)


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


_AMOUNT = re.compile(
    r"(?<![\w.*^/,])(?P<open>\()?\s*(?P<sign>[-+])?\s*\$?\s*(?P<sign2>-)?(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)(?![\w*^/]|\.\d)"
    r"\s*(?P<percent>%|percent\b)?(?P<close>\))?\s*(?P<percent2>%|percent\b)?\s*(?P<scale>thousand|million|billion)?",
    re.IGNORECASE | re.ASCII,
)
_SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def _amount(text: str) -> tuple[Fraction, int, bool, int] | None:
    """The last amount of a text: its digits' value with its sign, decimals shown, whether in percent, scale (0: none).

    An amount in brackets is negative, as in accounts, unless it carries a sign.
    """
    found = list(_AMOUNT.finditer(text[-MAX_LENGTH:]))
    if not found or len(found[-1]["digits"]) > 40:
        return None
    match = found[-1]
    digits = match["digits"].replace(",", "")
    signed = match["sign"] or match["sign2"]
    negative = signed == "-" or (not signed and match["open"] and match["close"])
    value = Fraction(digits) * (-1 if negative else 1)
    decimals = len(digits.partition(".")[2])
    return value, decimals, bool(match["percent"] or match["percent2"]), _SCALE.get((match["scale"] or "").lower(), 0)


def financial(text: str, answer: str, data: dict[str, Any]) -> bool:
    """An amount of money, a count or a percentage, as FinQA's questions ask for; "yes" or "no" as the last word.

    The last amount of the text counts; $, commas, brackets for a minus and %, which divides by 100, are read. Right is
    what equals data["result"], the exact result of the row, to five decimals, the rule of FinQA's own evaluation; and
    what rounds to ``answer`` at the decimals that ``answer`` shows: 14.1% stands for all from 14.05% to 14.15%, with or
    without its sign, and as a share (0.141). Million and billion count where both sides have one.
    """
    result = data.get("result")
    words = re.findall(r"[a-z]+", text[-MAX_LENGTH:].lower())
    wanted = str(answer if result is None else result).strip().lower()
    if wanted in ("yes", "no"):
        return bool(words) and words[-1] == wanted
    given = _amount(text)
    if given is None:
        return False
    value, _, percent, scale = given
    share = value / 100 if percent else value
    exact_result = None if result is None else _amount(str(result))
    if exact_result is not None and not scale:
        target = exact_result[0] / 100 if exact_result[2] else exact_result[0]
        if abs(share - target) * 10**5 <= Fraction(1, 2):
            return True
    gold = _amount(answer)
    if gold is None:
        return False
    target, decimals, gold_percent, gold_scale = gold
    values = [value] if percent == gold_percent else [share]
    if gold_percent and not percent:
        values = [value, value * 100]
    half = Fraction(1, 2 * 10**decimals)
    if scale and gold_scale:
        values, target, half = [v * scale for v in values], target * gold_scale, half * gold_scale
    return any(abs(v - target) <= half for v in values)


def json_value(text: str, answer: str, data: dict[str, Any]) -> bool:
    """The same text up to white space, or the same JSON value: keys in any order, 2 is 2.0, true is not 1."""
    if exact(text, answer, data):
        return True
    if len(text) > max(MAX_LENGTH, 4 * len(answer)):
        return False
    try:
        return _same_json(json.loads(text), json.loads(answer))
    except (ValueError, RecursionError):
        return False


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same_json(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def math_verify(text: str, answer: str, data: dict[str, Any]) -> bool:
    """Equal as mathematics, by the math-verify package.

    Only its LaTeX grammar is used: its route for plain expressions goes through sympy's parse_expr, which evaluates
    Python. Text without LaTeX is read as if it were boxed. Long texts and towers of powers, which sympy would compute,
    are wrong; the very text of the answer is right.
    """
    if exact(_unboxed(text), _unboxed(answer), data):
        return True
    from math_verify import LatexExtractionConfig, parse, verify

    if len(text) > MAX_LENGTH or _expensive(text):
        return False
    if not re.search(r"\\boxed|\$|\\\(|\\\[", text):
        text = f"\\boxed{{{text.strip()}}}"
    latex = [LatexExtractionConfig()]
    gold = parse(answer if re.search(r"\\boxed|\$", answer) else f"\\boxed{{{answer}}}", latex)
    found = parse(text, latex, raise_on_error=False)
    return bool(gold and found and verify(gold, found, raise_on_error=False))


def _unboxed(text: str) -> str:
    boxed = re.fullmatch(r"\s*\$?\\boxed\{(.*)\}\$?\s*", text, re.DOTALL)
    return boxed[1] if boxed else text.strip().strip("$")


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
    metadata = data.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("numbers"), list):
        return False
    return sorted(used) == sorted(metadata["numbers"]) and result == metadata.get("target", 24)


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "numeric": numeric,
    "financial": financial,
    "math_verify": math_verify,
    "expression": expression,
    "json_value": json_value,
}

# countdown and puzzle24 hand the completion to sympy's parse_expr, which evaluates Python; codeio measures the distance
# of two trees, slowly, and calls a long near miss right. Ours compute the same, or compare.
OWN_SCORE = {"countdown": expression, "puzzle24": expression, "codeio": json_value}
# Scores that evaluate the data set's own question or answer (the first two), or have a parser of their own.
_HARMLESS = {"number_sorting", "bitwise_arithmetic", "propositional_logic"}
_EVALUATING = {"eval", "exec", "parse_expr", "sympify", "parse_latex"}


def executes_text(dataset: Any) -> bool:
    """Whether the score of a reasoning-gym data set evaluates a text, going by its source and that of what it calls.

    Followed are calls to the class's own methods and to functions of its package.
    """
    kind = type(dataset)
    module = vars(sys.modules[kind.__module__])
    todo, seen = [kind.score_answer], set()
    while todo:
        function = todo.pop()
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in _EVALUATING:
                return True
            called = module.get(name) if isinstance(node.func, ast.Name) else getattr(kind, name, None)
            if inspect.isfunction(called) and called.__module__.startswith("reasoning_gym") and called not in seen:
                todo.append(called)
    return False


def reasoning_gym_verifier(name: str, dataset: Any) -> Verifier:
    """The data set's own score, made binary; refuses one that would execute a completion."""
    if name in OWN_SCORE:
        return OWN_SCORE[name]
    if name not in _HARMLESS and executes_text(dataset):
        raise UserError(
            f"task {name!r} cannot be scored by reasoning-gym, which would execute what the model wrote: give the "
            f"task a verifier of {', '.join(sorted(VERIFIERS))}"
        )

    def score(text: str, answer: str, data: dict[str, Any]) -> bool:
        if len(text) > MAX_LENGTH and len(text) > 4 * len(answer):
            return False
        try:
            return float(dataset.score_answer(text, data)) >= 0.99
        except Exception:  # the package's scorers are free to stumble over arbitrary text
            return False

    return score
