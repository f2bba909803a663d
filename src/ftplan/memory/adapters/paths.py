"""BEFT, GraLoRA, GLoRA, PEANuT and PSOFT: a bias, blocks, paths, a small network, a subspace.

Source: peft 0.21.2, ``tuners/{beft,gralora,glora,peanut,psoft}/layer.py``.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named, learned, thin
from ftplan.memory.adapters.products import Beside, leaf
from ftplan.memory.adapters.rotations import skew_symmetric
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module, activation
from ftplan.memory.tape import ONE, Grads, Tape, Tensor

__all__ = ["BeftLinear", "GloraLinear", "GraloraLinear", "PeanutLinear", "PsoftLinear"]


class BeftLinear(Beside):
    """A bias is learned beside the layer."""

    def __init__(self, base: Linear, spec: AdapterSpec, _rank: int) -> None:
        super().__init__(base, spec)
        self.beft_bias = Named.of("beft_bias", (1, base.out_features), spec.dtype)

    def update(self, x: Tensor) -> Tensor:
        return leaf(x.tape, self.beft_bias)


class GraloraLinear(Adapted):
    """LoRA in ``k`` x ``k`` blocks: the pieces of each block's thin numbers change places."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        blocks = int(spec.options.get("gralora_k", 2))
        if base.in_features % blocks or base.out_features % blocks:
            raise UnsupportedError(
                f"gralora with {blocks} blocks on a layer of {base.in_features} x "
                f"{base.out_features}",
                remedy="use options: {gralora_k: N} with a divisor of both; PEFT refuses it too",
            )
        self.rank, self.blocks, self.wide = rank, blocks, rank * blocks
        down, up = base.in_features // blocks, base.out_features // blocks
        self.gralora_A = Named.of("gralora_A", (blocks, down, rank), spec.dtype)
        self.gralora_B = Named.of("gralora_B", (blocks, rank, up), spec.dtype)
        self.dropout = spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        result = self.base_layer.forward(x)
        down, up = leaf(x.tape, self.gralora_A), leaf(x.tape, self.gralora_B)
        x = ops.dropout(ops.to(x, down.dtype), self.dropout)
        inner = self.in_features // self.blocks
        hidden = ops.matmul(x, down, x.rows, self.wide, inner=inner)
        hidden = ops.copy(hidden, "exchanged pieces")
        output = ops.matmul(hidden, up, x.rows, self.out_features, inner=self.rank)
        output = ops.copy(output, "joined blocks")
        del hidden
        result = ops.add_(result, ops.scale(ops.to(output, result.dtype)))
        return ops.to(result, before)


class GloraLinear(Adapted):
    """``W + W A + B``: a weight is made anew of it in each forward, beside the base's result."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        if base.bias is not None:
            raise UnsupportedError("glora on a layer with a bias", remedy="use lora here")
        super().__init__(base)
        self.path = str(spec.options.get("config_A_B", "lora"))
        shapes = {
            "lora": ((base.out_features, rank), (rank, base.in_features)),
            "vector": ((base.out_features, 1),),
            "constant": ((1,),),
        }
        if self.path not in shapes:
            raise UnsupportedError(
                f"glora with config_A_B {self.path!r}", remedy=f"use one of {', '.join(shapes)}"
            )
        for name in ("glora_A", "glora_B"):
            holder = Module()
            for part, shape in zip(("Xd", "Xu"), shapes[self.path], strict=False):
                holder.parameters[part] = learned(name, shape, spec.dtype)
            setattr(self, name, Named(holder))

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        result = self.base_layer.forward(x)
        base, dtype = result, result.dtype
        first, second = (self._made(tape, name) for name in ("glora_A", "glora_B"))
        weight = tape.leaf(self.base_layer.weight)
        weight = ops.add(ops.add(weight, ops.mul(weight, first)), second)
        result = ops.add(result, ops.linear(x, weight))
        del weight, first, second
        return ops.to(ops.add(result, ops.scale(base)), dtype)

    def _made(self, tape: Tape, name: str) -> Tensor:
        held = self.children[name].children["default"].parameters
        parts = [tape.leaf(parameter) for parameter in held.values()]
        if self.path == "lora":
            rows, rank = ONE * self.out_features, parts[0].width
            made = ops.matmul(parts[0], parts[1], rows, self.in_features, inner=rank)
        else:
            made = parts[0]
        return ops.to(made, self.base_layer.weight.dtype)


class PeanutLinear(Adapted):
    """A small network makes the update out of the frozen weight itself."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.depth = int(spec.options.get("depth", 0))
        self.act = str(spec.options.get("act_fn", "relu"))
        self.peanut_A = Named(thin(base.out_features, rank, spec.dtype))
        self.peanut_B = Named(thin(rank, base.out_features, spec.dtype))
        for number in range(self.depth):
            setattr(self, f"peanut_encoders_{number}", thin(rank, rank, spec.dtype))
            setattr(self, f"peanut_decoders_{number}", thin(rank, rank, spec.dtype))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer.forward(x)
        update = self._update(x.tape)
        cast = ops.to(x, update.dtype)
        delta = ops.matmul(cast, update, x.rows, self.out_features, inner=self.in_features)
        return ops.add(result, ops.to(delta, result.dtype))

    def _update(self, tape: Tape) -> Tensor:
        """The transposed update (in x out), scaled."""
        first, last = self.peanut_A.default, self.peanut_B.default
        turned = tape.leaf(self.base_layer.weight).alias(ONE * self.in_features, self.out_features)
        turned = ops.to(turned, first.parameters["weight"].dtype)
        hidden = activation(first.forward(turned), self.act)
        kept: list[Tensor] = []
        for number in range(self.depth):
            kept.append(hidden)
            hidden = activation(
                self.children[f"peanut_encoders_{number}"].forward(hidden), self.act
            )
        for number in range(self.depth):
            hidden = activation(
                self.children[f"peanut_decoders_{number}"].forward(hidden), self.act
            )
            hidden = ops.add(hidden, kept[self.depth - 1 - number])
        return ops.scale(last.forward(hidden))


def _solved(matrix: Tensor) -> Tensor:
    """``linalg.solve`` of ``I - Q`` and ``I + Q`` keeps a matrix, its factors and their pivots."""
    tape, size = matrix.tape, matrix.width
    out = tape.tensor(ONE * size, size, matrix.dtype, "solve")
    kept = [tape.tensor(ONE * size, size, matrix.dtype, "factors") for _ in range(2)]
    kept += [out.alias(), tape.tensor(ONE, size, "int32", "pivots")]
    make = ops.like(matrix.rows, size, matrix.dtype, matrix.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = kept
        return (make(grad),)

    ops.record([out], "solve", [matrix], apply)
    return out


class PsoftLinear(Beside):
    """A rotation within the subspace of the weight's first ``r`` singular vectors."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base, spec)
        if rank > min(base.in_features, base.out_features):
            raise UnsupportedError(
                f"psoft of rank {rank} on a layer of {base.in_features} x {base.out_features}",
                remedy="use a lower rank; PEFT refuses it too",
            )
        self.rank = rank
        rotation = Module()
        rotation.parameters["weight"] = learned("psoft_R", (rank * (rank - 1) // 2,), spec.dtype)
        for name in ("vector_b", "vector_a"):
            rotation.parameters[name] = learned(name, (rank,), spec.dtype)
        for name in ("rows", "cols"):
            places = (rank * (rank - 1) // 2,)
            rotation.parameters[name] = learned(name, places, "int64", trainable=False)
        self.psoft_R = Named(rotation)
        down, up = (rank, base.in_features), (base.out_features, rank)
        for name, shape in (("_psoft_A_cache", down), ("_psoft_B_cache", up)):
            holder = Module()
            holder.parameters["default"] = learned(name, shape, "fp32", trainable=False)
            setattr(self, name, holder)

    def update(self, x: Tensor) -> Tensor:
        tape = x.tape
        down, up = (
            tape.leaf(self.children[name].parameters["default"])
            for name in ("_psoft_A_cache", "_psoft_B_cache")
        )
        x = ops.dropout(ops.to(x, "fp32"), self.dropout)
        thin_x = ops.linear(x, ops.to(down, x.dtype))
        turned = ops.linear(thin_x, self._rotation(tape))
        return ops.scale(ops.linear(ops.add(turned, thin_x), ops.to(up, x.dtype)))

    def _rotation(self, tape: Tape) -> Tensor:
        """Cayley: ``(I - Q)^-1 (I + Q)``, its rows and columns scaled."""
        held, size = self.psoft_R.default.parameters, self.rank
        skew = skew_symmetric(tape.leaf(held["weight"]), ONE * size, size)
        made = _solved(skew)
        del skew
        made = ops.mul(ops.view(tape.leaf(held["vector_b"]), ONE * size, 1), made)
        return ops.mul(made, tape.leaf(held["vector_a"]))
