"""attach() on an SFTTrainer whose rows hold several sequences: padding-free batches and packed data sets."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

from gradnorm_kernels.integrations.trl import attach, pack_train_dataset
from gradnorm_kernels.integrations.trl.sft import OFFSETS, TASK
from tests.trl import trl_tiny as tiny
from tests.trl.test_sft_attach import own_gradient, sft, texts
from tests.trl.test_trl_docs import example

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 18


def watch(trainer: Any, attached: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(inputs of compute_loss, arguments of microbatch), filled while the trainer trains."""
    seen: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    inner, microbatch = trainer.compute_loss, attached.tracker.microbatch

    def compute(model: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return inner(model, inputs, **kwargs)

    trainer.compute_loss = compute
    attached.tracker.microbatch = lambda **more: (given.append(more), microbatch(**more))[1]
    return seen, given


@pytest.mark.parametrize(
    ("strategy", "changes", "options"),
    [
        (None, {"pad_to_multiple_of": 16}, {"layers": "all"}),
        ("bfd", {"per_device_train_batch_size": 3}, {"fused": True}),
        pytest.param(
            "bfd",
            {"per_device_train_batch_size": 1, "pad_to_multiple_of": 20, "loss_type": "dft"},
            {"accumulate": "exact"},
            marks=tiny.knows_dft,
        ),
    ],
    ids=["padding-free", "bfd", "bfd, one row"],
)
def test_u_is_that_of_the_sequences_own_losses(tmp_path, strategy, changes, options):
    settings = {"max_steps": 1, "learning_rate": 0.0, "padding_free": True, "max_length": None, **changes}
    trainer = sft(tmp_path, **settings)
    by_text = {tuple(row["input_ids"]): row["task"] for row in trainer.train_dataset}
    if strategy is not None:
        pack_train_dataset(trainer, LENGTH, strategy)
    attached = attach(trainer, **options)
    seen, given = watch(trainer, attached)
    trainer.train()
    attached.detach()
    gradients: list[list[tuple[str, torch.Tensor]]] = []
    for inputs, more in zip(seen, given, strict=True):
        offsets = more["cu_seqlens"]
        assert len(offsets) - 1 == len(more["task_ids"]) and inputs["input_ids"].shape[0] == 1
        gradients.append([])
        for name, (a, b) in zip(more["task_ids"], itertools.pairwise(offsets), strict=True):
            ids, labels = inputs["input_ids"][0, a:b], inputs["labels"][0, a:b]
            assert by_text[tuple(ids.tolist())] == name
            row = own_gradient(
                trainer.model, attached.tracker.layers, ids, torch.ones_like(ids), labels, "loss_type" in changes
            )
            gradients[-1].append((name, row))
    if options.get("accumulate") == "exact":  # all pairs of the step count
        gradients = [[one for part in gradients for one in part]]
    pairs: dict[str, list[float]] = {}
    for part in gradients:
        for (a, g), (b, h) in itertools.permutations(part, 2):
            if a == b:
                pairs.setdefault(a, []).append(float(g @ h))
    assert len(pairs) > 1 and not attached.tracker.skipped
    for task, products in pairs.items():
        gradient = attached.last[task]
        wanted = sum(products) / len(products)
        assert gradient.sq_norm == pytest.approx(wanted, rel=1e-4, abs=1e-4 * gradient.mean_sq_norm)


def test_packed_rows_are_trls_own_and_watching_changes_no_bit(tmp_path):
    packed = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    plain = sft(tmp_path / "a", packing=True, packing_strategy="bfd", max_length=LENGTH, **packed)
    watched = sft(tmp_path / "b", padding_free=True, max_length=None, **packed)
    pack_train_dataset(watched, LENGTH)
    for column in ("input_ids", "labels", "seq_lengths"):
        assert list(plain.train_dataset[column]) == list(watched.train_dataset[column])
    attached = attach(watched, layers="all")
    plain.train()
    watched.train()
    assert tiny.losses(plain) == tiny.losses(watched)
    first, second = tiny.weights(plain), tiny.weights(watched)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert attached.last and any("tasks/up/grad_norm_sq" in line for line in watched.state.log_history)
    rows = [dict(row) for row in watched.train_dataset.select(range(2))]
    batch = pickle.loads(pickle.dumps(watched.data_collator))(rows)  # as in a loader's worker
    assert len(batch[TASK]) == len(batch[OFFSETS]) - 1 == sum(len(row["seq_lengths"]) for row in rows)


def test_wrapped_rows_hold_one_task_each(tmp_path):
    trainer = sft(tmp_path, max_length=None, max_steps=1, per_device_train_batch_size=4)
    tokens: dict[str, list[int]] = {}
    for row in trainer.train_dataset:
        tokens.setdefault(row["task"], []).extend(row["input_ids"])
    pack_train_dataset(trainer, LENGTH, "wrapped")
    found: dict[str, int] = {}
    for row in trainer.train_dataset:
        assert len(row["input_ids"]) <= LENGTH
        found[row["task"]] = found.get(row["task"], 0) + len(row["input_ids"])
    assert found == {task: len(ids) for task, ids in tokens.items()}
    attached = attach(trainer)
    trainer.train()
    assert attached.last and all(gradient.n > 0 for gradient in attached.last.values())


def test_the_example_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = example("sft-packed").replace("report_to=[]", "report_to=[], bf16=False, use_cpu=True, save_strategy='no'")
    space: dict[str, Any] = {"model": tiny.model(), "tokenizer": tiny.tokenizer(), "data": texts()}
    exec(f"from trl import SFTConfig, SFTTrainer\n{text}", space)
    assert space["attached"].last["up"].n > 1


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"packing": True, "max_length": 16}, {}, "needs a trainer with packing=False and padding_free=True"),
        ({"max_length": None}, {}, "needs a trainer with packing=False and padding_free=True"),
        ({"padding_free": True, "max_length": None}, {"strategy": "wrapped"}, "padding_free=False, got packing=False"),
        ({}, {"strategy": "bfd_split"}, "cuts one sequence into several, which are not independent"),
        ({}, {"max_length": 0}, "max_length must be an int of at least 1, got 0"),
        ({"padding_free": True, "max_length": None}, {"task_column": "kind"}, "task_column='kind' is not a column"),
    ],
)
def test_packing_that_is_refused(tmp_path, changes, given, message):
    trainer = sft(tmp_path, **changes)
    before = trainer.train_dataset
    with pytest.raises(ValueError, match=message):
        pack_train_dataset(trainer, **{"max_length": LENGTH, **given})
    assert trainer.train_dataset is before


def test_what_attach_refuses(tmp_path):
    lost = sft(tmp_path, packing=True, max_length=16)
    with pytest.raises(ValueError, match=r"drops all others.*padding_free=True.*pack_train_dataset\(trainer"):
        attach(lost)
    lost.train_dataset = lost.train_dataset.add_column("task", ["up"] * len(lost.train_dataset))
    with pytest.raises(ValueError, match=r"packing=True drops the tasks.*pack_train_dataset\(trainer"):
        attach(lost)
    trainer = sft(tmp_path, padding_free=True, max_length=None)
    pack_train_dataset(trainer, LENGTH)
    with pytest.raises(ValueError, match="packed already"):
        pack_train_dataset(trainer, LENGTH)
    trainer.train_dataset = trainer.train_dataset.remove_columns("seq_lengths")
    with pytest.raises(ValueError, match="one task per packed sequence"):
        attach(trainer)
