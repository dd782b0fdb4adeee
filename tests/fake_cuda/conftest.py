"""Fixtures of the tests on CUDA tensors without a GPU; ``run.py`` brings the device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_host.build import Host, Tree
from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.launches import install


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> ctypes.CDLL:
    return pytestconfig.fake_cuda[0]  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="session")
def objects(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.fake_cuda[1]  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory, objects: Path) -> Host:
    return Host(Tree(tmp_path_factory.mktemp("csrc"), objects).module())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> Iterator[FakeCuda]:
    """A machine with two GPUs on which Triton runs."""
    with install(monkeypatch, library) as fake:
        yield fake


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, host: Host) -> Iterator[FakeCuda]:
    """A machine with two GPUs on which both compiled backends run."""
    with install(monkeypatch, library, host) as fake:
        yield fake
