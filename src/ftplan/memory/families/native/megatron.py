"""Megatron-Core's own modules with Transformer Engine's layers, as ms-swift builds and runs them.

Shapes are a rank's: :func:`ftplan.memory.parallel.local_config` has cut heads, inner widths,
experts and the vocabulary. Every micro batch is one packed row of tokens (``thd``: ms-swift's
``padding_free``, on by default), the vocabulary stays split through the loss, and an adapter of the
fused layers is the only one there is.

Source: megatron-core 0.16.1 megatron/core/{models/gpt, transformer, tensor_parallel, fusions};
mcore-bridge 1.6.3 model/gpt_model.py; ms-swift 4.6.0 swift/megatron/trainers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.blocks import ask_for_gradient
from ftplan.memory.families import build as build_whole
from ftplan.memory.families import complete
from ftplan.memory.families.native import te
from ftplan.memory.families.native.base import Native, parts_of, settle
from ftplan.memory.families.native.megatron_experts import MoELayer
from ftplan.memory.families.native.megatron_lora import OutputToSave, adapted
from ftplan.memory.families.projectors import scattered
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.job import Job, ShardingSpec
from ftplan.memory.log_probs import scalar
from ftplan.memory.nn import Embedding, Module, Shared, Stack, Stage
from ftplan.memory.tape import BATCH, ITEM_BYTES, ONE, TOKENS, Grads, Parameter, Tape, Tensor

__all__ = ["ATTENTION", "CHECKPOINTS", "METHODS", "PARALLEL", "TASKS", "WEIGHTS", "Shape", "build",
           "losses", "model_types", "shape_of", "shows"]  # fmt: skip

Config = Mapping[str, Any]

METHODS = ("full", "lora")
WEIGHTS = ("bf16",)
CHECKPOINTS = ("full", "selective")
TASKS = ("sft", "pt", "dpo", "kto", "rm", "classify")
ATTENTION = ("flash", "sdpa")
PARALLEL = ("tp", "pp", "ep")
"""Degrees that may be more than one."""

_BIASED = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
_NORMED = ("qwen3", "qwen3_moe", "qwen3_vl")
_TOWERS = {"qwen2_vl": "model.visual", "qwen2_5_vl": "model.visual", "qwen3_vl": "model.visual"}
"""Vision-language models, whose tower is transformers' own, whole on every rank and frozen."""
_SHOWN = ("qwen2_vl", "qwen2_5_vl")
"""Those of which images are walked: what Qwen3-VL adds to its first layers is not."""
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
_DENSE = ("llama", "mistral", "qwen2", "qwen3")


def model_types(_modules: str, _method: str) -> tuple[str, ...]:
    """Architectures of which Megatron's modules are walked."""
    return (*_DENSE, *_MIXTURES, *_TOWERS)


def shows(config: Config) -> bool:
    """Whether a row may have images in it."""
    return config.get("model_type") in _SHOWN


def losses(_modules: str, _method: str) -> tuple[str, ...]:
    """The loss meets all of a rank's part of the logits."""
    return ("full",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A rank's part of an architecture in the words of ``TransformerConfig``."""

    num_layers: int
    hidden_size: int
    heads: int
    groups: int
    """Query groups: key-value heads."""
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    qkv_bias: bool
    qk_layernorm: bool
    tied: bool
    sequence: bool
    """Sequence parallelism: ranks share the tokens outside of split layers."""
    gathers_qkv: bool
    """More tensor parallel ranks than key-value heads."""
    all_experts: int = 0
    experts: int = 0
    """Of a rank."""
    topk: int = 0
    moe_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    arrivals: int = 0
    """Rows that come to a rank's experts for each of its own tokens; 0: nothing travels."""
    dense_layers: tuple[int, ...] = ()


def shape_of(raw: Config, job: Job) -> Shape:
    """A rank's config.json in Megatron's words."""
    kind = str(raw["model_type"])
    whole = complete(raw)
    text = whole.get("text_config") if kind in _TOWERS else None
    config = {**whole, **text} if isinstance(text, Mapping) else whole
    heads, hidden, layers = (
        config[name] for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    spec = job.sharding
    tied = bool(config.get("tie_word_embeddings")) and job.task not in ("rm", "classify")
    groups = config.get("num_key_value_heads") or heads
    given: dict[str, Any] = {}
    if kind in _MIXTURES:
        given = _mixture(config, kind, layers, job)
    return Shape(
        num_layers=layers,
        hidden_size=hidden,
        heads=heads,
        groups=groups,
        kv_channels=config.get("head_dim") or hidden // heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        qkv_bias=kind in _BIASED or bool(config.get("attention_bias")),
        qk_layernorm=kind in _NORMED,
        tied=tied,
        sequence=spec.sequence_parallel and spec.tp > 1,
        gathers_qkv=False,
        **given,
    )


def _mixture(config: Config, kind: str, layers: int, job: Job) -> dict[str, Any]:
    spec = job.sharding
    local = config.get("num_local_experts") or config.get("num_experts")
    assert isinstance(local, int)
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    routed = kind == "mixtral"
    return {
        "all_experts": local * spec.ep,
        "experts": local,
        "topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["intermediate_size" if routed else "moe_intermediate_size"],
        "shared_ffn_hidden_size": config.get("shared_expert_intermediate_size") or 0
        if kind == "qwen2_moe" else 0,
        "shared_gate": kind == "qwen2_moe",
        "arrivals": _arrivals(spec, local, config["num_experts_per_tok"]),
        "dense_layers": tuple(
            layer for layer in range(layers) if layer in dense or (layer + 1) % every
        ) if not routed else (),
    }  # fmt: skip


def _arrivals(spec: ShardingSpec, experts: int, topk: int) -> int:
    """As many as leave where the router is balanced; at worst all tokens of all ranks."""
    if spec.ep == 1:
        return 0
    return spec.ep * min(topk, experts) if spec.worst_routing else topk


class SelfAttention(Module):
    """One fused layer for queries, keys and values, interleaved by query group."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.kv_channels
        self.wide, self.narrow = shape.heads * size, shape.groups * size
        self.linear_qkv: Module = te.LayerNormLinear(
            shape.hidden_size, self.wide + 2 * self.narrow,
            bias=shape.qkv_bias, sequence=shape.sequence,
        )  # fmt: skip
        self.linear_proj: Module = te.Linear(
            self.wide, shape.hidden_size, "row", sequence=shape.sequence
        )
        if shape.qk_layernorm:
            self.q_layernorm, self.k_layernorm = te.RMSNorm(size), te.RMSNorm(size)
        self.heads = Heads(count=shape.heads, kv_count=shape.groups, size=size, value_size=size)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        mixed = self.linear_qkv.forward(x)
        query, key, value = ops.split(mixed, [self.wide, self.narrow, self.narrow])
        del mixed
        if 1 < self.shape.groups < self.shape.heads:  # ``reshape`` of heads that lie apart
            query = ops.copy(query)
        if self.shape.qk_layernorm:
            query = self.q_layernorm.forward(query)
            key = self.k_layernorm.forward(key, strided=self.shape.groups > 1)
        query, key = self._turned(query, shared), self._turned(key, shared)
        out = attend(query, key, value, self.heads, apart=True)
        made: Tensor = self.linear_proj.forward(out)
        return made

    def _turned(self, x: Tensor, shared: Shared) -> Tensor:
        """``_apply_rotary_pos_emb_bshd``, not fused: sines are made for each call, and kept."""
        freqs = shared.rope[""][0]
        cos, sin = self._cast(freqs, x.dtype), self._cast(freqs, x.dtype)
        half = x.width // 2
        first = ops.mul(x, cos)
        turned = ops.cat((ops.neg(ops.part(x, half)), ops.part(x, half)))
        return ops.copy(ops.add(first, ops.mul(turned, sin)), "rotated")

    def _cast(self, freqs: Tensor, dtype: str) -> Tensor:
        return ops.to(ops.scale(ops.scale(freqs)), dtype)


class MLP(Module):
    """``linear_fc2(swiglu(linear_fc1(norm(x))))``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner, sequence = shape.ffn_hidden_size, shape.sequence
        self.linear_fc1: Module = te.LayerNormLinear(
            shape.hidden_size, 2 * inner, sequence=sequence
        )
        self.linear_fc2: Module = te.Linear(inner, shape.hidden_size, "row", sequence=sequence)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear_fc1.forward(x)
        hidden = te.swiglu(hidden)
        out: Tensor = self.linear_fc2.forward(hidden)
        return out


class TransformerLayer(Module):
    """Attention and an MLP, or a mixture of experts, each added to the residual stream."""

    def __init__(self, shape: Shape, *, dense: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(shape)
        self.routed = not dense
        if dense:
            self.mlp: Module = MLP(shape)
        else:
            self.pre_mlp_layernorm = te.RMSNorm(shape.hidden_size)
            self.mlp = MoELayer(shape)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.self_attention.forward(x, shared)
        hidden = ops.add(x, attended)
        del attended
        residual = hidden
        if self.routed:
            hidden = self.pre_mlp_layernorm.forward(hidden)
        fed = self.mlp.forward(hidden)
        return ops.add(residual, fed)


class OutputLayer(Module):
    """``ColumnParallelLinear``, Megatron's own: what is trained gathers into a buffer that is there
    for good, what is frozen into a tensor of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sequence = shape.sequence
        self.weight = self.parameter("weight", shape.vocab_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        trains = self.weight.trainable
        if self.sequence and not trains:
            x = _gather(x)
        tape, weight = x.tape, x.tape.leaf(self.weight)
        count, width = self.weight.shape
        split = self.sequence and trains
        rows, own, dtype = TOKENS if split else x.rows, x.rows, x.dtype
        tape.multiply(rows, width, count)
        out = tape.tensor(rows, count, dtype, "logits")
        saved, wants = x if trains else None, x.requires_grad

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            tape.multiply(rows, width, count, times=wants + trains)
            made = tape.tensor(rows, width, dtype, "gradient")
            part = tape.tensor(own, width, dtype, "scattered") if split else made
            dummy = Tensor(tape, None, ONE * count, width, dtype)
            dummy.based = True  # a tied table's gradient is not added to it in place
            return (part if wants else None), (dummy if trains else None)

        ops.record([out], "output layer", [x, weight], apply)
        return out


def vocab_parallel_cross_entropy(logits: Tensor) -> Tensor:
    """``fused_vocab_parallel_cross_entropy``: logits in fp32 become their softmax in place.

    The way back makes the gradient in a copy, which is cast (``calculate_gradients``, compiled:
    inductor of torch 2.13 does not write into an input by index).
    """
    tape = logits.tape
    softmax = tape.tensor(logits.rows, logits.width, "fp32", "softmax")
    target = tape.tensor(logits.rows, 1, "int64", "targets")
    masked = tape.tensor(logits.rows, 1, "bool", "target mask")
    loss = tape.tensor(logits.rows, 1, "fp32", "loss")
    saved = (softmax, target, masked)
    del softmax, target, masked
    rows, width = logits.rows, logits.width
    make = ops.like(rows, width, logits.dtype, logits.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        _copied = tape.tensor(rows, width, "fp32", "gradient")
        return (make(grad),)

    ops.record([loss], "cross entropy", [logits], apply)
    return loss


class GPTModel(Native):
    """The model, and the loss of each of ms-swift's trainers."""

    def __init__(self, shape: Shape, job: Job) -> None:
        super().__init__()
        self.shape, self.task = shape, job.task
        self.embedding = Module()
        table = Embedding(shape.vocab_size, shape.hidden_size)
        self.embedding.replace("word_embeddings", table)
        self.embedding_names = ("embedding.word_embeddings",)
        self.head_name = "output_layer"
        labels = {"rm": 1, "classify": job.labels}.get(job.task)
        self.output_layer: Module = (
            OutputLayer(shape) if labels is None
            else te.Linear(shape.hidden_size, labels, "duplicated")
        )  # fmt: skip
        self.scores = labels is not None
        if shape.tied:
            self.tie("output_layer.weight", to="embedding.word_embeddings.weight")
        stack = Stack("decoder.layers", shape.num_layers, self._layer, self._kind)
        self.final_layernorm = te.RMSNorm(shape.hidden_size)
        self.stages = [Stage(stack, self._enter, self._leave)]
        self.sent_back = False
        self.entrance = ("visual.",)
        self.sight: VisionLanguage | None = None
        """The model whose tower looks at the images of a row, without a graph: it is frozen, and
        its blocks are checkpointed only where it is not (``vit_gradient_checkpointing``)."""

    def was_cut(self, *, first: bool, fresh: bool) -> None:
        """A pipeline's rank has buffers for its own weights alone, and its schedule still names
        what it sent to the rank before (megatron/core/pipeline_parallel/schedules.py,
        ``input_tensor_grad``)."""
        self.buffer_bytes = _dummies(self)
        self.sent_back = not first and not fresh

    def _kind(self, layer: int) -> Hashable:
        return not self.shape.experts or layer in self.shape.dense_layers

    def _layer(self, layer: int) -> TransformerLayer:
        return TransformerLayer(self.shape, dense=bool(self._kind(layer)))

    def inputs(self, tape: Tape) -> list[Tensor]:
        """What is there from one micro batch to the next: the buffer into which a trained output
        layer gathers, what each layer's token dispatcher has names for, and the gradient that went
        to the pipeline's stage before."""
        shape, held = self.shape, []
        with tape.scoped("temporary"):
            if self.sent_back:
                rows = te.rows_of(shape.sequence)
                held.append(tape.tensor(rows, shape.hidden_size, "bf16", "gradient sent back"))
            trained = any(parameter.trainable for parameter in self.head_parameters())
            if shape.sequence and trained and not self.scores:
                held.append(tape.tensor(TOKENS, shape.hidden_size, "bf16", "global memory buffer"))
            stack = self.stages[0].stack
            layers = [stack.kinds[kind] for kind in stack.pattern]
            routed = sum(isinstance(layer, TransformerLayer) and layer.routed for layer in layers)
            if routed:  # probabilities, the map of them, and in which order tokens were sent
                width = (5 * shape.all_experts + 8 * shape.topk) * routed
                rows = te.rows_of(shape.sequence)
                held.append(tape.tensor(rows, width, "int8", "token dispatchers"))
        if self.sight is not None:
            held += self.sight.inputs(tape)
        return held

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Every rank looks up its rows; their sum is scattered over a sequence's ranks."""
        freqs = tape.tensor(TOKENS, self.shape.kv_channels, "fp32", "rope")
        shared.rope[""] = (freqs, freqs)
        found: Tensor = self.child("embedding.word_embeddings").forward(tape)
        if self.sight is not None and self.sight.images:  # ``get_inputs_embeds``
            found = scattered(found, self.sight.features(tape, found.dtype)[-1])
        out = _scatter(found) if self.shape.sequence else found
        del found
        if tape.env.training and not out.requires_grad:
            ask_for_gradient(out)  # mcore-bridge: adapters under checkpoints want one
        return out

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return self.final_layernorm.forward(x)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """A loss for every token; or a score, where that is what the head gives."""
        made: Tensor = self.output_layer.forward(x)
        if not self.scores:
            return [vocab_parallel_cross_entropy(made)]
        made = _gather(made) if self.shape.sequence else made
        return [made]

    def loss(self, held: list[Tensor]) -> Tensor:
        """Sums of a number a token, and of the last token's scores."""
        x = held[0]
        if self.scores:
            x = ops.gather(x, BATCH * 1)
        return scalar([ops.scale(x)])


def _scatter(x: Tensor) -> Tensor:
    out = x.tape.tensor(te.rows_of(True), x.width, x.dtype, "scattered")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "scatter", [x], lambda grad: (make(grad),))
    return out


def _gather(x: Tensor) -> Tensor:
    out = x.tape.tensor(TOKENS, x.width, x.dtype, "gathered")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "gather", [x], lambda grad: (make(grad),))
    return out


def _tower(network: GPTModel, job: Job) -> None:
    """The vision tower of transformers, on every rank as it is: ms-swift freezes it by default."""
    path = _TOWERS.get(str(job.config["model_type"]))
    if path is None:
        return
    whole = build_whole(job.config)
    tower = whole.child(path)
    network.replace("visual", tower)
    for _, parameter in tower.named_parameters():
        parameter.fixed = True
    if job.images:
        assert isinstance(whole, VisionLanguage)
        whole.show(job.images, job.image, checkpointed=False)
        network.sight = whole
        del network.children["sight"]  # it is not a part of the model: its tower is


def _dummies(network: GPTModel) -> int:
    """Bytes that stand for gradients that were added already: one tensor of each shape, for good.

    transformer_engine/pytorch/module/base.py, ``get_dummy_wgrad``.
    """
    roots: list[Module] = [network, *network.stages[0].stack.kinds]
    weights: list[Parameter] = [p for root in roots for _, p in root.named_parameters()]
    shapes = {(p.shape[-2:], p.dtype) for p in weights if te.learnt(p)}
    if network.shape.tied and any(p.trainable for p in network.head_parameters()):
        shapes |= {(p.shape, p.dtype) for p in network.head_parameters()}
    return sum(rows * columns * ITEM_BYTES[dtype] for (rows, columns), dtype in shapes)


def build(job: Job) -> Native:
    """The network of a job as ms-swift trains it."""
    shape = shape_of(job.config, job)
    network = GPTModel(shape, job)
    _tower(network, job)
    if job.adapter is not None:
        parts = parts_of(job.adapter)
        for block in network.stages[0].stack.kinds:
            adapted(block, job.adapter, parts)
        if network.scores:
            network.output_layer = OutputToSave(network.output_layer)
    settle(network, job, job.adapter.dtype if job.adapter is not None else "bf16")
    network.buffer_bytes = _dummies(network)
    return network
