"""Rewards: from a completion's text to 0 or 1. Nothing here, and nothing called from here, executes that text.

reasoning-gym's scores are made binary (1 where the score is at least 0.99): dividing by the group's standard deviation
would scale its small credit for the format up to a full-size advantage.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ..errors import UserError
from .extraction import MAX_LENGTH, Number, final_answer, last_number, marked, tagged, without_emphasis

Verifier = Callable[[str, str, dict[str, Any]], bool]  # completion, reference answer, the example's data


def exact(text: str, answer: str, data: dict[str, Any]) -> bool:
    """Same text, up to white space."""
    return text.split() == answer.split()


def numeric(text: str, answer: str, data: dict[str, Any]) -> bool:
    """The last number of the final answer equals the reference's to one part in a million.

    :func:`~.extraction.last_number` says what is read as a number, :func:`~.extraction.final_answer` what the final
    answer is. A percent sign, a unit and a currency are not compared.
    """
    value, target = last_number(final_answer(text)), last_number(final_answer(answer))
    if value is None or target is None:
        return False
    if target.value == 0:
        return abs(value.value) <= Fraction(1, 10**9)
    return abs(value.value - target.value) * 10**6 <= abs(target.value)


def financial(text: str, answer: str, data: dict[str, Any]) -> bool:
    """An amount of money, a count or a percentage, as FinQA's questions ask for; "yes" or "no" as the last word.

    The last number of the final answer counts; $, brackets for a minus and %, which divides by 100, are read. It is
    right if it equals data["result"], the exact result of the row, to five decimals (the rule of FinQA's own
    evaluation), or if it rounds to ``answer`` at the decimals that ``answer`` shows: 14.1% stands for everything from
    14.05% to 14.15%, with or without its sign, and as a share (0.141). Million and billion count where both sides have
    one.
    """
    result = data.get("result")
    text = final_answer(text)
    words = re.findall(r"[a-z]+", text[-MAX_LENGTH:].lower())
    wanted = str(answer if result is None else result).strip().lower()
    if wanted in ("yes", "no"):
        return bool(words) and words[-1] == wanted
    given, gold = _amount(text), _amount(answer)
    if given is None:
        return False
    share = given.value / 100 if given.percent else given.value
    exact_result = None if result is None else _amount(str(result))
    if exact_result is not None and not given.scale:
        target = exact_result.value / 100 if exact_result.percent else exact_result.value
        if abs(share - target) * 10**5 <= Fraction(1, 2):
            return True
    if gold is None:
        return False
    values = [given.value] if given.percent == gold.percent else [share]
    if gold.percent and not given.percent:
        values = [given.value, given.value * 100]
    target = gold.value
    half = abs(target) / 10**6 if gold.decimals is None else Fraction(1, 2 * 10**gold.decimals)
    if given.scale and gold.scale:
        values, target, half = [v * given.scale for v in values], target * gold.scale, half * gold.scale
    return any(abs(v - target) <= half for v in values)


def _amount(text: str) -> Number | None:
    """The last number of a text, negative where it stands in brackets without a sign, as in accounts."""
    found = last_number(text)
    return replace(found, value=-found.value) if found and found.brackets else found


def json_value(text: str, answer: str, data: dict[str, Any]) -> bool:
    """The same text up to white space, or the same JSON value: keys in any order, 2 is 2.0, true is not 1.

    The value may stand in an answer tag or in one Markdown code block. Numbers are compared exactly. A repeated key,
    NaN and Infinity are not JSON.
    """
    if exact(text, answer, data):
        return True
    if len(text) > max(MAX_LENGTH, 4 * len(answer)):
        return False
    inner = tagged(text)
    text = text if inner is None else inner
    block = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    try:
        return _same_json(_strict_json(block[1] if block else text), _strict_json(answer))
    except (ValueError, RecursionError, ArithmeticError):
        return False


def _strict_json(text: str) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def no_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    return json.loads(
        text, parse_int=Decimal, parse_float=Decimal, parse_constant=no_constant, object_pairs_hook=no_repeated_key
    )


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same_json(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


_LATEX = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$((?:[^$\n\\]|\\.)+)\$", re.DOTALL)
_ANSWER_IS = re.compile(r"\banswer\b(?:[^\n.:=]{0,40}?\bis\b)?\s*[:=]?\s*", re.IGNORECASE)


def math_verify(text: str, answer: str, data: dict[str, Any]) -> bool:
    """Equal as mathematics, by the math-verify package.

    What is compared is the final answer: an answer tag, the last box, a line of ``####``; else the last LaTeX formula;
    else what follows the last "answer is" or "answer:"; else the whole text, if it is short. The text before it may be
    of any length and hold anything. Only math-verify's LaTeX grammar is used: its route for plain expressions goes
    through sympy's parse_expr, which evaluates Python. An answer that is long, or that sympy would compute for long
    (towers of powers, large factorials), is wrong; the very text of the reference is right.
    """
    found = marked(text)
    if found is None:
        tail = without_emphasis(text[-5 * MAX_LENGTH :])
        formulas, pieces = _LATEX.findall(tail), _ANSWER_IS.split(tail)
        if formulas:
            found = next(group for group in formulas[-1] if group)
        elif len(pieces) > 1:
            found = pieces[-1].strip().split("\n")[0]
        else:
            found = text
    found = without_emphasis(found.strip()).strip().rstrip(".").strip()
    gold = _unboxed(answer)
    if exact(found, gold, data) or exact(_unboxed(text), gold, data):
        return True
    if not found or len(found) > MAX_LENGTH or _expensive(found):
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    wanted = parse(answer if re.search(r"\\boxed|\$", answer) else f"\\boxed{{{answer}}}", latex)
    given = parse(f"\\boxed{{{found}}}", latex, raise_on_error=False)
    return bool(wanted and given and verify(wanted, given, raise_on_error=False))


def _unboxed(text: str) -> str:
    r"""The text without the box or the dollar signs around all of it."""
    boxed = re.fullmatch(r"\s*\$?\\boxed\{(.*)\}\$?\s*", text, re.DOTALL)
    return boxed[1] if boxed else text.strip().strip("$")


def _expensive(text: str) -> bool:
    """Cheap to write, endless to parse or compute: big or piled-up powers, factorials, long numbers, deep brackets."""
    power = r"(?:\^|\*\*)"
    exponents = [int(found) for found in re.findall(rf"{power}\s*\{{?\s*[-+]?(\d{{1,2}})(?!\d)", text)]
    return (
        bool(re.search(r"(?<!\d)(?:\d{3,}|[^\d\s]|\d{1,2}!+)\s*!|^\s*!", text))
        or len(re.findall(power, text)) > 12
        or sum(exponents) > 120
        or len(re.findall(r"[(\[{]", text)) > 40
        or bool(re.search(rf"{power}\s*\{{?\s*[-+]?\d{{3,}}|{power}[^a-zA-Z+\-]*{power}|\d{{30,}}", text))
    )


_ARITHMETIC: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


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
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(left), value(right))
        raise ValueError("only whole numbers, + - * / and brackets are allowed")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


_OPERATORS = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/"})


def expression(text: str, answer: str, data: dict[str, Any]) -> bool:
    """An expression that uses each of metadata["numbers"] once and equals metadata["target"] (24 if there is none).

    The final answer counts, in plain or LaTeX operators. "= 24" may follow it if that is the target.
    """
    metadata = data.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("numbers"), list):
        return False
    target = metadata.get("target", 24)
    text = without_emphasis(final_answer(text)[:MAX_LENGTH]).strip()
    text = re.sub(r"^(?:\$|\\\()(.*?)(?:\$|\\\))$", r"\1", text).translate(_OPERATORS)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", re.sub(r"\\div(?![A-Za-z])", "/", text))
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    left, equals, right = text.partition("=")
    try:
        if equals and right.strip() != str(target):
            return False
        result, used = arithmetic_value(left)
    except ValueError:
        return False
    return sorted(used) == sorted(metadata["numbers"]) and result == target


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
        inner = tagged(text)  # a box or #### may be part of an answer of these data sets
        text = text if inner is None else inner
        if len(text) > MAX_LENGTH and len(text) > 4 * len(answer):
            return False
        try:
            return float(dataset.score_answer(text, data)) >= 0.99
        except Exception:  # the package's scorers are free to stumble over arbitrary text
            return False

    return score
