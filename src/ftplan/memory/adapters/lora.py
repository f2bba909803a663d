"""LoRA and DoRA: around a linear layer, an embedding, or a fused parameter of experts.

Source: peft 0.21.2, ``tuners/lora`` (layer.py, bnb.py, dora.py, variants.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.automodel import automodel_gated, automodel_product
from ftplan.memory.adapters.functions import lora_gated, lora_products
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Embedding, Linear, Module
from ftplan.memory.quantized import QuantizedLinear, dequantized
from ftplan.memory.tape import ONE, TOKENS, Grads, Parameter, Size, Tape, Tensor

__all__ = [
    "Adapted", "FoldedLinear", "FoldedParameter", "LoraEmbedding", "LoraLinear", "Named", "learned",
    "subtract_bias",
]  # fmt: skip


def learned(name: str, shape: tuple[int, ...], dtype: str, *, trainable: bool = True) -> Parameter:
    """A weight that the adapter adds to the model."""
    parameter = Parameter(name, shape, dtype, trainable)
    parameter.added = True
    return parameter


def thin(in_features: int, out_features: int, dtype: str, *, bias: bool = False) -> Linear:
    """A linear layer of the adapter's own."""
    matrix = Linear(in_features, out_features, bias=bias)
    for parameter in matrix.parameters.values():
        parameter.dtype = dtype
        parameter.added = True
    return matrix


class Named(Module):
    """peft keeps one module per adapter name; ours is ``default``."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.default = module

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: str) -> Named:
        """One parameter per adapter name."""
        holder = cls.__new__(cls)
        Module.__init__(holder)
        holder.parameters["default"] = learned(name, shape, dtype)
        return holder


class Adapted(Linear):
    """A linear layer with an adapter around it; ``base_layer`` keeps the weight and the bias."""

    def __init__(self, base: Linear) -> None:
        Module.__init__(self)
        self.base_layer = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.transposed = base.transposed
        # views, so that the weight has one place in the tree of names
        object.__setattr__(self, "weight", base.weight)
        object.__setattr__(self, "bias", base.bias)


class LoraLinear(Adapted):
    """The base matrix and two thin ones beside it; with DoRA a magnitude for each output."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.lora_A = Named(thin(base.in_features, rank, spec.dtype))
        self.lora_B = Named(thin(rank, base.out_features, spec.dtype))
        self.dora = spec.use_dora
        if spec.use_dora:
            self.lora_magnitude_vector = Named(Module())
            self.lora_magnitude_vector.default.parameters["weight"] = learned(
                "lora_magnitude_vector", (base.out_features,), spec.dtype
            )
        self.dropout = spec.dropout

    def looks_at(self) -> Sequence[Parameter]:
        return (self._down.weight,)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if x.tape.env.kernels.lora == "automodel" and not self.dora:
            return automodel_product(x, self, base.forward(x))
        if isinstance(base, QuantizedLinear) and (base.bitsandbytes or x.tape.env.unpacks_gptq):
            return self._forward_bitsandbytes(x, copied=base.four_bit)
        result = self.base_layer.forward(x)
        dtype = result.dtype
        # a module's call holds its arguments: ``x`` outlives the cast
        cast = ops.to(x, self._down.weight.dtype)
        if self.dora:
            result = self._forward_dora(cast, result)
        else:
            result = ops.add(result, self._delta(cast))
        return ops.to(result, dtype)

    def _forward_bitsandbytes(self, x: Tensor, *, copied: bool) -> Tensor:
        """``Linear4bit`` copies the base's result defensively; ``Linear8bitLt`` does not."""
        result = self.base_layer.forward(x)
        if copied:
            result = ops.copy(result)
        converts = x.tape.env.autocast is None
        dtype = result.dtype
        if converts:
            x = ops.to(x, self._down.weight.dtype)
        if self.dora:
            result = self._forward_dora(x, result)
            return ops.to(result, dtype) if converts else result
        output = self._delta(x)
        if converts:
            output = ops.to(output, dtype)
        return ops.add(result, output)

    @property
    def thin(self) -> tuple[Parameter, Parameter]:
        """The matrix down (rank x in) and the one up (out x rank)."""
        down, up = self.lora_A.default, self.lora_B.default
        return down.parameters["weight"], up.parameters["weight"]

    def _fuses(self, style: str) -> bool:
        """Whether a library's functions run this layer; they all leave DoRA to PEFT."""
        base = self.base_layer
        packed = isinstance(base, QuantizedLinear)
        if style == "none" or self.dora or (isinstance(base, QuantizedLinear) and base.int8):
            return False
        if style == "foak":
            return packed
        if style == "automodel":  # no model of its own, whose weights come later; plain, undropped
            return not (packed or base.bias or self.dropout)
        return style == "axolotl" or base.bias is None

    def together(self, x: Tensor, layers: Sequence[Linear]) -> list[Tensor] | None:
        style = x.tape.env.kernels.lora
        adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
        if (
            style == "automodel"
            or len(adapted) < len(layers)
            or not all(layer._fuses(style) for layer in adapted)
        ):
            return None
        return lora_products(x, adapted)

    def gated(self, x: Tensor, gate: Linear, up: Linear) -> Tensor | None:
        style = x.tape.env.kernels.lora
        layers = (gate, up, self)
        if not x.tape.env.kernels.lora_mlp:
            return None
        if not all(isinstance(layer, LoraLinear) and layer._fuses(style) for layer in layers):
            return None
        assert isinstance(gate, LoraLinear) and isinstance(up, LoraLinear)
        if style == "automodel":
            return automodel_gated(x, (gate, up, self))
        return lora_gated(x, (gate, up, self))

    @property
    def _down(self) -> Linear:
        matrix = self.lora_A.default
        assert isinstance(matrix, Linear)
        return matrix

    def _thin(self, x: Tensor) -> Tensor:
        out: Tensor = self.lora_B.default.forward(self.lora_A.default.forward(x))
        return out

    def _delta(self, x: Tensor) -> Tensor:
        # what dropout returns has no name: it goes when the first matrix has seen it
        dropped = x.tape.runs
        low = self.lora_A.default.forward(dropped(x, lambda x: ops.dropout(x, self.dropout)))
        return ops.scale(self.lora_B.default.forward(low))

    def _forward_dora(self, x: Tensor, result: Tensor) -> Tensor:
        """The norm of the whole updated weight is computed anew, outside the graph, each time."""
        if self.dropout > 0 and x.tape.env.training:
            x = ops.dropout(x, self.dropout)
            return ops.add(result, self._dora(x, None))
        return ops.add(result, self._dora(x, result))

    def _dora(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        tape = x.tape
        if tape.env.kernels.lora == "automodel":
            return self._scaled(x, base_result, self._norm_of_update(tape))
        eye = tape.tensor(ONE * self.in_features, self.in_features, self._down.weight.dtype, "eye")
        lora_weight = self._thin(eye)
        held = [eye] if tape.env.dora_names_identity else []
        del eye
        if not held:  # until 0.18 it keeps the dtype of the product
            lora_weight = ops.to(lora_weight, x.dtype)
        weight = ops.to(dequantized(self.base_layer, x), x.dtype)
        with tape.no_grad():
            scaled = ops.scale(lora_weight.alias())
            summed = ops.add(weight.alias(), scaled)
            del scaled
            norm = tape.tensor(ONE, self.out_features, summed.dtype, "weight norm")
            del summed
        out = self._scaled(x, base_result, norm, weight)
        held.clear()
        return out

    def _norm_of_update(self, tape: Tape) -> Tensor:
        """AutoModel multiplies the thin matrices themselves."""
        if isinstance(self.base_layer, QuantizedLinear):
            raise UnsupportedError(
                "NeMo AutoModel's DoRA on a quantised base",
                because="it adds the update to the packed weight (_dora_weight_norm, 0.7.0)",
                remedy="use lora, or a base that is not quantised",
            )
        rows, width, dtype = ONE * self.out_features, self.in_features, self.weight.dtype
        with tape.no_grad():
            update = tape.tensor(rows, width, self._down.weight.dtype, "update")
            scaled = ops.scale(update)
            summed = ops.add(tape.leaf(self.weight), scaled)
            del scaled
            norm = tape.tensor(ONE, self.out_features, dtype, "weight norm")
            del summed, update
        return norm

    def _scaled(
        self, x: Tensor, base_result: Tensor | None, norm: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """What the magnitudes make of the update and the base's result (None: it is made anew)."""
        tape = x.tape
        magnitude = tape.leaf(self.lora_magnitude_vector.default.parameters["weight"])
        ratio = ops.mul(magnitude, norm)
        lora_result = self._thin(x)
        if base_result is None:
            base_result = ops.linear(x, tape.leaf(self.weight) if weight is None else weight)
        elif self.base_layer.bias is not None:
            base_result = subtract_bias(base_result, self.base_layer.bias)
        first = ops.mul(ops.shift(ratio), base_result)
        return ops.add(first, ops.scale(ops.mul(ratio, lora_result)))


def subtract_bias(x: Tensor, bias: Parameter) -> Tensor:
    """``x - bias``: a new tensor."""
    return ops.add(x, x.tape.leaf(bias))


class LoraEmbedding(Embedding):
    """``peft.tuners.lora.Embedding``; the base table stays frozen."""

    def __init__(self, base: Embedding, spec: AdapterSpec, rank: int) -> None:
        Module.__init__(self)
        self.base_layer = base
        count, width = base.weight.shape
        object.__setattr__(self, "weight", base.weight)
        self.lora_embedding_A = Named.of("lora_A", (rank, count), spec.dtype)
        self.lora_embedding_B = Named.of("lora_B", (width, rank), spec.dtype)
        self.dora = spec.use_dora
        if spec.use_dora:
            self.lora_magnitude_vector = Named.of("lora_magnitude_vector", (width,), spec.dtype)

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        result = self.base_layer.forward(tape, rows)
        down = tape.leaf(self.lora_embedding_A.parameters["default"])
        table = down.alias(ONE * down.width, down.rows[0])
        table.requires_grad, table.node = down.requires_grad, down.node
        dtype = result.dtype
        if not self.dora:
            after = self._after(tape, table, rows)
            return ops.to(ops.add(result, after), dtype)
        count, width = self.weight.shape
        with tape.no_grad():
            delta = tape.tensor(ONE * count, width, table.dtype, "embedding update")
            scaled = ops.scale(delta)
            summed = ops.add(tape.leaf(self.weight), scaled)
            del delta, scaled
            norm = tape.tensor(ONE, width, summed.dtype, "weight norm")
            del summed
        ratio = ops.mul(tape.leaf(self.lora_magnitude_vector.parameters["default"]), norm)
        delta_result = ops.mul(ratio, self._after(tape, table, rows))
        return ops.to(ops.add(ops.mul(ratio, result), delta_result), dtype)

    def _after(self, tape: Tape, table: Tensor, rows: Size) -> Tensor:
        up = tape.leaf(self.lora_embedding_B.parameters["default"])
        return ops.scale(ops.linear(ops.embedding(tape, table, rows), up))


class FoldedParameter(Module):
    """``ParamWrapper``: a parameter of fused experts (or a router's matrix) plus its update.

    The sum is as large as the parameter itself and is made anew in each forward.
    """

    def __init__(
        self, parameter: Parameter, spec: AdapterSpec, rank: int, *, transposed: bool
    ) -> None:
        super().__init__()
        if spec.dropout > 0 or spec.use_dora:
            raise UnsupportedError(
                "dropout or DoRA on a parameter of fused experts",
                remedy="use dropout 0 without DoRA, or targets that leave the experts out, as "
                "[q_proj, k_proj, v_proj, o_proj]; PEFT refuses it too",
            )
        shape = parameter.shape
        if len(shape) not in (2, 3):
            raise UnsupportedError(f"a parameter of {len(shape)} dimensions as LoRA's target")
        self.count = shape[0] if len(shape) == 3 else 1
        first, second = shape[-2:]
        if not transposed or len(shape) == 2:  # stored (out, in)
            first, second = second, first
        object.__setattr__(self, "folded", parameter)
        self.folded: Parameter
        self.transposed = transposed
        self.lora_A = Named(thin(first, rank * self.count, spec.dtype))
        self.lora_B = Named(thin(rank * self.count, second, spec.dtype))

    def update(self, tape: Tape) -> tuple[Tensor, ...]:
        """What the update is made of: the two factors of all experts, or a matrix's whole update.

        ``register_parametrization`` folds them once for a check.
        """
        if self.count == 1:
            down = tape.leaf(self.lora_A.default.parameters["weight"])
            up = tape.leaf(self.lora_B.default.parameters["weight"])
            rows, width = ONE * self.folded.shape[0], self.folded.shape[-1]
            delta = ops.scale(ops.matmul(up, down, rows, width, "update", inner=up.width))
            made: tuple[Tensor, ...] = (ops.to(delta, self.folded.dtype),)
        else:
            names = ("lora_A", "lora_B") if self.transposed else ("lora_B", "lora_A")
            made = tuple(self._factor(tape, name) for name in names)
        _checked = self.fold(made)
        return made

    def _factor(self, tape: Tape, name: str) -> Tensor:
        """One factor as (expert, out, rank): its gradient is copied into its weight's order."""
        matrix = tape.leaf(self.children[name].children["default"].parameters["weight"])
        turned = self.transposed or name == "lora_B"
        factor = _turned(matrix) if turned else matrix
        return ops.to(factor, self.folded.dtype)

    def fold(self, update: tuple[Tensor, ...]) -> Tensor:
        """The parameter with its update: ``baddbmm``, outside autocast."""
        tape = update[0].tape
        weight = tape.leaf(self.folded)
        if self.count == 1:
            return ops.add(weight, update[0])
        rank = self.lora_A.default.parameters["weight"].shape[0] // self.count
        whole, across = weight.rows, weight.width
        tape.multiply(whole, rank, across)
        out = tape.tensor(whole, across, weight.dtype, "folded experts")
        makers = [ops.like(f.rows, f.width, f.dtype, True) for f in update]
        saved = update

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            made = []
            grad.tape.multiply(whole, rank, across, times=2)
            for make in makers:
                product = make(grad)
                made.append(make(grad))
                del product
            return tuple(made)

        ops.record([out], "baddbmm", update, apply)
        return out


def _turned(x: Tensor) -> Tensor:
    """A view whose gradient is not laid out as ``x``: it is copied on its way."""
    out = x.alias()
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "permute", [x], lambda grad: (make(grad),))
    return out


class FoldedLinear(Adapted):
    """A linear layer whose weight is a target parameter."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.weight_lora = FoldedParameter(base.weight, spec, rank, transposed=False)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        weight = self.weight_lora.fold(self.weight_lora.update(tape))
        bias = self.base_layer.bias
        return ops.linear(x, weight, tape.leaf(bias) if bias else None)
