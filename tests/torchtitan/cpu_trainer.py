"""torchtitan's own Trainer on a CPU: its small Llama, rows of several documents with tasks, and what a CPU lacks.

torchtitan 0.3 looks for a GPU and, without one, assumes "cuda". Told that the device is "cpu" it builds its meshes and
shards its model over gloo. Three things are replaced: that answer, the monitor of the GPU's memory, and FlexAttention,
whose backward torch does not have on a CPU, by dense attention with the same mask. The trainer's step is its own.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed.fsdp
from torch import Tensor

VOCABULARY, ROWS, LENGTH = 2048, 3, 24
TASKS = ("even", "odd")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
#: Where the documents of each row begin; with one document per row, only at 0.
BEGINNINGS = ((0, 9), (0, 5, 17), (0,))


def start(rank: int, ranks: int, port: str) -> None:
    """Say what torchrun would, and put a CPU where torchtitan looks for a GPU. Call it before importing torchtitan."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    from torchtitan.components import metrics
    from torchtitan.models.common import attention

    nothing = metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(
        device_name="cpu", reset_peak_stats=lambda: None, get_peak_stats=lambda: nothing
    )
    attention.FlexAttention._compiled_flex_attn = staticmethod(_dense)
    attention._compiled_create_block_mask = attention.create_block_mask


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: Any, enable_gqa: bool, **options: Any
) -> tuple[Tensor, None]:
    from torch.nn.attention.flex_attention import create_mask

    assert score_mod is None
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa), None


def micro_batch(number: int, *, packed: bool) -> tuple[dict[str, Any], Tensor]:
    """(input_dict, labels [ROWS, LENGTH]) of a micro-batch; ``tasks`` has one name per document."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels, positions = tokens[:, 1:].clone(), torch.arange(LENGTH).repeat(ROWS, 1)
    for row, beginnings in enumerate(BEGINNINGS):
        for begin in beginnings if packed else (0,):
            positions[row, begin:] = torch.arange(LENGTH - begin)
            labels[row, begin : begin + row + 1] = -100  # a prompt, so that documents have unequal loss tokens
    documents = int((positions == 0).sum())
    tasks = [TASKS[(number + document) % 2] for document in range(documents)]
    return {"input": tokens[:, :-1].clone(), "positions": positions, "tasks": tasks}, labels


def config(folder: Path, *, packed: bool, chunked: bool = False) -> Any:
    """A configuration of torchtitan's own kind: Llama of two layers, float32, two micro-batches per step.

    Activation checkpointing is torchtitan's default, the selective one.
    """
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.models.llama3 import model_registry
    from torchtitan.trainer import Trainer

    class Loader(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_rank: int, dp_world_size: int, **settings: Any) -> None:
            self.numbers = iter(range(dp_rank, 10_000, dp_world_size))

        def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
            return (micro_batch(number, packed=packed) for number in self.numbers)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Tokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **settings: Any) -> None:
            super().__init__()

        def encode(self, *args: Any, **settings: Any) -> list[int]:
            raise NotImplementedError("the batches are token ids already")

        decode = encode

        def get_vocab_size(self) -> int:
            return VOCABULARY

    spec = model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    loss = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    ranks = int(os.environ["WORLD_SIZE"])
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=loss) if chunked else loss,
        tokenizer=Tokenizer.Config(),
        dataloader=Loader.Config(),
        optimizer=default_adamw(lr=1e-3),
        dump_folder=str(folder),
        debug=DebugConfig(seed=0),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor" if ranks > 1 else "spmd_types"),
        training=TrainingConfig(
            local_batch_size=ROWS,
            global_batch_size=2 * ROWS if ranks == 1 else ranks * ROWS,
            seq_len=LENGTH,
            steps=2,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
    )


def example(name: str) -> type:
    """The trainer that an example of docs/trainers.md defines."""
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found.group(1), names)
    trainer: type = names["MeasuredTrainer"]
    return trainer


def sum_over_gloo(trainer: Any) -> None:
    """Let FSDP add gradients up with plain sums: gloo has not the scaled ones that it takes for a factor of 1."""
    for module in trainer.model_parts[0].modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def step(trainer: Any) -> None:
    """One optimizer step, as Trainer.train makes it."""
    trainer.step += 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))


def weights(trainer: Any) -> dict[str, Tensor]:
    """{name in the model that is not wrapped: whole weight}."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in trainer.model_parts[0].named_parameters()
    }


def replica(trainer: Any, parameters: dict[str, Tensor]) -> torch.nn.Module:
    """The trainer's model on one device, not sharded and not checkpointed, with these weights."""
    model: torch.nn.Module = trainer.model_config.build()
    model.init_weights()  # also its buffers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return model


def document_losses(model: Any, number: int, *, packed: bool) -> Iterator[tuple[str, Tensor]]:
    """(task, mean loss over its own loss tokens) of each document, computed from the document alone."""
    inputs, labels = micro_batch(number, packed=packed)
    tasks = iter(inputs["tasks"])
    for row in range(ROWS):
        begins = [*(inputs["positions"][row] == 0).nonzero().flatten().tolist(), LENGTH]
        for begin, end in itertools.pairwise(begins):
            tokens, positions = (inputs[key][row : row + 1, begin:end] for key in ("input", "positions"))
            logits = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))
            yield next(tasks), torch.nn.functional.cross_entropy(logits[0].float(), labels[row, begin:end])
