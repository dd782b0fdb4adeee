"""Tasks from environments of the package `verifiers` (0.4): single-turn ones, scored by their own closed rewards.

A taskset can be used where one reply to one prompt is scored by functions of the reply and the task's data. What needs
tools, a container, a judge or another turn, and what executes the model's text, is refused by name. A reward function
is judged by its source and that of the functions of its package that it calls.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from ..errors import UserError
from .spec import Question, TaskSpec
from .verifiers import Verifier

# Calls and modules by which a reward would execute text, or ask somebody else.
_EXECUTING = {
    *("eval", "exec", "compile", "__import__", "import_module", "parse_expr", "sympify", "lambdify", "system", "popen"),
    *("Popen", "check_output", "check_call", "create_subprocess_exec", "create_subprocess_shell", "run_program"),
}
_OPEN_MODULES = {
    *("subprocess", "os", "importlib", "runpy", "code", "ctypes", "multiprocessing", "docker", "pickle", "marshal"),
    *("socket", "requests", "httpx", "aiohttp", "urllib", "openai", "anthropic", "e2b", "modal", "prime_sandboxes"),
}


def why_open(function: Callable[..., Any]) -> str | None:
    """Why a reward function is not closed: what it uses by which text could be executed or sent; None if it is closed.

    Followed are calls to functions and methods of the same top-level package.
    """
    todo, seen = [inspect.unwrap(function)], set()
    while todo:
        current = todo.pop()
        current = getattr(current, "__func__", current)
        if current in seen:
            continue
        seen.add(current)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(current)))
        except (OSError, TypeError, SyntaxError):
            return f"{getattr(current, '__qualname__', current)} has no source to read"
        if "runtime" in inspect.signature(current).parameters and current is inspect.unwrap(function):
            return "it needs a runtime"
        space = vars(sys.modules[current.__module__])
        package = current.__module__.partition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
                imported = [*names, *(item.name for item in node.names)]
                if found := next((n for n in imported if n.partition(".")[0] in _OPEN_MODULES | _EXECUTING), None):
                    return f"it imports {found}"
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name is None:
                continue
            if name in _EXECUTING:
                return f"it uses {name}"
            value = space.get(name) if isinstance(node, ast.Name) else None
            if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _OPEN_MODULES:
                return f"it uses the module {value.__name__}"
            if getattr(value, "__module__", "").partition(".")[0] in _OPEN_MODULES or (
                getattr(value, "__name__", "") in _EXECUTING and callable(value)
            ):
                return f"it uses {name}"
            if isinstance(node, ast.Attribute):
                value = _method(current, space, name)
            if isinstance(value, FunctionType) and value.__module__.partition(".")[0] == package:
                todo.append(value)
    return None


def _method(function: Any, space: dict[str, Any], name: str) -> Any:
    """The function that an attribute of this name may be: of the function's own class, or of a module it uses."""
    owner = space.get(function.__qualname__.partition(".")[0])
    if inspect.isclass(owner) and hasattr(owner, name):
        return inspect.unwrap(getattr(owner, name))
    package = function.__module__.partition(".")[0]
    own = (value for value in space.values() if isinstance(value, ModuleType) and value.__name__.startswith(package))
    return next((found for module in own if (found := getattr(module, name, None)) is not None), None)


def read_environment(spec: TaskSpec) -> tuple[list[Question], Verifier]:
    """The questions of an installed taskset, and the verifier that its own rewards make.

    Args:
        spec: ``dataset`` is the taskset's id, ``config`` its settings, ``columns: {answer: FIELD}`` the field of a
            task's data that holds a reference answer, ``max_rows`` how many tasks to take.

    Raises:
        UserError: where the package or the taskset is missing, its config does not fit, or it cannot be used here.
    """
    try:
        import verifiers.v1 as vf
        from verifiers.v1.utils import loaders
    except ImportError as error:
        raise UserError(
            f"task {spec.name!r} needs the package verifiers, which cannot be imported ({error}): run "
            "`pip install 'verifiers>=0.4'` with Python 3.11 or newer"
        ) from error
    name = spec.dataset or spec.name
    try:
        kind = loaders.taskset_class(name)
        taskset = kind(loaders.taskset_config_type(name).model_validate({**spec.config, "id": name}))
        own_environment = loaders.environment_class(name) is not vf.SingleAgentEnv
        own_harness = loaders.default_harness_id(name) == name
        if taskset.INFINITE and not spec.max_rows:
            raise UserError(f"task {spec.name!r}: the taskset {name!r} never ends; give max_rows, the tasks to take")
        tasks = list(itertools.islice(taskset, spec.max_rows or None))
    except UserError:
        raise
    except Exception as error:  # a missing package, a config that does not fit, a download: each with errors of its own
        raise UserError(f"the taskset {name!r} of task {spec.name!r} could not be loaded: {_first(error)}") from error
    if len(tasks) < 2:
        raise UserError(f"the taskset {name!r} of task {spec.name!r} holds {len(tasks)} tasks: at least 2 are needed")
    reason = (
        "it brings an environment of its own"
        if own_environment
        else "it brings a harness of its own"
        if own_harness
        else "it serves tools"
        if kind.toolsets(taskset.config)
        else _why_not(vf, tasks[0], rewards=not spec.verifier)
    )
    if reason:
        raise UserError(
            f"the taskset {name!r} of task {spec.name!r} cannot be used here: {reason}. Allowed are tasks of one "
            "prompt and one reply, scored by functions of the reply that execute and ask nothing; for another reward "
            "name a verifier, and the field of the reference answer as columns: {answer: FIELD}"
        )
    return [_question(vf, spec, task) for task in tasks], _verifier(vf)


def _why_not(vf: Any, task: Any, rewards: bool) -> str | None:
    """Why a task needs more than a prompt, a reply and closed rewards; None if it does not."""
    kind, data = type(task), task.data
    if kind.NEEDS_CONTAINER or data.image or data.workdir or data.artifacts or data.skills:
        return "its tasks run in a container"
    if kind.toolsets(task.config):
        return "its tasks serve tools"
    for hook in ("setup", "finalize", "stage_verifier", "score"):
        if getattr(kind, hook) is not getattr(vf.Task, hook):
            return f"its tasks have a step {hook} of their own"
    if not rewards:
        return None
    if task.config.judges:
        return "its tasks are scored by a judge, another model"
    functions = task.hooks("reward")
    if not functions:
        return "its tasks have no reward"
    for function in functions:
        if reason := why_open(function):
            return f"its reward {function.__name__} may execute text or ask somebody else ({reason})"
    return None


def _question(vf: Any, spec: TaskSpec, task: Any) -> Question:
    messages = [vf.UserMessage(content=task.data.prompt)] if isinstance(task.data.prompt, str) else task.data.prompt
    turns = [message for message in messages or [] if message.role != "system"]
    if len(turns) != 1 or turns[0].role != "user" or not all(isinstance(m.content, str) for m in messages):
        raise UserError(
            f"task {spec.name!r}: task {task.data.idx} of the taskset is no single prompt of text: "
            f"{[message.role for message in messages or []]}"
        )
    system = [task.data.system_prompt or "", *(message.content for message in messages if message.role == "system")]
    prompt = "\n\n".join(text for text in [*system, turns[0].content] if text)
    field = spec.columns.get("answer")
    if field and not hasattr(task.data, field):
        raise UserError(
            f"columns.answer of task {spec.name!r}, {field!r}, is no field of the taskset's data: "
            f"{', '.join(sorted(type(task.data).model_fields))}"
        )
    return prompt, str(getattr(task.data, field)) if field else "", {"task": task}


def _verifier(vf: Any) -> Verifier:
    from verifiers.v1.graph import MessageNode

    def score(text: str, answer: str, data: dict[str, Any]) -> bool:
        """The weighted sum of the task's rewards, at least 0.99 of what full marks give."""
        task = data["task"]
        nodes = [
            MessageNode(message=vf.UserMessage(content=task.data.prompt_text)),
            MessageNode(parent=0, message=vf.AssistantMessage(content=text), sampled=True),
        ]
        record = vf.TraceTask(type=type(task).__name__, data=task.data)
        agent = vf.AgentInfo(config=vf.AgentConfig())
        trace = vf.Trace(task=record, agent=agent, nodes=nodes, is_completed=True, ok=True)
        try:
            asyncio.run(task.score(trace))
        except Exception:  # a reward is free to stumble over arbitrary text
            return False
        rewards = list(trace.rewards.values())
        if not rewards or any(reward is None for reward in rewards):
            return False
        best = sum(max(reward.weight, 0.0) for reward in rewards)
        return best > 0.0 and sum(reward.value for reward in rewards) >= 0.99 * best

    return score


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
