"""The tracker's total gradients beside autograd's: uses that no hook sees, planted faults, and copies of the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradnorm_kernels as gk
from gradnorm_kernels.tracking import recorder
from tests.tracking.measured import ROWS, TASKS, WORDS, agree, class_losses, features, next_token_losses, token_ids

functional = nn.functional
pytestmark = pytest.mark.filterwarnings("ignore:not measured", "ignore:nothing that layers", "ignore:.*never called")


class Text(nn.Module):
    """``kind`` says which parameter is used without a call of its module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.token, self.inner, self.norm = kind, nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.token(ids)
        if self.kind == "a second use":
            hidden = hidden + functional.linear(hidden, self.inner.weight)
        hidden = self.norm(torch.tanh(self.inner(hidden)).cumsum(1))
        if self.kind == "gain":
            hidden = hidden * self.norm.weight
        if self.kind == "tied head":
            return functional.linear(hidden, self.token.weight)
        if self.kind == "bias":
            return self.head(hidden) + self.head.bias
        if self.kind == "instead of a call":
            return functional.linear(hidden, self.head.weight, self.head.bias)
        return self.head(hidden)


HIDDEN = {
    "a second use": {"inner.weight"},
    "gain": {"norm.weight"},
    "tied head": {"token.weight"},
    "bias": {"head.bias"},
    "instead of a call": {"head.weight", "head.bias"},
}


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("kind", [*HIDDEN, "none"])
def test_a_use_outside_the_module_is_found(kind: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = Text(kind).double()
    reasons = agree(model, next_token_losses(model, token_ids()), steps=2, fused=fused)
    assert set(reasons) == HIDDEN.get(kind, set())
    if kind != "none":
        with pytest.raises(RuntimeError, match='cannot be measured: .*unverified="skip"'):
            agree(model, next_token_losses(model, token_ids()), fused=fused, unverified="raise")


def test_attention_that_multiplies_by_its_projections_itself() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mha, self.last = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x).transpose(0, 1)
            return self.last(self.mha(hidden, hidden, hidden)[0].mean(0))

    torch.manual_seed(0)
    model = Attention().double()
    reasons = agree(model, class_losses(model, features(5)))
    assert set(reasons) == {f"mha.{name}" for name, _ in model.mha.named_parameters()}


@pytest.mark.parametrize("layers", ["all", ["inner"]], ids=["left out", "refused"])
@pytest.mark.parametrize("fault", ["rows rolled", "a row lost", "a factor"])
def test_planted_faults(fault: str, layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong inside the tracker, between the hook and the sums, does not stay hidden."""
    take = recorder.tokens_of

    def wrong(call, dy):
        if call.layer.name == "inner":
            if fault == "rows rolled":
                call.x = call.x.roll(1, 0)
            elif fault == "a row lost":
                dy = torch.cat([dy[:-1], torch.zeros_like(dy[-1:])])
            else:
                dy = dy * 1.01
        return take(call, dy)

    monkeypatch.setattr(recorder, "tokens_of", wrong)
    torch.manual_seed(0)
    model = Text("none").double()
    losses = next_token_losses(model, token_ids())
    if layers == "all":
        assert set(agree(model, losses)) == {"inner.weight"}
    else:
        with pytest.raises(RuntimeError, match=r"'inner\.weight' of layer 'inner' \(Linear\).*of autograd's"):
            agree(model, losses, layers=layers)


def test_a_fault_that_comes_later_is_found_where_every_micro_batch_is_compared() -> None:
    torch.manual_seed(0)
    model = Text("none").double()
    losses = next_token_losses(model, token_ids())
    for verify, found in (("once", False), ("always", True)):
        model.kind = "none"
        tracker = gk.GradNormTracker(model, "all", verify=verify)
        with tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
        model.kind = "a second use"
        with tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
        assert ("inner.weight" in tracker.skipped) == found
        # The sums of the first micro-batch counted the parameter: they do not go together with those of later ones.
        assert (tracker.step() == {}) == found
        tracker.close()
    with pytest.raises(ValueError, match="verify must be one of 'once', 'always', got 'never'"):
        gk.GradNormTracker(model, "all", verify="never")


def test_what_has_no_gradient_yet_is_compared_later() -> None:
    torch.manual_seed(0)
    model = Text("a second use").double()
    losses = next_token_losses(model, token_ids())
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(TASKS):
        (losses(range(ROWS)) * 0.0).mean().backward()
    assert tracker.skipped == {}
    tracker.step()
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    assert set(tracker.skipped) == {"inner.weight"}
    tracker.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_parameter_whose_gradient_comes_in_several_passes(reentrant: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            for _ in range(2):
                hidden = torch.tanh(checkpoint(self.inner, hidden, use_reentrant=reentrant)).cumsum(1)
            return self.last(hidden[:, -1])

    torch.manual_seed(0)
    model = Shared().double()
    tracker = gk.GradNormTracker(model, "all", unverified="raise", verify="always")
    for _ in range(2):
        with tracker.microbatch(TASKS):
            class_losses(model, features(5))(range(ROWS)).mean().backward()
    assert tracker.step()["a"].n == 2 * TASKS.count("a")


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"accumulate": "exact"}, {"accumulate": "sketch"}], ids=str)
def test_backward_inside_autocast_leaves_nothing_out(options: dict[str, Any]) -> None:
    """The gradients are the same to the last bit in and outside autocast here, so the estimates must be too."""
    torch.manual_seed(0)
    model = Text("none")
    losses = next_token_losses(model, token_ids())
    found, gradients = [], []
    for inside in (False, True):
        model.zero_grad()
        tracker = gk.GradNormTracker(model, "all", unverified="raise", verify="always", **options)
        with tracker.microbatch(TASKS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses(range(ROWS)).mean()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss.backward()
        found.append(tracker.step())
        assert tracker.skipped == {}
        tracker.close()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert set(found[0]) == {"a", "b"}
    for task, gradient in found[0].items():
        assert gradient.mean_sq_norm > 0 and repr(found[1][task]) == repr(gradient)  # a NaN may be in it


def test_a_hook_of_the_caller_that_changes_a_gradient_is_not_a_fault() -> None:
    torch.manual_seed(0)
    model = Text("none").double()
    model.inner.weight.register_hook(lambda grad: grad * 3)
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with tracker.microbatch(TASKS):
        next_token_losses(model, token_ids())(range(ROWS)).mean().backward()
    tracker.close()
    fresh = gk.GradNormTracker(model, ["head"], unverified="raise")
    model.head.weight.register_hook(lambda grad: grad * 3)
    with fresh.microbatch(TASKS):
        next_token_losses(model, token_ids())(range(ROWS)).mean().backward()
    assert fresh.skipped == {} and fresh.step()["a"].sq_norm != 0
    fresh.close()


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_a_copy_of_the_model_is_a_model_of_its_own(fused: bool) -> None:
    """It computes with its own weights, has no hooks that do anything, and is not counted as the model."""
    torch.manual_seed(0)
    model = Text("none").double()
    plain = copy.deepcopy(model)
    tracker = gk.GradNormTracker(model, "all", fused=fused)
    ids = token_ids()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), averaged.module]
    for other in copies:
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
                mine.copy_(2 * theirs)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    wanted = plain(ids)
    wanted.sum().backward()
    with tracker.microbatch(TASKS):
        next_token_losses(model, ids)(range(ROWS)).mean().backward()
        for other in copies:
            out = other(ids)
            assert torch.equal(out, wanted)
            out.sum().backward()
            for a, b in zip(other.parameters(), plain.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad)
    found = tracker.step()["a"]
    tracker.close()
    fresh = gk.GradNormTracker(model, "all")
    with fresh.microbatch(TASKS):
        next_token_losses(model, ids)(range(ROWS)).mean().backward()
    assert found.sq_norm == pytest.approx(fresh.step()["a"].sq_norm, rel=1e-9)


def test_what_follows_a_fused_layer_may_work_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
    losses = class_losses(lambda x: model(x).sum(1), features(5))
    losses(range(ROWS)).mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tracker = gk.GradNormTracker(model, "all", fused=True, unverified="raise")
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    tracker.close()
    for p, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, grad)
