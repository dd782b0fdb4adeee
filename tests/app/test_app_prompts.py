"""Questions that are too long, before the first step, and every token that ends a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo import cli
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.models import end_tokens, load_model
from gradnorm_grpo.rollout import GENERATED_CHECKED, Prompter, Rollouts, completion_texts, generate
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import Task, build_tasks

TINY: dict[str, Any] = {
    "model": "tiny",
    "tiny_layers": 1,
    "tiny_hidden_size": 32,
    "num_threads": 1,
    "prompt_template": "{question} = ",
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 4,
    "loss_type": "grpo",
    "max_steps": 1,
    "eval_prompts": 2,
    "cache_dir": "",
    "max_prompt_length": 24,
}


def rows(path: Path, long: list[int], count: int = 40) -> dict[str, Any]:
    """A task of sums, some of whose questions have a hundred characters."""
    questions = ["8" * 100 + f" + {i}" if i in long else f"{i} + 2" for i in range(count)]
    path.write_text("".join(f'{{"prompt": "{question}", "answer": 2}}\n' for question in questions))
    return {"name": "sums", "source": "jsonl", "path": str(path), "verifier": "numeric"}


def checked(task: dict[str, Any], **settings: Any) -> tuple[Task, list[str], Prompter]:
    made = Settings(**{**TINY, "tasks": [task], **settings})
    tasks = build_tasks(made.tasks, made.seed, made.eval_prompts)
    prompter = Prompter(load_model(made)[1], tasks, made)
    return tasks[0], prompter.check(tasks), prompter


@pytest.mark.parametrize("long", [[17], [0, 39], list(range(5, 25))])
@pytest.mark.parametrize("seed", [0, 3])
def test_overlong_rows_are_counted_and_named_or_left_out(tmp_path: Path, long: list[int], seed: int) -> None:
    task = rows(tmp_path / "sums.jsonl", long)
    message = rf"task 'sums': {len(long)} of 40 questions do not fit, the first has 10\d tokens, .*max_prompt_length=24"
    with pytest.raises(UserError, match=message):
        checked(task, seed=seed)
    built, remarks, prompter = checked(task, seed=seed, overlong="drop", eval_prompts=8)
    assert remarks == [
        f"task 'sums': {len(long)} of 40 questions are left out, as their prompts do not fit max_prompt_length=24"
    ]
    drawn = [built.next_example() for _ in range(200)]
    shown = [*drawn, *built.held_out, *built.solved_examples(30)]
    assert all(len(prompter.ids("sums", example)) <= 24 for example in shown)
    assert len({example.question for example in [*drawn, *built.held_out]}) == 40 - len(long)
    assert not {e.question for e in drawn} & {e.question for e in built.held_out}


def test_too_few_rows_that_fit_are_an_error(tmp_path: Path) -> None:
    task = rows(tmp_path / "sums.jsonl", list(range(1, 40)))
    with pytest.raises(UserError, match="39 of 40 questions do not fit, too many"):
        checked(task, overlong="drop")


def test_rows_that_all_fit_are_not_mentioned(tmp_path: Path) -> None:
    assert checked(rows(tmp_path / "sums.jsonl", []))[1] == []


def test_generated_questions_are_looked_at_and_later_long_ones_left_out() -> None:
    task = {"name": "copy", "source": "synthetic", "config": {"low": 2, "high": 12}}
    with pytest.raises(
        UserError, match=r"task 'copy': \d+ of \d+ questions looked at do not fit, the first has \d\d tokens"
    ):
        checked(task, max_prompt_length=14)
    built, remarks, prompter = checked(task, max_prompt_length=14, overlong="drop")
    assert "are left out" in remarks[0] and built.position == 0
    drawn = [built.next_example() for _ in range(400)]
    assert all(len(prompter.ids("copy", example)) <= 14 for example in drawn) and built.left_out > 0
    # One that only turns up beyond what is looked at is passed over in either mode, and counted.
    rare, remarks, _ = checked({"name": "copy", "source": "synthetic"})
    assert remarks == []
    own = rare._stream.make
    far = GENERATED_CHECKED + 10

    def make(seed: int, index: int) -> Any:
        example = own(seed, index)
        return type(example)("copy " + "a" * 90, "a") if index == far else example

    object.__setattr__(rare._stream, "make", make)
    shown = [rare.next_example() for _ in range(far + 5)]
    assert rare.left_out == 1 and all(len(example.question) < 24 for example in shown)


def test_a_run_ends_before_its_first_step_or_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {**TINY, "max_steps": 12, "tasks": [rows(tmp_path / "sums.jsonl", [17])]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    for command in ("train", "probe"):
        assert cli.main([command, "--config", "config.yaml", "--output_dir", "refused"]) == 2
        assert "task 'sums': 1 of 40 questions do not fit" in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
    assert cli.main(["train", "--config", "config.yaml", "--output_dir", "run", "--overlong", "drop"]) == 0
    assert "1 of 40 questions are left out" in capsys.readouterr().out
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count('"kind": "train"') == 12
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}


# End tokens


def tiny() -> tuple[Any, Any, Settings]:
    settings = Settings(**{**TINY, "max_completion_length": 12, "temperature": 1.5})
    return (*load_model(settings), settings)


@pytest.mark.parametrize("declared", [None, 2, [2], [2, 30], [30, 31], (30,)])
def test_all_declared_end_tokens_are_known(declared: Any) -> None:
    model, tokenizer, _ = tiny()
    model.generation_config.eos_token_id = declared
    extra = {declared} if isinstance(declared, int) else set(declared or ())
    assert end_tokens(model, tokenizer) == sorted({tokenizer.eos_token_id, *extra})


@pytest.mark.parametrize("declared", [100_000, [2, 100_000], -1])
def test_an_end_token_outside_the_vocabulary_is_refused(declared: Any) -> None:
    model, tokenizer, _ = tiny()
    model.generation_config.eos_token_id = declared
    with pytest.raises(UserError, match="eos_token_id of the generation settings holds"):
        end_tokens(model, tokenizer)


def test_a_completion_ends_at_the_first_of_any_of_them() -> None:
    model, tokenizer, settings = tiny()
    others = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *others]
    torch.manual_seed(0)
    rollouts = generate(model, tokenizer, [[5, 6, 7], [8, 9]], 32, settings)
    ends = {tokenizer.eos_token_id, *others}
    seen = set()
    for ids, mask, ended in zip(
        rollouts.completion_ids.tolist(), rollouts.completion_mask.tolist(), rollouts.ended.tolist(), strict=True
    ):
        counted = [token for token, m in zip(ids, mask, strict=True) if m]
        assert not ends & set(counted[:-1])
        assert ended == (counted[-1] in ends)
        seen |= {counted[-1]} & ends
    assert len(seen) > 3, "several of them must have ended a completion, or the test shows nothing"


def test_the_end_token_is_no_part_of_the_text() -> None:
    """One that the tokenizer does not count as special, as a character here, is left out of the text all the same."""
    _, tokenizer, _ = tiny()
    ids = torch.tensor(tokenizer(["ab;cd"], add_special_tokens=False)["input_ids"])
    mask, prompt = torch.tensor([[1, 1, 1, 0, 0]]), torch.ones(1, 1, dtype=torch.long)
    for ended, text in ((True, "ab"), (False, "ab;")):
        rollouts = Rollouts(prompt, prompt, ids, mask, torch.tensor([ended]), 1)
        assert completion_texts(tokenizer, rollouts) == [text]
