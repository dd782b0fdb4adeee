"""What an entry of `tasks:` may say, and what it is refused for.

A task in YAML, of one of five sources; docs/tasks.md has an example of each::

    - name: number_sorting            # its name in tables and metrics
      source: reasoning_gym           # reasoning_gym (default), jsonl, datasets, synthetic or verifiers
      verifier: exact                 # exact, numeric, financial, math_verify, expression, json_value; default: the
                                      # data set's own score, the format's, or the taskset's rewards
      rewrite: [["(?s)\\nPlease.*", ""]]   # regular expressions replaced in question and reference answer, in order
      dataset: number_sorting         # default: the task's name; datasets: a name on the Hub
      config: {max_numbers: 3}        # reasoning_gym, synthetic, verifiers: settings of the data set
      template: "{question}"          # reasoning_gym, datasets: the prompt, from names in braces: the question and the
                                      # fields of its metadata, the texts of the format, or columns
      path: sums.jsonl                # jsonl: lines of {"prompt": ..., "answer": ...}; datasets: a local copy
      subset: algebra                 # datasets: the configuration on the Hub
      split: train                    # datasets: default train
      format: math                    # datasets: math, deepscaler, finqa, countdown or r1_code ...
      columns: {prompt: q, answer: a} # datasets: ... or the columns by name; verifiers: the field of the answer
      levels: [1, 2]                  # datasets, format math: keep these levels
      max_rows: 1000                  # datasets, verifiers: the first rows that fit; default 0, all
      skip_bad_rows: true             # datasets: leave out rows that do not fit; by default the first one is an error
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError, all_of, one_of


@dataclass(frozen=True)
class Example:
    """One question; ``data`` is what the verifier may look at."""

    question: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict, repr=False)


# A prompt, its answer (or a function that finds it when it is first wanted), and what the verifier may look at.
Question = tuple[str, str | Callable[[], str], dict[str, Any]]


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

    def rewriter(self) -> Callable[[str], str]:
        """The function that applies ``rewrite`` to a question or a reference answer."""
        rules = []
        for pair in self.rewrite:
            try:
                if not isinstance(pair, list) or not all(isinstance(text, str) for text in pair):
                    raise ValueError(f"got {pair!r}")
                pattern, replacement = pair
                rules.append((re.compile(pattern), replacement))
                rules[-1][0].sub(replacement, "")  # a group that the expression has not
            except (re.error, ValueError, IndexError) as error:
                raise UserError(
                    f"rewrite of task {self.name!r} must be a list of [regular expression, replacement] pairs: {error}"
                ) from error

        def rewrite(text: str) -> str:
            for pattern, replacement in rules:
                text = pattern.sub(replacement, text)
            return text.strip()

        return rewrite


_TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "text"),
    "bool": (bool, "true or false"),
    "dict": (dict, "a mapping"),
    "list": (list, "a list of [regular expression, replacement] pairs"),
}
_CHECKED_LATER = {"columns", "levels"}  # by the sources that read them
_EVERY = {"name", "source", "rewrite", "verifier"}


def read_spec(
    raw: Mapping[str, Any], keys_of: Mapping[str, Iterable[str]], verifiers: Iterable[str], formats: Iterable[str]
) -> TaskSpec:
    """The entry as a TaskSpec.

    Args:
        raw: the mapping in YAML.
        keys_of: the keys that each source reads, beside name, source, rewrite and verifier.
        verifiers: the names of the verifiers.
        formats: the names of the formats.

    Raises:
        UserError: for a key, source or verifier that does not exist, a key that the source does not read, and an entry
            that asks for a completion to be executed.
    """
    name, known = str(raw["name"]), {item.name for item in fields(TaskSpec)}
    _refuse_execution(name, raw, known, {*verifiers, *formats})
    all_of(f"a key of task {name!r}", raw, known)
    spec = TaskSpec(**{key: value for key, value in raw.items() if value is not None})
    for item in fields(TaskSpec):
        kind, words = _TYPES.get(str(item.type).partition("[")[0], (object, ""))
        if item.name not in _CHECKED_LATER and not isinstance(value := getattr(spec, item.name), kind):
            raise UserError(f"{item.name} of task {name!r} must be {words}, got {value!r}")
    if spec.verifier and spec.verifier not in set(verifiers):
        raise one_of(f"verifier of task {name!r}", spec.verifier, verifiers)
    all_of(f"source of task {name!r}", [spec.source], keys_of)
    read = {*_EVERY, *keys_of[spec.source]}
    all_of(f"a key of task {name!r}, whose source is {spec.source},", raw, read)
    return spec


# Whole words, so that "format: r1_code" and "dataset: codeio" are accepted; these two are names of ours.
_EXECUTION = {
    *("exec", "execute", "executes", "executed", "execution", "executor", "eval", "evaluate", "run", "runs", "runner"),
    *("sandbox", "sandboxed", "firejail", "docker", "container", "subprocess", "interpreter", "interpret", "jupyter"),
    *("unittest", "unittests", "unit", "pytest", "test", "tests", "testcase", "testcases", "functional", "stdio"),
    *("python", "javascript", "bash", "shell", "code", "coding", "program", "compile", "compiler", "judge"),
}
_NOT_EXECUTION = {"use_eval"}  # arc_agi's choice of its evaluation questions
INSTEAD = (
    "no reward here runs text a model wrote. Use a task whose answer is compared instead: codeio or bf of "
    "reasoning_gym, or source datasets with format r1_code, whose rows carry a program, an input and its output, so "
    "that the model predicts the output"
)


def asks_for_execution(text: str) -> bool:
    """Whether one of the words of ``text`` (split at case changes, digits and signs) means executing a program."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())
    return any(word in _EXECUTION for word in words)


def _refuse_execution(task: str, raw: Mapping[str, Any], known_keys: set[str], names: set[str]) -> None:
    """Raise UserError if an entry asks for a completion to be executed.

    Checked: its verifier and format unless they are among ``names`` (ours), keys that are not among ``known_keys``, and
    the keys of its config, at any depth.
    """
    for key in ("verifier", "format"):
        value = raw.get(key)
        if isinstance(value, str) and value not in names and asks_for_execution(value):
            raise UserError(f"{key} {value!r} of task {task!r} is refused: {INSTEAD}")
        if isinstance(value, Mapping):
            raise UserError(f"{key} of task {task!r} must be a name, got a mapping; {INSTEAD}")
    for key in raw:
        if key not in known_keys and (
            asks_for_execution(str(key)) or _executing_key(raw[key]) or key == "reward_model"
        ):
            raise UserError(f"{key!r} of task {task!r} is refused: {INSTEAD}")
    if (found := _executing_key(raw.get("config"))) is not None:
        raise UserError(f"{found!r} in the config of task {task!r} is refused: {INSTEAD}")


def _executing_key(value: Any) -> str | None:
    """The first key, at any depth of mappings, that asks for something to be executed."""
    if not isinstance(value, Mapping):
        return None
    for key, inner in value.items():
        if asks_for_execution(str(key)) and key not in _NOT_EXECUTION:
            return str(key)
        if (found := _executing_key(inner)) is not None:
            return found
    return None
