"""GradNormTracker: every task's squared gradient norm, measured while somebody else's training code runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..estimation.estimator import RunningEstimate
from ..estimation.moments import PairSums, add_up
from . import distributed
from .accumulate import MEMORY_BUDGET, Accumulation, RankPart, StepPlan, StepResult
from .calls import BatchDim, Placements, check_batch_dim
from .hooks import Watcher
from .layers import KINDS, Layer, LayerChoice, Parameters, select_layers
from .options import check_options, check_patterns
from .packing import CuSeqlens
from .reconcile import ELSEWHERE, Arrivals, Reconciliation
from .recorder import Recorder
from .rows import Ids, Rows, make_rows
from .samples import StepSamples
from .sketch import default_width
from .skipped import Skipped, some
from .stats import StepStats, read_state, step_stats

MAX_BLOCKS = 512  # with more samples in one micro-batch the jackknife leaves out folds instead of samples


class GradNormTracker:
    """Measure ``U_k = sum_{p != q} <G_p, G_q> / sum_{p != q} w_p w_q`` over the samples p, q of each task k.

    G_p is the gradient of sample p's own loss, the mean over its rows, in the weights and biases of the chosen layers;
    w_p is the share of the sample's rows present in the micro-batch (1 when it is whole); pairs are taken inside a
    micro-batch, and pooled over micro-batches and data-parallel ranks.

    Args:
        model: any module; it is left as it was by :meth:`close`.
        layers: "last_attention" (the projections of the last decoder layer's attention), "all" (every parameter that
            trains, norms and embeddings too), a regular expression searched in module names, or a list of module names
            (a name stands for everything inside it).
        fused: False only watches (training stays the same to the last bit). True swaps the chosen linears' backward
            for one that takes dW and the norms from one pass (the same up to rounding). All other parameters are
            watched.
        accumulate: which pairs of samples count. "pairs": those inside a micro-batch. "exact": all; the tasks'
            gradient sums are kept over the step's micro-batches and added over ranks,
            ``U_k = (||S_k||^2 - sum_p ||G_p||^2) / (n (n - 1))``. Costs a float32 copy of the measured parameters per
            task, and samples must be whole in their micro-batch. "sketch": all; a random projection of each sample's
            gradient is kept over micro-batches and added over ranks, also where a sample's rows are spread. U stays
            unbiased, with an error of the projection's, which std_error contains. "auto": pairs where every task with
            two samples has some; else exact sums (with errors from sketches), where samples are whole and
            ``memory_budget`` allows; else sketches. It decides from ``plan``, or at the end of the first step.
        errors: where standard errors come from, and so what is computed. "samples": a jackknife over the samples of a
            step, from all inner products of a micro-batch's samples. "tasks": the spread of U over steps (in
            ``running``; a step's own are NaN), from the inner products of the tasks; cosines stay. "steps": the same,
            from the tasks' squares only; cosines and inner products of two tasks are NaN. U and the plug-in are the
            same in all three. The last two are cheaper for many layers. Sketches have a jackknife in any case.
        sketch_width: r of the projections, at least 2. A side no wider than r is not projected. Default:
            128 for up to four measured matrices, less for more (docs/mathematics.md).
        memory_budget: the most bytes of exact sums that "auto" allows.
        plan: what a step looks like, where that is known beforehand.
        process_group: the data-parallel ranks, whose samples make up a step: "auto" (all ranks of an initialised
            torch.distributed), None (this process alone) or a ProcessGroup. With several ranks :meth:`step` is a
            collective call: each rank makes it once per step and gets the same estimates.
        frozen: also measure chosen linears whose weight does not train: the gradient that it would get, as of the
            matrix under a LoRA adapter.
        unverified: what happens to a parameter whose measurement does not pass its verification (docs/verification.md):
            "raise" an error that names it, or "skip" it: leave it out, with one warning. Default: "skip" for
            ``layers="all"`` while something is left to measure, else "raise".
        batch_dim: which dimension of a layer's input holds the rows of the batch: None (found by a probe in the first
            micro-batch), 0, 1, or ``{layer name or shell pattern: dimension}`` for some layers.
        verify: "once" compares the tracker's total gradient of a parameter with autograd's until it was seen to agree;
            "always" in every micro-batch.

    Attributes:
        layers: names of the measured modules.
        skipped: {parameter name: share of all trainable parameters} of what the choice holds and is not measured.
        skipped_reasons: {parameter name: why}.
        running: {task: RunningEstimate} pooled over all steps so far.
        accumulation: what counts and why, as "mode: reason"; "undecided" before "auto" has decided.

    Raises:
        ValueError: nothing to measure, (fused) a linear with a forward of its own, or an unknown option.
        TypeError: ``model`` is not a module, or an option is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerChoice = "last_attention",
        fused: bool = False,
        *,
        accumulate: str = "auto",
        errors: str = "samples",
        sketch_width: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        plan: StepPlan | None = None,
        process_group: Any = "auto",
        frozen: bool = False,
        unverified: str | None = None,
        batch_dim: BatchDim = None,
        verify: str = "once",
    ) -> None:
        check_options(
            fused=fused,
            frozen=frozen,
            accumulate=accumulate,
            errors=errors,
            unverified=unverified,
            verify=verify,
            sketch_width=sketch_width,
            memory_budget=memory_budget,
            plan=plan,
        )
        check_batch_dim(batch_dim)
        distributed.resolve(process_group)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._process_group = process_group
        self._lenient = (layers == "all") if unverified is None else unverified == "skip"
        self._skip_everything = unverified == "skip"
        self._verify_always = verify == "always"
        selection = select_layers(model, layers, frozen)
        self._parameters = Parameters(model, selection)
        self._skipped = Skipped(model)
        self._skipped.add(selection.skipped, KINDS)
        self._skip_own_parameters(selection.layers)
        self._placements = Placements(batch_dim)
        self._watcher = Watcher(
            selection.layers, self._parameters, self._skipped, self._placements, lenient=self._lenient
        )
        self._layers = [layer for layer in selection.layers if self._watcher.names_of(layer)]
        if not self._layers:
            raise ValueError(f"layers={layers!r} picks nothing that can be measured: {self._skipped.news()}")
        self._watcher.layers = self._layers
        self.layers = [layer.name for layer in self._layers]
        check_patterns(batch_dim, self.layers)
        self._warn_skipped(3)
        measured = self._measured()
        width = default_width(sum(p.dim() > 1 for p in measured.values())) if sketch_width is None else sketch_width
        self._accumulation = Accumulation(
            accumulate, memory_budget, width, 4 * sum(p.numel() for p in measured.values()), plan, errors
        )
        self.running: dict[Hashable, RunningEstimate] = {}
        self._probes = batch_dim is None or isinstance(batch_dim, Mapping)
        self._unplaced = self._probes  # no micro-batch of padded rows was probed yet
        self._unreconciled = {name for layer in self._layers for name in self._watcher.names_of(layer)}
        self._recorder: Recorder | None = None
        self._shards: dict[str, tuple[Any, ...]] = {}  # over which groups each parameter is sharded, as far as seen
        self._parts: list[PairSums] = []
        self._samples = StepSamples()
        self._task_index: dict[Hashable, int] = {}
        self._warned: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        try:
            for layer in self._layers:
                self._undo.append(self._watcher.install(layer, fused and layer.kind in ("linear", "conv1d")))
        except ValueError:
            self.close()
            raise

    @property
    def accumulation(self) -> str:
        """Which pairs count and why: "mode: reason", or "undecided"."""
        return "undecided" if self._accumulation.choice is None else str(self._accumulation.choice)

    @property
    def skipped(self) -> dict[str, float]:
        """{parameter name: share of all trainable parameters} of what the choice holds and is not measured."""
        return dict(self._skipped.shares)

    @property
    def skipped_reasons(self) -> dict[str, str]:
        """{parameter name: why it is not measured}."""
        return dict(self._skipped.reasons)

    def _measured(self) -> dict[str, Tensor]:
        """{name: parameter} of what is measured."""
        found: dict[str, Tensor] = {}
        for layer in self._layers:
            names = set(self._watcher.names_of(layer))
            for leaf, parameter in layer.module._parameters.items():
                if parameter is not None and (name := self._parameters.name(layer, leaf)) in names:
                    found[name] = parameter
        return found

    def _skip_own_parameters(self, layers: Sequence[Layer]) -> None:
        """Parameters of a linear or embedding for which the formula of its kind has no place."""
        for layer in layers:
            if layer.kind in ("vector", "experts"):
                continue
            own = layer.module._parameters
            extra = [leaf for leaf, p in own.items() if p is not None and leaf not in ("weight", "bias")]
            self._skipped.add(
                (self._parameters.name(layer, leaf) for leaf in extra if own[leaf].requires_grad),  # type: ignore[union-attr]
                f"{type(layer.module).__name__} has parameters of its own beside weight and bias",
            )

    def _warn_skipped(self, stacklevel: int) -> None:
        text = self._skipped.news()
        if text is not None:
            warnings.warn(text, stacklevel=stacklevel + 1)

    @contextmanager
    def microbatch(
        self,
        task_ids: Ids,
        sample_ids: Ids | None = None,
        attention_mask: Tensor | None = None,
        row_scale: float | Sequence[float] | Tensor | None = None,
        rows_per_sample: int | Sequence[int] | Tensor | None = None,
        cu_seqlens: CuSeqlens | None = None,
    ) -> Iterator[None]:
        """Measure the one forward and backward that run inside. An exception inside leaves the micro-batch out.

        ``G_p = sum over rows r of p of row_scale_r / rows_p * sum over tokens t of r of dy_t x_t^T``. With cu_seqlens a
        row is a packed sequence, and B below is their number S: the model gets [1, T] or [T] tokens of S sequences one
        after another, or several such packed rows.

        Args:
            task_ids: [B] ints or strings, the task of each row (sequence) of the batch.
            sample_ids: [B] ints or strings, the independent unit each row belongs to (in GRPO the prompt). Default:
                every row is a sample of its own.
            attention_mask: [B, L], 0 where a token is padding and has no gradient; lets a GPU skip it.
            row_scale: number or [B], the factor that turns a row's share of the differentiated loss into the row's own
                loss. Default B, which fits ``loss = row_losses.mean()``; times the accumulation steps if the loss is
                divided by them; divided by the loss scale under a GradScaler.
            rows_per_sample: number or [B], how many rows the whole sample has when its rows are spread over
                micro-batches or ranks; then one id means one sample on all ranks.
                Default: the rows seen here are all. Without it a sample may not come back within a step, and ids tell
                the samples of one rank apart.
            cu_seqlens: [S+1] ints from 0, ascending: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1] of all
                rows flattened. Or a list of such lists, one per packed row, each from 0. Tokens behind the last
                sequence are padding and belong to none. Sequences may be empty: they are samples with a zero gradient.
                From a GPU it is copied once, which waits. attention_mask then gives nothing but the shape [B, L] of the
                packed rows, and is needed only where the model's arguments do not show it.
                :func:`cu_seqlens_from_position_ids` makes it from positions that restart.

        Raises:
            ValueError, TypeError: ids that do not fit, before anything runs.
            RuntimeError: no gradient reached a measured layer inside the block, or the block is nested; a layer's
                output is not what its formula gives, or its total gradient is not autograd's.
        """
        if self._recorder is not None:
            raise RuntimeError(
                "tracker.microbatch(...) is already open: close the first block before the next one begins"
            )
        if not self._undo:
            raise RuntimeError("this tracker was closed: make a new GradNormTracker")
        rows = make_rows(
            task_ids,
            sample_ids,
            attention_mask,
            row_scale,
            rows_per_sample,
            cu_seqlens=cu_seqlens,
            serial=self._samples.serial,
            max_blocks=MAX_BLOCKS if self._accumulation.errors == "samples" else None,
            inner_products=self._accumulation.errors != "steps",
        )
        self._samples.check(rows, spread=rows_per_sample is not None)
        self._check_whole(rows)
        for layer in self._watcher.changed():
            self._unreconciled.update(self._watcher.names_of(layer))
        known = set(self._skipped.reasons)
        self._unreconciled.update(self._watcher.check_parameters())
        packed = rows.packing is not None
        searching = self._probes and self._unplaced and rows.batch > 1 and not packed
        self._watcher.watch_entries(self._model, everywhere=searching or packed or self._watcher.shares_outputs)
        reconciliation, arrivals = self._reconciliation()
        kept = self._accumulation
        sketches = kept.microbatch(rows)
        recorder = self._recorder = Recorder(
            rows, self._parameters, self._skipped, kept.exact, reconciliation, sketches, pairs=kept.pairs
        )
        self._watcher.begin(recorder, allowed=self._probes, searching=searching)
        try:
            yield
            self._watcher.entries.refuse_pieces()
            self._reconcile(reconciliation, sorted(arrivals.names - recorder.groups.keys()))
            nothing = self._nothing_left()
            if not recorder.reached and not nothing:
                left_out = self._skipped.news()
                raise RuntimeError(
                    f"no gradient reached a measured layer ({some(self.layers)}) inside tracker.microbatch(...): call "
                    "loss.backward() inside the block, on a loss that depends on them"
                    + (f" ({left_out})" if left_out else "")
                )
            strangers = self._watcher.entries.strangers
            part = None if strangers else self._finish(recorder)
        except BaseException:
            kept.spoiled = kept.spoiled or (kept.exact is not None and bool(recorder.reached))
            raise
        finally:
            self._recorder = None
            self._watcher.end()
            arrivals.close()
            if reconciliation is not None:
                reconciliation.close()
            if not packed and not self._watcher.shares_outputs:
                # Only hooks of what the caller calls stay: its arguments say whether to probe again.
                self._watcher.watch_entries(self._model, everywhere=False)
        self._unplaced = self._unplaced and not searching
        self._warn_never_called(recorder)
        self._warn_skipped(4)
        if nothing:
            self._reset(next_step=False)
            return
        if strangers:
            self._unplaced, kept.spoiled = True, kept.spoiled or kept.exact is not None
            warnings.warn(
                f"this micro-batch is not counted: {some(sorted(strangers))} were called by a "
                "module that no caller had called before, so nothing shows where their rows lie; the next one is "
                "looked at",
                stacklevel=3,
            )
            return
        if self._samples.serial and known != set(self._skipped.reasons):
            # Earlier micro-batches of this step counted what this one leaves out: their sums do not belong together.
            warnings.warn(
                f"the {self._samples.serial + 1} micro-batches of this step so far are dropped: they were measured "
                "with parameters that are now left out, as were earlier steps",
                stacklevel=3,
            )
            self._reset(next_step=False)
            return
        if part is not None:
            self._parts.append(part)
        if sketches is not None and kept.sketches is not None:
            sketches.complete(kept.sketches, self._skipped.reasons)
        self._shards.update(recorder.groups)
        self._samples.add(rows, recorder.sample_sq, spread=rows_per_sample is not None)

    def _check_whole(self, rows: Rows) -> None:
        """Exact sums that were asked for need whole samples in a micro-batch."""
        spread = self._accumulation.admit(rows, len({*self._task_index, *rows.block_tasks}))
        if spread is not None:
            raise ValueError(
                'accumulate="exact" needs whole samples in each micro-batch, but rows_per_sample says that rows of '
                f'{spread} are elsewhere: keep a sample\'s rows together, or use accumulate="sketch" or "pairs"'
            )

    def _finish(self, recorder: Recorder) -> PairSums | None:
        with torch.no_grad():
            for task in recorder.rows.block_tasks:
                self._task_index.setdefault(task, len(self._task_index))
            return recorder.finish(self._task_index)

    # Verification of the total gradients

    def _reconciliation(self) -> tuple[Reconciliation | None, Arrivals]:
        """Both sides of the comparison for the parameters that need it; None where there are none. Of the others only
        whether a gradient came.

        Off for parameters without a gradient of autograd's (``frozen=True``) and for sharded ones: what a rank's hook
        sees there is not the gradient of the rank's own rows.
        """
        wanted: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for layer in self._layers:
            for leaf, parameter in layer.module._parameters.items():
                if parameter is None or not parameter.requires_grad or distributed.is_dtensor(parameter):
                    continue
                name = self._parameters.name(layer, leaf)
                if name not in self._skipped:
                    compared = self._verify_always or name in self._unreconciled
                    (wanted if compared else others)[name] = parameter
        return Reconciliation(wanted) if wanted else None, Arrivals(others)

    def _reconcile(self, reconciliation: Reconciliation | None, unrecorded: Iterable[str]) -> None:
        """``unrecorded``: parameters of which autograd computed a gradient and the recorder saw none."""
        wrong: dict[str, str] = {name: ELSEWHERE for name in unrecorded if name not in self._skipped}
        verdicts = {} if reconciliation is None else reconciliation.verdicts()
        for name, fault in verdicts.items():
            if name in self._skipped:
                continue
            if fault is None:
                self._unreconciled.discard(name)
            else:
                wrong[name] = fault
        if not wrong:
            return
        if self._lenient:
            for name, fault in wrong.items():
                self._skipped.add([name], fault)
            return
        name, fault = next(iter(wrong.items()))
        owners = [layer for layer in self._layers if name in self._watcher.names_of(layer)]
        kinds = ", ".join(f"layer {layer.name!r} ({type(layer.module).__name__})" for layer in owners)
        raise RuntimeError(
            f"{name!r} of {kinds} cannot be measured: {fault}. The parameter is used outside a call of its layer "
            "(F.linear on its weight, a tied head, a term of the loss), or its forward ran outside the block "
            "tracker.microbatch(...), or rows were lost on the way. Run forward and backward inside the block, leave "
            f'it out of layers=, or pass unverified="skip" ({len(wrong)} such parameters: {some(wrong)})'
        )

    def _nothing_left(self) -> bool:
        """Whether every chosen parameter turned out not to be measurable.

        Raises:
            RuntimeError: they did, and nobody asked for training to go on without estimates (``unverified="skip"``).
        """
        names = {name for layer in self._layers for name in self._watcher.names_of(layer)}
        nothing = all(name in self._skipped for name in names)
        if nothing and not self._skip_everything:
            raise RuntimeError(
                f"nothing that layers= picks can be measured: {self._skipped.news()}; choose other layers, or pass "
                'unverified="skip" to train on without estimates'
            )
        if nothing and "nothing" not in self._warned:
            self._warned.add("nothing")
            warnings.warn("nothing that layers= picks can be measured: there will be no estimates", stacklevel=4)
        return nothing

    def _warn_never_called(self, recorder: Recorder) -> None:
        missing = [
            layer.name
            for layer in recorder.never_called(self._layers)
            if layer.name not in self._warned and not self._watcher.left_out(layer)
        ]
        if missing:
            self._warned.update(missing)
            warnings.warn(
                "these measured layers were never called in this micro-batch, so they count as zero: "
                f"{some(missing)}; a weight that is used without calling its layer cannot be seen",
                stacklevel=4,
            )

    def step(self) -> StepStats:
        """Estimates from all micro-batches since the last call, one optimizer step; resets, and updates ``running``.

        Returns:
            :class:`StepStats`; empty when there was no micro-batch. A task with one sample has NaN and n = 1.

        Raises:
            RuntimeError: inside :meth:`microbatch`; another rank stopped or did not make this call; or
                (``accumulate="exact"``) a micro-batch of this step failed halfway, so that its sums cannot be told
                from the others': the next step is measured again.
        """
        if self._recorder is not None:
            raise RuntimeError("tracker.microbatch(...) is open: close the block before step(), which would miss it")
        group = distributed.resolve(self._process_group)
        try:
            rank = distributed.rank(group) if group is not None else None
            parts = distributed.gather(self._part(rank), group)
            if self._ranks_differ(parts):
                return self._publish(StepResult(add_up([], []), None, None, "", False, False))
            mine = {self._samples.named(sample, rank): sample for sample in self._samples.tasks}
            self._learn_shards(parts, group)
            found = self._accumulation.combine(parts, mine, group, self._shards, MAX_BLOCKS)
        finally:
            self._reset(next_step=True)
        return self._publish(found)

    def _ranks_differ(self, parts: Sequence[RankPart]) -> bool:
        """Whether the ranks' parts of this step do not belong together; what differs is made the same from now on.

        Raises:
            RuntimeError: exact sums are spoiled, or ranks count steps or pairs in different ways.
        """
        if any(part.spoiled for part in parts) and not self._accumulation.automatic:
            raise RuntimeError(
                'accumulate="exact": a micro-batch failed halfway, so this step has no estimate; the next one will'
            )
        steps, modes = {part.step for part in parts}, {part.mode for part in parts}
        errors = {part.errors for part in parts}
        if len(steps) > 1 or len(errors) > 1 or (len(modes) > 1 and not self._accumulation.automatic):
            raise RuntimeError(
                f"ranks are at different steps or accumulate differently (steps {sorted(steps)}, accumulate "
                f"{sorted(map(str, modes))}, errors {sorted(errors)}): make every rank's tracker with the same "
                "options, restore the same state on all, and call step() once per optimizer step on each"
            )
        skipped = [part.skipped for part in parts]
        every = frozenset().union(*skipped)
        if all(names == every for names in skipped) and len(modes) == 1:
            return False
        if len(modes) > 1:
            self._accumulation.reconsider()
            warnings.warn(
                "ranks accumulated pairs in different ways, so this step has no estimate; the next one decides again",
                stacklevel=3,
            )
            return True
        self._skipped.add(sorted(every), "another rank could not measure it")
        warnings.warn(
            "ranks left out different parameters, so this step has no estimate; from the next one on all leave out "
            f"{some(sorted(every))}",
            stacklevel=3,
        )
        return True

    def _learn_shards(self, parts: Sequence[RankPart], group: Any) -> None:
        """How parameters are sharded, where other ranks saw it in a micro-batch and this one had none so far.

        Raises:
            RuntimeError: this rank's parameter does not tell.
        """
        missing = {name: n for part in parts for name, n in part.sharded.items() if name not in self._shards}
        measured = self._measured() if missing else {}
        for name, count in missing.items():
            # FSDP2 shards a parameter over the data-parallel ranks too, but not while its layer computes.
            groups = distributed.shard_groups(measured[name], besides=group) if name in measured else ()
            if len(groups) != count:
                raise RuntimeError(
                    f"{name!r} is sharded over {count} groups of ranks elsewhere, and this rank had no micro-batch so "
                    "far that shows how: give every rank a micro-batch in the first step"
                )
            self._shards[name] = groups

    def _part(self, rank: int | None) -> RankPart:
        """This rank's share of the step."""
        kept, named = self._accumulation, self._samples.named
        sums = add_up(self._parts, list(self._task_index))
        return RankPart(
            sums=replace(
                sums,
                keys=tuple(named(key, rank) for key in sums.keys),
                sample_task={
                    named(sample, rank): self._task_index[task] for sample, task in self._samples.tasks.items()
                },
                sample_sq={named(sample, rank): sq_norm for sample, sq_norm in self._samples.sq_norms.items()},
            ),
            folded=any(isinstance(key, tuple) and key[0] == "fold" for part in self._parts for key in part.block_keys),
            skipped=frozenset(self._skipped.reasons),
            spoiled=kept.spoiled,
            mode=None if kept.choice is None else kept.choice.mode,
            step=kept.step,
            shares={named(sample, rank): share for sample, share in self._samples.shares.items()},
            partial=self._samples.partial,
            layout={} if kept.sketches is None else kept.sketches.layout(),
            sharded={name: len(groups) for name, groups in self._shards.items() if groups},
            errors=kept.errors,
        )

    def _publish(self, found: StepResult) -> StepStats:
        """The estimates of a step, which also enter ``running``."""
        stats = step_stats(found)
        for task, gradient in stats.items():
            self.running.setdefault(task, RunningEstimate()).update(gradient)
        return stats

    def discard(self) -> None:
        """Forget the micro-batches since the last :meth:`step`, as where the optimizer's step is skipped.

        No estimate is made of them, and ``running`` stays. What they showed of the layers (where the rows lie, that
        the formulas hold) is kept: a small batch, discarded, spares a large one the forwards of the verification. With
        several ranks every one of them discards; nothing is communicated.

        Raises:
            RuntimeError: inside :meth:`microbatch`.
        """
        if self._recorder is not None:
            raise RuntimeError("tracker.microbatch(...) is open: close the block before discard()")
        # A layer that a small batch did not reach, as an expert's, is looked for again.
        self._unplaced = self._probes and not all(self._placements.knows(layer) for layer in self._layers)
        self._reset(next_step=False)

    def _reset(self, *, next_step: bool) -> None:
        self._parts, self._task_index = [], {}
        self._samples.reset()
        self._accumulation.reset(next_step=next_step)

    def state_dict(self) -> dict[str, Any]:
        """The running estimates, for a checkpoint between steps.

        Raises:
            RuntimeError: micro-batches are waiting for :meth:`step`; they would be lost.
        """
        if self._samples.serial or self._recorder is not None:
            raise RuntimeError(
                f"{self._samples.serial} micro-batches wait for tracker.step(): call it before state_dict()"
            )
        return {
            "running": [(task, estimate.state_dict()) for task, estimate in self.running.items()],
            "accumulation": self._accumulation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises ValueError, and changes nothing, where it is something else's."""
        self.running, accumulation = read_state(state)
        self._accumulation.load_state_dict(accumulation)

    def close(self) -> None:
        """Remove every hook and swapped forward: the model is as it was before. May be called twice."""
        self._watcher.entries.stop()
        for undo in self._undo:
            undo()
        self._undo = []
