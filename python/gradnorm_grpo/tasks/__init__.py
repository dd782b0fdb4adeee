"""Tasks: where questions come from, which are held out, and how an answer is scored.

spec reads an entry of `tasks:`, sources turn it into a stream of questions, formats know the columns of published data
sets, verifiers score, and task puts them together.
"""

from .spec import Example, TaskSpec
from .task import Task, build_tasks

__all__ = ["Example", "Task", "TaskSpec", "build_tasks"]
