"""attach() on SFTTrainer: every row is a sample; U against the rows' own losses; training is unchanged."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch

from gradnorm_kernels.integrations.trl import attach
from gradnorm_kernels.integrations.trl.sft import TASK
from tests.trl import trl_tiny as tiny

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def texts(rows: int = 24, **columns: Any) -> Any:
    data = tiny.prompts(rows)
    answers = [" ".join(tiny.WORDS[(i * 3 + j) % 9] for j in range(1 + i % 5)) for i in range(rows)]
    return data.add_column("completion", answers)


def sft(folder: Any, data: Any = None, trained: Any = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            model=tiny.model() if trained is None else trained,
            args=trl.SFTConfig(**settings),
            train_dataset=texts() if data is None else data,
            processing_class=tiny.tokenizer(),
        )


def own_gradient(model: Any, layers: list[str], ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, dft: bool):
    """The gradient of one row's mean-token loss by plain cross entropy."""
    logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0, :-1]
    counted = labels[1:] != -100
    token = torch.nn.functional.cross_entropy(logits[counted], labels[1:][counted], reduction="none")
    if dft:
        token = token * (-token).exp().detach()
    modules = dict(model.named_modules())
    grads = torch.autograd.grad(token.mean(), [p for name in layers for p in modules[name].parameters()])
    return torch.cat([grad.flatten() for grad in grads]).double()


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}, {"fused": True}),
        pytest.param({"loss_type": "dft"}, {"layers": r"layers\.0\.(self_attn|mlp)"}, marks=tiny.knows_dft),
        ({"gradient_checkpointing": True, "completion_only_loss": False}, {}),
        ({"average_tokens_across_devices": False}, {}),
    ],
)
def test_u_is_that_of_the_rows_own_losses(tmp_path, changes, options):
    trainer = sft(tmp_path, max_steps=1, learning_rate=0.0, **changes)
    seen, inner = [], trainer.compute_loss

    def compute(model: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return inner(model, inputs, **kwargs)

    trainer.compute_loss = compute
    attached = attach(trainer, **options)
    tasks, microbatch = [], attached.tracker.microbatch
    attached.tracker.microbatch = lambda **given: (tasks.append(given["task_ids"]), microbatch(**given))[1]
    trainer.train()
    attached.detach()
    num: dict[str, float] = {}
    count: dict[str, int] = {}
    for inputs, names in zip(seen, tasks, strict=True):
        rows = zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
        dft = changes.get("loss_type") == "dft"
        grads = [own_gradient(trainer.model, attached.tracker.layers, *row, dft) for row in rows]
        for p, q in itertools.permutations(range(len(names)), 2):
            if names[p] == names[q]:
                num[names[p]] = num.get(names[p], 0.0) + float(grads[p] @ grads[q])
                count[names[p]] = count.get(names[p], 0) + 1
    assert len(num) > 1
    for task, value in num.items():
        gradient = attached.last[task]
        assert gradient.sq_norm == pytest.approx(value / count[task], rel=1e-4, abs=1e-4 * gradient.mean_sq_norm)
    lengths = {int((row != -100).sum()) for inputs in seen for row in inputs["labels"]}
    assert len(lengths) > 2
    # the tasks travelled with their rows
    by_text = {tuple(row["input_ids"]): row["task"] for row in trainer.train_dataset}
    for inputs, names in zip(seen, tasks, strict=True):
        for ids, mask, name in zip(inputs["input_ids"], inputs["attention_mask"], names, strict=True):
            assert by_text[tuple(ids[mask.bool()].tolist())] == name


def test_watching_changes_no_bit_and_the_log_has_the_tasks(tmp_path):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plain = sft(tmp_path / "a", **options)
    plain.train()
    watched = sft(tmp_path / "b", **options)
    attached = attach(watched, layers="all", every=2)
    watched.train()
    assert tiny.losses(plain) == tiny.losses(watched)
    first, second = tiny.weights(plain), tiny.weights(watched)
    assert all(torch.equal(first[key], second[key]) for key in first)
    measured = [line for line in watched.state.log_history if "tasks/up/grad_norm_sq" in line]
    assert [line["step"] for line in measured] == [1, 3]
    assert math.isfinite(measured[-1]["tasks/up/grad_norm_sq_se"])
    again = sft(tmp_path / "b", **options)
    resumed = attach(again, layers="all", every=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed.state_dict() == attached.state_dict()
    row = dict(watched.train_dataset[0])
    assert TASK in pickle.loads(pickle.dumps(watched.data_collator))([row])  # as in a loader's worker
    assert TASK not in watched.data_collator([{**row, "task": "unheard of"}])
    attached.detach()
    assert TASK not in watched.data_collator([row])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"packing": True, "max_length": 16}, {}, "an SFTTrainer that packs drops all others"),
        ({}, {"task_sampling": "proportional"}, "act on GRPO's generations"),
        ({}, {"correction": "mgda"}, "act on GRPO's generations"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
    ],
)
def test_settings_that_are_refused(tmp_path, changes, options, message):
    trainer = sft(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        attach(trainer, **options)


def test_one_row_in_a_step_is_said_to_be_undefined(tmp_path):
    with pytest.warns(UserWarning, match="U stays undefined: an optimizer step holds one sample .*batch_size=1 x"):
        attach(sft(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=1))


def test_rows_alone_in_their_micro_batches_are_paired_over_the_step(tmp_path):
    trainer = sft(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attached = attach(trainer)
    trainer.train()
    assert attached.last.accumulate == "exact" and attached.tracker.accumulation.startswith("exact: no two samples")
    assert [line["accumulate/exact"] for line in trainer.state.log_history if "loss" in line] == [1.0, 1.0]
    assert sum(gradient.n for gradient in attached.last.values()) == 8
    assert all(math.isfinite(gradient.sq_norm) == (gradient.n > 1) for gradient in attached.last.values())
