"""Decoders for text: attention in every layer, hybrids whose last layer has none, and models without any."""

from __future__ import annotations

from functools import partial

import torch

from tests.tracking.models.architecture import BERT, MLA, VOCABULARY, Architecture, enter

DECODERS: dict[str, Architecture] = {}
add = partial(enter, DECODERS)

# Decoders whose attention has separate q, k, v and o.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 6}
add("llama", "LlamaForCausalLM")
add("llama (tied head)", "LlamaForCausalLM", tie_word_embeddings=True)
add("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True)
add("qwen3", "Qwen3ForCausalLM", head_dim=6, tie_word_embeddings=True)
add("mistral", "MistralForCausalLM", sliding_window=4)
add("ministral", "MinistralForCausalLM", slow=True, head_dim=6, sliding_window=4)
add("gemma", "GemmaForCausalLM", head_dim=6)
GEMMA = {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 6}
add("gemma2", "Gemma2ForCausalLM", dtype=torch.float32, **GEMMA)
add("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA)
add("phi", "PhiForCausalLM", parts="q_proj k_proj v_proj dense", partial_rotary_factor=0.7)
add("phi3", "Phi3ForCausalLM", parts="qkv_proj o_proj", original_max_position_embeddings=64)
add("starcoder2", "Starcoder2ForCausalLM", sliding_window=None)
add("olmo", "OlmoForCausalLM", slow=True)
add("olmo2", "Olmo2ForCausalLM")
add("olmo3", "Olmo3ForCausalLM", slow=True, sliding_window=4)
add("cohere", "CohereForCausalLM", use_qk_norm=True)
add("cohere2", "Cohere2ForCausalLM", slow=True, sliding_window=4)
add("granite", "GraniteForCausalLM", embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22)
add("smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=2)
add("stablelm", "StableLmForCausalLM", partial_rotary_factor=0.7)
add("nemotron", "NemotronForCausalLM", head_dim=6, partial_rotary_factor=0.7)
add("ernie4_5", "Ernie4_5ForCausalLM", slow=True)
add("glm", "GlmForCausalLM", slow=True, head_dim=8)
add("glm4", "Glm4ForCausalLM", head_dim=8)
add("exaone4", "Exaone4ForCausalLM", slow=True, sliding_window=4)
add("arcee", "ArceeForCausalLM", slow=True)
add("apertus", "ApertusForCausalLM", slow=True)
add("helium", "HeliumForCausalLM", slow=True, head_dim=6)
add("seed_oss", "SeedOssForCausalLM", slow=True, head_dim=6)
add("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", slow=True, head_dim=6)
add("nanochat", "NanoChatForCausalLM")
add("diffllama", "DiffLlamaForCausalLM")
add(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    parts=MLA,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=6,
    num_key_value_heads=4,
)

# Mixtures of experts.
add("mixtral", "MixtralForCausalLM", num_local_experts=4)
add("qwen2_moe", "Qwen2MoeForCausalLM", **EXPERTS, num_experts=4, shared_expert_intermediate_size=16)
add("qwen3_moe", "Qwen3MoeForCausalLM", **EXPERTS, num_experts=4)
add("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2)
add("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2)
add("gpt_oss", "GptOssForCausalLM", head_dim=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", slow=True, moe_num_experts=4, moe_k=2, moe_intermediate_size=16)
add(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    slow=True,
    **EXPERTS | {"head_dim": 8},
    n_routed_experts=4,
    first_k_dense_replace=1,
)
add(
    "llama4_text",
    "Llama4ForCausalLM",
    "Llama4TextConfig",
    head_dim=6,
    intermediate_size_mlp=32,
    num_local_experts=4,
    interleave_moe_layer_step=1,
)
DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
add("deepseek_v2", "DeepseekV2ForCausalLM", parts=MLA, **DEEPSEEK, topk_method="greedy")
add("deepseek_v3", "DeepseekV3ForCausalLM", parts=MLA, **DEEPSEEK)

# Hybrids: not every layer has softmax attention.
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 6,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
FIRST = "model.layers.0.self_attn"
add(
    "lfm2",
    "Lfm2ForCausalLM",
    at=FIRST,
    parts="q_proj k_proj v_proj out_proj",
    layer_types=["full_attention", "conv"],
    block_auto_adjust_ff_dim=False,
)
add(
    "jamba",
    "JambaForCausalLM",
    at=FIRST,
    attn_layer_offset=0,
    attn_layer_period=2,
    num_experts=2,
    expert_layer_offset=1,
    expert_layer_period=2,
    use_mamba_kernels=False,
    mamba_d_state=4,
)
add("bamba", "BambaForCausalLM", at=FIRST, **MAMBA, attn_layer_indices=[0], attn_rotary_emb=2)
add(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    at=FIRST,
    **MAMBA,
    num_local_experts=2,
    num_experts_per_tok=1,
    layer_types=["attention", "mamba"],
    shared_intermediate_size=16,
)
add("falcon_h1", "FalconH1ForCausalLM", **MAMBA, mamba_d_ssm=48, head_dim=6)
LINEAR = {
    "head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["full_attention", "linear_attention"],
}
add(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    at=FIRST,
    **LINEAR,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    decoder_sparse_step=1,
)
add("qwen3_5_text", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", at=FIRST, **LINEAR)
add(
    "nemotron_h",
    "NemotronHForCausalLM",
    at="model.layers.0.mixer",
    layers_block_type=["attention", "mamba"],
    head_dim=6,
    mamba_num_heads=8,
    mamba_head_dim=6,
    n_groups=1,
    ssm_state_size=8,
    chunk_size=8,
)
add(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    at="model.layers.0.temporal_block",
    head_dim=6,
    block_types=["attention", "recurrent"],
    attention_window_size=16,
    lru_width=24,
)
add(
    "minimax",
    "MiniMaxForCausalLM",
    at=FIRST,
    slow=True,
    head_dim=6,
    num_local_experts=2,
    num_experts_per_tok=1,
    layer_types=["full_attention", "linear_attention"],
    block_size=4,
)
add("mamba", "MambaForCausalLM", at="", state_size=4, time_step_rank=2)
add("mamba2", "Mamba2ForCausalLM", at="", slow=True, state_size=4, num_heads=8, head_dim=6, n_groups=1, chunk_size=8)
add("rwkv", "RwkvForCausalLM", at="", slow=True, attention_hidden_size=24)

# Decoders with their own names, positions and layouts.
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
add("gpt2", "GPT2LMHeadModel", at="transformer.h.1.attn", parts="c_attn c_proj", plain=True, **GPT2)
add("gpt_bigcode", "GPTBigCodeForCausalLM", at="transformer.h.1.attn", parts="c_attn c_proj", plain=True, **GPT2)
add(
    "gpt_neo",
    "GPTNeoForCausalLM",
    at="transformer.h.1.attn.attention",
    parts="q_proj k_proj v_proj out_proj",
    plain=True,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    vocab_size=VOCABULARY,
    hidden_size=24,
    max_position_embeddings=64,
)
add(
    "gptj",
    "GPTJForCausalLM",
    at="transformer.h.1.attn",
    parts="q_proj k_proj v_proj out_proj",
    plain=True,
    **GPT2,
    rotary_dim=4,
)
add(
    "codegen",
    "CodeGenForCausalLM",
    at="transformer.h.1.attn",
    parts="qkv_proj out_proj",
    plain=True,
    slow=True,
    **GPT2,
    rotary_dim=4,
)
add("gpt_neox", "GPTNeoXForCausalLM", at="gpt_neox.layers.1.attention", parts="query_key_value dense", rotary_pct=0.7)
add(
    "opt",
    "OPTForCausalLM",
    at="model.decoder.layers.1.self_attn",
    parts="q_proj k_proj v_proj out_proj",
    ffn_dim=32,
    word_embed_proj_dim=24,
)
add(
    "bloom",
    "BloomForCausalLM",
    dtype=torch.float32,
    at="transformer.h.1.self_attention",
    parts="query_key_value dense",
    n_layer=2,
    n_head=4,
)
add(
    "falcon",
    "FalconForCausalLM",
    at="transformer.h.1.self_attention",
    parts="query_key_value dense",
    fused=False,
    multi_query=True,
    parallel_attn=True,
    bias=False,
    new_decoder_architecture=False,
)
add(
    "mpt",
    "MptForCausalLM",
    dtype=torch.float32,
    at="transformer.blocks.1.attn",
    parts="Wqkv out_proj",
    plain=True,
    d_model=24,
    n_layers=2,
    n_heads=4,
    max_seq_len=64,
    expansion_ratio=2,
    vocab_size=VOCABULARY,
)
add("persimmon", "PersimmonForCausalLM", parts="query_key_value dense", slow=True, partial_rotary_factor=0.7)
add(
    "xglm",
    "XGLMForCausalLM",
    dtype=torch.float32,
    parts="q_proj k_proj v_proj out_proj",
    d_model=24,
    num_layers=2,
    attention_heads=4,
    ffn_dim=32,
)
add("biogpt", "BioGptForCausalLM", at="biogpt.layers.1.self_attn", parts="q_proj k_proj v_proj out_proj")
add(
    "bert_generation",
    "BertGenerationDecoder",
    "BertGenerationConfig",
    at="bert.encoder.layer.1.attention",
    parts=BERT,
    slow=True,
    is_decoder=True,
)
add(
    "modernbert_decoder",
    "ModernBertDecoderForCausalLM",
    at="model.layers.1.attn",
    parts="q_proj k_proj v_proj Wo",
    local_attention=4,
)
add("openai_gpt", "OpenAIGPTLMHeadModel", at="transformer.h.1.attn", parts="c_attn c_proj", plain=True, **GPT2)
add(
    "ctrl",
    "CTRLLMHeadModel",
    at="transformer.h.1.multi_head_attention",
    parts="Wq Wk Wv dense",
    plain=True,
    slow=True,
    **GPT2,
    dff=32,
)
