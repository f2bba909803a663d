"""Families: config.json to a network, one file per kind of architecture.

A family file ends in ``MODEL_TYPES``: the ``model_type`` values it builds, each with the function
from config to network. To add a family is to add a file and its row in :data:`_FILES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory.families.defaults import ALIASES, DEFAULTS
from ftplan.memory.nn import Network

__all__ = ["TEXT_ALONE", "build", "complete", "model_types", "text_alone", "thinker_alone"]

_FILES: dict[str, tuple[str, ...]] = {
    "llama": (
        "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "granite",
        "internlm3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "olmo3",
        "starcoder2", "glm", "glm4", "cohere", "cohere2", "exaone4", "nemotron", "arcee", "apertus",
        "seed_oss", "helium", "ernie4_5", "hunyuan_v1_dense", "cwm", "iquestcoder", "jais2",
        "vaultgemma",
    ),
    "gpt2": ("gpt2", "gpt_bigcode"),
    "neox": ("gpt_neox", "phi", "stablelm", "persimmon"),
    "opt": ("opt",),
    "bloom": ("bloom",),
    "bert": ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"),
    "albert": ("albert",),
    "gptj": ("gptj", "codegen", "gpt_neo"),
    "falcon": ("falcon",),
    "modernbert": ("modernbert",),
    "mpt": ("mpt",),
    "t5": ("t5", "mt5", "umt5"),
    "bart": ("bart", "plbart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"),
    "mixture": (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared",
    ),
    "gpt_oss": ("gpt_oss",),
    "routed": (
        "llama4_text", "phimoe", "ernie4_5_moe", "ernie4_5_vl_moe_text", "minimax_m2",
        "hunyuan_v1_moe",
    ),
    "vision": (
        "llava", "mistral3", "gemma3", "paligemma", "internvl", "idefics3", "smolvlm",
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
        "ernie4_5_vl_moe",
    ),
    "anyres": ("llava_next", "llava_onevision"),
    "llama4_vision": ("llama4",),
    "kimi": ("kimi_k25",),
    "dbrx": ("dbrx",),
    "chunked": ("mamba2", "granitemoehybrid"),
    "recurrent": ("mamba", "falcon_mamba", "lfm2", "lfm2_moe"),
    "published": ("internlm2", "exaone", "bitnet"),
    "qwen": ("qwen",),
    "blocks": ("minimax_m3_vl_text", "minimax_m3_vl"),
    "compressed": ("deepseek_v4",),
    "indexed": ("deepseek_v32", "glm_moe_dsa"),
    "delta": ("kimi_linear",),
    "mllama": ("mllama", "mllama_text_model"),
    "audio": (
        "qwen2_audio", "voxtral", "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
    ),
    "glm4v": ("glm4v", "glm46v", "glm4v_moe"),
    "deberta": ("deberta-v2",),
    "gemma4": ("gemma4_text", "gemma4"),
    "gemma3n": ("gemma3n_text", "gemma3n"),
    "mpnet": ("mpnet",),
    "states": ("falcon_h1", "jamba", "bamba", "nemotron_h"),
    "hybrid": ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    "latent": (
        "mistral4", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm4_moe", "dots1", "youtu",
        "minicpm3",
    ),
}  # fmt: skip


TEXT_ALONE = {
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "llama4": "llama4_text",
    "mllama": "mllama_text_model",
}  # fmt: skip
"""Vision-language types of which ``AutoModelForCausalLM`` builds the language model alone, and its
type (transformers 5.23, ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``)."""


NO_FLASH = frozenset({
    "bloom", "codegen", "deberta-v2", "deepseek_v32", "falcon_mamba", "glm_moe_dsa", "llama4",
    "llama4_text", "mamba", "mamba2", "mllama", "mllama_text_model", "mpnet", "mpt", "mt5", "t5",
    "umt5",
})  # fmt: skip
"""Types whose classes refuse FlashAttention (transformers 5.23.0, ``_supports_flash_attn``)."""


def text_alone(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of what ``AutoModelForCausalLM`` builds, where that is a part of the model."""
    kind = TEXT_ALONE.get(str(config.get("model_type")))
    text = config.get("text_config")
    return {**text, "model_type": kind} if kind and isinstance(text, Mapping) else None


def thinker_alone(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of the part of a Qwen-Omni that is trained: the talker is put aside."""
    thinker = config.get("thinker_config")
    if not isinstance(thinker, Mapping):
        return None
    own = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    return {**own, **thinker, "model_type": f"{config['model_type']}_thinker"}


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` that is modelled."""
    return tuple(sorted(name for names in _FILES.values() for name in names))


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what it leaves out, as its configuration class fills it in."""
    model_type = config.get("model_type", "")
    names = ALIASES.get(model_type, {})
    given = {names.get(key, key): value for key, value in config.items()}
    return {**DEFAULTS.get(model_type, {}), **given}


def build(config: Mapping[str, Any], *, labels: int | None = None) -> Network:
    """The network that a config.json describes.

    ``labels``: with a head that classifies sequences into so many labels (one: a reward model) in
    place of the language model's. Raises UnsupportedError, by name, for a ``model_type`` that is
    not modelled.
    """
    model_type = config.get("model_type")
    for file, names in _FILES.items():
        if model_type in names:
            module = import_module(f"ftplan.memory.families.{file}")
            network: Network = module.MODEL_TYPES[model_type](complete(config))
            if labels is not None:
                network.classify(labels)
            return network
    raise UnsupportedError(
        f"model_type {model_type!r}",
        remedy="give --params for the textbook's sums, or the config.json of a modelled family: "
        + ", ".join(model_types()),
    )
