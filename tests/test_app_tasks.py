"""The application's tasks and rewards: held-out questions, verifiers, and text that must never be executed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.verifiers import VERIFIERS, arithmetic_value, exact, executes_text, expression, math_verify, numeric

LETTERS = {"name": "letters", "dataset": "letter_counting", "config": {"min_words": 1, "max_words": 1}}


def _jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", [0, 7])
def test_training_never_shows_a_held_out_question(seed: int) -> None:
    task = build_tasks([{"name": "gcd", "config": {"min_value": 2, "max_value": 13}}], seed, 31)[0]
    held_out = {example.question for example in task.held_out}
    assert len(held_out) == 31
    seen = [task.next_example().question for _ in range(300)]
    assert not held_out & set(seen)
    assert task.position > 300  # some were passed over, or the test shows nothing
    assert not held_out & {example.question for example in task.solved_examples(100)}


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    streams = []
    for seed in (3, 3, 4):
        tasks = build_tasks([LETTERS, {"name": "sort", "source": "synthetic"}], seed, 5)
        streams.append([task.next_example().question for task in tasks for _ in range(20)])
    assert streams[0] == streams[1] != streams[2]


def test_position_is_all_that_a_task_needs_to_go_on() -> None:
    first, second = (build_tasks([LETTERS], 1, 5)[0] for _ in range(2))
    for _ in range(13):
        first.next_example()
    second.position = first.position
    assert first.next_example() == second.next_example()


def test_a_space_of_questions_that_is_all_held_out_is_an_error() -> None:
    spec = {"name": "add", "source": "synthetic", "config": {"low": 0, "high": 1}}
    with pytest.raises(UserError, match=r"no question left|not held out"):
        build_tasks([spec], 0, 64)[0].next_example()


def test_rewritten_countdown_accepts_any_right_expression() -> None:
    spec = {"name": "countdown", "config": {"min_numbers": 2, "max_numbers": 2, "min_target": 1, "max_target": 99}}
    task = build_tasks([spec], 0, 2)[0]
    example = task.next_example()
    a, b = example.data["metadata"]["numbers"]
    target = example.data["metadata"]["target"]
    scores = {
        text: task.score(text, example) for text in (f"{a}+{b}", f"{a} - {b}", f"({b}-{a})", f"{a}*{b}", f"{b}/{a}")
    }
    values = {f"{a}+{b}": a + b, f"{a} - {b}": a - b, f"({b}-{a})": b - a, f"{a}*{b}": a * b, f"{b}/{a}": b / a}
    assert scores == {text: float(value == target) for text, value in values.items()}
    assert task.score(str(target), example) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("3+4*2", 11), ("(3+4)*2", 14), ("-3 - -4", 1), ("8/(3-8/3)", 24), ("7/2", 3.5)],
)
def test_arithmetic(text: str, value: float) -> None:
    assert arithmetic_value(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "9**9**9", "2//3", "1/0", "x+1", "__import__('os')", "1e9", "3,4", "(1", "1 2", "0777"),
        *("(" * 110 + "1" + ")" * 110, "1" * 12, "1+" * 100 + "1"),
    ],
)
def test_what_is_not_arithmetic_is_wrong_and_quick(text: str) -> None:
    begun = time.perf_counter()
    assert not expression(text, "", {"metadata": {"numbers": [1, 2], "target": 3}})
    assert time.perf_counter() - begun < 0.5


ATTACK = "__import__('pathlib').Path('executed').touch()"


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "letter_counting", "number_sorting", "syllogism", "gcd"])
def test_no_score_executes_a_completion(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = build_tasks([{"name": name}], 0, 1)[0]
    example = task.next_example()
    for text in (ATTACK, f"[{ATTACK}]", f"['1', {ATTACK}]", f"1+{ATTACK}"):
        assert task.score(text, example) == 0.0
    for verify in VERIFIERS.values():
        for text in (ATTACK, f"${ATTACK}$", f"\\boxed{{{ATTACK}}}"):
            assert not verify(text, "1", {"metadata": {"numbers": [1], "target": 1}})
    assert not (tmp_path / "executed").exists()


def test_data_sets_whose_score_would_execute_text_are_refused() -> None:
    from reasoning_gym.factory import DATASETS

    unsafe = set()
    for name, (kind, _) in DATASETS.items():
        if executes_text(kind.__new__(kind)):
            unsafe.add(name)
    # Known by reading the package: if a new one turns up here it is refused, which is right; if one goes missing, look.
    assert {"binary_matrix", "spiral_matrix", "n_queens", "polynomial_multiplication", "simple_integration"} <= unsafe
    with pytest.raises(UserError, match="execute what the model wrote"):
        build_tasks([{"name": "n_queens"}], 0, 1)
    build_tasks([{"name": "spiral_matrix", "verifier": "exact"}], 0, 1)


def test_text_verifiers() -> None:
    assert exact(" a  b\n", "a b", {}) and not exact("ab", "a b", {})
    assert numeric("so it is 1,234.50.", "1234.5", {}) and numeric("7/2", "3.5", {})
    assert not numeric("no number", "3", {}) and not numeric("3 or 4", "3", {}) and not numeric("1/0", "3", {})
    assert math_verify("\\frac{1}{2}", "0.5", {}) and math_verify("The answer is $x+1$.", "$1+x$", {})
    assert not math_verify("\\frac{1}{3}", "0.5", {}) and not math_verify("", "1", {})


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "9**9**9**9", "1000000!", "2^{99999999}", "1" * 500, "$" + "(" * 350 + "$"]
)
def test_math_verify_is_not_stalled(text: str) -> None:
    begun = time.perf_counter()
    assert not math_verify(text, "3", {})
    assert time.perf_counter() - begun < 4.0  # math-verify's own limit is 5 s to parse and 5 s to compare


def test_jsonl_task_with_math_verify(tmp_path: Path) -> None:
    rows = [{"prompt": f"Half of {i}?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(10)]
    path = _jsonl(tmp_path / "halves.jsonl", rows)
    spec = {"name": "halves", "source": "jsonl", "path": str(path), "verifier": "math_verify"}
    task = build_tasks([spec], 0, 4)[0]
    assert len(task.held_out) == 4
    seen = [task.next_example() for _ in range(18)]
    assert {e.question for e in seen[:6]} == {e.question for e in seen[6:12]}, "an epoch is all rows, once each"
    assert not {e.question for e in seen} & {e.question for e in task.held_out}
    number = int(seen[0].question.split()[2].rstrip("?"))
    assert task.score(str(number / 2), seen[0]) == 1.0
    assert task.score(str(number / 2 + 1), seen[0]) == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds 0 questions"),
        ('{"prompt": "a", "answer": "b"}\n', "holds 1 questions"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2"),
        ('{"prompt": "a", "answer": "b"}\n[1]\n', "line 2"),
        ('{"prompt": "a", "answer": "b"}\nnot json\n', "line 2"),
        ('{"prompt": "a", "answer": ""}\n', "line 1"),
        ('{"prompt": 3, "answer": "b"}\n', "line 1"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        build_tasks([{"name": "t", "source": "jsonl", "path": str(path), "verifier": "exact"}], 0, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "leter_counting"}, "did you mean 'letter_counting'"),
        ({"name": "gcd", "config": {"min_valeu": 3}}, "config of task 'gcd' does not fit"),
        ({"name": "gcd", "config": {"min_value": -3}}, "config of task 'gcd' does not fit"),
        ({"name": "countdown", "config": {"min_target": 10**8, "max_target": 10**9}}, "makes no question"),
        ({"name": "gcd", "sorce": "jsonl"}, "did you mean 'source'"),
        ({"name": "gcd", "source": "web"}, "source of task 'gcd' must be one of"),
        ({"name": "gcd", "verifier": "numerc"}, "did you mean 'numeric'"),
        ({"name": "gcd", "rewrite": [["(", ""]]}, "rewrite of task 'gcd'"),
        ({"name": "gcd", "rewrite": [["\\d", "x"]]}, "scores 0"),
        ({"name": "t", "source": "jsonl", "path": "x.jsonl"}, "needs a verifier"),
        ({"name": "t", "source": "jsonl", "path": "no/such.jsonl", "verifier": "exact"}, "cannot be read"),
        ({"name": "t", "source": "jsonl", "verifier": "exact"}, "needs a path"),
        ({"name": "sortt", "source": "synthetic"}, "did you mean 'sort'"),
        ({"name": "sort", "source": "synthetic", "config": {"lo": 1}}, "does not fit"),
    ],
)
def test_a_bad_task_is_one_sentence(spec: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_tasks([spec], 0, 1)
    assert "\n" not in str(caught.value)
