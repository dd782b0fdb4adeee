"""What changes in a model after its layers were verified is measured as it is then, or left out by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import gradnorm_kernels as gk
from tests.tracking.measured import ROWS, TASKS, agree, class_losses, features


class Pair(nn.Module):
    """Two linears of one shape with their own weights, or one for both, and a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.double()
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh())).mean(1)


def _untie(model: Pair) -> None:
    model.b.weight = nn.Parameter(model.b.weight.detach() * 1.1)


def _tie(model: Pair) -> None:
    model.b.weight = model.a.weight


def _replace(model: Pair) -> None:
    model.a.weight = model.b.weight = nn.Parameter(model.a.weight.detach() * 2)


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize(
    ("tied", "change", "reason"),
    [(True, _untie, "now has another"), (False, _tie, "are now one"), (True, _replace, None)],
    ids=["untied", "tied", "replaced"],
)
def test_weights_that_are_tied_untied_or_replaced(
    tied: bool, change: Callable[[Pair], None], reason: str | None, fused: bool
) -> None:
    model = Pair(tied)
    losses = class_losses(model, features(5))

    def before(step: int) -> None:
        if step == 1:
            change(model)

    reasons = agree(model, losses, steps=2, before=before, fused=fused)
    assert set(reasons) <= {"a.weight", "b.weight"} and bool(reasons) == (reason is not None)
    assert all(reason is not None and reason in why for why in reasons.values())
    if reason is not None:
        model = Pair(tied)
        with pytest.raises(RuntimeError, match=rf"'[ab]\.weight' cannot be measured: .*{reason}.*make a new tracker"):
            agree(model, class_losses(model, features(5)), steps=2, before=before, fused=fused, unverified="raise")


@pytest.mark.parametrize("what", ["a layer", "a bias"])
def test_what_begins_to_train(what: str) -> None:
    """A layer of which nothing trained is left out by name. The bias of a measured one is measured and verified."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double()
    frozen = model[0] if what == "a layer" else model[3].bias
    frozen.requires_grad_(False)
    losses = class_losses(model, features(5))
    thaw = lambda step: frozen.requires_grad_(step == 1)  # noqa: E731
    reasons = agree(model, losses, steps=2, before=thaw)
    assert set(reasons) == ({"0.weight", "0.bias"} if what == "a layer" else set())
    tracker = gk.GradNormTracker(model, ["3"])
    frozen.requires_grad_(False)
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    tracker.close()
    if what == "a layer":
        with pytest.raises(RuntimeError, match=r"'0\.weight' cannot be measured: it did not train"):
            agree(model, losses, layers="[03]", steps=2, before=thaw)


def test_a_parameter_that_is_new() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double()

    def before(step: int) -> None:
        if step == 1:
            prune.random_unstructured(model[0], "weight", 0.3)

    reasons = agree(model, class_losses(model, features(5)), steps=2, before=before)
    assert "new since" in reasons["0.weight_orig"]


class Scaled(nn.Linear):
    scale, dropout = 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.dropout * (torch.arange(x.shape[-1]) % 2))
        return self.scale * functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("layers", ["all", ["2"]], ids=str)
@pytest.mark.parametrize("attribute", ["scale", "dropout"])
def test_a_forward_of_its_own_that_computes_something_else(attribute: str, layers: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Scaled(8, 3), nn.Flatten(), nn.Linear(15, 3)).double()
    losses = class_losses(model, features(5))
    before = lambda step: setattr(model[2], attribute, 2.0 * step if step or attribute == "dropout" else 1.0)  # noqa: E731
    if attribute == "scale":  # a constant factor is taken into account
        assert agree(model, losses, layers, steps=3, before=before) == {}
    elif layers == "all":
        assert set(agree(model, losses, layers, steps=2, before=before)) == {"2.weight", "2.bias"}
    else:
        with pytest.raises(RuntimeError, match=r"layer '2' \(Scaled\) cannot be measured: its output is not x W\^T"):
            agree(model, losses, layers, steps=2, before=before)


def test_a_hook_that_was_there_before_and_begins_to_scale() -> None:
    torch.manual_seed(0)
    model, now = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double(), {"scale": 1.0}
    model[0].register_forward_hook(lambda module, args, output: output * now["scale"])
    losses = class_losses(model, features(5))
    assert agree(model, losses, steps=2, before=lambda step: now.update(scale=1.0 + step)) == {}


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("way", ["functional", "in place"])
def test_a_gradient_that_no_longer_comes_through_the_layer(way: str, fused: bool) -> None:
    """A parent that multiplies by the weight itself, and one that changes a view of the output in place."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.later = nn.Linear(8, 8).double(), nn.Linear(8, 3).double(), False

        def forward(self, x: Tensor) -> Tensor:
            functionally = self.later and way == "functional"
            hidden = functional.linear(x, self.a.weight, self.a.bias) if functionally else self.a(x)
            if self.later and way == "in place":
                hidden[:, 0] = 0
            return self.b(hidden.tanh()).mean(1)

    model = Parent()
    losses = class_losses(model, features(5))
    before = lambda step: setattr(model, "later", step == 1)  # noqa: E731
    measured = fused and way == "in place"
    reasons = agree(model, losses, steps=2, before=before, fused=fused)
    assert set(reasons) == (set() if measured else {"a.weight", "a.bias"})
    if not measured:
        with pytest.raises(RuntimeError, match=r"of layer 'a' \(Linear\) cannot be measured: autograd computed"):
            agree(model, losses, steps=2, before=before, fused=fused, layers=["a"])


def test_an_argument_that_looks_like_rows_later() -> None:
    """A gain with an argument of one value per feature, and as many features as rows in the second micro-batch."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64))

        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x * self.weight * by

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.gain, self.b = nn.Linear(8, 6).double(), Gain(), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.gain(self.a(x), torch.linspace(1, 3, 6, dtype=torch.float64))).mean(1)

    model = Net()
    tracker = gk.GradNormTracker(model, "all")
    for rows in (4, 6):
        with tracker.microbatch(TASKS[:rows]):
            class_losses(model, features(5))(range(rows)).mean().backward()
        assert set(tracker.skipped) == ({"gain.weight"} if rows == 6 else set())
