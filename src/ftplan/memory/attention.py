"""Attention: the kernel that PyTorch would choose, and what each one keeps.

Shapes: queries are tokens x (heads x head size); keys and values tokens x (key-value heads x head
size). ``SCORES`` counts one number a head and a pair of tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.memory import ops
from ftplan.memory.env import Environment
from ftplan.memory.tape import ONE, SCORES, Grads, Tensor

__all__ = ["Heads", "attend", "kernel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The shape of an attention layer."""

    count: int
    kv_count: int
    size: int
    value_size: int
    dropout: float = 0.0
    causal: bool = True

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        return self.count // self.kv_count


def kernel(env: Environment, heads: Heads, dtype: str, *, masked: bool) -> str:
    """``eager``, ``flash``, ``efficient`` or ``math``: what runs on this GPU.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (conditions of each backend) and
    transformers' ``sdpa_attention.use_gqa_in_sdpa`` (heads stay unexpanded without a mask).
    """
    if env.attention == "eager":
        return "eager"
    if env.attention == "flash":
        return "flash"
    half = dtype in ("bf16", "fp16")
    modern = env.capability is None or env.capability >= (8, 0)
    if half and modern and not masked and heads.size == heads.value_size and heads.size <= 256:
        return "flash"
    return "math" if heads.groups > 1 and not masked else "efficient"


def attend(q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor | None = None) -> Tensor:
    """Attention of all heads: tokens x (heads x value size) comes out."""
    env = q.tape.env
    q, k, v = (ops.autocast(t) for t in (q, k, v))
    masked = mask is not None or env.padding_mask
    choice = kernel(env, heads, q.dtype, masked=masked)
    if choice == "eager":
        return _eager(q, k, v, heads, mask)
    if choice == "math":
        return _math(q, k, v, heads)
    if masked:
        k, v = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
    return _fused(q, k, v, heads, mask, choice)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor | None, choice: str
) -> Tensor:
    """Flash and memory-efficient kernels: keep q, k, v, the output and a log-sum-exp a head."""
    tape = q.tape
    out = tape.tensor(q.rows, heads.count * heads.value_size, q.dtype, choice)
    log_sum_exp = tape.tensor(q.rows, heads.count, "fp32", f"{choice} log-sum-exp")
    saved = (q, k, v, mask, out.alias(), log_sum_exp)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (q, k, v)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return tuple(make(grad) for make in makers)

    ops.record([out], choice, [q, k, v], apply)
    return out


def _math(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """The quadratic fallback inside SDPA: scaled operands, scores, softmax, product."""
    rows = SCORES * heads.count
    k, v = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
    q, k = ops.scale(q), ops.scale(k)
    scores = ops.matmul(q, k, rows, 1, "scores")
    scores = ops.shift(scores)
    weights = ops.softmax(scores)
    del scores
    return ops.matmul(weights, v, q.rows, heads.count * heads.value_size, "attention")


def _eager(q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor | None) -> Tensor:
    """transformers' ``eager_attention_forward``."""
    rows = SCORES * heads.count
    keys, values = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
    weights = ops.scale(ops.matmul(q, keys, rows, 1, "scores"))
    if mask is not None or heads.causal:
        weights = ops.shift(weights)
    dtype = q.dtype
    weights = ops.to(ops.softmax(weights, "fp32"), dtype)
    weights = ops.dropout(weights, heads.dropout)
    out = ops.matmul(weights, values, q.rows, heads.count * heads.value_size, "attention")
    return ops.copy(out)


def causal_mask(tape_tensor: Tensor) -> Tensor:
    """Placeholder shape of a causal mask, s x s."""
    return tape_tensor.alias(ONE, 1)
