"""MPNet: BERT's layers with a learnt bias of relative positions, made once for all of them.

Attention is eager, and a mask is added to the scores of every sequence.
Source: transformers 5.23.0, models/mpnet/modeling_mpnet.py.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import operand
from ftplan.memory.families.bert import ClassificationHead, LMHead, Output
from ftplan.memory.families.decoder import Config, filled
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
from ftplan.memory.tape import SCORES, SQUARE, TOKENS, Grads, Tape, Tensor

__all__ = ["MODEL_TYPES"]


class SelfAttention(Module):
    """``MPNetSelfAttention``: scores, plus positions in place, plus the mask."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.count = config["num_attention_heads"]
        for name in ("q", "k", "v", "o"):
            self.replace(name, Linear(hidden, hidden, bias=True))
        self.dropout = config.get("attention_probs_dropout_prob") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        q, k, v = (self.children[name].forward(x) for name in ("q", "k", "v"))
        left, right = operand(ops.autocast(q)), operand(ops.autocast(k))
        scores = ops.scale(ops.matmul(left, right, SCORES * self.count, 1, "scores"))
        del left, right
        assert shared.bias is not None and shared.mask is not None
        scores = ops.add_(scores, shared.bias)
        scores = ops.add(scores, shared.mask)
        weights = ops.softmax(ops.autocast_fp32(scores))
        weights = ops.dropout(weights, self.dropout)
        out = ops.matmul(weights, operand(ops.autocast(v)), x.rows, x.width, "attention")
        result: Tensor = self.children["o"].forward(ops.copy(out))
        return result


class Block(Module):
    """One encoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = Module()
        self.attention.replace("attn", SelfAttention(config))
        self.attention.replace("LayerNorm", LayerNorm(hidden))
        self.intermediate = Module()
        self.intermediate.replace("dense", Linear(hidden, inner, bias=True))
        self.output = Output(config, inner)
        self.act = config["hidden_act"]
        self.dropout = config.get("hidden_dropout_prob") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.child("attention.attn").forward(x, shared)
        attended = ops.add(ops.dropout(attended, self.dropout), x)
        attended = self.child("attention.LayerNorm").forward(attended)
        inner = self.child("intermediate.dense").forward(attended)
        return self.output.forward(activation(inner, self.act), attended)


class MPNet(Network):
    """``MPNetForMaskedLM``, or the same with a head that classifies sequences."""

    def __init__(self, raw: Config) -> None:
        super().__init__()
        self.checkpoints, self.lends_tables = False, True
        self.config = config = filled(raw)
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        embeddings = Module()
        embeddings.replace("word_embeddings", Embedding(vocabulary, hidden))
        positions = Embedding(config["max_position_embeddings"], hidden)
        embeddings.replace("position_embeddings", positions)
        embeddings.replace("LayerNorm", LayerNorm(hidden))
        body, encoder = Module(), Module()
        table = Embedding(
            config.get("relative_attention_num_buckets") or 32, config["num_attention_heads"]
        )
        encoder.replace("relative_attention_bias", table)
        body.replace("embeddings", embeddings)
        body.replace("encoder", encoder)
        self.mpnet = body
        self.lm_head = LMHead(config)
        self.lm_head.parameter("bias", vocabulary)
        self.head_name = "lm_head.decoder"
        self.loss_in_fp32 = False
        self.embedding_names = ("mpnet.embeddings.word_embeddings",)
        self.tie("lm_head.decoder.weight", f"{self.embedding_names[0]}.weight")
        self.tie("lm_head.decoder.bias", "lm_head.bias")
        stack = Stack(
            "mpnet.encoder.layer", config["num_hidden_layers"], lambda _layer: Block(config)
        )
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        embeddings = self.child("mpnet.embeddings")
        words = embeddings.child("word_embeddings").forward(tape)
        positions = embeddings.child("position_embeddings").forward(tape, TOKENS)
        x = ops.add(words, positions)
        del words, positions
        x = embeddings.child("LayerNorm").forward(x)
        x = ops.dropout(x, self.config.get("hidden_dropout_prob") or 0.0)
        shared.mask = tape.tensor(TOKENS, 1, x.dtype, "mask")
        shared.bias = self._positions(tape)
        return x

    def _positions(self, tape: Tape) -> Tensor:
        """``compute_position_bias``: a row of the table for each pair, spread over sequences."""
        buckets = tape.tensor(SQUARE, 1, "int64", "position buckets")
        weight = tape.leaf(self.child("mpnet.encoder.relative_attention_bias").parameters["weight"])
        picked = tape.tensor(SQUARE, weight.width, weight.dtype, "position bias")
        make = ops.like(weight.rows, weight.width, weight.dtype, weight.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = buckets
            return (make(grad),)

        ops.record([picked], "embedding", [weight], apply)
        out = tape.tensor(SCORES * weight.width, 1, weight.dtype, "position bias")
        make_sum = ops.like(picked.rows, picked.width, picked.dtype, picked.requires_grad)
        ops.record([out], "expand", [picked], lambda grad: (make_sum(grad),))
        return out

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)

    def classify(self, labels: int) -> None:
        """``MPNetForSequenceClassification``."""
        del self.children["lm_head"]
        self.tied.clear()
        self.head_name = "classifier"
        self.classifier = ClassificationHead(self.config, labels, "tanh")
        self.head = self.classifier.forward  # type: ignore[method-assign]


MODEL_TYPES = {"mpnet": MPNet}
