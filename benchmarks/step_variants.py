"""The ways to take a training step that are compared: plain, measured by the tracker, and what one would do without it.

Every variant makes one optimizer step on the same batch with the same total gradient, the mean over the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from benchmarks.models import Prompts, linears, row_losses


@dataclass
class Setting:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Prompts

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def losses(self, rows: slice = slice(None)) -> Tensor:
        return row_losses(self.model, self.batch.tokens[rows], self.batch.advantages[rows])


@dataclass(frozen=True)
class Variant:
    """``layers`` "last_attention" or "linears" and ``fused`` for the tracker's; ``rival`` for the ways without it."""

    name: str
    what: str
    layers: str | None = None
    fused: bool = False
    rival: bool = False

    @property
    def ours(self) -> bool:
        return self.layers is not None


BASELINE = "nothing"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "forward, backward, optimizer step"),
        Variant("last_attention", "the last block's attention projections watched", "last_attention"),
        Variant("last_attention_fused", "the same, their backward replaced", "last_attention", True),
        Variant("linears", "all linear layers but the head watched", "linears"),
        Variant("linears_fused", "the same, their backward replaced", "linears", True),
        Variant("prompt_microbatches", "one micro-batch a prompt, its gradient's norm, accumulation", rival=True),
        Variant(
            "prompt_backwards", "one forward, one backward a prompt, its gradient's norm, accumulation", rival=True
        ),
    )
}


def layer_names(setting: Setting, layers: str) -> str | list[str]:
    """The tracker's ``layers=`` for a variant's."""
    return linears(setting.model) if layers == "linears" else layers


def plain_step(setting: Setting) -> Callable[[], None]:
    def step() -> None:
        setting.optimizer.zero_grad()
        setting.losses().mean().backward()
        setting.optimizer.step()

    return step


def tracked_step(setting: Setting, tracker: gk.GradNormTracker) -> Callable[[], gk.StepStats]:
    batch = setting.batch

    def step() -> gk.StepStats:
        setting.optimizer.zero_grad()
        with tracker.microbatch(batch.task_ids, batch.sample_ids):
            setting.losses().mean().backward()
        setting.optimizer.step()
        return tracker.step()

    return step


#: The squared norms of one prompt's gradient in some of the parameters.
Norms = Callable[[list[Tensor]], Tensor]


def total_sq_norm(gradients: list[Tensor]) -> Tensor:
    """float64: one launch for all tensors, squares summed in float32 a tensor."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()


def prompt_microbatches(setting: Setting, norms: Norms = total_sq_norm) -> Callable[[], Tensor]:
    """One forward and backward a prompt; needs a second gradient buffer. The step returns ||G_p||^2, [n]."""
    parts, parameters = setting.batch.prompts, setting.parameters

    def step() -> Tensor:
        found, total = [], None
        for part in parts:
            setting.optimizer.zero_grad()
            (setting.losses(part).mean() / len(parts)).backward()
            gradients = _taken(parameters)
            found.append(norms(gradients))
            total = _accumulated(total, gradients)
        return _finish(setting, total, found)

    return step


def prompt_backwards(setting: Setting, norms: Norms = total_sq_norm) -> Callable[[], Tensor]:
    """One forward, then a backward a prompt through the whole batch's graph. The step returns ||G_p||^2, [n]."""
    parts, parameters = setting.batch.prompts, setting.parameters

    def step() -> Tensor:
        setting.optimizer.zero_grad()
        losses = setting.losses()
        found, total = [], None
        for i, part in enumerate(parts):
            (losses[part].mean() / len(parts)).backward(retain_graph=i + 1 < len(parts))
            gradients = _taken(parameters)
            found.append(norms(gradients))
            total = _accumulated(total, gradients)
        return _finish(setting, total, found)

    return step


RIVALS = {"prompt_microbatches": prompt_microbatches, "prompt_backwards": prompt_backwards}


def _taken(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients, taken away from the parameters."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def _accumulated(total: list[Tensor] | None, gradients: list[Tensor]) -> list[Tensor]:
    if total is None:
        return gradients
    torch._foreach_add_(total, gradients)
    return total


def _finish(setting: Setting, total: list[Tensor] | None, found: list[Tensor]) -> Tensor:
    assert total is not None
    for parameter, gradient in zip(setting.parameters, total, strict=True):
        parameter.grad = gradient
    setting.optimizer.step()
    # Each backward was of the prompt's share of the mean over n prompts.
    return torch.stack(found).cpu() * len(found) ** 2
