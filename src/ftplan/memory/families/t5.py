"""T5, mT5, UMT5 (and FLAN-T5): encoder and decoder with learnt relative positions in the scores."""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.llama import Config
from ftplan.memory.nn import (
    Embedding,
    Linear,
    Module,
    Network,
    Shared,
    Stack,
    Stage,
    activation,
)
from ftplan.memory.tape import SQUARE, TOKENS, Grads, Parameter, Tape, Tensor


class Norm(Module):
    """T5's RMSNorm: only the variance is computed on an fp32 copy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor) -> Tensor:
        weight = x.tape.leaf(self.weight)
        variance = ops.mean_square(ops.to(x, "fp32"))
        hidden = ops.mul(x, ops.unary(ops.shift(variance), "rsqrt", "output"))
        if weight.dtype in ("bf16", "fp16"):
            hidden = ops.to(hidden, weight.dtype)
        return ops.mul(weight, hidden)


class Attention(Module):
    """Self or cross attention; the first one of a stack owns the table of positions."""

    def __init__(self, config: Config, *, relative: bool, causal: bool, cross: bool) -> None:
        super().__init__()
        hidden, count, size = config["d_model"], config["num_heads"], config["d_kv"]
        self.heads = Heads(
            count=count,
            kv_count=count,
            size=size,
            value_size=size,
            dropout=config.get("dropout_rate") or 0.0,
            causal=causal,
            softmax_fp32=False,
        )
        self.cross = cross
        self.relative = relative
        self.every_layer = config["model_type"] == "umt5"
        self.q = Linear(hidden, count * size)
        self.k = Linear(hidden, count * size)
        self.v = Linear(hidden, count * size)
        self.o = Linear(count * size, hidden)
        if relative:
            self.relative_attention_bias = Embedding(
                config["relative_attention_num_buckets"], count
            )

    def _bias(self, shared: Shared, dtype: str, tape: Tape) -> Tensor:
        held = shared.cross_bias if self.cross else shared.bias
        if held is not None and not self.every_layer:
            return held
        if self.relative:
            bias = self._positions(tape)
        else:
            bias = tape.tensor(SQUARE, self.heads.count, dtype, "position bias")
            if shared.checkpointed:
                if not shared.zeros:
                    leaf = Parameter("", (self.heads.count,), dtype, True)
                    shared.zeros.append((bias.alias(), leaf))
                bias.requires_grad, bias.node = True, shared.zeros[0][1]
        if self.cross:
            shared.cross_bias = bias
        else:
            shared.bias = bias
        return bias

    def _positions(self, tape: Tape) -> Tensor:
        """Rows of the table for each pair of positions; the buckets are kept."""
        buckets = self._buckets(tape)
        weight = tape.leaf(self.relative_attention_bias.weight)
        out = tape.tensor(SQUARE, weight.width, weight.dtype, "position bias")
        make = ops.like(weight.rows, weight.width, weight.dtype, weight.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = buckets
            return (make(grad),)

        ops.record([out], "embedding", [weight], apply)
        return out

    def _buckets(self, tape: Tape) -> Tensor:
        """``compute_bias`` and ``_relative_position_bucket``: a number for each pair."""

        def made(dtype: str = "int64") -> Tensor:
            return tape.tensor(SQUARE, 1, dtype, "position buckets")

        distance = made()
        if self.heads.causal:
            zeros = made()
            smaller = made()
            del zeros
            positive = made()
            del smaller
            buckets = None
        else:
            above = made("bool")
            cast = made()
            del above
            scaled = made()
            del cast
            buckets = made()
            del scaled
            positive = made()
        small = made("bool")
        steps = [made("fp32")]
        for _ in range(4):  # divided, logarithm, divided, multiplied
            steps.append(made("fp32"))
            del steps[0]
        large = made()
        del steps[0]
        shifted = made()
        del large
        most = made()
        large = made()
        del most, shifted
        chosen = made()
        del small
        buckets = chosen if buckets is None else buckets
        del distance, positive, large, chosen
        return buckets

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        source = shared.memory if self.cross else x
        assert source is not None
        q, k, v = self.q.forward(x), self.k.forward(source), self.v.forward(source)
        tape = x.tape
        bias = self._bias(shared, q.dtype, tape)
        if tape.env.attention == "eager":
            mask = None if self.cross else shared.mask
            out = attend(q, k, v, self.heads, mask, bias=bias, held=held)
        else:
            out = attend(q, k, v, self.heads, self._as_mask(bias, shared), held=held)
        return self.o.forward(out)

    def _as_mask(self, bias: Tensor, shared: Shared) -> Tensor:
        """``create_position_bias_mask``: SDPA takes positions and causality as one mask."""
        tape = bias.tape
        if self.heads.causal and not self.cross:
            causal = tape.tensor(SQUARE, 1, "bool", "causal mask")
            return _masked(bias, causal)
        return ops.copy(bias) if self.relative or not self.cross else bias


def _masked(bias: Tensor, causal: Tensor) -> Tensor:
    """``where(causal, bias, lowest)``."""
    out = bias.tape.tensor(bias.rows, bias.width, bias.dtype, "where")
    make = ops.like(bias.rows, bias.width, bias.dtype, bias.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = causal
        return (make(grad),)

    ops.record([out], "where", [bias], apply)
    return out


class FeedForward(Module):
    """``wo(dropout(act(wi(x))))``, gated in versions 1.1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["d_model"], config["d_ff"]
        kind, _, act = str(config["feed_forward_proj"]).rpartition("-")
        self.gated = kind == "gated"
        self.act = "gelu_new" if self.gated and act == "gelu" else act
        if self.gated:
            self.wi_0 = Linear(hidden, inner)
            self.wi_1 = Linear(hidden, inner)
        else:
            self.wi = Linear(hidden, inner)
        self.wo = Linear(inner, hidden)
        self.dropout = config.get("dropout_rate") or 0.0

    def looks_at(self) -> Sequence[Parameter]:
        return (self.wo.weight,)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate = activation(self.wi_0.forward(x), self.act)
            up = self.wi_1.forward(x)
            x = ops.mul(gate, up)
            x = ops.dropout(x, self.dropout)
            x = ops.to(x, self.wo.weight.dtype)
            return self.wo.forward(x)
        x = self.wi.forward(x)
        x = activation(x, self.act)
        x = ops.dropout(x, self.dropout)
        x = ops.to(x, self.wo.weight.dtype)
        return self.wo.forward(x)


class Block(Module):
    """One layer of the encoder, or of the decoder with its cross attention."""

    def __init__(self, config: Config, *, decoder: bool, relative: bool) -> None:
        super().__init__()
        self.layer = Module()
        self.dropout = config.get("dropout_rate") or 0.0
        own = Attention(config, relative=relative, causal=decoder, cross=False)
        self._add("0", "SelfAttention", own, config)
        self.crossed = decoder
        if decoder:
            cross = Attention(config, relative=False, causal=False, cross=True)
            self._add("1", "EncDecAttention", cross, config)
        self.last = "2" if decoder else "1"
        self._add(self.last, "DenseReluDense", FeedForward(config), config)

    def _add(self, number: str, name: str, module: Module, config: Config) -> None:
        part = Module()
        part.replace(name, module)
        part.replace("layer_norm", Norm(config["d_model"]))
        self.layer.replace(number, part)

    def _attend(
        self, number: str, name: str, x: Tensor, shared: Shared, held: list[Tensor]
    ) -> Tensor:
        part = self.layer.child(number)
        normed = part.child("layer_norm").forward(x)
        out = part.child(name).forward(normed, shared, held)
        return ops.add(x, ops.dropout(out, self.dropout))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        x = self._attend("0", "SelfAttention", x, shared, held)
        if self.crossed:
            x = self._attend("1", "EncDecAttention", x, shared, held)
            del held[:-1]  # one name for the weights of both
        part = self.layer.child(self.last)
        fed = part.child("layer_norm").forward(x)
        fed = part.child("DenseReluDense").forward(fed)
        return ops.add(x, ops.dropout(fed, self.dropout))


class T5(Network):
    """``T5ForConditionalGeneration``: decoder as long as the encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, vocabulary = config["d_model"], config["vocab_size"]
        self.shared = Embedding(vocabulary, hidden)
        for name in ("encoder", "decoder"):
            part = Module()
            part.replace("embed_tokens", Embedding(vocabulary, hidden))
            part.replace("final_layer_norm", Norm(hidden))
            self.replace(name, part)
            self.tie(f"{name}.embed_tokens.weight", "shared.weight")
        self.lm_head = Linear(hidden, vocabulary)
        self.tie("lm_head.weight", "shared.weight")  # the classes always tie
        self.embedding_names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
        self.loss_in_fp32 = False
        self.unquantised = ("wo",)
        # T5 1.1 is told by its config to leave the outputs as they are; mT5 and UMT5 never scale
        self.scaled = (
            config["model_type"] == "t5" and config.get("tie_word_embeddings") is not False
        )
        self.dropout = config.get("dropout_rate") or 0.0
        layers = config["num_layers"]
        decoder_layers = config.get("num_decoder_layers") or layers
        self.stages = [
            self._stage("encoder", layers, decoder=False),
            self._stage("decoder", decoder_layers, decoder=True),
        ]

    def _stage(self, name: str, layers: int, *, decoder: bool) -> Stage:
        config = self.config
        every = config["model_type"] == "umt5"
        stack = Stack(
            f"{name}.block",
            layers,
            lambda layer: Block(config, decoder=decoder, relative=every or layer == 0),
            lambda layer: every or layer == 0,
        )
        part = self.child(name)

        def enter(tape: Tape, shared: Shared) -> Tensor:
            shared.bias = shared.cross_bias = None
            if decoder:
                shifted = tape.tensor(TOKENS, 1, "int64", "shifted ids")
                del shifted
            x: Tensor = part.child("embed_tokens").forward(tape)
            shared.mask = make_mask(tape, x.dtype, causal=decoder)
            return ops.dropout(x, self.dropout)

        def leave(x: Tensor, shared: Shared) -> Tensor:
            x = part.child("final_layer_norm").forward(x)
            return ops.dropout(x, self.dropout)

        return Stage(stack, enter, leave)

    def head(self, x: Tensor) -> Tensor:
        if self.scaled:
            x = ops.scale(x)
        return self.lm_head.forward(x)


MODEL_TYPES = dict.fromkeys(("t5", "mt5", "umt5"), T5)
