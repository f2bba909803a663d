"""BERT and its line: encoders with norms behind each sum, trained to fill in masked tokens."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
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
    activation,
)
from ftplan.memory.tape import BATCH, SEQ, TOKENS, Tape, Tensor


def first_token(x: Tensor) -> Tensor:
    """The first token of each sequence: a view, whose gradient is a whole tensor."""
    out = x.alias(rows=BATCH)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "select", [x], lambda grad: (make(grad),))
    return out


def bert_heads(config: Config) -> Heads:
    """All heads have keys and values of their own; nothing is causal."""
    count = config["num_attention_heads"]
    size = config["hidden_size"] // count
    return Heads(
        count=count,
        kv_count=count,
        size=size,
        value_size=size,
        dropout=config.get("attention_probs_dropout_prob") or 0.0,
        causal=False,
        softmax_fp32=False,
    )


class SelfAttention(Module):
    """Queries, keys and values with biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.heads = bert_heads(config)
        self.query = Linear(hidden, hidden, bias=True)
        self.key = Linear(hidden, hidden, bias=True)
        self.value = Linear(hidden, hidden, bias=True)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        q, k, v = self.query.forward(x), self.key.forward(x), self.value.forward(x)
        return attend(q, k, v, self.heads, shared.mask, held=held)


class Output(Module):
    """``norm(dropout(dense(x)) + residual)``."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.dense = Linear(width, hidden, bias=True)
        self.LayerNorm = LayerNorm(hidden)
        self.dropout = config.get("hidden_dropout_prob") or 0.0

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = self.dense.forward(x)
        x = ops.dropout(x, self.dropout)
        return self.LayerNorm.forward(ops.add(x, residual))


class Block(Module):
    """One encoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = Module()
        self.attention.replace("self", SelfAttention(config))
        self.attention.replace("output", Output(config, hidden))
        self.intermediate = Module()
        self.intermediate.replace("dense", Linear(hidden, inner, bias=True))
        self.output = Output(config, inner)
        self.act = config["hidden_act"]

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        attended = self.child("attention.self").forward(x, shared, held)
        attended = self.child("attention.output").forward(attended, x)
        inner = self.child("intermediate.dense").forward(attended)
        inner = activation(inner, self.act)
        return self.output.forward(inner, attended)


class Embeddings(Module):
    """Words, types and positions, normed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.get("embedding_size") or config["hidden_size"]
        self.word_embeddings = Embedding(config["vocab_size"], width)
        self.position_embeddings = Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = Embedding(config["type_vocab_size"], width)
        self.LayerNorm = LayerNorm(width)
        self.dropout = config.get("hidden_dropout_prob") or 0.0
        # RoBERTa counts positions from the padding of each sequence
        counted = config["model_type"] in ("roberta", "xlm-roberta", "camembert")
        self.position_rows = TOKENS if counted else SEQ

    def forward(self, tape: Tape) -> Tensor:
        words = self.word_embeddings.forward(tape)
        types = self.token_type_embeddings.forward(tape)
        x = ops.add(words, types)
        positions = self.position_embeddings.forward(tape, self.position_rows)
        x = ops.add(x, positions)
        x = self.LayerNorm.forward(x)
        return ops.dropout(x, self.dropout)


class LMHead(Module):
    """RoBERTa's: dense, GELU, norm and the table again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.dense = Linear(hidden, hidden, bias=True)
        self.layer_norm = LayerNorm(hidden)
        self.decoder = Linear(hidden, config["vocab_size"], bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.forward(x)
        x = activation(x, "gelu")
        x = self.layer_norm.forward(x)
        return self.decoder.forward(x)


class Predictions(Module):
    """BERT's: dense, the activation, norm and the table again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.transform = Module()
        self.transform.replace("dense", Linear(hidden, hidden, bias=True))
        self.transform.replace("LayerNorm", LayerNorm(hidden))
        self.decoder = Linear(hidden, config["vocab_size"], bias=True)
        self.act = config["hidden_act"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.child("transform.dense").forward(x)
        x = activation(x, self.act)
        x = self.child("transform.LayerNorm").forward(x)
        return self.decoder.forward(x)


class GeneratorPredictions(Module):
    """ELECTRA's generator: to the width of the embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config["embedding_size"]
        self.LayerNorm = LayerNorm(width)
        self.dense = Linear(config["hidden_size"], width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.forward(x)
        x = activation(x, "gelu")
        return self.LayerNorm.forward(x)


class ClassificationHead(Module):
    """RoBERTa's and ELECTRA's: on the first token, dense, an activation, dense."""

    def __init__(self, config: Config, labels: int, act: str) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.dense = Linear(hidden, hidden, bias=True)
        self.out_proj = Linear(hidden, labels, bias=True)
        self.act = act
        self.dropout = config.get("classifier_dropout") or config.get("hidden_dropout_prob") or 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = first_token(x)
        x = ops.dropout(x, self.dropout)
        x = self.dense.forward(x)
        x = activation(x, self.act)
        x = ops.dropout(x, self.dropout)
        return self.out_proj.forward(x)


_BODY = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "electra": "electra",
}


class Bert(Network):
    """``BertForMaskedLM`` and its kin, or the same with a head that classifies sequences."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        name = config["model_type"]
        self.body_name = body = _BODY[name]
        inner = Module()
        inner.replace("embeddings", Embeddings(config))
        width = config.get("embedding_size") or config["hidden_size"]
        self.projected = width != config["hidden_size"]
        if self.projected:
            inner.replace("embeddings_project", Linear(width, config["hidden_size"], bias=True))
        self.replace(body, inner)
        self.loss_in_fp32 = False
        self.embedding_names = (f"{body}.embeddings.word_embeddings",)
        self._add_head(config)
        layers = f"{body}.encoder.layer"
        stack = Stack(layers, config["num_hidden_layers"], lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _add_head(self, config: Config) -> None:
        name, table = config["model_type"], f"{self.embedding_names[0]}.weight"
        if name == "electra":
            self.generator_predictions = GeneratorPredictions(config)
            self.generator_lm_head = Linear(
                config["embedding_size"], config["vocab_size"], bias=True
            )
            self.head_name = "generator_lm_head"
        elif name == "bert":
            self.cls = Module()
            self.cls.replace("predictions", Predictions(config))
            self.head_name = "cls.predictions.decoder"
        else:
            self.lm_head = LMHead(config)
            self.head_name = "lm_head.decoder"
        if config.get("tie_word_embeddings", True):
            first, second = table, f"{self.head_name}.weight"
            if name in ("xlm-roberta", "camembert"):  # their head comes first, and names both
                first, second = second, first
            self.tie(second, first)
        if name != "electra":
            owner = self.child(self.head_name.rpartition(".")[0])
            owner.parameter("bias", config["vocab_size"])
            bias = f"{self.head_name.rpartition('.')[0]}.bias"
            if config.get("tie_word_embeddings", True):
                self.tie(f"{self.head_name}.bias", bias)

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        body = self.child(self.body_name)
        x: Tensor = body.child("embeddings").forward(tape)
        if self.projected:
            x = body.child("embeddings_project").forward(x)
        shared.mask = make_mask(tape, x.dtype, causal=False)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        name = self.config["model_type"]
        if name == "electra":
            return self.generator_lm_head.forward(self.generator_predictions.forward(x))
        logits: Tensor = self.child("cls.predictions" if name == "bert" else "lm_head").forward(x)
        return logits

    def classify(self, labels: int) -> None:
        """``ForSequenceClassification``: BERT pools, the others have a small head."""
        config, name = self.config, self.config["model_type"]
        for old in ("cls", "lm_head", "generator_predictions", "generator_lm_head"):
            self.children.pop(old, None)
        self.tied.clear()
        self.head_name = "classifier"
        if name == "bert":
            pooler = Pooler(config)
            self.child(self.body_name).replace("pooler", pooler)
            self.classifier: Module = Linear(config["hidden_size"], labels, bias=True)
            dropout = config.get("classifier_dropout") or config.get("hidden_dropout_prob") or 0.0

            def head(x: Tensor) -> Tensor:
                pooled = ops.dropout(pooler.forward(x), dropout)
                logits: Tensor = self.classifier.forward(pooled)
                return logits

            self.head = head  # type: ignore[method-assign]
            return
        act = "gelu" if name == "electra" else "tanh"
        self.classifier = ClassificationHead(config, labels, act)
        self.head = self.classifier.forward  # type: ignore[method-assign]


class Pooler(Module):
    """``tanh(dense(first token))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config["hidden_size"], config["hidden_size"], bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.unary(self.dense.forward(first_token(x)), "tanh", "output")


class DistilAttention(Module):
    """DistilBERT's names for the same attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["dim"], config["n_heads"]
        self.heads = Heads(
            count=count,
            kv_count=count,
            size=hidden // count,
            value_size=hidden // count,
            dropout=config.get("attention_dropout") or 0.0,
            causal=False,
            softmax_fp32=False,
        )
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            self.replace(name, Linear(hidden, hidden, bias=True))

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        q, k, v = (self.child(name).forward(x) for name in ("q_lin", "k_lin", "v_lin"))
        out = attend(q, k, v, self.heads, shared.mask, held=held)
        result: Tensor = self.child("out_lin").forward(out)
        return result


class DistilBlock(Module):
    """One layer of DistilBERT."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["dim"]
        self.attention = DistilAttention(config)
        self.sa_layer_norm = LayerNorm(hidden)
        self.ffn = Module()
        self.ffn.replace("lin1", Linear(hidden, config["hidden_dim"], bias=True))
        self.ffn.replace("lin2", Linear(config["hidden_dim"], hidden, bias=True))
        self.output_layer_norm = LayerNorm(hidden)
        self.act = config["activation"]
        self.dropout = config.get("dropout") or 0.0

    def _feed(self, x: Tensor) -> Tensor:
        x = self.child("ffn.lin1").forward(x)
        x = activation(x, self.act)
        x = self.child("ffn.lin2").forward(x)
        return ops.dropout(x, self.dropout)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        attended = self.attention.forward(x, shared, held)
        attended = self.sa_layer_norm.forward(ops.add(attended, x))
        fed = self._feed(attended)
        return self.output_layer_norm.forward(ops.add(fed, attended))


class DistilBert(Network):
    """``DistilBertForMaskedLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden = config["dim"]
        self.distilbert = Module()
        self.embeddings = Module()
        del self.children["embeddings"]
        self.distilbert.replace("embeddings", self.embeddings)
        self.embeddings.replace("word_embeddings", Embedding(config["vocab_size"], hidden))
        positions = Embedding(config["max_position_embeddings"], hidden)
        self.embeddings.replace("position_embeddings", positions)
        self.embeddings.replace("LayerNorm", LayerNorm(hidden))
        self.vocab_transform = Linear(hidden, hidden, bias=True)
        self.vocab_layer_norm = LayerNorm(hidden)
        self.vocab_projector = Linear(hidden, config["vocab_size"], bias=True)
        self.head_name = "vocab_projector"
        self.embedding_names = ("distilbert.embeddings.word_embeddings",)
        self.loss_in_fp32 = False
        if config.get("tie_word_embeddings", True):
            self.tie("vocab_projector.weight", f"{self.embedding_names[0]}.weight")
        layers = "distilbert.transformer.layer"
        stack = Stack(layers, config["n_layers"], lambda _layer: DistilBlock(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        words = self.embeddings.child("word_embeddings").forward(tape)
        positions = self.embeddings.child("position_embeddings").forward(tape, SEQ)
        x = ops.add(words, positions)
        del words, positions
        x = self.embeddings.child("LayerNorm").forward(x)
        x = ops.dropout(x, self.config.get("dropout") or 0.0)
        shared.mask = make_mask(tape, x.dtype, causal=False)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        x = self.vocab_transform.forward(x)
        x = activation(x, self.config["activation"])
        x = self.vocab_layer_norm.forward(x)
        return self.vocab_projector.forward(x)

    def classify(self, labels: int) -> None:
        """``DistilBertForSequenceClassification``."""
        for name in ("vocab_transform", "vocab_layer_norm", "vocab_projector"):
            del self.children[name]
        self.tied.clear()
        self.head_name = "classifier"
        self.pre_classifier = Linear(self.config["dim"], self.config["dim"], bias=True)
        self.classifier = Linear(self.config["dim"], labels, bias=True)

        def head(x: Tensor) -> Tensor:
            pooled = self.pre_classifier.forward(first_token(x))
            pooled = activation(pooled, "relu")
            pooled = ops.dropout(pooled, self.config.get("seq_classif_dropout") or 0.0)
            return self.classifier.forward(pooled)

        self.head = head  # type: ignore[method-assign]


MODEL_TYPES = {**dict.fromkeys(_BODY, Bert), "distilbert": DistilBert}
