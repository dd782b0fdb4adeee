"""TaskDraws: rows by task in shuffled passes, and resuming."""

from __future__ import annotations

import json

import pytest
import torch

from gradnorm_kernels import TaskSampler
from gradnorm_kernels.control.draws import TaskDraws

ROWS = ["a", "b", "a", "a", "b", "a", "a", "c"]


def test_a_tasks_rows_come_once_each_before_any_comes_again():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    draws = TaskDraws(ROWS, TaskSampler(["a", "b"], "uniform"), seed=4)
    rows = draws.draw(200)
    assert torch.equal(torch.random.get_rng_state(), state)
    passes = {}
    for task in "ab":
        own = [i for i, name in enumerate(ROWS) if name == task]
        drawn = [row for row in rows if ROWS[row] == task]
        assert len(drawn) > 50
        passes[task] = [drawn[i : i + len(own)] for i in range(0, len(drawn) - len(own), len(own))]
        assert all(sorted(each) == own for each in passes[task])
    assert len(set(map(tuple, passes["a"]))) > 5  # shuffled anew
    assert set(rows) == {0, 1, 2, 3, 4, 5, 6}  # "c" was not asked for
    assert TaskDraws(ROWS, TaskSampler(["a", "b"], "uniform"), seed=4).draw(200) == rows
    assert TaskDraws(ROWS, TaskSampler(["a", "b"], "uniform"), seed=5).draw(200) != rows
    with pytest.raises(ValueError, match=r"no row of the tasks \['d'\]"):
        TaskDraws(ROWS, TaskSampler(["a", "d"], "uniform"))


def test_a_saved_state_goes_on_draw_for_draw():
    draws, other = (TaskDraws(ROWS, TaskSampler(["a", "b"], "inverse", seed=2), seed=4) for _ in range(2))
    draws.sampler.update({"a": 4.0, "b": 1.0})
    draws.draw(13)
    other.load_state_dict(json.loads(json.dumps(draws.state_dict())))
    assert other.draw(40) == draws.draw(40)
    assert other.state_dict() == draws.state_dict()


def test_any_seed_that_a_trainer_takes_shuffles_rows():
    """Dates are popular seeds, and the numbers made of them are larger than torch's."""
    found = [TaskDraws(ROWS, TaskSampler(["a", "b"], "uniform"), seed=seed).draw(40) for seed in (20261130, 2**32 - 1)]
    assert found[0] != found[1]
    again = TaskDraws(ROWS, TaskSampler(["a", "b"], "uniform"), seed=20261130)
    assert again.draw(40) == found[0]
