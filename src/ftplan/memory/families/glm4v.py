"""GLM-4.1V, 4.5V and 4.6V: GLM's text with positions in three directions, beside a tower.

Source: transformers 5.23.0, models/glm4v, glm46v, glm4v_moe.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.latent import grouped
from ftplan.memory.families.llama import Llama
from ftplan.memory.families.patches import (
    Beside,
    Conv,
    Tower,
    VisionBlock,
    divided,
    embed_patches,
    plant,
    run_linear,
    stack_blocks,
)
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    RMSNorm,
    activation,
    gated_mlp,
)
from ftplan.memory.tape import BATCH, Grads, Size, Tensor


class Glm4v(VisionLanguage):
    """The wrapper: merged features take the places of image tokens."""

    def further_inputs(self) -> list[Module]:
        """The tower's class tells nobody where its embeddings are."""
        return []

    def project(self, x: Tensor) -> Tensor:
        """``Glm4vVisionPatchMerger``, the end of the tower."""
        merger = self.tower.child("merger")
        x = merger.child("post_projection_norm").forward(run_linear(merger.child("proj"), x))
        gate, up, down = (merger.child(f"{name}_proj") for name in ("gate", "up", "down"))
        x = activation(x, "gelu")
        assert isinstance(gate, Linear)
        assert isinstance(up, Linear)
        assert isinstance(down, Linear)
        return gated_mlp(x, gate, up, down, "silu")


def glm4v(raw: Config) -> Network:
    """``Glm4vForConditionalGeneration``, ``Glm46VForConditionalGeneration``,
    ``Glm4vMoeForConditionalGeneration``."""
    mixed = raw["model_type"] == "glm4v_moe"
    kind = "glm4v_moe" if mixed else "glm4v"
    text = {**filled(raw.get("text_config") or {}, f"{kind}_text"), "tie_word_embeddings": False}
    vision = filled(raw.get("vision_config") or {}, f"{kind}_vision")
    network = Glm4v(
        grouped(text) if mixed else Llama(text), GlmTower(vision),
        tied=bool(filled(raw).get("tie_word_embeddings")), tower_name="visual",
        text_name="language_model",
    )  # fmt: skip
    network.joins, network.returns_features = True, False
    return network


class GlmTower(Tower):
    """``Glm4vVisionModel``: any size of image, four neighbours become one by a convolution."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        wide, out, act = config["hidden_size"], config["out_hidden_size"], config["hidden_act"]
        patch, merge = config["patch_size"], config["spatial_merge_size"]
        plant(
            self, "embeddings.position_embedding",
            Embedding((config["image_size"] // patch) ** 2, wide),
        )  # fmt: skip
        embed_patches(
            self, "patch_embed.proj", config["in_channels"], wide, config["temporal_patch_size"],
            patch, patch, bias=True,
        )  # fmt: skip
        stack_blocks(
            self, "blocks", config["depth"],
            lambda: VisionBlock(
                wide, out, config["num_heads"], norm=RMSNorm, norms=("norm1", "norm2"),
                attn="attn", fused=True, out="proj", qkv_bias=bool(config.get("attention_bias")),
                out_bias=False, mlp_names=("gate_proj", "up_proj", "down_proj"), mlp_bias=False,
                act=act,
            ),
        )  # fmt: skip
        for block in self.in_order:
            block.turns, block.pieces = "fp32", True
        merger = plant(self, "merger", Module())
        plant(merger, "proj", Linear(out, out))
        plant(merger, "gate_proj", Linear(out, config["intermediate_size"]))
        plant(merger, "up_proj", Linear(out, config["intermediate_size"]))
        plant(merger, "down_proj", Linear(config["intermediate_size"], out))
        plant(merger, "post_projection_norm", LayerNorm(out))
        for name in ("post_conv_layernorm", "post_layernorm"):
            plant(self, name, RMSNorm(wide))
        down = Conv(wide, out, merge, merge, bias=True)
        down.channels_last = True
        plant(self, "downsample", down)
        self.merge = merge**2

    def picked(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Pixels in the tower's dtype, which the wrapper holds."""
        return [ops.to(pixels[0], self.patch.weight.dtype)]

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all tokens, before the merger."""
        rows = BATCH * (images * self.patches)
        x = self.child("post_conv_layernorm").forward(self.patch.forward(pixels))
        size = self.in_order[0].heads.size
        cos, sin = (x.tape.tensor(rows, size, "fp32", "rope") for _ in range(2))
        beside = Beside((cos, sin))
        x = ops.add(x, self._positions(x, rows))
        for block in self.in_order:
            block.reach = self.patches
            x = self._run(block, x, beside)
        x = self.child("post_layernorm").forward(x)
        x = ops.view(x, divided(x.rows, self.merge), x.width * self.merge)
        out: Tensor = self.child("downsample").forward(x)
        return out

    def _positions(self, x: Tensor, rows: Size) -> Tensor:
        """Learned positions of a square, sampled for each patch in fp32 (``grid_sample``)."""
        tape = x.tape
        table = tape.leaf(self.child("embeddings.position_embedding").parameters["weight"])
        dtype, square = table.dtype, ops.to(table, "fp32")
        grid = tape.tensor(rows, 2, "fp32", "grid")
        out = tape.tensor(rows, square.width, "fp32", "positions")
        saved = square, grid
        make = ops.like(square.rows, square.width, "fp32", square.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return (make(grad),)

        ops.record([out], "grid_sample", [square], apply)
        return ops.to(out, dtype)


MODEL_TYPES = {"glm4v": glm4v, "glm46v": glm4v, "glm4v_moe": glm4v}
