"""Whose row is it: the batch in front, sequence first, flattened tokens and heads, inputs that all rows share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.brute_force import sample_gradients, u_statistic
from tests.tracking.measured import ROWS, TASKS, WORDS, agree, class_losses, features, next_token_losses, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:not measured", "ignore:nothing that layers")


class Order(nn.Module):
    """``hidden`` sees the tokens in another order than [B, L, d]; then tokens are mixed."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.hidden, self.norm, self.last = order, nn.Linear(8, 8), nn.LayerNorm(4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, 8]
        rows, length, width = x.shape
        mixed = x.cumsum(1)
        if self.order == "sequence first":
            hidden = self.hidden(mixed.transpose(0, 1)).transpose(0, 1)
        elif self.order == "flattened":
            hidden = self.hidden(mixed.reshape(-1, width)).view(rows, length, width)
        elif self.order == "flattened, sequence first":
            hidden = self.hidden(mixed.transpose(0, 1).reshape(-1, width)).view(length, rows, width).transpose(0, 1)
        else:
            hidden = self.hidden(mixed)
        heads = torch.tanh(hidden).cumsum(1).reshape(-1, 4)  # [B L 2, 4]: a norm per head
        return self.last(self.norm(heads).view(rows, length, width).cumsum(1)[:, -1])


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("length", [ROWS, 5])
@pytest.mark.parametrize("order", ["batch first", "sequence first", "flattened", "flattened, sequence first"])
def test_orders_of_tokens(order: str, length: int, masked: bool) -> None:
    torch.manual_seed(0)
    model = Order(order).double()
    mask = torch.ones(ROWS, length) if masked else None
    assert agree(model, class_losses(model, features(length)), steps=2, mask=mask, unverified="raise") == {}


def test_a_later_micro_batch_of_another_length_is_held_to_what_was_found() -> None:
    torch.manual_seed(0)
    model = Order("sequence first").double()
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    found = []
    for length in (5, ROWS):
        losses = class_losses(model, features(length))
        with tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
        found.append(tracker.step()["a"].sq_norm)
    tracker.close()
    fresh = gk.GradNormTracker(model, "all", batch_dim={"hidden": 1, "last": 0}, unverified="raise")
    with fresh.microbatch(TASKS):
        class_losses(model, features(ROWS))(range(ROWS)).mean().backward()
    assert fresh.step()["a"].sq_norm == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("mixing", [True, False], ids=["tokens mixed", "token by token"])
@pytest.mark.parametrize("samples", [[0, 0, 1, 2, 3, 4], None], ids=["as many tokens as samples", "as many as rows"])
@pytest.mark.parametrize("together", [torch.cat, lambda pair: torch.stack(pair, 1).flatten(0, 1)])
def test_ids_for_half_of_the_rows_are_refused(mixing: bool, samples: list[int] | None, together) -> None:
    """Chosen and rejected rows in one batch, with ids of the pairs: the second dimension is as long as the ids."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.hidden(x))
            return self.last(hidden.cumsum(1) if mixing else hidden)

    torch.manual_seed(0)
    model, length = Scores().double(), 5 if samples else ROWS
    tracker = gk.GradNormTracker(model, "all")
    with pytest.raises(RuntimeError, match="nothing that layers= picks can be measured"):  # noqa: SIM117
        with tracker.microbatch(["a"] * ROWS, samples):
            model(together([features(length), features(length).flip(0)])).square().mean().backward()


@pytest.mark.parametrize("length", [2, 5, 2 * ROWS])
def test_a_sequence_first_part_runs_once_per_sample(length: int) -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:  # [L, N, 8]
            return self.last(torch.tanh(self.hidden(x)).cumsum(0)).mean(0)

    torch.manual_seed(0)
    model = nn.ModuleDict({"prefix": SequenceFirst(), "rows": nn.Linear(8, 3)}).double()
    samples, x = [0, 0, 1, 1, 2, 2], features(length)

    def losses(rows: Sequence[int]) -> Tensor:
        first = model["prefix"](x[::2].transpose(0, 1))
        return (model["rows"](x[list(rows)]).mean(1) * first[[samples[row] for row in rows]]).square().sum(1)

    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with tracker.microbatch(["a"] * ROWS, samples):
        losses(range(ROWS)).mean().backward()
    gradients = sample_gradients(losses(range(ROWS)), samples, list(model.parameters()))
    assert tracker.step()["a"].sq_norm == pytest.approx(u_statistic(torch.stack(list(gradients.values()))), rel=1e-9)


def test_a_model_that_takes_the_sequence_first_is_measured_or_refused() -> None:
    class SequenceFirst(Order):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    torch.manual_seed(0)
    model = SequenceFirst("sequence first").double()

    def losses(length: int):
        return class_losses(lambda rows_first: model(rows_first.transpose(0, 1)), features(length))

    assert agree(model, losses(5), unverified="raise") == {}
    with pytest.raises(ValueError, match=r"batch_dim="):
        agree(model, losses(ROWS), unverified="raise")


class Positions(nn.Module):
    """Positions looked up once for all rows, and spread over them in several ways."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.spread, self.token, self.wpe = spread, nn.Embedding(WORDS, 8), nn.Embedding(16, 8)
        self.out = nn.Linear(8, WORDS)

    def positions(self, ids: Tensor) -> Tensor:
        index = torch.arange(ids.shape[1])
        if self.spread == "one dimension":
            return self.wpe(index)
        rows = self.wpe(index[None])
        assert rows.shape[0] == 1, "watching must leave the output's shape alone"
        spread = {
            "broadcast": lambda: rows,
            "expand": lambda: rows.expand(len(ids), -1, -1),
            "repeat": lambda: rows.repeat(len(ids), 1, 1),
            "cat": lambda: torch.cat([rows] * len(ids)),
            "squeeze": lambda: rows.squeeze(0),
            "row 0": lambda: rows[0],
        }
        return spread[self.spread]()

    def forward(self, ids: Tensor) -> Tensor:
        return self.out((self.token(ids) + self.positions(ids)).cumsum(1))


@pytest.mark.parametrize("length", [5, ROWS])
@pytest.mark.parametrize("spread", ["one dimension", "broadcast", "expand", "repeat", "cat", "squeeze", "row 0"])
def test_an_input_that_all_rows_share(spread: str, length: int) -> None:
    torch.manual_seed(0)
    model = Positions(spread).double()
    reasons = agree(model, next_token_losses(model, token_ids(length)), steps=2)
    assert set(reasons) == ({"wpe.weight"} if spread == "cat" else set())
    with pytest.raises(ValueError, match=r"'wpe' \(Embedding\)") if reasons else contextlib.nullcontext():
        agree(model, next_token_losses(model, token_ids(length)), layers=["wpe"])


def test_positions_that_the_model_makes_for_every_row_are_measured() -> None:
    class Expanded(Positions):
        def positions(self, ids: Tensor) -> Tensor:
            return self.wpe(torch.arange(ids.shape[1])[None].expand(len(ids), -1))

    torch.manual_seed(0)
    for length in (5, ROWS):
        model = Expanded("").double()
        assert agree(model, next_token_losses(model, token_ids(length)), unverified="raise") == {}


def test_a_mean_over_tokens_hides_their_order_not_their_rows() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.a, self.b = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.token(ids).mean(1))))

    torch.manual_seed(0)
    model = Mean().double()
    assert agree(model, class_losses(model, token_ids()), unverified="raise") == {}


def test_channels_in_the_second_dimension() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.gate = nn.Linear(8, 8), nn.GroupNorm(2, 6), nn.PReLU(6)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gate(self.norm(self.inner(x).cumsum(1)))[:, -1])

    torch.manual_seed(0)
    model = Channels().double()
    assert agree(model, class_losses(model, features(6)), unverified="raise") == {}


def test_rows_that_depend_on_each_other_are_named() -> None:
    class Centred(Order):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    model = Centred("batch first").double()
    reasons = agree(model, class_losses(model, features(5)), unverified="skip")
    assert set(reasons) == {name for name, _ in model.named_parameters()}
    assert all("in other rows too" in reason for reason in reasons.values())


def test_rounding_that_depends_on_other_rows_is_no_dependence() -> None:
    """As in a mixture of experts, where the other rows decide the shape of the product that a token is part of."""

    class Noisy(Order):
        def forward(self, x: Tensor) -> Tensor:
            noise = 1e-14 * torch.frac(1e6 * x.detach().sum())
            return super().forward(x * (1 + noise))

    torch.manual_seed(0)
    model = Noisy("batch first").double()
    assert agree(model, class_losses(model, features(5)), unverified="raise") == {}


def test_without_a_probe_two_readings_are_refused_and_batch_dim_answers() -> None:
    """An argument that cannot be copied: the forward is not run twice, and only shapes are left."""

    class Opaque:
        def __deepcopy__(self, memo: dict) -> Opaque:
            raise TypeError("no copy")

    class Model(Order):
        def forward(self, x: Tensor, cache: Opaque) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    torch.manual_seed(0)
    cache = Opaque()
    for order, dims in (("batch first", {"hidden": 0}), ("sequence first", {"hidden": 1})):
        model = Model(order).double()
        losses = class_losses(lambda x, model=model: model(x, cache), features(ROWS))  # type: ignore[arg-type,misc]
        with pytest.raises(ValueError, match=r"layer 'hidden' \(Linear\).*batch_dim="):
            agree(model, losses, layers=["hidden"])
        assert agree(model, losses, layers=["hidden"], batch_dim=dims) == {}
        assert agree(model, losses, layers=["hidden"], batch_dim=dims["hidden"]) == {}
    with pytest.raises(ValueError, match="batch_dim must be None"):
        gk.GradNormTracker(model, "all", batch_dim="first")


def test_the_probe_leaves_no_trace() -> None:
    """Random states, buffers, counters, training flags and gradients are what they are without a tracker."""

    class Stateful(Order):
        def __init__(self) -> None:
            super().__init__("batch first")
            self.register_buffer("seen", torch.zeros(()))
            self.calls, self.cached = 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.calls += 1
            self.cached = x.mean()
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    torch.manual_seed(0)
    model = Stateful().double()
    twin = copy.deepcopy(model)
    twin.last.eval()
    model.last.eval()
    states = []
    for watched in (model, twin):
        torch.manual_seed(3)
        losses = class_losses(watched, features(5))
        tracker = gk.GradNormTracker(watched, "all") if watched is model else None
        for _ in range(2):
            with tracker.microbatch(TASKS) if tracker else contextlib.nullcontext():
                losses(range(ROWS)).mean().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert (
        model.calls == twin.calls == 2 and torch.equal(model.seen, twin.seen) and torch.equal(model.cached, twin.cached)
    )
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_hooks_that_the_first_forward_adds_are_added_once() -> None:
    """transformers adds hooks in a model's first forward, which may be the probe's, and notes that in an attribute."""

    class Capturing(Order):
        hooked = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.hooked:
                self.hooked = True
                self.hidden.register_forward_hook(lambda module, args, output: captured.append(output))
            return super().forward(x)

    captured: list[Tensor] = []
    torch.manual_seed(0)
    model = Capturing("batch first").double()
    losses = class_losses(model, features(5))
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(TASKS):
        losses(range(ROWS)).mean().backward()
    tracker.close()
    captured.clear()
    losses(range(ROWS))
    assert model.hooked
    assert len(captured) == 1


class Pictures(nn.Module):
    """Image features take the places of tokens 0, in order over all rows. A row's size says how many it has."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.vision = nn.Embedding(WORDS, 8), nn.Linear(4, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor, pixels: Tensor, image_sizes: Tensor) -> Tensor:
        pictures = self.vision(pixels)
        found = torch.cat([own[: int(size[0])] for own, size in zip(pictures, image_sizes, strict=True)])
        places = ids == 0
        if len(found) != int(places.sum()):
            raise ValueError("the images have another number of features than the text has places")
        embedded = self.token(ids).masked_scatter(places[..., None], found)
        return self.head(torch.tanh(self.hidden(embedded)).cumsum(1))


def test_sizes_of_images_are_not_exchanged() -> None:
    """With two sizes turned around, as many features as before would be in other rows."""
    torch.manual_seed(0)
    model = Pictures().double()
    sizes = torch.tensor([[1, 2], [3, 1], [2, 1], [2, 2], [1, 3], [2, 2]])
    ids = token_ids(9)
    for row, (own, _) in enumerate(sizes.tolist()):
        ids[row, 1 : 1 + own] = 0
    pixels = torch.randn(ROWS, 3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def losses(rows: Sequence[int]) -> Tensor:
        rows = list(rows)
        logits = model(ids[rows], pixels[rows], image_sizes=sizes[rows])[:, :-1]
        return -torch.log_softmax(logits, -1).gather(-1, ids[rows][:, 1:, None])[..., 0].mean(1)

    assert agree(model, losses, unverified="raise") == {}
