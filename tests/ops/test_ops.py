"""The public functions on the CPU's backends against the float64 reference, over the inputs that catch them out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import backends, cross_product, dispatch, ops, reference
from gradnorm_kernels.tuning import costs as tuning
from tests import traps
from tests.tolerances import NORMS
from tests.traps import ALGORITHMS, ODD, TRAPS, Trap, assert_close, check, check_pairs

DTYPES = list(NORMS)


def _param(name: str) -> Any:
    reason = backends.missing(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


BACKENDS = [_param("torch"), _param("cpu")]


def packed(
    lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    case = traps.packed(lengths, d_in, d_out, dtype)
    assert case.cu_seqlens is not None
    return case.x, case.dy, case.cu_seqlens


def served(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if backends.unable(backend, "cpu", dtype) is None]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_traps(backend: str, trap: Trap, algorithm: str) -> None:
    for dtype in served(backend):
        case = trap.build(dtype)
        check(case, backend, algorithm)
        check(case, backend, algorithm, weight_grad=True, group_gram=True)
        check_pairs(case, backend, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_results(backend: str, algorithm: str) -> None:
    for dtype in served(backend):
        check(ODD.build(dtype), backend, algorithm, weight_grad=True)
        check(ODD.build(dtype), backend, algorithm, group_gram=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_u_of_one_sample_is_undefined(backend: str) -> None:
    """A group of one sample has no pairs: NaN with n = 1, beside a group of two that has."""
    case = traps.packed([40, 3, 90], 50, 60, torch.float32, group_ids=[1, 0, 1])
    result = ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, group_ids=case.group_ids, backend=backend)
    estimate = cross_product(result.sample_sq_norms, result.group_sq_norms, case.group_ids)
    assert estimate.n.tolist() == [1, 2]
    assert math.isnan(estimate.sq_norm[0]) and math.isfinite(estimate.sq_norm[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_u_near_zero_keeps_its_digits(backend: str) -> None:
    """64 independent samples: U is a hundredth of the mean squared norm, and has lost two digits, not five."""
    case = traps.packed([16] * 64, 96, 80, torch.bfloat16)
    truth = reference.fused_grad_norm(case.x, case.dy, case.cu_seqlens)
    found = ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, backend=backend)
    u, expected = (float(group[0] - sample.sum()) / (64 * 63) for sample, group in (found[:2], truth[:2]))
    assert abs(u - expected) < 2e-6 * float(truth[0].mean())
    assert abs(expected) < 0.02 * float(truth[0].mean())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_slabs_and_tiles_that_do_not_divide(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a few rows, tiles of a few tokens: what only large layers and long batches reach by default."""
    small = tuning.Costs(64, 64, epilogue=18.0, gram=1.0, gram_token=0.0, pairs=0.5, workspace=37 * 10, gram_tile=7)
    monkeypatch.setattr(tuning, "costs", lambda *shape: small)
    dispatch.choose.cache_clear()
    case = traps.packed([9, 30, 0, 9, 9, 41, 1], 37, 53, torch.float32, group_ids=[0, 2, 0, 1, 2, 2, 1])
    for weight_grad in (False, True):
        for group_gram in (False, True):
            check(case, "torch", algorithm, weight_grad=weight_grad, group_gram=group_gram)
    check_pairs(case, "torch", algorithm)
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_samples_in_strips_and_blocks(backend: str, algorithm: str) -> None:
    """Equal samples long enough for the Gram's strips, and one longer than a block of widened rows."""
    for dtype in served(backend):
        check(traps.packed([128] * 10 + [5000], 24, 40, dtype), backend, algorithm, weight_grad=True)


@pytest.mark.parametrize("group_ids", [None, [0, 1, 0]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_squares_do_not_lose_digits(backend: str, group_ids: list[int] | None) -> None:
    """A float32 sum over a whole slab of a wide layer would be off by more than this."""
    case = traps.packed([3, 2, 4], 2048, 2048, torch.float32, group_ids=group_ids)
    call = (case.x, case.dy, case.cu_seqlens)
    result = ops.fused_grad_norm(*call, group_ids=case.group_ids, algorithm="wgrad", backend=backend)
    expected = reference.fused_grad_norm(*call, group_ids=case.group_ids)
    torch.testing.assert_close(result.sample_sq_norms, expected[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(result.group_sq_norms, expected[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_give_exact_zeros(backend: str, zero: float, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([20, 70, 1], 19, 23)
    dy[20:90] = zero
    assert ops.fused_grad_norm(x, dy, cu_seqlens, algorithm=algorithm, backend=backend).sample_sq_norms[1] == 0
    result = ops.fused_grad_norm(x, dy * 0, cu_seqlens, algorithm=algorithm, backend=backend)
    assert not result.sample_sq_norms.any() and not result.group_sq_norms.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_dot_with_v_of_any_dtype(backend: str, dtype: torch.dtype, algorithm: str) -> None:
    if dtype not in served(backend):
        return
    x, dy, cu_seqlens = packed([1, 0, 333, 13, 200, 97], 67, 83, dtype)
    samples = torch.tensor([3, 1, 0, 5, 2, 3])
    v = torch.randn(83, 67, generator=torch.Generator().manual_seed(0))
    for v_dtype in DTYPES:
        # A v that the products' dtype cannot hold is rounded to it: compare with the rounded one.
        held = v.to(v_dtype) if dtype == torch.float64 else v.to(v_dtype).float()
        dots = ops.grad_dot(x, dy, v.to(v_dtype), cu_seqlens, sample_ids=samples, backend=backend)
        assert_close(dots, reference.grad_dot(x, dy, held, cu_seqlens, sample_ids=samples), NORMS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_gram_of_single_samples_is_the_gram(backend: str) -> None:
    x, dy, cu_seqlens = packed([5, 60, 200, 1], 40, 30)
    result = ops.fused_grad_norm(x, dy, cu_seqlens, group_ids=torch.arange(4), group_gram=True, backend=backend)
    assert result.group_gram is not None
    assert_close(result.group_gram, reference.grad_gram(x, dy, cu_seqlens), 2e-5)
    assert torch.equal(result.group_gram.diagonal(), result.group_sq_norms)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_matmul_precision_of_the_caller_do_not_matter(backend: str, algorithm: str) -> None:
    x, dy, cu_seqlens = packed([40, 300], 64, 64)
    kwargs: dict[str, Any] = {"weight_grad": True, "algorithm": algorithm, "backend": backend}
    alone = ops.fused_grad_norm(x, dy, cu_seqlens, **kwargs)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ops.fused_grad_norm(x, dy, cu_seqlens, **kwargs)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    for a, b in zip(alone[:3], inside[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_carry_no_graph_and_inputs_are_untouched(backend: str) -> None:
    x, dy, cu_seqlens = packed([5, 60], 8, 9)
    x.requires_grad_()
    copies = x.detach().clone(), dy.clone()
    result = ops.fused_grad_norm(x, dy, cu_seqlens, weight_grad=True, group_gram=True, backend=backend)
    gram = ops.grad_gram(x, dy, cu_seqlens, backend=backend)
    dots = ops.grad_dot(x, dy, torch.ones(9, 8), cu_seqlens, backend=backend)
    assert not any(t is not None and t.requires_grad for t in (*result, gram, dots))
    assert torch.equal(x, copies[0]) and torch.equal(dy, copies[1])


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result, damaged a little or in one place only, is found out."""
    case = ODD.build(torch.float32)
    real = ops.fused_grad_norm
    damages = {
        "one norm a little": lambda r: r.sample_sq_norms[2].mul_(1 + 1e-4),
        "a short sample's norm": lambda r: r.sample_sq_norms[7].zero_(),
        "a sum": lambda r: r.group_sq_norms[4].mul_(1 + 1e-3),
        "NaN where nothing is": lambda r: r.group_sq_norms[3].fill_(float("nan")),
        "an element of dW": lambda r: r.weight_grad[-1, -1].zero_(),
        "an inner product": lambda r: r.group_gram[0, 1].add_(float(r.group_gram.max()) * 1e-3),
    }
    for name, damage in damages.items():

        def damaged(*args: Any, damage: Any = damage, **kwargs: Any) -> ops.FusedGradNorm:
            result = real(*args, **kwargs)
            damage(result)
            return result

        monkeypatch.setattr(ops, "fused_grad_norm", damaged)
        with pytest.raises(AssertionError):
            check(case, "torch", "wgrad", weight_grad=True, group_gram=True)
            pytest.fail(f"not found out: {name}", pytrace=False)
