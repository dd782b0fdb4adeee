"""What a digit of U costs: the ways measure the same U as the tracker, and the table is arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import parse_cost
from gradnorm_grpo.study import cost
from gradnorm_grpo.study.spec import CostSettings

SMALL = """
model: tiny
tiny_layers: 2
tiny_hidden_size: 32
num_threads: 1
prompt_template: "{question} = "
tasks:
  - {name: copy, source: synthetic}
  - {name: add, source: synthetic}
warm_start_steps: 0
num_generations: 4
per_device_train_batch_size: 32
gradient_accumulation_steps: BATCHES
max_completion_length: 4
loss_type: grpo
eval_prompts: 0
cache_dir: ""
study:
  seeds: [1]
  cost: {prompts: PROMPTS, rounds: 2}
"""


def _config(folder: Path, prompts: int = 16, batches: int = 1) -> list[str]:
    path = folder / "small.yaml"
    path.write_text(SMALL.replace("PROMPTS", str(prompts)).replace("BATCHES", str(batches)))
    return ["--config", str(path), "--output_dir", str(folder / "runs" / "new")]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warm start all rewards are zero: the advantages are drawn, the same for one seed."""
    plain = cost.stored_rollouts

    def stored(grpo, prompts, path):
        batch, reused = plain(grpo, prompts, path)
        batch.advantages.copy_(torch.randn(batch.advantages.shape, generator=torch.Generator().manual_seed(0)))
        return batch, reused

    monkeypatch.setattr(cost, "stored_rollouts", stored)


def test_every_way_measures_the_same_u_of_its_layers(gradients: None, tmp_path: Path) -> None:
    assert cost.cost(_config(tmp_path), Console(quiet=True)) == 0
    folder = tmp_path / "runs" / "new"
    result = json.loads((folder / "seed1.json").read_text())
    assert result["prompts_per_step"] == 4 and (folder / "cost.svg").stat().st_size > 1000
    ways = {way["name"]: way for way in result["ways"]}
    assert len(ways) == len(cost.WAYS) + 3 and all(len(way["seconds"]) == 2 for way in ways.values())
    for layers in cost.LAYERS:
        pairs = ways[f"{layers}_pairs"]["u"]
        for task, values in pairs.items():
            assert len(values) == 4 and ways[f"{layers}_exact"]["u"][task] == pytest.approx(values, rel=1e-3, abs=1e-9)
            assert len(ways[f"{layers}_two_batch"]["u"][task]) == 4
            assert math.isfinite(result["reference"][layers][task]["u"])
    # The whole model has more gradient than its linear layers, which have more than one block's attention.
    total = [sum(result["reference"][layers][task]["mean_sq_norm"] for task in pairs) for layers in cost.LAYERS]
    assert total[0] < total[1] < total[2]


def test_the_gradients_of_half_steps_are_those_of_the_tracker(
    gradients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The mean of two halves is the step's mean gradient, whose squared norm the tracker gives as the plug-in."""
    plug_in: dict[str, list[float]] = {}
    plain = cost._step

    def kept(grpo, part, tracker):
        stats = plain(grpo, part, tracker)
        if tracker is not None and tracker.accumulation.startswith("pairs"):
            plug_in.setdefault(str(len(tracker.layers)), []).extend(stats[task].plug_in for task in ("copy", "add"))
        return stats

    grams: list[dict[str, np.ndarray]] = []
    halves = cost.half_steps
    monkeypatch.setattr(cost, "_step", kept)
    monkeypatch.setattr(cost, "half_steps", lambda *a: grams.append(halves(*a)) or grams[-1])
    settings, options, _, name = parse_cost(_config(tmp_path))
    cost.measure(settings, name, options, tmp_path, Console(quiet=True))
    assert len(plug_in) == 3 and len(grams) == 2
    # Three passes a round: one that does not count and two steps; six numbers of each kind of layers in two rounds.
    for layers, found in zip(cost.LAYERS, sorted(plug_in, key=int), strict=True):
        expected = []
        for step in range(4):
            for gram in grams:
                two = gram[layers][2 * step : 2 * step + 2, 2 * step : 2 * step + 2]
                expected.append(two.sum() / 4)
        first, second = plug_in[found][:6], plug_in[found][6:]
        assert first[2:] + second[2:] == pytest.approx(expected, rel=1e-4)


def test_the_table_is_the_arithmetic_of_the_seconds_and_the_spread() -> None:
    u = [1.0, 3.0, -1.0, 5.0]
    known = {"a": {"u": 2.0, "significant": True}, "b": {"u": 1.0, "significant": False}}
    ways = [
        {"name": f"{layers}_{kind}", "layers": layers, "kind": kind, "u": {"a": u, "b": u}, "seconds": [1.1, 1.3]}
        for layers in cost.LAYERS
        for kind in ("pairs", "exact", "sketch", cost.TWO_BATCH)
    ]
    result = {
        "plain_seconds": [1.0, 1.0],
        "ways": ways,
        "reference": dict.fromkeys(cost.LAYERS, known),
        "prompts_per_step": 8,
    }
    row = cost.rows([result])[0]
    spread = float(np.std(u, ddof=1)) / 2.0
    assert row["error"] == pytest.approx(spread) and row["steps"] == pytest.approx((spread / 0.1) ** 2)
    assert row["extra"] == pytest.approx(0.2) and (row["low"], row["high"]) == pytest.approx((0.15, 0.25))
    assert row["price"] == pytest.approx(0.2 * row["steps"]) and row["share"] == pytest.approx(0.2)
    assert cost.table([result]).count("\n") == 2 + len(ways)
    assert "takes" not in cost.sentence([result]) and cost.draw([result]) is not None


def test_sizes_that_make_no_steps_and_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of rounds=2"):
        cost.cost(_config(tmp_path, prompts=12), Console(quiet=True))
    with pytest.raises(UserError, match="scale_rewards 'batch'"):
        cost.cost([*_config(tmp_path), "--scale_rewards", "batch"], Console(quiet=True))
    with pytest.raises(UserError, match="a key of the study's cost"):
        CostSettings.read({"prompt": 8})
    with pytest.raises(UserError, match="rounds of the study's cost"):
        CostSettings(rounds=0)
