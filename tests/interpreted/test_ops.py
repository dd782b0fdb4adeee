"""The public functions on the triton backend, interpreted: the very same traps as every other backend."""

from __future__ import annotations

import pytest
import torch

from gradnorm_kernels import backends, ops, traps
from gradnorm_kernels.traps import ALGORITHMS, ODD, TRAPS, Trap, check, check_pairs, check_sketches

# The interpreter multiplies the bit patterns of bfloat16 operands: that dtype is tested on a GPU.
DTYPES = [torch.float32, torch.float16]


#: What each algorithm is asked for: together every path through the kernels, each once, as the interpreter is slow.
WANTED: dict[str, dict[str, bool]] = {
    "wgrad": {"weight_grad": True, "group_gram": True},
    "gram": {"group_gram": True},
    "auto": {"weight_grad": True},
}


#: Every trap under every algorithm and dtype; in `make test` under one, in turns.
COMBINATIONS = [(dtype, algorithm) for dtype in DTYPES for algorithm in ALGORITHMS]
TURNS = [
    pytest.param(
        trap,
        *combination,
        marks=[pytest.mark.slow] * ((i + j) % len(COMBINATIONS) != 0),
        id="-".join(map(str, (trap, *combination))),
    )
    for i, trap in enumerate(TRAPS)
    for j, combination in enumerate(COMBINATIONS)
]


@pytest.mark.parametrize(("trap", "dtype", "algorithm"), TURNS)
def test_traps(trap: Trap, dtype: torch.dtype, algorithm: str) -> None:
    check(trap.build(dtype), "triton", algorithm, runs=1, **WANTED[algorithm])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_traps_of_the_gram_and_the_dot(trap: Trap, dtype: torch.dtype) -> None:
    check_pairs(trap.build(dtype), "triton", "auto", runs=1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_traps_of_the_sketch(trap: Trap, dtype: torch.dtype) -> None:
    check_sketches(trap.build(dtype), "triton", runs=1, sketches=[(7, 5) if dtype == torch.float32 else (None, 5)])


@pytest.mark.parametrize("algorithm", ["auto", *(pytest.param(a, marks=pytest.mark.slow) for a in ("wgrad", "gram"))])
def test_every_combination_of_results_twice(algorithm: str) -> None:
    case = next(trap for trap in TRAPS if trap.name == "groups that take turns").build(torch.float32)
    for weight_grad in (False, True):
        for group_gram in (False, True):
            check(case, "triton", algorithm, weight_grad=weight_grad, group_gram=group_gram)
    check_pairs(case, "triton", algorithm)
    check_sketches(case, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2, dtype=dtype)
    for run in (ops.fused_grad_norm, ops.grad_gram):
        with pytest.raises(RuntimeError, match="backend='triton' cannot run: "):
            run(x, x, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: "):
        ops.grad_dot(x, x, torch.ones(2, 2), backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: "):
        ops.grad_sketch(x, x, None, None, backend="triton")


def test_auto_does_not_interpret() -> None:
    """CPU tensors go to the interpreter only when it is asked for by name."""
    assert backends.unavailable_reason("triton", "fused_grad_norm", "cpu", torch.float32) is None
    from gradnorm_kernels import dispatch

    case = ODD.build(torch.float32)
    assert dispatch.explain(case.x, case.dy, case.cu_seqlens).plan.backend != "triton"


def test_bad_values_are_refused_before_anything_is_launched() -> None:
    case = traps.packed([5, 60], 9, 8, torch.float32)
    for offsets, said in (([1, 65], "start at 0"), ([0, 64], "must end"), ([0, 9, 5, 65], "ascend")):
        with pytest.raises(ValueError, match=said):
            ops.fused_grad_norm(case.x, case.dy, torch.tensor(offsets), backend="triton")
    with pytest.raises(ValueError, match="sample_ids must be at least 0"):
        ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, sample_ids=torch.tensor([0, -1]), backend="triton")
