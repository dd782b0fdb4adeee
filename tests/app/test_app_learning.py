"""Warm start, its cache, what the run's lines add up to, and that the tiny model learns under GRPO."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import set_seed

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Grpo
from gradnorm_grpo.models import load_model
from gradnorm_grpo.parse import parse_settings
from gradnorm_grpo.rollout import Prompter, evaluate
from gradnorm_grpo.runlog import report_trackers
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.summary import gain_at, summarize
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.warm_start import cache_file, warm_start


def _settings(*arguments: str) -> Settings:
    return parse_settings(["--preset", "tiny", "--num_threads", "1", *arguments])[0]


def _warm(settings: Settings) -> tuple[bool, list[float], torch.nn.Module]:
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    model, tokenizer = load_model(settings)
    losses: list[float] = []
    prompter = Prompter(tokenizer, tasks, settings)
    cached = warm_start(model, tokenizer, tasks, prompter, settings, lambda step, loss: losses.append(loss))
    return cached, losses, model


def test_warm_start_and_its_cache(tmp_path: Path) -> None:
    small = [
        "--tiny_hidden_size",
        "32",
        "--warm_start_steps",
        "30",
        "--warm_start_examples",
        "60",
        "--eval_prompts",
        "4",
    ]
    settings = _settings(*small, "--cache_dir", str(tmp_path))
    cached, losses, model = _warm(settings)
    assert not cached and len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    again, nothing, same = _warm(settings)
    assert again and nothing == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"], "no temporary file stays"
    kept = next(tmp_path.iterdir())
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    with pytest.raises(UserError, match="is damaged .* delete it"):
        _warm(settings)
    kept.write_bytes(whole)
    for change in (["--warm_start_steps", "31"], ["--seed", "1"], ["--only_tasks", "copy", "add"]):
        changed = _settings(*small, "--cache_dir", str(tmp_path), *change)
        assert cache_file(changed, model) != cache_file(settings, model), change
    for irrelevant in (["--max_steps", "9"], ["--learning_rate", "0.5"]):
        assert cache_file(_settings(*small, "--cache_dir", str(tmp_path), *irrelevant), model) == next(
            tmp_path.iterdir()
        )
    assert cache_file(_settings("--cache_dir="), model) is None


def test_the_tiny_model_learns_under_grpo() -> None:
    """Sampled reward at the end against the start. Its standard error is about 0.03; two seeds rose 0.10 and 0.14."""
    settings = _settings(
        *("--cache_dir=", "--only_tasks", "copy", "--per_device_train_batch_size", "256"),
        *("--warm_start_steps", "70", "--warm_start_batch_size", "48"),
    )
    set_seed(settings.seed)
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    model, tokenizer = load_model(settings)
    prompter = Prompter(tokenizer, tasks, settings)
    warm_start(model, tokenizer, tasks, prompter, settings, lambda step, loss: None)
    loop = Grpo(settings, model, tokenizer, tasks, prompter)
    before = evaluate(model, tokenizer, tasks, prompter, settings)
    set_seed(settings.seed)
    lines = [loop.step() for _ in range(30)]
    after = evaluate(model, tokenizer, tasks, prompter, settings)
    rewards = [line["tasks/copy/reward"] for line in lines]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.06, rewards
    evals = [{"step": 0, "kind": "eval", **before}, {"step": 30, "kind": "eval", **after}]
    task = summarize([evals[0], *lines, evals[1]], ["copy"], 10, 1.0)["tasks"]["copy"]
    assert task["gain"] > 0 and task["reward"] > task["reward_first"] and task["eval_n"] == 64
    assert task["n"] == 30 * 32 and task["grad_norm_sq"] > 0 and task["pull_share"] == 1.0


def test_gain() -> None:
    rewards = [0.0, 0.0, 1.0, 1.0, 1.0, 0.5]
    assert gain_at(rewards, 2, 2) == 1.0
    assert gain_at(rewards, 4, 2) == -0.25
    assert math.isnan(gain_at(rewards, 1, 2)) and math.isnan(gain_at(rewards, 5, 2))
    assert gain_at([0.0, None, 1.0, None], 2, 2) == 1.0
    assert math.isnan(gain_at([None, None, 1.0, 1.0], 2, 2))


def test_summary_pools_numerators_and_denominators() -> None:
    def line(step: int, u: float | None, pairs: float, inner: float, n: int) -> dict:
        measured = {"grad_norm_sq": u, "grad_norm_sq_se": 0.1, "pair_weight": pairs, "n": n, "plug_in": 1.0}
        common = {"reward": step / 4, "mean_sq_norm": 2.0, "noise_scale": None}
        return {
            "kind": "train",
            "step": step,
            **{f"tasks/a/{key}": value for key, value in {**measured, **common}.items()},
            **{f"tasks/b/{key}": value for key, value in {**measured, **common, "grad_norm_sq": 4.0}.items()},
            "tasks/inner_product/a/b": inner,
        }

    lines = [line(1, 1.0, 2.0, 1.0, 2), line(2, 3.0, 6.0, 2.0, 3), {"kind": "train", "step": 3}]
    summary = summarize(lines, ["a", "b"], 1, 7.0)
    a = summary["tasks"]["a"]
    assert a["grad_norm_sq"] == pytest.approx((1.0 * 2 + 3.0 * 6) / 8) and a["n"] == 5
    assert a["pull_share"] == pytest.approx(2.5 / 6.5)
    inner = (4 * 1.0 + 9 * 2.0) / 13
    assert summary["cosines"]["matrix"][0][1] == pytest.approx(inner / math.sqrt(2.5 * 4.0))
    assert (a["reward_first"], summary["steps"], summary["seconds"]) == (0.25, 3, 7.0)
    assert math.isnan(a["eval_before"])


def test_summary_of_a_task_that_was_never_measured() -> None:
    summary = summarize([{"kind": "train", "step": 1, "tasks/a/reward": 0.5}], ["a"], 2, 1.0)
    assert math.isnan(summary["tasks"]["a"]["grad_norm_sq"]) and math.isnan(summary["tasks"]["a"]["pull_share"])


def test_report_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert report_trackers(["none"], tmp_path, {}) == []
    tracker = report_trackers(["tensorboard"], tmp_path, {"a": 1, "b": [1, 2]})[0]
    tracker.log({"x": 1.0}, step=1)
    tracker.finish()
    assert any(path.name.startswith("events.") for path in tmp_path.rglob("*"))


def test_report_trackers_start_in_a_fresh_process_and_say_why_they_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.tracking
    from accelerate.logging import get_logger
    from accelerate.state import PartialState

    class Talking:
        """Logs through accelerate at its start, as trackio's tracker does."""

        requires_logging_directory = False

        def __init__(self, run_name: str) -> None:
            self.run_name = run_name

        def start(self) -> None:
            get_logger(__name__).debug("started")

        def store_init_configuration(self, values: dict) -> None:
            self.values = values

    class Broken(Talking):
        def start(self) -> None:
            raise ConnectionError("no server at hand")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "talking", Talking)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "broken", Broken)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["talking", "broken"])
    PartialState._reset_state()
    assert report_trackers(["talking"], tmp_path, {"a": [1]})[0].values == {"a": "[1]"}
    with pytest.raises(UserError, match=r"'broken' could not start \(no server at hand\)"):
        report_trackers(["broken"], tmp_path, {})
