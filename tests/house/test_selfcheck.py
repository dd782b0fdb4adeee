"""``python -m gradnorm_kernels check``: one verdict per backend, device and dtype, and an exit status."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradnorm_kernels import __main__, backends, selfcheck, traps


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three traps instead of all, on the CPU."""
    monkeypatch.setattr(traps, "TRAPS", traps.TRAPS[1:4])
    monkeypatch.setattr(selfcheck, "devices", lambda: ["cpu"])


def plant(monkeypatch: pytest.MonkeyPatch, op: str, wrong: Any) -> None:
    """The torch backend gives what ``wrong`` makes of its results for an operator."""
    right = backends.operator("torch", op)
    found = lambda name, of: (lambda *call: wrong(right(*call))) if of == op else asked(name, of)  # noqa: E731
    asked = backends.operator
    monkeypatch.setattr(backends, "operator", found)


def test_every_backend_has_its_lines(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in backends.NAMES:
        own = [line for line in lines if line.startswith((f"{name} on ", f"{name}: "))]
        reason = backends.unavailable_reason(name)
        if reason is not None:
            assert own == [f"{name}: not checked, it cannot run here: {reason}"]
        else:
            dtypes = [line.split(", ")[1].split(":")[0] for line in own]
            taken = [d for d in traps.NORMS if backends.supports(name, "fused_grad_norm", "cpu", d)]
            assert sorted(dtypes) == sorted(str(dtype).removeprefix("torch.") for dtype in taken)
            assert all(": right (" in line for line in own)


@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [
        ("fused_grad_norm", lambda r: (r[0] * 1.001, *r[1:]), "sample_sq_norms: off by 1.00e-03 of its scale"),
        ("grad_gram", lambda r: r + r.max() * 1e-3, "grad_gram and grad_dot, one token: grad_gram: off by"),
        ("grad_dot", lambda r: r + r.abs().max() * 1e-3, "grad_dot: off by"),
        ("grad_sketch", lambda r: r * 1.001, "grad_sketch, r_in=7, r_out=5: off by"),
        ("embedding_grad_norm", lambda r: (r[0], r[1] * 1.001, r[2]), "embedding_grad_norm: group_sq_norms: off by"),
        ("tied_grad_gram", lambda r: (r[0], r[1] + r[1].abs().max()), "tied_grad_gram: group_gram: off by"),
        ("grad_gram", lambda r: r.float(), "of dtypes [torch.float32"),
    ],
)
def test_a_wrong_result_is_found(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], op: str, wrong: Any, said: str
) -> None:
    plant(monkeypatch, op, wrong)
    monkeypatch.setattr(selfcheck.checks, "DTYPES", (torch.float32,))
    assert __main__.main(["check", "torch"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("torch on cpu, float32: WRONG in ") and said in printed, printed


def test_what_a_backend_raises_is_wrong_too(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "grad_dot", lambda results: 1 / 0)
    found = selfcheck.verdict("torch", "cpu", torch.float32)
    assert found.wrong and "ZeroDivisionError: division by zero" in found.wrong[0]
    assert len(found.wrong) < found.compared, "the others were compared all the same"


def test_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        __main__.main(["check", "metal"])
    assert raised.value.code == 2
    assert "BACKEND must be among torch, cpu, triton, cuda, got metal" in capsys.readouterr().err
    assert __main__.main(["tset"]) == 2
