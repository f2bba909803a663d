"""Residual streams that are mixed anew in every layer: manifold-constrained hyper-connections.

Source: transformers 5.23.0, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config
from ftplan.memory.nn import Module
from ftplan.memory.tape import Grads, Tensor

__all__ = ["Connection", "Head", "spread", "unweighted"]


def unweighted(x: Tensor) -> Tensor:
    """``DeepseekV4UnweightedRMSNorm``."""
    root = ops.unary(ops.shift(ops.mean_square(ops.to(x, "fp32"))), "rsqrt", "output")
    return ops.mul(x, ops.to(root, x.dtype))


def spread(a: Tensor, b: Tensor, width: int) -> Tensor:
    """Each stream's number times one hidden state, or that of its own."""
    out = a.tape.tensor(b.rows, width, ops.promote(a.dtype, b.dtype), "streams")
    rows, dtype = out.rows, out.dtype
    saved = (a if b.requires_grad else None, b if a.requires_grad else None)
    make_a, make_b = (ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (a, b))

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        wide = [grad.tape.tensor(rows, width, dtype, "gradient") for t in saved if t is not None]
        results = make_a(grad), make_b(grad)
        wide.clear()
        return results

    ops.record([out], "mul", [a, b], apply)
    return out


def _joined(x: Tensor, width: int, dtype: str) -> Tensor:
    """The sum over streams, in the streams' dtype; the way back is a view."""
    out = x.tape.tensor(x.rows, width, x.dtype, "sum over streams")
    rows, wide = x.rows, x.width
    ops.record([out], "sum", [x], lambda grad: (grad.alias(rows, wide),))
    return ops.to(out, dtype)


class Connection(Module):
    """``DeepseekV4HyperConnection``: how streams enter a part, take its output, and are mixed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.streams, self.rounds = config["hc_mult"], config["hc_sinkhorn_iters"]
        count = (2 + self.streams) * self.streams
        self.fn = self.parameter("fn", count, self.streams * config["hidden_size"])
        self.base = self.parameter("base", count)
        self.scale = self.parameter("scale", 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tape, count = x.tape, self.streams
        flat = unweighted(ops.to(ops.view(x, x.rows, x.width), "fp32"))
        flat = ops.linear(flat, ops.to(tape.leaf(self.fn), "fp32"))
        pre, post, comb = ops.split(flat, [count, count, count**2])
        pre, post = ops.unary(self.weighed(pre), "sigmoid", "output"), self.weighed(post)
        pre = ops.shift(pre)
        post = ops.scale(ops.unary(post, "sigmoid", "output"))
        comb = ops.shift(ops.softmax(ops.autocast_fp32(self.weighed(comb))))
        comb = self.balanced(comb)
        collapsed = _joined(spread(pre, x, x.width), x.width // count, x.dtype)
        return post, comb, collapsed

    def weighed(self, x: Tensor) -> Tensor:
        """Times a learnt number, plus learnt ones."""
        tape = x.tape
        out = tape.tensor(x.rows, x.width, ops.promote(x.dtype, self.scale.dtype), "mul")
        leaves = [tape.leaf(self.scale), tape.leaf(self.base)]
        saved = x if leaves[0].requires_grad else None
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, *leaves)]

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return tuple(make(grad) for make in makers)

        ops.record([out], "mul", [x, *leaves], apply)
        return out

    def balanced(self, x: Tensor) -> Tensor:
        """Rows and columns divided by their sums in turn: each quotient keeps both operands."""
        tape, count = x.tape, self.streams
        saved = None
        if ops.records(x):
            width = (2 * self.rounds - 1) * (count**2 + count)
            saved = tape.tensor(x.rows, width, x.dtype, "sums of rows and columns")
        out = tape.tensor(x.rows, x.width, x.dtype, "balanced")
        make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return (make(grad),)

        ops.record([out], "balance", [x], apply)
        return out


class Head(Module):
    """``DeepseekV4HyperHead``: the streams brought together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.streams = config["hc_mult"]
        self.hc_fn = self.parameter("hc_fn", self.streams, self.streams * config["hidden_size"])
        self.hc_base = self.parameter("hc_base", self.streams)
        self.hc_scale = self.parameter("hc_scale", 1)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        flat = unweighted(ops.to(ops.view(x, x.rows, x.width), "fp32"))
        mixes = ops.linear(flat, ops.to(tape.leaf(self.hc_fn), "fp32"))
        scale, base = (ops.to(tape.leaf(p), "fp32") for p in (self.hc_scale, self.hc_base))
        pre = ops.shift(ops.unary(ops.add(ops.mul(mixes, scale), base), "sigmoid", "output"))
        return _joined(spread(pre, x, x.width), x.width // self.streams, x.dtype)
