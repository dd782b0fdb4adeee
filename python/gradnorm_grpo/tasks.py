"""Tasks: where questions come from, which are held out, and how an answer is scored.

A task in YAML::

    - name: number_sorting            # its name in tables and metrics
      source: reasoning_gym           # reasoning_gym (default), jsonl or synthetic
      dataset: number_sorting         # reasoning_gym: the data set; synthetic: the generator; default: the name
      config: {max_numbers: 3}        # settings of the data set
      rewrite: [["(?s)\\nPlease.*", ""]]   # regular expressions replaced in question and reference answer, in order
      path: sums.jsonl                # jsonl: lines of {"prompt": ..., "answer": ...}
      verifier: exact                 # exact, numeric, math_verify, expression; default: reasoning_gym's own score
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, one_of
from .jsonl import read_questions
from .synthetic import GENERATORS, synthetic_example
from .verifiers import VERIFIERS, Verifier, exact, reasoning_gym_verifier

HELD_OUT_SEED = 1_000_003  # added to the seed: data sets number their examples seed + index
FEW_SHOT_SEED = 2_000_003


@dataclass(frozen=True)
class Example:
    """One question; ``data`` is what the verifier may look at."""

    question: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class TaskSpec:
    """One entry of `tasks:` in YAML, as described above."""

    name: str
    source: str = "reasoning_gym"
    dataset: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rewrite: list[list[str]] = field(default_factory=list)
    path: str = ""
    verifier: str = ""


class Task:
    """A stream of training examples, a list of held-out ones, and their score.

    ``example(seed, index)`` gives example ``index`` of the stream with that seed, or None past the end. Training
    passes over what is held out, so the two never share a question.
    """

    def __init__(
        self, name: str, make: Callable[[int, int], Example], verifier: Verifier, seed: int, held_out: int
    ) -> None:
        self.name = name
        self._make, self._verifier, self._seed = make, verifier, seed
        self.held_out = self._distinct(seed + HELD_OUT_SEED, held_out)
        self._held_out_questions = {example.question for example in self.held_out}
        self.position = 0  # examples of the training stream used so far

    def _distinct(self, seed: int, count: int) -> list[Example]:
        """Up to ``count`` different questions; a small data set may have fewer, and half of it stays for training."""
        found: dict[str, Example] = {}
        for index in range(4 * count):
            example = self._make(seed, index)
            found.setdefault(example.question, example)
            if len(found) == count:
                break
        return list(found.values())

    def next_example(self) -> Example:
        """The next training example; moves ``position``."""
        for _ in range(1000):
            example = self._make(self._seed, self.position)
            self.position += 1
            if example.question not in self._held_out_questions:
                return example
        raise UserError(
            f"task {self.name!r} has no question left to train on: the {len(self.held_out)} held-out ones are all it "
            f"makes; "
            "lower eval_prompts or widen the task's config"
        )

    def solved_examples(self, count: int, seed: int = FEW_SHOT_SEED) -> list[Example]:
        """Examples with answers for few-shot prompts or a warm start, none of them held out."""
        kept: list[Example] = []
        for index in range(20 * count + 100):
            example = self._make(self._seed + seed, index)
            if example.answer and example.question not in self._held_out_questions:
                kept.append(example)
            if len(kept) == count:
                break
        if len(kept) < count:
            raise UserError(
                f"task {self.name!r} has {len(kept)} solved examples that are not held out, {count} are needed"
            )
        return kept

    def score(self, text: str, example: Example) -> float:
        """The reward of a completion's text: 1.0 or 0.0."""
        return float(self._verifier(text.strip(), example.answer, example.data))


def build_tasks(specs: list[dict[str, Any]], seed: int, eval_prompts: int) -> list[Task]:
    """The tasks of a mixture, in order; every one is tried on its own reference answers."""
    return [_build(spec, seed, eval_prompts) for spec in specs]


def _build(raw: dict[str, Any], seed: int, eval_prompts: int) -> Task:
    known = {item.name for item in dataclasses.fields(TaskSpec)}
    for key in raw:
        if key not in known:
            raise one_of(f"a key of task {raw['name']!r}", key, known)
    spec = TaskSpec(**raw)
    if spec.verifier and spec.verifier not in VERIFIERS:
        raise one_of(f"verifier of task {spec.name!r}", spec.verifier, VERIFIERS)
    if spec.source == "reasoning_gym":
        task = _from_reasoning_gym(spec, seed, eval_prompts)
    elif spec.source == "jsonl":
        task = _from_jsonl(spec, seed, eval_prompts)
    elif spec.source == "synthetic":
        task = _from_synthetic(spec, seed, eval_prompts)
    else:
        raise one_of(f"source of task {spec.name!r}", spec.source, ("reasoning_gym", "jsonl", "synthetic"))
    for example in task.solved_examples(3):
        if not task.score(example.answer, example):
            raise UserError(
                f"task {spec.name!r}: its reference answer {example.answer!r} to {example.question!r} scores 0; check "
                f"its rewrite "
                "and verifier"
            )
    return task


def _rewriter(spec: TaskSpec) -> Callable[[str], str]:
    try:
        rules = [(re.compile(pattern), replacement) for pattern, replacement in spec.rewrite]
    except (re.error, ValueError, TypeError) as error:
        raise UserError(
            f"rewrite of task {spec.name!r} must be a list of [regular expression, replacement] pairs: {error}"
        ) from error

    def rewrite(text: str) -> str:
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
        return text.strip()

    return rewrite


def _from_reasoning_gym(spec: TaskSpec, seed: int, eval_prompts: int) -> Task:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = spec.dataset or spec.name
    if name not in DATASETS:
        raise one_of(f"dataset of task {spec.name!r}", name, DATASETS)
    rewrite, made = _rewriter(spec), {}

    def dataset(stream: int) -> Any:
        if stream not in made:
            try:
                made[stream] = reasoning_gym.create_dataset(name, seed=stream, size=2**31 - 1, **spec.config)
            except (TypeError, AssertionError, ValueError) as error:
                raise UserError(f"config of task {spec.name!r} does not fit {name!r}: {error}") from error
        return made[stream]

    def make(stream: int, index: int) -> Example:
        entry = _generate(dataset(stream), index, spec.name)
        return Example(rewrite(entry["question"]), rewrite(str(entry["answer"] or "")), entry)

    verifier = VERIFIERS[spec.verifier] if spec.verifier else reasoning_gym_verifier(name, dataset(seed))
    return Task(spec.name, make, verifier, seed, eval_prompts)


def _generate(dataset: Any, index: int, task: str) -> Any:
    """Entry ``index``. Some generators give up on some seeds; then a far-off index stands in, always the same."""
    for attempt in range(3):
        try:
            return dataset[index + attempt * (1 << 24)]
        except (ValueError, IndexError, ZeroDivisionError) as error:
            reason = error
    raise UserError(
        f"config of task {task!r} makes no question number {index}: {reason}; give it a wider one"
    ) from reason


def _from_synthetic(spec: TaskSpec, seed: int, eval_prompts: int) -> Task:
    name = spec.dataset or spec.name
    if name not in GENERATORS:
        raise one_of(f"dataset of task {spec.name!r}", name, GENERATORS)
    rewrite = _rewriter(spec)

    def make(stream: int, index: int) -> Example:
        try:
            question, answer = synthetic_example(name, stream, index, spec.config)
        except TypeError as error:
            raise UserError(f"config of task {spec.name!r} does not fit {name!r}: {error}") from error
        return Example(rewrite(question), rewrite(answer))

    return Task(spec.name, make, VERIFIERS[spec.verifier] if spec.verifier else exact, seed, eval_prompts)


def _from_jsonl(spec: TaskSpec, seed: int, eval_prompts: int) -> Task:
    if not spec.verifier:
        raise UserError(
            f"task {spec.name!r} reads JSON lines and needs a verifier: one of {', '.join(sorted(VERIFIERS))}"
        )
    rewrite = _rewriter(spec)
    rows = [
        Example(rewrite(question), rewrite(answer), data)
        for question, answer, data in read_questions(Path(spec.path), spec.name)
    ]
    random.Random(seed).shuffle(rows)
    questions = list(dict.fromkeys(row.question for row in rows))
    held_out = set(questions[: min(eval_prompts, len(questions) // 2)])
    parts = [row for row in rows if row.question in held_out], [row for row in rows if row.question not in held_out]

    def make(stream: int, index: int) -> Example:
        """Round after round of the same rows, each in an order of its own."""
        part = parts[0 if stream == seed + HELD_OUT_SEED and parts[0] else 1]
        turn, place = divmod(index, len(part))
        order = list(range(len(part)))
        random.Random(f"{stream} {turn}").shuffle(order)
        return part[order[place]]

    return Task(spec.name, make, VERIFIERS[spec.verifier], seed, len(held_out))
