"""attach() where parameters or gradients are sharded: FSDP2 and DeepSpeed's ZeRO on two gloo processes.

accelerate chooses both only where it finds GPUs. The workers tell it that its processes are of such a kind; what it and
DeepSpeed then do to the model is their own. U is compared with brute force on a replica that is not sharded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl import test_trl_ranks as ranks

pytest.importorskip("trl")

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed"
)


def fsdp2() -> dict[str, Any]:
    """Settings of a trainer whose model accelerate shards with fully_shard."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    inner = PartialState.__init__

    def init(state: Any, *args: Any, **kwargs: Any) -> None:
        inner(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": config}


def zero(stage: int) -> dict[str, Any]:
    """Settings of a trainer under DeepSpeed; stage 3 shards every parameter, however small."""
    import deepspeed  # noqa: F401
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # it would be compiled
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys((*automatic, "gradient_clipping"), "auto"),
    }
    return {"use_cpu": False, "deepspeed": config, "optim": "adamw_torch"}


def agree(attached: Any, parts: list[list[Any]], exact: bool) -> None:
    """U is that of the rows of both processes, and nothing was left out."""
    from tests.trl.test_trl_exact import u_of

    everything = sum(ranks.everywhere(parts), [])
    truth, squares = u_of([sum(everything, [])] if exact else everything)
    assert truth and not attached.tracker.skipped
    for task, value in truth.items():
        assert abs(attached.last[task].sq_norm - value) < 1e-4 * (abs(value) + squares[task]), task


def supervised(folder: str, settings: dict[str, Any], **options: Any) -> Any:
    """One step of an SFTTrainer; returns it."""
    from tests.trl import test_distillation as distillation
    from tests.trl import test_sft_attach as sft
    from tests.trl import trl_tiny as tiny

    seen = distillation.Seen(sft.sft(folder, learning_rate=0.0, max_steps=1, **settings), **options)
    seen.trainer.train()
    replica, parts = tiny.model(), []
    for at, (inputs, names) in enumerate(zip(seen.inputs, seen.tasks, strict=True)):
        rows = zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
        gradients = [sft.own_gradient(replica, seen.attached.tracker.layers, *row, False) for row in rows]
        tagged = enumerate(zip(names, gradients, strict=True))
        parts.append([(task, (at, row), gradient, 1.0) for row, (task, gradient) in tagged])
    # SFT's samples are those of a process: their ids say nothing to the other one.
    parts = [[(task, (int(os.environ["RANK"]), *key), g, w) for task, key, g, w in part] for part in parts]
    agree(seen.attached, parts, options.get("accumulate") == "exact")
    return seen.trainer


def grpo(folder: str, settings: dict[str, Any], **options: Any) -> Any:
    """One step of a GRPOTrainer; returns it."""
    from tests.trl.test_trl_exact import Watched, many_ends, stand_still

    watched = Watched(stand_still(folder, **settings), **options)
    trainer, replica = watched.trainer, many_ends()
    trainer.train()
    modules = dict(replica.named_modules())
    parameters = [p for name in watched.attached.tracker.layers for p in modules[name].parameters()]

    def gradient(inputs: dict[str, Any], row: int) -> torch.Tensor:
        """Of the mean over the tokens of ``-A pi / pi_old``, where both policies are the same."""
        tokens, kept = inputs["completion_ids"][row], inputs["completion_mask"][row].bool()
        ids = torch.cat([inputs["prompt_ids"][row], tokens])[None]
        mask = torch.cat([inputs["prompt_mask"][row], inputs["completion_mask"][row]])[None]
        logits = replica(input_ids=ids, attention_mask=mask).logits[0, -len(tokens) - 1 : -1] / trainer.temperature
        log_probs = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[kept, 0]
        loss = -(inputs["advantages"][row] * (log_probs - log_probs.detach()).exp()).mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]).double()

    group = trainer.num_generations
    parts = [
        [
            (task, sample, gradient(watched.seen[index], row) / group, 1 / group)
            for row, (task, sample) in enumerate(zip(given["task_ids"], given["sample_ids"], strict=True))
        ]
        for index, given in watched.opened
    ]
    agree(watched.attached, parts, False)
    return trainer


def under_fsdp2(folder: str) -> None:
    """Every parameter is a DTensor between the calls of its layer."""
    from torch.distributed.tensor import DTensor

    settings = fsdp2()
    for trainer in (
        supervised(folder, settings, batch_dim=0),
        supervised(folder, settings, batch_dim=0, layers="all", accumulate="exact"),
        grpo(folder, settings, batch_dim=0, layers="all"),
    ):
        assert str(trainer.accelerator.distributed_type).endswith("FSDP")
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())


def under_zero(folder: str, stage: int) -> None:
    """ZeRO-2 shards the gradients, ZeRO-3 the parameters too."""
    settings = zero(stage)
    for trainer in (
        supervised(folder, settings, batch_dim=0),
        supervised(folder, settings, batch_dim=0, accumulate="exact", fused=stage == 2),
        grpo(folder, settings, batch_dim=0, layers="all" if stage == 2 else "last_attention"),
    ):
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        assert trainer.model_wrapped.zero_optimization_stage() == stage
        assert all((p.numel() == 0) == (stage == 3) for p in trainer.model.parameters())


WORKERS: dict[str, Callable[[str], None]] = {
    "fsdp2": under_fsdp2,
    "zero2": lambda folder: under_zero(folder, 2),
    "zero3": lambda folder: under_zero(folder, 3),
}


@pytest.mark.parametrize(
    "worker", [pytest.param(name, marks=pytest.mark.slow if name == "fsdp2" else needs_deepspeed) for name in WORKERS]
)
def test_two_processes(tmp_path: Path, worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks.two_processes("tests.trl.test_trl_sharded", worker, tmp_path)


if __name__ == "__main__":
    ranks.work(WORKERS)
