"""GRPO's arithmetic: advantages, the clipped loss, and what undoes each loss type's weighting of a completion."""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import Settings


def advantages(rewards: Tensor, scale_rewards: str) -> Tensor:
    """``A = (r - mean_group) / (std + 1e-4)``, std over the group, the batch, or left out.

    rewards, result: [n, G] float32. A group whose rewards are equal gives zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred
    std = rewards.std(1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centred / (std + 1e-4)


def token_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, reference: Tensor | None, settings: Settings
) -> Tensor:
    """``-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta KL``, rho = exp(logprobs - old_logprobs).

    logprobs, old_logprobs, reference: [B, C]; advantage: [B]; result [B, C]. KL is ``exp(d) - d - 1`` with
    d = reference - logprobs.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    clipped = ratio.clamp(1 - settings.epsilon, 1 + high)
    loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    if reference is not None:
        gap = reference - logprobs
        loss = loss + settings.beta * (gap.exp() - gap - 1)
    return loss


def row_weights(mask: Tensor, step_tokens: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """How the loss type weighs a completion, and what undoes it for the measurement.

    With B rows and M mask tokens in the micro-batch, L_i tokens in row i, GA micro-batches and T tokens in the step,
    the micro-batch's loss is ``sum_i weight_i * (sum of row i's token losses)``::

        loss_type    weight_i                                scale_i = 1 / (weight_i L_i)
        grpo         1 / (B GA L_i)                          B GA
        bnpo         1 / (M GA)                              M GA / L_i
        dr_grpo      1 / (B max_completion_length GA)        B max_completion_length GA / L_i
        dapo         1 / T                                   T / L_i

    ``scale`` is the tracker's row_scale: it turns a row's share of the loss into the mean of its token losses, so that
    every loss type measures the same gradient, that of the prompt's mean-token loss.

    Args:
        mask: [B, C] of the micro-batch, 1 at completion tokens that count.
        step_tokens: T.

    Returns:
        weight [B] float32 on the mask's device, scale [B] float64 on the CPU. A row without tokens counts as one token.
    """
    lengths = mask.sum(1).clamp(min=1)
    rows, accumulation = mask.shape[0], settings.gradient_accumulation_steps
    divisors = {
        "grpo": (rows * accumulation * lengths).double(),
        "bnpo": torch.full_like(lengths, int(mask.sum().clamp(min=1)) * accumulation).double(),
        "dr_grpo": torch.full_like(lengths, rows * settings.max_completion_length * accumulation).double(),
        "dapo": torch.full_like(lengths, max(step_tokens, 1)).double(),
    }
    divisor = divisors[settings.loss_type]
    return (1.0 / divisor).float(), (divisor / lengths).cpu()
