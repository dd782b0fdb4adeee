"""Bad input: the right exception, with a text that names the argument, and the same from op and fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradnorm_kernels import ops

X, DY, CU = torch.randn(10, 4), torch.randn(10, 3), torch.tensor([0, 4, 10])

#: Arguments that differ from a good call, the exception, a part of its text. Wrong whatever the tensors hold:
SHAPES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list; wrap it"),
    ({"sample_ids": [0, 1]}, TypeError, "sample_ids must be a torch.Tensor or None, got list"),
    ({"x": X.long()}, TypeError, "x must be float32"),
    ({"dy": DY.half()}, TypeError, "dy must have x's dtype (torch.float32), got torch.float16"),
    ({"dy": DY.to("meta")}, ValueError, "dy must be on x's device (cpu), got meta"),
    ({"x": X[0]}, ValueError, "x must be [T, d_in] (packed) or [B, L, d_in], got shape [4]"),
    ({"dy": DY[:9]}, ValueError, "dy must be [10, 'd_out'], got [9, 3]"),
    ({"dy": DY[None]}, ValueError, "dy must have the rows of x"),
    ({"x": X[None], "dy": DY[None]}, ValueError, "cu_seqlens is for packed x [T, d_in]"),
    ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    ({"cu_seqlens": CU[None]}, ValueError, "cu_seqlens must be one-dimensional [S+1], got shape [1, 3]"),
    ({"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens must have at least one entry"),
    ({"sample_ids": torch.tensor([0])}, ValueError, "sample_ids must have one entry for each segment (2), got 1"),
    ({"sample_ids": torch.tensor([0.0, 1.0])}, TypeError, "sample_ids must be int32 or int64"),
    ({"group_ids": torch.tensor([0, 1, 1])}, ValueError, "group_ids must have one entry for each sample (2), got 3"),
    ({"group_ids": torch.tensor([True, False])}, TypeError, "group_ids must be int32 or int64, got torch.bool"),
    ({"num_samples": 3}, ValueError, "num_samples must equal the number of segments (2)"),
    ({"num_samples": -1}, ValueError, "num_samples must be at least 0, got -1"),
    ({"num_groups": 2}, ValueError, "num_groups must be 1 when group_ids is left out, got 2"),
    ({"algorithm": "ghost"}, ValueError, "algorithm must be one of 'auto', 'wgrad', 'gram', got 'ghost'"),
    ({"backend": "mps"}, ValueError, "backend must be one of 'auto', 'torch', 'cpu', 'triton', 'cuda', got 'mps'"),
]
#: Wrong because of what the integer tensors hold: only a call with data can tell.
VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": torch.tensor([1, 4, 10])}, ValueError, "cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, "must end at the number of rows of x (10), got 9"),
    ({"cu_seqlens": torch.tensor([0, 11, 10])}, ValueError, "cu_seqlens must ascend, got 11 then 10 at position 2"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, "must end at the number of rows of x (10), got 0"),
    ({"sample_ids": torch.tensor([0, -2])}, ValueError, "sample_ids must be at least 0, got -2 at position 1"),
    (
        {"sample_ids": torch.tensor([0, 2]), "num_samples": 2},
        ValueError,
        "sample_ids must be below the number of samples (2), got 2 at position 1",
    ),
    (
        {"sample_ids": torch.tensor([0, 2]), "group_ids": torch.tensor([0, 0])},
        ValueError,
        "sample_ids must be below the number of samples (2), got 2",
    ),
    ({"group_ids": torch.tensor([-1, 0])}, ValueError, "group_ids must be at least 0, got -1"),
    (
        {"group_ids": torch.tensor([0, 1]), "num_groups": 1},
        ValueError,
        "group_ids must be below the number of groups (1)",
    ),
]


def call(changes: dict[str, Any]) -> object:
    return ops.fused_grad_norm(**{"x": X, "dy": DY, "cu_seqlens": CU, **changes})


@pytest.mark.parametrize(("changes", "error", "text"), SHAPES + VALUES)
def test_what_is_refused_and_how(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        call(changes)
    assert text in str(raised.value)


@pytest.mark.parametrize(("changes", "error", "text"), [case for case in SHAPES if "meta" not in case[2]])
def test_the_fake_refuses_the_same(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {"x": X, "dy": DY, "cu_seqlens": CU, **changes}
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises(error) as raised:
            ops.fused_grad_norm(**fakes)
    assert text in str(raised.value)


def test_values_are_not_looked_at_in_the_fake() -> None:
    with FakeTensorMode() as mode:
        x, dy, cu_seqlens = (mode.from_tensor(t) for t in (X, DY, torch.tensor([5, 4, 3])))
        assert ops.fused_grad_norm(x, dy, cu_seqlens).sample_sq_norms.shape == (2,)


def test_the_other_ops_refuse_too() -> None:
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
