"""attach(): which settings are refused by name, which are remarked on, and what the words of its arguments mean."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from gradnorm_kernels.integrations.trl import attach
from tests.trl import trl_tiny as tiny

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def stream(rows):
    return rows.to_iterable_dataset()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"task_column": "topic"}, "task_column='topic' is not a column"),
        ({}, {"every": 0}, "every must be an int of at least 1"),
        ({}, {"task_sampling": "loudest"}, "task_sampling must be one of"),
        ({}, {"task_sampling": "proportional", "exponent": 2.0}, "exponent goes with strategy='power'"),
        ({}, {"exponent": 2.0}, "exponent goes with task_sampling='power'"),
        ({}, {"correction": "shout"}, "strategy must be one of"),
        ({"per_device_train_batch_size": 6}, {"keep_groups_together": True}, "multiple of num_generations=4"),
        ({"remove_unused_columns": True}, {}, "remove_unused_columns=True drops"),
        ({"torch_compile": True}, {}, "torch_compile=True"),
        ({}, {"layers": "lm_head"}, "picks only the output head"),
    ],
)
def test_what_is_refused(tmp_path, changes, options, message):
    trainer = tiny.grpo(tmp_path, **changes)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=message):
        attach(trainer, **options)
    assert trainer.__dict__ == before


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        ({"parallelism_config": SimpleNamespace(cp_enabled=True, sp_enabled=False)}, "cp_size or sp_size above 1"),
        ({"parallelism_config": SimpleNamespace(cp_enabled=False, sp_enabled=True)}, "cp_size or sp_size above 1"),
        ({"distributed_type": "DistributedType.DEEPSPEED", "mixed_precision": "fp16"}, "use bf16"),
    ],
)
def test_what_is_refused_of_accelerate(tmp_path, accelerator, message):
    trainer = tiny.grpo(tmp_path)
    trainer.accelerator = SimpleNamespace(**{"distributed_type": "DistributedType.NO", **accelerator})
    with pytest.raises(ValueError, match=message):
        attach(trainer)


def test_a_task_column_with_holes_is_refused(tmp_path):
    data = tiny.prompts().map(lambda row, at: {"task": None if at == 3 else row["task"]}, with_indices=True)
    with pytest.raises(ValueError, match="must hold a string or an int in every row, got None"):
        attach(tiny.grpo(tmp_path, data=data))


def test_what_is_refused_of_streams_losses_and_trainers(tmp_path):
    with pytest.raises(TypeError, match="must be a GRPOTrainer"):
        attach(object())
    streamed = tiny.grpo(tmp_path, data=stream(tiny.prompts()))
    with pytest.raises(ValueError, match="this one is a stream"):
        attach(streamed, task_sampling="uniform")
    attached = attach(streamed)
    streamed.train()
    assert attached.last
    unknown = tiny.grpo(tmp_path)
    unknown.loss_type = "novel"
    with pytest.raises(ValueError, match="loss_type='novel' is not one"):
        attach(unknown)
    old = tiny.grpo(tmp_path)
    old.__class__ = type("Old", (trl.GRPOTrainer,), {"_calculate_rewards": property(lambda self: self.gone)})
    with pytest.raises(ValueError, match="lacks _calculate_rewards"):
        attach(old)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"scale_rewards": "batch"}, {}, "scale_rewards='batch'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {}, "normalize_then_sum"),
        ({"entropy_coef": 0.1}, {}, "entropy_coef"),
        ({"top_entropy_quantile": 0.5}, {}, "top_entropy_quantile"),
        ({"num_iterations": 3}, {}, "make 3 optimizer steps from one generation: only the first"),
        ({"steps_per_generation": 8}, {}, "make 4 optimizer steps from one generation"),
        ({"loss_type": "cispo"}, {}, "0.2 times, and U 0.04 times"),
        ({"per_device_train_batch_size": 4}, {"keep_groups_together": True}, "U stays undefined"),
        ({}, {"layers": "all"}, "lm_head"),
    ],
)
def test_what_bends_the_measurement_is_said_by_name(tmp_path, changes, options, message):
    trainer = tiny.grpo(tmp_path, **changes)
    with pytest.warns(UserWarning, match=message):
        attach(trainer, **options)


def test_default_settings_call_for_no_remark(tmp_path):
    trainer = tiny.grpo(tmp_path, beta=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(trainer, correction="equal_pull")


def test_a_tied_head_takes_its_embedding_along(tmp_path):
    tied = tiny.model(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head, model.embed_tokens"):
        attached = attach(tiny.grpo(tmp_path, trained=tied), layers="all")
    assert "model.embed_tokens" not in attached.tracker.layers
    assert "model.norm" in attached.tracker.layers
