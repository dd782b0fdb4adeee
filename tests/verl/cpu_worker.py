"""verl's own actor worker on a CPU: a platform for verl's plug-in registry, a tiny Qwen2, and a batch of rollouts.

verl 0.9.1 has no CPU platform: its FSDP engine is for "cuda" and "npu", and on a CPU it stops at the device mesh.
The platform below registers "cpu" as verl's plug-in interface provides, and the engine's own class for it. Nothing of
verl's update is replaced.
"""

from __future__ import annotations

import contextlib
import os
import socket
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed

TASKS = ("sums", "facts", "loud")
VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def register_cpu() -> None:
    """Make "cpu" a platform of verl's. Call it before anything asks verl for its device; verl must be installed."""
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ.setdefault("WG_BACKEND", "ray")
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

    # verl asks its device module for the memory in use, which torch.cpu does not report.
    memoryless = types.SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in torch.cpu.__all__},
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        mem_get_info=lambda: (0, 0),
        empty_cache=lambda: None,
        get_device_name=lambda: "CPU",
    )

    class PlatformCPU(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = memoryless

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return True

        def current_device(self) -> Any:
            return torch.device("cpu")

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None: ...

        def synchronize(self, device_index: int | None = None) -> None: ...

        def manual_seed(self, seed: int) -> None: ...

        def manual_seed_all(self, seed: int) -> None: ...

        def set_allocator_settings(self, settings: str) -> None: ...

        def empty_cache(self) -> None: ...

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CPU_VISIBLE_DEVICES"

        def nvtx_range(self, msg: str) -> Any:
            return contextlib.nullcontext()

        def profiler_start(self) -> None: ...

        def profiler_stop(self) -> None: ...

        def cudart(self) -> None: ...

        def is_ipc_supported(self) -> bool:
            return False

        def ray_resource_name(self) -> str:
            return "CPU"

        def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
            return {"num_cpus": num_gpus}

        def ray_noset_envvars(self) -> list[str]:
            return []

    PlatformRegistry.register("cpu")(PlatformCPU)
    set_platform(PlatformCPU())
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    if "cpu" not in engines:
        EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
            FSDPEngineWithLMHead
        )


def join(rank: int = 0, ranks: int = 1, port: str = "29611") -> None:
    """A gloo group; verl's own call would ask for two backends of "cpu", and leaves a group that exists alone."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)


def start() -> None:
    """:func:`register_cpu` and a group of this process alone, once."""
    if not torch.distributed.is_initialized():
        register_cpu()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        join(port=port)


def saved_model(folder: Path) -> Path:
    """A random tiny Qwen2 with its configuration in ``folder``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def configs(folder: Path, *, remove_padding: bool = True, engine: dict | None = None, model: dict | None = None):
    """(model, engine, optimizer, checkpoint) configurations of verl's."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    return (
        HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            use_remove_padding=remove_padding,
            override_config={"attn_implementation": "sdpa"},
            **(model or {}),
        ),
        FSDPEngineConfig(
            **{
                "strategy": "fsdp2",
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 6,
                "max_token_len_per_gpu": 256,
                "infer_micro_batch_size_per_gpu": 6,
                "infer_max_token_len_per_gpu": 256,
                "use_torch_compile": False,
                "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                **(engine or {}),
            }
        ),
        FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, clip_grad=1.0),
        CheckpointConfig(),
    )


def training_worker(folder: Path, *, kind: Any = None, **changes: Any) -> Any:
    """verl's TrainingWorker (or ``kind``), reset, with its FSDP2 engine on the model in ``folder``."""
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    model, engine, optimizer, checkpoint = configs(folder, **changes)
    worker = (kind or TrainingWorker)(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=checkpoint,
        )
    )
    worker.reset()
    return worker


def actor_loss(**changes: Any) -> Any:
    """verl's own actor loss, ``partial(ppo_loss, config=...)``, and its configuration as ``.keywords["config"]``."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    changes["policy_loss"] = PolicyLossConfig(**changes.get("policy_loss", {}))
    config = FSDPActorConfig(
        **{"rollout_n": 3, "strategy": "fsdp2", "ppo_micro_batch_size_per_gpu": 6, **changes},
    )
    return partial(ppo_loss, config=config)


def rollouts(prompts: int = 8, completions: int = 3, seed: int = 1, padding: int = 0) -> Any:
    """A batch as verl's V1 trainer sends it to ``update_actor``: jagged fields, ``uid`` and ``data_source``.

    Prompts alternate between the tasks; lengths differ from row to row. ``padding`` rows are such as verl adds until
    mini-batches divide the batch.
    """
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    rows: list[dict[str, Any]] = []
    for p in range(prompts):
        prompt = torch.randint(2, VOCABULARY, (drawn(2, 7),), generator=generator)
        for _ in range(completions):
            response = torch.randint(2, VOCABULARY, (drawn(1, 9),), generator=generator)
            mask = (torch.rand(len(response), generator=generator) < 0.85).long()
            mask[0] = 1
            rows.append(
                {
                    "uid": f"prompt-{p}",
                    "data_source": TASKS[p % len(TASKS)],
                    "prompts": prompt,
                    "responses": response,
                    "response_mask": mask,
                    "advantages": torch.randn(1, generator=generator).expand(len(response)).clone(),
                    "old_log_probs": -3.0 + torch.randn(len(response), generator=generator) * 0.1,
                    "ref_log_prob": -3.0 + torch.randn(len(response), generator=generator) * 0.1,
                }
            )
    for _ in range(padding):
        response, prompt = torch.ones(1, dtype=torch.long), torch.ones(9, dtype=torch.long)
        rows.append(
            {
                **rows[0],
                "uid": "pad" + "0" * 32,
                "prompts": prompt,
                "responses": response,
                "response_mask": torch.zeros(1, dtype=torch.long),
                "advantages": torch.zeros(1),
                "old_log_probs": torch.zeros(1),
                "ref_log_prob": torch.zeros(1),
            }
        )
    for row in rows:
        row["input_ids"] = torch.cat([row["prompts"], row["responses"]])
        row["position_ids"] = torch.arange(len(row["input_ids"]))
        row["loss_mask"] = row["response_mask"]
    fields: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        fields[name] = (
            torch.nested.as_nested_tensor(values, layout=torch.jagged) if torch.is_tensor(values[0]) else values
        )
    return tu.get_tensordict(fields)


def prepared(data: Any, *, size: int, epochs: int = 1, shuffle: bool = False) -> Any:
    """``data`` with what verl's trainer adds for ``update_actor``; ``size`` rows of all ranks are a mini-batch."""
    from verl.utils import tensordict_utils as tu

    return tu.assign_non_tensor(
        data,
        calculate_entropy=False,
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=size,
        mini_batch_size=size,
        epochs=epochs,
        seed=42,
        dataloader_kwargs={"shuffle": shuffle},
        temperature=1.0,
    )


def reduced(output: Any) -> dict[str, Any]:
    """The metrics of an update as verl's trainer logs them."""
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import rename_dict

    return reduce_metrics(rename_dict(output["metrics"], "actor/"))


def update(worker: Any, data: Any, *, mini_batch: int | None = None, epochs: int = 1) -> dict[str, Any]:
    """One actor update of this process alone, as ``update_actor`` makes it: the metrics of the trainer's log."""
    size = len(data) if mini_batch is None else mini_batch
    return reduced(worker.train_mini_batch(data=prepared(data, size=size, epochs=epochs)))
