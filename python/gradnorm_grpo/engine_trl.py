"""Engine 'trl': the run of this program, its steps made by TRL's GRPOTrainer on one or more processes.

Read from top to bottom: what the processes agree on, a trainer that takes its prompts from the mixture and its rewards
from the tasks, and the run around it. `accelerate launch` starts the same script on every process; the main one writes
the run's folder. Batch sizes are per process, as in TRL; everything that is logged is of all processes together.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file, save_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import GenerationConfig, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from gradnorm_kernels import StepStats
from gradnorm_kernels.control.balancer import TaskBalancer
from gradnorm_kernels.integrations.trl import attach

from .checkpoint import finish_checkpoint, storage_errors
from .errors import PeerError, UserError
from .loop import Batch, describe
from .mixture import Mixture
from .models import load_model
from .progress import Display
from .rollout import Rollouts, evaluate, held_out_metrics
from .runlog import LOG_FILE, Line, check_log
from .settings import Settings
from .tasks import Example
from .train import REFERENCE_FILE, Interruption, Training
from .trl_arguments import grpo_config, lora_config

STATE_FILE = "run_state.json"  # in a checkpoint: the mixture, the log's length and the time
SIGNAL_COPIES = 10.0  # seconds: a launcher passes on the Ctrl-C that the terminal has already sent to every process


# What the processes agree on


@contextlib.contextmanager
def on_all_processes() -> Iterator[None]:
    """A UserError of one process ends the block with that error on all of them, so that none waits for another."""
    error: UserError | None = None
    try:
        yield
    except UserError as found:
        error = found
    messages = gather_object([None if error is None else (str(error), error.exit_code)])
    if first := next((message for message in messages if message is not None), None):
        shared = UserError(first[0])
        shared.exit_code, shared.shared = first[1], True
        raise shared from error


def from_main(value: Any) -> Any:
    """The main process's value."""
    return gather_object([value])[0]


def _described_launcher() -> str:
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "none"


# The trainer


class TaskTrainer(GRPOTrainer):
    """A GRPOTrainer whose prompts come from the run's mixture when a generation begins, and whose reward is the task's.

    TRL's loader brings rows before the last step's gradients exist; here it only counts steps. Every process draws the
    prompts of all, in the loop's order, and takes its own rows.
    """

    run: TrlTraining
    generation_kwargs: dict[str, Any]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The rows of this process for the generation that the optimizer step begins or goes on with."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._rows = self.run.next_rows()
        return [self._rows] * num_batches, None

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        rows = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.generation_batch_size
        return SequentialSampler(range(rows))

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The prompts are whole texts: TRL would add another beginning-of-text token to a chat template's."""
        return self.processing_class(prompts, add_special_tokens=False)["input_ids"], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        sizes = output["advantages"].detach().reshape(len(inputs), -1).mean(1).tolist()
        prompts = output["prompt_mask"].sum(1).tolist()
        self.run.take_in(inputs, prompts, sizes, time.perf_counter() - began)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, and after an optimizer step the run's own line and evaluation."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.run.on_log(logs)

    def greedy_completions(self, prompts: list[str]) -> list[list[int]]:
        """One greedy completion per prompt; every process calls it with as many prompts."""
        ids, _, _ = self._tokenize_prompts(prompts)
        training = self.model.training
        self.model.eval()
        with self._greedily():
            completions, _ = self._generate_single_turn(ids, None, {}, 1)
        self.model.train(training)
        return completions

    @contextlib.contextmanager
    def _greedily(self) -> Iterator[None]:
        if self.use_vllm:
            owner: Any = self.vllm_generation
            change: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": None}
            change |= {"repetition_penalty": 1.0, "generation_kwargs": {}}
        else:
            kept = ("max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "cache_implementation")
            greedy = {name: self.generation_kwargs[name] for name in kept}
            greedy |= {"do_sample": False, "repetition_penalty": 1.0}
            config = GenerationConfig(**greedy, disable_compile=True)
            owner, change = self, {"generation_config": config, "generation_kwargs": greedy}
        before = {name: getattr(owner, name) for name in change}
        owner.__dict__.update(change)
        try:
            yield
        finally:
            owner.__dict__.update(before)

    # Checkpoints: the Trainer's, under a temporary name until they are whole

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.folder / ".unfinished")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(self._get_output_dir(trial))
        temporary = place / f"checkpoint-{self.state.global_step}"
        final = self.run.folder / temporary.name
        main = self.args.should_save
        with on_all_processes(), storage_errors(self.run.folder, temporary.name):
            if main:
                shutil.rmtree(place, ignore_errors=True)
            super()._save_checkpoint(model, trial)
        with on_all_processes(), storage_errors(self.run.folder, temporary.name):
            if main:
                (temporary / STATE_FILE).write_text(json.dumps(self.run.state_dict()), encoding="utf-8")
                finish_checkpoint(temporary, final, self.state.global_step, self.run.settings.save_total_limit)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run's report describes it."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, LambdaLR):
            # With another max_steps the next step's rate is the new schedule's; the same bits without a change.
            for group, base, factor in zip(
                self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class _Pace(TrainerCallback):
    """Passes the beginning and the end of the trainer's steps on to the run."""

    def __init__(self, run: TrlTraining) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._run.evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        save, stop = self._run.on_step_end(state.global_step)
        control.should_save, control.should_training_stop = save, stop


# The run


_BATCHES = "TRL's position in the generations belongs to the first"
_OPTIMIZER = "the Trainer restores the optimizer and its schedule"


class TrlTraining(Training):
    """One run of TRL's GRPOTrainer in its folder; every process makes one, and the main process writes."""

    fixed: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), _BATCHES),
        **dict.fromkeys(("num_generations", "num_iterations"), _BATCHES),
        **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
        **dict.fromkeys(("lr_scheduler_type", "warmup_steps"), _OPTIMIZER),
        "beta": "the reference model belongs to the first",
    }

    def __init__(self, settings: Settings, name: str, console: Console) -> None:
        """Everything that can be refused is, before the first line of a file of the run is written or changed."""
        with tempfile.TemporaryDirectory() as scratch:
            args = grpo_config(settings, scratch)  # joins the processes
            args.device  # noqa: B018  # and this does where there is a launcher
            self.processes, self.rank = args.world_size, args.process_index
            self.main = self.rank == 0
            found: str | None = None
            self.settings, self.console = settings, console
            with on_all_processes():
                if self.main:
                    found = str(super()._checkpoint_to_resume(name) or "")
            self._found = from_main(found)
            with on_all_processes():
                super().__init__(settings, name, console)
                self._read_state()
                self.model, self.tokenizer = load_model(settings)
                self.prompter = self._make_prompter()
                lora = lora_config(settings)
            with on_all_processes():
                self._make_trainer(args, lora, Path(scratch))
            with on_all_processes():
                if self.main:
                    self._open(name, self.state["metrics_bytes"] if self.state else None)
            if not self.main:
                self.folder = Path()
        self.folder = Path(from_main(str(self.folder.absolute())))
        self.trainer.args.output_dir = str(self.folder)
        if args.log_completions and self.main:
            (self.folder / "completions").mkdir(exist_ok=True)

    def _checkpoint_to_resume(self, name: str) -> Path | None:
        """What the main process has found intact: hashing it is work enough for one."""
        return Path(self._found) if self._found else None

    def _read_state(self) -> None:
        """The state of a checkpoint of this engine, checked; None for a new run."""
        self.state: dict[str, Any] | None = None
        if not self.checkpoint or not self.before:
            return
        path = self.checkpoint / STATE_FILE
        if not path.is_file():
            raise UserError(f"{self.checkpoint} was not written by engine 'trl': it has no {STATE_FILE}")
        before = self.before.get("processes", 1)
        if before != self.processes:
            raise UserError(
                f"the run was on {before} process{'es' * (before > 1)} and cannot go on with {self.processes}: its "
                f"batches and random states are per process; launch {before}"
            )
        self.state = json.loads(path.read_text(encoding="utf-8"))
        self.started -= self.state["seconds"]
        check_log(self.checkpoint.parent / LOG_FILE, self.state["metrics_bytes"])

    def _make_trainer(self, args: Any, lora: Any, scratch: Path) -> None:
        """The trainer with the tracker on it, over one row per task: the rows it trains on are the mixture's."""
        settings, names = self.settings, [task.name for task in self.tasks]
        group, rows = settings.num_generations, settings.completions_per_step
        self.prompts = rows * self.processes // group
        self._scored: list[tuple[float, int, bool]] = []  # of this process: reward, length, ended
        self._batch: Batch | None = None
        self._line: Line = {}
        self._stats = StepStats()  # of the present step
        self._measured: StepStats | None = None  # the latest that attach has
        self._stop = Interruption(SIGNAL_COPIES if self.processes > 1 else 0.0)
        try:
            self.mixture = Mixture(settings, self.tasks)
            correction = (
                TaskBalancer(names, settings.task_weighting, decay=settings.task_weighting_decay, seed=settings.seed)
                if settings.task_weighting != "none"
                else None
            )
            with self._reference_source(scratch), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                self.trainer = TaskTrainer(
                    model=self.model,
                    reward_funcs=self._reward,
                    args=args,
                    train_dataset=Dataset.from_dict({"task": names, "prompt": [""] * len(names)}),
                    processing_class=self.tokenizer,
                    peft_config=lora,
                    callbacks=[_Pace(self)],
                )
                self.trainer.run = self
                self.attached = attach(
                    self.trainer,
                    layers=settings.tracker_layers,
                    fused=settings.tracker_fused,
                    correction=correction,
                    keep_groups_together=settings.per_device_train_batch_size % group == 0,
                    gain_window=settings.gain_window,
                    allow_undefined=True,
                )
        except (ValueError, ImportError, NotImplementedError) as error:
            raise UserError(f"a setting does not fit engine 'trl': {' '.join(str(error).split())}") from error
        self.trainer.remove_callback(PrinterCallback)
        for text in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
            self._remark(text)
        if self.state:
            self.mixture.load_state_dict(self.state["mixture"])
        sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        if sharded and settings.beta and (settings.warm_start_steps or settings.model in ("tiny", "smollm2")):
            raise UserError(
                f"beta={settings.beta} under FSDP or DeepSpeed needs a reference model that can be loaded: save the "
                "warm-started model first and give its folder as model, with warm_start_steps 0"
            )
        if self.trainer._dist.is_zero3 and settings.warm_start_steps:
            raise UserError("warm_start_steps cannot be combined with ZeRO-3, whose model is in parts: set it to 0")
        self._ends = set(self.trainer.eos_token_ids)

    @contextlib.contextmanager
    def _reference_source(self, scratch: Path) -> Iterator[None]:
        """TRL loads the reference model from where the config says that the model came from."""
        config, before = self.model.config, self.model.config._name_or_path
        if self.settings.beta and self.settings.model in ("tiny", "smollm2"):
            place = scratch / "reference"  # of each process: save_pretrained would write on the first alone
            place.mkdir()
            described = copy.deepcopy(config)
            described.architectures = [type(self.model).__name__]
            described.save_pretrained(place)
            save_model(self.model, str(place / "model.safetensors"), metadata={"format": "pt"})
            config._name_or_path = str(place)
        try:
            yield
        finally:
            config._name_or_path = before

    @property
    def step_number(self) -> int:
        """Steps done: generations with all their updates."""
        trainer = getattr(self, "trainer", None)
        return 0 if trainer is None else int(trainer.state.global_step) // self.settings.num_iterations

    def run(self) -> Path:
        """Everything from the warm start to the summary; returns the run's folder."""
        settings = self.settings
        names = [task.name for task in self.tasks]
        try:
            if self.main:
                self._describe(self.attached.tracker.layers, self._about())
            if self.state is None:
                self._before_training()
            elif self.trainer.ref_model is not None and settings.warm_start_steps:
                with on_all_processes():
                    self._load_reference()
            self._remark_processes()
            done = self.state["step"] if self.state else 0
            checkpoint = str(self.checkpoint) if self.checkpoint else None
            self._finished = done >= settings.max_steps
            with (
                self._stop.watch(),
                Display(self.console, "step", names, settings.max_steps, done) as self._display,
            ):
                if not self._finished:
                    with self._peers():
                        self.trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self.attached.detach()
            if self.main:
                self.log.close()
        self.interrupted = not self._finished
        if self.main and not self.interrupted:
            self._summarize()
        shutil.rmtree(self.folder / ".unfinished", ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return self.folder

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        """Turn the failure of a collective call, as another process's end causes, into one sentence."""
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if self.processes == 1 or not any(word in text.lower() for word in ("gloo", "nccl", "connection")):
                raise
            raise PeerError(
                f"process {self.rank}: another process of the run ended ({text[:160]}); its own message says why. "
                f"`train --resume {self.folder}` goes on from the last checkpoint, if there is one"
            ) from error

    def _about(self) -> dict[str, Any]:
        """What run.json says of this engine beside the loop's entries."""
        settings, accelerator = self.settings, self.trainer.accelerator
        return {
            "engine": "trl",
            "launcher": _described_launcher(),
            "processes": self.processes,
            "distributed": str(accelerator.distributed_type.value),
            "prompts_per_step": self.prompts,
            "completions_per_step": settings.completions_per_step * self.processes,
            "accumulation": self.attached.tracker.accumulation,
        }

    def _remark_processes(self) -> None:
        self.console.print(
            f"engine trl: {self.processes} process{'es' * (self.processes > 1)}, {self.prompts} prompts and "
            f"{self.settings.completions_per_step * self.processes} completions per step over all of them; pairs of "
            f"prompts: {self.attached.tracker.accumulation}",
            highlight=False,
            soft_wrap=True,
        )

    def _before_training(self) -> None:
        """The model as given, the warm start on the main process, and its weights on all of them."""
        settings = self.settings
        if settings.warm_start_steps:
            with on_all_processes():
                if self.main:
                    if settings.eval_base and settings.eval_prompts:
                        found = evaluate(self.model, self.tokenizer, self.tasks, self.prompter, settings)
                        self._log({"kind": "eval_base", "step": 0, **found})
                    self._warm_start()
            trained = {n: p.data for n, p in self.model.named_parameters() if p.requires_grad}
            if self.processes > 1:
                for parameter in trained.values():
                    torch.distributed.broadcast(parameter, src=0)
            if self.trainer.ref_model is not None:
                if self.main:
                    save_file({n: p.contiguous() for n, p in trained.items()}, self.folder / REFERENCE_FILE)
                self.trainer.ref_model.load_state_dict(trained, strict=False)
        # Whatever came before, from the cache or not, GRPO starts from the same random state.
        set_seed(settings.seed, device_specific=True)

    def _load_reference(self) -> None:
        path = self.folder / REFERENCE_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing: with beta={self.settings.beta} the run cannot go on without it")
        self.trainer.ref_model.load_state_dict(load_file(path), strict=False)

    # One step

    def next_rows(self) -> list[dict[str, Any]]:
        """Draw the prompts of all processes; returns the rows of this one, a row per completion."""
        self._began = time.perf_counter()
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._sampling = self.mixture.sampler.probabilities
        rows, group = self.settings.completions_per_step, self.settings.num_generations
        drawn = self.mixture.draw(self.prompts)
        examples = [self.mixture.tasks[task].next_example() for task in drawn]
        order = list(range(self.prompts))
        if rows % group == 0:
            # Dealt out one by one: every process has every task, so pairs of tasks meet, and about the same lengths.
            order = [at for rank in range(self.processes) for at in order[rank :: self.processes]]
        self._drawn, self._examples = [drawn[at] for at in order], [examples[at] for at in order]
        numbers = [row // group for row in range(self.rank * rows, (self.rank + 1) * rows)]
        texts = {at: self.prompter.text(self._drawn[at], self._examples[at]) for at in dict.fromkeys(numbers)}
        return [{"prompt": texts[at], "task": self._drawn[at], "example": self._examples[at]} for at in numbers]

    def _text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the token that ends it."""
        ended = bool(ids) and ids[-1] in self._ends
        return str(self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))

    def _reward(
        self, completion_ids: list[list[int]], task: list[str], example: list[Example], **_: Any
    ) -> list[float]:
        """TRL's reward function: the verifier of each row's task."""
        tasks = self.mixture.tasks
        scores = [
            tasks[name].score(self._text(ids), one)
            for ids, name, one in zip(completion_ids, task, example, strict=True)
        ]
        self._scored = [
            (score, len(ids), bool(ids) and ids[-1] in self._ends)
            for score, ids in zip(scores, completion_ids, strict=True)
        ]
        return scores

    def take_in(
        self, rows: Sequence[dict[str, Any]], prompt_lengths: list[int], advantages: list[float], seconds: float
    ) -> None:
        """A generation is over: put the rows of all processes together, as the loop's Batch has them."""
        own = [
            (score, length, ended, prompt, advantage)
            for (score, length, ended), prompt, advantage in zip(self._scored, prompt_lengths, advantages, strict=True)
        ]
        every = gather_object(own)
        rewards, lengths, ended, prompts, sizes = (torch.tensor(column) for column in zip(*every, strict=True))
        group = self.settings.num_generations
        prompt_mask, mask = _mask(prompts[::group]), _mask(lengths)
        self._batch = Batch(
            tasks=self._drawn,
            examples=self._examples,
            rollouts=Rollouts(prompt_mask, prompt_mask, mask, mask, ended, group),  # the lengths alone
            rewards=rewards.view(-1, group),
            advantages=sizes.view(-1, group),
            sampling=self._sampling,
            weights=self.attached.balancer.weights if self.attached.balancer is not None else None,
        )
        self._rollout_seconds = seconds

    def on_step_end(self, update: int) -> tuple[bool, bool]:
        """An update is done: (save, stop), the same on every process."""
        settings, last = self.settings, self.attached.last
        if (update - 1) % settings.num_iterations == 0:  # the first update on a generation is the one that is measured
            self._stats = StepStats() if last is self._measured else last
            self._measured = last
            self.mixture.sampler.update(self._stats)
        if update % settings.num_iterations:
            return False, False
        step = update // settings.num_iterations
        out_of_time = self.main and 0 < 60 * settings.max_minutes <= self.seconds
        flags = gather_object([(self._stop.requested, out_of_time)])
        stop, out_of_time = (any(column) for column in zip(*flags, strict=True))
        if out_of_time:
            text = f"max_minutes {settings.max_minutes:g} are over: the run ends with step {step}"
            self.console.print(text, highlight=False)
        self._finished = step == settings.max_steps or out_of_time
        save = self._finished or stop or (settings.save_steps > 0 and step % settings.save_steps == 0)
        return save, self._finished or stop

    def on_log(self, logs: dict[str, float]) -> None:
        """TRL has logged an update: the line of a step is that of its first, written after its last."""
        update, updates = self.trainer.state.global_step, self.settings.num_iterations
        if (update - 1) % updates == 0 and self._batch is not None:
            self._line = {"kind": "train", "step": (update - 1) // updates + 1}
            self._line |= {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs["learning_rate"]}
            self._line |= describe(self._batch, self._stats)
            self._line |= {f"trl/{key}": logs[key] for key in _TRL_METRICS if key in logs}
        if update % updates:
            return
        step = update // updates
        if self.main:
            total = time.perf_counter() - self._began
            self._line |= {"rollout_seconds": self._rollout_seconds, "update_seconds": total - self._rollout_seconds}
            if self.model.device.type == "cuda":
                self._line["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.model.device)
            self._add_gains(self._line)
            self._display.show(self._log(self._line))
            self._remark_left_out()
        if self._finished or (self.settings.eval_steps and step % self.settings.eval_steps == 0):
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Reward of one greedy completion per held-out question, the questions spread over the processes."""
        questions = [(task, example) for task in self.tasks for example in task.held_out]
        if not self.settings.eval_prompts or not questions:
            return
        rewards: dict[str, list[float]] = {task.name: [] for task in self.tasks}
        rows = self.settings.completions_per_step
        for first in range(0, len(questions), rows * self.processes):
            part = questions[first : first + rows * self.processes]
            each = -(-len(part) // self.processes)
            own = part[self.rank * each : (self.rank + 1) * each]
            padded = [*own, *[part[-1]] * (each - len(own))]  # every process generates as many
            found = self.trainer.greedy_completions([self.prompter.text(t.name, e) for t, e in padded])
            scores = [t.score(self._text(ids), e) for (t, e), ids in zip(own, found, strict=False)]
            for (task, _), score in zip(part, gather_object(scores), strict=True):
                rewards[task.name].append(score)
        if self.main:
            line: Line = {"kind": "eval", "step": step}
            for name, scored in rewards.items():
                line |= held_out_metrics(name, scored)
            self._log(line)

    def state_dict(self) -> dict[str, Any]:
        """What this run adds to the Trainer's checkpoint and attach's state."""
        return {
            "step": self.step_number,
            "mixture": self.mixture.state_dict(),
            "metrics_bytes": self.log.size,
            "seconds": self.seconds,
        }


#: What TRL logs that the loop does not have.
_TRL_METRICS = (
    *("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("frac_reward_zero_std", "num_tokens", "sampling/importance_sampling_ratio/mean"),
)


def _mask(lengths: torch.Tensor) -> torch.Tensor:
    """[n, longest] int64: 1 in the first ``lengths`` columns."""
    return (torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]).long()
