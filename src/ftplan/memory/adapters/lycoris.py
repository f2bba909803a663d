"""LoHa and LoKr: the update of a whole matrix is built in each forward.

Source: peft 0.21.2, ``tuners/loha/layer.py`` (``HadaWeight``), ``tuners/lokr/layer.py``.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import ONE, Grads, Tape, Tensor

__all__ = ["LohaLinear", "LokrLinear", "factorization"]


class WholeUpdate(Adapted):
    """A linear layer beside which the input meets a matrix as large as the layer's own."""

    def __init__(self, base: Linear, spec: AdapterSpec) -> None:
        if base.transposed or isinstance(base, QuantizedLinear):
            what = "GPT-2's transposed layers" if base.transposed else "a quantised layer"
            raise UnsupportedError(f"{spec.kind} on {what}", remedy="use lora; PEFT refuses it too")
        super().__init__(base)

    def update(self, tape: Tape) -> Tensor:
        """The matrix of (out x in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        result = self.base_layer.forward(x)
        result = ops.add(result, self._activations(x))
        return ops.to(result, before)

    def _activations(self, x: Tensor) -> Tensor:
        delta = self.update(x.tape)
        return ops.linear(ops.to(x, delta.dtype), delta)


class LohaLinear(WholeUpdate):
    """``(w1a w1b) * (w2a w2b)``: a Hadamard product of two low-rank matrices."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base, spec)
        for name in ("hada_w1", "hada_w2"):
            setattr(self, f"{name}_a", Named.of(name, (base.out_features, rank), spec.dtype))
            setattr(self, f"{name}_b", Named.of(name, (rank, base.in_features), spec.dtype))

    def update(self, tape: Tape) -> Tensor:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        factors = [tape.leaf(self.children[name].parameters["default"]) for name in names]
        rows, width = ONE * self.out_features, self.in_features

        def whole(dtype: str) -> Tensor:
            return tape.tensor(rows, width, dtype, "low-rank product")

        rank = factors[0].width
        with tape.no_grad():
            tape.multiply(rows, rank, width, times=2)
            cast = [ops.autocast(factor) for factor in factors]
            dtype = cast[0].dtype
            first, second = whole(dtype), whole(dtype)
            product = whole(dtype)
            del first, second
            out = whole(dtype)
            del product, cast
        shapes = [(factor.rows, factor.width, factor.dtype) for factor in factors]

        full = factors[0].dtype  # the way back runs outside autocast

        def apply(grad: Tensor) -> Grads:
            tape.multiply(
                rows, rank, width, times=6
            )  # both low-rank products again, and the gradients of their factors
            scaled = whole(dtype)
            product = whole(full)
            step = whole(full)
            del product
            made = [grad.tape.tensor(*shape, "gradient") for shape in shapes[:2]]
            product = whole(full)
            later = whole(full)
            del product, step, scaled
            made += [grad.tape.tensor(*shape, "gradient") for shape in shapes[2:]]
            del later
            return tuple(made)

        ops.record([out], "hadamard product", factors, apply)
        return out


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of ``dimension``, the smaller first: as close to each other as they can be.

    ``factor``: the first one, or where it divides nothing the most that the first may be.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = dimension if factor == -1 else factor
    first, second = 1, dimension
    while first < second:
        further = next(m for m in range(first + 1, dimension + 1) if dimension % m == 0)
        if further > most:
            break
        first, second = further, dimension // further
    return min(first, second), max(first, second)


class LokrLinear(WholeUpdate):
    """``w1 (x) w2``: a Kronecker product, whose larger factor is of low rank."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base, spec)
        factor = int(spec.options.get("decompose_factor", -1))
        outer_in, inner_in = factorization(base.in_features, factor)
        outer_out, inner_out = factorization(base.out_features, factor)
        self.inner = (inner_out, inner_in)
        self.lokr_w1 = Named.of("lokr_w1", (outer_out, outer_in), spec.dtype)
        self.thin = rank < max(inner_out, inner_in) / 2
        if self.thin:
            self.lokr_w2_a = Named.of("lokr_w2_a", (inner_out, rank), spec.dtype)
            self.lokr_w2_b = Named.of("lokr_w2_b", (rank, inner_in), spec.dtype)
        else:
            self.lokr_w2 = Named.of("lokr_w2", self.inner, spec.dtype)

    def update(self, tape: Tape) -> Tensor:
        first = tape.leaf(self.lokr_w1.parameters["default"])
        if self.thin:
            up = tape.leaf(self.lokr_w2_a.parameters["default"])
            down = tape.leaf(self.lokr_w2_b.parameters["default"])
            second = ops.matmul(
                up, down, ONE * self.inner[0], self.inner[1], "low-rank factor", inner=up.width
            )
        else:
            second = tape.leaf(self.lokr_w2.parameters["default"])
        return ops.scale(_kron(first, second, self.out_features, self.in_features))


def _kron(a: Tensor, b: Tensor, rows: int, width: int) -> Tensor:
    """``torch.kron``: a broadcast product; both ways back are as large until they are summed."""
    tape = a.tape
    dtype = ops.promote(a.dtype, b.dtype)
    out = tape.tensor(ONE * rows, width, dtype, "kronecker product")
    saved = (a if b.requires_grad else None, b if a.requires_grad else None)
    shapes = [(t.rows, t.width, t.dtype) for t in (a, b)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        first = grad.tape.tensor(ONE * rows, width, dtype, "gradient")
        second = grad.tape.tensor(ONE * rows, width, dtype, "gradient")
        return ops.fit(first, *shapes[0]), ops.fit(second, *shapes[1])

    ops.record([out], "kron", [a, b], apply)
    return out
