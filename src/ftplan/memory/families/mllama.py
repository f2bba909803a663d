"""Llama 3.2 Vision: a Llama some of whose layers attend to an image, and are passed over without.

The tower's weights are counted; images are refused. Source: transformers 5.23.0, models/mllama.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.llama import Block, GatedMLP, Llama
from ftplan.memory.families.patches import Conv, Tower, plant, weight
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module, Network, RMSNorm
from ftplan.memory.tape import Tensor

_CROSSED = (3, 8, 13, 18, 23, 28, 33, 38)


class CrossBlock(Module):
    """``MllamaCrossAttentionDecoderLayer``: names and shapes."""

    skipped = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = hidden // heads
        narrow = config["num_key_value_heads"] * size
        for name, width in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            plant(self, f"cross_attn.{name}_proj", Linear(hidden, width))
        for name in ("cross_attn.q_norm", "cross_attn.k_norm"):
            plant(self, name, RMSNorm(size))
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(hidden)
        self.post_attention_layernorm = RMSNorm(hidden)
        self.parameter("cross_attn_attn_gate", 1)
        self.parameter("cross_attn_mlp_gate", 1)


class MllamaText(Llama):
    """``MllamaForCausalLM``."""

    def __init__(self, raw: Config) -> None:
        config = filled(raw, "mllama_text_model")
        listed = config.get("cross_attention_layers")
        self.crossed = set(_CROSSED if listed is None else listed)
        super().__init__(config)
        table = Embedding(config["vocab_size"] + 8, config["hidden_size"])
        self.model.embed_tokens = table
        self.stages[0].stack.split(lambda layer: layer in self.crossed)
        self.alone = True
        """No part of a model with a tower, which leaves the logits as they are."""

    def block(self, config: Config, layer: int) -> Module:
        return CrossBlock(config) if layer in self.crossed else Block(config, layer)

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        return ops.to(logits, "fp32") if self.alone else logits


def mllama(raw: Config) -> Network:
    """``MllamaForConditionalGeneration``."""
    text = filled(raw.get("text_config") or {}, "mllama_text_model")
    vision = filled(raw.get("vision_config") or {}, "mllama_vision_model")
    language = MllamaText({**text, "tie_word_embeddings": False})
    language.alone = False
    network = VisionLanguage(
        language, tower(vision), tied=False, tower_name="vision_model", text_name="language_model"
    )
    network.shows = False
    projector = Linear(vision["vision_output_dim"], text["hidden_size"], bias=True)
    plant(network, "model.multi_modal_projector", projector)
    return network


def tower(config: Config) -> Tower:
    """``MllamaVisionModel``: names and shapes."""
    root, wide, patch = Tower(), config["hidden_size"], config["patch_size"]
    inner, tiles = config["intermediate_size"], config["max_num_tiles"]
    rows = (config["image_size"] // patch) ** 2 + 1
    ratios = 1 + sum(tiles // height for height in range(1, tiles + 1))  # and one for no image
    weight(root, "class_embedding", wide)
    plant(root, "patch_embedding", Conv(config["num_channels"], wide, patch, patch, bias=False))
    weight(root, "gated_positional_embedding.gate", 1)
    weight(root, "gated_positional_embedding.embedding", rows, wide)
    tile = "gated_positional_embedding.tile_embedding"
    plant(root, tile, Embedding(ratios, tiles * rows * wide))
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        weight(root, f"{name}.gate", 1)
        plant(root, f"{name}.embedding", Embedding(ratios, tiles * wide))
    for name in ("layernorm_pre", "layernorm_post"):
        plant(root, name, LayerNorm(wide))
    for part, count in (
        ("transformer", config["num_hidden_layers"]),
        ("global_transformer", config["num_global_layers"]),
    ):
        for layer in range(count):
            block = plant(root, f"{part}.layers.{layer}", Module())
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                plant(block, f"self_attn.{name}", Linear(wide, wide))
            plant(block, "mlp.fc1", Linear(wide, inner, bias=True))
            plant(block, "mlp.fc2", Linear(inner, wide, bias=True))
            plant(block, "input_layernorm", LayerNorm(wide))
            plant(block, "post_attention_layernorm", LayerNorm(wide))
            if part == "global_transformer":
                weight(block, "gate_attn", 1)
                weight(block, "gate_ffn", 1)
    return root


MODEL_TYPES: dict[str, Any] = {"mllama": mllama, "mllama_text_model": MllamaText}
