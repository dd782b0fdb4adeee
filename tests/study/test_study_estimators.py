"""The comparison of estimators: gradients of stored rollouts, the rollouts' files, and the command as a whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from rich.console import Console
from transformers import LlamaForCausalLM, set_seed

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Batch, Grpo
from gradnorm_grpo.probe import only_tracked
from gradnorm_grpo.rollout import Prompter, completion_logprobs
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.study import stats as statistics
from gradnorm_grpo.study.estimators import compare, estimators
from gradnorm_grpo.study.estimators.gradients import capture, gram
from gradnorm_grpo.study.estimators.rollouts import load, made_with, sample, store, stored_rollouts
from gradnorm_grpo.study.spec import EstimatorSettings
from gradnorm_grpo.tasks import Task, build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer

TASKS = [{"name": "copy", "source": "synthetic"}, {"name": "maximum", "source": "synthetic"}]
PROMPTS = 7  # of each task: not a multiple of a micro-batch


def _settings(**changes: Any) -> Settings:
    base: dict[str, Any] = {
        "prompt_template": "{question} = ",
        "max_completion_length": 6,
        "num_generations": 4,
        "per_device_train_batch_size": 12,
        "tasks": TASKS,
        "eval_prompts": 1,
        "loss_type": "grpo",
        "cache_dir": "",
        "tiny_hidden_size": 32,
        "tiny_layers": 2,
        "seed": 3,
    }
    return Settings(**{**base, **changes})


def _grpo(bias: bool = False, **changes: Any) -> Grpo:
    settings = _settings(**changes)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 32, 2, seed=3)
    torch.manual_seed(0)
    if bias:
        model.config.attention_bias = True
        model = LlamaForCausalLM(model.config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.dim() > 1 else 1.0)
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    grpo = Grpo(settings, model, tokenizer, tasks, Prompter(tokenizer, tasks, settings))
    only_tracked(grpo)
    return grpo


def _batch(grpo: Grpo, prompts: int = PROMPTS) -> Batch:
    """Rollouts of a random model with advantages and lengths it would never get by itself."""
    set_seed(1)
    batch = sample(grpo, prompts)
    count, width = batch.rollouts.completion_ids.shape
    lengths = torch.randint(1, width + 1, (count,))
    batch.rollouts.completion_mask = (torch.arange(width)[None] < lengths[:, None]).long()
    batch.rollouts.ended = lengths < width
    batch.advantages = torch.randn(len(batch.tasks), grpo.settings.num_generations)
    return batch


def _with(grpo: Grpo, **changes: Any) -> Grpo:
    grpo.settings = dataclasses.replace(grpo.settings, **changes)
    return grpo


# Gradients


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share_prompt", ["true", "false"])
def test_gram_is_that_of_every_prompts_own_gradient(share_prompt: str, bias: bool) -> None:
    grpo = _grpo(bias, share_prompt=share_prompt, temperature=0.8)
    batch = _batch(grpo)
    hooks = {name: list(module._forward_hooks) for name, module in grpo.model.named_modules()}
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"]
    weights = [p for name in names for p in grpo.model.get_submodule(name).parameters()]
    assert len(weights) == (8 if bias else 4)
    for first in (0, PROMPTS):  # each task by itself
        flat = []
        for at in range(first, first + PROMPTS):
            rows = batch.rollouts.rows(at, at + 1)
            logprobs = completion_logprobs(grpo.model, rows, 0.8, share_prompt=False)
            mean = (logprobs * rows.completion_mask).sum(1) / rows.completion_mask.sum(1)
            loss = -(batch.advantages[at] * mean).mean()
            flat.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, weights)]))
        expected = torch.stack(flat) @ torch.stack(flat).T
        layers = capture(grpo, batch, first, first + PROMPTS)
        assert [layer.name for layer in layers] == names and all(layer.bias == bias for layer in layers)
        torch.testing.assert_close(gram(layers), expected, rtol=0, atol=2e-5 * float(expected.diagonal().max()))
    assert all(p.grad is None for p in grpo.model.parameters())
    assert {name: list(module._forward_hooks) for name, module in grpo.model.named_modules()} == hooks


@pytest.mark.parametrize("changes", [{}, {"loss_type": "dapo"}, {"share_prompt": "false"}, {"loss_type": "bnpo"}])
@pytest.mark.parametrize("truncated", [False, True])
def test_the_tracker_finds_the_same_numbers(changes: dict[str, str], truncated: bool) -> None:
    """In one micro-batch; ours are cut into micro-batches of three prompts."""
    grpo = _grpo(mask_truncated_completions=truncated, **changes)
    batch = _batch(grpo)
    found = {}
    for index, task in enumerate(grpo.tasks):
        layers = capture(grpo, batch, index * PROMPTS, (index + 1) * PROMPTS)
        found[task] = statistics.reference(gram(layers).numpy())
    _, stats = _with(grpo, per_device_train_batch_size=4 * 2 * PROMPTS).backward(batch, [], measure=True)
    for task, numbers in found.items():
        assert numbers["u"] == pytest.approx(stats[task].sq_norm, rel=1e-4, abs=1e-6 * numbers["mean_sq_norm"])
        assert numbers["u_se"] == pytest.approx(stats[task].std_error, rel=1e-4)
        assert numbers["mean_sq_norm"] == pytest.approx(stats[task].mean_sq_norm, rel=1e-5)
        assert numbers["plug_in"] == pytest.approx(stats[task].plug_in, rel=1e-4)
        assert numbers["noise_scale"] == pytest.approx(stats[task].noise_scale, rel=1e-3)


def test_equal_groups_have_zero_gradients() -> None:
    grpo = _grpo()
    batch = _batch(grpo)
    batch.advantages[:] = 0.0
    layers = capture(grpo, batch, 0, PROMPTS)
    assert all(layer.tokens == 0 for layer in layers) and not gram(layers).any()
    batch.advantages[2] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    only = gram(capture(grpo, batch, 0, PROMPTS))
    assert only[2, 2] > 0 and only.count_nonzero() == 1


# Stored rollouts


def _same(a: Batch, b: Batch) -> bool:
    tensors = [
        (getattr(a.rollouts, name), getattr(b.rollouts, name))
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "ended")
    ]
    tensors += [(a.rewards, b.rewards), (a.advantages, b.advantages)]
    questions = [[(e.question, e.answer) for e in batch.examples] for batch in (a, b)]
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
    return same and a.tasks == b.tasks and questions[0] == questions[1] and a.rollouts.group == b.rollouts.group


def test_stored_rollouts_come_back_bit_for_bit(tmp_path: Path) -> None:
    grpo, path = _grpo(), tmp_path / "new" / "rollouts.safetensors"
    set_seed(2)
    first, reused = stored_rollouts(grpo, 5, path)
    assert not reused and first.tasks == ["copy"] * 5 + ["maximum"] * 5 and first.rewards.shape == (10, 4)
    written = path.read_bytes()
    again, reused = stored_rollouts(_grpo(per_device_train_batch_size=8), 5, path)
    assert reused and _same(first, again) and path.read_bytes() == written
    assert _same(first, load(path))
    texts = {e.question for e in first.examples}
    assert len(texts) > 5 and sorted(p.name for p in path.parent.iterdir()) == [
        "rollouts.json",
        "rollouts.safetensors",
    ]
    odd = _batch(grpo)
    store(odd, made_with(grpo, PROMPTS), tmp_path / "odd.safetensors")
    assert _same(odd, load(tmp_path / "odd.safetensors"))


def test_rollouts_of_other_settings_or_weights_are_refused(tmp_path: Path) -> None:
    grpo, path = _grpo(), tmp_path / "rollouts.safetensors"
    stored_rollouts(grpo, 3, path)
    with pytest.raises(UserError, match=r"made with other settings \(temperature 1.0, now 0.5\): delete"):
        stored_rollouts(_grpo(temperature=0.5), 3, path)
    with pytest.raises(UserError, match="prompts 3, now 4"):
        stored_rollouts(grpo, 4, path)
    with torch.no_grad():
        grpo.model.lm_head.weight[5, 5] += 1e-3
    with pytest.raises(UserError, match="weights"):
        stored_rollouts(grpo, 3, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not the file that rollouts.json describes"):
        load(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(path)


# The command


@pytest.fixture
def mixed_rewards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A random model is never right: let every other of its answers count."""
    monkeypatch.setattr(Task, "score", lambda self, text, example: float(sum(map(ord, text)) % 2))
    monkeypatch.setattr("gradnorm_grpo.probe.build_tasks", _untried_tasks)
    yield


def _untried_tasks(specs: list[dict[str, Any]], seed: int, eval_prompts: int) -> list[Task]:
    score = Task.score
    Task.score = lambda self, text, example: 1.0  # type: ignore[method-assign]
    try:
        return build_tasks(specs, seed, eval_prompts)
    finally:
        Task.score = score  # type: ignore[method-assign]


SMALL = EstimatorSettings(prompts=8, subsets=50, sketches=3, widths=[64, 8, 16], repeats=1)


@pytest.mark.usefixtures("mixed_rewards")
def test_the_comparison_as_a_whole(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    file = compare(_settings(loss_type="dapo"), "small", console, tmp_path, SMALL)
    assert file == tmp_path / "seed3.json" and "cross product" in console.export_text()
    result = json.loads(file.read_text())
    assert result["prompts"] == 8 and result["group"] == 4 and result["rollouts"]["reused"] is False
    assert [layer["name"].rpartition(".")[2] for layer in result["layers"]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {(layer["d_in"], layer["d_out"], layer["bias"]) for layer in result["layers"]} == {(32, 32, False)}
    task = result["tasks"]["copy"]
    assert task["reference"]["mean_sq_norm"] > 0 and 0 < task["reward"] < 1 and task["tokens"] > 0
    assert task["reference"] != result["tasks"]["maximum"]["reference"]
    assert [(row["n"], row["small"]) for row in task["estimators"][::3]] == [(2, True), (4, False), (8, False)]
    assert [sketch["skipped"] for sketch in result["sketches"]] == [False, False, True]
    assert [sketch["width"] for sketch in result["sketches"]] == [8, 16, 64]
    assert set(result["sketches"][0]["tasks"]) == {"copy", "maximum"}
    assert len(result["cost"]["rows"]) == 6 and result["cost"]["threads"] == torch.get_num_threads()
    again = json.loads(compare(_settings(), "small", Console(quiet=True), tmp_path, SMALL).read_text())
    assert again["rollouts"]["reused"] is True and again["tasks"] == result["tasks"]
    assert again["sketches"] == result["sketches"]


def test_tasks_that_nobody_solves(tmp_path: Path) -> None:
    """A random model answers nothing: all groups are equal, all gradients zero, and nothing fails."""
    config = tmp_path / "never.yaml"
    values = dataclasses.asdict(_settings(output_dir=str(tmp_path / "out")))
    kept = {
        k: v for k, v in values.items() if k in ("tasks", "prompt_template", "num_generations", "output_dir", "seed")
    }
    block = {"estimators": {"prompts": 8, "subsets": 20, "sketches": 2, "widths": [8], "repeats": 1}}
    more = {"model": "tiny", "tiny_hidden_size": 32, "tiny_layers": 1, "max_completion_length": 2, "eval_prompts": 1}
    config.write_text(json.dumps({**kept, **more, "study": block}))  # JSON is YAML
    assert estimators(["--config", str(config)], Console(quiet=True)) == 0
    result = json.loads((tmp_path / "out" / "seed3.json").read_text())
    for task in result["tasks"].values():
        assert task["equal_groups"] == 8 and task["tokens"] == 0
        assert task["reference"]["u"] == 0.0 and task["reference"]["noise_scale"] is None
    sketch = result["sketches"][0]
    assert sketch["order"]["ratio_exact"] is None and sketch["tasks"]["copy"]["u_bias_rel"] is None
    assert result["cost"]["rows"] == []


def test_requests_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scale_rewards 'batch' makes all prompts depend on each other"):
        compare(_settings(scale_rewards="batch"), "x", Console(quiet=True), tmp_path)
    assert EstimatorSettings.read({"prompts": 96}).prompts == 96 and EstimatorSettings.read({}) == EstimatorSettings()
    with pytest.raises(UserError, match="did you mean 'prompts'"):
        EstimatorSettings.read({"prompt": 96})
    with pytest.raises(UserError, match="prompts of the study's estimators must be a whole number from 8, got 2"):
        EstimatorSettings.read({"prompts": 2})
    for widths in ([8, 8], [0], 8, [1.5]):
        with pytest.raises(UserError, match="widths of the study's estimators must be a list of different whole"):
            EstimatorSettings.read({"widths": widths})
