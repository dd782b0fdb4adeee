"""Several processes over gloo against one process over the same global batch; what each runs is in
distributed_cases.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import gradnorm_kernels as gk
from gradnorm_kernels.tracking import distributed

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, world: int, *cases: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the cases on ``world`` processes; one result a rank."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.tracking.distributed_cases",
                ",".join(cases),
                str(rank),
                str(world),
                str(folder),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (
            2,
            (
                "ddp",
                "errors",
                "fsdp",
                "fsdp_units",
                "packed",
                "exact",
                "spread",
                "uneven",
                "tensor_parallel",
                "sequence_parallel",
                "sketch",
                "automatic",
                "unbiased",
            ),
        ),
        (4, ("tensor_and_data_parallel",)),
        pytest.param(4, ("ddp", "fsdp", "exact", "spread", "uneven"), marks=pytest.mark.slow),
        pytest.param(4, ("sketch", "automatic", "unbiased"), marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one_process(tmp_path: Path, world: int, cases: tuple[str, ...]) -> None:
    results = launch(tmp_path, world, *cases)
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.split() == [word for case in cases for word in ("passed", case)]


def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    start = time.monotonic()
    survivor, dead = launch(tmp_path, 2, "dies")
    assert dead.returncode == 3
    assert survivor.returncode == 1
    assert "rank 0 could not exchange the step's sums with the other ranks" in survivor.stderr, survivor.stderr
    assert time.monotonic() - start < 150


def test_process_group_is_checked() -> None:
    with pytest.raises(TypeError, match=r'process_group must be "auto"'):
        gk.GradNormTracker(torch.nn.Sequential(torch.nn.Linear(2, 2)), "all", process_group=3)
    assert distributed.resolve("auto") is None, "nothing is initialised in this process"
