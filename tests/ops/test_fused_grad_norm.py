"""``fused_grad_norm``: agreement with the float64 reference on the CPU's backends, refusals, opcheck, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_kernels import cross_product, dispatch, ops, reference, traps
from gradnorm_kernels.traps import ALGORITHMS, ODD, TRAPS, Trap, assert_close, check
from gradnorm_kernels.tuning import costs as tuning
from tests.ops.on_cpu import BACKENDS, packed, served

OFFSETS, SAMPLES, GROUPS = torch.tensor([0, 5, 12, 20]), torch.tensor([1, 0, 1]), torch.tensor([0, 1])
X, DY, CU = torch.randn(10, 4), torch.randn(10, 3), torch.tensor([0, 4, 10])

#: Arguments that differ from a good call, the exception, a part of its text. Wrong whatever the tensors hold:
SHAPES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list; wrap it"),
    ({"sample_ids": [0, 1]}, TypeError, "sample_ids must be a torch.Tensor or None, got list"),
    ({"x": X.long()}, TypeError, "x must be float32"),
    ({"dy": DY.half()}, TypeError, "dy must have x's dtype (torch.float32), got torch.float16"),
    ({"dy": DY.to("meta")}, ValueError, "dy must be on x's device (cpu), got meta"),
    ({"x": X[0]}, ValueError, "x must be [T, d_in] (packed) or [B, L, d_in], got shape [4]"),
    ({"dy": DY[:9]}, ValueError, "dy must be [10, 'd_out'], got [9, 3]"),
    ({"dy": DY[None]}, ValueError, "dy must have the rows of x"),
    ({"x": X[None], "dy": DY[None]}, ValueError, "cu_seqlens is for packed x [T, d_in]"),
    ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    ({"cu_seqlens": CU[None]}, ValueError, "cu_seqlens must be one-dimensional [S+1], got shape [1, 3]"),
    ({"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens must have at least one entry"),
    ({"sample_ids": torch.tensor([0])}, ValueError, "sample_ids must have one entry for each segment (2), got 1"),
    ({"sample_ids": torch.tensor([0.0, 1.0])}, TypeError, "sample_ids must be int32 or int64"),
    ({"group_ids": torch.tensor([0, 1, 1])}, ValueError, "group_ids must have one entry for each sample (2), got 3"),
    ({"group_ids": torch.tensor([True, False])}, TypeError, "group_ids must be int32 or int64, got torch.bool"),
    ({"num_samples": 3}, ValueError, "num_samples must equal the number of segments (2)"),
    ({"num_samples": -1}, ValueError, "num_samples must be at least 0, got -1"),
    ({"num_groups": 2}, ValueError, "num_groups must be 1 when group_ids is left out, got 2"),
    ({"algorithm": "ghost"}, ValueError, "algorithm must be one of 'auto', 'wgrad', 'gram', got 'ghost'"),
    ({"backend": "mps"}, ValueError, "backend must be one of 'auto', 'torch', 'cpu', 'triton', 'cuda', got 'mps'"),
]
#: Wrong because of what the integer tensors hold: only a call with data can tell.
VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": torch.tensor([1, 4, 10])}, ValueError, "cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, "must end at the number of rows of x (10), got 9"),
    ({"cu_seqlens": torch.tensor([0, 11, 10])}, ValueError, "cu_seqlens must ascend, got 11 then 10 at position 2"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, "must end at the number of rows of x (10), got 0"),
    ({"sample_ids": torch.tensor([0, -2])}, ValueError, "sample_ids must be at least 0, got -2 at position 1"),
    (
        {"sample_ids": torch.tensor([0, 2]), "num_samples": 2},
        ValueError,
        "sample_ids must be below the number of samples (2), got 2 at position 1",
    ),
    (
        {"sample_ids": torch.tensor([0, 2]), "group_ids": torch.tensor([0, 0])},
        ValueError,
        "sample_ids must be below the number of samples (2), got 2",
    ),
    ({"group_ids": torch.tensor([-1, 0])}, ValueError, "group_ids must be at least 0, got -1"),
    (
        {"group_ids": torch.tensor([0, 1]), "num_groups": 1},
        ValueError,
        "group_ids must be below the number of groups (1)",
    ),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_traps(backend: str, trap: Trap, algorithm: str) -> None:
    for dtype in served(backend):
        case = trap.build(dtype)
        check(case, backend, algorithm)
        check(case, backend, algorithm, weight_grad=True, group_gram=True)


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
def test_blocks_and_tiles_that_do_not_divide(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, tiles of a few tokens: what only large layers and long batches reach by default."""
    small = tuning.Costs(64, 64, epilogue=18.0, gram=1.0, gram_token=0.0, pairs=0.5, workspace=37 * 10, gram_tile=7)
    monkeypatch.setattr(tuning, "costs", lambda *shape: small)
    dispatch.choose.cache_clear()
    case = traps.packed([9, 30, 0, 9, 9, 41, 1], 37, 53, torch.float32, group_ids=[0, 2, 0, 1, 2, 2, 1])
    for weight_grad in (False, True):
        for group_gram in (False, True):
            check(case, "torch", algorithm, weight_grad=weight_grad, group_gram=group_gram)
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
    """A float32 sum over a whole block of rows of a wide layer would be off by more than this."""
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


def call(changes: dict[str, Any]) -> object:
    return ops.fused_grad_norm(**{"x": X, "dy": DY, "cu_seqlens": CU, **changes})


@pytest.mark.parametrize(("changes", "error", "text"), SHAPES + VALUES)
def test_what_is_refused_and_how(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        call(changes)
    assert text in str(raised.value)


@pytest.mark.parametrize(("changes", "error", "text"), [case for case in SHAPES if "meta" not in case[2]])
def test_the_fake_refuses_the_same(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {"x": X, "dy": DY, "cu_seqlens": CU, **changes}
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises(error) as raised:
            ops.fused_grad_norm(**fakes)
    assert text in str(raised.value)


def test_values_are_not_looked_at_in_the_fake() -> None:
    with FakeTensorMode() as mode:
        x, dy, cu_seqlens = (mode.from_tensor(t) for t in (X, DY, torch.tensor([5, 4, 3])))
        assert ops.fused_grad_norm(x, dy, cu_seqlens).sample_sq_norms.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [
        (None, None, None, None, None, False, False),
        (OFFSETS, None, None, None, None, True, False),
        (OFFSETS, SAMPLES, GROUPS, None, 2, True, True),
        (OFFSETS, SAMPLES, None, 3, None, False, True),
        (OFFSETS, SAMPLES, None, None, None, True, False),  # N known only from the data
        (OFFSETS, SAMPLES, GROUPS, None, None, True, True),  # K known only from the data
    ],
)
def test_opcheck_fused_grad_norm(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs = torch.randn(20, 5).to(dtype), torch.randn(20, 4).to(dtype)
    opcheck(torch.ops.gradnorm_kernels.fused_grad_norm, (*inputs, *arguments, "auto", "auto"))


def test_opcheck_batches_and_inputs_that_require_grad() -> None:
    x, dy = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 4)
    opcheck(
        torch.ops.gradnorm_kernels.fused_grad_norm, (x, dy, None, None, None, None, None, True, True, "wgrad", "torch")
    )


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation inside makes; views of ``inputs`` do not count."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("algorithm", ["wgrad", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(algorithm: str, dtype: torch.dtype) -> None:
    """No T x T and no N x d_out x d_in, which are 5 and 12 times the size of an input here."""
    tokens, d, samples = 4096, 768, 64
    x, dy = torch.randn(tokens, d).to(dtype), torch.randn(tokens, d).to(dtype)
    cu_seqlens = torch.arange(0, tokens + 1, tokens // samples)
    kernel = ops._fused_grad_norm  # below the dispatcher, which a mode would see as one operation
    for groups in (None, torch.arange(samples) % 4):
        with Largest(x, dy) as largest:
            kernel(x, dy, cu_seqlens, None, groups, None, None, False, groups is not None, algorithm, "torch")
        # As large as an input: its reordered copy where samples of a group are not neighbours, or its rows widened.
        copies = groups is not None or dtype != torch.float32
        assert 0 < largest.elements <= (tokens * d if copies else d * d)
