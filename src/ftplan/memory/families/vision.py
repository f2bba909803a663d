"""Vision-language models: a tower of patches, a projector, and a language model of another family.

The language model's forward is that of its own family; image tokens are part of the sequence
length. The tower runs before it, where :attr:`VisionLanguage.images` asks for it: in full where it
is trained, for a moment where it is frozen.
Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import families, ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.families.decoder import (
    MLP,
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
)
from ftplan.memory.families.mixture import act, qwen_kind, qwen_mixture
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    RMSNorm,
    Shared,
    Stage,
    activation,
)
from ftplan.memory.tape import BATCH, ONE, SCORES, TOKENS, Grads, Size, Tape, Tensor

__all__ = ["MODEL_TYPES", "VisionLanguage"]


def plant(root: Module, path: str, module: Module) -> Module:
    """Put ``module`` at a dotted path, making the modules on the way."""
    *above, last = path.split(".")
    for name in above:
        if name not in root.children:
            setattr(root, name, Module())
        root = root.children[name]
    setattr(root, last, module)
    return module


def weight(root: Module, path: str, *shape: int) -> None:
    """A bare weight at a dotted path."""
    where, _, name = path.rpartition(".")
    if where and where not in _paths(root):
        plant(root, where, Module())
    (root.child(where) if where else root).parameter(name, *shape)


def _paths(root: Module) -> set[str]:
    return {path for path, _ in root.named_modules()}


class VisionBlock(Module):
    """A pre-norm transformer layer over patches. ``names`` of norms, attention and MLP parts."""

    def __init__(
        self, hidden: int, inner: int, heads: int, *, norm: type[LayerNorm | RMSNorm] = LayerNorm,
        norms: tuple[str, str] = ("layer_norm1", "layer_norm2"), attn: str = "self_attn",
        fused: bool = False, qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
        out: str = "out_proj", qkv_bias: bool = True, out_bias: bool = True, mlp: str = "mlp",
        mlp_names: tuple[str, ...] = ("fc1", "fc2"), mlp_bias: bool = True, act: str = "gelu",
        scales: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        size = hidden // heads
        self.turns = False
        """Queries and keys are rotated, in fp32 (Qwen-VL)."""
        self.pieces = False
        """Images or windows are attended to one by one, and joined again."""
        self.reach = 0
        """Patches that a patch sees, where the scores are kept."""
        self.heads = Heads(count=heads, kv_count=heads, size=size, value_size=size, causal=False)
        self.norms, self.act, self.fused, self.scales = norms, act, fused, scales
        for name in norms:
            setattr(self, name, norm(hidden))
        self.attn_paths = [f"{attn}.qkv"] if fused else [f"{attn}.{name}" for name in qkv]
        for path in self.attn_paths:
            plant(self, path, Linear(hidden, hidden * (3 if fused else 1), bias=qkv_bias))
        self.out_path = f"{attn}.{out}"
        plant(self, self.out_path, Linear(hidden, hidden, bias=out_bias))
        self.mlp_paths = [f"{mlp}.{name}" for name in mlp_names]
        for path in self.mlp_paths[:-1]:
            plant(self, path, Linear(hidden, inner, bias=mlp_bias))
        plant(self, self.mlp_paths[-1], Linear(inner, hidden, bias=mlp_bias))
        for name in scales:
            self.parameter(name, hidden)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among the patches of an image, or of one window of it."""
        heads = self.heads
        if q.tape.env.attention == "eager":
            width = heads.count * self.reach
            scores = ops.matmul(q, k, q.rows, width, "scores", inner=heads.size)
            weights = ops.scale(scores)
            del scores
            weights = ops.to(ops.softmax(weights, "fp32"), q.dtype)
            width = heads.count * heads.size
            out = ops.copy(ops.matmul(weights, v, q.rows, width, "attention", inner=self.reach))
        else:
            out = attend(q, k, v, heads, reach=self.reach)
        return ops.copy(out, "windows joined") if self.pieces else out

    def linear(self, path: str, x: Tensor) -> Tensor:
        """The linear at a path."""
        out: Tensor = self.child(path).forward(x)
        return out

    def forward(self, x: Tensor, _shared: Shared | None = None) -> Tensor:
        residual = x
        x = self.child(self.norms[0]).forward(x)
        if self.fused:
            qkv = self.linear(self.attn_paths[0], x)
            q, k, v = ops.split(qkv, [qkv.width // 3] * 3)
            del qkv
        else:
            q, k, v = (self.linear(path, x) for path in self.attn_paths)
        if self.turns:
            q, k = _turned(q), _turned(k)
        out = self.attended(q, k, v)
        del q, k, v
        x = self.linear(self.out_path, out)
        del out
        x = ops.add(residual, x)
        residual = x
        x = self.child(self.norms[1]).forward(x)
        *first, last = self.mlp_paths
        if len(first) == 2:
            x = ops.mul(activation(self.linear(first[0], x), self.act), self.linear(first[1], x))
        else:
            x = activation(self.linear(first[0], x), self.act)
        return ops.add(residual, self.linear(last, x))


def _turned(x: Tensor) -> Tensor:
    """``apply_rotary_pos_emb_vision``: up to fp32, rotated, and back."""
    dtype = x.dtype
    x = ops.to(x, "fp32")
    half = ops.cat((ops.neg(ops.part(x, x.width // 2)), ops.part(x, x.width // 2)))
    return ops.to(ops.add(ops.scale(x), ops.scale(half)), dtype)


class Conv(Module):
    """A convolution whose windows do not overlap: a linear layer over each patch.

    No ``Linear``: adapters and quantisation pass it over.
    """

    def __init__(self, channels: int, out: int, *window: int, bias: bool) -> None:
        super().__init__()
        area = channels
        for extent in window:
            area *= extent
        self.in_features, self.out_features = area, out
        self.weight = self.parameter("weight", out, channels, *window)
        self.bias = self.parameter("bias", out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        flat = tape.leaf(self.weight)
        matrix = flat.alias(Size((self.out_features, 0, 0, 0, 0, 0, 0)), self.in_features)
        matrix.requires_grad, matrix.node = flat.requires_grad, flat.node
        x, matrix = ops.autocast(x), ops.autocast(matrix)
        inputs = [x, matrix]
        if self.bias is not None:
            inputs.append(ops.autocast(tape.leaf(self.bias)))
        rows, area, width = x.rows, self.in_features, self.out_features
        tape.multiply(rows, area, width)
        out = tape.tensor(rows, width, x.dtype, "convolution")
        wants = x.requires_grad + matrix.requires_grad
        saved = (x, matrix)  # one backward function for all of them: it keeps both in any case
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in inputs]

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            grad.tape.multiply(rows, area, width, times=wants)
            return tuple(make(grad) for make in makers)

        ops.record([out], "convolution", inputs, apply)
        return out


class Tower(Module):
    """Patch embedding, blocks, and what follows them. ``depth`` blocks share a list's path."""

    def __init__(self) -> None:
        super().__init__()
        self.in_order: list[VisionBlock] = []
        self.patch = Conv(1, 1, 1, bias=False)
        del self.children["patch"]
        self.before: list[Module] = []
        self.patches = 0
        """Patches of one image, where the config says."""
        self.pixels = 0
        """Numbers of one patch."""
        self.classed = False
        """A token of its own stands before the patches of each image."""
        self.layer: int | None = None
        """The hidden states that are used (-1: the last block's), where all are kept for it."""
        self.checkpointed = False
        """Blocks are recomputed in backward."""
        self.after: list[Module] = []
        self.merge = 1
        """Patches that become one token."""

    def pixel_values(self, tape: Tape, images: int) -> Tensor:
        """What the caller passes in, in fp32."""
        rows = BATCH * (images * (self.patches - self.classed))
        return tape.tensor(rows, self.pixels, "fp32", "pixel values")

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all patches: (sequences x images x patches) x hidden."""
        rows = BATCH * (images * self.patches)
        x = self.patch.forward(ops.to(pixels, self.patch.weight.dtype))
        if self.classed:
            x = _with_class(x, rows)
        if not any(block.turns for block in self.in_order):
            x = ops.shift(x, "position embedding")
        for norm in self.before:
            x = norm.forward(x)
        states = [x]
        for block in self.in_order:
            block.reach = block.reach or self.patches
            x = self._run(block, x)
            if self.layer is not None:
                states.append(x)
        for norm in self.after:
            x = norm.forward(x)
        return x if self.layer is None else states[self.layer]

    def _run(self, block: VisionBlock, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return block.forward(x)
        trains = any(parameter.trainable for _, parameter in block.named_parameters())
        return checkpoint(block.forward, x, trains=trains)


def _with_class(x: Tensor, rows: Size) -> Tensor:
    """A row for each image before its patches: a copy."""
    out = x.tape.tensor(rows, x.width, x.dtype, "cat")
    ops.record([out], "cat", [x], lambda grad: (grad,))
    return out


def _patch(tower: Tower, path: str, channels: int, out: int, *window: int, bias: bool) -> None:
    tower.patch = Conv(channels, out, *window, bias=bias)
    del tower.children["patch"]
    plant(tower, path, tower.patch)
    tower.pixels = tower.patch.in_features


def _stack(tower: Tower, path: str, depth: int, build: Any) -> None:
    for layer in range(depth):
        block = build()
        tower.in_order.append(block)
        plant(tower, f"{path}.{layer}", block)


def _sub(config: Config, key: str, model_type: str) -> dict[str, Any]:
    raw = config.get(key) or {}
    return filled(raw, raw.get("model_type") or model_type)


def clip(config: Mapping[str, Any]) -> Tower:
    """``CLIPVisionModel``."""
    tower, hidden = Tower(), config["hidden_size"]
    patch, size = config["patch_size"], config["image_size"]
    weight(tower, "embeddings.class_embedding", hidden)
    _patch(
        tower, "embeddings.patch_embedding", config.get("num_channels", 3), hidden, patch, patch,
        bias=False,
    )  # fmt: skip
    tower.patches, tower.classed = (size // patch) ** 2 + 1, True
    plant(tower, "embeddings.position_embedding", Embedding(tower.patches, hidden))
    tower.before = [plant(tower, "pre_layrnorm", LayerNorm(hidden))]
    _stack(
        tower, "encoder.layers", config["num_hidden_layers"],
        lambda: VisionBlock(
            hidden, config["intermediate_size"], config["num_attention_heads"], act=act(config)
        ),
    )  # fmt: skip
    plant(tower, "post_layernorm", LayerNorm(hidden))
    return tower


def siglip(config: Mapping[str, Any], *, pooled: bool = True) -> Tower:
    """``SiglipVisionModel`` and, without its pooling head, Idefics 3's."""
    tower, hidden, inner = Tower(), config["hidden_size"], config["intermediate_size"]
    patch, size = config["patch_size"], config["image_size"]
    _patch(
        tower, "embeddings.patch_embedding", config.get("num_channels", 3), hidden, patch, patch,
        bias=True,
    )  # fmt: skip
    tower.patches = (size // patch) ** 2
    plant(tower, "embeddings.position_embedding", Embedding(tower.patches, hidden))
    _stack(
        tower, "encoder.layers", config["num_hidden_layers"],
        lambda: VisionBlock(hidden, inner, config["num_attention_heads"], act=act(config)),
    )  # fmt: skip
    tower.after = [plant(tower, "post_layernorm", LayerNorm(hidden))]
    if pooled and config.get("vision_use_head", True):
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
    _patch(tower, "patch_conv", config.get("num_channels", 3), hidden, patch, patch, bias=False)
    tower.before = [plant(tower, "ln_pre", RMSNorm(hidden))]
    tower.patches = (config["image_size"] // patch) ** 2
    _stack(
        tower, "transformer.layers", config["num_hidden_layers"],
        lambda: VisionBlock(
            hidden, config["intermediate_size"], config["num_attention_heads"], norm=RMSNorm,
            norms=("attention_norm", "ffn_norm"), attn="attention", out="o_proj", qkv_bias=False,
            out_bias=False, mlp="feed_forward", mlp_names=("gate_proj", "up_proj", "down_proj"),
            mlp_bias=False, act=act(config),
        ),
    )  # fmt: skip
    return tower


def qwen_visual(config: Mapping[str, Any], kind: str) -> Tower:
    """The towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5."""
    tower = Tower()
    new, gated = kind.startswith("qwen3"), kind == "qwen2_5_vl"
    hidden = config["embed_dim"] if kind == "qwen2_vl" else config["hidden_size"]
    out = config["hidden_size"] if kind == "qwen2_vl" else config["out_hidden_size"]
    inner = int(hidden * config["mlp_ratio"]) if kind == "qwen2_vl" else config["intermediate_size"]
    patch, merge = config["patch_size"], config["spatial_merge_size"] ** 2
    channels = config.get("in_channels") or config.get("in_chans") or 3
    _patch(
        tower, "patch_embed.proj", channels, hidden, config["temporal_patch_size"], patch, patch,
        bias=new,
    )  # fmt: skip
    if new:
        plant(tower, "pos_embed", Embedding(config["num_position_embeddings"], hidden))
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    _stack(
        tower, "blocks", config["depth"],
        lambda: VisionBlock(
            hidden, inner, config["num_heads"], norm=RMSNorm if gated else LayerNorm,
            norms=("norm1", "norm2"), attn="attn", fused=True, out="proj", act=act(config),
            mlp_names=("linear_fc1", "linear_fc2") if new else names,
        ),
    )  # fmt: skip
    for block in tower.in_order:
        block.turns = block.pieces = True
        if gated:  # all but a few blocks see one window
            block.reach = (int(config.get("window_size") or 112) // patch) ** 2
    tower.merge = merge
    wide = hidden * merge
    if not new:
        plant(tower, "merger.ln_q", RMSNorm(hidden) if gated else LayerNorm(hidden))
        plant(tower, "merger.mlp.0", Linear(wide, wide, bias=True))
        plant(tower, "merger.mlp.2", Linear(wide, out, bias=True))
        return tower
    _merger(tower, "merger", hidden, wide, out)
    for number, _ in enumerate(config.get("deepstack_visual_indexes") or ()):
        _merger(tower, f"deepstack_merger_list.{number}", wide, wide, out)
    return tower


def _merger(tower: Tower, path: str, normed: int, wide: int, out: int) -> None:
    plant(tower, f"{path}.norm", LayerNorm(normed))
    plant(tower, f"{path}.linear_fc1", Linear(wide, wide, bias=True))
    plant(tower, f"{path}.linear_fc2", Linear(wide, out, bias=True))


def intern(config: Mapping[str, Any]) -> Tower:
    """``InternVLVisionModel``."""
    tower, hidden = Tower(), config["hidden_size"]
    patch, size = (
        value if isinstance(value, int) else value[0]
        for value in (config.get("patch_size", 14), config.get("image_size", 448))
    )
    tower.patches, tower.classed = (size // patch) ** 2 + 1, True
    weight(tower, "embeddings.cls_token", 1, 1, hidden)
    if config.get("use_mask_token"):
        weight(tower, "embeddings.mask_token", 1, 1, hidden)
    if config.get("use_absolute_position_embeddings", True):
        weight(tower, "embeddings.position_embeddings", 1, tower.patches, hidden)
    _patch(
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

    _stack(tower, "encoder.layer", config["num_hidden_layers"], block)
    if not config.get("use_mean_pooling", True):
        plant(tower, "layernorm", LayerNorm(hidden))
    return tower


def vision_tower(config: Config) -> Tower:
    """The tower by the ``model_type`` of its config."""
    kind = config["model_type"]
    if kind == "clip_vision_model":
        return clip(config)
    if kind == "siglip_vision_model":
        return siglip(config)
    if kind in ("idefics3_vision", "smolvlm_vision"):
        return siglip(config, pooled=False)
    if kind == "pixtral":
        return pixtral(config)
    if kind == "internvl_vision":
        return intern(config)
    return qwen_visual(config, kind.removesuffix("_vision"))


class VisionLanguage(Network):
    """A tower, a projector and a language model, under the names of one wrapper class."""

    def __init__(self, text: Network, tower: Tower, *, tied: bool, tower_name: str, text_name: str):
        super().__init__()
        self.text = text
        inner = text.children["model"]
        del self.children["text"]
        self.model = Module()
        setattr(self.model, tower_name, tower)
        self.tower = tower
        del self.children["tower"]
        setattr(self.model, text_name, inner)
        self.text_path = f"model.{text_name}"
        self.lm_head = text.children["lm_head"]
        stack = text.stages[0].stack
        stack.name = stack.name.replace("model", self.text_path, 1)
        self.embedding_names = tuple(
            name.replace("model", self.text_path, 1) for name in text.embedding_names
        )
        if tied:
            self.tie("lm_head.weight", f"{self.embedding_names[0]}.weight")
        self.stages = [Stage(stack, self.enter, text.stages[0].leave)]
        self.images = 0
        """Images per sequence: the tower runs where there is at least one."""
        self.pixels: list[Tensor] = []
        """The caller's pixel values, until the tower takes them."""
        self.image_tokens = 0
        """Tokens that an image becomes, where the config says."""
        self.shows = True
        """The tower's forward is modelled."""
        self.bidirectional = False
        """Image tokens see each other: a mask of its own for every sequence."""

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed the text; put projected image features in the places of image tokens."""
        x = self.text.stages[0].enter(tape, shared)
        if not self.images:
            return x
        if self.bidirectional:
            for name in shared.masks:
                shared.masks[name] = self._image_mask(tape, x.dtype)
        pixels = self.pixels.pop() if self.pixels else self.tower.pixel_values(tape, self.images)
        features = self.project(self.tower.forward(pixels, self.images))
        del pixels
        features = ops.to(features, x.dtype)
        return _scattered(x, features)

    def show(self, images: int, tokens: int, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence, of ``tokens`` each where the config leaves it open."""
        if not self.shows:
            super().show(images, tokens, checkpointed=checkpointed)
        self.images = images
        self.tower.checkpointed = checkpointed
        if not self.tower.patches:
            self.tower.patches = tokens * self.tower.merge
            self.image_tokens = tokens

    def inputs(self, tape: Tape) -> list[Tensor]:
        """Pixel values, which the caller holds."""
        if not self.images:
            return []
        pixels = self.tower.pixel_values(tape, self.images)
        self.pixels = [pixels]
        return [pixels]

    def further_inputs(self) -> list[Module]:
        return [self.tower.patch] if self.images else []

    def _image_mask(self, tape: Tape, dtype: str) -> Tensor | None:
        if tape.env.attention == "flash":
            return None
        return tape.tensor(SCORES, 1, dtype if tape.env.attention == "eager" else "bool", "mask")

    def project(self, x: Tensor) -> Tensor:
        """From patches to the language model's width."""
        children = self.model.children
        projector = children.get("multi_modal_projector")
        if "merger" in self.tower.children:
            return _merged(self.tower.child("merger"), x, self.tower.merge)
        if projector is None:  # Idefics 3: patches side by side, one linear layer
            linear = self.model.child("connector.modality_projection.proj")
            return _linear(linear, ops.copy(_grouped(x, linear)))
        if "linear" in projector.children:
            return _linear(projector.child("linear"), x)
        if "mm_soft_emb_norm" in projector.children:
            rows = BATCH * (self.images * self.image_tokens)
            return _pooled(projector, x, rows)
        if self.tower.classed:
            rows = BATCH * (self.images * (self.tower.patches - 1))
            x = ops.copy(ops.rows_slice(x, rows))
        if "layer_norm" in projector.children:  # InternVL: neighbours side by side
            norm = projector.child("layer_norm")
            assert isinstance(norm, LayerNorm)
            assert norm.weight is not None
            times = norm.weight.shape[0] // x.width
            x = norm.forward(ops.copy(ops.view(x, _divided(x.rows, times), x.width * times)))
        if "norm" in projector.children:  # Mistral 3
            x = projector.child("norm").forward(x)
            linear = projector.child("patch_merger.merging_layer")
            x = _linear(linear, ops.copy(_grouped(x, linear)))
        linear_1, linear_2 = projector.child("linear_1"), projector.child("linear_2")
        return _linear(linear_2, activation(_linear(linear_1, x), "gelu"))

    def head(self, x: Tensor) -> Tensor:
        return self.text.head(x)


def _linear(linear: Module, x: Tensor) -> Tensor:
    out: Tensor = linear.forward(x)
    return out


def _divided(rows: Size, times: int) -> Size:
    return Size(count // times for count in rows)


def _grouped(x: Tensor, linear: Module) -> Tensor:
    """Neighbouring patches side by side, as wide as the linear layer takes them."""
    weight = getattr(linear, "in_features", x.width)
    times = max(1, weight // x.width)
    return ops.view(x, _divided(x.rows, times), x.width * times)


def _merged(merger: Module, x: Tensor, merge: int) -> Tensor:
    """``PatchMerger``: normed, neighbours side by side, two linear layers, put back in order."""
    old = "ln_q" in merger.children
    x = merger.child("ln_q" if old else "norm").forward(x)
    x = ops.view(x, _divided(x.rows, merge), x.width * merge)
    first, second = ("mlp.0", "mlp.2") if old else ("linear_fc1", "linear_fc2")
    x = _linear(merger.child(second), activation(_linear(merger.child(first), x), "gelu"))
    return ops.gather(x) if old else x


def _pooled(projector: Module, x: Tensor, rows: Size) -> Tensor:
    """``Gemma3MultiModalProjector``: averaged over squares of patches, normed, multiplied."""
    x = ops.copy(x, "contiguous")
    out = x.tape.tensor(rows, x.width, x.dtype, "avg_pool2d")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = x

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "avg_pool2d", [x], apply)
    del x
    out = projector.child("mm_soft_emb_norm").forward(out)
    weight = out.tape.leaf(projector.parameters["mm_input_projection_weight"])
    turned = weight.alias(ONE * weight.width, weight.rows[0])
    turned.requires_grad, turned.node = weight.requires_grad, weight.node
    return ops.linear(ops.copy(out, "contiguous"), turned)


def _scattered(x: Tensor, features: Tensor) -> Tensor:
    """``masked_scatter``: a copy of the embeddings; keeps the mask."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "image features in place")
    mask = x.tape.tensor(TOKENS, 1, "bool", "image mask")
    make_x = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    shape = (features.rows, features.width, features.dtype)
    wants = features.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = mask
        return make_x(grad), grad.tape.tensor(*shape, "gradient") if wants else None

    ops.record([out], "masked_scatter", [x, features], apply)
    return out


def _text(config: Config, default: str) -> dict[str, Any]:
    text = config.get("text_config")
    if not text:  # configs from before the text had a config of its own
        text = {
            key: value for key, value in config.items()
            if key not in ("model_type", "vision_config", "architectures")
        }  # fmt: skip
    return {**text, "model_type": text.get("model_type") or default}


def _text_network(text: Mapping[str, Any]) -> Network:
    kind = text["model_type"]
    if kind in QWEN_TEXT:
        return qwen_text(text)
    return families.build(text)


QWEN_TEXT = {
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen2_vl",
    "qwen2_5_vl",
}  # fmt: skip


def qwen_text(raw: Mapping[str, Any]) -> Network:
    """The text part of Qwen-VL: positions in three directions, a table for each sequence."""
    kind = raw["model_type"]
    kind = kind if kind.endswith("_text") else f"{kind}_text"
    config = filled(raw, kind)
    new = kind.startswith("qwen3")
    mixed = kind == "qwen3_vl_moe_text"
    windowed = not new and config.get("use_sliding_window")
    types = list(config.get("layer_types") or ()) or [
        "sliding_attention"
        if windowed and layer >= config["max_window_layers"]
        else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    if new:
        types = [""] * config["num_hidden_layers"]

    def block(config: Config, layer: int) -> Module:
        attention = (
            Attention(config, qk_norm="head")
            if new
            else Attention(config, bias=True, out_bias=False, mask=types[layer])
        )
        if mixed and qwen_kind(config, layer):
            return Block(config, attention, qwen_mixture(config))
        mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
        return Block(config, attention, mlp)

    windows = {
        name: config.get("sliding_window") if name == "sliding_attention" else None
        for name in dict.fromkeys(types)
    }
    if mixed:
        config.setdefault("norm_topk_prob", True)
        config.pop("shared_expert_intermediate_size", None)
    return Decoder(
        {**config, "tie_word_embeddings": False}, block,
        kind=lambda layer: (types[layer], mixed and qwen_kind(config, layer)),
        ropes={"": Rope(width=head_size(config), per_sequence=True)}, windows=windows,
    )  # fmt: skip


_WRAPPERS: dict[str, tuple[str, str, str, str]] = {
    # wrapper: (text default, vision default, tower's name, language model's name)
    "llava": ("llama", "clip_vision_model", "vision_tower", "language_model"),
    "llava_next": ("llama", "clip_vision_model", "vision_tower", "language_model"),
    "mistral3": ("mistral", "pixtral", "vision_tower", "language_model"),
    "gemma3": ("gemma3_text", "siglip_vision_model", "vision_tower", "language_model"),
    "paligemma": ("gemma", "siglip_vision_model", "vision_tower", "language_model"),
    "internvl": ("qwen2", "internvl_vision", "vision_tower", "language_model"),
    "idefics3": ("llama", "idefics3_vision", "vision_model", "text_model"),
    "smolvlm": ("llama", "smolvlm_vision", "vision_model", "text_model"),
    "qwen2_vl": ("qwen2_vl_text", "qwen2_vl_vision", "visual", "language_model"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "qwen2_5_vl_vision", "visual", "language_model"),
    "qwen3_vl": ("qwen3_vl_text", "qwen3_vl_vision", "visual", "language_model"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision", "visual", "language_model"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe_vision", "visual", "language_model"),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", "qwen3_vl_moe_vision", "visual", "language_model"),
}
_SHOWN = ("llava", "gemma3", "paligemma", "internvl", "qwen2_vl", "qwen2_5_vl")
"""Wrappers whose tower is run; the others' weights are counted."""
_TEXT_TIES = ("llava", "qwen2_vl", "qwen2_5_vl", "glm4v")


def vision_language(raw: Config) -> Network:
    """A wrapper by its ``model_type``."""
    config = filled(raw)
    kind = config["model_type"]
    text_default, vision_default, tower_name, text_name = _WRAPPERS[kind]
    text = _text(raw, text_default)
    vision = _sub(config, "vision_config", vision_default)
    tied = bool(config.get("tie_word_embeddings"))
    if kind in _TEXT_TIES:
        tied = tied or bool(text.get("tie_word_embeddings"))
    network = VisionLanguage(
        _text_network({**text, "tie_word_embeddings": False}), vision_tower(vision), tied=tied,
        tower_name=tower_name, text_name=text_name,
    )  # fmt: skip
    network.bidirectional = kind in ("gemma3", "paligemma")
    network.shows = kind in _SHOWN and vision["model_type"] != "pixtral"
    network.image_tokens = _image_tokens(config, network.tower)
    if kind in ("llava", "llava_next"):
        layer = config.get("vision_feature_layer", -2)
        network.tower.layer = layer if isinstance(layer, int) else layer[-1]
    _projector(network.model, config, text, vision)
    return network


def _image_tokens(config: Config, tower: Tower) -> int:
    """Tokens of one image (of one crop of it, where the processor cuts it up); 0: any number."""
    kind, patches = config["model_type"], tower.patches - tower.classed
    if kind == "gemma3":
        return int(config.get("mm_tokens_per_image") or 256)
    if kind in ("idefics3", "smolvlm"):
        return int(patches // config.get("scale_factor", 2) ** 2)
    if kind == "internvl":
        return int(patches * config.get("downsample_ratio", 0.5) ** 2)
    if kind == "mistral3":
        tower.patches, tower.merge = 0, config["spatial_merge_size"] ** 2
        return 0
    return patches if tower.patches else 0


def _projector(model: Module, config: Config, text: Config, vision: Config) -> None:
    kind, wide = config["model_type"], filled(text)["hidden_size"]
    narrow = vision["hidden_size"]
    if kind in ("llava", "llava_next"):
        layers = config.get("vision_feature_layer", -2)
        count = 1 if isinstance(layers, int) else len(layers)
        bias = bool(config.get("multimodal_projector_bias", True))
        plant(model, "multi_modal_projector.linear_1", Linear(narrow * count, wide, bias=bias))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=bias))
        if kind == "llava_next":
            model.parameter("image_newline", wide)
    elif kind == "mistral3":
        bias, merge = bool(config.get("multimodal_projector_bias")), config["spatial_merge_size"]
        plant(model, "multi_modal_projector.norm", RMSNorm(narrow))
        plant(
            model, "multi_modal_projector.patch_merger.merging_layer",
            Linear(narrow * merge**2, narrow),
        )  # fmt: skip
        plant(model, "multi_modal_projector.linear_1", Linear(narrow, wide, bias=bias))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=bias))
    elif kind == "gemma3":
        weight(model, "multi_modal_projector.mm_input_projection_weight", narrow, wide)
        plant(model, "multi_modal_projector.mm_soft_emb_norm", RMSNorm(narrow, offset=True))
    elif kind == "paligemma":
        projected = config.get("projection_dim") or vision.get("projection_dim") or wide
        plant(model, "multi_modal_projector.linear", Linear(narrow, projected, bias=True))
    elif kind == "internvl":
        merged = int(narrow * (1 / config.get("downsample_ratio", 0.5)) ** 2)
        plant(model, "multi_modal_projector.layer_norm", LayerNorm(merged))
        plant(model, "multi_modal_projector.linear_1", Linear(merged, wide, bias=True))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=True))
    elif kind in ("idefics3", "smolvlm"):
        scale = config.get("scale_factor", 2) ** 2
        plant(model, "connector.modality_projection.proj", Linear(narrow * scale, wide))


class Llama4(Network):
    """``Llama4ForConditionalGeneration``: a whole causal model beside the tower.

    The tower's weights are counted; its forward is not modelled.
    """

    def __init__(self, raw: Config) -> None:
        super().__init__()
        config = filled(raw)
        text = families.build(_text(raw, "llama4_text"))
        vision = _sub(config, "vision_config", "llama4_vision_model")
        self.vision_model = llama4_tower(vision)
        wide = filled(_text(raw, "llama4_text"))["hidden_size"]
        plant(
            self, "multi_modal_projector.linear_1",
            Linear(vision["vision_output_dim"], wide),
        )  # fmt: skip
        plant(self, "language_model.model", text.children["model"])
        plant(self, "language_model.lm_head", text.children["lm_head"])
        self.text = [text]
        self.embedding_names = ("language_model.model.embed_tokens",)
        self.head_name = "language_model.lm_head"
        stage = text.stages[0]
        stage.stack.name = "language_model.model.layers"
        self.stages = [stage]

    def head(self, x: Tensor) -> Tensor:
        return self.text[0].head(x)

    def classify(self, labels: int) -> None:
        raise UnsupportedError(
            f"Llama 4 with a head over {labels} labels", remedy="use its text model, llama4_text"
        )


def llama4_tower(config: Mapping[str, Any]) -> Module:
    """``Llama4VisionModel``: names and shapes."""
    root, hidden, patch = Module(), config["hidden_size"], config["patch_size"]
    inner, mlp_out = config["intermediate_size"], config["projector_output_dim"]
    count = (config["image_size"] // patch) ** 2 + 1
    weight(root, "class_embedding", hidden)
    weight(root, "positional_embedding_vlm", count, hidden)
    plant(root, "patch_embedding.linear", Linear(config["num_channels"] * patch**2, hidden))
    for name in ("layernorm_pre", "layernorm_post"):
        plant(root, name, LayerNorm(hidden))
    for layer in range(config["num_hidden_layers"]):
        block = VisionBlock(
            hidden, inner, config["num_attention_heads"], out="o_proj",
            norms=("input_layernorm", "post_attention_layernorm"),
        )  # fmt: skip
        plant(root, f"model.layers.{layer}", block)
    plant(root, "vision_adapter.mlp.fc1", Linear(inner, config["projector_input_dim"]))
    plant(root, "vision_adapter.mlp.fc2", Linear(config["projector_input_dim"], mlp_out))
    return root


MODEL_TYPES: dict[str, Any] = {**dict.fromkeys(_WRAPPERS, vision_language), "llama4": Llama4}
