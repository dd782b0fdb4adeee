"""Options of a tracker that do not fit are refused by name, before the model is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradnorm_kernels as gk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": "no"}, "fused must be True or False, got 'no'"),
        ({"fused": 1}, "fused must be True or False, got 1"),
        ({"frozen": "false"}, "frozen must be True or False, got 'false'"),
        ({"plan": 8}, "plan must be a gradnorm_kernels.StepPlan or None, got int"),
        ({"batch_dim": {"0": 0, "fc": 0}}, "batch_dim names 'fc', which no measured layer matches.* 0, 1"),
        ({"accumulate": "pair"}, "accumulate must be one of 'auto', 'pairs', 'exact', 'sketch', got 'pair'"),
        ({"sketch_width": 1}, "sketch_width must be an int of at least 2, got 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    with pytest.raises((TypeError, ValueError), match=message):
        gk.GradNormTracker(model, "all", **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((-1, 4, True, 2), "samples must be an int of at least 1, got -1"),
        ((8, 0, True, 2), "together must be an int of at least 1, got 0"),
        ((8, 4, 2, True), "tasks must be an int of at least 1, got True"),
        ((8, 4, 2, 2), "whole must be True or False, got 2"),
    ],
)
def test_plans_that_do_not_fit(plan: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.StepPlan(*plan)


def test_a_forward_outside_the_block_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    tracker = gk.GradNormTracker(model, ["1"])
    loss = model(torch.randn(4, 3)).mean()
    with pytest.raises(RuntimeError, match="Run forward and backward inside the block"), tracker.microbatch(["a"] * 4):
        loss.backward()


def test_ids_for_too_few_rows_are_said_in_a_later_micro_batch() -> None:
    """The first one has shown where the rows lie; then the ids are wrong, and not the layer."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    tracker = gk.GradNormTracker(model, "all", unverified="raise")
    with tracker.microbatch(["a"] * 4):
        model(torch.randn(4, 7, 3)).mean().backward()
    said = "with its 3 rows; pass task_ids for every row the model sees"
    with pytest.raises(ValueError, match=said), tracker.microbatch(["a"] * 3):
        model(torch.randn(4, 7, 3)).mean().backward()


def test_step_inside_the_block_is_refused() -> None:
    """It would give the estimates of a step without the micro-batch, which would count in the next one."""
    model = nn.Sequential(nn.Linear(3, 5))
    tracker = gk.GradNormTracker(model, "all")
    with pytest.raises(RuntimeError, match=r"close the block before step\(\)"), tracker.microbatch(["a"] * 4):
        model(torch.randn(4, 3)).mean().backward()
        tracker.step()
    with tracker.microbatch(["a"] * 4):
        model(torch.randn(4, 3)).mean().backward()
    assert tracker.step()["a"].n == 4


@pytest.mark.parametrize("scale", [0, 0.0, True, torch.tensor(0.0)])
def test_one_factor_that_leaves_no_gradient_is_refused(scale: Any) -> None:
    """``row_scale=1 // steps`` is 0, and U was 0 without a word. Rows of their own may all be without a gradient."""
    model = nn.Sequential(nn.Linear(3, 5))
    tracker = gk.GradNormTracker(model, "all")
    with (
        pytest.raises(ValueError, match="row_scale must be the factor"),
        tracker.microbatch(["a"] * 4, row_scale=scale),
    ):
        pass
    with tracker.microbatch(["a"] * 4, row_scale=torch.zeros(4)):
        model(torch.randn(4, 3)).mean().backward()
    assert tracker.step()["a"].n_effective == 0
