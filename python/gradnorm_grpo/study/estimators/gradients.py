"""The last attention block's inputs and output gradients for stored rollouts, packed by prompt, and their Gram matrix.

Each micro-batch runs forward and backward once, on whole groups. The loss is the sum over prompts of each prompt's own
loss, the mean over its completions of their mean token losses, so that what reaches a layer is the prompt's gradient
without any factor to undo: ``G_p = sum over p's tokens of dy_t x_t^T``. That is what the tracker measures for every
loss type. The old log-probabilities are the present ones, as at GRPO's first update, where a KL term has no gradient
yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradnorm_kernels as gk

from ...errors import UserError
from ...loop import Batch, Grpo
from ...objective import token_losses


@dataclass(frozen=True)
class Layer:
    """One linear layer's tokens with a gradient, in segments of whole rows. A bias is the last column of x, of ones.

    x [T, d_in], dy [T, d_out], cu_seqlens [S + 1], sample_ids [S] in [0, prompts).
    """

    name: str
    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor
    sample_ids: Tensor
    prompts: int
    bias: bool

    @property
    def d_in(self) -> int:
        """Columns of the weight, the bias counted as one."""
        return self.x.shape[1]

    @property
    def d_out(self) -> int:
        """Rows of the weight."""
        return self.dy.shape[1]

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[0]

    def gram(self) -> Tensor:
        """[N, N] float64 on the CPU: ``<G_p, G_q>`` of this layer."""
        if not self.tokens:
            return torch.zeros(self.prompts, self.prompts, dtype=torch.float64)
        return gk.grad_gram(
            self.x, self.dy, self.cu_seqlens, sample_ids=self.sample_ids, num_samples=self.prompts
        ).cpu()


def gram(layers: Sequence[Layer]) -> Tensor:
    """[N, N] float64: the inner products of the prompts' gradients in all layers together."""
    return torch.stack([layer.gram() for layer in layers]).sum(0)


def capture(grpo: Grpo, batch: Batch, first: int, last: int) -> list[Layer]:
    """The tracked layers' tokens for prompts first..last-1 of ``batch``, which become samples 0, 1, ...

    One forward and backward a micro-batch of ``per_device_train_batch_size`` completions; no gradient is left behind.
    """
    settings = grpo.settings
    per_micro = settings.per_device_train_batch_size // settings.num_generations
    assert grpo.tracker is not None
    modules = {name: grpo.model.get_submodule(name) for name in grpo.tracker.layers}
    pieces: dict[str, list[_Piece]] = {name: [] for name in modules}
    grpo.model.train()
    for start in range(first, last, per_micro):
        stop = min(start + per_micro, last)
        with _watching(modules, start - first, stop - start, pieces):
            prompt_losses(grpo, batch, start, stop).sum().backward()
        grpo.model.zero_grad(set_to_none=True)
    return [_pack(name, module, pieces[name], last - first) for name, module in modules.items()]


def prompt_losses(
    grpo: Grpo, batch: Batch, first: int, last: int, watching: Sequence[gk.GradNormTracker] = ()
) -> Tensor:
    """[n] each prompt's own loss; ``watching``: the trackers whose micro-batch is open."""
    rollouts = batch.rollouts.rows(first, last)
    logprobs = grpo.logprobs(grpo.model, rollouts, watching)
    counted = rollouts.completion_mask
    if grpo.settings.mask_truncated_completions:
        counted = counted * rollouts.ended[:, None]
    advantage = batch.advantages[first:last].reshape(-1).to(logprobs)
    losses = token_losses(logprobs, logprobs.detach(), advantage, None, grpo.settings)
    rows = torch.where(counted > 0, losses, 0.0).sum(1) / counted.sum(1).clamp(min=1)
    return rows.view(-1, rollouts.group).mean(1)


@dataclass(frozen=True)
class _Piece:
    """What one call of a layer leaves: its tokens with a gradient, and the length and prompt of each of its rows."""

    x: Tensor
    dy: Tensor
    lengths: Tensor
    prompts: Tensor


@contextmanager
def _watching(
    modules: dict[str, torch.nn.Module], first: int, count: int, pieces: dict[str, list[_Piece]]
) -> Iterator[None]:
    """Keep every call of the modules whose output gets a gradient; its prompts are first..first+count-1."""

    def watch(name: str) -> Any:
        def forward_hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def output_hook(dy: Tensor) -> None:
                pieces[name].append(_piece(x, dy.detach(), first, count))

            if output.requires_grad:
                output.register_hook(output_hook)

        return forward_hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _piece(x: Tensor, dy: Tensor, first: int, count: int) -> _Piece:
    """The call's rows: one a prompt, where the group shares it, or as many a prompt as it has completions."""
    keep = (dy != 0).any(-1)
    prompts = first + torch.arange(len(x)) // (len(x) // count)
    return _Piece(x[keep].to(dy.dtype), dy[keep], keep.sum(1).cpu(), prompts)


def _pack(name: str, module: torch.nn.Module, pieces: Sequence[_Piece], prompts: int) -> Layer:
    if not pieces:
        raise UserError(f"no gradient reached the layer {name}: the estimators need a model that calls it")
    x, dy = torch.cat([piece.x for piece in pieces]), torch.cat([piece.dy for piece in pieces])
    trained = isinstance(module.bias, torch.nn.Parameter) and module.bias.requires_grad
    if trained:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    cu_seqlens = torch.nn.functional.pad(torch.cat([piece.lengths for piece in pieces]).cumsum(0), (1, 0))
    return Layer(name, x, dy, cu_seqlens, torch.cat([piece.prompts for piece in pieces]), prompts, trained)
