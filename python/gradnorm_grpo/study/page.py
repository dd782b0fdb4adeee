"""The study's page: README.md of its folder, with every answer's verdict, picture and numbers, in GitHub's Markdown.

Everything it says comes from study.json and answers.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..numbers import MISSING, clean, count, duration, significant
from .figures.data import IDS, Record, answer_of, number

_LONG = 12  # rows of a table that are shown unfolded
_MADE = ("reasoning_gym", "synthetic")  # sources of tasks that are made by a program
_VERDICTS = ("supported", "contradicted", "undecided")
#: What means something in Markdown, in HTML, or to GitHub; an underscore does at a word's end only.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&@]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "$": "&#36;"}


def _line(text: object) -> str:
    return " ".join(clean(str(text).replace("\n", " ")).split())


def escape(text: object) -> str:
    """Text of any kind as one line of Markdown that shows it as it is: no markup, cell's end, link or mention."""
    line = _SPECIAL.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), _line(text))
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;")
    # What makes a list, a rule or a heading at a line's start only.
    return re.sub(r"^(\d+(?=[.)])|(?=[-+=:#]))", r"\1\\", line)


def code(text: object) -> str:
    """Text of any kind as a code span that shows it as it is; not for the cells of a table."""
    line = _line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def page(study: Mapping[str, Any], answers: Mapping[str, Any], figures: Iterable[str] | None = None) -> str:
    """The study's README.md.

    Arguments: study, the content of study.json; answers, the content of answers.json; figures, the names (without .svg)
    of the pictures in the folder figures/ beside the page (default: one an answer, and the overview).
    Returns: GitHub-flavoured Markdown.
    """
    drawn = {*IDS, "overview"} if figures is None else set(figures)
    given = [answer_of(answers, name) for name in IDS]
    parts = [
        f"# The study {escape(study.get('name', ''))}".rstrip(),
        _first(answers),
        _picture("overview", "The study in one picture", drawn),
        _facts(study, answers),
        "## Answers\n\n" + _verdicts(given),
        *(_section(answer, drawn) for answer in given),
        "## Runs\n\n" + _runs(answers),
        "## What is not claimed\n\n" + "\n".join(f"- {line}" for line in _limits(study, answers, given)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _first(answers: Record) -> str:
    counts = {v: sum(a.get("verdict") == v for a in answers.get("answers") or []) for v in _VERDICTS}
    known = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    return (
        f"Claims about the gradients of tasks that are trained together, each held against this study's data: {known}."
        if known
        else "No question is answered yet."
    )


def _picture(name: str, label: str, drawn: set[str]) -> str:
    return f"![{escape(label)}](figures/{name}.svg)" if name in drawn else ""


def _facts(study: Record, answers: Record) -> str:
    """One line a fact: what was run, on what, with what command."""
    config = study.get("config") or {}
    arms, seeds = list(study.get("arms") or answers.get("arms") or []), list(study.get("seeds") or [])
    tasks = list(study.get("tasks") or answers.get("tasks") or [])
    finished = len(answers.get("runs") or [])
    missing = [str(m) for m in answers.get("missing") or []]
    facts: list[tuple[str, str]] = [
        ("Model", code(config["model"]) if config.get("model") else ""),
        ("Tasks", f"{len(tasks)}: {', '.join(map(code, tasks))}" if tasks else ""),
        ("Arms and seeds", f"{', '.join(map(code, arms))}, each with {_count(seeds, 'seed')}" if arms else ""),
        ("Runs", f"{finished} finished" + (f"; not finished: {', '.join(map(code, missing))}" if missing else "")),
        ("Training", _training(config)),
        ("Started", escape(study.get("started") or "")),
        ("Time", f"{duration(study['seconds'])} for all runs and the estimators" if study.get("seconds") else ""),
        ("Machine", _machine(study)),
        ("Commit", code(study["commit"]) if study.get("commit") else ""),
        ("Command", code(study["command"]) if study.get("command") else ""),
    ]
    return "\n".join(f"- {name}: {text}" for name, text in facts if text)


def _count(items: Sequence[object], what: str) -> str:
    listed = f" ({', '.join(escape(i) for i in items)})" if items else ""
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}{listed}"


def _training(config: Record) -> str:
    """Steps of a run, and prompts and completions of a step, as far as the settings say."""
    steps, completions = config.get("max_steps"), config.get("num_generations")
    rows, rounds = config.get("per_device_train_batch_size"), config.get("gradient_accumulation_steps", 1)
    texts = []
    if steps:
        texts.append(f"{steps} steps a run")
    if completions and rows and rounds:
        texts.append(f"{rows * rounds // completions} prompts of {completions} completions in each")
    return ", ".join(texts)


def _machine(study: Record) -> str:
    machine, versions = study.get("machine") or {}, study.get("versions") or {}
    shown = [str(machine[key]) for key in ("device", "platform") if machine.get(key)]
    if machine.get("processors"):
        shown.append(f"{machine['processors']} processors")
    shown += [f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if versions.get(name)]
    return escape(", ".join(shown))


def _verdicts(given: Sequence[Record]) -> str:
    rows = [
        (f"[{escape(a.get('question'))}](#{_anchor(a)})", f"**{escape(a.get('verdict'))}**", escape(a.get("sentence")))
        for a in given
    ]
    return _table(("question", "verdict", "what these data say"), rows)


def _anchor(answer: Record) -> str:
    """GitHub's anchor of the answer's heading: lower case, blanks as dashes, nothing but letters, digits, - and _."""
    text = clean(answer.get("question") or "").lower().strip()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _section(answer: Record, drawn: set[str]) -> str:
    name, question = str(answer.get("id")), escape(answer.get("question"))
    parts = [
        f"## {question}",
        f"Claim: {escape(answer['claim'])}" if answer.get("claim") else "",
        f"**{escape(str(answer.get('verdict')).capitalize())}.** {escape(answer.get('sentence') or '')}",
        _picture(name, f"{answer.get('question')} {answer.get('verdict')}", drawn),
        _numbers([n for n in answer.get("numbers") or [] if isinstance(n, Mapping)]),
    ]
    return "\n\n".join(part for part in parts if part)


def _numbers(found: Sequence[Record]) -> str:
    rows = [
        (escape(n.get("name")), _number(number(n, "value"), exact=_exact(n)), _interval(n), escape(n.get("how") or ""))
        for n in found
    ]
    if not rows:
        return ""
    table = _table(("number", "value", "interval", "how"), rows)
    if len(rows) <= _LONG:
        return table
    return f"<details>\n<summary>{len(rows)} numbers</summary>\n\n{table}\n\n</details>"


def _number(value: float, exact: bool = False) -> str:
    """Three digits; all of them where the number is exact."""
    return count(value) if exact and math.isfinite(value) else significant(value, 3)


def _exact(record: Record) -> bool:
    """Whether it is a count: whole, and without the level of an interval."""
    return math.isnan(number(record, "level")) and all(x.is_integer() for x in _known(record))


def _known(record: Record) -> list[float]:
    return [x for x in (number(record, key) for key in ("value", "low", "high")) if math.isfinite(x)]


def _interval(record: Record) -> str:
    low, high, level = number(record, "low"), number(record, "high"), number(record, "level")
    share = f" ({level:.0%})" if math.isfinite(level) else ""
    exact = _exact(record)
    if math.isfinite(low) and math.isfinite(high):
        return f"{_number(low, exact)} to {_number(high, exact)}{share}"
    if math.isfinite(low):
        return f"over {_number(low, exact)}{share}"
    if math.isfinite(high):
        return f"under {_number(high, exact)}{share}"
    return MISSING


def _runs(answers: Record) -> str:
    """A row a run and task in few columns, folded: what the answers are made of."""
    rows = []
    for run in answers.get("runs") or []:
        for task, own in (run.get("tasks") or {}).items():
            values = [number(own, key) for key in ("u", "u_se", "full_u", "eval_first", "eval_last")]
            rows.append((escape(run.get("arm")), escape(run.get("seed")), escape(task), *map(_number, values)))
    if not rows:
        return "No run is finished."
    heads = ("arm", "seed", "task", "U", "its standard error", "U of all parameters", "accuracy before", "after")
    return f"<details>\n<summary>{len(rows)} rows, one a run and task</summary>\n\n{_table(heads, rows)}\n\n</details>"


def _limits(study: Record, answers: Record, given: Sequence[Record]) -> list[str]:
    """What nobody should take from the page."""
    tasks, seeds = len(answers.get("tasks") or []), len(answers.get("seeds") or [])
    model = (study.get("config") or {}).get("model")
    what = f"of the model {code(model)}" if model else "of one model"
    limits = [
        f"All of this is {what}, {tasks} task{'' if tasks == 1 else 's'} and {seeds} seed{'' if seeds == 1 else 's'}. "
        "Whether it holds for larger models, longer training or other tasks is not known from here.",
        _stand_ins(study),
        "Undecided means that these data do not tell: it is no evidence that there is no effect.",
        "Correlations across tasks rest on few tasks, however many runs there are. None of them says what causes what.",
    ]
    limits = [line for line in limits if line]
    if seeds < 2:
        limits.append("With fewer than two seeds nothing is known of how far another seed would differ.")
    undecided = [a for a in given if a.get("verdict") == "undecided"]
    if undecided:
        limits.append("Nothing is claimed on: " + "; ".join(escape(a.get("question")) for a in undecided))
    return limits


def _stand_ins(study: Record) -> str:
    """What the tasks are, when they are made by a program; nothing of tasks whose source is not known."""
    tasks = [t for t in (study.get("config") or {}).get("tasks") or [] if isinstance(t, Mapping)]
    made = [str(t.get("name")) for t in tasks if t.get("source", "reasoning_gym") in _MADE]
    if not made:
        return ""
    which = "All tasks are" if len(made) == len(tasks) else f"{', '.join(map(escape, made))}:"
    return f"{which} made by a program. They stand in for the data sets of the paper (arXiv 2510.19178)."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
