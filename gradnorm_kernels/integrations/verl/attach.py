"""The tracker on verl's actor: ``attach(worker)`` on one TrainingWorker, ``measure_actor()`` on each that verl builds.

The engine's ``forward_step`` and ``train_batch`` and the worker's ``train_mini_batch`` are shadowed on the instance.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch

from ...estimation.metrics import gradient_metrics
from ...tracking.layers import LayerChoice, select_layers
from ...tracking.tracker import GradNormTracker, StepStats
from .loss_scale import COUPLED, actor_config, row_scale

_LOGGER = logging.getLogger(__name__)
#: verl's batches get rows without a prompt, until ranks and mini-batches divide them. They belong to this task.
PADDING = "(padding)"
PADDING_UID = re.compile(r"pad[0-9a-f]{32}")
#: verl pools metrics over the updates of one step by words in their names, instead of averaging.
POOLING_WORDS = ("max", "min", "sum", "total", "timing_s/", "timing_per_token_ms/")

RowScale = Callable[[Any], Any]


def attach(
    worker: Any,
    task_key: str = "data_source",
    layers: LayerChoice = "last_attention",
    fused: bool = False,
    every: int = 1,
    *,
    sample_key: str = "uid",
    row_scale: RowScale | None = None,
    **tracker_options: Any,
) -> Attachment:
    """Measure ``U_k``, every task's squared gradient norm, in the updates of a verl TrainingWorker.

    A sample is a prompt with all its rows in the mini-batch, over all ranks. A row's loss is the mean over its response
    tokens, whatever ``loss_agg_mode`` makes of it. Only the first mini-batch of an update is measured: later ones, and
    later epochs, use weights that may have been trained on the same prompts. With ``fused=False`` training is
    verl's own to the last bit.

    The update's metrics get, per task, ``tasks/<task>/grad_norm_sq`` (U), ``.../grad_norm_sq_se``, ``.../noise_scale``,
    ``.../n`` (prompts), ``.../plug_in``, ``.../mean_sq_norm`` and ``.../pair_weight``, with "actor/" in front in
    verl's log. A number that is not defined is left out.

    Args:
        worker: a ``verl.workers.engine_workers.TrainingWorker`` after ``reset()``, whose engine is FSDP2's.
        task_key, sample_key: the fields of the batch that name a row's task and its prompt.
        layers, fused: as in :class:`GradNormTracker`.
        every: measure one in so many updates.
        row_scale: for a loss of your own: ``row_scale(micro_batch)`` gives the [B] factors from a row's share of the
            differentiated loss to the row's own loss.
        tracker_options: any other argument of :class:`GradNormTracker`.

    Returns:
        the attachment: ``.tracker``, ``.last`` (the latest StepStats), ``.detach()``.

    Raises:
        TypeError: not a TrainingWorker, or not an FSDP engine with a language model.
        ValueError: settings that cannot be measured, by name; the worker is unchanged. The loss function is known only
            at the first update and is refused there.
    """
    _check(worker, every)
    engine = worker.engine
    if engine.engine_config.use_fused_kernels:
        _refuse_head(engine.module, layers, bool(tracker_options.get("frozen")))
    options = {"process_group": engine.get_data_parallel_group(), **tracker_options}
    tracker = GradNormTracker(engine.module, layers, fused, **options)
    worker.gradnorm = Attachment(worker, tracker, task_key, sample_key, every, row_scale)
    return worker.gradnorm


def measure_actor(task_key: str = "data_source", **options: Any) -> type:
    """Have every actor that verl builds from now on in this process measured by :func:`attach`.

    Call it in a module of your own that ``actor_rollout_ref.model.external_lib`` names: verl imports this module in
    each process before it builds the actor. It sets ``ActorRolloutRefWorker.actor_worker_cls`` to a subclass whose
    ``reset()`` ends with ``attach(self, task_key, **options)``. A second call replaces the first.

    Args:
        task_key, options: of :func:`attach`.

    Returns:
        the subclass.
    """
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.workers.engine_workers import ActorRolloutRefWorker

    present = ActorRolloutRefWorker.actor_worker_cls
    base: Any = present.__base__ if getattr(present, "measured_by_gradnorm", False) else present

    class MeasuredTrainingWorker(base):  # type: ignore[misc]
        """verl's TrainingWorker with the tracker on its engine."""

        measured_by_gradnorm = True
        gradnorm: Attachment | None = None

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
        def reset(self) -> None:
            """Build or reload the engine, and attach."""
            if self.gradnorm is not None:
                self.gradnorm.detach()
            super().reset()
            attach(self, task_key, **options)

    ActorRolloutRefWorker.actor_worker_cls = MeasuredTrainingWorker
    return MeasuredTrainingWorker


def _check(worker: Any, every: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        TypeError, ValueError: by name.
    """
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import TrainingWorker

    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an int of at least 1, got {every!r}: 1 measures each update")
    if not isinstance(worker, TrainingWorker):
        raise TypeError(f"worker must be a verl TrainingWorker, got {type(worker).__name__}")
    if getattr(worker, "gradnorm", None) is not None:
        raise ValueError("this worker is attached already: call worker.gradnorm.detach() first")
    engine = worker.engine
    if type(engine) is not FSDPEngineWithLMHead:
        raise TypeError(
            f"worker.engine must be verl's FSDPEngineWithLMHead, got {type(engine).__name__}: other engines are not "
            "known, use GradNormTracker in a loop of your own"
        )
    config = engine.engine_config
    if config.strategy != "fsdp2":
        raise ValueError(
            f"actor.strategy={config.strategy!r} keeps a layer's weights in one flat parameter, which no layer owns: "
            "set actor_rollout_ref.actor.strategy=fsdp2"
        )
    if config.ulysses_sequence_parallel_size > 1:
        raise ValueError(
            f"ulysses_sequence_parallel_size={config.ulysses_sequence_parallel_size} puts a row's tokens on several "
            "ranks: set it to 1"
        )
    if config.forward_only:
        raise ValueError("this worker only runs forward (a reference policy): attach to the actor's worker")
    if not hasattr(engine, "module"):
        raise ValueError("the worker has no model yet: call worker.reset() before attach(worker)")


def _refuse_head(model: Any, layers: LayerChoice, frozen: bool) -> None:
    """verl's fused kernels multiply by the output head's weight without calling the head, so no hook sees it."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    for layer in select_layers(model, layers, frozen).layers:
        if weight is not None and any(parameter is weight for parameter in layer.module.parameters(recurse=False)):
            raise ValueError(
                f"layers={layers!r} includes {layer.name!r}, whose weight model.use_fused_kernels=True uses without "
                "calling its module: choose layers beside the output head, or set use_fused_kernels=False"
            )


def _ids(batch: Any, key: str) -> list[Hashable]:
    """A field of one string or int per row."""
    fields = sorted(map(str, batch.keys()))
    if key not in fields:
        raise ValueError(
            f"the batch has no field {key!r}, it has {fields}: name the fields of the task and "
            "of the prompt with task_key= and sample_key="
        )
    values = batch[key]
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != len(batch):
        raise ValueError(f"the field {key!r} must hold one value per row, got {values!r} for {len(batch)} rows")
    return [value if isinstance(value, int) else str(value) for value in values]


class Attachment:
    """A tracker on a worker. :meth:`detach` puts everything back.

    Attributes:
        tracker: the GradNormTracker; ``tracker.running`` pools all measured updates.
        last: the StepStats of the latest measured update, without the rows that verl adds as padding.
    """

    def __init__(
        self,
        worker: Any,
        tracker: GradNormTracker,
        task_key: str,
        sample_key: str,
        every: int,
        own_row_scale: RowScale | None,
    ) -> None:
        self.worker, self.tracker = worker, tracker
        self.last = StepStats()
        self._task_key, self._sample_key, self._every = task_key, sample_key, every
        self._own_row_scale = own_row_scale
        self._updates = 0
        self._inside = False  # an update of several mini-batches is running
        self._later = False  # and its first mini-batch is over
        self._stack: ExitStack | None = None  # the open micro-batch of a measured mini-batch
        self._config: Any = None  # the ActorConfig of the measured mini-batch's loss
        self._rows: Counter[Hashable] = Counter()  # rows of each sample in the measured mini-batch, over all ranks
        self._warned: set[str] = set()
        self._shadowed: list[tuple[Any, str]] = []
        self._shadow(worker, "train_mini_batch", self._train_mini_batch)
        self._shadow(worker.engine, "train_batch", self._train_batch)
        self._shadow(worker.engine, "forward_step", self._forward_step)

    def _shadow(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper`` before a method of this instance; it gets the method itself first."""
        inner = getattr(owner, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return wrapper(inner, *args, **kwargs)

        setattr(owner, name, method)
        self._shadowed.append((owner, name))

    def detach(self) -> None:
        """Remove every method and hook: the worker and its model are as they were before. May be called twice."""
        for owner, name in self._shadowed:
            owner.__dict__.pop(name, None)
        self._shadowed = []
        self.tracker.close()
        if self.worker.__dict__.get("gradnorm") is self:
            del self.worker.gradnorm

    def _train_mini_batch(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An update: mini-batches and epochs over one batch of rollouts."""
        self._inside = True
        try:
            return inner(*args, **kwargs)
        finally:
            self._inside = self._later = False
            self._updates += 1

    def _train_batch(self, inner: Callable[..., Any], data: Any, loss_function: Any, *args: Any, **kwargs: Any) -> Any:
        """One optimizer step of the engine: a mini-batch of an update, or an update of its own."""
        measured = not self._later and self._updates % self._every == 0
        self._later = self._inside
        self._updates += not self._inside
        if not measured:
            return inner(data, loss_function, *args, **kwargs)
        return self._measure(inner, data, loss_function, *args, **kwargs)

    def _measure(self, inner: Callable[..., Any], data: Any, loss_function: Any, *args: Any, **kwargs: Any) -> Any:
        """One optimizer step with the tracker on, and its estimates among the metrics."""
        if self._own_row_scale is None:
            self._config = actor_config(loss_function)
            self._warn_coupled(self._config)
        self._rows = self._count(_ids(data, self._sample_key))
        try:
            with ExitStack() as self._stack:
                outputs = inner(data, loss_function, *args, **kwargs)
        except BaseException:
            self.tracker.discard()  # of an update that failed: the next one must not count its micro-batches
            raise
        finally:
            self._stack = None
        stats = self.tracker.step()
        self.tracker.running.pop(PADDING, None)
        stats.pop(PADDING, None)
        self.last = stats
        self._warn_names(stats)
        for task, gradient in stats.items():
            for key, value in gradient_metrics(task, gradient).items():
                if math.isfinite(value):
                    outputs["metrics"][key] = [value]  # a list, as verl keeps a micro-batch's metrics
        return outputs

    def _count(self, samples: list[Hashable]) -> Counter[Hashable]:
        """The rows of each sample in the mini-batch, over all data-parallel ranks."""
        own = Counter(samples)
        group = self.worker.engine.get_data_parallel_group()
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, own, group=group)
        return sum(parts, Counter())

    def _forward_step(
        self, inner: Callable[..., Any], micro_batch: Any, loss_function: Any, forward_only: bool, **kwargs: Any
    ) -> Any:
        """The forward of one micro-batch; its backward follows before the next forward or the optimizer's step."""
        if self._stack is not None and not forward_only:
            self._stack.close()
            self._stack.enter_context(self.tracker.microbatch(**self._microbatch(micro_batch)))
        return inner(micro_batch, loss_function=loss_function, forward_only=forward_only, **kwargs)

    def _microbatch(self, micro_batch: Any) -> dict[str, Any]:
        """The arguments of :meth:`GradNormTracker.microbatch`."""
        from verl.utils.tensordict_utils import get_non_tensor_data

        samples = _ids(micro_batch, self._sample_key)
        tasks = [
            PADDING if PADDING_UID.fullmatch(str(sample)) else task
            for sample, task in zip(samples, _ids(micro_batch, self._task_key), strict=True)
        ]
        own = self._own_row_scale
        scale = row_scale(micro_batch, self._config) if own is None else own(micro_batch)
        scaler = getattr(self.worker.engine, "scaler", None)
        offsets = micro_batch["input_ids"].offsets().cpu()
        rows: dict[str, Any] = {
            "task_ids": tasks,
            "sample_ids": samples,
            "row_scale": scale if scaler is None else scale / scaler.get_scale(),
            "rows_per_sample": [self._rows[sample] for sample in samples],
        }
        if get_non_tensor_data(micro_batch, "use_remove_padding", True):
            return {**rows, "cu_seqlens": offsets}
        lengths = offsets.diff()
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        return {**rows, "attention_mask": mask.to(next(self.worker.engine.module.parameters()).device)}

    def _warn_coupled(self, config: Any) -> None:
        """Prompts whose losses depend on each other: U is then not exactly unbiased."""
        mode = config.policy_loss.get("loss_mode", "vanilla")
        if mode in COUPLED and mode not in self._warned:
            self._warned.add(mode)
            warnings.warn(
                f"actor.policy_loss.loss_mode={mode!r} chooses tokens by a statistic of the micro-batch, which couples "
                "its prompts: U is then only approximately unbiased",
                stacklevel=3,
            )

    def _warn_names(self, stats: StepStats) -> None:
        """verl's V1 trainer adds up a metric with "sum" in its name over the updates of a step, and so on."""
        for task in stats:
            words = [word for word in POOLING_WORDS if word in str(task).lower()]
            if words and str(task) not in self._warned:
                self._warned.add(str(task))
                _LOGGER.warning(
                    "verl pools metrics over the updates of one step by words in their names: with "
                    "trainer.v1.*.parameter_sync_step above 1, the numbers of task %r are pooled by %r instead of "
                    "averaged; name the task otherwise",
                    task,
                    words[0],
                )
