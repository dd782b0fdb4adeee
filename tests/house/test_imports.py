"""The import order of the library: each room imports only from rooms above it, and torch, triton and Python only.

A room is a module or a package of gradnorm_kernels. A new one needs a place in ROOMS: a decision, not an accident.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "gradnorm_kernels"

#: From the top down. A room may import from itself and from the rooms before it.
ROOMS = (
    "tolerances",
    "reference",
    "batch",
    "checks",
    "segments",
    "tuning.costs",  # with configs/, which holds JSON and no code
    "tuning.tiles",
    "backends",
    "canary",
    "dispatch",
    "ops",
    "traps",
    "selfcheck",
    "tuning",
    "estimation",
    "tracking",
    "control",
    "integrations",
)
#: These two stand outside the order: they may import every room, and no room may import them.
OUTSIDE = ("__init__", "__main__")
#: room -> packages it may import besides torch and Python's own, and then only when they are asked for.
LAZY = {
    "control": {"torchjd"},
    "integrations": {"accelerate", "datasets", "peft", "transformers", "trl", "verl"},
}
#: The library imports none of these: the application, the tests, the benchmarks and the tools.
NEVER = {"benchmarks", "gradnorm_grpo", "tests", "tools", "train_grpo"}


def room_of(path: str) -> str:
    """'gradnorm_kernels/backends/torch.py' -> 'backends'; 'gradnorm_kernels/ops.py' -> 'ops'."""
    parts = path.split("/")
    inner = ".".join(parts[1:]).removesuffix(".py")
    return inner if inner in ROOMS else parts[1].removesuffix(".py")


def _lazy_nodes(tree: ast.Module) -> set[ast.AST]:
    """Every node inside a function or under ``if TYPE_CHECKING``: not executed when the module is imported."""
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if function or (isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"):
            for statement in node.body:
                lazy.update(ast.walk(statement))
    return lazy


def imported(path: str, source: str) -> list[tuple[str, int, bool]]:
    """(absolute dotted name, line, is it lazy) of everything a file imports, also by a literal import_module."""
    package = path.removesuffix(".py").split("/")[:-1]
    tree = ast.parse(source)
    lazy = _lazy_nodes(tree)
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                names = [argument.value]
        found += [(name, node.lineno, node in lazy) for name in names]
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Everything in ``{path: source}`` of the library that breaks the order, as 'path:line says what'."""
    problems = []
    for path, source in sorted(sources.items()):
        room = room_of(path)
        if room not in ROOMS + OUTSIDE:
            problems.append(f"{path}:1 is a room without a place in the import order")
            continue
        above = ROOMS if room in OUTSIDE else ROOMS[: ROOMS.index(room) + 1]
        for name, line, lazy in imported(path, source):
            top, _, rest = name.partition(".")
            if top == LIBRARY:
                target = next(
                    (room for room in ROOMS if "." in room and f"{rest}.".startswith(f"{room}.")), rest.split(".")[0]
                )
                if room not in OUTSIDE and target not in above:
                    problems.append(
                        f"{path}:{line} imports {target or 'the package itself'}, which is not above {room}"
                    )
                elif room in OUTSIDE and target in OUTSIDE:
                    problems.append(f"{path}:{line} imports {target}")
            elif top in NEVER:
                problems.append(f"{path}:{line} imports {top}, which nothing imports")
            elif top == "triton":
                if room != "backends" and not (room in ("tuning", "tuning.costs", "tuning.tiles", *OUTSIDE) and lazy):
                    problems.append(f"{path}:{line} imports triton outside the backends")
            elif top in LAZY.get(room, set()):
                if not lazy:
                    problems.append(f"{path}:{line} imports {top} before anyone asked for it")
            elif top != "torch" and top not in sys.stdlib_module_names:
                problems.append(f"{path}:{line} imports {top}, which is not torch, triton or the standard library")
    return problems


def library_sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / LIBRARY).rglob("*.py")}


def test_the_library_keeps_the_order():
    sources = library_sources()
    assert len(sources) > 5
    assert not violations(sources), "\n".join(violations(sources))


#: Folder -> the packages that nothing in it may import. Only the tests of the benchmarks and the tools (``TESTED_IN``)
#: import the benchmarks and the tools.
APART = {
    "python": {"benchmarks", "tests", "tools"},
    "benchmarks": {"gradnorm_grpo", "tests", "tools"},
    "tools": {"benchmarks", "gradnorm_grpo", "tests"},
    "tests": {"benchmarks", "tools"},
}
TESTED_IN = {
    "benchmarks": "tests/benchmarks/",
    "tools": ("tests/gpu_check/", "tests/tools/", "tests/trl/test_trl_harness.py"),
}


def crossings(folder: str, sources: dict[str, str]) -> list[str]:
    """Every import in ``{path: source}`` that the folder may not have, as 'path:line imports what'."""
    return [
        f"{path}:{line} imports {name}"
        for path, source in sources.items()
        for name, line, _ in imported(path, source)
        if name.split(".")[0] in APART[folder] and not path.startswith(TESTED_IN.get(name.split(".")[0], "-"))
    ]


@pytest.mark.parametrize("folder", APART)
def test_application_benchmarks_tools_and_tests_do_not_import_each_other(folder):
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / folder).rglob("*.py")}
    assert len(sources) > 5
    assert not crossings(folder, sources)


def test_that_test_sees_a_crossing():
    source = "from benchmarks.batches import truth"
    assert crossings("tests", {"tests/cpu/a.py": source}) == ["tests/cpu/a.py:1 imports benchmarks.batches.truth"]
    assert crossings("tests", {"tests/benchmarks/a.py": source}) == []
    assert crossings("benchmarks", {"benchmarks/a.py": "def f():\n    import tests.traps"})


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("ops.py", "from . import tracking", "imports tracking, which is not above ops"),
        ("ops.py", "from .tracking.tracker import GradNormTracker", "imports tracking, which is not above ops"),
        ("ops.py", "import gradnorm_kernels.tracking.tracker as t", "imports tracking, which is not above ops"),
        ("ops.py", "from gradnorm_kernels import tracking", "imports tracking, which is not above ops"),
        ("ops.py", "def f():\n    from .control.sampler import TaskSampler", "imports control, which is not above ops"),
        ("ops.py", "import gradnorm_kernels", "imports the package itself"),
        ("ops.py", "from . import __version__", "imports __version__, which is not above ops"),
        ("reference.py", "from . import checks", "imports checks, which is not above reference"),
        ("backends/triton/launch.py", "from ...ops import f", "imports ops, which is not above backends"),
        ("backends/triton/launch.py", "from ... import ops", "imports ops, which is not above backends"),
        ("backends/__init__.py", "from ..dispatch import f", "imports dispatch, which is not above backends"),
        ("__init__.py", "from .__main__ import describe", "imports __main__"),
        ("ops.py", "import numpy as np", "imports numpy, which is not torch"),
        ("ops.py", "import importlib\nimportlib.import_module('numpy')", "imports numpy, which is not torch"),
        ("ops.py", "__import__('transformers')", "imports transformers, which is not torch"),
        ("ops.py", "try:\n    import numpy\nexcept ImportError:\n    pass", "imports numpy"),
        ("ops.py", "import triton", "imports triton outside the backends"),
        ("tuning/costs.py", "import triton", "imports triton outside the backends"),
        ("tracking/tracker.py", "def f():\n    import trl", "imports trl, which is not torch"),
        ("integrations/trl/attach.py", "import trl", "imports trl before anyone asked for it"),
        ("integrations/trl/attach.py", "class A:\n    from trl import GRPOTrainer", "before anyone asked for it"),
        ("integrations/trl/attach.py", "import wandb", "imports wandb, which is not torch"),
        ("control/sampler.py", "from gradnorm_grpo import loop", "imports gradnorm_grpo, which nothing imports"),
        ("control/sampler.py", "def f():\n    import tests.conftest", "imports tests, which nothing imports"),
        ("novelty.py", "x = 1", "is a room without a place"),
        ("novelty/__init__.py", "", "is a room without a place"),
    ],
)
def test_the_checker_finds(path, source, said):
    found = violations({f"{LIBRARY}/{path}": source})
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops.py", "import math\nimport torch\nfrom torch import Tensor\nfrom . import checks, dispatch"),
        ("ops.py", "from .backends.torch import f\nfrom gradnorm_kernels.checks import g"),
        (
            "backends/triton/launch.py",
            "import triton\nfrom ... import checks\nfrom .kernels import k\nfrom .. import Plan",
        ),
        ("tracking/uses.py", "from ..ops import f\nfrom .layers import Layer"),
        ("integrations/trl/attach.py", "def attach(t):\n    import trl\n    from transformers import TrainerCallback"),
        (
            "integrations/trl/attach.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trl import GRPOTrainer",
        ),
        ("__init__.py", "from .ops import f\nfrom .integrations import trl"),
        ("__main__.py", "from . import __version__, backends"),
    ],
)
def test_the_checker_accepts(path, source):
    assert violations({f"{LIBRARY}/{path}": source}) == []


def test_importing_needs_torch_and_triton_only():
    """In a fresh interpreter where everything the extras bring is out of reach, numpy included."""
    program = """
    import sys, warnings
    warnings.simplefilter("ignore")  # torch says once that numpy is missing
    for name in ("numpy", "transformers", "trl", "accelerate", "datasets", "yaml", "pandas", "matplotlib", "gguf"):
        sys.modules[name] = None
    import torch
    import gradnorm_kernels as gk
    x, dy = torch.randn(7, 3), torch.randn(7, 2)
    r = gk.fused_grad_norm(x, dy, torch.tensor([0, 1, 7]), group_ids=torch.tensor([0, 0]))
    expected = torch.stack([(dy[:1].T @ x[:1]).square().sum(), (dy[1:].T @ x[1:]).square().sum()]).double()
    torch.testing.assert_close(r.sample_sq_norms, expected, rtol=1e-5, atol=1e-6)
    sampler = gk.TaskSampler(["a", "b"])
    sampler.update({"a": 1.0, "b": 2.0})
    assert len(sampler.draw(5)) == 5
    print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "done\n", result.stderr
