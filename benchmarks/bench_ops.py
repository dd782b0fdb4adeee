"""pytest-benchmark: every provider at a few shapes, checked against the float64 reference; on a GPU if there is one.

python -m pytest benchmarks/bench_ops.py --benchmark-only

Each timed call ends with a synchronisation, on a warm cache. ``python -m benchmarks ops`` measures with events, a cold
cache and pairs.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.batches import make_batch, truth
from benchmarks.providers import PROVIDERS, TILES, gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS, LENGTHS, TOKENS = ([576, 4096], [256, 2048], 16384) if DEVICE == "cuda" else ([576, 1024], [32, 256], 2048)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Norms by one algorithm are only for the cost model, and candidate tiles only for the choice among them.
NAMES = [name for name in PROVIDERS if not name.endswith(("wgrad_norms", "gram_norms")) and name not in TILES]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_provider(benchmark: BenchmarkFixture, name: str, d: int, length: int) -> None:
    batch = make_batch(d, d, length, TOKENS, ragged=False, device=DEVICE, dtype=DTYPE)
    provider = PROVIDERS[name]
    reason = provider.unavailable_reason(batch)
    if reason is not None:
        pytest.skip(reason)
    run = provider.prepare(batch)
    gate(provider, batch, truth(batch), run)

    def timed() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"d {d}, {length} tokens per sample"
    benchmark.pedantic(timed, rounds=10, warmup_rounds=1)
