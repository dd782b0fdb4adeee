"""The probe at the end of a run: all pairs of prompts at fixed weights, its line, its tables, and a kill inside it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("trl")

from gradnorm_grpo import cli, probe
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Batch, Grpo, Sampler
from gradnorm_grpo.rollout import Prompter, generate
from gradnorm_grpo.runlog import read_run
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.summary import task_results
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer

TASKS = [{"name": "copy", "source": "synthetic"}, {"name": "maximum", "source": "synthetic"}]
CONFIG: dict[str, Any] = {
    "tasks": TASKS,
    "model": "tiny",
    "tiny_layers": 2,
    "tiny_hidden_size": 32,
    "num_threads": 1,
    "prompt_template": "{question} = ",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 4,
    "loss_type": "grpo",
    "eval_prompts": 2,
    "cache_dir": "",
    "max_steps": 2,
}


def loop(monkeypatch: pytest.MonkeyPatch, kept: list[Batch]) -> Grpo:
    """A tiny model's loop whose prompts have advantages drawn at random, but for every third, which has none."""
    settings = Settings(**CONFIG)
    tokenizer, tasks = tiny_tokenizer(), build_tasks(TASKS, 0, 2)
    grpo = Grpo(settings, tiny_model(tokenizer, 32, 2, 3), tokenizer, tasks, Prompter(tokenizer, tasks, settings), None)
    generator, rollout = torch.Generator().manual_seed(6), grpo.rollout

    def given(names: list[str], sample: Sampler = generate) -> Batch:
        batch = rollout(names, sample)
        advantages = torch.randn(len(names), 4, generator=generator)
        advantages[[i for i in range(len(names)) if (len(kept) + i) % 3 == 0]] = 0.0
        kept.append(dataclasses.replace(batch, advantages=advantages, rewards=advantages))
        return kept[-1]

    monkeypatch.setattr(grpo, "rollout", given)
    return grpo


def last_block_gradients(grpo: Grpo, batch: Batch) -> list[Tensor]:
    """Each prompt's gradient in the last attention block, by autograd, one prompt at a time."""
    found = []
    attention = grpo.model.model.layers[-1].self_attn
    for i in range(len(batch.tasks)):
        part = slice(i, i + 1)
        one = Batch(
            batch.tasks[part],
            batch.examples[part],
            dataclasses.replace(batch.rollouts.rows(i, i + 1), below=None),  # by the whole model
            batch.rewards[part],
            batch.advantages[part],
            batch.sampling,
        )
        grpo.model.zero_grad(set_to_none=True)
        grpo.accumulate(one, [], [])
        found.append(torch.cat([p.grad.double().flatten() for p in attention.parameters()]))
    return found


def test_it_is_u_over_all_pairs_of_prompts_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Batch] = []
    grpo, told = loop(monkeypatch, kept), []
    frozen = grpo.model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in grpo.model.named_parameters()}
    line = probe.final_probe(grpo, 7, lambda done, seconds, numbers: told.append((done, seconds)) or 7)
    assert [done for done, _ in told] == [2, 4, 6, 7] and all(seconds > 0 for _, seconds in told)
    assert all(torch.equal(p, before[name]) for name, p in grpo.model.named_parameters())
    assert [p for p in grpo.model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in grpo.model.parameters())
    assert all(batch.rollouts.below is not None for batch in kept), "only the last layer ran again"
    sums = {}
    for name in ("copy", "maximum"):
        batches = [batch for batch in kept if batch.tasks[0] == name]
        gradients = torch.stack([g for batch in batches for g in last_block_gradients(grpo, batch)])
        squares = gradients.square().sum(1)
        sums[name] = gradients.sum(0)
        u = float((sums[name].square().sum() - squares.sum()) / (7 * 6))
        assert line[f"tasks/{name}/grad_norm_sq"] == pytest.approx(u, rel=1e-4, abs=1e-6 * float(squares.mean()))
        assert line[f"tasks/{name}/mean_sq_norm"] == pytest.approx(float(squares.mean()), rel=1e-4)
        assert line[f"tasks/{name}/n"] == line[f"tasks/{name}/prompts"] == 7
        informative = sum(int((batch.advantages != 0).any(1).sum()) for batch in batches)
        assert line[f"tasks/{name}/n_effective"] == informative and 0 < informative < 7
        mean = sum(float(batch.rewards.mean(1).sum()) for batch in batches) / 7
        assert line[f"tasks/{name}/reward"] == pytest.approx(mean, abs=1e-6)
        assert math.isfinite(line[f"tasks/{name}/grad_norm_sq_se"])
    inner = float(sums["copy"] @ sums["maximum"]) / 49
    assert line["tasks/inner_product/copy/maximum"] == pytest.approx(inner, rel=1e-3, abs=1e-9)


def test_it_stops_at_the_number_of_prompts_that_a_round_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo = loop(monkeypatch, [])
    line = probe.final_probe(grpo, 50, lambda done, seconds, numbers: 5 if done >= 4 else 50)
    assert {line[f"tasks/{name}/n"] for name in ("copy", "maximum")} == {5}


def test_one_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="final_probe_prompts must be 0 or at least 2, got 1"):
        Settings(**{**CONFIG, "final_probe_prompts": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a plan and a final probe."""
    place = tmp_path_factory.mktemp("probe")
    more = {"final_probe_prompts": 12, "plan_minutes": 30, "warm_start_steps": 2, "warm_start_examples": 8}
    (place / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **more}))
    assert cli.main(["train", "--config", str(place / "config.yaml"), "--output_dir", str(place / "run")]) == 0
    return place / "run"


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found if line["kind"] == kind]


def test_a_run_logs_its_plan_and_its_probe_apart_from_its_steps(run: Path) -> None:
    (plan,), (probed,) = lines(run, "plan"), lines(run, "final_probe")
    assert plan["step"] == 1 and plan["planned_steps"] == 2 and plan["planned_prompts"] == 12
    assert plan["step_seconds"] > 0 and plan["question_seconds"] > 0 and plan["prompt_seconds"] > 0
    info = json.loads((run / "run.json").read_text())
    assert info["plan"] == {"steps": 2, "questions": 2, "prompts": 12, "warm_start": 2}
    assert info["machine"]["threads_from"] == "num_threads"
    assert probed["step"] == 2 and probed["tasks/copy/n"] == 12
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["final_probe"]["step"] == 2
    assert summary["tasks"]["copy"]["n"] == 2 and summary["final_probe"]["tasks"]["copy"]["n"] == 12
    assert summary["final_probe"]["tasks"]["copy"]["n_effective"] == probed["tasks/copy/n_effective"]
    read = read_run(run)
    assert len(read.steps) == 2 and not read.probe and read.final_probe is not None
    for result in task_results(read.final_probe):
        assert result.n == 12 and result.sq_norm == probed[f"tasks/{result.name}/grad_norm_sq"]
    assert any("plan_minutes 30.0 had room for warm_start_steps 2 of 2, max_steps 2 of 2" in n for n in read.notes)
    page = (run / "report.html").read_text()
    assert "At the end: 12 new prompts per task at the weights after step 2" in page and 'id="final-probe"' in page


def test_a_run_killed_in_its_probe_measures_the_same_again(run: Path) -> None:
    """What SIGKILL leaves: the last checkpoint, and a log that ends in the middle of the probe's line."""
    (before,) = lines(run, "final_probe")
    (run / "summary.json").unlink()
    log = run / "metrics.jsonl"
    kept = [text for text in log.read_text().splitlines() if '"final_probe"' not in text]
    log.write_text("\n".join([*kept, '{"kind": "final_pr']))
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert lines(run, "final_probe") == [before] and (run / "summary.json").is_file()
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


def test_a_run_resumed_for_more_steps_has_one_probe_of_its_last_weights(run: Path) -> None:
    assert cli.main(["train", "--resume", str(run), "--max_steps", "3", "--final_probe_prompts", "4"]) == 0
    (probed,) = lines(run, "final_probe")
    assert probed["step"] == 3 and probed["tasks/copy/n"] == 4
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3]
    assert json.loads((run / "run.json").read_text())["plan"]["steps"] == 3
