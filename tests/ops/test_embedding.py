"""``embedding_grad_norm`` and ``tied_grad_gram``: agreement with the float64 reference, refusals, opcheck, compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from gradnorm_kernels import dispatch, ops, reference
from gradnorm_kernels.backends.torch import embedding as of_torch
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import assert_close, assert_same_bits, poisoned_memory
from gradnorm_kernels.tuning import costs as tuning
from tests.ops.on_cpu import DTYPES

OPS = torch.ops.gradnorm_kernels
NAN = float("nan")
WORDS = 40


@dataclass
class Side:
    """Tokens of one side: x (ids for an embedding) and dy, with their segments."""

    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor | None
    sample_ids: Tensor | None


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def embedding(
    lengths: list[int],
    d: int,
    dtype: torch.dtype = torch.float32,
    samples: list[int] | None = None,
    words: int = WORDS,
    seed: int = 0,
) -> Side:
    """Random ids, every seventh left out with a NaN in its dy."""
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    ids = torch.randint(0, words, (sum(lengths),), generator=generator)
    dy = torch.randn(len(ids), d, generator=generator).to(dtype)
    ids[::7], dy[::7] = -1, NAN
    return Side(ids, dy, offsets(lengths), None if samples is None else torch.tensor(samples))


def linear(
    lengths: list[int], d: int, dtype: torch.dtype = torch.float32, samples: list[int] | None = None, words: int = WORDS
) -> Side:
    """A head's tokens, x [T, d] and dy [T, words]."""
    generator = torch.Generator().manual_seed(1 + sum(lengths))
    x, dy = (torch.randn(sum(lengths), width, generator=generator).to(dtype) for width in (d, words))
    return Side(x, dy, offsets(lengths), None if samples is None else torch.tensor(samples))


#: lengths, samples and groups of an embedding's tokens.
LAYOUTS: dict[str, tuple[list[int], list[int] | None, list[int] | None]] = {
    "one sample": ([150], None, None),
    "one token": ([1, 1], None, [1, 0]),
    "empty segments": ([0, 40, 0, 7, 0], None, [0, 1, 1, 0, 2]),
    "samples that take turns": ([5, 60, 5, 60, 7, 13], [0, 1, 0, 1, 0, 1], [1, 0]),
    "samples and groups without tokens": ([30, 9, 64], [2, 0, 5], [4, 0, 1, 1, 0, 0]),
    "a group per sample": ([40, 3, 90, 777], None, [0, 1, 2, 3]),
    "a group per sample, in another order": ([40, 3, 90], None, [2, 0, 1]),
    "many samples": ([3, 1, 2, 5] * 50, None, [0, 1, 2, 2, 1] * 40),
    "nothing": ([0, 0], None, [0, 1]),
}


def ids_of(groups: list[int] | None) -> Tensor | None:
    return None if groups is None else torch.tensor(groups)


def truth(side: Side, groups: list[int] | None, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """(the samples' gradients, the groups' sums)."""
    count = samples if samples is not None else None if groups is None else len(groups)
    gradients = reference.embedding_gradients(
        side.x, side.dy, WORDS, side.cu_seqlens, sample_ids=side.sample_ids, num_samples=count
    )
    return gradients, reference.group_sums(gradients, ids_of(groups))


def inner(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten(1) @ b.flatten(1).T


class TestEmbeddingGradNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_agrees_with_the_reference(self, name: str, dtype: torch.dtype) -> None:
        lengths, samples, groups = LAYOUTS[name]
        for d in (1, 19):
            side = embedding(lengths, d, dtype, samples)
            call = (side.x, side.dy, side.cu_seqlens)
            gradients, sums = truth(side, groups)
            scale = gradients.square().sum() + sums.square().sum()
            for group_gram in (False, True):
                options = {"sample_ids": side.sample_ids, "group_ids": ids_of(groups), "group_gram": group_gram}
                with poisoned_memory():
                    found, again = (ops.embedding_grad_norm(*call, **options) for _ in range(2))
                assert_same_bits(found, again, found._fields)
                assert_close(found.sample_sq_norms, gradients.square().sum((1, 2)), NORMS[dtype], scale)
                assert_close(found.group_sq_norms, sums.square().sum((1, 2)), NORMS[dtype], scale)
                assert (found.group_gram is not None) == group_gram
                if found.group_gram is not None:
                    assert_close(found.group_gram, inner(sums, sums), NORMS[dtype], scale)
                    assert torch.equal(found.group_gram, found.group_gram.T)
                kept = [tensor for tensor in found if tensor is not None and tensor.numel()]
                assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)

    def test_agrees_with_the_linear_operator_on_one_hot_rows(self) -> None:
        side = embedding([20, 7, 60], 16)
        one_hot = torch.nn.functional.one_hot(side.x.clamp_min(0), WORDS).float() * (side.x >= 0)[:, None]
        dense = ops.fused_grad_norm(side.dy.nan_to_num(0), one_hot, side.cu_seqlens, group_ids=torch.tensor([0, 1, 0]))
        found = ops.embedding_grad_norm(side.x, side.dy, side.cu_seqlens, group_ids=torch.tensor([0, 1, 0]))
        torch.testing.assert_close(found.sample_sq_norms, dense.sample_sq_norms, rtol=2e-6, atol=0)
        torch.testing.assert_close(found.group_sq_norms, dense.group_sq_norms, rtol=2e-6, atol=0)

    def test_one_word_adds_up_before_it_is_squared(self) -> None:
        """A thousand tokens of one word that almost cancel."""
        dy = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        dy[500:] = -dy[:500] + 1e-3
        found = ops.embedding_grad_norm(torch.zeros(1000, dtype=torch.int32), dy)
        expected = dy.double().sum(0).square().sum()
        torch.testing.assert_close(found.sample_sq_norms, expected[None], rtol=1e-6, atol=0)

    def test_rows_of_a_batch_are_segments(self) -> None:
        ids = torch.randint(0, 9, (4, 11), generator=torch.Generator().manual_seed(0))
        dy = torch.randn(4, 11, 10)[..., ::2]
        packed = ops.embedding_grad_norm(ids.flatten(), dy.flatten(0, 1), offsets([11] * 4))
        batch = ops.embedding_grad_norm(ids, dy)
        assert torch.equal(batch.sample_sq_norms, packed.sample_sq_norms)
        assert torch.equal(ops.embedding_grad_norm(ids.T.contiguous().T, dy).sample_sq_norms, packed.sample_sq_norms)

    def test_a_nan_stays_with_those_who_share_the_word(self) -> None:
        ids, group_ids = torch.tensor([0, 1, 0, 1, 2, 3]), torch.arange(3)
        dy = torch.randn(6, 4)
        dy[0, 2] = NAN  # sample 0, word 0, which sample 1 has too
        found = ops.embedding_grad_norm(ids, dy, offsets([2, 2, 2]), group_ids=group_ids, num_groups=3, group_gram=True)
        assert found.group_gram is not None
        assert found.group_gram.isnan().tolist() == [[True, True, False], [True, False, False], [False] * 3]
        assert found.sample_sq_norms.isnan().tolist() == [True, False, False]

    @pytest.mark.parametrize("workspace", [1, 11 * 64, 1 << 20])
    def test_products_in_several_steps(self, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is held at a time is bounded, by rows of the Gram and by columns that are widened: the steps add up."""
        prices = tuning.Costs(
            64, 64, epilogue=18.0, gram=1.0, gram_token=0.0, pairs=0.5, workspace=workspace, gram_tile=7
        )
        monkeypatch.setattr(tuning, "costs", lambda *shape: prices)
        monkeypatch.setattr(of_torch, "_WIDENED", 400)
        dispatch.choose.cache_clear()
        ids, samples, dy = torch.arange(200) % 9, torch.arange(200) % 11, torch.randn(200, 6)
        side = Side(ids, dy, torch.arange(201), samples)
        _, sums = truth(side, list(range(11)))
        found = ops.embedding_grad_norm(
            ids, dy, side.cu_seqlens, sample_ids=samples, group_ids=torch.arange(11), num_groups=11, group_gram=True
        )
        dispatch.choose.cache_clear()
        assert found.group_gram is not None
        assert_close(found.group_gram, inner(sums, sums), 1e-6)

    def test_results_carry_no_graph_and_inputs_are_untouched(self) -> None:
        side = embedding([5, 60], 8)
        side.dy.requires_grad_()
        copies = side.x.clone(), side.dy.detach().clone()
        found = ops.embedding_grad_norm(side.x, side.dy, side.cu_seqlens, group_gram=True)
        assert not any(tensor is not None and tensor.requires_grad for tensor in found)
        assert torch.equal(side.x, copies[0])
        assert torch.equal(side.dy.detach().nan_to_num(), copies[1].nan_to_num())

    REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"ids": [1, 2]}, TypeError, "ids must be a torch.Tensor, got list"),
        ({"ids": torch.ones(10)}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ({"ids": torch.ones(10, 2, 2).long()}, ValueError, "ids must be [T] (packed) or [B, L], got shape [10, 2, 2]"),
        ({"ids": torch.ones(9).long()}, ValueError, "dy must have one row per token id: ids is [9]"),
        ({"dy": torch.ones(10, 3).long()}, TypeError, "dy must be float32"),
        ({"dy": torch.ones(10, 3, device="meta")}, ValueError, "ids must be on the device of dy (meta), got cpu"),
        (
            {"ids": torch.ones(2, 5).long(), "dy": torch.ones(2, 5, 3)},
            ValueError,
            "cu_seqlens is for packed ids [T]; in [B, L] each row of the batch is a segment",
        ),
        ({"sample_ids": torch.tensor([0])}, ValueError, "sample_ids must have one entry for each segment (2), got 1"),
        ({"num_groups": 2}, ValueError, "num_groups must be 1 when group_ids is left out, got 2"),
        ({"backend": "mps"}, ValueError, "backend must be one of 'auto', 'torch', 'cpu', 'triton', 'cuda', got 'mps'"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, "must end at the number of rows of ids (10), got 9"),
        ({"group_ids": torch.tensor([0, -1])}, ValueError, "group_ids must be at least 0, got -1"),
    ]

    @pytest.mark.parametrize(("changes", "error", "text"), REFUSED)
    def test_what_is_refused(self, changes: dict[str, Any], error: type[Exception], text: str) -> None:
        arguments = {"ids": torch.arange(10), "dy": torch.ones(10, 3), "cu_seqlens": torch.tensor([0, 4, 10])}
        with pytest.raises(error) as raised:
            ops.embedding_grad_norm(**{**arguments, **changes})
        assert text in str(raised.value)

    @pytest.mark.parametrize(("changes", "error", "text"), [case for case in REFUSED[:10] if "meta" not in case[2]])
    def test_the_fake_refuses_the_same(self, changes: dict[str, Any], error: type[Exception], text: str) -> None:
        arguments = {"ids": torch.arange(10), "dy": torch.ones(10, 3), "cu_seqlens": torch.tensor([0, 4, 10])}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = {**arguments, **changes}
            fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            with pytest.raises(error) as raised:
                ops.embedding_grad_norm(**fakes)
        assert text in str(raised.value)

    @pytest.mark.parametrize(
        "arguments",
        [
            (None, None, None, None, None, False),
            (offsets([5, 7, 8]), torch.tensor([1, 0, 1]), torch.tensor([0, 1]), None, 2, True),
            (offsets([5, 7, 8]), torch.tensor([1, 0, 1]), torch.tensor([0, 1]), None, None, True),
        ],
    )
    def test_opcheck(self, arguments: tuple[Any, ...]) -> None:
        side = embedding([20], 5)
        dy = side.dy.nan_to_num().requires_grad_()
        opcheck(OPS.embedding_grad_norm, (side.x, dy, *arguments, "auto"))


class TestTiedGradGram:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("words", [WORDS, 9])
    @pytest.mark.parametrize(
        ("head", "other", "samples", "groups"),
        [
            ([3, 0, 40, 70], [20, 5, 0, 66], None, None),
            ([3, 0, 40, 70], [20, 5, 0, 66], None, [0, 1, 2, 3]),
            ([31, 12, 8, 40], [9, 20, 30, 1], [2, 0, 2, 4], [1, 0, 1, 3, 0]),
            ([64] * 6, [30] * 6, None, [1, 0, 1, 0, 2, 2]),
            ([0, 0], [4, 5], None, [0, 1]),
        ],
        ids=str,
    )
    def test_agrees_with_the_reference(
        self,
        head: list[int],
        other: list[int],
        samples: list[int] | None,
        groups: list[int] | None,
        words: int,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Other tokens on the two sides, samples without any on one, ids left out, few words, tiles within samples."""
        count = len(head) if samples is None else 5
        one = linear(head, 19, dtype, samples)
        two = embedding(other, 19, dtype, None if samples is None else list(reversed(samples)), words)
        gradients, sums = truth(two, groups, count)
        of_head = reference.sample_gradients(
            one.x, one.dy, one.cu_seqlens, sample_ids=one.sample_ids, num_samples=count
        )
        head_sums = reference.group_sums(of_head, ids_of(groups))
        scale = of_head.flatten(1).norm(dim=1).max() * gradients.flatten(1).norm(dim=1).max() * count + 1e-30
        for tile in (1 << 10, 13):
            prices = tuning.Costs(
                64, 64, epilogue=18.0, gram=1.0, gram_token=0.0, pairs=0.5, workspace=1 << 20, gram_tile=tile
            )
            monkeypatch.setattr(tuning, "costs", lambda *shape, prices=prices: prices)
            dispatch.choose.cache_clear()
            with poisoned_memory():
                found, again = (
                    ops.tied_grad_gram(
                        one.x,
                        one.dy,
                        two.x,
                        two.dy,
                        one.cu_seqlens,
                        two.cu_seqlens,
                        sample_ids=one.sample_ids,
                        e_sample_ids=two.sample_ids,
                        group_ids=ids_of(groups),
                        num_samples=count,
                    )
                    for _ in range(2)
                )
            dispatch.choose.cache_clear()
            assert_same_bits(found, again, found._fields)
            assert_close(found.sample_dots, (of_head * gradients).sum((1, 2)), NORMS[dtype], scale)
            assert_close(found.group_gram, inner(head_sums, sums), NORMS[dtype], scale)

    def test_the_whole_norm_of_a_tied_matrix(self) -> None:
        """``||H_i + G_i||^2 = ||H_i||^2 + ||G_i||^2 + 2 <H_i, G_i>``."""
        one, two = linear([10, 20], 8), embedding([15, 6], 8)
        gradients = truth(two, None)[0] + reference.sample_gradients(one.x, one.dy, one.cu_seqlens)
        found = ops.fused_grad_norm(one.x, one.dy, one.cu_seqlens).sample_sq_norms
        found = found + ops.embedding_grad_norm(two.x, two.dy, two.cu_seqlens).sample_sq_norms
        cross = ops.tied_grad_gram(one.x, one.dy, two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
        torch.testing.assert_close(found + 2 * cross.sample_dots, gradients.square().sum((1, 2)), rtol=1e-5, atol=1e-4)

    def test_padding_without_a_gradient_may_hold_nan(self) -> None:
        one, two = linear([30, 40], 8), embedding([15, 6], 8)
        call = (two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
        one.dy[5], one.x[5] = 0.0, 0.0
        plain = ops.tied_grad_gram(one.x, one.dy, *call)
        one.x[5] = NAN
        assert torch.equal(ops.tied_grad_gram(one.x, one.dy, *call).sample_dots, plain.sample_dots)
        one.x[35] = NAN  # the other sample's, with a gradient
        poisoned = ops.tied_grad_gram(one.x, one.dy, *call).sample_dots
        assert poisoned.isnan().tolist() == [False, True] and poisoned[0] == plain.sample_dots[0]

    @pytest.mark.parametrize("dy_dtype", DTYPES, ids=str)
    def test_dy_of_another_dtype(self, dy_dtype: torch.dtype) -> None:
        one, two = linear([30, 40], 8), embedding([15, 6], 8)
        dy = one.dy.to(dy_dtype)
        found = ops.tied_grad_gram(one.x, dy, two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
        of_head = reference.sample_gradients(one.x, dy, one.cu_seqlens)
        assert_close(found.sample_dots, (of_head * truth(two, None)[0]).sum((1, 2)), 2e-5)

    REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"e": torch.ones(7, 4)}, ValueError, "e must have the width of x (d_in = 5)"),
        ({"e": torch.ones(7, 5).half()}, TypeError, "e must have x's dtype (torch.float32), got torch.float16"),
        ({"ids": torch.arange(6)}, ValueError, "e must have one row per token id: ids is [6]"),
        ({"dy": torch.ones(10, 9).long()}, TypeError, "dy must be float32"),
        ({"dy": torch.ones(9, 9)}, ValueError, "dy must have the rows of x"),
        ({"e_cu_seqlens": torch.tensor([0, 7])}, ValueError, "e_sample_ids must be given unless each"),
        (
            {"sample_ids": torch.tensor([0, 1]), "e_sample_ids": torch.tensor([0, 1])},
            ValueError,
            "num_samples must be given with sample_ids and e_sample_ids",
        ),
        ({"backend": "mps"}, ValueError, "backend must be one of"),
        ({"e_cu_seqlens": torch.tensor([0, 4, 6])}, ValueError, "e_cu_seqlens must end at the number of rows of ids"),
        ({"e_sample_ids": torch.tensor([0, 2])}, ValueError, "e_sample_ids must be below the number of samples (2)"),
        ({"ids": torch.arange(7) + 3}, ValueError, "ids must be below the number of rows of the matrix (9), got 9"),
    ]

    @pytest.mark.parametrize(("changes", "error", "text"), REFUSED)
    def test_what_is_refused(self, changes: dict[str, Any], error: type[Exception], text: str) -> None:
        arguments = {"x": torch.ones(10, 5), "dy": torch.ones(10, 9), "ids": torch.arange(7), "e": torch.ones(7, 5)}
        arguments |= {"cu_seqlens": torch.tensor([0, 4, 10]), "e_cu_seqlens": torch.tensor([0, 3, 7])}
        ops.tied_grad_gram(**arguments)
        with pytest.raises(error) as raised:
            ops.tied_grad_gram(**{**arguments, **changes})
        assert text in str(raised.value)

    def test_opcheck(self) -> None:
        one, two = linear([12, 8], 5), embedding([3, 9], 5)
        e = two.dy.nan_to_num().requires_grad_()
        groups = torch.tensor([1, 0])
        tensors = (one.x.requires_grad_(), one.dy, two.x, e, one.cu_seqlens, two.cu_seqlens)
        opcheck(OPS.tied_grad_gram, (*tensors, None, None, groups, None, 2, "auto"))
        opcheck(OPS.tied_grad_gram, (*tensors, None, None, groups, None, None, "torch"))


def test_compiles_without_a_graph_break() -> None:
    one, two = linear([12, 8], 5), embedding([3, 9], 5)
    groups = torch.tensor([1, 0])

    def step(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = ops.embedding_grad_norm(two.x, e * 2, two.cu_seqlens, group_ids=groups, num_groups=2)
        cross = ops.tied_grad_gram(x, one.dy, two.x, e, one.cu_seqlens, two.cu_seqlens, group_ids=groups, num_groups=2)
        return norms.sample_sq_norms, norms.group_sq_norms + 1, cross.group_gram

    e = two.dy.nan_to_num()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(one.x, e), step(one.x, e), strict=True):
        assert torch.equal(a, b)
