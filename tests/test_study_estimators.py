"""The comparison of estimators: gradients of stored rollouts, subsets, sketches, and the command as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from rich.console import Console
from transformers import LlamaForCausalLM, set_seed

import gradnorm_kernels as gk
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Batch, Grpo
from gradnorm_grpo.probe import only_tracked
from gradnorm_grpo.rollout import Prompter, completion_logprobs
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.study import estimators_sketches as sketches
from gradnorm_grpo.study import estimators_statistics as statistics
from gradnorm_grpo.study.estimators import compare, estimators
from gradnorm_grpo.study.estimators_cost import cost
from gradnorm_grpo.study.estimators_gradients import Layer, capture, gram
from gradnorm_grpo.study.estimators_settings import EstimatorSettings, read_options
from gradnorm_grpo.study.rollouts import load, made_with, sample, store, stored_rollouts
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
    assert not any(m._forward_hooks for n, m in grpo.model.named_modules() if n not in grpo.tracker.layers)


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


# Subsets


def _random_gram(prompts: int, mean: float = 0.5, size: int = 5, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(prompts, size)) + mean
    return vectors @ vectors.T


def test_expectations_over_all_subsets_are_the_closed_forms() -> None:
    for odd, prompts in ((0, 6), (1, 7)):
        g = _random_gram(prompts)
        orders = np.array(list(itertools.permutations(range(prompts))))
        u, q = statistics.cross_product(g), float(np.diagonal(g).mean())
        assert statistics.sizes(prompts) == [2, 4, 6]
        for n in (2, 4, 6):
            found, _ = statistics.on_subsets(g, orders, n)
            for estimator in statistics.ESTIMATORS:
                expected = u + statistics.expected_bias(estimator, g, n)
                assert found[estimator].mean() == pytest.approx(expected, rel=1e-10)
            assert found["plug_in"].mean() - u == pytest.approx((q - u) / n)
            if n == 6 and not odd:
                assert found["cross_product"].std() < 1e-12 < found["two_batch"].std()
        rows = statistics.compare(g, orders)
        assert [row["bias"] == 0 for row in rows] == [row["estimator"] != "plug_in" for row in rows]
        for row in rows:
            assert row["mean"] - u == pytest.approx(row["bias"], abs=1e-12)
            assert row["bias_rel"] == row["bias"] / u and row["rmse_rel"] == row["rmse"] / u


def test_a_subsets_numbers_are_those_of_its_own_gram() -> None:
    g = _random_gram(12)
    orders = statistics.shuffles(12, 20, seed=1)
    assert (np.sort(orders, 1) == np.arange(12)).all() and (statistics.shuffles(12, 20, 1) == orders).all()
    assert (orders != statistics.shuffles(12, 20, 2)).any()
    found, errors = statistics.on_subsets(g, orders, 8)
    for r, order in enumerate(orders):
        own = torch.tensor(g[np.ix_(order[:8], order[:8])])
        expected = gk.cross_product(own.diagonal(), own.sum()[None], [0] * 8, own)
        assert found["cross_product"][r] == pytest.approx(float(expected.sq_norm), rel=1e-9)
        assert found["plug_in"][r] == pytest.approx(float(expected.plug_in), rel=1e-9)
        assert errors[r] == pytest.approx(float(expected.std_error), rel=1e-9)
        assert found["two_batch"][r] == pytest.approx(float(own[:4, 4:].mean()), rel=1e-9)
    whole = statistics.reference(g)
    expected = gk.cross_product(np.diagonal(g).copy(), [g.sum()], [0] * 12, torch.tensor(g))
    assert whole["u"] == pytest.approx(float(expected.sq_norm)) and whole["u_se"] == pytest.approx(
        float(expected.std_error)
    )
    assert whole["noise_scale"] == pytest.approx(float(expected.noise_scale))


def test_spread_of_fresh_prompts() -> None:
    """sd_fresh, from one pool of prompts, is the spread over pools; sd, given the pool, is less near n = N."""
    pools, drawn = [], []
    for seed in range(300):
        g = _random_gram(24, seed=seed)
        pools.append(statistics.compare(g, statistics.shuffles(24, 200, seed)))
        drawn.append(statistics.on_subsets(g, np.arange(24)[None], 16)[0])
    for estimator in statistics.ESTIMATORS:
        truth = np.std([one[estimator][0] for one in drawn])
        rows = [row for pool in pools for row in pool if row["n"] == 16 and row["estimator"] == estimator]
        fresh, given = (math.sqrt(np.mean([row[key] ** 2 for row in rows])) for key in ("sd_fresh", "sd"))
        assert fresh == pytest.approx(truth, rel=0.15), estimator
        assert given < 0.9 * truth, estimator
        assert not any(row["small"] for row in rows)
    held = [
        row["coverage_t"] for pool in pools for row in pool if row["n"] == 4 and row["estimator"] == "cross_product"
    ]
    assert 0.85 < np.mean(held) < 1.0
    wide = [row["coverage"] for row in statistics.compare(_random_gram(24), statistics.shuffles(24, 200, 0), 0.5)]
    assert np.nanmean(wide) < 0.8, "an interval of level 0.5 covers less"


def test_what_fresh_prompts_add_is_the_jackknife_of_the_expectation() -> None:
    g, n = _random_gram(9), 4
    rest = [np.delete(np.delete(g, i, 0), i, 1) for i in range(9)]
    rows = [row for row in statistics.compare(g, statistics.shuffles(9, 30, 0)) if row["n"] == n]
    for row in rows:
        means = [statistics.cross_product(one) + statistics.expected_bias(row["estimator"], one, n) for one in rest]
        added = 8 / 9 * sum((mean - np.mean(means)) ** 2 for mean in means)
        assert row["sd_fresh"] ** 2 - row["sd"] ** 2 == pytest.approx(added)
        assert row["rmse"] ** 2 == pytest.approx(row["bias"] ** 2 + row["sd_fresh"] ** 2)


def test_micro_batches_see_fewer_pairs() -> None:
    g = _random_gram(6)
    for row in statistics.in_microbatches(g, np.array(list(itertools.permutations(range(6)))), 4):
        assert row["pairs"] == 4 * (row["size"] - 1)
    noise = _random_gram(512, mean=0.0, size=2000)
    rows = statistics.in_microbatches(noise, statistics.shuffles(512, 1500, 0), statistics.pooled_size(512))
    assert [row["size"] for row in rows] == [2, 4, 8, 16, 32, 64, 128] and rows[0]["n"] == 128
    for row in rows[:4]:  # of pure noise, the variance goes with one over the number of pairs
        assert row["variance_ratio"] == pytest.approx(127 / (row["size"] - 1), rel=0.25)
    assert [statistics.pooled_size(n) for n in (8, 9, 96, 128, 256)] == [2, 2, 16, 32, 64]


def test_numbers_that_do_not_exist_are_null() -> None:
    zero = statistics.reference(np.zeros((8, 8)))
    assert (zero["u"], zero["u_se"], zero["significant"]) == (0.0, 0.0, False) and math.isnan(zero["noise_scale"])
    rows = statistics.compare(np.zeros((8, 8)), statistics.shuffles(8, 10, 0))
    assert all(math.isnan(row["sd_rel"]) and row["sd"] == 0 for row in rows)
    negative = -_random_gram(8) + 20 * np.eye(8)
    assert all(math.isnan(row["rmse_rel"]) for row in statistics.compare(negative, statistics.shuffles(8, 10, 0)))


# Sketches


def _layers(prompts: int = 6, sizes: tuple[tuple[int, int], ...] = ((20, 12), (9, 20))) -> list[Layer]:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (2 * prompts,), generator=rng)
    owners = torch.arange(2 * prompts) % prompts
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return [
        Layer(
            f"layer{i}",
            torch.randn(int(lengths.sum()), d_in, generator=rng) + 0.3,
            torch.randn(int(lengths.sum()), d_out, generator=rng) + 0.3,
            offsets,
            owners,
            prompts,
            False,
        )
        for i, (d_in, d_out) in enumerate(sizes)
    ]


def _far_from_exact(layers: list[Layer], width: int, count: int = 300) -> float:
    """The largest deviation of the sketches' mean Gram from the exact one, in standard errors."""
    exact = gram(layers).numpy()
    found = sketches.sketch_grams(layers, width, range(count))
    return float((np.abs(found.mean(0) - exact) / (found.std(0) / math.sqrt(count))).max())


def test_sketches_are_unbiased_and_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _layers()
    assert _far_from_exact(layers, 4) < 4.5 and _far_from_exact(layers, 10) < 4.5
    right = sketches.projections

    def wrong(layers: list[Layer], width: int, seed: int) -> list[sketches.Projection]:
        chosen = right(layers, width, seed)
        return [tuple(None if m is None else m * math.sqrt(width / (width + 1)) for m in pair) for pair in chosen]

    monkeypatch.setattr(sketches, "projections", wrong)
    assert _far_from_exact(layers, 4) > 6


def test_sketches_are_smaller_repeatable_and_exact_where_nothing_is_projected() -> None:
    layers = _layers()
    seeds = [5, 6, 5]
    found = sketches.sketch_grams(layers, 4, seeds)
    assert (found[0] == found[2]).all() and (found[0] != found[1]).any()
    assert [
        (one.x.shape[1], one.dy.shape[1]) for one in sketches.project(layers, sketches.projections(layers, 10, 0))
    ] == [
        (10, 10),
        (9, 10),
    ]
    assert sketches.unprojected(layers, 10) == ["layer1: input (9)"]
    assert sketches.useless(layers, 19) is None
    assert sketches.useless(layers, 20) == "no side of a layer is wider than 20: the widest has 20"
    np.testing.assert_allclose(sketches.sketch_grams(layers, 20, [1])[0], gram(layers).numpy(), rtol=1e-6)
    assert sketches.bytes_per_prompt(layers) == 4 * (20 * 12 + 9 * 20)
    assert sketches.bytes_per_prompt(layers, 10) == 4 * (10 * 10 + 9 * 10)
    spread = [sketches.sketch_grams(layers, width, range(40))[:, 0, 0].std() for width in (2, 8)]
    assert spread[1] < 0.7 * spread[0]


def test_what_sketches_keep_of_the_tasks() -> None:
    exact = {name: _random_gram(8, mean, seed=4) for name, mean in (("quiet", 0.6), ("loud", 3.0), ("middle", 1.5))}
    copies = {name: np.stack([one * 0.9, one, one * 1.1]) for name, one in exact.items()}
    orders = statistics.shuffles(8, 50, 0)
    of_task = sketches.describe_task(exact["loud"], copies["loud"], 2.0, orders, 2)
    assert of_task["u_bias"] == pytest.approx(0) and of_task["u_sd_rel"] == pytest.approx(0.1)
    assert of_task["sq_sd_rel"] == pytest.approx(0.1) and of_task["u_sd_over_se"] == pytest.approx(of_task["u_sd"] / 2)
    assert of_task["rmse_all_pairs"] > of_task["u_sd"]
    order = sketches.describe_order(exact, copies)
    assert (order["largest"], order["smallest"], order["same_order"]) == ("loud", "quiet", 1.0)
    assert order["kendall_tau_min"] == pytest.approx(1.0) and order["ratio_median"] == pytest.approx(
        order["ratio_exact"]
    )
    copies["loud"][0] *= 0.001
    order = sketches.describe_order(exact, copies)
    assert order["same_order"] == pytest.approx(2 / 3) and order["kendall_tau_min"] < 0.5
    nothing = {name: np.zeros((8, 8)) for name in exact}
    order = sketches.describe_order(nothing, {name: np.zeros((3, 8, 8)) for name in exact})
    assert order["largest"] is None and math.isnan(order["ratio_exact"])


def test_cost_rows() -> None:
    layers = _layers()
    rows = {(row["what"], row["width"]): row for row in cost(layers, [4, 10], repeats=2)}
    assert list(rows) == [
        *((what, None) for what in ("weight_grad", "norms", "norms_with_weight_grad", "gram")),
        ("sketch_gram", 4),
        ("sketch_gram", 10),
    ]
    tokens = layers[0].tokens
    assert rows["weight_grad", None]["multiply_adds"] == tokens * (20 * 12 + 9 * 20)
    assert rows["weight_grad", None]["ratio"] == 1.0 and all(row["seconds"] > 0 for row in rows.values())
    pairs = 6 * 7 / 2  # here gradients are cheaper formed than tokens paired
    assert rows["gram", None]["multiply_adds"] == (tokens + pairs) * (20 * 12 + 9 * 20)
    assert rows["sketch_gram", 10]["multiply_adds"] == tokens * (20 + 12 + 20) * 10 + (tokens + pairs) * (100 + 90)
    assert rows["sketch_gram", 4]["bytes_per_prompt"] == 4 * 2 * 16


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
    monkeypatch.setattr("gradnorm_grpo.study.estimators.build_tasks", _untried_tasks)
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
    assert read_options({"prompts": 96}).prompts == 96 and read_options({}) == EstimatorSettings()
    with pytest.raises(UserError, match="did you mean 'prompts'"):
        read_options({"prompt": 96})
    with pytest.raises(UserError, match="prompts of the study's estimators must be a whole number from 8, got 2"):
        read_options({"prompts": 2})
    for widths in ([8, 8], [0], 8, [1.5]):
        with pytest.raises(UserError, match="widths of the study's estimators must be a list of different whole"):
            read_options({"widths": widths})
