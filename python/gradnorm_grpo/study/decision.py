"""What a study declares before its runs, and the verdict that it makes possible: no difference larger than d.

Two one-sided tests (TOST) at 5%: the 90% interval of a difference lies within -d to d. Of a correlation that is asked
of the seeds (Student's t over them) and of the tasks (Fisher's z, ``se = sqrt(1.06 / (K - 3))`` for Spearman's over K
tasks), and d is first multiplied by the share of a correlation that the noise of the measurements leaves,
``sqrt(reliability_x reliability_y)``: noise alone must not look like the absence of a relation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from ..errors import UserError, all_of
from .stats import Array, Correlation, correlate, t_interval

#: The verdict beside supported, contradicted and undecided.
NO_DIFFERENCE = "no difference larger than d"
#: The questions that a margin can be declared for, with its unit.
MARGINS = {
    "arms": "mean held-out accuracy",
    "gain": "Spearman's correlation over tasks",
    "explain": "Spearman's correlation over tasks",
}
PRIMARY = ("end", "average")
#: Variance of Fisher's z of Spearman's correlation over K tasks, times K - 3 (Fieller, Hartley and Pearson 1957).
SPEARMAN_Z = 1.06


@dataclass(frozen=True)
class Decision:
    """The entry `decision` of a study, as it stands before the first run.

    Args:
        primary: the accuracy that the verdict on the arms is about, "end" (of training) or "average" (of the
            evaluations after step 0, the area under the learning curve by its length).
        margins: question -> d, in the unit of MARGINS. A question without one has no equivalence verdict.
        seeds: the fewest pairs of runs that a verdict on the arms takes.
    """

    primary: str = "end"
    margins: Mapping[str, float] = field(default_factory=dict)
    seeds: int = 2

    def __post_init__(self) -> None:
        """Hold every entry to its type and range."""
        all_of("primary of a study's decision", [self.primary], PRIMARY)
        if not isinstance(self.margins, Mapping):
            raise UserError(f"margins of a study's decision must be a mapping, got {self.margins!r}")
        all_of("a margin of a study's decision", self.margins, MARGINS)
        for name, margin in self.margins.items():
            if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 < margin < 1:
                raise UserError(
                    f"the margin of {name!r} must be a number between 0 and 1 ({MARGINS[name]}), got {margin!r}"
                )
        if type(self.seeds) is not int or self.seeds < 2:
            raise UserError(f"seeds of a study's decision must be a whole number from 2, got {self.seeds!r}")

    def margin(self, question: str) -> float:
        """The d of a question; NaN where none was declared."""
        return float(self.margins.get(question, math.nan))


def read_decision(block: Any) -> Decision:
    """:class:`Decision` from a mapping, as YAML and study.json have it; the defaults from an empty one."""
    if not isinstance(block, Mapping):
        raise UserError(f"decision of a study must be a mapping, got {block!r}")
    all_of("a key of a study's decision", block, [spec.name for spec in dataclasses.fields(Decision)])
    return Decision(**block)


def tost(values: Sequence[float] | Array, margin: float) -> float:
    """p of the two one-sided t tests that the mean of the finite values lies within -margin to margin.

    The larger of both p; NaN for fewer than two values, for values that are all equal, and without a margin.
    """
    low, high = (t_interval(values, null) for null in (-margin, margin))
    if not (math.isfinite(margin) and math.isfinite(low.p) and math.isfinite(high.p)):
        return math.nan
    above = low.p / 2 if low.value > -margin else 1 - low.p / 2
    below = high.p / 2 if high.value < margin else 1 - high.p / 2
    return max(above, below)


def correlation_tost(found: Correlation, margin: float, reliability: float) -> float:
    """p of the two one-sided tests that a rank correlation over tasks lies within -margin to margin.

    The largest of the p over seeds (Student's t) and over tasks (Fisher's z), against ``margin sqrt(reliability)``.
    ``reliability``: the product of those of both quantities; NaN, as the result, where it is not known or not positive.
    """
    if not (reliability > 0 and found.tasks > 3 and math.isfinite(margin) and math.isfinite(found.value)):
        return math.nan
    reach = margin * math.sqrt(min(reliability, 1.0))
    z, end, error = math.atanh(np.clip(found.value, -0.9999, 0.9999)), math.atanh(reach), spearman_error(found.tasks)
    over_tasks = max(float(special.ndtr((z - end) / error)), float(special.ndtr(-(z + end) / error)))
    return max(over_tasks, tost(found.per_seed, reach))


def spearman_error(tasks: int) -> float:
    """Standard error of Fisher's z of Spearman's correlation over so many tasks, at least 4."""
    return math.sqrt(SPEARMAN_Z / (tasks - 3))


def split_half(first: Array, second: Array) -> float:
    """Reliability of ranks: ``2 r / (1 + r)`` with r the mean over runs of Spearman's correlation of two halves [R, K].

    Spearman and Brown's formula, for the halves together. NaN without a run in which both are known; 0 where r is not
    positive.
    """
    each = [correlate(a, b) for a, b in zip(first, second, strict=True)]
    known = [r for r in each if math.isfinite(r)]
    if not known:
        return math.nan
    r = max(sum(known) / len(known), 0.0)
    return 2 * r / (1 + r)


def beyond_noise(values: Array, errors: Array) -> float:
    """Reliability ``1 - mean error^2 / variance over tasks`` of values [R, K] with standard errors, mean over runs.

    At least 0; NaN without a run in which the tasks differ.
    """
    found = []
    for row, error in zip(values, errors, strict=True):
        known = np.isfinite(row + error)
        if known.sum() > 1 and (spread := float(row[known].var(ddof=1))) > 0:
            found.append(max(0.0, 1 - float((error[known] ** 2).mean()) / spread))
    return sum(found) / len(found) if found else math.nan
