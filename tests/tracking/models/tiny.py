"""Tiny random-weight models of the architectures in transformers, their inputs and their rows' losses.

A model is built from its configuration class, the sizes that all share and its own. Its weights get noise, so that no
gain is one and no bias zero, and its dropouts are zero, so that a row has one loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.tracking.models.architecture import CLASSES, IMAGE_TOKEN, LENGTH, ROWS, SIZES, TARGETS, VOCABULARY
from tests.tracking.models.decoders import DECODERS
from tests.tracking.models.others import OTHERS

MODELS = DECODERS | OTHERS
PADDINGS = ("none", "right", "left")


def tiny_model(name: str) -> nn.Module:
    """The model with noise on its weights and no dropout, in training mode."""
    architecture = MODELS[name]
    torch.manual_seed(0)
    if architecture.build is not None:
        model = architecture.build()
    else:
        sizes = ({} if architecture.plain else SIZES) | architecture.sizes
        if architecture.task == "classification":
            sizes = sizes | {"num_labels": CLASSES}
        model = getattr(tf, architecture.model)(getattr(tf, architecture.config)(**sizes))
    for config in [module.config for module in model.modules() if hasattr(module, "config")]:
        config._experts_implementation = "eager"  # the grouped product has no float64
        for key, value in config.to_dict().items():
            if ("drop" in key or "pdrop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    model.config.use_cache = False
    model.to(architecture.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def padding_mask(padding: str, length: int) -> Tensor:
    """[ROWS, length] with 0 at up to half of the tokens of some rows, at the right or the left end."""
    mask = torch.ones(ROWS, length, dtype=torch.long)
    for row in range(ROWS if padding != "none" else 0):
        pad = (2 * row) % (length // 2 + 1)
        mask[row, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
    return mask


def inputs_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of the model for the whole batch, each with rows first, and the targets."""
    task = MODELS[name].task
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (ROWS, length), generator=generator)

    if task == "speech":
        features = torch.randn(ROWS, 4, 8, generator=generator, dtype=torch.float64)
        if name == "speech_to_text":
            features = features.transpose(1, 2).contiguous()
        target = tokens(TARGETS)
        return {"input_features": features, "decoder_input_ids": target}, target
    ids, mask = tokens(LENGTH), padding_mask(padding, LENGTH)
    ids[mask == 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "classification":
        return inputs, torch.arange(ROWS) % CLASSES
    if task == "image" and padding == "none":  # with padding the rows are text alone
        return inputs | image_inputs(name, ids), ids
    if task == "seq2seq":
        target = tokens(TARGETS)
        return inputs | {"decoder_input_ids": target, "decoder_attention_mask": padding_mask(padding, TARGETS)}, target
    if name == "paligemma":
        inputs["token_type_ids"] = torch.ones_like(ids)  # what follows the prompt is causal
    return inputs, ids


def image_inputs(name: str, ids: Tensor) -> dict[str, Tensor]:
    """One image of four tokens per row, whose places in ``ids`` [ROWS, LENGTH] are written."""
    generator = torch.Generator().manual_seed(2)
    ids[:, 1:5] = IMAGE_TOKEN
    if name.startswith("qwen"):  # patches of all images in one list, [ROWS * 16, 24]
        ids[:, 0] = VOCABULARY
        patches = torch.randn(ROWS * 16, 3 * 2 * 2 * 2, generator=generator, dtype=torch.float64)
        places = (ids == IMAGE_TOKEN).int()
        return {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
            "mm_token_type_ids": places,
        }
    images = (ROWS, 1, 3, 8, 8) if name == "smolvlm" else (ROWS, 3, 8, 8)
    found = {"pixel_values": torch.randn(images, generator=generator, dtype=torch.float64)}
    places = ids == IMAGE_TOKEN
    kinds = {"gemma3": places.long(), "paligemma": (~places).long()}
    return found | ({"token_type_ids": kinds[name]} if name in kinds else {})


def of_rows(value: Tensor, rows: Sequence[int]) -> Tensor:
    """The part of an argument that belongs to these rows; patches of several images per row go together."""
    return value.unflatten(0, (ROWS, -1))[rows].flatten(0, 1) if len(value) != ROWS else value[rows]


def losses_of(model: nn.Module, name: str, padding: str) -> Callable[[Sequence[int]], Tensor]:
    """``losses(rows)``: [n] each row's own loss, the mean over its tokens, or its classification loss."""
    inputs, target = inputs_of(name, padding)
    decoder_mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))

    def losses(rows: Sequence[int]) -> Tensor:
        rows = list(rows)
        logits = model(**{key: of_rows(value, rows) for key, value in inputs.items()}).logits
        if MODELS[name].task == "classification":
            return cross_entropy(logits, target[rows], reduction="none")
        token = cross_entropy(logits[:, :-1].transpose(1, 2), target[rows][:, 1:], reduction="none")
        mask = torch.ones_like(target[rows]) if MODELS[name].task == "speech" else decoder_mask[rows]
        keep = (mask[:, 1:] * mask[:, :-1]).to(token.dtype)
        return (token * keep).sum(1) / keep.sum(1)

    return losses
