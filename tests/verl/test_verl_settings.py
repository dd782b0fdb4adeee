"""What attach() refuses on a verl worker, and measure_actor() through verl's own ActorRolloutRefWorker and settings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.workers", reason="verl is not installed: make test-verl runs these tests")

import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gradnorm_kernels.integrations.verl import attach
from tests.verl import cpu_worker as cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cpu.start()
    return cpu.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Any:
    return cpu.training_worker(folder)


@pytest.fixture
def restored() -> Any:
    """verl's ActorRolloutRefWorker, whose class for actors is put back after the test."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    before = ActorRolloutRefWorker.actor_worker_cls
    yield ActorRolloutRefWorker
    ActorRolloutRefWorker.actor_worker_cls = before


def test_it_needs_a_training_worker_with_an_engine_it_knows(worker: Any) -> None:
    with pytest.raises(TypeError, match="worker must be a verl TrainingWorker, got Namespace"):
        attach(type("Namespace", (), {})())
    engine = worker.engine
    worker.engine = type("MegatronEngine", (), {})()
    try:
        with pytest.raises(TypeError, match="FSDPEngineWithLMHead, got MegatronEngine"):
            attach(worker)
    finally:
        worker.engine = engine


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("strategy", "fsdp", "actor_rollout_ref.actor.strategy=fsdp2"),
        ("ulysses_sequence_parallel_size", 2, "ulysses_sequence_parallel_size=2 puts a row's tokens on several ranks"),
        ("forward_only", True, "only runs forward"),
    ],
)
def test_engine_settings_that_cannot_be_measured(worker: Any, name: str, value: Any, message: str) -> None:
    config = worker.engine.engine_config
    before = getattr(config, name)
    object.__setattr__(config, name, value)
    try:
        with pytest.raises(ValueError, match=message):
            attach(worker)
    finally:
        object.__setattr__(config, name, before)


def test_every_and_a_second_attach(worker: Any) -> None:
    with pytest.raises(ValueError, match="every must be an int of at least 1, got 0"):
        attach(worker, every=0)
    attachment = attach(worker)
    try:
        with pytest.raises(ValueError, match=r"attached already: call worker\.gradnorm\.detach\(\) first"):
            attach(worker)
    finally:
        attachment.detach()
    attach(worker).detach()


def test_the_fused_head_is_refused_under_all(folder: Path) -> None:
    worker = cpu.training_worker(folder, model={"use_fused_kernels": True})
    with pytest.raises(ValueError, match=r"layers='all' includes 'lm_head', whose weight model.use_fused_kernels=True"):
        attach(worker, layers="all")
    attach(worker).detach()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"policy_loss": {"loss_mode": "geo_mean"}}, "loss_mode='geo_mean' averages in a way that is not known"),
        ({"policy_loss": {"loss_mode": "bypass_mode"}}, "loss_mode='bypass_mode' averages in a way that is not known"),
        (
            {"policy_loss": {"loss_mode": "sapo"}, "use_kl_loss": True},
            "set actor.loss_agg_mode=seq-mean-token-mean, or pass row_scale=",
        ),
    ],
)
def test_losses_that_are_not_known_are_refused_at_the_first_update(folder: Path, loss: dict, message: str) -> None:
    worker = cpu.training_worker(folder)
    worker.set_loss_fn(cpu.actor_loss(**loss))
    attach(worker)
    with pytest.raises(ValueError, match=message):
        cpu.update(worker, cpu.rollouts())


def test_a_loss_of_ones_own_needs_row_scale(folder: Path) -> None:
    """With the scale given, U is that of verl's loss, which the function wraps."""
    inner = cpu.actor_loss()

    def own_loss(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = inner(*args, **kwargs)
        return loss * 2.0, metrics

    def measured(loss: Any, **options: Any) -> Any:
        worker = cpu.training_worker(folder)
        worker.set_loss_fn(loss)
        attachment = attach(worker, accumulate="exact", **options)
        cpu.update(worker, cpu.rollouts())
        return attachment.last

    with pytest.raises(ValueError, match="loss function is .*own_loss, and only verl's ppo_loss is known"):
        measured(own_loss)

    def half(micro_batch: Any) -> Any:
        from gradnorm_kernels.integrations.verl import row_scale

        return row_scale(micro_batch, inner.keywords["config"]) / 2.0

    expected, found = measured(inner), measured(own_loss, row_scale=half)
    for task in cpu.TASKS:
        assert found[task].sq_norm == pytest.approx(expected[task].sq_norm, rel=1e-5)


def test_a_missing_field_is_named(folder: Path) -> None:
    worker = cpu.training_worker(folder)
    worker.set_loss_fn(cpu.actor_loss())
    attach(worker, task_key="domain")
    with pytest.raises(ValueError, match="no field 'domain', it has .*data_source.*task_key="):
        cpu.update(worker, cpu.rollouts())


def test_a_task_name_that_verl_would_pool_by_is_warned_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = cpu.training_worker(folder)
    worker.set_loss_fn(cpu.actor_loss())
    attach(worker)
    cpu.update(worker, cpu.rollouts())
    cpu.update(worker, cpu.rollouts(seed=2))
    said = [record.getMessage() for record in caplog.records if "parameter_sync_step" in record.getMessage()]
    assert len(said) == 1 and "task 'sums' are pooled by 'sum'" in said[0]


def actor_settings(folder: Path, module: str) -> Any:
    """verl's own ``ppo_trainer`` configuration for a CPU, with ``module`` as its external library."""
    directory = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=directory, version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                f"actor_rollout_ref.model.path={folder}",
                f"actor_rollout_ref.model.external_lib={module}",
                "actor_rollout_ref.model.use_remove_padding=true",
                "+actor_rollout_ref.model.load_tokenizer=false",
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
                "actor_rollout_ref.actor.strategy=fsdp2",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=6",
                "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
                "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}",
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.n=3",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=6",
            ],
        )
    OmegaConf.resolve(config.actor_rollout_ref)
    return config.actor_rollout_ref


def test_measure_actor_by_external_lib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: Any
) -> None:
    """verl's hydra configuration, worker class and update_actor; the module is imported by verl itself."""
    name = "measured_by_external_lib"
    (tmp_path / f"{name}.py").write_text(
        "from gradnorm_kernels.integrations.verl import measure_actor\n"
        'measure_actor(layers="last_attention", accumulate="exact")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    worker = restored(actor_settings(folder, name), role="actor")
    worker.init_model()
    data = cpu.prepared(cpu.rollouts(), size=24)
    log = cpu.reduced(worker.update_actor(data))

    expected = cpu.training_worker(folder)
    expected.set_loss_fn(cpu.actor_loss())
    attachment = attach(expected, accumulate="exact")
    cpu.update(expected, cpu.rollouts())
    for task in cpu.TASKS:
        assert log[f"actor/tasks/{task}/grad_norm_sq"] == pytest.approx(attachment.last[task].sq_norm, rel=1e-6)
    worker.actor.reset()  # builds the engine again
    assert worker.actor.gradnorm.tracker is not attachment.tracker
    cpu.reduced(worker.update_actor(cpu.prepared(cpu.rollouts(), size=24)))
    assert worker.actor.gradnorm.last


def test_a_second_measure_actor_replaces_the_first(restored: Any) -> None:
    from gradnorm_kernels.integrations.verl import measure_actor

    plain = restored.actor_worker_cls
    measure_actor()
    second = measure_actor(layers="all")
    assert restored.actor_worker_cls is second and second.__base__ is plain


def test_the_page_has_the_codes_formulas_policy_losses_and_examples() -> None:
    from gradnorm_kernels.integrations.verl.loss_scale import FORMULAS, POLICY_LOSSES

    page = (Path(__file__).resolve().parents[2] / "docs" / "verl.md").read_text(encoding="utf-8")
    for mode, formula in FORMULAS.items():
        assert f"| `{mode}` | `{formula}` |" in page
    assert all(f"`{loss}`" in page for loss in POLICY_LOSSES)


@pytest.mark.parametrize("example", ["measure", "draw"])
def test_the_examples_of_the_page_run(example: str, restored: Any) -> None:
    pytest.importorskip("transfer_queue", reason="verl's V1 trainer needs TransferQueue")
    from verl.trainer.ppo.v1 import trainer_base

    before = trainer_base.create_rl_sampler, trainer_base.PPOTrainer._update_actor
    page = (Path(__file__).resolve().parents[2] / "docs" / "verl.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {example} -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    try:
        exec(found.group(1), {})
        assert restored.actor_worker_cls.measured_by_gradnorm
        assert (trainer_base.create_rl_sampler is not before[0]) == (example == "draw")
    finally:
        trainer_base.create_rl_sampler, trainer_base.PPOTrainer._update_actor = before
