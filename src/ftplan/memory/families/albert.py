"""ALBERT: one block, or a few, run again and again; its weights are counted once.

Source: transformers 5.23.0, models/albert.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import attend, make_mask
from ftplan.memory.families.bert import Embeddings, Pooler, bert_heads
from ftplan.memory.families.llama import Config
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, Shared, Stack, Stage, activation
from ftplan.memory.tape import Tape, Tensor


class Attention(Module):
    """``norm(x + dropout(dense(attention(x))))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.heads = bert_heads(config)
        for name in ("query", "key", "value", "dense"):
            self.replace(name, Linear(hidden, hidden, bias=True))
        self.LayerNorm = LayerNorm(hidden)
        self.dropout = config.get("hidden_dropout_prob") or 0.0

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        q, k, v = (self.child(name).forward(x) for name in ("query", "key", "value"))
        out = attend(q, k, v, self.heads, shared.mask, held=held)
        del q, k, v
        out = self.child("dense").forward(out)
        out = ops.dropout(out, self.dropout)
        return self.LayerNorm.forward(ops.add(x, out))


class Layer(Module):
    """``AlbertLayer``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.full_layer_layer_norm = LayerNorm(hidden)
        self.attention = Attention(config)
        self.ffn = Linear(hidden, inner, bias=True)
        self.ffn_output = Linear(inner, hidden, bias=True)
        self.act = config["hidden_act"]

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        attended = self.attention.forward(x, shared, held)
        fed = self.feed(attended)
        return self.full_layer_layer_norm.forward(ops.add(fed, attended))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        x = self.ffn.forward(x)
        x = activation(x, self.act)
        return self.ffn_output.forward(x)


class Group(Module):
    """``AlbertLayerGroup``: layers that are run one after the other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.albert_layers = Module()
        self.count = int(config.get("inner_group_num") or 1)
        for number in range(self.count):
            self.albert_layers.replace(str(number), Layer(config))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        for number in range(self.count):
            x = self.albert_layers.child(str(number)).forward(x, shared)
        return x


class Predictions(Module):
    """``AlbertMLMHead``: to the width of the embeddings, and their table again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, vocabulary = config["embedding_size"], config["vocab_size"]
        self.bias = self.parameter("bias", vocabulary)
        self.LayerNorm = LayerNorm(width)
        self.dense = Linear(config["hidden_size"], width, bias=True)
        self.decoder = Linear(width, vocabulary, bias=True)
        self.act = config["hidden_act"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense.forward(x)
        x = activation(x, self.act)
        x = self.LayerNorm.forward(x)
        return self.decoder.forward(x)


class Albert(Network):
    """``AlbertForMaskedLM``, or the same with a head that classifies sequences."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.checkpoints = False
        self.config = config
        self.albert = Module()
        self.albert.replace("embeddings", Embeddings(config))
        encoder = Module()
        self.albert.replace("encoder", encoder)
        self.widen = Linear(config["embedding_size"], config["hidden_size"], bias=True)
        del self.children["widen"]
        encoder.replace("embedding_hidden_mapping_in", self.widen)
        self.predictions = Predictions(config)
        self.head_name = "predictions.decoder"
        self.embedding_names = ("albert.embeddings.word_embeddings",)
        self.loss_in_fp32 = False
        if config.get("tie_word_embeddings", True):
            self.tie("predictions.decoder.weight", f"{self.embedding_names[0]}.weight")
            self.tie("predictions.decoder.bias", "predictions.bias")
        count, groups = config["num_hidden_layers"], config.get("num_hidden_groups") or 1
        stack = Stack(
            "albert.encoder.albert_layer_groups", count, lambda _layer: Group(config),
            lambda layer: int(layer / (count / groups)), shared=True,
        )  # fmt: skip
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.albert.child("embeddings").forward(tape)
        shared.mask = make_mask(tape, x.dtype, causal=False)
        return self.widen.forward(x)

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.predictions.forward(x)

    def classify(self, labels: int) -> None:
        """``AlbertForSequenceClassification``: a pooler, and a linear layer on it."""
        config = self.config
        del self.children["predictions"]
        self.tied.clear()
        pooler = Pooler(config)
        self.albert.replace("pooler", pooler.dense)
        self.head_name = "classifier"
        self.classifier = Linear(config["hidden_size"], labels, bias=True)
        dropout = config.get("classifier_dropout_prob") or 0.0

        def head(x: Tensor) -> Tensor:
            return self.classifier.forward(ops.dropout(pooler.forward(x), dropout))

        self.head = head  # type: ignore[method-assign]


MODEL_TYPES = {"albert": Albert}
