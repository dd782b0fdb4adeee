"""The registry of backends: what they declare, which operators they have, and why one cannot serve a call."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from gradnorm_kernels import backends, checks, dispatch, fused_grad_norm, ops


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
