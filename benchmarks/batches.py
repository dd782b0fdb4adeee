"""One problem to measure: a packed batch of random samples, and the float64 truth about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradnorm_kernels import reference


@dataclass(frozen=True)
class Batch:
    """x [T, d_in], dy [T, d_out], cu_seqlens [N + 1] on their device; the same offsets on the host; K groups.

    The groups are runs of consecutive samples, as equal in number as can be. ``gram``: the inner products of their sums
    are wanted as well, as the tracker wants them with every sample a group.
    """

    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor
    offsets: tuple[int, ...]
    groups: int = 1
    gram: bool = False

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> list[int]:
        return [hi - lo for lo, hi in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    @property
    def length(self) -> int | None:
        """The tokens of each sample if all have as many, else None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @cached_property
    def group_of(self) -> list[int]:
        return [sample * self.groups // self.samples for sample in range(self.samples)]

    @cached_property
    def group_ids(self) -> Tensor | None:
        """[N] on the device, or None for one group: the argument of that name."""
        return None if self.groups == 1 else torch.tensor(self.group_of, device=self.x.device)

    def padded(self) -> tuple[Tensor, Tensor]:
        """x [N, L, d_in] and dy [N, L, d_out], L the longest sample's length, padded with zeros; views if equal."""
        if self.length is not None:
            return self.x.unflatten(0, (-1, self.length)), self.dy.unflatten(0, (-1, self.length))
        x, dy = (
            torch.nn.utils.rnn.pad_sequence(list(t.split(self.lengths)), batch_first=True) for t in (self.x, self.dy)
        )
        return x, dy


def make_batch(
    d_in: int,
    d_out: int,
    length: int,
    tokens: int,
    ragged: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    gram: bool = False,
) -> Batch:
    """Normal random x and dy; samples of ``length`` tokens, or ragged: of half to one and a half times as many.

    Samples of one length fill as many of the ``tokens`` as they can; ragged ones fill them all, and the last takes
    what is left. ``gram``: every sample is a group, whatever ``groups`` says.
    """
    generator = torch.Generator().manual_seed(seed)
    if ragged:
        lengths = torch.randint(length // 2, length + length // 2 + 1, (2 * tokens // length + 1,), generator=generator)
        ends = lengths.cumsum(0)
        ends = torch.cat([ends[ends < tokens], torch.tensor([tokens])])
    else:
        ends = torch.arange(length, tokens + 1, length)
        tokens = int(ends[-1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    numbers = torch.Generator(device).manual_seed(seed + 1)
    x, dy = (torch.randn(tokens, d, generator=numbers, device=device, dtype=dtype) for d in (d_in, d_out))
    count = len(ends)
    return Batch(x, dy, offsets.to(device), tuple(offsets.tolist()), count if gram else min(groups, count), gram)


@dataclass(frozen=True)
class Truth:
    """float64: squared norms of the samples in ``checked``, of each group's sum [K], and all gradients' sum.

    ``gram`` [N, N]: the samples' inner products, where the batch wants them.
    """

    checked: list[int]
    norms: Tensor
    group_norms: Tensor
    total: Tensor
    gram: Tensor | None


def truth(batch: Batch, most: int | None = None) -> Truth:
    """The float64 reference on the batch's own device, one sample at a time for memory's sake.

    ``most``: at most so many samples' norms are found (the longest, the shortest, and others evenly spread); the sums
    always cover all samples.
    """
    checked = _spread(batch.lengths, most)
    norms = []
    total = torch.zeros(batch.dy.shape[1], batch.x.shape[1], dtype=torch.float64, device=batch.x.device)
    groups = total.new_zeros(batch.groups)
    for group in range(batch.groups):
        members = [i for i in range(batch.samples) if batch.group_of[i] == group]
        singly = [i for i in members if i in checked]
        group_sum = torch.zeros_like(total)
        for i in singly:
            lo, hi = batch.offsets[i], batch.offsets[i + 1]
            gradient = reference.sample_gradients(batch.x[lo:hi], batch.dy[lo:hi])[0]
            norms.append(gradient.square().sum())
            group_sum += gradient
        # The others need no norm of their own: one product for each stretch between checked samples.
        others = [i for i in members if i not in checked]
        for lo, hi in _stretches(others, batch.offsets):
            group_sum += reference.sample_gradients(batch.x[lo:hi], batch.dy[lo:hi])[0]
        groups[group] = group_sum.square().sum()
        total += group_sum
    return Truth(sorted(checked), torch.stack(norms), groups, total, _sample_gram(batch) if batch.gram else None)


def _sample_gram(batch: Batch) -> Tensor:
    """``<G_i, G_j> = sum over tokens t of i, s of j of (x_t . x_s)(dy_t . dy_s)``, a sample's rows at a time."""
    x, dy = batch.x.double(), batch.dy.double()
    counts = torch.tensor(batch.lengths, device=x.device)
    sample_of = torch.arange(batch.samples, device=x.device).repeat_interleave(counts)
    gram = x.new_zeros(batch.samples, batch.samples)
    for i in range(batch.samples):
        lo, hi = batch.offsets[i], batch.offsets[i + 1]
        pairs = ((x[lo:hi] @ x.T) * (dy[lo:hi] @ dy.T)).sum(0)
        gram[i].index_add_(0, sample_of, pairs)
    return gram


def _spread(lengths: list[int], most: int | None) -> set[int]:
    count = len(lengths)
    if most is None or count <= most:
        return set(range(count))
    extremes = {lengths.index(max(lengths)), lengths.index(min(lengths)), 0, count - 1}
    return extremes | {i * count // most for i in range(most)}


def _stretches(samples: list[int], offsets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Token ranges of runs of adjacent samples."""
    found: list[tuple[int, int]] = []
    for i in samples:
        lo, hi = offsets[i], offsets[i + 1]
        if found and found[-1][1] == lo:
            found[-1] = (found[-1][0], hi)
        else:
            found.append((lo, hi))
    return found
