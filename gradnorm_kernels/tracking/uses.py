"""One parameter's uses in a backward pass, and the Gram matrix of the samples' gradients of that parameter.

A *use* is one call of a layer: its input and the gradient of its output. Several uses of one parameter (a tied or
reused weight) are more tokens of the same samples: they are concatenated, so that the cross terms are right.

On a GPU nothing here waits for the device: whose rows they are is known on the host, shapes do not depend on data (so
that tokens without a gradient stay in and add their zeros), and copies to the device do not block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import fused_grad_norm
from ..segments import to_device
from .layers import Layer
from .owners import by_owner, resident
from .rows import Rows
from .vocabulary import Sums, Tokens, vocabulary_sums


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
        row_sample, scale = torch.arange(count, device="cpu"), rows.sample_scale
    else:
        raise ValueError(
            f"layer {layer.name!r} got an input of shape {tuple(x.shape)}: its leading size must be the {rows.batch} "
            f"rows of the micro-batch "
            f"(or its {rows.num_samples} samples); pass task_ids for every row the model sees, or leave the layer out "
            f"of layers="
        )
    return Use(layer, x, dy, row_sample, scale)


def _tokens(use: Use) -> Tokens:
    """The use's tokens. On a CPU those whose dy is zero are left out; a padding id is marked by -1."""
    rows = use.x.shape[0]
    embedding = use.layer.kind == "embedding"
    x = use.x.reshape(rows, -1) if embedding else use.x.reshape(rows, -1, use.x.shape[-1])
    dy = use.dy.reshape(rows, -1, use.dy.shape[-1])
    if embedding:
        assert isinstance(use.layer.module, nn.Embedding)
        padding = use.layer.module.padding_idx
        if padding is not None:
            x = torch.where(x == padding, -1, x)
    if resident(dy):
        lengths = torch.full((rows,), dy.shape[1], device="cpu")
        return Tokens(x.flatten(0, 1), dy.flatten(0, 1), lengths, use.row_sample, use.scale, embedding)
    keep = (dy != 0).any(-1)
    if embedding:
        keep &= x >= 0
    return Tokens(x[keep], dy[keep], keep.sum(1), use.row_sample, use.scale, embedding)


def weight_sums(uses: Sequence[Use], rows: Rows, *, weight_grad: bool = False) -> Sums:
    """Gram over blocks of ``G_p = sum_uses sum_tokens scale dy x^T`` for one weight matrix.

    With ``weight_grad`` (one linear use only) also dW of the plain, unscaled gradient, which backward needs.
    """
    parts = [_tokens(use) for use in uses]
    factors = _block_factors(parts, rows)
    scaled = parts if factors is not None else [_prescale(part) for part in parts]

    if any(part.embedding for part in parts):
        sums = vocabulary_sums(scaled, rows, _linear_sums)
    else:
        sums = _linear_sums(scaled, rows, weight_grad and factors is not None)
    if factors is not None:
        factor = to_device(factors, sums.gram.device)
        return Sums(sums.gram * factor[:, None] * factor, sums.self_sq * factor**2, sums.weight_grad)
    plain = parts[0]
    return sums._replace(weight_grad=plain.dy.T @ plain.x.to(plain.dy.dtype) if weight_grad else None)


def _block_factors(parts: Sequence[Tokens], rows: Rows) -> Tensor | None:
    """[blocks] float64: the factor that all rows of a block share, so that its sums can be scaled after the fact.

    None where rows of one block differ.
    """
    scale = torch.cat([part.scale for part in parts])
    block = rows.sample_block[torch.cat([part.row_sample for part in parts])]
    factors = torch.zeros(rows.num_blocks, dtype=torch.float64, device="cpu")
    factors[block] = scale
    return factors if bool((factors[block] == scale).all()) else None


def _prescale(tokens: Tokens) -> Tokens:
    """Scale dy row by row without rounding it to its dtype again, which would cost the estimate its digits."""
    dy, rows = tokens.dy, len(tokens.lengths)
    factor = to_device(tokens.scale, dy.device).to(torch.promote_types(dy.dtype, torch.float32))
    if not resident(dy):
        return tokens._replace(dy=dy.to(factor.dtype) * factor.repeat_interleave(tokens.lengths)[:, None])
    wide = (dy.unflatten(0, (rows, -1)).to(factor.dtype) * factor[:, None, None]).flatten(0, 1)
    if tokens.embedding or dy.dtype != torch.bfloat16:
        return tokens._replace(dy=wide)
    return split(tokens._replace(dy=wide))


def split(tokens: Tokens) -> Tokens:
    """Tokens of float32 dy as twice as many of bfloat16: the part that fits and what is left, 16 bits of dy together.

    Tensor cores multiply those ten times faster than they do float32.
    """
    high = tokens.dy.bfloat16()
    low = (tokens.dy - high).bfloat16()
    x, rows = tokens.x.bfloat16(), tokens.row_sample
    return tokens._replace(
        x=torch.cat([x, x]),
        dy=torch.cat([high, low]),
        lengths=torch.cat([tokens.lengths, tokens.lengths]),
        row_sample=torch.cat([rows, rows]),
        scale=torch.cat([tokens.scale, tokens.scale]),
    )


def _linear_sums(parts: Sequence[Tokens], rows: Rows, weight_grad: bool) -> Sums:
    """The sums of a linear's tokens, unscaled, from the operator."""
    lengths = torch.cat([part.lengths for part in parts])
    x, dy = (
        torch.cat(tensors) if len(parts) > 1 else tensors[0]
        for tensors in zip(*[(part.x, part.dy) for part in parts], strict=True)
    )
    r = fused_grad_norm(
        x.to(dy.dtype),
        dy,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        sample_ids=torch.cat([part.row_sample for part in parts]),
        group_ids=rows.sample_block,
        num_groups=rows.num_blocks,
        group_gram=True,
        weight_grad=weight_grad,
    )
    assert r.group_gram is not None
    return Sums(r.group_gram, by_owner(r.sample_sq_norms, rows.sample_block, rows.num_blocks), r.weight_grad)


def bias_rows(use: Use) -> Tensor:
    """[R, d_out] float64: the gradient of a bias through each row, ``sum_t dy_t``, times the row's factor."""
    dy = use.dy.reshape(use.dy.shape[0], -1, use.dy.shape[-1])
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.sum(1, dtype=wide).to(torch.float64) * to_device(use.scale, dy.device)[:, None]


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
    factor = to_device(use.scale, use.dy.device)
    return {name: grad.to(torch.float64) * factor.view(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}
