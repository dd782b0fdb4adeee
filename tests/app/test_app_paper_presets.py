"""The presets of the paper's settings, walked with tiny models of their architectures on files of the same shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")

import transformers
from accelerate.commands.config.config_args import load_config_from_file

from gradnorm_grpo import cli
from gradnorm_grpo.parse import PRESETS, parse_settings
from gradnorm_grpo.tiny import tiny_tokenizer
from gradnorm_grpo.trl_arguments import grpo_config, lora_config

DATA = Path(__file__).resolve().parents[1] / "data"
#: Small files with the columns of the data sets that the presets name.
FILES = {
    "ganler/code-r1-12k": "r1_code.jsonl",
    "Jiayi-Pan/Countdown-Tasks-3to4": "countdown.jsonl",
    "agentica-org/DeepScaleR-Preview-Dataset": "deepscaler.json",
    "MothMalone/finqa": "finqa_flat.jsonl",
    "DigitalLearningGmbH/MATH-lighteval": "math.jsonl",
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def tiny_folder(folder: Path, architecture: str) -> Path:
    """A saved model of the architecture with random weights, and the character tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=len(tokenizer), **SIZES, **ends)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_local_files(preset: str) -> dict[str, Any]:
    """The preset's content with a local file in place of every data set's name on the Hub."""
    content: dict[str, Any] = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    for task in content["tasks"]:
        if task.get("source") == "datasets":
            task["path"] = str(DATA / FILES[task.pop("dataset")])
    return content


@pytest.mark.parametrize(
    ("preset", "architecture"), [("paper_multi_domain", "Qwen2"), ("paper_single_domain", "Llama")]
)
def test_a_step_of_the_preset_with_a_tiny_model_on_small_files(preset: str, architecture: str, tmp_path: Path) -> None:
    content = on_local_files(preset)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    model = tiny_folder(tmp_path / "model", architecture)
    arguments = ["--model", str(model), "--device", "cpu", "--bf16", "false", "--trl", "{}", "--num_threads", "1"]
    arguments += ["--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "2"]
    arguments += ["--gradient_accumulation_steps", "8", "--max_completion_length", "3", "--eval_prompts", "1"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml"), *arguments]) == 0
    names = [task["name"] for task in content["tasks"]]
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["kind"] == "train"]
    assert sum(step[f"tasks/{name}/prompts"] for name in names) == 8
    # One prompt per micro-batch, as in the preset: all pairs of the step are measured, from the first step on.
    for name in names:
        n = step[f"tasks/{name}/n"]
        assert n >= 2 and step[f"tasks/{name}/pair_weight"] == n * (n - 1)
        assert isinstance(step[f"tasks/{name}/grad_norm_sq"], float)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["tasks"] == names and all(".self_attn." in layer for layer in info["tracked_layers"])
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("preset", ["paper_multi_domain", "paper_single_domain"])
@pytest.mark.parametrize(
    "model", ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"]
)
def test_the_preset_s_settings_are_trl_s(preset: str, model: str, tmp_path: Path) -> None:
    """Its block `trl:` as it is; without bf16, which TRL refuses where there is no GPU."""
    settings, _ = parse_settings(["--preset", preset, "--model", model, "--device", "cpu", "--bf16", "false"])
    config = grpo_config(settings, str(tmp_path))
    assert settings.model == model and settings.engine == "trl" and config.use_vllm and config.max_steps == 200
    prompts = 8 * settings.per_device_train_batch_size * settings.gradient_accumulation_steps // config.num_generations
    assert prompts == 16 * len(settings.tasks)


def test_the_documented_block_for_lora_on_one_gpu_is_peft_s(tmp_path: Path) -> None:
    page = (PRESETS.parents[1] / "docs" / "gpu-run.md").read_text()
    (block,) = re.findall(r"--trl '(\{.*peft.*\})'", page)
    arguments = ["--preset", "paper_multi_domain", "--device", "cpu", "--bf16", "false", "--trl", block]
    settings, _ = parse_settings(arguments)
    assert grpo_config(settings, str(tmp_path)).vllm_gpu_memory_utilization == 0.4
    assert lora_config(settings).r == 64 and lora_config(settings).target_modules == "all-linear"


def test_the_launch_file_is_accelerate_s_and_fits_the_presets() -> None:
    launch = load_config_from_file(str(PRESETS / "accelerate" / "fsdp2.yaml"))
    assert launch.num_processes == 8 and launch.fsdp_config["fsdp_version"] == 2
    for preset in ("paper_multi_domain", "paper_single_domain"):
        assert (launch.mixed_precision == "bf16") == parse_settings(["--preset", preset])[0].bf16
