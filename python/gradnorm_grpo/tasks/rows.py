"""Rows of local files and of loaded data sets, each value also in the text that the file itself has for it.

A reference answer keeps its file's own text: 007 stays 007, 6.02e23 and true stay as they are written, a date is no
timestamp, and an object is the JSON in the file. Readers that infer types lose that text, so JSON and CSV files are
read here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in the stubs
from pathlib import Path
from typing import Any

_LONGEST_INTEGER = 4000  # digits; Python refuses to convert more than 4300
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(parse_int=lambda text: int(text) if len(text) <= _LONGEST_INTEGER else text)


class BadRow(ValueError):
    """What is wrong with one row, in words that follow its number."""


class Row(dict[str, Any]):
    """The values of a row by column; ``own`` has the text that the file has for each."""

    def __init__(self, values: Mapping[str, Any], own: Mapping[str, str]) -> None:
        super().__init__(values)
        self.own = own


def own_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a value: the file's own where it is known, else as JSON writes it.

    Raises BadRow for a typed value that has no text of its own, such as a timestamp.
    """
    value = row[column]
    if isinstance(row, Row):
        text = row.own[column]
    elif isinstance(value, str):
        text = value
    elif value is None or (isinstance(value, (dict, list)) and _holds_none(value)):
        # A reader of typed columns fills up the keys that an object lacks.
        raise BadRow(f"holds null in {column}, which may not be in the file: give path= of the file itself")
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except TypeError:
            raise BadRow(
                f"holds a {type(value).__name__} in {column}, whose own text is lost: store that column as text, or "
                "give path= of a JSON or CSV file"
            ) from None
    if isinstance(value, float) and (math.isnan(value) or text.lstrip("-") == "Infinity"):
        raise BadRow(f"holds {text} in {column}, which is no number")
    if re.search(r"[\ud800-\udfff]", text):
        raise BadRow(f"holds half of a surrogate pair in {column}, which is no text")
    return text


def _holds_none(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(_holds_none(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark; ValueError names another encoding and the place."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16 text, by its byte order mark: save it as UTF-8")
    if b"\x00" in data[:1000]:
        raise ValueError("it holds zero bytes, as UTF-16 text does: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} holds the byte 0x{data[error.start]:02x}, which is not UTF-8; Latin-1 or Windows-1252 text "
            "does: save it as UTF-8"
        ) from None


def json_lines(text: str) -> Iterator[tuple[int, Row | Exception]]:
    """(line number, row) of each line that is not blank; in place of a row, what is wrong with the line.

    A line ends with a line feed. U+2028 and its like are characters of a string.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        try:
            row, end = _object(line, _SPACE.match(line).end())  # type: ignore[union-attr]
            if line[end:].strip(" \t\r"):
                raise ValueError("there is more behind the object")
            yield number, row
        except (ValueError, RecursionError) as error:
            yield number, error


def json_list(text: str) -> Iterator[Row]:
    """The objects of a list. Raises ValueError for anything else."""
    at = _skip(text, 0) + 1
    if text[_skip(text, at) :].startswith("]"):
        return
    while True:
        row, at = _object(text, _skip(text, at))
        yield row
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"character {at} of the list must be a comma or its end")
        at += 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _object(text: str, at: int) -> tuple[Row, int]:
    """The object that starts at a place, with the text of each of its values, and where it ends."""
    if text[at : at + 1] != "{":
        raise ValueError("it is not a JSON object")
    values: dict[str, Any] = {}
    own: dict[str, str] = {}
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}" or values:
        if text[at : at + 1] != '"':
            raise ValueError(f"a key in quotes is expected at character {at}")
        key, at = scanstring(text, at + 1, True)
        if key in values:
            raise ValueError(f"the key {key!r} is repeated")
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"a colon is expected at character {at}")
        at = _skip(text, at + 1)
        value, end = _DECODER.raw_decode(text, at)
        values[key], own[key] = value, value if text[at] == '"' else text[at:end]
        at = _skip(text, end)
        if text[at : at + 1] == "}":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"a comma or the end of the object is expected at character {at}")
        at = _skip(text, at + 1)
    return Row(values, own), at + 1


def read_json(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines, or of one list of objects. Raises ValueError."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from json_list(text)
        return
    for number, row in json_lines(text):
        if isinstance(row, Exception):
            raise ValueError(f"line {number} is not a JSON object ({row})")
        yield row


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with a header; every value is the text in its cell. Raises ValueError."""
    csv.field_size_limit(1 << 30)
    table = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise ValueError(f"its header repeats a column: {', '.join(header)}")
        for cells in table:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"line {table.line_num} has {len(cells)} cells, the header {len(header)}")
            row = dict(zip(header, cells, strict=True))
            yield Row(row, row)
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from error


def data_files(entry: Mapping[str, Any]) -> list[Path]:
    """The local files that an entry of `tasks:` reads: its path, or every file below it."""
    path = Path(str(entry.get("path") or ""))
    if not entry.get("path"):
        return []
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def data_hashes(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The SHA-256 of each task's local data by the task's name, for tasks that have any."""
    hashes = {}
    for entry in entries:
        digest = hashlib.sha256()
        for file in (files := data_files(entry)):
            digest.update(f"{file.name}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        if files:
            hashes[str(entry["name"])] = digest.hexdigest()
    return hashes
