"""First use of a GPU kernel on CUDA tensors without a GPU: compared with torch, or left out with one warning."""

from __future__ import annotations

import ctypes
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from gradnorm_kernels import backends, canary, dispatch, ops, reference
from gradnorm_kernels.backends import cuda, triton
from tests.cuda_host.build import Host
from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.launches import install

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = torch.device("cuda:0")
PASSED = canary.passed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, host: Host) -> Iterator[FakeCuda]:
    """A machine with two GPUs on which nothing was used yet."""
    with install(monkeypatch, library, host) as fake:
        monkeypatch.setattr(canary, "passed", PASSED)
        dispatch.choose.cache_clear()
        canary.forget()
        yield fake
    canary.forget()
    dispatch.choose.cache_clear()
    backends.forget()


@pytest.fixture
def planted(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``planted(module, wrong)``: a backend whose fused_grad_norm gives what ``wrong`` makes of torch's results."""

    def plant(module: Any, wrong: Callable[[Any], Any]) -> None:
        right = backends.operator("torch", "fused_grad_norm")
        monkeypatch.setattr(module, "fused_grad_norm", lambda *call: wrong(right(*call)))
        backends.forget()

    return plant


def scaled(results: Any) -> Any:
    """A wrong sum: every group's norm is larger by a thousandth."""
    samples, groups, *others = results
    return samples, groups * 1.001, *others


def raising(results: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


def call(fake: FakeCuda, device: str = "cuda:0", dtype: torch.dtype = FP16, backend: str = "auto") -> Any:
    x, dy = (fake.put(torch.ones(5, d, dtype=dtype), device) for d in (16, 8))
    return ops.fused_grad_norm(x, dy, backend=backend)


@pytest.mark.parametrize(
    ("name", "dtype", "op"),
    [
        ("triton", FP16, "fused_grad_norm"),
        ("cuda", BF16, "fused_grad_norm"),
        *(pytest.param("triton", FP16, op, marks=pytest.mark.slow) for op in backends.OPERATORS[1:]),
        *(pytest.param("cuda", BF16, op, marks=pytest.mark.slow) for op in backends.OPERATORS[1:3]),
        pytest.param("triton", FP32, "fused_grad_norm", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass(fake: FakeCuda, name: str, dtype: torch.dtype, op: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first use")
        assert canary.passed(name, op, DEVICE, dtype), canary.reason(name, op, DEVICE, dtype)
    assert fake.launches and {(device, stream >> 16) for _, device, stream in fake.launches} == {(0, 1)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(scaled, "result 2 of 4 off by 1.00e-03 of its scale"), (raising, "RuntimeError: no kernel image")],
)
def test_a_wrong_backend_is_left_out(fake: FakeCuda, planted: Any, wrong: Any, said: str) -> None:
    """One warning, the next backend, right numbers; by name the backend still runs."""
    planted(triton, wrong)
    named = (
        r"backend='triton' failed its first use for fused_grad_norm with torch.float16 on NVIDIA H200 \(sm_90, cuda:0"
    )
    with pytest.warns(RuntimeWarning, match=f"{named}.*{said}.*torch {torch.__version__[:3]}.*triton.*") as caught:
        found = call(fake)
    assert len(caught) == 1
    assert float(found.group_sq_norms.inner) == 5 * 5 * 16 * 8
    x = fake.put(torch.ones(5, 16, dtype=FP16))
    explained = dispatch.explain(x, x)
    assert explained.plan.backend == "cuda" and "backend 'triton' is left out: its first use failed: " in str(explained)
    assert said in str(explained) and explained.backends["triton"] is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first use")
        call(fake)
        if wrong is scaled:
            assert float(call(fake, backend="triton").group_sq_norms.inner) == pytest.approx(1.001 * 5 * 5 * 16 * 8)
        else:
            with pytest.raises(RuntimeError, match="no kernel image"):
                call(fake, backend="triton")
    assert dispatch.explain(x, x, backend="triton").plan.backend == "triton"


def test_torch_is_left_where_both_are_wrong(fake: FakeCuda, planted: Any) -> None:
    planted(triton, scaled)
    planted(cuda, raising)
    with pytest.warns(RuntimeWarning) as caught:
        found = call(fake, dtype=BF16)
    assert [str(warning.message).split("'")[1] for warning in caught] == ["triton", "cuda"]
    assert float(found.group_sq_norms.inner) == 5 * 5 * 16 * 8
    x = fake.put(torch.ones(5, 16, dtype=BF16))
    assert dispatch.explain(x, x).plan.backend == "torch"


def test_a_nan_where_none_belongs_is_wrong(fake: FakeCuda, planted: Any) -> None:
    """The trial has an infinity in one sample. A kernel that lets it out into a neighbour is found."""

    def leaking(results: Any) -> Any:
        samples, groups, *others = results
        return torch.where(samples.isfinite().all(), samples, torch.nan), groups, *others

    planted(triton, leaking)
    with pytest.warns(RuntimeWarning, match="three groups: result 1 of 4 not finite where it should be"):
        call(fake)


def test_every_device_dtype_and_operator_is_tried_once(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(canary, "_trial", lambda *key: tried.append(key))
    fake.silent = True
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        for dtype in (FP16, BF16, FP16):
            call(fake, device, dtype)
    assert tried == [
        ("triton", "fused_grad_norm", torch.device(device), dtype)
        for device in ("cuda:0", "cuda:1")
        for dtype in (FP16, BF16)
    ]
    for backend in ("triton", "cuda", "torch"):
        call(fake, dtype=FP16, backend=backend)
    assert len(tried) == 4, "a backend that is asked for by name is not tried"
    assert canary.passed("cpu", "fused_grad_norm", torch.device("cpu"), FP32)
    assert len(tried) == 4, "on a CPU there is nothing to try"


def test_the_first_use_follows_the_tensors_device_and_the_current_stream(fake: FakeCuda) -> None:
    fake.silent = True  # where launches go is seen without their results, which the first use then finds wrong
    with fake.stream(3):
        call(fake, "cuda:1")
    assert {(device, stream) for _, device, stream in fake.launches} == {(1, 2 << 16)}
    assert torch.cuda.current_device() == 0
    del fake.launches[:]
    with fake.stream(3):
        call(fake)
    assert {(device, stream) for _, device, stream in fake.launches} == {(0, 1 << 16 | 3)}


def test_it_changes_no_random_state_and_no_setting(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["error"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    with torch.enable_grad():
        call(fake)
        assert torch.is_grad_enabled()
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert modes == ["error", 0, "error"]


def test_nothing_is_tried_inside_a_graph(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.silent = True
    monkeypatch.setattr(canary, "_trial", lambda *key: None)
    with fake.forbidding(capture=True):
        with pytest.raises(RuntimeError, match="not used yet .* call the operator once before the capture, or ask for"):
            call(fake)
        call(fake, backend="triton")
    call(fake)
    with fake.forbidding(capture=True):
        call(fake)


def test_nothing_is_tried_while_tracing(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(canary, "_trial", lambda *key: tried.append(key))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert canary.passed("triton", "grad_dot", DEVICE, FP16) and not tried
    assert canary.passed("triton", "grad_dot", DEVICE, FP16) and len(tried) == 1


def test_threads_share_one_trial(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def slow(*key: Any) -> str:
        tried.append(key)
        time.sleep(0.2)
        return "wrong"

    monkeypatch.setattr(canary, "_trial", slow)
    found: list[bool] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask = lambda: found.append(canary.passed("triton", "grad_dot", DEVICE, FP16))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(tried) == len(caught) == 1 and found == [False] * 4


def test_a_backend_that_calls_the_operator_itself_is_no_endless_loop(fake: FakeCuda, planted: Any) -> None:
    depth = []

    def calling(results: Any) -> Any:
        if not depth:
            depth.append(1)
            call(fake)
        return results

    planted(triton, calling)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first use")
        call(fake)
    assert depth == [1]


def test_no_memory_is_not_the_backends_fault(fake: FakeCuda, planted: Any) -> None:
    def exhausted(results: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    planted(triton, exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        call(fake)
    assert canary.reason("triton", "fused_grad_norm", DEVICE, FP16) is None


def test_the_inputs_are_exact_and_have_no_pattern(fake: FakeCuda) -> None:
    x = canary.counted(198, 136, 1, torch.device("cpu"))
    assert torch.equal(x, x.half().float()) and torch.equal(x, x.bfloat16().float())
    norms = reference.fused_grad_norm(x, canary.counted(198, 200, 2, torch.device("cpu")))[0]
    # As for independent entries: E||sum of 198 outer products||^2 = 198 * 136 * 200 * E[x^2]^2.
    variance = float(x.double().square().mean())
    assert 0.5 < float(norms) / (198 * 136 * 200 * variance**2) < 2
