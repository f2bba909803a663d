"""Llama 4 with its tower, and a whole causal model beside it; an image is tiles of one size.

Source: transformers 5.23.0, models/llama4/modeling_llama4.py.
"""

from __future__ import annotations

from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import families, ops
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.patches import (
    Beside,
    Tower,
    VisionBlock,
    divided,
    plant,
    run_linear,
    stack_blocks,
    weight,
    with_class,
)
from ftplan.memory.families.projectors import scattered
from ftplan.memory.images import Image
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, Shared, Stage, activation
from ftplan.memory.tape import BATCH, Tape, Tensor

__all__ = ["MODEL_TYPES", "Llama4"]


class Llama4(Network):
    """``Llama4ForConditionalGeneration``."""

    def __init__(self, raw: Config) -> None:
        super().__init__()
        config = filled(raw)
        own = config.get("text_config") or {}
        text = families.build({**own, "model_type": own.get("model_type") or "llama4_text"})
        raw_vision = config.get("vision_config") or {}
        vision = filled(raw_vision, raw_vision.get("model_type") or "llama4_vision_model")
        tower = TileTower(vision)
        self.vision_model = tower
        projector = Linear(vision["vision_output_dim"], filled(own, "llama4_text")["hidden_size"])
        plant(self, "multi_modal_projector.linear_1", projector)
        plant(self, "language_model.model", text.children["model"])
        plant(self, "language_model.lm_head", text.children["lm_head"])
        self.text, self.tower = [text], [tower]
        self.embedding_names = ("language_model.model.embed_tokens",)
        self.head_name = "language_model.lm_head"
        stage = text.stages[0]
        stage.stack.name = "language_model.model.layers"
        self.stages = [Stage(stage.stack, self.enter, stage.leave)]
        half = vision["hidden_size"] // vision["num_attention_heads"] // 2
        self.buffer_bytes = tower.patches * half * 8  # a complex number for each pair of a head's
        self.images = 0
        """Tiles per sequence."""
        self.pixels: list[Tensor] = []
        """The caller's pixel values, until the tower takes them."""

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put so many tiles in each sequence."""
        self.images, self.tower[0].checkpointed = images, checkpointed

    def inputs(self, tape: Tape) -> list[Tensor]:
        """Pixel values, which the caller holds."""
        self.pixels = self.tower[0].pixel_values(tape, self.images) if self.images else []
        return list(self.pixels)

    def further_inputs(self) -> list[Module]:
        return [self.tower[0].first] if self.images else []

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed the text; put projected features in place, which live until the loss is there."""
        x = self.text[0].stages[0].enter(tape, shared)
        if not self.images:
            return x
        (pixels,) = self.pixels or self.tower[0].pixel_values(tape, self.images)
        self.pixels = []
        features = self.tower[0].forward(pixels, self.images)
        del pixels
        projected = run_linear(self.child("multi_modal_projector.linear_1"), features)
        projected = ops.to(projected, x.dtype)
        x = scattered(x, projected)
        tape.cached += [features.alias(), projected.alias()]
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.text[0].head(x)

    def classify(self, labels: int) -> None:
        raise UnsupportedError(
            f"Llama 4 with a head over {labels} labels", remedy="use its text model, llama4_text"
        )


class Unfold(Module):
    """``Llama4UnfoldConvolution``: patches are copied out of a tile, then a linear layer."""

    def __init__(self, area: int, hidden: int) -> None:
        super().__init__()
        self.linear = Linear(area, hidden)

    def forward(self, x: Tensor) -> Tensor:
        unfolded = ops.copy(x, "unfold")
        return run_linear(self.children["linear"], ops.copy(ops.autocast(unfolded), "contiguous"))


class TileTower(Tower):
    """``Llama4VisionModel``: tiles of one size, of which four neighbouring patches are a token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, patch = config["hidden_size"], config["patch_size"]
        self.pixels = config["num_channels"] * patch**2
        self.patches, self.classed = (config["image_size"] // patch) ** 2 + 1, True
        self.merge = round(1 / config["pixel_shuffle_ratio"] ** 2)
        self.token = "class_embedding"
        weight(self, self.token, hidden)
        weight(self, "positional_embedding_vlm", self.patches, hidden)
        self.patch_embedding = Unfold(self.pixels, hidden)
        for name in ("layernorm_pre", "layernorm_post"):
            plant(self, name, LayerNorm(hidden))
        stack_blocks(
            self, "model.layers", config["num_hidden_layers"],
            lambda: VisionBlock(
                hidden, config["intermediate_size"], config["num_attention_heads"], out="o_proj",
                norms=("input_layernorm", "post_attention_layernorm"),
            ),
        )  # fmt: skip
        for block in self.in_order:
            block.turns, block.reach = "complex", self.patches
        inner, out = config["projector_input_dim"], config["projector_output_dim"]
        plant(self, "vision_adapter.mlp.fc1", Linear(config["intermediate_size"], inner))
        plant(self, "vision_adapter.mlp.fc2", Linear(inner, out))

    @property
    def first(self) -> Module:
        return self.patch_embedding

    def pixel_values(self, tape: Tape, images: int) -> list[Tensor]:
        """In fp32 under autocast; else somebody has cast them, for the model does not."""
        stored = self.parameters["positional_embedding_vlm"].dtype
        dtype = "fp32" if tape.env.autocast else stored
        rows = BATCH * (images * (self.patches - 1))
        return [tape.tensor(rows, self.pixels, dtype, "pixel values")]

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all tokens."""
        rows = BATCH * (images * self.patches)
        x = self.patch_embedding.forward(pixels)
        x = with_class(x, self.class_token(x.tape), rows)
        x = ops.add(x, ops.to(x.tape.leaf(self.parameters["positional_embedding_vlm"]), x.dtype))
        x = self.child("layernorm_pre").forward(x)
        for block in self.in_order:
            x = self._run(block, x, Beside())
        encoded = x
        x = self.child("layernorm_post").forward(x)
        x = ops.rows_slice(x, BATCH * (images * (self.patches - 1)))
        x = self._adapted(x)
        del encoded
        return x

    def _adapted(self, x: Tensor) -> Tensor:
        """``Llama4VisionPixelShuffleMLP``."""
        x = ops.copy(ops.copy(x, "pixel shuffle"), "pixel shuffle")
        x = ops.view(x, divided(x.rows, self.merge), x.width * self.merge)
        x = activation(run_linear(self.child("vision_adapter.mlp.fc1"), x), "gelu")
        return activation(run_linear(self.child("vision_adapter.mlp.fc2"), x), "gelu")


MODEL_TYPES: dict[str, Any] = {"llama4": Llama4}
