"""The recipe of docs/trainers.md in torchtitan's own training step, against brute force: `make test-torchtitan`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.torchtitan import cpu_trainer as cpu
from tests.tracking.brute_force import u_statistic

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed: make test-torchtitan runs these tests", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Any:
    cpu.start(0, 1, free_port())
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def truth(trainer: Any, before: dict[str, torch.Tensor], *, packed: bool) -> dict[str, torch.Tensor]:
    """{task: [n, P] gradients} of the documents of the first step, by the trainer's weights before it."""
    model = cpu.replica(trainer, before)
    measured = [name.replace("_checkpoint_wrapped_module.", "") for name in trainer.tracker.layers]
    parameters = [p for name in measured for p in model.get_submodule(name).parameters(recurse=False)]
    assert parameters
    found: dict[str, list[torch.Tensor]] = {task: [] for task in cpu.TASKS}
    for number in range(2):
        for task, loss in cpu.document_losses(model, number, packed=packed):
            grads = torch.autograd.grad(loss, parameters)
            found[task].append(torch.cat([grad.flatten().double() for grad in grads]))
    return {task: torch.stack(grads) for task, grads in found.items()}


def check(stats: Any, right: dict[str, torch.Tensor]) -> None:
    for task, g in right.items():
        size = float(g.square().sum(1).mean())
        assert stats[task]["n"] == len(g)
        assert stats[task]["mean_sq_norm"] == pytest.approx(size, rel=1e-4)
        assert stats[task]["sq_norm"] == pytest.approx(u_statistic(g), abs=1e-4 * size)


def numbers(stats: Any) -> dict[str, dict[str, float]]:
    return {task: {name: getattr(stats[task], name) for name in ("n", "mean_sq_norm", "sq_norm")} for task in stats}


def measured(folder: Path, *, packed: bool, chunked: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """(the page's trainer after one step, its weights before)."""
    trainer = cpu.example("torchtitan documents" if packed else "torchtitan")(
        cpu.config(folder, packed=packed, chunked=chunked)
    )
    cpu.sum_over_gloo(trainer)
    before = cpu.weights(trainer)
    cpu.step(trainer)
    return trainer, before


@pytest.mark.parametrize(
    ("packed", "chunked"), [(False, False), (True, False), (False, True)], ids=["rows", "documents", "chunked loss"]
)
def test_u_of_the_trainers_own_step(packed: bool, chunked: bool, tmp_path: Path) -> None:
    trainer, before = measured(tmp_path, packed=packed, chunked=chunked)
    check(numbers(trainer.stats), truth(trainer, before, packed=packed))


def test_training_stays_the_same(tmp_path: Path) -> None:
    """Two steps with and without the tracker, under torchtitan's selective activation checkpointing."""
    from torchtitan.trainer import Trainer

    class Plain(Trainer):  # type: ignore[misc]
        def post_dataloading_process(self, input_dict: Any, labels: Any) -> Any:
            input_dict.pop("tasks", None)
            return super().post_dataloading_process(input_dict, labels)

    found = []
    for kind in (Plain, cpu.example("torchtitan")):
        trainer = kind(cpu.config(tmp_path, packed=False))
        cpu.step(trainer)
        cpu.step(trainer)
        found.append(cpu.weights(trainer))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def rank_main(folder: str, rank: int, port: str) -> None:
    """One of two ranks over which the model is sharded, with one of the two micro-batches."""
    cpu.start(rank, 2, port)
    trainer, before = measured(Path(folder), packed=False)
    assert all(isinstance(p, DTensor) for p in trainer.model_parts[0].parameters())
    torch.save(before, Path(folder, f"before{rank}.pt"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(numbers(trainer.stats)))
    torch.distributed.destroy_process_group()


def test_two_ranks_over_which_the_model_is_sharded(tmp_path: Path) -> None:
    """One U over the rows of both, the same on each."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.torchtitan.test_torchtitan_step", str(tmp_path)]
    environment, port = {**os.environ, "OMP_NUM_THREADS": "1"}, free_port()
    ranks = [subprocess.Popen([*command, str(rank), port], cwd=ROOT, env=environment) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    trainer, _ = measured(tmp_path, packed=False)  # its configuration: sharded weights are initialised differently
    check(first, truth(trainer, torch.load(tmp_path / "before0.pt"), packed=False))


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
