"""The application's objective: advantages, every loss type against a plain formula, and U against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Batch, Grpo
from gradnorm_grpo.objective import advantages, row_weights, token_losses
from gradnorm_grpo.rollout import Prompter, Rollouts
from gradnorm_grpo.settings import LOSS_TYPES, Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer

TASKS = [{"name": "copy", "source": "synthetic"}, {"name": "sort", "source": "synthetic"}]


def _settings(**changes: object) -> Settings:
    base = {
        "prompt_template": "{question} = ",
        "num_generations": 3,
        "per_device_train_batch_size": 18,
        "max_completion_length": 7,
        "temperature": 0.7,
        "eval_prompts": 2,
        "tasks": TASKS,
        "max_grad_norm": 0.0,
    }
    return Settings(**{**base, **changes})


def _loop(settings: Settings, reference: torch.nn.Module | None = None) -> Grpo:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 32, 2, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0)  # gradients of a useful size
    tasks = build_tasks(settings.tasks, 0, 2)
    return Grpo(settings, model, tokenizer, tasks, Prompter(tokenizer, tasks, settings), reference)


def _batch(loop: Grpo, rewards: torch.Tensor) -> Batch:
    """Rollouts with rewards made up, so that they differ inside groups; completions of different lengths."""
    n = rewards.shape[0]
    batch = loop.rollout(["copy"] * (n // 2) + ["sort"] * (n - n // 2))
    lengths = torch.tensor(list(itertools.islice(itertools.cycle([1, 7, 3, 5, 2]), rewards.numel())))
    width = batch.rollouts.completion_ids.shape[1]
    assert width == 7, "a random model hardly ever ends early; the lengths below rely on it"
    batch.rollouts.completion_mask = (torch.arange(width)[None] < lengths[:, None]).long()
    batch.rewards = rewards
    batch.advantages = advantages(rewards, loop.settings.scale_rewards)
    return batch


def _row_logprobs(loop: Grpo, batch: Batch, row: int) -> torch.Tensor:
    """One completion on its own: no padding, no sharing, log_softmax of the whole sequence."""
    rollouts, prompt = batch.rollouts, row // batch.rollouts.group
    ids = rollouts.prompt_ids[prompt][rollouts.prompt_mask[prompt] > 0]
    completion = rollouts.completion_ids[row][rollouts.completion_mask[row] > 0]
    logits = loop.model(torch.cat([ids, completion])[None]).logits[0] / loop.settings.temperature
    return logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, completion[:, None])[:, 0]


def _plain_loss(loop: Grpo, batch: Batch) -> torch.Tensor:
    """The step's loss, from the definitions, in one piece; micro-batches enter through the normalisers only."""
    s, group = loop.settings, batch.rollouts.group
    sums, lengths = [], []
    for row in range(batch.rewards.numel()):
        logprobs = _row_logprobs(loop, batch, row)
        ratio = torch.exp(logprobs - logprobs.detach())
        advantage = batch.advantages.reshape(-1)[row]
        sums.append(-torch.min(ratio * advantage, ratio.clamp(1 - s.epsilon, 1 + s.epsilon) * advantage).sum())
        lengths.append(len(logprobs))
    rows = s.per_device_train_batch_size
    micro = [range(i, min(i + rows, len(sums))) for i in range(0, len(sums), rows)]
    if s.loss_type == "grpo":
        return sum(sums[i] / lengths[i] / len(part) for part in micro for i in part) / len(micro)
    if s.loss_type == "bnpo":
        return sum(sum(sums[i] for i in part) / sum(lengths[i] for i in part) for part in micro) / len(micro)
    if s.loss_type == "dr_grpo":
        return sum(sum(sums[i] for i in p) / (len(p) * s.max_completion_length) for p in micro) / len(micro)
    assert group == s.num_generations
    return sum(sums) / sum(lengths)


def _rewards(n: int, group: int) -> torch.Tensor:
    rewards = torch.randint(0, 2, (n, group), generator=torch.Generator().manual_seed(5)).float()
    rewards[0] = 1.0  # a prompt without a gradient: a sample all the same
    return rewards


@pytest.mark.parametrize(
    ("loss_type", "share_prompt", "layers"),
    [
        *((loss_type, "false", "last_attention") for loss_type in LOSS_TYPES),
        ("grpo", "true", "last_attention"),
        ("grpo", "false", "all"),  # with the output embedding among them
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_and_u_match_the_definitions(
    loss_type: str, share_prompt: str, layers: str, accumulation: int
) -> None:
    settings = _settings(
        loss_type=loss_type,
        share_prompt=share_prompt,
        tracker_layers=layers,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=18 // accumulation,
    )
    loop = _loop(settings)
    batch = _batch(loop, _rewards(6, 3))
    loss, stats = loop.backward(batch, [], measure=True)
    got = {name: p.grad.clone() for name, p in loop.model.named_parameters()}

    loop.model.zero_grad()
    plain = _plain_loss(loop, batch)
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), abs=1e-6)
    for name, p in loop.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=2e-4, atol=2e-7 + 1e-5 * float(p.grad.abs().max()))

    # U by brute force: each prompt's gradient of the mean over its completions of the mean token loss.
    weights = [p for name, p in loop.model.named_parameters() if name.rpartition(".")[0] in loop.tracker.layers]
    gradients = []
    for prompt in range(6):
        loss = 0.0
        for row in range(3 * prompt, 3 * prompt + 3):
            logprobs = _row_logprobs(loop, batch, row)
            ratio = torch.exp(logprobs - logprobs.detach())
            loss = loss - (ratio * batch.advantages.reshape(-1)[row]).mean() / 3
        parts = torch.autograd.grad(loss, weights)
        gradients.append(torch.cat([part.reshape(-1).double() for part in parts]))
    per_micro = 6 // accumulation
    for task in ("copy", "sort"):
        pairs = [
            float(gradients[p] @ gradients[q])
            for p in range(6)
            for q in range(6)
            if p != q and batch.tasks[p] == batch.tasks[q] == task and p // per_micro == q // per_micro
        ]
        expected = sum(pairs) / len(pairs)
        scale = sum(float(g @ g) for g in gradients) / 6
        assert stats[task].n == 3
        assert stats[task].sq_norm == pytest.approx(expected, rel=1e-3, abs=1e-5 * scale)
        assert scale > 1e-8


def test_every_loss_type_measures_the_same_u() -> None:
    values = []
    for loss_type in LOSS_TYPES:
        loop = _loop(_settings(loss_type=loss_type, share_prompt="false"))
        values.append(loop.backward(_batch(loop, _rewards(6, 3)), [], measure=True)[1]["copy"].sq_norm)
    assert values == pytest.approx([values[0]] * len(LOSS_TYPES), rel=1e-3)


@pytest.mark.parametrize("share_prompt", ["true", "false"])
def test_tracking_leaves_training_as_it_is(share_prompt: str) -> None:
    weights = []
    for track in (True, False):
        loop = _loop(_settings(track=track, loss_type="grpo", share_prompt=share_prompt, learning_rate=1e-2))
        for _ in range(2):
            loop.step()
        weights.append(torch.cat([p.detach().reshape(-1) for p in loop.model.parameters()]))
    assert torch.equal(*weights)


def test_later_iterations_use_the_first_ones_logprobs_and_are_not_measured() -> None:
    loop = _loop(_settings(num_iterations=3, learning_rate=1e-2, loss_type="grpo"))
    batch = _batch(loop, _rewards(6, 3))
    old: list[torch.Tensor] = []
    first, stats = loop.backward(batch, old, measure=True)
    kept = [t.clone() for t in old]
    loop.optimizer.step()
    second, nothing = loop.backward(batch, old, measure=False)
    assert len(stats) == 2 and len(nothing) == 0
    assert second < first - 1e-4, "after a step up its gradient the clipped objective is larger"
    assert all(torch.equal(a, b) for a, b in zip(kept, old, strict=True))
    line = _loop(_settings(num_iterations=3, learning_rate=1e-2, loss_type="grpo")).step()
    assert line["step"] == 1 and line["tasks/copy/n"] == 3


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    std = math.sqrt(4 * 3 / 16 / 3)  # of 1 0 0 0 with n - 1
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4])
    torch.testing.assert_close(advantages(rewards, "none"), expected)
    torch.testing.assert_close(advantages(rewards, "group"), expected / torch.tensor([[std + 1e-4], [1e-4]]))
    torch.testing.assert_close(advantages(rewards, "batch"), expected / (rewards.std() + 1e-4))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, -1.3), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.1, 2.0, -2.2)],
)
def test_clipping(ratio: float, advantage: float, expected: float) -> None:
    settings = _settings(epsilon=0.2, epsilon_high=0.3)
    new, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    assert float(token_losses(new, old, torch.tensor([advantage]), None, settings)) == pytest.approx(expected)


def test_kl_term() -> None:
    settings = _settings(beta=0.5)
    new, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    value = float(token_losses(new, new, torch.zeros(1), reference, settings))
    assert value == pytest.approx(0.5 * (math.exp(-0.5) + 0.5 - 1))


def test_a_reference_model_pulls_the_model_back() -> None:
    tokenizer = tiny_tokenizer()
    reference = tiny_model(tokenizer, 32, 2, seed=9).requires_grad_(False)
    settings = _settings(beta=1.0, loss_type="grpo", learning_rate=3e-3, scale_rewards="none")
    loop = _loop(settings, reference)
    batch = _batch(loop, torch.ones(6, 3))  # no advantage: the KL term is all there is
    losses = []
    for _ in range(8):
        losses.append(loop.backward(batch, [], measure=False)[0])
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_row_weights_of_a_row_without_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    for loss_type in LOSS_TYPES:
        weights, scale = row_weights(mask, 2, _settings(loss_type=loss_type, share_prompt="false"))
        assert bool(torch.isfinite(weights).all()) and bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_draws(draws: str) -> None:
    loop = _loop(_settings(task_draws=draws))
    counts = [loop.mixture.draw(7).count("copy") for _ in range(200)]
    assert sum(counts) / 200 == pytest.approx(3.5, abs=0.4)
    if draws == "systematic":
        assert set(counts) == {3, 4}
    assert loop.mixture.draw(1)[0] in ("copy", "sort")


def test_masking_truncated_completions() -> None:
    loop = _loop(_settings(mask_truncated_completions=True, loss_type="grpo", share_prompt="false"))
    batch = _batch(loop, _rewards(6, 3))
    batch.rollouts.ended = torch.zeros(18, dtype=torch.bool)
    loss, stats = loop.backward(batch, [], measure=True)
    assert loss == 0.0 and stats["copy"].n == 3 and stats["copy"].sq_norm == 0.0
    assert isinstance(batch.rollouts, Rollouts)


@pytest.mark.parametrize("share_prompt", ["true", "false"])
def test_full_steps_measures_every_trained_parameter_beside_the_last_block(share_prompt: str) -> None:
    """Against the two trackers one at a time on the same rollouts; the tied head and the embeddings are among them."""
    loop = _loop(_settings(loss_type="grpo", share_prompt=share_prompt, full_steps=2))
    batch = _batch(loop, _rewards(6, 3))
    _, both = loop.backward(batch, [], measure=True, full=True)
    full = loop.full_tracker.step()
    gradients = [p.grad.clone() for p in loop.model.parameters()]
    loop.model.zero_grad()
    alone = _loop(_settings(loss_type="grpo", share_prompt=share_prompt, tracker_layers="all"))
    alone.model.load_state_dict(loop.model.state_dict())
    _, every = alone.backward(batch, [], measure=True)
    _, last = loop.backward(batch, [], measure=True)
    for name in ("copy", "sort"):
        assert both[name].sq_norm == pytest.approx(last[name].sq_norm, rel=1e-6)
        assert full[name].sq_norm == pytest.approx(every[name].sq_norm, rel=1e-6)
        assert full[name].mean_sq_norm > 2 * both[name].mean_sq_norm, "the last block is a part of the whole"
    for found, expected in zip(gradients, alone.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected.grad, rtol=1e-5, atol=1e-7)


def test_full_steps_logs_every_so_many_steps_and_survives_a_checkpoint() -> None:
    loop = _loop(_settings(loss_type="grpo", full_steps=2))
    lines = [loop.step() for _ in range(3)]
    assert ["tasks/copy/full_grad_norm_sq" in line for line in lines] == [True, False, True]
    assert all("tasks/copy/grad_norm_sq" in line for line in lines)
    other = _loop(_settings(loss_type="grpo", full_steps=2))
    other.load_state_dict(loop.state_dict())
    assert other.full_tracker.running["copy"].value == loop.full_tracker.running["copy"].value
    loop.close()
    assert not any(module._forward_hooks for module in loop.model.modules())


@pytest.mark.parametrize("changes", [{"track": False}, {"tracker_layers": "all"}])
def test_full_steps_is_refused_where_it_says_nothing_new(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="set full_steps to 0"):
        _settings(full_steps=1, **changes)
