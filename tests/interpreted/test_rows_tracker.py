"""What the tracker runs on a GPU, interpreted: paths without shapes that depend on data, and the kernels of rows."""

from __future__ import annotations

import functools

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels import ops
from gradnorm_kernels.tracking import parameter_gram, rows
from tests.tracking.brute_force import batch, row_losses, sample_gradients, small_model, u_statistic

TASKS = ["a", "b", "a", "a", "b", "a", "a"]
SAMPLES = ["a0", "b0", "a0", "a1", "b1", "a2", "a3"]
FACTORS = [1.0, 2.0, 0.5, 1.5, 1.0, 0.25, 0.75]


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the GPU's paths on the CPU."""
    for module in (rows, parameter_gram):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)


@pytest.mark.parametrize(
    "name, blocks, factors",
    [
        ("llama_tied", 512, FACTORS),
        ("llama_tied", 4, [1.0] * 7),
        ("llama", 4, FACTORS),
        ("gpt2", 512, [0.5, 2.0, 0.5, 1.5, 1.0, 0.25, 1.0]),  # the same for all rows of a sample
    ],
)
def test_all_parameters(
    name: str, blocks: int, factors: list[float], resident: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, tied and not, biases and norms, by samples and by folds."""
    interpreted = []
    for operator in ("embedding_grad_norm", "tied_grad_gram"):
        run = functools.partial(getattr(ops, operator), backend="triton")
        call = lambda *args, run=run, **options: interpreted.append(1) or run(*args, **options)  # noqa: E731
        monkeypatch.setattr(parameter_gram, operator, call)
    monkeypatch.setattr("gradnorm_kernels.tracking.tracker.MAX_BLOCKS", blocks)
    model = small_model(name, torch.float32)
    ids, mask = batch(len(TASKS), 7, "left")
    scale = torch.tensor(factors)
    tracker = gk.GradNormTracker(model, "all")
    with tracker.microbatch(TASKS, SAMPLES, mask, row_scale=len(TASKS) / scale):
        (row_losses(model, ids, mask) * scale).mean().backward()
    stats = tracker.step()
    tracker.close()
    assert interpreted
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = sample_gradients(row_losses(model, ids, mask), SAMPLES, parameters)
    for task in "ab":
        gradients = torch.stack([g for s, g in truth.items() if s[0] == task])
        size = float(gradients.square().sum(1).mean())
        assert stats[task].mean_sq_norm == pytest.approx(size, rel=1e-4)
        assert stats[task].sq_norm == pytest.approx(u_statistic(gradients), abs=1e-4 * size)


def test_a_factor_for_each_row_does_not_cost_bfloat16_its_digits(resident: None) -> None:
    """Two bfloat16 parts of a scaled dy hold 16 bits of it."""
    dy = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.tensor([0, 0])
    scale = torch.tensor([0.3, 7.1], dtype=torch.float64)
    tokens = parameter_gram.Tokens(dy, dy, torch.tensor([20, 20]), rows, scale, embedding=False)
    split = parameter_gram._prescale(tokens)
    assert split.dy.dtype == torch.bfloat16 and split.lengths.tolist() == [20] * 4 and len(split.row_sample) == 4
    wanted = dy.double() * scale.repeat_interleave(20)[:, None]
    high, low = split.dy.double().chunk(2)
    assert ((high + low - wanted).abs() <= 2**-16 * wanted.abs()).all()
    assert ((high - wanted).abs() > 2**-10 * wanted.abs()).any()
    assert torch.equal(split.x, torch.cat([dy, dy]))


def test_sums_by_owner(resident: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sorted sums of a GPU and the plain ones of a CPU; a NaN stays with its owner; owners may have nothing."""
    values = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[2, 1, 1] = float("nan")
    owner = torch.tensor([4, 0, 2, 0, 4, 4, 1, 0, 1])
    by_segments = rows.sum_by(values, owner, 6)
    monkeypatch.setattr(rows, "on_gpu", lambda tensor: False)
    by_index = rows.sum_by(values, owner, 6)
    torch.testing.assert_close(by_segments, by_index, rtol=1e-14, atol=1e-14, equal_nan=True)
    assert by_segments.isnan().nonzero().tolist() == [[2, 1, 1]] and not by_segments[3].any()
