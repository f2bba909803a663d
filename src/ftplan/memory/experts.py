"""Mixtures of experts: routers, and the experts as transformers 5 runs them.

Modelled is the default path on CUDA, ``grouped_mm`` (transformers ``integrations/moe.py``,
``get_correct_experts_implementation``): every token is copied once for each of its ``top_k``
experts, the copies are sorted by expert, two grouped matrix products run over them, and the
weighted results are sorted back and summed. How evenly tokens spread over experts changes no
size: there are tokens x ``top_k`` rows in all. ``torch.nn.functional.grouped_mm`` is not on
autocast's list: under autocast with fp32 weights the experts run in fp32.
"""

from __future__ import annotations

from typing import Protocol

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.nn import Module, activation
from ftplan.memory.tape import ONE, Grads, Size, Tape, Tensor

__all__ = [
    "ExpertWeights", "Experts", "Router", "Routing", "batched_linear", "gather_rows",
    "grouped_linear", "masked", "repeat_rows", "topk",
]  # fmt: skip


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their indices (kept); backward scatters into zeros."""
    tape = x.tape
    values = tape.tensor(x.rows, k, x.dtype, "topk")
    index = tape.tensor(x.rows, k, "int64", "topk indices")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = index

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([values], "topk", [x], apply)
    return values, index


def gather_rows(x: Tensor, index: Tensor, rows: Size, width: int, name: str = "index") -> Tensor:
    """``x[index]``: a copy; keeps the index; backward adds into zeros of the whole of ``x``."""
    out = x.tape.tensor(rows, width, x.dtype, name)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = index

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], name, [x], apply)
    return out


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """``grouped_mm``: rows sorted by expert, each times its expert's matrix.

    The weight's gradient is as large as all experts together. The input follows the weight's
    dtype (``input.to(weight.dtype)``); a bias is added in place.
    """
    x = ops.to(x, weight.dtype) if weight.dtype in ("fp32", "bf16", "fp16") else x
    rows, width = x.rows, x.width
    x.tape.multiply(rows, width, out_features)
    out = x.tape.tensor(rows, out_features, x.dtype, "grouped_mm")
    saved_x = x if weight.requires_grad else None
    saved_weight = weight if x.requires_grad else None
    make_x = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    weight_rows, weight_width, weight_dtype = weight.rows, weight.width, weight.dtype
    wants_x, wants_weight = x.requires_grad, weight.requires_grad
    inputs = [x, weight]
    if bias is not None:
        inputs.append(bias)
    has_bias, wants_bias = bias is not None, bias is not None and bias.requires_grad
    cast = None if bias is None or bias.dtype == out.dtype else bias.dtype

    def apply(grad: Tensor) -> Grads:
        _kept = saved_x, saved_weight, offsets
        grad.tape.multiply(rows, width, out_features, times=wants_x + wants_weight)
        grad_weight = None
        if wants_weight:
            grad_weight = grad.tape.tensor(weight_rows, weight_width, weight_dtype, "expert grad")
        grads = (make_x(grad), grad_weight)
        if not has_bias:
            return grads
        return (*grads, (ops.to(grad, cast) if cast else grad) if wants_bias else None)

    ops.record([out], "grouped_mm", inputs, apply)
    return out


def packed_linear(x: Tensor, matrix: tuple[int, ...], out_features: int, dtype: str) -> Tensor:
    """Each expert's rows times its matrix, which is expanded for the moment, both ways."""
    before = x.dtype
    x = ops.to(x, dtype)
    shape = ONE * matrix[0], matrix[1], dtype
    expanded = x.tape.tensor(*shape, "dequantised weight")
    out = x.tape.tensor(x.rows, out_features, dtype, "linear")
    del expanded
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        weight = grad.tape.tensor(*shape, "dequantised weight")
        result = make(grad)
        del weight
        return (result,)

    ops.record([out], "quantised matmul", [x], apply)
    return ops.to(out, before)


def _add_rows(total: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``index_add_``: in place; the way back picks the rows again."""
    out = total.alias()
    make = ops.like(rows.rows, rows.width, rows.dtype, rows.requires_grad)
    saved, wants = index, total.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return grad if wants else None, make(grad)

    ops.record([out], "index_add", [total, rows], apply)
    return out


def batched_linear(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    """``bmm`` of every expert's rows with its matrix, as many rows for each; under autocast."""
    x, weight = ops.autocast(x), ops.autocast(weight)
    rows, width = x.rows, x.width
    x.tape.multiply(rows, width, out_features)
    out = x.tape.tensor(rows, out_features, x.dtype, "bmm")
    saved = (x if weight.requires_grad else None, weight if x.requires_grad else None)
    make_x = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    make_weight = ops.like(weight.rows, weight.width, weight.dtype, weight.requires_grad)
    wants = x.requires_grad + weight.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(rows, width, out_features, times=wants)
        return make_x(grad), make_weight(grad)

    ops.record([out], "bmm", [x, weight], apply)
    return out


def repeat_rows(x: Tensor, times: int) -> Tensor:
    """``x.repeat(times, 1)``: backward sums."""
    out = x.tape.tensor(x.rows * times, x.width, x.dtype, "repeat")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "repeat", [x], lambda grad: (make(grad),))
    return out


def sum_of_groups(x: Tensor, group: int, rows: Size) -> Tensor:
    """``view(rows, group, width).sum(1)``; backward copies the gradient to each of the group."""
    out = x.tape.tensor(rows, x.width, x.dtype, "sum over experts")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    assert x.rows == rows * group
    alone = group == 1  # nothing was expanded, so nothing is copied
    ops.record([out], "sum", [x], lambda grad: (grad if alone else make(grad),))
    return out


def normalize_(x: Tensor) -> Tensor:
    """``x /= x.sum(-1, keepdim=True)``: keeps a copy of x, and the sums."""
    tape = x.tape
    sums = tape.tensor(x.rows, 1, x.dtype, "sum")
    saved = None
    if ops.records(x):
        saved = (tape.tensor(x.rows, x.width, x.dtype, "normalize"), sums)
    out = x.alias()
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "normalize", [x], apply)
    return out


class Folded(Protocol):
    """An adapter whose update is added to a weight in each forward."""

    def update(self, tape: Tape) -> tuple[Tensor, ...]:
        """What the update is made of, before the module runs."""
        ...

    def fold(self, update: tuple[Tensor, ...]) -> Tensor:
        """The weight with its update."""
        ...


@dataclass(slots=True)
class Routing:
    """What a router says of each token: ``weights`` and ``index`` (tokens x top_k)."""

    logits: Tensor
    """Tokens x experts; they live as long as the block's forward."""
    weights: Tensor
    index: Tensor


class Router(Module):
    """A linear layer over the experts, then scores and the ``top_k`` of them.

    ``scoring``: ``softmax`` (of all, then top k), ``top_softmax`` (of the top k only),
    ``sigmoid`` (DeepSeek-V3: grouped choice, then gathered scores), ``gathered`` (so, of a
    softmax), ``sigmoid_topk`` (the top k of the sigmoids). ``upcast`` computes the logits from fp32
    copies. ``keep_fp32`` leaves the weights in fp32; otherwise they return to the dtype of the
    logits. ``masked`` keeps a mask of experts (group-limited choice). ``float_logits`` casts the
    logits, and the weights back to the dtype of the input.
    """

    def __init__(
        self, hidden: int, experts: int, top_k: int, *, scoring: str = "softmax",
        normalize: bool = False, keep_fp32: bool = False, upcast: bool = False,
        masked: bool = False, scaled: bool = False, bias: bool = False,
        float_logits: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = self.parameter("weight", experts, hidden)
        self.bias = self.parameter("bias", experts) if bias else None
        self.top_k = top_k
        self.scoring = scoring
        self.normalize = normalize
        self.keep_fp32 = keep_fp32
        self.upcast = upcast
        self.masked = masked
        self.scaled = scaled
        self.float_logits = float_logits
        self.folded: dict[str, Folded] = {}

    def forward(self, x: Tensor) -> Routing:
        logits = self._logits(x)
        if self.float_logits:
            logits = ops.to(logits, "fp32")
        if self.scoring == "top_softmax":
            values, index = topk(logits, self.top_k)
            weights = ops.softmax(values, values.dtype)
            return Routing(
                logits, weights if not self.float_logits else ops.to(weights, x.dtype), index
            )
        if self.scoring == "sigmoid_topk":
            weights, index = topk(ops.unary(logits, "sigmoid", "output"), self.top_k)
        elif self.scoring in ("sigmoid", "gathered"):
            weights, index = self._gathered(logits)
        else:
            scores = ops.softmax(logits, "fp32")
            if self.masked:
                scores = masked(scores)
            weights, index = topk(scores, self.top_k)
        if self.normalize:
            weights = normalize_(weights)
        if self.scaled:
            weights = ops.scale(weights)
        return Routing(logits, weights if self.keep_fp32 else ops.to(weights, logits.dtype), index)

    def _logits(self, x: Tensor) -> Tensor:
        adapted = self.folded.get("weight")
        if adapted:
            weight = adapted.fold(adapted.update(x.tape))
        else:
            weight = x.tape.leaf(self.weight)
        bias = x.tape.leaf(self.bias) if self.bias else None
        if self.upcast:
            return ops.linear(ops.to(x, "fp32"), ops.to(weight, "fp32"), bias)
        return ops.linear(x, weight, bias)

    def _gathered(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.scoring == "sigmoid":
            scores = ops.unary(logits, "sigmoid", "output")
        else:
            scores = ops.softmax(ops.autocast_fp32(logits))
        tape = logits.tape
        with tape.no_grad():  # what chooses has no way to the result: it dies with the router
            choice = ops.scale(scores)
            index = topk(choice, self.top_k)[1]
        return gather_rows(scores, index, scores.rows, self.top_k, "gather"), index


def masked(scores: Tensor, mask: Tensor | None = None, *, in_place: bool = False) -> Tensor:
    """``masked_fill``: keeps the mask; without one given, it is made for every score."""
    tape = scores.tape
    if mask is None:
        mask = tape.tensor(scores.rows, scores.width, "bool", "group mask")
    if in_place:
        out = scores.alias()
    else:
        out = tape.tensor(scores.rows, scores.width, scores.dtype, "masked_fill")
    make = ops.like(scores.rows, scores.width, scores.dtype, scores.requires_grad)
    saved = mask

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "masked_fill", [scores], apply)
    return out


class Exchange(Protocol):
    """How tokens reach experts that lie on other ranks, and come back."""

    masks: bool
    """Rows beyond those of a rank's experts are masked before and after either product."""
    adapts: bool
    """Adapters of a rank's experts are those of all, cut alike."""

    def __call__(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """``x`` (tokens x hidden) through all experts."""
        ...


class ExpertWeights(Module):
    """Two 3D weights: ``inner`` features lie between them, of a rank where they are cut."""

    inner: int
    transposed = False
    names = ("gate_up_proj", "down_proj")


class Experts(ExpertWeights):
    """All experts of a layer as 3D weights: ``gate_up_proj`` and ``down_proj``.

    ``transposed``: stored (expert, in, out) as in GPT-OSS, else (expert, out, in).
    ``gated`` False: only an ``up_proj``.
    """

    def __init__(
        self, hidden: int, inner: int, count: int, *, act: str = "silu", bias: bool = False,
        transposed: bool = False, gated: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.hidden, self.inner, self.count, self.act = hidden, inner, count, act
        self.transposed, self.gated = transposed, gated
        self.folded: dict[str, Folded] = {}
        self.names = ("gate_up_proj" if gated else "up_proj", "down_proj")
        self.has_bias = bias
        self.exchange: Exchange | None = None
        """Expert parallelism: what brings a rank's experts their tokens."""
        self.expands_to: str | None = None
        """Experts were linear layers of their own and are stored in few bits: the dtype that one
        after the other is expanded to (transformers until 4.57)."""
        wide = 2 * inner if gated else inner
        for name, shape in zip(self.names, ((hidden, wide), (inner, hidden)), strict=True):
            width_in, width_out = shape
            matrices = shape if transposed else (width_out, width_in)
            self.parameter(name, count, *matrices).expert = True
            if bias:
                self.parameter(f"{name}_bias", count, width_out).expert = True

    def gate(self, both: Tensor) -> Tensor:
        """``act(gate) * up``."""
        gate, up = ops.split(both, [self.inner, self.inner])
        return ops.mul(activation(gate, self.act), up)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if self.exchange is None:
            return self.run(x, routing)
        return ops.to(self.exchange(self, x, routing), x.dtype)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """The experts that are here, on the rows that are here.

        Rows beyond the last expert's are masked where experts are spread, whether there are any or
        not: the input in place, and what either product returns.
        """
        tape = x.tape
        masks = self.exchange is not None and self.exchange.masks
        top_k = routing.index.width
        if self.expands_to is not None:
            return self._one_by_one(x, routing, top_k, self.expands_to)
        rows = x.rows * top_k
        # wrappers lie in each other: that of the last parameter is outside
        adapted = [name for name in reversed(self.names) if name in self.folded]
        updates = {name: self.folded[name].update(tape) for name in adapted}
        index = _index(routing.index, rows, "sorted experts")
        order = _index(routing.index, rows, "sort order")
        picked = gather_rows(x, _index(routing.index, rows, "token order"), rows, x.width)
        weights = gather_rows(routing.weights, order, rows, 1)
        counts = tape.tensor(rows, 1, "int32", "experts of rows")
        offsets = tape.tensor(ONE, self.count, "int32", "expert offsets")
        mask = tape.tensor(rows, 1, "bool", "rows of other ranks") if masks else None
        bias = self._bias(self.names[0], index)
        if mask is not None:
            picked = masked(picked, mask, in_place=True)
        folded: list[Tensor] = []  # ``parametrize.cached``: alive until the experts return
        out = self._linear(picked, self.names[0], bias, offsets, updates, folded)
        out = masked(out, mask) if mask is not None else out
        out = self.gate(out) if self.gated else activation(out, self.act)
        bias = self._bias(self.names[1], index)
        out = self._linear(out, self.names[1], bias, offsets, updates, folded)
        out = masked(out, mask) if mask is not None else out
        weighted = ops.mul(out, weights, "weighted experts")
        back = _index(routing.index, rows, "inverse order")
        weighted = gather_rows(weighted, back, rows, weighted.width)
        total = sum_of_groups(weighted, top_k, x.rows)
        del counts
        return ops.to(total, x.dtype)

    def _one_by_one(self, x: Tensor, routing: Routing, top_k: int, dtype: str) -> Tensor:
        """A loop over experts, each with its even share of the rows, as so much narrower ones.

        Source: transformers 4.48, ``MixtralSparseMoeBlock``.
        """
        tape, share = x.tape, self.count // top_k
        narrow, inner = -(-self.hidden // share), -(-self.inner // share)
        total = tape.tensor(x.rows, self.hidden, x.dtype, "sum over experts")
        for _ in range(self.count):
            index = tape.tensor(x.rows, max(1, 16 // share), "bool", "rows of the expert")
            picked = gather_rows(x, index, x.rows, narrow)
            gate = packed_linear(picked, (self.inner, self.hidden), inner, dtype)
            hidden = activation(gate, self.act)
            del gate
            hidden = ops.mul(hidden, packed_linear(picked, (self.inner, self.hidden), inner, dtype))
            del picked
            out = packed_linear(hidden, (self.hidden, self.inner), narrow, dtype)
            del hidden
            weights = gather_rows(routing.weights, index, x.rows, 1)
            out = ops.mul(out, weights, "weighted experts")
            total = _add_rows(total, ops.to(out, total.dtype), index)
            del out
        return total

    def _bias(self, name: str, index: Tensor) -> Tensor | None:
        """The bias of each row's expert."""
        if not self.has_bias:
            return None
        bias = index.tape.leaf(self.parameters[f"{name}_bias"])
        return gather_rows(bias, index, index.rows, bias.width)

    def _linear(
        self, x: Tensor, name: str, bias: Tensor | None, offsets: Tensor,
        updates: dict[str, tuple[Tensor, ...]], folded: list[Tensor],
    ) -> Tensor:  # fmt: skip
        weight = self.parameters[name]
        width = weight.shape[2 if self.transposed else 1]
        if name in updates:
            operand = self.folded[name].fold(updates[name])
            folded.append(operand)
        else:
            operand = x.tape.leaf(weight) if self.transposed else x.tape.view(weight)
        return grouped_linear(x, operand, offsets, width, bias)


def _index(like: Tensor, rows: Size, name: str) -> Tensor:
    return like.tape.tensor(rows, 1, "int64", name)
