"""GRPOTrainer: prompt and task ids through its generation buffer, draws by task, advantages by task weight.

TRL shuffles and splits every entry of the dictionary that ``_generate_and_score_completions`` returns in unison, so ids
put in there arrive with their rows in ``compute_loss``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...control.balancer import TaskBalancer
from ...control.draws import TaskDraws
from ...control.sampler import TaskSampler
from ...tracking.layers import LayerChoice
from ...tracking.tracker import StepStats
from .attachment import Attachment
from .loss_scale import grpo_remarks, grpo_row_scale, refuse_common, refuse_grpo

PROMPT, TASK, WEIGHT = "gradnorm_prompt", "gradnorm_task", "gradnorm_weight"

RowScale = Callable[[Any, dict[str, Any]], Tensor]


class GrpoAttachment(Attachment):
    """See :func:`gradnorm_kernels.integrations.trl.attach`.

    Attributes:
        sampler: the TaskSampler that draws the tasks; None where TRL's own sampler does.
        balancer: the TaskBalancer; None without a correction.
    """

    NEEDS = (
        *Attachment.NEEDS,
        "_generate_and_score_completions",
        "_calculate_rewards",
        "_prepare_inputs",
        "reward_weights",
        "loss_type",
        "num_iterations",
        "num_generations",
    )

    def __init__(
        self,
        trainer: Any,
        task_column: str,
        layers: LayerChoice,
        every: int,
        tracker_options: Mapping[str, Any],
        *,
        sampler: TaskSampler[Any] | None,
        row_tasks: Sequence[Hashable] | None,
        balancer: TaskBalancer | None,
        keep_groups_together: bool,
        row_scale: RowScale | None,
        gain_window: int,
        seed: int,
    ) -> None:
        self.sampler, self.balancer = sampler, balancer
        self._row_scale = grpo_row_scale if row_scale is None else row_scale
        self._gain_window = gain_window
        self._draws = None if sampler is None or row_tasks is None else TaskDraws(row_tasks, sampler, seed)
        self._shares = _shares(row_tasks) if row_tasks is not None and sampler is None else {}
        self._chunk: list[int] = []  # rows of the generation at hand
        self._chunk_again = False  # a resumed run begins with a generation that was not used up
        self._since_generation = 0  # micro-batches
        self._generations = 0
        self._generated_at: int | None = None  # optimizer steps before the generation at hand
        self._scores: Tensor | None = None
        self._sums: dict[Hashable, dict[str, float]] = {}  # since the last log
        self._step_rewards: dict[Hashable, tuple[float, int]] = {}  # since the last measured step
        self._history: list[dict[Hashable, float]] = []  # mean rewards of the latest generations
        refuse_common(trainer)
        if row_scale is None:
            refuse_grpo(trainer)
        if trainer.args.remove_unused_columns:
            raise ValueError(
                f"remove_unused_columns=True drops the column {task_column!r} before training sees it: set it to False "
                "in GRPOConfig (its default)"
            )
        if keep_groups_together and trainer.args.per_device_train_batch_size % trainer.num_generations:
            raise ValueError(
                f"keep_groups_together=True needs per_device_train_batch_size to be a multiple of "
                f"num_generations={trainer.num_generations}, got {trainer.args.per_device_train_batch_size}: a "
                "micro-batch cannot hold whole groups otherwise"
            )
        if tracker_options.get("accumulate") == "exact" and not keep_groups_together:
            raise ValueError(
                "accumulate='exact' needs keep_groups_together=True: it adds up whole prompts, and TRL's shuffle "
                "spreads a prompt over micro-batches"
            )
        shuffles = getattr(inspect.unwrap(type(trainer)._prepare_inputs), "__globals__", {})
        if keep_groups_together and "shuffle_sequence_dict" not in shuffles:
            raise ValueError(
                f"keep_groups_together=True replaces the shuffle inside _prepare_inputs, and that of "
                f"{type(trainer).__name__} has none of TRL's: leave it False"
            )
        super().__init__(trainer, task_column, layers, every, tracker_options)
        self._put("_generate_and_score_completions", self._generate)
        self._put("_calculate_rewards", self._rewards)
        if keep_groups_together:
            self._put("_prepare_inputs", self._prepare_grouped)
        own_loss = row_scale is None and not _is_trls_loss(trainer)
        for remark in grpo_remarks(trainer, own_loss, keep_groups_together):
            warnings.warn(remark, stacklevel=4)
        if balancer is not None and trainer.beta != 0.0:
            warnings.warn(
                f"beta={trainer.beta} with a correction: the weights scale advantages and not the KL term, and U "
                "counts the KL term's gradient divided by the task's weight",
                stacklevel=4,
            )

    # From the data set to the generation buffer

    def _generate(self, inner: Callable[..., Any], inputs: list[dict[str, Any]]) -> Any:
        trainer = self.trainer
        if not trainer.model.training:
            return inner(inputs)
        if self._draws is not None:
            inputs = self._drawn(self._draws, len(inputs))
        tasks = [self._task_of(row) for row in inputs]
        output = inner(inputs)
        rows, group = len(inputs), trainer.num_generations
        first = trainer.accelerator.process_index * rows
        prompts = rows * trainer.accelerator.num_processes // group
        output[PROMPT] = torch.arange(first, first + rows) // group + self._generations * prompts
        output[TASK] = torch.tensor([self._index(task) for task in tasks])
        self._note(tasks, output["advantages"], output["completion_mask"])
        if self.balancer is not None:
            weights = self.balancer.weights
            factor = torch.tensor([weights.get(task, 1.0) for task in tasks], dtype=torch.float64)
            advantages = output["advantages"]
            shaped = factor.to(advantages).reshape(-1, *[1] * (advantages.dim() - 1))
            output["advantages"], output[WEIGHT] = advantages * shaped, factor
        self._generations += 1
        self._generated_at, self._since_generation = trainer.state.global_step, 0
        return output

    def _drawn(self, draws: TaskDraws, rows: int) -> list[dict[str, Any]]:
        """The rows that this process generates for, in place of those the loader brought.

        Drawn here, when every gradient of the past is known, and by every process alike.
        """
        trainer = self.trainer
        group = trainer.num_generations
        if not self._chunk_again:
            self._chunk = draws.draw(rows * trainer.accelerator.num_processes // group)
        self._chunk_again = False
        first = trainer.accelerator.process_index * rows
        return [trainer.train_dataset[self._chunk[i // group]] for i in range(first, first + rows)]

    def _task_of(self, row: dict[str, Any]) -> Hashable:
        if self.task_column not in row:
            raise ValueError(
                f"task_column={self.task_column!r} is not a column of the training data, which has {sorted(row)}: "
                "name the one that says which task a prompt belongs to"
            )
        task: Hashable = row[self.task_column]
        return task

    def _rewards(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        per_function = inner(*args, **kwargs)
        weights = self.trainer.reward_weights.to(per_function.device)
        self._scores = (per_function * weights.unsqueeze(0)).nansum(dim=1)
        return per_function

    def _prepare_grouped(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's _prepare_inputs with a shuffle that moves whole groups; it takes as much of the random state."""
        names = inspect.unwrap(type(self.trainer)._prepare_inputs).__globals__
        shuffle = names["shuffle_sequence_dict"]
        names["shuffle_sequence_dict"] = shuffle_groups
        try:
            return inner(*args, **kwargs)
        finally:
            names["shuffle_sequence_dict"] = shuffle

    # One micro-batch

    def _training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = super()._training_step(inner, *args, **kwargs)
        self._since_generation += 1
        return loss

    def _compute_loss(self, inner: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = {name: inputs[name] for name in (PROMPT, TASK, WEIGHT) if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in ids}
        fresh = self._generated_at == self.trainer.state.global_step
        if self._stack is not None and ids and fresh and self._is_due():
            scale = self._row_scale(self.trainer, inputs)
            if WEIGHT in ids:
                scale = scale / ids[WEIGHT]
            self._open(
                task_ids=[self._name(index) for index in ids[TASK].tolist()],
                sample_ids=ids[PROMPT].tolist(),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                row_scale=scale,
                rows_per_sample=self.trainer.num_generations,
            )
        return inner(model, inputs, *args, **kwargs)

    def _take_in(self, stats: StepStats) -> None:
        super()._take_in(stats)
        if self.sampler is not None:
            self.sampler.update(stats)
        if self.balancer is not None:
            rewards = {task: total / count for task, (total, count) in self._step_rewards.items()}
            self.balancer.update(stats, rewards)
        self._step_rewards = {}

    # What is logged

    def _note(self, tasks: list[Hashable], advantages: Tensor, mask: Tensor) -> None:
        """Add up rewards, absolute advantages and lengths of one generation by task, over all processes."""
        sizes = advantages.detach().abs().reshape(len(tasks), -1).mean(1)
        rows = list(zip(tasks, sizes.tolist(), mask.sum(1).tolist(), strict=True))
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        scores = [math.nan] * len(rows) if self._scores is None else self._scores.tolist()
        means: dict[Hashable, list[float]] = {}
        for (task, size, length), reward in zip(rows, scores, strict=True):
            sums = self._sums.setdefault(task, dict.fromkeys(("rows", "reward", "abs_advantage", "length"), 0.0))
            for name, value in (("rows", 1), ("reward", reward), ("abs_advantage", size), ("length", length)):
                sums[name] += value
            means.setdefault(task, []).append(reward)
        for task, values in means.items():
            total, count = self._step_rewards.get(task, (0.0, 0))
            self._step_rewards[task] = (total + math.fsum(values), count + len(values))
        self._history.append({task: math.fsum(values) / len(values) for task, values in means.items()})
        del self._history[: -2 * self._gain_window]

    def metrics(self) -> dict[str, float]:
        metrics = super().metrics()
        for task, sums in self._sums.items():
            metrics[f"tasks/{task}/reward"] = sums["reward"] / sums["rows"]
            metrics[f"tasks/{task}/abs_advantage"] = sums["abs_advantage"] / sums["rows"]
            metrics[f"tasks/{task}/response_length"] = sums["length"] / sums["rows"]
            gain = self._gain(task)
            if gain is not None:
                metrics[f"tasks/{task}/learning_gain"] = gain
        self._sums = {}
        shares = self._shares if self.sampler is None else self.sampler.probabilities
        metrics |= {f"tasks/{task}/sampling_prob": share for task, share in shares.items()}
        if self.balancer is not None:
            metrics |= {f"tasks/{task}/weight": weight for task, weight in self.balancer.weights.items()}
        return metrics

    def _gain(self, task: Hashable) -> float | None:
        """Mean reward of the latest ``gain_window`` generations minus that of as many before; None while too few."""
        window = self._gain_window
        if len(self._history) < 2 * window:
            return None
        rewards = [means.get(task) for means in self._history]
        before = [reward for reward in rewards[:window] if reward is not None]
        after = [reward for reward in rewards[window:] if reward is not None]
        return sum(after) / len(after) - sum(before) / len(before) if before and after else None

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        cycle = self.trainer.args.steps_per_generation * self.trainer.num_iterations
        return {
            **super().state_dict(),
            "draws": None if self._draws is None else self._draws.state_dict(),
            "chunk": self._chunk if 0 < self._since_generation < cycle else [],
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "history": [[[task, reward] for task, reward in means.items()] for means in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in (("draws", self._draws), ("balancer", self.balancer)):
            if (state[name] is None) != (own is None):
                raise ValueError(
                    f"the checkpoint was saved {'without' if own else 'with'} {name}: call attach(...) with the "
                    "task_sampling and correction of the run that saved it"
                )
        super().load_state_dict(state)
        if self._draws is not None:
            self._draws.load_state_dict(state["draws"])
            self._chunk, self._chunk_again = list(state["chunk"]), bool(state["chunk"])
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        self._history = [dict(map(tuple, means)) for means in state["history"]]


def _shares(row_tasks: Sequence[Hashable]) -> dict[Hashable, float]:
    counts: dict[Hashable, int] = {}
    for task in row_tasks:
        counts[task] = counts.get(task, 0) + 1
    return {task: count / len(row_tasks) for task, count in counts.items()}


def _is_trls_loss(trainer: Any) -> bool:
    from trl import GRPOTrainer

    return all(getattr(type(trainer), name) is getattr(GRPOTrainer, name) for name in ("_compute_loss", "compute_loss"))


def shuffle_groups(rows: dict[str, Any]) -> dict[str, Any]:
    """TRL's shuffle of a generation's rows with the rows of one prompt kept together, in the order they came."""
    prompts = rows[PROMPT].tolist() if PROMPT in rows else None
    length = len(next(value for value in rows.values() if value is not None))
    order: list[int] = torch.randperm(length).tolist()
    if prompts is not None:
        members: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            members.setdefault(prompt, []).append(row)
        order = [row for prompt in dict.fromkeys(prompts[i] for i in order) for row in members[prompt]]
    index = torch.tensor(order)

    def moved(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[index] if isinstance(value, Tensor) else [value[i] for i in order]

    return {name: moved(value) for name, value in rows.items()}
