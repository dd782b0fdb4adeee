"""What is measured: linear layers by name, packed batches of random samples, and the float64 truth about a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradnorm_kernels import reference


@dataclass(frozen=True)
class Layer:
    """A linear layer, d_in -> d_out; ``also`` names layers of the same model and size that it stands for."""

    name: str
    d_in: int
    d_out: int
    also: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.name.rsplit(".", 1)[0]


# hidden size, size of k and v, size of the feed-forward layer: from the models' published configurations.
_SIZES = {
    "smollm2-135m": (576, 192, 1536),
    "qwen2.5-3b": (2048, 256, 11008),
    "llama-3.1-8b": (4096, 1024, 14336),
    # Small enough to walk every step on a CPU in seconds; 40 and 72 are multiples of 8 but of no tile.
    "tiny": (40, 16, 72),
}


def _layers(model: str, hidden: int, kv: int, wide: int) -> dict[str, Layer]:
    sizes = {"q": (hidden, hidden), "kv": (hidden, kv), "o": (hidden, hidden)}
    sizes |= {"gate_up": (hidden, wide), "down": (wide, hidden)}
    return {f"{model}.{name}": Layer(f"{model}.{name}", *size) for name, size in sizes.items()}


#: Every layer by its name, as in "llama-3.1-8b.gate_up"; "kv" is one of k and v, "gate_up" one of gate and up.
LAYERS = {name: layer for model, sizes in _SIZES.items() for name, layer in _layers(model, *sizes).items()}


def choose(names: list[str]) -> list[Layer]:
    """Layers by layer name, model name or "all"; within a model, layers of one size are measured once.

    Raises:
        ValueError: a name is neither a layer, a model nor "all".
    """
    chosen: dict[tuple[str, int, int], Layer] = {}
    for name in names:
        if name in LAYERS:
            found = [LAYERS[name]]
        else:
            models = set(_SIZES) - {"tiny"} if name == "all" else {name}
            found = [layer for layer in LAYERS.values() if layer.model in models]
        if not found:
            raise ValueError(f"{name!r} is no layer, no model and not 'all'; layers: {', '.join(LAYERS)}")
        for layer in found:
            key = (layer.model, layer.d_in, layer.d_out)
            first = chosen.get(key)
            if first is None:
                chosen[key] = layer
            elif layer.name != first.name and layer.name not in first.also:
                chosen[key] = Layer(first.name, first.d_in, first.d_out, (*first.also, layer.name))
    return list(chosen.values())


@dataclass(frozen=True)
class Batch:
    """x [T, d_in], dy [T, d_out] and cu_seqlens [N + 1] on their device; the same offsets on the host; K groups.

    Each group is a run of consecutive samples; the sizes of the groups differ by at most one. ``gram``: the inner
    products of the groups' sums are computed too, as in the tracker's call, where every sample is a group.
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
        """The tokens per sample if all samples have the same length, else None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @cached_property
    def group_of(self) -> list[int]:
        return [sample * self.groups // self.samples for sample in range(self.samples)]

    @cached_property
    def group_ids(self) -> Tensor | None:
        """[N] on the device, or None for one group: the argument of that name."""
        return None if self.groups == 1 else torch.tensor(self.group_of, device=self.x.device)

    def padded(self) -> tuple[Tensor, Tensor]:
        """x [N, L, d_in] and dy [N, L, d_out], padded with zeros to the longest length L; views if all are equal."""
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
    """Normal random x and dy; samples of ``length`` tokens, or, if ragged, of half to one and a half times as many.

    Samples of one length fill at most ``tokens``; ragged samples fill exactly ``tokens``, and the last one takes the
    remainder. ``gram``: every sample is a group, whatever ``groups`` says.
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
    """float64: squared norms of the samples in ``checked``, squared norms of the groups' sums [K], the total.

    ``gram`` [N, N]: the inner products of the samples' gradients, if the batch asks for them.
    """

    checked: list[int]
    norms: Tensor
    group_norms: Tensor
    total: Tensor
    gram: Tensor | None


def truth(batch: Batch, most: int | None = None) -> Truth:
    """The float64 reference on the batch's own device, one sample at a time to save memory.

    ``most``: about how many samples' norms are computed (the longest, the shortest, and others evenly spread); the sums
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
        # The others need no norm of their own: one product per run of adjacent samples.
        others = [i for i in members if i not in checked]
        for lo, hi in _runs(others, batch.offsets):
            group_sum += reference.sample_gradients(batch.x[lo:hi], batch.dy[lo:hi])[0]
        groups[group] = group_sum.square().sum()
        total += group_sum
    return Truth(sorted(checked), torch.stack(norms), groups, total, _sample_gram(batch) if batch.gram else None)


def _sample_gram(batch: Batch) -> Tensor:
    """``<G_i, G_j> = sum over tokens t of i, s of j of (x_t . x_s)(dy_t . dy_s)``, one sample's rows at a time."""
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


def _runs(samples: list[int], offsets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Token ranges of runs of adjacent samples."""
    found: list[tuple[int, int]] = []
    for i in samples:
        lo, hi = offsets[i], offsets[i + 1]
        if found and found[-1][1] == lo:
            found[-1] = (found[-1][0], hi)
        else:
            found.append((lo, hi))
    return found
