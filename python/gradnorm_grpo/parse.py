"""From a command line and a YAML file to Settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from .errors import Parser, UserError, all_of, one_of
from .runlog import RUN_FILE, check_names, read_info
from .settings import Settings
from .study.spec import (
    CostSettings,
    FrozenSettings,
    IntervalSettings,
    StudySpec,
    read_spec,
    take_options,
)

PRESETS = Path(__file__).resolve().parent.parent / "configs"


def _parser() -> Parser:
    """An option per setting, in both spellings; options not given stay out of the result. Settings checks values."""
    parser = Parser(prog="train_grpo.py", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)

    def add(name: str, *aliases: str, **more: Any) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), *aliases, **more)

    for spec in dataclasses.fields(Settings):
        kind = str(spec.type)
        if kind == "bool":
            add(spec.name, nargs="?", const=True)
            if spec.default is True:
                add(f"no_{spec.name}", dest=spec.name, action="store_false")
        elif spec.name != "tasks":  # a list of mappings is for YAML
            add(spec.name, *spec.metadata["aliases"], dest=spec.name, nargs="+" if kind.startswith("list") else None)
    return parser


def preset_names() -> list[str]:
    """The presets that ship with the application."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_settings(arguments: list[str]) -> tuple[Settings, str]:
    """Settings and the run's name: the defaults, then the YAML file (or a resumed run's settings), then the options.

    ``--preset NAME`` is ``--config`` of the file of that name among the presets. Its block `study:` is left to
    :func:`parse_study`. With `--resume PATH` and neither of the two, the settings are those the run was started with.
    """
    rest, config = _take_config(arguments)
    given = _options(rest)
    values = read_yaml(config) if config else _saved(given)
    values.pop("study", None)
    return _settings(values, given, config), config.stem if config else "run"


def parse_study(arguments: list[str]) -> tuple[Settings, StudySpec, str]:
    """The settings that all runs of a study share, the study, and its name.

    `study: settings:` overrides the preset's own settings, and the options override both.
    """
    given, rest = take_options(arguments)
    settings, spec, name = _shared(rest, given, "a study")
    if settings.plan_minutes:
        raise UserError(
            f"plan_minutes={settings.plan_minutes:g} gives every run a length of its own, so that the runs of a study "
            "could not be compared: set it to 0, on the command line or under `study: settings:`"
        )
    return settings, spec, name


def parse_estimators(arguments: list[str]) -> tuple[Settings, dict[str, Any], str]:
    """The settings whose rollouts are stored, the block `study: estimators:`, and the name."""
    settings, spec, name = _shared(arguments, {}, "estimators")
    return settings, spec.estimators, name


def parse_frozen(arguments: list[str]) -> tuple[Settings, FrozenSettings]:
    """The settings of a run at fixed weights, whose folder must be named, and the block `study: frozen:`."""
    settings, spec, _ = _shared(arguments, {}, "frozen")
    if not settings.output_dir:
        raise UserError("frozen needs output_dir, the folder of its run; `study --frozen` names one")
    return settings, FrozenSettings.read(spec.frozen or {})


def parse_intervals(arguments: list[str]) -> tuple[Settings, IntervalSettings, list[int], str]:
    """The settings whose rollouts are stored, the block `study: intervals:`, the seeds, and the name."""
    given, rest = take_options(arguments)
    settings, spec, name = _shared(rest, given, "intervals")
    return settings, IntervalSettings.read(spec.intervals), spec.seeds, name


def parse_lags(arguments: list[str]) -> tuple[Settings, list[int], str]:
    """The settings of the runs whose steps are compared, the seeds, and the name."""
    given, rest = take_options(arguments)
    settings, spec, name = _shared(rest, given, "lags")
    return settings, spec.seeds, name


def parse_cost(arguments: list[str]) -> tuple[Settings, CostSettings, list[int], str]:
    """The settings whose steps are measured, the block `study: cost:`, the seeds, and the name."""
    given, rest = take_options(arguments)
    settings, spec, name = _shared(rest, given, "cost")
    return settings, CostSettings.read(spec.cost), spec.seeds, name


def _shared(arguments: list[str], given: dict[str, Any], who: str) -> tuple[Settings, StudySpec, str]:
    rest, config = _take_config(arguments)
    if config is None:
        raise UserError(f"{who} needs --preset NAME or --config FILE; see --help")
    values = read_yaml(config)
    spec = read_spec(values.pop("study", {}), given)
    settings = _settings({**values, **spec.settings}, _options(rest), config)
    if settings.engine != "loop":
        raise UserError(
            f"{who} runs with engine 'loop', got engine={settings.engine!r}: add --engine loop --trl '{{}}'; single "
            "runs of the other engine can be compared by their reports"
        )
    return settings, spec, config.stem


def _options(arguments: list[str]) -> dict[str, Any]:
    """The settings that are given as options."""
    given, unknown = _parser().parse_known_args(arguments)
    if unknown:
        option = next((text for text in unknown if text.startswith("--")), unknown[0])
        raise one_of("an option", option.split("=")[0], [f"--{spec.name}" for spec in dataclasses.fields(Settings)])
    return vars(given)


def _saved(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that the options ask to resume."""
    wanted = given.get("resume_from_checkpoint", "")
    place = given.get("output_dir", "") if wanted == "auto" else wanted
    if not place:
        raise UserError("--preset NAME, --config FILE or --resume RUN_DIR is needed; see --help")
    path = Path(place)
    if not path.is_dir():
        raise UserError(f"there is nothing to resume from: {path} does not exist")
    folder = path if (path / RUN_FILE).is_file() else path.parent
    config = read_info(folder).get("config")
    if not isinstance(config, dict):
        raise UserError(f"{folder / RUN_FILE} holds no settings of a run, so it cannot be resumed: start a new run")
    known = {spec.name for spec in dataclasses.fields(Settings)} - {"resume_from_checkpoint"}
    return {key: value for key, value in config.items() if key in known}


def _settings(values: dict[str, Any], given: dict[str, Any], config: Path | None) -> Settings:
    all_of(f"a key of {config}", values, {spec.name for spec in dataclasses.fields(Settings)})
    tasks = values.pop("tasks", [])
    settings = Settings(**{**values, **given})
    return dataclasses.replace(settings, tasks=_select(tasks, settings.only_tasks))


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    config: Path | None = None
    items = iter(arguments)
    for item in items:
        name, _, value = item.partition("=")
        if name not in ("--preset", "--config"):
            rest.append(item)
            continue
        value = value or next(items, "")
        if not value:
            raise UserError(f"{name} needs a value")
        if config is not None:
            raise UserError("give one of --preset and --config, once")
        if name == "--preset" and value not in preset_names():
            raise one_of("--preset", value, preset_names())
        config = PRESETS / f"{value}.yaml" if name == "--preset" else Path(value)
    return rest, config


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but for a key that a mapping holds twice: an error, where YAML readers take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a sentence saying what is wrong with it."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def _select(tasks: Any, only: list[str]) -> list[dict[str, Any]]:
    named = isinstance(tasks, list) and all(isinstance(task, dict) and task.get("name") for task in tasks)
    if not named:
        raise UserError(
            f"tasks must be a list of mappings that each have a name, got {json.dumps(tasks, default=str)[:200]}"
        )
    names = [task["name"] for task in tasks]
    if not names:
        raise UserError("tasks is empty: the YAML file must list at least one task under `tasks:`")
    if other := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise UserError(f"a task's name must be text, got {other[0]!r}: put it in quotes")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks holds the name {name!r} {names.count(name)} times: every task needs its own")
    all_of("only_tasks", only, names)
    check_names(names)
    return [task for task in tasks if not only or task["name"] in only]
