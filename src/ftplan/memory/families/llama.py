"""The Llama line: pre-norm decoder, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.nn import (
    Embedding,
    Linear,
    Module,
    Network,
    RMSNorm,
    Shared,
    Stack,
    Stage,
    activation,
    rope_table,
)
from ftplan.memory.tape import Tape, Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in elementwise steps (``apply_rotary_pos_emb``)."""
    return ops.add(ops.mul(x, cos), ops.mul(_rotate_half(x), sin))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = ops.part(x, x.width // 2), ops.part(x, x.width - x.width // 2)
    return ops.cat((ops.neg(second), first))


class Attention(Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        count = config["num_attention_heads"]
        kv_count = config.get("num_key_value_heads") or count
        size = config.get("head_dim") or hidden // count
        self.heads = Heads(count=count, kv_count=kv_count, size=size, value_size=size)
        bias = bool(config.get("attention_bias"))
        self.q_proj = Linear(hidden, count * size, bias=bias)
        self.k_proj = Linear(hidden, kv_count * size, bias=bias)
        self.v_proj = Linear(hidden, kv_count * size, bias=bias)
        self.o_proj = Linear(count * size, hidden, bias=bias)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        q = self.q_proj.forward(x)
        k = self.k_proj.forward(x)
        v = self.v_proj.forward(x)
        cos, sin = shared.rope[""]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, self.heads, shared.mask)
        return self.o_proj.forward(out)


class GatedMLP(Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        bias = bool(config.get("mlp_bias"))
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.act = config.get("hidden_act") or "silu"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj.forward(
            ops.mul(activation(self.gate_proj.forward(x), self.act), self.up_proj.forward(x))
        )


class Block(Module):
    """One decoder layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"])

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        residual = x
        x = self.input_layernorm.forward(x)
        x = self.self_attn.forward(x, shared)
        x = ops.add(residual, x)
        residual = x
        x = self.post_attention_layernorm.forward(x)
        x = self.mlp.forward(x)
        return ops.add(residual, x)


class Body(Module):
    """``LlamaModel`` but for its blocks: the table before them and the norm after."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config["vocab_size"], config["hidden_size"])
        self.norm = RMSNorm(config["hidden_size"])


class Llama(Network):
    """``LlamaForCausalLM``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Body(config)
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", "model.embed_tokens.weight")
        stack = Stack("model.layers", config["num_hidden_layers"], lambda _layer: Block(config))
        self.rope_width = Attention(config).heads.size
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x = self.model.embed_tokens.forward(tape)
        shared.rope[""] = rope_table(tape, self.rope_width, x.dtype)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return self.model.norm.forward(x)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"llama": Llama, "mistral": Llama}
