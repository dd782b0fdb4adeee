"""What a run shows while it works: a bar and a live line per task on a terminal, one line per step elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .numbers import clean
from .runlog import Line, task_values


def _number(value: Any, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


class Display:
    """Context manager; call :meth:`show` with every line that is logged."""

    def __init__(self, console: Console, title: str, tasks: Sequence[str], total: int, done: int = 0) -> None:
        self._console, self._tasks, self._title = console, list(tasks), title
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self._id = self._bar.add_task(title, total=total, completed=done)
        self._total = total
        self._latest: dict[str, Line] = {}
        live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(*error)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("task", "reward", "|advantage|", "U", "std. error", "tokens", "draw"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for task in self._tasks:
            line = self._latest.get(task, {})
            table.add_row(clean(task), *(_number(line.get(name), form) for name, form in _COLUMNS))
        return Group(self._bar, table) if self._latest else Group(self._bar)

    def expect(self, total: int) -> None:
        """Take another number of steps for the whole."""
        self._total = total
        self._bar.update(self._id, total=total)

    def show(self, line: Line) -> None:
        """Take in one line of metrics."""
        self._bar.update(self._id, completed=line["step"])
        parts = []
        for task in self._tasks:
            own = task_values(line, task)
            if "reward" in own:
                self._latest[task] = own
                gradient = f" (U {_number(own['grad_norm_sq'], '.1e')})" if "grad_norm_sq" in own else ""
                parts.append(f"{clean(task)} {own['reward']:.2f}{gradient}")
        if not self._live:
            loss = f" loss {_number(line.get('loss'), '.4f')}" if "loss" in line else ""
            text = f"{self._title} {line['step']}/{self._total} {line['time']:6.1f} s{loss} {' '.join(parts)}"
            self._console.print(text, highlight=False, soft_wrap=True)


_COLUMNS = (
    ("reward", ".2f"),
    ("abs_advantage", ".2f"),
    ("grad_norm_sq", ".2e"),
    ("grad_norm_sq_se", ".1e"),
    ("response_length", ".1f"),
    ("sampling_prob", ".2f"),
)
