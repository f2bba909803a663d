"""BART and its line (mBART, Pegasus, Marian, NLLB, Blenderbot): norms behind parts, or before."""

from __future__ import annotations

from typing import Literal

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.llama import Config, ScaledEmbedding
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
from ftplan.memory.tape import ONE, SEQ, TOKENS, Size, Tape, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What one model of the line does differently."""

    before: bool = False
    """A norm stands before each part, and one after the last block."""
    last: bool = False
    positions: Literal["learnt", "table", "buffer"] = "learnt"
    """A table that is learnt, one that is stored and never trained, or none among the weights."""
    offset: int = 2
    """Rows of the learnt table beyond the positions."""
    normed: bool = True
    """A norm follows the sum of embeddings."""
    biased: bool = True
    """``final_logits_bias`` is added to the logits."""


TRAITS = {
    "bart": Traits(),
    "plbart": Traits(),
    "mbart": Traits(before=True, last=True),
    "pegasus": Traits(before=True, last=True, positions="table", normed=False),
    "marian": Traits(positions="table", normed=False),
    "m2m_100": Traits(before=True, last=True, positions="buffer", normed=False, biased=False),
    "blenderbot": Traits(before=True, last=True, offset=0, normed=False),
}


class Attention(Module):
    """Multi-head attention over the sequence itself or the encoder's output."""

    def __init__(self, config: Config, side: str, *, causal: bool, cross: bool) -> None:
        super().__init__()
        hidden, count = config["d_model"], config[f"{side}_attention_heads"]
        self.heads = Heads(
            count=count,
            kv_count=count,
            size=hidden // count,
            value_size=hidden // count,
            dropout=config.get("attention_dropout") or 0.0,
            causal=causal,
            softmax_fp32=False,
        )
        self.cross = cross
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.replace(name, Linear(hidden, hidden, bias=True))

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        source = shared.memory if self.cross else x
        q = self.child("q_proj").forward(x)
        k, v = self.child("k_proj").forward(source), self.child("v_proj").forward(source)
        mask = shared.masks.get("cross") if self.cross else shared.mask
        out = attend(q, k, v, self.heads, mask, held=held)
        result: Tensor = self.child("out_proj").forward(out)
        return result


class Block(Module):
    """One layer; BART norms after each part, others before it."""

    def __init__(self, config: Config, side: str) -> None:
        super().__init__()
        hidden, inner = config["d_model"], config[f"{side}_ffn_dim"]
        decoder = side == "decoder"
        self.self_attn = Attention(config, side, causal=decoder, cross=False)
        self.self_attn_layer_norm = LayerNorm(hidden)
        self.crossed = decoder
        if decoder:
            self.encoder_attn = Attention(config, side, causal=False, cross=True)
            self.encoder_attn_layer_norm = LayerNorm(hidden)
        self.fc1 = Linear(hidden, inner, bias=True)
        self.fc2 = Linear(inner, hidden, bias=True)
        self.final_layer_norm = LayerNorm(hidden)
        self.before = TRAITS[config["model_type"]].before
        self.act = config["activation_function"]
        self.dropout = config.get("dropout") or 0.0
        self.inner_dropout = config.get("activation_dropout") or 0.0

    def _attend(self, name: str, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        norm = self.child(f"{name}_layer_norm")
        residual = x
        if self.before:
            x = norm.forward(x)
        x = self.child(name).forward(x, shared, held)
        x = ops.dropout(x, self.dropout)
        x = ops.add(residual, x)
        return x if self.before else norm.forward(x)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        x = self._attend("self_attn", x, shared, held)
        if self.crossed:
            x = self._attend("encoder_attn", x, shared, held)
        residual = x
        if self.before:
            x = self.final_layer_norm.forward(x)
        x = activation(self.fc1.forward(x), self.act)
        x = ops.dropout(x, self.inner_dropout)
        x = self.fc2.forward(x)
        x = ops.dropout(x, self.dropout)
        x = ops.add(residual, x)
        return x if self.before else self.final_layer_norm.forward(x)


class Sinusoids(Embedding):
    """Positions in a table that is never trained."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.weight.trainable, self.weight.fixed = False, True

    def forward(self, tape: Tape, rows: Size = SEQ) -> Tensor:
        with tape.no_grad():
            return super().forward(tape, rows)


class Waves(Module):
    """NLLB's positions: picked for every token out of a table that is no weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tape: Tape, _rows: Size = SEQ, dtype: str = "fp32") -> Tensor:
        return tape.tensor(TOKENS, self.width, dtype, "positions")


class Bart(Network):
    """``BartForConditionalGeneration``: decoder as long as the encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, vocabulary = config["d_model"], config["vocab_size"]
        self.traits = traits = TRAITS[config["model_type"]]
        self.model = Module()
        self.model.replace("shared", ScaledEmbedding(vocabulary, hidden))
        for side in ("encoder", "decoder"):
            part = Module()
            self.model.replace(side, part)
            part.replace("embed_tokens", ScaledEmbedding(vocabulary, hidden))
            self.tie(f"model.{side}.embed_tokens.weight", "model.shared.weight")
            count = config["max_position_embeddings"]
            part.replace("embed_positions", self._positions(count, hidden))
            if traits.normed:
                part.replace("layernorm_embedding", LayerNorm(hidden))
            if traits.last:
                part.replace("layer_norm", LayerNorm(hidden))
        self.lm_head = Linear(hidden, vocabulary)
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "model.shared.weight")
        self.embedding_names = (
            "model.shared",
            "model.encoder.embed_tokens",
            "model.decoder.embed_tokens",
        )
        self.loss_in_fp32 = False
        self.dropout = config.get("dropout") or 0.0
        self.stages = [self._stage("encoder"), self._stage("decoder")]

    def _positions(self, count: int, hidden: int) -> Module:
        if self.traits.positions == "buffer":
            self.buffer_elements += (count + self.traits.offset) * hidden
            return Waves(hidden)
        if self.traits.positions == "table":
            return Sinusoids(count, hidden)
        return Embedding(count + self.traits.offset, hidden)

    def _stage(self, side: str) -> Stage:
        config = self.config
        stack = Stack(
            f"model.{side}.layers", config[f"{side}_layers"], lambda _layer: Block(config, side)
        )
        part = self.child(f"model.{side}")
        decoder = side == "decoder"
        normed = "layernorm_embedding" in part.children
        last = "layer_norm" in part.children

        def enter(tape: Tape, shared: Shared) -> Tensor:
            embedded: Tensor = part.child("embed_tokens").forward(tape)
            kind = part.child("embed_positions")
            if isinstance(kind, Waves):
                positions: Tensor = kind.forward(tape, SEQ, embedded.dtype)
            else:
                positions = kind.forward(tape, SEQ)
            shared.mask = make_mask(tape, embedded.dtype, causal=decoder)
            if decoder:
                shared.masks["cross"] = make_mask(tape, embedded.dtype, causal=False)
            x = ops.add(embedded, positions)
            if normed:
                x = part.child("layernorm_embedding").forward(x)
            return ops.dropout(x, self.dropout)

        def leave(x: Tensor, shared: Shared) -> Tensor:
            if last:
                x = part.child("layer_norm").forward(x)
            return x

        return Stage(stack, enter, leave)

    def head(self, x: Tensor) -> Tensor:
        logits = self.lm_head.forward(x)
        if not self.traits.biased:
            return logits
        tape = x.tape
        bias = Tensor(tape, None, ONE, logits.width, self.loaded_dtype)
        return ops.add(logits, bias)


MODEL_TYPES = dict.fromkeys(TRAITS, Bart)
