"""Guarantees of the GPU backends beyond right numbers: the same bits, no synchronisation, graphs, streams, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import ops, tolerances, traps
from gradnorm_kernels.traps import ALGORITHMS, ALIGNED, LARGE, ODD, Case, Trap, assert_same_bits

pytestmark = pytest.mark.gpu


def call(case: Case, backend: str, algorithm: str = "auto") -> list[Tensor]:
    """All three ops with every result, and with all sizes given, so that nothing has to be read from the device."""
    kwargs: dict[str, Any] = {"algorithm": algorithm, "backend": backend, "num_samples": 8}
    call = (case.x, case.dy, case.cu_seqlens)
    result = ops.fused_grad_norm(
        *call,
        sample_ids=case.sample_ids,
        group_ids=case.group_ids,
        num_groups=5,
        weight_grad=True,
        group_gram=True,
        **kwargs,
    )
    gram = ops.grad_gram(*call, sample_ids=case.sample_ids, **kwargs)
    v = torch.ones(case.dy.shape[1], case.x.shape[1], dtype=case.x.dtype, device=case.x.device)
    dots = ops.grad_dot(*call[:2], v, call[2], sample_ids=case.sample_ids, backend=backend, num_samples=8)
    return [*(tensor for tensor in result if tensor is not None), gram, dots]


NAMES = ("sample_sq_norms", "group_sq_norms", "weight_grad", "group_gram", "grad_gram", "grad_dot")


@pytest.fixture(params=(ODD, ALIGNED, LARGE), ids=("odd", "aligned", "large"))
def layout(request: pytest.FixtureRequest, device: torch.device) -> Trap:
    """The layout decides which loads run and whether tokens are split."""
    trap: Trap = request.param
    if trap is not ODD and device.type == "cpu":
        pytest.skip("too large for the interpreter, or equivalent there to the odd layout")
    return trap


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_every_time(
    algorithm: str, layout: Trap, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = layout.build(dtype).to(device)
    first = call(case, backend, algorithm)
    for _ in range(30 if device.type == "cuda" else 1):
        assert_same_bits(first, call(case, backend, algorithm), NAMES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_is_read_back(algorithm: str, layout: Trap, backend: str, device: torch.device, gpu_only: None) -> None:
    """Offsets and ids on the device, sizes given: no operation may wait for the device."""
    case = layout.build(torch.float16).to(device)
    expected = call(case, backend, algorithm)  # compiles first
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = call(case, backend, algorithm)
        with pytest.raises(RuntimeError, match="synchroni"):
            found[0].sum().item()  # shows that the mode detects synchronisation
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_same_bits(expected, found, NAMES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_a_graph(algorithm: str, layout: Trap, backend: str, device: torch.device, gpu_only: None) -> None:
    """Captured once, replayed over other inputs of the same sizes."""
    case, other = layout.build(torch.float16).to(device), layout.build(torch.float16).to(device)
    other.x.mul_(0.5)
    other.dy.add_(0.25)
    other.cu_seqlens.copy_(torch.tensor([0, 9, 9, 500, 501, 1400, 1800, 1801, 1901], device=device))
    expected = call(other, backend, algorithm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(case, backend, algorithm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(case, backend, algorithm)
    for mine, theirs in zip((case.x, case.dy, case.cu_seqlens), (other.x, other.dy, other.cu_seqlens), strict=True):
        mine.copy_(theirs)
    for tensor in found:
        tensor.fill_(-7.0)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(expected, found, NAMES)


def test_on_another_stream(layout: Trap, backend: str, device: torch.device, gpu_only: None) -> None:
    """The launch goes to the current stream, so it waits for inputs that a slow kernel on that stream writes."""
    case = layout.build(torch.float16).to(device)
    expected = call(case, backend)
    late_x, late_dy = torch.full_like(case.x, float("nan")), torch.full_like(case.dy, float("nan"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late_x.copy_(case.x)
        late_dy.copy_(case.dy)
        late = Case(late_x, late_dy, case.cu_seqlens, case.sample_ids, case.group_ids)
        found = call(late, backend)
    stream.synchronize()
    assert_same_bits(expected, found, NAMES)


def test_under_compile(backend: str, device: torch.device, gpu_only: None) -> None:
    case = ODD.build(torch.float16).to(device)
    expected = call(case, backend)
    torch._dynamo.reset()
    found = torch.compile(lambda x, dy: call(Case(x, dy, case.cu_seqlens, case.sample_ids, case.group_ids), backend))(
        case.x, case.dy
    )
    assert_same_bits(expected, found, NAMES)


def _norms_in_pieces(x: Tensor, dy: Tensor, lengths: list[int]) -> Tensor:
    """||G_i||^2 from plain products in float32, a block of rows at a time."""
    norms = []
    for xs, dys in zip(x.split(lengths), dy.split(lengths), strict=True):
        total = torch.zeros(dy.shape[1], x.shape[1], device=x.device)
        for a, b in zip(xs.split(1 << 16), dys.split(1 << 16), strict=True):
            total += b.float().T @ a.float()
        norms.append(total.double().square().sum())
    return torch.stack(norms)


@pytest.mark.parametrize("wide", ["x", "dy"])
@pytest.mark.parametrize("algorithm", ["wgrad", "auto"])
def test_more_than_two_billion_elements(
    algorithm: str, wide: str, backend: str, device: torch.device, gpu_only: None
) -> None:
    """2^20 tokens of 2304 features: 32-bit offsets would overflow."""
    lengths = [300_000, 1, 0, 777, 400_000, (1 << 20) - 700_778]
    tokens, widths = sum(lengths), (2304, 48) if wide == "x" else (48, 2304)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator(device=device).manual_seed(0)
    x, dy = (torch.randn(tokens, d, generator=generator, device=device, dtype=torch.bfloat16) for d in widths)
    assert max(x.numel(), dy.numel()) > 1 << 31
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    found = ops.fused_grad_norm(x, dy, offsets, weight_grad=True, algorithm=algorithm, backend=backend)
    expected = _norms_in_pieces(x, dy, lengths)
    chains = [max(length, *widths) for length in lengths]
    allowed = expected.new_tensor([tolerances.norms(x.dtype, device, chain) for chain in chains])
    error = (found.sample_sq_norms - expected).abs()
    assert (error <= allowed * expected).all(), (
        f"sample_sq_norms: off by {(error / expected).tolist()}, allowed {allowed.tolist()}: found "
        f"{found.sample_sq_norms.tolist()}, expected {expected.tolist()}"
    )
    dots = ops.grad_dot(x, dy, torch.ones(widths[1], widths[0], device=device), offsets, backend=backend)
    sums = torch.stack(
        [
            (a.double().sum(1) * b.double().sum(1)).sum()
            for a, b in zip(x.split(lengths), dy.split(lengths), strict=True)
        ]
    )
    terms = float(x.shape[1] * dy.shape[1] * tokens) ** 0.5
    assert (dots - sums).abs().max() < 1e-4 * terms, f"grad_dot: found {dots.tolist()}, expected {sums.tolist()}"


def test_a_weight_of_more_than_two_billion_elements(backend: str, device: torch.device, gpu_only: None) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator(device=device).manual_seed(0)
    x, dy = (torch.randn(64, d, generator=generator, device=device, dtype=torch.bfloat16) for d in (32768, 65664))
    offsets = torch.tensor([0, 20, 64], device=device)
    found = ops.fused_grad_norm(x, dy, offsets, weight_grad=True, algorithm="wgrad", backend=backend)
    xs, dys = x.double(), dy.double()
    products = (xs @ xs.T) * (dys @ dys.T)
    expected = torch.stack([products[:20, :20].sum(), products[20:, 20:].sum()])
    torch.testing.assert_close(found.sample_sq_norms, expected, rtol=tolerances.NORMS[x.dtype], atol=0)
    assert found.weight_grad is not None
    corner = dys[:, -64:].T @ xs[:, -64:]
    error = (found.weight_grad[-64:, -64:].double() - corner).abs().max() / corner.abs().max()
    assert error < tolerances.WEIGHT_GRAD[x.dtype], f"weight_grad: its last corner is off by {float(error):.2e}"


def _peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def test_memory_besides_dw(backend: str, device: torch.device, gpu_only: None) -> None:
    """A layer of a 7B model, 64k tokens, 64 samples: the memory of a call besides its results."""
    x, dy = (torch.randn(65536, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.arange(0, 65537, 1024, device=device)

    def run() -> object:
        return ops.fused_grad_norm(x, dy, offsets, weight_grad=True, algorithm="wgrad", backend=backend)

    run()  # what a library allocates once, in its first call, is not counted
    besides = _peak(run) - 4096 * 4096 * 2
    assert besides < 16 << 20, f"{besides / 2**20:.1f} MiB besides dW, 16 allowed"


def test_streams_of_calls_do_not_share_memory(backend: str, device: torch.device) -> None:
    """The results of a call do not change while later calls run."""
    cases = [traps.packed([30 + i, 100, 7], 48, 40, torch.float16).to(device) for i in range(4)]
    first = [ops.fused_grad_norm(c.x, c.dy, c.cu_seqlens, weight_grad=True, backend=backend) for c in cases]
    kept = [[t.clone() for t in result if t is not None] for result in first]
    for c in cases:
        ops.fused_grad_norm(c.x, c.dy, c.cu_seqlens, weight_grad=True, backend=backend)
    for result, copies in zip(first, kept, strict=True):
        assert_same_bits([t for t in result if t is not None], copies, NAMES[: len(copies)])
