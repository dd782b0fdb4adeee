"""The examples of docs/trl.md, and that of docs/trainers.md, run as printed."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels.integrations.trl.loss_scale import AVERAGES, LOSS_TYPES
from gradnorm_kernels.integrations.trl.validation import TASK_SAMPLING
from tests.trl import trl_tiny as tiny

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "trl.md"


def example(name: str, page: Path = PAGE) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"docs/{page.name} has no example {name!r}"
    return found.group(1)


def test_grpo(tmp_path, capsys, monkeypatch):
    """TRL's own configuration but for the accumulation, and for what makes it small."""
    monkeypatch.chdir(tmp_path)
    data = tiny.prompts()
    data = data.map(lambda row: {"task": "gcd" if row["task"] == "up" else "sum"})
    small = "max_steps=6, max_completion_length=5, report_to=[], use_cpu=True, bf16=False, save_strategy='no'"
    text = example("grpo")
    assert text.count("gradient_accumulation_steps=4") == 1
    space = {
        "model": tiny.model(),
        "reward": lambda completion_ids, **_: [float(ids[0] % 5) for ids in completion_ids],
        "data": data,
        "tokenizer": tiny.tokenizer(),
    }
    exec(text.replace("gradient_accumulation_steps=4", f"gradient_accumulation_steps=4, {small}"), space)
    value = space["attached"].tracker.running["gcd"].value
    out = capsys.readouterr().out
    assert math.isfinite(value) and str(value) in out and space["attached"].tracker.accumulation in out
    page = PAGE.read_text(encoding="utf-8")
    assert "task_sampling" in page
    for key in space["attached"].metrics():
        assert key.rsplit("/", 1)[-1] in page


def test_the_table_of_loss_types_is_that_of_the_code():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    printed = {loss: formula for losses, formula in rows for loss in re.findall(r"\w+", losses)}
    assert {loss: printed.get(loss) for loss in LOSS_TYPES} == {
        loss: AVERAGES[average].formula for loss, average in LOSS_TYPES.items()
    }


def test_the_words_of_task_sampling_are_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f'"{word}"' in page for word in (*TASK_SAMPLING, "equal"))


def test_sft(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.model()
    exec(
        example("sft").replace("report_to=[]", "report_to=[], bf16=False, use_cpu=True"),
        {
            "model": model,
            "tokenizer": tiny.tokenizer(),
        },
    )
    assert "arithmetic: U = " in capsys.readouterr().out


def test_packed():
    torch.manual_seed(0)
    sequence_lengths, prompts = [5, 1, 7, 3, 4], torch.tensor([0, 1, 0, 2, 3])
    x, dy = torch.randn(20, 6), torch.randn(20, 4)
    space = {"torch": torch, "gk": gk, "sequence_lengths": sequence_lengths, "prompts": prompts, "x": x, "dy": dy}
    exec(example("packed", DOCS / "trainers.md"), out := space | {"envs": ["b", "a", "b", "a"]})
    bounds = [0, 5, 6, 13, 16, 20]
    parts = [dy[a:b].T @ x[a:b] for a, b in itertools.pairwise(bounds)]
    samples = [parts[0] + parts[2], parts[1], parts[3], parts[4]]
    expected = [(samples[1] * samples[3]).sum(), (samples[0] * samples[2]).sum()]
    torch.testing.assert_close(out["estimate"].sq_norm, torch.stack(expected).double(), rtol=1e-4, atol=1e-4)


def row_losses(model, batch):
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["ids"][:, 1:], reduction="none").mean(1)


class Batches(list):
    """What prepare() leaves alone."""


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loop_under_accelerate(steps):
    """The printed loop gives U of the rows' own losses, and trains as it would without the tracker."""
    ids = torch.randint(3, 31, (2, 6, 7), generator=torch.Generator().manual_seed(1))
    batches = [
        {"ids": part, "mask": torch.ones_like(part), "task": list("abaabb"), "prompt": [f"{k}-{i}" for i in range(6)]}
        for k, part in enumerate(ids)
    ]
    accelerate.state.AcceleratorState._reset_state()  # what the trainers of other tests left behind
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    space = {"gk": gk, "accelerator": accelerator, "model": model, "optimizer": optimizer, "row_losses": row_losses}
    exec(example("accelerate"), out := space | {"batches": Batches(batches[:steps])})
    stats, tracker = out["stats"], out["tracker"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    modules = dict(model.named_modules())
    parameters = [p for name in tracker.layers for p in modules[name].parameters()]
    num = den = 0.0
    for batch in batches[:steps]:
        grads = []
        for loss in row_losses(model, batch):
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            grads.append(torch.cat([part.flatten() for part in parts]).double())
        rows = [i for i, task in enumerate(batch["task"]) if task == "a"]
        num += sum(float(grads[i] @ grads[j]) for i in rows for j in rows if i != j)
        den += len(rows) * (len(rows) - 1)
    assert stats["a"].sq_norm == pytest.approx(num / den, rel=1e-3, abs=1e-4 * stats["a"].mean_sq_norm)
