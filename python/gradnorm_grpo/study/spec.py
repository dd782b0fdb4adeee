"""What a study runs: the block `study:` of a preset, and the options of the command.

In YAML, all keys optional::

    study:
      seeds: [1, 2, 3]               # the independent replications; each seed has its own warm start and questions
      jobs: 2                        # runs at a time
      settings: {full_steps: 1}      # settings of every run, instead of the preset's own; this is the default
      arms:                          # what is compared: a name and the settings that make the arm
        uniform: {sampling_strategy: uniform}
        inverse: {sampling_strategy: inverse}
      stages: [[uniform, inverse]]   # the order of the runs: seed by seed within a stage; default: arm by arm
      decision:                      # fixed before the runs (see Decision); default: no margins, the end of training
        primary: average
        margins: {arms: 0.02}
      estimators: {prompts: 256}     # of the comparison of estimators (see EstimatorSettings)
      estimator_seeds: 1             # for how many of the seeds the estimators are compared
      intervals: {prompts: 512}      # of the comparison of intervals (see IntervalSettings)
      cost: {prompts: 256}           # of the command `cost` (see CostSettings)
      frozen: {steps: 2}             # measure at fixed weights instead of training (see FrozenSettings)
      keep_checkpoints: false        # keep the weights of finished runs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Parser, UserError, all_of
from ..settings import Settings
from .decision import read_decision

if TYPE_CHECKING:
    from typing_extensions import Self

#: The paper's interventions. "uniform" is what the others are compared with.
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"sampling_strategy": "uniform"},
    "proportional": {"sampling_strategy": "proportional"},
    "inverse": {"sampling_strategy": "inverse"},
    "equal_pull": {"sampling_strategy": "uniform", "task_weighting": "equal_pull"},
}
#: An arm may change how tasks are drawn and weighed. Anything else would change its budget or its starting point.
ARM_SETTINGS = (
    *("sampling_strategy", "sampling_exponent", "sampling_floor", "sampling_decay", "task_draws"),
    *("task_weighting", "task_weighting_decay"),
)
#: Settings that do not change what a run measures: a study may continue with others.
FREE = (
    *("output_dir", "cache_dir", "num_threads", "report_to", "save_steps", "save_total_limit", "seed", "device"),
    *("commit", "resume_from_checkpoint"),
)
#: A study sets these itself, for each run.
_OWN = ("seed", "output_dir", "resume_from_checkpoint", "tasks")


@dataclass
class StudySpec:
    """The `study:` block, checked; see the file's head for the meaning of each entry."""

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    jobs: int = 1
    settings: dict[str, Any] = field(default_factory=lambda: {"full_steps": 1})
    arms: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: dict(own) for name, own in ARMS.items()})
    stages: list[list[str]] = field(default_factory=list)
    decision: dict[str, Any] = field(default_factory=dict)
    estimators: dict[str, Any] = field(default_factory=dict)
    estimator_seeds: int = 1
    intervals: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, Any] | None = None
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        """Hold every entry to its type and range."""
        whole = isinstance(self.seeds, list) and all(type(seed) is int and seed >= 0 for seed in self.seeds)
        if not whole or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds must be a list of different whole numbers from 0, got {self.seeds!r}")
        for name, lowest in (("jobs", 1), ("estimator_seeds", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < lowest:
                raise UserError(f"{name} must be a whole number from {lowest}, got {getattr(self, name)!r}")
        if not isinstance(self.keep_checkpoints, bool):
            raise UserError(f"keep_checkpoints must be true or false, got {self.keep_checkpoints!r}")
        for name in ("settings", "arms", "estimators", "intervals", "cost"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"{name} of a study must be a mapping, got {getattr(self, name)!r}")
        if not self.arms:
            raise UserError(f"arms of a study must name at least one arm, for instance {', '.join(ARMS)}")
        for arm, own in self.arms.items():
            if not isinstance(arm, str) or not arm.replace("_", "").replace(".", "").isalnum():
                raise UserError(f"an arm's name must be letters, digits, dots and underscores, got {arm!r}")
            all_of(f"a setting of arm {arm!r}", own if isinstance(own, dict) else [own], ARM_SETTINGS)
        known = [spec.name for spec in dataclasses.fields(Settings) if spec.name not in _OWN]
        all_of("a setting of the study", self.settings, known)
        self._check_stages()
        if self.frozen is not None:
            FrozenSettings.read(self.frozen)
            if list(self.arms) != ["uniform"]:
                raise UserError(f"a frozen study has the one arm uniform, got {', '.join(self.arms)}")
        read_decision(self.decision)

    def _check_stages(self) -> None:
        lists = isinstance(self.stages, list) and all(isinstance(stage, list) for stage in self.stages)
        named = [arm for stage in self.stages for arm in stage] if lists else []
        if not lists or len(set(map(str, named))) != len(named):
            raise UserError(f"stages of a study must be a list of lists of different arms, got {self.stages!r}")
        all_of("an arm of the study's stages", named, self.arms)
        if missing := [arm for arm in self.arms if arm not in named] if self.stages else []:
            raise UserError(f"stages of the study must name every arm once; {', '.join(missing)} is not there")

    def order(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run in the order in which they start.

        One arm after another, so that runs side by side have different seeds and do not repeat the same warm start.
        With ``stages``: as many seeds as ``jobs`` at a time, all arms of the stage for them, then the next seeds. What
        is finished when time ends is then the same seeds of all arms.
        """
        if not self.stages:
            return [(arm, seed) for arm in self.arms for seed in self.seeds]
        blocks = [self.seeds[first : first + self.jobs] for first in range(0, len(self.seeds), self.jobs)]
        return [(arm, seed) for stage in self.stages for block in blocks for arm in stage for seed in block]

    def run_settings(self, settings: Settings, arm: str, seed: int, folder: str) -> Settings:
        """The settings of one run."""
        return dataclasses.replace(settings, **self.arms[arm], seed=seed, output_dir=folder)


def read_spec(block: Any, given: dict[str, Any]) -> StudySpec:
    """The `study:` block of a preset, or the defaults without one; ``given``: what the command line says instead."""
    if not isinstance(block, dict):
        raise UserError(f"study must be a mapping, got {block!r}")
    known = [spec.name for spec in dataclasses.fields(StudySpec)]
    all_of("a key of study", block, known)
    if given.pop("frozen", False) and block.get("frozen") is None:
        block = {**block, "frozen": {}, "arms": {"uniform": dict(ARMS["uniform"])}, "stages": [], "estimator_seeds": 0}
    chosen = given.pop("arms", None)
    spec = StudySpec(**{**block, **given})
    if chosen is None:
        return spec
    all_of("--arms", chosen, spec.arms)
    stages = [[arm for arm in stage if arm in chosen] for stage in spec.stages]
    return dataclasses.replace(spec, arms={arm: spec.arms[arm] for arm in chosen}, stages=[s for s in stages if s])


class Block:
    """An entry of the block that is a mapping of its own: a dataclass of whole numbers, and what else it checks."""

    NAME: ClassVar[str]  # in messages
    LEAST: ClassVar[Mapping[str, int]]  # the smallest value of each of its whole numbers

    def __post_init__(self) -> None:
        """Hold every whole number to its range."""
        for name, lowest in self.LEAST.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < lowest:
                raise UserError(
                    f"{name} of {self.NAME} must be a whole number from {lowest}, got {getattr(self, name)!r}"
                )

    @classmethod
    def read(cls, block: Any) -> Self:
        """The entry from a mapping, as YAML has it. Raises UserError for anything else and for other keys."""
        if not isinstance(block, Mapping):
            raise UserError(f"the settings of {cls.NAME} must be a mapping, got {block!r}")
        all_of(f"a key of {cls.NAME}", block, [spec.name for spec in dataclasses.fields(cls)])  # type: ignore[arg-type]
        return cls(**block)


@dataclass
class EstimatorSettings(Block):
    """The entry `estimators`: how much is sampled, drawn and timed.

    Args:
        prompts: N, of every task, each with its whole group; at least 8.
        subsets: random subsets of the N for every n.
        sketches: draws of the projections for every width.
        widths: of the sketches.
        repeats: times that each measurement is timed.
    """

    NAME = "the study's estimators"
    LEAST = MappingProxyType({"prompts": 8, "subsets": 2, "sketches": 2, "repeats": 1})

    prompts: int = 256
    subsets: int = 2000
    sketches: int = 16
    widths: list[int] = field(default_factory=lambda: [16, 64, 128, 256])
    repeats: int = 5

    def __post_init__(self) -> None:
        """Hold every entry to its type and range."""
        super().__post_init__()
        whole = isinstance(self.widths, list) and all(type(width) is int and width > 0 for width in self.widths)
        if not whole or len(set(self.widths)) != len(self.widths):
            raise UserError(
                f"widths of {self.NAME} must be a list of different whole numbers above 0, got {self.widths!r}"
            )


@dataclass(frozen=True)
class FrozenSettings(Block):
    """The entry `frozen`.

    Args:
        steps: rounds, at least 2: the questions compare different rounds.
        prompts: of every task in a round, each with its whole group; at least 3.
        full_steps: in the first so many rounds all parameters are measured too.
        proxies: name -> a regular expression searched in module names, or "last_attention": measured beside the last
            attention block.
    """

    NAME = "a frozen study"
    LEAST = MappingProxyType({"steps": 2, "prompts": 3, "full_steps": 0})

    steps: int = 2
    prompts: int = 32
    full_steps: int = 1
    proxies: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hold every entry to its type and range."""
        super().__post_init__()
        known = isinstance(self.proxies, Mapping) and all(
            isinstance(name, str) and name.isidentifier() and name not in ("full", "last") and isinstance(layers, str)
            for name, layers in self.proxies.items()
        )
        if not known:
            raise UserError(
                f"proxies of {self.NAME} must map names (letters, digits, underscores; not full or last) to layers, "
                f"got {self.proxies!r}"
            )


@dataclass
class IntervalSettings(Block):
    """The entry `intervals`: how the intervals of U are compared.

    Args:
        prompts: N, of every task, each with its whole group; at least 32.
        draws: of n of the N, for every n.
        resamples: of the bootstrap, at least 99.
    """

    NAME = "the study's intervals"
    LEAST = MappingProxyType({"prompts": 32, "draws": 1, "resamples": 99})

    prompts: int = 512
    draws: int = 200
    resamples: int = 299


@dataclass(frozen=True)
class CostSettings(Block):
    """The entry `cost`: how the extra seconds of a step are measured.

    Args:
        prompts: N, of every task, each with its whole group: as many steps as that makes.
        rounds: in which the ways take turns; the number of steps is a multiple of it, at least twice.
    """

    NAME = "the study's cost"
    LEAST = MappingProxyType({"prompts": 8, "rounds": 1})

    prompts: int = 256
    rounds: int = 8


def take_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What of ``arguments`` belongs to the study, and the rest: the settings of its runs."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--frozen", action="store_true", default=None)
    parser.add_argument("--seed", nargs="?")
    found, rest = parser.parse_known_args(arguments)
    if found.seed is not None:
        raise UserError("a study has --seeds, a run for each of them, instead of --seed")
    return {name: value for name, value in vars(found).items() if value is not None}, rest
