"""Every dotted name of torch and triton that the repository writes down exists in the versions at hand.

Most of what only runs on a GPU is never called in this suite, and a name that torch does not have (a private one above
all, with the checker told to ignore it) would be found there first. A CPU build of torch has all the public names of
``torch.cuda``; a private one that it lacks is not to be used.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton")
#: What is there only once the library is imported.
OTHERWISE = ("torch.ops.gradnorm_kernels",)
FOLDERS = ("gradnorm_kernels", "benchmarks", "python", "tests", "tools")


def names(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) for every name below PACKAGES in a source, whatever it was imported as."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"

    def dotted(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        base = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return None if base is None else f"{base}.{node.attr}"  # type: ignore[attr-defined]

    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name is not None:
            yield node.lineno, name


@cache
def lacks(name: str) -> str | None:
    """The first part of a dotted name that is not there; None where all of it is."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
        except ImportError:
            return path
    return None


def wrong(source: str) -> list[tuple[int, str]]:
    """(line, name up to the part that is missing) for every name that is not there."""
    found = set()
    for line, name in names(source):
        if name.split(".")[0] in PACKAGES and not name.startswith(OTHERWISE):
            missing = lacks(name)
            if missing is not None:
                found.add((line, missing))
    return sorted(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_is_there(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, name in wrong(path.read_text()):
            found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not found, f"names that torch or triton does not have: {found}"


def test_the_scan_sees_a_wrong_name() -> None:
    source = """
import torch
import triton.language as tl
from torch import _C, cuda as gpu
torch.cuda.Event()
_C._cuda_getDriverVersion()
gpu.no_such.thing
torch._C._current_graph_task_id
def kernel():
    tl.no_such
"""
    assert wrong(source) == [
        (6, "torch._C._cuda_getDriverVersion"),
        (7, "torch.cuda.no_such"),
        (10, "triton.language.no_such"),
    ]
