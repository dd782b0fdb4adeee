"""The operators on CUDA tensors: the host code before and around launches, run by ``test_fake_cuda.py``.

Nothing waits for the device where that is promised, nothing is summed in an order that is not fixed, every launch goes
to the tensors' device and to the current stream, and the numbers are the reference's.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import dispatch, ops, reference, traps
from gradnorm_kernels.traps import ALGORITHMS, Case
from gradnorm_kernels.tuning import costs as tuning
from tests.fake_cuda.device import CudaTensor, FakeCuda
from tests.fake_cuda.launches import other_defaults

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {"num_samples": 4, "num_groups": 3}


def _mixed(dtype: torch.dtype) -> Case:
    """Long samples and short, in pieces and in turns, an empty segment; rows that a tensor descriptor takes."""
    return traps.packed(
        [70, 0, 33, 90, 5], 64, 48, dtype, sample_ids=[2, 1, 0, 2, 1], group_ids=[2, 0, 2, 1], kwargs=dict(SIZES)
    )


def _batch(dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 25, d, generator=generator).to(dtype) for d in (22, 13))
    return Case(x, dy, group_ids=torch.tensor([0, 2, 0, 1]), kwargs={"num_groups": 3})


def _overlapping(dtype: torch.dtype) -> Case:
    """Rows all in the same place, odd widths and starts."""
    case = traps.packed([40, 3, 20], 33, 21, dtype, group_ids=[1, 0, 1], kwargs={"num_groups": 2})
    return Case(case.x[:1].expand(63, 33), case.dy[:, 1:], case.cu_seqlens, None, case.group_ids, case.kwargs)


def _few_long(dtype: torch.dtype) -> Case:
    """More multiprocessors than tiles: the tokens are split, anywhere."""
    return traps.packed([1500, 777], 40, 24, dtype, group_ids=[0, 1], kwargs={"num_groups": 2})


def _many(dtype: torch.dtype) -> Case:
    """The same, between samples."""
    return traps.packed([20, 9, 31] * 60, 40, 24, dtype, group_ids=[0, 1, 1] * 60, kwargs={"num_groups": 2})


CASES = {"mixed": _mixed, "batch": _batch, "overlapping": _overlapping, "few long": _few_long, "many": _many}


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def fake(both: FakeCuda) -> FakeCuda:
    """Both compiled backends run."""
    return both


def on(fake: FakeCuda, case: Case, device: str = "cuda:0", ids: str | None = None) -> Case:
    """The case with x and dy on a device, and the index tensors there or on the host."""

    def moved(tensor: Tensor | None, to: str) -> Any:
        return tensor if tensor is None or to == "cpu" else fake.put(tensor, to)

    x, dy = moved(case.x, device), moved(case.dy, device)
    indices = (moved(t, ids or device) for t in (case.cu_seqlens, case.sample_ids, case.group_ids))
    return Case(x, dy, *indices, case.kwargs)


def everything(case: Case, backend: str, algorithm: str, **wanted: bool) -> list[Any]:
    """All three operators, with every size given."""
    counts = {name: value for name, value in case.kwargs.items() if name == "num_samples"}
    call, ids = (case.x, case.dy, case.cu_seqlens), {"sample_ids": case.sample_ids, "backend": backend, **counts}
    found = ops.fused_grad_norm(*call, group_ids=case.group_ids, algorithm=algorithm, **ids, **wanted, **_groups(case))
    v = torch.ones(case.dy.shape[-1], case.x.shape[-1], dtype=case.x.dtype, device=case.x.device)
    return [
        *found[:4],
        ops.grad_gram(*call, algorithm=algorithm, **ids),
        ops.grad_dot(case.x, case.dy, v, **_dot(case, ids)),
    ]


def _groups(case: Case) -> dict[str, int]:
    return {name: value for name, value in case.kwargs.items() if name == "num_groups"}


def _dot(case: Case, ids: dict[str, Any]) -> dict[str, Any]:
    return {"cu_seqlens": case.cu_seqlens, **ids}


def right(case: Case, found: list[Any], device: str, **wanted: bool) -> None:
    """On the device, of the promised dtypes, and the reference's numbers."""
    counts = {name: value for name, value in case.kwargs.items() if name == "num_samples"}
    call, ids = (case.x, case.dy, case.cu_seqlens), {"sample_ids": case.sample_ids, **counts}
    expected = [
        *reference.fused_grad_norm(*call, group_ids=case.group_ids, **ids, **wanted, **_groups(case)),
        reference.grad_gram(*call, **ids),
        reference.grad_dot(case.x, case.dy, torch.ones(case.dy.shape[-1], case.x.shape[-1]), **_dot(case, ids)),
    ]
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), place
        if one is not None and other is not None:
            assert isinstance(one, CudaTensor) and one.device == torch.device(device), place
            assert one.dtype == (case.x.dtype if place == 2 else torch.float64), place
            error = (one.inner.double() - other).abs().max()
            assert error <= (4e-3 if place == 2 else 2e-5) * other.abs().max(), (place, float(error))


@pytest.mark.parametrize("ids", ["cuda:0", "cpu"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_waits(fake: FakeCuda, backend: str, name: str, algorithm: str, ids: str) -> None:
    """With the indices on the device a graph can hold the call: nothing of the host's memory is part of it."""
    fake.silent = True
    case = on(fake, CASES[name](FP16), ids=ids)
    for weight_grad, group_gram in itertools.product((False, True), repeat=2):
        with fake.forbidding(waits=True, capture=ids != "cpu", any_order=True):
            everything(case, backend, algorithm, weight_grad=weight_grad, group_gram=group_gram)


@pytest.mark.parametrize("ids", ["cuda:0", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_a_sketch_does_not_wait(fake: FakeCuda, name: str, ids: str) -> None:
    fake.silent = True
    case = on(fake, CASES[name](FP16), ids=ids)
    counts = {key: value for key, value in case.kwargs.items() if key == "num_samples"}
    c_in, c_out = (fake.put(torch.ones(side.shape[-1], 5, dtype=FP16)) for side in (case.x, case.dy))
    for projections in ((c_in, c_out), (None, c_out)):
        with fake.forbidding(waits=True, capture=ids != "cpu", any_order=True):
            call = (case.x, case.dy, *projections, case.cu_seqlens)
            ops.grad_sketch(*call, sample_ids=case.sample_ids, backend="triton", **counts)


def test_a_sketch_with_more_columns_than_a_grid_has_in_its_second_dimension(fake: FakeCuda) -> None:
    """2900 x 2900 elements are 65704 blocks of 128."""
    fake.silent = True
    x, dy = (fake.put(torch.ones(3, 2900, dtype=FP16)) for _ in range(2))
    assert ops.grad_sketch(x, dy, None, None, backend="triton").shape == (1, 2900, 2900)
    assert {"sketch_kernel", "row_sums_kernel"} <= set(fake.operations)


@pytest.mark.parametrize(
    ("algorithm", "name", "dtype", "ids"),
    [("wgrad", "mixed", BF16, "cpu"), ("gram", "batch", FP16, "cuda:0"), ("auto", "overlapping", FP16, "cpu")],
)
def test_the_numbers(fake: FakeCuda, backend: str, algorithm: str, name: str, dtype: torch.dtype, ids: str) -> None:
    case = CASES[name](dtype)
    wanted = {"weight_grad": algorithm == "wgrad", "group_gram": algorithm != "auto"}
    right(case, everything(on(fake, case, ids=ids), backend, algorithm, **wanted), "cuda:0", **wanted)


@pytest.mark.parametrize("ids", ["cuda:1", "cpu"])
def test_on_the_other_device_and_another_stream(fake: FakeCuda, backend: str, ids: str) -> None:
    """The current device is cuda:0: launches and allocations follow the tensors, and the stream is that device's."""
    fake.silent, case = True, _mixed(FP16)
    with fake.stream(7):
        found = everything(on(fake, case, "cuda:1", ids), backend, "auto", weight_grad=True, group_gram=True)
    assert {tensor.device for tensor in found} == {torch.device("cuda:1")}
    assert {(device, stream) for _, device, stream in fake.launches} == {(1, 2 << 16)}
    del fake.launches[:]
    with torch.cuda.device(1), fake.stream(7):
        everything(on(fake, case, "cuda:1", ids), backend, "auto")
    assert {(device, stream) for _, device, stream in fake.launches} == {(1, 2 << 16 | 7)}
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_indices_on_the_host_are_refused_in_a_graph(fake: FakeCuda, backend: str) -> None:
    case = on(fake, _mixed(FP16), ids="cpu")
    with fake.forbidding(capture=True), pytest.raises(RuntimeError, match="graph is being captured.* on x's device"):
        everything(case, backend, "auto")


@pytest.mark.parametrize(
    ("backend", "name"), [("torch", "many"), ("triton", "batch"), ("cuda", "mixed"), ("cuda", "few long")]
)
def test_whatever_the_defaults_are(fake: FakeCuda, backend: str, name: str) -> None:
    """The caller's default device and default dtype are not those of our buffers."""
    case = CASES[name](FP16)
    moved = on(fake, case, ids="cpu")
    with other_defaults():
        found = everything(moved, backend, "wgrad", weight_grad=True, group_gram=True)
    right(case, found, "cuda:0", weight_grad=True, group_gram=True)


def test_sizes_that_only_values_tell_are_read_and_nothing_else(fake: FakeCuda, backend: str) -> None:
    fake.silent, case = True, on(fake, _mixed(FP16))
    call = (case.x, case.dy, case.cu_seqlens)
    found = ops.fused_grad_norm(*call, sample_ids=case.sample_ids, group_ids=case.group_ids, backend=backend)
    assert len(fake.waits) == 1 and len(found.group_sq_norms) == 3  # N is that of group_ids
    ops.grad_gram(*call, sample_ids=case.sample_ids, backend=backend)
    assert len(fake.waits) == 2


def test_wrong_values_on_the_device_are_nan(fake: FakeCuda, backend: str) -> None:
    case = on(fake, traps.packed([5, 60, 7], 40, 24, FP16))
    for offsets in ([0, 65, 5, 72], [0, 5, 1 << 40, 72]):
        with fake.forbidding(capture=True):
            found = ops.fused_grad_norm(
                case.x, case.dy, fake.put(torch.tensor(offsets)), weight_grad=True, backend=backend
            )
        assert all(tensor is None or tensor[:1].inner.isnan().all() for tensor in found), offsets


@pytest.mark.parametrize("ids", ["cuda:0", "cpu"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["mixed", "overlapping"])
def test_the_torch_backend(fake: FakeCuda, name: str, dtype: torch.dtype, algorithm: str, ids: str) -> None:
    """It reads index values that are on the device. From the host it does not wait, and the bits are the same."""
    wanted = {"weight_grad": algorithm == "wgrad", "group_gram": algorithm != "auto"}
    case = CASES[name](dtype)
    with fake.forbidding(waits=ids == "cpu", any_order=True):
        found = everything(on(fake, case, ids=ids), "torch", algorithm, **wanted)
    right(case, found, "cuda:0", **wanted)


def test_float32_on_triton(fake: FakeCuda) -> None:
    case = _mixed(FP32)
    with fake.forbidding(capture=True, any_order=True):
        found = everything(on(fake, case), "triton", "auto", weight_grad=True)
    right(case, found, "cuda:0", weight_grad=True)


def test_the_choice_and_its_explanation_read_nothing(fake: FakeCuda) -> None:
    case = on(fake, _mixed(BF16))
    with fake.forbidding(capture=True):
        said = dispatch.explain(case.x, case.dy, case.cu_seqlens, sample_ids=case.sample_ids, num_samples=4)
    assert said.plan.backend in ("triton", "cuda") and said.backends["triton"] is said.backends["cuda"] is None
    assert "nvidia-h200" in str(said) or "H200" in str(said)
    assert tuning.chip(case.x.device) == tuning.Chip("cuda", "nvidia-h200", 90)
