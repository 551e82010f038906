"""Toy configurations of many MoE families: two or three layers, 8 experts, built in-process, no download."""

from __future__ import annotations

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.1,
)
_DEEPSEEK = dict(
    COMMON,
    num_key_value_heads=4,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)

# The six families that the project guarantees; the tests of this folder run on each of them.
FAMILIES: dict[str, dict] = {
    "olmoe": dict(COMMON, intermediate_size=16, num_experts=8, num_experts_per_tok=2),
    "mixtral": dict(COMMON, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": dict(
        COMMON,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": dict(
        COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "deepseek_v3": dict(
        _DEEPSEEK, num_hidden_layers=3, first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.0
    ),
    "gpt_oss": dict(COMMON, head_dim=8, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
}

# More families that pass the same round trip; each covers something that the six do not.
MORE_FAMILIES: dict[str, dict] = {
    "deepseek_v2": dict(_DEEPSEEK, first_k_dense_replace=0, topk_method="greedy", n_group=1, topk_group=1),
    "dots1": dict(
        COMMON,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
    ),
    "ernie4_5_moe": dict(  # softmax with a selection bias
        COMMON,
        intermediate_size=48,
        moe_intermediate_size=16,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    "lfm2_moe": dict(  # bias outside the router
        COMMON,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        num_dense_layers=0,
        layer_types=["full_attention", "conv"],
    ),
    "granitemoe": dict(COMMON, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
    "phimoe": dict(COMMON, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
    "flex_olmo": dict(COMMON, intermediate_size=16, num_experts=8, num_experts_per_tok=2),
    "glm4_moe": dict(
        COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
    ),
    "minimax": dict(COMMON, head_dim=8, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
    "minimax_m2": dict(
        COMMON, head_dim=8, rotary_dim=4, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2
    ),
    "hunyuan_v1_moe": dict(COMMON, head_dim=8, intermediate_size=16, num_experts=8, moe_topk=2),
    "afmoe": dict(
        COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        num_dense_layers=0,
        num_shared_experts=1,
    ),
    "exaone_moe": dict(
        COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
    ),
    "qwen3_next": dict(
        COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "jamba": dict(
        COMMON,
        intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "nemotron_h": dict(  # ungated experts behind a latent projection
        COMMON,
        head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        moe_latent_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        layers_block_type=["attention", "moe"],
    ),
    "aria_text": dict(COMMON, intermediate_size=16, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1),
    "gemma4_text": dict(  # the block is a whole decoder layer
        COMMON,
        head_dim=8,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_experts=8,
        top_k_experts=2,
        enable_moe_block=True,
        global_head_dim=8,
        layer_types=["full_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
}

# First minor version of transformers 5 whose class of that family uses the experts interface; older ones are refused.
SINCE = {"deepseek_v2": 13, "granitemoe": 13, "aria_text": 18}

# Models without an experts interface, or without experts.
REFUSED: dict[str, dict] = {
    "llama": dict(COMMON, intermediate_size=48),
    "llama4_text": dict(
        COMMON, head_dim=8, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=8, num_experts_per_tok=1
    ),
    "dbrx": dict(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2, hidden_size=32),
        attn_config=dict(kv_n_heads=2),
    ),
}
