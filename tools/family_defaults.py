"""Write src/ftplan/memory/families/defaults.py from transformers' configuration classes.

A config.json may leave out what its class fills in. This reads each class's own defaults, so that
the calculator fills in the same. Needs transformers; run it when a new version is followed::

    python tools/family_defaults.py            # write
    python tools/family_defaults.py --check    # exit 1 if the file would change
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

TARGET = Path(__file__).parents[1] / "src/ftplan/memory/families/defaults.py"
TYPES = """
llama mistral ministral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi phi3 olmo olmo2
olmo3 granite stablelm starcoder2 internlm3 glm glm4 cohere cohere2 exaone4 nemotron arcee seed_oss
helium persimmon ernie4_5 hunyuan_v1_dense cwm iquestcoder jais2 vaultgemma youtu
minicpm3 apertus falcon gpt2 gptj gpt_neo gpt_neox gpt_bigcode
opt bloom mpt codegen xglm biogpt bert roberta xlm-roberta camembert distilbert electra albert
deberta-v2 modernbert mpnet t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot plbart
mixtral qwen2_moe qwen3_moe olmoe flex_olmo deepseek_v2 deepseek_v3 gpt_oss llama4_text granitemoe
granitemoehybrid granitemoeshared qwen3_next qwen3_5_text qwen3_5_moe_text dbrx phimoe glm4_moe
glm4_moe_lite minimax minimax_m2 jamba mamba mamba2 falcon_mamba falcon_h1 bamba nemotron_h
ernie4_5_moe hunyuan_v1_moe lfm2 lfm2_moe recurrent_gemma bitnet gemma3n_text gemma4_text
gemma4 gemma4_vision gemma4_audio
deepseek_v32 glm_moe_dsa dots1
clip_vision_model siglip_vision_model pixtral qwen2_vl qwen2_vl_text qwen2_vl_vision qwen2_5_vl
qwen2_5_vl_text qwen2_5_vl_vision qwen3_vl qwen3_vl_text qwen3_vl_vision qwen3_vl_moe
qwen3_vl_moe_text qwen3_vl_moe_vision qwen3_5 qwen3_5_moe qwen3_5_vision qwen3_5_moe_vision llama4
llama4_vision_model mllama mllama_text_model mllama_vision_model mistral3 llava llava_next
paligemma gemma3 idefics3 idefics3_vision smolvlm smolvlm_vision internvl internvl_vision glm4v
mistral4 glm4v_text glm4v_vision glm4v_moe glm4v_moe_text glm4v_moe_vision
kimi_linear qwen2_audio qwen2_audio_encoder voxtral voxtral_encoder llava_onevision
qwen2_5_omni_thinker qwen2_5_omni_text qwen2_5_omni_vision_encoder qwen2_5_omni_audio_encoder
qwen3_omni_moe_thinker qwen3_omni_moe_text qwen3_omni_moe_vision_encoder
qwen3_omni_moe_audio_encoder gemma3n gemma3n_vision gemma3n_audio deepseek_v4
kimi_k25 kimi_k25_vision ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision minimax_m3_vl
minimax_m3_vl_text minimax_m3_vl_vision
""".split()  # noqa: SIM905 - one list literal of these would be a hundred lines
# what moves neither a shape nor an operation
IGNORED = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range",
    "initializer_factor", "use_cache", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "layernorm_epsilon", "norm_eps", "norm_epsilon", "rope_parameters", "init_std", "init_device",
    "initializer_cutoff_factor", "pretraining_tp", "deterministic_flash_attn", "logit_scale",
    "sparse_prediction", "sparse_pred_ignore_index", "logits_scaling", "query_pre_attn_scalar",
    "is_decoder", "add_cross_attention", "attn_config", "alibi_bias_max", "rope_theta",
    "relative_attention_max_distance", "classifier_dropout", "position_embedding_type",
    "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_last_dropout", "original_max_position_embeddings",
}  # fmt: skip


def defaults_of(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The class's own defaults that matter, and other names of its fields."""
    cls = CONFIG_MAPPING[model_type]
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        if name in IGNORED or name.endswith(("token_id", "token_ids")) or name.startswith("_"):
            continue
        value = field.default
        if isinstance(value, (bool, int, float, str)) or value is None:
            found[name] = value
    instance = cls()
    rope = getattr(instance, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found, dict(getattr(cls, "attribute_map", None) or {})


def rendered() -> str:
    """The whole file."""
    lines = [
        '"""Defaults of the configuration classes: what a config.json may leave out.',
        "",
        "Written by tools/family_defaults.py from the classes in models/*/configuration_*.py of",
        f"transformers {transformers.__version__}. Do not edit.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Any",
        "",
        '__all__ = ["ALIASES", "DEFAULTS"]',
        "",
        "# fmt: off",
        "DEFAULTS: dict[str, dict[str, Any]] = {",
    ]
    aliases = {}
    for model_type in TYPES:
        found, names = defaults_of(model_type)
        if names:
            aliases[model_type] = names
        lines.append(f'    "{model_type}": {{')
        line = "       "
        for name, value in found.items():
            item = f' "{name}": {_literal(value)},'
            if len(line) + len(item) > 99:
                lines.append(line)
                line = "       "
            line += item
        lines += [line, "    },"]
    lines += [
        "}",
        '"""Fields and their values, by ``model_type``."""',
        "",
        "ALIASES: dict[str, dict[str, str]] = {",
    ]
    for model_type, names in aliases.items():
        lines.append(f'    "{model_type}": {{')
        lines += [f'        "{name}": "{real}",' for name, real in names.items()]
        lines.append("    },")
    lines += ["}", '"""Other names of fields (``attribute_map``), by ``model_type``."""', ""]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    text = rendered()
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_text() != text)
    TARGET.write_text(text)
