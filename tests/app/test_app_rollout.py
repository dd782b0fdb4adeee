"""Prompts, sampling and log-probabilities; and that the probe's shortcuts change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Grpo
from gradnorm_grpo.models import choose_trainable, load_model
from gradnorm_grpo.probe import only_tracked
from gradnorm_grpo.rollout import Prompter, completion_logprobs, completion_texts, generate, pad
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import CHARACTERS, tiny_model, tiny_tokenizer

TASKS = [{"name": "copy", "source": "synthetic"}, {"name": "maximum", "source": "synthetic"}]


def _settings(**changes: object) -> Settings:
    base = {
        "prompt_template": "{question} = ",
        "max_completion_length": 9,
        "num_generations": 4,
        "tasks": TASKS,
        "eval_prompts": 1,
    }
    return Settings(**{**base, "per_device_train_batch_size": 16, "loss_type": "grpo", **changes})


def _model(scale: float = 3.0) -> tuple[torch.nn.Module, object]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 32, 2, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() > 1 else 1.0)
    return model, tokenizer


PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33]]


def test_tiny_tokenizer_round_trip() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(CHARACTERS)["input_ids"]) == CHARACTERS
    assert len(tokenizer(CHARACTERS)["input_ids"]) == len(CHARACTERS)
    assert tokenizer("\u20ac")["input_ids"] == [tokenizer.unk_token_id]


def test_pad() -> None:
    ids, mask = pad([[1, 2, 3], [4]], 0, "left", torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad([[1, 2, 3], [4]], 9, "right", torch.device("cpu"))[0].tolist() == [[1, 2, 3], [4, 9, 9]]


@pytest.mark.parametrize("generation_batch_size", [0, 4, 8])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_logprobs_equal_a_teacher_forced_recomputation(generation_batch_size: int, share_prompt: bool) -> None:
    model, tokenizer = _model()
    settings = _settings(generation_batch_size=generation_batch_size, temperature=0.8)
    torch.manual_seed(0)
    rollouts = generate(model, tokenizer, PROMPTS, 4, settings)
    got = completion_logprobs(model, rollouts, 0.8, share_prompt).detach()
    padded = completion_logprobs(model, rollouts, 0.8, share_prompt, pad_logits=True).detach()
    counted = rollouts.completion_mask > 0
    torch.testing.assert_close(got[counted], padded[counted], rtol=0, atol=1e-5)
    assert not got[~counted].any() and not model.get_output_embeddings()._forward_pre_hooks
    checked = 0
    for row in range(12):
        prompt = PROMPTS[row // 4]
        tokens = rollouts.completion_ids[row][rollouts.completion_mask[row] > 0].tolist()
        for at, token in enumerate(tokens):  # one position at a time, nothing shared, nothing padded
            logits = model(torch.tensor([prompt + tokens[:at]])).logits[0, -1].detach().double() / 0.8
            assert float(got[row, at]) == pytest.approx(float(logits.log_softmax(0)[token]), abs=2e-5)
            checked += 1
    assert checked >= 12 * 2


def test_greedy_generation_takes_the_likeliest_token_everywhere() -> None:
    model, tokenizer = _model()
    rollouts = generate(model, tokenizer, PROMPTS, 1, _settings(), greedy=True)
    for prompt, ids, mask in zip(PROMPTS, rollouts.completion_ids, rollouts.completion_mask, strict=True):
        tokens = ids[mask > 0].tolist()
        for at, token in enumerate(tokens):
            assert int(model(torch.tensor([prompt + tokens[:at]])).logits[0, -1].argmax()) == token


def test_sampling_follows_the_models_distribution() -> None:
    model, tokenizer = _model(scale=4.0)
    settings = _settings(max_completion_length=1, temperature=0.5)
    torch.manual_seed(1)
    rollouts = generate(model, tokenizer, [PROMPTS[0]], 4000, settings)
    drawn = torch.bincount(rollouts.completion_ids[:, 0], minlength=len(tokenizer)) / 4000
    expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].detach() / 0.5).softmax(0)
    assert float(expected.max()) > 0.05
    assert float((drawn - expected).abs().max()) < 0.035


def test_masks_end_with_the_end_token() -> None:
    model, tokenizer = _model()
    with torch.no_grad():  # make the end token likely
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight.mul_(0.1)
    torch.manual_seed(0)
    rollouts = generate(model, tokenizer, PROMPTS, 64, _settings(max_completion_length=60, temperature=1.0))
    lengths = rollouts.completion_mask.sum(1)
    assert bool(rollouts.ended.any())
    for ids, n, ended in zip(rollouts.completion_ids, lengths.tolist(), rollouts.ended.tolist(), strict=True):
        kept = ids[:n].tolist()
        assert kept.count(tokenizer.eos_token_id) == int(ended)
        assert not ended or kept[-1] == tokenizer.eos_token_id
        assert ended or n == rollouts.completion_ids.shape[1]
    texts = completion_texts(tokenizer, rollouts)
    assert all("<eos>" not in text and "<pad>" not in text for text in texts)
    part = rollouts.rows(1, 2)
    assert part.prompt_ids.tolist() == [PROMPTS[1]], "columns that are padding in all rows are cut"
    assert part.completion_mask.sum().item() == lengths[64:128].sum().item()


def test_few_shot_and_template() -> None:
    settings = _settings(few_shot=2)
    tasks = build_tasks(TASKS, 0, 1)
    prompter = Prompter(tiny_tokenizer(), tasks, settings)
    example = tasks[0].next_example()
    text = prompter.text("copy", example)
    shots = tasks[0].solved_examples(2)
    assert text == "".join(f"{s.question} = {s.answer}<eos>\n" for s in shots) + f"{example.question} = "
    ids = prompter.ids("copy", example)
    assert ids.count(tiny_tokenizer().eos_token_id) == 2


def test_chat_template_and_its_absence() -> None:
    tokenizer = tiny_tokenizer()
    tasks = build_tasks(TASKS, 0, 1)
    with pytest.raises(UserError, match="no chat template"):
        Prompter(tokenizer, tasks, _settings(prompt_template="chat"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    prompter = Prompter(tokenizer, tasks, _settings(prompt_template="chat", system_prompt="be brief"))
    example = tasks[0].next_example()
    assert prompter.text("copy", example) == f"<system>be brief<user>{example.question}<assistant>"


def test_a_prompt_that_is_too_long_is_named() -> None:
    tasks = build_tasks(TASKS, 0, 1)
    prompter = Prompter(tiny_tokenizer(), tasks, _settings(max_prompt_length=5))
    with pytest.raises(UserError, match="max_prompt_length=5"):
        prompter.ids("copy", tasks[0].next_example())


def _loop(settings: Settings) -> Grpo:
    model, tokenizer = _model()
    tasks = build_tasks(TASKS, 0, 1)
    return Grpo(settings, model, tokenizer, tasks, Prompter(tokenizer, tasks, settings))


def test_probe_measures_what_the_plain_computation_measures() -> None:
    """Frozen lower layers and a shared prompt against full training without sharing, on the same rollouts."""
    results = []
    for probing in (True, False):
        loop = _loop(_settings(share_prompt="true" if probing else "false"))
        if probing:
            only_tracked(loop)
        torch.manual_seed(4)
        batch = loop.rollout(["copy"] * 2 + ["maximum"] * 2)
        batch.advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(6))
        _, stats = loop.backward(batch, [], measure=True)
        results.append(stats)
        below = loop.model.model.layers[0].self_attn.q_proj.weight.grad
        assert (below is None) == probing
    for task in ("copy", "maximum"):
        for name in ("sq_norm", "mean_sq_norm", "plug_in"):
            a, b = (getattr(stats[task], name) for stats in results)
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5 * results[1][task].mean_sq_norm), name
        assert results[0][task].n == 2 and results[0][task].mean_sq_norm > 0
    torch.testing.assert_close(results[0].inner_products, results[1].inner_products, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("layers", ["1", "2"])
def test_last_layers_only(layers: str) -> None:
    loop_settings = _settings(train_layers=layers)
    model, _ = _model()
    choose_trainable(model, layers)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "layers." in name} == {
        name for name, _ in model.named_parameters() if any(f"layers.{i}." in name for i in range(2 - int(layers), 2))
    }
    assert "model.norm.weight" in names and not any("embed" in name or "lm_head" in name for name in names)
    tokenizer, tasks = tiny_tokenizer(), build_tasks(TASKS, 0, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loop = Grpo(loop_settings, model, tokenizer, tasks, Prompter(tokenizer, tasks, loop_settings))
    batch = loop.rollout(["copy", "maximum"])
    batch.advantages = torch.randn(2, 4)
    loop.backward(batch, [], measure=True)
    loop.optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= names
    with pytest.raises(UserError, match="at most 2"):
        choose_trainable(model, "3")


def test_a_saved_model_is_loaded_by_its_folder(tmp_path: Path) -> None:
    model, tokenizer = _model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = load_model(_settings(model=str(tmp_path)))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert again("copy ab = ")["input_ids"] == tokenizer("copy ab = ")["input_ids"]
    half, _ = load_model(_settings(model=str(tmp_path), dtype="bfloat16"))
    assert half.dtype == torch.bfloat16


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_model(_settings(model=str(tmp_path / "no-such-model")))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(_settings(model=str(tmp_path)))
    assert "\n" not in str(caught.value)
