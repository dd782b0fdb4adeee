"""The mathematics of sketches: no bias, the variance of docs/mathematics.md, and its estimate from one sketch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradnorm_kernels as gk
from gradnorm_kernels.tracking.sketch import Projections, Sketch, sketch_sums

DRAWS = 20000


def variance(gp: Tensor, gq: Tensor, r: int | None, s: int | None) -> float:
    """The variance of <S_p, S_q>; ``r`` of the inputs' side, ``s`` of the outputs', None for a side kept whole."""
    inner, p, q = gq.T @ gp, gp.T @ gp, gq.T @ gq

    def over(width: int | None) -> float:
        return 0.0 if width is None else 1.0 / width

    of_inner = inner.square().sum() + (inner @ inner).trace() - 2 * inner.diagonal().square().sum()
    a = (p @ q).trace() + over(r) * ((p @ q).trace() + p.trace() * q.trace() - 2 * (p.diagonal() * q.diagonal()).sum())
    b = (inner @ inner).trace() + over(r) * (
        inner.square().sum() + inner.trace() ** 2 - 2 * inner.diagonal().square().sum()
    )
    rows = (gp * gq).sum(1)
    d = rows.square().sum() + over(r) * (
        (gp.square().sum(1) * gq.square().sum(1) + rows.square()).sum() - 2 * (gp.square() * gq.square()).sum()
    )
    return float(over(r) * of_inner + over(s) * (a + b - 2 * d))


def gradients(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gp, gq = (torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "alike":
        return gp, gp + 0.1 * gq
    if kind == "rank one":
        u, v = torch.randn(9, 1, generator=generator).double(), torch.randn(1, 7, generator=generator).double()
        return u @ v, 2.0 * u @ v
    return gp, gq


def signs(draws: int, size: int, width: int | None, seed: int) -> Tensor:
    """[draws, size, width] of +-1 over the root of the width; the identity for a side kept whole."""
    if width is None:
        return torch.eye(size, dtype=torch.float64).expand(draws, size, size)
    drawn = torch.randint(0, 2, (draws, size, width), generator=torch.Generator().manual_seed(seed))
    return (2.0 * drawn.double() - 1.0) / width**0.5


@pytest.mark.parametrize("kept", [(3, 3), (5, 2), (None, 7), (4, None), (None, None)])
@pytest.mark.parametrize("kind", ["random", "alike", "rank one"])
def test_no_bias_and_the_variance_of_the_page(kind: str, kept: tuple[int | None, int | None]) -> None:
    gp, gq = gradients(kind)
    rows, columns = signs(DRAWS, 9, kept[1], 0), signs(DRAWS, 7, kept[0], 1)
    found = ((rows.mT @ gp @ columns) * (rows.mT @ gq @ columns)).sum((1, 2))
    exact, expected = float((gp * gq).sum()), variance(gp, gq, *kept)
    if expected == 0.0:
        assert torch.allclose(found, torch.tensor(exact).double())
        return
    assert abs(float(found.mean()) - exact) < 4 * (expected / DRAWS) ** 0.5
    spread = (found - exact).square()
    assert abs(float(spread.mean()) - expected) < 5 * float(spread.std()) / DRAWS**0.5
    bound = sum(2.0 / w for w in kept if w) + (4.0 / (kept[0] * kept[1]) if kept[0] and kept[1] else 0.0)
    assert expected <= bound * float(gp.square().sum() * gq.square().sum())


def test_the_variance_is_estimated_from_one_sketch() -> None:
    """Over projections, the mean of the estimates is the variance of ``sum over pairs of <S_p, S_q>``."""
    generator = torch.Generator().manual_seed(4)
    grads = torch.randn(5, 9, 7, generator=generator, dtype=torch.float64) + 0.5
    tasks = [0, 0, 0, 1, 1]
    totals, said, draws = [], [], 1000
    for rows, columns in zip(signs(draws, 9, 4, 2), signs(draws, 7, 4, 3), strict=True):
        values = rows.T @ grads @ columns
        blocks = (list(range(5)), list(range(5)))
        found = sketch_sums([("weight", Sketch(values, (True, True)), ())], [1.0] * 5, tasks, 2, blocks)
        gram = found.pairs.gram - torch.diag(found.pairs.self_sq)
        totals.append(torch.stack([gram[:3, :3].sum(), gram[:3, 3:].sum(), gram[3:, 3:].sum()]))
        said.append(torch.stack([found.variance[0, 0], found.variance[0, 1], found.variance[1, 1]]))
    wanted, estimates = torch.stack(totals).var(0), torch.stack(said)
    # Estimates below zero count as zero: the mean may lie a little above.
    assert ((estimates.mean(0) / wanted - 1).abs() < 0.15).all(), (estimates.mean(0), wanted)


def test_projections_depend_on_name_step_shape_and_shard_only() -> None:
    like = torch.zeros(1)
    first = Projections(70, 3).of("a", (100, 90), (), like)
    again = Projections(70, 3).of("a", (100, 90), (), like.bfloat16())
    for c, d in zip(first, again, strict=True):
        assert c is not None and d is not None and d.dtype == torch.bfloat16
        assert torch.equal(c, d.float()) and set(c.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(c.mean())) < 0.06
    for other in (
        Projections(70, 4).of("a", (100, 90), (), like),
        Projections(70, 3).of("b", (100, 90), (), like),
        Projections(70, 3).of("a", (100, 90), (1,), like),
    ):
        assert other[0] is not None and first[0] is not None and not torch.equal(other[0], first[0])
    square = Projections(70, 3).of("a", (100, 100), (), like)
    assert square[0] is not None and square[1] is not None and not torch.equal(square[0], square[1])


def test_u_of_sketches_by_the_operator() -> None:
    """The operator's sketches of known samples give U through ``cross_product``, without bias."""
    generator = torch.Generator().manual_seed(6)
    x, dy = torch.randn(40, 12, generator=generator), torch.randn(40, 10, generator=generator)
    offsets = torch.arange(0, 41, 10)
    gram = gk.grad_gram(x, dy, offsets)
    exact = float((gram.sum() - gram.trace()) / 12)
    found = []
    for draw in range(200):
        c_out, c_in = Projections(5, draw).of("weight", (10, 12), (), x)
        s = gk.fused_grad_norm(x, dy, offsets, sketch=(c_in, c_out)).sketches
        assert s is not None
        flat = s.double().flatten(1) / 5
        found.append(float((flat.sum(0).square().sum() - flat.square().sum()) / 12))
    u = torch.tensor(found, dtype=torch.float64)
    assert abs(float(u.mean()) - exact) < 4 * float(u.std()) / len(u) ** 0.5
