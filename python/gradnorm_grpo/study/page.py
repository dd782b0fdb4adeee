"""The study's page: README.md of its folder, with every answer's verdict, figure and numbers, in GitHub's Markdown.

Everything it says comes from study.json and answers.json; page.md.j2 has its form. Whatever the template prints is
escaped, except what is :class:`Markup` already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..numbers import MISSING, clean, count, duration, significant
from .figures import OVERVIEW
from .questions import QUESTIONS, asked
from .questions.common import VERDICTS, count_of
from .questions.reading import Answers, Reading, Row, reading
from .spec import FrozenSettings

_GENERATED = ("reasoning_gym", "synthetic")  # sources of tasks that are made by a program
#: What means something in Markdown, in HTML, or to GitHub; an underscore does at a word's end only.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&@]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "$": "&#36;"}


def _line(text: object) -> str:
    return " ".join(clean(str(text).replace("\n", " ")).split())


def escape(text: object) -> Markup:
    """Text of any kind as one line of Markdown that shows it as it is: no markup, cell's end, link or mention."""
    line = _SPECIAL.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), _line(text))
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;")
    # What makes a list, a rule or a heading at a line's start only.
    return Markup(re.sub(r"^(\d+(?=[.)])|(?=[-+=:#]))", r"\1\\", line))


def code(text: object) -> Markup:
    """Text of any kind as a code span that shows it as it is; not for the cells of a table."""
    line = _line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return Markup(f"{fence}{pad}{line}{pad}{fence}")


def page(study: Mapping[str, Any], answers: Mapping[str, Any], figures: Iterable[str] | None = None) -> str:
    """The page's Markdown.

    Arguments: study, the content of study.json; answers, that of answers.json; figures, the names of the pictures that
    exist in the folder figures/ (all by default).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
    )
    environment.filters |= {"anchor": _anchor, "rows": _rows, "plain": Markup}
    questions = asked(answers)
    given = [reading(answers, name) for name in questions]
    return environment.get_template("page.md.j2").render(
        name=study.get("name", ""),
        first=_first(answers),
        drawn={*questions, *(["overview"] if questions.keys() >= set(OVERVIEW) else [])}
        if figures is None
        else set(figures),
        facts=_facts(study, answers),
        answers=given,
        runs=_runs(answers),
        limits=_limits(study, answers, given),
    )


def _first(answers: Answers) -> Markup:
    counts = {v: sum(a.get("verdict") == v for a in answers.get("answers") or []) for v in VERDICTS}
    known = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    if not known:
        return Markup("No question is answered yet.")
    return Markup(
        f"Claims about the gradients of tasks that are trained together, each held against this study's data: {known}."
    )


def _facts(study: Mapping[str, Any], answers: Answers) -> list[tuple[str, Markup]]:
    """What was run, on what, with what command; facts that are not known are left out."""
    config = study.get("config") or {}
    arms, seeds = list(study.get("arms") or answers.get("arms") or []), list(study.get("seeds") or [])
    tasks = list(study.get("tasks") or answers.get("tasks") or [])
    missing = [str(m) for m in answers.get("missing") or []]
    runs = f"{len(answers.get('runs') or [])} finished"
    facts = [
        ("Model", code(config["model"]) if config.get("model") else ""),
        ("Tasks", f"{len(tasks)}: {', '.join(map(code, tasks))}" if tasks else ""),
        ("Arms and seeds", f"{', '.join(map(code, arms))}, each with {_seeds(seeds)}" if arms else ""),
        ("Runs", runs + (f"; not finished: {', '.join(map(code, missing))}" if missing else "")),
        ("Training", _training(config)) if study.get("frozen") is None else ("Rounds", _rounds(study["frozen"])),
        ("Started", escape(study.get("started") or "")),
        ("Time", f"{duration(study['seconds'])} for all runs and the estimators" if study.get("seconds") else ""),
        ("Machine", _machine(study)),
        ("Commit", code(study["commit"]) if study.get("commit") else ""),
        *(
            ("Earlier runs", f"commit {code(own.get('commit') or 'not known')}, {_machine(own)}")
            for own in study.get("earlier") or []
        ),
        ("Command", code(study["command"]) if study.get("command") else ""),
    ]
    return [(name, Markup(text)) for name, text in facts if text]


def _seeds(seeds: Sequence[object]) -> str:
    listed = f" ({', '.join(map(escape, seeds))})" if seeds else ""
    return f"{count_of(len(seeds), 'seed')}{listed}"


def _training(config: Mapping[str, Any]) -> str:
    """Steps of a run, and prompts and completions of a step, as far as the settings say."""
    steps, completions = config.get("max_steps"), config.get("num_generations")
    rows, rounds = config.get("per_device_train_batch_size"), config.get("gradient_accumulation_steps", 1)
    texts = []
    if steps:
        texts.append(f"{steps} steps a run")
    if completions and rows and rounds:
        texts.append(f"{rows * rounds // completions} prompts of {completions} completions in each")
    return ", ".join(texts)


def _rounds(block: Mapping[str, Any]) -> str:
    """What a run measures at fixed weights."""
    options = FrozenSettings.read(block)
    layers = ["the last attention block", *map(str, options.proxies)]
    text = f"{options.steps} a run at fixed weights, {options.prompts} prompts of every task in each; "
    whole = f"; all parameters in the first {options.full_steps}" if options.full_steps else ""
    return f"{text}layers: {', '.join(map(escape, layers))}{whole}"


def _machine(study: Mapping[str, Any]) -> str:
    machine, versions = study.get("machine") or {}, study.get("versions") or {}
    shown = [str(machine[key]) for key in ("device", "platform") if machine.get(key)]
    if machine.get("processors"):
        shown.append(f"{machine['processors']} processors")
    shown += [f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if versions.get(name)]
    return escape(", ".join(shown))


def _anchor(question: object) -> Markup:
    """GitHub's anchor of a heading: lower case, blanks as dashes, nothing but letters, digits, - and _."""
    text = clean(question or "").lower().strip()
    return Markup(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))


def _rows(answer: Reading) -> list[tuple[object, ...]]:
    """The cells of an answer's table of numbers."""
    return [(n["name"], _number(n["value"], _exact(n)), _interval(n), n.get("how") or "") for n in answer.numbers]


def _number(value: float, exact: bool = False) -> Markup:
    """Three digits; all of them where the number is exact."""
    return Markup(count(value) if exact and math.isfinite(value) else significant(value, 3))


def _exact(row: Row) -> bool:
    """Whether it is a count: whole, and without the level of an interval."""
    return math.isnan(row["level"]) and all(float(x).is_integer() for x in row.interval() if math.isfinite(x))


def _interval(row: Row) -> Markup:
    _, low, high = row.interval()
    ends = " to ".join(_number(end, _exact(row)) for end in (low, high) if math.isfinite(end))
    if not ends:
        return Markup(MISSING)
    bound = "over " if not math.isfinite(high) else "under " if not math.isfinite(low) else ""
    return Markup(bound + ends + (f" ({row['level']:.0%})" if math.isfinite(row["level"]) else ""))


def _runs(answers: Answers) -> list[tuple[object, ...]]:
    """A row per run and task in few columns: what the answers are made of."""
    keys = ("u", "u_se", "full_u", "eval_first", "eval_last")
    return [
        (run["arm"], run["seed"], task, *(_number(Row(own)[key]) for key in keys))
        for run in answers.get("runs") or []
        for task, own in run["tasks"].items()
    ]


def _limits(study: Mapping[str, Any], answers: Answers, given: Sequence[Reading]) -> list[Markup]:
    """What nobody should take from the page."""
    tasks, seeds = len(answers.get("tasks") or []), len(answers.get("seeds") or [])
    model = (study.get("config") or {}).get("model")
    what = f"of the model {code(model)}" if model else "of one model"
    limits = [
        f"All of this is {what}, {count_of(tasks, 'task')} and {count_of(seeds, 'seed')}. "
        "Whether it holds for larger models, longer training or other tasks is not known from here.",
        _stand_ins(study),
        "Undecided means that these data do not tell: it is no evidence that there is no effect.",
        "Correlations across tasks rest on few tasks, however many runs there are. None of them says what causes what.",
    ]
    here = [study.get(key) for key in ("machine", "versions")]
    if any([own.get(key) for key in ("machine", "versions")] != here for own in study.get("earlier") or []):
        limits.append(
            "Some runs were made on another machine or with other versions, where the same seed may begin from other "
            "weights: arms are paired by seed, but such pairs share no more than their questions."
        )
    if seeds < 2:
        limits.append("With fewer than two seeds nothing is known of how far another seed would differ.")
    undecided = [escape(a.question) for a in given if a.verdict == "undecided"]
    if others := [QUESTIONS[name].QUESTION for name in answers.get("not_asked") or () if name in QUESTIONS]:
        limits.append(f"This study was not made to answer: {'; '.join(map(escape, others))}")
    if undecided:
        limits.append(f"Nothing is claimed on: {'; '.join(undecided)}")
    return [Markup(limit) for limit in limits if limit]


def _stand_ins(study: Mapping[str, Any]) -> str:
    """What the tasks are, when they are made by a program; nothing of tasks whose source is not known."""
    tasks = [t for t in (study.get("config") or {}).get("tasks") or [] if isinstance(t, Mapping)]
    made = [str(t.get("name")) for t in tasks if t.get("source", "reasoning_gym") in _GENERATED]
    if not made:
        return ""
    which = "All tasks are" if len(made) == len(tasks) else f"{', '.join(map(escape, made))}:"
    return f"{which} made by a program. They stand in for the data sets of the paper (arXiv 2510.19178)."
