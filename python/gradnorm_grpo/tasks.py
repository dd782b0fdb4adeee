"""Tasks: where questions come from, which are held out, and how an answer is scored.

A task in YAML, of one of four sources; docs/tasks.md has an example of each::

    - name: number_sorting            # its name in tables and metrics
      source: reasoning_gym           # reasoning_gym (default), jsonl, datasets or synthetic
      verifier: exact                 # exact, numeric, financial, math_verify, expression, json_value; default: the
                                      # data set's own score or the format's
      rewrite: [["(?s)\\nPlease.*", ""]]   # regular expressions replaced in question and reference answer, in order
      dataset: number_sorting         # reasoning_gym, synthetic: default the name; datasets: a name on the Hub
      config: {max_numbers: 3}        # reasoning_gym, synthetic: settings of the data set
      template: "{question}"          # reasoning_gym, datasets: the prompt, from names in braces: the question and the
                                      # fields of its metadata, the texts of the format, or columns
      path: sums.jsonl                # jsonl: lines of {"prompt": ..., "answer": ...}; datasets: a local copy
      subset: algebra                 # datasets: the configuration on the Hub
      split: train                    # datasets: default train
      format: math                    # datasets: math, deepscaler, finqa, countdown or r1_code ...
      columns: {prompt: q, answer: a} # datasets: ... or the columns by name
      levels: [1, 2]                  # datasets, format math: keep these levels
      max_rows: 1000                  # datasets: the first rows that fit; default 0, all
      skip_bad_rows: true             # datasets: leave out rows that do not fit; by default the first one is an error
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, one_of
from .hub_formats import FORMATS, BadRow, fill
from .hub_refusals import refuse_running
from .hub_rows import read_dataset
from .jsonl import HeldOutRows, Question, read_questions
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
    template: str = ""
    path: str = ""
    subset: str = ""
    split: str = "train"
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    levels: list[int] = field(default_factory=list)
    max_rows: int = 0
    skip_bad_rows: bool = False
    verifier: str = ""


_EVERY = {"name", "source", "rewrite", "verifier"}
_KEYS = {
    "reasoning_gym": _EVERY | {"dataset", "config", "template"},
    "jsonl": _EVERY | {"path"},
    "synthetic": _EVERY | {"dataset", "config"},
    "datasets": {item.name for item in dataclasses.fields(TaskSpec)} - {"config"},
}


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
    refuse_running(str(raw["name"]), raw, known, {*VERIFIERS, *FORMATS})
    for key in raw:
        if key not in known:
            raise one_of(f"a key of task {raw['name']!r}", key, known)
    spec = TaskSpec(**raw)
    if spec.verifier and spec.verifier not in VERIFIERS:
        raise one_of(f"verifier of task {spec.name!r}", spec.verifier, VERIFIERS)
    if spec.source not in _KEYS:
        raise one_of(f"source of task {spec.name!r}", spec.source, _KEYS)
    for key in raw:
        if key not in _KEYS[spec.source]:
            raise one_of(f"a key of task {spec.name!r}, whose source is {spec.source},", key, _KEYS[spec.source])
    if spec.source == "reasoning_gym":
        task = _from_reasoning_gym(spec, seed, eval_prompts)
    elif spec.source == "synthetic":
        task = _from_synthetic(spec, seed, eval_prompts)
    elif spec.source == "jsonl":
        if not spec.verifier:
            raise UserError(
                f"task {spec.name!r} reads JSON lines and needs a verifier: one of {', '.join(sorted(VERIFIERS))}"
            )
        task = _from_rows(spec, read_questions(Path(spec.path), spec.name), spec.verifier, seed, eval_prompts)
    else:
        task = _from_rows(spec, *read_dataset(spec), seed, eval_prompts)
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
    if name == "composite":
        raise UserError(
            f"dataset of task {spec.name!r}, composite, mixes others: list each of them as a task of its own"
        )
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
        question = _templated(spec, entry) if spec.template else entry["question"]
        return Example(rewrite(question), rewrite(str(entry["answer"] or "")), entry)

    verifier = VERIFIERS[spec.verifier] if spec.verifier else reasoning_gym_verifier(name, dataset(seed))
    return Task(spec.name, make, verifier, seed, eval_prompts)


def _generate(dataset: Any, index: int, task: str) -> Any:
    """Entry ``index``. Some generators give up on some seeds; then a far-off index stands in, always the same."""
    for attempt in range(3):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # bf and codeio print while they make a question
                return dataset[index + attempt * (1 << 24)]
        except (ValueError, IndexError, ZeroDivisionError) as error:
            reason = error
    raise UserError(
        f"config of task {task!r} makes no question number {index}: {reason}; give it a wider one"
    ) from reason


def _templated(spec: TaskSpec, entry: Any) -> str:
    texts = {"question": entry["question"]} | {key: str(value).strip() for key, value in entry["metadata"].items()}
    try:
        return fill(spec.template, texts)
    except BadRow as error:
        raise UserError(f"template of task {spec.name!r}: its data set {error}") from error


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


def _from_rows(spec: TaskSpec, questions: list[Question], verifier: str, seed: int, eval_prompts: int) -> Task:
    rewrite = _rewriter(spec)
    prompts = [rewrite(prompt) for prompt, _, _ in questions]
    rows = HeldOutRows(prompts, eval_prompts, seed)

    def make(stream: int, index: int) -> Example:
        row = rows.row(stream, index, held_out=stream == seed + HELD_OUT_SEED)
        _, answer, data = questions[row]
        return Example(prompts[row], rewrite(answer if isinstance(answer, str) else answer()), data)

    return Task(spec.name, make, VERIFIERS[verifier], seed, len(rows.held_out))
