"""The cost model's choices, their explanation, the registry of backends and the frozen constants."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources

import pytest
import torch

from gradnorm_kernels import backends, dispatch, tuning
from gradnorm_kernels.dispatch import ALL_TOKENS, Problem


def problem(**changes: object) -> Problem:
    return dataclasses.replace(Problem("cpu", 4096, 1024, 1024, samples=32, groups=1), **changes)


def test_the_weight_gradient_needs_slabs() -> None:
    for tokens in (1, 64, 4096):
        plan = dispatch.choose(problem(tokens=tokens, weight_grad=True)).plan
        assert plan.sums == "wgrad"
        assert 16 <= plan.gram_tokens <= 256


def test_few_tokens_in_a_wide_layer_go_by_pairs() -> None:
    assert dispatch.choose(problem(tokens=64)).plan.sums == "gram"
    assert dispatch.choose(problem(tokens=65536)).plan.sums == "wgrad"
    assert dispatch.choose(problem(tokens=64), "wgrad").plan.sums == "wgrad"


def test_more_groups_mean_fewer_pairs() -> None:
    costs = [dispatch.choose(problem(groups=groups)).gram_cost for groups in (1, 4, 32)]
    assert costs == sorted(costs, reverse=True)
    gram = problem(groups=32, group_gram=True)
    assert dispatch.choose(gram).gram_cost == costs[0]  # the groups' Gram needs every pair


def test_explicit_algorithms() -> None:
    assert dispatch.choose(problem(weight_grad=True), "wgrad").plan.gram_tokens == 0
    assert dispatch.choose(problem(weight_grad=True), "gram").plan.gram_tokens == ALL_TOKENS
    assert dispatch.choose(problem(groups=32), "gram").plan.sums == "gram"


def test_the_crossover_grows_with_the_layer() -> None:
    tokens = [dispatch.choose(problem(d_in=d, d_out=d, weight_grad=True)).plan.gram_tokens for d in (128, 1024, 8192)]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]


@pytest.mark.parametrize("sizes", [(0, 4, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
def test_nothing_to_do_is_a_plan_too(sizes: tuple[int, int, int]) -> None:
    tokens, d_in, d_out = sizes
    assert dispatch.choose(problem(tokens=tokens, d_in=d_in, d_out=d_out, samples=0, groups=0)).plan.backend == "torch"


def test_explain_reads_no_data_and_names_every_backend() -> None:
    x, dy, cu_seqlens = (torch.empty(n, device="meta") for n in ((4096, 64), (4096, 64), (33,)))
    explanation = dispatch.explain(x, dy, cu_seqlens.long())
    text = str(explanation)
    assert explanation.backends == backends.status()
    assert "backend 'torch' is the first that can run" in text
    for name in backends.NAMES:
        assert f"  {name}: " in text
    assert "not part of this version" in text
    assert "asked for" in str(dispatch.explain(x, dy, backend="torch", weight_grad=True))
    with pytest.raises(ValueError, match="x must be"):
        dispatch.explain(x[0], dy)
    with pytest.raises(RuntimeError, match="cannot run"):
        dispatch.explain(x, dy, backend="cuda")


def test_registry() -> None:
    assert list(backends.status()) == ["torch", "triton", "cuda"]
    assert backends.status()["torch"] is None
    assert backends.preferred() == "torch"
    for op in ("fused_grad_norm", "grad_gram", "grad_dot"):
        assert callable(getattr(backends.load("torch"), op))
    with pytest.raises(RuntimeError, match="not part of this version"):
        backends.load("triton")


def test_nearest_shape_and_default() -> None:
    assert tuning.costs("cpu", 600, 500).d_in == 576
    assert tuning.costs("cpu", 100_000, 100_000).d_in == 4096
    assert tuning.costs("cpu", 0, 7) in tuning.entries("cpu")
    assert tuning.entries("a device nobody measured") == tuning.entries("default")


def test_frozen_files_are_whole() -> None:
    folder = resources.files("gradnorm_kernels") / "configs"
    names = [f.name for f in folder.iterdir() if f.name.endswith(".json")]
    assert "default.json" in names
    for name in names:
        assert json.loads((folder / name).read_text())["measured_on"]
        for entry in tuning.entries(name.removesuffix(".json")):
            assert min(entry.boundary, entry.gram, entry.pairs, entry.slab, entry.tile) > 0 <= entry.gram_token
