"""The reductions, interpreted: sums over spans of positions and rows, and the norms of segmented wgrad."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradnorm_kernels.backends.base import Results
from gradnorm_kernels.backends.triton import reduce
from gradnorm_kernels.traps import poisoned_memory

NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(*ends: tuple[int, int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def test_sums_of_positions() -> None:
    """Spans that are empty, of one position, and longer than what is summed at a time; a NaN next to each."""
    parts = random(3, 1300).double()
    parts[:, 7], parts[:, 1100] = NAN, NAN
    wanted = spans((0, 7), (8, 8), (8, 9), (9, 1100), (1101, 1300))
    row = torch.randperm(1300, generator=torch.Generator().manual_seed(1)).int()
    with poisoned_memory():
        plain, gathered = (
            reduce.position_sums(parts, wanted),
            reduce.position_sums(parts[:, row.long().argsort()], wanted, row),
        )
    expected = torch.stack([parts[:, lo:hi].sum() for lo, hi in wanted.tolist()])
    torch.testing.assert_close(plain, expected, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(gathered, expected, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_rows(dtype: torch.dtype, short: bool) -> None:
    values = random(100, 130, dtype=dtype)
    values[3], values[60] = NAN, NAN
    wanted = spans((0, 3), (4, 60), (5, 5), (99, 100))
    row = torch.randperm(100, generator=torch.Generator().manual_seed(1)).int()
    expected = torch.stack([values[lo:hi].double().sum(0) for lo, hi in wanted.tolist()])
    with poisoned_memory():
        for source, where in ((values, None), (values.T.contiguous().T, None), (values[row.long().argsort()], row)):
            sums = reduce.row_sums(source, wanted, where, short=short)
            torch.testing.assert_close(sums, expected, rtol=1e-14, atol=1e-13)
            assert reduce.row_sums(source, wanted, where, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("samples", [1, 31, 777])
def test_norms_take_what_is_there_and_nothing_else(samples: int) -> None:
    """In float64 and over more rows than one step takes; the rest of the partials is NaN."""
    generator = torch.Generator().manual_seed(samples)
    columns, splits = samples + 3, 4
    partials = torch.full((45, columns), torch.nan, dtype=torch.float64)
    fixup = torch.full((splits, 2, 70), torch.nan, dtype=torch.float64)
    state = torch.zeros(columns, dtype=torch.int32)
    wanted = torch.zeros(columns, dtype=torch.float64)
    for column in range(0, columns, 3):
        partials[:, column] = torch.rand(45, generator=generator, dtype=torch.float64)
        state[column], wanted[column] = 1, partials[:, column].sum()
    for column, split, kind in ((samples - 1, 2, 0), (samples + 2, 3, 1)):
        fixup[split, kind] = torch.rand(70, generator=generator, dtype=torch.float64)
        state[column], wanted[column] = 2 + split, fixup[split, kind].sum()
    # Norms that another kernel took come in once, with the first pass.
    other = torch.rand(samples, generator=generator, dtype=torch.float64)
    once = wanted.clone()
    once[:samples] += other
    for valid in (1, 0):
        results = results_of(samples, 3)
        call = (results, state, torch.tensor([0, valid], dtype=torch.int32), partials, fixup, None)
        reduce.finish(*call, first=True, last=False, of_samples=other)
        found = torch.cat([results.sample_sq, results.group_sq])
        torch.testing.assert_close(found, once, rtol=1e-14, atol=0)
        assert results.weight_grad is not None and not results.weight_grad.isnan().any(), "not the last pass"
        reduce.finish(*call, first=False, last=True, of_samples=other)
        found = torch.cat([results.sample_sq, results.group_sq])
        if valid:
            torch.testing.assert_close(found, once + wanted, rtol=1e-14, atol=0)
            assert not results.weight_grad.isnan().any()
        else:
            assert found.isnan().all() and results.weight_grad[0].isnan().all()
            assert not results.weight_grad[1:].isnan().any()


def results_of(samples: int, groups: int) -> Results:
    """Results that hold nothing yet, but for dW."""
    empty = [torch.full((n,), torch.nan, dtype=torch.float64) for n in (samples, groups)]
    return Results(*empty, torch.zeros(3, 77), torch.full((groups, groups), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("groups", [2, 5, 37])
def test_the_gram_is_symmetric_and_holds_what_is_there(groups: int) -> None:
    """Sums over more tiles than one step takes, in two passes; a group without rows has none and is 0."""
    generator = torch.Generator().manual_seed(groups)
    products = torch.randn(2, 40, groups, groups, generator=generator)
    products[:, :, 1] = products[:, :, :, 1] = torch.nan
    partials = torch.rand(3, 1 + groups, generator=generator, dtype=torch.float64)
    state = torch.ones(1 + groups, dtype=torch.int32)
    state[2] = 0
    results = results_of(1, groups)
    for i in range(2):
        reduce.finish(
            results, state, torch.ones(2, dtype=torch.int32), partials, None, products[i], first=i == 0, last=i == 1
        )
    summed = products.double().sum((0, 1))
    expected = (summed + summed.T) / 2
    expected.diagonal().copy_(2 * partials[:, 1:].sum(0))
    expected[1] = expected[:, 1] = 0.0
    assert results.group_gram is not None
    torch.testing.assert_close(results.group_gram, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(results.group_gram, results.group_gram.T)
    assert torch.equal(results.group_gram.diagonal(), results.group_sq)
