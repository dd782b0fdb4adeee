"""Prompts drawn by task through verl's own data loader and V1 trainer class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers", reason="verl is not installed: make test-verl runs these tests")
pytest.importorskip("transfer_queue", reason="verl's V1 trainer needs TransferQueue")

from datasets import Dataset
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader

from gradnorm_kernels.integrations.verl import DrawnRows, attach, draw_tasks
from tests.verl import cpu_worker as cpu


class Rows(torch.utils.data.Dataset):
    """What draw_tasks needs of verl's RLHFDataset: the table and its rows."""

    def __init__(self, tasks: list[str]) -> None:
        self.dataframe = Dataset.from_dict({"data_source": tasks, "row": list(range(len(tasks)))})

    def __len__(self) -> int:
        return len(self.dataframe)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataframe[index]


DATA = Rows([cpu.TASKS[i % 3] for i in range(30)])


@pytest.fixture
def trainer_base() -> Any:
    """verl's module with the V1 trainer; what draw_tasks replaces is put back after the test."""
    cpu.start()
    from verl.trainer.ppo.v1 import trainer_base as module

    before = module.create_rl_sampler, module.PPOTrainer._update_actor
    yield module
    module.create_rl_sampler, module.PPOTrainer._update_actor = before


def settings(**changes: Any) -> Any:
    return OmegaConf.create({"dataloader_num_workers": 0, "shuffle": True, "seed": 5, **changes})


def loader(rows: DrawnRows, batch_size: int = 6) -> StatefulDataLoader:
    return StatefulDataLoader(DATA, batch_size=batch_size, num_workers=0, drop_last=True, collate_fn=list, sampler=rows)


def estimates(**values: float) -> dict[str, float]:
    """An update's metrics by verl's names."""
    line = {}
    for task, value in values.items():
        line |= {
            f"actor/tasks/{task}/{field}": number
            for field, number in {
                "grad_norm_sq": value, "n": 4.0, "plug_in": abs(value), "mean_sq_norm": 1.0, "pair_weight": 12.0
            }.items()
        }  # fmt: skip
    return line


def test_draws_follow_the_estimates_of_earlier_updates(trainer_base: Any) -> None:
    draw_tasks("proportional_sq", floor=0.0)
    rows = trainer_base.create_rl_sampler(settings(), DATA)
    batches = iter(loader(rows, batch_size=15))
    assert {row["data_source"] for row in next(batches)} == set(cpu.TASKS)
    rows.update(estimates(sums=0.0, facts=0.0, loud=2.0))
    drawn = next(batches)
    assert Counter(row["data_source"] for row in drawn) == {"loud": 15}, "drawn when the loader asks, not before"
    assert len({row["row"] for row in drawn}) == 10, "each of the task's ten rows before any comes again"
    assert rows.metrics()["actor/tasks/loud/sampling_prob"] == 1.0
    assert next(batches, None) is None, "a pass has as many rows as the data"


def test_verls_checkpoint_of_the_loader_continues_draw_for_draw(trainer_base: Any) -> None:
    draw_tasks("proportional", floor=0.2)

    def built() -> StatefulDataLoader:
        return loader(trainer_base.create_rl_sampler(settings(), DATA))

    first = built()
    batches = iter(first)
    next(batches)
    first.sampler.update(estimates(sums=1.0, facts=0.1, loud=4.0))
    next(batches)
    state = first.state_dict()
    expected = list(batches) + list(iter(first))
    resumed = built()
    resumed.load_state_dict(state)
    found = list(iter(resumed))
    assert len(found) == 3
    assert found + list(iter(resumed)) == expected
    assert resumed.sampler.sampler.sq_norms == first.sampler.sampler.sq_norms


def test_what_does_not_fit_is_refused_by_name(trainer_base: Any) -> None:
    with pytest.raises(ValueError, match="strategy must be one of"):
        draw_tasks("loudest")
    draw_tasks()
    with pytest.raises(ValueError, match=r"data.dataloader_num_workers=4 .*: set it to 0"):
        trainer_base.create_rl_sampler(settings(dataloader_num_workers=4), DATA)
    draw_tasks(task_column="domain")
    with pytest.raises(ValueError, match="task_column='domain' is not a column of the training data"):
        trainer_base.create_rl_sampler(settings(), DATA)


class ActorGroup:
    """verl's worker group, with one real worker in this process instead of Ray's."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.seed = worker, 0

    def update_actor(self, batch: Any) -> Any:
        self.seed += 1
        size = batch.extra_info["mini_batch_size"]
        data = cpu.prepared(cpu.rollouts(seed=self.seed), size=size)
        return self.worker.train_mini_batch(data=data)


def trainer(trainer_base: Any, worker: Any) -> Any:
    """verl's synchronous V1 trainer with a real actor worker, and without its rollout servers."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    made = object.__new__(PPOTrainerSync)
    made.config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "actor": {
                    "ppo_mini_batch_size": 8,
                    "ppo_epochs": 1,
                    "calculate_entropy": False,
                    "entropy_coeff": 0.0,
                    "data_loader_seed": 1,
                    "shuffle": False,
                },
                "rollout": {"n": 3, "temperature": 1.0},
            }
        }
    )
    made.actor_rollout_wg = ActorGroup(worker)
    made.train_dataloader = loader(trainer_base.create_rl_sampler(settings(), DATA))
    return made


def test_the_trainers_update_feeds_the_sampler(trainer_base: Any, tmp_path: Path) -> None:
    draw_tasks("proportional")
    draw_tasks("proportional", floor=0.0)  # a second call replaces the first: one update is taken in once
    worker = cpu.training_worker(cpu.saved_model(tmp_path))
    worker.set_loss_fn(cpu.actor_loss())
    attachment = attach(worker, accumulate="exact")
    made = trainer(trainer_base, worker)
    metrics: dict[str, Any] = {}
    made._update_actor(SimpleNamespace(extra_info={}), metrics)
    sampler = made.train_dataloader.sampler.sampler
    assert sampler.sq_norms == {task: attachment.last[task].sq_norm for task in sampler.tasks}
    for task, probability in sampler.probabilities.items():
        assert metrics[f"actor/tasks/{task}/sampling_prob"] == probability
    assert {estimate.steps for estimate in sampler._estimates.values()} == {1}


def test_draws_without_measurements_are_refused(trainer_base: Any, tmp_path: Path) -> None:
    draw_tasks()
    worker = cpu.training_worker(cpu.saved_model(tmp_path))
    worker.set_loss_fn(cpu.actor_loss())
    made = trainer(trainer_base, worker)
    with pytest.raises(ValueError, match=r"no estimates to draw tasks by: call measure_actor"):
        made._update_actor(SimpleNamespace(extra_info={}), {})


def test_verls_own_sampler_without_draw_tasks(trainer_base: Any) -> None:
    assert not isinstance(trainer_base.create_rl_sampler(settings(), DATA), DrawnRows)
