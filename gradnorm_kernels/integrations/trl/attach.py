"""``attach(trainer)`` and what it returns: every task's gradient measured inside TRL's own training, and acted on.

What is particular to a trainer is in :mod:`.grpo` and :mod:`.sft`, what its losses do to a row in :mod:`.loss_scale`,
and what is refused in :mod:`.validation`.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ...control.balancer import RunningGram, TaskBalancer
from ...control.sampler import TaskSampler
from ...estimation.estimator import RunningEstimate
from ...estimation.metrics import pair_key, pooled_metrics
from ...tracking.layers import LayerChoice, select_layers
from ...tracking.tracker import GradNormTracker, StepStats
from .grpo import GrpoHooks
from .sft import SftHooks
from .validation import (
    check_count,
    check_flag,
    check_trainer,
    check_version,
    grpo_plan,
    refuse_common,
    refuse_zero3,
    row_tasks,
    sampling_strategy,
    sft_plan,
    undefined_remark,
)

_LOGGER = logging.getLogger(__name__)
#: The file in a checkpoint's folder.
STATE_FILE = "gradnorm_state.json"
#: How far the factor of a loss may lie from the expected one, relative to it: the rounding of a scalar in bfloat16.
FACTOR_TOLERANCE = 2e-2
#: TaskSampler's. Another floor without draws was meant for some and is refused.
DEFAULT_FLOOR = 0.1


def attach(
    trainer: Any,
    task_column: str = "task",
    layers: LayerChoice = "last_attention",
    fused: bool = False,
    every: int = 1,
    task_sampling: str = "off",
    *,
    exponent: float | None = None,
    floor: float = DEFAULT_FLOOR,
    decay: float | None = 0.9,
    seed: int | None = None,
    correction: str | TaskBalancer | None = None,
    keep_groups_together: bool = False,
    row_scale: Callable[..., Any] | None = None,
    gain_window: int = 4,
    max_cosines: int | None = 100,
    allow_undefined: bool = False,
    **tracker_options: Any,
) -> Attachment:
    """Measure ``U_k``, every task's squared gradient norm, at each optimizer step of a TRL trainer.

    Call it before ``trainer.train()``, on a GRPOTrainer, an SFTTrainer, or a subclass of either. In GRPO a sample is a
    prompt with all its completions, in SFT a row. A sample's loss is the mean over its rows of the mean over a row's
    tokens, whatever the trainer's loss_type makes of it. With ``fused=False``, ``task_sampling="off"`` and neither
    correction nor keep_groups_together the run is the trainer's own to the last bit on one device.

    The trainer's logs get, for each task: ``tasks/<task>/grad_norm_sq`` (U), ``.../grad_norm_sq_se``,
    ``.../noise_scale``, ``.../n`` (samples), ``.../n_effective`` (samples with a gradient) and
    ``tasks/cosine/<a>/<b>``; in GRPO also ``.../reward``, ``.../learning_gain``, ``.../abs_advantage``,
    ``.../response_length``, ``.../sampling_prob`` and ``.../weight``. ``accumulate/<mode>`` is the share of steps whose
    U is of this kind: "pairs", "exact" or "sketch". With logging_steps above 1 all are pooled over the steps since the
    last line. Squared norms are in the squared unit of the loss per unit of the parameters.

    Args:
        trainer: the trainer, built and not yet training.
        task_column: the column of the training data that names a row's task (strings or ints).
        layers, fused: as in :class:`GradNormTracker`. The output head is left out by name: TRL's fused head does not
            call its module.
        every: measure one in so many of the optimizer steps that can be measured. In GRPO these are the first on each
            generation.
        task_sampling: GRPO only. "off": TRL's own sampler, which treats all rows alike. "uniform": every task is drawn
            with the same probability. Otherwise tasks are drawn by their running U: "proportional" (to the norm),
            "proportional_sq", "inverse", or "power" (``exponent``). Rows of a task come in shuffled passes. The draw
            happens when the generation begins, so it uses every step before it, and it is the same on every process.
        exponent, floor, decay: of :class:`TaskSampler`, where tasks are drawn; decay also of the correction's running
            averages.
        seed: of the draws; default: ``trainer.args.seed``.
        correction: GRPO only. A strategy of :class:`TaskBalancer` ("equal_pull", "mgda", "pcgrad" ...) or a balancer:
            its weights multiply the tasks' advantages; U stays that of the unweighted loss.
        keep_groups_together: GRPO only. Shuffle a generation by whole prompts, so that a prompt's completions are in
            one micro-batch and every pair counts in full. The order of rows then differs from TRL's.
        row_scale: for a trainer with a loss of its own: ``row_scale(trainer, inputs)`` (SFT: ``row_scale(trainer,
            inputs, num_items_in_batch)``) gives the [B] factors from a row's share of the differentiated loss to the
            row's own loss.
        gain_window: at least 1. ``learning_gain`` is the mean reward of so many latest generations minus that of as
            many before.
        max_cosines: log the cosines of at most so many pairs of tasks per line: those measured on the most samples.
            None logs all. ``.last.cosines`` always has them all.
        allow_undefined: where no step can hold two samples, U stays undefined: attach warns with the arithmetic, and
            task_sampling and correction that depend on U do not start: rows are drawn and weighted as TRL does. True
            starts them all the same; they then go by no estimate.
        tracker_options: any other argument of :class:`GradNormTracker`. ``accumulate="auto"``, the default, is decided
            here from the trainer's batch sizes; ``.tracker.accumulation`` says what was chosen and why.

    Returns:
        the attachment: ``.tracker``, ``.sampler``, ``.balancer``, ``.last`` (the latest StepStats), ``.detach()``.
        Averages, draws and weights are saved in the trainer's checkpoints and restored by resume_from_checkpoint.

    Raises:
        TypeError: not a trainer this works on.
        ValueError: settings that cannot be measured or do not fit together, or a version of TRL that is not known, by
            name; the trainer is unchanged.
        During training, ValueError: rows that are not those of their prompts or have lost their tasks. RuntimeError: a
            loss that is differentiated with another factor than accelerate's.
    """
    import trl
    from trl import GRPOTrainer, SFTTrainer

    check_version(trl.__version__)
    if not isinstance(trainer, (GRPOTrainer, SFTTrainer)):
        raise TypeError(
            f"trainer must be a GRPOTrainer (or a subclass) or an SFTTrainer, got {type(trainer).__name__}: for a loop "
            "of your own use GradNormTracker"
        )
    grpo = isinstance(trainer, GRPOTrainer)
    check_trainer(trainer, (*Attachment.NEEDS, *(GrpoHooks.NEEDS if grpo else SftHooks.NEEDS)))
    refuse_common(trainer, own_group="process_group" in tracker_options)
    for name, flag in (("keep_groups_together", keep_groups_together), ("allow_undefined", allow_undefined)):
        check_flag(name, flag)
    check_count("every", every, 1, "1 measures each step that can be measured")
    check_count("gain_window", gain_window, 1, "it is how many generations are on each side of learning_gain")
    if max_cosines is not None:
        check_count("max_cosines", max_cosines, 0, "it is how many pairs of tasks a log line holds; None logs all")
    strategy = sampling_strategy(task_sampling)
    if strategy is None and floor != DEFAULT_FLOOR:
        raise ValueError(
            f"floor={floor!r} goes with drawn tasks, got task_sampling={task_sampling!r}: name another task_sampling, "
            "or leave floor out"
        )
    seed = trainer.args.seed if seed is None else seed
    rows = row_tasks(trainer, task_column)
    accumulate = tracker_options.get("accumulate", "auto")
    count = len(set(rows or ()))
    plan = grpo_plan(trainer, keep_groups_together, count) if grpo else sft_plan(trainer, count)
    undefined = undefined_remark(trainer, plan, accumulate)
    idle: tuple[TaskSampler[Any] | None, TaskBalancer | None] = (None, None)
    hooks: GrpoHooks | SftHooks
    if grpo:
        sampler, balancer = _controls(rows, strategy, correction, task_sampling, exponent, floor, decay, seed)
        without_products = tracker_options.get("errors") == "steps" and accumulate != "exact"
        if balancer is not None and balancer.needs_inner_products and without_products:
            raise ValueError(
                f"correction={balancer.strategy!r} needs the tasks' inner products, which errors='steps' does not "
                "compute: pass errors='tasks' or 'samples'"
            )
        if undefined is not None and not allow_undefined:
            # "uniform" and "famo" go by no U.
            if sampler is not None and strategy != "uniform":
                idle, sampler = (sampler, None), None
            if balancer is not None and balancer.strategy != "famo":
                idle, balancer = (idle[0], balancer), None
        hooks = GrpoHooks(
            trainer,
            task_column,
            rows,
            sampler=sampler,
            balancer=balancer,
            keep_groups_together=keep_groups_together,
            row_scale=row_scale,
            gain_window=gain_window,
            seed=seed,
            accumulate=accumulate,
        )
    else:
        if strategy is not None or correction is not None or keep_groups_together:
            raise ValueError(
                "task_sampling, correction and keep_groups_together act on GRPO's generations; with an SFTTrainer "
                "attach(...) measures only"
            )
        hooks = SftHooks(trainer, task_column, rows, row_scale=row_scale)
    frozen = bool(tracker_options.get("frozen"))
    chosen = layers_beside_the_head(trainer.model, layers, frozen)
    refuse_zero3(trainer, select_layers(trainer.model, chosen, frozen).layers, fused)
    # A list of names stands for "all" here: what it picked up without being asked for is still left out, not refused.
    tracker_options.setdefault("unverified", "skip" if layers == "all" else "raise")
    tracker = GradNormTracker(trainer.model, chosen, fused=fused, **{"plan": plan, **tracker_options})
    for remark in hooks.remarks:
        warnings.warn(remark, stacklevel=2)
    if undefined is not None:
        warnings.warn(undefined + _not_started(idle, task_sampling), stacklevel=2)
    _LOGGER.info("accumulate=%s", tracker.accumulation)
    trainer._gradnorm = Attachment(trainer, hooks, tracker, every, max_cosines)
    trainer._gradnorm.sampler = hooks.sampler or idle[0]
    trainer._gradnorm.balancer = hooks.balancer or idle[1]
    return trainer._gradnorm


def _not_started(idle: tuple[TaskSampler[Any] | None, TaskBalancer | None], task_sampling: str) -> str:
    """What does not start because U is undefined, as the end of the warning."""
    sampler, balancer = idle
    names = [f"task_sampling={task_sampling!r}"] if sampler is not None else []
    names += ["correction"] if balancer is not None else []
    if not names:
        return ""
    return (
        f". {' and '.join(names)} would go by no estimate and {'do' if len(names) > 1 else 'does'} not start: TRL "
        "draws and weights the rows. attach(..., allow_undefined=True) starts them all the same"
    )


def _controls(
    rows: list[Hashable] | None,
    strategy: str | None,
    correction: str | TaskBalancer | None,
    task_sampling: str,
    exponent: float | None,
    floor: float,
    decay: float | None,
    seed: int,
) -> tuple[TaskSampler[Any] | None, TaskBalancer | None]:
    """The sampler and the balancer that were asked for, over the tasks of the training data."""
    tasks = list(dict.fromkeys(rows or []))
    if rows is None and (strategy is not None or correction is not None):
        raise ValueError(
            "task_sampling and correction need a map-style training data set, whose tasks and rows can be listed; this "
            "one is a stream"
        )
    if strategy is None and exponent is not None:
        raise ValueError(f"exponent goes with task_sampling='power', got task_sampling={task_sampling!r}")
    sampler = None
    if strategy is not None:
        sampler = TaskSampler(tasks, strategy, exponent=exponent, floor=floor, decay=decay, seed=seed)
    balancer = TaskBalancer(tasks, correction, decay=decay, seed=seed) if isinstance(correction, str) else correction
    if balancer is not None and set(balancer.tasks) != set(tasks):
        raise ValueError(f"the balancer in correction= has the tasks {list(balancer.tasks)!r}, the data has {tasks!r}")
    return sampler, balancer


def layers_beside_the_head(model: Any, layers: LayerChoice, frozen: bool) -> LayerChoice:
    """``layers`` without the modules that own the output head's weight.

    TRL's fused head multiplies by that weight without calling the module, so no hook sees its gradient; a tied
    embedding would be measured without the head's part of it.

    Raises:
        ValueError: nothing else was chosen.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return layers
    selection = select_layers(model, layers, frozen)
    beside = [
        layer.name
        for layer in selection.layers
        if all(parameter is not weight for parameter in layer.module.parameters(recurse=False))
    ]
    if len(beside) == len(selection.layers):
        return layers
    owners = sorted({layer.name for layer in selection.layers} - set(beside))
    if not beside:
        raise ValueError(
            f"layers={layers!r} picks only the output head's weight ({', '.join(owners)}), which TRL's fused head uses "
            "without calling its module: choose other layers"
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    warnings.warn(
        f"not measured, {weight.numel() / trainable:.2%} of the trainable parameters: {', '.join(owners)}; TRL's fused "
        "head uses this weight without calling its module",
        stacklevel=3,
    )
    return [*beside, *sorted({name.rpartition(".")[0] for name in selection.skipped} - {""})]


class Attachment:
    """A tracker on a trainer. :meth:`detach` puts everything back.

    Attributes:
        tracker: the GradNormTracker; ``tracker.running`` pools all steps.
        sampler: the TaskSampler that draws the tasks; None where the trainer's own sampler was asked for.
        balancer: the TaskBalancer; None without a correction. Where U is undefined both may be idle (allow_undefined).
        last: the StepStats of the latest measured optimizer step.
    """

    #: The trainer's methods and attributes that are used, except for one that train() makes.
    NEEDS = (
        "training_step",
        "compute_loss",
        "log",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
    )

    def __init__(
        self, trainer: Any, hooks: GrpoHooks | SftHooks, tracker: GradNormTracker, every: int, max_cosines: int | None
    ) -> None:
        self.trainer, self.tracker, self.every, self.max_cosines = trainer, tracker, every, max_cosines
        self.sampler, self.balancer = hooks.sampler, hooks.balancer
        self.last = StepStats()
        self._hooks = hooks
        self._stack: ExitStack | None = None  # what is open around the present training step
        self._due: bool | None = None  # whether this optimizer step is one of every `every`; None before it is known
        self._opened = False  # whether this optimizer step has a measured micro-batch
        self._run: Any = None  # the trainer's state: a new object in each train()
        self._measurable_steps = 0
        self._has_news = False  # since the last log, as the two below
        self._window: dict[Hashable, RunningEstimate] = {}
        self._window_gram: RunningGram | None = None
        self._window_modes: Counter[str] = Counter()
        self._warned_of_cosines = False
        self._verified_factors: set[float] = set()
        self._before: dict[str, Any] = {}  # what the instance had under the names put on it
        for name, wrapper in {
            "training_step": self._training_step,
            "compute_loss": self._compute_loss,
            "log": self._log,
            "_save_optimizer_and_scheduler": self._save,
            "_load_optimizer_and_scheduler": self._load,
            **hooks.methods,
        }.items():
            self._put(name, wrapper)
        hooks.install()

    def _put(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadow one of the trainer's methods on this instance; ``wrapper`` gets the method itself first."""
        inner = getattr(self.trainer, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return wrapper(inner, *args, **kwargs)

        self._before[name] = self.trainer.__dict__.get(name)
        setattr(self.trainer, name, method)

    def detach(self) -> None:
        """Remove every method and hook: the trainer and the model are as they were before. May be called twice."""
        if not self._before:
            return
        for name, before in self._before.items():
            del self.trainer.__dict__[name]
            if before is not None:
                self.trainer.__dict__[name] = before
        self._before = {}
        self._hooks.uninstall()
        self.tracker.close()
        self.trainer.__dict__.pop("_gradnorm", None)

    # One micro-batch, one optimizer step

    def _training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._run is not self.trainer.state:
            self._run = self.trainer.state
            self._discard()  # of a train() that ended inside a step, whose gradients Trainer clears
        try:
            with ExitStack() as self._stack:
                loss = inner(*args, **kwargs)
        finally:
            self._stack = None
        if self.trainer.accelerator.sync_gradients:
            if self._opened:
                before = self.tracker.accumulation
                self.last = self.tracker.step()
                if self.tracker.accumulation != before:
                    _LOGGER.info("accumulate=%s", self.tracker.accumulation)
                self._take_in(self.last)
            self._due, self._opened, self._has_news = None, False, True
            self._hooks.end_step()
        self._hooks.end_micro_batch()
        return loss

    def _discard(self) -> bool:
        """Forget the micro-batches of a step that is not finished; whether there were any."""
        waiting = self._opened
        if waiting:
            self.tracker.discard()
        self._due, self._opened = None, False
        return waiting

    def _compute_loss(self, inner: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, with the tracker's micro-batch open around it and its backward where it is measured."""
        entries = {name: inputs[name] for name in self._hooks.ENTRIES if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in entries}
        if self._stack is None or not self._hooks.measurable() or not self._is_due():
            return inner(model, inputs, *args, **kwargs)
        missing = [name for name in self._hooks.REQUIRED if name not in entries]
        if missing:
            raise ValueError(self._hooks.explain_missing())
        # compute_loss(model, inputs, return_outputs, num_items_in_batch)
        num_items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        self._stack.enter_context(self.tracker.microbatch(**self._hooks.microbatch(inputs, entries, num_items)))
        self._opened = True
        loss = inner(model, inputs, *args, **kwargs)
        self._verify_factor(loss, self._hooks.loss_factor(num_items))
        return loss

    def _verify_factor(self, loss: Any, expected: float | None) -> None:
        """Have backward compare the factor that the loss is differentiated with to the one that row scales divide out.

        On a GPU reading it waits, so it is read once per expected value. ``expected`` is None for a row_scale= of the
        caller's own, which may account for anything.
        """
        if expected is None or expected in self._verified_factors or not isinstance(loss, Tensor):
            return

        def verify(gradient: Tensor) -> None:
            found = float(gradient.float().sum())
            if math.isfinite(found) and abs(found - expected) > FACTOR_TOLERANCE * abs(expected):
                raise RuntimeError(
                    f"training_step of {type(self.trainer).__name__} differentiates {found:.6g} times what "
                    f"compute_loss returned, and {expected:.6g} times was expected: U would be off by the square of "
                    "their ratio. Scale the loss inside compute_loss and say so with attach(..., row_scale=), or leave "
                    "training_step's loss as it is"
                )
            self._verified_factors.add(expected)

        if loss.requires_grad:
            loss.register_hook(verify)

    def _is_due(self) -> bool:
        """Counts the optimizer steps that can be measured; True in one of ``every``."""
        if self._due is None:
            self._due = self._measurable_steps % self.every == 0
            self._measurable_steps += 1
        return self._due

    def _take_in(self, stats: StepStats) -> None:
        """A measured optimizer step is over."""
        for task, gradient in stats.items():
            self._window.setdefault(task, RunningEstimate()).update(gradient)
        if self._window_gram is None or set(stats.tasks) - set(self._window_gram.tasks):
            earlier, tasks = self._window_gram, list(self._window)
            self._window_gram = RunningGram(tasks, None)
            if earlier is not None:
                self._window_gram.adopt(earlier)
        self._window_gram.update(stats)
        if stats.accumulate:
            self._window_modes[stats.accumulate] += 1
        self._hooks.update(stats)

    # The log

    def _log(self, inner: Callable[..., Any], logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.trainer.model.training and self._has_news:
            self._has_news = False
            logs.update({key: value for key, value in self.metrics().items() if math.isfinite(value)})
            self._window, self._window_gram, self._window_modes = {}, None, Counter()
            self._hooks.end_line()
        return inner(logs, *args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """What the next log line gets, pooled over the optimizer steps since the last one. A call changes nothing."""
        metrics: dict[str, float] = {}
        for task, estimate in self._window.items():
            metrics |= pooled_metrics(task, estimate)
        if self._window_gram is not None:
            metrics |= self._cosines(self._window_gram)
        steps = self._window_modes.total()
        metrics |= {f"accumulate/{mode}": count / steps for mode, count in self._window_modes.items()}
        return metrics | self._hooks.metrics()

    def _cosines(self, gram: RunningGram) -> dict[str, float]:
        """The cosines of at most ``max_cosines`` pairs of tasks.

        They are chosen by the weight of their samples and not by value, which would favour the noisiest.
        """
        matrix, weights = gram.matrix, gram.pair_weights
        order = sorted(enumerate(gram.tasks), key=lambda item: str(item[1]))
        found: list[tuple[float, str, float]] = []  # weight, key, cosine
        for (i, a), (j, b) in itertools.combinations(order, 2):
            squares, product = (float(matrix[i, i]), float(matrix[j, j])), float(matrix[i, j])
            if min(squares) > 0 and math.isfinite(product):
                found.append((float(weights[i, j]), pair_key("cosine", a, b), product / math.sqrt(math.prod(squares))))
        most = len(found) if self.max_cosines is None else self.max_cosines
        if len(found) > most > 0 and not self._warned_of_cosines:
            self._warned_of_cosines = True
            warnings.warn(
                f"{len(found)} pairs of tasks have a cosine: each log line gets the {most} measured on the most "
                "samples; attach(..., max_cosines=None) logs all",
                stacklevel=2,
            )
        heaviest = sorted(found, key=lambda entry: (-entry[0], entry[1]))[:most]
        return {key: cosine for _, key, cosine in sorted(heaviest, key=lambda entry: entry[1])}

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        return {
            "tracker": self.tracker.state_dict(),
            "measurable_steps": self._measurable_steps,
            **self._hooks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the state was saved under other settings of attach(...).
        """
        self._hooks.load_state_dict(state)
        self.tracker.load_state_dict(state["tracker"])
        self._measurable_steps = state["measurable_steps"]

    def _save(self, inner: Callable[..., Any], output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = inner(output_dir, *args, **kwargs)
        if self._discard():
            warnings.warn(
                "training stopped, or a stream ended, inside an optimizer step: its micro-batches are not counted, so "
                "that the checkpoint can be saved",
                stacklevel=3,
            )
        if self.trainer.args.should_save:
            with open(os.path.join(output_dir, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(self.state_dict(), file)
        return result

    def _load(self, inner: Callable[..., Any], checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        result = inner(checkpoint, *args, **kwargs)
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    self.load_state_dict(json.load(file))
            else:
                warnings.warn(
                    f"{checkpoint} holds no {STATE_FILE}: it was saved without attach(...), so running averages, draws "
                    "and weights start afresh",
                    stacklevel=3,
                )
        return result
