"""torchtune's own modules: ``TransformerDecoder``, its layers and adapters, and its loss.

Source: pytorch/torchtune torchtune/modules (transformer.py, attention.py, feed_forward.py,
rms_norm.py, position_embeddings.py, peft/lora.py, low_precision/nf4_linear.py, loss/),
torchtune/models/*/_component_builders.py and recipes/{full,lora}_finetune_single_device.py, 0.7.0;
:data:`ERAS` says what was otherwise before. NF4 is torchao's (torchao/dtypes/nf4tensor.py, 0.11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.families import complete
from ftplan.memory.families.llama import rotate
from ftplan.memory.families.native.base import (
    Native,
    cast_streamed,
    learned,
    parts_of,
    repeated,
    settle,
    shifted,
    streamed_loss,
    targets,
)
from ftplan.memory.families.native.litgpt import apply_rope
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.nn import (
    Embedding,
    Linear,
    Module,
    RMSNorm,
    Shared,
    Stack,
    Stage,
    activation,
)
from ftplan.memory.optimizer import rounded
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import CHUNK, ONE, SEQ, TOKENS, Grads, Tape, Tensor

__all__ = [
    "CHECKPOINTS",
    "ERAS",
    "METHODS",
    "WEIGHTS",
    "Era",
    "Shape",
    "build",
    "losses",
    "model_types",
    "shape_of",
]

Config = Mapping[str, Any]

METHODS = ("full", "lora", "qlora")
WEIGHTS = ("bf16", "fp32", "nf4-dq")
CHECKPOINTS = ("full",)
FSDP = {"torchtune": 2, "torchtune-0.6": 2}
_KNOWN = {
    "torchtune-0.1": ("llama", "mistral"),
    "torchtune-0.4": ("llama", "mistral", "gemma", "phi3", "qwen2"),
    "torchtune-0.6": ("llama", "mistral", "gemma", "gemma2", "phi3", "qwen2"),
    "torchtune": ("llama", "mistral", "gemma", "gemma2", "phi3", "qwen2", "qwen3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """What torchtune did at a time."""

    loss: Literal["linear", "listed", "shifted"] = "linear"
    """Where chunks meet the head: in the loss, chunk by chunk; or in the model, which returns a
    list; or all logits are copied but the last of each sequence, which the loop goes on naming."""
    weight_in_fp32: bool = False
    """RMSNorm multiplies by its weight before it casts back (``F.rms_norm``)."""
    expands_first: bool = False
    """Keys are repeated before they are rotated."""
    drops: bool = True
    """LoRA's dropout reaches the layers: the first builders did not hand it on."""
    tables: bool = False
    """Layers are copies of one: each has a table of sines of its own."""


ERAS = {
    "torchtune": Era(),
    "torchtune-0.6": Era(loss="listed", weight_in_fp32=True),
    "torchtune-0.4": Era(loss="listed", tables=True),
    "torchtune-0.1": Era(loss="shifted", expands_first=True, drops=False, tables=True),
}
"""0.7.0; 0.5.0 to 0.6.1; 0.3.0 to 0.4.0; 0.1.0 to 0.1.1."""


def model_types(modules: str, method: str) -> tuple[str, ...]:
    """Architectures that there were builders of; the first one of Gemma was without LoRA."""
    whole = ("gemma",) if modules == "torchtune-0.1" and method == "full" else ()
    return (*_KNOWN[modules], *whole)


def losses(modules: str, _method: str) -> tuple[str, ...]:
    """How the loss meets the logits: the recipe's ``loss``."""
    return ("full",) if ERAS[modules].loss == "shifted" else ("full", "chunked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An architecture in the words of torchtune's builders."""

    kind: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    tied: bool
    softcapping: float | None = None
    final_capping: float | None = None

    @property
    def gemma(self) -> bool:
        """Scaled embeddings, norms whose weight is one more than stored, gelu."""
        return self.kind in ("gemma", "gemma2")

    @property
    def pairs(self) -> bool:
        """Neighbours are rotated, in fp32; else halves are."""
        return self.kind not in ("qwen2", "qwen3", "phi3")

    @property
    def quantises_all(self) -> bool:
        """QLoRA quantises every matrix of a layer; in Qwen only those that are adapted."""
        return self.kind not in ("qwen2", "qwen3")

    @property
    def shares_table(self) -> bool:
        """Whether every builder makes one table for all layers: those of Llama 3.1 and 3.2."""
        return self.kind == "llama" and self.vocab_size == 128_256 and self.max_seq_len > 8192

    @property
    def table_bytes(self) -> int:
        """A table of sines: fp32, cosine and sine of each pair, of each number for Qwen and Phi."""
        return rounded(4 * self.max_seq_len * self.head_dim * (1 if self.pairs else 2))


def shape_of(raw: Config) -> Shape:
    """A config.json in the builders' words."""
    config = complete(raw)
    kind, heads = str(config["model_type"]), config["num_attention_heads"]
    longest = int(config.get("max_position_embeddings") or 4096)
    return Shape(
        kind=kind,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        # qwen2's builders say 32,768 whatever the checkpoint's config does
        max_seq_len=min(longest, 32768) if kind == "qwen2" else longest,
        tied=bool(config.get("tie_word_embeddings")),
        softcapping=config.get("attn_logit_softcapping") if kind == "gemma2" else None,
        final_capping=config.get("final_logit_softcapping") if kind == "gemma2" else None,
    )


def _norm(shape: Shape, era: Era, width: int) -> Module:
    return RMSNorm(width, offset=shape.gemma, late=era.weight_in_fp32)


class Rope(Module):
    """Rotary positions, each layer's for itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        tape, size = x.tape, self.shape.head_dim
        cos, sin = shared.rope[""]
        if tape.env.packed:  # the rows that the positions of the batch ask for
            taken = tape.tensor(TOKENS, 2 * size // (2 if self.shape.pairs else 1), "fp32", "rope")
            cos, sin = taken.alias(width=size), taken.alias(width=size)
        if self.shape.pairs:
            return _rotate_pairs(x, cos, sin)
        if self.shape.kind == "phi3":
            return apply_rope(x, cos, sin)
        rows = TOKENS if tape.env.packed else SEQ
        cos, sin = (tape.tensor(rows, size, x.dtype, "rope") for _ in range(2))
        return rotate(x, cos, sin)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours as two halves of an fp32 copy, put together again and cast back."""
    hidden = ops.to(x, "fp32")
    half = x.width // 2
    first = ops.add(ops.mul(ops.part(hidden, half), cos), ops.mul(ops.part(hidden, half), sin))
    second = ops.add(ops.mul(ops.part(hidden, half), cos), ops.mul(ops.part(hidden, half), sin))
    return ops.to(ops.cat((first, second), "stack"), x.dtype)


class MultiHeadAttention(Module):
    """Queries first, then keys and values; keys and values repeated for each query head."""

    def __init__(self, shape: Shape, era: Era) -> None:
        super().__init__()
        self.shape, self.era = shape, era
        wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        bias = shape.kind == "qwen2"
        self.q_proj: Module = Linear(shape.embed_dim, wide, bias=bias)
        self.k_proj: Module = Linear(shape.embed_dim, narrow, bias=bias)
        self.v_proj: Module = Linear(shape.embed_dim, narrow, bias=bias)
        self.output_proj: Module = Linear(wide, shape.embed_dim)
        self.pos_embeddings = Rope(shape)
        self.normed = shape.kind == "qwen3"
        if self.normed:
            self.q_norm = _norm(shape, era, shape.head_dim)
            self.k_norm = _norm(shape, era, shape.head_dim)
        count, size = shape.num_heads, shape.head_dim
        self.heads = Heads(
            count=count, kv_count=count, size=size, value_size=size,
            softcap=shape.softcapping is not None,
        )  # fmt: skip

    def _by_head(self, norm: Module, x: Tensor) -> Tensor:
        rows = x.rows * (x.width // self.shape.head_dim)
        out: Tensor = norm.forward(ops.view(x, rows, self.shape.head_dim))
        return ops.view(out, x.rows, x.width)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        repeats, size = self.shape.num_heads // self.shape.num_kv_heads, self.shape.head_dim
        turn = self.pos_embeddings.forward
        if self.era.expands_first:
            q, k, v = (part.forward(x) for part in (self.q_proj, self.k_proj, self.v_proj))
            k, v = repeated(k, repeats, size), repeated(v, repeats, size)
            q, k = turn(q, shared), turn(k, shared)
        else:
            q = self.q_proj.forward(x)
            if self.normed:
                q = self._by_head(self.q_norm, q)
            q = turn(q, shared)
            k, v = self.k_proj.forward(x), self.v_proj.forward(x)
            if self.normed:
                k = self._by_head(self.k_norm, k)
            k = turn(k, shared)
            k, v = repeated(k, repeats, size), repeated(v, repeats, size)
        output = attend(q, k, v, self.heads, eager=self.heads.softcap)
        out: Tensor = self.output_proj.forward(output)
        return out


class FeedForward(Module):
    """``w2(act(w1(x)) * w3(x))``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1: Module = Linear(shape.embed_dim, shape.intermediate_dim)
        self.w2: Module = Linear(shape.intermediate_dim, shape.embed_dim)
        self.w3: Module = Linear(shape.embed_dim, shape.intermediate_dim)
        self.act = "gelu" if shape.gemma else "silu"

    def forward(self, x: Tensor) -> Tensor:
        h = activation(self.w1.forward(x), self.act)
        h = ops.mul(h, self.w3.forward(x))
        out: Tensor = self.w2.forward(h)
        return out


class TransformerSelfAttentionLayer(Module):
    """One layer; Gemma 2 norms what it adds to the residual stream."""

    def __init__(self, shape: Shape, era: Era) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(shape, era)
        self.mlp: Module = FeedForward(shape)
        self.sa_norm, self.mlp_norm = (_norm(shape, era, shape.embed_dim) for _ in range(2))
        self.scaled = shape.kind == "gemma2"
        if self.scaled:
            self.sa_scale, self.mlp_scale = (_norm(shape, era, shape.embed_dim) for _ in range(2))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        h = self.sa_norm.forward(x)
        attn_out = self.attn.forward(h, shared)
        h = ops.add(self.sa_scale.forward(attn_out) if self.scaled else attn_out, x)
        mlp_out = self.mlp.forward(self.mlp_norm.forward(h))
        return ops.add(h, self.mlp_scale.forward(mlp_out) if self.scaled else mlp_out)


class TransformerDecoder(Native):
    """The decoder, and the recipe's loss."""

    def __init__(self, shape: Shape, era: Era, *, chunked: bool) -> None:
        super().__init__()
        self.shape, self.era, self.chunked = shape, era, chunked
        self.outputs_outlive_step = self.meets_previous = era.loss == "shifted"
        self.tok_embeddings = Embedding(shape.vocab_size, shape.embed_dim)
        self.norm = _norm(shape, era, shape.embed_dim)
        self.head_name = "output"
        self.output: Module = Linear(shape.embed_dim, shape.vocab_size)
        if shape.tied:
            self.tie("output.weight", "tok_embeddings.weight")
        self.embedding_names = ("tok_embeddings",)
        stack = Stack(
            "layers", shape.num_layers, lambda _layer: TransformerSelfAttentionLayer(shape, era)
        )
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        # the rows of a table that is static: no bytes of their own
        size = self.shape.head_dim // (2 if self.shape.pairs else 1)
        table = Tensor(tape, None, SEQ, size, "fp32")
        shared.rope[""] = (table, table)
        x = self.tok_embeddings.forward(tape)
        return ops.scale(x) if self.shape.gemma else x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.norm.forward(x)
        if self.shape.final_capping is not None:  # of the states, not of the logits
            out = ops.scale(ops.unary(ops.scale(out), "tanh", "output"))
        return out

    def head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output.forward(x)
        return logits

    def outputs(self, x: Tensor) -> list[Tensor]:
        """All logits in fp32; or chunks of them; or the states, for a loss that has the head."""
        if not self.chunked:
            return [ops.to(self.head(x), "fp32")]
        if self.era.loss == "linear":
            return [x]
        return [self.head(piece) for piece in _chunks(x)]

    def loss(self, held: list[Tensor]) -> Tensor:
        """The recipe's ``_loss_step``: what the model returned is let go of before backward."""
        if not self.chunked:
            return self._whole(held)
        if self.era.loss == "linear":
            return self._linear(held[0])
        rest, second, last = held
        held.clear()
        loss = streamed_loss(cast_streamed(rest, "fp32", alone=True), rest.dtype)
        for piece in (second, last):
            loss = ops.add(loss, _entropy(piece))
        return loss

    def _whole(self, held: list[Tensor]) -> Tensor:
        logits = held.pop()
        if self.era.loss == "shifted":
            logits = shifted(logits)
            held.append(logits)
            # tokens last: the kernel copies what it is given before it reads it
            turned = logits.tape.tensor(logits.rows, logits.width, logits.dtype, "transposed")
            loss = ops.cross_entropy(logits, targets(logits))
            del turned
            return loss
        return ops.cross_entropy(logits, targets(logits))

    def _linear(self, x: Tensor) -> Tensor:
        """``LinearCrossEntropyLoss``: the valid tokens are picked, then head and entropy chunk by
        chunk. Two chunks are played; the others leave what they keep."""
        hidden = ops.gather(x)
        loss = _head_and_entropy(self, ops.rows_slice(hidden, TOKENS + CHUNK * -2))
        for _ in range(2):
            loss = ops.add(loss, _entropy(self.head(ops.rows_slice(hidden, CHUNK))))
        return loss


def _chunks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All chunks but two, and those, as views; the way back joins their gradients."""
    pieces = x.alias(rows=TOKENS + CHUNK * -2), x.alias(rows=CHUNK), x.alias(rows=CHUNK)
    shape = (x.rows, x.width, x.dtype)

    def apply(*grads: Tensor | None) -> Grads:
        tape = next(grad.tape for grad in grads if grad is not None)
        return (tape.tensor(*shape, "gradient"),)

    ops.record(list(pieces), "split", [x], apply)
    return pieces


def _entropy(logits: Tensor) -> Tensor:
    return ops.cross_entropy(ops.to(logits, "fp32"), targets(logits))


def _head_and_entropy(network: TransformerDecoder, x: Tensor) -> Tensor:
    """Head and entropy of all earlier chunks: each one's are let go of as its turn comes."""
    tape, shape = x.tape, network.shape
    rows, wide = x.rows, (shape.embed_dim, shape.vocab_size)
    weights = [tape.leaf(p) for p in network.head_parameters() if p.trainable]
    tape.multiply(rows, *wide)
    kept = [tape.tensor(rows, shape.vocab_size, "fp32", "log-probabilities")]
    out = tape.tensor(ONE, 1, "fp32", "loss")
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, *weights)]
    wanted = sum(t.requires_grad for t in (x, *weights))

    def apply(grad: Tensor) -> Grads:
        kept.clear()
        grad.tape.multiply(rows, *wide, times=wanted)
        return tuple(make(grad) for make in makers)

    ops.record([out], "earlier chunks", [x, *weights], apply)
    return out


class NF4Linear(QuantizedLinear):
    """torchao's NF4, whose scales are always quantised: neither input nor expanded weight is kept.

    Expanding is elementwise: two 8-byte indices for each byte, what they stand for, the scales
    spread out, their products, and then the weight (``NF4Tensor.get_original_weight``).
    """

    def forward(self, x: Tensor) -> Tensor:
        tape, rows, dtype = x.tape, x.rows, x.dtype
        tape.multiply(rows, self.in_features, self.out_features)
        expanded = self._expanded(tape, dtype)
        out = tape.tensor(rows, self.out_features, dtype, "linear")
        del expanded

        def apply(grad: Tensor) -> Grads:
            grad.tape.multiply(rows, self.in_features, self.out_features)
            weight = self._expanded(grad.tape, grad.dtype)
            result = grad.tape.tensor(rows, self.in_features, dtype, "gradient")
            del weight
            return (result,)

        ops.record([out], "nf4 matmul", [x], apply)
        return ops.add(out, tape.leaf(self.bias)) if self.bias is not None else out

    def _expanded(self, tape: Tape, dtype: str) -> Tensor:
        rows, half = ONE * self.out_features, self.in_features // 2
        indices = [tape.tensor(rows, half, "int64", "nf4 indices") for _ in range(2)]
        values = [tape.tensor(rows, half, dtype, "nf4 values") for _ in range(2)]
        scaled = []
        for _ in values:
            spread = tape.tensor(rows, half, dtype, "nf4 scales")
            scaled.append(tape.tensor(rows, half, dtype, "nf4 values"))
            del spread
        out = tape.tensor(rows, self.in_features, dtype, "dequantised weight")
        del indices, values, scaled
        return out


class LoRALinear(Module):
    """A matrix and two thin ones: ``weight x + (alpha / rank) lora_b(lora_a(dropout(x)))``."""

    def __init__(self, linear: Linear, spec: AdapterSpec) -> None:
        super().__init__()
        self.linear: Module = linear
        self.dropout = spec.dropout
        self.lora_a = learned("lora_a", (spec.rank, linear.in_features), spec.dtype)
        self.lora_b = learned("lora_b", (linear.out_features, spec.rank), spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear.forward(x)
        tape = x.tape
        lora = ops.linear(ops.dropout(x, self.dropout), tape.leaf(self.lora_a))
        lora = ops.scale(ops.linear(lora, tape.leaf(self.lora_b)))
        return ops.add(out, lora)


_PARTS = {
    "attn.q_proj": "query", "attn.k_proj": "key", "attn.v_proj": "value",
    "attn.output_proj": "projection", "mlp.w1": "mlp", "mlp.w2": "mlp", "mlp.w3": "mlp",
    "output": "head",
}  # fmt: skip


def build(job: Job) -> Native:
    """The network of a job, as its recipe makes it."""
    shape, era, spec = shape_of(job.config), ERAS[job.modules], job.adapter
    network = TransformerDecoder(shape, era, chunked=job.environment.loss != "full")
    settle(network, job, spec.dtype if spec is not None else "")
    adapted = parts_of(spec) if spec is not None else frozenset()
    quantised = job.weights.layout != "plain"
    for root in (network, *network.stages[0].stack.kinds):
        for path, module in list(root.named_modules()):
            if not isinstance(module, Linear):
                continue
            part = _PARTS[path]
            wrapped = part in adapted and not (part == "head" and shape.tied)
            linear = module
            if quantised and part != "head" and (wrapped or shape.quantises_all):
                linear = NF4Linear(module, job.weights, job.compute_dtype)
            changed: Module = linear
            if wrapped and spec is not None:
                changed = LoRALinear(linear, spec if era.drops else replace(spec, dropout=0.0))
            if changed is not module:
                root.replace(path, changed)
    own_tables = (era.tables or spec is not None) and not shape.shares_table
    network.buffer_bytes = shape.table_bytes * (shape.num_layers if own_tables else 1)
    return network
