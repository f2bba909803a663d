"""Transformer Engine's functions, as Megatron-Core calls them: what each keeps and what it needs.

A weight's gradient is added to ``main_grad`` by the product that makes it
(``gradient_accumulation_fusion``), so none has bytes here. Under sequence parallelism a
column-parallel layer gathers its input, keeps the rank's part and gathers it again on the way
back; a row-parallel one scatters what it made and gathers its gradient.

Source: NVIDIA/TransformerEngine transformer_engine/pytorch/module/{linear,layernorm_linear,
grouped_linear}.py, ops/basic/rmsnorm.py, attention/dot_product_attention/utils.py
(``get_qkv_layout``) and utils.py (``SplitAlongDim``), 2.20.0.dev0 (commit d0067d0da).
"""

from __future__ import annotations

from typing import Literal

from ftplan.memory import ops
from ftplan.memory.nn import Module
from ftplan.memory.tape import ONE, PART, TOKENS, Grads, Parameter, Size, Tape, Tensor

__all__ = ["LayerNormLinear", "Linear", "Mode", "RMSNorm", "swiglu"]

Mode = Literal["column", "row", "duplicated", "grouped"]
"""How a layer is split: ``column`` by outputs, ``row`` by inputs, ``duplicated`` not at all;
``grouped`` is one matrix for each of a rank's experts."""


class Linear(Module):
    """``te.Linear`` and ``te.GroupedLinear`` (``experts`` of them); a rank's part of the matrix."""

    def __init__(
        self, in_features: int, out_features: int, mode: Mode, *,
        bias: bool = False, sequence: bool = False, experts: int = 0,
    ) -> None:  # fmt: skip
        """``sequence``: tensor parallel ranks share the tokens outside of split layers."""
        super().__init__()
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        self.gathers = sequence and mode == "column"
        self.scatters = sequence and mode == "row"
        shape = (experts, out_features, in_features) if experts else (out_features, in_features)
        self.weight = self.parameter("weight", *shape)
        self.weight.expert = bool(experts)
        self.bias = self.parameter("bias", out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        operands = self._operands(tape)
        out = self.product(x)
        saved = x if self.weight.trainable else None
        wants, makes = x.requires_grad, self.gradient

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return makes(grad, wants=wants)

        ops.record([out], "linear", [x, *operands], apply)
        return out

    def _operands(self, tape: Tape) -> list[Tensor]:
        return [tape.leaf(p) for p in (self.weight, self.bias) if p is not None]

    def product(self, x: Tensor) -> Tensor:
        """The layer's output of a rank's input."""
        tape = x.tape
        total = _whole(x) if self.gathers else x
        tape.multiply(total.rows, self.in_features, self.out_features)
        out = tape.tensor(total.rows, self.out_features, x.dtype, "linear")
        return _part(out) if self.scatters else out

    def gradient(self, grad: Tensor, *, wants: bool) -> Grads:
        """Gradients of the input and of the bias; the weight's is added where it is summed."""
        tape, trains = grad.tape, self.weight.trainable
        whole = _whole(grad) if self.scatters else grad
        total = None
        if self.gathers and trains:
            total = tape.tensor(TOKENS, self.in_features, grad.dtype, "gathered")
        tape.multiply(whole.rows, self.in_features, self.out_features, times=wants + trains)
        made = tape.tensor(whole.rows, self.in_features, grad.dtype, "gradient") if wants else None
        own = _part(made) if made is not None and self.gathers else made
        del total
        self.weight.reached = trains
        if self.bias is None:
            return own, None
        trained = self.bias.trainable
        bias = tape.tensor(ONE, self.out_features, grad.dtype, "gradient") if trained else None
        return own, None, bias


def _whole(x: Tensor) -> Tensor:
    return x.tape.tensor(TOKENS, x.width, x.dtype, "gathered")


def _part(x: Tensor) -> Tensor:
    return x.tape.tensor(PART, x.width, x.dtype, "scattered")


class LayerNormLinear(Linear):
    """``te.LayerNormLinear``: an RMSNorm and a column-parallel layer in one function."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, sequence: bool = False
    ) -> None:
        super().__init__(in_features, out_features, "column", bias=bias, sequence=sequence)
        self.layer_norm_weight = self.parameter("layer_norm_weight", in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x)[0]

    def normed(self, x: Tensor, *, returned: bool = False) -> tuple[Tensor, Tensor]:
        """The output, and what came out of the norm (``return_layernorm_output``)."""
        tape = x.tape
        operands = [*self._operands(tape), tape.leaf(self.layer_norm_weight)]
        normal = tape.tensor(x.rows, x.width, x.dtype, "norm")
        root = tape.tensor(x.rows, 1, "fp32", "norm statistics")
        out = self.product(normal)
        saved = (x, root, normal.alias() if self.weight.trainable or returned else None)
        wants, learns = x.requires_grad, self.layer_norm_weight.trainable
        makes, rows, width = self.gradient, x.rows, x.width

        def apply(grad: Tensor | None, more: Tensor | None = None) -> Grads:
            _kept = saved
            assert grad is not None
            dgrad, *others = makes(grad, wants=True)
            assert dgrad is not None
            if more is not None:
                dgrad = tape.tensor(rows, width, dgrad.dtype, "gradient")
            own = tape.tensor(rows, width, dgrad.dtype, "gradient") if wants else None
            norm = tape.tensor(ONE, width, dgrad.dtype, "gradient") if learns else None
            return own, *others, norm

        outputs = [out, normal.alias()] if returned else [out]
        ops.record(outputs, "norm and linear", [x, *operands], apply)
        return out, outputs[-1]


class RMSNorm(Module):
    """``te.RMSNorm``: keeps its input, laid out contiguously, and a number a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor, *, strided: bool = False) -> Tensor:
        """``strided``: x is a slice of something wider, which is copied."""
        tape = x.tape
        weight = tape.leaf(self.weight)
        kept = tape.tensor(x.rows, x.width, x.dtype, "copy") if strided else x
        out = tape.tensor(x.rows, x.width, x.dtype, "norm")
        heads = x.width // self.weight.shape[0]
        saved = (kept.alias(), tape.tensor(x.rows * heads, 1, "fp32", "norm statistics"))
        del kept
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, weight)]

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return tuple(make(grad) for make in makers)

        ops.record([out], "norm", [x, weight], apply)
        return out


def swiglu(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``silu(x1) x2`` of the halves of x as one function, which keeps x.

    ``weights``: a probability for each row, in fp32: so the gradient of x is joined, and then cast.
    Source: megatron/core/fusions/fused_bias_swiglu.py, megatron-core 0.16.1, and what inductor of
    torch 2.13 allocates for it.
    """
    tape = x.tape
    out = tape.tensor(x.rows, x.width // 2, x.dtype, "swiglu")
    inputs = [x] if weights is None else [x, weights]
    saved = tuple(inputs)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in inputs]

    rows, width = x.rows, x.width

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        _joined = tape.tensor(rows, width, "fp32", "gradient") if weights is not None else None
        return tuple(make(grad) for make in makers)

    ops.record([out], "swiglu", inputs, apply)
    return out


def rows_of(sequence: bool) -> Size:
    """Tokens of a rank outside of what tensor parallelism splits."""
    return PART if sequence else TOKENS


def learnt(parameter: Parameter) -> bool:
    """Whether its gradient is made inside a product that adds it to ``main_grad``."""
    return parameter.trainable and len(parameter.shape) > 1 and not parameter.embedding
