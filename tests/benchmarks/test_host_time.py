"""The benchmark of the host's time: it runs, counts the launches of an H200 and leaves everything as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import host_time, records
from gradnorm_kernels import backends, ops
from gradnorm_kernels.backends import native

pytestmark = pytest.mark.skipif(
    native.cuda_unavailable_reason() is not None, reason=str(native.cuda_unavailable_reason())
)


def test_a_row_per_call_with_its_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as tests/fake_cuda/counts.py has for index tensors on the device."""
    for name, value in {"WIDTHS": (576,), "REPEATS": 2, "CALLS_PER_REPEAT": 1}.items():
        monkeypatch.setattr(host_time, name, value)
    threads = torch.get_num_threads()
    host_time.main(["--out", str(tmp_path / "found.json")])
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "found.json").read_text())
    launches = {(row["length"], row["call"]): row["launches"] for row in record["rows"]}
    assert launches == {
        (64, "norms"): 5,
        (64, "dW"): 5,
        (64, "groups, dW"): 6,
        (64, "group Gram"): 6,
        (2048, "norms"): 4,
        (2048, "dW"): 4,
        (2048, "groups, dW"): 5,
        (2048, "group Gram"): 5,
    }
    assert all(0 < row["lower_quartile"] <= row["seconds"] <= row["upper_quartile"] for row in record["rows"])


def test_nothing_stays_replaced() -> None:
    before = backends.status()
    x, dy = (torch.ones(4, 8, dtype=torch.bfloat16) for _ in range(2))
    with host_time.silent() as module:
        ops.fused_grad_norm(x, dy, backend="cuda")
        assert module.launches
    assert backends.status() == before
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run"):
        ops.fused_grad_norm(x, dy, backend="cuda")


def test_the_table_in_the_docs_is_that_of_the_result_file() -> None:
    record = records.read(records.RESULTS / "host_time-epyc-2-cores.json")
    text = (records.RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    section = text[text.index("## Host time of a call\n") :].partition("\n## ")[0]
    printed = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", section, re.MULTILINE)
    found = {(int(d), int(length), *cells.split(" | ")) for d, length, cells in printed}
    expected: dict[tuple[int, int], list[str]] = {}
    for row in record["rows"]:
        expected.setdefault((row["d"], row["length"]), []).append(f"{1e6 * row['seconds']:.0f} ({row['launches']})")
    assert found == {(*shape, *cells) for shape, cells in expected.items()}
    times = [1e6 * row["seconds"] for row in record["rows"]]
    assert f"missed: {min(times):.0f} to {max(times):.0f} µs" in " ".join(section.split())
