"""pytest-benchmark: every provider at one shape a layer size, each gated on the float64 reference.

python -m pytest benchmarks/bench_ops.py
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import gate, make_batch, truth
from benchmarks.providers import PROVIDERS


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("d", [576, 1024])
@pytest.mark.parametrize("name", PROVIDERS)
def test_provider(benchmark: BenchmarkFixture, name: str, d: int, length: int) -> None:
    batch = make_batch(d, d, length, tokens=2048, ragged=False)
    provider = PROVIDERS[name]
    if not provider.available(batch):
        pytest.skip("does not fit")
    gate(provider, batch, truth(batch))
    benchmark.group = f"d {d}, {length} tokens a sample"
    benchmark.pedantic(provider.prepare(batch), rounds=10, warmup_rounds=1)
