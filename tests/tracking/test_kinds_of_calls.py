"""Whose rows a layer gets may differ between its calls, between modes, and between micro-batches."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.measured import (
    ROWS,
    TASKS,
    WORDS,
    TwoLinears,
    agree,
    class_losses,
    features,
    next_token_losses,
    token_ids,
)

SAMPLES = [0, 0, 1, 1, 2, 2]


class Two(nn.Module):
    """Two linears; ``between(self, x)`` makes the output."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 3), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.between(self, x)
        return out.mean(1) if out.dim() == 3 else out


def names(model: nn.Module, *modules: str) -> set[str]:
    return {f"{module}.{leaf}" for module in modules for leaf, _ in model.get_submodule(module).named_parameters()}


def _both_orders(model: Any, x: Tensor) -> Tensor:
    return model.b(torch.tanh(model.a(x)) * model.a(x.flip(0)).flip(0))


def _rolled(model: Any, x: Tensor) -> Tensor:
    return model.b(torch.tanh(model.a(x)) + model.a(x.roll(1, 0)).roll(-1, 0))


@pytest.mark.parametrize("fused", [False, True], ids=["watching", "fused"])
@pytest.mark.parametrize("between", [_both_orders, _rolled])
def test_one_call_of_two_has_the_rows_in_another_order(between: Callable[..., Tensor], fused: bool) -> None:
    model = Two(between)
    reasons = agree(model, class_losses(model, features(5)), fused=fused)
    assert set(reasons) == names(model, "a") and all("in other rows too" in why for why in reasons.values())
    with pytest.raises(ValueError, match=r"layer 'a' \(Linear\) .* in other rows too"):
        agree(model, class_losses(model, features(5)), layers=["a"], fused=fused)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2).relu()).mean(1)


def test_a_batch_norm_couples_the_layers_before_and_behind_it() -> None:
    model = Normed()
    losses = class_losses(model, features(5))
    for layer in ("a", "b"):
        with pytest.raises(ValueError, match=rf"layer '{layer}' .*the model's output changes in other rows too"):
            agree(model, losses, layers=[layer])
    with pytest.raises(RuntimeError, match="nothing that layers= picks can be measured"):
        agree(model, losses)
    assert set(agree(model.eval(), losses)) == names(model, "norm")


def test_a_sum_over_all_tokens_couples_rows_of_ids() -> None:
    """Tokens that change places leave it alone, so other tokens must take their place."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.token, self.a, self.b = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS)
            self.double()

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.token(ids)
            return self.b(self.a(hidden - hidden.mean((0, 1))).tanh())

    model = Centred()
    reasons = agree(model, next_token_losses(model, token_ids()), unverified="skip")
    assert set(reasons) == names(model, "token", "a", "b")


def _mixed_in_training(model: Any, x: Tensor) -> Tensor:
    hidden = model.a(x)
    return model.b((hidden + 0.5 * hidden.roll(1, 0) if model.training else hidden).relu())


def _shuffled_in_training(model: Any, x: Tensor) -> Tensor:
    return model.b(model.a(x.flip(0)).relu()).flip(0) if model.training else model.b(model.a(x).relu())


@pytest.mark.parametrize("between", [_mixed_in_training, _shuffled_in_training])
def test_rows_that_meet_in_training_mode_only(between: Callable[..., Tensor]) -> None:
    model = Two(between)
    losses = class_losses(model, features(5))
    reasons = agree(model, losses, unverified="skip")
    assert set(reasons) == names(model, "a", "b") and all("in other rows too" in why for why in reasons.values())
    assert agree(model.eval(), losses, unverified="raise") == {}


def test_what_draws_numbers_in_training_mode_is_measured() -> None:
    """Dropout, modules with random numbers of their own and statistics that a forward moves couple no rows."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.drop, self.b = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)
            self.generator = torch.Generator().manual_seed(2)
            self.register_buffer("mean", torch.zeros(8))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x) - self.mean
            if self.training:
                self.mean.mul_(0.5).add_(hidden.detach().mean((0, 1)))
                hidden = hidden * torch.rand(8, generator=self.generator, dtype=hidden.dtype)
            return self.b(self.drop(hidden)).mean(1)

    model, twin = Noisy(), Noisy()
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    for watched in (model, twin):
        torch.manual_seed(3)
        for _ in range(2):
            if watched is model:
                with tracker.microbatch(TASKS):
                    class_losses(watched, features(5))(range(ROWS)).mean().backward()
            else:
                class_losses(watched, features(5))(range(ROWS)).mean().backward()
    assert tracker.skipped == {} and torch.equal(model.mean, twin.mean)
    assert torch.equal(model.generator.get_state(), twin.generator.get_state())
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


class Sorted(TwoLinears):
    """Sorts rows by their lengths, as code for recurrent networks does, and puts them back."""

    def forward(self, x: Tensor, lengths: Tensor | list[int]) -> Tensor:
        lengths = torch.as_tensor(lengths).long()
        order = lengths.argsort(descending=True, stable=True)
        last = self.a(x[order]).cumsum(1)[torch.arange(len(order)), lengths[order] - 1]
        return self.b(last.relu())[order.argsort()]


class Unpadded(TwoLinears):
    """Gives a layer the tokens that the mask keeps, those of all rows one after another."""

    def forward(self, x: Tensor, lengths: Tensor | list[int]) -> Tensor:
        lengths = torch.as_tensor(lengths)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        hidden = torch.zeros_like(x)
        hidden[mask] = self.a(x[mask]).tanh()
        return self.b(hidden.sum(1))


SORTED = (Sorted, [2, 5, 1, 3, 4, 5], ("a", "b"))
UNPADDED = (Unpadded, [2, 5, 1, 3, 4, 3], ("a",))  # 18 tokens are three per row


@pytest.mark.parametrize(
    ("kind", "lengths", "left_out", "form"),
    [(*SORTED, "integers"), (*SORTED, "floats"), (*SORTED, "a list"), (*UNPADDED, "integers"), (*UNPADDED, "a list")],
)
def test_lengths_that_differ_for_the_first_time(
    kind: type[nn.Module], lengths: list[int], left_out: Sequence[str], form: str
) -> None:
    model, x = kind(), features(5)
    given = torch.full((ROWS,), 5)

    def losses(rows: Sequence[int]) -> Tensor:
        some = given[list(rows)]
        logits = model(
            x[list(rows)], some if form == "integers" else some.double() if form == "floats" else some.tolist()
        )
        return nn.functional.cross_entropy(logits, torch.arange(ROWS)[list(rows)] % 3, reduction="none")

    def before(step: int) -> None:
        given.copy_(torch.tensor(lengths) if step else torch.full((ROWS,), 5))

    assert agree(model, losses, steps=1, unverified="raise") == {}
    assert set(agree(model, losses, steps=2, before=before, unverified="skip")) == names(model, *left_out)


def test_another_length_with_as_many_tokens_as_a_multiple_of_the_rows() -> None:
    """A layer that picks tokens by their values, all of them at first."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.least = nn.Linear(8, 8), nn.Linear(8, 3), -1e9
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            keep = x.sum(-1) > self.least
            hidden = torch.zeros_like(x)
            hidden[keep] = self.a(x[keep]).tanh()
            return self.b(hidden.sum(1))

    model, x = Picked(), features(5)

    def before(step: int) -> None:
        # 18 of the 30 tokens, not three in each row.
        model.least = float(x.sum(-1).flatten().sort().values[11]) if step else -1e9

    assert set(agree(model, class_losses(model, x), steps=2, before=before)) == names(model, "a")
    # Another length is no such case.
    model.least = -1e9
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    for length in (5, 7, 6):
        with tracker.microbatch(TASKS):
            class_losses(model, features(length))(range(ROWS)).mean().backward()
    assert tracker.skipped == {}


@pytest.mark.parametrize("first", [True, False], ids=["in pieces", "in pieces from the second step"])
def test_pieces_with_as_many_rows_as_samples_are_refused(first: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double(), features(5)
    tracker = gk.GradNormTracker(model, "all")

    def microbatch(size: int) -> None:
        tracker.step()
        with tracker.microbatch(["t"] * ROWS, SAMPLES):
            torch.cat([model(piece).mean(1) for piece in x.split(size)]).square().sum(1).mean().backward()

    if not first:
        microbatch(6)
    with pytest.raises(RuntimeError, match="called 2 times with 3 rows each .* 6 rows from 3 samples"):
        microbatch(3)


@pytest.mark.parametrize("frozen", [False, True], ids=["of the batch", "frozen"])
def test_a_batch_norm_couples_samples_in_a_part_that_runs_once_per_sample(frozen: bool) -> None:
    """The part in front of it is left out; the rest and, with fixed statistics, the part too are measured."""
    parts = {
        "prefix": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)),
        "rows": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
    }
    torch.manual_seed(0)
    model, x = nn.ModuleDict(parts).double(), features(5)
    if frozen:
        parts["prefix"][1].eval()
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(["t"] * ROWS, SAMPLES):
        first = model["prefix"](x[[0, 2, 4]].mean(1))[torch.tensor(SAMPLES)]
        model["rows"](x + first[:, None]).square().mean().backward()
    assert set(tracker.skipped) == (set() if frozen else {"prefix.0.weight", "prefix.0.bias"})


def test_a_prefix_runs_once_per_sample_from_the_second_step() -> None:
    """A sample per row at first; then the model that was called with all rows is called with one per sample too."""

    class Prefixed(TwoLinears):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    model, x = Prefixed(), features(5)
    tracker = gk.GradNormTracker(model, "all", unverified="raise")

    def losses(rows: Sequence[int], samples: Sequence[int]) -> Tensor:
        """Each sample's prefix is the tokens of its first row."""
        starts = [samples.index(sample) for sample in dict.fromkeys(samples)]
        at = [list(dict.fromkeys(samples)).index(samples[row]) for row in rows]
        return (model(x[list(rows)]).sum(1) * model(x[starts] * 2).sum(1)[at]).square().sum(1)

    for samples in (list(range(ROWS)), SAMPLES):
        with tracker.microbatch(["t"] * ROWS, samples):
            losses(range(ROWS), samples).mean().backward()
        u = tracker.step()["t"].sq_norm
    parameters = list(model.parameters())
    alone = [torch.autograd.grad(losses([row], SAMPLES)[0], parameters) for row in range(ROWS)]
    flat = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in alone])
    g = flat.view(3, 2, -1).mean(1)
    assert u == pytest.approx(float(((g.sum(0) ** 2).sum() - (g**2).sum()) / 6), rel=1e-6)


class Branching(nn.Module):
    """A branch for the rows ``rows``, in that order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.branch, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.rows: list[int] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if len(x) == ROWS and self.rows:
            hidden = hidden.index_add(0, torch.tensor(self.rows), self.branch(hidden[self.rows]))
        return self.b(hidden.tanh()).mean(1)


@pytest.mark.parametrize(
    "steps",
    [([], [5, 4, 3, 2, 1, 0]), ([], [0, 1, 2, 3, 4, 5], [0, 1, 2])],
    ids=["another order", "as many as samples"],
)
@pytest.mark.filterwarnings("ignore:these measured layers were never called")
def test_a_branch_that_is_used_later_is_looked_for(steps: Sequence[list[int]]) -> None:
    model = Branching()
    tracker = gk.GradNormTracker(model, "all")
    for rows in steps:
        model.rows = rows
        tracker.step()
        with tracker.microbatch(["t"] * ROWS, SAMPLES):
            model(features(5)).square().sum(1).mean().backward()
        assert set(tracker.skipped) == (names(model, "branch") if rows is steps[-1] else set())


def test_a_table_and_classes_in_one_embedding() -> None:
    """Positions that all rows share, and as many of them as rows in the second step."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.b = nn.Embedding(20, 8), nn.Linear(8, 3)
            self.double()

        def forward(self, x: Tensor, classes: Tensor) -> Tensor:
            return self.b(x + self.table(classes)[:, None] + self.table(torch.arange(x.shape[1]))).square().mean(1)

    model, classes, length = Both(), torch.tensor([3, 1, 4, 1, 5, 9]), {"now": 5}

    def losses(rows: Sequence[int]) -> Tensor:
        return model(features(length["now"])[list(rows)], classes[list(rows)]).sum(1)

    assert agree(model, losses, unverified="raise") == {}
    reasons = agree(model, losses, steps=2, before=lambda step: length.update(now=5 + step))
    assert set(reasons) == {"table.weight"}


def test_arguments_in_a_dataclass_or_a_mapping_are_perturbed() -> None:
    @dataclasses.dataclass
    class Inputs:
        x: Tensor
        order: Tensor

    class Ordered(nn.Module):
        def __init__(self, sorts: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.sorts = nn.Linear(8, 8), nn.Linear(8, 3), sorts
            self.double()

        def forward(self, given: Any) -> Tensor:
            x, order = (given.x, given.order) if isinstance(given, Inputs) else (given["x"], given["order"])
            at = order.argsort() if self.sorts else torch.arange(len(x))
            return self.b(self.a(x[at]).tanh()).mean(1)[at.argsort()]

    x, order = features(5), torch.tensor([2, 5, 1, 3, 4, 0])
    for holder in (Inputs, collections.UserDict):
        for sorts in (True, False):
            model = Ordered(sorts)

            def losses(rows: Sequence[int], model: nn.Module = model, holder: Any = holder) -> Tensor:
                return model(holder(x=x[list(rows)], order=order[list(rows)])).square().sum(1)

            reasons = agree(model, losses, unverified="skip")
            assert set(reasons) == (names(model, "a", "b") if sorts else set())


class Packed(nn.Module):
    """A mean over each sequence; ``mode`` adds what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.a, self.branch = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.b = nn.BatchNorm1d(8, affine=False), nn.Linear(8, WORDS)
        self.mode = ""
        self.double()

    def forward(self, ids: Tensor, ends: Sequence[int]) -> Tensor:
        hidden = self.a(self.token(ids)).tanh()
        if self.mode == "branch":
            hidden = hidden + self.branch(hidden)
        elif self.mode == "another order":
            hidden = hidden + self.branch(hidden.flip(1)).flip(1)
        elif self.mode == "batch norm":
            hidden = self.norm(hidden[0])[None]
        parts = hidden.tensor_split(list(ends), 1)
        return self.b(torch.cat([part + part.mean(1, keepdim=True) for part in parts], 1))


@pytest.mark.parametrize("mode", ["branch", "another order", "batch norm"])
@pytest.mark.filterwarnings("ignore:these measured layers were never called")
def test_packed_sequences(mode: str) -> None:
    model, lengths = Packed(), [3, 4, 2, 5, 1, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, WORDS, (1, 18), generator=torch.Generator().manual_seed(1))
    tracker = gk.GradNormTracker(model, ["token", "a", "b"] if mode == "batch norm" else "all", unverified="skip")
    if mode == "batch norm":
        model.mode = mode
    for _ in range(2):
        with tracker.microbatch(TASKS, cu_seqlens=offsets):
            nn.functional.cross_entropy(model(ids, offsets[1:-1].tolist())[0], ids[0]).backward()
        stats = tracker.step()
        model.mode = mode
    coupled = [name for name, _ in model.named_parameters() if not name.startswith("branch")]
    left_out = {"branch": set(), "another order": names(model, "branch"), "batch norm": set(coupled)}
    assert set(tracker.skipped) == left_out[mode] and (stats == {}) == (mode == "batch norm")
    assert all("other sequences" in why or "in others" in why for why in tracker.skipped_reasons.values())


@pytest.mark.parametrize("accumulate", ["pairs", "exact", "sketch"])
def test_a_part_that_the_caller_calls_itself_later(accumulate: str) -> None:
    """Nothing shows the rows of that micro-batch, which is not counted. The next one is looked at."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)).mean(1)

    model = Whole()
    tracker = gk.GradNormTracker(model, "all", accumulate=accumulate, unverified="raise", sketch_width=64)
    whole = class_losses(model, features(5))
    parts = class_losses(lambda x: model.head(model.body(x)).mean(1), features(5))
    found = []
    for losses in (whole, parts, parts, whole):
        counted = losses is whole or len(found) == 2
        warned = contextlib.nullcontext() if counted else pytest.warns(UserWarning, match="not counted: body.0, head")
        with warned, tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
        failed = accumulate == "exact" and not counted
        with pytest.raises(RuntimeError, match="failed halfway") if failed else contextlib.nullcontext():
            found.append(tracker.step())
        if failed:
            found.append({})
    assert found[1] == {} and all(stats["a"].sq_norm == pytest.approx(found[0]["a"].sq_norm) for stats in found[2:])
