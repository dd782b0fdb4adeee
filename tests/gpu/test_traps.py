"""The traps of every backend, on a GPU: bfloat16, float16 and float32."""

from __future__ import annotations

import pytest
import torch

from gradnorm_kernels import backends, ops, traps
from gradnorm_kernels.traps import ALGORITHMS, ALIGNED, ODD, TRAPS, Trap, check, check_pairs, check_sketches

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.usefixtures("gpu_only")
def test_backends_can_run(name: str) -> None:
    """The other tests are skipped for a backend that cannot run: this one fails."""
    assert backends.unavailable_reason(name) is None


@pytest.fixture(params=(*TRAPS, ALIGNED), ids=str)
def trap(request: pytest.FixtureRequest, device: torch.device) -> Trap:
    found: Trap = request.param
    if found is ALIGNED and device.type == "cpu":
        pytest.skip("equivalent in the interpreter to the unaligned layout")
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_traps(algorithm: str, trap: Trap, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = trap.build(dtype).to(device)
    check(case, backend, algorithm, weight_grad=True, group_gram=True)
    check(case, backend, algorithm)


def test_traps_of_the_gram_and_the_dot(trap: Trap, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    check_pairs(trap.build(dtype).to(device), backend, "auto")


@pytest.mark.usefixtures("gpu_only")
def test_traps_of_the_sketch(trap: Trap, dtype: torch.dtype, device: torch.device) -> None:
    check_sketches(trap.build(dtype).to(device), "triton")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_offsets_and_ids_on_the_host(algorithm: str, backend: str, device: torch.device) -> None:
    case = ODD.build(torch.float16)
    on_host, on_device = (check(case.to(device, ids), backend, algorithm, weight_grad=True) for ids in ("cpu", device))
    traps.assert_same_bits(on_host, on_device, on_host._fields)


@pytest.mark.parametrize(
    ("lengths", "d_in", "d_out"),
    [([64] * 32, 576, 1536), ([2048, 777, 1000, 271], 2048, 2048), ([1000, 3096], 896, 4864), ([8192], 128, 128)],
)
def test_shapes_of_real_layers(
    lengths: list[int], d_in: int, d_out: int, backend: str, dtype: torch.dtype, device: torch.device, gpu_only: None
) -> None:
    case = traps.packed(lengths, d_in, d_out, dtype, group_ids=[i % 3 for i in range(len(lengths))])
    expected = traps.truth(case, weight_grad=True)
    case = case.to(device)
    for algorithm in ALGORITHMS:
        check(case, backend, algorithm, expected=expected, weight_grad=True)


def test_wrong_values_on_the_device_give_nan_and_touch_nothing(
    backend: str, device: torch.device, gpu_only: None
) -> None:
    case = traps.packed([5, 60, 7], 40, 24, torch.float16).to(device)
    for offsets in ([0, 5, 65, 73], [0, 65, 5, 72], [1, 5, 65, 72], [0, -9, 65, 72], [0, 5, 1 << 40, 72]):
        wrong = torch.tensor(offsets, device=device)
        result = ops.fused_grad_norm(case.x, case.dy, wrong, weight_grad=True, backend=backend)
        assert result.sample_sq_norms.isnan().all() and result.group_sq_norms.isnan().all(), offsets
        assert result.weight_grad is not None and result.weight_grad[0].isnan().all(), offsets
    for ids in ([0, 3, 1], [0, -1, 1]):
        wrong = torch.tensor(ids, device=device)
        found = ops.grad_gram(case.x, case.dy, case.cu_seqlens, sample_ids=wrong, num_samples=3, backend=backend)
        assert found.isnan().all(), ids
    check(case, backend, "auto", weight_grad=True)
