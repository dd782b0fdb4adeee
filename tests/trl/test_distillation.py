"""attach() on TRL's GKDTrainer and GOLDTrainer: U of the distillation loss, on data and on own completions."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from gradnorm_kernels.integrations.trl import attach
from tests.trl import trl_tiny as tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def chats(rows: int = 16) -> Any:
    """Conversations of a question and an answer of different lengths, with a task."""
    data = tiny.prompts(rows)
    answers = [" ".join(tiny.WORDS[(i * 3 + j) % 9] for j in range(2 + i % 4)) for i in range(rows)]
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(data["prompt"], answers, strict=True)
    ]
    return tiny.Dataset.from_dict({"messages": messages, "task": data["task"]})


def tokenizer() -> Any:
    """Bytes as tokens: GOLD takes byte-level tokenizers only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
    found.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return found


def distillation(name: str, folder: Any, **changes: Any) -> Any:
    """A GKDTrainer or a GOLDTrainer with another tiny Llama as its teacher, at learning rate 0."""
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig as Config
        from trl.experimental.gkd import GKDTrainer as Trainer

        length = {"max_new_tokens": 5}
    else:
        from trl.experimental.gold import GOLDConfig as Config
        from trl.experimental.gold import GOLDTrainer as Trainer

        length = {"max_completion_length": 5}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 48,
        "seed": 7,
        **length,
        **changes,
    }
    student = tiny.model(vocab_size=258)
    student.generation_config.eos_token_id = list(range(1, 60))  # or no completion would end before its limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            model=student,
            teacher_model=tiny.model(seed=1, vocab_size=258),
            args=Config(**settings),
            train_dataset=chats(),
            processing_class=tokenizer(),
        )


def gkd(folder: Any, **changes: Any) -> Any:
    """A GKDTrainer on its data."""
    return distillation("gkd", folder, lmbda=0.0, **changes)


def own_gradient(trainer: Any, layers: list[str], inputs: dict[str, Any], row: int) -> torch.Tensor:
    """The gradient of one row's mean-token loss, as the trainer computes a batch of that row alone."""
    modules = dict(trainer.model.named_modules())
    parameters = [p for layer in layers for p in modules[layer].parameters()]
    alone = {key: value[row : row + 1] for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    length = (alone["labels"][:, 1:] != -100).sum()
    loss = type(trainer).compute_loss(trainer, trainer.model, alone, num_items_in_batch=length)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]).double()


class Seen:
    """A trainer with attach(), and what its loss and the tracker were given in each micro-batch."""

    def __init__(self, trainer: Any, **options: Any) -> None:
        self.trainer, self.inputs, self.tasks = trainer, [], []
        inner = trainer.compute_loss

        def compute(model: Any, inputs: Any, **kwargs: Any) -> Any:
            self.inputs.append(dict(inputs))
            return inner(model, inputs, **kwargs)

        trainer.compute_loss = compute
        self.attached = attach(trainer, **options)
        microbatch = self.attached.tracker.microbatch

        def opened(**given: Any) -> Any:
            self.tasks.append(given["task_ids"])
            return microbatch(**given)

        self.attached.tracker.microbatch = opened


@pytest.mark.parametrize("name", ["gkd", "gold"])
@pytest.mark.parametrize("own_completions", [0.0, 1.0])
def test_u_is_that_of_the_rows_own_losses(tmp_path, name, own_completions):
    seen = Seen(distillation(name, tmp_path, lmbda=own_completions))
    seen.trainer.train()
    attached = seen.attached
    num: dict[str, float] = {}
    count: dict[str, int] = {}
    for inputs, names in zip(seen.inputs, seen.tasks, strict=True):
        gradients = [own_gradient(seen.trainer, attached.tracker.layers, inputs, row) for row in range(len(names))]
        for p, q in itertools.permutations(range(len(names)), 2):
            if names[p] == names[q]:
                num[names[p]] = num.get(names[p], 0.0) + float(gradients[p] @ gradients[q])
                count[names[p]] = count.get(names[p], 0) + 1
    assert len(num) > 1
    lengths = {int(n) for inputs in seen.inputs for n in (inputs["labels"][:, 1:] != -100).sum(1)}
    assert len(lengths) > 2  # or a mean over rows would give the same
    for task, value in num.items():
        gradient = attached.last[task]
        assert gradient.sq_norm == pytest.approx(value / count[task], rel=1e-4, abs=1e-4 * gradient.mean_sq_norm)


def test_settings_that_are_refused(tmp_path):
    from trl.experimental.gkd import GKDTrainer

    several = distillation("gold", tmp_path, num_generations=2)
    with pytest.raises(ValueError, match="num_generations=2 makes several rows from one prompt"):
        attach(several)
    aligned = distillation("gold", tmp_path)
    aligned.use_uld_loss = True
    with pytest.raises(ValueError, match=r"use_uld_loss=True is a loss of its own .*pass row_scale="):
        attach(aligned)
    other = distillation("gkd", tmp_path)
    other.__class__ = type("Mine", (GKDTrainer,), {"compute_loss": lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=r"Mine computes a loss of its own .*sft_row_scale if the average is still"):
        attach(other)
