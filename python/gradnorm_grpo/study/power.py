"""What a study of a given size can tell: the arithmetic behind docs/study-design.md, from finished studies' spreads.

``python -m gradnorm_grpo.study.power docs/study/tiny ...`` prints the page's tables. Differences between arms are
paired by seed; their standard deviation is pooled over the arms of a study. Spearman's correlation over K tasks is
taken on Fisher's scale, with standard error ``sqrt(1.06 / (K - 3))``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

from ..errors import UserError
from ..numbers import fixed, percent, significant
from .decision import PRIMARY, spearman_error
from .measurements import CSV_FILE, Measurements
from .questions.arms import paired
from .questions.common import BASELINE
from .stats import ALPHA

POWER = 0.8
DIFFERENCE = 0.02  # of mean accuracy
CORRELATION = 0.5
MOST = 1000  # seeds or tasks looked at


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds of the difference between an arm and uniform, pooled over the arms of a study.

    ``high``: the upper end of its one-sided 90% interval, ``free`` its degrees of freedom.
    """

    sd: float
    high: float
    free: int


def spread(m: Measurements, when: str) -> Spread:
    """Of the mean accuracy over tasks, "end" or "average". NaN where no arm has two pairs of runs."""
    variances, free = [], 0
    for arm in m.arms:
        if arm == BASELINE:
            continue
        values = np.array(list(paired(m, arm, m.tasks, when).values()))
        values = values[np.isfinite(values)]
        if len(values) > 1:
            variances.append((len(values) - 1) * float(values.var(ddof=1)))
            free += len(values) - 1
    if not free:
        return Spread(math.nan, math.nan, 0)
    variance = sum(variances) / free
    return Spread(math.sqrt(variance), math.sqrt(variance * free / float(special.chdtri(free, 0.9))), free)


def power_of_difference(sd: float, difference: float, seeds: int) -> float:
    """Power of the paired two-sided t test at 5% over so many seeds."""
    free, shift = seeds - 1, difference / sd * math.sqrt(seeds)
    critical = float(special.stdtrit(free, 1 - ALPHA / 2))
    if shift > 10:  # where the distribution underflows; the power is then one to nine digits for any number of seeds
        return 1.0 if critical < shift / 2 else float(special.ndtr(shift - critical))
    return float(stats.nct.sf(critical, free, shift) + stats.nct.cdf(-critical, free, shift))


def power_of_equivalence(sd: float, margin: float, seeds: int) -> float:
    """Power of the two one-sided t tests at 5% where the arms do not differ: both have to reject.

    By integration over the sample's standard deviation.
    """
    free = seeds - 1
    critical = float(special.stdtrit(free, 1 - ALPHA))
    # With s the sample's deviation the mean must lie within margin - critical s / sqrt(seeds) of zero.
    shares = (np.arange(2000) + 0.5) / 2000
    s = sd * np.sqrt(special.chdtri(free, 1 - shares) / free)
    reach = np.maximum(margin - critical * s / math.sqrt(seeds), 0.0)
    return float((2 * special.ndtr(reach * math.sqrt(seeds) / sd) - 1).mean())


def half_width(sd: float, seeds: int) -> float:
    """Half the expected 95% interval of a mean over seeds, for a standard deviation of ``sd``."""
    return float(special.stdtrit(seeds - 1, 1 - ALPHA / 2)) * sd / math.sqrt(seeds)


def power_of_correlation(correlation: float, tasks: int) -> float:
    """Power of the two-sided test at 5% of Spearman's correlation over so many tasks."""
    shift, critical = math.atanh(correlation) / spearman_error(tasks), float(special.ndtri(1 - ALPHA / 2))
    return float(special.ndtr(shift - critical) + special.ndtr(-shift - critical))


def power_of_no_correlation(margin: float, tasks: int) -> float:
    """Power of the two one-sided tests at 5% that the correlation lies within the margin, where it is zero."""
    reach = math.atanh(margin) / spearman_error(tasks) - float(special.ndtri(1 - ALPHA))
    return float(2 * special.ndtr(reach) - 1) if reach > 0 else 0.0


def detectable(power: Callable[[float, int], float], tasks: int) -> float:
    """The correlation, or margin, at which so many tasks have 80% power; NaN where none below 0.999 has."""
    if power(0.999, tasks) < POWER:
        return math.nan
    return float(optimize.brentq(lambda r: power(r, tasks) - POWER, 1e-6, 0.999))


def smallest(power: Callable[[int], float], first: int) -> int:
    """The smallest size from ``first`` on with 80% power; 0 where MOST is not enough."""
    return next((size for size in range(first, MOST + 1) if power(size) >= POWER), 0)


def arms_table(studies: Sequence[tuple[str, Measurements]], seeds: Sequence[int]) -> str:
    """One row per study and accuracy: the spread, the seeds needed, and what the given numbers of seeds can tell."""
    heads = [
        "study",
        "accuracy",
        "SD of a difference (90% bound)",
        "seeds for 0.02",
        "seeds for no difference above 0.02",
    ]
    heads += [f"half width, power with {n} seeds" for n in seeds]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, m in studies:
        for when in PRIMARY:
            found = spread(m, when)
            if not found.sd > 0:
                continue
            cells = [name, when, f"{significant(found.sd)} ({significant(found.high)}; {found.free} df)"]
            for power in (power_of_difference, power_of_equivalence):
                each = [smallest(partial(power, sd, DIFFERENCE), 2) for sd in (found.sd, found.high)]
                cells.append(f"{each[0]} ({each[1]})")
            for n in seeds:
                powers = percent(power_of_difference(found.sd, DIFFERENCE, n))
                worst = percent(power_of_difference(found.high, DIFFERENCE, n))
                cells.append(f"{fixed(half_width(found.sd, n), 3)}, {powers} ({worst})")
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def tasks_table(tasks: Sequence[int]) -> str:
    """One row per number of tasks: power for a correlation of 0.5, what is detectable, and the same for its absence."""
    heads = ["tasks", "power for 0.5", "detectable with 80%", "power for none above 0.5", "margin with 80%"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for count in tasks:
        cells = [str(count), percent(power_of_correlation(CORRELATION, count))]
        cells += [fixed(detectable(power_of_correlation, count)), percent(power_of_no_correlation(CORRELATION, count))]
        lines.append(_row([*cells, fixed(detectable(power_of_no_correlation, count))]))
    needed = [smallest(partial(f, CORRELATION), 4) for f in (power_of_correlation, power_of_no_correlation)]
    lines += ["", f"80% power takes {needed[0]} tasks for a correlation of 0.5 and {needed[1]} for none above 0.5."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


#: The sizes that the page shows.
SEEDS, TASKS = (10, 12), (6, 12, 16, 24, 34)


def tables(folders: Sequence[Path]) -> str:
    """Both tables of the page, from the measurements.csv of finished studies."""
    studies = [(folder.name, Measurements.from_csv(folder / CSV_FILE)) for folder in folders]
    return f"{arms_table(studies, SEEDS)}\n{tasks_table(TASKS)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m gradnorm_grpo.study.power", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", type=Path, help="finished studies, each with a measurements.csv")
    try:
        print(tables(parser.parse_args().folders), end="")
    except UserError as error:
        parser.error(str(error))
