"""attach() where a run is interrupted, and where rows, losses or data are not as TRL leaves them: right or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from gradnorm_kernels.integrations.trl import attach
from gradnorm_kernels.integrations.trl.attach import STATE_FILE
from gradnorm_kernels.integrations.trl.loss_scale import grpo_row_scale, sft_row_scale
from tests.trl import trl_tiny as tiny
from tests.trl.test_sft_attach import sft, texts

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def measured(trainer: Any) -> list[bool]:
    """For each step that was logged, whether it was measured."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [any(key.endswith("/n") for key in line) for line in lines]


# Rows that are not those of their prompts


class Replayed(trl.GRPOTrainer):
    """Trains on the last generation's first group instead of this one's, as a replay buffer does."""

    last: Any = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        now = {name: output[name][:4].clone() for name in names}
        for name, value in (self.last or {}).items():
            if value.dim() == 1 or value.shape[1] == output[name].shape[1]:
                output[name][:4] = value
        self.last = now
        return output


class Filtered(trl.GRPOTrainer):
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        return {name: value[::2] if value.dim() else value for name, value in output.items()}


class Retried(trl.GRPOTrainer):
    """Generates twice and keeps one or the other of each group: every row is still its prompt's."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        first = super()._generate_and_score_completions(inputs)
        second = super()._generate_and_score_completions(inputs)
        for name in ("completion_ids", "completion_mask", "advantages"):
            if first[name].dim() == 1 or first[name].shape[1] == second[name].shape[1]:
                second[name][:4] = first[name][:4]
        return second


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Replayed, "Replayed returned a completion in row 0 that was not generated for its prompt"),
        (Filtered, "Filtered returned 8 rows for 16"),
        (Retried, None),
    ],
)
def test_replaced_and_dropped_rows_are_refused(tmp_path, kind, message):
    """All completions have the same length, so that they fit in each other's place."""
    model = tiny.model()
    model.generation_config.min_new_tokens = 5
    trainer = tiny.grpo(tmp_path, kind=kind, trained=model, max_steps=2, shuffle_dataset=False)
    attached = attach(trainer)
    if message is None:
        trainer.train()
        assert sum(gradient.n for gradient in attached.last.values()) == 4
    else:
        with pytest.raises(ValueError, match=message):
            trainer.train()


class Bare(trl.GRPOTrainer):
    """Keeps only the entries that it knows."""

    def _prepare_inputs(self, batch: Any) -> Any:
        inputs = super()._prepare_inputs(batch)
        return {name: value for name, value in inputs.items() if not name.startswith("_")}


class Aside(trl.GRPOTrainer):
    """Fills its buffer by the class's method."""

    def _prepare_inputs(self, batch: Any) -> Any:
        if self._step % self.args.steps_per_generation == 0:
            self._buffered_inputs = trl.trainer.grpo_trainer.split_tensor_dict(
                super()._generate_and_score_completions(batch), self.args.steps_per_generation
            )
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


@pytest.mark.parametrize("kind", [Bare, Aside])
def test_micro_batches_that_lost_their_ids_are_refused(tmp_path, kind):
    trainer = tiny.grpo(tmp_path, kind=kind, max_steps=3)
    attach(trainer)
    with pytest.raises(ValueError, match=f"a micro-batch of {kind.__name__} lacks the entries _gradnorm_prompt"):
        trainer.train()


def test_rows_of_replaced_data_are_not_drawn_for_other_tasks(tmp_path):
    trainer = tiny.grpo(tmp_path)
    attach(trainer, task_sampling="uniform")
    trainer.train_dataset = tiny.prompts().map(lambda row: {"task": "up"})
    with pytest.raises(ValueError, match=r"is of the task 'up', and was of '\w+' when attach\(...\) was called"):
        trainer.train()


class Sorting:
    """A collator that puts the longest row first."""

    def __init__(self, inner: Any, keep: int | None = None) -> None:
        self.inner, self.keep = inner, keep

    def __call__(self, rows: Any) -> Any:
        ordered = rows if self.keep else sorted(rows, key=lambda row: -len(row["input_ids"]))
        return self.inner(ordered[: self.keep])


@pytest.mark.parametrize(("keep", "message"), [(None, r"moves row \d to row \d"), (6, "makes 6 rows of 8")])
def test_a_collator_that_moves_rows_is_refused(tmp_path, keep, message):
    trainer = sft(tmp_path)
    trainer.data_collator = Sorting(trainer.data_collator, keep)
    attach(trainer)
    with pytest.raises(ValueError, match=rf"data_collator \(Sorting\) {message}"):
        trainer.train()


def test_rows_of_tasks_that_came_later_are_refused(tmp_path):
    trainer = sft(tmp_path)
    attach(trainer)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"task": "new"})
    with pytest.raises(ValueError, match="came without its tasks: column 'task'"):
        trainer.train()


# Losses that are not TRL's


@pytest.mark.parametrize(("kind", "method"), [("GRPOTrainer", "_compute_loss"), ("SFTTrainer", "compute_loss")])
def test_a_loss_put_into_trls_own_class_is_a_loss_of_its_own(tmp_path, monkeypatch, kind, method):
    trainer = tiny.grpo(tmp_path) if kind == "GRPOTrainer" else sft(tmp_path)
    inner = getattr(getattr(trl, kind), method)
    monkeypatch.setattr(getattr(trl, kind), method, lambda *args, **kwargs: 2 * inner(*args, **kwargs))
    with pytest.raises(ValueError, match="a loss of its own .*test_trl_interrupted"):
        attach(trainer)
    attach(trainer, row_scale=lambda *_: 1.0).detach()
    monkeypatch.undo()
    attach(trainer)


def test_ligers_loss_in_older_versions_is_a_loss_of_its_own(tmp_path):
    """TRL 1.9 has it beside its own, and does not tell it how many tokens the generation has, which dapo divides by."""
    trainer = tiny.grpo(tmp_path)
    trainer.use_liger_kernel, trainer.compute_liger_loss = True, lambda *_: None
    with pytest.raises(ValueError, match="use_liger_kernel=True computes Liger's GRPO loss"):
        attach(trainer)
    trainer.use_liger_kernel = False
    attach(trainer)


def scaled_step(base: Any) -> Any:
    class Scaled(base):
        scale = 0.5

        def training_step(self, model: Any, inputs: Any, num_items: Any = None) -> Any:
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs), False, num_items) * self.scale
            self.accelerator.backward(loss)
            return loss.detach()

    return Scaled


def test_a_training_step_that_scales_the_loss_is_refused(tmp_path):
    trainer = tiny.grpo(tmp_path, kind=scaled_step(trl.GRPOTrainer))
    attach(trainer)
    with pytest.raises(RuntimeError, match=r"training_step of Scaled differentiates 0.5 times what .*, and 1 times"):
        trainer.train()
    own = tiny.grpo(tmp_path, kind=scaled_step(trl.GRPOTrainer), max_steps=1)
    attached = attach(own, row_scale=lambda trainer, inputs: 2 * grpo_row_scale(trainer, inputs))
    own.train()
    assert attached.last


def test_label_tokens_given_by_position_count(tmp_path):
    """A training step may pass num_items_in_batch to compute_loss by position."""
    trainer = sft(tmp_path, max_steps=1)
    trainer.__class__ = scaled_step(trl.SFTTrainer)
    trainer.scale = 1.0
    attached = attach(trainer)
    given, microbatch = [], attached._hooks.microbatch
    attached._hooks.microbatch = lambda *args: (given.append(args), microbatch(*args))[1]
    trainer.train()
    tokens = sum(int((inputs["labels"] != -100).sum()) for inputs, _, _ in given)
    assert [int(num_items) for _, _, num_items in given] == [tokens, tokens]


def test_terms_that_a_correction_does_not_weight_are_warned_about(tmp_path):
    trainer = tiny.grpo(tmp_path, entropy_coef=0.1)
    with pytest.warns(UserWarning, match="entropy_coef .* with a correction: the weights scale advantages"):
        attach(trainer, correction="equal_pull")


# Runs that stop and go on


def test_prompts_that_a_resumed_run_generates_for_again_are_not_measured(tmp_path):
    """The weights were trained on them before the checkpoint. The generation after them is measured."""
    options = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_completion_length": 2}
    whole = tiny.grpo(tmp_path, max_steps=1, **options)
    attach(whole)
    whole.train()
    again = tiny.grpo(tmp_path, max_steps=4, **options)
    attach(again)
    again.train(resume_from_checkpoint=True)
    assert measured(again) == [True, False, False, True]


def test_a_second_training_does_not_measure_what_is_left_of_the_first(tmp_path):
    """The buffer of the first train() is used up by the second, at the same number of optimizer steps."""
    trainer = tiny.grpo(tmp_path, max_steps=1, steps_per_generation=4, max_completion_length=2)
    attach(trainer)
    trainer.train()
    assert measured(trainer) == [True]
    trainer.train()
    assert measured(trainer) == [False]


def test_micro_batches_of_an_interrupted_step_do_not_count_in_the_next(tmp_path):
    trainer = sft(tmp_path, max_steps=1, learning_rate=0.0)
    inner, calls = trainer.compute_loss, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    trainer.compute_loss = interrupted
    attached = attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert sum(gradient.n for gradient in attached.last.values()) == 16


class StopInside(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 1


def test_a_run_that_stops_inside_a_step_is_saved(tmp_path):
    trainer = sft(tmp_path, save_strategy="epoch", data=texts(32))
    trainer.add_callback(StopInside())
    attached = attach(trainer)
    with pytest.warns(UserWarning, match="inside an optimizer step: its micro-batches are not counted"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / STATE_FILE).exists()
    assert sum(estimate.n for estimate in attached.tracker.running.values()) == 16


def test_an_unfinished_generation_may_be_resumed_at_a_larger_size(tmp_path):
    """The rows that it had come again, and others are drawn beside them."""
    options = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_completion_length": 2}
    whole = tiny.grpo(tmp_path, max_steps=1, **options)
    first = attach(whole, task_sampling="uniform")
    whole.train()
    again = tiny.grpo(tmp_path, max_steps=2, per_device_train_batch_size=16, **options)
    second = attach(again, task_sampling="uniform")
    again.train(resume_from_checkpoint=True)
    chunks = [attached._hooks._chunk for attached in (first, second)]
    assert list(map(len, chunks)) == [4, 8] and chunks[1][:4] == chunks[0]


def test_looking_at_the_metrics_takes_nothing_from_the_log(tmp_path):
    trainer = tiny.grpo(tmp_path, max_steps=1)
    attached = attach(trainer)
    inner, looked = trainer._gradnorm._take_in, []
    attached._take_in = lambda stats: (inner(stats), looked.append(attached.metrics()))
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    rewards = {key: value for key, value in looked[0].items() if key.endswith(("/reward", "/abs_advantage"))}
    assert rewards and {key: line.get(key) for key in rewards} == rewards


# How processes share rows


def test_tensor_parallel_ranks_count_once(tmp_path):
    """Both N and W are then smaller by the ranks that share rows."""
    trainer = sft(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.state.num_processes = 4
    try:
        labels = torch.tensor([[-100, 1, 2], [3, 4, -100]])
        plain = sft_row_scale(trainer, {"labels": labels}, 12)
        trainer.get_tp_size = lambda: 2
        assert sft_row_scale(trainer, {"labels": labels}, 12).tolist() == [2 * value for value in plain.tolist()]
    finally:
        trainer.accelerator.state.num_processes = 1
    with pytest.raises(ValueError, match=r"a tensor-parallel group \(of 2\) train on the same rows"):
        attach(trainer)
    attach(trainer, process_group=None)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = tiny.grpo(tmp_path)
    trainer.args = SimpleNamespace(**{**vars(trainer.args), "n_gpu": 2})
    with pytest.raises(ValueError, match="this process sees 2 GPUs"):
        attach(trainer)
