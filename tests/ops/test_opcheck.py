"""As torch.library operators: opcheck, torch.compile without a graph break, and what is allocated on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_kernels import ops

OPS = torch.ops.gradnorm_kernels
X, DY, CU = torch.randn(20, 5), torch.randn(20, 4), torch.tensor([0, 5, 12, 20])
SAMPLES, GROUPS = torch.tensor([1, 0, 1]), torch.tensor([0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [
        (None, None, None, None, None, False, False),
        (CU, None, None, None, None, True, False),
        (CU, SAMPLES, GROUPS, None, 2, True, True),
        (CU, SAMPLES, None, 3, None, False, True),
        (CU, SAMPLES, None, None, None, True, False),  # N known only from the data
        (CU, SAMPLES, GROUPS, None, None, True, True),  # K known only from the data
    ],
)
def test_opcheck_fused_grad_norm(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    opcheck(OPS.fused_grad_norm, (X.to(dtype), DY.to(dtype), *arguments, "auto", "auto"))


def test_opcheck_batches_and_inputs_that_require_grad() -> None:
    x, dy = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 4)
    opcheck(OPS.fused_grad_norm, (x, dy, None, None, None, None, None, True, True, "wgrad", "torch"))


@pytest.mark.parametrize("samples", [None, SAMPLES])
def test_opcheck_the_others(samples: Tensor | None) -> None:
    opcheck(OPS.grad_gram, (X, DY, CU, samples, None, "auto", "auto"))
    opcheck(OPS.grad_dot, (X, DY, torch.randn(4, 5), CU, samples, None, "auto"))


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


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation inside makes; views of ``inputs`` do not count."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("algorithm", ["wgrad", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(algorithm: str, dtype: torch.dtype) -> None:
    """No T x T and no N x d_out x d_in, which are 5 and 12 times the size of an input here."""
    tokens, d, samples = 4096, 768, 64
    x, dy = torch.randn(tokens, d).to(dtype), torch.randn(tokens, d).to(dtype)
    cu_seqlens = torch.arange(0, tokens + 1, tokens // samples)
    kernel = ops._fused_grad_norm  # below the dispatcher, which a mode would see as one operation
    for groups in (None, torch.arange(samples) % 4):
        with Largest(x, dy) as largest:
            kernel(x, dy, cu_seqlens, None, groups, None, None, False, groups is not None, algorithm, "torch")
        # As large as an input: its reordered copy where samples of a group are not neighbours, or its rows widened.
        copies = groups is not None or dtype != torch.float32
        assert 0 < largest.elements <= (tokens * d if copies else d * d)


def test_row_numbers_are_int64() -> None:
    """Batches of more than 2^31 elements are a matter of row times width: rows are numbered in int64."""
    from gradnorm_kernels import checks, segments

    cu_seqlens, samples = torch.tensor([0, 2, 5, 9], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32)
    x = torch.randn(9, 2)
    batch = checks.grad_gram(x, x, cu_seqlens, samples, None, "auto", "auto", backends=())
    found = segments.host_segments(batch)
    assert found.order is not None and found.order.dtype == torch.int64
    assert found.order.tolist() == [0, 1, 5, 6, 7, 8, 2, 3, 4]
