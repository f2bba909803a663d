"""Hybrids of full attention and the gated delta rule: Qwen3-Next and the text of Qwen3.5.

Modelled is the path that transformers runs without the packages flash-linear-attention and
causal-conv1d: ``torch_chunk_gated_delta_rule`` in fp32, in chunks of 64 tokens, whose every
intermediate autograd keeps. With those packages much less is kept; this is then an upper bound.
Source: transformers 5.23.0, models/qwen3_next, qwen3_5, qwen3_5_moe.
"""

from __future__ import annotations

from functools import partial

from ftplan.memory import ops
from ftplan.memory.attention import attend, sequence_rows
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
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import BATCH, TOKENS, Grads, Tensor

CHUNK_TOKENS = 64


class GatedAttention(Attention):
    """Queries come with a gate of their own size, whose sigmoid weighs the output."""

    def __init__(self, config: Config, turned: int) -> None:
        super().__init__(
            config, qk_norm="head", qk_offset=True, turned=turned, joined=True, gated=True
        )

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        heads = self.heads
        both = self.q_proj.forward(x)
        q, gate = ops.split(both, [both.width // 2, both.width // 2])
        del both
        gate = ops.copy(gate, "gate")
        q = self.normed(self.q_norm, q)
        k = self.normed(self.k_norm, self.k_proj.forward(x))
        v = self.v_proj.forward(x)
        q, k = self.turn(q, k, shared)
        out = attend(q, k, v, heads, shared.masks.get(self.mask), held=held, by_head=True)
        out = ops.mul(out, ops.unary(gate, "sigmoid", "output"))
        return self.out(out)


class GatedNorm(Module):
    """``RMSNormGated``: normed, then weighed by ``silu(gate)`` in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = x.dtype
        hidden = ops.to(x, "fp32")
        root = ops.unary(ops.shift(ops.mean_square(hidden)), "rsqrt", "output")
        hidden = ops.mul(hidden, root)
        hidden = ops.mul(x.tape.leaf(self.weight), ops.to(hidden, dtype))
        hidden = ops.mul(hidden, ops.unary(ops.to(gate, "fp32"), "silu", "input"))
        return ops.to(hidden, dtype)


class Conv1d(Module):
    """A causal convolution of each channel by itself (``causal_conv1d``'s fallback)."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = False, act: bool = True) -> None:
        super().__init__()
        self.weight = self.parameter("weight", channels, 1, kernel)
        self.bias = self.parameter("bias", channels) if bias else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        tape, dtype = x.tape, x.dtype
        if self.act:  # the fallback casts its input to the weight's dtype, its output back
            x = ops.to(x, self.weight.dtype)
        x = ops.autocast(x)
        weight = ops.autocast(tape.leaf(self.weight))
        inputs = [x, weight]
        if self.bias is not None:
            inputs.append(ops.autocast(tape.leaf(self.bias)))
        # the last tokens of the padding are cut off, but they are in the output's storage
        kernel, channels, wants = self.weight.shape[2], x.width, sum(map(_wanted, (x, weight)))
        rows = x.rows + BATCH * (kernel - 1)
        tape.multiply(rows, kernel, channels)
        out = tape.tensor(rows, channels, x.dtype, "conv1d")
        saved = (x, weight)  # one backward function for all of them: it keeps both in any case
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in inputs]

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            grad.tape.multiply(rows, kernel, channels, times=wants)
            return tuple(make(grad) for make in makers)

        ops.record([out], "conv1d", inputs, apply)
        out = ops.rows_slice(out, x.rows)
        return ops.to(ops.unary(out, "silu", "input"), dtype) if self.act else out


def _wanted(x: Tensor) -> bool:
    return x.requires_grad


def without_padding(x: Tensor) -> Tensor:
    """``apply_mask_to_padding_states``: times zero where a batch is padded."""
    return ops.scale(x, "without padding") if x.tape.env.padding_mask else x


def l2norm(x: Tensor, heads: int) -> Tensor:
    square = ops.mul(x, x)
    total = ops.view(square, x.rows * heads, x.width // heads)
    inverse = ops.unary(ops.shift(summed(total)), "rsqrt", "output")
    del square, total
    return ops.mul(x, inverse)


def summed(x: Tensor) -> Tensor:
    """The sum of each row."""
    out = x.tape.tensor(x.rows, 1, x.dtype, "sum")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "sum", [x], lambda grad: (make(grad),))
    return out


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, heads: int, key_heads: int
) -> Tensor:
    """``torch_chunk_gated_delta_rule``; widths are heads x head size, everything in fp32."""
    dtype, repeats = q.dtype, heads // key_heads
    if repeats > 1:
        q, k = ops.expand_heads(q, repeats), ops.expand_heads(k, repeats)
    q, k, v, beta, decay = (contiguous_fp32(t) for t in (q, k, v, beta, decay))
    q, k = l2norm(q, heads), l2norm(k, heads)
    q = ops.scale(q)
    padded = sequence_rows(q.tape, CHUNK_TOKENS)  # even what is long enough is copied
    q, k, v = (ops.pad(t, padded) for t in (q, k, v))
    beta, decay = (ops.pad(t, padded) for t in (beta, decay))
    v_beta, k_beta = ops.mul(v, beta), ops.mul(k, beta)
    cumulated = _cumulated(decay)
    pairs = heads * CHUNK_TOKENS
    pairwise = decay_pairs(cumulated, pairs)
    pairwise = ops.scale(pairwise, "masked_fill")
    pairwise = ops.unary(pairwise, "exp", "output")
    system = ops.mul(_product(k_beta, k, pairs, heads), pairwise)
    intra = ops.mul(_product(q, k, pairs, heads), pairwise)
    decayed = ops.mul(k_beta, ops.unary(cumulated, "exp", "output"))
    values = _solved(system, v_beta)
    k_cumulated = _solved(system, decayed)
    out = v.tape.tensor(padded, v.width, "fp32", "delta rule output")
    q = ops.mul(q, ops.unary(cumulated, "exp", "output"))
    k = ops.mul(k, ops.unary(ops.scale(cumulated), "exp", "output"))
    out = _scan(out, values, k_cumulated, q, intra, k, heads)
    return to_copy(out if padded == TOKENS else ops.rows_slice(out, TOKENS), dtype)


def contiguous_fp32(x: Tensor) -> Tensor:
    return ops.copy(x, "contiguous") if x.dtype == "fp32" else ops.to(x, "fp32")


def to_copy(x: Tensor, dtype: str) -> Tensor:
    return ops.copy(x, "contiguous") if x.dtype == dtype else ops.to(x, dtype)


def _cumulated(x: Tensor) -> Tensor:
    return ops.scale(x, "cumsum")


def decay_pairs(x: Tensor, width: int) -> Tensor:
    out = x.tape.tensor(x.rows, width, x.dtype, "pairwise decay")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "sub", [x], lambda grad: (make(grad),))
    return out


def _product(a: Tensor, b: Tensor, width: int, heads: int) -> Tensor:
    return ops.matmul(a, b, a.rows, width, "chunk scores", inner=a.width // heads)


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """``solve_triangular``: keeps the system and the solution."""
    rows = right.rows
    out = right.tape.tensor(rows, right.width, right.dtype, "solve_triangular")
    saved = (system, out.alias())
    make_system = ops.like(system.rows, system.width, system.dtype, system.requires_grad)
    make_right = ops.like(right.rows, right.width, right.dtype, right.requires_grad)

    width = right.width if system.requires_grad else 0

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(rows, CHUNK_TOKENS, width)
        grad_right = make_right(grad)
        return make_system(grad), grad_right

    ops.record([out], "solve_triangular", [system, right], apply)
    return out


def _scan(
    out: Tensor, values: Tensor, k_cumulated: Tensor, q: Tensor, intra: Tensor, k: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """The walk over chunks: keeps each chunk's state and corrected values."""
    tape = values.tape
    state = q.width // heads * values.width  # numbers of one state: heads x key size x value size
    per_token = max(1, state // CHUNK_TOKENS)
    rows = values.rows
    inputs = [values, k_cumulated, q, intra, k]
    each = 3 * state + CHUNK_TOKENS * values.width  # two products read the state, one makes it
    # no gradient goes to the first state, and none comes from the last
    edges = BATCH * (-4 * CHUNK_TOKENS * state)
    tape.multiply(rows, each, name="delta rule")
    kept: list[Tensor] = []
    if ops.records(*inputs):
        low = tape.env.autocast
        if low is None:
            kept = [tape.tensor(rows, per_token, "fp32", "chunk states")]
            kept += [k_cumulated, q, intra, k]
            kept.append(tape.tensor(rows, values.width, "fp32", "corrected values"))
        else:  # each operand of a product is cast on its own; nothing comes of the last state
            before = rows + BATCH * -CHUNK_TOKENS
            kept = [tape.tensor(before, per_token, "fp32", "chunk states")]
            widths = [t.width for t in (k_cumulated, q, intra, values)] + [per_token] * 2
            kept += [tape.tensor(rows, width, low, "scan operands") for width in widths]
            widths = [k.width, values.width]
            kept += [tape.tensor(before, width, low, "scan operands") for width in widths]
    saved = tuple(kept)
    del kept
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in inputs]
    width = max(q.width, values.width)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        tape = grad.tape
        tape.multiply(rows * (2 * each) + edges, 1, name="delta rule")
        grads = tuple(make(grad) for make in makers)
        # each chunk's slice is put into zeros of the whole and added
        zeros = tape.tensor(rows, width, "fp32", "gradient")
        added = tape.tensor(rows, width, "fp32", "gradient")
        del zeros, added
        return grads

    ops.record([out], "delta rule", inputs, apply)
    return out


class DeltaNet(Module):
    """``Qwen3NextGatedDeltaNet``; Qwen3.5 has four input projections instead of two."""

    def __init__(self, config: Config, fused: bool) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.heads, self.key_heads = (
            config["linear_num_value_heads"], config["linear_num_key_heads"],
        )  # fmt: skip
        self.key = config["linear_key_head_dim"] * self.key_heads
        self.value = config["linear_value_head_dim"] * self.heads
        self.state_values = self.value * config["linear_key_head_dim"]
        self.fused = fused
        channels = 2 * self.key + self.value
        self.dt_bias = self.parameter("dt_bias", self.heads)
        self.A_log = self.parameter("A_log", self.heads)
        self.conv1d = Conv1d(channels, config["linear_conv_kernel_dim"])
        if fused:
            self.in_proj_qkvz = Linear(hidden, channels + self.value)
            self.in_proj_ba = Linear(hidden, 2 * self.heads)
        else:
            self.in_proj_qkv = Linear(hidden, channels)
            self.in_proj_z = Linear(hidden, self.value)
            self.in_proj_b = Linear(hidden, self.heads)
            self.in_proj_a = Linear(hidden, self.heads)
        self.norm = GatedNorm(config["linear_value_head_dim"])
        self.out_proj = Linear(self.value, hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixed queries, keys and values; the output's gate; b and a."""
        if not self.fused:
            return (
                self.in_proj_qkv.forward(x), self.in_proj_z.forward(x),
                self.in_proj_b.forward(x), self.in_proj_a.forward(x),
            )  # fmt: skip
        both, ba = self.in_proj_qkvz.forward(x), self.in_proj_ba.forward(x)
        q, k, v, z = ops.split(both, [self.key, self.key, self.value, self.value])
        b, a = ops.split(ba, [self.heads, self.heads])
        z, b, a = ops.copy(z), ops.copy(b), ops.copy(a)
        q, k, v = ops.copy(q), ops.copy(k), ops.copy(v)
        return ops.cat((q, k, v)), z, b, a

    def forward(self, x: Tensor, _shared: Shared, _held: list[Tensor] | None = None) -> Tensor:
        tape = x.tape
        x = without_padding(x)
        mixed, z, b, a = self.project(x)
        mixed = self.conv1d.forward(mixed)
        q, k, v = ops.split(mixed, [self.key, self.key, self.value])
        del mixed
        beta = ops.unary(b, "sigmoid", "output")
        rate = ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output")
        step = ops.add(ops.to(a, "fp32"), tape.leaf(self.dt_bias))
        decay = ops.mul(ops.neg(rate), ops.unary(step, "softplus", "input"))
        del step, rate
        out = delta_rule(q, k, v, decay, beta, self.heads, self.key_heads)
        size = self.value // self.heads
        rows = x.rows * self.heads
        out = self.norm.forward(ops.view(out, rows, size), ops.view(z, rows, size))
        return self.out_proj.forward(ops.view(out, x.rows, self.value))


def qwen_hybrid(raw: Config) -> Network:
    """``Qwen3NextForCausalLM``, ``Qwen3_5ForCausalLM``, ``Qwen3_5MoeForCausalLM``."""
    config = filled(raw)
    kind = config["model_type"]
    every = config.get("full_attention_interval") or 4
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or ()) or [
        "full_attention" if (layer + 1) % every == 0 else "linear_attention"
        for layer in range(count)
    ]
    dense = kind == "qwen3_5_text"
    config.setdefault("norm_topk_prob", True)
    turned = int(head_size(config) * (config.get("partial_rotary_factor") or 1.0))
    norm = partial(RMSNorm, offset=True)

    def sparse(layer: int) -> bool:
        return not dense and (kind == "qwen3_5_moe_text" or qwen_kind(config, layer))

    def block(config: Config, layer: int) -> Module:
        if types[layer] == "full_attention":
            mixer: Module = GatedAttention(config, turned)
            name = "self_attn"
        else:
            mixer, name = DeltaNet(config, fused=kind == "qwen3_next"), "linear_attn"
        if sparse(layer):
            mlp: Module = qwen_mixture(config)
        else:
            mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
        return Block(config, mixer, mlp, mixer_name=name, norm=norm)

    return Decoder(
        config, block, kind=lambda layer: (types[layer], sparse(layer)), norm=norm,
        ropes={"": Rope(width=turned, per_sequence=kind != "qwen3_next")},
    )  # fmt: skip


MODEL_TYPES = {
    "qwen3_next": qwen_hybrid,
    "qwen3_5_text": qwen_hybrid,
    "qwen3_5_moe_text": qwen_hybrid,
}
