"""``grad_sketch``: agreement with the float64 reference on the CPU's backends, refusals, opcheck, torch.compile.

What the projections do to U is in ``tests/estimation/test_sketches.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gradnorm_kernels as gk
from gradnorm_kernels import backends, dispatch, ops, reference
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import TRAPS, Trap, assert_close, check_sketches
from tests.ops.on_cpu import BACKENDS, DTYPES, packed, served

OPS = torch.ops.gradnorm_kernels
X, DY, CU = torch.randn(20, 5), torch.randn(20, 4), torch.tensor([0, 5, 12, 20])
C_IN, C_OUT = torch.randn(5, 3), torch.randn(4, 2)


@pytest.mark.parametrize("trap", TRAPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_traps(backend: str, trap: Trap) -> None:
    for dtype in served(backend):
        check_sketches(trap.build(dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    if dtype not in served(backend):
        return
    x, dy, cu_seqlens = packed([1, 0, 333, 5000, 13, 13], 67, 83, dtype)
    terms = (x.double().norm(dim=1) * dy.double().norm(dim=1)).norm()
    for c_dtype in DTYPES:
        c_in, c_out = (torch.randn(d, 9, generator=torch.Generator().manual_seed(d)).to(c_dtype) for d in (67, 83))
        # A projection that the products' dtype cannot hold is rounded to it: compare with the rounded one.
        held = [c if dtype == torch.float64 else c.float() for c in (c_in, c_out)]
        found = ops.grad_sketch(x, dy, c_in, c_out, cu_seqlens, backend=backend)
        assert_close(found, reference.grad_sketch(x, dy, *held, cu_seqlens), NORMS[dtype], terms)


@pytest.mark.parametrize("ids", [{}, {"sample_ids": [2, 0, 2], "group_ids": [1, 0, 0]}, {"sample_ids": [1, 0, 1]}])
def test_as_a_mode_of_fused_grad_norm(ids: dict[str, list[int]]) -> None:
    tensors: dict[str, Any] = {name: torch.tensor(value) for name, value in ids.items()}
    plain = gk.fused_grad_norm(X, DY, CU, **tensors, weight_grad=True)
    found = gk.fused_grad_norm(X, DY, CU, **tensors, weight_grad=True, sketch=(C_IN, None))
    assert plain.sketches is None and found.sketches is not None
    for name in ("sample_sq_norms", "group_sq_norms", "weight_grad"):
        assert torch.equal(getattr(plain, name), getattr(found, name))
    assert found.sketches.shape == (len(found.sample_sq_norms), 4, 3)
    samples = tensors.get("sample_ids")
    assert torch.equal(found.sketches, gk.grad_sketch(X, DY, C_IN, None, CU, sample_ids=samples))


def test_both_sides_whole_gives_the_gradients() -> None:
    found = ops.grad_sketch(X, DY, None, None, CU)
    assert_close(found, reference.sample_gradients(X, DY, CU), 1e-6)


def test_a_row_per_sample_and_no_graph() -> None:
    x = X[None].requires_grad_()
    found = ops.grad_sketch(x, DY[None], C_IN.clone().requires_grad_(), None)
    assert found.shape == (1, 4, 3) and not found.requires_grad


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"c_in must have one row per feature of x, \[5, r\], got \[4, 2\]; None keeps"
    ):
        ops.grad_sketch(X, DY, C_OUT, None)
    with pytest.raises(ValueError, match=r"c_out must have one row per feature of dy, \[4, r\], got \[4\]"):
        ops.grad_sketch(X, DY, None, torch.ones(4))
    with pytest.raises(TypeError, match="c_out must be float32"):
        ops.grad_sketch(X, DY, None, torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="c_in must be on x's device"):
        ops.grad_sketch(X, DY, torch.ones(5, 2, device="meta"), None)
    with pytest.raises(TypeError, match=r"c_in must be a torch\.Tensor or None, got int"):
        ops.grad_sketch(X, DY, 3, None)
    with pytest.raises(TypeError, match="sketch must be a pair .*got Tensor"):
        ops.fused_grad_norm(X, DY, sketch=C_IN)
    with pytest.raises(TypeError, match="sketch must be a pair .*got tuple of length 1"):
        ops.fused_grad_norm(X, DY, sketch=(C_IN,))
    with pytest.raises(ValueError, match="must end at the number of rows"):
        ops.grad_sketch(X, DY, C_IN, C_OUT, torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: "):
        ops.grad_sketch(X, DY, C_IN, C_OUT, backend="cuda")


def test_backends_that_have_it() -> None:
    assert [name for name in backends.NAMES if backends.implements(name, "grad_sketch")] == ["torch", "cpu", "triton"]
    problem = dispatch.Problem(dispatch.tuning.chip(X.device), 20, 5, 4, 3, 1, op="grad_sketch")
    expected = "cpu" if backends.unavailable_reason("cpu") is None else "torch"
    assert dispatch.choose(problem).plan.backend == expected


@pytest.mark.parametrize("samples", [None, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("c_out", [None, C_OUT])
def test_opcheck(c_out: Tensor | None, samples: Tensor | None) -> None:
    opcheck(OPS.grad_sketch, (X, DY, C_IN, c_out, CU, samples, None, "auto"))
    opcheck(OPS.grad_sketch, (X.bfloat16(), DY.bfloat16(), None, c_out, CU, samples, None, "auto"))


def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        found = ops.fused_grad_norm(x * 2, dy, CU, sketch=(C_IN, C_OUT))
        return found.sketches, ops.grad_sketch(x, dy, None, C_OUT, CU) + 1

    torch._dynamo.reset()
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(X, DY), step(X, DY), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
