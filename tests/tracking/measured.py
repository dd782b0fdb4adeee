"""A tracker beside brute force on any model: every parameter that is not listed as skipped must be measured right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.brute_force import sample_gradients, u_statistic

TASKS = ["a", "b", "a", "b", "a", "a"]
ROWS = len(TASKS)
WORDS = 20
RowLosses = Callable[[Sequence[int]], Tensor]


class TwoLinears(nn.Module):
    """The layers of many small models, [.., 8] to 8 and to 3, in float64; each model has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()


def next_token_losses(model: nn.Module, ids: Tensor) -> RowLosses:
    """``losses(rows)``: [n] mean next-token losses of these rows of ``ids`` [B, L]; the model gives logits."""

    def losses(rows: Sequence[int]) -> Tensor:
        rows = list(rows)
        logits = model(ids[rows])
        logits = getattr(logits, "logits", logits)[:, :-1]
        return -torch.log_softmax(logits, -1).gather(-1, ids[rows][:, 1:, None])[..., 0].mean(1)

    return losses


def class_losses(model: nn.Module, x: Tensor) -> RowLosses:
    """``losses(rows)``: [n] the cross-entropy of each row of ``x``; the model gives [n, classes] logits."""

    def losses(rows: Sequence[int]) -> Tensor:
        rows = list(rows)
        logits = model(x[rows])
        target = torch.arange(ROWS)[rows] % logits.shape[-1]
        return nn.functional.cross_entropy(logits, target, reduction="none")

    return losses


def token_ids(length: int = 6) -> Tensor:
    return torch.randint(1, WORDS, (ROWS, length), generator=torch.Generator().manual_seed(5))


def features(length: int = 6, width: int = 8) -> Tensor:
    return torch.randn(ROWS, length, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def agree(
    model: nn.Module,
    losses: RowLosses,
    layers: Any = "all",
    steps: int = 1,
    mask: Tensor | None = None,
    rel: float = 1e-6,
    before: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, str]:
    """Hold U and the mean squared norm of both tasks against brute force; returns why parameters were skipped.

    ``before(step)`` is called before each step; the last one's numbers count. Brute force takes each row alone, so
    that a model that sees rows in the wrong order cannot agree with itself.
    """
    tracker = gk.GradNormTracker(model, layers, **options)
    try:
        for step in range(steps):
            if before is not None:
                before(step)
            model.zero_grad()
            with tracker.microbatch(TASKS, attention_mask=mask):
                losses(range(ROWS)).mean().backward()
            stats = tracker.step()
    finally:
        tracker.close()
    every = dict(model.named_parameters(remove_duplicate=False))
    out = {id(every[name]) for name in tracker.skipped_reasons if name in every}
    modules = dict(model.named_modules())
    inside = {id(p) for name in tracker.layers for p in modules[name].parameters(recurse=False)}
    parameters = [p for p in every.values() if p.requires_grad and id(p) in inside and id(p) not in out]
    parameters = list({id(p): p for p in parameters}.values())
    if not parameters:
        assert stats == {}
        return tracker.skipped_reasons
    rows = [sample_gradients(losses([row]), [row], parameters)[row] for row in range(ROWS)]
    for task in "ab":
        g = torch.stack([row for row, other in zip(rows, TASKS, strict=True) if other == task])
        size = float(g.square().sum(1).mean())
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=rel)
        assert stats[task].sq_norm == pytest.approx(u_statistic(g), abs=rel * size)
    return tracker.skipped_reasons
