"""What the comparison of estimators is told: the entry `estimators` of a preset's block `study:`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError, one_of


@dataclass
class EstimatorSettings:
    """How much is sampled, drawn and timed.

    Args:
        prompts: N, of every task, each with its whole group; at least 8.
        subsets: random subsets of the N for every n.
        sketches: draws of the projections for every width.
        widths: of the sketches.
        repeats: times that each measurement is timed.
    """

    prompts: int = 256
    subsets: int = 2000
    sketches: int = 16
    widths: list[int] = field(default_factory=lambda: [16, 64, 128, 256])
    repeats: int = 5

    def __post_init__(self) -> None:
        """Hold every entry to its type and range."""
        for name, lowest in (("prompts", 8), ("subsets", 2), ("sketches", 2), ("repeats", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < lowest:
                raise UserError(
                    f"{name} of the study's estimators must be a whole number from {lowest}, "
                    f"got {getattr(self, name)!r}"
                )
        whole = isinstance(self.widths, list) and all(type(width) is int and width > 0 for width in self.widths)
        if not whole or len(set(self.widths)) != len(self.widths):
            raise UserError(
                "widths of the study's estimators must be a list of different whole numbers above 0, "
                f"got {self.widths!r}"
            )


def read_options(block: Mapping[str, Any]) -> EstimatorSettings:
    """:class:`EstimatorSettings` from a mapping, as YAML has it."""
    known = [spec.name for spec in dataclasses.fields(EstimatorSettings)]
    for key in block:
        if key not in known:
            raise one_of("a key of the study's estimators", key, known)
    return EstimatorSettings(**block)
