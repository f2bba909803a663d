"""GLM-4.1V, 4.5V and 4.6V: GLM's text with positions in three directions, beside a tower.

The tower's weights are counted; images are refused.
Source: transformers 5.23.0, models/glm4v, glm46v, glm4v_moe.
"""

from __future__ import annotations

from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.latent import grouped
from ftplan.memory.families.llama import Llama
from ftplan.memory.families.patches import Conv, Tower, plant
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module, Network, RMSNorm


def glm4v(raw: Config) -> Network:
    """``Glm4vForConditionalGeneration``, ``Glm46VForConditionalGeneration``,
    ``Glm4vMoeForConditionalGeneration``."""
    mixed = raw["model_type"] == "glm4v_moe"
    kind = "glm4v_moe" if mixed else "glm4v"
    text = {**filled(raw.get("text_config") or {}, f"{kind}_text"), "tie_word_embeddings": False}
    vision = filled(raw.get("vision_config") or {}, f"{kind}_vision")
    network = VisionLanguage(
        grouped(text) if mixed else Llama(text), tower(vision),
        tied=bool(filled(raw).get("tie_word_embeddings")), tower_name="visual",
        text_name="language_model",
    )  # fmt: skip
    network.shows = False
    return network


def tower(config: Config) -> Tower:
    """``Glm4vVisionModel``: names and shapes."""
    root, wide, out = Tower(), config["hidden_size"], config["out_hidden_size"]
    patch, merge = config["patch_size"], config["spatial_merge_size"]
    bias = bool(config.get("attention_bias"))
    rows = (config["image_size"] // patch) ** 2
    plant(root, "embeddings.position_embedding", Embedding(rows, wide))
    window = (config["temporal_patch_size"], patch, patch)
    plant(root, "patch_embed.proj", Conv(config["in_channels"], wide, *window, bias=True))
    for layer in range(config["depth"]):
        block = plant(root, f"blocks.{layer}", Module())
        plant(block, "norm1", RMSNorm(wide))
        plant(block, "norm2", RMSNorm(wide))
        plant(block, "attn.qkv", Linear(wide, 3 * wide, bias=bias))
        plant(block, "attn.proj", Linear(wide, wide))
        _gated(block, "mlp", wide, out)
    plant(root, "merger.proj", Linear(out, out))
    _gated(root, "merger", out, config["intermediate_size"])
    plant(root, "merger.post_projection_norm", LayerNorm(out))
    for name in ("post_conv_layernorm", "post_layernorm"):
        plant(root, name, RMSNorm(wide))
    plant(root, "downsample", Conv(wide, out, merge, merge, bias=True))
    return root


def _gated(root: Module, path: str, hidden: int, inner: int) -> None:
    plant(root, f"{path}.gate_proj", Linear(hidden, inner))
    plant(root, f"{path}.up_proj", Linear(hidden, inner))
    plant(root, f"{path}.down_proj", Linear(inner, hidden))


MODEL_TYPES = {"glm4v": glm4v, "glm46v": glm4v, "glm4v_moe": glm4v}
