"""The benchmarks' batches, providers and gate: a wrong provider is refused, and a right one is not."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ops, providers
from benchmarks.batches import LAYERS, choose, make_batch, truth
from benchmarks.harness import HostClock
from benchmarks.providers import BASELINE, PEERS, PROVIDERS, Provider, Result, WrongResultError, gate
from gradnorm_kernels import reference, tolerances
from gradnorm_kernels.tuning.costs import SHARED_MEMORY
from gradnorm_kernels.tuning.tiles import CUDA_CANDIDATES, CudaConfig, cuda_config

EMPTY = SimpleNamespace(sample_sq_norms=None, weight_grad=None, group_sq_norms=None, group_gram=None)


def broken(change) -> Provider:
    """``bmm`` with a changed result."""
    peer = PROVIDERS["bmm"]

    def prepare(batch):
        run = peer.prepare(batch)
        return lambda: change(run())

    return dataclasses.replace(peer, name="broken", prepare=prepare)


def set_first(tensor: torch.Tensor | None, factor: float) -> torch.Tensor:
    assert tensor is not None
    changed = tensor.clone()
    changed.view(-1)[0] *= factor
    return changed


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_truth_agrees_with_the_reference(ragged, groups):
    batch = make_batch(13, 7, 9, 100, ragged, groups=groups)
    expected = truth(batch)
    norms, group_norms, total, _ = reference.fused_grad_norm(
        batch.x, batch.dy, batch.cu_seqlens, group_ids=torch.tensor(batch.group_of), weight_grad=True
    )
    assert len(set(batch.group_of)) == groups
    assert expected.checked == list(range(batch.samples))
    torch.testing.assert_close(expected.norms, norms)
    torch.testing.assert_close(expected.group_norms, group_norms)
    torch.testing.assert_close(expected.total, total)


def test_truth_of_some_samples_has_the_sums_of_all():
    batch = make_batch(13, 7, 9, 100, True)
    whole, some = truth(batch), truth(batch, most=3)
    assert 3 <= len(some.checked) < batch.samples
    assert {batch.lengths[i] for i in some.checked} >= {min(batch.lengths), max(batch.lengths)}
    torch.testing.assert_close(some.norms, whole.norms[some.checked])
    torch.testing.assert_close(some.total, whole.total)
    torch.testing.assert_close(some.group_norms, whole.group_norms)


def test_the_gram_of_a_batch_is_the_samples_gram():
    batch = make_batch(13, 7, 9, 100, True, gram=True)
    assert batch.groups == batch.samples
    torch.testing.assert_close(truth(batch).gram, reference.grad_gram(batch.x, batch.dy, batch.cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", [BASELINE, "torch", "torch_gram", "torch_norms", *PEERS])
def test_providers_are_right(name, ragged, dtype):
    batch = make_batch(40, 24, 13, 100, ragged, dtype=dtype, groups=2)
    reason = PROVIDERS[name].unavailable_reason(batch)
    if reason is not None:
        assert name == "grouped_mm" and "bfloat16" in reason
        return
    errors = gate(PROVIDERS[name], batch, truth(batch))
    assert set(errors) >= ({"weight gradient"} if "dW" in PROVIDERS[name].does else {"norms"})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: Result(set_first(r.norms, 1.01), r.weight_grad), "norms"),
        (lambda r: Result(set_first(r.norms, math.nan), r.weight_grad), "norms"),
        (lambda r: Result(r.norms, set_first(r.weight_grad, 2.0)), "weight gradient"),
        (lambda r: Result(r.norms, torch.zeros_like(r.weight_grad)), "weight gradient"),
        (lambda r: Result(r.norms, r.weight_grad, torch.zeros(1)), "group norms"),
    ],
)
def test_the_gate_refuses_a_wrong_result(change, what):
    batch = make_batch(17, 11, 10, 50, False)
    with pytest.raises(WrongResultError, match=f"broken: {what} off by"):
        gate(broken(change), batch, truth(batch))


def test_a_peer_that_rounds_has_a_wider_tolerance():
    batch = make_batch(40, 24, 13, 100, False, dtype=torch.bfloat16)
    rounded = PROVIDERS["bmm"]
    gate(rounded, batch, truth(batch))
    with pytest.raises(WrongResultError, match="norms off by"):
        gate(dataclasses.replace(rounded, rounds=False), batch, truth(batch))


def test_only_tensor_cores_have_a_wider_tolerance_and_only_for_long_chains():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        assert tolerances.norms(dtype, gpu, 1000) == tolerances.NORMS[dtype]
        assert tolerances.norms(dtype, gpu, 400_000) == pytest.approx(2.4e-3)
        assert tolerances.norms(dtype, cpu, 400_000) == tolerances.NORMS[dtype]
    assert tolerances.norms(torch.float32, gpu, 400_000) == tolerances.NORMS[torch.float32]


@pytest.mark.parametrize(("d", "norms", "sums"), [(24, 100, 131), (120, 120, 131), (777, 777, 777)])
def test_a_chain_is_as_long_as_the_tokens_of_a_sample_or_a_sum_or_as_the_features(d, norms, sums, monkeypatch):
    chains = []
    monkeypatch.setattr(tolerances, "norms", lambda dtype, device, chain: chains.append(chain) or 1.0)
    batch = make_batch(d, 8, 1, 131, False, gram=True)
    batch = dataclasses.replace(batch, offsets=(0, 30, 130, 131), cu_seqlens=torch.tensor([0, 30, 130, 131]), groups=3)
    gate(PROVIDERS["torch"], batch, truth(batch))
    assert chains == [norms, sums, sums]


def measured(provider: Provider, monkeypatch) -> dict:
    monkeypatch.setitem(PROVIDERS, provider.name, provider)
    case = ops.Case("tiny.q", 17, 11, 10, False, 50, "fp32")
    return ops.measure(provider.name, ops._prepare(case, torch.device("cpu")), HostClock(), 1e-3)


def test_a_wrong_provider_has_no_speed(monkeypatch):
    row = measured(broken(lambda r: Result(set_first(r.norms, 1.01), r.weight_grad)), monkeypatch)
    assert row["status"] == "wrong" and "off by" in row["reason"]
    assert not {"seconds", "ratio", "tflops", "errors"} & set(row)


def test_a_provider_that_is_right_only_in_its_first_call_has_no_speed(monkeypatch):
    calls = []

    def change(result: Result) -> Result:
        calls.append(1)
        return result if len(calls) == 1 else Result(set_first(result.norms, 1.01), result.weight_grad)

    assert measured(broken(change), monkeypatch)["status"] == "wrong"


def test_a_right_provider_has_its_numbers(monkeypatch):
    row = measured(broken(lambda r: r), monkeypatch)
    assert row["status"] == "ok"
    assert row["tflops"] == pytest.approx(2 * 50 * 17 * 11 / row["seconds"]["median"] / 1e12)
    assert row["gbps"] == pytest.approx(4 * (50 * 17 + 50 * 11 + 17 * 11) / row["seconds"]["median"] / 1e9)
    assert row["repeats"] >= 5


@pytest.mark.parametrize("name", CUDA_CANDIDATES)
def test_a_candidate_tile_is_forced_during_the_call_only(name, monkeypatch):
    config = CUDA_CANDIDATES[name].config

    def launched() -> CudaConfig:
        return cuda_config(config.arch, (128, 192, 256), SHARED_MEMORY[config.arch], lambda columns: 1.0)

    def call(*_, **options):
        seen.append((launched(), options))
        return EMPTY

    before, seen = launched(), []
    monkeypatch.setattr(providers.gk, "fused_grad_norm", call)
    run = PROVIDERS[f"cuda_{name}"].prepare(make_batch(17, 11, 10, 50, False))
    assert not seen and launched() == before
    run()
    ((during, options),) = seen
    assert during == config and launched() == before
    assert (options["backend"], options["algorithm"], options["weight_grad"]) == ("cuda", "wgrad", True)
    assert tuple(f"cuda_{name}" for name in CUDA_CANDIDATES) == providers.TILES


def test_memory_limits_name_the_sizes(monkeypatch):
    monkeypatch.setattr("benchmarks.providers.CPU_LIMIT", 1000)
    batch = make_batch(40, 24, 13, 100, False)
    assert "stores 7 gradients" in str(PROVIDERS["bmm"].unavailable_reason(batch))
    assert "two Grams of 13 tokens" in str(PROVIDERS["two_gram"].unavailable_reason(batch))


def test_layers_are_chosen_by_name():
    assert [layer.name for layer in choose(["qwen2.5-3b.q"])] == ["qwen2.5-3b.q"]
    llama = choose(["llama-3.1-8b"])
    assert [(layer.name, layer.also) for layer in llama][:2] == [
        ("llama-3.1-8b.q", ("llama-3.1-8b.o",)),
        ("llama-3.1-8b.kv", ()),
    ]
    assert {layer.model for layer in choose(["all"])} == {"smollm2-135m", "qwen2.5-3b", "llama-3.1-8b"}
    assert LAYERS["llama-3.1-8b.down"].d_in == 14336
    with pytest.raises(ValueError, match=r"'gpt' is no layer, no model and not 'all'; layers: smollm2-135m\.q"):
        choose(["gpt"])
