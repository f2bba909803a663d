"""Weights stored in few bits: what a matmul does with them."""

from __future__ import annotations

from ftplan.dtypes import Format
from ftplan.memory import ops
from ftplan.memory.nn import Linear, Module
from ftplan.memory.tape import ONE, Grads, Parameter, Tensor

__all__ = ["QuantizedLinear", "quantize"]


class QuantizedLinear(Module):
    """A frozen matrix that is expanded to ``compute_dtype`` for each matmul, forward and back.

    bitsandbytes' ``MatMul4Bit`` keeps neither its input nor the expanded weight: both ways
    dequantise again (bitsandbytes/autograd/_functions.py).
    """

    def __init__(self, linear: Linear, storage: Format, compute_dtype: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.transposed = linear.transposed
        self.storage = storage
        self.compute_dtype = compute_dtype
        self.weight = Parameter("weight", linear.weight.shape, storage.name, False)
        self.parameters["weight"] = self.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        x = ops.to(ops.autocast(x), self.compute_dtype)
        out = _matmul_4bit(x, self.in_features, self.out_features)
        if self.bias is not None:
            out = ops.add(out, x.tape.leaf(self.bias))
        return ops.to(out, before)


def _matmul_4bit(x: Tensor, in_features: int, out_features: int) -> Tensor:
    tape = x.tape
    expanded = tape.tensor(ONE * out_features, in_features, x.dtype, "dequantised weight")
    out = tape.tensor(x.rows, out_features, x.dtype, "linear")
    del expanded
    rows, dtype = x.rows, x.dtype

    def apply(grad: Tensor) -> Grads:
        weight = grad.tape.tensor(ONE * out_features, in_features, dtype, "dequantised weight")
        result = grad.tape.tensor(rows, in_features, dtype, "gradient")
        del weight
        return (result,)

    ops.record([out], "matmul_4bit", [x], apply)
    return out


def quantize(block: Module, storage: Format, compute_dtype: str) -> None:
    """Store every matrix of a block in ``storage``."""
    for path, module in list(block.named_modules()):
        if type(module) is Linear:
            block.replace(path, QuantizedLinear(module, storage, compute_dtype))
