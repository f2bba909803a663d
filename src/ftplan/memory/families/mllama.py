"""Llama 3.2 Vision: a Llama some of whose layers attend to an image, and are passed over without.

An image is up to four tiles, padded to four by the processor; all of them go through the tower.
Source: transformers 5.23.0, models/mllama.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import Heads, KeptStates, attend
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.llama import Block, GatedMLP, Llama
from ftplan.memory.families.patches import (
    Beside,
    Tower,
    VisionBlock,
    embed_patches,
    plant,
    run_linear,
    stack_blocks,
    weight,
    with_class,
)
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.images import Image
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module, RMSNorm, Shared
from ftplan.memory.tape import BATCH, TOKENS, Size, Tape, Tensor

_CROSSED = (3, 8, 13, 18, 23, 28, 33, 38)
_MULTIPLE = 8
"""Patches of a tile are padded to a multiple of it."""


class CrossAttention(Module):
    """``MllamaTextCrossAttention``: queries of the text, keys and values of the image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        size, kv_count = hidden // count, config["num_key_value_heads"]
        self.heads = Heads(
            count=count, kv_count=kv_count, size=size, value_size=size, causal=False,
            dropout=config.get("dropout") or 0.0,
        )  # fmt: skip
        for name, width in (("q", hidden), ("k", kv_count * size), ("v", kv_count * size)):
            setattr(self, f"{name}_proj", Linear(hidden, width))
        self.o_proj = Linear(hidden, hidden)
        self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        assert shared.memory is not None
        assert shared.mask is not None
        q = self._normed("q_norm", run_linear(self.children["q_proj"], x))
        k = run_linear(self.children["k_proj"], shared.memory)
        v = run_linear(self.children["v_proj"], shared.memory)
        k = self._normed("k_norm", k)
        cache = x.tape.prefix
        if isinstance(cache, KeptStates):
            k, v = cache.join(k), cache.join(v)
        mask = shared.mask
        reach = mask.rows[TOKENS.index(1)]
        out = attend(q, k, v, self.heads, mask, reach=reach)
        return run_linear(self.children["o_proj"], out)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        size = self.heads.size
        out = self.child(name).forward(ops.view(x, x.rows * (x.width // size), size))
        return ops.view(out, x.rows, x.width)


class CrossBlock(Module):
    """``MllamaCrossAttentionDecoderLayer``; ``skipped`` where there is no image."""

    def __init__(self, config: Config, *, skipped: bool) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.skipped = skipped
        self.cross_attn = CrossAttention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(hidden)
        self.post_attention_layernorm = RMSNorm(hidden)
        self.parameter("cross_attn_attn_gate", 1)
        self.parameter("cross_attn_mlp_gate", 1)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        residual = x
        x = self.children["input_layernorm"].forward(x)
        x = self.children["cross_attn"].forward(x, shared)
        x = ops.add(residual, self._gated("cross_attn_attn_gate", x))
        residual = x
        x = self.children["post_attention_layernorm"].forward(x)
        x = self.children["mlp"].forward(x)
        rows = shared.masks["rows"]
        assert rows is not None
        x = ops.mul(rows, x)
        return ops.add(residual, self._gated("cross_attn_mlp_gate", x))

    def _gated(self, name: str, x: Tensor) -> Tensor:
        return ops.mul(ops.unary(x.tape.leaf(self.parameters[name]), "tanh", "output"), x)


class MllamaText(Llama):
    """``MllamaForCausalLM``."""

    def __init__(self, raw: Config) -> None:
        config = filled(raw, "mllama_text_model")
        listed = config.get("cross_attention_layers")
        self.crossed = set(_CROSSED if listed is None else listed)
        self.sees = False
        """There is an image."""
        super().__init__(config)
        table = Embedding(config["vocab_size"] + 8, config["hidden_size"])
        self.model.embed_tokens = table
        self.stages[0].stack.split(lambda layer: layer in self.crossed)
        self.alone = True
        """No part of a model with a tower, which leaves the logits as they are."""

    def block(self, config: Config, layer: int) -> Module:
        if layer in self.crossed:
            return CrossBlock(config, skipped=not self.sees)
        return Block(config, layer)

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        return ops.to(logits, "fp32") if self.alone else logits


class Mllama(VisionLanguage):
    """``MllamaForConditionalGeneration``."""

    def __init__(self, raw: Config) -> None:
        text = filled(raw.get("text_config") or {}, "mllama_text_model")
        vision = filled(raw.get("vision_config") or {}, "mllama_vision_model")
        language = MllamaText({**text, "tie_word_embeddings": False})
        language.alone = False
        tiles = TiledTower(vision)
        super().__init__(
            language, tiles, tied=False, tower_name="vision_model", text_name="language_model"
        )
        self.language, self.tiles = [language], [tiles]
        projector = Linear(vision["vision_output_dim"], text["hidden_size"], bias=True)
        plant(self, "model.multi_modal_projector", projector)

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence: they take no tokens, and their blocks run."""
        super().show(images, image, checkpointed=checkpointed)
        self.language[0].sees = True
        stack = self.stages[0].stack
        stack.hands_on = True  # the last cross block is the first to have a gradient of the image
        stack.split(lambda _layer: 0)

    def inputs(self, tape: Tape) -> list[Tensor]:
        """Pixel values, and which tiles each token sees."""
        if not self.images:
            return []
        tiles = self.images * self.tiles[0].count
        return [*super().inputs(tape), tape.tensor(TOKENS, tiles, "int64", "tile mask")]

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """The tower and the mask come before the text's embedding."""
        if self.images:
            (pixels,) = self.pixels or self.tower.pixel_values(tape, self.images)
            self.pixels = []
            features = self.tower.forward(pixels, self.images)
            del pixels
            shared.memory = run_linear(self.model.child("multi_modal_projector"), features)
            shared.held.append(features)
            dtype = self.tower.patch.weight.dtype
            shared.mask = self._mask(tape, dtype)
            shared.masks["rows"] = tape.tensor(TOKENS, 1, dtype, "rows that see something")
        images, self.images = self.images, 0
        x = super().enter(tape, shared)
        self.images = images
        return x

    def _mask(self, tape: Tape, dtype: str) -> Tensor:
        """``_prepare_cross_attention_mask``: a number for each token and patch, and its inverse."""
        tower = self.tiles[0]
        rows = TOKENS * (self.images * tower.count * tower.patches)
        repeated = tape.tensor(rows, 1, "int64", "repeated mask")
        inverse = ops.to(tape.tensor(rows, 1, "fp32", "inverse mask"), dtype)
        hidden = tape.tensor(rows, 1, "bool", "mask")
        mask = tape.tensor(rows, 1, dtype, "mask")
        del repeated, hidden
        seen = tape.tensor(rows, 1, "bool", "mask")
        del seen, inverse
        return mask

    def leave(self, x: Tensor, shared: Shared) -> Tensor:
        x = super().leave(x, shared)
        shared.memory = None
        return x


class TiledTower(Tower):
    """``MllamaVisionModel``: tiles by themselves, then all tiles of an image together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wide = wide = config["hidden_size"]
        patch, self.count = config["patch_size"], config["max_num_tiles"]
        self.patches = (config["image_size"] // patch) ** 2 + 1
        self.padded = -(-self.patches // _MULTIPLE) * _MULTIPLE
        self.taken = len(config.get("intermediate_layers_indices") or (3, 7, 15, 23, 30))
        ratios = 1 + sum(self.count // height for height in range(1, self.count + 1))
        weight(self, "class_embedding", wide)
        embed_patches(
            self, "patch_embedding", config["num_channels"], wide, patch, patch, bias=False
        )
        self.image_pixels = self.count * config["num_channels"] * config["image_size"] ** 2
        self.token = "class_embedding"
        weight(self, "gated_positional_embedding.gate", 1)
        weight(self, "gated_positional_embedding.embedding", self.patches, wide)
        tile = "gated_positional_embedding.tile_embedding"
        plant(self, tile, Embedding(ratios, self.count * self.patches * wide))
        for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
            weight(self, f"{name}.gate", 1)
            plant(self, f"{name}.embedding", Embedding(ratios, self.count * wide))
        for name in ("layernorm_pre", "layernorm_post"):
            plant(self, name, LayerNorm(wide))
        self.local = config["num_hidden_layers"]
        for part, count, gates in (
            ("transformer", self.local, ()),
            ("global_transformer", config["num_global_layers"], ("gate_attn", "gate_ffn")),
        ):
            stack_blocks(
                self, f"{part}.layers", count,
                lambda gates=gates: VisionBlock(  # type: ignore[misc]
                    wide, config["intermediate_size"], config["attention_heads"], out="o_proj",
                    norms=("input_layernorm", "post_attention_layernorm"), qkv_bias=False,
                    out_bias=False, act=config["hidden_act"], scales=gates, scale_width=1,
                ),
            )  # fmt: skip

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all patches, those of some blocks beside the last ones."""
        tape, tiles = pixels.tape, BATCH * (images * self.count)
        x = ops.to(pixels, self.patch.weight.dtype)
        x = self.patch.forward(ops.view(x, tiles * (self.patches - 1), self.pixels))
        x = ops.add(x, self._of_tiles("pre_tile_positional_embedding", tape, images))
        x = with_class(x, self.class_token(tape), tiles * self.patches)
        x = self.placed(x, tiles)
        x = self.child("layernorm_pre").forward(x)
        x = ops.pad(x, tiles * self.padded)
        beside = Beside(mask=self._mask(tape, x.dtype, images))
        states = []
        for block in self.in_order[: self.local]:
            block.reach = self.count * self.padded
            x = block.forward(x, beside)
            states.append(x)
        x = self.child("layernorm_post").forward(x)
        x = ops.add(x, self._of_tiles("post_tile_positional_embedding", tape, images))
        returned = []
        for block in self.in_order[self.local :]:
            block.reach = self.count * self.padded
            x = block.forward(x, beside)
            returned.append(x)
        rows = tiles * self.patches
        x = ops.copy(ops.rows_slice(x, rows))
        between = _stacked(states[: self.taken])
        between = ops.copy(ops.rows_slice(between, rows))
        return ops.cat((x, between))

    def placed(self, x: Tensor, rows: Size) -> Tensor:
        """A gated position for each patch, and one for each patch of each tile."""
        tape, own = x.tape, self.child("gated_positional_embedding")
        gate = tape.leaf(own.parameters["gate"])
        closed = ops.scale(ops.unary(gate, "tanh", "output"))
        x = ops.add(x, ops.mul(closed, tape.leaf(own.parameters["embedding"])))
        images = Size(count // self.count for count in rows)
        table = own.children["tile_embedding"].forward(tape, images)
        table = ops.view(table, rows * self.patches, self.wide)
        return ops.add(x, ops.mul(ops.unary(gate, "tanh", "output"), table))

    def _of_tiles(self, name: str, tape: Tape, images: int) -> Tensor:
        """A gated row for each tile."""
        own = self.child(name)
        rows = own.children["embedding"].forward(tape, BATCH * images)
        rows = ops.view(rows, rows.rows * self.count, self.wide)
        return ops.mul(rows, ops.unary(tape.leaf(own.parameters["gate"]), "tanh", "output"))

    def _mask(self, tape: Tape, dtype: str, images: int) -> Tensor:
        """``_prepare_aspect_ratio_attention_mask``: every patch of an image against every other."""
        rows = BATCH * (images * (self.count * self.padded) ** 2)
        product = tape.tensor(rows, 1, tape.env.autocast or dtype, "mask")
        mask = tape.tensor(rows, 1, product.dtype, "mask")
        del product
        return mask


def _stacked(states: list[Tensor]) -> Tensor:
    """``torch.stack`` in a new last dimension: a copy; the way back hands out strided views."""
    first = states[0]
    out = first.tape.tensor(first.rows, first.width * len(states), first.dtype, "stack")
    shape = first.rows, first.width
    wants = [state.requires_grad for state in states]
    ops.record(
        [out], "stack", states,
        lambda grad: tuple(grad.alias(*shape) if wanted else None for wanted in wants),
    )  # fmt: skip
    return out


MODEL_TYPES: dict[str, Any] = {"mllama": Mllama, "mllama_text_model": MllamaText}
