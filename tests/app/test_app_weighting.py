"""task_weighting in the application: what the loss becomes, what is measured all the same, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from tests.app.test_app_objective import _batch, _loop, _rewards, _settings


def _gradients(loop) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in loop.model.parameters()]
    loop.model.zero_grad()
    return found


@pytest.mark.parametrize("share_prompt", ["true", "false"])
def test_weights_scale_the_tasks_gradients_and_leave_u(share_prompt: str) -> None:
    loop = _loop(_settings(loss_type="grpo", share_prompt=share_prompt, task_weighting="equal_pull"))
    batch = _batch(loop, _rewards(6, 3))
    assert loop.balancer.weights == {"copy": 1.0, "sort": 1.0}, "before anything was measured"
    _, plain = loop.backward(batch, [], measure=True)
    both = _gradients(loop)
    advantages, parts = batch.advantages, {}
    for task in ("copy", "sort"):
        only = torch.tensor([[float(name == task)] for name in batch.tasks])
        batch.advantages = advantages * only
        loop.backward(batch, [], measure=False)
        parts[task] = _gradients(loop)
    batch.advantages, batch.weights = advantages, {"copy": 0.25, "sort": 1.75}
    _, stats = loop.backward(batch, [], measure=True)
    for whole, a, b, got in zip(both, parts["copy"], parts["sort"], _gradients(loop), strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(got, 0.25 * a + 1.75 * b, rtol=1e-3, atol=1e-6)
    for task in ("copy", "sort"):
        assert stats[task].sq_norm == pytest.approx(plain[task].sq_norm, rel=1e-4, abs=1e-9)
        assert stats[task].mean_sq_norm == pytest.approx(plain[task].mean_sq_norm, rel=1e-4)


def test_a_step_logs_the_weights_and_a_checkpoint_keeps_them() -> None:
    loop = _loop(_settings(loss_type="grpo", task_weighting="equal_pull", learning_rate=1e-3))
    first = loop.step()
    assert first["tasks/copy/loss_weight"] == first["tasks/sort/loss_weight"] == 1.0
    other = _loop(_settings(loss_type="grpo", task_weighting="equal_pull", learning_rate=1e-3))
    other.load_state_dict(copy.deepcopy(loop.state_dict()))
    assert other.balancer.weights == loop.balancer.weights
    if loop.balancer.gram.matrix.diagonal().max() > 0:
        line = loop.step()
        weights = [line["tasks/copy/loss_weight"], line["tasks/sort/loss_weight"]]
        assert sum(weights) / 2 == pytest.approx(1.0), "both tasks have half of the prompts"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="task_weighting='mgda' needs track=true and beta=0, got beta=0.1"):
        _settings(task_weighting="mgda", beta=0.1)
    with pytest.raises(UserError, match="needs track=true and beta=0, got track=false"):
        _settings(task_weighting="mgda", track=False)
    with pytest.raises(UserError, match="task_weighting"):
        _settings(task_weighting="equal")
    with pytest.raises(UserError, match="task_weighting_decay must lie between 0 and 1"):
        _settings(task_weighting="mgda", task_weighting_decay=1.0)
