"""Models that listen: a language model of another family beside an encoder of sound.

The encoders' weights are counted; a batch is text, and what is not shown anything is not run.
Of Qwen-Omni, the thinker alone is built: trainers put the talker aside (``model.thinker``,
LLaMA-Factory, model/loader.py).
Source: transformers 5.23.0, models/qwen2_audio, voxtral, qwen2_5_omni, qwen3_omni_moe.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import families
from ftplan.memory.families.bart import Sinusoids
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.patches import Conv, Tower, plant
from ftplan.memory.families.towers import qwen_visual
from ftplan.memory.families.vision import VisionLanguage, qwen_text
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module, Network

_VOXTRAL_TEXT = {
    "model_type": "llama", "vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 30, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "head_dim": 128,
}  # fmt: skip


def listening(raw: Config) -> Network:
    """``Qwen2AudioForConditionalGeneration``, ``VoxtralForConditionalGeneration``."""
    kind = raw["model_type"]
    first = _VOXTRAL_TEXT if kind == "voxtral" else {"model_type": "qwen2"}
    text = {**first, **(raw.get("text_config") or {}), "tie_word_embeddings": False}
    sound = filled(raw.get("audio_config") or {}, f"{kind}_encoder")
    network = VisionLanguage(
        families.build(text), whisper(sound), tied=False, tower_name="audio_tower",
        text_name="language_model",
    )  # fmt: skip
    network.shows = False
    wide = families.complete(text)["hidden_size"]
    if kind == "qwen2_audio":
        network.loss_in_fp32, network.loss_shifts = False, "picked"
        plant(
            network, "model.multi_modal_projector.linear", Linear(sound["d_model"], wide, bias=True)
        )
        return network
    network.kept_in_fp32 = ("embed_positions",)
    plant(network, "model.multi_modal_projector.linear_1", Linear(sound["intermediate_size"], wide))
    plant(network, "model.multi_modal_projector.linear_2", Linear(wide, wide))
    return network


def thinker(raw: Config) -> Network:
    """``Qwen2_5OmniThinkerForConditionalGeneration``,
    ``Qwen3OmniMoeThinkerForConditionalGeneration``."""
    raw = families.thinker_alone(raw) or raw
    kind = str(raw["model_type"]).removesuffix("_thinker")
    text = {**(raw.get("text_config") or {}), "model_type": f"{kind}_text"}
    vision = filled(raw.get("vision_config") or {}, f"{kind}_vision_encoder")
    sound = filled(raw.get("audio_config") or {}, f"{kind}_audio_encoder")
    old = kind == "qwen2_5_omni"
    network = VisionLanguage(
        qwen_text(text), qwen_visual(vision, kind),
        tied=bool(raw.get("tie_word_embeddings")), tower_name="visual",
        text_name="language_model",
    )  # fmt: skip
    network.shows = False
    plant(network, "model.audio_tower", omni_encoder(sound) if old else strided_encoder(sound))
    # ``SinusoidsPositionEmbedding``: a table in fp32 that is no weight
    network.buffer_bytes += sound["max_source_positions"] * sound["d_model"] * 4
    return network


def _layers(root: Module, config: Config, *, key_bias: bool = False) -> None:
    """The encoder's blocks: names and shapes."""
    wide, inner = config["d_model"], config["encoder_ffn_dim"]
    for layer in range(config["encoder_layers"]):
        block = plant(root, f"layers.{layer}", Module())
        for name in ("q", "k", "v", "out"):
            bias = key_bias or name != "k"
            plant(block, f"self_attn.{name}_proj", Linear(wide, wide, bias=bias))
        plant(block, "fc1", Linear(wide, inner, bias=True))
        plant(block, "fc2", Linear(inner, wide, bias=True))
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            plant(block, name, LayerNorm(wide))


def _convolutions(root: Module, config: Config) -> None:
    wide = config["d_model"]
    plant(root, "conv1", Conv(config["num_mel_bins"], wide, 3, bias=True))
    plant(root, "conv2", Conv(wide, wide, 3, bias=True))


def whisper(config: Config) -> Tower:
    """``Qwen2AudioEncoder``, ``VoxtralEncoder``: names and shapes."""
    root = Tower()
    _convolutions(root, config)
    plant(root, "embed_positions", Sinusoids(config["max_source_positions"], config["d_model"]))
    _layers(root, config)
    plant(root, "layer_norm", LayerNorm(config["d_model"]))
    return root


def omni_encoder(config: Config) -> Module:
    """``Qwen2_5OmniAudioEncoder``: names and shapes."""
    root = Module()
    _convolutions(root, config)
    plant(root, "audio_bos_eos_token", Embedding(2, config["output_dim"]))
    _layers(root, config)
    plant(root, "ln_post", LayerNorm(config["d_model"]))
    plant(root, "proj", Linear(config["d_model"], config["output_dim"], bias=True))
    return root


def strided_encoder(config: Config) -> Module:
    """``Qwen3OmniMoeAudioEncoder``: names and shapes."""
    root, wide, channels = Module(), config["d_model"], config["downsample_hidden_size"]
    for number in (1, 2, 3):
        plant(
            root, f"conv2d{number}", Conv(1 if number == 1 else channels, channels, 3, 3, bias=True)
        )
    bins = config["num_mel_bins"]
    for _ in range(3):  # each convolution takes every other bin
        bins = (bins + 1) // 2
    plant(root, "conv_out", Linear(channels * bins, wide))
    _layers(root, config, key_bias=True)
    plant(root, "ln_post", LayerNorm(wide))
    plant(root, "proj1", Linear(wide, wide, bias=True))
    plant(root, "proj2", Linear(wide, config["output_dim"], bias=True))
    return root


MODEL_TYPES: dict[str, Any] = {
    "qwen2_audio": listening, "voxtral": listening, "qwen2_5_omni": thinker,
    "qwen2_5_omni_thinker": thinker, "qwen3_omni_moe": thinker, "qwen3_omni_moe_thinker": thinker,
}  # fmt: skip
