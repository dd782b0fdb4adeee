"""The compared ways to compute squared norms of per-sample gradients, by name, and the check that a result is right.

A provider takes a batch and returns a function of no arguments, which does the work and returns its results.
``weight_grad`` computes no norms: it is the baseline. Ours are named by backend, algorithm and "norms" (without dW),
with "auto" left out: ``auto``, ``wgrad``, ``triton``, ``triton_gram``, ``cuda_norms``, ``cuda_gram_norms``. Names in
``TILES`` are ``cuda_wgrad`` with a given tile, to choose between tiles.

The peers are written the way a user who needs correct numbers would write them: norms of half-precision gradients are
computed in float32, two-Gram products are kept in float32 where the library can, and ragged batches are padded
beforehand, outside the timed region.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import gradnorm_kernels as gk
from benchmarks.batches import Batch, Truth
from gradnorm_kernels import backends, dispatch, tolerances
from gradnorm_kernels.backends.cuda.launch import architecture
from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES, CudaConfig, forced


class Result(NamedTuple):
    """Squared norms of the samples [N], weight gradient [d_out, d_in], squared norms of the groups' sums [K] and their
    inner products [K, K]."""

    norms: Tensor | None = None
    weight_grad: Tensor | None = None
    group_norms: Tensor | None = None
    group_gram: Tensor | None = None


Run = Callable[[], Result]


@dataclass(frozen=True)
class Provider:
    """``prepare(batch)`` gives the function to time; ``unavailable_reason(batch)`` says why there is none, or None.

    ``does`` is "dW", "norms" or "dW and norms". ``ran(batch)``, for ours: what dispatch chose. ``rounds``: parts of the
    result are rounded to the inputs' dtype before they are added (stored gradients, or partial sums of a BLAS).
    """

    name: str
    what: str
    does: str
    prepare: Callable[[Batch], Run]
    unavailable_reason: Callable[[Batch], str | None] = lambda batch: None
    ran: Callable[[Batch], dict[str, object]] | None = None
    rounds: bool = False

    @property
    def ours(self) -> bool:
        return self.ran is not None


class WrongResultError(RuntimeError):
    """A provider's result is wrong: its speed means nothing and is not reported."""


def errors_of(result: Result, expected: Truth, batch: Batch) -> dict[str, float]:
    """The error of each result, relative to the truth's largest element: {what: error}."""
    norms = None if result.norms is None else result.norms[torch.tensor(expected.checked, device=batch.x.device)]
    compared = {
        "norms": (norms, expected.norms),
        "weight gradient": (result.weight_grad, expected.total),
        "group norms": (result.group_norms, expected.group_norms),
        "group gram": (result.group_gram, expected.gram),
    }
    return {
        what: float((actual.double() - right).abs().max() / right.abs().max())
        for what, (actual, right) in compared.items()
        if actual is not None and right is not None
    }


def gate(
    provider: Provider, batch: Batch, expected: Truth, run: Callable[[], Result] | None = None
) -> dict[str, float]:
    """The errors of the provider's result (:func:`errors_of`), all within the tolerances of the tests.

    The tolerances are wider for long chains of products on a GPU. A provider that ``rounds`` is allowed that rounding:
    the weight gradient's tolerance for its norms, and twice that for its weight gradient. With float32 inputs nothing
    is rounded.

    Raises:
        WrongResultError: an error is larger than allowed, or NaN.
    """
    poison(batch.x.device)
    errors = errors_of((run or provider.prepare(batch))(), expected, batch)
    for what, error in errors.items():
        allowed = _allowed(provider, what, batch)
        if not error <= allowed:
            raise WrongResultError(f"{provider.name}: {what} off by {error:.1e} (allowed {allowed:.0e})")
    return errors


def _allowed(provider: Provider, what: str, batch: Batch) -> float:
    dtype = batch.x.dtype
    if not provider.rounds or dtype == torch.float32:
        # Sums over samples may go through one accumulator from the first token to the last.
        tokens = max(batch.lengths) if what == "norms" else len(batch.x)
        chain = max(tokens, batch.x.shape[1], batch.dy.shape[1])
        weight_grad = tolerances.WEIGHT_GRAD[dtype]
        return weight_grad if what == "weight gradient" else tolerances.norms(dtype, batch.x.device, chain)
    return tolerances.WEIGHT_GRAD[dtype] * (2 if what == "weight gradient" else 1)


def poison(device: torch.device, size: int = 64 << 20) -> None:
    """Leave NaN in the memory that a GPU's caching allocator hands out next, so that an unwritten element shows."""
    if device.type == "cuda":
        for elements in (size // 4, 1 << 18, 1 << 8):  # the allocator has pools by block size
            torch.full((elements,), math.nan, device=device)


BASELINE = "weight_grad"
#: Memory that a provider which stores every sample's gradient may use: bytes on a CPU, share of free memory on a GPU.
CPU_LIMIT, GPU_SHARE = 4 << 30, 0.6


def _too_large(batch: Batch, copies: float, padded: bool) -> str | None:
    """The reason why every sample's gradient cannot be stored ``copies`` times, or None."""
    one = batch.x.shape[1] * batch.dy.shape[1] * batch.x.element_size()
    need = copies * one * batch.samples
    if padded and batch.length is None:
        need += batch.samples * max(batch.lengths) * (batch.x.shape[1] + batch.dy.shape[1]) * batch.x.element_size()
    on_gpu = batch.x.is_cuda
    limit = GPU_SHARE * torch.cuda.mem_get_info(batch.x.device)[0] if on_gpu else CPU_LIMIT
    if need <= limit:
        return None
    return f"stores {batch.samples} gradients of {one / 2**20:.1f} MiB: {need / 2**30:.1f} GiB, the limit here is " + (
        f"{limit / 2**30:.1f}"
    )


def sq_norms(gradients: Tensor) -> Tensor:
    """[N, ...] -> [N] float32: squares summed in float32 for every dtype, without a float32 copy on a GPU."""
    flat = gradients.flatten(1)
    if flat.is_cuda:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square()
    # On a CPU vector_norm adds sequentially and is off by 6e-5 at a million elements; sum adds pairwise.
    return flat.float().square().sum(1)


def _weight_grad(batch: Batch) -> Run:
    return lambda: Result(None, batch.dy.T @ batch.x)


def _ours(backend: str, algorithm: str, weight_grad: bool) -> Provider:
    parts = [part for part in (backend, algorithm) if part != "auto"] + ([] if weight_grad else ["norms"])

    def prepare(batch: Batch) -> Run:
        def run() -> Result:
            result = gk.fused_grad_norm(
                batch.x,
                batch.dy,
                batch.cu_seqlens,
                group_ids=batch.group_ids,
                num_groups=batch.groups,
                weight_grad=weight_grad,
                group_gram=batch.gram,
                algorithm=algorithm,
                backend=backend,
            )
            return Result(result.sample_sq_norms, result.weight_grad, result.group_sq_norms, result.group_gram)

        return run

    def unavailable_reason(batch: Batch) -> str | None:
        return (
            None
            if backend == "auto"
            else backends.unavailable_reason(backend, "fused_grad_norm", batch.x.device.type, batch.x.dtype)
        )

    def ran(batch: Batch) -> dict[str, object]:
        plan = dispatch.explain(
            batch.x,
            batch.dy,
            batch.cu_seqlens,
            group_ids=batch.group_ids,
            num_groups=batch.groups,
            weight_grad=weight_grad,
            group_gram=batch.gram,
            algorithm=algorithm,
            backend=backend,
        ).plan
        longest = max(batch.lengths)
        return {"backend": plan.backend, "gram_tokens": min(plan.gram_tokens, longest), "sums": plan.group_sums}

    what = f"fused_grad_norm, backend={backend!r}, algorithm={algorithm!r}" + (", with dW" if weight_grad else "")
    does = "dW and norms" if weight_grad else "norms"
    return Provider("_".join(parts) or "auto", what, does, prepare, unavailable_reason, ran)


def _bmm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, batched, with a float32 result, on a GPU directly from the accumulators."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _two_gram(batch: Batch) -> Run:
    if batch.length is None and not batch.x.is_cuda:
        # On a CPU many small products cost nothing extra; padding costs products.
        pairs = [(batch.x[None, lo:hi], batch.dy[None, lo:hi]) for lo, hi in pairwise(batch.offsets)]
        return lambda: Result(torch.cat([_two_gram_of(x, dy) for x, dy in pairs]))
    x, dy = batch.padded()
    return lambda: Result(_two_gram_of(x, dy))


def _two_gram_of(x: Tensor, dy: Tensor) -> Tensor:
    return (_bmm_float32(x, x.mT) * _bmm_float32(dy, dy.mT)).sum((1, 2))


def _two_gram_unavailable(batch: Batch) -> str | None:
    longest = max(batch.lengths)
    need = 3 * 4 * batch.samples * longest * longest
    limit = GPU_SHARE * torch.cuda.mem_get_info(batch.x.device)[0] if batch.x.is_cuda else CPU_LIMIT
    return None if need <= limit else f"stores two Grams of {longest} tokens per sample: {need / 2**30:.1f} GiB"


def _bmm(batch: Batch) -> Run:
    x, dy = batch.padded()

    def run() -> Result:
        gradients = torch.bmm(dy.mT, x)
        return Result(sq_norms(gradients), gradients.sum(0))

    return run


def _vmap_grad(batch: Batch) -> Run:
    x, dy = batch.padded()
    weight = torch.randn(dy.shape[2], x.shape[2], dtype=x.dtype, device=x.device) / x.shape[2]

    def loss(w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (torch.nn.functional.linear(x, w) * dy).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> Result:
        gradients = per_sample(weight, x, dy)
        return Result(sq_norms(gradients), gradients.sum(0))

    return run


def _grouped_mm(batch: Batch) -> Run:
    # With two-dimensional operands the offsets split the contracted dimension, the tokens: [N, d_out, d_in].
    ends = batch.cu_seqlens[1:].to(torch.int32)

    def run() -> Result:
        gradients = torch._grouped_mm(batch.dy.T, batch.x, offs=ends)
        return Result(sq_norms(gradients), gradients.sum(0))

    return run


def _grouped_mm_unavailable(batch: Batch) -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    if batch.x.dtype != torch.bfloat16:
        return f"its grouped kernel takes bfloat16, not {str(batch.x.dtype).removeprefix('torch.')}"
    if batch.x.shape[1] % 8 or batch.dy.shape[1] % 8:
        return f"its rows must be multiples of 16 bytes: d {batch.x.shape[1]} and {batch.dy.shape[1]} are not"
    return _too_large(batch, 1, padded=False)


def _all_ours() -> list[Provider]:
    found = []
    for backend in ("auto", *backends.NAMES):
        found += [_ours(backend, algorithm, True) for algorithm in ("auto", "wgrad", "gram")]
        found += [_ours(backend, algorithm, False) for algorithm in ("auto", "wgrad", "gram")]
    return found


#: The launches of ``cuda_wgrad`` to choose from.
_TILES = {f"cuda_{name}": candidate.config for name, candidate in CUDA_CANDIDATES.items()}


def _with_tiles(name: str, tiles: CudaConfig) -> Provider:
    base = _ours("cuda", "wgrad", True)

    def prepare(batch: Batch) -> Run:
        call = base.prepare(batch)

        def run() -> Result:
            with forced(tiles):
                return call()

        return run

    def unavailable_reason(batch: Batch) -> str | None:
        reason = base.unavailable_reason(batch)
        if reason is None and architecture(torch.cuda.get_device_capability(batch.x.device)) != tiles.arch:
            reason = f"these tiles are for the kernel of sm_{tiles.arch}"
        return reason

    return replace(
        base, name=name, what=f"{base.what}, {tiles}", prepare=prepare, unavailable_reason=unavailable_reason
    )


_PEERS = (
    Provider("two_gram", "the two-Gram formula", "norms", _two_gram, _two_gram_unavailable),
    Provider(
        "bmm",
        "every sample's gradient by torch.bmm",
        "dW and norms",
        _bmm,
        lambda batch: _too_large(batch, 1, True),
        rounds=True,
    ),
    Provider(
        "vmap_grad",
        "every sample's gradient by torch.func.vmap(grad), forward included",
        "dW and norms",
        _vmap_grad,
        lambda batch: _too_large(batch, 2, True),
        rounds=True,
    ),
    Provider(
        "grouped_mm",
        "every sample's gradient by torch._grouped_mm (a loop of products where the GPU is no sm_90 or sm_100)",
        "dW and norms",
        _grouped_mm,
        _grouped_mm_unavailable,
        rounds=True,
    ),
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, "dy.T @ x by torch's BLAS", "dW", _weight_grad, rounds=True),
        *_all_ours(),
        *(_with_tiles(name, tiles) for name, tiles in _TILES.items()),
        *_PEERS,
    )
}
PEERS = tuple(provider.name for provider in _PEERS)
TILES = tuple(_TILES)
