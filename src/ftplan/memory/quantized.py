"""Weights stored in few bits: what a matmul does with them.

Facts of bitsandbytes 0.50 (``autograd/_functions.py``, ``nn/modules.py``, ``backends/``): only
``nn.Linear`` and ``Conv1D`` are replaced, so the head, embeddings, norms, routers and fused expert
weights stay as they were loaded.
"""

from __future__ import annotations

from ftplan.dtypes import Format
from ftplan.memory import ops
from ftplan.memory.experts import Experts
from ftplan.memory.nn import Linear, Module
from ftplan.memory.tape import ONE, Grads, Held, Parameter, Tensor

__all__ = ["KEPT_BY_PREPARATION", "QuantizedLinear", "dequantized", "quantize"]

KEPT_BY_PREPARATION = ("gptq", "hqq", "int8-row", "int4-groups")
"""Formats whose models ``prepare_model_for_kbit_training`` freezes and does not cast (GPTQ, AQLM,
EETQ, HQQ, torchao; peft/utils/other.py)."""


class QuantizedLinear(Linear):
    """A frozen matrix that is expanded to ``compute_dtype`` for each matmul, forward and back.

    ``MatMul4Bit`` keeps neither its input nor the expanded weight: both ways dequantise again
    (before 0.44 it held its input as an attribute, which checkpointing without reentry cannot see).
    ``MatMul8bitLt`` keeps its input and multiplies int8 copies of it. AutoAWQ's function keeps its
    input; GPTQ (but for auto_gptq's), HQQ, torchao and FP8 kernels are taken to keep nothing.
    """

    def __init__(self, linear: Linear, storage: Format, compute_dtype: str) -> None:
        Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.transposed = linear.transposed
        self.storage = storage
        self.compute_dtype = compute_dtype
        self.weight = Parameter("weight", linear.weight.shape, storage.name, False)
        self.bias = linear.bias
        self.int8 = storage.name == "bnb-int8"
        if self.bias is not None and not self.int8:
            self.bias.dtype = compute_dtype  # the first forward casts it for good

    @property
    def four_bit(self) -> bool:
        """bitsandbytes' ``Linear4bit``."""
        return self.storage.name.removesuffix("-dq") in ("nf4", "fp4")

    @property
    def bitsandbytes(self) -> bool:
        """PEFT has adapters of its own for bitsandbytes' two classes."""
        return self.int8 or self.four_bit

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        if self.int8:
            return self._forward_int8(x)
        x = ops.to(x, self.compute_dtype)
        if x.tape.env.unpacks_gptq and self.storage.name.startswith("gptq"):
            return ops.to(self._forward_unpacked(x), before)
        keeps = self.storage.name.startswith("awq")
        if self.four_bit and x.tape.env.holds_4bit_inputs:
            out = _matmul(x, self.in_features, self.out_features, saved=x.tape.hold(x))
        else:
            out = _matmul(x, self.in_features, self.out_features, saved=x if keeps else None)
        return ops.to(out, before)

    def _forward_unpacked(self, x: Tensor) -> Tensor:
        """auto_gptq 0.5.1, ``qlinear_cuda_old``, without its kernel, which has no gradient."""
        tape, rows, width = x.tape, ONE * self.out_features, self.in_features
        dtype = "int16" if self.storage.name == "gptq-int8" else "int8"
        shifted = tape.tensor(rows, width, "int32", "unpacked weight")
        packed = tape.tensor(rows, width, dtype, "unpacked weight")
        del shifted
        masked = tape.tensor(rows, width, dtype, "unpacked weight")
        del packed
        centred = tape.tensor(rows, width, dtype, "unpacked weight")
        weight = tape.tensor(rows, width, self.compute_dtype, "unpacked weight")
        del masked, centred
        out = ops.linear(x, weight)
        return out if self.bias is None else ops.add(out, tape.leaf(self.bias))

    def _forward_int8(self, x: Tensor) -> Tensor:
        """``Linear8bitLt`` with a threshold of 6.0 and no outlier columns."""
        if self.bias is not None:
            self.bias.dtype = x.dtype
        fused = self.bias is not None and self.bias.dtype == "fp16"
        return _matmul_int8(
            x, self.in_features, self.out_features, adds=bool(self.bias) and not fused
        )


def _matmul(
    x: Tensor, in_features: int, out_features: int, *, saved: Tensor | Held | None
) -> Tensor:
    tape = x.tape
    tape.multiply(x.rows, in_features, out_features)
    expanded = tape.tensor(ONE * out_features, in_features, x.dtype, "dequantised weight")
    out = tape.tensor(x.rows, out_features, x.dtype, "linear")
    del expanded
    rows, dtype = x.rows, x.dtype

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(rows, in_features, out_features)
        weight = grad.tape.tensor(ONE * out_features, in_features, dtype, "dequantised weight")
        result = grad.tape.tensor(rows, in_features, dtype, "gradient")
        del weight
        return (result,)

    ops.record([out], "quantised matmul", [x], apply)
    return out


def _matmul_int8(x: Tensor, in_features: int, out_features: int, *, adds: bool) -> Tensor:
    """Quantised input, int32 product, fp16 result, each for a moment; the input is held."""
    tape = x.tape
    rows, dtype = x.rows, x.dtype
    tape.multiply(rows, in_features, out_features)
    with tape.no_grad():
        half = ops.to(x.alias(), "fp16")
        scales = tape.tensor(rows, 1, "fp32", "int8 row scales")
        values = tape.tensor(rows, in_features, "int8", "int8 input")
        size = tape.tensor(rows, in_features, "fp16", "outlier search")
        outliers = tape.tensor(rows, in_features, "bool", "outlier search")
        del size, outliers, half
        product = tape.tensor(rows, out_features, "int32", "int8 product")
        result = tape.tensor(rows, out_features, "fp16", "int8 result")
        del product, values, scales
        if adds:
            result = tape.tensor(rows, out_features, "fp32" if dtype == "fp32" else dtype, "bias")
        result = ops.to(result, dtype)
    saved = tape.hold(x) if ops.records(x) else None

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grad.tape.multiply(rows, in_features, out_features)
        weight = grad.tape.tensor(ONE * out_features, in_features, dtype, "dequantised weight")
        cast = ops.to(grad.alias(), dtype)
        made = grad.tape.tensor(rows, in_features, dtype, "gradient")
        del weight, cast
        return (made,)

    ops.record([result], "int8 matmul", [x], apply)
    return result


def dequantized(linear: Linear, like: Tensor) -> Tensor:
    """A base weight in full, as adapters that look at it see it (``dequantize_module_weight``)."""
    tape = like.tape
    if isinstance(linear, QuantizedLinear):
        dtype = "fp32" if linear.int8 else linear.compute_dtype
        rows = ONE * linear.out_features
        return tape.tensor(rows, linear.in_features, dtype, "dequantised weight")
    weight = tape.leaf(linear.weight)
    return weight.alias(ONE * linear.out_features, linear.in_features)


def quantize(
    block: Module,
    storage: Format,
    compute_dtype: str,
    *,
    whole: tuple[str, ...] = (),
    experts: bool = False,
) -> None:
    """Store every matrix of a block in ``storage``, but those named in ``whole``.

    ``experts``: they are linear layers of their own, as before transformers 5.
    """
    for path, module in list(block.named_modules()):
        if any(part in whole for part in path.split(".")):  # and all that is in it
            continue
        if experts and isinstance(module, Experts):
            module.expands_to = compute_dtype
            for name in module.names:
                module.parameters[name].dtype = storage.name
        if isinstance(module, Linear) and not isinstance(module, QuantizedLinear):
            block.replace(path, QuantizedLinear(module, storage, compute_dtype))
