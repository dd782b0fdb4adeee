"""The public functions against the float64 reference, over the inputs that catch implementations out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import ops, reference
from tests.tolerances import NORMS, WEIGHT_GRAD

DTYPES = list(NORMS)
ALGORITHMS = ["wgrad", "gram", "auto"]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest finite expected value; NaN and Inf where, and only where, expected."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    if finite.any():
        error = (actual.double() - expected)[finite].abs().max()
        assert error <= tolerance * expected[finite].abs().max(), f"{error / expected[finite].abs().max():.2e}"


def packed(lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(lengths) + d_in)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    return torch.randn(tokens, d_in).to(dtype), torch.randn(tokens, d_out).to(dtype), cu_seqlens


def compare(x: Tensor, dy: Tensor, *args: Any, algorithm: str = "auto", **kwargs: Any) -> ops.FusedGradNorm:
    """Run op and reference, hold every result to the table, return the op's."""
    result = ops.fused_grad_norm(x, dy, *args, algorithm=algorithm, **kwargs)
    sample_sq, group_sq, weight_grad, group_gram = reference.fused_grad_norm(x, dy, *args, **kwargs)
    assert result.sample_sq_norms.dtype == result.group_sq_norms.dtype == torch.float64
    assert_close(result.sample_sq_norms, sample_sq, NORMS[x.dtype])
    assert_close(result.group_sq_norms, group_sq, NORMS[x.dtype])
    if weight_grad is None:
        assert result.weight_grad is None
    else:
        assert result.weight_grad is not None and result.weight_grad.dtype == x.dtype
        assert_close(result.weight_grad, weight_grad, WEIGHT_GRAD[x.dtype])
    if group_gram is None:
        assert result.group_gram is None
    else:
        assert result.group_gram is not None and result.group_gram.dtype == torch.float64
        assert_close(result.group_gram, group_gram, NORMS[x.dtype])
    return result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("group_gram", [False, True])
def test_odd_lengths_scattered_samples_and_gaps(
    dtype: torch.dtype, algorithm: str, weight_grad: bool, group_gram: bool
) -> None:
    """Lengths of 1, 0, 777 and 1000; a sample in two places; samples 4 and 6 and group 3 without tokens."""
    x, dy, cu_seqlens = packed([1, 0, 777, 13, 1000, 97, 0, 13], 67, 83, dtype)
    compare(
        x,
        dy,
        cu_seqlens,
        sample_ids=torch.tensor([3, 1, 0, 5, 2, 3, 4, 7]),
        group_ids=torch.tensor([0, 1, 0, 2, 2, 4, 0, 1]),
        weight_grad=weight_grad,
        group_gram=group_gram,
        algorithm=algorithm,
    )
