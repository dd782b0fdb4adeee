"""The kernel of grad_dot, interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import reference
from gradnorm_kernels.backends.triton import dot, launch
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import Case, assert_close, packed, poisoned_memory
from gradnorm_kernels.tuning.tiles import KernelConfig
from tests.interpreted.test_gram import IDS, LENGTHS, prepared

SMALL = KernelConfig("dot", 80, 4, 32, 16, 16, num_warps=4, num_stages=2, group_m=2)


def matrix(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(case.dy.shape[1], case.x.shape[1], generator=generator).to(dtype)


def check(case: Case, v: Tensor) -> Tensor:
    x, dy, segs = prepared(case)
    with poisoned_memory():
        dots, again = (dot.grad_dot(x, dy, v, segs, SMALL) for _ in range(2))
    assert torch.equal(dots.nan_to_num(nan=-7.0), again.nan_to_num(nan=-7.0)), "other bits the second time"
    samples = None if case.group_ids is None else len(case.group_ids)
    ids = {"sample_ids": case.sample_ids, "num_samples": samples}
    expected = reference.grad_dot(case.x, case.dy, v, case.cu_seqlens, **ids)
    # Products of random signs: a sum is held to the root of the sum of its terms' squares.
    finite = case.x.double().nan_to_num(0, 0, 0).norm(dim=1) * case.dy.double().nan_to_num(0, 0, 0).norm(dim=1)
    assert dots.dtype == torch.float64
    assert_close(dots, expected, NORMS[x.dtype], finite.norm())
    return dots


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_of_v(dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    """``v`` of another dtype is taken as float32, and its digits are not lost."""
    case = packed(LENGTHS, 19, 35, dtype, **IDS)
    check(case, matrix(case, v_dtype))


@pytest.mark.parametrize("d_in, d_out", [(1, 1), (16, 300), (33, 16), (64, 257)])
def test_widths(d_in: int, d_out: int) -> None:
    case = packed([40, 1, 30], d_in, d_out, torch.float32)
    check(case, matrix(case, torch.float32))


def test_more_rows_of_v_than_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dot, "_SPLITS", 2)
    case = packed([40, 1, 30], 9, 100, torch.float32)
    check(case, matrix(case, torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_what_is_not_finite_stays_in_its_sample(where: str, value: float) -> None:
    case = packed([10, 40, 30], 9, 8, torch.float32)
    getattr(case, where)[20, 3] = value
    dots = check(case, matrix(case, torch.float32))
    assert dots.isfinite().tolist() == [True, False, True]


def test_a_transposed_and_an_expanded_v() -> None:
    case = packed([40, 3], 20, 20, torch.float32)
    v = matrix(case, torch.float32)
    check(case, v.T)
    check(case, v[:1].expand(20, 20))
    check(case, v[:, :1].expand(20, 20))


def test_samples_without_tokens() -> None:
    case = packed([0, 0], 4, 5, torch.float32)
    x, dy, segs = prepared(case)
    assert torch.equal(dot.grad_dot(x, dy, matrix(case, torch.float32), segs, SMALL), torch.zeros(2).double())


@pytest.mark.parametrize("tensor_memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_kernel_widens_beside_float32_where_that_means_tf32(
    dtype: torch.dtype, tensor_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton multiplies as tf32 on B200 where one operand is converted in the kernel: v would lose digits."""
    taken: list[tuple[torch.dtype, torch.dtype]] = []
    kernel = dot.dot_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., object]:
            def run(*args: Any, **meta: Any) -> object:
                taken.append((args[0].dtype, args[2].dtype))
                return kernel[grid](*args, **meta)

            return run

    monkeypatch.setattr(dot, "dot_kernel", Watched())
    monkeypatch.setattr(launch, "has_tensor_memory", lambda tensor: tensor_memory)
    case = packed(LENGTHS, 19, 35, dtype, **IDS)
    check(case, matrix(case, torch.float32))
    assert set(taken) == {(torch.float32 if tensor_memory else dtype, torch.float32)}
