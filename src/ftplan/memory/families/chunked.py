"""Mamba 2 and its hybrids: the state-space scan in chunks (Mamba 2, Granite 4).

Modelled is the path that transformers runs without the packages mamba-ssm and causal-conv1d:
``mamba2_chunk_scan`` in fp32, written out in einsums whose operands autograd keeps. With those
packages far less is kept; this is then an upper bound.
Source: transformers 5.23.0, models/mamba2, granitemoehybrid.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.families.decoder import (
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
)
from ftplan.memory.families.hybrid import Conv1d
from ftplan.memory.families.mixture import SharedBlock, fused_mlp, granite_mixture
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import BATCH, SCORES, TOKENS, Grads, Tensor


class GroupNorm(Module):
    """``MambaRMSNormGated``: weighed by ``silu(gate)``, then normed in groups, in fp32."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype, rows, width = x.dtype, x.rows, x.width
        hidden = ops.to(x, "fp32")
        hidden = ops.mul(hidden, ops.unary(ops.to(gate, "fp32"), "silu", "input"))
        hidden = ops.view(hidden, rows * self.groups, width // self.groups)
        root = ops.unary(ops.shift(ops.mean_square(hidden)), "rsqrt", "output")
        hidden = ops.view(ops.mul(hidden, root), rows, width)
        return ops.mul(x.tape.leaf(self.weight), ops.to(hidden, dtype))


class Mamba2Mixer(Module):
    """``Mamba2Mixer``. ``inner`` = heads x head size; ``groups`` share B and C."""

    def __init__(
        self, hidden: int, inner: int, heads: int, states: int, groups: int, kernel: int,
        chunk: int, *, bias: bool, conv_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner, self.heads, self.states, self.groups = inner, heads, states, groups
        self.chunk = chunk
        self.state_values = inner * states
        self.channels = inner + 2 * groups * states
        self.dt_bias = self.parameter("dt_bias", heads)
        self.A_log = self.parameter("A_log", heads)
        self.D = self.parameter("D", heads)
        self.conv1d = Conv1d(self.channels, kernel, bias=conv_bias)
        self.in_proj = Linear(hidden, inner + self.channels + heads, bias=bias)
        self.norm = GroupNorm(inner, groups)
        self.out_proj = Linear(inner, hidden, bias=bias)

    def forward(
        self, x: Tensor, _shared: Shared | None = None, _held: list[Tensor] | None = None
    ) -> Tensor:
        dtype, tape = x.dtype, x.tape
        projected = self.in_proj.forward(x)
        rate = ops.neg(ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output"))
        gate, mixed, step = ops.split(projected, [self.inner, self.channels, self.heads])
        mixed = self.conv1d.forward(mixed)
        narrow = self.groups * self.states
        inner, b, c = ops.split(mixed, [self.inner, narrow, narrow])
        del mixed
        out = self.scan(inner, step, rate, b, c)
        out = self.norm.forward(out, gate)
        return self.out_proj.forward(ops.to(out, dtype))

    def scan(self, x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """``mamba2_chunk_scan``: chunks of ``chunk`` tokens, ``pairs`` scores a token."""
        tape = x.tape
        pairs, repeats = self.heads * self.chunk, self.heads // self.groups
        step = ops.add(step, ops.to(tape.leaf(self.dt_bias), step.dtype))
        step = ops.unary(ops.autocast_fp32(step), "softplus", "input")
        step = ops.unary(step, "clamp", "input")
        x, b, c = ops.to(x, "fp32"), ops.to(b, "fp32"), ops.to(c, "fp32")
        b, c = ops.expand_heads(b, repeats), ops.expand_heads(c, repeats)
        residual = ops.mul(tape.leaf(self.D), ops.copy(x, "pad"))
        x = ops.mul(x, ops.to(step, "fp32"))
        decay = ops.mul(rate, ops.to(step, "fp32"))
        x, decay, b, c = (ops.copy(t, "pad") for t in (x, decay, b, c))
        total = ops.scale(decay, "cumsum")
        within = ops.unary(_segments(decay, pairs), "exp", "output")
        scores = _einsum(c, b, pairs, self.states)
        scores = ops.mul(scores, within)
        diagonal = _einsum(scores, x, self.inner, self.chunk)
        late = ops.unary(ops.scale(total), "exp", "output")
        weighed = ops.mul(b, late)
        states = _states(weighed, x, self.inner, self.states, self.chunk)
        early = ops.unary(total, "exp", "output")
        across = _read(c, states, self.inner, self.states)
        across = ops.mul(across, early)
        out = ops.copy(ops.add(diagonal, across), "contiguous")
        return ops.add(out, residual)


def _segments(x: Tensor, width: int) -> Tensor:
    """``segment_sum``: masked, summed, masked again; keeps the small masks only."""
    tape = x.tape
    first = tape.tensor(TOKENS, width, x.dtype, "masked_fill")
    second = tape.tensor(TOKENS, width, x.dtype, "cumsum")
    del first
    out = tape.tensor(TOKENS, width, x.dtype, "masked_fill")
    del second
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    rows, dtype = x.rows, x.dtype

    def apply(grad: Tensor) -> Grads:
        spread = grad.tape.tensor(rows, width, dtype, "gradient")
        again = grad.tape.tensor(rows, width, dtype, "gradient")
        del spread, again
        return (make(grad),)

    ops.record([out], "segment_sum", [x], apply)
    return out


def _einsum(a: Tensor, b: Tensor, width: int, inner: int) -> Tensor:
    """A batched product over heads: both operands are copied head by head, and kept."""
    a, b = ops.copy(a, "permuted"), ops.copy(b, "permuted")
    return ops.matmul(a, b, TOKENS, width, "einsum", inner=inner)


def _states(b: Tensor, x: Tensor, inner: int, states: int, chunk: int) -> Tensor:
    """One state of heads x head size x states for each chunk."""
    b, x = ops.copy(b, "permuted"), ops.copy(x, "permuted")
    size = max(1, inner * states // chunk)
    made = ops.matmul(b, x, TOKENS, size, "chunk states", inner=chunk)
    return _passed_on(made, inner * states, chunk)


def _passed_on(states: Tensor, size: int, chunk: int) -> Tensor:
    """States summed over the chunks before: joined with a first one, copied, and kept."""
    tape, dtype = states.tape, states.dtype
    every = states.rows * states.width + BATCH * size
    joined = tape.tensor(every, 1, dtype, "cat")
    operand = tape.tensor(every, 1, dtype, "permuted")
    del joined
    # a first state and one for each chunk, by as many: (s / chunk + 1)^2 for a sequence
    every_pair = SCORES + TOKENS * (2 * chunk) + BATCH * (chunk * chunk)
    each = -(-size // (chunk * chunk))
    tape.multiply(every_pair, each)
    out = tape.tensor(every, 1, dtype, "einsum")
    shown = out.alias(states.rows, states.width)
    make = ops.like(states.rows, states.width, dtype, states.requires_grad)
    saved = operand

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(every_pair, each, times=2)
        whole = grad.tape.tensor(every, 1, dtype, "gradient")
        again = grad.tape.tensor(every, 1, dtype, "gradient")
        del whole, again
        return (make(grad),)

    ops.record([shown], "pass states", [states], apply)
    return shown


def _read(c: Tensor, states: Tensor, width: int, inner: int) -> Tensor:
    c, states = ops.copy(c, "permuted"), ops.copy(states, "permuted")
    return ops.matmul(c, states, TOKENS, width, "einsum", inner=inner)


class Mamba2Block(Module):
    """``Mamba2Block``: the residual stream may be fp32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.norm = RMSNorm(hidden)
        self.mixer = Mamba2Mixer(
            hidden, int(config["expand"] * hidden), config["num_heads"], config["state_size"],
            config["n_groups"], config["conv_kernel"], config["chunk_size"],
            bias=bool(config["use_bias"]), conv_bias=bool(config["use_conv_bias"]),
        )  # fmt: skip
        self.fp32 = bool(config["residual_in_fp32"])

    def forward(self, x: Tensor, _shared: Shared) -> Tensor:
        residual = x
        assert self.norm.weight is not None
        x = self.norm.forward(ops.to(x, self.norm.weight.dtype))
        if self.fp32:
            residual = ops.to(residual, "fp32")
        return ops.add(residual, self.mixer.forward(x))


class Mamba2(Decoder):
    """``Mamba2ForCausalLM``."""

    def head(self, x: Tensor) -> Tensor:
        weight = self.children["lm_head"].parameters["weight"]
        return ops.to(super().head(ops.to(x, weight.dtype)), "fp32")


def mamba2(raw: Config) -> Network:
    """``Mamba2ForCausalLM``."""
    return Mamba2(
        filled(raw), lambda config, _layer: Mamba2Block(config), ropes={}, windows={},
        norm_name="norm_f", path="backbone", embed_name="embeddings",
    )  # fmt: skip


def granite_hybrid(raw: Config) -> Network:
    """``GraniteMoeHybridForCausalLM`` (Granite 4)."""
    config = filled(raw)
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or config.get("layers_block_type") or ())
    linear = [name in ("mamba", "linear_attention") for name in types] or [True] * count
    rotates = config.get("position_embedding_type") == "rope"

    def block(config: Config, layer: int) -> Module:
        hidden = config["hidden_size"]
        if linear[layer]:
            mixer: Module = Mamba2Mixer(
                hidden, int(config["mamba_expand"] * hidden), config["mamba_n_heads"],
                config["mamba_d_state"], config["mamba_n_groups"], config["mamba_d_conv"],
                config["mamba_chunk_size"], bias=bool(config["mamba_proj_bias"]),
                conv_bias=bool(config["mamba_conv_bias"]),
            )  # fmt: skip
        else:
            mixer = Attention(config, rope="" if rotates else None)
        mixture = granite_mixture(config) if config["num_local_experts"] else None
        made: Block = SharedBlock(
            config, mixer, mixture, fused_mlp(config, config["shared_intermediate_size"]),
            mixer_name="mamba" if linear[layer] else "self_attn",
        )  # fmt: skip
        return made

    return Decoder(
        config, block, kind=lambda layer: linear[layer], embed_scaled=True, logits_scaled=True,
        ropes={"": Rope(width=head_size(config))} if rotates else {},
    )  # fmt: skip


MODEL_TYPES = {"mamba2": mamba2, "granitemoehybrid": granite_hybrid}
