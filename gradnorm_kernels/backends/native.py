"""The compiled module ``gradnorm_kernels._C``: loaded once, and the reason where it could not be.

It holds the cpu backend and the CUDA launchers, whose functions take addresses, sizes, strides and a stream. A machine
without a C++ compiler has the library without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch

_NAME = f"{__package__.rpartition('.')[0]}._C"
#: The element types of launchers.h by torch's.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, why there is none)."""
    try:
        found = importlib.util.find_spec(_NAME)
        module = importlib.import_module(_NAME) if found else None
    except ImportError as error:
        return None, (
            f"the compiled module {_NAME} is there but does not load ({error}): it was built for another machine or "
            "Python; install gradnorm_kernels again with pip"
        )
    if module is None:
        return None, (
            f"the compiled module {_NAME} was not built (setup.py builds it where a C++ compiler is found); install a "
            "C++17 compiler such as g++ and install gradnorm_kernels again with pip"
        )
    return module, None


def unavailable_reason() -> str | None:
    """Why there is no compiled module, as the end of a sentence; None where there is one."""
    return _load()[1]


def module() -> Any:
    """``gradnorm_kernels._C``. Raises RuntimeError with the reason where it cannot be had."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def build_info() -> dict[str, Any] | None:
    """What the module was built with, or None where there is none.

    ``cxx_compiler``, ``cuda_compiler``, ``cuda`` (the toolkit's version), ``commit``: str, the last three None where
    there is none; ``architectures`` ("sm_80", ...) and ``cpu_isas`` ("generic", "avx2", ...): lists of str.
    """
    loaded = _load()[0]
    return None if loaded is None else dict(loaded.build_info())


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels are not there, as the end of a sentence; None where they are. Says nothing about a GPU."""
    info = build_info()
    if info is None:
        return unavailable_reason()
    if info["cuda"] is None:
        return (
            "gradnorm_kernels was built without its CUDA kernels (no nvcc, or GRADNORM_BUILD_CUDA=0); put nvcc on PATH "
            "and install it again with GRADNORM_BUILD_CUDA=1, or use backend='torch'"
        )
    return None
