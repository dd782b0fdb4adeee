"""How a wgrad launch of the cuda backend shares the tokens among multiprocessors."""

from __future__ import annotations

from typing import Any

import pytest

from gradnorm_kernels.backends.cuda.splits import Split, busiest, choose


def dealt(whole: int, split: int, parts: int, multiprocessors: int) -> float:
    """The most that a multiprocessor has to do, item by item: item i is that of number i % multiprocessors."""
    loads = [0] * multiprocessors
    for item in range(whole + split * parts):
        loads[item % multiprocessors] += parts if item < whole else 1
    return max(loads) / parts


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 108, 132])
def test_the_busiest_multiprocessor(multiprocessors: int) -> None:
    for whole in (0, 1, 6, 7, 8, 107, 132, 200, 660):
        for split in (1, 3, 12, 44, 131):
            for parts in (2, 3, 7, 11):
                tiles, pieces = busiest(whole, split, parts, 1 / parts, multiprocessors)
                found = tiles + pieces / parts
                assert found == pytest.approx(dealt(whole, split, parts, multiprocessors)), (whole, split, parts)


def where(d_in: int, d_out: int, columns: int, tokens: int = 16384, processors: int = 132, **options: Any) -> Split:
    return choose(90, -(-d_out // 128), -(-d_in // columns), d_in, tokens, processors, **options)


def test_what_is_split() -> None:
    """Nothing where the rounds are nearly full, all tiles of a small layer, and otherwise the last rows."""
    assert where(4096, 4096, 256)[:2] == (32, 1)  # 512 tiles: 3.9 rounds
    assert where(4096, 4096, 128)[:2] == (32, 1)  # 1024: 7.8
    assert where(4096, 4096, 192)[:2] == (30, 3)  # 704: 5 full rounds, and 44 tiles in three parts
    assert where(1536, 1536, 128)[:2] == (11, 11)  # 144: a full round, and 12 tiles in eleven parts
    small = where(576, 576, 128)  # 25
    assert small.whole_rows == 0 and small.parts > 4
    # Two multiprocessors take tiles together.
    assert where(1536, 1536, 128, row_step=2).whole_rows == 10


def test_what_limits_a_split() -> None:
    assert where(1536, 1536, 128, some=False).whole_rows in (0, 12)
    # An A100 takes longer to store a part.
    assert choose(80, 12, 12, 1536, 16384, 108).parts <= choose(90, 12, 12, 1536, 16384, 108).parts
    assert where(576, 576, 128, tokens=200)[:2] == (5, 1), "too few tokens for two parts"
    # Each group is stored in each part: with many of them that takes longer than the rounds that it saves.
    assert where(1536, 1536, 128, groups=2).parts > 1
    assert where(1536, 1536, 128, groups=500)[:2] == (12, 1)
    assert all(where(128, 128 * tiles, 128, 100000, 108).parts <= 108 for tiles in range(1, 300, 7))


def test_few_samples() -> None:
    """With fewer than four samples per part all tiles are cut anywhere; other parts are as long as the longest."""
    assert where(576, 576, 128, samples=100).anywhere is False
    small = where(576, 576, 128, samples=8)
    assert small.anywhere and small.parts > 4 and small.whole_rows == 0 and small.share == 1 / small.parts
    assert where(4096, 4096, 192, samples=1)[:3] == (32, 1, False), "64 MiB for each part"
    assert where(4096, 4096, 192, samples=8)[:4] == (30, 3, False, 3 / 8)
    stored = where(576, 576, 128, samples=8, some=False, cut=False)
    assert stored.parts == 4 and not stored.anywhere and stored.share == 1 / 4


def test_a_price_is_between_full_rounds_and_no_split() -> None:
    for d_in in (128, 576, 1536, 2048, 4096):
        for d_out in (128, 1000, 4096, 11008):
            for columns in (128, 192, 256):
                split = where(d_in, d_out, columns)
                tiles = -(-d_out // 128) * -(-d_in // columns)
                assert tiles / 132 <= split.price <= -(-tiles // 132)
                assert (split.parts == 1) == (split.whole_rows == -(-d_out // 128))


def test_calls_of_nearly_equal_lengths_are_split_alike() -> None:
    """The choice is kept, and made again only where the number of tokens differs by more than an eighth."""
    assert len({where(1536, 1536, 128, tokens) for tokens in range(16384, 18432, 64)}) == 1
