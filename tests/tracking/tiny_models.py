"""Tiny random-weight models of the architectures in transformers, each with the default layers that are right for it.

A model is built from its configuration class, the sizes in ``SIZES`` and what it needs besides. Its weights get noise, so
that no gain is one and no bias zero, and its dropouts are zero, so that a row has one loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

VOCABULARY = 61
ROWS, LENGTH, TARGETS = 5, 8, 6  # rows of a batch, tokens of a row, tokens of a sequence-to-sequence target
CLASSES = 3
PADDINGS = ("none", "right", "left")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QKVO = "q_proj k_proj v_proj o_proj"
BERT = "self.query self.key self.value output.dense"
MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"

Task = Literal["causal", "seq2seq", "classification", "speech", "image"]


@dataclass(frozen=True)
class Architecture:
    """How to build one model, and the modules that ``layers="last_attention"`` is to choose.

    Attributes:
        model: the class in transformers. Its configuration's class has the same beginning unless ``config`` names it.
        at: the name of the attention in the last layer that has softmax attention; "" where there is none.
        parts: names of the projections inside ``at``, separated by spaces.
        sizes: arguments of the configuration besides ``SIZES``; with ``plain`` instead of them.
        task: which inputs the model gets and what its loss is.
        slow: left to the slow tests, as an architecture whose kind is tested by another one.
        dtype: float32 where the model's own code overflows in float64 (masks that are filled with the smallest float).
        build: builds what a configuration of one class cannot.
    """

    model: str
    config: str
    at: str = "model.layers.1.self_attn"
    parts: str = QKVO
    sizes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    task: Task = "causal"
    slow: bool = False
    dtype: torch.dtype = torch.float64
    build: Callable[[], nn.Module] | None = None

    @property
    def default_layers(self) -> set[str]:
        return {f"{self.at}.{part}" for part in self.parts.split()} if self.at else set()


MODELS: dict[str, Architecture] = {}


def add(name: str, model: str, config: str | None = None, **options: Any) -> None:
    """Enter a model in ``MODELS``; ``config`` defaults to the class named like the model."""
    if config is None:
        stem = model
        for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification"):
            stem = stem.removesuffix(ending)
        config = f"{stem}Config"
    MODELS[name] = Architecture(model, config, **options)


# Decoders whose attention has separate q, k, v and o.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 6}
add("llama", "LlamaForCausalLM")
add("llama (tied head)", "LlamaForCausalLM", sizes={"tie_word_embeddings": True})
add("qwen2", "Qwen2ForCausalLM", sizes={"tie_word_embeddings": True})
add("qwen3", "Qwen3ForCausalLM", sizes={"head_dim": 6, "tie_word_embeddings": True})
add("mistral", "MistralForCausalLM", sizes={"sliding_window": 4})
add("ministral", "MinistralForCausalLM", sizes={"head_dim": 6, "sliding_window": 4}, slow=True)
add("gemma", "GemmaForCausalLM", sizes={"head_dim": 6})
GEMMA = {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 6}
add("gemma2", "Gemma2ForCausalLM", dtype=torch.float32, sizes=GEMMA)
add("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", sizes=GEMMA)
add("phi", "PhiForCausalLM", parts="q_proj k_proj v_proj dense", sizes={"partial_rotary_factor": 0.7})
add("phi3", "Phi3ForCausalLM", parts="qkv_proj o_proj", sizes={"original_max_position_embeddings": 64})
add("starcoder2", "Starcoder2ForCausalLM", sizes={"sliding_window": None})
add("olmo", "OlmoForCausalLM", slow=True)
add("olmo2", "Olmo2ForCausalLM")
add("olmo3", "Olmo3ForCausalLM", sizes={"sliding_window": 4}, slow=True)
add("cohere", "CohereForCausalLM", sizes={"use_qk_norm": True})
add("cohere2", "Cohere2ForCausalLM", sizes={"sliding_window": 4}, slow=True)
add(
    "granite",
    "GraniteForCausalLM",
    sizes={"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
)
add("smollm3", "SmolLM3ForCausalLM", sizes={"no_rope_layer_interval": 2})
add("stablelm", "StableLmForCausalLM", sizes={"partial_rotary_factor": 0.7})
add("nemotron", "NemotronForCausalLM", sizes={"head_dim": 6, "partial_rotary_factor": 0.7})
add("ernie4_5", "Ernie4_5ForCausalLM", slow=True)
add("glm", "GlmForCausalLM", sizes={"head_dim": 8}, slow=True)
add("glm4", "Glm4ForCausalLM", sizes={"head_dim": 8})
add("exaone4", "Exaone4ForCausalLM", sizes={"sliding_window": 4}, slow=True)
add("arcee", "ArceeForCausalLM", slow=True)
add("apertus", "ApertusForCausalLM", slow=True)
add("helium", "HeliumForCausalLM", sizes={"head_dim": 6}, slow=True)
add("seed_oss", "SeedOssForCausalLM", sizes={"head_dim": 6}, slow=True)
add("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", sizes={"head_dim": 6}, slow=True)
add("nanochat", "NanoChatForCausalLM")
add("diffllama", "DiffLlamaForCausalLM")
add("minicpm3", "MiniCPM3ForCausalLM", parts=MLA, sizes={"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4})

# Mixtures of experts.
add("mixtral", "MixtralForCausalLM", sizes={"num_local_experts": 4})
add("qwen2_moe", "Qwen2MoeForCausalLM", sizes=EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16})
add("qwen3_moe", "Qwen3MoeForCausalLM", sizes=EXPERTS | {"num_experts": 4})
add("olmoe", "OlmoeForCausalLM", sizes={"num_experts": 4, "num_experts_per_tok": 2})
add("granitemoe", "GraniteMoeForCausalLM", sizes={"num_local_experts": 4, "num_experts_per_tok": 2})
add("gpt_oss", "GptOssForCausalLM", sizes={"head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 4})
add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", sizes={"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    slow=True)
add("glm4_moe", "Glm4MoeForCausalLM", sizes=EXPERTS | {"n_routed_experts": 4, "head_dim": 8,
    "first_k_dense_replace": 1}, slow=True)
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
add("deepseek_v2", "DeepseekV2ForCausalLM", parts=MLA, sizes=DEEPSEEK | {"topk_method": "greedy"})
add("deepseek_v3", "DeepseekV3ForCausalLM", parts=MLA, sizes=DEEPSEEK)

# Hybrids: not every layer has softmax attention.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 6, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8}
FIRST = "model.layers.0.self_attn"
add("lfm2", "Lfm2ForCausalLM", at=FIRST, parts="q_proj k_proj v_proj out_proj",
    sizes={"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False})
add("jamba", "JambaForCausalLM", at=FIRST, sizes={"attn_layer_offset": 0, "attn_layer_period": 2, "num_experts": 2,
    "expert_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False, "mamba_d_state": 4})
add("bamba", "BambaForCausalLM", at=FIRST, sizes=MAMBA | {"attn_layer_indices": [0], "attn_rotary_emb": 2})
add("granitemoehybrid", "GraniteMoeHybridForCausalLM", at=FIRST, sizes=MAMBA | {"num_local_experts": 2,
    "num_experts_per_tok": 1, "layer_types": ["attention", "mamba"], "shared_intermediate_size": 16})
add("falcon_h1", "FalconH1ForCausalLM", sizes=MAMBA | {"mamba_d_ssm": 48, "head_dim": 6})
LINEAR = {"head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
    "linear_value_head_dim": 4, "linear_conv_kernel_dim": 4, "layer_types": ["full_attention", "linear_attention"]}
add("qwen3_next", "Qwen3NextForCausalLM", at=FIRST, sizes=LINEAR | {"num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1})
add("qwen3_5_text", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", at=FIRST, sizes=LINEAR)
add("nemotron_h", "NemotronHForCausalLM", at="model.layers.0.mixer", sizes={"layers_block_type": ["attention", "mamba"],
    "head_dim": 6, "mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8})
add("recurrent_gemma", "RecurrentGemmaForCausalLM", at="model.layers.0.temporal_block", sizes={"head_dim": 6,
    "block_types": ["attention", "recurrent"], "attention_window_size": 16, "lru_width": 24})
add("minimax", "MiniMaxForCausalLM", at=FIRST, sizes={"head_dim": 6, "num_local_experts": 2, "num_experts_per_tok": 1,
    "layer_types": ["full_attention", "linear_attention"], "block_size": 4}, slow=True)
add("mamba", "MambaForCausalLM", at="", sizes={"state_size": 4, "time_step_rank": 2})
add("mamba2", "Mamba2ForCausalLM", at="", sizes={"state_size": 4, "num_heads": 8, "head_dim": 6, "n_groups": 1,
    "chunk_size": 8}, slow=True)
add("rwkv", "RwkvForCausalLM", at="", sizes={"attention_hidden_size": 24}, slow=True)

# Decoders with their own names, positions and layouts.
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
add("gpt2", "GPT2LMHeadModel", at="transformer.h.1.attn", parts="c_attn c_proj", sizes=GPT2, plain=True)
add("gpt_bigcode", "GPTBigCodeForCausalLM", at="transformer.h.1.attn", parts="c_attn c_proj", sizes=GPT2, plain=True)
add("gpt_neo", "GPTNeoForCausalLM", at="transformer.h.1.attn.attention", parts="q_proj k_proj v_proj out_proj",
    sizes={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4,
    "vocab_size": VOCABULARY, "hidden_size": 24, "max_position_embeddings": 64}, plain=True)
add("gptj", "GPTJForCausalLM", at="transformer.h.1.attn", parts="q_proj k_proj v_proj out_proj",
    sizes=GPT2 | {"rotary_dim": 4}, plain=True)
add("codegen", "CodeGenForCausalLM", at="transformer.h.1.attn", parts="qkv_proj out_proj", sizes=GPT2
    | {"rotary_dim": 4}, plain=True, slow=True)
add("gpt_neox", "GPTNeoXForCausalLM", at="gpt_neox.layers.1.attention", parts="query_key_value dense",
    sizes={"rotary_pct": 0.7})
add("opt", "OPTForCausalLM", at="model.decoder.layers.1.self_attn", parts="q_proj k_proj v_proj out_proj",
    sizes={"ffn_dim": 32, "word_embed_proj_dim": 24})
add("bloom", "BloomForCausalLM", dtype=torch.float32, at="transformer.h.1.self_attention", parts="query_key_value dense",
    sizes={"n_layer": 2, "n_head": 4})
add("falcon", "FalconForCausalLM", at="transformer.h.1.self_attention", parts="query_key_value dense",
    sizes={"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False})
add("mpt", "MptForCausalLM", dtype=torch.float32, at="transformer.blocks.1.attn", parts="Wqkv out_proj", sizes={"d_model": 24,
    "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2, "vocab_size": VOCABULARY}, plain=True)
add("persimmon", "PersimmonForCausalLM", parts="query_key_value dense", sizes={"partial_rotary_factor": 0.7}, slow=True)
add("xglm", "XGLMForCausalLM", dtype=torch.float32, parts="q_proj k_proj v_proj out_proj", sizes={"d_model": 24, "num_layers": 2,
    "attention_heads": 4, "ffn_dim": 32})
add("biogpt", "BioGptForCausalLM", at="biogpt.layers.1.self_attn", parts="q_proj k_proj v_proj out_proj")
add("bert_generation", "BertGenerationDecoder", "BertGenerationConfig", at="bert.encoder.layer.1.attention", parts=BERT,
    sizes={"is_decoder": True}, slow=True)
add("modernbert_decoder", "ModernBertDecoderForCausalLM", at="model.layers.1.attn", parts="q_proj k_proj v_proj Wo",
    sizes={"local_attention": 4})
add("openai_gpt", "OpenAIGPTLMHeadModel", at="transformer.h.1.attn", parts="c_attn c_proj", sizes=GPT2, plain=True)
add("ctrl", "CTRLLMHeadModel", at="transformer.h.1.multi_head_attention", parts="Wq Wk Wv dense",
    sizes=GPT2 | {"dff": 32}, plain=True, slow=True)

# Encoder and decoder: the decoder's last layer, self attention and cross attention.
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size":
    VOCABULARY, "decoder_start_token_id": 0}
T5_PARTS = " ".join(f"{attention}.{leaf}" for attention in ("0.SelfAttention", "1.EncDecAttention") for leaf in "qkvo")
for name, model in (("t5", "T5"), ("mt5", "MT5"), ("umt5", "UMT5"), ("longt5", "LongT5")):
    add(name, f"{model}ForConditionalGeneration", at="decoder.block.1.layer", parts=T5_PARTS, sizes=T5, plain=True,
        task="seq2seq", slow=name in ("mt5", "longt5"))
add("switch_transformers", "SwitchTransformersForConditionalGeneration", at="decoder.block.1.layer", parts=T5_PARTS,
    sizes=T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity":
    64, "router_jitter_noise": 0.0}, plain=True, task="seq2seq", slow=True)
BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads":
    4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
BART_PARTS = " ".join(f"{attention}.{leaf}_proj" for attention in ("self_attn", "encoder_attn") for leaf in
    ("q", "k", "v", "out"))
for name, model in (
    ("bart", "BartForConditionalGeneration"),
    ("mbart", "MBartForConditionalGeneration"),
    ("pegasus", "PegasusForConditionalGeneration"),
    ("m2m_100", "M2M100ForConditionalGeneration"),
    ("marian", "MarianMTModel"),
    ("blenderbot", "BlenderbotForConditionalGeneration"),
    ("plbart", "PLBartForConditionalGeneration"),
):
    add(name, model, "MarianConfig" if name == "marian" else None, at="model.decoder.layers.1", parts=BART_PARTS,
        sizes=BART | {"scale_embedding": name in ("mbart", "m2m_100", "marian")}, plain=True, task="seq2seq",
        slow=name in ("blenderbot", "plbart"))

# Encoders with a classification head.
for name, model, at in (
    ("bert", "BertForSequenceClassification", "bert"),
    ("roberta", "RobertaForSequenceClassification", "roberta"),
    ("electra", "ElectraForSequenceClassification", "electra"),
    ("camembert", "CamembertForSequenceClassification", "roberta"),
    ("xlm-roberta", "XLMRobertaForSequenceClassification", "roberta"),
):
    add(name, model, at=f"{at}.encoder.layer.1.attention", parts=BERT, sizes={"embedding_size": 12} if name == "electra"
        else {}, task="classification", slow=name in ("camembert", "xlm-roberta"))
add("distilbert", "DistilBertForSequenceClassification", at="distilbert.transformer.layer.1.attention",
    parts="q_lin k_lin v_lin out_lin", sizes={"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size":
    VOCABULARY, "max_position_embeddings": 64}, plain=True, task="classification")
add("albert", "AlbertForSequenceClassification", at="albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
    parts="query key value dense", sizes={"embedding_size": 12}, task="classification")
add("deberta", "DebertaForSequenceClassification", at="deberta.encoder.layer.1.attention",
    parts="self.in_proj output.dense", task="classification")
add("deberta-v2", "DebertaV2ForSequenceClassification", at="deberta.encoder.layer.1.attention",
    parts="self.query_proj self.key_proj self.value_proj output.dense", sizes={"relative_attention": True,
    "share_att_key": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"}, task="classification")
add("mpnet", "MPNetForSequenceClassification", at="mpnet.encoder.layer.1.attention.attn", parts="q k v o",
    task="classification", slow=True)
add("modernbert", "ModernBertForSequenceClassification", at="model.layers.1.attn", parts="Wqkv Wo",
    sizes={"local_attention": 4}, task="classification")
add("qwen2 (classification)", "Qwen2ForSequenceClassification", task="classification")

# Images and text: the language model, never the vision tower, though that is deeper here.
TEXT = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"vocab_size": VOCABULARY + 8}
IMAGE_TOKEN = VOCABULARY + 3
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 16}
VISION_TEXT = "model.language_model.layers.1.self_attn"


def llava() -> nn.Module:
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**CLIP),
        image_token_index=IMAGE_TOKEN)
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = tf.Gemma3Config(text_config=TEXT | GEMMA, vision_config=CLIP | {"vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN, boi_token_index=VOCABULARY, eoi_token_index=VOCABULARY + 1)
    return tf.Gemma3ForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = tf.PaliGemmaConfig(text_config=TEXT | {"head_dim": 6, "model_type": "gemma"}, vision_config=CLIP | {
        "model_type": "siglip_vision_model", "vision_use_head": False}, image_token_index=IMAGE_TOKEN,
        projection_dim=24, hidden_size=24)
    return tf.PaliGemmaForConditionalGeneration(config)


def qwen_vl(version: str, **vision: Any) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    text = TEXT | {"rope_parameters": rope | ({"mrope_interleaved": True} if version == "3" else {}), "head_dim": 6}
    vision |= {"depth": 3, "num_heads": 2, "in_channels": 3, "patch_size": 2, "temporal_patch_size": 2,
        "spatial_merge_size": 2}
    config = getattr(tf, f"Qwen{version}{'_' if '_' in version else ''}VLConfig")
    model = getattr(tf, f"Qwen{version}{'_' if '_' in version else ''}VLForConditionalGeneration")
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": VOCABULARY + 4, "vision_start_token_id": VOCABULARY,
        "vision_end_token_id": VOCABULARY + 1}
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
    ("qwen2_5_vl", lambda: qwen_vl("2_5_"[:-1], hidden_size=16, intermediate_size=16, out_hidden_size=24,
        fullatt_block_indexes=[1]), True),
    ("qwen3_vl", lambda: qwen_vl("3", hidden_size=16, intermediate_size=16, out_hidden_size=24,
        deepstack_visual_indexes=[0], num_position_embeddings=16), True),
    ("smolvlm", smolvlm, False),
):
    add(name, "", "", at="model.text_model.layers.1.self_attn" if name == "smolvlm" else VISION_TEXT, task="image",
        build=built, slow=slow)

# Speech.
add("whisper", "WhisperForConditionalGeneration", at="model.decoder.layers.1", parts=BART_PARTS, sizes=BART
    | {"encoder_layers": 3, "num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16}, plain=True,
    task="speech")
add("speech_to_text", "Speech2TextForConditionalGeneration", at="model.decoder.layers.1", parts=BART_PARTS, sizes=BART
    | {"encoder_layers": 3, "input_feat_per_channel": 4, "conv_channels": 8, "num_conv_layers": 1, "conv_kernel_sizes":
    [3], "max_source_positions": 16, "max_target_positions": 16}, plain=True, task="speech", slow=True)


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
    return inputs, ids


def image_inputs(name: str, ids: Tensor) -> dict[str, Tensor]:
    """One image of four tokens per row, whose places in ``ids`` [ROWS, LENGTH] are written."""
    generator = torch.Generator().manual_seed(2)
    ids[:, 1:5] = IMAGE_TOKEN
    if name.startswith("qwen"):  # patches of all images in one list, [ROWS * 16, 24]
        ids[:, 0] = VOCABULARY
        patches = torch.randn(ROWS * 16, 3 * 2 * 2 * 2, generator=generator, dtype=torch.float64)
        places = (ids == IMAGE_TOKEN).int()
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS), "mm_token_type_ids": places}
    images = (ROWS, 1, 3, 8, 8) if name == "smolvlm" else (ROWS, 3, 8, 8)
    found = {"pixel_values": torch.randn(images, generator=generator, dtype=torch.float64)}
    return found | ({"token_type_ids": (ids == IMAGE_TOKEN).long()} if name in ("gemma3", "paligemma") else {})


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
