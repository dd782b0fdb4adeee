"""Stand-ins for the tiny models and data sets on the hub that TRL's tests load: made here, nothing is downloaded.

Models, tokenizers and processors go into a hub cache of their own (``HF_HUB_CACHE``), so transformers finds them by
their names. The architecture is read from the name, the sizes are those below, and the chat template is the installed
TRL's own. Data sets come from the scripts in TRL's sources that make the published ones.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HUB = "trl-internal-testing"
SCRIPTS = {
    "zen": "generate_zen_dataset",
    "zen-image": "generate_zen_image_dataset",
    "zen-multi-image": "generate_zen_multi_image_dataset",
    "harmony": "generate_harmony_dataset",
    "toolcall": "generate_toolcall_dataset",
}
#: A part of the model's name -> TRL's file with its chat template; the first that fits.
TEMPLATES = {
    "Qwen2_5_VL": "qwen2_5_vl",
    "Qwen2VL": "qwen2_5_vl",
    "Qwen3VL": "qwen3_vl",
    "-3.6": "qwen3_6",
    "Qwen3_5": "qwen3_5_nothink",
    "Qwen3": "qwen3",
    "Llama": "llama3_2",
    "Gemma4": "gemma4",
    "Gemma3": "gemma3",
    "Gemma": "gemma",
    "Cohere2": "cohere2",
    "Cohere": "cohere",
    "GptOss": "gptoss",
    "Glm4Moe": "glm4moe",
    "NemotronH": "nemotron_3_nano",
    "Phi3": "phi3",
    "DeepseekV3": "deepseekv3",
    "Llava": "llava_next",
    "Idefics3": "idefics3",
    "": "qwen2_5",
}
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
#: The beginning of a model's name -> the token that stands for an image, where it is not Qwen's.
IMAGE_MARKS = {"Gemma3": "<image_soft_token>", "Llava": "<image>"}
VOCABULARY = 320  # bytes, the tokens above, and room
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": EXPERTS,
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Glm4MoeForCausalLM": EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "NemotronHForCausalLM": {
        "layers_block_type": ["mamba", "attention"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "Qwen3ForCausalLM": {"head_dim": 8, "tie_word_embeddings": True},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "GemmaForCausalLM": {"head_dim": 8},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}


def tokenizer(template: str, image: str) -> Any:
    """A tokenizer of bytes, with the special tokens that the chat templates write; ``image`` stands for an image."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    split.add_special_tokens(TOKENS)
    made = PreTrainedTokenizerFast(
        tokenizer_object=split,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={
            "image_token": image,
            "video_token": "<|video_pad|>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    return made


def _text_model(kind: str) -> Any:
    import transformers

    model = getattr(transformers, kind)
    sizes = dict(SIZES)
    if kind.endswith("ForSequenceClassification"):
        sizes |= {"num_labels": 1}
    return model(model.config_class(**sizes | CHANGES.get(kind, {})))


def _image_model(kind: str, marks: dict[str, int]) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its image processor, and the processor's other arguments."""
    import transformers as tf
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    text = dict(SIZES)
    model = getattr(tf, kind)
    config = model.config_class
    small = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    if kind.startswith("Qwen"):
        tokens = {
            "image_token_id": marks["<|image_pad|>"],
            "video_token_id": marks["<|video_pad|>"],
            "vision_start_token_id": marks["<|vision_start|>"],
            "vision_end_token_id": marks["<|vision_end|>"],
        }
        vision = dict(QWEN_VISION)
        if kind.startswith("Qwen2VL"):
            vision |= {"embed_dim": 16, "hidden_size": 32}
        else:
            vision |= {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}
        if kind.startswith("Qwen2_5"):
            vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        if kind.startswith("Qwen3"):
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
            vision |= {"patch_size": 14}
        rope = MROPE if kind.startswith("Qwen2") else MROPE | {"mrope_interleaved": True}
        text |= {"rope_parameters": rope, "head_dim": 8}
        if kind.startswith("Qwen3_5"):
            text |= LINEAR | {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}
            if "Moe" in kind:
                text |= EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 16}
        made = model(config(text_config=text, vision_config=vision, **tokens))
        images = Qwen2VLImageProcessorPil(size=small, patch_size=14, merge_size=2, temporal_patch_size=2)
        return made, images, {}
    if kind.startswith("Gemma3"):
        made = model(
            config(
                text_config=text | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
                vision_config=CLIP | {"vision_use_head": False},
                mm_tokens_per_image=4,
                image_token_index=marks["<image_soft_token>"],
                boi_token_index=marks["<start_of_image>"],
                eoi_token_index=marks["<end_of_image>"],
            )
        )
        return made, Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), {"image_seq_length": 4}
    if kind.startswith("LlavaFor"):
        made = model(
            config(
                text_config=text | {"model_type": "llama"},
                vision_config=CLIP | {"model_type": "clip_vision_model", "projection_dim": 16},
                image_token_index=marks["<image>"],
            )
        )
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        other = {"patch_size": 8, "vision_feature_select_strategy": "default", "image_token": "<image>"}
        return made, images, other | {"num_additional_image_tokens": 1}
    if kind.startswith("LlavaNext"):
        made = model(
            config(
                text_config=text | {"model_type": "mistral"},
                vision_config=CLIP | {"model_type": "clip_vision_model", "projection_dim": 16},
                image_token_index=marks["<image>"],
                image_grid_pinpoints=[[32, 32]],
            )
        )
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32]]
        )
        other = {
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        }
        return made, images, other
    raise NotImplementedError(f"no stand-in for {kind}")


def _make(name: str, folder: Path) -> None:
    """Write the stand-in for ``trl-internal-testing/<name>`` into ``folder``."""
    import transformers as tf

    kind = name.removeprefix("tiny-").removeprefix("small-").split("-")[0]
    template = next(file for part, file in TEMPLATES.items() if part in name)
    mark = next((mark for part, mark in IMAGE_MARKS.items() if kind.startswith(part)), "<|image_pad|>")
    words = tokenizer(template, mark)
    marks = {word: words.convert_tokens_to_ids(word) for word in TOKENS}
    torch.manual_seed(0)
    if not kind.endswith("ForConditionalGeneration"):
        made, parts = _text_model(kind), words
    else:
        made, images, other = _image_model(kind, marks)
        processor = {
            "Qwen2VL": "Qwen2VLProcessor",
            "Qwen2_5_VL": "Qwen2_5_VLProcessor",
            "Qwen3VL": "Qwen3VLProcessor",
            "Qwen3_5": "Qwen3VLProcessor",
            "Qwen3_5Moe": "Qwen3VLProcessor",
            "Gemma3": "Gemma3Processor",
            "Llava": "LlavaProcessor",
            "LlavaNext": "LlavaNextProcessor",
        }[kind.removesuffix("ForConditionalGeneration")]
        arguments: dict[str, Any] = {"image_processor": images, "tokenizer": words, **other}
        parts = getattr(tf, processor)(**arguments, chat_template=words.chat_template)
    if not kind.endswith("ForSequenceClassification"):
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = 258, 256
    made.save_pretrained(folder)
    parts.save_pretrained(folder)
    if kind.endswith("ForConditionalGeneration") and not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(images.to_dict(), default=str))


def _names(tests: list[Path]) -> Iterator[str]:
    found = {name for path in tests for name in re.findall(rf"{HUB}/((?:tiny|small)-[\w.-]+)", path.read_text("utf-8"))}
    yield from sorted(found)


def make_models(tests: list[Path], cache: Path) -> dict[str, str]:
    """Write a stand-in for every model that the ``tests`` name into the hub cache; {name: why there is none}."""
    missing = {}
    for name in _names(tests):
        repository = cache / f"models--{HUB}--{name}"
        folder = repository / "snapshots" / ("0" * 40)
        if (repository / "refs" / "main").exists():
            continue
        shutil.rmtree(repository, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            _make(name, folder)
        except Exception as error:
            shutil.rmtree(repository)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    return missing


def make_data(source: Path, folder: Path) -> None:
    """Run the scripts of TRL's sources that make the data sets, and write what they would publish into ``folder``."""
    import numpy as np
    from datasets import DatasetDict

    published = DatasetDict.push_to_hub
    for name, script in SCRIPTS.items():
        if (folder / name).exists():
            continue

        def write(data: Any, repository: str, config_name: str, name: str = name) -> None:
            data.save_to_disk(str(folder / f"{name}.new" / config_name))

        DatasetDict.push_to_hub = write
        try:
            spec = importlib.util.spec_from_file_location(script, source / "scripts" / f"{script}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            np.random.seed(0)
            module.main(0.1, True, f"{HUB}/{name}")
        finally:
            DatasetDict.push_to_hub = published
        (folder / f"{name}.new").rename(folder / name)


def load(folder: Path, path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """What ``datasets.load_dataset(path, name, split=, streaming=)`` gives, from ``folder``.

    Raises:
        FileNotFoundError: there is no stand-in for this data set.
    """
    from datasets import ReadInstruction, load_from_disk

    owner, _, repository = path.partition("/")
    where = folder / repository / (name or "")
    if owner != HUB or name is None or not where.exists():
        raise FileNotFoundError(f"no stand-in for the data set {path}, {name}")
    data = load_from_disk(str(where))
    if split is None:
        chosen: Any = data
    else:
        base = split.split("[")[0]
        chosen = data[base]
        if "[" in split:
            lengths = {base: len(chosen)}
            (part,) = ReadInstruction.from_spec(split).to_absolute(lengths)
            chosen = chosen.select(range(part.from_ or 0, len(chosen) if part.to is None else part.to))
    if not streaming:
        return chosen
    if isinstance(chosen, dict):
        from datasets import IterableDatasetDict

        return IterableDatasetDict({key: part.to_iterable_dataset() for key, part in chosen.items()})
    return chosen.to_iterable_dataset()
