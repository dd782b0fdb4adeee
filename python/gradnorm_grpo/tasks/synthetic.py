"""Small generated questions, for the preset `tiny`: short enough for a character model to learn in a minute."""

from __future__ import annotations

import random
from collections.abc import Callable


def _text(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def copy(rng: random.Random, low: int = 2, high: int = 5) -> tuple[str, str]:
    """Repeat a word of ``low`` to ``high`` letters."""
    word = _text(rng, "abcdefgh", low, high)
    return f"copy {word}", word


def reverse(rng: random.Random, low: int = 2, high: int = 4) -> tuple[str, str]:
    """Spell a word of ``low`` to ``high`` letters backwards."""
    word = _text(rng, "abcdefgh", low, high)
    return f"reverse {word}", word[::-1]


def sort(rng: random.Random, low: int = 2, high: int = 4) -> tuple[str, str]:
    """Put ``low`` to ``high`` digits in ascending order."""
    digits = _text(rng, "0123456789", low, high)
    return f"sort {digits}", "".join(sorted(digits))


def count(rng: random.Random, low: int = 2, high: int = 5) -> tuple[str, str]:
    """Count a letter in a text of ``low`` to ``high`` letters."""
    text = _text(rng, "abc", low, high)
    letter = rng.choice("abc")
    return f"count {letter} in {text}", str(text.count(letter))


def add(rng: random.Random, low: int = 0, high: int = 12) -> tuple[str, str]:
    """Add two whole numbers between ``low`` and ``high``."""
    a, b = rng.randint(low, high), rng.randint(low, high)
    return f"add {a} {b}", str(a + b)


def maximum(rng: random.Random, low: int = 4, high: int = 8) -> tuple[str, str]:
    """The largest of ``low`` to ``high`` digits."""
    digits = _text(rng, "0123456789", low, high)
    return f"max {digits}", max(digits)


def compare(rng: random.Random, low: int = 10, high: int = 99) -> tuple[str, str]:
    """Say whether the first of two numbers is smaller (<), equal (=) or larger (>)."""
    a, b = rng.randint(low, high), rng.randint(low, high)
    return f"compare {a} {b}", "<" if a < b else ">" if a > b else "="


GENERATORS: dict[str, Callable[..., tuple[str, str]]] = {
    f.__name__: f for f in (copy, reverse, sort, count, add, maximum, compare)
}
