"""``python -m gradnorm_kernels``: the facts it prints are this installation's, and every backend has its line."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradnorm_kernels
from gradnorm_kernels import __main__ as main
from gradnorm_kernels import backends

ROOT = Path(__file__).resolve().parents[2]


def parts(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The facts and the backends, each as name -> what is said."""
    facts, found = ({}, {})
    for block, part in zip(text.split("backends:\n"), (facts, found), strict=True):
        part.update(line.strip().split(": ", 1) for line in block.splitlines())
    return facts, found


def test_as_a_command():
    command = [sys.executable, "-m", "gradnorm_kernels"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    facts, _ = parts(result.stdout)
    assert facts["gradnorm_kernels"] == gradnorm_kernels.__version__
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("-h", 0), ("chek", 2)])
def test_it_says_how_it_is_called(argument, status, capsys):
    assert main.main([argument]) == status
    printed = capsys.readouterr()
    text = printed.err if status else printed.out
    assert all(re.search(rf"^{name} +[a-z]", text, re.MULTILINE) for name in ("without a command", "check", "tune"))
    assert ("no command is called 'chek'" in text) == bool(status)


def test_every_backend_says_whether_and_why(monkeypatch):
    status = {
        "torch": None,
        "triton": "no GPU of compute capability 8.0 or newer",
        "cuda": "the extension is not built",
    }
    monkeypatch.setattr(backends, "status", lambda: status)
    assert parts(main.describe())[1] == {
        "torch": "can run here",
        "triton": "cannot run here: no GPU of compute capability 8.0 or newer",
        "cuda": "cannot run here: the extension is not built",
    }


def test_real_backends_are_all_listed():
    found = parts(main.describe())[1]
    assert list(found) == list(backends.status())
    assert found["torch"] == "can run here", "the torch backend runs everywhere"


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert parts(main.describe())[0]["triton"].startswith("not importable (")


def test_commit(tmp_path, monkeypatch):
    """None outside a checkout; inside one, what git says."""
    package = tmp_path / "gradnorm_kernels"
    package.mkdir()
    monkeypatch.setattr(main, "__file__", str(package / "__main__.py"))
    assert main.commit() is None
    assert "commit:" not in main.describe()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert (main.commit() or "").startswith("unknown (fatal:"), "a checkout without a commit has no name to print"
    (package / "file").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert head.startswith(main.commit() or "none")
    (package / "file").write_text("two")
    assert (main.commit() or "").endswith("-dirty")


def test_gpus_by_name_and_architecture(monkeypatch):
    assert main._gpus() if torch.cuda.is_available() else main._gpus() == "none that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["A100", "H200"][i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 0), (9, 0)][i])
    assert main._gpus() == "A100 (sm_80), H200 (sm_90)"
