"""How the blocks of a wgrad launch share the tokens (split-K): a block takes all tokens of a tile, or a part of them.

Tiles of the weight are dealt to the multiprocessors in rounds, and the last round is seldom full. A pass can split the
tokens of every tile, of the tiles in the last rows alone, so that these fill the last round, or of none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

BLOCK_M = 128
# The fewest tokens of a part.
_PART_TOKENS = 256
# With fewer samples per part than this, parts end inside samples where they can: they would be of uneven lengths.
_PART_SAMPLES = 4
# The most parts that the tiles of the last rows are split into.
_MOST_PARTS = 64
# The most bytes of workspace if all tiles are split; if only the last rows are, or splits end anywhere.
WORKSPACE = 256 << 20
_SMALL_WORKSPACE = 64 << 20


class Split(NamedTuple):
    """The upper ``whole_rows`` rows of tiles take all tokens; the tiles of the others take them in ``parts`` parts.

    ``parts`` is 1 where the tokens are not split: then all rows are whole. ``anywhere``: parts end anywhere, not only
    between samples. ``share``: of the tokens in the longest part, for samples of one length. ``price``: estimated time,
    in units of the time in which a multiprocessor takes all tokens of a tile.
    """

    whole_rows: int
    parts: int
    anywhere: bool
    share: float
    price: float


def busiest(whole: int, split: int, parts: int, share: float, multiprocessors: int) -> tuple[int, int]:
    """(whole tiles, parts of tiles) of the busiest multiprocessor, where item i is that of number i % multiprocessors.

    The items are ``whole`` tiles and then ``split`` tiles in ``parts`` parts each, of a ``share`` of the tokens.
    """
    rounds, left = divmod(whole, multiprocessors)
    items = split * parts
    loads = [(rounds, -(-items // multiprocessors))]  # of the first multiprocessor that gets no tile in the last round
    if left:  # of the first of all, which gets a part once the others have theirs
        loads.append((rounds + 1, max(0, -(-(items - multiprocessors + left) // multiprocessors))))
    return max(loads, key=lambda load: load[0] + load[1] * share)


def choose(
    arch: int,
    tile_rows: int,
    tile_columns: int,
    d_in: int,
    tokens: int,
    multiprocessors: int,
    *,
    samples: int = 1 << 30,
    groups: int = 1,
    row_step: int = 1,
    some: bool = True,
    cut: bool = True,
) -> Split:
    """The split with the lowest price: ``busiest`` in rounds, plus what it takes to store the parts and to launch the
    fix-up.

    ``arch``: 80 or 90, of the kernel. ``samples``: few of them make uneven parts. ``groups``: each has a sum of its own
    in every part that it is in. ``row_step``: whole rows are a multiple of it. ``some``: rows may be split while others
    are whole. ``cut``: parts of all tiles may end inside samples.

    The estimate takes ``tokens`` to four binary digits, rounded down, so that calls of nearly equal lengths share it.
    """
    digits = max(0, tokens.bit_length() - 4)
    tokens, samples = tokens >> digits << digits, min(samples, 16 * multiprocessors)
    return _choose(arch, tile_rows, tile_columns, d_in, tokens, multiprocessors, samples, groups, row_step, some, cut)


@lru_cache(maxsize=4096)
def _choose(
    arch: int,
    tile_rows: int,
    tile_columns: int,
    d_in: int,
    tokens: int,
    multiprocessors: int,
    samples: int,
    groups: int,
    row_step: int,
    some: bool,
    cut: bool,
) -> Split:
    tiles, most = tile_rows * tile_columns, min(multiprocessors, tokens // _PART_TOKENS)
    best = Split(tile_rows, 1, False, 1.0, float(-(-tiles // multiprocessors)))
    tile_bytes = 4 * BLOCK_M * d_in  # of a row of tiles
    # The rows that fill all rounds but the last one, or the last two.
    full = [tiles // multiprocessors - less for less in (0, 1)]
    rows = [count * multiprocessors // tile_columns // row_step * row_step for count in full] if some else []
    for whole_rows in (0, *(count for count in rows if 0 < count < tile_rows)):
        split = tile_rows - whole_rows
        limit = _SMALL_WORKSPACE if whole_rows else WORKSPACE
        for parts in range(2, min(most, _MOST_PARTS if whole_rows else most) + 1):
            extra = _fixup_price(arch, split * tile_columns * (parts + groups - 1), tokens)
            if tiles / multiprocessors + extra >= best.price:  # even full rounds would not be cheaper, nor more parts
                break
            if (parts + groups - 1) * split * tile_bytes > limit:
                break
            anywhere = samples < _PART_SAMPLES * parts and cut and not whole_rows
            anywhere = anywhere and (parts + samples) * split * tile_bytes <= _SMALL_WORKSPACE
            share = 1 / parts if anywhere else -(-samples // parts) / samples
            counts = whole_rows * tile_columns, split * tile_columns
            of_whole, of_parts = busiest(*counts, parts, share, multiprocessors)
            price = of_whole + of_parts * share + extra
            if price < best.price:
                best = Split(whole_rows, parts, anywhere, share, price)
    return best


def _fixup_price(arch: int, stored: int, tokens: int) -> float:
    """Of storing so many tiles of float32 and reading them again, and of a launch, in rounds over ``tokens`` tokens.

    Counted from data sheets, not measured. A launch takes 2.5 microseconds. For 128 columns, whose tiles of 64 KiB are
    written once and read once, an A100 multiplies a token in 11.5 ns and moves 1.6 TB/s: 7.1 tokens per tile. An H200
    takes 7.3 ns and 4.2 TB/s: 4.3. Tiles with more columns take more of both.
    """
    tokens_per_tile, launch = (4.3, 340) if arch >= 90 else (7.1, 220)
    return (tokens_per_tile * stored + launch) / tokens
