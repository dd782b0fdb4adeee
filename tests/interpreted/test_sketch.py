"""The kernel of grad_sketch, interpreted: segments cut into splits, and values on the device that are out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels.backends.triton import launch, sketch
from gradnorm_kernels.traps import check_sketches, packed
from tests.interpreted.test_gram import prepared


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_segments_are_cut_into_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than some segments have tokens, and a sample whose segments are apart."""
    launched: list[int] = []
    kernel = sketch.sketch_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., object]:
            def run(*args: Any, **meta: Any) -> object:
                launched.append(len(args[4]))  # the parts
                return kernel[grid](*args, **meta)

            return run

    monkeypatch.setattr(sketch, "sketch_kernel", Counted())
    monkeypatch.setattr(sketch, "_PROGRAMS", 5 * splits)
    monkeypatch.setattr(sketch, "_SPLIT_TOKENS", 1)
    case = packed([90, 1, 0, 33, 40], 20, 24, torch.float32, sample_ids=[1, 0, 2, 1, 4])
    check_sketches(case, "triton", runs=1)
    assert max(launched) == 5 * splits


@pytest.mark.parametrize("tensor_memory", [True, False])
def test_no_kernel_widens_beside_float32_where_that_means_tf32(
    tensor_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x of 16 bits that is not projected, dy projected to float32: as on a GPU that makes tf32 of such a pair."""
    taken: list[tuple[torch.dtype, torch.dtype]] = []
    widened = launch.widened

    def watched(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left, right = widened(left, right)
        taken.append((left.dtype, right.dtype))
        return left, right

    monkeypatch.setattr(sketch, "widened", watched)
    monkeypatch.setattr(launch, "has_tensor_memory", lambda tensor: tensor_memory)
    case = packed([9, 33], 20, 24, torch.bfloat16)
    c_out = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
    segments = prepared(case)[2]
    found = sketch.grad_sketch(case.x, case.dy, None, c_out, segments)
    wanted = torch.stack(
        [c_out.double().T @ case.dy[a:b].double().T @ case.x[a:b].double() for a, b in ((0, 9), (9, 42))]
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert taken == [(torch.float32 if tensor_memory else torch.bfloat16, torch.float32)]
