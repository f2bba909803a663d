"""Towers of patches: what every one of them is made of.

A tower embeds patches, runs blocks over them, and hands on the hidden states that its wrapper asks
for. Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.families.llama import rotate
from ftplan.memory.nn import LayerNorm, Linear, Module, activation, rope_table
from ftplan.memory.tape import BATCH, CROSSED, ONE, Grads, Size, Tape, Tensor

__all__ = [
    "Beside", "Conv", "Crops", "Tower", "VisionBlock", "divided", "embed_patches", "grouped",
    "merged", "plant", "run_linear", "stack_blocks", "weight", "with_class",
]  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Beside:
    """What a tower hands to each of its blocks."""

    rope: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of each patch."""
    mask: Tensor | None = None


class VisionBlock(Module):
    """A pre-norm transformer layer over patches. ``names`` of norms, attention and MLP parts."""

    def __init__(
        self, hidden: int, inner: int, heads: int, *, norm: Callable[[int], Module] = LayerNorm,
        norms: tuple[str, str] = ("layer_norm1", "layer_norm2"), attn: str = "self_attn",
        fused: bool = False, qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
        out: str = "out_proj", qkv_bias: bool = True, out_bias: bool = True, mlp: str = "mlp",
        mlp_names: tuple[str, ...] = ("fc1", "fc2"), mlp_bias: bool = True, act: str = "gelu",
        scales: tuple[str, ...] = (), scale_width: int | None = None, size: int | None = None,
        kv_count: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        size, kv_count = size or hidden // heads, kv_count or heads
        wide, narrow = heads * size, kv_count * size
        self.turns: Literal["", "fp32", "own", "complex"] = ""
        """Queries and keys are rotated: in fp32 (Qwen-VL), in their own dtype (Pixtral), as complex
        numbers (Llama 4)."""
        self.pieces = False
        """Images or windows are attended to one by one, and joined again."""
        self.reach = 0
        """Patches that a patch sees, where the scores are kept."""
        self.gated = len(scales) == 2 and scale_width == 1
        self.names_added = bool(scales) and not self.gated
        """What attention returned has a name until the block returns (InternVL)."""
        self.heads = Heads(count=heads, kv_count=kv_count, size=size, value_size=size, causal=False)
        self.norms, self.act, self.fused, self.scales = norms, act, fused, scales
        for name in norms:
            setattr(self, name, norm(hidden))
        self.attn_paths = [f"{attn}.qkv"] if fused else [f"{attn}.{name}" for name in qkv]
        widths = (3 * wide,) if fused else (wide, narrow, narrow)
        for path, width in zip(self.attn_paths, widths, strict=True):
            plant(self, path, Linear(hidden, width, bias=qkv_bias))
        self.out_path = f"{attn}.{out}"
        plant(self, self.out_path, Linear(wide, hidden, bias=out_bias))
        self.mlp_paths = [f"{mlp}.{name}" for name in mlp_names]
        for path in self.mlp_paths[:-1]:
            plant(self, path, Linear(hidden, inner, bias=mlp_bias))
        plant(self, self.mlp_paths[-1], Linear(inner, hidden, bias=mlp_bias))
        for name in scales:
            self.parameter(name, scale_width or hidden)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention among the patches of an image, or of one window of it; under a mask, among
        those of all images."""
        heads = self.heads
        if q.tape.env.attention != "eager":
            out = attend(q, k, v, heads, mask, reach=self.reach, by_head=self.turns == "own")
            return ops.copy(out, "windows joined") if self.pieces else out
        k, v = (ops.expand_heads(t, heads.groups) for t in (k, v))
        rows, width = q.rows, heads.count * self.reach
        if mask is not None:
            rows, width = mask.rows, heads.count
        weights = ops.scale(ops.matmul(q, k, rows, width, "scores", inner=heads.size))
        if mask is not None:
            weights = ops.add(weights, mask)
        if self.turns == "complex":  # Llama 4's own: autocast decides
            weights = ops.softmax(ops.autocast_fp32(weights))
        else:
            weights = ops.to(ops.softmax(weights, "fp32"), q.dtype)
        width = heads.count * heads.size
        out = ops.copy(ops.matmul(weights, v, q.rows, width, "attention", inner=self.reach))
        return ops.copy(out, "windows joined") if self.pieces else out

    def linear(self, path: str, x: Tensor) -> Tensor:
        """The linear at a path."""
        out: Tensor = self.child(path).forward(x)
        return out

    def forward(self, x: Tensor, beside: Beside) -> Tensor:
        residual = x
        x = self.child(self.norms[0]).forward(x)
        if self.fused:
            qkv = self.linear(self.attn_paths[0], x)
            q, k, v = ops.split(qkv, [qkv.width // 3] * 3)
            del qkv
        else:
            q, k, v = (self.linear(path, x) for path in self.attn_paths)
        if self.turns == "fp32":
            q, k = _turned(q, beside.rope), _turned(k, beside.rope)
        elif self.turns == "complex":
            q, k = _multiplied(q, k)
        elif self.turns:
            assert beside.rope is not None
            q, k = rotate(q, *beside.rope), rotate(k, *beside.rope)
        out = self.attended(q, k, v, beside.mask)
        del q, k, v
        added = self.scaled(self.linear(self.out_path, out), 0)
        del out
        x = ops.add(residual, added)
        if not self.names_added:
            del added
        residual = x
        x = self.child(self.norms[1]).forward(x)
        x = self.mlp_of(x)  # its input has a name here until it returns
        return ops.add(residual, self.scaled(x, 1))

    def mlp_of(self, x: Tensor) -> Tensor:
        """Two linear layers, or three where one of them is a gate."""
        *first, last = self.mlp_paths
        if len(first) == 2:
            x = ops.mul(activation(self.linear(first[0], x), self.act), self.linear(first[1], x))
        else:
            x = activation(self.linear(first[0], x), self.act)
        return self.linear(last, x)

    def scaled(self, x: Tensor, which: int) -> Tensor:
        """What attention or the MLP returns, times a learned number for each channel (InternVL),
        or times the tanh of one for all (Llama 3.2)."""
        if not self.scales:
            return x
        scale = x.tape.leaf(self.parameters[self.scales[which]])
        return ops.mul(ops.unary(scale, "tanh", "output") if self.gated else scale, x)


def _turned(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """``apply_rotary_pos_emb_vision``: up to fp32, rotated, and back."""
    dtype = x.dtype
    x = ops.to(x, "fp32")
    if rope is not None:
        return ops.to(rotate(x, *rope), dtype)
    half = ops.cat((ops.neg(ops.part(x, x.width // 2)), ops.part(x, x.width // 2)))
    return ops.to(ops.add(ops.scale(x), ops.scale(half)), dtype)


def _multiplied(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``vision_apply_rotary_emb``: both up to fp32, times complex numbers, and back."""
    dtype = q.dtype
    q, k = ops.to(q, "fp32"), ops.to(k, "fp32")
    turned = ops.scale(q), ops.scale(k)
    return ops.to(turned[0], dtype), ops.to(turned[1], dtype)


class Conv(Module):
    """A convolution whose windows do not overlap: a linear layer over each patch.

    No ``Linear``: quantisation passes it over, and adapters that look for linear layers.
    """

    transposed = False
    channels_last = False
    """Its input lies patch by patch, channels last, and so does its weight's gradient, which
    autograd lays out anew (torch/csrc/autograd/functions/accumulate_grad.h)."""

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
        flat = _laid_out(flat) if self.channels_last else flat
        matrix = flat.alias(ONE * self.out_features, self.in_features)
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


def _laid_out(weight: Tensor) -> Tensor:
    """A weight whose gradient is copied into its own layout."""
    out = weight.alias()
    make = ops.like(weight.rows, weight.width, weight.dtype, weight.requires_grad)
    ops.record([out], "layout", [weight], lambda grad: (make(grad),))
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
        self.image_pixels = 0
        """Numbers of one image, where the last pixels of a row are in no patch."""
        self.classed = False
        """A token of its own stands before the patches of each image."""
        self.token = ""
        """Path of the token that stands before the patches of each image."""
        self.table = ""
        """Path of the learned positions of patches, the same for all images."""
        self.packs = False
        """All images are one sequence, under a mask that keeps them apart (Pixtral)."""
        self.layer: int | None = None
        """The hidden states that are used (-1: the last block's), where they are kept for it."""
        self.checkpointed = False
        """Blocks are recomputed in backward."""
        self.after: list[Module] = []
        self.merge = 1
        """Patches that become one token."""
        self.stacks: tuple[int, ...] = ()
        """Blocks whose outputs are merged too, for the first blocks of the language model."""
        self.stacked: list[Tensor] = []
        self.chosen: list[Tensor] = []
        """Those hidden states."""

    def pixel_values(self, tape: Tape, images: int) -> list[Tensor]:
        """What the caller passes in, in fp32."""
        if self.image_pixels:
            return [tape.tensor(BATCH * images, self.image_pixels, "fp32", "pixel values")]
        rows = BATCH * (images * (self.patches - self.classed))
        return [tape.tensor(rows, self.pixels, "fp32", "pixel values")]

    def forward(self, pixels: Tensor, images: int) -> Tensor:
        """Features of all patches: (sequences x images x patches) x hidden."""
        rows = BATCH * (images * self.patches)
        embedded = x = self.embedded(pixels, rows)
        x = self.placed(x, rows)
        if self.packs:
            x = ops.copy(x, "images in a row")
        else:
            del embedded
        for norm in self.before:
            x = norm.forward(x)
        beside = Beside(*self._positions_and_mask(x, images))
        last = len(self.in_order)
        wanted = None if self.layer is None else self.layer % (last + 1)
        self.chosen = [x] if wanted == 0 else []
        self.stacked = []
        reach = self.patches * images if self.packs else self.patches
        for number, block in enumerate(self.in_order):
            block.reach = block.reach or reach
            x = self._run(block, x, beside)
            if number + 1 == wanted:
                self.chosen = [x]
            if number in self.stacks:
                merger = self.child(f"deepstack_merger_list.{self.stacks.index(number)}")
                self.stacked.append(merged(merger, x, self.merge, whole=True))
        for norm in self.after:
            x = norm.forward(x)
        return x

    @property
    def first(self) -> Module:
        """Whose output transformers makes ask for a gradient (``get_input_embeddings``)."""
        return self.patch

    def picked(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """What the wrapper makes of the caller's tensors and holds until it has features."""
        return list(pixels)

    def embedded(self, pixels: Tensor, rows: Size) -> Tensor:
        """Patches, with a token before those of each image where the tower has one."""
        x = self.first.forward(self.in_patches(ops.to(pixels, self.patch.weight.dtype)))
        return with_class(x, self.class_token(x.tape), rows) if self.classed else x

    def in_patches(self, pixels: Tensor) -> Tensor:
        """A row for each patch; the last pixels of an image may be in none."""
        if not self.image_pixels:
            return pixels
        return ops.view(pixels, pixels.rows * (self.patches - self.classed), self.pixels)

    def class_token(self, tape: Tape) -> Tensor:
        """The learned token."""
        path, _, name = self.token.rpartition(".")
        return tape.leaf((self.child(path) if path else self).parameters[name])

    def placed(self, x: Tensor, rows: Size) -> Tensor:
        """Positions are added."""
        if "pos_embed" in self.children:
            return ops.add(x, self._interpolated(x.dtype, x.tape, rows))
        if not self.table:
            return x
        path, _, name = self.table.rpartition(".")
        module = self.child(path)
        if name in module.children:
            table = module.children[name]
            return ops.add(x, table.forward(x.tape, ONE * self.patches))
        return ops.add(x, x.tape.leaf(module.parameters[name]))

    def _positions_and_mask(
        self, x: Tensor, images: int
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Of images that are one sequence: a row of sines for each patch, a mask over all."""
        if not self.packs:
            return None, None
        rope = rope_table(x.tape, self.in_order[0].heads.size, x.dtype, x.rows)
        if x.tape.env.attention == "flash":
            return rope, None
        return rope, x.tape.tensor(CROSSED * (images * self.patches) ** 2, 1, x.dtype, "mask")

    def _interpolated(self, dtype: str, tape: Tape, rows: Size) -> Tensor:
        """Learned positions of a square, four of them weighted for each patch, in fp32."""
        table = self.child("pos_embed")
        corners = table.forward(tape, rows * 4)
        weighted = ops.mul(corners, tape.tensor(rows * 4, 1, "fp32", "corner weights"))
        del corners
        out = tape.tensor(rows, weighted.width, "fp32", "positions")
        ops.record([out], "sum", [weighted], lambda grad: (grad.alias(rows * 4),))
        return ops.to(out, dtype)

    def _run(self, block: VisionBlock, x: Tensor, beside: Beside) -> Tensor:
        if not self.checkpointed:
            return block.forward(x, beside)
        trains = any(parameter.trainable for _, parameter in block.named_parameters())
        return checkpoint(lambda x: block.forward(x, beside), x, trains=trains)


class CropEmbeddings(Module):
    """``Idefics3VisionEmbeddings``: a row of the table of positions is looked up for each patch."""

    def forward(self, pixels: Tensor) -> Tensor:
        conv, table = self.children["patch_embedding"], self.children["position_embedding"]
        x = conv.forward(pixels)
        return ops.add(x, table.forward(x.tape, x.rows))


class Crops(Tower):
    """Idefics 3's tower: of crops of one size, those that are all zeros are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = CropEmbeddings()

    @property
    def first(self) -> Module:
        return self.embeddings

    def pixel_values(self, tape: Tape, images: int) -> list[Tensor]:
        """Pixels, and which of them are no padding."""
        mask = tape.tensor(BATCH * images, self.image_pixels // 3, "int64", "pixel mask")
        return [*super().pixel_values(tape, images), mask]

    def picked(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """The crops that are there: copies of both."""
        values, mask = pixels
        values = ops.to(values, self.patch.weight.dtype)
        zeros = values.tape.tensor(values.rows, values.width, "bool", "zeros")
        del zeros
        values = ops.copy(values, "crops")
        return [values, ops.copy(mask, "pixel mask")]

    def placed(self, x: Tensor, rows: Size) -> Tensor:
        """Positions are in already."""
        return x


def with_class(x: Tensor, token: Tensor, rows: Size) -> Tensor:
    """A row for each image before its patches: a copy."""
    dtype = ops.promote(x.dtype, token.dtype)
    x = ops.to(x, dtype)
    out = x.tape.tensor(rows, x.width, dtype, "cat")
    shape = (x.rows, x.width)
    make = ops.like(token.rows, token.width, dtype, token.requires_grad)
    ops.record([out], "cat", [token, x], lambda grad: (make(grad), grad.alias(*shape)))
    return out


def embed_patches(
    tower: Tower, path: str, channels: int, out: int, *window: int, bias: bool
) -> None:
    tower.patch = Conv(channels, out, *window, bias=bias)
    del tower.children["patch"]
    plant(tower, path, tower.patch)
    tower.pixels = tower.patch.in_features


def stack_blocks(tower: Tower, path: str, depth: int, build: Callable[[], VisionBlock]) -> None:
    """``depth`` blocks at a list's path, in the order in which they run."""
    for layer in range(depth):
        block = build()
        tower.in_order.append(block)
        plant(tower, f"{path}.{layer}", block)


def run_linear(linear: Module, x: Tensor) -> Tensor:
    """A linear layer that is found by its name."""
    out: Tensor = linear.forward(x)
    return out


def divided(rows: Size, times: int) -> Size:
    """So many times fewer rows."""
    return Size(count // times for count in rows)


def grouped(x: Tensor, linear: Module) -> Tensor:
    """Neighbouring patches side by side, as wide as the linear layer takes them."""
    weight = getattr(linear, "in_features", x.width)
    times = max(1, weight // x.width)
    return ops.view(x, divided(x.rows, times), x.width * times)


def merged(merger: Module, x: Tensor, merge: int, *, whole: bool = False) -> Tensor:
    """``PatchMerger``: normed, neighbours side by side, two linear layers, put back in order.

    ``whole``: the norm sees the neighbours side by side.
    """
    old = "ln_q" in merger.children
    norm = merger.child("ln_q" if old else "norm")
    x = x if whole else norm.forward(x)
    x = ops.view(x, divided(x.rows, merge), x.width * merge)
    x = norm.forward(x) if whole else x
    first, second = ("mlp.0", "mlp.2") if old else ("linear_fc1", "linear_fc2")
    x = run_linear(merger.child(second), activation(run_linear(merger.child(first), x), "gelu"))
    return ops.gather(x) if old else x
