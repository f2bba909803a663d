"""Towers of patches: what every one of them is made of.

A tower embeds patches, runs blocks over them, and hands on the hidden states that its wrapper asks
for. Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from collections.abc import Callable

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.nn import LayerNorm, Linear, Module, RMSNorm, Shared, activation
from ftplan.memory.tape import BATCH, ONE, Grads, Size, Tape, Tensor

__all__ = [
    "Conv", "Tower", "VisionBlock", "divided", "embed_patches", "grouped", "merged", "plant",
    "run_linear", "stack_blocks", "weight",
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
        x = self.scaled(self.linear(self.out_path, out), 0)
        del out
        x = ops.add(residual, x)
        residual = x
        x = self.child(self.norms[1]).forward(x)
        *first, last = self.mlp_paths
        if len(first) == 2:
            x = ops.mul(activation(self.linear(first[0], x), self.act), self.linear(first[1], x))
        else:
            x = activation(self.linear(first[0], x), self.act)
        return ops.add(residual, self.scaled(self.linear(last, x), 1))

    def scaled(self, x: Tensor, which: int) -> Tensor:
        """What attention or the MLP returns, times a learned number for each channel (InternVL)."""
        if not self.scales:
            return x
        return ops.mul(x.tape.leaf(self.parameters[self.scales[which]]), x)


def _turned(x: Tensor) -> Tensor:
    """``apply_rotary_pos_emb_vision``: up to fp32, rotated, and back."""
    dtype = x.dtype
    x = ops.to(x, "fp32")
    half = ops.cat((ops.neg(ops.part(x, x.width // 2)), ops.part(x, x.width // 2)))
    return ops.to(ops.add(ops.scale(x), ops.scale(half)), dtype)


class Conv(Module):
    """A convolution whose windows do not overlap: a linear layer over each patch.

    No ``Linear``: quantisation passes it over, and adapters that look for linear layers.
    """

    transposed = False

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
        self.stacks: tuple[int, ...] = ()
        """Blocks whose outputs are merged too, for the first blocks of the language model."""
        self.stacked: list[Tensor] = []
        self.states: list[Tensor] = []
        """The hidden states of every block, where they are kept."""

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
        if "pos_embed" in self.children:
            x = ops.add(x, self._interpolated(x.dtype, x.tape, rows))
        elif not any(block.turns for block in self.in_order):
            x = ops.shift(x, "position embedding")
        for norm in self.before:
            x = norm.forward(x)
        self.states = [x] if self.layer is not None else []
        self.stacked = []
        for number, block in enumerate(self.in_order):
            block.reach = block.reach or self.patches
            x = self._run(block, x)
            if self.layer is not None:
                self.states.append(x)
            if number in self.stacks:
                merger = self.child(f"deepstack_merger_list.{self.stacks.index(number)}")
                self.stacked.append(merged(merger, x, self.merge, whole=True))
        for norm in self.after:
            x = norm.forward(x)
        return x

    def _interpolated(self, dtype: str, tape: Tape, rows: Size) -> Tensor:
        """Learned positions of a square, four of them weighted for each patch, in fp32."""
        table = self.child("pos_embed")
        corners = table.forward(tape, rows * 4)
        weighted = ops.mul(corners, tape.tensor(rows * 4, 1, "fp32", "corner weights"))
        del corners
        out = tape.tensor(rows, weighted.width, "fp32", "positions")
        ops.record([out], "sum", [weighted], lambda grad: (grad.alias(rows * 4),))
        return ops.to(out, dtype)

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
