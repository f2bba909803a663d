"""MPT: ALiBi positions, no biases, eager attention of its own."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import make_mask, operand
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
from ftplan.memory.tape import SCORES, Grads, Tape, Tensor


def attention_dropout(config: Config) -> float:
    """``attn_config.attn_pdrop``."""
    return float((config.get("attn_config") or {}).get("attn_pdrop") or 0.0)


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """Keeps the mask; a new tensor on either way."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "masked_fill")
    saved = mask
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "masked_fill", [x], apply)
    return out


class Attention(Module):
    """One matrix for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["d_model"]
        self.count = config["n_heads"]
        settings = config.get("attn_config") or {}
        self.clipped = bool(settings.get("clip_qkv"))
        self.alibi = bool(settings.get("alibi", True))
        self.dropout = attention_dropout(config)
        self.Wqkv = Linear(hidden, 3 * hidden)
        self.out_proj = Linear(hidden, hidden)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        mixed = self.Wqkv.forward(x)
        if self.clipped:
            mixed = ops.unary(mixed, "clamp", "input")
        q, k, v = ops.split(mixed, [x.width] * 3)
        operands = [operand(ops.autocast(t)) for t in (q, k)]
        scores = ops.scale(ops.matmul(operands[0], operands[1], SCORES * self.count, 1, "scores"))
        del operands
        scores = ops.to(scores, "fp32")  # the fp32 positions are added
        assert shared.mask is not None
        scores = masked_fill(scores, shared.mask)
        weights = ops.to(ops.softmax(scores, "fp32"), v.dtype)
        weights = ops.dropout(weights, self.dropout)
        held.append(weights)
        out = ops.matmul(weights, operand(ops.autocast(v)), x.rows, x.width, "attention")
        return self.out_proj.forward(ops.copy(out))


class Block(Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["d_model"]
        self.norm_1 = LayerNorm(hidden, bias=False)
        self.attn = Attention(config)
        self.norm_2 = LayerNorm(hidden, bias=False)
        self.ffn = Module()
        self.ffn.replace("up_proj", Linear(hidden, 4 * hidden))
        self.ffn.replace("down_proj", Linear(4 * hidden, hidden))
        self.dropout = attention_dropout(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        normed = self.norm_1.forward(x)
        residual = x
        attended = self.attn.forward(normed, shared, held)
        x = ops.add(ops.dropout(attended, self.dropout), residual)
        normed = self.norm_2.forward(x)
        residual = x
        fed = activation(self.ffn.child("up_proj").forward(normed), "gelu")
        fed = self.ffn.child("down_proj").forward(fed)
        return ops.add(ops.dropout(fed, self.dropout), residual)


class Mpt(Network):
    """``MptForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["d_model"]
        self.transformer = Module()
        self.transformer.replace("wte", Embedding(config["vocab_size"], hidden))
        self.transformer.replace("norm_f", LayerNorm(hidden, bias=False))
        self.lm_head = Linear(hidden, config["vocab_size"])
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "transformer.wte.weight")
        self.embedding_names = ("transformer.wte",)
        stack = Stack("transformer.blocks", config["n_layers"], lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.transformer.child("wte").forward(tape)
        mask = make_mask(tape, x.dtype, eager=True)  # cast, for a moment
        del mask
        shared.mask = tape.tensor(SCORES, 1, "bool", "mask")
        return x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.transformer.child("norm_f").forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"mpt": Mpt}
