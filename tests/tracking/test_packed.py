"""Packed rows: U and norms are those of the same sequences on their own; what mixes sequences is refused by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import gradnorm_kernels as gk
from gradnorm_kernels.tracking.calls import Call, Placement
from gradnorm_kernels.tracking.layers import Layer
from gradnorm_kernels.tracking.packing import TokenPlacement, make_packing
from tests.tracking.brute_force import DECODER, VOCABULARY, small_model, u_statistic

pytestmark = pytest.mark.filterwarnings("ignore:not measured", "ignore:these measured layers")
LENGTHS = [5, 1, 7, 3, 0, 4, 2]


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def tasks_of(lengths: Sequence[int]) -> list[str]:
    return ["ab"[i % 2] for i in range(len(lengths))]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """A sequence's mean loss; each token has one, so that a sequence of one token has a gradient."""
    return nn.functional.cross_entropy(logits, (ids * 7 + 3) % VOCABULARY) if len(ids) else logits.sum()


def packed(parts: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """(ids [T], position_ids [T], cu_seqlens) of sequences one after another, with padding behind them."""
    padding = torch.zeros(pad, dtype=torch.long)
    positions = torch.cat([*(torch.arange(len(part)) for part in parts), padding])
    return torch.cat([*parts, padding]), positions, [0, *accumulate(len(part) for part in parts)]


def mean_loss(logits: Tensor, parts: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    """The mean over sequences of their own losses, from logits [T, V] of all tokens."""
    losses = [loss_of(logits[a:b], ids) for ids, (a, b) in zip(parts, pairwise(offsets), strict=True)]
    return torch.stack(losses).mean()


def run_packed(model: nn.Module, parts: Sequence[Tensor], pad: int = 0) -> Tensor:
    """The differentiated loss of the sequences packed into one row."""
    ids, positions, offsets = packed(parts, pad)
    logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
    return mean_loss(logits, parts, offsets)


def measured_parameters(model: nn.Module, tracker: gk.GradNormTracker) -> list[Tensor]:
    modules = dict(model.named_modules())
    inside = {id(p) for name in tracker.layers for p in modules[name].parameters(recurse=False)}
    every = dict(model.named_parameters())
    return [p for name, p in every.items() if id(p) in inside and name not in tracker.skipped_reasons]


def alone(model: nn.Module, parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Each sequence's gradient by plain autograd, the model seeing nothing else."""
    found = []
    for ids in parts:
        if not len(ids):
            found.append(torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64))
            continue
        loss = loss_of(model(input_ids=ids[None], use_cache=False).logits[0], ids)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        found.append(torch.cat([g.flatten() for g in flat]).double())
    return found


def agree(stats: gk.StepStats, gradients: Sequence[Tensor], tasks: Sequence[str], rel: float = 1e-6) -> None:
    for task in sorted(set(tasks)):
        g = torch.stack([one for one, other in zip(gradients, tasks, strict=True) if other == task])
        size = float(g.square().sum(1).mean())
        assert stats[task].n == len(g)
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=rel)
        if len(g) > 1:
            assert stats[task].sq_norm == pytest.approx(u_statistic(g), abs=rel * size)


def mixture() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.float64)
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    model.config.use_cache = False
    return model.train()


@pytest.mark.parametrize("fused", [False, True], ids=["watched", "fused"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gpt2", "mixture"])
def test_u_is_that_of_the_sequences_alone(name: str, fused: bool) -> None:
    model = mixture() if name == "mixture" else small_model(name)
    model.config._attn_implementation = "eager" if fused else "sdpa"
    parts, tasks = sequences(), tasks_of(LENGTHS)
    tracker = gk.GradNormTracker(model, "all", fused=fused)
    pad = 0 if fused else 3
    with tracker.microbatch(tasks, cu_seqlens=packed(parts)[2]):
        run_packed(model, parts, pad).backward()
    stats = tracker.step()
    tracker.close()
    assert not tracker.skipped_reasons, "experts and routers are measured too"
    agree(stats, alone(model, parts, measured_parameters(model, tracker)), tasks)


def test_u_is_that_of_padded_rows_in_float32() -> None:
    model = small_model("qwen3", torch.float32)
    parts, tasks = sequences([5, 1, 7, 3, 4, 2]), tasks_of(range(6))
    ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.stack([torch.arange(ids.shape[1]) < len(part) for part in parts]).long()
    found = []
    for form in ("padded", "packed"):
        tracker = gk.GradNormTracker(model, "all", unverified="raise")
        given = {"attention_mask": mask} if form == "padded" else {"cu_seqlens": packed(parts)[2]}
        with tracker.microbatch(tasks, **given):
            if form == "packed":
                run_packed(model, parts).backward()
            else:
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                rows = zip(logits, parts, strict=True)
                torch.stack([loss_of(row[: len(part)], part) for row, part in rows]).mean().backward()
        found.append(tracker.step())
        tracker.close()
    for task, right in found[0].items():
        assert found[1][task].mean_sq_norm == pytest.approx(right.mean_sq_norm, rel=1e-6)
        assert found[1][task].sq_norm == pytest.approx(right.sq_norm, abs=1e-6 * right.mean_sq_norm)
        assert found[1][task].std_error == pytest.approx(right.std_error, abs=1e-5 * right.mean_sq_norm)


@pytest.mark.parametrize("form", ["one list per row", "tensors per row", "flattened"])
def test_several_packed_rows(form: str) -> None:
    """[B, L]: with padding behind each row, or full rows under one cu_seqlens over all tokens."""
    model = small_model("gpt2")
    rows = [[5, 1, 3], [4, 5], [2, 0, 6, 1]]
    length = 9 if form == "flattened" else 11
    lengths = [n for row in rows for n in row]
    parts, tasks = sequences(lengths), tasks_of(lengths)
    ids, positions = torch.zeros(2, len(rows), length, dtype=torch.long)
    offsets, at = [[0, *accumulate(row)] for row in rows], 0
    for row, own in enumerate(rows):
        row_ids, row_positions, _ = packed(parts[at : at + len(own)])
        ids[row, : len(row_ids)], positions[row, : len(row_ids)] = row_ids, row_positions
        at += len(own)
    given: Any = offsets
    if form == "tensors per row":
        given = [torch.tensor(row, dtype=torch.int32) for row in offsets]
    elif form == "flattened":
        given = torch.tensor([0, *accumulate(lengths)])
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with tracker.microbatch(tasks, cu_seqlens=given):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        parts_of_rows = iter(parts)
        losses = [
            loss_of(logits[r, a:b], next(parts_of_rows)) for r, own in enumerate(offsets) for a, b in pairwise(own)
        ]
        torch.stack(losses).mean().backward()
    agree(tracker.step(), alone(model, parts, measured_parameters(model, tracker)), tasks)


class Packed(nn.Module):
    """Takes ids [T], or embeddings [T, 8], and boundaries: a running mean inside each sequence, no attention."""

    def __init__(self, order: str = "plain") -> None:
        super().__init__()
        self.order = order
        self.token, self.position = nn.Embedding(VOCABULARY, 8), nn.Embedding(64, 8)
        self.norm, self.hidden = nn.LayerNorm(8), nn.Linear(8, 8)
        if "heads" in order:
            self.heads = nn.LayerNorm(4)
        self.reused, self.out = nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor, offsets: list[int]) -> Tensor:
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise([*offsets, len(ids)])])
        x = self.norm(self.token(ids) + self.position(positions))
        if self.order == "rows behind tokens":
            x = self.hidden(x[:, None])[:, 0]
        elif self.order == "heads first":
            heads = self.hidden(x).view(1, -1, 2, 4).transpose(1, 2)
            x = self.heads(heads).transpose(1, 2).reshape(-1, 8)
        elif self.order == "heads flattened":
            x = self.heads(self.hidden(x).reshape(-1, 4)).view(-1, 8)
        elif self.order == "moved":
            order = torch.arange(len(x)).roll(2)
            x = self.hidden(x[order])[order.argsort()]
        else:
            x = self.hidden(x)
        x = torch.tanh(self.reused(torch.tanh(self.reused(x))))
        mixed = [x[a:b].cumsum(0) / torch.arange(1, b - a + 1)[:, None] for a, b in pairwise([*offsets, len(ids)])]
        return self.out(torch.cat(mixed))


def small_packed(order: str = "plain") -> Packed:
    torch.manual_seed(0)
    return Packed(order).double()


def own_gradients(model: Packed, parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for ids in parts:
        grads = torch.autograd.grad(loss_of(model(ids, [0]), ids), parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        found.append(torch.cat([g.flatten() for g in flat]).double())
    return found


@pytest.mark.parametrize("seed", range(8))
def test_any_lengths(seed: int) -> None:
    """Lengths of 0, 1 and more, with and without padding, over several micro-batches and ways to accumulate."""
    chance = random.Random(seed)
    model = small_packed(chance.choice(["plain", "rows behind tokens", "heads first", "heads flattened"]))
    accumulated = chance.choice(["pairs", "exact", "sketch"])
    tracker = gk.GradNormTracker(
        model, "all", fused=seed % 2 == 1, accumulate=accumulated, sketch_width=512, unverified="raise"
    )
    gradients, tasks, counts = [], [], (1 if accumulated == "pairs" else 2)
    for part in range(counts):
        lengths = [chance.choice([0, 1, 1, 2, 3, 5, 8, 13]) for _ in range(chance.randint(2, 7))]
        lengths[chance.randrange(len(lengths))] = 4
        parts, own = sequences(lengths, seed + 100 * part), [chance.choice("ab") for _ in lengths]
        ids, _, offsets = packed(parts, chance.choice([0, 0, 3]))
        scale = [1.0 + chance.random() for _ in lengths] if chance.random() < 0.5 else 1.0
        samples = [f"{part} {i}" for i in range(len(lengths))]
        with tracker.microbatch(own, samples, row_scale=scale, cu_seqlens=offsets):
            logits = model(ids, offsets)
            torch.stack(
                [loss_of(logits[a:b], one) for one, (a, b) in zip(parts, pairwise(offsets), strict=True)]
            ).sum().backward()
        factors = scale if isinstance(scale, list) else [1.0] * len(lengths)
        gradients += [
            factor * g
            for factor, g in zip(factors, own_gradients(model, parts, measured_parameters(model, tracker)), strict=True)
        ]
        tasks += own
    assert not tracker.skipped_reasons
    agree(tracker.step(), gradients, tasks, rel=1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    parts, tasks = sequences(), tasks_of(LENGTHS)
    found = []
    for checkpointed in (False, True):
        model = small_model("llama")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        tracker = gk.GradNormTracker(model, "all", fused=True)
        with tracker.microbatch(tasks, cu_seqlens=packed(parts)[2]):
            run_packed(model, parts).backward()
        found.append(tracker.step())
    for task, right in found[0].items():
        assert found[1][task].sq_norm == pytest.approx(right.sq_norm, rel=1e-12)


def test_samples_of_several_sequences_and_a_later_micro_batch_of_another_length() -> None:
    model = small_model("llama")
    tracker = gk.GradNormTracker(model, "all", accumulate="exact", unverified="raise")
    gradients = []
    for step, lengths in enumerate(([5, 2, 1, 4], [3, 9, 2, 2])):
        parts = sequences(lengths, step)
        samples = [f"{step} {i // 2}" for i in range(4)]
        with tracker.microbatch(["a"] * 4, samples, cu_seqlens=packed(parts)[2]):
            run_packed(model, parts, step).backward()
        own = alone(model, parts, measured_parameters(model, tracker))
        gradients += [(own[0] + own[1]) / 2, (own[2] + own[3]) / 2]
    agree(tracker.step(), gradients, ["a"] * 4)


def test_autocast() -> None:
    model = small_model("llama", torch.float32)
    parts, tasks = sequences([5, 1, 7, 3, 4, 2]), tasks_of(range(6))
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(tasks, cu_seqlens=packed(parts)[2]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run_packed(model, parts)
        loss.backward()
    assert not tracker.skipped_reasons
    agree(tracker.step(), alone(model, parts, measured_parameters(model, tracker)), tasks, rel=0.02)


def test_watching_changes_no_bit_and_fused_keeps_the_padding_in_the_weights_gradient() -> None:
    """A loss that counts padding: its gradient belongs to no sequence, and training has to have it all the same."""
    parts, tasks = sequences([5, 1, 7]), ["a", "b", "a"]
    ids, positions, offsets = packed(parts, 3)
    found = []
    for mode in (None, "watched", "fused"):
        model = small_model("llama")
        tracker = gk.GradNormTracker(model, "all", fused=mode == "fused", unverified="skip") if mode else None
        for counts_padding in (False, True):
            model.zero_grad()
            if tracker is not None:
                context = tracker.microbatch(tasks, [f"{counts_padding} {i}" for i in range(3)], cu_seqlens=offsets)
                context.__enter__()
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
            (mean_loss(logits, parts, offsets) + counts_padding * logits[offsets[-1] :].square().sum()).backward()
            if tracker is not None:
                context.__exit__(None, None, None)
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, found[0], found[1]))
    for plain, fused in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_a_gradient_in_the_padding_is_found() -> None:
    model = small_model("llama")
    parts = sequences([5, 1, 7])
    ids, positions, offsets = packed(parts, 3)
    tracker = gk.GradNormTracker(model)
    with (
        pytest.raises(RuntimeError, match="differs from autograd's"),
        tracker.microbatch(["a"] * 3, cu_seqlens=offsets),
    ):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        (mean_loss(logits, parts, offsets) + logits[offsets[-1] :].square().sum()).backward()


# What is refused


@pytest.mark.parametrize("reason", ["an attention mask", "a cache", "no positions"])
def test_a_model_that_mixes_sequences_is_refused(reason: str) -> None:
    model = small_model("qwen3")
    parts = sequences([5, 2, 7])
    ids, positions, offsets = packed(parts)
    more = {
        "an attention mask": {"attention_mask": torch.ones(1, len(ids)), "position_ids": positions[None]},
        "a cache": {"position_ids": positions[None], "use_cache": True},
        "no positions": {},
    }[reason]
    for layers, fault in (("last_attention", ValueError), ("all", RuntimeError)):
        tracker = gk.GradNormTracker(model, layers)
        refused = pytest.raises(fault, match="does not keep packed sequences apart")
        with refused, tracker.microbatch(["a", "b", "a"], cu_seqlens=offsets):
            logits = model(input_ids=ids[None], **{"use_cache": False, **more}).logits[0]
            mean_loss(logits, parts, offsets).backward()
        tracker.close()


@pytest.mark.parametrize("pad", [0, 2])
def test_one_sequence_first(pad: int) -> None:
    """Nothing can be probed with one sequence: its tokens are all there are. The next micro-batch is probed."""
    model = small_packed("heads first")
    tracker = gk.GradNormTracker(model, "all", accumulate="exact", unverified="raise")
    gradients = []
    for step, lengths in enumerate(([4], [3, 5])):
        parts = sequences(lengths, step)
        ids, _, offsets = packed(parts, pad)
        with tracker.microbatch(["a"] * len(parts), cu_seqlens=offsets):
            mean_loss(model(ids, offsets), parts, offsets).backward()
        gradients += own_gradients(model, parts, measured_parameters(model, tracker))
    agree(tracker.step(), gradients, ["a"] * 3, rel=1e-9)
    assert tracker._watcher.entries._packed


def test_tokens_that_are_all_the_same_are_probed_later() -> None:
    model = small_packed("heads first")
    tracker = gk.GradNormTracker(model, "all")
    same = [torch.full((4,), 5), torch.full((3,), 5)]
    for parts in (same, sequences([4, 3])):
        ids, _, offsets = packed(parts)
        with tracker.microbatch(["a", "a"], cu_seqlens=offsets):
            mean_loss(model(ids, offsets), parts, offsets).backward()
        assert bool(tracker._watcher.entries._packed) == (parts is not same)
        tracker.step()


class Pooled(nn.Module):
    """A head that gets one row per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = Packed(), nn.Linear(VOCABULARY, 3)

    def forward(self, ids: Tensor, offsets: list[int]) -> Tensor:
        tokens = self.body(ids, offsets[:-1])
        return self.score(torch.stack([tokens[a:b].mean(0) for a, b in pairwise(offsets)]))


def test_a_pooled_head_is_refused_until_batch_dim_says_where_its_rows_are() -> None:
    torch.manual_seed(0)
    model = Pooled().double()
    parts, tasks = sequences([5, 1, 7, 3]), ["a", "b", "a", "b"]
    ids, _, offsets = packed(parts)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(ids, offsets), torch.arange(4) % 3)

    lenient = gk.GradNormTracker(model, "all")
    with lenient.microbatch(tasks, cu_seqlens=offsets):
        loss().backward()
    assert set(lenient.skipped_reasons) == {"score.weight", "score.bias"}
    assert "tokens were selected, pooled or moved" in lenient.skipped_reasons["score.weight"]
    lenient.close()
    strict = gk.GradNormTracker(model, ["score"])
    refused = pytest.raises(ValueError, match="tokens were selected, pooled or moved.*batch_dim")
    with refused, strict.microbatch(tasks, cu_seqlens=offsets):
        loss().backward()
    strict.close()
    told = gk.GradNormTracker(model, "all", batch_dim={"score": 0}, unverified="raise")
    with told.microbatch(tasks, cu_seqlens=offsets):
        loss().backward()
    gradients = []
    for at, part in enumerate(parts):
        own = nn.functional.cross_entropy(model(part, [0, len(part)]), torch.tensor([at % 3]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(own, measured_parameters(model, told))]))
    agree(told.step(), gradients, tasks, rel=1e-9)


def test_tokens_in_another_order_are_refused() -> None:
    model = small_packed("moved")
    parts = sequences([5, 2, 7])
    ids, _, offsets = packed(parts)
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(["a", "b", "a"], cu_seqlens=offsets):
        mean_loss(model(ids, offsets), parts, offsets).backward()
    assert set(tracker.skipped_reasons) == {"hidden.weight", "hidden.bias"}
    agree(tracker.step(), own_gradients(model, parts, measured_parameters(model, tracker)), ["a", "b", "a"], rel=1e-9)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 3, 2, 8], ValueError, "cu_seqlens must not descend: entry 2 is 2, after 3"),
        ([1, 3, 8], ValueError, "cu_seqlens must start at 0"),
        ([], ValueError, "cu_seqlens must start at 0"),
        ([0, 3, 8, 8], ValueError, "cu_seqlens describes 3 sequences, task_ids has 2 entries"),
        ([0, 3, 9], ValueError, "cu_seqlens ends at 9, but the model got 8 tokens"),
        ([[0, 3], [0, 5]], ValueError, "cu_seqlens describes 2 rows, but the model got 1"),
        ([[0, 3, 9]], ValueError, "cu_seqlens of row 0 ends at 9, but the model got rows of 8 tokens"),
        ([0, 3, 8.0], TypeError, "cu_seqlens must hold ints, got 8.0"),
        (torch.tensor([0.0, 3.0, 8.0]), ValueError, "1-D integer tensor"),
        (torch.tensor([[0, 3, 8]]), ValueError, "1-D integer tensor"),
        ("0 3 8", TypeError, "cu_seqlens must be a 1-D integer tensor or a list"),
        ([0], ValueError, "at least one sequence"),
    ],
)
def test_boundaries_that_are_refused(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    model = small_packed()
    tracker = gk.GradNormTracker(model, "all")
    with pytest.raises(error, match=message), tracker.microbatch(["a", "b"], cu_seqlens=cu_seqlens):
        model(sequences([8])[0], [0, 3])


def test_a_sequence_across_rows_is_refused() -> None:
    model = small_model("gpt2")
    tracker = gk.GradNormTracker(model, "all")
    refused = pytest.raises(ValueError, match="crosses from one row of 4 tokens")
    with refused, tracker.microbatch(["a", "b"], cu_seqlens=[0, 3, 8]):
        model(input_ids=sequences([8])[0].view(2, 4))


def test_ids_and_scales_are_per_sequence() -> None:
    tracker = gk.GradNormTracker(small_packed(), "all")
    for given, message in (
        ({"sample_ids": ["p"]}, "sample_ids must have one entry"),
        ({"row_scale": [1.0] * 3}, "row_scale must be a number or have one entry per row"),
        ({"rows_per_sample": [1, 1, 1]}, "rows_per_sample must be a number or have one entry"),
        ({"attention_mask": torch.ones(8)}, r"attention_mask must be a \[B, L\] tensor of the packed rows"),
        ({"attention_mask": torch.ones(1, 7)}, "cu_seqlens ends at 8, but the model got 7 tokens"),
    ):
        with pytest.raises(ValueError, match=message), tracker.microbatch(["a", "b"], cu_seqlens=[0, 3, 8], **given):
            pass


# The parts


def test_cu_seqlens_from_position_ids() -> None:
    make = gk.cu_seqlens_from_position_ids
    assert make(torch.tensor([0, 1, 2, 0, 0, 1])).tolist() == [0, 3, 4, 6]
    assert make(torch.tensor([[0, 1, 2, 0, 1]])).tolist() == [0, 3, 5]
    rows = make(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]))
    assert [row.tolist() for row in rows] == [[0, 2, 3], [0, 3]]
    assert make(torch.tensor([0, 1, 0, 0]), torch.tensor([1, 1, 1, 0])).tolist() == [0, 2, 3]
    for positions, mask, message in (
        ([1, 2, 3], None, "row 0 has 1 at token 0"),
        ([0, 1, 3], None, "row 0 has 3 at token 2, after 1"),
        ([0, 1, 2], [0, 1, 1], "padding in front of a token"),
        ([0, 1, 2], [1, 1], "attention_mask must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            make(torch.tensor(positions), None if mask is None else torch.tensor(mask))
    with pytest.raises(TypeError, match="position_ids must be an integer tensor"):
        make(torch.tensor([0.0, 1.0]))


def test_row_of_tokens() -> None:
    layer = Layer("x", nn.Linear(2, 2), "linear")
    scale = torch.ones(2, dtype=torch.float64)
    padded = Call(layer, torch.zeros(3, 2, 2), (), {}, Placement(1), torch.arange(2), scale)
    assert padded.row_of_tokens().tolist() == [0, 1, 0, 1, 0, 1]
    packing = make_packing([[0, 2], [0, 1]])
    packing.settle((2, 3))
    for shape, dims, wanted in (
        ((2, 3), (0, 1), [0, 0, -1, 1, -1, -1]),
        ((3, 2), (1, 0), [0, 1, 0, -1, -1, -1]),
        ((6,), (0,), [0, 0, -1, 1, -1, -1]),
    ):
        call = Call(
            layer, torch.zeros(*shape, 2), (), {}, TokenPlacement(dims), torch.arange(2), scale, packing=packing
        )
        assert call.row_of_tokens().tolist() == wanted
