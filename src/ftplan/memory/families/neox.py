"""Decoders with layer norms, rotary positions and, mostly, attention beside the MLP.

GPT-NeoX (Pythia), Phi, StableLM and Persimmon: Llama's attention with other projections, a part
of each head rotated and joined to the rest again.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.llama import Config, GatedMLP, rotary_width, rotate_part
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    Shared,
    Stack,
    Stage,
    activation,
    rope_table,
)
from ftplan.memory.tape import Tape, Tensor


class PlainMLP(Module):
    """``out(act(in(x)))`` with biases."""

    def __init__(self, names: tuple[str, str], hidden: int, inner: int, act: str) -> None:
        super().__init__()
        self.names = names
        self.replace(names[0], Linear(hidden, inner, bias=True))
        self.replace(names[1], Linear(inner, hidden, bias=True))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(self.names[0]).forward(x)
        x = activation(x, self.act)
        out: Tensor = self.child(self.names[1]).forward(x)
        return out


def heads_of(config: Config, *, field: str = "attention_dropout") -> Heads:
    """The shape of attention; heads share the hidden size evenly."""
    count = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // count  # a rank's: part of the heads
    grouped = config["model_type"] in ("phi", "stablelm")
    kv_count = config.get("num_key_value_heads") if grouped else None
    return Heads(
        count=count,
        kv_count=kv_count or count,
        size=size,
        value_size=size,
        dropout=config.get(field) or 0.0,
    )


class HeadNorms(Module):
    """A layer norm of its own for each head (StableLM 2)."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.size, self.count = size, count
        self.norms = Module()
        for number in range(count):
            self.norms.replace(str(number), LayerNorm(size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        pieces = ops.split(x, [self.size] * self.count)
        normed = [
            self.norms.child(str(number)).forward(piece) for number, piece in enumerate(pieces)
        ]
        return ops.cat(normed)


class Attention(Module):
    """Attention whose rotated share of each head is joined to the rest again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        name = config["model_type"]
        self.heads = heads = heads_of(config)
        self.share = rotary_width(config, heads.size) / heads.size
        self.fused = name in ("gpt_neox", "persimmon")
        self.selects = name == "persimmon"
        bias = {"gpt_neox": bool(config.get("attention_bias", True)), "stablelm": False}
        out_bias = bias.get(name, True)
        if self.fused:
            self.query_key_value = Linear(hidden, 3 * heads.count * heads.size, bias=out_bias)
        else:
            in_bias = bool(config.get("use_qkv_bias")) if name == "stablelm" else True
            self.q_proj = Linear(hidden, heads.count * heads.size, bias=in_bias)
            self.k_proj = Linear(hidden, heads.kv_count * heads.size, bias=in_bias)
            self.v_proj = Linear(hidden, heads.kv_count * heads.size, bias=in_bias)
        self.out = "o_proj" if name == "stablelm" else "dense"
        self.replace(self.out, Linear(heads.count * heads.size, hidden, bias=out_bias))
        self.normed = bool(config.get("qk_layernorm")) and name != "gpt_neox"
        self.norm_per_head = name == "stablelm"
        if self.normed and self.norm_per_head:
            self.q_layernorm: Module = HeadNorms(heads.size, heads.count)
            self.k_layernorm: Module = HeadNorms(heads.size, heads.kv_count)
        elif self.normed:
            self.q_layernorm, self.k_layernorm = LayerNorm(heads.size), LayerNorm(heads.size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        if not self.fused:
            return self.q_proj.forward(x), self.k_proj.forward(x), self.v_proj.forward(x)
        qkv = self.query_key_value.forward(x)
        width = qkv.width // 3
        if self.selects:
            return ops.part(qkv, width), ops.part(qkv, width), ops.part(qkv, width)
        q, k, v = ops.split(qkv, [width] * 3)
        return q, k, v

    def norm(self, norm: Module, x: Tensor) -> Tensor:
        """A norm over each head."""
        if self.norm_per_head:
            out: Tensor = norm.forward(x)
            return out
        heads = x.width // self.heads.size
        out = norm.forward(ops.view(x, x.rows * heads, self.heads.size))
        return ops.view(out, x.rows, x.width)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x)
        if self.normed:
            q, k = self.norm(self.q_layernorm, q), self.norm(self.k_layernorm, k)
        cos, sin = shared.rope[""]
        q, k = rotate_part(q, cos, sin, self.share), rotate_part(k, cos, sin, self.share)
        out = attend(q, k, v, self.heads, shared.mask, by_head=True, held=held)
        result: Tensor = self.child(self.out).forward(out)
        return result


class NeoXBlock(Module):
    """GPT-NeoX: attention and MLP on the same input, each behind its own norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm = LayerNorm(hidden)
        self.post_attention_layernorm = LayerNorm(hidden)
        self.attention = Attention(config)
        names = ("dense_h_to_4h", "dense_4h_to_h")
        self.mlp = PlainMLP(names, hidden, config["intermediate_size"], config["hidden_act"])
        self.parallel = bool(config.get("use_parallel_residual", True))
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        attended = self.attention.forward(self.input_layernorm.forward(x), shared, held)
        attended = ops.dropout(attended, self.dropout)
        if self.parallel:
            fed = self.mlp.forward(self.post_attention_layernorm.forward(x))
            fed = ops.dropout(fed, self.dropout)
            return ops.add(ops.add(fed, attended), x)
        attended = ops.add(attended, x)
        fed = self.mlp.forward(self.post_attention_layernorm.forward(attended))
        fed = ops.dropout(fed, self.dropout)
        return ops.add(fed, attended)


class PhiBlock(Module):
    """Phi: one norm, attention and MLP beside each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.self_attn = Attention(config)
        self.mlp = PlainMLP(
            ("fc1", "fc2"), hidden, config["intermediate_size"], config["hidden_act"]
        )
        self.input_layernorm = LayerNorm(hidden)
        self.dropout = config.get("resid_pdrop") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = self.input_layernorm.forward(x)
        attended = self.self_attn.forward(x, shared, held)
        attended = ops.dropout(attended, self.dropout)
        fed = ops.dropout(self.mlp.forward(x), self.dropout)
        return ops.add(ops.add(attended, fed), residual)


class StableBlock(Module):
    """StableLM: pre-norm, or one norm for attention and MLP beside each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = LayerNorm(hidden)
        self.parallel = bool(config.get("use_parallel_residual"))
        if not self.parallel:
            self.post_attention_layernorm = LayerNorm(hidden)
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = self.input_layernorm.forward(x)
        attended = self.self_attn.forward(x, shared, held)
        if self.parallel:
            fed = ops.dropout(self.mlp.forward(x), self.dropout)
            return ops.add(ops.add(residual, attended), fed)
        residual = ops.add(residual, attended)
        fed = self.mlp.forward(self.post_attention_layernorm.forward(residual))
        fed = ops.dropout(fed, self.dropout)
        return ops.add(residual, fed)


class PersimmonBlock(Module):
    """Persimmon: pre-norm with layer norms."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.self_attn = Attention(config)
        names = ("dense_h_to_4h", "dense_4h_to_h")
        self.mlp = PlainMLP(names, hidden, config["intermediate_size"], config["hidden_act"])
        self.input_layernorm = LayerNorm(hidden)
        self.post_attention_layernorm = LayerNorm(hidden)
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = self.input_layernorm.forward(x)
        x = self.self_attn.forward(x, shared, held)
        x = ops.add(residual, x)
        residual = x
        x = self.post_attention_layernorm.forward(x)
        x = self.mlp.forward(x)
        x = ops.dropout(x, self.dropout)
        return ops.add(x, residual)


_BLOCKS: dict[str, type[Module]] = {
    "gpt_neox": NeoXBlock,
    "phi": PhiBlock,
    "stablelm": StableBlock,
    "persimmon": PersimmonBlock,
}
# body, table, final norm
_NAMES = {
    "gpt_neox": ("gpt_neox", "embed_in", "final_layer_norm"),
    "phi": ("model", "embed_tokens", "final_layernorm"),
    "stablelm": ("model", "embed_tokens", "norm"),
    "persimmon": ("model", "embed_tokens", "final_layernorm"),
}
_EMBEDDING_DROPOUT = {"gpt_neox": "hidden_dropout", "phi": "embd_pdrop"}


class NeoX(Network):
    """``GPTNeoXForCausalLM`` and its kin."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        name = config["model_type"]
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        self.body_name, table, norm = _NAMES[name]
        body = Module()
        body.replace(table, Embedding(vocabulary, hidden))
        body.replace(norm, LayerNorm(hidden))
        self.replace(self.body_name, body)
        self.table, self.final = f"{self.body_name}.{table}", f"{self.body_name}.{norm}"
        self.lm_head = Linear(hidden, vocabulary, bias=name == "phi")
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", f"{self.table}.weight")
        self.embedding_names = (self.table,)
        block = _BLOCKS[name]
        layers = f"{self.body_name}.layers"
        stack = Stack(layers, config["num_hidden_layers"], lambda _layer: block(config))  # type: ignore[call-arg]
        self.rope_width = rotary_width(config, heads_of(config).size)
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.child(self.table).forward(tape)
        shared.mask = make_mask(tape, x.dtype)
        field = _EMBEDDING_DROPOUT.get(self.config["model_type"])
        x = ops.dropout(x, (self.config.get(field) or 0.0) if field else 0.0)
        shared.rope[""] = rope_table(tape, self.rope_width, x.dtype)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.child(self.final).forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = dict.fromkeys(_BLOCKS, NeoX)
