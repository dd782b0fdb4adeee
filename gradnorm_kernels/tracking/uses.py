"""One parameter's uses in a backward pass, and the Gram matrix of the samples' gradients of that parameter.

A *use* is one call of a layer: its input and the gradient of its output. Several uses of one parameter (a tied or
reused weight) are more tokens of the same samples: they are concatenated, so that the cross terms are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import fused_grad_norm
from .layers import Layer
from .rows import Rows

VOCABULARY_CHUNK = 2048  # rows of an embedding matrix handled at once: bounds the one-hot factor at T x 2048


class Sums(NamedTuple):
    """Over blocks, float64: gram [b, b] and the samples' own squares summed [b]; dW [d_out, d_in] if asked for."""

    gram: Tensor
    self_sq: Tensor
    weight_grad: Tensor | None


@dataclass(frozen=True)
class Use:
    """x: [R, L, d_in] (ids [R, L] for an embedding), dy: [R, L, d_out]; whose rows they are, and their factors."""

    layer: Layer
    x: Tensor
    dy: Tensor
    row_sample: Tensor  # [R] int64, CPU
    scale: Tensor  # [R] float64, CPU


def make_use(layer: Layer, x: Tensor, dy: Tensor, rows: Rows) -> Use:
    """Bring a call's tensors to [R, L, ...] and find out whose rows they are.

    R is the micro-batch's B, or its number of samples N: a part that runs once a sample, as a shared prompt prefix
    does. A flattened [B * L, ...] input is told apart by the attention mask.

    Raises:
        ValueError: the leading size fits neither, or rows of one sample differ in scale where one row stands for them
            all.
    """
    tokens = 1 if layer.kind == "embedding" else 0
    if rows.mask is not None and x.dim() + tokens == 2 and x.shape[0] == rows.mask.numel() != rows.batch:
        shape = rows.mask.shape
        x, dy = x.reshape(*shape, *x.shape[1:]), dy.reshape(*shape, dy.shape[-1])
    count = x.shape[0]
    if count == rows.batch:
        row_sample, scale = rows.row_sample, rows.scale
    elif count == rows.num_samples:
        if rows.sample_scale is None:
            raise ValueError(
                f"layer {layer.name!r} ran once a sample ({count} rows for {rows.batch}), but row_scale or "
                f"rows_per_sample differs between rows of "
                "one sample: a shared prefix needs one factor a sample"
            )
        row_sample, scale = torch.arange(count), rows.sample_scale
    else:
        raise ValueError(
            f"layer {layer.name!r} got an input of shape {tuple(x.shape)}: its leading size must be the {rows.batch} "
            f"rows of the micro-batch "
            f"(or its {rows.num_samples} samples); pass task_ids for every row the model sees, or leave the layer out "
            f"of layers="
        )
    return Use(layer, x, dy, row_sample, scale)


class _Packed(NamedTuple):
    """T kept tokens: x [T, ...], dy [T, d_out], and how many of them each row has."""

    x: Tensor
    dy: Tensor
    lengths: Tensor  # [R] int64


def _pack(use: Use, mask: Tensor | None, drop_zeros: bool) -> _Packed:
    """Leave out tokens whose dy is zero: seen exactly on a CPU; elsewhere the mask says so without a sync."""
    rows = use.x.shape[0]
    embedding = use.layer.kind == "embedding"
    x = use.x.reshape(rows, -1) if embedding else use.x.reshape(rows, -1, use.x.shape[-1])
    dy = use.dy.reshape(rows, -1, use.dy.shape[-1])
    keep = None
    if drop_zeros and not dy.is_cuda:
        keep = (dy != 0).any(-1)
    elif drop_zeros and mask is not None and mask.shape == dy.shape[:2]:
        keep = mask.to(dy.device)
    if embedding:
        assert isinstance(use.layer.module, nn.Embedding)
        padding = use.layer.module.padding_idx
        if padding is not None:
            keep = (x != padding) if keep is None else keep & (x != padding)
    if keep is None:
        length = dy.shape[1]
        return _Packed(
            x.flatten(0, 1), dy.flatten(0, 1), torch.full((rows,), length, dtype=torch.long, device=dy.device)
        )
    return _Packed(x[keep], dy[keep], keep.sum(1))


def weight_sums(uses: Sequence[Use], rows: Rows, *, weight_grad: bool = False) -> Sums:
    """Gram over blocks of ``G_p = sum_uses sum_tokens scale dy x^T`` for one weight matrix.

    With ``weight_grad`` (one linear use only) also dW of the plain, unscaled, unmasked gradient, which backward needs.
    """
    packed = [_pack(use, rows.mask, drop_zeros=not (weight_grad and use.dy.is_cuda)) for use in uses]
    factors = torch.cat([use.scale for use in uses])
    uniform = float(factors[0]) if bool((factors == factors[0]).all()) else None
    if uniform is None:
        scaled = [_prescale(p, use.scale) for p, use in zip(packed, uses, strict=True)]
    else:
        scaled = packed
    row_sample = torch.cat([use.row_sample for use in uses])
    lengths = torch.cat([p.lengths for p in scaled])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    device = cu_seqlens.device
    sample_ids, group_ids = row_sample.to(device), rows.sample_block.to(device)

    def run(x: Tensor, dy: Tensor, want: bool) -> Sums:
        r = fused_grad_norm(
            x.to(dy.dtype),
            dy,
            cu_seqlens,
            sample_ids=sample_ids,
            group_ids=group_ids,
            group_gram=True,
            weight_grad=want,
        )
        own = torch.zeros(rows.num_blocks, dtype=torch.float64, device=device).index_add_(
            0, group_ids, r.sample_sq_norms
        )
        assert r.group_gram is not None
        return Sums(r.group_gram, own, r.weight_grad)

    if any(use.layer.kind == "embedding" for use in uses):
        sums = _vocabulary_sums([use.layer.kind == "embedding" for use in uses], scaled, run)
    else:
        x, dy = (
            torch.cat(parts) if len(parts) > 1 else parts[0]
            for parts in zip(*[(p.x, p.dy) for p in scaled], strict=True)
        )
        sums = run(x, dy, weight_grad and uniform is not None)
    if uniform is not None:
        return Sums(sums.gram * uniform**2, sums.self_sq * uniform**2, sums.weight_grad)
    plain = packed[0]
    return sums._replace(weight_grad=plain.dy.T @ plain.x.to(plain.dy.dtype) if weight_grad else None)


def _prescale(packed: _Packed, scale: Tensor) -> _Packed:
    """Scale dy row by row, in fp32 at least: rounding a scaled bf16 again would cost the estimate its digits."""
    wide = torch.promote_types(packed.dy.dtype, torch.float32)
    factor = scale.to(packed.dy.device).to(wide).repeat_interleave(packed.lengths)
    return packed._replace(dy=packed.dy.to(wide) * factor[:, None])


def _vocabulary_sums(
    is_embedding: list[bool], packed: list[_Packed], run: Callable[[Tensor, Tensor, bool], Sums]
) -> Sums:
    """An embedding's gradient is ``one_hot(id) dy^T``; a head tied to it adds ``dy_head x^T``.

    The Gram adds up over rows of the matrix, so nothing larger than tokens x VOCABULARY_CHUNK is made. Without a head
    only the ids that occur are looked at.
    """
    wide = torch.promote_types(packed[0].dy.dtype, torch.float32)
    heads = [p for p, embedding in zip(packed, is_embedding, strict=True) if not embedding]
    ids = [p.x for p, embedding in zip(packed, is_embedding, strict=True) if embedding]
    if heads:
        vocabulary = heads[0].dy.shape[1]
    else:
        occurring, inverse = torch.cat(ids).unique(return_inverse=True)
        vocabulary = occurring.numel()
        ids = list(inverse.split([part.numel() for part in ids]))
    remaining = iter(ids)
    codes = [next(remaining) if embedding else None for embedding in is_embedding]
    x = torch.cat([(p.dy if embedding else p.x).to(wide) for p, embedding in zip(packed, is_embedding, strict=True)])
    total: Sums | None = None
    for start in range(0, max(vocabulary, 1), VOCABULARY_CHUNK):
        stop = min(start + VOCABULARY_CHUNK, max(vocabulary, 1))
        span = torch.arange(start, stop, device=x.device)
        dy = torch.cat(
            [
                p.dy[:, start:stop].to(wide) if code is None else (code[:, None] == span).to(wide)
                for p, code in zip(packed, codes, strict=True)
            ]
        )
        part = run(x, dy, False)
        total = part if total is None else Sums(total.gram + part.gram, total.self_sq + part.self_sq, None)
    assert total is not None
    return total


def bias_rows(use: Use) -> Tensor:
    """[R, d_out] float64: the gradient of a bias through each row, ``sum_t dy_t``, times the row's factor."""
    dy = use.dy.reshape(use.dy.shape[0], -1, use.dy.shape[-1])
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.sum(1, dtype=wide).to(torch.float64) * use.scale.to(dy.device)[:, None]


def vector_rows(use: Use) -> dict[str, Tensor]:
    """The gradients of a norm-like module's own parameters through each row: name -> [R, *shape] float64, scaled.

    One vectorised vector-Jacobian product of the module's own forward, so every norm is right whatever its formula.
    """
    module = use.layer.module
    wide = torch.promote_types(use.dy.dtype, torch.float32)
    own = {name: p.detach().to(wide) for name, p in module.named_parameters(recurse=False)}
    trained = {name: own[name] for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    fixed = {name: value for name, value in own.items() if name not in trained}

    def one_row(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, {**fixed, **parameters}, (x,))

        return torch.func.vjp(forward, trained)[1](dy)[0]

    try:
        with torch.enable_grad(), torch.autocast(use.dy.device.type, enabled=False):
            grads = torch.func.vmap(one_row)(use.x.to(wide), use.dy.to(wide))
    except (RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"layer {use.layer.name!r} ({type(module).__name__}) cannot be measured: its forward does not run row by "
            f"row ({error}); leave it out of layers="
        ) from error
    factor = use.scale.to(use.dy.device)
    return {name: grad.to(torch.float64) * factor.view(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}
