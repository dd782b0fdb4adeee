"""The final table: its cells and footnotes, for the terminal and the page, and the terminal's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..numbers import MISSING, clean, count, fixed, percent, signed, significant, with_error
from ..runlog import read_run
from ..summary import MIN_PROMPTS, TaskResult, few_with_gradient, task_results
from .verdict import imbalance_sentence, probe_title

UNRESOLVED = "≈0"

HEADINGS = (
    "task",
    "n",
    "U ± se",
    "plug-in",
    "noise\nscale",
    "share\nof pull",
    "reward, first\n→ last third",
    "gain",
    "eval (given →)\nbefore → after",
)
#: Of the table of a final probe: one time, fixed weights, so there is neither a change of rewards nor a gain.
PROBE_HEADINGS = ("task", "n", "with a\ngradient", "U ± se", "plug-in", "noise\nscale", "share\nof pull", "reward")
# A terminal narrower than this gets two tables, the first about the pull, the second about rewards.
_WHOLE = 120
_COLUMNS = [(0, 1, 2, 3, 4, 5), (0, 6, 7, 8)]
_PROBE_WHOLE = 100
_PROBE_COLUMNS = [(0, 1, 2, 3, 4), (0, 5, 6, 7)]


@dataclass(frozen=True)
class Row:
    """One task's cells as text, in the order of HEADINGS or PROBE_HEADINGS."""

    result: TaskResult
    cells: tuple[str, ...]

    @property
    def undecided(self) -> bool:
        """Whether U is known but not distinguishable from zero."""
        return math.isfinite(self.result.sq_norm) and not self.result.resolved


def _change(first: float, last: float) -> str:
    if math.isnan(first) and math.isnan(last):
        return MISSING
    return f"{fixed(first)} → {fixed(last)}"


def _evaluations(result: TaskResult) -> str:
    """Held-out reward before and after GRPO, and in front of them that of the model as given if it was warm-started."""
    change = _change(*(point.reward if point else math.nan for point in (result.before, result.after)))
    return f"{fixed(result.base.reward)} → {change}" if result.base and change != MISSING else change


def _pull(r: TaskResult) -> tuple[str, ...]:
    """U with its error, the plug-in estimate, the noise scale and the share of the pull."""
    return (
        with_error(r.sq_norm, r.std_error) + (f" {UNRESOLVED}" if math.isfinite(r.sq_norm) and not r.resolved else ""),
        significant(r.plug_in),
        significant(r.noise_scale) if r.resolved else MISSING,  # a ratio to what may be zero has no meaning
        percent(r.pull_share),
    )


def table_rows(results: list[TaskResult]) -> list[Row]:
    """The table's rows, in the order of the results."""
    return [
        Row(
            r,
            (
                clean(r.name),
                count(r.n),
                *_pull(r),
                _change(r.reward_first, r.reward_last),
                signed(r.gain, 3),
                _evaluations(r),
            ),
        )
        for r in results
    ]


def probe_rows(results: list[TaskResult]) -> list[Row]:
    """The rows of the table of a final probe, in the order of the results."""
    return [Row(r, (clean(r.name), count(r.n), count(r.n_effective), *_pull(r), fixed(r.reward_last))) for r in results]


def footnotes(results: list[TaskResult], rows: list[Row] | None = None) -> list[str]:
    """One sentence for each mark that the table uses; ``rows``: the table's, if not :func:`table_rows`."""
    notes, rows = [], table_rows(results) if rows is None else rows
    if any(math.isfinite(r.sq_norm) and not r.resolved for r in results):
        notes.append(
            f"{UNRESOLVED}: U is not distinguishable from zero (it is less than two standard errors above zero, or its "
            f"standard error is unknown or comes from fewer than {MIN_PROMPTS} prompts). A negative U is noise around "
            "a small value and is printed as it is. The share of pull of such a task is as uncertain as its U. Its "
            "noise scale, a ratio to what may be zero, is left out."
        )
    notes += [
        f"{clean(r.name)}: {r.caution}, so the standard error of its U means little." for r in results if r.caution
    ]
    notes += few_with_gradient(results)
    if any(math.isnan(r.sq_norm) for r in results):
        notes.append(f"{MISSING} for U: no step drew two prompts of the task (n < 2), so U is not defined.")
    if any(MISSING in cell for row in rows for cell in row.cells[1:] if math.isfinite(row.result.sq_norm)):
        notes.append(f"{MISSING}: not measured, or not defined (a standard error takes at least three prompts).")
    return notes


def print_table(run_dir: Path | str, console: Console | None = None) -> None:
    """Print the final table of a run, loudest task first, its footnotes and a line on the imbalance.

    Arguments: run_dir, the folder of a run, finished or not; console, where to print (default: standard output).
    Raises: FileNotFoundError or ValueError where the folder is not a readable run.
    """
    run = read_run(run_dir)
    results = task_results(run)
    console = console or Console()
    rows = table_rows(results)
    name, steps = clean(run.path.resolve().name), len(run.steps)
    when = f", measured in steps 1 to {steps} while the weights changed" if run.final_probe and steps else ""
    console.print(Text(f"{name}: {steps} steps{when}", style="bold"))
    for columns in _COLUMNS if console.width < _WHOLE else [tuple(range(len(HEADINGS)))]:
        console.print(_table([HEADINGS[i] for i in columns], rows, columns))
    for line in (*footnotes(results), imbalance_sentence(results)):
        console.print(Text(line))
    if run.final_probe:
        probed = task_results(run.final_probe)
        measured = probe_rows(probed)
        console.print(Text(probe_title(run.final_probe), style="bold"))
        for columns in _PROBE_COLUMNS if console.width < _PROBE_WHOLE else [tuple(range(len(PROBE_HEADINGS)))]:
            console.print(_table([PROBE_HEADINGS[i] for i in columns], measured, columns))
        shown = footnotes(results)
        for line in (*(note for note in footnotes(probed, measured) if note not in shown), imbalance_sentence(probed)):
            console.print(Text(line))
    for line in run.notes:
        console.print(Text(line))


def _table(headings: Sequence[str], rows: list[Row], columns: Iterable[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        # Only a name may be broken over lines: half a number can be misread.
        table.add_column(heading, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for row in rows:
        # Text, not str: a task called [red] must not be read as markup.
        table.add_row(*(Text(row.cells[i]) for i in columns), style="dim" if row.undecided else None)
    return table
