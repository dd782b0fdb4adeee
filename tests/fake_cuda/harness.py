"""That the device without a GPU finds what it is for: one slip at a time, planted into an expression or the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradnorm_kernels as gk
from gradnorm_kernels import segments, traps
from gradnorm_kernels.backends import triton
from gradnorm_kernels.backends.triton import wgrad_schedule
from gradnorm_kernels.tracking import rows as tracking_rows
from tests.fake_cuda.device import FakeCuda, Unordered, Waited

Slip = Callable[[Tensor, Tensor], Any]  # of floats [4, 3] and of places [2], both on the device
CPU = torch.ones(4, 3)

WAITS: dict[str, Slip] = {
    "a value": lambda x, i: x.sum().item(),
    "a condition": lambda x, i: bool((x > 0).all()),
    "a list": lambda x, i: i.tolist(),
    "to the host": lambda x, i: x.cpu(),
    "to the host, not waited for": lambda x, i: x.to("cpu", non_blocking=True),
    "a list to the device": lambda x, i: torch.tensor([1, 2], device=x.device),
    "a tensor to the device": lambda x, i: CPU.to(x.device),
    "a copy from the host": lambda x, i: x.copy_(CPU),
    "places that hold": lambda x, i: x.nonzero(),
    "rows of a mask": lambda x, i: x[x[:, 0] > 0],
    "values to a mask": lambda x, i: x.__setitem__(x > 0, x.new_zeros(12)),
    "an index on the host": lambda x, i: x[torch.tensor([0, 1])],
    "unknown sizes": lambda x, i: x[:2].repeat_interleave(i, 0),
    "distinct values": lambda x, i: i.unique(),
    "counts": lambda x, i: torch.bincount(i),
    "the same": lambda x, i: torch.equal(x, x),
    "checked lengths": lambda x, i: torch.segment_reduce(x, "sum", lengths=torch.full_like(i, 2)),
    "a number of the host": lambda x, i: torch.where(x > 0, x, torch.tensor(1.0)),
    "a number to a place": lambda x, i: x.__setitem__((0, 0), 1.0),
    "a slice": lambda x, i: x[: i[1]],
}
FREE: dict[str, Slip] = {
    "a small copy": lambda x, i: CPU.to(x.device, non_blocking=True),
    "a known size": lambda x, i: x[:2].repeat_interleave(i.clamp(2, 2), 0, output_size=4),
    "rows by place": lambda x, i: x[i],
    "a number to places": lambda x, i: x.__setitem__(slice(0, 2), 1.0),
    "a filled mask": lambda x, i: x.masked_fill_(x > 0, 1.0),
    "a number": lambda x, i: torch.where(x > 0, x, 1.0) + torch.tensor(2.0),
    "sums of places": lambda x, i: i.cumsum(0) + i.new_zeros(4).index_add_(0, i, i)[:2],
    "a wide product": lambda x, i: torch.mm(x.half(), x.half().T, out_dtype=torch.float32),
}


@pytest.fixture
def given(fake: FakeCuda) -> tuple[Tensor, Tensor]:
    return fake.put(torch.rand(4, 3)), fake.put(torch.tensor([1, 3]))


@pytest.mark.parametrize("slip", WAITS)
def test_what_waits_is_found(fake: FakeCuda, given: tuple[Tensor, Tensor], slip: str) -> None:
    with fake.forbidding(waits=True), pytest.raises(Waited):
        WAITS[slip](*given)


@pytest.mark.parametrize("slip", FREE)
def test_what_does_not_wait_is_let_through(fake: FakeCuda, given: tuple[Tensor, Tensor], slip: str) -> None:
    with fake.forbidding(waits=True, any_order=True):
        FREE[slip](*given)
    assert fake.waits == []


def test_a_graph_takes_nothing_from_the_host(fake: FakeCuda, given: tuple[Tensor, Tensor]) -> None:
    with fake.forbidding(capture=True), pytest.raises(Waited, match="every replay"):
        FREE["a small copy"](*given)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, other: x + CPU,
        lambda x, other: torch.cat([x, CPU]),
        lambda x, other: x @ CPU.T,
        lambda x, other: torch.searchsorted(x[:, 0].contiguous(), torch.ones(2)),
        lambda x, other: x.new_zeros(4).scatter_(0, torch.tensor([1]), 1.0),
        lambda x, other: torch.mm(x, torch.zeros(3, 1, device="cuda:1")),
        lambda x, other: x + other,
        lambda x, other: torch.stack([x.sum(), torch.tensor(1.0)]),
    ],
)
def test_two_devices_in_one_expression(fake: FakeCuda, given: tuple[Tensor, Tensor], mixed: Slip) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        mixed(given[0], fake.put(torch.rand(4, 3), "cuda:1"))


def test_products_of_integers_are_not_there(given: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="not implemented on CUDA"):
        given[1][None] @ given[1][:, None]


def fused(fake: FakeCuda) -> Any:
    case = traps.packed([9, 4, 5], 32, 16, torch.float16, group_ids=[1, 0, 1])
    tensors = [fake.put(t) for t in (case.x, case.dy, case.cu_seqlens, case.group_ids) if t is not None]
    ids = {"group_ids": tensors[3], "num_groups": 2}
    return gk.fused_grad_norm(*tensors[:3], **ids, weight_grad=True, algorithm="gram", backend="triton")


def test_slips_in_the_library_are_found(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.silent = True

    def planted(module: Any, name: str, changed: Callable[..., Any], error: type[Exception], said: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, changed)
            with fake.forbidding(capture=True, any_order=True), pytest.raises(error, match=said):
                fused(fake)

    def read(tensor: Tensor) -> Tensor:
        assert tensor.flatten()[0].item() != 2
        return plain(tensor)

    def on_host(segments: Any, *sizes: int) -> Any:
        object.__setattr__(segments, "group", segments.group.inner)
        return build(segments, *sizes)

    def scattered(parts: Tensor, spans: Tensor) -> Tensor:
        return parts.new_zeros(len(spans)).index_add_(0, spans[:, 0].long(), parts.new_zeros(len(spans)))

    with fake.forbidding(capture=True, any_order=True):
        fused(fake)
    plain, build = segments.rows, triton.wgrad.build
    planted(triton.table, "rows", read, Waited, "reads a value")
    planted(triton.wgrad, "build", on_host, AssertionError, "schedule_kernel: group_ptr is on cpu")
    planted(triton.gram, "position_sums", scattered, Unordered, "no fixed order")
    away = lambda tensor: torch.cuda.device(1)  # noqa: E731
    planted(wgrad_schedule, "on_device", away, AssertionError, "is on cuda:0, and the launch goes to cuda:1")


def test_a_slip_in_a_hook_is_found(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook raises on autograd's thread comes out of backward."""
    layer = torch.nn.Linear(3, 2)
    for name, parameter in layer.named_parameters():
        setattr(layer, name, torch.nn.Parameter(fake.put(parameter)))
    tracker = gk.GradNormTracker(torch.nn.Sequential(layer), "all")
    x = fake.put(torch.rand(4, 5, 3))
    with tracker.microbatch(list("aabb")):
        layer(x).sum().backward()  # verified: this reads values
    monkeypatch.setattr(tracking_rows, "on_gpu", lambda tensor: False)
    fake.silent = True
    refused = pytest.raises(RuntimeError, match="expected all tensors on one device")
    with fake.forbidding(waits=True, any_order=True), refused, tracker.microbatch(list("aabb")):
        layer(x).sum().backward()
