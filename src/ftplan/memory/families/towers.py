"""The towers of vision-language models, one function for each class of transformers.

Source: transformers 5.23.0, models/{clip,siglip,pixtral,qwen2_vl,qwen2_5_vl,qwen3_vl,
internvl}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config
from ftplan.memory.families.mixture import act
from ftplan.memory.families.patches import (
    Beside,
    Crops,
    Tower,
    VisionBlock,
    embed_patches,
    plant,
    stack_blocks,
    weight,
)
from ftplan.memory.nn import Embedding, LayerNorm, Linear, RMSNorm
from ftplan.memory.tape import BATCH, ONE, Grads, Size, Tape, Tensor

__all__ = ["vision_tower"]


def clip(config: Mapping[str, Any]) -> Tower:
    """``CLIPVisionModel``."""
    tower, hidden = Tower(), config["hidden_size"]
    patch, size = config["patch_size"], config["image_size"]
    weight(tower, "embeddings.class_embedding", hidden)
    embed_patches(
        tower, "embeddings.patch_embedding", config.get("num_channels", 3), hidden, patch, patch,
        bias=False,
    )  # fmt: skip
    tower.patches, tower.classed = (size // patch) ** 2 + 1, True
    tower.token, tower.table = "embeddings.class_embedding", "embeddings.position_embedding"
    plant(tower, tower.table, Embedding(tower.patches, hidden))
    tower.before = [plant(tower, "pre_layrnorm", LayerNorm(hidden))]
    stack_blocks(
        tower, "encoder.layers", config["num_hidden_layers"],
        lambda: VisionBlock(
            hidden, config["intermediate_size"], config["num_attention_heads"], act=act(config)
        ),
    )  # fmt: skip
    plant(tower, "post_layernorm", LayerNorm(hidden))
    return tower


def siglip(config: Mapping[str, Any], *, crops: bool = False) -> Tower:
    """``SiglipVisionModel`` and, of crops and without its pooling head, Idefics 3's."""
    tower = Crops() if crops else Tower()
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    patch, size = config["patch_size"], config["image_size"]
    channels = config.get("num_channels", 3)
    embed_patches(
        tower, "embeddings.patch_embedding", channels, hidden, patch, patch, bias=True,
    )  # fmt: skip
    tower.patches = (size // patch) ** 2
    tower.image_pixels = channels * size**2
    tower.table = "embeddings.position_embedding"
    plant(tower, tower.table, Embedding(tower.patches, hidden))
    stack_blocks(
        tower, "encoder.layers", config["num_hidden_layers"],
        lambda: VisionBlock(hidden, inner, config["num_attention_heads"], act=act(config)),
    )  # fmt: skip
    tower.after = [plant(tower, "post_layernorm", LayerNorm(hidden))]
    if not crops and config.get("vision_use_head", True):
        weight(tower, "head.probe", 1, 1, hidden)
        weight(tower, "head.attention.in_proj_weight", 3 * hidden, hidden)
        weight(tower, "head.attention.in_proj_bias", 3 * hidden)
        plant(tower, "head.attention.out_proj", Linear(hidden, hidden, bias=True))
        plant(tower, "head.layernorm", LayerNorm(hidden))
        plant(tower, "head.mlp.fc1", Linear(hidden, inner, bias=True))
        plant(tower, "head.mlp.fc2", Linear(inner, hidden, bias=True))
    return tower


def pixtral(config: Mapping[str, Any]) -> Tower:
    """``PixtralVisionModel``."""
    tower, hidden = Tower(), config["hidden_size"]
    patch = config["patch_size"]
    embed_patches(
        tower, "patch_conv", config.get("num_channels", 3), hidden, patch, patch, bias=False
    )
    tower.before = [plant(tower, "ln_pre", RMSNorm(hidden))]
    tower.patches = (config["image_size"] // patch) ** 2
    stack_blocks(
        tower, "transformer.layers", config["num_hidden_layers"],
        lambda: VisionBlock(
            hidden, config["intermediate_size"], config["num_attention_heads"], norm=RMSNorm,
            norms=("attention_norm", "ffn_norm"), attn="attention", out="o_proj", qkv_bias=False,
            out_bias=False, mlp="feed_forward", mlp_names=("gate_proj", "up_proj", "down_proj"),
            mlp_bias=False, act=act(config),
        ),
    )  # fmt: skip
    for block in tower.in_order:
        block.turns = "own"
    tower.packs = True
    return tower


def qwen_visual(config: Mapping[str, Any], kind: str) -> Tower:
    """The towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and Qwen-Omni."""
    tower = Tower()
    new, gated = kind.startswith("qwen3"), kind in ("qwen2_5_vl", "qwen2_5_omni")
    hidden = config["embed_dim"] if kind == "qwen2_vl" else config["hidden_size"]
    out = config["hidden_size"] if kind == "qwen2_vl" else config["out_hidden_size"]
    inner = int(hidden * config["mlp_ratio"]) if kind == "qwen2_vl" else config["intermediate_size"]
    patch, merge = config["patch_size"], config["spatial_merge_size"] ** 2
    channels = config.get("in_channels") or config.get("in_chans") or 3
    embed_patches(
        tower, "patch_embed.proj", channels, hidden, config["temporal_patch_size"], patch, patch,
        bias=new,
    )  # fmt: skip
    if new:
        plant(tower, "pos_embed", Embedding(config["num_position_embeddings"], hidden))
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    stack_blocks(
        tower, "blocks", config["depth"],
        lambda: VisionBlock(
            hidden, inner, config["num_heads"], norm=RMSNorm if gated else LayerNorm,
            norms=("norm1", "norm2"), attn="attn", fused=kind != "qwen2_5_omni",
            qkv=("q", "k", "v"), out="proj", act=act(config),
            mlp_names=("linear_fc1", "linear_fc2") if new else names,
        ),
    )  # fmt: skip
    for block in tower.in_order:
        block.turns, block.pieces = "fp32", True
        if gated:  # all but a few blocks see one window
            block.reach = (int(config.get("window_size") or 112) // patch) ** 2
    tower.merge = merge
    wide = hidden * merge
    if not new:
        plant(tower, "merger.ln_q", RMSNorm(hidden) if gated else LayerNorm(hidden))
        plant(tower, "merger.mlp.0", Linear(wide, wide, bias=True))
        plant(tower, "merger.mlp.2", Linear(wide, out, bias=True))
        return tower
    omni = kind == "qwen3_omni_moe"
    parts = ("ln_q", "mlp.0", "mlp.2") if omni else ("norm", "linear_fc1", "linear_fc2")
    _merger(tower, "merger", parts, hidden, wide, out)
    tower.stacks = tuple(config.get("deepstack_visual_indexes") or ((8, 16, 24) if omni else ()))
    name = "merger_list" if omni else "deepstack_merger_list"
    for number, _ in enumerate(tower.stacks):
        _merger(tower, f"{name}.{number}", parts, wide, wide, out)
    return tower


def _merger(
    tower: Tower, path: str, parts: tuple[str, str, str], normed: int, wide: int, out: int
) -> None:
    norm, first, second = parts
    plant(tower, f"{path}.{norm}", LayerNorm(normed))
    plant(tower, f"{path}.{first}", Linear(wide, wide, bias=True))
    plant(tower, f"{path}.{second}", Linear(wide, out, bias=True))


def intern(config: Mapping[str, Any]) -> Tower:
    """``InternVLVisionModel``."""
    tower, hidden = Tower(), config["hidden_size"]
    patch, size = (
        value if isinstance(value, int) else value[0]
        for value in (config.get("patch_size", 14), config.get("image_size", 448))
    )
    tower.patches, tower.classed = (size // patch) ** 2 + 1, True
    tower.token = "embeddings.cls_token"
    weight(tower, tower.token, 1, 1, hidden)
    if config.get("use_mask_token"):
        weight(tower, "embeddings.mask_token", 1, 1, hidden)
    if config.get("use_absolute_position_embeddings", True):
        tower.table = "embeddings.position_embeddings"
        weight(tower, tower.table, 1, tower.patches, hidden)
    embed_patches(
        tower, "embeddings.patch_embeddings.projection", config.get("num_channels", 3), hidden,
        patch, patch, bias=True,
    )  # fmt: skip
    norm = RMSNorm if config.get("norm_type") == "rms_norm" else LayerNorm

    def block() -> VisionBlock:
        made = VisionBlock(
            hidden, config["intermediate_size"], config["num_attention_heads"], norm=norm,
            norms=("layernorm_before", "layernorm_after"), attn="attention",
            out="projection_layer", qkv_bias=bool(config.get("attention_bias")),
            act=act(config), scales=("lambda_1", "lambda_2"),
        )  # fmt: skip
        if config.get("use_qk_norm"):
            for name in ("q_norm", "k_norm"):
                plant(made, f"attention.{name}", RMSNorm(hidden))
        return made

    stack_blocks(tower, "encoder.layer", config["num_hidden_layers"], block)
    if not config.get("use_mean_pooling", True):
        plant(tower, "layernorm", LayerNorm(hidden))
    return tower


class MoonTower(Tower):
    """``Kimi_K25VisionModel``: images of any size, learned positions sampled for each patch."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.hidden, patch = config["hidden_size"], config["patch_size"]
        high, wide = config["pos_emb_height"], config["pos_emb_width"]
        self.positions = high * wide
        embed_patches(self, "patch_embed.proj", 3, self.hidden, patch, patch, bias=True)
        weight(self, "patch_embed.pos_emb.position_embeddings", high, wide, self.hidden)
        stack_blocks(
            self, "layers", config["num_hidden_layers"],
            lambda: VisionBlock(
                self.hidden, config["intermediate_size"], config["num_attention_heads"],
                norms=("norm1", "norm2"), attn="attn", out="proj", act=act(config),
            ),
        )  # fmt: skip
        for block in self.in_order:
            block.turns, block.pieces = "fp32", True
        self.final_layernorm = LayerNorm(self.hidden)
        down, across = config.get("merge_kernel_size") or (2, 2)
        self.merge = down * across

    def pixel_values(self, tape: Tape, images: int) -> list[Tensor]:
        """In fp32 under autocast; else somebody has cast them, for the model does not."""
        dtype = "fp32" if tape.env.autocast else self.patch.weight.dtype
        return [tape.tensor(BATCH * (images * self.patches), self.pixels, dtype, "pixel values")]

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all patches."""
        rows = BATCH * (images * self.patches)
        x = self.patch.forward(pixels)
        x = ops.add(x, ops.to(self._positions(x.tape, rows), x.dtype))
        size = self.in_order[0].heads.size
        cos, sin = (x.tape.tensor(rows, size, "fp32", "rope") for _ in range(2))
        beside = Beside((cos, sin))
        for block in self.in_order:
            block.reach = self.patches
            x = self._run(block, x, beside)
        return self.final_layernorm.forward(x)

    def _positions(self, tape: Tape, rows: Size) -> Tensor:
        """Sixteen rows of the table, weighted (``embedding_bag``), and a sinusoid of time."""
        leaf = tape.leaf(self.child("patch_embed.pos_emb").parameters["position_embeddings"])
        table = leaf.alias(ONE * self.positions, self.hidden)
        table.requires_grad, table.node = leaf.requires_grad, leaf.node
        taps = [tape.tensor(rows, 16, dtype, "taps") for dtype in ("int64", table.dtype)]
        out = tape.tensor(rows, self.hidden, table.dtype, "embedding_bag")
        bags = tape.tensor(rows, 16, "int64", "bags")
        make = ops.like(table.rows, table.width, table.dtype, table.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = taps, bags
            return (make(grad),)

        ops.record([out], "embedding_bag", [table], apply)
        return ops.add(out, tape.tensor(rows, self.hidden, "fp32", "time"))


def ernie(config: Mapping[str, Any]) -> Tower:
    """``Ernie4_5_VLMoeVisionTransformerPretrainedModel``: names and shapes."""
    tower, hidden = Tower(), config["hidden_size"]
    area = config["in_channels"] * config["patch_size"] ** 2
    plant(tower, "patch_embed.proj", Linear(area, hidden))
    stack_blocks(
        tower, "blocks", config["depth"],
        lambda: VisionBlock(
            hidden, config["intermediate_size"], config["num_heads"], norms=("norm1", "norm2"),
            attn="attn", fused=True, out="proj", act=act(config),
        ),
    )  # fmt: skip
    plant(tower, "ln", LayerNorm(hidden))
    return tower


def vision_tower(config: Config) -> Tower:
    """The tower by the ``model_type`` of its config."""
    kind = config["model_type"]
    if kind == "clip_vision_model":
        return clip(config)
    if kind == "siglip_vision_model":
        return siglip(config)
    if kind in ("idefics3_vision", "smolvlm_vision"):
        return siglip(config, crops=True)
    if kind == "pixtral":
        return pixtral(config)
    if kind == "internvl_vision":
        return intern(config)
    if kind == "kimi_k25_vision":
        return MoonTower(config)
    if kind == "ernie4_5_vl_moe_vision":
        return ernie(config)
    return qwen_visual(config, kind.removesuffix("_vision"))
