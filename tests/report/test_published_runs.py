"""The published logs of `make train`: the numbers of their page follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from gradnorm_grpo.runlog import read_run
from gradnorm_grpo.summary import task_results

PAGE = Path(__file__).resolve().parents[2] / "docs/runs/smollm2/README.md"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in PAGE.parent.glob("*/metrics.jsonl")), ids=lambda p: p.name
)
def test_the_pages_numbers_follow_from_the_logs(folder: Path) -> None:
    run, text = read_run(folder), " ".join(PAGE.read_text(encoding="utf-8").split())
    assert run.final_probe is not None and f"{folder.name}/metrics.jsonl" in text
    assert f"Commit {run.info['commit'][:7]}" in text
    results = task_results(run.final_probe)
    for r in results:
        value = f"{r.name} {1e3 * r.sq_norm:.2g} ± {1e3 * r.std_error:.2g}".replace("-", "−")
        assert value in text
    assert f"{results[0].n:.0f} prompts per task" in text
