"""DeBERTa 2 and 3: attention whose scores add those of content and relative position.

Every attention is eager. Scores of positions are products with a table of distances, from which
the pairs are gathered: three matrices of scores a head in all.
Source: transformers 5.23.0, models/deberta_v2/modeling_deberta_v2.py.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.families.bert import Output, first_token
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.mpt import masked_fill
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
from ftplan.memory.tape import BATCH, SCORES, SEQ, SQUARE, TOKENS, Grads, Size, Tape, Tensor

__all__ = ["MODEL_TYPES"]


def span_of(config: Config) -> int:
    """Distances that have a row of the table, on either side."""
    most = int(config.get("max_relative_positions") or -1)
    buckets = int(config.get("position_buckets") or -1)
    if buckets > 0:
        return buckets
    return most if most > 0 else int(config["max_position_embeddings"])


def _contiguous(x: Tensor) -> Tensor:
    """``transpose_for_scores``: the heads one after the other, a copy."""
    return ops.copy(x)


def _repeat(x: Tensor, rows: Size) -> Tensor:
    """``repeat(batch, 1, 1)``: once for each sequence."""
    out = x.tape.tensor(rows, x.width, x.dtype, "positions of every sequence")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "repeat", [x], lambda grad: (make(grad),))
    return out


def _gather_pairs(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """For each pair of tokens the score of its distance; what it picks from is kept too."""
    out = x.tape.tensor(SCORES * heads, 1, x.dtype, "gather")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = (x, index)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "gather", [x], apply)
    return out


class Attention(Module):
    """``DisentangledSelfAttention``: content to content, content to position, and the reverse."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.count = config["num_attention_heads"]
        self.kinds = tuple(config.get("pos_att_type") or ())
        if isinstance(config.get("pos_att_type"), str):
            self.kinds = tuple(kind.strip() for kind in config["pos_att_type"].split("|"))
        self.query_proj = Linear(hidden, hidden, bias=True)
        self.key_proj = Linear(hidden, hidden, bias=True)
        self.value_proj = Linear(hidden, hidden, bias=True)
        self.relative = bool(config.get("relative_attention"))
        self.span = span_of(config)
        self.position_dropout = config.get("hidden_dropout_prob") or 0.0
        self.dropout = config.get("attention_probs_dropout_prob") or 0.0
        self.shares = bool(config.get("share_att_key"))
        if self.relative and not self.shares:
            if "c2p" in self.kinds:
                self.pos_key_proj = Linear(hidden, hidden, bias=True)
            if "p2c" in self.kinds:
                self.pos_query_proj = Linear(hidden, hidden, bias=True)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        count = self.count
        q = _contiguous(self.query_proj.forward(x))
        k = _contiguous(self.key_proj.forward(x))
        v = _contiguous(self.value_proj.forward(x))
        scores = ops.matmul(q, ops.scale(k), SCORES * count, 1, "scores")
        bias = None
        if self.relative:
            assert shared.bias is not None
            table = ops.dropout(shared.bias, self.position_dropout)
            bias = self._positions(q, k, shared, table)
            scores = scores if bias is None else ops.add(scores, bias)
        allowed = x.tape.tensor(SCORES, 1, "bool", "mask")
        scores = masked_fill(scores, x.tape.tensor(SCORES, 1, "bool", "inverted mask"))
        weights = ops.softmax(ops.autocast_fp32(scores))
        weights = ops.dropout(weights, self.dropout)
        out = ops.matmul(weights, v, x.rows, x.width, "attention")
        out = ops.copy(out)
        del allowed, bias
        return out

    def _positions(self, q: Tensor, k: Tensor, shared: Shared, table: Tensor) -> Tensor | None:
        """``disentangled_attention_bias``."""
        tape, count = q.tape, self.count
        rows = BATCH * (2 * self.span)
        tables = self._tables(table, rows)
        total: Tensor | None = None
        width, inner = 2 * self.span, q.width // count
        for kind, other in (("c2p", q), ("p2c", k)):
            if kind not in self.kinds:
                continue
            found = ops.matmul(
                other, tables[kind], TOKENS * count, width, "position scores", inner=inner
            )
            shifted = tape.tensor(SQUARE, 1, "int64", "relative positions")
            index = tape.tensor(SQUARE, 1, "int64", "relative positions")
            del shifted
            found = _gather_pairs(found, index, count)
            scaled = ops.scale(found)
            total = ops.shift(scaled) if total is None else ops.add_(total, scaled)
            del scaled
        return total

    def _tables(self, table: Tensor, rows: Size) -> dict[str, Tensor]:
        """The table of distances as queries and as keys, for each sequence."""
        if self.shares:
            linears: dict[str, Module] = {"p2c": self.query_proj, "c2p": self.key_proj}
        else:
            names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
            linears = {kind: self.children[names[kind]] for kind in names if kind in self.kinds}
        return {
            kind: _repeat(_contiguous(linear.forward(table)), rows)
            for kind, linear in linears.items()
        }


class Block(Module):
    """One encoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = Module()
        self.attention.replace("self", Attention(config))
        self.attention.replace("output", Output(config, hidden))
        self.intermediate = Module()
        self.intermediate.replace("dense", Linear(hidden, inner, bias=True))
        self.output = Output(config, inner)
        self.act = config["hidden_act"]

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.child("attention.self").forward(x, shared)
        attended = self.child("attention.output").forward(attended, x)
        inner = self.child("intermediate.dense").forward(attended)
        return self.output.forward(activation(inner, self.act), attended)


class Embeddings(Module):
    """Words, and positions and types where the config has them; rows of padding become zeros."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.get("embedding_size") or config["hidden_size"]
        self.word_embeddings = Embedding(config["vocab_size"], width)
        self.positioned = bool(config.get("position_biased_input", True))
        if self.positioned:
            self.position_embeddings = Embedding(config["max_position_embeddings"], width)
        self.typed = bool(config.get("type_vocab_size"))
        if self.typed:
            self.token_type_embeddings = Embedding(config["type_vocab_size"], width)
        self.projected = width != config["hidden_size"]
        if self.projected:
            self.embed_proj = Linear(width, config["hidden_size"])
        self.LayerNorm = LayerNorm(config["hidden_size"])
        self.dropout = config.get("hidden_dropout_prob") or 0.0

    def forward(self, tape: Tape) -> Tensor:
        x: Tensor = self.word_embeddings.forward(tape)
        if self.positioned:
            positions: Tensor = self.position_embeddings.forward(tape, SEQ)
            x = ops.add(x, positions)
        else:
            positions = tape.tensor(x.rows, x.width, x.dtype, "zeros")
        if self.typed:
            x = ops.add(x, self.token_type_embeddings.forward(tape))
        if self.projected:
            x = self.embed_proj.forward(x)
        x = self.LayerNorm.forward(x)
        mask = tape.tensor(TOKENS, 1, x.dtype, "mask")
        return ops.dropout(ops.mul(x, mask), self.dropout)


class Deberta(Network):
    """``DebertaV2ForMaskedLM``, or the same with a head that classifies sequences."""

    def __init__(self, raw: Config) -> None:
        super().__init__()
        self.lends_tables = True
        config = filled(raw)
        if config.get("conv_kernel_size"):
            raise UnsupportedError(
                "DeBERTa with a convolution beside its first layer",
                remedy="use a DeBERTa v3, or give --params for the textbook's sums",
            )
        self.config = config
        hidden = config["hidden_size"]
        body = Module()
        body.replace("embeddings", Embeddings(config))
        encoder = Module()
        if config.get("relative_attention"):
            table = Embedding(2 * span_of(config), hidden)
            table.weight.embedding = False  # used whole, not row by row
            encoder.replace("rel_embeddings", table)
        if "layer_norm" in str(config.get("norm_rel_ebd") or ""):
            encoder.replace("LayerNorm", LayerNorm(hidden))
        body.replace("encoder", encoder)
        self.deberta = body
        self.loss_in_fp32 = False
        self.embedding_names = ("deberta.embeddings.word_embeddings",)
        self._add_head(config)
        stack = Stack(
            "deberta.encoder.layer", config["num_hidden_layers"], lambda _layer: Block(config)
        )
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _add_head(self, config: Config) -> None:
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        if not config.get("legacy", True):
            raise UnsupportedError(
                "DeBERTa's masked language model with legacy: false",
                remedy="leave legacy out, or classify sequences (task: classify)",
            )
        width = config.get("embedding_size") or hidden
        predictions = Module()
        transform = Module()
        transform.replace("dense", Linear(hidden, width, bias=True))
        transform.replace("LayerNorm", LayerNorm(width))
        predictions.replace("transform", transform)
        predictions.replace("decoder", Linear(width, vocabulary, bias=True))
        predictions.parameter("bias", vocabulary)
        self.cls = Module()
        self.cls.replace("predictions", predictions)
        self.head_name = "cls.predictions.decoder"
        self.tie(f"{self.head_name}.weight", f"{self.embedding_names[0]}.weight")
        self.tie(f"{self.head_name}.bias", "cls.predictions.bias")

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.child("deberta.embeddings").forward(tape)
        encoder = self.child("deberta.encoder")
        shared.mask = tape.tensor(SCORES, 1, "fp32", "mask")
        if "rel_embeddings" in encoder.children:
            shared.masks["distances"] = _distances(tape)
            table = tape.leaf(encoder.child("rel_embeddings").parameters["weight"])
            if "LayerNorm" in encoder.children:
                table = encoder.child("LayerNorm").forward(table)
            shared.bias = table
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        predictions = self.child("cls.predictions")
        x = predictions.child("transform.dense").forward(x)
        x = activation(x, self.config["hidden_act"])
        x = predictions.child("transform.LayerNorm").forward(x)
        logits: Tensor = predictions.child("decoder").forward(x)
        return logits

    def classify(self, labels: int) -> None:
        """``DebertaV2ForSequenceClassification``: the first token through one more layer."""
        config = self.config
        del self.children["cls"]
        self.tied.clear()
        self.head_name = "classifier"
        self.pooler = Module()
        self.pooler.replace(
            "dense", Linear(config["hidden_size"], config["hidden_size"], bias=True)
        )
        self.classifier = Linear(config["hidden_size"], labels, bias=True)

        def head(x: Tensor) -> Tensor:
            pooled = ops.dropout(first_token(x), config.get("pooler_dropout") or 0.0)
            pooled = activation(
                self.child("pooler.dense").forward(pooled), config["pooler_hidden_act"]
            )
            pooled = ops.dropout(pooled, config.get("hidden_dropout_prob") or 0.0)
            return self.classifier.forward(pooled)

        self.head = head  # type: ignore[method-assign]


def _distances(tape: Tape) -> Tensor:
    """``build_relative_position``: a bucket for each pair of tokens."""

    def made(dtype: str) -> Tensor:
        return tape.tensor(SQUARE, 1, dtype, "relative positions")

    distance, sign = made("int64"), made("int64")
    near = made("int64")
    steps = [made("fp32")]
    for _ in range(5):  # divided, logarithm, divided, multiplied, rounded, moved
        steps.append(made("fp32"))
        del steps[0]
    chosen = made("fp32")
    del steps, sign, near
    bucket = made("int64")
    del chosen, distance
    return bucket


MODEL_TYPES = {"deberta-v2": Deberta}
