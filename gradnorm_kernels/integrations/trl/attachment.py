"""What every attached trainer shares: methods put on the instance, the open micro-batch, the log, the checkpoint."""

from __future__ import annotations

import abc
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ...control.balancer import RunningGram
from ...estimation.estimator import RunningEstimate
from ...tracking.layers import LayerChoice, select_layers
from ...tracking.tracker import GradNormTracker, StepStats

#: The file in a checkpoint's folder.
STATE_FILE = "gradnorm_state.json"


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
    outside = sorted({layer.name for layer in selection.layers} - set(beside))
    if not beside:
        raise ValueError(
            f"layers={layers!r} picks only the output head's weight ({', '.join(outside)}), which TRL's fused head "
            "uses without calling its module: choose other layers"
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    warnings.warn(
        f"not measured, {weight.numel() / trainable:.2%} of the trainable parameters: {', '.join(outside)}; TRL's "
        "fused head uses this weight without calling its module",
        stacklevel=4,
    )
    return [*beside, *sorted({name.rpartition(".")[0] for name in selection.skipped} - {""})]


class Attachment(abc.ABC):
    """A tracker on a trainer. :meth:`detach` puts everything back.

    Attributes:
        tracker: the GradNormTracker; ``tracker.running`` pools all steps.
        last: the StepStats of the latest measured optimizer step.
    """

    #: What the trainer must have for the hooks to hold.
    NEEDS: Sequence[str] = (
        "training_step",
        "compute_loss",
        "log",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
        "current_gradient_accumulation_steps",
    )

    def __init__(
        self, trainer: Any, task_column: str, layers: LayerChoice, every: int, tracker_options: Mapping[str, Any]
    ) -> None:
        self.trainer, self.task_column, self.every = trainer, task_column, every
        chosen = layers_beside_the_head(trainer.model, layers, bool(tracker_options.get("frozen")))
        self.tracker = GradNormTracker(trainer.model, chosen, **tracker_options)
        self.last = StepStats()
        self._stack: ExitStack | None = None
        self._due: bool | None = None  # whether this optimizer step is one of every `every`; None before it is known
        self._opened = False  # whether this optimizer step has a measured micro-batch
        self._measurable_steps = 0
        self._tasks: dict[Hashable, int] = {}
        self._has_news = False  # since the last log, as the two below
        self._window: dict[Hashable, RunningEstimate] = {}
        self._window_gram: RunningGram | None = None
        self._before: dict[str, Any] = {}  # what the instance had under the names put on it
        self._put("training_step", self._training_step)
        self._put("compute_loss", self._compute_loss)
        self._put("log", self._log)
        self._put("_save_optimizer_and_scheduler", self._save)
        self._put("_load_optimizer_and_scheduler", self._load)

    def _put(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadow one of the trainer's methods on this instance; ``wrapper`` gets the method itself first."""
        inner = getattr(self.trainer, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return wrapper(inner, *args, **kwargs)

        self._before[name] = self.trainer.__dict__.get(name)
        setattr(self.trainer, name, method)

    def detach(self) -> None:
        """Remove every method and hook: the trainer and the model are as they were before. May be called twice."""
        for name, before in self._before.items():
            del self.trainer.__dict__[name]
            if before is not None:
                self.trainer.__dict__[name] = before
        self._before = {}
        self.tracker.close()
        self.trainer.__dict__.pop("_gradnorm", None)

    # One micro-batch, one optimizer step

    def _training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with ExitStack() as self._stack:
                loss = inner(*args, **kwargs)
        finally:
            self._stack = None
        if self.trainer.accelerator.sync_gradients:
            if self._opened:
                self.last = self.tracker.step()
                self._take_in(self.last)
            self._due, self._opened, self._has_news = None, False, True
        return loss

    @abc.abstractmethod
    def _compute_loss(self, inner: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, with the tracker's micro-batch open around it where it is measured."""

    def _is_due(self) -> bool:
        """Counts the optimizer steps that can be measured; True in one of ``every``."""
        if self._due is None:
            self._due = self._measurable_steps % self.every == 0
            self._measurable_steps += 1
        return self._due

    def _open(self, **microbatch: Any) -> None:
        """The tracker's micro-batch around the forward that comes and the backward after it."""
        assert self._stack is not None
        self._stack.enter_context(self.tracker.microbatch(**microbatch))
        self._opened = True

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

    def _index(self, task: Hashable) -> int:
        return self._tasks.setdefault(task, len(self._tasks))

    def _name(self, index: int) -> Hashable:
        return list(self._tasks)[index]

    # The log

    def _log(self, inner: Callable[..., Any], logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.trainer.model.training and self._has_news:
            self._has_news = False
            logs.update({key: value for key, value in self.metrics().items() if math.isfinite(value)})
            self._window, self._window_gram = {}, None
        return inner(logs, *args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """What the next log line gets: pooled over the optimizer steps since the last one."""
        metrics: dict[str, float] = {}
        for task, estimate in self._window.items():
            metrics |= {
                f"tasks/{task}/grad_norm_sq": estimate.value,
                f"tasks/{task}/grad_norm_sq_se": estimate.std_error,
                f"tasks/{task}/noise_scale": estimate.noise_scale,
                f"tasks/{task}/n": estimate.n,
            }
        if self._window_gram is not None:
            matrix = self._window_gram.matrix
            order = sorted(enumerate(self._window_gram.tasks), key=lambda item: str(item[1]))
            for (i, a), (j, b) in itertools.combinations(order, 2):
                squares = float(matrix[i, i]), float(matrix[j, j])
                if min(squares) > 0:
                    metrics[f"tasks/cosine/{a}/{b}"] = float(matrix[i, j]) / math.sqrt(math.prod(squares))
        return metrics

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        return {"tracker": self.tracker.state_dict(), "measurable_steps": self._measurable_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.tracker.load_state_dict(state["tracker"])
        self._measurable_steps = state["measurable_steps"]

    def _save(self, inner: Callable[..., Any], output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = inner(output_dir, *args, **kwargs)
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
                    f"{checkpoint} holds no {STATE_FILE}: it was saved without attach(...), so running averages, "
                    "draws and weights start afresh",
                    stacklevel=3,
                )
        return result
