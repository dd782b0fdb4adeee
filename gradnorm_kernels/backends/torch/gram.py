"""The Gram ("ghost") formula: norms and inner products of gradients from inner products of tokens.

``<G_i, G_j> = sum over t in i, s in j of (x_t . x_s)(dy_t . dy_s)``, in tiles, using the symmetry. Where a sample's
tokens cancel, the float32 errors of the terms stay while the sum shrinks: the result is off by about 1e-7 of the sum of
the terms' sizes, which may be more than the norm itself. Segmented wgrad does not lose those digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Stretch
from .numerics import block_sums, inner

# A batch of samples is cut in strips, to skip what symmetry repeats, from so many tokens a sample and so many elements
# of its products: below, small matrices and many calls cost more than the arithmetic they save.
_STRIPS = 4
_STRIPS_FROM_LENGTH = 96
_STRIPS_FROM_SIZE = 1 << 17
# Tokens of a batch of samples: bounds the widened copies of half-precision inputs.
_BATCH_TOKENS = 4096


def sample_norms(x: Tensor, dy: Tensor, stretches: list[Stretch], tile: int) -> Tensor:
    """``||G_i||^2`` of each stretch, float64; neighbours of equal length are one batch of small products."""
    norms = []
    at = 0
    while at < len(stretches):
        lo, hi = stretches[at].lo, stretches[at].hi
        length = hi - lo
        count = 1
        if length > tile:
            norms.append(pair_gram(x, dy, stretches[at : at + 1], tile).view(1))
        else:
            most = max(1, min(tile * tile // (length * length), _BATCH_TOKENS // length))
            while count < most and at + count < len(stretches) and stretches[at + count][:2] == (hi, hi + length):
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


def pair_gram(x: Tensor, dy: Tensor, stretches: list[Stretch], tile: int) -> Tensor:
    """``<G_i, G_j>`` [n, n] float64 of neighbouring stretches, from tiles of token pairs on and above the diagonal."""
    tiles = []
    at = 0
    for lo in range(stretches[0].lo, stretches[-1].hi, tile):
        hi = min(lo + tile, stretches[-1].hi)
        while stretches[at].hi <= lo:
            at += 1
        end = at
        while end < len(stretches) and stretches[end].lo < hi:
            end += 1
        lengths = [min(s.hi, hi) - max(s.lo, lo) for s in stretches[at:end]]
        tiles.append((slice(lo, hi), slice(at, end), lengths))
    gram = torch.zeros(len(stretches), len(stretches), dtype=torch.float64, device=x.device)
    for i, (rows, row_samples, row_lengths) in enumerate(tiles):
        for columns, column_samples, column_lengths in tiles[i:]:
            terms = inner(x[rows], x[columns]).mul_(inner(dy[rows], dy[columns]))
            sums = block_sums(terms, row_lengths, column_lengths)
            gram[row_samples, column_samples] += sums
            if columns != rows:
                gram[column_samples, row_samples] += sums.T
    return gram
