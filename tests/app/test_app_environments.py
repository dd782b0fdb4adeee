"""Tasks from environments of the package `verifiers`: what is used, what is refused, and by which reason."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.tasks import Task, build_tasks
from gradnorm_grpo.tasks.environments import why_open

CLOSED = """
import re

def number(text):
    found = re.findall(r"-?[0-9]+", text)
    return found[-1] if found else None

def right(reply, answer):
    return float(number(reply) == str(answer))

class Score:
    def reward(self, reply, answer):
        return self.half(reply) + right(reply, answer)

    def half(self, reply):
        return 0.5 * bool(number(reply))
"""
OPEN = {
    "eval": "def reward(reply):\n    return float(eval(reply))",
    "exec": "def reward(reply):\n    exec(reply)\n    return 1.0",
    "an alias of eval": "run = eval\ndef reward(reply):\n    return run(reply)",
    "eval in a helper": "def helper(text):\n    return eval(text)\ndef reward(reply):\n    return helper(reply)",
    "eval two calls away": (
        "def inner(text):\n    return eval(text)\ndef outer(text):\n    return inner(text)\ndef reward(reply):\n"
        "    return outer(reply)"
    ),
    "eval in a method": (
        "class Score:\n    def reward(self, reply):\n        return self.value(reply)\n"
        "    def value(self, reply):\n        return eval(reply)\nreward = Score().reward"
    ),
    "a subprocess": "import subprocess\ndef reward(reply):\n    return subprocess.run(reply, shell=True).returncode",
    "a name from subprocess": "from subprocess import run\ndef reward(reply):\n    return run(reply).returncode",
    "an import inside": "def reward(reply):\n    import subprocess as s\n    return s.run(reply).returncode",
    "a from-import inside": "def reward(reply):\n    from os import system as s\n    return s(reply)",
    "os.system": "import os\ndef reward(reply):\n    return os.system(reply)",
    "sympy": "from sympy import sympify\ndef reward(reply):\n    return float(sympify(reply))",
    "parse_expr": "import sympy\ndef reward(reply):\n    return sympy.parsing.sympy_parser.parse_expr(reply)",
    "the network": "import urllib.request\ndef reward(reply):\n    return urllib.request.urlopen(reply)",
    "a runtime": "def reward(reply, runtime):\n    return 1.0",
    "no source": "reward = len",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes and imports a module of its own name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(name: str, source: str) -> Any:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        made.append(name)
        return importlib.import_module(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_a_closed_reward_is_closed(module: Any) -> None:
    closed = module("closed_rewards", CLOSED)
    assert why_open(closed.right) is None and why_open(closed.Score().reward) is None


@pytest.mark.parametrize("name", OPEN)
def test_a_reward_that_may_execute_or_ask_is_open(module: Any, name: str) -> None:
    found = module(f"open_{list(OPEN).index(name)}", OPEN[name])
    assert why_open(found.reward)


def test_without_the_package_the_task_says_what_to_install() -> None:
    """In a process where it cannot be imported, whether it is installed here or not."""
    code = (
        "import sys; sys.modules['verifiers'] = None\n"
        "from gradnorm_grpo.errors import UserError\nfrom gradnorm_grpo.tasks import build_tasks\n"
        "try:\n    build_tasks([{'name': 'sums', 'source': 'verifiers'}], 0, 1)\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert "task 'sums' needs the package verifiers" in done.stdout and "pip install 'verifiers>=0.4'" in done.stdout


def _environment() -> dict[str, str]:
    import os

    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"verifier": "numeric"}, "needs the field of the reference answer"),
        ({"columns": {"prompt": "a"}}, "may name the field of the answer alone"),
        ({"max_rows": -1}, "max_rows of task 'sums' must be a whole number"),
        ({"template": "x"}, "whose source is verifiers, must be one of"),
        ({"path": "x"}, "whose source is verifiers, must be one of"),
    ],
)
def test_a_bad_entry_is_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tasks([{"name": "sums", "source": "verifiers", **keys}], 0, 1)


# With the package itself

TASKSET = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str = ""

class SumTask(vf.Task[SumData]):
    @vf.reward(weight=1.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply.split()[-1:] == [self.data.answer])
    {more}

class SumsConfig(vf.TasksetConfig):
    count: int = 12

class Sums(vf.Taskset[SumTask, SumsConfig]):
    {taskset}
    def load(self):
        for i in range(self.config.count):
            yield SumTask(SumData(prompt={prompt}, answer=str(i + 1){data}), self.config.task)

__all__ = ["Sums"]
"""


PROMPT = "f'{i} + 1?'"


def taskset(module: Any, name: str, more: str = "", taskset: str = "", prompt: str = PROMPT, data: str = "") -> str:
    pytest.importorskip("verifiers.v1", reason="the package verifiers is not installed")
    module(name, TASKSET.format(more=more, taskset=taskset, prompt=prompt, data=data))
    return name


def build(name: str, **keys: Any) -> Task:
    return build_tasks([{"name": "sums", "source": "verifiers", "dataset": name, **keys}], 0, 3)[0]


def test_a_taskset_is_scored_by_its_own_reward(module: Any) -> None:
    task = build(taskset(module, "vf_sums"), columns={"answer": "answer"})
    assert len(task.held_out) == 3
    drawn = [task.next_example() for _ in range(18)]
    assert {e.question for e in drawn} | {e.question for e in task.held_out} == {f"{i} + 1?" for i in range(12)}
    assert not {e.question for e in drawn} & {e.question for e in task.held_out}
    for example in drawn:
        assert task.score(f"it is {example.answer}", example) == 1.0
        assert task.score(f"{example.answer} or not", example) == 0.0 and task.score("", example) == 0.0


def test_rewards_are_binary_at_full_marks(module: Any) -> None:
    more = """
    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 4)
    """
    task = build(taskset(module, "vf_weighted", more), columns={"answer": "answer"})
    example = task.solved_examples(1)[0]
    assert task.score(example.answer, example) == 1.0 and task.score(f"it is {example.answer}", example) == 0.0


def test_without_a_field_for_the_answer_there_are_no_solved_examples(module: Any) -> None:
    task = build(taskset(module, "vf_unsolved"), config={"count": 6}, max_rows=5)
    assert len({task.next_example().question for _ in range(20)}) + len(task.held_out) == 5
    with pytest.raises(UserError, match=r"no reference answers, .*columns: \{answer: FIELD\}"):
        task.solved_examples(1)


def test_a_named_verifier_takes_the_place_of_an_open_reward(module: Any) -> None:
    more = """
    @vf.reward
    async def run(self, trace) -> float:
        return float(eval(trace.last_reply) == int(self.data.answer))
    """
    name = taskset(module, "vf_open", more)
    with pytest.raises(UserError, match=r"its reward run may execute text .*it uses eval"):
        build(name)
    task = build(name, verifier="numeric", columns={"answer": "answer"})
    example = task.solved_examples(1)[0]
    assert task.score(f"**{example.answer}**", example) == 1.0 and task.score("__import__('os')", example) == 0.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"more": "NEEDS_CONTAINER = True"}, "its tasks run in a container"),
        ({"data": ", image='python:3'"}, "its tasks run in a container"),
        ({"more": "async def setup(self, trace, runtime):\n        pass"}, "a step setup of their own"),
        ({"more": "async def finalize(self, trace, runtime):\n        pass"}, "a step finalize of their own"),
        ({"more": "right = None"}, "its tasks have no reward"),
        ({"more": "@classmethod\n    def toolsets(cls, config):\n        return [1]"}, "its tasks serve tools"),
        ({"taskset": "@classmethod\n    def toolsets(cls, config):\n        return [1]\n"}, "it serves tools"),
        ({"taskset": "INFINITE = True"}, "never ends; give max_rows"),
        (
            {"prompt": "[vf.UserMessage(content='a'), vf.AssistantMessage(content='b'), vf.UserMessage(content='c')]"},
            "is no single prompt of text",
        ),
        ({"prompt": "None"}, "is no single prompt of text"),
    ],
)
def test_what_is_not_one_prompt_and_one_reply_is_refused(module: Any, keys: dict[str, str], message: str) -> None:
    name = taskset(module, f"vf_refused_{abs(hash(str(keys)))}", **keys)
    with pytest.raises(UserError, match=message):
        build(name)


def test_a_missing_taskset_a_wrong_config_and_a_wrong_field_are_named(module: Any) -> None:
    name = taskset(module, "vf_config")
    with pytest.raises(UserError, match="the taskset 'vf_nowhere' of task 'sums' could not be loaded"):
        build("vf_nowhere")
    with pytest.raises(UserError, match="could not be loaded: .*count"):
        build(name, config={"count": "many"})
    with pytest.raises(UserError, match="'reply', is no field of the taskset's data: .*answer"):
        build(name, columns={"answer": "reply"})
