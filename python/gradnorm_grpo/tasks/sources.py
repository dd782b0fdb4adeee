"""The sources of questions: reasoning-gym, JSON lines, the `datasets` library, synthetic ones, and `verifiers`.

A source is an entry of SOURCES: the keys of a task that it reads, and a function that opens a Stream.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, all_of
from .environments import read_environment
from .formats import FORMATS, Format, Parts, fill
from .rows import BadRow, Row, json_lines, own_text, read_csv, read_json, read_text
from .spec import Example, Question, TaskSpec
from .synthetic import GENERATORS
from .verifiers import VERIFIERS, Verifier, exact, reasoning_gym_verifier

ANSWERS_CHECKED = 10_000  # rows whose reference answers are tried on the verifier
HELD_OUT_SEED = 1_000_003  # added to the seed for the held-out stream: data sets number their examples seed + index


@dataclass(frozen=True)
class Stream:
    """``make(seed, index)``: example ``index`` of the stream with that seed; ``held_out``: how many to hold out."""

    make: Callable[[int, int], Example]
    verifier: Verifier
    held_out: int
    questions: Sequence[str] | None = None  # all of them, where they are rows; None where they are generated
    solved: bool = True  # whether reference answers are known
    unfit: Sequence[str] = ()  # reference answers of rows that the verifier scores 0


class HeldOutRows:
    """A list of rows in two parts that share no question: some to hold out, the others to train on.

    Up to ``count`` questions are held out, and never more than half of the different ones. All rows with the same
    question are on the same side.
    """

    def __init__(self, questions: list[str], count: int, seed: int) -> None:
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        different = list(dict.fromkeys(questions[i] for i in order))
        self.held_out = set(different[: min(count, len(different) // 2)])
        self._parts = (
            [i for i in order if questions[i] in self.held_out],
            [i for i in order if questions[i] not in self.held_out],
        )
        self._turn = functools.lru_cache(maxsize=4)(self._order_of_turn)

    def row(self, stream: int, index: int, held_out: bool) -> int:
        """Row number ``index`` of a stream: the same rows round after round, each round in its own order."""
        held_out = held_out and bool(self._parts[0])
        turn, place = divmod(index, len(self._parts[not held_out]))
        return self._turn(stream, turn, held_out)[place]

    def _order_of_turn(self, stream: int, turn: int, held_out: bool) -> list[int]:
        order = list(self._parts[not held_out])
        random.Random(f"{stream} {turn}").shuffle(order)
        return order


def _rows_stream(spec: TaskSpec, questions: list[Question], verifier: Verifier, seed: int, eval_prompts: int) -> Stream:
    """A stream over a list of questions, some of them held out."""
    rewrite = spec.rewriter()
    prompts = [rewrite(prompt) for prompt, _, _ in questions]
    if len(different := set(prompts)) < 2:
        raise UserError(
            f"task {spec.name!r} has {len(prompts)} rows with the one question {next(iter(different))!r:.80}: at least "
            "2 different ones are needed, one to hold out"
        )
    rows = HeldOutRows(prompts, eval_prompts, seed)

    def make(stream: int, index: int) -> Example:
        row = rows.row(stream, index, held_out=stream == seed + HELD_OUT_SEED)
        _, answer, data = questions[row]
        return Example(prompts[row], rewrite(answer if isinstance(answer, str) else answer()), data)

    solved = any(answer for _, answer, _ in questions)
    return Stream(make, verifier, len(rows.held_out), prompts, solved, _unfit(questions, rewrite, verifier))


def _unfit(questions: Sequence[Question], rewrite: Callable[[str], str], verifier: Verifier) -> list[str]:
    """The written reference answers among the first ANSWERS_CHECKED that a verifier of ours scores 0."""
    if verifier not in VERIFIERS.values():  # a taskset's own rewards may take long
        return []
    written = [(rewrite(answer), data) for _, answer, data in questions[:ANSWERS_CHECKED] if isinstance(answer, str)]
    return [answer for answer, data in written if not verifier(answer, answer, data)]


# reasoning_gym


def open_reasoning_gym(spec: TaskSpec, seed: int, eval_prompts: int) -> Stream:
    """Questions that reasoning-gym generates, scored by the data set's own score unless a verifier is named."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = spec.dataset or spec.name
    all_of(f"dataset of task {spec.name!r}", [name], DATASETS)
    if name == "composite":
        raise UserError(
            f"dataset of task {spec.name!r}, composite, mixes others: list each of them as a task of its own"
        )
    rewrite, made = spec.rewriter(), {}

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
    return Stream(make, verifier, eval_prompts)


def _generate(dataset: Any, index: int, task: str) -> Any:
    """Entry ``index``. Some generators give up on some seeds; then a distant index is used, always the same."""
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


# jsonl


def open_jsonl(spec: TaskSpec, seed: int, eval_prompts: int) -> Stream:
    """Questions from the lines of a file, scored by the named verifier."""
    if not spec.verifier:
        raise UserError(
            f"task {spec.name!r} reads JSON lines and needs a verifier: one of {', '.join(sorted(VERIFIERS))}"
        )
    if not spec.path:
        raise UserError(f"task {spec.name!r} needs a path: the file of JSON lines to read")
    return _rows_stream(spec, _read_jsonl(Path(spec.path), spec.name), VERIFIERS[spec.verifier], seed, eval_prompts)


def _read_jsonl(path: Path, task: str) -> list[Question]:
    """(prompt, answer, the whole line) of every line ``{"prompt": ..., "answer": ...}``; the answer is any JSON value.

    Raises UserError for a file that cannot be read, holds fewer than two questions, or has a bad line, named by its
    number.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"path of task {task!r}, {path}, cannot be read: {error}") from error
    rows: list[Question] = []
    for number, row in json_lines(text):
        if isinstance(row, Exception) or row.get("answer") is None or "prompt" not in row:
            line = text.split("\n")[number - 1].strip()
            reason = f" ({row})" if isinstance(row, Exception) else ""
            raise UserError(
                f'{path}, line {number}: every line must be {{"prompt": text, "answer": text, number or JSON}}, '
                f"got {line[:80]!r}{reason}"
            )
        try:
            answer, prompt = own_text(row, "answer"), own_text(row, "prompt")
        except BadRow as error:
            raise UserError(f"{path}, line {number} {error}") from error
        if not isinstance(row["prompt"], str) or not prompt.strip() or not answer.strip():
            raise UserError(
                f"{path}, line {number}: prompt must be text and answer must not be blank, nor prompt, got prompt "
                f"{prompt[:80]!r} and answer {answer[:80]!r}"
            )
        rows.append((prompt, answer, dict(row)))
    if len(rows) < 2:
        raise UserError(
            f"path of task {task!r}, {path}, holds {len(rows)} questions: at least 2 are needed, one to hold out"
        )
    return rows


# datasets


COLUMNS = ("prompt", "answer")
READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv}
SUFFIXES = (*READERS, ".parquet")
HUB_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


def open_datasets(spec: TaskSpec, seed: int, eval_prompts: int) -> Stream:
    """Questions from the rows of a data set, by a known format or by columns named in YAML.

    Raises UserError for settings that do not fit together, a data set that cannot be loaded, a row that does not fit
    its format (named by its number, from 1; with ``skip_bad_rows`` it is left out) and fewer than two questions.
    """
    form = _format(spec)
    name = spec.path or spec.dataset
    questions, bad = _questions(spec, form, load_rows(spec), name)
    if len(questions) < 2:
        left_out = f"; {len(bad)} rows were left out, the first because {bad[0]}" if bad else ""
        kept = f" with levels {spec.levels}" if spec.levels else ""
        raise UserError(
            f"{name} holds {len(questions)} questions for task {spec.name!r}{kept}: at least 2 are needed, one to hold "
            f"out{left_out}"
        )
    return _rows_stream(spec, questions, VERIFIERS[spec.verifier or form.verifier], seed, eval_prompts)


def _format(spec: TaskSpec) -> Format:
    """The format that a task asks for, with its own template if it gives one."""
    if bool(spec.format) == bool(spec.columns):
        raise UserError(
            f"task {spec.name!r} needs either format (one of {', '.join(sorted(FORMATS))}) or columns (such as "
            f"{{prompt: question, answer: answer}}), got format={spec.format!r} and columns={spec.columns!r}"
        )
    if spec.format:
        all_of(f"format of task {spec.name!r}", [spec.format], FORMATS)
        known = FORMATS[spec.format]
        form = Format(known.read, spec.template or known.template, known.verifier, known.levels)
    else:
        form = _by_columns(spec)
    if spec.levels and not form.levels:
        raise UserError(f"levels of task {spec.name!r} need format math: other rows have no level")
    if not isinstance(spec.levels, list) or not all(type(level) is int for level in spec.levels):
        raise UserError(
            f"levels of task {spec.name!r} must be a list of whole numbers, such as [1, 2], got {spec.levels}"
        )
    _check_max_rows(spec)
    return form


def _check_max_rows(spec: TaskSpec) -> None:
    if type(spec.max_rows) is not int or spec.max_rows < 0:
        raise UserError(f"max_rows of task {spec.name!r} must be a whole number, 0 for all rows, got {spec.max_rows!r}")


def _by_columns(spec: TaskSpec) -> Format:
    columns = spec.columns
    if not isinstance(columns, Mapping) or not all(isinstance(value, str) for value in columns.values()):
        raise UserError(f"columns of task {spec.name!r} must map prompt and answer to column names, got {columns!r}")
    all_of(f"a key of columns of task {spec.name!r}", columns, COLUMNS)
    if "answer" not in columns:
        raise UserError(f"columns of task {spec.name!r} must name the column of the answer, got {dict(columns)}")
    if ("prompt" in columns) == bool(spec.template):
        raise UserError(
            f"task {spec.name!r} needs either columns.prompt or a template with {{column}} names, got columns="
            f"{dict(columns)} and template={spec.template!r}"
        )
    if not spec.verifier:
        raise UserError(f"task {spec.name!r} names its columns and needs a verifier: exact, numeric, math_verify, ...")
    needed = [columns[key] for key in COLUMNS if key in columns]

    def read(row: Mapping[str, Any]) -> Parts:
        for column in needed:
            if row.get(column) is None or not str(row[column]).strip():
                raise BadRow(f"needs {column}, got the columns {', '.join(map(str, row)) or 'none'}")
        answer = columns["answer"]
        if spec.verifier == "exact" and isinstance(row[answer], float) and not isinstance(row, Row):
            raise BadRow(
                f"holds a floating-point number in {answer}, whose own text is lost: use the verifier numeric, or give "
                "path= of a JSON or CSV file"
            )
        return Parts(_texts(row, needed), own_text(row, answer).strip(), dict(row))

    return Format(read, spec.template or f"{{{columns['prompt']}}}", spec.verifier)


def _texts(row: Mapping[str, Any], needed: Iterable[str] = ()) -> dict[str, str]:
    """The text of every column that has one; of those ``needed`` every one, or BadRow says why not."""
    texts = {}
    for column in row:
        try:
            texts[str(column)] = own_text(row, column)
        except BadRow:
            if column in needed:
                raise
    return texts


def _questions(
    spec: TaskSpec, form: Format, rows: Iterable[Mapping[str, Any]], name: str
) -> tuple[list[Question], list[str]]:
    """The questions of the first ``max_rows`` rows that fit, and what was wrong with those that were left out."""
    questions: list[Question] = []
    bad: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            parts = form.read(row)
            if spec.levels and parts.level not in spec.levels:
                continue
            # What a format takes from a row, and any column beside it.
            names = _texts(row) | parts.texts if spec.template else parts.texts
            questions.append((fill(form.template, names), parts.answer, parts.data))
        except BadRow as error:
            problem = f"row {number} {error}"
            if not spec.skip_bad_rows:
                raise UserError(f"{name}, task {spec.name!r}: {problem}") from error
            bad.append(problem)
        if spec.max_rows and len(questions) == spec.max_rows:
            break
    return questions, bad


def load_rows(spec: TaskSpec) -> Iterable[Mapping[str, Any]]:
    """The rows of one split, mappings from column to value.

    ``path`` names a local file (json, jsonl, csv or parquet) or a folder of them; otherwise ``dataset`` is a name on
    the Hub. Raises UserError when nothing can be loaded; an unreachable Hub is noticed within seconds, and then only a
    copy that an earlier run left in the cache of `datasets` is used.
    """
    import datasets

    datasets.disable_progress_bars()
    if bool(spec.dataset) == bool(spec.path):
        raise UserError(
            f"task {spec.name!r} needs either dataset (a name on the Hub, such as Jiayi-Pan/Countdown-Tasks-3to4) or "
            f"path (a local copy), got dataset={spec.dataset!r} and path={spec.path!r}"
        )
    reason = ""
    try:
        if spec.path:
            return _load_local(spec)
        reason = _why_unreachable(spec.dataset)
        with _cache_only(bool(reason)):
            return datasets.load_dataset(spec.dataset, spec.subset or None, split=spec.split)  # type: ignore[no-any-return]
    except UserError:
        raise
    # Whatever goes wrong in there, a server's answer or a broken file, is one sentence to the person who named it.
    except Exception as error:
        if reason:
            cause = f"the Hub cannot be reached ({reason}) and there is no copy in the cache"
        else:
            cause = _first_line(error.__cause__ or error)
        advice = "check path" if spec.path else "give path= of a local copy, or check"
        raise UserError(
            f"the data set {spec.path or spec.dataset!r} of task {spec.name!r} could not be loaded: {cause}; {advice}"
            f"{',' if spec.path else ''} subset and split"
        ) from error


def _load_local(spec: TaskSpec) -> Iterable[Mapping[str, Any]]:
    import datasets

    path = Path(spec.path)
    if path.is_dir():
        builder = datasets.load_dataset_builder(str(path), spec.subset or None)
        files = {str(split): [Path(file) for file in found] for split, found in builder.config.data_files.items()}
        if not all(file.suffix in READERS for found in files.values() for file in found):
            return datasets.load_dataset(str(path), spec.subset or None, split=spec.split)  # type: ignore[no-any-return]
    else:
        if not path.is_file():
            raise UserError(f"path of task {spec.name!r}, {path}, is neither a file nor a folder")
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"path of task {spec.name!r}, {path}, must end in one of {', '.join(SUFFIXES)}, or be a folder"
            )
        if spec.subset:
            raise UserError(f"subset of task {spec.name!r} must be left out for a single file, got {spec.subset!r}")
        files = {"train": [path]}
        if path.suffix not in READERS:
            return datasets.load_dataset("parquet", data_files={"train": str(path)}, split=spec.split)  # type: ignore[no-any-return]
    instruction = datasets.ReadInstruction.from_spec(spec.split)
    rows = {split: _read_files(found) if split in spec.split else [] for split, found in files.items()}
    parts = instruction.to_absolute({split: len(found) for split, found in rows.items()})
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def _read_files(files: Iterable[Path]) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        try:
            rows += READERS[file.suffix](file)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from error
    return rows


def _why_unreachable(dataset: str) -> str:
    """Empty if the Hub answers at all, whatever it answers; `load_dataset` alone would try for half a minute."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode"
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(dataset, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return ""
    except Exception as error:  # the HTTP client's own errors, which differ from one version of the library to the next
        return _first_line(error)
    return ""


@contextmanager
def _cache_only(active: bool) -> Iterator[None]:
    """Inside, `datasets` asks no server: it takes what is in its cache, or gives up at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split())[:200] if text else type(error).__name__


# synthetic


def open_synthetic(spec: TaskSpec, seed: int, eval_prompts: int) -> Stream:
    """Questions of one of GENERATORS; example ``index`` is the same in every process."""
    name = spec.dataset or spec.name
    all_of(f"dataset of task {spec.name!r}", [name], GENERATORS)
    rewrite = spec.rewriter()

    def make(stream: int, index: int) -> Example:
        try:
            question, answer = GENERATORS[name](random.Random(f"{name} {stream} {index}"), **spec.config)
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(f"config of task {spec.name!r} does not fit {name!r}: {error}") from error
        return Example(rewrite(question), rewrite(answer))

    return Stream(make, VERIFIERS[spec.verifier] if spec.verifier else exact, eval_prompts)


# verifiers


def open_verifiers(spec: TaskSpec, seed: int, eval_prompts: int) -> Stream:
    """Single-turn tasks of an installed taskset, scored by its own rewards unless a verifier is named."""
    _check_max_rows(spec)
    columns = spec.columns
    if not isinstance(columns, Mapping) or set(columns) - {"answer"}:
        raise UserError(f"columns of task {spec.name!r} may name the field of the answer alone, got {columns!r}")
    if spec.verifier and not columns:
        raise UserError(
            f"task {spec.name!r} names a verifier and needs the field of the reference answer, columns: {{answer: ...}}"
        )
    questions, rewards = read_environment(spec)
    verifier = VERIFIERS[spec.verifier] if spec.verifier else rewards
    return _rows_stream(spec, questions, verifier, seed, eval_prompts)


@dataclass(frozen=True)
class Source:
    """``keys``: what it reads of a task beside the keys of every task; ``open(spec, seed, eval_prompts)``."""

    keys: tuple[str, ...]
    open: Callable[[TaskSpec, int, int], Stream]


_DATASETS_KEYS = ("dataset", "path", "subset", "split", "format", "columns", "template", "levels", "max_rows")
SOURCES = {
    "reasoning_gym": Source(("dataset", "config", "template"), open_reasoning_gym),
    "jsonl": Source(("path",), open_jsonl),
    "datasets": Source((*_DATASETS_KEYS, "skip_bad_rows"), open_datasets),
    "synthetic": Source(("dataset", "config"), open_synthetic),
    "verifiers": Source(("dataset", "config", "columns", "max_rows"), open_verifiers),
}
