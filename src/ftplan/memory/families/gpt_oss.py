"""GPT-OSS: experts with biases, and attention with a learnt sink in every head.

transformers has no SDPA for it: attention is eager, or flash where a kernel with sinks is asked
for. Checkpoints in mxfp4 are expanded to bf16 when they are loaded for training.
Source: transformers 5.23.0, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from functools import partial

from ftplan.memory import ops
from ftplan.memory.attention import attend, operand, pairs, with_prefix
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families.decoder import (
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
    rotate_chunks,
)
from ftplan.memory.families.mixture import Mixture
from ftplan.memory.nn import Module, Network, RMSNorm, Shared
from ftplan.memory.tape import ONE, SCORES, TOKENS, Grads, Size, Tensor


class OssExperts(Experts):
    """Interleaved gate and up, clamped: ``(up + 1) * gate * sigmoid(alpha gate)``."""

    def gate(self, both: Tensor) -> Tensor:
        gate, up = ops.part(both, self.inner), ops.part(both, self.inner)
        gate = ops.unary(gate, "clamp", "input")
        up = ops.unary(up, "clamp", "input")
        glu = ops.mul(gate, ops.unary(ops.scale(gate), "sigmoid", "output"))
        return ops.mul(ops.shift(up), glu)


class SinkAttention(Attention):
    """A learnt score of each head takes part in the softmax."""

    def __init__(self, config: Config, mask: str) -> None:
        super().__init__(config, mask=mask)
        self.sinks = self.parameter("sinks", self.heads.count)

    def turn(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        cos, sin = shared.rope[""]
        return rotate_chunks(q, cos, sin), rotate_chunks(k, cos, sin)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x)
        q, k = self.turn(q, k, shared)
        if x.tape.env.attention == "flash":
            return self.out(attend(q, k, v, self.heads, window=shared.windows.get(self.mask)))
        return self.out(self.eager(q, k, v, shared.masks[self.mask], held))

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: list[Tensor] | None
    ) -> Tensor:
        """``eager_attention_forward``: the scores have one column more than there are keys."""
        heads, dtype = self.heads, v.dtype
        k, v, mask = with_prefix(k, v, mask)
        keys, values = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
        alone = heads.groups > 1
        keys, values = (operand(ops.autocast(t), by_head=alone) for t in (keys, values))
        weights = ops.scale(ops.matmul(q, keys, pairs(q.tape) * heads.count, 1, "scores"))
        if mask is not None:
            weights = ops.add(weights, mask)
        joined = with_sinks(weights, q.tape.leaf(self.sinks), heads.count)
        joined = minus_maximum(joined, heads.count)
        weights = ops.softmax(joined)
        weights = ops.to(
            ops.dropout(without_sinks(weights, SCORES * heads.count), heads.dropout), dtype
        )
        if held is not None:
            held.append(weights)
        out = ops.matmul(weights, values, q.rows, heads.count * heads.value_size, "attention")
        return ops.copy(out)


def with_sinks(weights: Tensor, sinks: Tensor, heads: int) -> Tensor:
    """A column more for each query and head."""
    tape = weights.tape
    dtype = ops.promote(weights.dtype, sinks.dtype)
    out = tape.tensor(weights.rows + TOKENS * heads, 1, dtype, "scores and sinks")
    rows, scores_dtype, sink_dtype = weights.rows, weights.dtype, sinks.dtype

    def apply(grad: Tensor) -> Grads:
        scores = ops.fit(grad.alias(rows), rows, 1, scores_dtype)
        return scores, grad.tape.tensor(ONE, heads, sink_dtype, "gradient sum")

    ops.record([out], "cat", [weights, sinks], apply)
    return out


def minus_maximum(x: Tensor, heads: int) -> Tensor:
    """Scores less the largest of each row, through which the gradient goes too."""
    tape = x.tape
    largest = tape.tensor(TOKENS, heads, x.dtype, "max")
    index = tape.tensor(TOKENS, heads, "int64", "max indices")
    out = tape.tensor(x.rows, 1, x.dtype, "minus max")
    del largest
    rows, dtype = x.rows, x.dtype
    saved = index

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        negative = grad.tape.tensor(rows, 1, dtype, "gradient")
        del negative  # summed for the maximum's gradient
        scattered = grad.tape.tensor(rows, 1, dtype, "gradient")
        total = grad.tape.tensor(rows, 1, dtype, "gradient")
        del scattered
        return (total,)

    ops.record([out], "minus max", [x], apply)
    return out


def without_sinks(x: Tensor, rows: Size) -> Tensor:
    """The columns of keys alone: a view."""
    out = x.alias(rows, 1)
    make = ops.like(x.rows, 1, x.dtype, x.requires_grad)
    ops.record([out], "slice", [x], lambda grad: (make(grad),))
    return out


def gpt_oss(raw: Config) -> Network:
    """``GptOssForCausalLM``."""
    config = filled(raw)
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or ()) or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(count)
    ]

    def block(config: Config, layer: int) -> Module:
        hidden, experts = config["hidden_size"], config["num_local_experts"]
        router = Router(
            hidden, experts, config["num_experts_per_tok"], scoring="top_softmax", bias=True
        )
        mixture = Mixture(
            router,
            OssExperts(hidden, config["intermediate_size"], experts, bias=True, transposed=True),
            router_name="router",
        )
        return OssBlock(
            config, SinkAttention(config, types[layer]), mixture, norm=partial(RMSNorm, late=True)
        )

    return Decoder(
        config, block, kind=lambda layer: types[layer],
        ropes={"": Rope(width=head_size(config) // 2)},
        windows={"full_attention": None, "sliding_attention": config.get("sliding_window")},
        norm=partial(RMSNorm, late=True), eager_only=True,
    )  # fmt: skip


class OssBlock(Block):
    """The router's weights are named until the block returns."""


MODEL_TYPES = {"gpt_oss": gpt_oss}
