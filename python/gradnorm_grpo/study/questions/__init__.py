"""The study's questions, one file each: a claim, its statistic and its figure.

To add one, write a file with ``QUESTION``, ``CLAIM``, ``answer`` and ``draw`` (see :class:`Question`) and name it in
the line of ``_FILES``. Its name becomes the answer's id and the figure's file name; the page has a section for it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from ...runlog import plain
from ..measurements import Measurements, Run
from ..stats import known_mean
from . import arms, estimators, explain, gain, imbalance, last_block, proxy
from .common import Answer
from .reading import Answers, Reading


class Question(Protocol):
    """What a file of this folder has."""

    __name__: str
    QUESTION: str
    CLAIM: str

    def answer(self, m: Measurements) -> Answer:
        """The verdict on the claim and what it rests on. It must come whatever is missing from the measurements."""

    def draw(self, a: Reading) -> Figure:
        """The figure of this answer. Any part of its data may be missing; the figure then says so."""


_FILES: tuple[Question, ...] = (imbalance, last_block, gain, explain, arms, estimators)
#: Id -> question, in the order of the page.
QUESTIONS = {file.__name__.rpartition(".")[2]: file for file in _FILES}
_FROZEN: tuple[Question, ...] = (imbalance, last_block, explain, proxy)
#: What a study at fixed weights is asked instead.
FROZEN = {file.__name__.rpartition(".")[2]: file for file in _FROZEN}


def asked(answers: Answers) -> dict[str, Question]:
    """The questions that answers.json has, or would have, an answer to."""
    questions = FROZEN if answers.get("frozen") else QUESTIONS
    return {name: question for name, question in questions.items() if name not in answers.get("not_asked", ())}


def _not_asked(m: Measurements) -> list[str]:
    """What a study that declared its decision was not made to answer: it has one arm, or compared no estimators."""
    if not m.decision or m.frozen:
        return []
    return [name for name, there in (("arms", len(m.arms) > 1), ("estimators", m.estimates)) if not there]


def answer(m: Measurements) -> dict[str, Any]:
    """The content of answers.json, as strict JSON can hold it: what is not known is None."""
    study = {key: getattr(m, key) for key in ("tasks", "arms", "seeds", "missing", "gain_window")}
    declared: dict[str, Any] = {"decision": m.decision} if m.decision else {}
    declared |= {"frozen": True} if m.frozen else {}
    declared |= {"not_asked": names} if (names := _not_asked(m)) else {}
    answers = []
    for name, question in asked(declared).items():
        found = question.answer(m)
        about = {"id": name, "question": question.QUESTION, "claim": found.claim or question.CLAIM}
        parts = {"verdict": found.verdict, "sentence": found.sentence, "numbers": found.numbers, "data": found.data}
        answers.append(about | parts)
    whole: dict[str, Any] = plain({"answers": answers, "runs": [_run(m, run) for run in m.runs], **study, **declared})
    return whole


def _run(m: Measurements, run: Run) -> dict[str, Any]:
    """One run in a few numbers per task: pooled U, reward in the first and last third, accuracy before and after."""
    (u, error), (full, full_error) = (m.by_run([run], m.every_step(), prefix) for prefix in ("", "full_"))
    table = {}
    for k, task in enumerate(m.tasks):
        rewards = m.series(*run, task, "reward")
        early, late = (
            (known_mean(rewards[slice(*third)]) for third in (m.thirds()[0], m.thirds()[-1]))
            if m.steps
            else (math.nan, math.nan)
        )
        _, accuracy, _ = m.evaluation(*run, task)
        table[task] = {
            "u": float(u[0, k]),
            "u_se": float(error[0, k]),
            "full_u": float(full[0, k]),
            "full_u_se": float(full_error[0, k]),
            "reward_first": early,
            "reward_last": late,
            "eval_first": float(accuracy[0]) if len(accuracy) else math.nan,
            "eval_last": float(accuracy[-1]) if len(accuracy) > 1 else math.nan,
        }
    steps = int(np.isfinite(m.array(*run, "prompts")).any(0).sum())
    return {"arm": run[0], "seed": run[1], "steps": steps, "rollouts": arms.rollouts(m, run), "tasks": table}
