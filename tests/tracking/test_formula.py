"""A layer's output is recomputed by its formula before it counts: modules with a forward of their own, factors,
parameters of their own, gates, tuples, parametrizations."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gradnorm_kernels as gk
from tests.tracking.measured import ROWS, TASKS, WORDS, agree, class_losses, features, next_token_losses, token_ids

functional = nn.functional
pytestmark = pytest.mark.filterwarnings("ignore:not measured", "ignore:nothing that layers", "ignore:.*weight_norm")


class Scaled(nn.Embedding):
    """Gemma's: the rows times a constant."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2.8


class Shifted(nn.Embedding):
    """OPT's and BART's: positions are looked up two rows further down."""

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
        return super().forward(positions + 2)


class FromFeatures(nn.Embedding):
    """BART's decoder hands its positions a tensor of which only the shape counts."""

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None].expand(len(hidden), -1)
        return super().forward(positions)


class Far(nn.Embedding):
    """What it is called with is no id of its own table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids - 1000) % WORDS)


class Text(nn.Module):
    """Embedding, mixing over tokens, a head; ``kind`` of the embedding varies."""

    def __init__(self, kind: type[nn.Embedding], tied: bool = False) -> None:
        super().__init__()
        self.token, self.special = nn.Embedding(WORDS, 8), kind(WORDS, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, WORDS, bias=False)
        if tied:
            self.head.weight = self.special.weight

    def forward(self, ids: Tensor) -> Tensor:
        words = self.token(ids)
        given = {FromFeatures: words[:, :, 0], Far: ids + 1000}.get(type(self.special), ids)
        hidden = torch.tanh(self.inner(words + self.special(given)).cumsum(1))
        return self.head(hidden)


class Features(nn.Module):
    """A linear, then what is tried, then a linear; tokens are mixed in between."""

    def __init__(self, tried: nn.Module) -> None:
        super().__init__()
        self.inner, self.tried, self.last = nn.Linear(8, 8), tried, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.tried(torch.tanh(self.inner(x)).cumsum(1))
        return self.last((out[0] if isinstance(out, tuple) else out)[:, -1])


@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
@pytest.mark.parametrize("kind", [Scaled, Shifted, FromFeatures, Far])
def test_an_embedding_with_a_forward_of_its_own_is_measured(kind: type[nn.Embedding], tied: bool) -> None:
    torch.manual_seed(0)
    model = Text(kind, tied).double()
    assert agree(model, next_token_losses(model, token_ids()), steps=2, unverified="raise") == {}


class TwoFactors(nn.Linear):
    def __init__(self, train_weight: bool) -> None:
        super().__init__(8, 8, bias=False)
        self.weight.requires_grad_(train_weight)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Times(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * super().forward(x)


class Pair(nn.Linear):
    """A router that returns its logits first."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out.argmax(-1)


class Softmax(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class NoTensor(nn.Linear):
    def forward(self, x: Tensor) -> list[str]:  # type: ignore[override]
        return ["x"]


@pytest.mark.parametrize(
    ("build", "skipped"),
    [
        (lambda: Times(8, 8), set()),
        (lambda: Pair(8, 8), set()),
        (lambda: Softmax(8, 8), {"tried.weight", "tried.bias"}),
        (lambda: TwoFactors(True), {"tried.down", "tried.up", "tried.weight"}),
        (lambda: TwoFactors(False), {"tried.down", "tried.up"}),
    ],
    ids=["a factor", "a tuple", "a softmax", "own parameters", "own parameters alone"],
)
def test_a_subclass_of_linear(build, skipped: set[str]) -> None:
    torch.manual_seed(0)
    model = Features(build()).double()
    reasons = agree(model, class_losses(model, features()))
    assert set(reasons) == skipped
    assert all(type(model.tried).__name__ in reason for reason in reasons.values())


def test_what_was_named_is_refused_with_its_class_and_what_to_do() -> None:
    model = Features(Softmax(8, 8)).double()
    with pytest.raises(RuntimeError, match=r"layer 'tried' \(Softmax\) cannot be measured.*unverified=\"skip\""):
        agree(model, class_losses(model, features()), layers=["tried"])
    reasons = agree(model, class_losses(model, features()), layers=["tried", "last"], unverified="skip")
    assert set(reasons) == {"tried.weight", "tried.bias"}
    with pytest.raises(ValueError, match="unverified must be one of None, 'raise', 'skip', got 'ignore'"):
        gk.GradNormTracker(model, "all", unverified="ignore")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("wrap", [spectral_norm, weight_norm, hooked_weight_norm])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_parametrized_weight_is_left_out_and_its_state_is_not_moved(wrap, bias: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Features(wrap(nn.Linear(8, 8, bias=bias))).double().train(training)
    if not training or wrap is not spectral_norm:  # in training its weight changes from call to call
        reasons = agree(model, class_losses(model, features()))
        assert reasons and all(name.startswith("tried.") for name in reasons) and "tried.bias" not in reasons
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = Features(wrap(nn.Linear(8, 8, bias=bias))).double().train(training)
    twin.load_state_dict(before)
    losses = class_losses(model, features())(range(ROWS)).mean()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with gk.GradNormTracker(twin, "all").microbatch(TASKS):
        class_losses(twin, features())(range(ROWS)).mean().backward()
    assert all(map(torch.equal, after.values(), twin.state_dict().values())) and losses.isfinite()


@pytest.mark.parametrize("wrap", [spectral_norm, weight_norm, hooked_weight_norm])
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_a_parametrized_weight_cannot_be_fused(wrap, later: bool) -> None:
    model = Features(nn.Linear(8, 8)).double()
    if later:
        tracker = gk.GradNormTracker(model, "all", fused=True)
        wrap(model.tried)
        with pytest.raises(ValueError, match="layer 'tried': its weight is computed"), tracker.microbatch(TASKS):
            class_losses(model, features())(range(ROWS)).mean().backward()
        return
    wrap(model.tried)
    with pytest.raises(ValueError, match="layer 'tried': its weight is computed"):
        gk.GradNormTracker(model, "all", fused=True)
    assert not any(module._forward_hooks for module in (model, model.last))


class Gated(nn.Module):
    """An RMSNorm whose second argument is a gate, by name or by position."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(8))

    def forward(self, hidden: Tensor, gate: Tensor | None = None, eps: float = 1e-6) -> Tensor:
        out = self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
        return out if gate is None else out * functional.silu(gate)


class WithGate(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name, self.inner, self.norm, self.last = by_name, nn.Linear(8, 8), Gated(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).cumsum(1)
        out = self.norm(hidden, gate=x, eps=1e-3) if self.by_name else self.norm(hidden, x, 1e-3)
        return self.last(out[:, -1])


@pytest.mark.parametrize("by_name", [True, False])
def test_a_norm_with_a_gate_is_replayed_with_all_its_arguments(by_name: bool) -> None:
    torch.manual_seed(0)
    model = WithGate(by_name).double()
    assert agree(model, class_losses(model, features()), unverified="raise") == {}


def test_a_changed_forward_is_verified_again() -> None:
    torch.manual_seed(0)
    model = Features(nn.Linear(8, 8)).double()
    losses = class_losses(model, features())
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    handle = model.tried.register_forward_hook(lambda module, args, output: output.softmax(-1), prepend=True)
    with pytest.raises(RuntimeError, match="'tried'"), tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
    tracker.close()
