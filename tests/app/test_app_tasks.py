"""The application's tasks and rewards: held-out questions, verifiers, and text that must never be executed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tasks.verifiers import (
    OWN_SCORE,
    VERIFIERS,
    arithmetic_value,
    exact,
    executes_text,
    expression,
    financial,
    json_value,
    math_verify,
    numeric,
)

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


@pytest.mark.parametrize(
    "name",
    [
        *("countdown", "puzzle24", "letter_counting", "number_sorting", "syllogism", "gcd", "bitwise_arithmetic", "bf"),
        *("polynomial_equations", "leg_counting"),
    ],
)
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
    # Known by reading the package, version 0.1.25: if a new one turns up here it is refused, which is right; if one
    # goes missing, look. bitwise_arithmetic is found through a helper; that one and number_sorting evaluate what the
    # data set says, not what the model says. codeio and bf compare: neither is here.
    assert unsafe >= {
        *("binary_matrix", "spiral_matrix", "n_queens", "polynomial_multiplication", "simple_integration"),
        *("intermediate_integration", "string_insertion", "number_sorting", "bitwise_arithmetic", *OWN_SCORE),
    } - {"codeio"}
    assert not unsafe & {"codeio", "bf", "gcd", "chain_sum", "polynomial_equations", "leg_counting"}
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


class _Hidden:
    """A score that evaluates its text two calls away."""

    def score_answer(self, answer: str, entry: dict) -> float:
        return self._score(answer)

    def _score(self, answer: str) -> float:
        return float(eval(answer))


def test_a_score_that_evaluates_in_a_helper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Hidden._score, "__module__", "reasoning_gym.somewhere")
    assert executes_text(_Hidden())


def test_composite_is_refused_as_it_would_hide_the_scores_of_others() -> None:
    spec = {"name": "composite", "config": {"datasets": [{"name": "n_queens", "weight": 1, "config": {}}]}}
    with pytest.raises(UserError, match="list each of them as a task of its own"):
        build_tasks([spec], 0, 1)


@pytest.mark.parametrize(
    "asked",
    [
        *(
            {"verifier": word}
            for word in ("execute", "unit_tests", "sandbox", "python", "code", "runTests", "exec_python")
        ),
        *({"verifier": word} for word in ("code_execution", "pytest", "stdio", "CodeJudge", "sandbox_fusion", "eval")),
        {"source": "datasets", "path": "x.jsonl", "format": "unit_tests"},
        {"source": "datasets", "path": "x.jsonl", "format": "python"},
        {"source": "datasets", "path": "x.jsonl", "format": "r1_code", "verifier": "run_tests"},
        {"execute": True},
        {"sandbox": "firejail"},
        {"unit_tests": ["assert f(2) == 4"]},
        {"reward_model": {"style": "rule", "ground_truth": "assert f(2) == 4"}},
        {"reward": {"kind": "x", "run_tests": True}},
        {"config": {"reward": {"execute": True}}},
        {"verifier": {"style": "unit_tests"}},
    ],
)
def test_a_task_that_asks_for_execution_is_refused_with_what_can_be_done(asked: dict) -> None:
    with pytest.raises(UserError, match="no reward here runs text a model wrote") as caught:
        build_tasks([{"name": "gcd", **asked}], 0, 1)
    assert "codeio or bf" in str(caught.value) and "r1_code" in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_only_look_like_execution_are_not_refused() -> None:
    build_tasks([{"name": "run the code tests", "dataset": "gcd"}], 0, 1)
    with pytest.raises(UserError, match="did you mean 'exact'"):
        build_tasks([{"name": "gcd", "verifier": "exakt"}], 0, 1)


BF = {"name": "output", "dataset": "bf", "config": {"difficulty": 2}, "template": "What is printed?\n{bfit_code}"}


def test_a_template_takes_the_fields_of_the_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    task = build_tasks([BF], 0, 3)[0]
    example = task.next_example()
    assert example.question.startswith("What is printed?\nint main() {") and "while (acc < target)" in example.question
    assert task.score(example.answer, example) == 1.0 and task.score(f"{example.answer}0", example) == 0.0
    assert task.score(example.data["metadata"]["bf_program"], example) == 0.0
    assert capsys.readouterr().out == ""  # the package's compiler prints dots
    with pytest.raises(UserError, match=r"its data set has no \{code\} for the template, only .*bf_program.*question"):
        build_tasks([{**BF, "template": "{code}"}], 0, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "gcd", "format": "math"}, "a key of task 'gcd', whose source is reasoning_gym, must be one of"),
        ({"name": "sort", "source": "synthetic", "template": "x"}, "whose source is synthetic, must be one of"),
        ({"name": "t", "source": "jsonl", "verifier": "exact", "path": "x", "split": "test"}, "whose source is jsonl"),
    ],
)
def test_a_key_of_another_source_is_not_ignored(spec: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tasks([spec], 0, 1)


@pytest.mark.parametrize(
    ("text", "answer", "result", "right"),
    [
        ("14.1%", "14.1%", None, True),
        ("about 14.13 percent", "14.1%", None, True),
        ("14.1", "14.1%", None, True),
        ("0.141", "14.1%", None, True),
        ("14.2%", "14.1%", None, False),
        ("1.41%", "14.1%", None, False),
        ("-14.1%", "14.1%", None, False),
        ("14.1%", "14.1", None, False),
        ("0.14136", "14.1%", "0.14136", True),
        ("14.136%", "14.1%", "0.14136", True),
        ("0.14147", "14.14%", "0.14136", False),
        ("$1,250.0 million", "1250", None, True),
        ("1.25 billion", "1.25 million", None, False),
        ("1.25 million", "$1.25 million", None, True),
        ("(12.3)", "-12.3", None, True),
        ("$ (12.3)", "-12.3", "-12.3", True),
        ("12.3", "-12.3", None, False),
        (".5", "0.5", None, True),
        ("380.4", "380", None, True),
        ("380.6", "380", None, False),
        ("from 2006 to 2007 it rose by 3", "3", None, True),
        ("yes, it did: Yes", "yes", "yes", True),
        ("yes", "no", "no", False),
        ("5", "yes", "yes", False),
        ("", "3", None, False),
        ("nothing", "3", None, False),
        ("3", "n/a", None, False),
    ],
)
def test_financial(text: str, answer: str, result: str | None, right: bool) -> None:
    assert financial(text, answer, {"result": result}) is right


HOSTILE = [
    *("10**10**10", "10^10^10", "9e999999999", "1e10", "nan", "inf", "0x10", "__import__('os').getpid()"),
    *(
        "1" * 100_000,
        "9" * 390 + ".0",
        "(" * 100_000,
        "[" * 100_000,
        '{"a":' * 60_000,
        "-" * 100_000 + "10x",
        "1," * 50_000,
    ),
    *("1/0", "10/0", "$" * 100_000 + "%", "\x00" * 1000, "\u0661\u0660", "\\frac{" * 50_000),
]


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_hostile_text_is_wrong_and_quick(name: str) -> None:
    data = {"metadata": {"numbers": [10], "target": 10}, "result": "10"}
    begun = time.process_time()
    assert [text[:40] for text in HOSTILE if VERIFIERS[name](text, "10", data)] == []
    assert time.process_time() - begun < 5.0
    assert VERIFIERS[name]("10", "10", data)


def test_numbers_inside_a_computation_are_no_answer() -> None:
    assert not numeric("3*5", "5", {}) and not numeric("x5", "5", {}) and not numeric("5.25x", "5", {})
    assert numeric("x=5", "5", {}) and numeric("it is 5.", "5", {}) and numeric("-7/2", "-3.5", {})


def test_json_values() -> None:
    assert json_value('{"b": [1, 2.0], "a": null}', '{"a": null, "b": [1, 2]}', {})
    assert json_value("plain text", "plain  text", {}) and json_value("[]", " [ ] ", {})
    for wrong in ('{"b": [1, 2]}', '{"a": null, "b": [2, 1]}', '{"a": 0, "b": [1, 2]}', "so: {}", "[", "NaN"):
        assert not json_value(wrong, '{"a": null, "b": [1, 2]}', {})
    assert not json_value("1", "true", {}) and not json_value("true", "1", {})


def test_codeio_compares_json_and_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {"name": "codeio", "config": {"input_prediction_probability": 1.0}}
    task = build_tasks([spec], 0, 1)[0]
    example = task.solved_examples(1)[0]
    value = json.loads(example.answer)
    assert task.score(json.dumps(value, indent=1), example) == 1.0
    for text in (ATTACK, f"[{ATTACK}]", '{"answer": 1}', "{" * 10_000):
        assert task.score(text, example) == 0.0
    assert not (tmp_path / "executed").exists()
