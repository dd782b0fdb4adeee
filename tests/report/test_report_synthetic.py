"""Synthetic runs for the tests of the report: invented, but statistically like real ones. No model was trained.

Each prompt's gradient is drawn as a vector around its task's mean, and every number of the log (U, its jackknife error,
plug-in, inner products) is computed from those vectors, so the errors in the log are honest about the scatter in it.
"""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NAMES = ["syllogism", "letter_counting", "gcd", "isomorphic_strings", "countdown", "number_sorting"]
# Squared norms and noise scales like those that a small model shows: loud tasks are 30 times louder than quiet ones.
PULL = [3.7e-2, 2.6e-2, 1.5e-2, 5.4e-3, 1.4e-3, 1.2e-3]
NOISE = [10.0, 9.0, 30.0, 32.0, 50.0, 60.0]
DIM = 48


def estimates(gradients: np.ndarray) -> dict[str, float]:
    """U, its jackknife standard error, plug-in, mean squared norm and noise scale of n gradients [n, d]."""
    n = len(gradients)
    total, own = gradients.sum(0), (gradients**2).sum(1)
    u = (total @ total - own.sum()) / (n * (n - 1)) if n > 1 else math.nan
    error = math.nan
    if n > 2:
        left = total - gradients
        u_left = ((left**2).sum(1) - (own.sum() - own)) / ((n - 1) * (n - 2))
        error = math.sqrt((n - 1) / n * ((u_left - u_left.mean()) ** 2).sum())
    mean_sq = own.mean()
    return {
        "grad_norm_sq": u,
        "grad_norm_sq_se": error,
        "noise_scale": (mean_sq - u) / u if n > 1 else math.nan,
        "plug_in": float(total @ total) / n**2,
        "mean_sq_norm": mean_sq,
        "n": n,
        "pair_weight": n * (n - 1),
    }


def write_synthetic_run(
    path: Path,
    names: list[str] = NAMES,
    steps: int = 60,
    prompts: int = 36,
    seed: int = 0,
    evals: bool = True,
    warm: int = 28,
) -> Path:
    """Write run.json and metrics.jsonl of an invented, unfinished run (summary.json is left to the caller)."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    k = len(names)
    pull = np.array([PULL[i % len(PULL)] * 0.7 ** (i // len(PULL)) for i in range(k)])
    noise = np.array([NOISE[i % len(NOISE)] for i in range(k)]) * pull / DIM
    directions = rng.standard_normal((k, DIM)) + 0.5 * rng.standard_normal(DIM)
    if k > 3:
        directions[3] = -0.6 * directions[0] + 0.8 * directions[3]
    means = directions / np.linalg.norm(directions, axis=1, keepdims=True) * np.sqrt(pull)[:, None]
    start, end = rng.uniform(0.1, 0.5, k), rng.uniform(0.0, 0.4, k)
    lines: list[dict[str, Any]] = [
        {
            "kind": "warm_start",
            "step": s,
            "time": 6.0 * s,
            "loss": 2.8 * math.exp(-s / 9) + 0.3 + 0.08 * rng.standard_normal(),
        }
        for s in range(1, warm + 1)
    ]

    def evaluate(step: int, level: np.ndarray, kind: str = "eval") -> None:
        line: dict[str, Any] = {"kind": kind, "step": step, "time": 200.0 + 30 * step}
        for name, p in zip(names, level, strict=True):
            reward = rng.binomial(128, p) / 128
            line |= {f"eval/{name}/reward": reward, f"eval/{name}/n": 128}
            line[f"eval/{name}/reward_se"] = math.sqrt(reward * (1 - reward) / 127)
        lines.append(line)

    if evals and warm:
        evaluate(0, np.zeros(k), "eval_base")  # a model that solves nothing before its warm start
    if evals:
        evaluate(0, start)
    running = pull.copy()
    rewards = np.full((steps, k), np.nan)
    for step in range(1, steps + 1):
        done = step / max(steps, 1)
        level = np.clip(start + end * (1 - math.exp(-3 * done)), 0, 1)
        share = np.sqrt(np.maximum(running, 1e-6))
        probability = 0.9 * share / share.sum() + 0.1 / k
        probability /= probability.sum()
        drawn = rng.multinomial(prompts, probability)
        line = {
            "kind": "train",
            "step": step,
            "time": 200.0 + 30 * step,
            "loss": 0.01 * rng.standard_normal(),
            "lr": 1e-5,
        }
        line |= {"grad_norm": float(rng.gamma(4, 0.2)), "tokens": int(rng.integers(9000, 12000))}
        sums = {}
        for i, name in enumerate(names):
            line[f"tasks/{name}/sampling_prob"] = probability[i]
            if not drawn[i]:
                continue
            fade = math.sqrt(1 - 0.5 * done)
            gradients = fade * means[i] + rng.standard_normal((drawn[i], DIM)) * math.sqrt(noise[i])
            sums[i] = gradients.mean(0)
            values = estimates(gradients)
            if drawn[i] > 1:
                running[i] = 0.9 * running[i] + 0.1 * values["grad_norm_sq"]
            rewards[step - 1, i] = values["reward"] = rng.binomial(drawn[i] * 8, level[i]) / (drawn[i] * 8)
            values |= {"reward_std": 0.4, "abs_advantage": 0.5, "prompt_length": 40.0 + i, "response_length": 2.0 + i}
            line |= {f"tasks/{name}/{key}": value for key, value in values.items()}
        for (i, a), (j, b) in combinations(sums.items(), 2):
            line[f"tasks/inner_product/{names[i]}/{names[j]}"] = float(a @ b)
        lines.append(line)
        if evals and step % 20 == 0 and step < steps:
            evaluate(step, level)
    train = [line for line in lines if line["kind"] == "train"]
    for t in range(5, steps - 4):
        for i, name in enumerate(names):
            after, before = rewards[t : t + 5, i], rewards[t - 5 : t, i]
            if np.isfinite(after).any() and np.isfinite(before).any():
                train[t][f"tasks/{name}/learning_gain"] = float(np.nanmean(after) - np.nanmean(before))
    if evals and steps:
        evaluate(steps, np.clip(start + end * 0.95, 0, 1))
    info = {
        "command": "synthetic: no training took place",
        "started": "2025-01-01T00:00:00+00:00",
        "versions": {"torch": "0.0 (synthetic)"},
        "machine": "none (synthetic)",
        "config": {"seed": seed, "sampling": {"strategy": "proportional", "floor": 0.1}, "prompts_per_step": prompts},
        "tasks": names,
        "model": "synthetic/invented-numbers",
        "parameters": 134_515_008,
        "tracked_layers": [f"layer.{p}_proj" for p in "qkvo"],
    }
    (path / "run.json").write_text(json.dumps(info))
    (path / "metrics.jsonl").write_text("".join(json.dumps(nulled(line)) + "\n" for line in lines))
    return path


def nulled(line: dict[str, Any]) -> dict[str, Any]:
    """The line as plain JSON: NaN becomes null, numpy's numbers Python's."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and math.isnan(value) else value

    return {key: plain(value) for key, value in line.items()}


def test_synthetic_estimates_are_unbiased_and_their_errors_honest() -> None:
    """The generator itself: mean of U within 4 errors of the truth, plug-in off by trace/n, z-scores about one wide."""
    rng = np.random.default_rng(1)
    mean, n, trials = np.full(DIM, 0.05), 7, 2000
    found = [estimates(mean + rng.standard_normal((n, DIM)) * 0.1) for _ in range(trials)]
    u, error, plug = (np.array([f[key] for f in found]) for key in ("grad_norm_sq", "grad_norm_sq_se", "plug_in"))
    truth, trace = float(mean @ mean), DIM * 0.01
    assert abs(u.mean() - truth) < 4 * u.std() / math.sqrt(trials)
    assert plug.mean() == pytest.approx(truth + trace / n, rel=0.05)
    assert 0.7 < u.std() / math.sqrt((error**2).mean()) < 1.3
