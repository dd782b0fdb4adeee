"""The ways to the squared norms of per-sample gradients that are compared, by name.

A provider takes a batch and returns a function of no arguments; that function does the work and returns the squared
norms [N] and, from those that make it, the weight's gradient. ``weight_grad`` alone does no norms: it is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import gradnorm_kernels as gk

Result = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Batch:
    """One problem: x [T, d_in], dy [T, d_out] and where its samples begin and end."""

    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor

    @property
    def offsets(self) -> list[int]:
        return self.cu_seqlens.tolist()

    @property
    def length(self) -> int | None:
        """The tokens of each sample if all have as many, else None."""
        lengths = set(self.cu_seqlens.diff().tolist())
        return lengths.pop() if len(lengths) == 1 else None


@dataclass(frozen=True)
class Provider:
    """``prepare(batch)`` gives the function to time; ``available(batch)`` says whether it can, for memory's sake."""

    name: str
    what: str
    prepare: Callable[[Batch], Callable[[], Result]]
    available: Callable[[Batch], bool] = lambda batch: True


# What a provider that stores every sample's gradient may use.
_MATERIALISE_LIMIT = 4 << 30


def _fits(batch: Batch) -> bool:
    samples = len(batch.cu_seqlens) - 1
    size = samples * batch.x.shape[1] * batch.dy.shape[1] * batch.x.element_size()
    return batch.length is not None and size <= _MATERIALISE_LIMIT


def _weight_grad(batch: Batch) -> Callable[[], Result]:
    return lambda: (None, batch.dy.T @ batch.x)


def _ours(algorithm: str) -> Callable[[Batch], Callable[[], Result]]:
    def prepare(batch: Batch) -> Callable[[], Result]:
        def run() -> Result:
            result = gk.fused_grad_norm(
                batch.x, batch.dy, batch.cu_seqlens, weight_grad=True, algorithm=algorithm, backend="torch"
            )
            return result.sample_sq_norms, result.weight_grad

        return run

    return prepare


def _two_gram(batch: Batch) -> Callable[[], Result]:
    offsets = batch.offsets

    def run() -> Result:
        if batch.length is not None:
            x, dy = (t.unflatten(0, (-1, batch.length)) for t in (batch.x, batch.dy))
            return ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)), None
        pairs = [(batch.x[lo:hi], batch.dy[lo:hi]) for lo, hi in pairwise(offsets)]
        return torch.stack([((x @ x.T) * (dy @ dy.T)).sum() for x, dy in pairs]), None

    return run


def _bmm(batch: Batch) -> Callable[[], Result]:
    length = batch.length
    assert length is not None

    def run() -> Result:
        gradients = torch.bmm(
            batch.dy.view(-1, length, batch.dy.shape[1]).mT, batch.x.view(-1, length, batch.x.shape[1])
        )
        return gradients.flatten(1).square().sum(1), gradients.sum(0)

    return run


def _vmap_grad(batch: Batch) -> Callable[[], Result]:
    length = batch.length
    assert length is not None
    weight = torch.zeros(batch.dy.shape[1], batch.x.shape[1], dtype=batch.x.dtype, device=batch.x.device)

    def loss(w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (torch.nn.functional.linear(x, w) * dy).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> Result:
        gradients = per_sample(
            weight, batch.x.view(-1, length, batch.x.shape[1]), batch.dy.view(-1, length, batch.dy.shape[1])
        )
        return gradients.flatten(1).square().sum(1), gradients.sum(0)

    return run


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("weight_grad", "torch's dy.T @ x, no norms", _weight_grad),
        Provider("auto", "fused_grad_norm with dW, algorithm='auto'", _ours("auto")),
        Provider("wgrad", "fused_grad_norm with dW, algorithm='wgrad'", _ours("wgrad")),
        Provider("gram", "fused_grad_norm with dW, algorithm='gram'", _ours("gram")),
        Provider("two_gram", "the two-Gram formula, norms only", _two_gram),
        Provider("bmm", "per-sample gradients by torch.bmm", _bmm, _fits),
        Provider("vmap_grad", "per-sample gradients by torch.func.vmap(grad), forward included", _vmap_grad, _fits),
    )
}
