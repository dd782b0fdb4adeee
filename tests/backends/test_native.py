"""The compiled module: what it says about itself, how it is built, and what is said where it is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from gradnorm_kernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
#: Where pip puts cmake and ninja, then the rest.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMPILER = os.environ.get("CXX") or "c++"
built = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"no compiled module: {native.unavailable_reason()}"
)
buildable = pytest.mark.skipif(
    not all(shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja", COMPILER)),
    reason="needs cmake, ninja and a C++ compiler",
)


def run(command: list[str], cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDACXX", "CUDA_PATH")}
    environment |= {"PATH": TOOLS, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


def python(program: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", textwrap.dedent(program)], cwd, PYTHONPATH=str(cwd))


def setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", *arguments], **variables)


@built
def test_build_info():
    info = native.build_info()
    assert info is not None
    assert set(info) == {"cxx_compiler", "cuda_compiler", "cuda", "architectures", "cpu_isas", "commit"}
    assert re.fullmatch(r"\S+ \d[\d.]*", info["cxx_compiler"])
    assert info["cpu_isas"][0] == "generic"
    assert info["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", info["commit"])
    if info["cuda"] is None:
        assert info["architectures"] == [] and info["cuda_compiler"] is None
        assert "GRADNORM_BUILD_CUDA" in str(native.cuda_unavailable_reason())
    else:
        assert info["architectures"] == ["sm_80", "sm_90a"] and native.cuda_unavailable_reason() is None


@built
def test_a_launch_takes_every_argument_and_no_other():
    with pytest.raises(TypeError, match="missing argument: x"):
        native.module().segmented_wgrad()


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_setup_refuses_other_values():
    result = setup("--name", GRADNORM_BUILD_CUDA="yes")
    assert result.returncode and "GRADNORM_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in result.stderr


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_without_a_compiler_the_library_is_pure_python(mode: str):
    result = setup("--name", CXX="none", GRADNORM_BUILD_CUDA=mode)
    assert result.returncode == 0
    assert "gradnorm_kernels._C is left out: no C++ compiler was found (looked for none)" in result.stdout


def test_without_a_compiler_cuda_fails_loudly():
    result = setup("--name", CXX="none", GRADNORM_BUILD_CUDA="1")
    assert result.returncode and "GRADNORM_BUILD_CUDA=1, but no C++ compiler was found" in result.stderr


@buildable
def test_without_nvcc_cuda_fails_loudly(tmp_path: Path):
    """On a PATH of the three tools alone."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja", COMPILER, "cc", "as", "ld", "git"):
        found = shutil.which(tool, path=TOOLS)
        if found:
            (tools / Path(tool).name).symlink_to(found)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DGRADNORM_BUILD_CUDA=1"]
    result = run([*command, f"-DPython_EXECUTABLE={sys.executable}"], PATH=str(tools))
    assert result.returncode, result.stdout
    assert "GRADNORM_BUILD_CUDA=1, but no working nvcc was found" in " ".join(result.stderr.split())


@buildable
def test_builds_without_cuda_and_without_a_warning(tmp_path: Path):
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DGRADNORM_BUILD_CUDA=0"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    result = python("import _C; print(_C.build_info()['cuda'], _C.best_isa() >= 0)", tmp_path)
    assert result.stdout == "None True\n", result.stderr


MISSING = """
import sys
# An editable installation would find the checkout's module for the copy too.
sys.meta_path[:] = [f for f in sys.meta_path if not str(getattr(f, "__module__", "")).startswith("__editable__")]
import torch
from gradnorm_kernels import backends, dispatch, ops
from gradnorm_kernels.backends import native
x = torch.randn(5, 3)
print(backends.unavailable_reason("cpu", "fused_grad_norm", "cpu", torch.float32))
print(native.build_info(), dispatch.explain(x, x).plan.backend, ops.fused_grad_norm(x, x).sample_sq_norms.shape[0])
try:
    ops.fused_grad_norm(x, x, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def copy_of_the_library(to: Path) -> Path:
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    return Path(shutil.copytree(ROOT / "gradnorm_kernels", to / "gradnorm_kernels", ignore=ignore))


def test_without_the_module_auto_takes_torch_and_an_explicit_request_says_why(tmp_path: Path):
    copy_of_the_library(tmp_path)
    result = python(MISSING, tmp_path)
    why, chosen, refused = result.stdout.splitlines()
    assert "gradnorm_kernels._C was not built" in why and "C++17 compiler" in why
    assert chosen == "None torch 1"
    assert refused == f"backend='cpu' cannot run: {why}"


def test_a_module_that_does_not_load_says_why(tmp_path: Path):
    library = copy_of_the_library(tmp_path)
    (library / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no shared object")
    result = python(MISSING, tmp_path)
    why, chosen, _ = result.stdout.splitlines()
    assert "is there but does not load" in why and "built for another machine or Python" in why
    assert chosen == "None torch 1"
