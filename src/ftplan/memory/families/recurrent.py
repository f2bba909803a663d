"""State-space and convolutional decoders: Mamba, Falcon Mamba, LFM2.

Modelled is the path that transformers runs without the packages mamba-ssm and causal-conv1d: the
scan is a loop over tokens (``mamba_selective_scan``), whose every state autograd keeps. With those
packages the states are recomputed and far less is kept; this is then an upper bound.
Source: transformers 5.23.0, models/mamba, falcon_mamba, lfm2.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families.decoder import MLP, Attention, Block, Config, Decoder, filled
from ftplan.memory.families.hybrid import Conv1d, without_padding
from ftplan.memory.families.mixture import Mixture
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import TOKENS, Grads, Tensor


class MambaMixer(Module):
    """``MambaMixer``; ``normed``: Falcon's, which norms B, C and the time step."""

    def __init__(self, config: Config, *, normed: bool) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.inner = int(config.get("intermediate_size") or config["expand"] * hidden)
        self.states = config["state_size"]
        self.state_values = self.inner * self.states
        rank = config["time_step_rank"]
        self.rank = -(-hidden // 16) if rank == "auto" else int(rank)
        bias = bool(config["use_bias"])
        self.A_log = self.parameter("A_log", self.inner, self.states)
        self.D = self.parameter("D", self.inner)
        kernel = config["conv_kernel"]
        self.conv1d = Conv1d(self.inner, kernel, bias=bool(config["use_conv_bias"]))
        self.in_proj = Linear(hidden, 2 * self.inner, bias=bias)
        self.x_proj = Linear(self.inner, self.rank + 2 * self.states)
        self.dt_proj = Linear(self.rank, self.inner, bias=True)
        self.out_proj = Linear(self.inner, hidden, bias=bias)
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        tape, dtype = x.tape, x.dtype
        x = without_padding(x)
        projected = self.in_proj.forward(x)
        rate = ops.neg(ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output"))
        inner, gate = ops.split(projected, [self.inner, self.inner])
        inner = without_padding(self.conv1d.forward(inner))
        selected = self.x_proj.forward(ops.copy(inner, "contiguous"))
        step, b, c = ops.split(selected, [self.rank, self.states, self.states])
        del selected
        step, b, c = self.selected(step, b, c)
        assert self.dt_proj.bias is not None
        step = ops.linear(step, tape.leaf(self.dt_proj.weight))
        bias = ops.to(tape.leaf(self.dt_proj.bias), "fp32")
        out = self.scan(inner, step, rate, b, c, gate, bias)
        return self.out_proj.forward(ops.to(out, dtype))

    def selected(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The time step, B and C as the scan takes them."""
        if not self.normed:
            return step, b, c
        step, b, c = (RMSNorm(t.width, weight=False).forward(t) for t in (step, b, c))
        return step, b, c

    def scan(
        self, inner: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, gate: Tensor,
        bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """``mamba_selective_scan``: tokens x inner x states numbers, several times."""
        tape = inner.tape
        step = ops.add(step, ops.to(bias, step.dtype))
        step = ops.unary(ops.autocast_fp32(step), "softplus", "input")
        discrete = ops.unary(self.spread(step, rate, step.dtype), "exp", "output")
        inputs = self.spread(step, ops.to(b, "fp32"), "fp32")
        inputs = self.weighed(inputs, ops.to(inner, "fp32"))
        out = _loop(discrete, inputs, c, inner, self.inner * self.states)
        skip = ops.mul(inner, ops.to(tape.leaf(self.D), "fp32"))
        out = ops.add(out, skip)
        del skip
        return ops.mul(out, ops.unary(gate, "silu", "input"))

    def spread(self, a: Tensor, b: Tensor, dtype: str) -> Tensor:
        """A product over inner x states for each token; keeps both factors."""
        tape = a.tape
        out = tape.tensor(TOKENS, self.inner * self.states, ops.promote(a.dtype, b.dtype), "spread")
        saved = (a if b.requires_grad else None, b if a.requires_grad else None)
        shape = (out.rows, out.width, out.dtype)
        make_a = ops.like(a.rows, a.width, a.dtype, a.requires_grad)
        make_b = ops.like(b.rows, b.width, b.dtype, b.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            first = grad.tape.tensor(*shape, "gradient")
            second = grad.tape.tensor(*shape, "gradient")
            results = make_a(grad), make_b(grad)
            del first, second
            return results

        ops.record([out], "spread", [a, b], apply)
        return out

    def weighed(self, a: Tensor, b: Tensor) -> Tensor:
        """Each token's numbers times one number for each of its states."""
        out = a.tape.tensor(a.rows, a.width, a.dtype, "weighed")
        saved = (a if b.requires_grad else None, b if a.requires_grad else None)
        make_a = ops.like(a.rows, a.width, a.dtype, a.requires_grad)
        make_b = ops.like(b.rows, b.width, b.dtype, b.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return make_a(grad), make_b(grad)

        ops.record([out], "mul", [a, b], apply)
        return out


def _loop(discrete: Tensor, inputs: Tensor, c: Tensor, inner: Tensor, width: int) -> Tensor:
    """A step for each token: keeps the states, and their casts that meet C."""
    tape = discrete.tape
    low = tape.env.autocast or inner.dtype
    tape.multiply(TOKENS, width)
    out = tape.tensor(TOKENS, inner.width, low, "scan output")
    sources = [discrete, inputs, c]
    kept: list[Tensor] = []
    if ops.records(*sources):
        kept = [discrete, c, tape.tensor(TOKENS, width, "fp32", "states")]
        if low != "fp32":
            kept.append(tape.tensor(TOKENS, width, low, "state casts"))
    saved = tuple(kept)
    del kept
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in sources]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(TOKENS, width, times=2)
        grads = tuple(make(grad) for make in makers)
        zeros = grad.tape.tensor(TOKENS, width, "fp32", "gradient")  # each step's slice in zeros
        del zeros
        return grads

    ops.record([out], "scan", sources, apply)
    return ops.copy(out, "stack")


class MambaBlock(Module):
    """``MambaBlock``: the residual stream may be fp32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config["hidden_size"])
        self.mixer = MambaMixer(config, normed=config["model_type"] == "falcon_mamba")
        self.fp32 = bool(config["residual_in_fp32"])

    def forward(self, x: Tensor, _shared: Shared) -> Tensor:
        residual = x
        assert self.norm.weight is not None
        x = self.norm.forward(ops.to(x, self.norm.weight.dtype))
        if self.fp32:
            residual = ops.to(residual, "fp32")
        x = self.mixer.forward(x)
        return ops.add(residual, x)


class Mamba(Decoder):
    """``MambaForCausalLM``: the head's input is cast to its weight's dtype, its output to fp32."""

    def head(self, x: Tensor) -> Tensor:
        weight = self.children["lm_head"].parameters["weight"]
        return ops.to(super().head(ops.to(x, weight.dtype)), "fp32")


def mamba(raw: Config) -> Network:
    """``MambaForCausalLM``, ``FalconMambaForCausalLM``."""
    return Mamba(
        filled(raw), lambda config, _layer: MambaBlock(config), ropes={}, windows={},
        norm_name="norm_f", path="backbone", embed_name="embeddings",
    )  # fmt: skip


class ShortConv(Module):
    """``Lfm2ShortConv``: a gated convolution over a few tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config["hidden_size"], bool(config["conv_bias"])
        self.conv = Conv1d(hidden, config["conv_L_cache"], bias=bias, act=False)
        self.in_proj = Linear(hidden, 3 * hidden, bias=bias)
        self.out_proj = Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor, _shared: Shared, _held: list[Tensor] | None = None) -> Tensor:
        x = without_padding(x)
        both = self.in_proj.forward(x)
        b, c, x = ops.split(both, [both.width // 3] * 3)
        del both
        x = self.conv.forward(ops.mul(b, x))
        x = ops.mul(c, x)
        return self.out_proj.forward(ops.copy(x, "contiguous"))


class LfmAttention(Attention):
    """LFM2's attention: the norms bear other names."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, bias=False, qk_norm="head", out_name="out_proj")
        for old, new in (("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")):
            self.children[new] = self.children.pop(old)


def lfm2(raw: Config) -> Network:
    """``Lfm2ForCausalLM``."""
    config = filled(raw)
    count, inner = config["num_hidden_layers"], config["intermediate_size"]
    inner = config.get("block_ff_dim") or inner
    if config["block_auto_adjust_ff_dim"]:
        inner = int(2 * inner / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            multiple = config["block_multiple_of"]
            inner = int(config["block_ffn_dim_multiplier"] * inner)
            inner = multiple * -(-inner // multiple)
    attends = config.get("full_attn_idxs")
    attends = range(count) if attends is None else attends
    types = list(config.get("layer_types") or ()) or [
        "full_attention" if layer in attends else "conv" for layer in range(count)
    ]

    def block(config: Config, layer: int) -> Module:
        conv = types[layer] == "conv"
        mixer: Module = ShortConv(config) if conv else LfmAttention(config)
        mlp = MLP(config["hidden_size"], inner, "silu", names=("w1", "w3", "w2"))
        return Block(
            config, mixer, mlp, mixer_name="conv" if conv else "self_attn",
            mlp_name="feed_forward", norms=("operator_norm", "ffn_norm"),
        )  # fmt: skip

    return Decoder(
        config, block, kind=lambda layer: types[layer] == "conv", norm_name="embedding_norm"
    )


def lfm2_moe(raw: Config) -> Network:
    """``Lfm2MoeForCausalLM``: experts in all but the first layers."""
    config = filled(raw)
    config["tie_word_embeddings"] = raw.get("tie_embedding", config["tie_word_embeddings"])
    count, dense = config["num_hidden_layers"], config["num_dense_layers"]
    types = list(config.get("layer_types") or ()) or ["full_attention"] * count

    def block(config: Config, layer: int) -> Module:
        hidden = config["hidden_size"]
        conv = types[layer] == "conv"
        mixer: Module = ShortConv(config) if conv else LfmAttention(config)
        if layer < dense:
            mlp: Module = MLP(hidden, config["intermediate_size"], "silu", names=("w1", "w3", "w2"))
        else:
            chosen = "sigmoid" if config["use_expert_bias"] else "sigmoid_topk"
            router = Router(
                hidden, config["num_experts"], config["num_experts_per_tok"], scoring=chosen,
                normalize=bool(config["norm_topk_prob"]), scaled=True, keep_fp32=True,
            )  # fmt: skip
            experts = Experts(hidden, config["moe_intermediate_size"], config["num_experts"])
            mlp = Mixture(router, experts)
        return Block(
            config, mixer, mlp, mixer_name="conv" if conv else "self_attn",
            mlp_name="feed_forward", norms=("operator_norm", "ffn_norm"),
        )  # fmt: skip

    return Decoder(
        config, block, kind=lambda layer: (types[layer] == "conv", layer < dense),
        norm_name="embedding_norm",
    )  # fmt: skip


MODEL_TYPES = {"mamba": mamba, "falcon_mamba": mamba, "lfm2": lfm2, "lfm2_moe": lfm2_moe}
