"""The kernel of grad_sketch, interpreted: segments cut into splits, and values on the device that are out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradnorm_kernels.backends.triton import sketch
from gradnorm_kernels.traps import check_sketches, packed


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
