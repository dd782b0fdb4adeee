"""``run.py GUARD OBJECTS ARGUMENTS``: pytest with a device called "cuda", which torch must find when it is loaded."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

if __name__ == "__main__":
    guard, objects, *arguments = sys.argv[1:]
    library = ctypes.CDLL(guard)
    library.fake_stream.restype = ctypes.c_long
    library.fake_set_stream.argtypes = [ctypes.c_int, ctypes.c_long]

    import pytest

    class Given:
        """What was given, for the fixtures."""

        def pytest_configure(self, config: pytest.Config) -> None:
            config.fake_cuda = library, Path(objects)  # type: ignore[attr-defined]

    sys.exit(pytest.main(arguments, plugins=[Given()]))
