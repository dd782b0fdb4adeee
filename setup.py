"""Builds the compiled module gradnorm_kernels._C with CMake; everything else about the package is in pyproject.toml.

GRADNORM_BUILD_CUDA: "auto" (the default) compiles the CUDA kernels where nvcc is found, "1" fails without nvcc, "0"
leaves them out. Without a C++ compiler (CXX=none stands for none) "auto" and "0" install the library without _C: its
torch and triton backends are pure Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure afresh (a build environment of pip has another path each time), compile, put the module in place."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DGRADNORM_BUILD_CUDA={MODE}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                raise SystemExit("setup.py: cmake was not found; install cmake and ninja, or set CXX=none") from None
            except subprocess.CalledProcessError as error:
                line = " ".join(command)
                raise SystemExit(f"setup.py: {line} failed with status {error.returncode}; see above") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old module loaded keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy(build / target.name, fresh)
        os.replace(fresh, target)


def extensions() -> list[Extension]:
    """The module, or nothing where it cannot be built and need not be."""
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: GRADNORM_BUILD_CUDA must be auto, 0 or 1, got {MODE!r}")
    named = os.environ.get("CXX")
    compilers = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    missing = None
    if not any(map(shutil.which, compilers)):
        missing = f"no C++ compiler was found (looked for {', '.join(compilers)})"
    elif not (ROOT / "CMakeLists.txt").is_file():
        missing = "CMakeLists.txt is not here"
    if missing is None:
        return [Extension("gradnorm_kernels._C", sources=[])]
    if MODE == "1":
        raise SystemExit(f"setup.py: GRADNORM_BUILD_CUDA=1, but {missing}")
    print(f"setup.py: gradnorm_kernels._C is left out: {missing}; the cpu and cuda backends will not run")
    return []


MODE = os.environ.get("GRADNORM_BUILD_CUDA", "auto")
setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
