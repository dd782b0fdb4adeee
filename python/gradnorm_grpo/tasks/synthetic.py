"""Small generated questions, for the presets of the model `tiny`: a character model learns them in a minute."""

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


def minimum(rng: random.Random, low: int = 4, high: int = 8) -> tuple[str, str]:
    """The smallest of ``low`` to ``high`` digits."""
    digits = _text(rng, "0123456789", low, high)
    return f"min {digits}", min(digits)


def subtract(rng: random.Random, low: int = 0, high: int = 12) -> tuple[str, str]:
    """The larger of two whole numbers between ``low`` and ``high`` less the smaller."""
    a, b = sorted((rng.randint(low, high), rng.randint(low, high)), reverse=True)
    return f"subtract {a} {b}", str(a - b)


def length(rng: random.Random, low: int = 2, high: int = 7) -> tuple[str, str]:
    """How many letters a word of ``low`` to ``high`` letters has."""
    word = _text(rng, "abcdefgh", low, high)
    return f"length {word}", str(len(word))


def double(rng: random.Random, low: int = 2, high: int = 3) -> tuple[str, str]:
    """Write every letter of a word of ``low`` to ``high`` letters twice."""
    word = _text(rng, "abcdefgh", low, high)
    return f"double {word}", "".join(letter * 2 for letter in word)


def shift(rng: random.Random, low: int = 2, high: int = 4) -> tuple[str, str]:
    """Replace every letter of a word of ``low`` to ``high`` letters by the next one of the alphabet."""
    word = _text(rng, "abcdefgh", low, high)
    return f"shift {word}", "".join(chr(ord(letter) + 1) for letter in word)


def swap(rng: random.Random, low: int = 2, high: int = 4) -> tuple[str, str]:
    """Exchange the first and the last letter of a word of ``low`` to ``high`` letters, at least 2."""
    if low < 2:
        raise ValueError(f"low must be at least 2, got {low}")
    word = _text(rng, "abcdefgh", low, high)
    return f"swap {word}", word[-1] + word[1:-1] + word[0]


def unique(rng: random.Random, low: int = 3, high: int = 5) -> tuple[str, str]:
    """Keep the first of every letter of a text of ``low`` to ``high`` letters."""
    text = _text(rng, "abcd", low, high)
    return f"unique {text}", "".join(dict.fromkeys(text))


def parity(rng: random.Random, low: int = 10, high: int = 99) -> tuple[str, str]:
    """Say whether the sum of a number's digits is even or odd; the number is between ``low`` and ``high``."""
    number = str(rng.randint(low, high))
    return f"parity {number}", "odd" if sum(map(int, number)) % 2 else "even"


def index(rng: random.Random, low: int = 2, high: int = 4) -> tuple[str, str]:
    """The letter at a place, counted from 1, of a word of ``low`` to ``high`` letters."""
    word = _text(rng, "abcdefgh", low, high)
    place = rng.randint(1, len(word))
    return f"letter {place} of {word}", word[place - 1]


def interleave(rng: random.Random, low: int = 1, high: int = 2) -> tuple[str, str]:
    """Take the letters of two words of equal length, ``low`` to ``high``, in turn."""
    size = rng.randint(low, high)
    a, b = (_text(rng, "abcdefgh", size, size) for _ in range(2))
    return f"join {a} {b}", "".join(x + y for x, y in zip(a, b, strict=True))


GENERATORS: dict[str, Callable[..., tuple[str, str]]] = {
    f.__name__: f
    for f in (
        *(copy, reverse, sort, count, add, maximum, compare),
        *(minimum, subtract, length, double, shift, swap, unique, parity, index, interleave),
    )
}
