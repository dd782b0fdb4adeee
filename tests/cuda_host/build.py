"""Compiles csrc for the host: the module ``_C`` whose CUDA kernels run on the CPU, with checks (include/host.h).

``Tree`` copies csrc to a folder, lays ``overlay/`` over it (the files with inline assembly, in plain C++), patches the
text where a test wants a broken kernel, and compiles with g++ against ``include/cuda_runtime.h``. Objects are kept by
the hash of their preprocessed text, so a patch compiles one file again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-pthread"]
_FAST = ("-O2", "-march=native")
_WARN = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
_BUILD_INFO = """#include "launchers.h"
namespace gradnorm { const BuildInfo build = {"host", "host execution", "0.0", "sm_80,sm_90a", "generic", ""}; }
"""
_names: dict[tuple[str, ...], str] = {}


class Patch(NamedTuple):
    """Replace the one match of a regular expression in a file of csrc."""

    file: str
    pattern: str
    replacement: str


class Tree:
    """A copy of csrc to be compiled for the host. ``folder`` is the tree's own; ``objects`` is shared between trees.

    ``flags``: how a patched file is compiled, where that is not as all others: what only has to fail may run slowly.
    """

    def __init__(
        self,
        folder: Path,
        objects: Path,
        patches: Iterable[Patch] = (),
        flags: tuple[str, ...] = _FAST,
    ) -> None:
        self.csrc, self.objects = folder / "csrc", objects
        patches = list(patches)
        self._patched, self._flags = {patch.file for patch in patches}, flags
        objects.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / "csrc", self.csrc)
        shutil.copytree(HERE / "overlay", self.csrc, dirs_exist_ok=True)
        shutil.copy(HERE / "control.cpp", self.csrc)
        (self.csrc / "build_info.cpp").write_text(_BUILD_INFO)
        for patch in patches:
            path = self.csrc / patch.file
            text, count = re.subn(patch.pattern, patch.replacement, path.read_text(), flags=re.S)
            if count != 1:
                raise ValueError(f"{patch.pattern!r} must match once in {patch.file}, it matches {count} times")
            path.write_text(text)

    def module(self, without: str = "nothing") -> Path:
        """The module built from the bindings and the CUDA sources, but for those whose names begin with ``without``.

        What is left out fails when it is called.
        """
        names = [self.csrc / name for name in ("bindings.cpp", "build_info.cpp", "control.cpp")]
        return self.link([*names, *sorted(p for p in self.csrc.glob("*.cu") if not p.name.startswith(without))])

    def link(self, sources: list[Path]) -> Path:
        """A shared object of these sources. Raises RuntimeError with the compiler's words."""
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(self._compile, sources))
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
        target = self.objects / name / f"_C{suffix}"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            fresh = target.with_name(f"{os.getpid()}.so")
            command = ["g++", "-shared", "-pthread", *map(str, objects), "-o", str(fresh)]
            _run(command)
            # What the bindings name and these sources do not have (the CPU backend) throws when it is called.
            wanted = re.findall(r" U (_ZN\w*8gradnorm\w+)", _run(["nm", "-D", str(fresh)]))
            if wanted:
                _run([*command, *(f"-Wl,--defsym={name}=host_left_out" for name in wanted)])
            os.replace(fresh, target)
        return target

    def _compile(self, source: Path) -> Path:
        import pybind11

        kernel = source.suffix == ".cu" or source.name == "control.cpp"
        includes = [HERE / "include", self.csrc] if kernel else [self.csrc, pybind11.get_include()]
        command = ["g++", "-x", "c++", *_FLAGS, "-DGRADNORM_WITH_CUDA", *(f"-I{path}" for path in includes)]
        # A header's patch is in every source.
        patched = any(name == source.name or not name.endswith(".cu") for name in self._patched)
        flags = self._flags if patched else _FAST
        if kernel:
            command += [*flags, *_WARN]
        else:
            command += ["-O0", "-w", f"-I{sysconfig.get_path('include')}"]
        # The object is named by the preprocessed text, which is not made again for files that no patch touches.
        files = [source, *sorted(self.csrc.rglob("*.h")), *sorted(self.csrc.rglob("*.cuh"))]
        files += sorted((HERE / "include").iterdir())
        known = (*flags, *(path.read_text() for path in files))
        if known not in _names:
            text = _run([*command, "-E", "-P", str(source)])
            _names[known] = hashlib.sha256((" ".join([*_FLAGS, *flags]) + text).encode()).hexdigest()[:24]
        target = self.objects / f"{_names[known]}.o"
        # Two processes that want the same object do not both compile it.
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                fresh = target.with_suffix(f".{os.getpid()}.o")
                _run([*command, "-c", str(source), "-o", str(fresh)])
                os.replace(fresh, target)
        return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


class Host:
    """A loaded host module: ``module`` is its ``_C``."""

    def __init__(self, path: Path) -> None:
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
        try:
            spec = importlib.util.spec_from_file_location(f"host_{path.parent.name}._C", path)
            assert spec is not None and spec.loader is not None
            self.module: ModuleType = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
        finally:
            sys.setdlopenflags(flags)
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LAZY)
        self._library.host_region.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self._library.host_bank_conflicts.restype = ctypes.c_uint64

    def reset(self, seed: int) -> None:
        """Forget all buffers; draw the order of blocks, warps and deliveries from this seed."""
        self._library.host_reset(seed)

    def region(self, begin: int, size: int) -> None:
        """Let kernels touch these bytes."""
        self._library.host_region(begin, size)

    def bank_conflicts(self) -> int:
        """Extra turns of ldmatrix since the last reset."""
        return int(self._library.host_bank_conflicts())
