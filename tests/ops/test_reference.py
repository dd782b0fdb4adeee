"""The reference against sums written out token by token: what everything else is compared with."""

from __future__ import annotations

import pytest
import torch

from gradnorm_kernels import reference


def test_against_single_tokens() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(6, 3), torch.randn(6, 2)
    cu_seqlens, samples = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([2, 0, 1, 2])
    owner = [2, 2, 1, 1, 1, 2]
    gradients = torch.zeros(3, 2, 3, dtype=torch.float64)
    for t in range(6):
        gradients[owner[t]] += torch.outer(dy[t].double(), x[t].double())
    assert torch.allclose(reference.sample_gradients(x, dy, cu_seqlens, sample_ids=samples), gradients)

    groups = torch.tensor([1, 0, 1])
    sample_sq, group_sq, total, gram = reference.fused_grad_norm(
        x, dy, cu_seqlens, sample_ids=samples, group_ids=groups, weight_grad=True, group_gram=True
    )
    sums = torch.stack([gradients[1], gradients[0] + gradients[2]])
    assert torch.allclose(sample_sq, gradients.square().sum((1, 2)))
    assert torch.allclose(group_sq, sums.square().sum((1, 2)))
    assert total is not None and torch.allclose(total, dy.double().T @ x.double())
    assert gram is not None and gram[0, 1] == pytest.approx(float((sums[0] * sums[1]).sum()))
    pairs = reference.grad_gram(x, dy, cu_seqlens, sample_ids=samples)
    assert pairs[1, 2] == pytest.approx(float((gradients[1] * gradients[2]).sum()))
    v = torch.randn(2, 3)
    dots = reference.grad_dot(x, dy, v, cu_seqlens, sample_ids=samples)
    assert dots[1] == pytest.approx(float((gradients[1] * v).sum()))


def test_rows_of_a_batch_are_segments() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    packed = reference.fused_grad_norm(x.flatten(0, 1), dy.flatten(0, 1), torch.arange(0, 21, 5))
    assert torch.equal(reference.fused_grad_norm(x, dy)[0], packed[0])


def test_agrees_with_autograd() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4), torch.randn(3, 4, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    (dy,) = torch.autograd.grad(y.square().sum(), y, retain_graph=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    assert torch.allclose(reference.sample_gradients(x, dy)[0], gradient.double(), rtol=1e-5)
