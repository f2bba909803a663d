"""The towers of Gemma 4: of images, which are padded to one number of patches, and of sound.

Source: transformers 5.23.0, models/gemma4/modeling_gemma4.py. The tower of sound is counted.
"""

from __future__ import annotations

from ftplan.memory import fused, ops
from ftplan.memory.families.decoder import Config
from ftplan.memory.families.llama import rotate
from ftplan.memory.families.patches import (
    Beside,
    Conv,
    Tower,
    VisionBlock,
    plant,
    run_linear,
    stack_blocks,
    weight,
)
from ftplan.memory.nn import LayerNorm, Linear, Module
from ftplan.memory.tape import BATCH, ONE, Grads, Size, Tape, Tensor

__all__ = ["SOFT_TOKENS", "ImageTower", "Norm", "sound_tower"]

SOFT_TOKENS = 280
"""Tokens of an image at most: what its patches are padded to (``Gemma4ImageProcessor``)."""


class Norm(Module):
    """RMSNorm in fp32, by a power of the mean square."""

    def __init__(self, width: int, *, scaled: bool = True) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        weight = x.tape.leaf(self.weight) if self.weight else None
        if x.tape.env.kernels.norm:
            return fused.rms_norm(x, weight)
        hidden = ops.to(x, "fp32")
        hidden = ops.mul(hidden, ops.power(ops.shift(ops.mean_square(hidden))))
        if weight is not None:
            hidden = ops.mul(hidden, ops.to(weight, "fp32"))
        return ops.to(hidden, x.dtype)


class Layer(VisionBlock):
    """``Gemma4VisionEncoderLayer``: normed before and after attention and MLP, inputs and outputs
    of linear layers clipped where the config says so."""

    def __init__(self, config: Config) -> None:
        hidden, size = config["hidden_size"], config["head_dim"]
        super().__init__(
            hidden, config["intermediate_size"], config["num_attention_heads"], norm=Norm,
            size=size, kv_count=config["num_key_value_heads"],
            norms=("input_layernorm", "pre_feedforward_layernorm"),
            qkv=("q_proj.linear", "k_proj.linear", "v_proj.linear"), out="o_proj.linear",
            qkv_bias=False, out_bias=False, mlp_bias=False, act=config["hidden_activation"],
            mlp_names=("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
        )  # fmt: skip
        self.clips = bool(config.get("use_clipped_linears"))
        for name in ("q_norm", "k_norm"):
            plant(self, f"self_attn.{name}", Norm(size))
        self.v_norm = Norm(size, scaled=False)
        self.post_attention_layernorm = Norm(hidden)
        self.post_feedforward_layernorm = Norm(hidden)

    def linear(self, path: str, x: Tensor) -> Tensor:
        """``Gemma4ClippableLinear``."""
        if not self.clips:
            return super().linear(path, x)
        return _clipped(super().linear(path, _clipped(x)))

    def forward(self, x: Tensor, beside: Beside) -> Tensor:
        residual = x
        x = self.child(self.norms[0]).forward(x)
        x = self._attention(x, beside)
        x = self.post_attention_layernorm.forward(x)
        x = ops.add(residual, x)
        residual = x
        x = self.child(self.norms[1]).forward(x)
        x = self.mlp_of(x)
        x = self.post_feedforward_layernorm.forward(x)
        return ops.add(residual, x)

    def _attention(self, x: Tensor, beside: Beside) -> Tensor:
        assert beside.rope is not None
        q, k, v = self.attn_paths
        queries = _turned(self._normed("q_norm", self.linear(q, x)), beside.rope)
        keys = _turned(self._normed("k_norm", self.linear(k, x)), beside.rope)
        values = self._by_head(self.v_norm, self.linear(v, x))
        out = self.attended(queries, keys, values, beside.mask)
        return self.linear(self.out_path, out)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return self._by_head(self.child(f"self_attn.{name}"), x)

    def _by_head(self, norm: Module, x: Tensor) -> Tensor:
        size = self.heads.size
        out = norm.forward(ops.view(x, x.rows * (x.width // size), size))
        return ops.view(out, x.rows, x.width)


def _clipped(x: Tensor) -> Tensor:
    """``clamp`` between two tensors keeps its input; the way back compares it with both."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "clamp")
    saved = x

    def apply(grad: Tensor) -> Grads:
        kept = saved
        within = [grad.tape.tensor(kept.rows, kept.width, "bool", "within") for _ in range(2)]
        made = grad.tape.tensor(kept.rows, kept.width, kept.dtype, "gradient")
        del within
        return (made,)

    ops.record([out], "clamp", [x], apply)
    return out


def _turned(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """``apply_multidimensional_rope``: columns and rows each turn half of a head."""
    half = x.width // 2
    parts = ops.split(x, [half, half])
    return ops.cat([rotate(part, *rope) for part in parts])


class ImageTower(Tower):
    """``Gemma4VisionModel``: all images padded to one number of patches, averaged in squares."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, patch = config["hidden_size"], config["patch_size"]
        self.pool, self.standardizes = config["pooling_kernel_size"] ** 2, config["standardize"]
        self.patches, self.pixels = SOFT_TOKENS * self.pool, 3 * patch**2
        self.tokens = SOFT_TOKENS
        """Tokens of an image."""
        self.hidden, self.positions = hidden, config["position_embedding_size"]
        weight(self, "patch_embedder.position_embedding_table", 2, self.positions, hidden)
        plant(self, "patch_embedder.input_proj", Linear(self.pixels, hidden))
        stack_blocks(self, "encoder.layers", config["num_hidden_layers"], lambda: Layer(config))

    def pixel_values(self, tape: Tape, images: int) -> list[Tensor]:
        """Pixels, and the column and row of each patch."""
        positions = tape.tensor(BATCH * (images * self.patches), 2, "int64", "patch positions")
        return [*super().pixel_values(tape, images), positions]

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all tokens: (sequences x images x tokens) x hidden."""
        rows = BATCH * (images * self.patches)
        padding = pixels.tape.tensor(rows, 1, "bool", "padding")
        embedded = x = self._embedded(pixels, padding)
        beside = self._beside(x, images)
        for block in self.in_order:
            block.reach = self.patches
            x = self._run(block, x, beside)
        del beside
        encoded = x
        x = self._pooled(x, padding, images)
        x = ops.gather(x, BATCH * (images * self.tokens))
        if self.standardizes:
            x = ops.mul(ops.shift(x), x.tape.tensor(ONE, x.width, "fp32", "scale"))
        x = ops.to(x, embedded.dtype)
        del encoded
        return x

    def _embedded(self, pixels: Tensor, padding: Tensor) -> Tensor:
        linear = self.child("patch_embedder.input_proj")
        assert isinstance(linear, Linear)
        pixels = ops.scale(ops.shift(pixels))
        if linear.weight.dtype in ("fp32", "bf16", "fp16"):  # not where it is quantised
            pixels = ops.to(pixels, linear.weight.dtype)
        x = run_linear(linear, pixels)
        return ops.add(x, self._positions(x.tape, x.rows, padding))

    def _positions(self, tape: Tape, rows: Size, padding: Tensor) -> Tensor:
        """A row of one table for the column of each patch, and of another for its row."""
        leaf = tape.leaf(self.child("patch_embedder").parameters["position_embedding_table"])
        both = leaf.alias(ONE * (2 * self.positions), self.hidden)
        both.requires_grad, both.node = leaf.requires_grad, leaf.node
        table = ONE * self.positions
        across = ops.embedding(tape, ops.rows_slice(both, table), rows)
        down = ops.embedding(tape, ops.rows_slice(both, table), rows)
        return ops.masked_fill(ops.add(across, down), padding)

    def _beside(self, x: Tensor, images: int) -> Beside:
        """Cosines and sines of each patch; a mask that hides those of padding."""
        tape, size = x.tape, self.in_order[0].heads.size
        rope = (
            tape.tensor(x.rows, size, x.dtype, "rope"),
            tape.tensor(x.rows, size, x.dtype, "rope"),
        )
        if self.tokens == SOFT_TOKENS:
            return Beside(rope)
        if tape.env.attention == "flash":
            return Beside(rope, tape.tensor(x.rows, 1, "bool", "mask"))
        pairs = BATCH * (images * self.patches**2)
        mask = tape.tensor(pairs, 1, "bool", "mask")
        if tape.env.attention == "eager":
            mask = tape.tensor(pairs, 1, x.dtype, "mask")
        return Beside(rope, mask)

    def _pooled(self, x: Tensor, padding: Tensor, images: int) -> Tensor:
        """``Gemma4VisionPooler``: squares of patches are averaged by a product, in fp32."""
        tape, dtype, rows = x.tape, x.dtype, BATCH * (images * SOFT_TOKENS)
        x = ops.masked_fill(x, padding)
        which = tape.tensor(x.rows, SOFT_TOKENS, "int64", "which square")
        ones = tape.tensor(x.rows, SOFT_TOKENS, "fp32", "which square")
        del which
        weights = ops.scale(ones)
        del ones
        pooled = ops.matmul(
            weights, ops.to(x, "fp32"), rows, x.width, "pooled", inner=self.patches
        )  # fmt: skip
        none = tape.tensor(x.rows, SOFT_TOKENS, "bool", "no weight")
        del none
        x = ops.to(pooled, dtype)
        del pooled, weights
        return ops.scale(ops.to(x, "fp32"))


def sound_tower(config: Config) -> Module:
    """``Gemma4AudioModel``: names and shapes."""
    tower, hidden = Module(), config["hidden_size"]
    counts = config.get("subsampling_conv_channels") or (128, 32)
    channels = 1
    for number, count in enumerate(counts):
        path = f"subsample_conv_projection.layer{number}"
        plant(tower, f"{path}.conv", Conv(channels, count, 3, 3, bias=False))
        plant(tower, f"{path}.norm", LayerNorm(count, bias=False))
        channels = count
    left = counts[0] // 4 * channels
    plant(tower, "subsample_conv_projection.input_proj_linear", Linear(left, hidden))
    for layer in range(config["num_hidden_layers"]):
        root = plant(tower, f"layers.{layer}", Module())
        for name in ("feed_forward1", "feed_forward2"):
            plant(root, f"{name}.ffw_layer_1.linear", Linear(hidden, 4 * hidden))
            plant(root, f"{name}.ffw_layer_2.linear", Linear(4 * hidden, hidden))
            plant(root, f"{name}.pre_layer_norm", Norm(hidden))
            plant(root, f"{name}.post_layer_norm", Norm(hidden))
        weight(root, "self_attn.per_dim_scale", hidden // config["num_attention_heads"])
        for name in ("q_proj", "k_proj", "v_proj", "post"):
            plant(root, f"self_attn.{name}.linear", Linear(hidden, hidden))
        plant(root, "self_attn.relative_k_proj", Linear(hidden, hidden))
        plant(root, "lconv1d.linear_start.linear", Linear(hidden, 2 * hidden))
        plant(root, "lconv1d.linear_end.linear", Linear(hidden, hidden))
        weight(root, "lconv1d.depthwise_conv1d.weight", hidden, 1, config["conv_kernel_size"])
        for name in ("lconv1d.pre_layer_norm", "lconv1d.conv_norm"):
            plant(root, name, Norm(hidden))
        for name in ("norm_pre_attn", "norm_post_attn", "norm_out"):
            plant(root, name, Norm(hidden))
    plant(tower, "output_proj", Linear(hidden, config["output_proj_dims"], bias=True))
    return tower
