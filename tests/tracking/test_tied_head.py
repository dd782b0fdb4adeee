"""Fused heads that are tied to embeddings: the pass over the head that gives dW gives its norms too."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.tracking import parameter_gram, recorder
from tests.tracking.measured import TASKS, WORDS, agree, next_token_losses, token_ids


class Tied(nn.Module):
    """One matrix for ``uses``: the embedding, a second embedding, the head, the head again, another linear module."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uses = uses
        self.token, self.second = nn.Embedding(WORDS, 8), nn.Embedding(WORDS, 8)
        self.inner = nn.Linear(8, 8)
        self.head, self.other = nn.Linear(8, WORDS, bias=False), nn.Linear(8, WORDS, bias=False)
        self.free = nn.Embedding(WORDS, 8)
        self.head.weight = self.second.weight = self.token.weight
        if "other" in uses:
            self.other.weight = self.token.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        words = self.free(ids)
        words = words + self.token(ids) if "token" in self.uses else words
        words = words + self.second(ids.roll(1, 1)) if "second" in self.uses else words
        hidden = torch.tanh(self.inner(words).cumsum(1))
        out: Tensor = self.head(hidden)
        if "twice" in self.uses:
            out = out + self.head(hidden.square())
        return out + self.other(hidden.flip(-1)) if "other" in self.uses else out


pytestmark = pytest.mark.filterwarnings("ignore:these measured layers were never called")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose dW was a product of its own."""
    found: list[str] = []
    own = parameter_gram.plain_weight_grad
    monkeypatch.setattr(recorder, "plain_weight_grad", lambda call, dy: found.append(call.layer.name) or own(call, dy))
    return found


@pytest.mark.parametrize("errors", ["samples", "tasks", "steps"])
@pytest.mark.parametrize(
    ("uses", "apart"),
    [
        ("token", []),
        ("token second", []),
        ("", []),  # the embedding is not used: the head alone
        ("token twice", ["head", "head"]),
        ("token other", ["other", "head"]),
    ],
)
def test_the_head_is_multiplied_once(uses: str, apart: list[str], errors: str, plain: list[str]) -> None:
    model = Tied(uses)
    assert agree(model, next_token_losses(model, token_ids()), steps=2, fused=True, errors=errors) == {}
    assert plain == 2 * apart


@pytest.mark.parametrize("scale", ["even", "uneven"])
def test_gradients_are_those_of_backward(scale: str, plain: list[str]) -> None:
    """Rows of a block with unlike factors are scaled before they are squared; dW is that of backward all the same."""
    model, ids = Tied("token second"), token_ids()
    losses = next_token_losses(model, ids)
    factors = [6.0] * len(TASKS) if scale == "even" else [1.0, 6.0, 3.0, 0.5, 2.0, 9.0]

    def gradients(tracker: gk.GradNormTracker | None) -> dict[str, Tensor]:
        model.zero_grad()
        with tracker.microbatch(TASKS, row_scale=factors) if tracker else contextlib.nullcontext():
            losses(range(len(TASKS))).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted, stats = gradients(None), []
    for fused in (True, False):
        tracker = gk.GradNormTracker(model, "all", fused=fused, errors="tasks")
        for name, gradient in gradients(tracker).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)
        stats.append(tracker.step())
        tracker.close()
    assert plain == []
    for task in "ab":
        assert stats[0][task].sq_norm == pytest.approx(stats[1][task].sq_norm, rel=1e-9)
        assert stats[0][task].mean_sq_norm == pytest.approx(stats[1][task].mean_sq_norm, rel=1e-9)
