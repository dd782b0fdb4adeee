"""The operators under torch.compile: no graph break, no part in the backward pass, sizes that only data determine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import ops

X, DY, CU = torch.randn(20, 5), torch.randn(20, 4), torch.tensor([0, 5, 12, 20])
SAMPLES, GROUPS = torch.tensor([1, 0, 1]), torch.tensor([0, 1])


def compiled(function: Any, **kwargs: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def step(x: Tensor, dy: Tensor, cu_seqlens: Tensor) -> tuple[Tensor | None, ...]:
        x = x * 2
        norms = ops.fused_grad_norm(
            x, dy, cu_seqlens, sample_ids=SAMPLES, group_ids=GROUPS, num_groups=2, weight_grad=True, group_gram=True
        )
        batch = ops.fused_grad_norm(x[None], dy[None])
        gram = ops.grad_gram(x, dy, cu_seqlens, sample_ids=SAMPLES, num_samples=2)
        dots = ops.grad_dot(x, dy, norms.weight_grad, cu_seqlens)
        return (*norms, batch.sample_sq_norms, batch.weight_grad, gram, dots + 1)

    run = compiled(step, fullgraph=True, dynamic=dynamic)
    for x, dy, cu_seqlens in ((X, DY, CU), (X[:13], DY[:13], torch.tensor([0, 5, 5, 13]))):
        for a, b in zip(run(x, dy, cu_seqlens), step(x, dy, cu_seqlens), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_compiled_training_step() -> None:
    """Inputs that require grad: the op is no part of the backward, and the rest of the graph is untouched."""

    def step(weight: Tensor) -> tuple[Tensor, Tensor]:
        y = X @ weight
        return y.square().sum(), ops.fused_grad_norm(y, DY, CU).sample_sq_norms

    weight = torch.randn(5, 6, requires_grad=True)
    loss, norms = compiled(step, fullgraph=True)(weight)
    assert not norms.requires_grad
    loss.backward()
    expected = torch.autograd.grad(step(weight)[0], weight)[0]
    assert weight.grad is not None and torch.allclose(weight.grad, expected)


def test_sizes_from_data_compile_with_a_graph_break_or_dynamic_shapes() -> None:
    def step(x: Tensor, dy: Tensor) -> Tensor:
        return ops.fused_grad_norm(x, dy, CU, sample_ids=SAMPLES).sample_sq_norms * 2

    assert torch.equal(compiled(step)(X, DY), step(X, DY))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(step, fullgraph=True)(X, DY), step(X, DY))
