"""OPT: learned positions, biases everywhere, dropout in training, ReLU."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import attend, make_mask
from ftplan.memory.families.llama import Config
from ftplan.memory.families.neox import heads_of
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
)
from ftplan.memory.tape import TOKENS, Tape, Tensor

POSITION_OFFSET = 2
"""Rows of the table of positions before the first position."""


def _table_width(config: Config) -> int:
    """The width of the table of words; only 350M has one of its own."""
    return int(config.get("word_embed_proj_dim") or config["hidden_size"])


class Attention(Module):
    """Multi-head attention; the queries are scaled by themselves."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config["hidden_size"], bool(config.get("enable_bias", True))
        self.heads = heads_of(config)
        inner = self.heads.count * self.heads.size
        self.k_proj = Linear(hidden, inner, bias=bias)
        self.v_proj = Linear(hidden, inner, bias=bias)
        self.q_proj = Linear(hidden, inner, bias=bias)
        self.out_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q = ops.scale(self.q_proj.forward(x))
        k, v = self.k_proj.forward(x), self.v_proj.forward(x)
        return self.out_proj.forward(attend(q, k, v, self.heads, shared.mask, held=held))


class Block(Module):
    """One decoder layer, with its norms before (all sizes but 350M) or after."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config["hidden_size"], bool(config.get("enable_bias", True))
        affine = bool(config.get("layer_norm_elementwise_affine", True))
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = LayerNorm(hidden, weight=affine, bias=affine)
        self.fc1 = Linear(hidden, config["ffn_dim"], bias=bias)
        self.fc2 = Linear(config["ffn_dim"], hidden, bias=bias)
        self.final_layer_norm = LayerNorm(hidden, weight=affine, bias=affine)
        self.before = bool(config.get("do_layer_norm_before", True))
        self.act = config["activation_function"]
        self.dropout = config.get("dropout") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        if self.before:
            x = self.self_attn_layer_norm.forward(x)
        x = self.self_attn.forward(x, shared, held)
        x = ops.dropout(x, self.dropout)
        x = ops.add(residual, x)
        if not self.before:
            x = self.self_attn_layer_norm.forward(x)
        residual = x
        if self.before:
            x = self.final_layer_norm.forward(x)
        x = self.fc1.forward(x)
        x = activation(x, self.act)
        x = self.fc2.forward(x)
        x = ops.dropout(x, self.dropout)
        x = ops.add(residual, x)
        if not self.before:
            x = self.final_layer_norm.forward(x)
        return x


class Decoder(Module):
    """``OPTDecoder`` but for its blocks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, narrow = config["hidden_size"], _table_width(config)
        affine = bool(config.get("layer_norm_elementwise_affine", True))
        self.embed_tokens = Embedding(config["vocab_size"], narrow)
        self.embed_positions = Embedding(
            config["max_position_embeddings"] + POSITION_OFFSET, hidden
        )
        self.projects = narrow != hidden
        if self.projects:
            self.project_out = Linear(hidden, narrow)
            self.project_in = Linear(narrow, hidden)
        kept = not config.get("_remove_final_layer_norm")
        self.normed = bool(config.get("do_layer_norm_before", True)) and kept
        if self.normed:
            self.final_layer_norm = LayerNorm(hidden, weight=affine, bias=affine)


class OPT(Network):
    """``OPTForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Module()
        self.decoder = Decoder(config)
        del self.children["decoder"]
        self.model.replace("decoder", self.decoder)
        self.lm_head = Linear(_table_width(config), config["vocab_size"])
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "model.decoder.embed_tokens.weight")
        self.embedding_names = ("model.decoder.embed_tokens",)
        layers = config["num_hidden_layers"]
        stack = Stack("model.decoder.layers", layers, lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.decoder.embed_tokens.forward(tape)
        shared.mask = make_mask(tape, x.dtype)
        positions = self.decoder.embed_positions.forward(tape, TOKENS)
        if self.decoder.projects:
            x = self.decoder.project_in.forward(x)
        return ops.add(x, positions)

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        if self.decoder.normed:
            x = self.decoder.final_layer_norm.forward(x)
        if self.decoder.projects:
            x = self.decoder.project_out.forward(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"opt": OPT}
