"""A task: its stream of training examples, its held-out examples and its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from .formats import FORMATS
from .sources import HELD_OUT_SEED, SOURCES, Stream
from .spec import Example, read_spec
from .verifiers import VERIFIERS

FEW_SHOT_SEED = 2_000_003  # added to the seed: data sets number their examples seed + index


class Task:
    """A stream of training examples, a list of held-out ones, and their score.

    Training passes over what is held out, so the two never share a question.
    """

    def __init__(self, name: str, stream: Stream, seed: int) -> None:
        self.name = name
        self._stream, self._seed = stream, seed
        self.held_out = self._distinct(seed + HELD_OUT_SEED, stream.held_out)
        self._held_out_questions = {example.question for example in self.held_out}
        self.position = 0  # examples of the training stream used so far
        self.left_out = 0  # drawn and passed over because they do not fit, see leave_out
        self._fits: Callable[[Example], bool] = lambda example: True

    @property
    def solved(self) -> bool:
        """Whether its reference answers are known, as few-shot prompts and a warm start need them."""
        return self._stream.solved

    @property
    def questions(self) -> Sequence[str] | None:
        """All questions of a task made of rows; None where they are generated."""
        return self._stream.questions

    @property
    def unfit(self) -> Sequence[str]:
        """Reference answers of a task made of rows that its own verifier scores 0."""
        return self._stream.unfit

    def preview(self, count: int) -> list[str]:
        """The held-out questions and the first ``count`` of the training stream, which stays where it is."""
        stream = (self._stream.make(self._seed, index).question for index in range(count))
        return [*(example.question for example in self.held_out), *stream]

    def leave_out(self, fits: Callable[[Example], bool]) -> None:
        """From now on, pass over examples that do not fit, in training, evaluation and the warm start."""
        self._fits = fits
        self.held_out = [example for example in self.held_out if fits(example)]

    def _distinct(self, seed: int, count: int) -> list[Example]:
        """Up to ``count`` different questions; a small data set may have fewer, and half of it stays for training."""
        found: dict[str, Example] = {}
        for index in range(4 * count):
            example = self._stream.make(seed, index)
            found.setdefault(example.question, example)
            if len(found) == count:
                break
        return list(found.values())

    def next_example(self) -> Example:
        """The next training example; moves ``position``."""
        for _ in range(max(1000, len(self.questions or ()))):
            example = self._stream.make(self._seed, self.position)
            self.position += 1
            if example.question in self._held_out_questions:
                continue
            if self._fits(example):
                return example
            self.left_out += 1
        raise UserError(
            f"task {self.name!r} has no question left to train on: the {len(self._held_out_questions)} held-out ones "
            "are all it makes, or the others are too long; lower eval_prompts, widen the task's config, or raise "
            "max_prompt_length"
        )

    def solved_examples(self, count: int, seed: int = FEW_SHOT_SEED) -> list[Example]:
        """Examples with answers for few-shot prompts or a warm start, none of them held out."""
        if not self.solved:
            raise UserError(
                f"task {self.name!r} has no reference answers, which few_shot and warm_start_steps need: name their "
                "field as columns: {answer: FIELD}, or set both to 0"
            )
        kept: list[Example] = []
        for index in range(20 * count + 100):
            example = self._stream.make(self._seed + seed, index)
            if example.answer and example.question not in self._held_out_questions and self._fits(example):
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
        return float(self._stream.verifier(text.strip(), example.answer, example.data))


def build_tasks(entries: Sequence[Mapping[str, Any]], seed: int, eval_prompts: int) -> list[Task]:
    """The tasks of a mixture, in order; each is tried on three of its own reference answers."""
    keys_of = {name: source.keys for name, source in SOURCES.items()}
    tasks = []
    for entry in entries:
        spec = read_spec(entry, keys_of, VERIFIERS, FORMATS)
        task = Task(spec.name, SOURCES[spec.source].open(spec, seed, eval_prompts), seed)
        for example in task.solved_examples(3) if task.solved else ():
            if not task.score(example.answer, example):
                raise UserError(
                    f"task {spec.name!r}: its reference answer {example.answer!r} to {example.question!r} scores 0; "
                    "check its rewrite and verifier"
                )
        tasks.append(task)
    return tasks
