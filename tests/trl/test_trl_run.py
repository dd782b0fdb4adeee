"""attach() on whole GRPOTrainer runs: bit-identical training, the log, draws and their lag, checkpoints, detaching."""

from __future__ import annotations

import math

import pytest
import torch

from gradnorm_kernels.integrations.trl import attach
from gradnorm_kernels.integrations.trl.grpo import PROMPT, shuffle_groups
from tests.trl import trl_tiny as tiny

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def same_weights(a, b) -> bool:
    first, second = tiny.weights(a), tiny.weights(b)
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "steps_per_generation": 4, "loss_type": "grpo"},
        {"steps_per_generation": 1, "beta": 0.0, "loss_type": "bnpo", "gradient_checkpointing": True},
        pytest.param(
            {"loss_type": "luspo", "importance_sampling_level": "sequence", "eval_strategy": "steps", "eval_steps": 1},
            marks=pytest.mark.slow,
        ),
        {"num_generations": 8, "dataloader_num_workers": 1, "shuffle_dataset": False, "bf16": True},
    ],
)
def test_watching_changes_no_bit(tmp_path, changes):
    extra = {"extra": {"eval_dataset": tiny.prompts(4)}, "per_device_eval_batch_size": 8}
    options = {"max_steps": 4, **changes, **(extra if "eval_steps" in changes else {})}
    plain = tiny.grpo(tmp_path / "a", **options)  # building a trainer seeds everything: train it before the next
    plain.train()
    watched = tiny.grpo(tmp_path / "b", **options)
    attached = attach(watched, layers="all")
    watched.train()
    assert tiny.losses(plain) == tiny.losses(watched)
    assert any(loss != 0 for loss in tiny.losses(plain))
    assert same_weights(plain, watched)
    assert attached.last


def test_what_is_logged(tmp_path):
    trainer = tiny.grpo(tmp_path, max_steps=5, per_device_train_batch_size=48)
    attached = attach(trainer, gain_window=2)
    steps, take_in = [], attached._take_in
    attached._take_in = lambda stats: (steps.append(stats), take_in(stats))
    trainer.train()
    assert len(steps) == 5
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line, stats in zip(lines, steps, strict=True):
        for task, gradient in stats.items():
            assert line[f"tasks/{task}/n"] == gradient.n
            for key, value in (("grad_norm_sq", gradient.sq_norm), ("noise_scale", gradient.noise_scale)):
                if math.isfinite(value):
                    assert line[f"tasks/{task}/{key}"] == pytest.approx(value)
            if math.isfinite(gradient.std_error):
                assert line[f"tasks/{task}/grad_norm_sq_se"] == pytest.approx(gradient.std_error)
        a, b = (stats.tasks.index(task) for task in ("down", "up"))
        if math.isfinite(stats.cosines[a, b]):
            assert line["tasks/cosine/down/up"] == pytest.approx(float(stats.cosines[a, b]))
        shares = {task: tiny.prompts()["task"].count(task) / 24 for task in tiny.TASKS}
        assert {task: line[f"tasks/{task}/sampling_prob"] for task in shares} == pytest.approx(shares)
        drawn = {task: line[f"tasks/{task}/n"] for task in tiny.TASKS if f"tasks/{task}/n" in line}
        mean = sum(line[f"tasks/{task}/reward"] * n for task, n in drawn.items()) / sum(drawn.values())
        assert mean == pytest.approx(line["reward"], rel=1e-5)
    assert any("tasks/cosine/down/up" in line for line in lines)
    rewards = [line["tasks/up/reward"] for line in lines]
    assert all("tasks/up/learning_gain" not in line for line in lines[:3])
    for at in (3, 4):
        gain = sum(rewards[at - 1 : at + 1]) / 2 - sum(rewards[at - 3 : at - 1]) / 2
        assert lines[at]["tasks/up/learning_gain"] == pytest.approx(gain)
    last = trainer.state.log_history[-1]
    assert "train_runtime" in last
    assert not any(key.startswith("tasks/") for key in last)


def test_several_steps_per_line_are_pooled(tmp_path):
    trainer = tiny.grpo(tmp_path, max_steps=4, logging_steps=4, per_device_train_batch_size=24)
    attached = attach(trainer)
    trainer.train()
    pooled = attached.tracker.running["up"]
    assert tiny.logged(trainer, "tasks/up/grad_norm_sq") == [pytest.approx(pooled.value)]
    assert tiny.logged(trainer, "tasks/up/n") == [pooled.n]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_iterations": 2}, [1, 0, 1, 0]),
        ({"steps_per_generation": 4, "num_iterations": 2}, [1, 0, 0, 0]),
        ({"steps_per_generation": 1}, [1, 1, 1, 1]),
        ({"every": 3}, [1, 0, 0, 1]),
        ({"num_iterations": 2, "every": 2}, [1, 0, 0, 0]),
    ],
)
def test_only_steps_on_fresh_completions_are_measured(tmp_path, changes, expected):
    changes = dict(changes)
    every = changes.pop("every", 1)
    trainer = tiny.grpo(tmp_path, max_steps=4, **changes)
    attach(trainer, every=every)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [int(any(key.endswith("/n") for key in line)) for line in lines] == expected


# What TRL logs too, by task


def rollout(prompts, trainer):
    """Completions of six tokens, of which the environment wrote three."""
    tokens = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    rows = range(len(prompts))
    return {
        "prompt_ids": tokens,
        "completion_ids": [[5 + (i + j) % 20 for j in range(6)] for i in rows],
        "logprobs": [[-1.0] * 6 for _ in rows],
        "env_mask": [[1, 1, 0, 0, 0, 1] for _ in rows],
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"mask_truncated_completions": True}, {"extra": {"rollout_func": rollout}}],
    ids=["plain", "truncated completions masked", "tokens of an environment"],
)
def test_response_length_is_trls(tmp_path, changes):
    data = tiny.prompts().map(lambda row: {"task": "up"})
    trainer = tiny.grpo(tmp_path, data=data, max_completion_length=6, max_steps=3, **changes)
    attach(trainer)
    trainer.train()
    lengths = tiny.logged(trainer, "completions/mean_length")
    assert len(lengths) == 3
    assert tiny.logged(trainer, "tasks/up/response_length") == pytest.approx(lengths)
    masked = [value for value in tiny.logged(trainer, "completions/clipped_ratio") if value > 0]
    assert masked or "extra" in changes  # some completions were truncated, or masking them would change nothing


def test_completions_that_no_function_scored_do_not_count(tmp_path):
    """They are left out of the task's reward, of its gain and of what the balancer is given, as TRL leaves them out."""
    scored: list[dict[str, list[float]]] = []

    def some(completion_ids, task, **_):
        """Nothing for "down", and for every second "up" or "loud"."""
        values = [
            None if name == "down" or at % 2 else 1.0 + sum(i % 2 == 0 for i in ids) / len(ids)
            for at, (ids, name) in enumerate(zip(completion_ids, task, strict=True))
        ]
        found: dict[str, list[float]] = {}
        for name, value in zip(task, values, strict=True):
            if value is not None:
                found.setdefault(name, []).append(value)
        scored.append(found)
        return values

    trainer = tiny.grpo(tmp_path, max_steps=4, per_device_train_batch_size=48)
    trainer.reward_funcs = [some]
    attached = attach(trainer, correction="famo", gain_window=1)
    given, update = [], attached.balancer.update
    attached.balancer.update = lambda stats, rewards: (given.append(rewards), update(stats, rewards))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(scored) == len(given) == 4
    means = [{task: sum(values) / len(values) for task, values in found.items()} for found in scored]
    for line, found, passed in zip(lines, means, given, strict=True):
        assert set(found) == {"up", "loud"}
        assert passed == pytest.approx(found, rel=1e-5)
        for task, mean in found.items():
            assert line[f"tasks/{task}/reward"] == pytest.approx(mean, rel=1e-5)
        assert "tasks/down/reward" not in line
        assert "tasks/down/response_length" in line
    for before, after, line in zip(means[:-1], means[1:], lines[1:], strict=True):
        assert line["tasks/up/learning_gain"] == pytest.approx(after["up"] - before["up"], abs=1e-5)
        assert "tasks/down/learning_gain" not in line
    values = [value for found in scored[:1] for task in found.values() for value in task]
    assert lines[0]["reward"] == pytest.approx(sum(values) / len(values), rel=1e-5)


# Draws


class Recorded:
    """The rows that a trainer generated for, one list of prompts per generation."""

    def __init__(self, trainer) -> None:
        self.prompts: list[list[str]] = []
        self.before: list[dict[str, float]] = []
        inner = trainer._generate

        def generate(prompts):
            self.prompts.append(list(prompts))
            self.before.append(trainer._gradnorm.sampler.probabilities)
            return inner(prompts)

        trainer._generate = generate


def test_draws_follow_every_step_before_them(tmp_path):
    """Lag zero: the probabilities of a generation are those after the step just before it."""
    trainer = tiny.grpo(tmp_path, max_steps=4, per_device_train_batch_size=16)
    attached = attach(trainer, task_sampling="proportional", floor=0.2)
    recorded = Recorded(trainer)
    after, take_in = [], attached._take_in
    attached._take_in = lambda stats: (take_in(stats), after.append(attached.sampler.probabilities))
    trainer.train()
    assert recorded.before[0] == dict.fromkeys(attached.sampler.tasks, pytest.approx(1 / 3))
    assert recorded.before[1:] == after[:-1]
    assert after[0] != after[1]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["tasks/up/sampling_prob"] for line in logged] == [p["up"] for p in after]
    rows = {row["prompt"]: row["task"] for row in tiny.prompts()}
    for prompts in recorded.prompts:
        assert len(prompts) == 32
        assert all(prompts[i] == prompts[i - i % 4] for i in range(32))
        assert set(prompts) <= set(rows)


def test_uniform_draws_favour_no_task(tmp_path):
    trainer = tiny.grpo(tmp_path, max_steps=6, per_device_train_batch_size=16, max_completion_length=2)
    attach(trainer, task_sampling="uniform")
    recorded = Recorded(trainer)
    trainer.train()
    rows = {row["prompt"]: row["task"] for row in tiny.prompts()}
    drawn = [rows[prompt] for prompts in recorded.prompts for prompt in prompts[::4]]
    assert 10 <= drawn.count("loud") <= 22  # of 48; an eighth of the rows is "loud"


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 1}])
def test_a_resumed_run_goes_on_draw_for_draw(tmp_path, changes):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, **changes}
    settings = {"task_sampling": "inverse", "correction": "equal_pull", "gain_window": 1}
    whole = tiny.grpo(tmp_path / "run", **options)
    first = attach(whole, **settings)
    drawn = Recorded(whole)
    whole.train()
    again = tiny.grpo(tmp_path / "run", **options)
    second = attach(again, **settings)
    rest = Recorded(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert rest.prompts == drawn.prompts[len(drawn.prompts) // 2 :]
    assert rest.before == drawn.before[len(drawn.prompts) // 2 :]
    assert same_weights(whole, again)
    assert first.state_dict() == second.state_dict()
    assert tiny.logged(whole, "tasks/up/weight") == tiny.logged(again, "tasks/up/weight")


def test_a_generation_that_was_not_used_up_comes_again(tmp_path):
    """TRL generates again where a checkpoint falls inside a generation's iterations; the prompts must be the same."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = tiny.grpo(tmp_path / "run", **options)
    attach(whole, task_sampling="uniform")
    drawn = Recorded(whole)
    whole.train()
    again = tiny.grpo(tmp_path / "run", **options)
    attach(again, task_sampling="uniform")
    rest = Recorded(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(drawn.prompts) == 2
    assert rest.prompts[0] == drawn.prompts[0]
    assert rest.prompts[1:] == []


def test_checkpoints_and_settings_that_do_not_fit(tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain = tiny.grpo(tmp_path / "plain", **options)
    plain.train()
    later = tiny.grpo(tmp_path / "plain", **{**options, "max_steps": 2})
    attach(later)
    with pytest.warns(UserWarning, match="saved without attach"):
        later.train(resume_from_checkpoint=True)
    other = tiny.grpo(tmp_path / "other", **options)
    attach(other, task_sampling="uniform")
    other.train()
    changed = tiny.grpo(tmp_path / "other", **{**options, "max_steps": 2})
    attach(changed)
    with pytest.raises(ValueError, match="saved with draws"):
        changed.train(resume_from_checkpoint=True)


def test_detach_puts_everything_back(tmp_path):
    trainer = tiny.grpo(tmp_path)
    before = dict(trainer.__dict__)
    hooks = {name: len(module._forward_hooks) for name, module in trainer.model.named_modules()}
    attached = attach(trainer, task_sampling="proportional", keep_groups_together=True, fused=True)
    with pytest.raises(ValueError, match="already called"):
        attach(trainer)
    attached.detach()
    attached.detach()
    assert trainer.__dict__ == before
    assert hooks == {name: len(module._forward_hooks) for name, module in trainer.model.named_modules()}
    assert not any("forward" in module.__dict__ for name, module in trainer.model.named_modules() if name)
    trainer.train()
    plain = tiny.grpo(tmp_path)
    plain.train()
    assert tiny.losses(plain) == tiny.losses(trainer)


def test_an_error_in_the_loss_leaves_the_tracker_usable(tmp_path):
    trainer = tiny.grpo(tmp_path)
    inner, calls = trainer._compute_loss, []

    def fails_once(model, inputs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("broken")
        return inner(model, inputs)

    trainer._compute_loss = fails_once
    attached = attach(trainer)
    with pytest.raises(KeyError, match="broken"):
        trainer.train()
    trainer.train()
    assert attached.last


# Correction


def test_weights_scale_advantages_and_not_the_measurement(tmp_path):
    """With fixed weights: the advantages are multiplied, and U is that of the unweighted loss."""
    from gradnorm_kernels.control.balancer import TaskBalancer

    class Fixed(TaskBalancer):
        weights = {"up": 3.0, "down": 0.25, "loud": 1.0}

    runs = {}
    for name, balancer in (("plain", None), ("weighted", Fixed(["up", "down", "loud"]))):
        trainer = tiny.grpo(tmp_path, max_steps=1, per_device_train_batch_size=24)
        advantages, inner = [], trainer._compute_loss

        def compute(model, inputs, inner=inner, advantages=advantages):
            advantages.append(inputs["advantages"])
            return inner(model, inputs)

        trainer._compute_loss = compute
        attached = attach(trainer, correction=balancer)
        trainer.train()
        runs[name] = (attached.last, torch.cat(advantages), trainer)
    ratio = (runs["weighted"][1] / runs["plain"][1])[runs["plain"][1] != 0]
    assert set(ratio.round(decimals=3).tolist()) <= {3.0, 0.25, 1.0}
    assert {3.0, 0.25} <= set(ratio.round(decimals=3).tolist())
    for task, gradient in runs["plain"][0].items():
        assert runs["weighted"][0][task].sq_norm == pytest.approx(gradient.sq_norm, rel=1e-4, nan_ok=True)
    assert tiny.logged(runs["weighted"][2], "tasks/up/weight") == [3.0]
    assert not same_weights(runs["plain"][2], runs["weighted"][2])


@pytest.mark.parametrize("strategy", ["famo", "gradnorm", "mgda", "pcgrad"])
def test_a_correction_is_learned_during_the_run(tmp_path, strategy):
    if strategy in ("mgda", "pcgrad"):
        pytest.importorskip("torchjd")
    trainer = tiny.grpo(tmp_path, max_steps=3, per_device_train_batch_size=24)
    attached = attach(trainer, correction=strategy)
    trainer.train()
    weights = attached.balancer.weights
    assert set(weights) == set(tiny.TASKS)
    assert max(weights.values()) > 1.01 * min(weights.values())
    assert len(set(tiny.logged(trainer, "tasks/up/weight"))) > 1


# Whole groups


def test_shuffling_groups_moves_whole_prompts_at_random():
    """Every entry moves alike, prompts stay whole, and the random state ends where TRL's own shuffle leaves it."""
    trl_utils = pytest.importorskip("trl.trainer.utils")
    prompts = torch.arange(6).repeat_interleave(4)
    rows = {
        "x": torch.arange(24),
        PROMPT: prompts,
        "words": list(map(str, range(24))),
        "total": torch.tensor(3.0),
        "no": None,
    }
    orders = []
    for seed in range(5):
        torch.manual_seed(seed)
        moved = shuffle_groups(rows)
        after = torch.random.get_rng_state()
        torch.manual_seed(seed)
        trl_utils.shuffle_sequence_dict(rows)
        assert torch.equal(torch.random.get_rng_state(), after)
        assert moved["words"] == list(map(str, moved["x"].tolist()))
        assert torch.equal(prompts[moved["x"]], moved[PROMPT])
        assert moved["total"] is rows["total"]
        assert moved["no"] is None
        assert sorted(moved["x"].tolist()) == list(range(24))
        groups = moved[PROMPT].view(6, 4)
        assert bool((groups == groups[:, :1]).all())
        orders.append(tuple(groups[:, 0].tolist()))
    assert len(set(orders)) > 3
