"""GradNormTracker: every task's squared gradient norm, measured while somebody else's training code runs."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .estimator import PairSums, RunningEstimate, TaskGradient, task_moments
from .tracking.capture import fuse, observe
from .tracking.layers import LayerChoice, named, select_layers, use_counts
from .tracking.recorder import Recorder
from .tracking.rows import Ids, Rows, make_rows

MAX_BLOCKS = 512  # above as many samples in one micro-batch the jackknife leaves out folds instead of samples


def _some(names: Iterable[str], most: int = 5) -> str:
    """A list of names as a message shows it."""
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


class StepStats(dict[Hashable, TaskGradient]):
    """``{task: TaskGradient}`` for one step, with the tasks' inner products beside it.

    Attributes:
        tasks: the K tasks, in the order of the matrices' rows.
        inner_products: [K, K] float64, ``<E G_a, E G_b>`` unbiased; the diagonal is U. NaN where no pair was seen
            together.
        inner_products_se: [K, K] float64, jackknife standard errors.
        cosines: [K, K] float64, ``M_ab / sqrt(U_a U_b)``; NaN where a U is not positive.
        cosines_se: [K, K] float64, jackknife standard errors (0 on the diagonal).
    """

    tasks: list[Hashable]
    inner_products: Tensor
    inner_products_se: Tensor
    cosines: Tensor
    cosines_se: Tensor


class GradNormTracker:
    """Measure ``U_k = sum_{p != q} <G_p, G_q> / sum_{p != q} w_p w_q`` over the samples p, q of each task k.

    G_p is the gradient of sample p's own loss, the mean over its rows, in the weights and biases of the chosen layers;
    w_p is the share of the sample's rows present in the micro-batch (1 when it is whole); pairs are taken inside a
    micro-batch.

    Args:
        model: any module; it is left as it was by :meth:`close`.
        layers: "last_attention" (the projections of the last decoder layer's attention), "all" (every parameter that
            trains, norms and embeddings too), a regular expression searched in module names, or a list of module names
            (a name stands for everything inside it).
        fused: False only watches (training stays the same to the last bit). True swaps the chosen linears' backward
            for one
            that takes dW and the norms from one pass (the same up to rounding); all other parameters are watched.

    Attributes:
        layers: names of the measured modules.
        skipped: names of trainable parameters of the choice that cannot be measured, with their share of all trainable
            parameters.
        running: {task: RunningEstimate} pooled over all steps so far.

    Raises:
        ValueError: nothing to measure, or (fused) a linear with a forward of its own.
        TypeError: ``model`` is not a module or ``layers`` is of the wrong type.
    """

    def __init__(self, model: nn.Module, layers: LayerChoice = "last_attention", fused: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._selection = select_layers(model, layers)
        self._uses_of = use_counts(model, self._selection)
        self.layers = [layer.name for layer in self._selection.layers]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.skipped = {name: size / trainable for name, size in self._selection.skipped.items()}
        if self.skipped:
            warnings.warn(
                f"not measured, {sum(self.skipped.values()):.2%} of the trainable parameters: {_some(self.skipped)} "
                "(linears, embeddings, and norms and other leaf modules with parameters of one dimension are)",
                stacklevel=2,
            )
        self.running: dict[Hashable, RunningEstimate] = {}
        self._recorder: Recorder | None = None
        self._parts: list[PairSums] = []
        self._task_index: dict[Hashable, int] = {}
        self._sample_task: dict[Hashable, Hashable] = {}
        self._sample_rows: dict[Hashable, int] = {}
        self._serial = 0
        self._warned: set[str] = set()
        self._undo = []
        try:
            for layer in self._selection.layers:
                install = fuse if fused and layer.kind in ("linear", "conv1d") else observe
                self._undo.append(install(layer, lambda: self._recorder))
        except ValueError:
            self.close()
            raise

    @contextmanager
    def microbatch(
        self,
        task_ids: Ids,
        sample_ids: Ids | None = None,
        attention_mask: Tensor | None = None,
        row_scale: float | Sequence[float] | Tensor | None = None,
        rows_per_sample: int | Sequence[int] | Tensor | None = None,
    ) -> Iterator[None]:
        """Measure the one forward and backward that run inside. An exception inside leaves the micro-batch out.

        Args:
            task_ids: [B] ints or strings, the task of each row (sequence) of the batch.
            sample_ids: [B] ints or strings, the independent unit each row belongs to (in GRPO the prompt); default:
                every row
                is a sample of its own.
            attention_mask: [B, L], 0 where a token is padding and has no gradient; lets a GPU skip it.
            row_scale: number or [B], the factor that turns a row's share of the differentiated loss into the row's own
                loss.
                Default B, which fits ``loss = row_losses.mean()``; times the accumulation steps if the loss is divided
                by them; divided by the loss scale under a GradScaler.
            rows_per_sample: number or [B], how many rows the whole sample has when its rows are spread over
                micro-batches.
                Default: the rows seen here are all. Without it a sample may not come back within a step.

        Raises:
            ValueError, TypeError: ids that do not fit, before anything runs.
            RuntimeError: no gradient reached a measured layer inside the block, or the block is nested.
        """
        if self._recorder is not None:
            raise RuntimeError(
                "tracker.microbatch(...) is already open: close the first block before the next one begins"
            )
        if not self._undo:
            raise RuntimeError("this tracker was closed: make a new GradNormTracker")
        rows = make_rows(
            task_ids, sample_ids, attention_mask, row_scale, rows_per_sample, serial=self._serial, max_blocks=MAX_BLOCKS
        )
        self._check_samples(rows, spread=rows_per_sample is not None)
        recorder = self._recorder = Recorder(rows, self._uses_of, lambda p: named(self._model, p))
        try:
            yield
            if not recorder.reached:
                raise RuntimeError(
                    f"no gradient reached a measured layer ({_some(self.layers)}) inside "
                    "tracker.microbatch(...): call loss.backward() inside the block, on a loss that depends on them"
                )
            with torch.no_grad():
                part = recorder.finish(lambda task: self._task_index.setdefault(task, len(self._task_index)))
        finally:
            self._recorder = None
        self._warn_never_called(recorder)
        self._parts.append(part)
        self._serial += 1
        for sample, task, present in zip(rows.samples, rows.tasks, rows.rows_present, strict=True):
            self._sample_task[sample] = task
            self._sample_rows[sample] = self._sample_rows.get(sample, 0) + present

    def _check_samples(self, rows: Rows, spread: bool) -> None:
        """A sample that comes back within a step must say how many rows it has, and must keep its task."""
        whole = [round(present / share) for present, share in zip(rows.rows_present, rows.weight.tolist(), strict=True)]
        for sample, task, present, limit in zip(rows.samples, rows.tasks, rows.rows_present, whole, strict=True):
            if sample not in self._sample_task:
                continue
            if self._sample_task[sample] != task:
                raise ValueError(
                    f"sample_ids: sample {sample!r} belonged to task {self._sample_task[sample]!r} earlier in this "
                    f"step, now to {task!r}"
                )
            if not spread:
                raise ValueError(
                    f"sample_ids: sample {sample!r} was already in an earlier micro-batch of this step; if its rows "
                    f"are spread over several, "
                    "pass rows_per_sample= (its number of rows in all), else give every sample an id of its own"
                )
            if self._sample_rows[sample] + present > limit:
                raise ValueError(
                    f"rows_per_sample: sample {sample!r} has {self._sample_rows[sample] + present} rows in this step, "
                    f"more than the {limit} given"
                )

    def _warn_never_called(self, recorder: Recorder) -> None:
        missing = [name for name in recorder.never_called(self._selection.layers) if name not in self._warned]
        if missing:
            self._warned.update(missing)
            warnings.warn(
                "these measured layers were never called in this micro-batch, so they count as zero: "
                f"{_some(missing)}; a weight that is used without calling its layer cannot be seen",
                stacklevel=4,
            )

    def step(self) -> StepStats:
        """Estimates from all micro-batches since the last call, one optimizer step; resets, and updates ``running``.

        Returns:
            :class:`StepStats`; empty when there was no micro-batch. A task with one sample has NaN and n = 1.
        """
        stats = StepStats()
        tasks = stats.tasks = list(self._task_index)
        moments = task_moments(self._parts, len(tasks))
        stats.inner_products, stats.inner_products_se = moments.inner_products, moments.inner_products_se
        stats.cosines, stats.cosines_se = moments.cosines, moments.cosines_se
        counts = dict.fromkeys(tasks, 0)
        for task in self._sample_task.values():
            counts[task] += 1
        folded = any(isinstance(key, tuple) and key[0] == "fold" for part in self._parts for key in part.block_keys)
        for k, task in enumerate(tasks):
            error = float(moments.std_error[k])
            method = "none" if error != error else "jackknife over folds" if folded else "jackknife over samples"
            stats[task] = TaskGradient(
                sq_norm=float(moments.sq_norm[k]),
                std_error=error,
                noise_scale=float(moments.noise_scale[k]),
                plug_in=float(moments.plug_in[k]),
                n=counts[task],
                mean_sq_norm=float(moments.mean_sq_norm[k]),
                pair_weight=float(moments.pair_weight[k]),
                std_error_method=method,
            )
            self.running.setdefault(task, RunningEstimate()).update(stats[task])
        self._parts, self._serial = [], 0
        self._task_index, self._sample_task, self._sample_rows = {}, {}, {}
        return stats

    def state_dict(self) -> dict[str, Any]:
        """The running estimates, for a checkpoint between steps.

        Raises:
            RuntimeError: micro-batches are waiting for :meth:`step`; they would be lost.
        """
        if self._parts or self._recorder is not None:
            raise RuntimeError(f"{len(self._parts)} micro-batches wait for tracker.step(): call it before state_dict()")
        return {"running": [(task, estimate.state_dict()) for task, estimate in self.running.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        running: dict[Hashable, RunningEstimate] = {}
        for task, entry in state["running"]:
            running[task] = RunningEstimate()
            running[task].load_state_dict(entry)
        self.running = running

    def close(self) -> None:
        """Remove every hook and swapped forward: the model is as it was before. May be called twice."""
        for undo in self._undo:
            undo()
        self._undo = []
