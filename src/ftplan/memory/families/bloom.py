"""BLOOM: ALiBi positions inside the scores, no other attention than eager."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import make_mask, operand, pairs, with_prefix
from ftplan.memory.families.llama import Config
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    Shared,
    Stack,
    Stage,
)
from ftplan.memory.tape import TOKENS, Grads, Tape, Tensor


def bloom_gelu(x: Tensor) -> Tensor:
    """``BloomGelu``: a function of its own that keeps its input and works in many steps."""
    with x.tape.no_grad():
        half = ops.scale(x)
        out = ops.mul(half, ops.shift(_tanh(x)))
        del half
    saved = x

    def apply(grad: Tensor) -> Grads:
        with grad.tape.no_grad():
            return (ops.mul(_slope(saved), grad),)

    ops.record([out], "BloomGelu", [x], apply)
    return out


def _tanh(x: Tensor) -> Tensor:
    inner = ops.scale(x)
    factor = ops.mul(ops.scale(x), x)
    factor = ops.shift(factor)
    inner = ops.mul(inner, factor)
    del factor
    return ops.unary(inner, "tanh", "output")


def _slope(x: Tensor) -> Tensor:
    """The derivative, in the steps of ``bloom_gelu_back``."""
    tanh = _tanh(x)
    half = ops.scale(x)
    left = ops.mul(tanh, tanh)
    left = ops.scale(left)
    right = ops.mul(ops.scale(x), x)
    right = ops.shift(right)
    left = ops.mul(left, right)
    del right
    left = ops.mul(half, left)
    del half
    return ops.add(left, ops.scale(ops.shift(tanh)))


class Attention(Module):
    """Scores are ALiBi plus the product; queries, keys and values are copied out of one matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.count = config["n_head"]
        self.query_key_value = Linear(hidden, 3 * hidden, bias=True)
        self.dense = Linear(hidden, hidden, bias=True)
        self.attention_dropout = config.get("attention_dropout") or 0.0
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, residual: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        fused = self.query_key_value.forward(x)
        width = fused.width // 3
        q, k, v = (operand(ops.part(fused, width)) for _ in range(3))
        k, v, mask = with_prefix(k, v, shared.mask)
        rows = pairs(x.tape) * self.count
        alibi = shared.bias
        assert alibi is not None
        dtype = q.dtype
        _alibi = ops.autocast(alibi)
        scores = ops.matmul(q, k, rows, 1, "scores")
        del _alibi
        assert mask is not None
        weights = ops.add(scores, mask)
        probabilities = ops.to(ops.softmax(weights, "fp32"), dtype)
        probabilities = ops.dropout(probabilities, self.attention_dropout)
        held.append(probabilities)
        out = ops.matmul(probabilities, v, x.rows, width, "attention")
        out = ops.copy(out)
        out = self.dense.forward(out)
        return ops.add(residual, ops.dropout(out, self.dropout))


class MLP(Module):
    """``dense_4h_to_h(gelu(dense_h_to_4h(x)))`` and the residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.dense_h_to_4h = Linear(hidden, 4 * hidden, bias=True)
        self.dense_4h_to_h = Linear(4 * hidden, hidden, bias=True)
        self.dropout = config.get("hidden_dropout") or 0.0

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = bloom_gelu(self.dense_h_to_4h.forward(x))
        out = self.dense_4h_to_h.forward(x)
        return ops.add(residual, ops.dropout(out, self.dropout))


class Block(Module):
    """One decoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm = LayerNorm(hidden)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = LayerNorm(hidden)
        self.mlp = MLP(config)
        self.after = bool(config.get("apply_residual_connection_post_layernorm"))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        normed = self.input_layernorm.forward(x)
        residual = normed if self.after else x
        attended = self.self_attention.forward(normed, residual, shared, held)
        normed = self.post_attention_layernorm.forward(attended)
        residual = normed if self.after else attended
        return self.mlp.forward(normed, residual)


class Body(Module):
    """``BloomModel`` but for its blocks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.word_embeddings = Embedding(config["vocab_size"], hidden)
        self.word_embeddings_layernorm = LayerNorm(hidden)
        self.ln_f = LayerNorm(hidden)


class Bloom(Network):
    """``BloomForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Body(config)
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "transformer.word_embeddings.weight")
        self.embedding_names = ("transformer.word_embeddings",)
        stack = Stack("transformer.h", config["n_layer"], lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        embedded: Tensor = self.transformer.word_embeddings.forward(tape)
        x = self.transformer.word_embeddings_layernorm.forward(embedded)
        shared.bias = tape.tensor(TOKENS, self.config["n_head"], x.dtype, "alibi")
        shared.mask = make_mask(tape, embedded.dtype, eager=True)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return self.transformer.ln_f.forward(x)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"bloom": Bloom}
