"""``grad_gram`` and ``grad_dot``: agreement with the float64 reference on the CPU's backends, refusals, opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gradnorm_kernels import dispatch, ops, reference, traps
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import ALGORITHMS, TRAPS, Trap, assert_close, check_pairs
from gradnorm_kernels.tuning import costs as tuning
from tests.ops.on_cpu import BACKENDS, DTYPES, packed, served

OPS = torch.ops.gradnorm_kernels
X, DY = torch.randn(10, 4), torch.randn(10, 3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_traps(backend: str, trap: Trap, algorithm: str) -> None:
    for dtype in served(backend):
        check_pairs(trap.build(dtype), backend, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_and_tiles_that_do_not_divide(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, tiles of a few tokens: what only large layers and long batches reach by default."""
    small = tuning.Costs(64, 64, epilogue=18.0, gram=1.0, gram_token=0.0, pairs=0.5, workspace=37 * 10, gram_tile=7)
    monkeypatch.setattr(tuning, "costs", lambda *shape: small)
    dispatch.choose.cache_clear()
    case = traps.packed([9, 30, 0, 9, 9, 41, 1], 37, 53, torch.float32, group_ids=[0, 2, 0, 1, 2, 2, 1])
    check_pairs(case, "torch", algorithm)
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_dot_with_v_of_any_dtype(backend: str, dtype: torch.dtype, algorithm: str) -> None:
    if dtype not in served(backend):
        return
    x, dy, cu_seqlens = packed([1, 0, 333, 13, 200, 97], 67, 83, dtype)
    samples = torch.tensor([3, 1, 0, 5, 2, 3])
    v = torch.randn(83, 67, generator=torch.Generator().manual_seed(0))
    for v_dtype in DTYPES:
        # A v that the products' dtype cannot hold is rounded to it: compare with the rounded one.
        held = v.to(v_dtype) if dtype == torch.float64 else v.to(v_dtype).float()
        dots = ops.grad_dot(x, dy, v.to(v_dtype), cu_seqlens, sample_ids=samples, backend=backend)
        assert_close(dots, reference.grad_dot(x, dy, held, cu_seqlens, sample_ids=samples), NORMS[dtype])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be"):
        ops.grad_gram(X[0], DY)
    with pytest.raises(ValueError, match=r"v must have the weight's shape \[d_out, d_in\] = \[3, 4\], got \[4, 3\]"):
        ops.grad_dot(X, DY, torch.ones(4, 3))
    with pytest.raises(TypeError, match="v must be float32"):
        ops.grad_dot(X, DY, torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="v must be on x's device"):
        ops.grad_dot(X, DY, torch.ones(3, 4, device="meta"))
    with pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got NoneType"):
        ops.grad_dot(X, DY, None)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_is_not_here_says_so(name: str) -> None:
    for run in (
        lambda: ops.fused_grad_norm(X, DY, backend=name),
        lambda: ops.grad_gram(X, DY, backend=name),
        lambda: ops.grad_dot(X, DY, torch.ones(3, 4), backend=name),
    ):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: .*use backend='torch'"):
            run()


@pytest.mark.parametrize("samples", [None, torch.tensor([1, 0, 1])])
def test_opcheck(samples: Tensor | None) -> None:
    x, dy, cu_seqlens = torch.randn(20, 5), torch.randn(20, 4), torch.tensor([0, 5, 12, 20])
    opcheck(OPS.grad_gram, (x, dy, cu_seqlens, samples, None, "auto", "auto"))
    opcheck(OPS.grad_dot, (x, dy, torch.randn(4, 5), cu_seqlens, samples, None, "auto"))
