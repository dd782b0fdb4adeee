"""Which gradients count: those of the parameters that a backward pass computes, of calls of the open micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradnorm_kernels as gk
from tests.tracking.measured import ROWS, TASKS, TwoLinears, agree, class_losses, features


class Model(nn.Sequential):
    def __init__(self, last: type[nn.Linear] = nn.Linear) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), last(8, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.detach(), self.bias)


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


@pytest.mark.parametrize("last", [Detached, WithoutBias])
def test_a_parameter_without_a_gradient_of_its_own_adds_nothing(last: type[nn.Linear]) -> None:
    model = Model(last)
    nn.init.zeros_(model[3].bias)
    assert agree(model, class_losses(model, features(5)), unverified="raise") == {}


def _equal(tracker: gk.GradNormTracker, parameters: Sequence[Tensor], model: Any) -> None:
    """The step's estimates are those of these parameters, each row alone."""
    stats = tracker.step()
    for task in "ab":
        rows = [row for row in range(ROWS) if TASKS[row] == task]
        losses = class_losses(model, features(5))
        grads = [torch.autograd.grad(losses([row])[0], parameters) for row in rows]
        size = sum(float(g.square().sum()) for row in grads for g in row) / len(rows)
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_a_layer_that_is_frozen_for_one_forward(fused: bool) -> None:
    model = Model()
    tracker = gk.GradNormTracker(model, "all", fused=fused, unverified="raise")
    for frozen in (False, True):
        with tracker.microbatch(TASKS):
            model[3].requires_grad_(not frozen)
            loss = class_losses(model, features(5))(range(ROWS)).mean()
            model[3].requires_grad_(True)
            loss.backward()
        wanted = [p for name, p in model.named_parameters() if not (frozen and name.startswith("3"))]
        _equal(tracker, wanted, model)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("layers", ["all", ["0"], ["2"], ["3"]], ids=str)
def test_a_pass_for_something_else_is_none_of_the_micro_batch(layers: Any, fused: bool) -> None:
    model, x = Model(), features(5).requires_grad_()
    tracker = gk.GradNormTracker(model, layers, fused=fused, unverified="raise")
    for extra in (False, True):
        with tracker.microbatch(TASKS):
            loss = class_losses(model, x)(range(ROWS)).mean()
            if extra:
                torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
        measured = [p for name in tracker.layers for p in model.get_submodule(name).parameters()]
        _equal(tracker, measured, model)


@pytest.mark.parametrize("layers", [["0"], ["2"], ["3"]], ids=str)
def test_a_gradient_penalty_that_begins_later_is_refused(layers: list[str]) -> None:
    model, x = Model(), features(5).requires_grad_()
    tracker = gk.GradNormTracker(model, layers)
    with tracker.microbatch(TASKS):
        class_losses(model, x)(range(ROWS)).mean().backward()
    with pytest.raises(RuntimeError, match=rf"layer '{layers[0]}' .* second derivatives"), tracker.microbatch(TASKS):
        losses = class_losses(model, x)(range(ROWS))
        penalty = torch.autograd.grad(losses.sum(), x, create_graph=True)[0].square().sum()
        (losses.mean() + penalty).backward()


@pytest.mark.parametrize("layers", [["0"], ["2"]], ids=str)
def test_a_gradient_that_is_handed_out_and_added_up_is_refused(layers: list[str]) -> None:
    model = Model()
    tracker = gk.GradNormTracker(model, layers)
    with pytest.raises(RuntimeError, match="got a second gradient"), tracker.microbatch(TASKS):
        loss = class_losses(model, features(5))(range(ROWS)).mean()
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
def test_a_state_with_the_graph_of_an_earlier_micro_batch_is_refused(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.Linear(8, 8), "out": nn.Linear(8, 3)}).double()
    tracker = gk.GradNormTracker(model, "all", fused=fused, unverified="raise")
    state, x = torch.zeros(ROWS, 8, dtype=torch.float64), features(5)

    def microbatch(state: Tensor, at: int) -> Tensor:
        with tracker.microbatch(TASKS):
            state = torch.tanh(model["cell"](state + x[:, at]))
            model["out"](state).square().sum(1).mean().backward(retain_graph=True)
        return state

    state = microbatch(microbatch(state, 0).detach(), 1)
    with pytest.raises(RuntimeError, match=r"layer 'cell' .* in an earlier micro-batch .*detach"):
        microbatch(state, 2)


def test_a_buffer_that_is_filled_again_before_the_micro_batch_ends_is_refused() -> None:
    class Twice(TwoLinears):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).tanh())).mean(1)

    model, x = Twice(), features(5)
    tracker = gk.GradNormTracker(model, "all")
    with pytest.raises(RuntimeError, match=r"'a\.weight' was modified in place"), tracker.microbatch(TASKS):
        class_losses(model, x)  # takes the rows by index, which copies them
        model(x).square().sum(1).mean().backward()
        x.zero_()
