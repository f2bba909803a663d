"""What PEFT targets in each architecture when a config does not say.

Facts of peft 0.21.2, ``utils/constants.py`` and ``utils/transformers_weight_conversion.py``, by
``model_type``.
"""

from __future__ import annotations

__all__ = ["CONVERTED", "FUSED", "IA3_FEEDFORWARD", "IA3_TARGETS", "LN_TARGETS"]

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "norm",
)  # fmt: skip

LN_TARGETS: dict[str, tuple[str, ...]] = {
    "llama": _NORMS,
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "llava": (
        "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm",
        "embed_tokens", "lm_head",
    ),
    "t5": ("layer_norm", "final_layer_norm"),
    "mt5": ("layer_norm", "final_layer_norm"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "mistral": _NORMS,
    "phi": ("input_layernorm", "final_layernorm"),
    "gemma": _NORMS,
    "gemma2": _GEMMA_NORMS,
    "gemma3_text": _GEMMA_NORMS,
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
}  # fmt: skip

IA3_TARGETS: dict[str, tuple[str, ...]] = {
    "t5": ("k", "v", "wo"),
    "mt5": ("k", "v", "wi_1"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "roberta": ("key", "value", "output.dense"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "bart": ("q_proj", "v_proj", "fc2"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "llama4": ("q_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "bert": ("key", "value", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
}

IA3_FEEDFORWARD: dict[str, tuple[str, ...]] = {
    "t5": ("wo",),
    "mt5": (),
    "gpt2": ("mlp.c_proj",),
    "bloom": ("mlp.dense_4h_to_h",),
    "roberta": ("output.dense",),
    "opt": ("fc2",),
    "gptj": ("fc_out",),
    "gpt_neox": ("dense_4h_to_h",),
    "gpt_neo": ("c_proj",),
    "bart": ("fc2",),
    "gpt_bigcode": ("mlp.c_proj",),
    "llama": ("down_proj",),
    "llama4": ("down_proj",),
    "mistral": ("down_proj",),
    "mixtral": ("w2",),
    "bert": ("output.dense",),
    "deberta-v2": ("output.dense",),
    "falcon": ("dense_4h_to_h",),
    "phi": ("fc2",),
    "gemma": ("down_proj",),
    "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
}

_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {
    "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}  # fmt: skip

CONVERTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
            "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open",
            "qwen3_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "qwen3_next",
            "hunyuan_v1_moe", "flex_olmo",
            "olmoe", "exaone_moe", "cohere2_moe",
        ),
        _QWEN,
    ),
}  # fmt: skip
"""Mixtures whose experts transformers 5 fuses into one parameter: LoRA's targets of the layers
they once were, `all-linear` among them, become targets of those parameters."""

FUSED: dict[str, tuple[str, ...]] = {"w1": ("w1", "w3"), "gate_proj": ("gate_proj", "up_proj")}
"""Targets that only go together, by the first of them: one matrix of twice the rank."""
