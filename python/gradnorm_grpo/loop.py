"""The GRPO loop: draw tasks, sample groups, score, measure every task's gradient while going backward, update."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from gradnorm_kernels import GradNormTracker, StepPlan, StepStats
from gradnorm_kernels.control.balancer import TaskBalancer
from gradnorm_kernels.estimation.metrics import gradient_metrics, task_key

from .checkpoint import same_random_state
from .errors import UserError
from .mixture import Mixture
from .models import adamw, mixed_precision
from .objective import advantages, row_weights, token_losses
from .rollout import Prompter, Rollouts, completion_logprobs, completion_texts, generate, pad
from .runlog import FULL, Line, pair_metrics, task_metrics
from .settings import Settings
from .tasks import Example, Task

#: Model, tokenizer, the prompts' token ids, completions per prompt and the settings to completions.
Sampler = Callable[[Any, Any, Sequence[Sequence[int]], int, Settings], Rollouts]


@dataclass
class Batch:
    """The rollouts of one step, scored; one entry per prompt in the lists, [n, G] in the tensors."""

    tasks: list[str]
    examples: list[Example]
    rollouts: Rollouts
    rewards: Tensor
    advantages: Tensor
    sampling: dict[str, float]
    weights: dict[str, float] | None = None  # the factors of the tasks' advantages in the loss; None: 1 for all


def _estimates(stats: StepStats, prefix: str = "") -> Line:
    """Every task's gradient statistics by metric key."""
    return {key: value for task, found in stats.items() for key, value in gradient_metrics(task, found, prefix).items()}


def describe(batch: Batch, stats: StepStats) -> Line:
    """The step's numbers of every task, by metric key."""
    rollouts, group = batch.rollouts, batch.rollouts.group
    prompt_lengths = rollouts.prompt_mask.sum(1).tolist()
    response_lengths = rollouts.completion_mask.sum(1).view(-1, group).float().mean(1).tolist()
    line: Line = {
        "tokens": int(rollouts.completion_mask.sum()),
        "truncated": 1.0 - float(rollouts.ended.float().mean()),
    }
    for name, probability in batch.sampling.items():
        values, at = {"sampling_prob": probability}, [i for i, task in enumerate(batch.tasks) if task == name]
        if batch.weights is not None:
            values["loss_weight"] = batch.weights[name]
        if at:
            values |= {
                "prompts": len(at),
                "reward": float(batch.rewards[at].mean()),
                "reward_std": float(batch.rewards[at].std(1).mean()),
                "abs_advantage": float(batch.advantages[at].abs().mean()),
                "prompt_length": sum(prompt_lengths[i] for i in at) / len(at),
                "response_length": sum(response_lengths[i] for i in at) / len(at),
            }
        line |= task_metrics(name, values)
    return line | estimates(stats, list(batch.sampling))


def estimates(stats: StepStats, names: Sequence[str]) -> Line:
    """The statistics of every task's gradient, and the inner products and cosines of the tasks ``names``, by key."""
    line = _estimates(stats)
    order = {task: i for i, task in enumerate(stats.tasks)} if stats else {}
    for a, b in itertools.combinations([name for name in names if name in order], 2):
        tables = {"cosine": stats.cosines, "inner_product": stats.inner_products}
        line |= pair_metrics(a, b, {name: float(table[order[a], order[b]]) for name, table in tables.items()})
    return line


class Grpo:
    """Model, optimizer, tracker, sampler and the tasks' data positions: what a step changes and a checkpoint keeps."""

    def __init__(
        self,
        settings: Settings,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        prompter: Prompter,
        reference: Any = None,
    ) -> None:
        """``reference``: the frozen model that ``beta`` holds the trained one to, copied before the tracker's hooks."""
        self.settings, self.model, self.tokenizer, self.prompter = settings, model, tokenizer, prompter
        self.reference = reference
        self.tasks = {task.name: task for task in tasks}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters, settings, settings.learning_rate)
        try:
            self.scheduler = get_scheduler(
                settings.lr_scheduler_type,
                self.optimizer,
                num_warmup_steps=settings.warmup_steps,
                num_training_steps=max(1, settings.max_steps * settings.num_iterations),
            )
            together = min(settings.per_device_train_batch_size // settings.num_generations, settings.prompts_per_step)
            plan = StepPlan(settings.prompts_per_step, together, whole=True, tasks=len(tasks))
            # Decoders have the rows first. Of a single prompt, or of few rows, shapes are not enough to tell.
            dim = 0 if settings.tracker_layers == "last_attention" else None
            self.tracker = (
                GradNormTracker(model, settings.tracker_layers, settings.tracker_fused, plan=plan, batch_dim=dim)
                if settings.track
                else None
            )
            # Beside the first one, for the question whether a few layers stand for all of them.
            self.full_tracker = GradNormTracker(model, "all", plan=plan) if settings.full_steps else None
            self.mixture = Mixture(settings, tasks)
            self.sampler = self.mixture.sampler
            self.balancer = (
                TaskBalancer(
                    list(self.tasks), settings.task_weighting, decay=settings.task_weighting_decay, seed=settings.seed
                )
                if settings.task_weighting != "none"
                else None
            )
        except (ValueError, ImportError) as error:
            raise UserError(f"a setting does not fit: {error}") from error
        self.step_number = 0
        self._verify()

    def _verify(self) -> None:
        """Let the trackers verify the measured layers on a few tokens, whose measurement is discarded.

        The verification takes several forwards: in the first step they would be those of a whole batch. A layer that
        cannot be measured is named here, before the warm start.
        """
        watching = [tracker for tracker in (self.tracker, self.full_tracker) if tracker is not None]
        if not watching:
            return
        device = next(iter(self.parameters)).device
        try:
            with same_random_state(device):
                self.accumulate(self.few_tokens(device), [], watching)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f"tracker_layers {self.settings.tracker_layers!r} cannot be measured: {error}") from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for tracker in watching:
                tracker.discard()

    def few_tokens(self, device: torch.device) -> Batch:
        """Short prompts with groups of three-token completions, made of the tasks' first questions."""
        group = self.settings.num_generations
        count = min(4, self.settings.per_device_train_batch_size // group)
        names = [list(self.tasks)[i % len(self.tasks)] for i in range(count)]
        examples = [Example(self.tasks[name].preview(1 + i)[-1], "") for i, name in enumerate(names)]
        tokens = [self.prompter.tokens(name, example) for name, example in zip(names, examples, strict=True)]
        # As many tokens as rows could not be told from them.
        longest = next(n for n in range(14, 20) if not {n - 1, n, n + 2} & {count, count * group})
        prompts = [(row * longest)[: longest - i] for i, row in enumerate(tokens)]
        completions = [[row[(2 * j + k) % len(row)] for k in range(3)] for row in prompts for j in range(group)]
        prompt_ids, prompt_mask = pad(prompts, self.tokenizer.pad_token_id, "left", device)
        completion_ids, completion_mask = pad(completions, self.tokenizer.pad_token_id, "right", device)
        ended = torch.ones(len(completions), dtype=torch.bool, device=device)
        rollouts = Rollouts(prompt_ids, prompt_mask, completion_ids, completion_mask, ended, group)
        signs = torch.tensor([(-1.0) ** j for j in range(group)]).expand(count, group)
        return Batch(names, examples, rollouts, torch.zeros(count, group), signs, {})

    # One step, from prompts to update

    def step(self, look: Callable[[Batch], None] | None = None) -> Line:
        """One batch of rollouts and its ``num_iterations`` updates; returns what happened.

        ``look`` is called with the batch before the update, and leaves no gradients behind.
        """
        settings, started = self.settings, time.perf_counter()
        device = next(iter(self.parameters)).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch = self.rollout(self.mixture.draw(settings.prompts_per_step))
        if look is not None:
            look(batch)
        rolled_out = time.perf_counter()  # the completions have been read: no GPU is still at work on them
        line: Line = {"kind": "train", "step": self.step_number + 1}
        old: list[Tensor] = []
        for iteration in range(settings.num_iterations):
            # Later iterations have weights that have seen these prompts: only the first is measured.
            full = iteration == 0 and settings.full_steps > 0 and self.step_number % settings.full_steps == 0
            line_loss, stats = self.backward(batch, old, measure=iteration == 0, full=full)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm or math.inf))
            if not math.isfinite(norm):
                raise UserError(
                    f"the gradient of step {self.step_number + 1} is not finite (norm {norm}, loss {line_loss}), and "
                    "an update by it would spoil the weights: the run ends before it; lower "
                    f"learning_rate={settings.learning_rate:g}, or take dtype float32, and go on from a checkpoint"
                )
            if iteration == 0:
                lr = self.scheduler.get_last_lr()[0]
                line |= {"loss": line_loss, "grad_norm": norm, "lr": lr, **describe(batch, stats)}
                if full and self.full_tracker is not None:
                    line |= _estimates(self.full_tracker.step(), FULL)
                self.sampler.update(stats)
                if self.balancer is not None:
                    rewards = {task: line[task_key(task, "reward")] for task in dict.fromkeys(batch.tasks)}
                    self.balancer.update(stats, rewards)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        line |= {"rollout_seconds": rolled_out - started, "update_seconds": time.perf_counter() - rolled_out}
        if device.type == "cuda":
            line["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        self.step_number += 1
        return line

    def rollout(self, tasks: list[str], sample: Sampler = generate) -> Batch:
        """Completions, rewards and advantages for the next example of each task in ``tasks``; ``sample`` makes them."""
        settings, sampling = self.settings, self.sampler.probabilities
        examples = [self.tasks[task].next_example() for task in tasks]
        prompts = [self.prompter.ids(task, example) for task, example in zip(tasks, examples, strict=True)]
        rollouts = sample(self.model, self.tokenizer, prompts, settings.num_generations, settings)
        texts = completion_texts(self.tokenizer, rollouts)
        group = settings.num_generations
        scores = [self.tasks[tasks[i // group]].score(text, examples[i // group]) for i, text in enumerate(texts)]
        rewards = torch.tensor(scores).view(len(tasks), group)
        weights = self.balancer.weights if self.balancer is not None else None
        return Batch(tasks, examples, rollouts, rewards, advantages(rewards, settings.scale_rewards), sampling, weights)

    def backward(self, batch: Batch, old: list[Tensor], measure: bool, full: bool = False) -> tuple[float, StepStats]:
        """Accumulate the gradient of the step's loss; returns the loss and, with ``measure``, the tasks' estimates.

        ``old`` receives the sampling-time log-probabilities in the first iteration and holds them for the later ones.
        ``full``: let ``full_tracker`` watch as well; its ``step()`` is the caller's.
        """
        trackers = [self.tracker if measure else None, self.full_tracker if full else None]
        total = self.accumulate(batch, old, [tracker for tracker in trackers if tracker is not None])
        return total, self.tracker.step() if measure and self.tracker else StepStats()

    def accumulate(
        self, batch: Batch, old: list[Tensor], watching: Sequence[GradNormTracker], first_sample: int = 0
    ) -> float:
        """Accumulate the gradient of the batch's loss in micro-batches of whole groups; returns the loss.

        ``old``: as in :meth:`backward`. ``watching``: the trackers that see it, for which the batch's prompts are the
        samples from ``first_sample`` on.
        """
        settings, total = self.settings, 0.0
        first_iteration, group = not old, settings.num_generations
        per_micro = settings.per_device_train_batch_size // group
        counted = self._counted(batch.rollouts)
        step_tokens = int(counted.sum())
        self.model.train()
        for micro, first in enumerate(range(0, len(batch.tasks), per_micro)):
            last = min(first + per_micro, len(batch.tasks))
            rollouts = batch.rollouts.rows(first, last)
            mask = counted[first * group : last * group, : rollouts.completion_ids.shape[1]]
            weights, scale = row_weights(mask, step_tokens, settings)
            advantage = batch.advantages[first:last].reshape(-1).to(mask.device)
            if batch.weights is not None:
                factor = torch.tensor([batch.weights[task] for task in batch.tasks[first:last]], dtype=torch.float64)
                factor = factor.repeat_interleave(group)
                # What is measured stays the gradient of the unweighted loss.
                advantage, scale = advantage * factor.to(advantage), scale / factor
            with self._measuring(watching, batch.tasks[first:last], first_sample + first, scale):
                logprobs = self.logprobs(self.model, rollouts, watching)
                if first_iteration:
                    old.append(logprobs.detach())
                losses = token_losses(logprobs, old[micro], advantage, self._reference_logprobs(rollouts), settings)
                loss = (weights * torch.where(mask > 0, losses, 0.0).sum(1)).sum()
                loss.backward()
            total += float(loss.detach())
        return total

    @contextmanager
    def _measuring(
        self, trackers: Sequence[GradNormTracker], tasks: list[str], first: int, scale: Tensor
    ) -> Iterator[None]:
        rows = [i for i in range(len(tasks)) for _ in range(self.settings.num_generations)]
        with contextlib.ExitStack() as stack:
            for tracker in trackers:
                opened = tracker.microbatch([tasks[i] for i in rows], [first + i for i in rows], row_scale=scale)
                stack.enter_context(opened)
            yield

    def _counted(self, rollouts: Rollouts) -> Tensor:
        if not self.settings.mask_truncated_completions:
            return rollouts.completion_mask
        return rollouts.completion_mask * rollouts.ended[:, None]

    def logprobs(self, model: Any, rollouts: Rollouts, watching: Sequence[GradNormTracker] = ()) -> Tensor:
        """[n G, C] log-probabilities under ``model`` at the sampling temperature; ``watching``: the open trackers."""
        head = model.get_output_embeddings()
        watched = any(model.get_submodule(name) is head for tracker in watching for name in tracker.layers)
        with mixed_precision(self.settings, rollouts.prompt_ids.device):
            return completion_logprobs(
                model, rollouts, self.settings.temperature, self.settings.shares_prompt, pad_logits=watched
            )

    def _reference_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.logprobs(self.reference, rollouts)

    def close(self) -> None:
        """Remove the trackers' hooks from the model."""
        for tracker in (self.tracker, self.full_tracker):
            if tracker is not None:
                tracker.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and global random states."""
        return {
            "step": self.step_number,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **self.mixture.state_dict(),
            "balancer": self.balancer.state_dict() if self.balancer else None,
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "full_tracker": self.full_tracker.state_dict() if self.full_tracker else None,
        }

    def plan_steps(self, steps: int) -> None:
        """Take the learning rate of the steps to come from the schedule of a run of ``steps`` steps.

        A schedule that does not depend on the number of steps, as a constant one, is left as it is.
        """
        scheduler, settings = self.scheduler, self.settings
        if not isinstance(scheduler, LambdaLR):
            return
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        total = max(1, steps * settings.num_iterations)
        planned = get_scheduler(settings.lr_scheduler_type, stand_in, settings.warmup_steps, total)
        scheduler.lr_lambdas = planned.lr_lambdas * len(scheduler.base_lrs)
        self._take_optimizer_settings()

    def _take_optimizer_settings(self) -> None:
        """The optimizer's settings of this run in place of the loaded ones: the same bits where nothing changed."""
        settings, scheduler, groups = self.settings, self.scheduler, self.optimizer.param_groups
        for group in groups:
            group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_epsilon
            group["weight_decay"] = settings.weight_decay
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [settings.learning_rate for _ in scheduler.base_lrs]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"] = settings.learning_rate
                group["lr"] = settings.learning_rate * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]
        elif any(group.get("initial_lr", settings.learning_rate) != settings.learning_rate for group in groups):
            raise UserError(
                f"learning_rate cannot change in a resumed run with lr_scheduler_type={settings.lr_scheduler_type!r}, "
                "which is no factor of the step: resume without the change, or start a new run"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step_number = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._take_optimizer_settings()
        self.mixture.load_state_dict(state)
        if self.balancer and state.get("balancer"):
            self.balancer.load_state_dict(state["balancer"])
        if self.tracker and state["tracker"]:
            self.tracker.load_state_dict(state["tracker"])
        if self.full_tracker and state.get("full_tracker"):
            self.full_tracker.load_state_dict(state["full_tracker"])
