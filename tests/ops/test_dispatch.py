"""The cost model's choices, the choice of a backend, and their explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from gradnorm_kernels import backends, dispatch
from gradnorm_kernels.dispatch import ALL_TOKENS, Problem
from gradnorm_kernels.tuning import costs as tuning
from gradnorm_kernels.tuning.costs import Chip

#: A kind of device that only the torch backend serves, with the default's costs.
CHIP = Chip("meta")
GPU = Chip("cuda", "nvidia-a-gpu-nobody-measured", 90)


def problem(**changes: object) -> Problem:
    return dataclasses.replace(Problem(CHIP, 4096, 1024, 1024, samples=32, groups=1), **changes)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``able("torch", "cuda")``: for the test, these backends serve every call and the others none."""
    dispatch.choose.cache_clear()

    def set_able(*names: str) -> None:
        monkeypatch.setattr(
            backends, "unavailable_reason", lambda name, *call: None if name in names else f"no {name} here"
        )
        dispatch.choose.cache_clear()

    yield set_able
    dispatch.choose.cache_clear()


def test_the_weight_gradient_needs_slabs() -> None:
    for tokens in (1, 64, 4096):
        plan = dispatch.choose(problem(tokens=tokens, weight_grad=True)).plan
        assert plan.group_sums == "wgrad"
        assert 256 <= plan.gram_tokens <= 1024  # the default's crossover: d_in d_out / (d_in + d_out) = 512


def test_few_tokens_in_a_wide_layer_go_by_pairs() -> None:
    assert dispatch.choose(problem(tokens=64)).plan.group_sums == "gram"
    assert dispatch.choose(problem(tokens=65536)).plan.group_sums == "wgrad"
    assert dispatch.choose(problem(tokens=64), "wgrad").plan.group_sums == "wgrad"


def test_more_groups_mean_fewer_pairs() -> None:
    costs = [dispatch.choose(problem(groups=groups)).gram_cost for groups in (1, 4, 32)]
    assert costs == sorted(costs, reverse=True)
    gram = problem(groups=32, group_gram=True)
    assert dispatch.choose(gram).gram_cost == costs[0]  # the groups' Gram needs every pair


def test_a_group_for_each_sample_pays_its_stops() -> None:
    """The norms of such samples come from slabs, however cheap a Gram would be: that is what is priced."""
    prices = tuning.costs(CHIP, "torch", 4, 1024, 1024)
    alone = problem(samples=64, groups=64)
    expected = (4096 + prices.epilogue * 64) * 1024 * 1024
    assert dispatch.choose(alone).wgrad_cost == pytest.approx(expected)
    assert dispatch.choose(dataclasses.replace(alone, groups=63)).wgrad_cost < expected


def test_explicit_algorithms() -> None:
    assert dispatch.choose(problem(weight_grad=True), "wgrad").plan.gram_tokens == 0
    assert dispatch.choose(problem(weight_grad=True), "gram").plan.gram_tokens == ALL_TOKENS
    assert dispatch.choose(problem(groups=32), "gram").plan.group_sums == "gram"


def test_the_crossover_grows_with_the_layer() -> None:
    tokens = [dispatch.choose(problem(d_in=d, d_out=d, weight_grad=True)).plan.gram_tokens for d in (128, 1024, 8192)]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]


def test_long_samples_on_a_gpu_pay_for_no_gram(able: Callable[..., None]) -> None:
    """The lengths are on the device: the Gram would be launched whether a sample is short or not."""
    able("triton")
    on_gpu = problem(chip=GPU, d_in=4096, d_out=4096, weight_grad=True, dtype=torch.bfloat16)
    crossover = dispatch.choose(dataclasses.replace(on_gpu, tokens=32)).plan.gram_tokens
    assert crossover > 32
    for mean, expected in ((crossover, crossover), (2 * crossover - 1, crossover), (2 * crossover, 0), (4096, 0)):
        found = dispatch.choose(dataclasses.replace(on_gpu, tokens=32 * mean))
        assert found.plan.gram_tokens == expected, mean
        explained = dispatch._reasons(dataclasses.replace(on_gpu, tokens=32 * mean), "auto", found)[2]
        assert (f"they have {mean} tokens on average, well past" in explained) == (expected == 0)
    assert dispatch.choose(dataclasses.replace(on_gpu, tokens=32 * 4096), "gram").plan.gram_tokens == ALL_TOKENS
    able("cpu")
    on_cpu = dataclasses.replace(on_gpu, chip=Chip("cpu", "", 0), tokens=32 * 4096)
    assert dispatch.choose(on_cpu).plan.gram_tokens > 0, "a CPU knows the lengths and leaves out what is not there"


@pytest.mark.parametrize("sizes", [(0, 4, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
def test_nothing_to_do_is_a_plan_too(sizes: tuple[int, int, int]) -> None:
    tokens, d_in, d_out = sizes
    assert dispatch.choose(problem(tokens=tokens, d_in=d_in, d_out=d_out, samples=0, groups=0)).plan.backend == "torch"


def test_explain_reads_no_data_and_names_every_backend() -> None:
    x, dy, cu_seqlens = (torch.empty(n, device="meta") for n in ((4096, 64), (4096, 64), (33,)))
    explanation = dispatch.explain(x, dy, cu_seqlens.long())
    text = str(explanation)
    assert "backend 'torch' is the only one that can serve this call" in text
    assert explanation.backends["torch"] is None
    for name in backends.NAMES:
        assert explanation.backends[name] == backends.unavailable_reason(name, "fused_grad_norm", "meta", torch.float32)
        assert f"  {name}: " in text
    assert "  torch: chosen" in text
    assert "asked for" in str(dispatch.explain(x, dy, backend="torch", weight_grad=True))
    with pytest.raises(ValueError, match="x must be"):
        dispatch.explain(x[0], dy)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: "):
        dispatch.explain(x, dy, backend="cuda")


def test_explain_for_float64_says_who_takes_it() -> None:
    explanation = dispatch.explain(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    assert explanation.plan.backend == "torch"
    assert all(explanation.backends[name] for name in backends.NAMES if name != "torch")


def test_auto_on_a_cpu(able: Callable[..., None]) -> None:
    cpu = problem(chip=Chip("cpu", "", 0), d_in=64, d_out=64)
    able("torch", "cpu", "triton", "cuda")
    assert dispatch.choose(cpu).plan.backend in ("cpu", "torch")
    able("torch", "triton", "cuda")
    assert dispatch.choose(cpu).plan.backend == "torch", "Triton serves CPU tensors only when it is asked for"
    assert dispatch.choose(cpu, backend="triton").plan.backend == "triton"


def test_auto_on_a_gpu(able: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = problem(chip=GPU, dtype=torch.bfloat16)
    able("torch", "triton", "cuda")
    choice = dispatch.choose(gpu)
    assert choice.plan.backend == "triton"
    assert "no measurement of both on nvidia-a-gpu-nobody-measured" in choice.why
    able("torch", "cuda")
    assert dispatch.choose(gpu).plan.backend == "cuda"
    able("torch")
    assert dispatch.choose(gpu).plan.backend == "torch"

    entries = [{"d_in": 1024, "d_out": 1024, "element_bytes": 2, "backend": "cuda"}]
    entries += [{"d_in": 64, "d_out": 64, "element_bytes": 2, "backend": "triton"}]
    measured = {GPU.gpu: {"faster": {"measured_on": "the bench in this test", "entries": entries}}}
    monkeypatch.setattr(tuning, "frozen", lambda name, real=tuning.frozen: measured.get(name) or real(name))
    tuning.faster.cache_clear()
    able("torch", "triton", "cuda")
    assert dispatch.choose(gpu).plan.backend == "cuda"
    assert "measured fastest at the nearest shape, on the bench in this test" in dispatch.choose(gpu).why
    assert dispatch.choose(problem(chip=GPU, dtype=torch.bfloat16, d_in=70, d_out=70)).plan.backend == "triton"
    assert dispatch.choose(problem(chip=GPU)).plan.backend == "triton", "float32 was not measured"
    able("torch", "triton")
    assert dispatch.choose(gpu).plan.backend == "triton", "measured fastest, but it cannot serve the call"
    tuning.faster.cache_clear()


def test_an_explicit_backend_is_refused_with_its_reason(able: Callable[..., None]) -> None:
    able("torch")
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: no {name} here"):
            dispatch.choose(problem(), backend=name)


def test_the_cache_tells_dtypes_and_devices_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {("triton", "fused_grad_norm", "cuda", torch.bfloat16)}
    reason = lambda *call: None if call in served or call[0] == "torch" else "no"  # noqa: E731
    monkeypatch.setattr(backends, "unavailable_reason", reason)
    dispatch.choose.cache_clear()
    chosen = {
        (chip.type, dtype): dispatch.choose(problem(chip=chip, dtype=dtype)).plan.backend
        for chip in (CHIP, GPU)
        for dtype in (torch.float64, torch.bfloat16, torch.float32)
    }
    dispatch.choose.cache_clear()
    assert [call for call, name in chosen.items() if name != "torch"] == [("cuda", torch.bfloat16)]
