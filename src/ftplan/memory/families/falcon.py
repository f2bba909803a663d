"""Falcon: one key-value head (7B) or a few that are copied out to all (40B, 180B), or ALiBi (RW).

Its attention asks for a mask always, so flash never runs; with one key-value head no fused kernel
does, and the scores of all heads are kept.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.attention import (
    Heads,
    attend,
    attend_broadcast,
    make_mask,
    operand,
    spread,
)
from ftplan.memory.families.llama import Config, rotate
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
from ftplan.memory.tape import SCORES, TOKENS, Tape, Tensor


class FalconLinear(Linear):
    """A product with a view of the weight and, where there is a bias, a sum of its own."""

    def forward(self, x: Tensor) -> Tensor:
        out = ops.linear(x, x.tape.view(self.weight), plain=True)
        return ops.add(out, x.tape.leaf(self.bias)) if self.bias else out


class Attention(Module):
    """One matrix for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        self.grouped = bool(config.get("new_decoder_architecture"))
        multi_query = bool(config.get("multi_query", True))
        self.single = multi_query and not self.grouped
        size = hidden // count
        self.kv_count = config.get("num_kv_heads") or count if self.grouped else count
        self.kv_count = 1 if self.single else self.kv_count
        self.size = size
        self.heads = Heads(
            count=count,
            kv_count=1 if self.single else count,
            size=size,
            value_size=size,
            dropout=config.get("attention_dropout") or 0.0,
        )
        self.alibi = bool(config.get("alibi"))
        bias = bool(config.get("bias"))
        width = hidden + 2 * self.kv_count * size
        self.query_key_value = FalconLinear(hidden, width, bias=bias)
        self.dense = FalconLinear(hidden, hidden, bias=bias)

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow = self.kv_count * self.size
        q = ops.part(fused, self.heads.count * self.size)
        k, v = ops.part(fused, narrow), ops.part(fused, narrow)
        if not (self.single or self.grouped):
            return q, k, v
        k, v = ops.copy(k), ops.copy(v)
        if self.grouped:
            repeats = self.heads.count // self.kv_count
            q = ops.copy(q)
            k, v = _spread(k, repeats), _spread(v, repeats)
        return q, k, v

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        fused = self.query_key_value.forward(x)
        q, k, v = self._split(fused)
        if not self.alibi:
            cos, sin = shared.rope[""]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = shared.mask
        if x.tape.env.attention == "flash":
            if self.alibi:  # FalconFlashAttention2 raises
                raise UnsupportedError(
                    "flash attention of a Falcon with alibi", remedy="use attention: sdpa"
                )
            return self.dense.forward(attend(q, k, v, self.heads))
        assert mask is not None
        if x.tape.env.attention == "eager":
            out = self._eager(q, k, v, mask, shared, x.dtype, held)
        elif self.single:
            out = attend_broadcast(q, k, v, self.heads, mask)
        else:
            out = attend(q, k, v, self.heads, mask)
        return self.dense.forward(out)

    def _eager(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        shared: Shared,
        dtype: str,
        held: list[Tensor],
    ) -> Tensor:
        heads = self.heads
        left, right = operand(ops.autocast(q)), self._operand(k)
        scores = ops.matmul(left, right, SCORES * heads.count, 1, "scores")
        del left, right
        if self.alibi:
            assert shared.bias is not None
            scores = ops.shift(ops.to(scores, "fp32"))
        weights = ops.softmax(ops.to(ops.add(scores, mask), dtype))
        if self.alibi:
            weights = ops.dropout(weights, heads.dropout)
        held.append(weights)
        v = self._operand(v)
        return ops.copy(ops.matmul(weights, v, q.rows, q.width, "attention"))

    def _operand(self, x: Tensor) -> Tensor:
        x = ops.autocast(x)
        return spread(x, self.heads) if self.single else operand(x)


def _spread(x: Tensor, repeats: int) -> Tensor:
    """``broadcast_to`` and ``flatten``: a copy for each query head, even for one."""
    return ops.expand_heads(x, repeats) if repeats > 1 else ops.copy(x)


class Block(Module):
    """Attention beside the MLP with one norm or two, or one after the other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        inner = config.get("ffn_hidden_size") or 4 * hidden
        self.new = bool(config.get("new_decoder_architecture"))
        self.parallel = bool(config.get("parallel_attn", True))
        count = config.get("num_ln_in_parallel_attn") or (2 if self.new else 1)
        self.two = self.parallel and count == 2
        bias = bool(config.get("bias"))
        self.self_attention = Attention(config)
        self.mlp = Module()
        self.mlp.replace("dense_h_to_4h", FalconLinear(hidden, inner, bias=bias))
        self.mlp.replace("dense_4h_to_h", FalconLinear(inner, hidden, bias=bias))
        if self.two:
            self.ln_attn, self.ln_mlp = LayerNorm(hidden), LayerNorm(hidden)
        else:
            self.input_layernorm = LayerNorm(hidden)
        if not self.parallel:
            self.post_attention_layernorm = LayerNorm(hidden)
        self.act = config.get("activation") or "gelu"
        self.attention_dropout = config.get("attention_dropout") or 0.0
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        if self.two:
            normed = self.ln_attn.forward(x)
            fed = self.ln_mlp.forward(x)
        else:
            fed = normed = self.input_layernorm.forward(x)
        attended = self.self_attention.forward(normed, shared, held)
        if not (self.new or self.parallel):
            residual = ops.add(residual, ops.dropout(attended, self.attention_dropout))
            fed = self.post_attention_layernorm.forward(residual)
        out: Tensor = self.mlp.child("dense_h_to_4h").forward(fed)
        out = activation(out, self.act)
        out = self.mlp.child("dense_4h_to_h").forward(out)
        if self.new or self.parallel:
            out = ops.add_(out, attended)
        return ops.add(residual, ops.dropout(out, self.dropout))


class Falcon(Network):
    """``FalconForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden = config["hidden_size"]
        self.transformer = Module()
        self.transformer.replace("word_embeddings", Embedding(config["vocab_size"], hidden))
        self.transformer.replace("ln_f", LayerNorm(hidden))
        self.lm_head = Linear(hidden, config["vocab_size"])
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "transformer.word_embeddings.weight")
        self.embedding_names = ("transformer.word_embeddings",)
        layers = config["num_hidden_layers"]
        stack = Stack("transformer.h", layers, lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        config = self.config
        count = config["num_attention_heads"]
        x: Tensor = self.transformer.child("word_embeddings").forward(tape)
        if config.get("alibi"):
            shared.bias = tape.tensor(TOKENS, count, x.dtype, "alibi")
        shared.mask = make_mask(tape, x.dtype, always=True)
        if config.get("alibi"):
            shared.mask = tape.tensor(SCORES, count, x.dtype, "alibi mask")
        shared.rope[""] = rope_table(tape, config["hidden_size"] // count, x.dtype)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.transformer.child("ln_f").forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"falcon": Falcon}
