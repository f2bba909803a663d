"""OFT and BOFT: an orthogonal matrix turns the input of a layer.

Source: peft 0.21.2, ``tuners/oft/layer.py``, ``tuners/boft/layer.py``.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named, learned, subtract_bias
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module
from ftplan.memory.tape import ONE, Grads, Tape, Tensor

__all__ = ["BoftLinear", "OftLinear", "nearest_divisor", "skew_symmetric"]

OFT_BLOCK = 32
BOFT_BLOCK = 4
"""PEFT's default block sizes."""


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` next to ``wanted``, the smaller one of two as near."""
    if wanted >= number:
        return number
    higher = wanted
    while number % higher:
        higher += 1
    lower = wanted
    while number % lower:
        lower -= 1
    return lower if wanted - lower <= higher - wanted else higher


def _refuse_transposed(base: Linear, kind: str) -> None:
    if base.transposed:
        raise UnsupportedError(
            f"{kind} on GPT-2's transposed layers", remedy="use lora or ia3; PEFT refuses it too"
        )


class OftLinear(Adapted):
    """A block-diagonal rotation; a block is the Cayley transform of a skew-symmetric matrix.

    ``blocks``: how many, or zero for blocks of 32.
    """

    def __init__(self, base: Linear, spec: AdapterSpec, blocks: int) -> None:
        _refuse_transposed(base, spec.kind)
        super().__init__(base)
        width = base.in_features
        if blocks:
            self.blocks = nearest_divisor(width, blocks)
            self.size = width // self.blocks
        else:
            self.size = OFT_BLOCK if width % OFT_BLOCK == 0 else nearest_divisor(width, OFT_BLOCK)
            self.blocks = width // self.size
        self.elements = self.size * (self.size - 1) // 2
        self.oft_R = Named(Module())
        rotation = self.oft_R.default
        rotation.parameters["weight"] = learned("oft_R", (self.blocks, self.elements), spec.dtype)
        for name in ("rows", "cols"):
            rotation.parameters[name] = learned(name, (self.elements,), "int64", trainable=False)

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        weight = self.oft_R.default.parameters["weight"]
        x = ops.to(x, weight.dtype)
        x = self._rotated(x, weight.dtype)
        result = self.base_layer.forward(ops.to(x, before))
        return ops.to(result, before)

    def _rotated(self, x: Tensor, dtype: str) -> Tensor:
        turn = self._cayley(x.tape, dtype)
        turned = ops.matmul(x, turn, x.rows, x.width, "rotation", inner=self.size)
        return ops.copy(turned, "joined blocks")

    def _cayley(self, tape: Tape, dtype: str) -> Tensor:
        """A Neumann series of five terms: ``I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``."""
        vector = tape.leaf(self.oft_R.default.parameters["weight"])
        rows, size = ONE * (self.blocks * self.size), self.size
        skew = skew_symmetric(vector, rows, size)
        total = tape.tensor(rows, size, dtype, "rotation")
        square = ops.matmul(skew, skew, rows, size, "power", inner=size)
        cube = ops.matmul(square, skew, rows, size, "power", inner=size)
        fourth = ops.matmul(cube, skew, rows, size, "power", inner=size)

        def apply(grad: Tensor) -> Grads:
            made = [grad.tape.tensor(rows, size, dtype, "gradient") for _ in range(3)]
            return (*made, grad)

        out = total.alias()
        ops.record([out], "add_", [skew, square, cube, fourth], apply)
        return ops.to(out, dtype)


def skew_symmetric(vector: Tensor, rows: object, size: int) -> Tensor:
    """The vector written above the diagonal of zeros, minus its mirror image."""
    tape = vector.tape
    assert isinstance(rows, tuple)
    shape = ONE * rows[0]
    upper = tape.tensor(shape, size, vector.dtype, "upper triangle")
    source = (vector.rows, vector.width, vector.dtype)

    def apply(grad: Tensor) -> Grads:
        return (grad.tape.tensor(*source, "gradient"),)

    ops.record([upper], "index_put_", [vector], apply)
    return ops.add(upper, upper)


class BoftLinear(Adapted):
    """Butterfly factors: without the CUDA extension one, a block diagonal of 4 x 4 rotations.

    The permutation is a dense fp32 matrix of (in x in), a buffer of each layer.
    """

    def __init__(self, base: Linear, spec: AdapterSpec, _rank: int) -> None:
        _refuse_transposed(base, spec.kind)
        super().__init__(base)
        width = base.in_features
        if width % BOFT_BLOCK:
            raise UnsupportedError(
                f"boft on {width} inputs, which blocks of {BOFT_BLOCK} do not divide",
                remedy="use oft or lora; PEFT refuses it too",
            )
        shape = (1, width // BOFT_BLOCK, BOFT_BLOCK, BOFT_BLOCK)
        self.boft_R = Named.of("boft_R", shape, spec.dtype)
        self.boft_s = Named.of("boft_s", (base.out_features, 1), spec.dtype)
        self.parameters["boft_P"] = learned("boft_P", (1, width, width), "fp32", trainable=False)

    def forward(self, x: Tensor) -> Tensor:
        tape, before = x.tape, x.dtype
        width = self.in_features
        scale = tape.leaf(self.boft_s.parameters["default"])
        scale = ops.mul(scale, tape.tensor(ONE * self.out_features, 1, before, "ones"))
        x = self._rotated(x, width)
        result = self.base_layer.forward(x)
        bias = self.base_layer.bias
        if bias is not None:
            result = subtract_bias(result, bias)
        result = ops.mul(result, ops.view(scale, ONE, self.out_features))
        if bias is not None:
            result = subtract_bias(result, bias)
        return ops.to(result, before)

    def _rotated(self, x: Tensor, width: int) -> Tensor:
        tape, dtype = x.tape, x.dtype
        rows = ONE * width
        eye = tape.tensor(rows, width, dtype, "eye")
        blocks = tape.leaf(self.boft_R.parameters["default"])
        blocks = ops.view(blocks, rows, BOFT_BLOCK)
        turned = ops.unary(ops.to(ops.scale(ops.add(blocks, blocks)), "fp32"), "solve", "output")
        dense = ops.to(_block_diagonal(turned, width), dtype)
        order = ops.to(tape.leaf(self.parameters["boft_P"]).alias(rows, width), dtype)
        dense = ops.matmul(dense, order, rows, width, "rotation", inner=width)
        dense = ops.matmul(order, dense, rows, width, "rotation", inner=width)
        dense = ops.matmul(dense, eye, rows, width, "rotation", inner=width)
        return ops.matmul(x, ops.to(dense, dtype), x.rows, width, "rotated input", inner=width)


def _block_diagonal(blocks: Tensor, width: int) -> Tensor:
    out = blocks.tape.tensor(ONE * width, width, blocks.dtype, "block diagonal")
    make = ops.like(blocks.rows, blocks.width, blocks.dtype, blocks.requires_grad)
    ops.record([out], "block_diag", [blocks], lambda grad: (make(grad),))
    return out
