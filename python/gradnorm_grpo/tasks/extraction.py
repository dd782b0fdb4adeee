r"""The final answer of a completion, and the number in it.

The final answer is, in this order: the last ``<answer>...</answer>``; the last ``\boxed{...}``; the last line that
starts with ``####``, if it ends the text or is a bare number; else the whole text. Reasoning up to ``</think>`` is left
out. A box or an answer tag that never closes (a truncated completion) holds no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 400  # characters of a final answer, or of the end of a text, that a verifier reads
_MAX_DIGITS, _MAX_EXPONENT = 40, 400


def boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` (or ``\fbox{...}``, ``\boxed x``) holds; "" without one, or if it never closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return ""
    rest = text[start:].split("box", 1)[1].removeprefix("ed")
    if not rest.lstrip().startswith("{"):
        return rest.split("$")[0].strip()
    rest, depth = rest.lstrip(), 0
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i].strip()
    return ""


def tagged(text: str) -> str | None:
    """What the last ``<answer>...</answer>`` holds, or what follows ``</think>``; None without such tags."""
    start = text.lower().rfind("<answer>")
    if start >= 0:
        inner, close, _ = text[start + len("<answer>") :].partition("</answer>")
        return inner.strip() if close else ""
    _, close, rest = text.rpartition("</think>")
    if close:
        return rest.strip()
    return "" if "<think>" in text else None


_HASHED = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n#][^\n]*)")
_BARE = re.compile(r"[-+\u2212$€£(\s]*[0-9][0-9.,/\s]*%?\)?")


def marked(text: str) -> str | None:
    """The final answer that a tag, a box or ``####`` marks; None where the text marks none."""
    inner = tagged(text)
    text = text if inner is None else inner
    if "\\boxed" in text or "\\fbox" in text:
        return boxed(text)
    hashed = _HASHED.findall(text)
    # A heading of Markdown looks the same: it is an answer at the end of the text, or where it is nothing but a number.
    if hashed and (text.rstrip().endswith(hashed[-1].rstrip()) or _BARE.fullmatch(hashed[-1].strip())):
        return hashed[-1].strip()
    return inner


def final_answer(text: str) -> str:
    """The final answer, or the whole text where nothing marks one."""
    found = marked(text)
    return text if found is None else found


# Markdown emphasis and code: an opening mark does not follow an operand, so 3**2 and 5*6*7 stay as they are.
_EMPHASIS = re.compile(r"(?<![\w)\]}*`])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*_`])([^\n]*?[^\s*_`])\1(?![\w(*`])")


def without_emphasis(text: str) -> str:
    """``text`` without Markdown's bold, italics and code marks around words."""
    for _ in range(3):  # one mark inside another
        text = _EMPHASIS.sub(r"\2", text)
    return text


@dataclass(frozen=True)
class Number:
    """A number as written: its value with its sign, and how it is written."""

    value: Fraction
    decimals: int | None  # decimals shown; None for a fraction, which is exact
    percent: bool
    brackets: bool  # unsigned and in brackets, which means a minus in accounts
    scale: int  # thousand, million, ... behind it; 0: none


_SCALES = {
    **dict.fromkeys(("k", "thousand"), 10**3),
    **dict.fromkeys(("m", "mn", "mm", "million"), 10**6),
    **dict.fromkeys(("b", "bn", "billion"), 10**9),
    **dict.fromkeys(("tn", "trillion"), 10**12),
}
_LETTER_SCALES = {"k", "m", "mn", "mm", "b", "bn", "tn"}  # directly behind the digits and a currency: $1.5M
_UNITS = {
    *("st", "nd", "rd", "th", "mm", "cm", "dm", "m", "km", "in", "ft", "yd", "mi", "mg", "g", "kg", "t", "lb", "lbs"),
    *("oz", "ml", "cl", "l", "ms", "s", "sec", "min", "h", "hr", "hrs", "d", "w", "kw", "kwh", "j", "kj", "n", "v"),
    *("hz", "khz", "mhz", "ghz", "kb", "mb", "gb", "tb", "mph", "kmh", "pa", "kpa", "usd", "eur", "gbp", "px", "pp"),
    *("c", "f", "deg", "am", "pm", "percent"),
}
_CURRENCY = "$€£¥₹"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8"}
_THIN = "\u202f"  # stands for every space that groups digits
_OPERATORS = "*^/×÷·√"
_DIGITS = rf"(?:(?<!\w)\.)?[0-9](?:[0-9.,'’_{_THIN}]*[0-9])?"
_SCAN = re.compile(
    rf"""
    (?P<word>[^\W\d_]{{2,}}(?:[-‑]\w+)+|[^\W\d]\w*[0-9](?:\.[0-9]+)+|[^\W\d]\w*)  # CO2, x5, v1.2, COVID-19
    |(?P<money>[{_CURRENCY}])?[ ]?(?P<open>\()?[ ]?(?P<sign>[-+])?(?P<gap>[ ]?)
    (?P<money2>[{_CURRENCY}])?[ ]?(?P<sign2>-)?
    (?P<digits>{_DIGITS})
    (?:[eE](?P<exponent>[-+]?[0-9]{{1,5}})(?!\w|\.[0-9])
      |[ ]?[×x*·][ ]?10[ ]?(?:(?:\^|\*\*)[ ]?\{{?(?P<power>[-+]?[0-9]{{1,5}})\}}?|(?P<raised>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,5}}))
      |[ ](?P<over>[0-9]+)[ ]?/[ ]?(?P<under>[0-9]+)
      |[ ]?/[ ]?(?P<denominator>[0-9]+)
    )?
    (?P<percent>[ ]?(?:%|percent\b|per[ ]cent\b|pct\b))?
    (?P<close>[ ]?\))?
    (?P<percent2>[ ]?(?:%|percent\b))?
    (?:[ ]?(?P<scale>thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def last_number(text: str) -> Number | None:
    """The last number of a text, or None where it has none or its last one cannot be read.

    Read are: thousands in groups (1,234; 1 234; 1'234; 12,34,567), a decimal point or a decimal comma where the comma
    cannot group thousands (3,14 is 3.14; 1,234 is 1234), exponents (1e-5, 6.02 × 10^23), fractions and mixed numbers,
    Unicode minus signs, currency signs, LaTeX around all of these, and Markdown emphasis. A number that is part of a
    word (CO2) is passed over. One that is part of a computation, a range, a date, a time or a list without spaces
    (10^5, 5-7, 1,2,3) is not read, and no earlier number takes its place.
    """
    text = text.strip()
    tail = _plain(text[-MAX_LENGTH:])
    last = None
    for match in _SCAN.finditer(tail):
        last = match if match["digits"] else last
    if last is None or (last.start("digits") == 0 and len(text) > MAX_LENGTH):
        return None
    return _read(tail, last)


def _plain(text: str) -> str:
    """The text with its typography and its LaTeX reduced to plain characters."""
    text = re.sub(r"[\u2212\ufe63\uff0d]", "-", text)
    text = re.sub(r"(?<![0-9])[\u2012\u2013](?=[0-9.])", "-", text)  # between digits an en dash is a range
    text = re.sub(r"[\u2014\u2015]", " ", text)
    text = re.sub(r"(?<=[0-9])(?:[\u00a0\u2007\u2009\u202f]|\\,|\\;|\\ |~)(?=[0-9]{3}(?![0-9]))", _THIN, text)
    text = re.sub(r"(?<=[0-9])\\!|(?<=,)\\!", "", text).replace("{,}", ",")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 ", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])", r" \1/\2 ", text)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", text)
    text = re.sub(r"\\div(?![A-Za-z])", "÷", text)
    text = re.sub(r"\\sqrt(?![A-Za-z])", "√", text).replace("\\pi", "π")
    text = re.sub(r"\\([%$#&_{}])", r"\1", text)
    text = re.sub(r"\\(?:[A-Za-z]+|.)", " ", text)
    for mark, written in _VULGAR.items():
        text = re.sub(rf"(?<=[0-9]){mark}(?![0-9])", f" {written}", text)
        text = re.sub(rf"(?<![0-9]){mark}(?![0-9])", written, text)
    text = re.sub(r"[\u00a0\u2007\u2009\t]", " ", text).replace("\u2044", "/")
    text = without_emphasis(text)
    # An exponent of a unit is no number: 11 cm^2, 11 m³.
    text = re.sub(r"(?<![^\W\d_])([A-Za-z]{1,3})(?:\^\{?-?[1-9]\}?|[²³])(?![\w^])", _unit_alone, text)
    return re.sub(r"(?<![\w.,])([1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9])", _grouped, text)


def _unit_alone(match: re.Match[str]) -> str:
    return match[1] if match[1].lower() in _UNITS else match[0]


def _grouped(match: re.Match[str]) -> str:
    return match[1] + match[2].replace(" ", _THIN)


def _read(text: str, match: re.Match[str]) -> Number | None:
    """The number that _SCAN matched, or None where what stands around it makes it something else."""
    digits = _digits(match["digits"])
    if digits is None or len(match["digits"]) > _MAX_DIGITS:
        return None
    value, scale = Fraction(digits), 0
    decimals: int | None = len(digits.partition(".")[2])
    exponent = match["exponent"] or match["power"] or (match["raised"] or "").translate(_SUPERSCRIPTS)
    if exponent:
        if abs(int(exponent)) > _MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
        decimals = max(0, len(digits.partition(".")[2]) - int(exponent))
    elif match["denominator"] or match["under"]:
        under = int((match["denominator"] or match["under"])[:_MAX_DIGITS])
        if under == 0 or (match["over"] and value.denominator != 1):
            return None
        value = value + Fraction(int(match["over"][:_MAX_DIGITS]), under) if match["over"] else value / under
        decimals = None
    if match["scale"]:
        scale = _SCALES[match["scale"].lower()]
    # What follows.
    behind = text[match.end() :]
    letters = re.match(r"[^\W\d_]+", behind)
    if letters and not match["percent"] and not match["close"] and not match["scale"]:
        if (match["money"] or match["money2"]) and letters[0].lower() in _LETTER_SCALES:
            scale = _SCALES[letters[0].lower()]
        elif letters[0].lower() not in _UNITS:
            return None
    if re.match(rf"\s?[{_OPERATORS}]+\s?[\w(.√]|[-–+:][0-9(]|[⁰¹²³⁴⁵⁶⁷⁸⁹_]", behind):
        return None
    # What stands before: the operand of an operator, the start of a range, a date, a time or a ratio.
    start = min(match.start(name) for name in ("sign", "money", "open", "money2", "digits") if match[name])
    before = text[:start].rpartition("\n")[2]
    if re.search(rf"√\{{?\s*$|[\w)\]}}%]\s*[{_OPERATORS}]+\s*[({{]?\s*$|[0-9)]\s?x\s?$|[0-9]\s?[:–]\s?$", before):
        return None
    negative = "-" in (match["sign"] or "", match["sign2"] or "")
    if match["sign"]:
        joined = before != before.rstrip()
        operand = re.search(r"(?:[0-9)\]}%]|(?<![^\W\d_])[^\W\d_])$", before.rstrip())
        if operand and (not joined or match["gap"]):
            return None  # 12 - 5, x-5
        alone = match.start() == 0 and match.end() == len(text.rstrip())
        if match["gap"] and (joined or not before) and not alone:
            negative = False  # a dash or a bullet: "Total - 11"
    elif re.search(r"[\w)\]]$", before) and match["open"] is None:
        return None
    brackets = bool(match["open"] and match["close"]) and not (match["sign"] or match["sign2"])
    percent = bool(match["percent"] or match["percent2"])
    return Number(-value if negative else value, decimals, percent, brackets, scale)


def _digits(token: str) -> str | None:
    """Digits with their separators as plain digits with a point; None where the separators make no number."""
    group = rf"[{_THIN}'’_]"
    forms = (
        (r"[0-9]+", ""),
        (r"[0-9]*\.[0-9]+", ""),
        (r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?", ","),
        (r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?", ","),
        (rf"[1-9][0-9]{{0,2}}(?:{group}[0-9]{{3}})+(?:\.[0-9]+)?", f"{_THIN}'’_"),
    )
    for form, dropped in forms:
        if re.fullmatch(form, token):
            return token.translate({ord(mark): None for mark in dropped})
    european = re.fullmatch(rf"([0-9]+|[1-9][0-9]{{0,2}}(?:[.{_THIN}'’][0-9]{{3}})+),([0-9]+)", token)
    if european:
        return re.sub(r"[^0-9]", "", european[1]) + "." + european[2]
    if re.fullmatch(r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}", token):
        return token.replace(".", "")
    return None
