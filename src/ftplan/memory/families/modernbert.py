"""ModernBERT: a pre-norm encoder with rotary positions, a gated MLP and mostly local attention."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.bert import first_token
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
from ftplan.memory.tape import Tape, Tensor


def layer_type(config: Config, layer: int) -> str:
    """Every third layer sees the whole sequence."""
    if config.get("layer_types"):
        return str(config["layer_types"][layer])
    every = config.get("global_attn_every_n_layers") or 3
    return "sliding_attention" if layer % every else "full_attention"


class Attention(Module):
    """One matrix for queries, keys and values; rotated in fp32."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        bias = bool(config.get("attention_bias"))
        self.heads = Heads(
            count=count,
            kv_count=count,
            size=hidden // count,
            value_size=hidden // count,
            dropout=config.get("attention_dropout") or 0.0,
            causal=False,
        )
        self.kind = layer_type(config, layer)
        self.Wqkv = Linear(hidden, 3 * hidden, bias=bias)
        self.Wo = Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        fused = self.Wqkv.forward(x)
        q, k, v = ops.split(fused, [x.width] * 3)
        del fused
        cos, sin = shared.rope[self.kind]
        dtype = q.dtype
        q, k = rotate(ops.to(q, "fp32"), cos, sin), rotate(ops.to(k, "fp32"), cos, sin)
        q, k = ops.to(q, dtype), ops.to(k, dtype)
        out = attend(q, k, v, self.heads, shared.masks.get(self.kind), held=held)
        return ops.dropout(self.Wo.forward(out), self.heads.dropout)


class Block(Module):
    """Pre-norm, but for the first block, whose input the embeddings have normed."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        norm_bias, bias = bool(config.get("norm_bias")), bool(config.get("mlp_bias"))
        self.first = layer == 0
        if not self.first:
            self.attn_norm = LayerNorm(hidden, bias=norm_bias)
        self.attn = Attention(config, layer)
        self.mlp_norm = LayerNorm(hidden, bias=norm_bias)
        self.mlp = Module()
        self.mlp.replace("Wi", Linear(hidden, 2 * inner, bias=bias))
        self.mlp.replace("Wo", Linear(inner, hidden, bias=bias))
        self.act = config["hidden_activation"]
        self.dropout = config.get("mlp_dropout") or 0.0

    def _feed(self, x: Tensor) -> Tensor:
        both: Tensor = self.mlp.child("Wi").forward(x)
        inner, gate = ops.split(both, (both.width // 2, both.width // 2))
        del both
        product = ops.mul(activation(inner, self.act), gate)
        out: Tensor = self.mlp.child("Wo").forward(ops.dropout(product, self.dropout))
        return out

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        normed = x if self.first else self.attn_norm.forward(x)
        attended = self.attn.forward(normed, shared, held)
        del normed
        x = ops.add(x, attended)
        return ops.add(x, self._feed(self.mlp_norm.forward(x)))


class ModernBert(Network):
    """``ModernBertForMaskedLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, norm_bias = config["hidden_size"], bool(config.get("norm_bias"))
        self.model = Module()
        embeddings = Module()
        self.model.replace("embeddings", embeddings)
        embeddings.replace("tok_embeddings", Embedding(config["vocab_size"], hidden))
        embeddings.replace("norm", LayerNorm(hidden, bias=norm_bias))
        self.model.replace("final_norm", LayerNorm(hidden, bias=norm_bias))
        self.transform = Module()
        self.children["head"] = self.children.pop("transform")
        self.transform.replace(
            "dense", Linear(hidden, hidden, bias=bool(config.get("classifier_bias")))
        )
        self.transform.replace("norm", LayerNorm(hidden, bias=norm_bias))
        bias = bool(config.get("decoder_bias", True))
        self.decoder = Linear(hidden, config["vocab_size"], bias=bias)
        self.head_name = "decoder"
        self.embedding_names = ("model.embeddings.tok_embeddings",)
        if config.get("tie_word_embeddings", True):
            self.tie("decoder.weight", "model.embeddings.tok_embeddings.weight")
        count = config["num_hidden_layers"]
        stack = Stack(
            "model.layers",
            count,
            lambda layer: Block(config, layer),
            lambda layer: (layer == 0, layer_type(config, layer)),
        )
        self.kinds = sorted({layer_type(config, layer) for layer in range(count)})
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        config = self.config
        embeddings = self.model.child("embeddings")
        x: Tensor = embeddings.child("tok_embeddings").forward(tape)
        x = embeddings.child("norm").forward(x)
        x = ops.dropout(x, config.get("embedding_dropout") or 0.0)
        window = (config.get("local_attention") or 128) // 2
        width = config["hidden_size"] // config["num_attention_heads"]
        for kind in self.kinds:
            sliding = window if kind == "sliding_attention" else None
            shared.masks[kind] = make_mask(tape, x.dtype, window=sliding, causal=False)
            shared.rope[kind] = rope_table(tape, width, x.dtype)
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.model.child("final_norm").forward(x)
        return out

    def _transformed(self, x: Tensor) -> Tensor:
        x = self.transform.child("dense").forward(x)
        x = activation(x, self.config.get("classifier_activation") or "gelu")
        out: Tensor = self.transform.child("norm").forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        return self.decoder.forward(self._transformed(x))

    def classify(self, labels: int) -> None:
        """``ModernBertForSequenceClassification``: on the first token."""
        del self.children["decoder"]
        self.tied.clear()
        self.head_name = "classifier"
        self.classifier = Linear(self.config["hidden_size"], labels, bias=True)

        def head(x: Tensor) -> Tensor:
            return self.classifier.forward(self._transformed(first_token(x)))

        self.head = head  # type: ignore[method-assign]


MODEL_TYPES = {"modernbert": ModernBert}
