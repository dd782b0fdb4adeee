"""The Gram ("ghost") formula: norms and inner products of gradients from inner products of tokens.

``<G_i, G_j> = sum over t in i, s in j of (x_t . x_s)(dy_t . dy_s)``, in tiles, using the symmetry. Where a sample's
tokens cancel, the float32 errors of the terms stay while the sum shrinks: the result is off by about 1e-7 of the sum of
the terms' sizes, which may be more than the norm itself. Segmented wgrad does not lose those digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segment
from .numerics import block_sums, inner

# A batch of samples is cut into strips, to skip what symmetry repeats, from so many tokens per sample and so many
# elements of its products: below that, small matrices and many calls cost more than the arithmetic they save.
_STRIPS = 4
_STRIPS_FROM_LENGTH = 96
_STRIPS_FROM_SIZE = 1 << 17
# Tokens of a batch of samples: bounds the widened copies of half-precision inputs.
_BATCH_TOKENS = 4096


def sample_norms(x: Tensor, dy: Tensor, segments: list[Segment], tile: int) -> Tensor:
    """``||G_i||^2`` of each segment, float64; neighbours of equal length are one batch of small products."""
    norms = []
    at = 0
    while at < len(segments):
        lo, hi = segments[at].start, segments[at].end
        length = hi - lo
        count = 1
        if length > tile:
            norms.append(pair_gram(x, dy, segments[at : at + 1], tile).view(1))
        else:
            most = max(1, min(tile * tile // (length * length), _BATCH_TOKENS // length))
            while count < most and at + count < len(segments) and segments[at + count][:2] == (hi, hi + length):
                hi += length
                count += 1
            a, b = x[lo:hi], dy[lo:hi]
            if count == 1 and length < _STRIPS_FROM_SIZE // length:
                norms.append(torch.dot(inner(a, a).view(-1), inner(b, b).view(-1)).double().view(1))
            else:
                norms.append(_batch_norms(a.unflatten(0, (count, length)), b.unflatten(0, (count, length))))
        at += count
    return torch.cat(norms)


def _batch_norms(x: Tensor, dy: Tensor) -> Tensor:
    """``||G_i||^2`` of samples of one length, x [n, L, d_in] and dy [n, L, d_out]."""
    samples, length, _ = x.shape
    if length < _STRIPS_FROM_LENGTH or samples * length * length < _STRIPS_FROM_SIZE:
        return inner(x, x).mul_(inner(dy, dy)).sum((1, 2), dtype=torch.float64)
    norms = torch.zeros(samples, dtype=torch.float64, device=x.device)
    height = -(-length // _STRIPS)
    for lo in range(0, length, height):
        hi = min(lo + height, length)
        # Rows lo to hi of the Gram up to the diagonal block; left of that block every element stands for two.
        terms = inner(x[:, lo:hi], x[:, :hi]).mul_(inner(dy[:, lo:hi], dy[:, :hi]))
        norms += 2 * terms.sum((1, 2), dtype=torch.float64) - terms[:, :, lo:].sum((1, 2), dtype=torch.float64)
    return norms


def pair_gram(x: Tensor, dy: Tensor, segments: list[Segment], tile: int) -> Tensor:
    """``<G_i, G_j>`` [n, n] float64 of neighbouring segments, from tiles of token pairs on and above the diagonal."""
    tiles = token_tiles(segments, tile)
    gram = torch.zeros(len(segments), len(segments), dtype=torch.float64, device=x.device)
    for i, mine in enumerate(tiles):
        for theirs in tiles[i:]:
            terms = inner(x[mine.rows], x[theirs.rows]).mul_(inner(dy[mine.rows], dy[theirs.rows]))
            sums = block_sums(terms, mine.lengths, theirs.lengths)
            gram[mine.segments, theirs.segments] += sums
            if theirs is not mine:
                gram[theirs.segments, mine.segments] += sums.T
    return gram


class TokenTile(NamedTuple):
    """Consecutive rows, the segments that they meet, and how many rows of each."""

    rows: slice
    segments: slice
    lengths: list[int]


def token_tiles(segments: list[Segment], tile: int) -> list[TokenTile]:
    """The rows of neighbouring segments cut into tiles of at most ``tile``."""
    tiles, first = [], 0
    for lo in range(segments[0].start, segments[-1].end, tile):
        hi = min(lo + tile, segments[-1].end)
        while segments[first].end <= lo:
            first += 1
        last = first
        while last < len(segments) and segments[last].start < hi:
            last += 1
        lengths = [min(segment.end, hi) - max(segment.start, lo) for segment in segments[first:last]]
        tiles.append(TokenTile(slice(lo, hi), slice(first, last), lengths))
    return tiles
