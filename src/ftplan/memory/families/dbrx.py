"""DBRX: experts in a Python loop, one after the other, over the tokens that chose them.

The loop has as many rows in all as there are tokens times experts a token; one expert's share of
them is modelled as the whole, which is the same for what is kept and an upper bound for what a
single expert needs for a moment. Source: transformers 5.23.0, models/dbrx/modeling_dbrx.py.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.experts import gather_rows, topk
from ftplan.memory.families.decoder import Config, Decoder, filled
from ftplan.memory.families.llama import rotate
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, Shared, activation
from ftplan.memory.tape import Grads, Parameter, Tensor

_ATTENTION = {"attn_pdrop": 0.0, "clip_qkv": None, "kv_n_heads": 1}
_EXPERTS = {
    "hidden_size": 6144, "ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1,
    "ffn_act_fn": None, "moe_normalize_expert_weights": 1.0,
}  # fmt: skip


class DbrxAttention(Module):
    """Queries, keys and values from one matrix, clamped."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["d_model"], config["n_heads"]
        attention = {**_ATTENTION, **(config.get("attn_config") or {})}
        kv_count, size = attention["kv_n_heads"], hidden // count
        self.heads = Heads(
            count=count, kv_count=kv_count, size=size, value_size=size,
            dropout=attention["attn_pdrop"],
        )  # fmt: skip
        self.Wqkv = Linear(hidden, hidden + 2 * kv_count * size)
        self.out_proj = Linear(hidden, hidden)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        heads = self.heads
        narrow = heads.kv_count * heads.size
        qkv = ops.unary(self.Wqkv.forward(x), "clamp", "input")
        q, k, v = ops.split(qkv, [heads.count * heads.size, narrow, narrow])
        del qkv
        cos, sin = shared.rope[""]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.out_proj.forward(attend(q, k, v, heads, shared.masks[""], held=held))


class DbrxExperts(Module):
    """``DbrxFFN``: a router and the loop over experts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = {**_EXPERTS, **(config.get("ffn_config") or {})}
        hidden, inner = settings["hidden_size"], settings["ffn_hidden_size"]
        self.count, self.top_k = settings["moe_num_experts"], settings["moe_top_k"]
        self.inner = inner
        self.act = (settings["ffn_act_fn"] or {}).get("name", "silu")
        self.layer = Linear(hidden, self.count)
        self.router = Module()
        self.router.children["layer"] = self.children.pop("layer")
        self.experts, weights = Module(), Module()
        self.experts.children["mlp"] = weights
        self.weights = [
            weights.parameter(name, self.count * inner, hidden) for name in ("w1", "v1", "w2")
        ]

    def forward(self, x: Tensor) -> Tensor:
        scores = ops.softmax(self.layer.forward(x))
        values, index = topk(scores, self.top_k)
        values = ops.scale(values, "div")
        rows = x.rows * self.top_k
        out = x.tape.tensor(x.rows, x.width, x.dtype, "sum over experts")
        order = x.tape.tensor(rows, 1, "int64", "tokens of experts")
        picked = gather_rows(x, order, rows, x.width)
        w1, v1, w2 = self.weights
        gate, up = self.product(picked, w1, self.inner), self.product(picked, v1, self.inner)
        gate = activation(gate, self.act)
        states = self.product(ops.mul(gate, up), w2, x.width)
        states = ops.mul(states, gather_rows(values, index, rows, 1))
        return _added(out, states, order)

    def product(self, x: Tensor, weight: Parameter, width: int) -> Tensor:
        """Rows times their expert's slice of the weight; the slice's gradient fills the whole."""
        tape = x.tape
        leaf = ops.autocast(tape.leaf(weight))
        x = ops.autocast(x)
        rows, inner = x.rows, x.width
        tape.multiply(rows, inner, width)
        out = tape.tensor(rows, width, x.dtype, "matmul")
        saved = (x if leaf.requires_grad else None, leaf if x.requires_grad else None)
        make_x = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
        make_weight = ops.like(leaf.rows, leaf.width, leaf.dtype, leaf.requires_grad)
        experts = self.count
        wants = x.requires_grad + leaf.requires_grad

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            grad.tape.multiply(rows, inner, width, times=wants)
            total = make_weight(grad)
            if total is not None and experts > 1:
                another = make_weight(grad)  # each expert's share comes in zeros of the whole
                del another
            return make_x(grad), total

        ops.record([out], "matmul", [x, leaf], apply)
        return out


def _added(out: Tensor, states: Tensor, index: Tensor) -> Tensor:
    """``index_add_``: keeps the index."""
    total = out.alias()
    saved = index
    make = ops.like(states.rows, states.width, states.dtype, states.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([total], "index_add", [states], apply)
    return total


class DbrxBlock(Module):
    """``DbrxBlock``: the first half is a module of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(config["d_model"], bias=False)
        self.attn = DbrxAttention(config)
        self.norm_2 = LayerNorm(config["d_model"], bias=False)
        first = Module()
        first.children = {name: self.children.pop(name) for name in ("norm_1", "attn", "norm_2")}
        self.norm_attn_norm = first
        self.ffn = DbrxExperts(config)
        self.dropout = config.get("resid_pdrop") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = ops.to(self.norm_1.forward(x), x.dtype)
        x = ops.dropout(self.attn.forward(x, shared, held), self.dropout)
        x = ops.add(x, residual)
        residual = x
        x = ops.to(self.norm_2.forward(x), x.dtype)
        x = ops.dropout(self.ffn.forward(x), self.dropout)
        return ops.add(residual, x)


def dbrx(raw: Config) -> Network:
    """``DbrxForCausalLM``."""
    return Decoder(
        filled(raw), lambda config, _layer: DbrxBlock(config), path="transformer",
        embed_name="wte", norm_name="norm_f", layers_name="blocks",
        norm=lambda width: LayerNorm(width, bias=False),
    )  # fmt: skip


MODEL_TYPES = {"dbrx": dbrx}
