"""Every model class of transformers' auto mappings, on the meta device, and where a forward computes attention last.

A model has no weights there, so that the default sizes cost nothing; only the number of layers is reduced where the
configuration allows it. :func:`last_attention_call` is independent of the choice of default layers: it runs the
model and notes which module calls a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
LAYERS = 6
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")
TOKENS = 17  # no model has as many experts or heads

SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
GROUPED = {function for function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if function}
TO_NUMBER = {Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__float__}


def every_class() -> dict[str, str]:
    """{class: model type}, each class once."""
    found: dict[str, str] = {}
    for mapping in MAPPINGS.values():
        for model_type, classes in mapping.items():
            for name in [classes] if isinstance(classes, str) else classes:
                found.setdefault(name, model_type)
    return found


def _fewer_layers(config: Any) -> dict[str, Any]:
    """Arguments that give a configuration, and those inside it, at most ``LAYERS`` layers."""
    values = config.to_dict()
    found = {key: LAYERS for key in COUNTS if isinstance(values.get(key), int) and values[key] > LAYERS}
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "to_dict"):
            fewer = _fewer_layers(inner)
            if fewer:
                found[key] = {"model_type": inner.model_type, **fewer}
    return found


def build(name: str, model_type: str) -> nn.Module:
    """The class with its default configuration, with few layers if it can be built so."""
    config_class = tf.CONFIG_MAPPING[model_type]
    default = config_class()
    for arguments in (_fewer_layers(default), {}):
        try:
            config = config_class(**arguments)
            with torch.device("meta"):
                return getattr(tf, name)(config).eval()
        except Exception:
            if not arguments:
                raise
    raise AssertionError


class _Softmaxes(TorchFunctionMode):
    """Notes the module that is running when a softmax over [.., L, L] scores is computed.

    A meta tensor has no values, so that what the code asks of them is made up.
    """

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.calls = running, []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensor = next((value for value in args if isinstance(value, Tensor)), None)
        if tensor is not None and tensor.is_meta:
            if function in (Tensor.__bool__, Tensor.__contains__):
                return False
            if function in TO_NUMBER:
                return 1
            if function is Tensor.tolist:
                return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()
            if function in GROUPED:
                return tensor.new_empty(tensor.shape[0], args[1].shape[-1])
            of_tokens = tensor.dim() >= 3 and tensor.shape[-2] == TOKENS
            scores = function in SOFTMAX and of_tokens and tensor.shape[-1] in (TOKENS, TOKENS + 1)  # with a sink
            if scores or function is F.scaled_dot_product_attention:
                self.calls.append(self.running[-1] if self.running else "")
        return function(*args, **(kwargs or {}))


def last_attention_call(model: nn.Module, **inputs: Tensor) -> str | None:
    """Name of the module in which a forward computes attention last; None where it computes none."""
    running: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    handles = []
    for module in model.modules():
        name = names[id(module)]
        if next(module.parameters(), None) is None:  # a softmax or a rotary embedding of its own
            continue
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda m, args, out: running.pop() and None, always_call=True))
    mode = _Softmaxes(running)
    try:
        with mode, torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return mode.calls[-1] if mode.calls else None


def text_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Token ids on the meta device, for the decoder too where there are two."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    config = model.config
    config.use_cache = False
    both = getattr(config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}
