"""Encoders and decoders, encoders that classify, and models that also see images or hear speech."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as tf
from torch import nn

from tests.tracking.models.architecture import BERT, IMAGE_TOKEN, SIZES, VOCABULARY, Architecture, enter
from tests.tracking.models.decoders import GEMMA

OTHERS: dict[str, Architecture] = {}
add = partial(enter, OTHERS)

# Encoder and decoder: the decoder's last layer, self attention and cross attention.
T5 = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
T5_PARTS = " ".join(f"{attention}.{leaf}" for attention in ("0.SelfAttention", "1.EncDecAttention") for leaf in "qkvo")
for name, model in (("t5", "T5"), ("mt5", "MT5"), ("umt5", "UMT5"), ("longt5", "LongT5")):
    add(
        name,
        f"{model}ForConditionalGeneration",
        at="decoder.block.1.layer",
        parts=T5_PARTS,
        plain=True,
        task="seq2seq",
        slow=name in ("mt5", "longt5"),
        **T5,
    )
add(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    at="decoder.block.1.layer",
    parts=T5_PARTS,
    plain=True,
    task="seq2seq",
    slow=True,
    **T5,
    num_experts=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    expert_capacity=64,
    router_jitter_noise=0.0,
)
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
BART_PARTS = " ".join(
    f"{attention}.{leaf}_proj" for attention in ("self_attn", "encoder_attn") for leaf in ("q", "k", "v", "out")
)
for name, model in (
    ("bart", "BartForConditionalGeneration"),
    ("mbart", "MBartForConditionalGeneration"),
    ("pegasus", "PegasusForConditionalGeneration"),
    ("m2m_100", "M2M100ForConditionalGeneration"),
    ("marian", "MarianMTModel"),
    ("blenderbot", "BlenderbotForConditionalGeneration"),
    ("plbart", "PLBartForConditionalGeneration"),
):
    add(
        name,
        model,
        at="model.decoder.layers.1",
        parts=BART_PARTS,
        plain=True,
        task="seq2seq",
        slow=name in ("blenderbot", "plbart"),
        **BART,
        scale_embedding=name in ("mbart", "m2m_100", "marian"),
    )

# Encoders with a classification head.
for name, model, at in (
    ("bert", "BertForSequenceClassification", "bert"),
    ("roberta", "RobertaForSequenceClassification", "roberta"),
    ("electra", "ElectraForSequenceClassification", "electra"),
    ("camembert", "CamembertForSequenceClassification", "roberta"),
    ("xlm-roberta", "XLMRobertaForSequenceClassification", "roberta"),
):
    add(
        name,
        model,
        at=f"{at}.encoder.layer.1.attention",
        parts=BERT,
        task="classification",
        slow=name in ("camembert", "xlm-roberta"),
        **{"embedding_size": 12} if name == "electra" else {},
    )
add(
    "distilbert",
    "DistilBertForSequenceClassification",
    at="distilbert.transformer.layer.1.attention",
    parts="q_lin k_lin v_lin out_lin",
    plain=True,
    task="classification",
    dim=24,
    n_layers=2,
    n_heads=4,
    hidden_dim=32,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
)
add(
    "albert",
    "AlbertForSequenceClassification",
    at="albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
    parts="query key value dense",
    task="classification",
    embedding_size=12,
)
add(
    "deberta",
    "DebertaForSequenceClassification",
    at="deberta.encoder.layer.1.attention",
    parts="self.in_proj output.dense",
    task="classification",
    reentrant=False,
)
add(
    "deberta-v2",
    "DebertaV2ForSequenceClassification",
    at="deberta.encoder.layer.1.attention",
    parts="self.query_proj self.key_proj self.value_proj output.dense",
    task="classification",
    refused=r"key_proj' \(Linear\) .* its input does not depend on the rows",
    reentrant=False,
    relative_attention=True,
    share_att_key=True,
    pos_att_type=["c2p", "p2c"],
    norm_rel_ebd="layer_norm",
)
add(
    "mpnet",
    "MPNetForSequenceClassification",
    at="mpnet.encoder.layer.1.attention.attn",
    parts="q k v o",
    task="classification",
    slow=True,
)
add(
    "modernbert",
    "ModernBertForSequenceClassification",
    at="model.layers.1.attn",
    parts="Wqkv Wo",
    task="classification",
    local_attention=4,
)
add("qwen2 (classification)", "Qwen2ForSequenceClassification", task="classification")

# Images and text: the language model, never the vision tower, though that is deeper here.
TEXT = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"vocab_size": VOCABULARY + 8}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
VISION_TEXT = "model.language_model.layers.1.self_attn"


def llava() -> nn.Module:
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**CLIP), image_token_index=IMAGE_TOKEN
    )
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = tf.Gemma3Config(
        text_config=TEXT | GEMMA,
        vision_config=CLIP | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VOCABULARY,
        eoi_token_index=VOCABULARY + 1,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = tf.PaliGemmaConfig(
        text_config=TEXT | {"head_dim": 6, "model_type": "gemma"},
        vision_config=CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE_TOKEN,
        projection_dim=24,
        hidden_size=24,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def qwen_vl(version: str, **vision: Any) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    text = TEXT | {"rope_parameters": rope | ({"mrope_interleaved": True} if version == "3" else {}), "head_dim": 6}
    vision |= {
        "depth": 3,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    config = getattr(tf, f"Qwen{version}{'_' if '_' in version else ''}VLConfig")
    model = getattr(tf, f"Qwen{version}{'_' if '_' in version else ''}VLForConditionalGeneration")
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VOCABULARY + 4,
        "vision_start_token_id": VOCABULARY,
        "vision_end_token_id": VOCABULARY + 1,
    }
    return model(config(text_config=text, vision_config=vision, **tokens))


def smolvlm() -> nn.Module:
    text = TEXT | {"model_type": "llama"}
    config = tf.SmolVLMConfig(text_config=text, vision_config=CLIP, image_token_id=IMAGE_TOKEN, scale_factor=1)
    return tf.SmolVLMForConditionalGeneration(config)


for name, built, slow in (
    ("llava", llava, False),
    ("gemma3", gemma3, False),
    ("paligemma", paligemma, True),
    ("qwen2_vl", lambda: qwen_vl("2", embed_dim=16, hidden_size=24), False),
    (
        "qwen2_5_vl",
        lambda: qwen_vl(
            "2_5_"[:-1], hidden_size=16, intermediate_size=16, out_hidden_size=24, fullatt_block_indexes=[1]
        ),
        True,
    ),
    (
        "qwen3_vl",
        lambda: qwen_vl(
            "3",
            hidden_size=16,
            intermediate_size=16,
            out_hidden_size=24,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        True,
    ),
    ("smolvlm", smolvlm, False),
):
    add(
        name,
        "",
        "",
        at="model.text_model.layers.1.self_attn" if name == "smolvlm" else VISION_TEXT,
        task="image",
        build=built,
        slow=slow,
    )

# Speech.
add(
    "whisper",
    "WhisperForConditionalGeneration",
    at="model.decoder.layers.1",
    parts=BART_PARTS,
    plain=True,
    task="speech",
    **BART | {"encoder_layers": 3},
    num_mel_bins=4,
    max_source_positions=4,
    max_target_positions=16,
)
add(
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    at="model.decoder.layers.1",
    parts=BART_PARTS,
    plain=True,
    task="speech",
    slow=True,
    **BART | {"encoder_layers": 3},
    input_feat_per_channel=4,
    conv_channels=8,
    num_conv_layers=1,
    conv_kernel_sizes=[3],
    max_source_positions=16,
    max_target_positions=16,
)
