"""Shared by all tests: what is skipped, with its reason, and what is left to a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="run the tests in tests/gpu on the CPU, as far as they can: set TRITON_INTERPRET=1 as well",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The interpreted tests run in their own process (``make test-interpreted``), or where they are asked for."""
    asked = os.environ.get("TRITON_INTERPRET") == "1" or any("interpreted" in str(arg) for arg in config.args)
    return True if collection_path.name == "interpreted" and not asked else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--rehearse"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device that torch can use, and there is none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
