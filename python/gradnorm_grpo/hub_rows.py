"""Questions and answers from the rows of a data set: by a known format, or by columns named in YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import UserError, one_of
from .hub_formats import FORMATS, BadRow, Format, Parts, fill
from .hub_load import load_rows
from .jsonl import Question

if TYPE_CHECKING:
    from .tasks import TaskSpec

COLUMNS = ("prompt", "answer")


def read_dataset(spec: TaskSpec) -> tuple[list[Question], str]:
    """The questions of a task of source `datasets`, in the order of its rows, and the name of its verifier.

    Raises UserError for settings that do not fit together, a data set that cannot be loaded, a row that does not fit
    its format (named by its number, from 1; with ``skip_bad_rows`` it is left out) and fewer than two questions.
    """
    form = _format(spec)
    rows = load_rows(spec.name, spec.dataset, spec.path, spec.subset, spec.split)
    name = spec.path or spec.dataset
    questions, bad = _questions(spec, form, rows, name)
    if len(questions) < 2:
        left_out = f"; {len(bad)} rows were left out, the first because {bad[0]}" if bad else ""
        kept = f" with levels {spec.levels}" if spec.levels else ""
        raise UserError(
            f"{name} holds {len(questions)} questions for task {spec.name!r}{kept}: at least 2 are needed, one to hold "
            f"out{left_out}"
        )
    return questions, spec.verifier or form.verifier


def _format(spec: TaskSpec) -> Format:
    """The format that a task asks for, with its own template if it gives one."""
    for key in ("dataset", "path", "subset", "split", "format", "template"):
        if not isinstance(getattr(spec, key), str):
            raise UserError(f"{key} of task {spec.name!r} must be text, got {getattr(spec, key)!r}")
    if bool(spec.format) == bool(spec.columns):
        raise UserError(
            f"task {spec.name!r} needs either format (one of {', '.join(sorted(FORMATS))}) or columns (such as "
            f"{{prompt: question, answer: answer}}), got format={spec.format!r} and columns={spec.columns!r}"
        )
    if spec.format:
        if spec.format not in FORMATS:
            raise one_of(f"format of task {spec.name!r}", spec.format, FORMATS)
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
    if type(spec.max_rows) is not int or spec.max_rows < 0:
        raise UserError(f"max_rows of task {spec.name!r} must be a whole number, 0 for all rows, got {spec.max_rows!r}")
    return form


def _by_columns(spec: TaskSpec) -> Format:
    columns = spec.columns
    if not isinstance(columns, Mapping) or not all(isinstance(value, str) for value in columns.values()):
        raise UserError(f"columns of task {spec.name!r} must map prompt and answer to column names, got {columns!r}")
    for key in columns:
        if key not in COLUMNS:
            raise one_of(f"a key of columns of task {spec.name!r}", key, COLUMNS)
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
        texts = {str(key): str(value) for key, value in row.items() if value is not None}
        return Parts(texts, str(row[columns["answer"]]).strip(), dict(row))

    return Format(read, spec.template or f"{{{columns['prompt']}}}", spec.verifier)


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
            names = {str(key): str(value) for key, value in row.items()} | parts.texts if spec.template else parts.texts
            questions.append((fill(form.template, names), parts.answer, parts.data))
        except BadRow as error:
            problem = f"row {number} {error}"
            if not spec.skip_bad_rows:
                raise UserError(f"{name}, task {spec.name!r}: {problem}") from error
            bad.append(problem)
        if spec.max_rows and len(questions) == spec.max_rows:
            break
    return questions, bad
