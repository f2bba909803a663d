"""What LitGPT finetunes: LoRA, LLaMA-Adapter 1 and 2, on a plain or a quantised base.

Source: Lightning-AI/litgpt litgpt/{lora,adapter,adapter_v2}.py and finetune/*.py, 0.5.13; Fabric's
``BitsandbytesPrecision`` (lightning/fabric/plugins/precision/bitsandbytes.py, 2.5).
"""

from __future__ import annotations

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.families.native.base import Native, learned, parts_of, settle
from ftplan.memory.families.native.litgpt import (
    ERAS,
    GPT,
    CausalSelfAttention,
    Era,
    Shape,
    shape_of,
)
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module
from ftplan.memory.optimizer import rounded
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import ITEM_BYTES, ONE, SEQ, TOKENS, Grads, Size, Tape, Tensor

PROMPT_LENGTH = 10
"""``adapter_prompt_length``."""
START_LAYER = 2
"""``adapter_start_layer``."""


class FabricLinear(QuantizedLinear):
    """bitsandbytes' ``Linear4bit`` as Fabric makes it: quantised from fp16, so expanded to fp16
    and then cast to what is computed in. Every matrix is one, the output head too."""

    def __init__(self, linear: Linear, job: Job) -> None:
        super().__init__(linear, job.weights, job.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        tape, rows, dtype = x.tape, x.rows, x.dtype
        tape.multiply(rows, self.in_features, self.out_features)
        expanded = self._expanded(tape, dtype)
        out = tape.tensor(rows, self.out_features, dtype, "linear")
        del expanded
        if tape.env.holds_4bit_inputs and ops.records(x):
            tape.hold(x)  # and the loop's names keep the graph

        def apply(grad: Tensor) -> Grads:
            grad.tape.multiply(rows, self.in_features, self.out_features)
            weight = self._expanded(grad.tape, grad.dtype)
            result = grad.tape.tensor(rows, self.in_features, dtype, "gradient")
            del weight
            return (result,)

        ops.record([out], "quantised matmul", [x], apply)
        return out

    def _expanded(self, tape: Tape, dtype: str) -> Tensor:
        size = ONE * self.out_features
        half = tape.tensor(size, self.in_features, "fp16", "dequantised weight")
        if dtype == "fp16":
            return half
        return tape.tensor(size, self.in_features, dtype, "dequantised weight")


class LoRALinear(Module):
    """A matrix and two thin ones: ``linear(x) + dropout(x) A' B' scaling``."""

    def __init__(self, linear: Linear, spec: AdapterSpec) -> None:
        super().__init__()
        self.linear: Module = linear
        self.dropout = spec.dropout
        self.lora_A = learned("lora_A", (spec.rank, linear.in_features), spec.dtype)
        self.lora_B = learned("lora_B", (linear.out_features, spec.rank), spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        pretrained = self.linear.forward(x)
        tape = x.tape
        thin = ops.linear(ops.dropout(x, self.dropout), tape.leaf(self.lora_A))
        lora = ops.scale(ops.linear(thin, tape.leaf(self.lora_B)))
        return ops.add(pretrained, lora)


class LoRAQKVLinear(Module):
    """LoRA on some of queries, keys and values, which are one matrix: what the others would get is
    filled with zeros."""

    def __init__(
        self, linear: Linear, spec: AdapterSpec, era: Era, widths: tuple[int, ...], grouped: bool
    ) -> None:
        """``widths`` of those that are adapted; ``grouped``: keys are fewer than queries."""
        super().__init__()
        self.linear: Module = linear
        self.dropout, self.era = spec.dropout, era
        self.widths, self.rank, self.grouped = widths, spec.rank, grouped
        self.lora_A = learned("lora_A", (spec.rank * len(widths), linear.in_features), spec.dtype)
        self.lora_B = learned("lora_B", (sum(widths), spec.rank), spec.dtype)
        self.out_features = linear.out_features
        pads = sum(widths) < linear.out_features and era.index != "made"
        self.index_bytes = rounded(8 * sum(widths)) if pads else 0

    def forward(self, x: Tensor) -> Tensor:
        pretrained = self.linear.forward(x)
        after_a = ops.linear(ops.dropout(x, self.dropout), x.tape.leaf(self.lora_A))
        after_b = self._conv1d(after_a)
        lora = ops.scale(self._zero_pad(after_b))
        return ops.add(pretrained, lora)

    def _conv1d(self, thin: Tensor) -> Tensor:
        """A convolution over one token, its groups in one call where they are alike."""
        tape = thin.tape
        weight = tape.leaf(self.lora_B)
        if not self.grouped:
            return ops.linear(thin, weight, name="conv1d")
        pieces = ops.split(thin, [self.rank] * len(self.widths))
        matrices = _rows_split(weight, self.widths)
        return ops.cat([
            ops.linear(a, b, name="conv1d") for a, b in zip(pieces, matrices, strict=True)
        ])  # fmt: skip

    def _zero_pad(self, x: Tensor) -> Tensor:
        """``index_copy`` keeps its source and its indices."""
        if sum(self.widths) == self.out_features:
            return x
        tape = x.tape
        if self.era.pads_by_copy:
            x = ops.copy(x, "source of index_copy")
        zeros = tape.tensor(x.rows, self.out_features, x.dtype, "zeros")
        out = zeros
        if self.era.pads_by_copy:
            out = tape.tensor(x.rows, self.out_features, x.dtype, "padded")
        saved = [x]
        if self.era.index != "kept":
            saved.append(tape.tensor(ONE, sum(self.widths), "int64", "indices"))
        rows, width, dtype = x.rows, x.width, x.dtype

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return (grad.tape.tensor(rows, width, dtype, "gradient"),)

        ops.record([out], "index_copy", [x], apply)
        return out


def _rows_split(weight: Tensor, heights: tuple[int, ...]) -> list[Tensor]:
    """A matrix in parts below each other; the gradients are joined."""
    pieces = [weight.alias(rows=ONE * height) for height in heights]
    rows, width, dtype = weight.rows, weight.width, weight.dtype

    def apply(*grads: Tensor | None) -> Grads:
        tape = next(grad.tape for grad in grads if grad is not None)
        return (tape.tensor(rows, width, dtype, "gradient"),)

    ops.record(pieces, "split", [weight], apply)
    return pieces


class AdapterV2Linear(Module):
    """``scale * (linear(x) + bias)``."""

    def __init__(self, linear: Linear, dtype: str) -> None:
        super().__init__()
        self.linear: Module = linear
        self.adapter_bias = learned("adapter_bias", (linear.out_features,), dtype)
        self.adapter_scale = learned("adapter_scale", (linear.out_features,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        shifted = ops.add(self.linear.forward(x), tape.leaf(self.adapter_bias))
        return ops.mul(tape.leaf(self.adapter_scale), shifted)


class AdapterAttention(CausalSelfAttention):
    """LLaMA-Adapter's: a few learned keys and values, attended to beside the sequence.

    They are made once, in the validation before training, and kept: what they are made from gets
    no gradient. (``adapter_kv_cache`` is filled by whichever forward comes first.)
    """

    def __init__(self, shape: Shape, era: Era, layer: int) -> None:
        super().__init__(shape, era, layer)
        self.adapted = layer >= START_LAYER
        if self.adapted:
            self.adapter_wte = learned(
                "adapter_wte", (PROMPT_LENGTH, shape.n_embd), "bf16", trainable=False
            )
            self.gating_factor = learned("gating_factor", (shape.n_head, 1), "bf16")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = super().attend(q, k, v, mask)
        if not self.adapted:
            return y
        tape, width = q.tape, q.width
        # keys and values are static: of one sequence, for all
        ak, av = (tape.tensor(ONE * PROMPT_LENGTH, width, q.dtype, "prefix") for _ in range(2))
        allowed = tape.tensor(SEQ, PROMPT_LENGTH, "bool", "mask of the prefix")
        ay = self._beside(q, ak, av)
        del allowed
        gate = tape.leaf(self.gating_factor)
        return ops.add(y, ops.mul(gate, ay))

    def _beside(self, q: Tensor, ak: Tensor, av: Tensor) -> Tensor:
        """The memory-efficient kernel over the prefix, under an additive mask."""
        tape, heads, pairs = q.tape, self.heads, q.rows * PROMPT_LENGTH
        tape.multiply(pairs, 2 * q.width, name="efficient", kind="attention")
        bias = tape.tensor(SEQ, -(-PROMPT_LENGTH // 16) * 16, q.dtype, "mask of the prefix")
        out = tape.tensor(q.rows, q.width, q.dtype, "efficient")
        log_sum_exp = tape.tensor(q.rows, heads.count, "fp32", "efficient log-sum-exp")
        saved = (q, ak, av, bias, out.alias(), log_sum_exp)
        make = ops.like(q.rows, q.width, q.dtype, q.requires_grad)
        spread = -(-heads.size // 32) * 32

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            grad.tape.multiply(pairs, 4 * grad.width, name="efficient", kind="attention")
            grad.tape.multiply(pairs, grad.width, name="efficient", kind="attention", again=True)
            result = make(grad)
            rows = grad.tape.tensor(grad.rows, heads.count, "fp32", "efficient row sums")
            sums = grad.tape.tensor(grad.rows, heads.count * spread, "fp32", "accumulator")
            del rows, sums
            return (result,)

        ops.record([out], "efficient", [q], apply)
        return out


class StableEmbedding(Embedding):
    """bitsandbytes' embedding with a layer norm; both are made after the freezing, so they take
    gradients, and after the optimizer, so nothing uses or clears them."""

    def __init__(self, embedding: Embedding) -> None:
        count, width = embedding.weight.shape
        super().__init__(count, width)
        self.norm = LayerNorm(width)
        for _, parameter in self.named_parameters():
            parameter.idle = True

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        return self.norm.forward(super().forward(tape, rows))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix is, and the part of the model that it belongs to."""

    root: Module
    path: str
    linear: Linear

    @property
    def part(self) -> str:
        """``qkv``, ``projection``, ``mlp`` or ``head``."""
        if self.path == "lm_head":
            return "head"
        if self.path.endswith("qkv"):
            return "qkv"
        return "projection" if self.path == "attn.proj" else "mlp"


def _matrices(network: GPT) -> list[_Place]:
    roots: list[Module] = [network]
    roots += [block for stage in network.stages for block in stage.stack.kinds]
    return [
        _Place(root, path, module)
        for root in roots
        for path, module in list(root.named_modules())
        if isinstance(module, Linear)
    ]


def _lora(network: GPT, spec: AdapterSpec, place: _Place, linear: Linear) -> Module:
    parts, shape = parts_of(spec), network.shape
    if place.part != "qkv":
        return LoRALinear(linear, spec) if place.part in parts else linear
    wide, narrow = shape.n_head * shape.head_size, shape.n_query_groups * shape.head_size
    widths = tuple(
        width
        for part, width in (("query", wide), ("key", narrow), ("value", narrow))
        if part in parts
    )
    grouped = shape.n_query_groups != shape.n_head
    return LoRAQKVLinear(linear, spec, network.era, widths, grouped) if widths else linear


class AdapterGPT(GPT):
    """LLaMA-Adapter: attention to a prefix from the third layer on."""

    def __init__(self, shape: Shape, era: Era, *, chunks_head: bool) -> None:
        super().__init__(shape, era, chunks_head=chunks_head)
        self.stages[0].stack.split(lambda layer: layer >= START_LAYER)

    def block(self, layer: int) -> Module:
        block = super().block(layer)
        block.replace("attn", AdapterAttention(self.shape, self.era, layer))
        return block


NORMS = ("norm_1", "norm_2", "ln_f")
"""What the second adapter trains beside its own weights."""


def build(job: Job) -> Native:
    """The network of a job, as the finetuning script of its method makes it."""
    shape, era, spec = shape_of(job.config), ERAS[job.modules], job.adapter
    kind = spec.kind if spec is not None else "full"
    prefixed = kind.startswith("llama_adapter")
    network = (AdapterGPT if prefixed else GPT)(shape, era, chunks_head=spec is not None)
    added = spec.dtype if spec is not None else ""
    settle(network, job, added)
    quantised = job.weights.layout != "plain"
    for place in _matrices(network):
        linear = place.linear
        if quantised:
            linear = FabricLinear(linear, job)
        changed: Module = linear
        if spec is not None and kind in ("lora", "qlora"):
            changed = _lora(network, spec, place, linear)
        elif kind == "llama_adapter_v2":
            changed = AdapterV2Linear(linear, added)
        if changed is not place.linear:
            place.root.replace(place.path, changed)
    if kind == "llama_adapter_v2":
        for root in (network, *network.stages[0].stack.kinds):
            for path, parameter in root.named_parameters():
                if any(part in NORMS for part in path.split(".")):
                    parameter.trainable = True
    network.buffer_bytes = sum(
        shape.n_layer * module.index_bytes
        for _, module in network.stages[0].stack.kinds[-1].named_modules()
        if isinstance(module, LoRAQKVLinear)
    )
    if quantised and era.stable_embedding:
        table = network.transformer.wte
        assert isinstance(table, Embedding)
        stable = StableEmbedding(table)
        for _, parameter in stable.named_parameters():
            parameter.dtype, parameter.trainable = job.base_dtype, True
        # the script goes on naming the table that this one replaces (``old_embedding``)
        network.buffer_bytes += rounded(table.weight.numel * ITEM_BYTES[job.base_dtype])
        network.transformer.replace("wte", stable)
    return network
