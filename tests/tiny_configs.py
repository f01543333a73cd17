"""What is particular of each tiny model: entries of its `config.json`."""

from typing import Any

VOCABULARY = 96
LAYERS = 3

PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 16, **_MIXTURE},
    "phi3": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "glm4": {"head_dim": 32, "attention_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": {"tie_word_embeddings": True},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "cohere": {"layer_norm_eps": 1e-5, "use_qk_norm": True},
    "minicpm3": {
        "num_key_value_heads": 4,
        "dim_model_base": 32,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
        | {"original_max_position_embeddings": 64},
    },
    "openelm": {
        "head_dim": 16,
        "num_transformer_layers": LAYERS,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [1, 2, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
}
"""Architectures with plain attention: what each adds to `PLAIN`."""

ONE_AT_A_TIME: dict[str, dict[str, Any]] = {
    "gpt_bigcode": {
        "n_embd": 64,
        "n_layer": LAYERS,
        "n_inner": 96,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": 1,
    },
}
"""Architectures with plain attention that take one position for all rows of a forward.

So do "afm7" of `SHARED` and "gemma2" of `FETCHED`, whose mask does not fit a batch of rows."""

WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 32,
        "num_key_value_heads": 1,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
    },
    "olmo3": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss": {
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "qwen3_next": {
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 48,
        "full_attention_interval": 3,
        **_MIXTURE,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "falcon_h1": {
        "head_dim": 32,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
    },
}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FETCHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "rope_scaling": _YARN},
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 6},
    "mistral4": {
        **_LATENT,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1},
    },
    "longcat_flash": {
        **_LATENT,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 48,
        "num_layers": 2,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
    },
    "stablelm": {
        "rope_traditional": False,
        "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
        "rope_pct": 0.25,
        "norm_eps": 1e-5,
    },
    "gemma2": {"head_dim": 16},
}
"""Architectures that compute on what their caches return."""

SHARED: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": True,
    },
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
}
"""Architectures with layers that attend over the keys and values of other layers."""

_GEMMA4 = {
    **SHARED["gemma4_text"],
    "model_type": "gemma4_text",
    "head_dim": 32,
    "global_head_dim": 64,
    "num_hidden_layers": 6,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
MIXED: dict[str, dict[str, Any]] = {
    "gemma4_e2b": _GEMMA4,
    "gemma4_26b_a4b": {
        **_GEMMA4,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
}
"""Models whose layers differ in heads, head sizes and windows, in the proportions of real ones.

Gemma 4 E2B shares the keys and values of its last layers; 26B-A4B makes those of a full-attention
layer from one projection, fewer and larger KV heads there than in its windows, and experts."""
