"""The cost model's choices, the choice of a backend, their explanation, and the registry of backends."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from gradnorm_kernels import backends, checks, dispatch, fused_grad_norm, ops
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
    expected = (4096 + prices.boundary * 64) * 1024 * 1024
    assert dispatch.choose(alone).wgrad_cost == pytest.approx(expected)
    assert dispatch.choose(dataclasses.replace(alone, groups=63)).wgrad_cost < expected


def test_explicit_algorithms() -> None:
    assert dispatch.choose(problem(weight_grad=True), "wgrad").plan.gram_tokens == 0
    assert dispatch.choose(problem(weight_grad=True), "gram").plan.gram_tokens == ALL_TOKENS
    assert dispatch.choose(problem(groups=32), "gram").plan.group_sums == "gram"


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


def test_registry() -> None:
    assert list(backends.status()) == list(backends.NAMES) == ["torch", "cpu", "triton", "cuda"]
    assert backends.status()["torch"] is None
    for name, reason in backends.status().items():
        for op in ("fused_grad_norm", "grad_gram", "grad_dot"):
            if reason is None:
                assert callable(backends.operator(name, op)), f"{name} lacks {op}"
            else:
                with pytest.raises(RuntimeError) as raised:
                    backends.operator(name, op)
                assert str(raised.value) == f"backend={name!r} cannot run: {reason}"


def test_declarations() -> None:
    """A name, known dtypes, priorities that leave no tie on a type of device, and operators by their names."""
    declared = [backends.declared(name) for name in backends.NAMES]
    for name, backend in zip(backends.NAMES, declared, strict=True):
        assert backend is not None and backend.name == name and set(backend.dtypes) <= set(checks.DTYPES)
        assert all(backends.implements(name, op) for op in backends.OPERATORS[:3])
        if backend.unavailable_reason() is None:
            for device in backend.devices or ("cpu", "cuda"):
                for dtype in checks.DTYPES:
                    assert (backend.unsupported_reason(device, dtype) is None) == (dtype in backend.dtypes)
    assert all(backends.implements("torch", op) for op in backends.OPERATORS)
    for device in ("cpu", "cuda", "meta"):
        fitting = [backend for backend in declared if backend and (not backend.devices or device in backend.devices)]
        assert len({backend.priority for backend in fitting}) == len(fitting)


@pytest.fixture
def registry() -> Iterator[None]:
    """The registry, asked afresh before and after."""
    backends.forget()
    dispatch.choose.cache_clear()
    yield
    backends.forget()
    dispatch.choose.cache_clear()


@pytest.fixture
def newcomer(registry: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend with one operator, preferred on a CPU: a package and its name."""
    module = ModuleType("gradnorm_kernels.backends.newcomer")
    module.__file__ = __file__
    module.BACKEND = backends.Backend("newcomer", ("cpu",), (torch.float32,), priority=9, why="is new")  # type: ignore[attr-defined]
    module.fused_grad_norm = backends.operator("torch", "fused_grad_norm")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "newcomer"))
    return module


def test_a_new_backend_is_a_package_and_its_name(newcomer: ModuleType) -> None:
    x = torch.randn(7, 3)
    assert dispatch.explain(x, x, backend="newcomer").plan.backend == "newcomer"
    found = fused_grad_norm(x, x, backend="newcomer").sample_sq_norms
    assert torch.equal(found, fused_grad_norm(x, x, backend="torch").sample_sq_norms)
    assert "newcomer" in str(dispatch.explain(x, x))


def test_an_operator_that_a_backend_lacks_is_refused_by_name(newcomer: ModuleType) -> None:
    x, v, ids = torch.randn(7, 3), torch.randn(3, 3), torch.arange(7)
    for op, call in {
        "grad_gram": lambda backend: ops.grad_gram(x, x, backend=backend),
        "grad_dot": lambda backend: ops.grad_dot(x, x, v, backend=backend),
        "embedding_grad_norm": lambda backend: ops.embedding_grad_norm(ids, x, backend=backend),
        "tied_grad_gram": lambda backend: ops.tied_grad_gram(x, torch.ones(7, 7), ids, x, backend=backend),
    }.items():
        with pytest.raises(RuntimeError, match=f"backend='newcomer' cannot run: it has no {op}: use .*'torch'"):
            call("newcomer")
        call("auto")
        assert backends.unavailable_reason("newcomer", op) is not None
        with pytest.raises(RuntimeError, match=f"backend='newcomer' cannot run: it has no {op}"):
            backends.operator("newcomer", op)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_embeddings_are_refused_by_backends_without_their_operators(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: "):
        ops.embedding_grad_norm(torch.arange(3), torch.ones(3, 2), backend=name)


def test_a_backend_that_cannot_be_imported(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradnorm_kernels.backends.cuda", None)
    reason = backends.status()["cuda"]
    assert reason is not None and reason.startswith("cannot be imported (ModuleNotFoundError: ")
    assert backends.unavailable_reason("cuda", "fused_grad_norm", "cuda", torch.float32) == reason
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: cannot be imported"):
        fused_grad_norm(torch.zeros(3, 2), torch.zeros(3, 2), backend="cuda")


def test_reasons_of_the_process_go_before_reasons_of_the_tensors(newcomer: ModuleType) -> None:
    call = ("newcomer", "fused_grad_norm", "cpu", torch.float64)
    newcomer.BACKEND = dataclasses.replace(
        newcomer.BACKEND,
        unavailable_reason=lambda: "no device",
        unsupported_reason=lambda kind, dtype: f"{kind} {dtype}",
    )
    assert backends.unavailable_reason(*call) == "no device"
    backends.forget()
    newcomer.BACKEND = dataclasses.replace(newcomer.BACKEND, unavailable_reason=lambda: None)
    assert backends.unavailable_reason(*call) == "cpu torch.float64"
    assert not backends.supports(*call)


@pytest.mark.parametrize("name", [name for name in backends.NAMES if name != "torch"])
def test_float64_and_foreign_devices_are_refused(name: str) -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: "):
        fused_grad_norm(x, x, backend=name)
    assert backends.unavailable_reason(name, "fused_grad_norm", "meta", torch.float32) is not None
    if backends.unavailable_reason(name) is None:
        kind = "cuda" if name != "cpu" else "cpu"
        assert "float64" in (backends.unavailable_reason(name, "fused_grad_norm", kind, torch.float64) or "")


def test_an_interpreter_that_numpy_is_too_new_for_says_so() -> None:
    from gradnorm_kernels.backends import triton

    assert triton.old_interpreter("3.6.0", "2.3.5") is None
    assert triton.old_interpreter("3.7.1", "2.5.2") is None
    reason = triton.old_interpreter("3.6.0+git1a2b", "2.4.0rc1")
    assert reason is not None and "Triton 3.6.0+git1a2b" in reason and "install NumPy 2.3" in reason
