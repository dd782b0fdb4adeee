"""`study --frozen`: what is measured at fixed weights, that it continues where it stopped, and what it is asked."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import PRESETS, parse_frozen, parse_study
from gradnorm_grpo.study import frozen, run
from gradnorm_grpo.study.estimators.gradients import capture, gram
from gradnorm_grpo.study.measurements import FIELDS, Measurements, _Run
from gradnorm_grpo.study.page import page
from gradnorm_grpo.study.questions import FROZEN, answer, proxy
from gradnorm_grpo.study.spec import FrozenSettings
from gradnorm_grpo.study.stats import cross_product

BLOCK = {"steps": 2, "prompts": 4, "full_steps": 1, "proxies": {"first": r"layers\.0\.self_attn", "mlp": r"1\.mlp"}}


def _config(folder: Path) -> Path:
    """A preset tiny of two tasks, small enough for a test."""
    config = yaml.safe_load((PRESETS / "tiny.yaml").read_text())
    config |= {"tiny_hidden_size": 32, "warm_start_steps": 0, "num_generations": 4, "eval_prompts": 4, "cache_dir": ""}
    config |= {"per_device_train_batch_size": 16, "max_completion_length": 3, "tasks": config["tasks"][:2]}
    config["study"] = {"frozen": BLOCK, "arms": {"uniform": {}}, "seeds": [1], "settings": {}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _measure(config: Path, folder: Path) -> list[dict[str, Any]]:
    settings, options = parse_frozen(["--config", str(config), "--output_dir", str(folder)])
    frozen.measure(settings, options, Console(quiet=True))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    place = tmp_path_factory.mktemp("frozen")
    config = _config(place)
    return config, place / "run", _measure(config, place / "run")


def test_every_choice_of_layers_is_measured_in_every_round(measured: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    lines = measured[2]
    assert [(line["kind"], line["step"]) for line in lines] == [("probe", 1), ("probe", 2)]
    for line in lines:
        for task in ("copy", "reverse"):
            for prefix in ("", "first_", "mlp_", *(["full_"] if line["step"] == 1 else [])):
                assert line[f"tasks/{task}/{prefix}n"] == 4 and f"tasks/{task}/{prefix}grad_norm_sq" in line
            assert line[f"tasks/{task}/prompts"] == 4
    assert "tasks/copy/full_n" not in lines[1]
    assert (measured[1] / "summary.json").is_file()


def test_the_last_blocks_u_is_that_of_the_stored_gradients(measured: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    """The loss of the parts is not that of training: the estimate is compared with the comparison of estimators'."""
    from transformers import set_seed

    from gradnorm_grpo.probe import untrained

    settings, _ = parse_frozen(["--config", str(measured[0]), "--output_dir", "unused"])
    grpo = untrained(settings, Console(quiet=True))
    # Rewards by hand: a model without a warm start has none.
    set_seed(0)
    batch = grpo.rollout(["copy"] * 4)
    batch.advantages = torch.randn(4, 4)
    assert grpo.tracker is not None
    expected = cross_product(gram(capture(grpo, batch, 0, 4)).numpy())
    values = frozen._part(grpo, batch, {"": grpo.tracker})
    grpo.close()
    assert values["tasks/copy/grad_norm_sq"] == pytest.approx(expected, rel=1e-4)


def test_an_interrupted_run_continues_with_the_same_numbers(
    measured: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, folder, lines = measured
    shutil.copytree(folder, tmp_path / "again")
    parts = (folder / "parts.jsonl").read_text().splitlines(keepends=True)
    assert len(parts) == 4
    # Killed while the third part was written.
    (tmp_path / "again" / "parts.jsonl").write_text("".join(parts[:2]) + parts[2][:40])
    (tmp_path / "again" / "summary.json").unlink()
    again = _measure(config, tmp_path / "again")
    assert again == lines
    assert (tmp_path / "again" / "parts.jsonl").read_text() == "".join(parts)


def test_another_settings_run_is_refused(measured: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    settings, options = parse_frozen(["--config", str(measured[0]), "--output_dir", str(measured[1])])
    with pytest.raises(UserError, match="holds a run with another prompts"):
        frozen.measure(settings, FrozenSettings(**{**vars(options), "prompts": 5}), Console(quiet=True))


def _planted(noise: float, proxies: dict[str, float], seed: int = 0) -> Measurements:
    """Eight tasks in four rounds of six seeds; each proxy's true U is the whole model's with errors of its own."""
    rng = np.random.default_rng(seed)
    tasks, steps = 8, 4
    truth = np.exp(np.linspace(0, 3, tasks))
    m = Measurements(
        ["uniform"], list(range(1, 7)), [f"task{k}" for k in range(tasks)], steps, 1, frozen=True, proxies=list(proxies)
    )
    for s in m.seeds:
        series = {name: np.full((tasks, steps), np.nan) for name in m.fields}
        for prefix, own in {"full_": 0.0, "": noise, **{f"{name}_": value for name, value in proxies.items()}}.items():
            u = truth * np.exp(own * rng.standard_normal(tasks))
            series[f"{prefix}grad_norm_sq"] = u[:, None] * np.exp(0.02 * rng.standard_normal((tasks, steps)))
            series[f"{prefix}grad_norm_sq_se"] = np.full((tasks, steps), 0.02)
            series[f"{prefix}pair_weight"] = np.full((tasks, steps), 56.0)
        for name in ("reward", "abs_advantage", "prompt_length", "response_length", "prompts", "rollouts"):
            series[name] = rng.random((tasks, steps)) + 1
        m._runs["uniform", s] = _Run(series, {})
    return m


def test_the_closest_choice_of_layers_is_found() -> None:
    assert proxy.answer(_planted(0.01, {"first": 4.0, "mlp": 5.0})).verdict == "supported"
    assert proxy.answer(_planted(4.0, {"first": 0.01, "mlp": 5.0})).verdict == "contradicted"
    found = proxy.answer(_planted(0.3, {"first": 0.3, "mlp": 0.3}, seed=4))
    assert found.verdict == "undecided" and "not distinguishable" in found.sentence


def test_all_parameters_at_fewer_rounds_are_compared_with_the_other_rounds() -> None:
    m = _planted(0.01, {"first": 4.0, "mlp": 5.0})
    for seed in m.seeds:
        m.array("uniform", seed, "full_grad_norm_sq")[:, 2:] = math.nan
    found = proxy.answer(m)
    assert found.verdict == "supported" and found.data["choices"][0]["value"] > 0.9


def test_a_frozen_study_is_asked_its_own_questions_and_travels_as_csv(tmp_path: Path) -> None:
    m = _planted(0.1, {"first": 0.2})
    m.write_csv(tmp_path / "m.csv")
    again = Measurements.from_csv(tmp_path / "m.csv")
    found = answer(again)
    assert [a["id"] for a in found["answers"]] == list(FROZEN) == ["imbalance", "last_block", "explain", "proxy"]
    again.write_csv(tmp_path / "twice.csv")
    assert (
        found == answer(Measurements.from_csv(tmp_path / "twice.csv"))
        and again.proxies == ["first"]
        and again.thirds() == [(0, 4)]
    )
    by_id = {a["id"]: a for a in found["answers"]}
    assert by_id["imbalance"]["verdict"] == by_id["last_block"]["verdict"] == "supported"
    text = page({"name": "frozen", "frozen": BLOCK}, found)
    assert "- Rounds: 2 a run at fixed weights, 4 prompts of every task in each" in text and "- Training:" not in text
    assert "over tasks, each U from prompts of its own" in text and "thirds of training, each U" not in text
    assert proxy.QUESTION in text and "overview.svg" not in text
    assert set(again.fields) > set(FIELDS)


def test_the_command_takes_its_jobs_from_the_block(tmp_path: Path) -> None:
    settings, spec, _ = parse_study(["--preset", "smollm2_frozen", "--output_dir", str(tmp_path)])
    assert len(settings.tasks) >= 12 and spec.frozen is not None and len(spec.seeds) * 2 * 22 >= 128
    jobs = run._jobs(settings, spec, tmp_path, [])
    assert [job.arguments[0] for job in jobs] == ["frozen"] * 3
    again = parse_frozen(list(jobs[0].arguments[1:]))
    assert again[0].seed == 1 and again[1] == FrozenSettings.read(spec.frozen)
    plain = parse_study(["--preset", "tiny", "--frozen"])[1]
    assert plain.frozen == {} and list(plain.arms) == ["uniform"]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"steps": 1}, "steps of a frozen study must be a whole number from 2"),
        ({"prompts": 2}, "prompts of a frozen study"),
        ({"proxies": {"full": "x"}}, "proxies of a frozen study must map names"),
        ({"proxies": ["x"]}, "proxies of a frozen study must map names"),
        ({"rounds": 2}, "a key of a frozen study"),
        ([], "must be a mapping"),
    ],
)
def test_what_cannot_be_is_refused(block: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FrozenSettings.read(block)


def test_a_mean_that_is_not_known_is_nan() -> None:
    m = _planted(0.1, {})
    m.array("uniform", 1, "full_grad_norm_sq")[:] = math.nan
    assert proxy.answer(m).verdict == "undecided"
