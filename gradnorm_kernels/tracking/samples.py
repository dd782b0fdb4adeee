"""The samples that a step has seen so far on this rank: their tasks, how many of their rows, and their names."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from .rows import Rows, is_task_block


class StepSamples:
    """The samples of the micro-batches since the last step.

    Attributes:
        tasks: {sample: its task}.
        shares: {sample: the share of its rows that was seen}.
        sq_norms: {sample: its squared norm}, added up over the micro-batches that hold rows of it; empty without pairs.
        spread: the samples whose rows may lie in other micro-batches, and on other ranks.
        partial: whether a micro-batch had only a part of a sample.
        serial: the number of the next micro-batch.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the step."""
        self.tasks: dict[Hashable, Hashable] = {}
        self.shares: dict[Hashable, float] = {}
        self.sq_norms: dict[Hashable, float] = {}
        self.spread: set[Hashable] = set()
        self.partial, self.serial = False, 0
        self._rows: dict[Hashable, int] = {}

    def check(self, rows: Rows, spread: bool) -> None:
        """A sample that comes back within a step must say how many rows it has, and must keep its task.

        ``spread``: the micro-batch says so (``rows_per_sample``).

        Raises:
            ValueError: it does not.
        """
        whole = [round(present / share) for present, share in zip(rows.rows_present, rows.weight.tolist(), strict=True)]
        for sample, task, present, limit in zip(rows.samples, rows.tasks, rows.rows_present, whole, strict=True):
            if sample not in self.tasks:
                continue
            if self.tasks[sample] != task:
                raise ValueError(
                    f"sample_ids: sample {sample!r} belonged to task {self.tasks[sample]!r} earlier in this step, now "
                    f"to {task!r}"
                )
            if not spread:
                raise ValueError(
                    f"sample_ids: sample {sample!r} was already in an earlier micro-batch of this step; if its rows "
                    "are spread over several, pass rows_per_sample= (its number of rows in all), else give every "
                    "sample an id of its own"
                )
            if self._rows[sample] + present > limit:
                raise ValueError(
                    f"rows_per_sample: sample {sample!r} has {self._rows[sample] + present} rows in this step, more "
                    f"than the {limit} given"
                )

    def add(self, rows: Rows, sq_norms: Mapping[Hashable, float], spread: bool) -> None:
        """Count a micro-batch that was measured. ``sq_norms``: of its samples, where pairs are summed."""
        self.serial += 1
        if spread:
            self.spread.update(rows.samples)
        for sample, task, present in zip(rows.samples, rows.tasks, rows.rows_present, strict=True):
            self.tasks[sample] = task
            self._rows[sample] = self._rows.get(sample, 0) + present
        for sample, share in zip(rows.samples, rows.weight.tolist(), strict=True):
            self.shares[sample] = self.shares.get(sample, 0.0) + share
            self.partial |= share != 1.0
        for sample, sq_norm in sq_norms.items():
            self.sq_norms[sample] = self.sq_norms.get(sample, 0.0) + sq_norm

    def named(self, key: Hashable, rank: int | None) -> Hashable:
        """A sample or block, named as among all ranks: ids that only this rank knows get its number."""
        return key if rank is None or key in self.spread or is_task_block(key) else ("rank", rank, key)
