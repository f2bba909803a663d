"""PyTorch's flex attention, compiled."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, count_products
from ftplan.memory.tape import SCORES, TOKENS, Grads, Tensor

__all__ = ["flex_attention"]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """Compiled ``flex_attention``: keeps q, k, v, the output and a log-sum-exp a head.

    On the way back there are row sums for a moment; keys and values have their own heads.
    Source: torch/_inductor/kernel/flex/flex_attention.py, 2.13.
    """
    tape, hidden = q.tape, SCORES + TOKENS * -1
    count_products(tape, SCORES, hidden, heads, "flex", backward=False)
    out = tape.kept(q.rows, heads.count * heads.value_size, q.dtype, "flex")
    log_sum_exp = tape.kept(q.rows, heads.count, "fp32", "flex log-sum-exp")
    saved = (q, k, v, out.alias(), log_sum_exp)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (q, k, v)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        count_products(grad.tape, SCORES, hidden, heads, "flex", backward=True)
        sums = grad.tape.tensor(saved[4].rows, heads.count, "fp32", "flex row sums")
        grads = tuple(make(grad) for make in makers)
        del sums
        return grads

    ops.record([out], "flex", [q, k, v], apply)
    return out
