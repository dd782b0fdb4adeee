"""The operators for embeddings on the triton backend, interpreted, over the layouts of ``ops/test_embedding.py``."""

from __future__ import annotations

import pytest
import torch

from gradnorm_kernels import ops, reference
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import assert_close, assert_same_bits, poisoned_memory
from tests.ops.test_embedding import LAYOUTS, embedding, ids_of, inner, linear, truth

#: Those of few tokens: the interpreter is slow.
SMALL = [name for name, (lengths, *_) in LAYOUTS.items() if sum(lengths) <= 150]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, torch.float32, marks=[pytest.mark.slow] * (i % 2 == 0)) for i, name in enumerate(SMALL)),
        ("empty segments", torch.float16),
    ],
    ids=str,
)
def test_embedding_grad_norm(name: str, dtype: torch.dtype) -> None:
    lengths, samples, groups = LAYOUTS[name]
    side = embedding(lengths, 19, dtype, samples)
    gradients, sums = truth(side, groups)
    scale = gradients.square().sum() + sums.square().sum()
    options = {"sample_ids": side.sample_ids, "group_ids": ids_of(groups), "backend": "triton"}
    with poisoned_memory():
        found = ops.embedding_grad_norm(side.x, side.dy, side.cu_seqlens, **options, group_gram=True)
        plain = ops.embedding_grad_norm(side.x, side.dy, side.cu_seqlens, **options)
    assert plain.group_gram is None and found.group_gram is not None
    assert_same_bits(found[:1], plain[:1], ["sample_sq_norms"])
    for result in (found, plain):
        assert_close(result.sample_sq_norms, gradients.square().sum((1, 2)), NORMS[dtype], scale)
        assert_close(result.group_sq_norms, sums.square().sum((1, 2)), NORMS[dtype], scale)
    assert_close(found.group_gram, inner(sums, sums), NORMS[dtype], scale)


@pytest.mark.parametrize("groups", [None, [0, 1, 2, 3], [1, 0, 1, 3]], ids=str)
@pytest.mark.parametrize("samples", [None, [2, 0, 2, 3]], ids=str)
def test_tied_grad_gram(samples: list[int] | None, groups: list[int] | None) -> None:
    one, two = linear([31, 0, 8, 40], 19, samples=samples), embedding([9, 20, 30, 1], 19, samples=samples)
    of_head = reference.sample_gradients(one.x, one.dy, one.cu_seqlens, sample_ids=one.sample_ids, num_samples=4)
    gradients, sums = truth(two, groups, 4)
    ids = {"sample_ids": one.sample_ids, "e_sample_ids": two.sample_ids, "group_ids": ids_of(groups), "num_samples": 4}
    call = (one.x, one.dy, two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
    with poisoned_memory():
        found = ops.tied_grad_gram(*call, **ids, backend="triton")
    scale = of_head.flatten(1).norm(dim=1).max() * gradients.flatten(1).norm(dim=1).max() * 4
    assert_close(found.sample_dots, (of_head * gradients).sum((1, 2)), NORMS[torch.float32], scale)
    expected = inner(reference.group_sums(of_head, ids_of(groups)), sums)
    assert_close(found.group_gram, expected, NORMS[torch.float32], scale)


def test_ids_out_of_range_give_nan_and_are_not_read() -> None:
    """On a GPU reading an id to raise would wait for it."""
    one, two = linear([31, 9], 19), embedding([9, 20], 19)
    two.x[3] = 1 << 40
    call = (one.x, one.dy, two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
    found = ops.tied_grad_gram(*call, backend="triton")
    assert found.sample_dots.isnan().all() and found.group_gram.isnan().all()


@pytest.mark.parametrize("where", ["embedding", "head x", "head dy"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinity_does_not_meet_the_padding(where: str) -> None:
    """Numbers above 0 in widths that no tile divides: infinite where float64 is, and nowhere NaN.

    Every sample has all three words: float64 multiplies an infinity with the zeros of words that a sample lacks, which
    no kernel forms.
    """
    lengths, samples, groups = [31, 0, 28, 40], [0, 1, 2, 0], torch.tensor([0, 1, 1])
    one, two = linear(lengths, 19, samples=samples, words=3), embedding(lengths, 19, samples=samples, words=3)
    one.x, one.dy, two.dy = (side.nan_to_num().abs().clamp_min(0.125) for side in (one.x, one.dy, two.dy))
    spoiled = {"embedding": two.dy, "head x": one.x, "head dy": one.dy}[where]
    spoiled[33, 2] = torch.inf  # in sample 2, whose group has an empty sample too
    of_head = reference.sample_gradients(one.x, one.dy, one.cu_seqlens, sample_ids=one.sample_ids, num_samples=3)
    gradients = reference.embedding_gradients(
        two.x, two.dy, 3, two.cu_seqlens, sample_ids=two.sample_ids, num_samples=3
    )
    sums = reference.group_sums(gradients, groups)
    ids = {"sample_ids": two.sample_ids, "group_ids": groups}
    alone = ops.embedding_grad_norm(two.x, two.dy, two.cu_seqlens, **ids, group_gram=True, backend="triton")
    call = (one.x, one.dy, two.x, two.dy, one.cu_seqlens, two.cu_seqlens)
    cross = ops.tied_grad_gram(*call, **ids, e_sample_ids=two.sample_ids, backend="triton")
    near = {"rtol": 2e-5, "atol": 0.0}
    torch.testing.assert_close(alone.sample_sq_norms, gradients.square().sum((1, 2)), **near)
    torch.testing.assert_close(alone.group_sq_norms, sums.square().sum((1, 2)), **near)
    torch.testing.assert_close(alone.group_gram, inner(sums, sums), **near)
    torch.testing.assert_close(cross.sample_dots, (of_head * gradients).sum((1, 2)), **near)
    torch.testing.assert_close(cross.group_gram, inner(reference.group_sums(of_head, groups), sums), **near)
    assert alone.sample_sq_norms.isinf().tolist() == [False, False, where == "embedding"]
    assert cross.sample_dots.isinf().tolist() == [False, False, True]


def test_empty_calls() -> None:
    ids, dy, cu_seqlens = torch.arange(0), torch.ones(0, 4), torch.tensor([0, 0, 0])
    found = ops.embedding_grad_norm(ids, dy, cu_seqlens, group_gram=True, backend="triton")
    assert found.sample_sq_norms.tolist() == [0, 0] and found.group_gram is not None and not found.group_gram.any()
    x, wide = torch.ones(0, 4), torch.ones(0, 9)
    cross = ops.tied_grad_gram(x, wide, ids, dy, cu_seqlens, cu_seqlens, backend="triton")
    assert cross.sample_dots.tolist() == [0, 0] and cross.group_gram.tolist() == [[0]]
