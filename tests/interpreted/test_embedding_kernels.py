"""The Grams of embeddings and of heads tied to them, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradnorm_kernels.backends.triton import embedding
from gradnorm_kernels.segments import Segments
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import assert_close, poisoned_memory

NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients_of(ids: Tensor, dy: Tensor, sample: Tensor, samples: int, words: int) -> Tensor:
    """Every sample's gradient, whole: [samples, words * d] float64."""
    found = torch.zeros(samples, words, dy.shape[1], dtype=torch.float64)
    for word, gradient, at in zip(ids.tolist(), dy.double(), sample.tolist(), strict=True):
        if word >= 0:
            found[at, word] += gradient
    return found.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "tokens, d, words, samples",
    [(1, 3, 4, 2), (150, 19, 40, 5), (130, 5, 1, 70), (97, 16, 1000, 3), (60, 7, 3, 1)],
)
def test_embedding(tokens: int, d: int, words: int, samples: int, dtype: torch.dtype) -> None:
    """Ids that occur once, that all samples share, that fill more than a block; ids left out; samples without any."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, words, (tokens,), generator=generator)
    ids[::7] = -1
    sample = torch.randint(0, samples, (tokens,), generator=generator)
    dy = random(tokens, d, dtype=dtype)
    dy[::7] = NAN  # what is left out is not read
    gradients = gradients_of(ids, dy, sample, samples, words)
    expected = gradients @ gradients.T
    with poisoned_memory():
        gram, again = (embedding.embedding_gram(ids, dy, sample, samples) for _ in range(2))
        norms = embedding.embedding_norms(ids, dy, sample, samples)
    assert torch.equal(gram, again) and torch.equal(gram, gram.T)
    assert_close(gram, expected, NORMS[dtype], expected.abs().max())
    assert_close(norms, expected.diagonal(), NORMS[dtype], expected.abs().max())


def test_embedding_in_several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at a time is bounded: the strips add up."""
    ids, sample = torch.arange(200) % 9, torch.arange(200) % 11
    dy = random(200, 6)
    whole = embedding.embedding_gram(ids, dy, sample, 11)
    monkeypatch.setattr(embedding, "_HELD", 64 * 11)
    torch.testing.assert_close(embedding.embedding_gram(ids, dy, sample, 11), whole, rtol=1e-12, atol=1e-12)


def test_a_nan_in_an_embedding_stays_with_those_who_share_the_word() -> None:
    ids, sample = torch.tensor([0, 1, 0, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 2, 2])
    dy = random(6, 4)
    dy[0, 2] = NAN  # sample 0, word 0, which sample 1 has too
    gram = embedding.embedding_gram(ids, dy, sample, 3)
    assert gram.isnan().tolist() == [[True, True, False], [True, False, False], [False, False, False]]
    assert embedding.embedding_norms(ids, dy, sample, 3).isnan().tolist() == [True, False, False]


def segments(lengths: list[int]) -> Segments:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    samples = torch.arange(len(lengths), dtype=torch.int32)
    return Segments(offsets[:-1], offsets[1:], samples, samples, len(lengths), len(lengths), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_tied_to_an_embedding(dtype: torch.dtype) -> None:
    """Other tokens on the two sides, samples without any, ids left out, and padding whose x is NaN."""
    head, other = [3, 0, 40, 70], [20, 5, 0, 66]
    x, dy = random(113, 19, dtype=dtype), random(113, 50, seed=1, dtype=dtype)
    e, ids = random(91, 19, seed=2, dtype=dtype), torch.arange(91) % 51 - 1
    gradients = torch.stack([a.double().T @ b.double() for a, b in zip(dy.split(head), x.split(head), strict=True)])
    sample = torch.arange(4).repeat_interleave(torch.tensor(other))
    expected = gradients.flatten(1) @ gradients_of(ids, e, sample, 4, 50).T
    with poisoned_memory():
        cross = embedding.tied_gram(x, dy, segments(head), ids, e, segments(other))
    scale = expected.abs().max()
    assert_close(cross, expected, NORMS[dtype], scale)

    dy[50], x[50] = 0.0, NAN
    without = [part.clone() for part in (x, dy)]
    without[0][50] = 0.0
    padded, plain = (embedding.tied_gram(*pair, segments(head), ids, e, segments(other)) for pair in ((x, dy), without))
    assert torch.equal(padded, plain)
    x[2] = NAN  # the last token of sample 0, in a block with sample 2
    poisoned = embedding.tied_gram(x, dy, segments(head), ids, e, segments(other))
    assert poisoned[0].isnan().tolist() == [True, True, False, True] and poisoned[1:].isfinite().all()
