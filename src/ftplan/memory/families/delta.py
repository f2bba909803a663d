"""Kimi Linear: a delta rule whose decay is each channel's own, latent attention without positions.

Modelled is the path that transformers runs without the package flash-linear-attention:
``chunk_kimi_delta_attention`` in fp32, in chunks of 64 tokens. A decay of every channel for every
pair of a chunk's tokens is kept, and two products of as many numbers: 64 times a head's width for
each token and head. With that package far less is kept; this is then an upper bound.
Source: transformers 5.23.0, models/kimi_linear/modeling_kimi_linear.py.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import attend, sequence_rows
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families.decoder import MLP, Block, Config, Decoder, filled
from ftplan.memory.families.hybrid import CHUNK_TOKENS as CHUNK
from ftplan.memory.families.hybrid import (
    Conv1d,
    contiguous_fp32,
    decay_pairs,
    l2norm,
    to_copy,
    without_padding,
)
from ftplan.memory.families.latent import LatentAttention
from ftplan.memory.families.mixture import Mixture, act
from ftplan.memory.nn import Linear, Module, Network, Shared
from ftplan.memory.tape import BATCH, TOKENS, Grads, Tensor

_SQUARES = sum(i * i + i for i in range(1, CHUNK)) // CHUNK
"""Numbers for each token and head that the inverse of a unit triangle keeps, row after row."""


def _outer(a: Tensor, b: Tensor, width: int) -> Tensor:
    """``a.unsqueeze(-2) * b.unsqueeze(-3)``: a product for every pair of a chunk's tokens."""
    out = a.tape.tensor(a.rows, width, a.dtype, "product of pairs")
    rows, dtype = a.rows, a.dtype
    saved = (a if b.requires_grad else None, b if a.requires_grad else None)
    make_a, make_b = (ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (a, b))

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        wide = [grad.tape.tensor(rows, width, dtype, "gradient") for _ in saved]
        results = make_a(grad), make_b(grad)
        wide.clear()
        return results

    ops.record([out], "mul", [a, b], apply)
    return out


def _summed(x: Tensor, width: int) -> Tensor:
    """A sum over channels; the way back is a view."""
    out = x.tape.tensor(x.rows, width, x.dtype, "sum")
    rows, wide = x.rows, x.width
    ops.record([out], "sum", [x], lambda grad: (grad.alias(rows, wide),))
    return out


def _inverted(system: Tensor, heads: int) -> Tensor:
    """Row after row, each of the rows above it: in place, both operands of each product kept."""
    out = system.alias()
    rows, width, dtype = system.rows, system.width, system.dtype
    saved = None
    if ops.records(system):
        saved = system.tape.tensor(rows, heads * _SQUARES, dtype, "rows above")

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (grad.tape.tensor(rows, width, dtype, "gradient"),)

    ops.record([out], "rows", [system], apply)
    return out


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, heads: int) -> Tensor:
    """``chunk_kimi_delta_attention``; widths are heads x head size, those of beta heads."""
    dtype, wide = q.dtype, q.width
    q, k, v, beta, decay = (contiguous_fp32(t) for t in (q, k, v, beta, decay))
    q, k = l2norm(q, heads), l2norm(k, heads)
    padded = sequence_rows(q.tape, CHUNK)  # even what is long enough is copied
    q = ops.scale(ops.pad(q, padded))
    k, v, decay, beta = (ops.pad(t, padded) for t in (k, v, decay, beta))
    v_beta, k_beta = ops.mul(v, beta), ops.mul(k, beta)
    decay = ops.scale(decay, "cumsum")
    pairs = decay_pairs(decay, CHUNK * wide)
    pairs = ops.scale(pairs, "masked_fill")
    pairs = ops.unary(pairs, "exp", "output")
    system = _summed(ops.mul(_outer(k_beta, k, CHUNK * wide), pairs), CHUNK * heads)
    system = ops.scale(ops.scale(system, "masked_fill"))
    system = _inverted(system, heads)
    system = ops.shift(system)
    v = ops.matmul(system, v_beta, padded, wide, "values", inner=CHUNK)
    decayed = ops.mul(k_beta, ops.unary(decay, "exp", "output"))
    k_cumulated = ops.matmul(system, decayed, padded, wide, "keys", inner=CHUNK)
    out = _scan(v, k_cumulated, q, k, decay, pairs, heads)
    return to_copy(out if padded == TOKENS else ops.rows_slice(out, TOKENS), dtype)


def _scan(
    values: Tensor, k_cumulated: Tensor, q: Tensor, k: Tensor, decay: Tensor, pairs: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """The walk over chunks: keeps each chunk's products of pairs, its state and its operands."""
    tape, rows, wide = values.tape, values.rows, q.width
    size = wide // heads
    state = wide * size
    low = tape.env.autocast or "fp32"
    inputs = [values, k_cumulated, q, k, decay, pairs]
    each = 4 * state + CHUNK * wide  # four products with the state or the keys
    tape.multiply(rows, each, name="delta rule")
    out = tape.tensor(rows, wide, values.dtype, "delta rule output")
    chunk = BATCH * CHUNK
    kept: list[list[Tensor]] = []
    """Of the last chunk, the one before it, all others; and what is whole."""
    if ops.records(*inputs):
        states = max(1, state // CHUNK)
        casts = 2 * states if low != "fp32" else 0
        for part in (rows + chunk * -2, chunk, chunk):
            last = 0 if len(kept) == 2 else 1  # nothing comes of its state
            kept.append([
                tape.tensor(part, wide + states + last * wide, "fp32", "scan operands"),
                tape.tensor(part, (1 + 2 * last) * wide + CHUNK * heads + casts, low, "operands"),
            ])  # fmt: skip
            if pairs.requires_grad:
                kept[-1].append(tape.tensor(part, CHUNK * wide, "fp32", "product of pairs"))
        kept.insert(0, [k_cumulated, q, k, pairs])
    passing = tape.tensor(chunk, CHUNK * wide, "fp32", "product of pairs")
    del passing
    held = [kept]
    del kept
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in inputs]

    def apply(grad: Tensor) -> Grads:
        (kept,) = held
        tape = grad.tape
        tape.multiply(rows, 2 * each, name="delta rule")
        grads = [make(grad) for make in makers]
        kept.pop()
        # a chunk's gradients of both factors, and its slice of the decays' in zeros of the whole
        factors = [tape.tensor(chunk, CHUNK * wide, "fp32", "gradient") for _ in range(2)]
        kept.pop()
        zeros = makers[-1](grad)
        del zeros
        factors.clear()
        kept.clear()
        return tuple(grads)

    ops.record([out], "delta rule", inputs, apply)
    return out


class ForgetGate(Module):
    """``KimiLinearForgetGate``: a softplus that is the input itself where that is large."""

    def __init__(self, hidden: int, heads: int, size: int) -> None:
        super().__init__()
        self.f_a_proj = Linear(hidden, size)
        self.f_b_proj = Linear(size, heads * size)
        self.dt_bias = self.parameter("dt_bias", heads * size)
        self.A_log = self.parameter("A_log", 1, 1, heads, 1)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        gate = self.f_b_proj.forward(self.f_a_proj.forward(x))
        step = ops.add(ops.to(gate, "fp32"), ops.to(tape.leaf(self.dt_bias), "fp32"))
        rate = ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output")
        large = tape.tensor(step.rows, step.width, "bool", "large")
        soft = ops.unary(ops.shift(ops.unary(step, "exp", "output")), "log", "input")
        soft = ops.where(large, step, soft)
        rate = ops.view(ops.neg(rate), rate.rows, rate.width)
        return _weighed(soft, rate)


def _weighed(x: Tensor, rate: Tensor) -> Tensor:
    """Each head's channels times one number."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "mul")
    saved = (x if rate.requires_grad else None, rate if x.requires_grad else None)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, rate)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return tuple(make(grad) for make in makers)

    ops.record([out], "mul", [x, rate], apply)
    return out


class GatedNorm(Module):
    """``KimiLinearRMSNormGated``: normed and weighed by ``sigmoid(gate)``, all in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = x.dtype
        hidden = ops.to(x, "fp32")
        root = ops.unary(ops.shift(ops.mean_square(hidden)), "rsqrt", "output")
        hidden = ops.mul(hidden, root)
        hidden = ops.mul(ops.to(x.tape.leaf(self.weight), "fp32"), hidden)
        hidden = ops.mul(hidden, ops.unary(ops.to(gate, "fp32"), "sigmoid", "output"))
        return ops.to(hidden, dtype)


class DeltaAttention(Module):
    """``KimiLinearDeltaAttention``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["linear_num_heads"]
        self.size = config["linear_head_dim"]
        self.wide = self.heads * self.size
        self.state_values = self.wide * self.size
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", Linear(hidden, self.wide))
        self.conv1d = Conv1d(3 * self.wide, config["linear_conv_kernel_dim"])
        self.forget_gate = ForgetGate(hidden, self.heads, self.size)
        self.b_proj = Linear(hidden, self.heads)
        self.g_a_proj = Linear(hidden, self.size)
        self.g_b_proj = Linear(self.size, self.wide)
        self.o_norm = GatedNorm(self.size)
        self.o_proj = Linear(self.wide, hidden)

    def forward(self, x: Tensor, _shared: Shared, _held: list[Tensor] | None = None) -> Tensor:
        x = without_padding(x)
        mixed = ops.cat([self.children[f"{name}_proj"].forward(x) for name in ("q", "k", "v")])
        mixed = self.conv1d.forward(mixed)
        q, k, v = ops.split(mixed, [self.wide] * 3)
        decay = self.forget_gate.forward(x)
        beta = ops.unary(self.b_proj.forward(x), "sigmoid", "output")
        out = delta_rule(q, k, v, decay, beta, self.heads)
        gate = self.g_b_proj.forward(self.g_a_proj.forward(x))
        rows = x.rows * self.heads
        out = self.o_norm.forward(ops.view(out, rows, self.size), ops.view(gate, rows, self.size))
        return self.o_proj.forward(ops.view(out, x.rows, self.wide))


class PlainAttention(LatentAttention):
    """Latent attention without positions (``KimiLinearAttention``)."""

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q = self.queries(x)
        latent = self.kv_a_proj_with_mqa.forward(x)
        kv, rest = ops.split(latent, [self.rank, self.turned])
        kv = self.kv_a_layernorm.forward(kv)
        key, value = self.expand(kv, rest)
        out = attend(q, key, value, self.heads, shared.masks[""], by_head=True, held=held)
        return self.o_proj.forward(out)


def _arranged(config: dict[str, Any]) -> dict[str, Any]:
    """With what the class makes of a config: the sizes of ``linear_attn_config``, kinds of layers.

    Layers are counted from one there.
    """
    given, count = config.get("linear_attn_config") or {}, config["num_hidden_layers"]
    for name, old in (
        ("linear_head_dim", "head_dim"), ("linear_num_heads", "num_heads"),
        ("linear_conv_kernel_dim", "short_conv_kernel_size"),
    ):  # fmt: skip
        config[name] = given.get(old, config[name])
    full = given.get("full_attn_layers")
    if full is None:
        full = [layer + 1 for layer in range(4, count, 4)]
    config["layer_types"] = list(config.get("layer_types") or ()) or [
        "full_attention" if layer + 1 in full else "linear_attention" for layer in range(count)
    ]
    dense = config.get("first_k_dense_replace", 1)
    config["mlp_layer_types"] = list(config.get("mlp_layer_types") or ()) or [
        "dense" if layer < dense else "sparse" for layer in range(count)
    ]
    return config


def kimi_linear(raw: Config) -> Network:
    """``KimiLinearForCausalLM``."""
    config = _arranged(filled(raw))
    types, kinds = config["layer_types"], config["mlp_layer_types"]

    def mixture(config: Config) -> Module:
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        count = config["num_local_experts"]
        router = Router(
            hidden, count, config["num_experts_per_tok"], scoring="sigmoid", upcast=True,
            keep_fp32=True, scaled=True, normalize=bool(config["norm_topk_prob"]),
        )  # fmt: skip
        every = MLP(hidden, inner * config["n_shared_experts"], act(config))
        experts = Experts(hidden, inner, count, act=act(config))
        return Mixture(router, experts, shared=("shared_experts", every))

    def block(config: Config, layer: int) -> Module:
        linear = types[layer] == "linear_attention"
        mixer: Module = DeltaAttention(config) if linear else PlainAttention(config, "none")
        if kinds[layer] == "sparse":
            return Block(config, mixer, mixture(config))
        mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
        return Block(config, mixer, mlp)

    return Decoder(config, block, kind=lambda layer: (types[layer], kinds[layer]), ropes={})


MODEL_TYPES = {"kimi_linear": kimi_linear}
