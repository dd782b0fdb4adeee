"""How numbers and names are written, in the terminal, on pages and in pictures."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence

MISSING = "–"
MINUS = "\u2212"  # the true minus sign: as wide as a digit, and never a place to break a line
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
# Characters that reorder the text around them (a task's name must not rearrange the page), and two that XML has not.
_BARRED = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFFE, 0xFFFF)}


def clean(name: object) -> str:
    """A name as one line of printable text: control characters, lone surrogates and reordering marks become �."""
    return "".join("\ufffd" if unicodedata.category(c) in {"Cc", "Cs"} or c in _BARRED else c for c in str(name))


def columns(text: str) -> int:
    """How many columns the text takes: ideographs and the like are two wide, combining marks take none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(name: str, width: float, measure: Callable[[str], float] = columns) -> str:
    """The name, cut with an ellipsis where it is wider than `width`; `measure` gives a text's width."""
    if measure(name) <= width:
        return name
    while name and measure(name + "…") > width:
        name = name[:-1]
    return name.rstrip() + "…"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def power(exponent: int) -> str:
    """×10 to a power, or nothing for the power 0."""
    return f"×10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""


def fixed(value: float, digits: int = 2) -> str:
    """A number with so many decimals; a dash for NaN."""
    return _signed(f"{round(value, digits) + 0.0:.{digits}f}") if math.isfinite(value) else MISSING  # + 0.0: no "−0.00"


def signed(value: float, digits: int = 2) -> str:
    """Like fixed(), with its sign always shown."""
    return _signed(f"{round(value, digits) + 0.0:+.{digits}f}") if math.isfinite(value) else MISSING


def significant(value: float, digits: int = 2) -> str:
    """A number with so many significant digits: 0.037, 4.2, 1300, 3.7×10⁻⁴; a dash for NaN."""
    if not math.isfinite(value):
        return MISSING
    value = float(f"{value:.{digits - 1}e}")
    exponent = _exponent(value)
    if -3 <= exponent < 5:
        return _signed(f"{value:,.{max(digits - 1 - exponent, 0)}f}")
    return _signed(f"{value / 10.0**exponent:.{digits - 1}f}") + power(exponent)


def percent(value: float) -> str:
    """A share as a percentage; a dash for NaN."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"


def count(value: float) -> str:
    """A whole number with thousands separated; a dash for NaN."""
    return f"{value:,.0f}" if math.isfinite(value) else MISSING


def with_error(value: float, error: float) -> str:
    """value ± error in one common power of ten, the error to two digits: (3.7 ± 2.0)×10⁻². Dashes for NaN."""
    if not math.isfinite(value):
        return MISSING
    if not math.isfinite(error):
        return f"{significant(value, 3)} ± {MISSING}"
    exponent = _exponent(max(abs(value), error))
    shift = 0 if -2 < exponent < 3 else exponent
    a, e = value / 10.0**shift, error / 10.0**shift
    decimals = min(max(1 - _exponent(e), 0), 4) if e else 2
    text = _signed(f"{a:.{decimals}f}") + f" ± {e:.{decimals}f}"
    return f"({text}){power(shift)}" if shift else text


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, a line per row of cells."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (heads, *rows)]
    return "".join([lines[0], "|---" * len(heads) + "|\n", *lines[1:]])


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min or 3 h 05 min; a dash for NaN."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
