"""Megatron-Core's mixture of experts: a router, tokens sent to their experts and back.

Of the tokens of all ranks each rank's experts get an even share, ``topk`` times the rank's own; at
worst, which is the interval's upper end, all that can come.

Source: megatron-core 0.16.1 megatron/core/transformer/moe/{router, moe_layer, token_dispatcher,
moe_utils, experts, shared_experts}.py: ``MoEAlltoAllTokenDispatcher``, ``TEGroupedMLP``, with
permutations that are not fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.memory import ops
from ftplan.memory.families.native import te
from ftplan.memory.nn import Module
from ftplan.memory.tape import ONE, Grads, Size, Tensor

if TYPE_CHECKING:
    from ftplan.memory.families.native.megatron import Shape

__all__ = ["MoELayer"]


class Router(Module):
    """``TopKRouter``: logits in fp32 (``moe_router_dtype``), probabilities of the chosen ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.topk = shape.topk
        self.weight = self.parameter("weight", shape.all_experts, shape.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and a map, of every token and expert."""
        logits = self._gating(x)
        scores = self._picked(logits)
        chosen = ops.softmax(scores)
        probs = self._spread(chosen, logits)
        counts = logits.tape.tensor(logits.rows, logits.width, "int32", "routing map")
        routing_map = logits.tape.tensor(logits.rows, logits.width, "bool", "routing map")
        del counts
        if ops.records(logits):
            probs = _with_auxiliary_loss(probs, logits)
        return probs, routing_map

    def _gating(self, x: Tensor) -> Tensor:
        """``RouterGatingLinearFunction``: keeps its input; the way back is in fp32."""
        tape, weight = x.tape, x.tape.leaf(self.weight)
        count, width = self.weight.shape
        tape.multiply(x.rows, width, count)
        out = tape.tensor(x.rows, count, "fp32", "router logits")
        saved, rows, dtype = x, x.rows, x.dtype
        wants, trains = x.requires_grad, weight.requires_grad

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            tape.multiply(rows, width, count, times=wants + 1)
            wide = tape.tensor(rows, width, "fp32", "gradient")
            copied = tape.tensor(rows, width, "fp32", "cast")
            whole = tape.tensor(ONE * count, width, "fp32", "gradient")
            del copied
            own = tape.tensor(rows, width, dtype, "gradient") if wants else None
            del wide
            made = tape.tensor(ONE * count, width, dtype, "gradient") if trains else None
            del whole
            return own, made

        ops.record([out], "router", [x, weight], apply)
        return out

    def _picked(self, logits: Tensor) -> Tensor:
        tape = logits.tape
        out = tape.tensor(logits.rows, self.topk, "fp32", "topk")
        index = tape.tensor(logits.rows, self.topk, "int64", "chosen experts")
        make = ops.like(logits.rows, logits.width, "fp32", logits.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = index
            return (make(grad),)

        ops.record([out], "topk", [logits], apply)
        return out

    def _spread(self, chosen: Tensor, logits: Tensor) -> Tensor:
        """``zeros_like(logits).scatter(...)``: out of place, keeps its index."""
        tape = chosen.tape
        zeros = tape.tensor(logits.rows, logits.width, "fp32", "zeros")
        out = tape.tensor(logits.rows, logits.width, "fp32", "routing probabilities")
        del zeros
        make = ops.like(chosen.rows, chosen.width, "fp32", chosen.requires_grad)
        ops.record([out], "scatter", [chosen], lambda grad: (make(grad),))
        return out


def _with_auxiliary_loss(probs: Tensor, logits: Tensor) -> Tensor:
    """``MoEAuxLossAutoScaler``: scores over all experts are kept for a loss of their own."""
    tape = probs.tape
    scores = tape.tensor(logits.rows, logits.width, "fp32", "scores")
    out = probs.alias()
    saved = scores
    make = ops.like(logits.rows, logits.width, "fp32", logits.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return grad, make(grad)

    del scores
    ops.record([out], "auxiliary loss", [probs, logits], apply)
    return out


class GroupedMLP(Module):
    """``TEGroupedMLP``: experts in grouped products, weighted inside the activation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.moe_ffn_hidden_size
        self.linear_fc1: Module = te.Linear(
            shape.hidden_size, 2 * inner, "grouped", experts=shape.experts
        )
        self.linear_fc2: Module = te.Linear(
            inner, shape.hidden_size, "grouped", experts=shape.experts
        )

    def forward(self, x: Tensor, probs: Tensor) -> Tensor:
        hidden = self.linear_fc1.forward(x)
        acted = te.swiglu(hidden, probs)
        out: Tensor = self.linear_fc2.forward(acted)
        return out


class SharedExpertMLP(Module):
    """An expert that every token visits, with a gate of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner, sequence = shape.shared_ffn_hidden_size, shape.sequence
        self.linear_fc1: Module = te.Linear(
            shape.hidden_size, 2 * inner, "column", sequence=sequence
        )
        self.linear_fc2: Module = te.Linear(inner, shape.hidden_size, "row", sequence=sequence)
        self.gate_weight = self.parameter("gate_weight", 1, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear_fc1.forward(x)
        hidden = te.swiglu(hidden)
        out = self.linear_fc2.forward(hidden)
        gate = ops.linear(x, x.tape.leaf(self.gate_weight))
        return ops.mul(out, ops.unary(gate, "sigmoid", "output"))


class MoELayer(Module):
    """Route, permute, exchange, sort by expert; the experts; and all of it back."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = Router(shape)
        self.experts = GroupedMLP(shape)
        if shape.shared_ffn_hidden_size:
            self.shared_experts = SharedExpertMLP(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, width = hidden.rows, hidden.width
        beside = self.children.get("shared_experts")
        extra = beside.forward(hidden) if beside is not None else None
        probs, routing_map = self.router.forward(hidden)
        hidden, probs = self._permuted(hidden, probs, routing_map)
        sent, received = rows * self.shape.topk, rows * self.shape.arrivals
        dispatched, probs = self._exchanged(hidden, received), self._exchanged(probs, received)
        output = self._experts(dispatched, probs)
        output = self._exchanged(output, sent)
        output = _unpermuted(output, rows, width)
        return output if extra is None else ops.add(output, extra)

    def _experts(self, x: Tensor, probs: Tensor) -> Tensor:
        """``routed_experts_compute``: sorted by local expert, and back."""
        if self.shape.experts > 1:
            x, probs = ops.copy(x, "sorted"), ops.copy(probs, "sorted")
        made = self.experts.forward(x, probs)
        return ops.copy(made, "restored") if self.shape.experts > 1 else made

    def _permuted(self, x: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of each token's experts, and their probabilities."""
        tape, rows = x.tape, x.rows * self.shape.topk
        turned = tape.tensor(probs.rows, probs.width, "bool", "routing map")
        index = tape.tensor(rows, 1, "int64", "sorted indices")
        chosen = tape.tensor(rows, 1, probs.dtype, "permuted probabilities")
        kept = turned.alias()
        make = ops.like(probs.rows, probs.width, probs.dtype, probs.requires_grad)

        def unmasked(grad: Tensor) -> Grads:
            _kept = kept
            return (make(grad),)

        ops.record([chosen], "masked select", [probs], unmasked)
        del turned, routing_map
        return ops.gather(x, rows, index), chosen

    def _exchanged(self, x: Tensor, rows: Size) -> Tensor:
        """``all_to_all`` among the ranks that share the experts."""
        if not self.shape.arrivals:
            return x
        out = x.tape.tensor(rows, x.width, x.dtype, "exchanged")
        make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
        ops.record([out], "all to all", [x], lambda grad: (make(grad),))
        return out


def _unpermuted(x: Tensor, rows: Size, width: int) -> Tensor:
    """``zeros.scatter_add_``: in place; the way back is a gather."""
    out = x.tape.tensor(rows, width, x.dtype, "unpermuted")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "unpermute", [x], lambda grad: (make(grad),))
    return out
