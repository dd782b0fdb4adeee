"""CUDA tensors without a GPU (tests/fake_cuda): the host code around launches, run on a device that is not there.

In a process of its own, because torch looks for its devices when it is loaded, and Triton must interpret.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from gradnorm_kernels.backends.triton import old_interpreter

OLD = old_interpreter(version("triton"), version("numpy"))
FOLDER = Path(__file__).resolve().parents[1] / "fake_cuda"

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(OLD is not None, reason=str(OLD)),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device, compiled against this torch."""
    target = tmp_path_factory.mktemp("guard") / "guard.so"
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", str(FOLDER / "guard.cpp"), "-o", str(target)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    done = subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize(
    ("names", "marked"),
    [
        *((names, "not slow") for names in ("harness counts ops canary", "tracking", "application")),
        *(pytest.param(name, "slow", marks=pytest.mark.slow) for name in ("canary", "tracking", "application")),
    ],
)
def test_in_a_process_of_its_own(names: str, marked: str, guard: Path, pytestconfig: pytest.Config) -> None:
    """The files in one process: loading torch and Triton takes longer than some of them."""
    objects = pytestconfig.cache.mkdir("cuda_host")  # type: ignore[union-attr]
    command = [sys.executable, str(FOLDER / "run.py"), str(guard), str(objects)]
    command += [str(FOLDER / f"{name}.py") for name in names.split()]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", marked, "-q", "-x", "-p", "no:cacheprovider", "--tb=short"],
        check=False,
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env=environment,
        timeout=900,  # a minute alone; a machine that others use takes longer
    )
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "skipped" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
