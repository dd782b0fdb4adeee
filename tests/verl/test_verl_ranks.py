"""verl's update on two ranks (gloo, FSDP2): one U over the prompts of both, the same metrics on each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl.workers", reason="verl is not installed: make test-verl runs these tests")

from gradnorm_kernels.integrations.verl import attach
from tests.verl import cpu_worker as cpu

ROOT = Path(__file__).resolve().parents[2]


def rank_main(folder: str, rank: int, port: str) -> None:
    """One of two ranks, with half of the prompts."""
    from verl.utils.tensordict_utils import index_select_tensor_dict

    cpu.register_cpu()
    cpu.join(rank, 2, port)
    worker = cpu.training_worker(Path(folder), engine={"micro_batch_size_per_gpu": 12})
    worker.set_loss_fn(cpu.actor_loss())
    attach(worker, accumulate="exact")
    data = index_select_tensor_dict(cpu.rollouts(), list(range(12 * rank, 12 * (rank + 1))))
    log = cpu.reduced(worker.train_mini_batch(data=cpu.prepared(data, size=24)))
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({key: float(value) for key, value in log.items() if "/tasks/" in key})
    )


def test_two_ranks_give_the_u_of_one(tmp_path: Path) -> None:
    cpu.start()
    folder = cpu.saved_model(tmp_path)
    worker = cpu.training_worker(folder, engine={"micro_batch_size_per_gpu": 24})
    worker.set_loss_fn(cpu.actor_loss())
    attach(worker, accumulate="exact")
    alone = cpu.update(worker, cpu.rollouts())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", "tests.verl.test_verl_ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), port], cwd=ROOT, env=environment) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for task in cpu.TASKS:
        for field in ("grad_norm_sq", "n", "mean_sq_norm", "plug_in"):
            key = f"actor/tasks/{task}/{field}"
            assert first[key] == pytest.approx(float(alone[key]), rel=1e-5), key


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
