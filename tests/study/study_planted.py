"""Made-up studies with known truths, for the tests of the study: U, gains, accuracies and lengths are planted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradnorm_grpo.study.measurements import FIELDS, Array, Measurements, _Run

NAMES = ("copy", "reverse", "sort", "compare", "add", "maximum", "count", "shift")
PAIRS = 56.0  # of 8 prompts


def planted(
    rng: np.random.Generator,
    u: Sequence[float],
    gains: Sequence[float] | None = None,
    arms: Sequence[str] = ("uniform", "proportional"),
    seeds: Sequence[int] = (1, 2, 3),
    steps: int = 30,
    window: int = 5,
    noise: float = 0.3,
    spread: float = 0.1,
    full: Sequence[float] | None = None,
    full_noise: float = 0.3,
    better: float = 0.0,
    accuracy_noise: float = 0.01,
    statistics: Array | None = None,
    evaluations: Sequence[float] = (0.0, 0.5, 1.0),
) -> Measurements:
    """Measurements of made-up runs.

    ``u`` [K]: the true U of the last block; ``spread``: log deviation of a task's U from seed to seed; ``noise`` and
    ``full_noise``: error of one step's U, shared by both; ``full`` [K]: the true U of all parameters; ``gains`` [K]: of
    held-out accuracy; ``better``: what "proportional" adds; ``statistics`` [4, K]: reward, |advantage|, two lengths.
    """
    count = len(u)
    means = statistics if statistics is not None else 1 + rng.random((4, count))
    learned = np.zeros(count) if gains is None else np.asarray(gains, float)
    m = Measurements(list(arms), list(seeds), list(NAMES[:count]), steps, window)
    for seed in seeds:
        own = np.exp(spread * rng.standard_normal(count))
        start = 0.4 + 0.05 * rng.standard_normal(count)
        for arm in arms:
            series = {name: np.full((count, steps), np.nan) for name in FIELDS}
            chance = rng.standard_normal((count, steps))
            for prefix, truth, error in (("", u, noise), ("full_", full, full_noise)):
                if truth is None:
                    continue
                series[f"{prefix}grad_norm_sq"] = (np.asarray(truth) * own)[:, None] + error * chance
                series[f"{prefix}grad_norm_sq_se"] = np.full((count, steps), error)
                series[f"{prefix}pair_weight"] = np.full((count, steps), PAIRS)
                series[f"{prefix}plug_in"] = series[f"{prefix}grad_norm_sq"] + 3.0
            for name, mean in zip(("reward", "abs_advantage", "prompt_length", "response_length"), means, strict=True):
                series[name] = mean[:, None] + 0.1 * rng.standard_normal((count, steps))
            series["prompts"], series["rollouts"] = np.full((count, steps), 8.0), np.full((count, steps), 64.0)
            evals = {}
            for part in evaluations:
                end = learned + (better if arm == "proportional" else 0.0)
                reward = start + part * end + (accuracy_noise * rng.standard_normal(count) if part else 0.0)
                evals[round(part * steps)] = {
                    "reward": reward,
                    "reward_se": np.full(count, 0.05),
                    "n": np.full(count, 64.0),
                }
            m._runs[arm, seed] = _Run(series, {"eval": evals})
    return m


def write_runs(m: Measurements, folder: Path) -> None:
    """The same as the folders that training leaves: study.json and runs/<arm>-seed<seed>/."""
    arms = {arm: {"sampling_strategy": arm} for arm in m.arms}
    study = {"name": "planted", "arms": arms, "seeds": m.seeds, "tasks": m.tasks, "gain_window": m.gain_window}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study))
    for arm, seed in m.runs:
        place = folder / "runs" / f"{arm}-seed{seed}"
        place.mkdir(parents=True)
        config = {"num_generations": 8, "tracker_layers": m.layers}
        (place / "run.json").write_text(json.dumps({"config": config, "tasks": m.tasks}))
        lines: list[dict[str, object]] = [{"kind": "warm_start", "step": 1, "loss": 1.0}]
        for step, point in m._runs[arm, seed].evals["eval"].items():
            values = {f"eval/{task}/{key}": float(point[key][k]) for k, task in enumerate(m.tasks) for key in point}
            lines.append({"kind": "eval", "step": step, **values})
        for t in range(m.steps):
            line: dict[str, object] = {"kind": "train", "step": t + 1, "loss": 0.0}
            for task in m.tasks:
                values = {name: float(m.series(arm, seed, task, name)[t]) for name in FIELDS if name != "rollouts"}
                line |= {f"tasks/{task}/{name}": v if np.isfinite(v) else None for name, v in values.items()}
            lines.append(line)
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (place / "summary.json").write_text("{}")
