"""The ways to the squared norms of per-sample gradients that are compared, by name.

A provider takes a batch and returns a function of no arguments; that function does the work and returns what it found.
``weight_grad`` alone does no norms: it is the yardstick. Ours are named by backend, algorithm and "norms" (without dW),
what is "auto" left out: ``auto``, ``wgrad``, ``triton``, ``triton_gram``, ``cuda_norms``, ``cuda_gram_norms``. Names in
``TILES`` are ``cuda_wgrad`` with its tiles given, to find the ones to take.

The peers are written as somebody who needs the right numbers would write them: norms of half-precision gradients are
taken in float32, two-Gram products are kept in float32 where the library can, and ragged batches are padded
beforehand, outside the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import gradnorm_kernels as gk
from benchmarks.batches import Batch
from gradnorm_kernels import backends, dispatch
from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES, CudaConfig, forced


class Result(NamedTuple):
    """Squared norms of the samples [N], the weight's gradient [d_out, d_in], squared norms of group sums [K],
    their inner products [K, K]."""

    norms: Tensor | None = None
    weight_grad: Tensor | None = None
    group_norms: Tensor | None = None
    group_gram: Tensor | None = None


Run = Callable[[], Result]


@dataclass(frozen=True)
class Provider:
    """``prepare(batch)`` gives the function to time; ``unable(batch)`` says why there is none, or None.

    ``does`` is "dW", "norms" or "dW and norms". ``ran(batch)`` tells what the dispatch chose, for ours. ``rounds``: it
    rounds parts of the result to the inputs' dtype before it adds them: stored gradients, or a BLAS's split sums.
    """

    name: str
    what: str
    does: str
    prepare: Callable[[Batch], Run]
    unable: Callable[[Batch], str | None] = lambda batch: None
    ran: Callable[[Batch], dict[str, object]] | None = None
    rounds: bool = False

    @property
    def ours(self) -> bool:
        return self.ran is not None


YARDSTICK = "weight_grad"
#: What a provider that stores every sample's gradient may use on a CPU; on a GPU, this share of what is free.
CPU_LIMIT, GPU_SHARE = 4 << 30, 0.6


def _too_large(batch: Batch, copies: float, padded: bool) -> str | None:
    """Why every sample's gradient cannot be stored ``copies`` times, or None."""
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
    """[N, ...] -> [N] float32: squares summed in float32 whatever the dtype, without a float32 copy on a GPU."""
    flat = gradients.flatten(1)
    if flat.is_cuda:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square()
    # On a CPU vector_norm adds one after the other and is off by 6e-5 at a million elements; sum adds in a tree.
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

    def unable(batch: Batch) -> str | None:
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
        return {"backend": plan.backend, "gram_tokens": min(plan.gram_tokens, longest), "sums": plan.sums}

    what = f"fused_grad_norm, backend={backend!r}, algorithm={algorithm!r}" + (", with dW" if weight_grad else "")
    does = "dW and norms" if weight_grad else "norms"
    return Provider("_".join(parts) or "auto", what, does, prepare, unable, ran)


def _bmm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, batched, with a float32 result: straight from the accumulators on a GPU."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _two_gram(batch: Batch) -> Run:
    if batch.length is None and not batch.x.is_cuda:
        # Many small products cost a CPU nothing extra, padding costs it products.
        pairs = [(batch.x[None, lo:hi], batch.dy[None, lo:hi]) for lo, hi in pairwise(batch.offsets)]
        return lambda: Result(torch.cat([_two_gram_of(x, dy) for x, dy in pairs]))
    x, dy = batch.padded()
    return lambda: Result(_two_gram_of(x, dy))


def _two_gram_of(x: Tensor, dy: Tensor) -> Tensor:
    return (_bmm_float32(x, x.mT) * _bmm_float32(dy, dy.mT)).sum((1, 2))


def _two_gram_unable(batch: Batch) -> str | None:
    longest = max(batch.lengths)
    need = 3 * 4 * batch.samples * longest * longest
    limit = GPU_SHARE * torch.cuda.mem_get_info(batch.x.device)[0] if batch.x.is_cuda else CPU_LIMIT
    return None if need <= limit else f"stores two Grams of {longest} tokens a sample: {need / 2**30:.1f} GiB"


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
    # Both operands two-dimensional: the offsets divide the tokens, the contraction, and the result is [N, d_out, d_in].
    ends = batch.cu_seqlens[1:].to(torch.int32)

    def run() -> Result:
        gradients = torch._grouped_mm(batch.dy.T, batch.x, offs=ends)
        return Result(sq_norms(gradients), gradients.sum(0))

    return run


def _grouped_mm_unable(batch: Batch) -> str | None:
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


#: On Hopper, the launches of ``cuda_wgrad`` to choose from.
_TILES = {f"cuda_{name}": candidate.config for name, candidate in CUDA_CANDIDATES.items()}


def _with_tiles(name: str, tiles: CudaConfig) -> Provider:
    base = _ours("cuda", "wgrad", True)

    def prepare(batch: Batch) -> Run:
        call = base.prepare(batch)

        def run() -> Result:
            with forced(tiles):
                return call()

        return run

    def unable(batch: Batch) -> str | None:
        reason = base.unable(batch)
        if reason is None and torch.cuda.get_device_capability(batch.x.device)[0] < 9:
            reason = "other tiles are for Hopper's kernel"
        return reason

    return replace(base, name=name, what=f"{base.what}, {tiles}", prepare=prepare, unable=unable)


_PEERS = (
    Provider("two_gram", "the two-Gram formula", "norms", _two_gram, _two_gram_unable),
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
        _grouped_mm_unable,
        rounds=True,
    ),
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(YARDSTICK, "dy.T @ x by torch's BLAS", "dW", _weight_grad, rounds=True),
        *_all_ours(),
        *(_with_tiles(name, tiles) for name, tiles in _TILES.items()),
        *_PEERS,
    )
}
PEERS = tuple(provider.name for provider in _PEERS)
TILES = tuple(_TILES)
