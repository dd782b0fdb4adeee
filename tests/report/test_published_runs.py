"""The published logs of `make train`: the numbers of their page, and README's table, follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from gradnorm_grpo.report.verdict import imbalance
from gradnorm_grpo.runlog import Run, read_run
from gradnorm_grpo.summary import TaskResult, task_results

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/runs/smollm2/README.md"


def published(pattern: str) -> list[Run]:
    return [read_run(path.parent) for path in sorted(PAGE.parent.glob(f"{pattern}/metrics.jsonl"))]


def probed(run: Run) -> list[TaskResult]:
    """The tasks' results of the probe at the end."""
    assert run.final_probe is not None
    return task_results(run.final_probe)


def table(runs: list[Run]) -> str:
    """Markdown: U of every task in thousandths with its standard error, prompts per task, and the imbalance."""
    found = [{r.name: r for r in probed(run)} for run in runs]
    seeds = [f"seed {run.info['config']['seed']}" for run in runs]
    lines = [f"| task | {' | '.join(seeds)} |", "|---" * 4 + "|"]
    for name in sorted(found[0], key=lambda name: -sum(results[name].sq_norm for results in found)):
        cells = []
        for results in found:
            r = results[name]
            value = f"{1e3 * r.sq_norm:.2g} ± {1e3 * r.std_error:.2g}".replace("-", "−")
            cells.append(value if r.resolved else f"{value}, not significant")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    prompts = [f"{max(r.n for r in results.values()):.0f}" for results in found]
    lines.append(f"| prompts per task | {' | '.join(prompts)} |")
    ratios = [imbalance(list(results.values())) for results in found]
    cells = ["undecided" if r is None else f"{r.ratio:.2g} ({r.low:.2g} to {r.high:.2g})" for r in ratios]
    return "\n".join([*lines, f"| loudest over quietest | {' | '.join(cells)} |"]) + "\n"


@pytest.mark.parametrize("folder", ["seed42", "seed43", "seed44", "slow_machine"])
def test_the_pages_numbers_follow_from_the_logs(folder: str) -> None:
    (run,), text = published(folder), " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"{folder}/metrics.jsonl" in text and f"Commit {run.info['commit'][:7]}" in text
    results = probed(run)
    for r in results:
        value = f"{r.name} {1e3 * r.sq_norm:.2g} ± {1e3 * r.std_error:.2g}".replace("-", "−")
        assert value in text
    assert f"{results[0].n:.0f} prompts per task" in text


def test_readmes_table_follows_from_the_logs_of_three_seeds() -> None:
    runs = published("seed*")
    assert [run.info["config"]["seed"] for run in runs] == [42, 43, 44]
    assert not any(run.info["commit"].endswith("-dirty") for run in runs)
    assert table(runs) in (ROOT / "README.md").read_text(encoding="utf-8")
