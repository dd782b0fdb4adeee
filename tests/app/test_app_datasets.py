"""Tasks of source `datasets`: every format on small files in its published shape, refusals, and data out of reach."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("reasoning_gym")

import datasets

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.parse import PRESETS
from gradnorm_grpo.tasks import Task, build_tasks
from gradnorm_grpo.tasks.formats import BadRow, boxed, countdown_solution, fill, render_table
from gradnorm_grpo.tasks.verifiers import arithmetic_value

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test is left in, or taken from, the cache of the person who runs it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(ROOT)


def build(path: str | Path, eval_prompts: int = 2, **keys: Any) -> Task:
    return build_tasks([{"name": "t", "source": "datasets", "path": str(path), **keys}], 0, eval_prompts)[0]


def everything(task: Task, rows: int) -> dict[str, Any]:
    """All examples of a task by question: the held-out ones and two rounds of the others."""
    return {e.question: e for e in [*task.held_out, *(task.next_example() for _ in range(2 * rows))]}


def test_math_takes_the_answer_from_the_last_box_and_filters_levels() -> None:
    found = everything(build(DATA / "math.jsonl", format="math"), 8)
    assert len(found) == 8
    answers = {question.split()[0] + question[-9:]: e.answer for question, e in found.items()}
    assert "4" in answers.values() and "11" not in answers.values()  # two boxes: the last one counts
    assert {"\\frac{3}{4}", "7", "\\text{Ann}", "(-2,2)"} <= set(answers.values())
    easy = everything(build(DATA / "math.jsonl", format="math", levels=[1]), 3)
    assert {e.answer for e in easy.values()} == {"\\frac{3}{4}", "(x-3)(x+3)", "\\text{Ann}"}
    assert len(everything(build(DATA / "math.jsonl", format="math", levels=[2, 5]), 3)) == 3


def test_math_scores_mathematics_and_accepts_every_reference_answer() -> None:
    task = build(DATA / "math.jsonl", format="math")
    for example in everything(task, 8).values():
        assert task.score(example.answer, example) == 1.0
        assert task.score(f"So it is $\\boxed{{{example.answer}}}$.", example) == 1.0
        assert task.score("\\boxed{123456}", example) == 0.0
    half = next(e for e in everything(task, 8).values() if e.answer == "\\frac{3}{4}")
    assert task.score("0.75", half) == 1.0


def test_mirrors_of_math_with_an_answer_column_and_a_level_in_figures(tmp_path: Path) -> None:
    rows = [
        {
            "problem": f"{i}+1?",
            "solution": "clear",
            "answer": str(i + 1),
            "subject": "Algebra",
            "level": i,
            "unique_id": "x",
        }
        for i in range(1, 6)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "math500.parquet")
    found = everything(build(tmp_path / "math500.parquet", format="math", levels=[2, 3, 4]), 3)
    assert {question: e.answer for question, e in found.items()} == {"2+1?": "3", "3+1?": "4", "4+1?": "5"}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{1} or rather \\boxed{ {2} }", "{2}"),
        ("$\\boxed 7$, as said", "7"),
        ("\\fbox{x}", "x"),
        ("no box", ""),
        ("\\boxed{never closed", ""),
    ],
)
def test_boxed(solution: str, answer: str) -> None:
    assert boxed(solution) == answer


def test_deepscaler() -> None:
    task = build(DATA / "deepscaler.json", format="deepscaler")
    found = everything(task, 4)
    assert {e.answer for e in found.values()} == {"58", "\\frac{1}{6}", "1", "5\\sqrt{3}"}
    sixth = next(e for e in found.values() if e.answer == "\\frac{1}{6}")
    assert task.score("\\boxed{2/12}", sixth) == 1.0 and task.score("1/5", sixth) == 0.0


def test_finqa_as_published_holds_the_texts_the_table_and_the_question() -> None:
    task = build(DATA / "finqa.json", format="finqa")
    found = everything(task, 4)
    growth = next(e for question, e in found.items() if "growth" in question)
    assert growth.question == (
        "the company sells lamps . amounts are in millions of dollars .\n\n"
        "| 2007 | 2006\nnet sales | $ 1,250.0 | $ 1,100.0\ncost of sales | ( 812.5 ) | ( 770.0 )\n\n"
        "sales grew in every region .\n\nwhat was the growth of net sales from 2006 to 2007?"
    )
    assert (growth.answer, growth.data["result"]) == ("13.6%", "0.13636")
    for text, score in [
        ("13.6%", 1),
        ("13.636 %", 1),
        ("0.13636", 1),
        ("13.6", 1),
        ("13.7%", 0),
        ("136%", 0),
        ("0.14", 0),
    ]:
        assert task.score(text, growth) == score, text
    asked = next(e for question, e in found.items() if "exceed" in question)
    assert asked.answer == "yes" and task.score("Yes.", asked) == 1.0 and task.score("no", asked) == 0.0
    costs = next(e for question, e in found.items() if "costs" in question)
    assert task.score("$ (1,582.5)", costs) == 1.0 and task.score("1582.5", costs) == 0.0


def test_finqa_flat_copies_and_a_template_without_the_text() -> None:
    task = build(DATA / "finqa_flat.jsonl", format="finqa", template="{table}\n{question}")
    found = everything(task, 4)
    assert "| amount\nrent | 102\ndeposit | 300\nwhat are rent and deposit together in year 2?" in found
    assert all(task.score(f"${e.answer}", e) == 1.0 for e in found.values())


def test_a_table_is_a_list_of_rows() -> None:
    assert render_table([["", "2007"], ["sales ", 3]]) == "| 2007\nsales | 3"
    for wrong in (None, [], "text", [1, 2], [{"a": 1}]):
        with pytest.raises(BadRow, match="needs a table"):
            render_table(wrong)


def test_countdown_finds_its_own_reference_answers() -> None:
    task = build(DATA / "countdown.jsonl", format="countdown", eval_prompts=1)
    found = everything(task, 6)
    assert len(found) == 6
    for example in found.values():
        metadata = example.data["metadata"]
        if metadata["target"] == 9999:
            assert example.answer == ""  # out of reach: no reference answer, and no reply is right
            continue
        value, used = arithmetic_value(example.answer)
        assert value == metadata["target"] and sorted(used) == sorted(metadata["numbers"])
        assert task.score(example.answer, example) == 1.0
        assert task.score(str(metadata["target"]), example) == 0.0


@pytest.mark.parametrize(
    ("numbers", "target", "solvable"),
    [
        ((3, 3, 8, 8), 24, True),
        ((7,), 7, True),
        ((7,), 8, False),
        ((1, 1), 3, False),
        ((0, 5), 5, True),
        ((5, 5), 1, True),
    ],
)
def test_countdown_solution(numbers: tuple[int, ...], target: int, solvable: bool) -> None:
    found = countdown_solution(numbers, target)
    assert bool(found) == solvable
    if found:
        assert arithmetic_value(found) == (target, arithmetic_value(found)[1])


def test_r1_code_rows_become_output_prediction(tmp_path: Path) -> None:
    task = build(DATA / "r1_code.jsonl", format="r1_code")
    found = everything(task, 3)
    double = found["What does this program print?\n\nn = int(input())\nprint(2 * n)\n\nInput:\n4\n\nOutput:"]
    assert double.answer == "8" and task.score(" 8\n", double) == 1.0 and task.score("print(8)", double) == 0.0
    assert {e.answer for e in found.values()} == {"8", "9", "pmal"}
    plain = everything(build(DATA / "program_io.csv", format="r1_code"), 3)
    assert {e.answer for e in plain.values()} == {"3", "abab", "4"}


def test_r1_code_rows_that_need_unit_tests_are_refused_by_number_or_left_out() -> None:
    with pytest.raises(UserError, match=r"row 2 is scored by running unit tests .* refused.*codeio and bf"):
        build(DATA / "r1_code_unit_tests.jsonl", format="r1_code")
    kept = build(DATA / "r1_code_unit_tests.jsonl", format="r1_code", skip_bad_rows=True)
    assert {e.answer for e in everything(kept, 2).values()} == {"8", "2"}


def test_columns_and_templates(tmp_path: Path) -> None:
    task = build(
        DATA / "table.csv",
        columns={"answer": "net"},
        template="{company} in {year}: {assets} less {debts}? Use \\boxed{}.",
        verifier="numeric",
    )
    example = everything(task, 6)["Lamps 2 in 2012: 114 less 46? Use \\boxed{}."]
    assert example.answer == "68" and task.score("68.0", example) == 1.0
    named = build(DATA / "table.csv", columns={"prompt": "company", "answer": "assets"}, verifier="exact", max_rows=4)
    assert set(everything(named, 4)) == {"Lamps 0", "Lamps 1", "Lamps 2", "Lamps 3"}


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and 1", "answer": i + 1} for i in range(7)]
    table = datasets.Dataset.from_list(rows)
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "folder")
    keys = {"columns": {"prompt": "prompt", "answer": "answer"}, "verifier": "exact"}
    found = []
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.json", "folder"):
        found.append({q: e.answer for q, e in everything(build(tmp_path / name, **keys), 7).items()})
    assert all(answers == {f"{i} and 1": str(i + 1) for i in range(7)} for answers in found)


def test_a_list_in_a_csv_file_is_read_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('nums,target\n"[1, 2]",3\n"[4, 2]",8\n')
    assert {e.answer for e in everything(build(tmp_path / "a.csv", format="countdown"), 2).values()} == {
        "2 + 1",
        "4 * 2",
    }


def test_training_never_shows_a_held_out_question_even_one_that_occurs_twice(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {i % 20}", "answer": i % 20} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    keys = {"columns": {"prompt": "prompt", "answer": "answer"}, "verifier": "exact"}
    for seed in range(3):
        spec = {"name": "t", "source": "datasets", "path": str(tmp_path / "a.json"), **keys}
        task = build_tasks([spec], seed, 8)[0]
        held_out = {e.question for e in task.held_out}
        seen = {task.next_example().question for _ in range(100)}
        assert len(held_out) == 8 and len(seen) == 12 and not held_out & seen
        assert not held_out & {e.question for e in task.solved_examples(30)}


def test_rewriting_that_makes_questions_equal_keeps_them_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}: number {i % 4}", "answer": i % 4} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    keys = {"columns": {"prompt": "prompt", "answer": "answer"}, "verifier": "exact", "rewrite": [["^\\d+: ", ""]]}
    task = build(tmp_path / "a.json", eval_prompts=3, **keys)
    assert not {e.question for e in task.held_out} & {task.next_example().question for _ in range(80)}


MATH, TABLE = str(DATA / "math.jsonl"), str(DATA / "table.csv")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": MATH}, "needs either format .* or columns"),
        (
            {"path": MATH, "format": "math", "columns": {"prompt": "a", "answer": "b"}},
            "needs either format .* or columns",
        ),
        ({"path": MATH, "format": "mth"}, "did you mean 'math'"),
        ({"format": "math"}, "needs either dataset .* or path"),
        ({"path": MATH, "dataset": "x/y", "format": "math"}, "needs either dataset .* or path"),
        ({"path": "no/such.jsonl", "format": "math"}, "is neither a file nor a folder"),
        ({"path": str(DATA.parent / "conftest.py"), "format": "math"}, "must end in one of .json"),
        ({"path": MATH, "format": "math", "subset": "algebra"}, "subset of task 't' must be left out"),
        ({"path": MATH, "format": "math", "split": "tset"}, "could not be loaded: Unknown split .tset."),
        ({"path": MATH, "format": "math", "levels": [9]}, r"holds 0 questions for task 't' with levels \[9\]"),
        ({"path": MATH, "format": "math", "levels": ["Level 1"]}, "must be a list of whole numbers"),
        ({"path": MATH, "format": "math", "levels": 3}, "must be a list of whole numbers"),
        ({"path": [MATH, MATH], "format": "math"}, "path of task 't' must be text"),
        ({"path": MATH, "format": "math", "max_rows": -1}, "max_rows of task 't' must be a whole number"),
        ({"path": MATH, "format": "math", "max_rows": 1}, "holds 1 questions"),
        (
            {"path": MATH, "format": "math", "template": "{problm}"},
            r"row 1 has no \{problm\} for the template, only .*problem",
        ),
        ({"path": MATH, "format": "deepscaler"}, "row 1 needs answer, got the columns problem, level, type, solution"),
        ({"path": MATH, "format": "finqa"}, "row 1 needs pre_text"),
        ({"path": MATH, "format": "countdown"}, "row 1 needs nums, .* got None and None"),
        ({"path": MATH, "format": "r1_code"}, "row 1 needs program, input and output, or reward_model"),
        (
            {"path": MATH, "format": "finqa", "skip_bad_rows": True},
            "8 rows were left out, the first because row 1 needs",
        ),
        ({"path": TABLE, "format": "countdown", "levels": [1]}, "levels of task 't' need format math"),
        ({"path": TABLE, "columns": {"prompt": "company", "answer": "net"}}, "needs a verifier"),
        ({"path": TABLE, "columns": {"prompt": "company"}, "verifier": "exact"}, "must name the column of the answer"),
        ({"path": TABLE, "columns": {"answer": "net"}, "verifier": "exact"}, "columns.prompt or a template"),
        ({"path": TABLE, "columns": {"promt": "a", "answer": "net"}, "verifier": "exact"}, "did you mean 'prompt'"),
        (
            {"path": TABLE, "columns": {"prompt": "firm", "answer": "net"}, "verifier": "exact"},
            "row 1 needs firm, got the",
        ),
        (
            {"path": TABLE, "columns": {"answer": "net"}, "template": "{firm}", "verifier": "exact"},
            "row 1 has no {firm}",
        ),
        ({"path": MATH, "format": "math", "config": {}}, "whose source is datasets, must be one of"),
        ({"path": MATH, "format": "math", "verifier": "expression"}, "scores 0"),
    ],
)
def test_a_bad_task_is_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_tasks([{"name": "t", "source": "datasets", **keys}], 0, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"problem": "a"}\nnonsense\n'])
def test_a_file_that_is_no_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"(could not be loaded|holds 0 questions)") as caught:
        build(tmp_path / "a.jsonl", format="math")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_said_within_seconds_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    spec = {"name": "cd", "source": "datasets", "dataset": "Jiayi-Pan/Countdown-Tasks-3to4", "format": "countdown"}
    begun = time.perf_counter()
    with pytest.raises(UserError, match=r"could not be loaded: the Hub cannot be reached .*give path= of a local copy"):
        build_tasks([spec], 0, 1)
    assert time.perf_counter() - begun < 10.0
    assert not datasets.config.HF_HUB_OFFLINE  # and the library is left as it was


def test_out_of_reach_an_earlier_copy_in_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list([{"problem": f"{i}?", "answer": str(i), "solution": ""} for i in range(4)])

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = {"name": "t", "source": "datasets", "dataset": "a/b", "subset": "s", "split": "test", "format": "deepscaler"}
    assert len(build_tasks([spec], 0, 2)[0].held_out) == 2
    assert asked == [("a/b", "s", "test", True)]


def test_fill_replaces_names_and_leaves_other_braces() -> None:
    assert fill("{a} \\boxed{} {1} {b_2}", {"a": "x {b}", "b_2": "y"}) == "x {b} \\boxed{} {1} y"


def test_the_example_preset_builds_and_its_formats_are_all_of_them() -> None:
    values = yaml.safe_load((PRESETS / "datasets_example.yaml").read_text())
    tasks = build_tasks(values["tasks"], 0, values["eval_prompts"])
    assert {spec.get("format", "") for spec in values["tasks"]} == {
        "math",
        "deepscaler",
        "finqa",
        "countdown",
        "r1_code",
        "",
    }
    for task in tasks:
        example = task.next_example()
        assert task.score(example.answer, example) == 1.0 and task.score("none of it", example) == 0.0


def test_every_yaml_example_of_the_guide_builds() -> None:
    """Copied from the page as it stands; names on the Hub are built with the local file that the example names."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
    specs = [spec for block in blocks for spec in yaml.safe_load(block)["tasks"]]
    assert {spec.get("source", "reasoning_gym") for spec in specs} == {
        "reasoning_gym",
        "jsonl",
        "datasets",
        "synthetic",
        "verifiers",
    }
    for spec in specs:
        if spec.get("source") == "verifiers":  # a taskset that nobody has installed
            with pytest.raises(
                UserError, match=r"needs the package verifiers|'my_taskset' of task 'sums' could not be"
            ):
                build_tasks([spec], 0, 2)
        elif "path" in spec or spec.get("source") != "datasets":
            task = build_tasks([spec], 0, 2)[0]
            assert task.score(task.next_example().answer or "x", task.held_out[0]) in (0.0, 1.0)
        else:  # loading is out of reach here: all that comes before it is checked
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
                with pytest.raises(UserError, match="the Hub cannot be reached"):
                    build_tasks([spec], 0, 2)
