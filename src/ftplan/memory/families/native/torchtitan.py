"""torchtitan's own modules: its decoders, and the losses of its trainer.

Source: pytorch/torchtitan torchtitan/models/common (decoder.py, attention.py, rope.py,
feed_forward.py), torchtitan/components/loss.py, torchtitan/distributed/fsdp.py and
torchtitan/trainer.py, 0.3.0. Norms are PyTorch's fused one, attention is compiled flex attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import Heads
from ftplan.memory.families import complete
from ftplan.memory.families.llama import rotate
from ftplan.memory.families.native.base import Native, settle
from ftplan.memory.families.native.torchtitan_experts import MoE
from ftplan.memory.families.native.torchtitan_latent import LatentAttention
from ftplan.memory.families.native.torchtitan_split import (
    VocabParallelEmbedding,
    gathered,
    loss_parallel,
    scattered,
)
from ftplan.memory.families.native.torchtitan_spread import Grouped, Mixed
from ftplan.memory.flex import flex_attention
from ftplan.memory.fsdp import Fsdp
from ftplan.memory.job import Job, ShardingSpec
from ftplan.memory.nn import Embedding, Linear, Module, Shared, Stack, Stage, activation
from ftplan.memory.tape import (
    CHUNK,
    ONE,
    SEQ,
    TOKENS,
    Grads,
    Parameter,
    Tape,
    Tensor,
    backward,
)
from ftplan.memory.units import Unit

__all__ = [
    "ATTENTION",
    "CHECKPOINTS",
    "METHODS",
    "WEIGHTS",
    "build",
    "losses",
    "model_types",
    "wraps",
]

Config = Mapping[str, Any]

METHODS = ("full",)
PARALLEL = ("ep", "tp")
WEIGHTS = ("bf16", "fp32")
CHECKPOINTS = ("full", "selective")
ATTENTION = ("sdpa", "flash")
"""Any fused kernel means flex attention, which is compiled whatever else is."""


def model_types(_modules: str, _method: str) -> tuple[str, ...]:
    """Architectures of which its model classes are walked."""
    return ("llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def losses(_modules: str, _method: str) -> tuple[str, ...]:
    """``CrossEntropyLoss``, by itself or in ``ChunkedLossWrapper``."""
    return ("full", "chunked")


def wraps(sharding: Any, config: Config) -> bool:
    """``fully_shard`` of every block, of the embeddings, and of norm and head; on one GPU too.

    Tensor parallelism is walked of models without experts, their sequence split beside it.
    """
    tp, apart = (sharding.tp or 1) > 1, set(sharding.apart or ())
    if tp and (
        config.get("model_type") not in ("llama", "qwen3") or not sharding.sequence_parallel
    ):
        return False
    offloads = sharding.offload not in (None, "none")
    units = apart == {"embeddings", "head"} and not offloads
    return bool((sharding.kind, sharding.version or 2) == ("fsdp", 2) and units)


class RMSNorm(Module):
    """``torch.nn.RMSNorm``, one kernel on CUDA: keeps its input and an fp32 number a row.

    ``gathers``: all tokens come out of it, of a part of them.
    """

    def __init__(self, width: int, *, gathers: bool = False) -> None:
        super().__init__()
        self.gathers = gathers
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor) -> Tensor:
        weight = x.tape.leaf(self.weight)
        out = x.tape.tensor(x.rows, x.width, x.dtype, "rms_norm")
        saved = (x, x.tape.tensor(x.rows, 1, "fp32", "rms_norm statistics"))
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, weight)]

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return tuple(make(grad) for make in makers)

        ops.record([out], "rms_norm", [x, weight], apply)
        return gathered(out) if self.gathers else out


class Attention(Module):
    """``GQAttention``: one matrix makes queries, keys and values, which are laid apart."""

    def __init__(self, config: Config, *, split: bool) -> None:
        super().__init__()
        self.split = split
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        kv_count = config.get("num_key_value_heads") or count
        size = config.get("head_dim") or hidden // count
        self.widths = (count * size, kv_count * size, kv_count * size)
        self.heads = Heads(count=count, kv_count=kv_count, size=size, value_size=size)
        self.wqkv = Linear(hidden, sum(self.widths))
        self.wo = Linear(count * size, hidden)
        self.normed = config["model_type"] != "llama"
        if self.normed:
            self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(gathered(x) if self.split else x)
        if self.normed:
            q = self._by_head(self.q_norm, q)
            k = self._by_head(self.k_norm, k)
        turn = _rotate_halves if self.normed else _rotate_pairs
        q, k = turn(q, k, self.heads.size)
        out: Tensor = self.wo.forward(flex_attention(q, k, v, self.heads))
        return scattered(out) if self.split else out

    def _project(self, x: Tensor) -> list[Tensor]:
        qkv: Tensor = self.wqkv.forward(x)
        return [ops.copy(piece) for piece in ops.split(qkv, self.widths)]

    def _by_head(self, norm: Module, x: Tensor) -> Tensor:
        rows = x.rows * (x.width // self.heads.size)
        out: Tensor = norm.forward(ops.view(x, rows, self.heads.size))
        return ops.view(out, x.rows, x.width)


def _rotate_pairs(q: Tensor, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``ComplexRoPE``: neighbours as complex numbers, times rows of a table that are picked."""
    rows = q.tape.tensor(TOKENS, size, "fp32", "rope")
    xq, xk = ops.to(q, "fp32"), ops.to(k, "fp32")
    xq_out = _turn(xq, rows)
    xk_out = _turn(xk, rows)
    return ops.to(xq_out, q.dtype), ops.to(xk_out, k.dtype)


def _turn(x: Tensor, rows: Tensor) -> Tensor:
    """A complex product; the way back conjugates the other factor for a moment."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "mul")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        conjugate = grad.tape.tensor(rows.rows, rows.width, rows.dtype, "conjugate")
        result = make(grad)
        del conjugate
        return (result,)

    ops.record([out], "mul", [x], apply)
    return out


def _rotate_halves(q: Tensor, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``CosSinRoPE``: halves, in fp32."""
    rows = q.tape.tensor(TOKENS, 2 * size, "fp32", "rope")
    cos, sin = rows.alias(width=size), rows.alias(width=size)
    xq, xk = ops.to(q, "fp32"), ops.to(k, "fp32")
    xq_out = rotate(xq, cos, sin)
    xk_out = rotate(xk, cos, sin)
    return ops.to(xq_out, q.dtype), ops.to(xk_out, k.dtype)


class FeedForward(Module):
    """``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, config: Config, *, split: bool) -> None:
        super().__init__()
        self.split = split
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.w1, self.w3 = Linear(hidden, inner), Linear(hidden, inner)
        self.w2 = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out = self._run(gathered(x) if self.split else x)
        return scattered(out) if self.split else out

    def _run(self, x: Tensor) -> Tensor:
        h = ops.mul(activation(self.w1.forward(x), "silu"), self.w3.forward(x))
        return self.w2.forward(h)


def _moe(config: Config, spec: ShardingSpec) -> MoE:
    """Experts, and beside them as many more that all tokens go through."""
    count = config.get("n_shared_experts") or 0
    width = {**config, "intermediate_size": config["moe_intermediate_size"] * count}
    return MoE(config, spec, FeedForward(width, split=False) if count else None)


class TransformerBlock(Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Config, spec: ShardingSpec, *, mixed: bool) -> None:
        super().__init__()
        split = spec.tp > 1
        if config.get("kv_lora_rank"):
            self.attention: Module = LatentAttention(config, norm=RMSNorm, rotate=_rotate_pairs)
        else:
            self.attention = Attention(config, split=split)
        self.feed_forward: Module = (
            _moe(config, spec) if mixed else FeedForward(config, split=split)
        )
        self.attention_norm = RMSNorm(config["hidden_size"])
        self.ffn_norm = RMSNorm(config["hidden_size"])

    def forward(self, x: Tensor, _shared: Shared) -> Tensor:
        h = ops.add(x, self.attention.forward(self.attention_norm.forward(x)))
        return ops.add(h, self.feed_forward.forward(self.ffn_norm.forward(h)))


class Decoder(Native):
    """The decoder, its units of FSDP2 beside the blocks, and the trainer's loss."""

    def __init__(self, config: Config, spec: ShardingSpec, *, chunked: bool, earlier: int) -> None:
        super().__init__()
        self.fsdp_kind = Grouped if spec.ep > 1 else Mixed
        self.chunked, self.earlier = chunked, earlier
        self.split = spec.tp > 1
        hidden, vocabulary = config["hidden_size"], -(-config["vocab_size"] // spec.tp)
        table = VocabParallelEmbedding if self.split else Embedding
        self.tok_embeddings = table(vocabulary, hidden)
        self.norm = RMSNorm(hidden, gathers=self.split)
        self.lm_head = Linear(hidden, vocabulary)
        self.embedding_names = ("tok_embeddings",)
        self.frees_head = chunked  # from the first step on: ``set_reshard_after_forward(True)``
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", "tok_embeddings.weight")
            self.lm_head.weight.twice = chunked or self.split
        mixed = _mixed(config)
        stack = Stack(
            "layers", config["num_hidden_layers"],
            lambda layer: TransformerBlock(config, spec, mixed=mixed(layer)), mixed,
        )  # fmt: skip
        self.stages = [Stage(stack, self._enter, self._leave)]
        self.row_width = _row_width(config)
        self.fsdp: Fsdp | None = None

    def inputs(self, tape: Tape) -> list[Tensor]:
        """Positions, and what a mask of packed documents knows of each token; and what the loop
        has moved to the GPU of the step's earlier micro batches: tokens and positions."""
        ends = tape.tensor(TOKENS, 2 if tape.alone else 1, "int32", "document ends")
        held = [tape.tensor(TOKENS, 1, "int64", "positions"), ends]
        if self.earlier:
            held.append(tape.tensor(TOKENS * self.earlier, 2, "int64", "earlier batches"))
        return held

    def tables(self, tape: Tape) -> list[Tensor]:
        """Each layer's own table of rotary positions, as long as the sequence."""
        return [tape.tensor(SEQ, self.row_width * self.stages[0].stack.count, "fp32", "rope")]

    def sharded(self, fsdp: Fsdp, units: Sequence[Unit]) -> None:
        """The trainer sums the loss over all tokens and scales no gradient."""
        self.fsdp, fsdp.divides = fsdp, True
        self.last = next(unit for unit in units if unit.name == "head")
        if self.split and self.tied:  # ``parallelize`` makes two DTensors, and FSDP2 knows both
            other = copy.deepcopy(self.lm_head.weight)
            other.trainable = False
            self.last.parameters.append(other)
        if isinstance(fsdp, Mixed):
            fsdp.prepare(self.stages[0].stack, self.last)

    def _enter(self, tape: Tape, _shared: Shared) -> Tensor:
        x: Tensor = self.tok_embeddings.forward(tape)
        return x

    def _leave(self, x: Tensor, _shared: Shared) -> Tensor:
        out: Tensor = self.norm.forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head.forward(x)
        return logits

    def outputs(self, x: Tensor) -> list[Tensor]:
        """All logits; or the states, for a loss that has the head."""
        return [x if self.chunked else self.head(x)]

    def loss(self, held: list[Tensor]) -> Tensor:
        """``loss_fn``, while the trainer names what the model returned."""
        if self.chunked:
            loss = self._chunked(held[0])
        else:
            loss = self._entropy(held[0])
        held.clear()
        return loss

    def _chunked(self, x: Tensor) -> Tensor:
        """``ChunkedLossWrapper``: each chunk runs forward and at once backward, while the head's
        unit stays gathered.

        Two chunks are played; the others are like the second.
        """
        tape, width, dtype = x.tape, x.width, x.dtype
        chunks, held = x.alias(), []
        if not tape.alone:  # chunks of several sequences are laid together
            chunks = tape.tensor(x.rows, width, dtype, "chunks of hidden states")
            held = [tape.tensor(TOKENS, 1, "int64", name) for name in ("labels", "positions")]
        total = tape.tensor(x.rows, width, "fp32", "gradient of hidden states")
        if self.fsdp is not None:
            self.fsdp.unshard(self.last)
        tape.chunks_played = 2
        logits: list[Tensor] = []
        for rows, last in ((CHUNK, False), (TOKENS + CHUNK * -1, True)):
            with tape.counting({CHUNK: rows}):
                self._piece(chunks, logits, last=last)
        if self.fsdp is not None:
            self.last.gathered = []
        gradient = tape.tensor(x.rows, width, dtype, "gradient of hidden states")
        loss = tape.tensor(ONE, 1, "fp32", "loss")
        ops.record([loss], "chunked loss", [x], lambda _grad: (gradient,))
        del held, total
        return loss

    def _piece(self, chunks: Tensor, logits: list[Tensor], *, last: bool) -> None:
        """One chunk there and back; ``logits`` names those of the chunk before until new ones
        are there."""
        leaf = Parameter("", (1, chunks.width), chunks.dtype, True)
        h = chunks.alias(rows=CHUNK)
        h.requires_grad, h.node = True, leaf
        # its unit is gathered, and waits for the norm of another forward
        run: Callable[[Tensor], Tensor] = getattr(self.lm_head.forward, "bare", self.head)
        logits[:] = [run(h)]
        loss = self._entropy(logits[0])
        backward(loss, h.tape.tensor(ONE, 1, "fp32", "output gradient"))
        if self.fsdp is not None:
            self.fsdp.accumulate(self.last, self.lm_head.weight, reduces=last)
        cast = ops.to(leaf.grad, "fp32") if leaf.grad is not None else None
        del cast, loss

    def _entropy(self, logits: Tensor) -> Tensor:
        """``cross_entropy_loss``: in fp32, summed; the labels are the batch's own."""
        if self.split:
            return loss_parallel(logits)
        labels = Tensor(logits.tape, None, logits.rows, 1, "int64")
        return ops.cross_entropy(ops.to(logits, "fp32"), labels)


def _mixed(config: Config) -> Callable[[int], bool]:
    """Whether a layer has experts: none has, all have, or all after the first ones."""
    experts = config.get("n_routed_experts") or config.get("num_experts") or 0
    first = config.get("first_k_dense_replace") or 0
    return lambda layer: bool(experts) and layer >= first


def _row_width(config: Config) -> int:
    """Numbers in a layer's table of positions for each token: complex, or cosines and sines."""
    if config.get("kv_lora_rank"):
        return int(config["qk_rope_head_dim"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size) * (1 if config["model_type"] == "llama" else 2)


def build(job: Job) -> Native:
    """The network of a job."""
    chunked, earlier = job.environment.loss == "chunked", job.accumulation - 1
    network = Decoder(complete(job.config), job.sharding, chunked=chunked, earlier=earlier)
    settle(network, job, "")
    return network
