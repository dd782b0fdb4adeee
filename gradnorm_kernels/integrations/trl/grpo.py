"""GRPOTrainer: prompt and task ids through its generation buffer, rows drawn by task, advantages weighted by task.

TRL shuffles and splits every entry of the dictionary that ``_generate_and_score_completions`` returns in unison, so ids
that are added to it arrive with their rows in ``compute_loss``.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...control.balancer import TaskBalancer
from ...control.draws import TaskDraws
from ...control.sampler import TaskSampler
from ...estimation.metrics import task_key
from ...tracking.tracker import StepStats
from .loss_scale import grpo_row_scale, loss_factor
from .validation import grpo_remarks, refuse_grpo

PROMPT, TASK, WEIGHT = "_gradnorm_prompt", "_gradnorm_task", "_gradnorm_weight"

RowScale = Callable[..., Any]


class Totals:
    """Sums over the completions of one task: of rewards where there is one, absolute advantages and lengths."""

    def __init__(self) -> None:
        self.rows = self.scored = 0
        self.reward = self.abs_advantage = self.length = 0.0

    def add(self, reward: float, abs_advantage: float, length: float) -> None:
        """Add one completion; a reward of NaN means that no reward function scored it."""
        self.rows += 1
        self.abs_advantage += abs_advantage
        self.length += length
        if not math.isnan(reward):
            self.scored += 1
            self.reward += reward

    @property
    def mean_reward(self) -> float:
        """Over the completions that were scored; NaN where none was."""
        return self.reward / self.scored if self.scored else math.nan


class GrpoHooks:
    """What :func:`attach` adds to a GRPOTrainer; see there for the settings.

    Raises:
        ValueError: settings that cannot be measured, by name; the trainer is unchanged.
    """

    NEEDS = (
        "_generate_and_score_completions",
        "_calculate_rewards",
        "_generate",
        "_prepare_inputs",
        "reward_weights",
        "loss_type",
        "num_iterations",
        "num_generations",
    )
    ENTRIES = (PROMPT, TASK, WEIGHT)
    REQUIRED = (PROMPT, TASK)

    def __init__(
        self,
        trainer: Any,
        task_column: str,
        row_tasks: Sequence[Hashable] | None,
        *,
        sampler: TaskSampler[Any] | None,
        balancer: TaskBalancer | None,
        keep_groups_together: bool,
        row_scale: RowScale | None,
        gain_window: int,
        seed: int,
        accumulate: str | None,
    ) -> None:
        refuse_grpo(
            trainer,
            task_column,
            own_row_scale=row_scale is not None,
            keep_groups_together=keep_groups_together,
            accumulate=accumulate,
        )
        self.remarks = grpo_remarks(trainer, keep_groups_together, balancer is not None)
        self.methods: dict[str, Callable[..., Any]] = {
            "_generate_and_score_completions": self._generate_and_score,
            "_generate": self._generate,
            "_calculate_rewards": self._calculate_rewards,
        }
        if keep_groups_together:
            self.methods["_prepare_inputs"] = self._prepare_inputs_in_groups
        self.trainer, self.task_column = trainer, task_column
        self.sampler, self.balancer = sampler, balancer
        self._row_scale = grpo_row_scale if row_scale is None else row_scale
        self._row_tasks = row_tasks
        self._gain_window = gain_window
        self._draws = None if sampler is None or row_tasks is None else TaskDraws(row_tasks, sampler, seed)
        self._shares = {task: n / len(row_tasks) for task, n in Counter(row_tasks).items()} if row_tasks else {}
        self._tasks: dict[Hashable, int] = {}  # task -> its number in the buffer
        self._chunk: list[int] = []  # data rows of the current generation
        self._chunk_again = False  # a resumed run begins with a generation that was not used up
        self._micro_batches = 0  # since the generation
        self._generations = 0
        self._trained = True  # the weights were trained on the current generation's prompts, or there is none
        self._unfinished = False  # a resumed run generates again for prompts that the weights were trained on
        self._completions: list[list[list[int]]] | None = None  # by call of _generate, while a generation runs
        self._lengths: list[float] = []  # model tokens of this process's completions, in the current generation
        self._scores: list[float] = []  # rewards of all processes' completions, in the current generation
        self._totals: dict[Hashable, Totals] = {}  # since the last log
        self._step_totals: dict[Hashable, Totals] = {}  # since the last measured step
        self._history: list[dict[Hashable, float]] = []  # mean rewards of the latest generations

    def install(self) -> None:
        """Nothing beyond ``methods``."""

    def uninstall(self) -> None:
        """Nothing beyond ``methods``."""

    # From the data set to the generation buffer

    def _generate_and_score(self, inner: Callable[..., Any], inputs: list[dict[str, Any]]) -> Any:
        trainer = self.trainer
        if not trainer.model.training:
            return inner(inputs)
        if self._draws is not None:
            inputs = self._drawn_rows(self._draws, len(inputs))
        tasks = [self._task_of(row) for row in inputs]
        self._lengths, self._scores, self._completions = [], [], []
        output = inner(inputs)
        rows, group = len(inputs), trainer.num_generations
        first = trainer.accelerator.process_index * rows
        self._check_rows(output, [(first + row) // group for row in range(rows)])
        prompts = rows * trainer.accelerator.num_processes // group
        output[PROMPT] = torch.arange(first, first + rows) // group + self._generations * prompts
        output[TASK] = torch.tensor([self._tasks.setdefault(task, len(self._tasks)) for task in tasks])
        self._add_up(tasks, output["advantages"])
        if self.balancer is not None:
            weights = self.balancer.weights
            factor = torch.tensor([weights.get(task, 1.0) for task in tasks], dtype=torch.float64)
            advantages = output["advantages"]
            shaped = factor.to(advantages).reshape(-1, *[1] * (advantages.dim() - 1))
            output["advantages"], output[WEIGHT] = advantages * shaped, factor
        self._generations += 1
        self._trained, self._unfinished, self._micro_batches = self._unfinished, False, 0
        return output

    def _check_rows(self, output: Mapping[str, Any], groups: Sequence[int]) -> None:
        """That the rows which came back are those of the prompts that went in, whose tasks they get.

        Raises:
            ValueError: a subclass dropped, replaced or moved rows.
        """
        kind = type(self.trainer).__name__
        advice = (
            "so which task a row belongs to is not known: attach(...) to a trainer that keeps every row beside its "
            "prompt, or measure with GradNormTracker in a loop of your own"
        )
        rows = len(output["advantages"])
        if rows != len(groups):
            raise ValueError(
                f"_generate_and_score_completions of {kind} returned {rows} rows for {len(groups)}, {advice}"
            )
        calls = [call for call in self._completions or () if len(call) == rows]
        self._completions = None
        if not calls:  # a subclass may generate in another way
            return
        generated: dict[int, set[tuple[int, ...]]] = {}
        for call in calls:
            for group, ids in zip(groups, call, strict=True):
                generated.setdefault(group, set()).add(tuple(ids))
        for row, (group, ids) in enumerate(zip(groups, output["completion_ids"].tolist(), strict=True)):
            if not any(tuple(ids[: len(own)]) == own for own in generated[group]):
                raise ValueError(
                    f"_generate_and_score_completions of {kind} returned a completion in row {row} that was not "
                    f"generated for its prompt, {advice}"
                )

    def _drawn_rows(self, draws: TaskDraws, rows: int) -> list[dict[str, Any]]:
        """The rows that this process generates for, instead of those the loader brought.

        They are drawn here because every gradient of the past is known by now; every process draws the same.
        """
        trainer = self.trainer
        group = trainer.num_generations
        count = rows * trainer.accelerator.num_processes // group
        again = self._chunk[:count] if self._chunk_again else []  # of another number if the batch sizes have changed
        self._chunk = again + draws.draw(count - len(again))
        self._chunk_again = False
        first = trainer.accelerator.process_index * rows
        return [self._data_row(self._chunk[i // group]) for i in range(first, first + rows)]

    def _data_row(self, index: int) -> dict[str, Any]:
        """A row of the training data, of the task that was drawn.

        Raises:
            ValueError: the data is another than when the tasks of its rows were listed.
        """
        data, known = self.trainer.train_dataset, self._row_tasks or ()
        if index < min(len(data), len(known)):
            row: dict[str, Any] = data[index]
            if (task := self._task_of(row)) == known[index]:
                return row
            found = f"is of the task {task!r}, and was of {known[index]!r} when attach(...) was called"
        else:
            found = f"was drawn, and there are {len(data)} rows"
        raise ValueError(
            f"row {index} of trainer.train_dataset {found}, so tasks would not be drawn as asked for: replace the data "
            "before attach(...), and resume a run with the data that it began with"
        )

    def _task_of(self, row: dict[str, Any]) -> Hashable:
        if self.task_column not in row:
            raise ValueError(
                f"task_column={self.task_column!r} is not a column of the training data, which has {sorted(row)}: "
                "name the one that says which task a prompt belongs to"
            )
        task: Hashable = row[self.task_column]
        return task

    def _generate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note how many tokens of each completion the model wrote, as TRL counts them for its own log."""
        result = inner(*args, **kwargs)
        _, completion_ids, tool_mask = result[:3]
        if self._completions is not None:
            self._completions.append([list(ids) for ids in completion_ids])
        counts = map(len, completion_ids) if tool_mask is None else map(sum, tool_mask)
        self._lengths = [float(count) for count in counts]
        return result

    def _calculate_rewards(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the weighted sum of the reward functions, NaN for a completion that none of them scored."""
        per_function = inner(*args, **kwargs)
        weights = self.trainer.reward_weights.to(per_function.device)
        scores = (per_function * weights.unsqueeze(0)).nansum(dim=1)
        self._scores = scores.masked_fill(per_function.isnan().all(dim=1), math.nan).tolist()
        return per_function

    def _prepare_inputs_in_groups(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's _prepare_inputs with a shuffle that moves whole groups; it uses as many random numbers."""
        names = inspect.unwrap(type(self.trainer)._prepare_inputs).__globals__
        shuffle = names["shuffle_sequence_dict"]
        names["shuffle_sequence_dict"] = shuffle_groups
        try:
            return inner(*args, **kwargs)
        finally:
            names["shuffle_sequence_dict"] = shuffle

    # One micro-batch, one optimizer step

    def measurable(self) -> bool:
        """Whether the weights have not yet been trained on the current generation, and this is its first pass.

        A step that is longer than a generation repeats its rows (num_iterations) before the weights change.
        """
        args = self.trainer.args
        if not self._generations:  # of a buffer that was filled before attach, or no generation ever comes this way
            return self._micro_batches >= args.steps_per_generation * self.trainer.num_iterations
        return not self._trained and self._micro_batches < args.steps_per_generation

    def explain_missing(self) -> str:
        """Why a micro-batch without its ids cannot be measured."""
        return (
            f"a micro-batch of {type(self.trainer).__name__} lacks the entries {', '.join(self.REQUIRED)}, which "
            "attach(...) adds to what self._generate_and_score_completions(...) returns, so which task a row belongs "
            "to is not known: let _prepare_inputs call that, keep every entry, and select or sort all of them alike"
        )

    def loss_factor(self, num_items: Any) -> float | None:
        """What the loss is multiplied by before backward; None where row_scale= is the caller's own."""
        return loss_factor(self.trainer) if self._row_scale is grpo_row_scale else None

    def microbatch(self, inputs: dict[str, Any], entries: Mapping[str, Tensor], num_items: Any) -> dict[str, Any]:
        """The arguments of :meth:`GradNormTracker.microbatch`."""
        scale = self._row_scale(self.trainer, inputs)
        if WEIGHT in entries:
            scale = scale / entries[WEIGHT]
        names = list(self._tasks)
        return {
            "task_ids": [names[index] for index in entries[TASK].tolist()],
            "sample_ids": entries[PROMPT].tolist(),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "row_scale": scale,
            "rows_per_sample": self.trainer.num_generations,
        }

    def end_micro_batch(self) -> None:
        """A training step of the trainer is over."""
        self._micro_batches += 1

    def end_step(self) -> None:
        """The weights are about to be trained on what was generated so far."""
        self._trained = True

    def update(self, stats: StepStats) -> None:
        """A measured optimizer step is over: pass its estimates on to the sampler and the balancer."""
        if self.sampler is not None:
            self.sampler.update(stats)
        if self.balancer is not None:
            rewards = {task: totals.mean_reward for task, totals in self._step_totals.items() if totals.scored}
            self.balancer.update(stats, rewards)
        self._step_totals = {}

    # The log

    def _add_up(self, tasks: Sequence[Hashable], advantages: Tensor) -> None:
        """Add one generation's rewards, absolute advantages and lengths by task, over all processes."""
        sizes = advantages.detach().abs().reshape(len(tasks), -1).mean(1)
        lengths = self._lengths or [math.nan] * len(tasks)  # a subclass may generate in another way
        rows = list(zip(tasks, sizes.tolist(), lengths, strict=True))
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        scores = self._scores or [math.nan] * len(rows)
        generation: dict[Hashable, Totals] = {}
        for (task, size, length), reward in zip(rows, scores, strict=True):
            for totals in (generation, self._totals, self._step_totals):
                totals.setdefault(task, Totals()).add(reward, size, length)
        self._history.append({task: totals.mean_reward for task, totals in generation.items() if totals.scored})
        del self._history[: -2 * self._gain_window]

    def metrics(self) -> dict[str, float]:
        """What the next log line gets beside the estimates: pooled over the generations since the last one."""
        metrics: dict[str, float] = {}
        for task, totals in self._totals.items():
            metrics[task_key(task, "reward")] = totals.mean_reward
            metrics[task_key(task, "abs_advantage")] = totals.abs_advantage / totals.rows
            metrics[task_key(task, "response_length")] = totals.length / totals.rows
            metrics[task_key(task, "learning_gain")] = self._gain(task)
        shares = self._shares if self.sampler is None else self.sampler.probabilities
        metrics |= {task_key(task, "sampling_prob"): share for task, share in shares.items()}
        if self.balancer is not None:
            metrics |= {task_key(task, "weight"): weight for task, weight in self.balancer.weights.items()}
        return metrics

    def end_line(self) -> None:
        """A log line has the metrics: the next one begins afresh."""
        self._totals = {}

    def _gain(self, task: Hashable) -> float:
        """Mean reward of the latest ``gain_window`` generations minus that of as many before; NaN while too few."""
        window = self._gain_window
        if len(self._history) < 2 * window:
            return math.nan
        before = [means[task] for means in self._history[:window] if task in means]
        after = [means[task] for means in self._history[window:] if task in means]
        return sum(after) / len(after) - sum(before) / len(before) if before and after else math.nan

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        cycle = self.trainer.args.steps_per_generation * self.trainer.num_iterations
        unfinished = 0 < self._micro_batches < cycle
        return {
            "draws": None if self._draws is None else self._draws.state_dict(),
            "chunk": self._chunk if unfinished else [],
            "unfinished": unfinished,
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "history": [[[task, reward] for task, reward in means.items()] for means in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the state was saved under other settings of attach(...).
        """
        for name, own in (("draws", self._draws), ("balancer", self.balancer)):
            if (state[name] is None) != (own is None):
                raise ValueError(
                    f"the checkpoint was saved {'without' if own else 'with'} {name}: call attach(...) with the "
                    "task_sampling and correction of the run that saved it"
                )
        if self._draws is not None:
            self._draws.load_state_dict(state["draws"])
            self._chunk, self._chunk_again = list(state["chunk"]), bool(state["chunk"])
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        self._history = [dict(map(tuple, means)) for means in state["history"]]
        self._unfinished = bool(state.get("unfinished", state["chunk"]))  # older states tell it by the chunk alone


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
