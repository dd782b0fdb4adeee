"""Engine 'trl' before it runs: what becomes of every setting, and what is refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig

from gradnorm_grpo import cli
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.trl_arguments import SETTINGS, grpo_config, lora_config, refuse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine-trl.md"
TASKS = [{"name": "add", "source": "synthetic"}]
#: A value of each setting that goes to GRPOConfig, other than its default.
OTHER: dict[str, Any] = {
    "bf16": True,
    "device": "cpu",
    "gradient_checkpointing": True,
    "max_steps": 7,
    "num_generations": 4,
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 3,
    "max_completion_length": 17,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 11,
    "num_iterations": 2,
    "beta": 0.03,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "mask_truncated_completions": True,
    "learning_rate": 3e-5,
    "weight_decay": 0.02,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 5,
    "seed": 9,
}


def settings(**changes: Any) -> Settings:
    return Settings(**{"tasks": TASKS, "engine": "trl", "device": "cpu", **changes})


def test_every_setting_has_a_place_in_the_table_and_on_the_page() -> None:
    names = [spec.name for spec in dataclasses.fields(Settings)]
    assert list(SETTINGS) == names
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    said = {"own": "as in the loop", "refused": "refused", "attach": "`attach`", "GRPOConfig": "`GRPOConfig`"}
    for name, place in SETTINGS.items():
        assert rows[name].startswith(said[place.how]) and place.name.replace("`", "") in rows[name].replace("`", "")
    assert list(rows) == names


def test_every_setting_of_grpo_config_arrives_there(tmp_path: Path) -> None:
    assert set(OTHER) == {name for name, place in SETTINGS.items() if place.how == "GRPOConfig"} - {"trl"}
    default, other = (grpo_config(settings(**values), str(tmp_path)) for values in ({"device": "auto"}, OTHER))
    renamed = {"device": "use_cpu"}
    for name, value in OTHER.items():
        found = getattr(other, renamed.get(name, name))
        wanted = {"max_steps": 14, "device": True}.get(name, value)
        assert found == wanted, name
        assert name == "device" or getattr(default, name) != found, name  # this machine may have no other
    assert other.steps_per_generation == 3 and other.logging_steps == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"track": False}, "track=False cannot be combined with engine 'trl'"),
        ({"full_steps": 2}, "full_steps=2 cannot be combined with engine 'trl'"),
        ({"share_prompt": "true", "loss_type": "grpo"}, "share_prompt='true' cannot be combined with engine 'trl'"),
        ({"generation_batch_size": 8}, "generation_batch_size=8 cannot be combined with engine 'trl'"),
        ({"plan_minutes": 5.0}, "plan_minutes=5.0 cannot be combined with engine 'trl'"),
        ({"final_probe_prompts": 4}, "final_probe_prompts=4 cannot be combined with engine 'trl'"),
        ({"max_steps": 0}, "max_steps must be at least 1 with engine 'trl'"),
    ],
)
def test_what_the_engine_cannot_honour_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    refuse(settings())
    with pytest.raises(UserError, match=re.escape(why)):
        refuse(settings(**change))


def test_the_cases_above_are_all_that_the_table_refuses() -> None:
    refused = {name for name, place in SETTINGS.items() if place.how == "refused"}
    assert refused == {
        *("track", "full_steps", "share_prompt", "generation_batch_size", "plan_minutes", "final_probe_prompts"),
    }


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"use_vlm": True}, "a key of trl must be one of"),
        ({"learning_rate": 1e-4}, "trl: learning_rate cannot be set in the block: set learning_rate outside the block"),
        ({"use_cpu": True}, "set device outside the block"),
        ({"steps_per_generation": 4}, "set gradient_accumulation_steps outside the block"),
        ({"model_init_kwargs": {}}, "set model and dtype outside the block"),
        ({"logging_steps": 5}, "trl: logging_steps cannot be set in the block: this program decides it"),
        ({"report_to": "wandb"}, "set report_to outside the block"),
        ({"use_vllm": "yes"}, "trl: use_vllm must be of type bool, got 'yes'"),
        ({"vllm_server_port": "8000"}, "trl: vllm_server_port must be of type int, got '8000'"),
        ({"vllm_gpu_memory_utilization": "half"}, "trl: vllm_gpu_memory_utilization must be of type float"),
        ({"ddp_timeout": True}, "trl: ddp_timeout must be of type int"),
        ({"optim": "adamw_tourch"}, "trl: optim must be one of"),
        ({"fsdp_config": 3}, "trl: fsdp_config must be of type dict or str or null"),
        ({"auto_find_batch_size": True}, "this program decides it"),
        ({"use_adaptive_entropy": True, "fp16": True, "tf32": 1}, "trl: tf32 must be of type bool or null"),
    ],
)
def test_the_block_is_held_to_the_names_and_types_of_grpo_config(
    tmp_path: Path, block: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        grpo_config(settings(trl=block), str(tmp_path))


def test_no_key_of_the_block_decides_what_a_setting_decides(tmp_path: Path) -> None:
    """Every field of GRPOConfig that this program sets itself is refused in the block."""
    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    ours = grpo_config(settings(**OTHER, dtype="float32"), str(tmp_path))
    set_here = {
        spec.name
        for spec in dataclasses.fields(GRPOConfig)
        if getattr(plain, spec.name) != getattr(ours, spec.name) and spec.name not in ("output_dir", "logging_dir")
    }
    # Those that follow from another field in GRPOConfig itself, or that have one value that is right.
    for name in set_here - {"gradient_checkpointing_kwargs", "activation_checkpointing", "mixed_precision"}:
        if name.startswith("activation_checkpointing"):
            continue
        with pytest.raises(UserError, match=f"trl: {name} cannot be set in the block"):
            grpo_config(settings(trl={name: None}), str(tmp_path))


def test_the_block_passes_on_what_it_may(tmp_path: Path) -> None:
    block = {"vllm_server_timeout": "1e2", "ddp_timeout": 7200, "optim": "sgd", "generation_kwargs": {"min_p": 0.1}}
    made = grpo_config(settings(trl=block), str(tmp_path))
    assert (made.vllm_server_timeout, made.ddp_timeout, str(made.optim.value)) == (100.0, 7200, "sgd")
    assert made.generation_kwargs == {"min_p": 0.1}


def test_batches_that_hold_no_whole_groups_are_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation_batch_size \(6\) must be divisible by num_generations"):
        grpo_config(settings(per_device_train_batch_size=6), str(tmp_path))
    assert grpo_config(settings(per_device_train_batch_size=4, gradient_accumulation_steps=2), str(tmp_path))


def test_mixed_precision_of_the_launcher_has_to_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="accelerate's mixed_precision is 'bf16' and bf16 is False"):
        grpo_config(settings(), str(tmp_path))
    assert grpo_config(settings(bf16=True), str(tmp_path)).bf16


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"trl": {"peft": 8}}, "trl: peft must be a mapping"),
        ({"trl": {"peft": {"rank": 8}}}, "a key of trl: peft must be one of"),
        ({"trl": {"peft": {"r": "8"}}}, "trl: peft: r must be of type int, got '8'"),
        ({"trl": {"peft": {"task_type": "CAUSAL_LM"}}}, "trl: peft: task_type follows from the run"),
        ({"trl": {"peft": {"bias": "some"}}}, "trl: peft: bias must be"),
        ({"trl": {"peft": {}}, "train_layers": "1"}, "train_layers='1' cannot be combined with trl: peft"),
        ({"trl": {"peft": {}}, "warm_start_steps": 3}, "warm_start_steps=3 cannot be combined with trl: peft"),
    ],
)
def test_lora_is_held_to_the_names_and_types_of_lora_config(change: dict[str, Any], why: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=re.escape(why)):
        lora_config(settings(**change))


def test_lora_takes_its_block() -> None:
    pytest.importorskip("peft")
    made = lora_config(settings(trl={"peft": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": "1e-1"}}))
    assert (made.r, made.target_modules, made.lora_dropout) == (4, {"q_proj"}, 0.1)
    assert lora_config(settings()) is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("train", "--preset", "tiny"), "engine 'loop' is one process, and 2 were launched"),
        (("probe", "--preset", "tiny"), "`probe` runs in one process, and 2 were launched"),
        (("study", "--preset", "tiny"), "`study` runs in one process, and 2 were launched"),
        (("report", "runs"), "`report` runs in one process, and 2 were launched"),
    ],
)
def test_what_runs_in_one_process_is_refused_in_two_by_the_first_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(list(arguments)) == 2
        assert (why in capsys.readouterr().err) == (rank == "0")


def test_a_study_runs_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("study", "estimators"):
        assert cli.main([command, "--preset", "tiny", "--engine", "trl"]) == 2
        assert "engine" in capsys.readouterr().err


def test_the_loop_refuses_a_block_that_it_does_not_use() -> None:
    with pytest.raises(UserError, match="trl holds use_vllm, which only engine 'trl' uses"):
        Settings(tasks=TASKS, trl={"use_vllm": True})
    with pytest.raises(UserError, match="trl must be of type mapping"):
        settings(trl=[1])
