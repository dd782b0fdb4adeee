"""Made-up answers of the form of answers.json, for the tests of the study's pictures and page."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradnorm_grpo.study.questions import QUESTIONS as MODULES

IDS = tuple(MODULES)
SIX = ["copy", "reverse", "sort", "compare", "add", "maximum"]
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b `c` & d",
    "$x$ ünïcödé 数え上げ",
    "line\nbreak\x00\ud800",
    "--> ]]>",
    "z" * 90,
    "gcd",
    "countdown of numbers",
    "-0",
    "é",
    " ",
    "12",
]
FACTORS = {
    "reward": "mean reward",
    "abs_advantage": "mean |advantage|",
    "prompt_length": "prompt length",
    "response_length": "response length",
}
ARMS = ["uniform", "proportional", "inverse", "equal_pull", "arm_e", "arm_f"]
QUESTIONS = {
    "imbalance": "Do some tasks produce much larger gradients than others?",
    "last_block": "Does the last attention block stand for the whole model?",
    "gain": "Do tasks with larger gradients gain more?",
    "explain": "Do reward, advantages or lengths explain which gradients are large?",
    "arms": "Does drawing tasks by their gradients change what is learned?",
    "estimators": "Which estimator of U is best, and what does a sketch of the gradients cost?",
}


def around(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made_up(tasks: list[str], num_arms: int = 4, num_seeds: int = 3, spread: float = 30.0) -> dict[str, Any]:
    """Answers of the form of answers.json, drawn by chance, for so many tasks, arms and seeds."""
    rng = np.random.default_rng(len(tasks) * 10 + num_arms)
    arms, seeds = ARMS[:num_arms], list(range(1, num_seeds + 1))
    u = dict(zip(tasks, 0.02 * spread ** rng.permutation(np.linspace(0, 1, len(tasks))), strict=True))
    windows = [{"window": w, "first": 20 * w + 1, "last": 20 * w + 20} for w in range(3)]
    imbalance = {
        "unit": "last attention block",
        "overall": [
            {
                "task": t,
                **around(u[t], 0.3 * u[t] + 0.01),
                "plug_in": u[t] + 0.2,
                "per_seed": [{"seed": s, "value": u[t], "se": 0.02} for s in seeds],
                "full": 5 * u[t],
                "full_low": 3 * u[t],
                "full_high": 7 * u[t],
            }
            for t in tasks
        ],
        "windows": windows,
        "by_window": [
            {"task": t, "window": w, **around(u[t] * (1.2 - 0.4 * w) + rng.normal() * 0.01, 0.3 * u[t] + 0.02)}
            for t in tasks
            for w in range(3)
        ],
        "ratios": [
            {"where": "training", "value": 18.0, "low": 9.0, "high": 36.0},
            {"where": "all parameters", "value": None, "low": None, "high": None},
            *({"where": f"steps {w['first']}-{w['last']}", "value": 15.0, "low": 6.0, "high": None} for w in windows),
            *({"where": f"arm {a}", "value": 20.0, "low": 0.8, "high": 44.0} for a in arms),
        ],
        "paper": [15, 33],
    }

    def pair(t: str) -> dict[str, float]:
        last = u[t] * float(np.exp(rng.normal() * 0.4)) + rng.normal() * 0.02
        return {"last": last, "last_se": 0.015, "full": 5 * last * float(np.exp(rng.normal() * 0.3)), "full_se": 0.1}

    points = [
        {"arm": a, "seed": s, "task": t, "window": w, **pair(t)}
        for a in arms
        for s in seeds
        for t in tasks
        for w in range(3)
    ]
    disjoint = [{**p, **pair(p["task"]), "fold": f} for p in points for f in (0, 1)]
    last_block = {
        "points": points,
        "disjoint": disjoint,
        "fit": {"slope": 0.85, "intercept": -0.7},
        "not_positive": sum(p["last"] <= 0 or p["full"] <= 0 for p in disjoint),
        "correlations": [
            {"where": where, "kind": kind, "value": 0.9, "low": 0.7, "high": 0.97}
            for where in ("same rollouts", "disjoint rollouts")
            for kind in ("Spearman", "Pearson of logarithms")
        ],
    }
    gain = {
        "arms": arms[:1],
        "across": [
            {
                "task": t,
                "u": u[t],
                "u_low": u[t] * 0.6 - 0.01,
                "u_high": u[t] * 1.4 + 0.01,
                "gain": g,
                "gain_low": g - 0.08,
                "gain_high": g + 0.08,
                "training_gain": g,
                "per_seed": [
                    {"seed": s, "u": u[t] * (0.9 + 0.1 * s), "gain": g + 0.03 * rng.normal(), "training_gain": g}
                    for s in seeds
                ],
            }
            for t in tasks
            for g in [float(0.1 + 0.1 * rng.normal())]
        ],
        "within": [],
        "correlations": [
            {"where": "across tasks (held-out)", "kind": "Spearman", "value": 0.14, "low": -0.7, "high": 0.8},
            {"where": "across tasks (training)", "kind": "Spearman", "value": 0.11, "low": -0.7, "high": 0.8},
            {"where": "within tasks", "kind": "Spearman", "value": 0.05, "low": -0.1, "high": 0.2},
        ],
        "within_correlations": [
            {"arm": a, "seed": s, "task": t, "value": float(np.tanh(rng.normal() * 0.6)), "n": 6}
            for a in arms
            for s in seeds
            for t in tasks
        ],
    }
    explain = {
        "tasks": [
            {
                "task": t,
                "u": u[t],
                "reward": float(rng.uniform(0.1, 0.9)),
                "abs_advantage": float(rng.uniform(0.2, 0.7)),
                "prompt_length": float(rng.uniform(5, 300)),
                "response_length": float(rng.uniform(2, 9)),
            }
            for t in tasks
        ],
        "factors": [
            {
                "name": name,
                "label": label,
                "across": {**around(0.2, 0.7), "p": 0.4, "p_holm": 1.0},
                "within": {**around(0.35, 0.2), "p": 0.001, "p_holm": 0.004},
            }
            for name, label in FACTORS.items()
        ],
    }

    def compared(arm: str, task: str | None, when: str) -> dict[str, Any]:
        value = float(0.03 * rng.normal())
        seeded = [{"seed": s, "value": value + 0.01 * (s - 2)} for s in seeds]
        known = {"p": 0.4, "p_holm": 0.9} if task is None else {"p": None, "p_holm": None}
        half = 0.03 if task is None else 0.09
        return {"arm": arm, "task": task, "when": when, **around(value, half), **known, "per_seed": seeded}

    steps = [0, 20, 40, 60]
    comparison = {
        "baseline": "uniform",
        "final": [
            {"arm": a, "task": t, **around(float(rng.uniform(0.2, 0.9)), 0.06), "per_seed": []}
            for a in arms
            for t in [None, *tasks]
        ],
        "differences": [compared(a, t, when) for a in arms[1:] for when in ("end", "average") for t in [None, *tasks]],
        "curves": [
            {
                "arm": a,
                "task": None,
                "steps": steps,
                "value": [0.3, 0.4 + 0.01 * i, 0.45 + 0.02 * i, 0.5 + 0.02 * i],
                "low": [0.25, 0.33, 0.4, 0.42],
                "high": [0.35, 0.47, 0.5, 0.6],
            }
            for i, a in enumerate(arms)
        ],
        "rollouts": [{"arm": a, "seed": s, "rollouts": 23040} for a in arms for s in seeds],
    }
    sizes = [2, 4, 8, 16, 32, 64, 128, 256]
    estimators = {
        "by_n": [
            {
                "estimator": e,
                "n": n,
                "task": t,
                "bias": 0.0,
                "bias_low": -0.02,
                "bias_high": 0.02,
                "sd": 2.0 / n,
                "relative_bias": (6.0 * k / n if e == "plug_in" else 0.0),
                "relative_sd": {"cross_product": 5.0, "plug_in": 6.0, "two_batch": 9.0}[e] * k / n**0.8,
            }
            for e in ("cross_product", "plug_in", "two_batch")
            for n in sizes
            for t, k in [(None, 1.0), *((t, float(np.exp(i - 2))) for i, t in enumerate(tasks[:6]))]
        ],
        "sketches": [
            {
                "width": w,
                "relative_error": 4.0 / w,
                "low": 3.0 / w,
                "high": 5.0 / w,
                "sd_over_se": 100.0 / w,
                "sd_over_se_low": 60.0 / w,
                "sd_over_se_high": 180.0 / w,
                "seconds": w / 640,
                "exact_seconds": 0.2,
                "norms_seconds": 0.05,
            }
            for w in (64, 128, 256)
        ],
        "reference": "U over all stored prompts",
    }
    data = dict(zip(IDS, (imbalance, last_block, gain, explain, comparison, estimators), strict=True))
    verdicts = dict(
        zip(IDS, ("supported", "supported", "undecided", "undecided", "undecided", "supported"), strict=True)
    )
    return {
        "answers": [
            {
                "id": name,
                "question": QUESTIONS[name],
                "claim": f"The claim of {name}.",
                "verdict": verdicts[name],
                "sentence": f"Made up for {name}: 18 times <&> $x$ |y|.",
                "numbers": [
                    {
                        "name": f"ratio of {name}",
                        "value": 18.0,
                        "low": 9.0,
                        "high": 36.0,
                        "level": 0.95,
                        "how": "t, 3 seeds",
                    },
                    {"name": "unknown", "value": None, "low": None, "high": None, "level": None, "how": "one seed"},
                ],
                "data": data[name],
            }
            for name in IDS
        ],
        "runs": [
            {
                "arm": a,
                "seed": s,
                "steps": 60,
                "rollouts": 23040,
                "tasks": {t: {"u": u[t], "u_se": 0.02, "full_u": 5 * u[t], "full_u_se": 0.1} for t in tasks},
            }
            for a in arms
            for s in seeds
        ],
        "tasks": tasks,
        "arms": arms,
        "seeds": seeds,
        "missing": [],
        "gain_window": 10,
    }
