"""Tensor parallelism: what a model's own plan in transformers cuts, and how.

Written by tools/tensor_plans.py from models/*/configuration_*.py
(``base_model_tp_plan``) and modeling_*.py (``_tp_plan``) of
transformers 5.23.0. Do not edit.
"""

from __future__ import annotations

__all__ = ["HEADS", "PLANS", "VERSION"]

VERSION = "5.23.0"

# fmt: off
_GROUPS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    ((
        "llama", "mistral", "ministral", "ministral3", "qwen2", "smollm3", "gemma", "gemma2",
        "olmo", "granite", "internlm3", "cohere", "cohere2", "seed_oss", "helium", "ernie4_5",
        "cwm", "iquestcoder", "vaultgemma", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }),
    ((
        "qwen3", "gemma3_text", "exaone4",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "phi",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.dense": "rowwise", "mlp.fc1": "colwise", "mlp.fc2": "rowwise",
    }),
    ((
        "phi3",
    ), {
        "self_attn.qkv_proj": "colwise_gather_output", "self_attn.o_proj": "rowwise_split_input",
        "mlp.gate_up_proj": "colwise_gather_output", "mlp.down_proj": "rowwise_split_input",
    }),
    ((
        "olmo2", "olmo3",
    ), {
        "self_attn.q_proj": "colwise_gather_output", "self_attn.k_proj": "colwise_gather_output",
        "self_attn.v_proj": "colwise_gather_output", "self_attn.o_proj": "rowwise_split_input",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "starcoder2",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise",
    }),
    ((
        "glm", "glm4", "glm4v_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.gate_up_proj": "colwise_gather_output",
        "mlp.down_proj": "rowwise_split_input",
    }),
    ((
        "nemotron", "arcee", "jais2",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "youtu",
    ), {
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "minicpm3",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.q_b_proj": "colwise",
        "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj", "self_attn.kv_b_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }),
    ((
        "apertus",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "gpt_neox",
    ), {
        "attention.query_key_value": "colwise", "attention.dense": "rowwise",
        "mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise",
    }),
    ((
        "mixtral", "minimax",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
    }),
    ((
        "qwen2_moe", "qwen3_omni_moe_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "qwen3_moe",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }),
    ((
        "olmoe", "flex_olmo", "minimax_m2", "minimax_m3_vl_text",
    ), {
        "self_attn.q_proj": "colwise_gather_output", "self_attn.k_proj": "colwise_gather_output",
        "self_attn.v_proj": "colwise_gather_output", "self_attn.o_proj": "rowwise_split_input",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts",
    }),
    ((
        "deepseek_v2",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.q_b_proj": "colwise",
        "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj", "self_attn.kv_b_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
        "mlp.shared_experts.gate_proj": "colwise", "mlp.shared_experts.up_proj": "colwise",
        "mlp.shared_experts.down_proj": "rowwise", "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "deepseek_v3", "mistral4", "kimi_linear",
    ), {
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.shared_experts.gate_proj": "colwise",
        "mlp.shared_experts.up_proj": "colwise", "mlp.shared_experts.down_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "llama4_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "feed_forward.shared_expert.gate_proj": "colwise",
        "feed_forward.shared_expert.up_proj": "colwise",
        "feed_forward.shared_expert.down_proj": "rowwise",
        "feed_forward.experts.gate_up_proj": "packed_rowwise",
        "feed_forward.experts.down_proj": "colwise", "feed_forward.experts": "moe_tp_experts",
        "feed_forward.gate_proj": "colwise", "feed_forward.up_proj": "colwise",
        "feed_forward.down_proj": "rowwise",
    }),
    ((
        "granitemoe", "granitemoehybrid", "granitemoeshared",
    ), {
        "block_sparse_moe.experts.gate_up_proj": "packed_colwise",
        "block_sparse_moe.experts.down_proj": "rowwise",
        "block_sparse_moe.experts": "moe_tp_experts",
    }),
    ((
        "qwen3_next",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.shared_expert.gate_proj": "colwise", "mlp.shared_expert.up_proj": "colwise",
        "mlp.shared_expert.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
        "linear_attn.in_proj_qkvz": "colwise_gather_output",
        "linear_attn.in_proj_ba": "colwise_gather_output",
        "linear_attn.out_proj": "colwise_gather_output",
    }),
    ((
        "qwen3_5_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
        "linear_attn.in_proj_qkv": "colwise_gather_output",
        "linear_attn.in_proj_z": "colwise_gather_output",
        "linear_attn.in_proj_b": "colwise_gather_output",
        "linear_attn.in_proj_a": "colwise_gather_output",
        "linear_attn.out_proj": "colwise_gather_output",
    }),
    ((
        "qwen3_5_moe_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.shared_expert.gate_proj": "colwise",
        "mlp.shared_expert.up_proj": "colwise", "mlp.shared_expert.down_proj": "rowwise",
        "linear_attn.in_proj_qkv": "colwise_gather_output",
        "linear_attn.in_proj_z": "colwise_gather_output",
        "linear_attn.in_proj_b": "colwise_gather_output",
        "linear_attn.in_proj_a": "colwise_gather_output",
        "linear_attn.out_proj": "colwise_gather_output",
    }),
    ((
        "phimoe", "hunyuan_v1_moe", "deepseek_v4",
    ), {
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts",
    }),
    ((
        "glm4_moe", "ernie4_5_moe", "glm4v_moe_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
        "mlp.shared_experts.gate_proj": "colwise", "mlp.shared_experts.up_proj": "colwise",
        "mlp.shared_experts.down_proj": "rowwise", "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "glm4_moe_lite",
    ), {
        "self_attn.q_b_proj": "colwise", "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "self_attn.kv_b_proj": "colwise", "self_attn.o_proj": "rowwise",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }),
    ((
        "jamba", "lfm2_moe",
    ), {
        "feed_forward.experts.gate_up_proj": "packed_colwise",
        "feed_forward.experts.down_proj": "rowwise", "feed_forward.experts": "moe_tp_experts",
    }),
    ((
        "nemotron_h",
    ), {
        "embeddings": "embedding_rowwise", "mixer.experts.up_proj": "colwise",
        "mixer.experts.down_proj": "rowwise", "mixer.experts": "moe_tp_experts",
    }),
    ((
        "gemma3n_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce",
        "self_attn.v_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "gemma4_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce", "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
        "experts.gate_up_proj": "packed_colwise", "experts.down_proj": "rowwise",
        "experts": "moe_tp_experts",
    }),
    ((
        "deepseek_v32", "glm_moe_dsa",
    ), {
        "self_attn.q_b_proj": "colwise", "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "self_attn.kv_b_proj": "colwise", "self_attn.o_proj": "rowwise",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.shared_experts.gate_proj": "colwise",
        "mlp.shared_experts.up_proj": "colwise", "mlp.shared_experts.down_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "dots1",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce",
        "mlp.experts.gate_up_proj": "packed_colwise", "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts", "mlp.shared_experts.gate_proj": "colwise",
        "mlp.shared_experts.up_proj": "colwise", "mlp.shared_experts.down_proj": "rowwise",
        "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
    ((
        "qwen3_vl_moe_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise", "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts",
    }),
    ((
        "ernie4_5_vl_moe_text",
    ), {
        "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise", "mlp.text_moe.experts.gate_up_proj": "packed_colwise",
        "mlp.text_moe.experts.down_proj": "rowwise", "mlp.text_moe.experts": "moe_tp_experts",
        "mlp.vision_moe.experts.gate_up_proj": "packed_colwise",
        "mlp.vision_moe.experts.down_proj": "rowwise", "mlp.vision_moe.experts": "moe_tp_experts",
        "mlp.shared_experts.gate_proj": "colwise", "mlp.shared_experts.up_proj": "colwise",
        "mlp.shared_experts.down_proj": "rowwise", "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
    }),
)

PLANS = {name: plan for names, plan in _GROUPS for name in names}
"""Styles by path within a block (tables: within the model), by ``model_type``."""

HEADS = frozenset({
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "granite", "starcoder2", "internlm3",
    "glm", "glm4", "cohere", "cohere2", "exaone4", "nemotron", "arcee", "seed_oss", "helium",
    "ernie4_5", "hunyuan_v1_dense", "cwm", "iquestcoder", "jais2", "vaultgemma", "youtu",
    "minicpm3", "apertus", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo",
    "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "dbrx", "phimoe",
    "glm4_moe", "glm4_moe_lite", "minimax", "minimax_m2", "jamba", "falcon_h1", "bamba",
    "ernie4_5_moe", "hunyuan_v1_moe", "lfm2", "lfm2_moe", "gemma3n_text", "gemma4_text", "gemma4",
    "deepseek_v32", "glm_moe_dsa", "dots1", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
    "qwen3_5", "qwen3_5_moe", "llama4", "mistral3", "llava", "llava_next", "paligemma", "gemma3",
    "idefics3", "smolvlm", "internvl", "glm4v", "mistral4", "glm4v_moe", "kimi_linear",
    "llava_onevision", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "gemma3n", "deepseek_v4",
    "kimi_k25", "ernie4_5_vl_moe", "minimax_m3_vl", "minimax_m3_vl_text",
})
"""Types whose class cuts the output head by columns and gathers all logits."""
