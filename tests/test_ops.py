"""The public functions against the float64 reference, over the inputs that catch implementations out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import dispatch, ops, reference, tuning
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


def packed(
    lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(lengths) + d_in)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    return torch.randn(tokens, d_in).to(dtype), torch.randn(tokens, d_out).to(dtype), cu_seqlens


def compare(x: Tensor, dy: Tensor, *args: Any, algorithm: str = "auto", **kwargs: Any) -> ops.FusedGradNorm:
    """Run op and reference, hold every result to the table, return the op's."""
    result = ops.fused_grad_norm(x, dy, *args, algorithm=algorithm, **kwargs)
    sample_sq, group_sq, weight_grad, group_gram = reference.fused_grad_norm(x, dy, *args, **kwargs)
    assert result.sample_sq_norms.dtype == result.group_sq_norms.dtype == torch.float64
    for norms, expected in ((result.sample_sq_norms, sample_sq), (result.group_sq_norms, group_sq)):
        assert_close(norms, expected, NORMS[x.dtype])
        # Each by itself too, not only beside the largest.
        torch.testing.assert_close(norms, expected, rtol=NORMS[x.dtype], atol=1e-30, equal_nan=True)
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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "lengths", [[1], [777], [1, 1, 1], [5, 0, 0], [0, 0], [2, 3, 5, 7, 11, 13], [128] * 9, [600, 40]]
)
def test_lengths(lengths: list[int], algorithm: str) -> None:
    x, dy, cu_seqlens = packed(lengths, 31, 17)
    compare(x, dy, cu_seqlens, weight_grad=True, group_gram=True, algorithm=algorithm)
    compare(x, dy, cu_seqlens.int(), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 97), (777, 2), (1000, 131), (0, 5), (5, 0)])
def test_widths(d_in: int, d_out: int, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([7, 60, 1], d_in, d_out)
    compare(x, dy, cu_seqlens, weight_grad=True, group_gram=True, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_slabs_and_tiles_that_do_not_divide(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a few rows, tiles of a few tokens: what only large layers and long batches reach by default."""
    small = tuning.Costs(64, 64, boundary=18.0, gram=1.0, gram_token=0.0, pairs=0.5, slab=37 * 10, tile=7)
    monkeypatch.setattr(tuning, "costs", lambda *shape: small)
    dispatch.choose.cache_clear()
    x, dy, cu_seqlens = packed([9, 30, 0, 9, 9, 41, 1], 37, 53)
    groups = torch.tensor([0, 2, 0, 1, 2, 2, 1])
    for weight_grad in (False, True):
        for group_gram in (False, True):
            compare(
                x, dy, cu_seqlens, group_ids=groups, weight_grad=weight_grad, group_gram=group_gram, algorithm=algorithm
            )
    assert_close(ops.grad_gram(x, dy, cu_seqlens, algorithm=algorithm), reference.grad_gram(x, dy, cu_seqlens), 2e-5)
    v = torch.randn(53, 37)
    assert_close(ops.grad_dot(x, dy, v, cu_seqlens), reference.grad_dot(x, dy, v, cu_seqlens), 2e-5)
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_samples_in_strips_and_blocks(dtype: torch.dtype, algorithm: str) -> None:
    """Equal samples long enough for the Gram's strips, and one longer than a block of widened rows."""
    x, dy, cu_seqlens = packed([128] * 10 + [5000], 24, 40, dtype)
    compare(x, dy, cu_seqlens, weight_grad=True, algorithm=algorithm)


@pytest.mark.parametrize("group_ids", [None, torch.tensor([0, 1, 0])])
def test_a_million_squares_do_not_lose_digits(group_ids: Tensor | None) -> None:
    """A float32 sum over a whole slab of a wide layer would be off by more than this."""
    x, dy, cu_seqlens = packed([3, 2, 4], 2048, 2048)
    result = ops.fused_grad_norm(x, dy, cu_seqlens, group_ids=group_ids, algorithm="wgrad")
    expected = reference.fused_grad_norm(x, dy, cu_seqlens, group_ids=group_ids)
    torch.testing.assert_close(result.sample_sq_norms, expected[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(result.group_sq_norms, expected[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_and_strides(dtype: torch.dtype, algorithm: str) -> None:
    torch.manual_seed(0)
    base_x, base_dy = torch.randn(6, 40, 22).to(dtype), torch.randn(6, 40, 13).to(dtype)
    views = {
        "batch": (base_x, base_dy),
        "sliced tokens": (base_x[:, 3:20], base_dy[:, 3:20]),
        "every other row": (base_x[::2], base_dy[::2]),
        "sliced features": (base_x[..., 2:9], base_dy[..., ::3]),
        "transposed": (base_x.transpose(0, 1), base_dy.transpose(0, 1)),
        "expanded features": (base_x[..., :1].expand(6, 40, 8), base_dy),
        "expanded rows": (base_x[:1, :1].expand(6, 40, 22), base_dy[:, :1].expand(6, 40, 13)),
        "columns first": (base_x[0].T.contiguous().T, base_dy[0].T.contiguous().T),
        "no rows": (base_x[:, :0], base_dy[:, :0]),
        "no batch": (base_x[:0], base_dy[:0]),
    }
    for name, (x, dy) in views.items():
        try:
            compare(x, dy, weight_grad=True, group_gram=True, algorithm=algorithm)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_poison_stays_in_its_sample_and_group(poison: float, where: str, algorithm: str) -> None:
    """Neighbours on both sides, another piece of the sample elsewhere, other groups: only the poisoned ones are hit."""
    x, dy, cu_seqlens = packed([20, 20, 20, 130, 20, 7], 19, 23)
    samples, groups = torch.tensor([0, 1, 2, 3, 1, 4]), torch.tensor([0, 1, 2, 0, 2])
    (x if where == "x" else dy)[30, 5] = poison
    for group_gram in (False, True):
        result = ops.fused_grad_norm(
            x, dy, cu_seqlens, sample_ids=samples, group_ids=groups, group_gram=group_gram, algorithm=algorithm
        )
        clean_x, clean_dy = x.nan_to_num(0, 0, 0), dy.nan_to_num(0, 0, 0)
        expected = reference.fused_grad_norm(
            clean_x, clean_dy, cu_seqlens, sample_ids=samples, group_ids=groups, group_gram=True
        )
        assert result.sample_sq_norms.isfinite().tolist() == [True, False, True, True, True]
        assert result.group_sq_norms.isfinite().tolist() == [True, False, True]
        assert_close(result.sample_sq_norms[[0, 2, 3, 4]], expected[0][[0, 2, 3, 4]], 2e-5)
        assert_close(result.group_sq_norms[[0, 2]], expected[1][[0, 2]], 2e-5)
        if result.group_gram is not None:
            assert_close(result.group_gram[[0, 2]][:, [0, 2]], expected[3][[0, 2]][:, [0, 2]], 2e-5)
    gram = ops.grad_gram(x, dy, cu_seqlens, sample_ids=samples, algorithm=algorithm)
    rest = [0, 2, 3, 4]
    assert gram[rest][:, rest].isfinite().all() and not gram[1].isfinite().any()
    dots = ops.grad_dot(x, dy, torch.ones(23, 19), cu_seqlens, sample_ids=samples)
    assert dots.isfinite().tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_gradients(zero: float, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([20, 70, 1], 19, 23)
    dy[20:90] = zero
    result = compare(x, dy, cu_seqlens, weight_grad=True, algorithm=algorithm)
    assert result.sample_sq_norms[1] == 0
    result = compare(x, dy * 0, cu_seqlens, weight_grad=True, group_gram=True, algorithm=algorithm)
    assert not result.sample_sq_norms.any() and not result.group_sq_norms.any()


def cancelling(epsilon: float) -> tuple[Tensor, Tensor]:
    """Pairs of tokens with opposite gradients up to ``epsilon``: the norm is ``epsilon`` of what it is summed from."""
    torch.manual_seed(0)
    x, dy = torch.randn(50, 64), torch.randn(50, 48)
    return torch.cat([x, x + epsilon * torch.randn(50, 64)]), torch.cat([dy, -dy])


def test_cancelling_tokens_keep_their_digits_in_wgrad() -> None:
    x, dy = cancelling(1e-3)
    expected = reference.fused_grad_norm(x, dy)[0]
    error = {
        algorithm: float((ops.fused_grad_norm(x, dy, algorithm=algorithm).sample_sq_norms / expected - 1).abs())
        for algorithm in ("wgrad", "gram")
    }
    assert error["wgrad"] < 2e-5
    assert error["gram"] < 0.5  # the known loss: 1e-7 of the terms' sizes, here 1e6 times the norm


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sums_that_cancel(algorithm: str) -> None:
    """Two samples with opposite gradients: the group's norm is nothing beside theirs, and U = -||G||^2."""
    x, dy, _ = packed([90], 33, 21)
    x, dy = torch.cat([x, x]), torch.cat([dy, -dy])
    result = ops.fused_grad_norm(x, dy, torch.tensor([0, 90, 180]), algorithm=algorithm)
    assert result.group_sq_norms[0] < 1e-6 * result.sample_sq_norms.sum()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_run(dtype: torch.dtype, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([1, 300, 64, 64, 500, 64, 7], 130, 96, dtype)
    kwargs: dict[str, Any] = {"group_ids": torch.tensor([0, 1, 0, 1, 2, 2, 0]), "algorithm": algorithm}
    kwargs |= {"weight_grad": True, "group_gram": True}
    first = ops.fused_grad_norm(x, dy, cu_seqlens, **kwargs)
    for _ in range(3):
        for a, b in zip(first, ops.fused_grad_norm(x, dy, cu_seqlens, **kwargs), strict=True):
            assert torch.equal(a, b)
    gram = ops.grad_gram(x, dy, cu_seqlens, algorithm=algorithm)
    assert torch.equal(gram, ops.grad_gram(x, dy, cu_seqlens, algorithm=algorithm))
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_gram_and_grad_dot(dtype: torch.dtype, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([1, 0, 333, 13, 200, 97], 67, 83, dtype)
    samples = torch.tensor([3, 1, 0, 5, 2, 3])
    gram = ops.grad_gram(x, dy, cu_seqlens, sample_ids=samples, algorithm=algorithm)
    assert_close(gram, reference.grad_gram(x, dy, cu_seqlens, sample_ids=samples), NORMS[dtype])
    v = torch.randn(83, 67)
    for v_dtype in DTYPES:
        # A v that the products' dtype cannot hold is rounded to it: compare with the rounded one.
        held = v.to(v_dtype) if dtype == torch.float64 else v.to(v_dtype).float()
        dots = ops.grad_dot(x, dy, v.to(v_dtype), cu_seqlens, sample_ids=samples)
        assert_close(dots, reference.grad_dot(x, dy, held, cu_seqlens, sample_ids=samples), NORMS[dtype])


def test_group_gram_of_single_samples_is_the_gram() -> None:
    x, dy, cu_seqlens = packed([5, 60, 200, 1], 40, 30)
    result = ops.fused_grad_norm(x, dy, cu_seqlens, group_ids=torch.arange(4), group_gram=True)
    assert result.group_gram is not None
    assert_close(result.group_gram, reference.grad_gram(x, dy, cu_seqlens), 2e-5)
    assert torch.equal(result.group_gram.diagonal(), result.group_sq_norms)


def test_counts_given_by_hand() -> None:
    x, dy, cu_seqlens = packed([5, 6], 4, 3)
    samples = torch.tensor([1, 0])
    result = ops.fused_grad_norm(
        x, dy, cu_seqlens, sample_ids=samples, num_samples=4, group_ids=torch.tensor([0, 1, 1, 0]), num_groups=3
    )
    assert result.sample_sq_norms.shape == (4,) and result.group_sq_norms.shape == (3,)
    assert result.sample_sq_norms[2:].tolist() == [0, 0] and result.group_sq_norms[2] == 0
    assert ops.grad_gram(x, dy, cu_seqlens, sample_ids=samples, num_samples=3).shape == (3, 3)
    assert ops.grad_dot(x, dy, torch.ones(3, 4), cu_seqlens, sample_ids=samples, num_samples=3).shape == (3,)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_and_matmul_precision_of_the_caller_do_not_matter(algorithm: str) -> None:
    x, dy, cu_seqlens = packed([40, 300], 64, 64)
    alone = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, algorithm=algorithm)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, algorithm=algorithm)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    for a, b in zip(alone[:3], inside[:3], strict=True):
        assert torch.equal(a, b)


def test_results_carry_no_graph_and_inputs_are_untouched() -> None:
    x, dy, cu_seqlens = packed([5, 60], 8, 9)
    x.requires_grad_()
    copies = x.detach().clone(), dy.clone()
    result = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, group_gram=True)
    gram, dots = ops.grad_gram(x, dy, cu_seqlens), ops.grad_dot(x, dy, torch.ones(9, 8), cu_seqlens)
    assert not any(t.requires_grad for t in (*result, gram, dots))
    assert torch.equal(x, copies[0]) and torch.equal(dy, copies[1])
