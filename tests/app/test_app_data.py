"""Data as people have it: reference answers keep the file's own text, and files in odd encodings are read or named."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

import datasets

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.tasks import Task, build_tasks
from gradnorm_grpo.tasks.rows import data_files, data_hashes, json_lines, read_csv, read_json

COLUMNS = {"prompt": "question", "answer": "reply"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(path: Path, verifier: str = "exact", source: str = "datasets", **keys: Any) -> Task:
    spec = {"name": "t", "source": source, "path": str(path), "verifier": verifier}
    if source == "datasets":
        spec["columns"] = COLUMNS
    return build_tasks([{**spec, **keys}], 0, 1)[0]


def answers(task: Task) -> dict[str, str]:
    return {e.question: e.answer for e in [*task.held_out, *task.solved_examples(40)]}


# What a file writes as a JSON value, other than a string: its own text must come out.
OWN = [
    *("7", "0", "-3", "0.5", "5.0", "5.00", "1e-05", "0.00001", "6.02e23", "1E5", "-0.0", "12345678901234567890"),
    *("true", "false", "[1, 2]", "[1,2]", '{"count": 1, "name": "n"}', '{"b":1,"a":2}', '[{"id": 1}, {"tag": "x"}]'),
    *('{"nested": {"x": [true, null, 1.50]}}', "[]", '["a", "b"]', "7" * 6000),
]
# What a file writes as text.
TEXTS = [
    *(
        "007",
        "7",
        "2023-11-10",
        "2023-11-10T00:15:00Z",
        "10:15",
        "00:00:00",
        "true",
        "True",
        "null",
        "None",
        "NA",
        "nan",
    ),
    *(
        "1,234",
        "3,14",
        "1e3",
        "0x1f",
        "+5",
        ".5",
        "5.",
        "\u22125",
        "inf",
        "1/2",
        "a\u2028b",
        "a\u0085b",
        "\u4f60\u597d",
    ),
    *("{'a': 1}", "[1, 2]", "\\frac{1}{2}", "12.05.2023", "6.02e23", "1_000", "50%", "$5", "\u00bd", "e\u0301"),
]


def padded(values: list[str]) -> dict[str, str]:
    return {f"q{i}": value for i, value in enumerate(values)}


@pytest.mark.parametrize("source", ["jsonl", "datasets"])
def test_json_values_keep_their_own_text(tmp_path: Path, source: str) -> None:
    said, (prompt, answer) = padded(OWN), ("prompt", "answer") if source == "jsonl" else ("question", "reply")
    file = tmp_path / "values.jsonl"
    file.write_text("".join(f'{{"{prompt}": "{q}", "{answer}": {text}}}\n' for q, text in said.items()))
    assert answers(build(file, source=source)) == said


@pytest.mark.parametrize("source", ["jsonl", "datasets"])
def test_json_strings_keep_their_own_text(tmp_path: Path, source: str) -> None:
    said, (prompt, answer) = padded(TEXTS), ("prompt", "answer") if source == "jsonl" else ("question", "reply")
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({prompt: q, answer: text}, ensure_ascii=False) for q, text in said.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert answers(build(file, source=source)) == said


def test_cells_of_a_csv_file_keep_their_own_text(tmp_path: Path) -> None:
    said = padded([text for text in TEXTS if "\u2028" not in text])
    file = tmp_path / "table.csv"
    quoted = (text.replace('"', '""') for text in said.values())
    rows = "".join(f'{q},"{text}",\n' for q, text in zip(said, quoted, strict=True))
    file.write_text("question,reply,note\n" + rows, encoding="utf-8")
    assert answers(build(file)) == said


def test_integers_beside_a_blank_stay_integers(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("question,reply,other\n" + "".join(f"q{i},{i},{i if i % 2 else ''}\n" for i in range(8)))
    template = {"columns": {"answer": "reply"}, "template": "{question} {other}"}
    task = build(file, **template)
    assert {e.question for e in [*task.held_out, *task.solved_examples(20)]} == {
        f"q{i} {i}" if i % 2 else f"q{i}" for i in range(8)
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "folder"])
def test_the_reply_that_repeats_the_file_scores_one(tmp_path: Path, kind: str) -> None:
    said = {f"q{i}": f"2023-11-1{i}" for i in range(6)}
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"question": q, "reply": a} for q, a in said.items()]
    if kind == "json":
        file = folder / "a.json"
        file.write_text(json.dumps(rows, indent=2))
    elif kind == "csv":
        file = folder / "a.csv"
        file.write_text("question,reply\n" + "".join(f"{q},{a}\n" for q, a in said.items()))
    else:
        file = folder / "train.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
    task = build(folder if kind == "folder" else file)
    for example in task.solved_examples(5):
        assert task.score(said[example.question], example) == 1.0


def test_objects_are_compared_as_json(tmp_path: Path) -> None:
    own = {f"q{i}": {f"key{i}": i, "list": [i, None]} for i in range(6)}
    file = tmp_path / "own_keys.jsonl"
    file.write_text("\n".join(json.dumps({"question": q, "reply": a}) for q, a in own.items()))
    task = build(file, "json_value")
    for example in task.solved_examples(5):
        value = own[example.question]
        assert task.score(json.dumps(dict(reversed(list(value.items())))), example) == 1.0
        assert task.score(json.dumps({**value, "key0": None, "more": 1}), example) == 0.0


def test_typed_columns_have_the_text_of_json_or_are_refused_by_name(tmp_path: Path) -> None:
    def table(values: list[Any]) -> Path:
        rows = [{"question": f"q{i}", "reply": value} for i, value in enumerate(values)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    assert set(answers(build(table([True, False, True]))).values()) == {"true", "false"}
    assert set(answers(build(table([7, 8, 9]))).values()) == {"7", "8", "9"}
    assert set(answers(build(table([0.5, 1e-5]), "numeric")).values()) == {"0.5", "1e-05"}
    assert set(answers(build(table([[1, 2], [3]]), "json_value")).values()) == {"[1, 2]", "[3]"}
    assert set(answers(build(table([{"a": 1}, {"a": 2}]), "json_value")).values()) == {'{"a": 1}', '{"a": 2}'}
    day = datetime.datetime(2023, 11, 10)
    for values, verifier, message in (
        ([day, day.replace(day=11)], "exact", "row 1 holds a datetime in reply, whose own text is lost"),
        ([day.date(), day.date()], "exact", "row 1 holds a date in reply"),
        ([5.0, 6.0], "exact", "row 1 holds a floating-point number in reply.*verifier numeric"),
        ([{"a": 1}, {"b": 2}], "json_value", "row 1 holds null in reply, which may not be in the file"),
        ([b"ab", b"c"], "exact", "row 1 holds a bytes in reply"),
    ):
        with pytest.raises(UserError, match=message):
            build(table(values), verifier)


def line(prompt: str) -> str:
    return json.dumps({"prompt": prompt, "answer": "1"}, ensure_ascii=False)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("character", list("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"))
def test_a_line_ends_with_a_line_feed_alone(tmp_path: Path, character: str, end: str) -> None:
    prompts = ["one", f"two{character}more"]
    text = json.dumps(prompts[1], ensure_ascii=False)
    file = tmp_path / "questions.jsonl"
    rows = [line("one"), f'{{"prompt": {text}, "answer": "1"}}']
    file.write_bytes((end.join(rows) + end).encode())
    task = build(file, source="jsonl")
    assert {e.question for e in [*task.held_out, *task.solved_examples(1)]} == set(prompts)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": f"q{i}", "reply": f"{i}"} for i in range(3)]
    texts = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "question,reply\n" + "".join(f"q{i},{i}\n" for i in range(3)),
    }
    file = tmp_path / f"a.{suffix}"
    file.write_text(texts[suffix], encoding="utf-8-sig")
    assert answers(build(file)) == {"q0": "0", "q1": "1", "q2": "2"}


@pytest.mark.parametrize("source", ["jsonl", "datasets"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "it is UTF-16 text, by its byte order mark: save it as UTF-8"),
        ("utf-16-le", "it holds zero bytes, as UTF-16 text does: save it as UTF-8"),
        ("utf-16-be", "it holds zero bytes, as UTF-16 text does: save it as UTF-8"),
        (
            "latin-1",
            "line 2 holds the byte 0xe9, which is not UTF-8; Latin-1 or Windows-1252 text does: save it as UTF-8",
        ),
        ("cp1252", "line 2 holds the byte 0xe9, which is not UTF-8; Latin-1 or Windows-1252"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, source: str, encoding: str, message: str) -> None:
    names = ("prompt", "answer") if source == "jsonl" else ("question", "reply")
    rows = [dict(zip(names, pair, strict=True)) for pair in (("one", "1"), ("d\u00e9j\u00e0", "2"))]
    file = tmp_path / "questions.jsonl"
    file.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    with pytest.raises(UserError, match=message) as caught:
        build(file, source=source)
    assert "questions.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": null}\n', "line 2"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "c", "answer": "d"}\n',
            "line 2.*'answer' is repeated",
        ),
        ('{"prompt": "a", "answer": "b"} {"prompt": "c"}\n', "line 1.*more behind the object"),
        ('{"prompt": "a", "answer": 1,}\n', "line 1"),
        ('{"prompt": "a" "answer": 1}\n', "line 1.*comma"),
        ('{"prompt": "a", "answer" 1}\n', "line 1.*colon"),
        ('{"prompt": "a", "answer": "b\tc"}\n', "line 1"),
        ('{prompt: "a", "answer": 1}\n', "line 1.*key in quotes"),
        ('{"prompt": "a", "answer": \n', "line 1"),
        (
            '{"prompt": "a\\ud83d", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n',
            "line 1 holds half of a surrogate pair",
        ),
        ('{"prompt": "a", "answer": "\\udc00"}\n{"prompt": "c", "answer": "d"}\n', "surrogate pair in answer"),
        ("[" * 100_000, "line 1"),
        ('{"prompt": "a", "answer": ' + "[" * 100_000 + "\n", "line 1"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build(file, source="jsonl")
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,reply\na,1\nb\n", "line 3 has 1 cells, the header 2"),
        ("question,reply\na,1\nb,2,3\n", "line 3 has 3 cells, the header 2"),
        ("question,question\na,1\n", "its header repeats a column: question, question"),
        ('question,reply\na,"1\n', "line 2: unexpected end of data"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=f"bad.csv.*{message}"):
        build(file)


def test_a_table_may_hold_lines_and_long_cells(tmp_path: Path) -> None:
    long = "x" * 200_000
    file = tmp_path / "a.csv"
    file.write_bytes(f'question,reply\r\n"a\nb","{long}"\r\n\r\n"say ""hi""",2\r\n'.encode())
    assert [dict(row) for row in read_csv(file)] == [
        {"question": "a\nb", "reply": long},
        {"question": 'say "hi"', "reply": "2"},
    ]


def test_a_list_and_lines_of_objects_are_both_json_files(tmp_path: Path) -> None:
    rows = [{"a": i, "b": [i, {"c": None}]} for i in range(3)]
    contents = (json.dumps(rows), json.dumps(rows, indent=3), "\n\n".join(map(json.dumps, rows)), " [ ] ", "")
    for content, expected in zip(contents, (rows, rows, rows, [], []), strict=True):
        (tmp_path / "a.json").write_text(content)
        assert [dict(row) for row in read_json(tmp_path / "a.json")] == expected
    for bad in ("[{}", "[{} {}]", "[1]", '{"a": 1}\n[1]\n', "3"):
        (tmp_path / "a.json").write_text(bad)
        with pytest.raises(ValueError):
            list(read_json(tmp_path / "a.json"))


def test_our_reader_of_json_agrees_with_pythons() -> None:
    texts = [
        '{"a": 1}',
        ' { "a" : [1, 2.5, "x\\n"] , "b":{"c":null} } ',
        "{}",
        '{"":0}',
        '{"\\u0061": "\\ud83d\\ude00"}',
    ]
    texts += ['{"a": 1', '{"a"}', "{,}", '{"a": 1,, "b": 2}', "nonsense", '{"a": 01}', "{'a': 1}", '{"a": tru}', '"a"']
    for text in texts:
        try:
            expected: Any = json.loads(text)
        except ValueError:
            expected = None
        (_, row) = next(iter(json_lines(text)))
        if isinstance(expected, Mapping):
            assert dict(row) == expected  # type: ignore[arg-type]
        else:
            assert isinstance(row, Exception), text


@pytest.mark.parametrize(
    ("split", "expected"), [("train", 10), ("train[:4]", 4), ("train[50%:]", 5), ("train[2:5]", 3)]
)
def test_a_part_of_a_split(tmp_path: Path, split: str, expected: int) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"question": "q{i}", "reply": {i}}}\n' for i in range(10)))
    task = build(tmp_path / "a.jsonl", split=split)
    assert len({e.question for e in [*task.held_out, *task.solved_examples(60)]}) == expected


def test_the_files_of_a_folder_keep_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(f'{{"question": "{split}{i}", "reply": "0{i}"}}\n' for i in range(4))
        )
    for split in ("train", "test"):
        assert answers(build(folder, split=split)) == {f"{split}{i}": f"0{i}" for i in range(4)}
    with pytest.raises(UserError, match="could not be loaded: Unknown split .tset."):
        build(folder, split="tset")


def test_the_hash_of_a_tasks_data_covers_every_file_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.jsonl").write_text("1")
    (folder / "inner" / "b.jsonl").write_text("2")
    entries = [{"name": "t", "path": str(folder)}, {"name": "u", "path": str(folder / "a.jsonl")}, {"name": "v"}]
    assert [len(data_files(entry)) for entry in entries] == [2, 1, 0]
    first = data_hashes(entries)
    assert first.keys() == {"t", "u"}
    times = (folder / "inner" / "b.jsonl").stat()
    (folder / "inner" / "b.jsonl").write_text("3")
    os.utime(folder / "inner" / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    second = data_hashes(entries)
    assert second["t"] != first["t"] and second["u"] == first["u"]
