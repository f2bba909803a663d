"""Mamba 2 and its hybrids: the state-space scan in chunks (Mamba 2, Granite 4).

Modelled is the path that transformers runs without the packages mamba-ssm and causal-conv1d:
``mamba2_chunk_scan`` in fp32, written out in einsums whose operands autograd keeps. With those
packages far less is kept; this is then an upper bound.
Source: transformers 5.23.0, models/mamba2, granitemoehybrid.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import sequence_rows
from ftplan.memory.families.decoder import (
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
)
from ftplan.memory.families.hybrid import Conv1d, without_padding
from ftplan.memory.families.mixture import SharedBlock, fused_mlp, granite_mixture
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import BATCH, SCORES, TOKENS, Grads, Size, Tensor


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
        x = without_padding(x)
        projected = self.in_proj.forward(x)
        rate = ops.neg(ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output"))
        gate, mixed, step = ops.split(projected, [self.inner, self.channels, self.heads])
        mixed = without_padding(self.conv1d.forward(mixed))
        narrow = self.groups * self.states
        x, b, c = ops.split(mixed, [self.inner, narrow, narrow])
        out = self.scan(x, step, rate, b, c)
        out = self.norm.forward(out, gate)
        return self.out_proj.forward(ops.to(out, dtype))

    def scan(self, x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """``mamba2_chunk_scan``: sequences are filled up to whole chunks of ``chunk`` tokens."""
        tape = x.tape
        padded = sequence_rows(tape, self.chunk)
        pairs, repeats = self.heads * self.chunk, self.heads // self.groups
        step = ops.add(step, ops.to(tape.leaf(self.dt_bias), step.dtype))
        step = ops.unary(ops.autocast_fp32(step), "softplus", "input")
        step = ops.unary(step, "clamp", "input")
        x = ops.to(x, "fp32")
        b = ops.expand_heads(ops.to(b, "fp32"), repeats)
        c = ops.expand_heads(ops.to(c, "fp32"), repeats)
        residual = ops.mul(tape.leaf(self.D), ops.pad(x, padded))
        x = ops.mul(x, ops.to(step, "fp32"))
        decay = ops.mul(rate, ops.to(step, "fp32"))
        x, decay, b, c = (ops.pad(t, padded) for t in (x, decay, b, c))
        total = ops.scale(decay, "cumsum")
        within = ops.unary(_segments(decay, pairs), "exp", "output")
        scores = _einsum(ops.copy(c), ops.copy(b), padded, pairs, self.states)
        weighed = ops.mul(scores, within)
        # where a chunk is all tokens, x and its states lie head by head already
        several = (tape.env.seq_len or 0) > self.chunk
        operand = ops.copy(x) if several else x
        diagonal = _einsum(weighed, operand, padded, self.inner, self.chunk)
        del operand
        late = ops.unary(ops.scale(total), "exp", "output")
        faded = ops.mul(b, late)
        state = self.inner * self.states // self.chunk
        operand = ops.copy(x) if several else x
        states = _einsum(operand, ops.copy(faded), padded, state, self.chunk)
        del operand
        states, _first, _new = self._passed_on(total, states)
        early = ops.unary(total, "exp", "output")
        states = ops.copy(states) if several else states
        read = _einsum(ops.copy(c), states, padded, self.inner, self.states)
        across = ops.mul(read, early)
        out = ops.copy(ops.add(diagonal, across), "contiguous")
        out = ops.add(out, residual)
        return out if padded == TOKENS else ops.rows_slice(out, TOKENS)

    def _passed_on(self, total: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """States at the start of each chunk: of those before it, and of a first one of zeros."""
        tape, one = states.tape, BATCH * (self.inner * self.states)
        first = tape.tensor(one, 1, states.dtype, "first states")
        every = states.rows * states.width + one
        joined = _behind(states, every)
        chunks = -(-(tape.env.seq_len or 0) // self.chunk)
        ends = ops.rows_slice(total, BATCH * chunks)
        ends = ops.pad(ends, BATCH * (chunks + 1))
        between = ops.unary(_segments(ends, self.heads * (chunks + 1)), "exp", "output")
        # a first state and one for each chunk, by as many: (s / chunk + 1)^2 for a sequence
        filled = self.chunk + -(tape.env.seq_len or 0) % self.chunk
        by_pairs = SCORES + TOKENS * (2 * filled) + BATCH * filled**2
        each = -(-self.inner * self.states // self.chunk**2)
        new = _einsum(between, ops.copy(joined), every, 1, each, by_pairs)
        shown = ops.view(ops.rows_slice(new, states.rows * states.width), states.rows, states.width)
        return shown, first, new


def _segments(x: Tensor, width: int) -> Tensor:
    """``segment_sum``: masked, summed, masked again; keeps the small masks only."""
    tape = x.tape
    first = tape.tensor(x.rows, width, x.dtype, "masked_fill")
    second = tape.tensor(x.rows, width, x.dtype, "cumsum")
    del first
    out = tape.tensor(x.rows, width, x.dtype, "masked_fill")
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


def _einsum(
    a: Tensor, b: Tensor, rows: Size, width: int, inner: int, counted: Size | None = None
) -> Tensor:
    """A batched product over heads; operands that were copied to lie head by head live on."""
    return ops.matmul(a, b, rows, width, "einsum", inner=inner, counted=counted)


def _behind(states: Tensor, every: Size) -> Tensor:
    """``cat`` with a first state that asks for no gradient."""
    out = states.tape.tensor(every, 1, states.dtype, "cat")
    rows, width = states.rows, states.width
    ops.record([out], "cat", [states], lambda grad: (grad.alias(rows, width),))
    return out


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
