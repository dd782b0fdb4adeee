"""Fills page.html with what run.json, the results and the pictures say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..numbers import MISSING, clean, count, duration, fixed, with_error
from ..plots import PALETTE, css_variables
from ..runlog import Run, read_run, whole
from ..summary import ERRORS, MIN_PROMPTS, Cosine, TaskResult, cosines, task_results
from . import charts
from .table import HEADINGS, PROBE_HEADINGS, Row, footnotes, probe_rows, table_rows
from .verdict import probe_title, verdict

_HERE = Path(__file__).parent


def write_report(run_dir: Path | str) -> Path:
    """Write run_dir/report.html: one file that needs no network, with everything that the run's folder holds.

    Arguments: run_dir, the folder of a run, finished or not.
    Returns: the path of the report. It is replaced in one step: a reader never sees half a page.
    Raises: FileNotFoundError or ValueError where the folder is not a readable run.
    """
    run = read_run(run_dir)
    text = render(run)
    target = run.path / "report.html"
    with whole(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def render(run: Run) -> str:
    """The page as text."""
    results = task_results(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = clean
    table = cosines(run, results)
    return environment.get_template("page.html").render(
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
        title=clean(run.path.resolve().name),
        facts=_facts(run),
        notes=[clean(note) for note in run.notes],
        verdict=verdict(run, results, table),
        tables=_tables(run, results),
        results=results,
        min_prompts=MIN_PROMPTS,
        swatch=_swatch,
        pictures=_pictures(run, results) if len(run.steps) else None,
        evaluations=charts.both_widths(lambda w: charts.evaluations(results, w))
        if any(r.base or r.before or r.after for r in results)
        else None,
        given=any(r.base for r in results),
        warm_start=charts.warm_start(run) if np.isfinite(run.warm_start[1]).any() else None,
        warm_start_steps=len(run.warm_start[0]),
        heat=_heat(results, table) if any(math.isfinite(c.value) for c in table.values()) else None,
        settings=list(_flat(run.info.get("config", {}))),
        versions=list(_flat({k: v for k, v in run.info.items() if k not in {"config", "tasks"}})),
    )


def _tables(run: Run, results: list[TaskResult]) -> list[dict[str, Any]]:
    """The table of the run's steps, and that of its final probe if there was one."""

    def table(
        name: str, title: str, headings: tuple[str, ...], rows: list[Row], picture: Markup | None = None
    ) -> dict[str, Any]:
        notes = footnotes([row.result for row in rows], rows)
        return {
            "picture": picture,
            "id": name,
            "title": title,
            "headings": headings,
            "rows": rows,
            "notes": notes,
            "share": headings.index("share\nof pull"),
        }

    when = f", in steps 1 to {len(run.steps)} while training" if run.final_probe else ""
    tables = [table("table", f"The tasks, loudest first{when}", HEADINGS, table_rows(results))]
    if probe := run.final_probe:
        probed = task_results(probe)
        picture = charts.both_widths(lambda w: charts.pooled_pull(probed, w))
        tables.append(table("final-probe", probe_title(probe), PROBE_HEADINGS, probe_rows(probed), picture))
    return tables


def _swatch(result: TaskResult) -> Markup:
    """The task's colour as a small square; striped where the palette has begun again."""
    striped = " striped" if result.index >= len(PALETTE) else ""
    return Markup('<i class="swatch{}" style="--c:var(--task-{})"></i>').format(striped, result.index % len(PALETTE))


def _pictures(run: Run, results: list[TaskResult]) -> dict[str, Any]:
    pooled = any(math.isfinite(r.sq_norm) for r in results)
    drawn = np.isfinite(run.array("sampling_prob")).any()
    return {
        "pooled": charts.both_widths(lambda w: charts.pooled_pull(results, w)) if pooled else None,
        "pull": [(r, with_error(r.sq_norm, r.std_error), charts.pull_panel(run, r)) for r in results],
        "pooled_steps": charts.steps_per_dot(run),
        "reward": [] if run.probe else [(r, charts.reward_panel(run, r)) for r in results],
        "window": charts.reward_window(run),
        "sampling": charts.both_widths(lambda w: charts.sampling(run, results, w)) if drawn else None,
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """The facts under the title: model, duration, device and so on."""
    info, machine = run.info, run.info.get("machine")
    seconds = (run.summary or {}).get("seconds")
    last = run.totals["time"][-1] if len(run.steps) else math.nan
    facts = [
        ("model", info.get("model")),
        ("parameters", count(float(info["parameters"])) if isinstance(info.get("parameters"), (int, float)) else None),
        ("steps", f"{len(run.steps)}" + ("" if run.finished else " so far")),
        ("time", duration(float(seconds) if isinstance(seconds, (int, float)) else float(last))),
        ("tokens", count(float(np.nansum(run.totals["tokens"])))),
        ("tracked layers", len(info["tracked_layers"]) if isinstance(info.get("tracked_layers"), list) else None),
        ("device", machine.get("device") if isinstance(machine, dict) else None),
        ("started", str(info["started"])[:16].replace("T", " ") if info.get("started") else None),
        ("seed", run.config.get("seed")),
    ]
    return [(name, clean(value)) for name, value in facts if value is not None]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, JSON value)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield clean(prefix), clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _heat(
    results: list[TaskResult], table: dict[tuple[str, str], Cosine]
) -> list[tuple[TaskResult, list[dict[str, str]]]]:
    """The heat map's rows: per cell its text, error, class and strength of colour."""
    return [(row, [_cell(row, column, table.get((row.name, column.name))) for column in results]) for row in results]


def _cell(row: TaskResult, column: TaskResult, cosine: Cosine | None) -> dict[str, str]:
    if row is column:
        return {"text": "1", "error": "", "kind": "self", "strength": "0"}
    if cosine is None or math.isnan(cosine.value):
        return {"text": MISSING, "error": "", "kind": "unknown", "strength": "0"}
    sure = cosine.trusted and abs(cosine.value) > ERRORS * cosine.std_error
    return {
        "text": fixed(cosine.value),
        "error": f"± {fixed(cosine.std_error)}" if math.isfinite(cosine.std_error) else "",
        # Colour only what is distinguishable from zero: the wildest values belong to the quietest tasks.
        "kind": ("plus" if cosine.value > 0 else "minus") if sure else "unsure",
        "strength": f"{min(abs(cosine.value), 1.0):.3f}",
    }
