"""LoRA's projections as autograd functions of kernel libraries: an input is kept once for all.

The plain modules cast and keep an input for each adapted layer (:mod:`lora`). Source: the
functions themselves, run with their launches left out (tests/cases/kernels):
unsloth/kernels/fast_lora.py 2026.10.9; fms_acceleration_foak fused_ops/unsloth_lora 0.7.4;
axolotl/kernels/lora.py 0.18.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ftplan.memory import ops
from ftplan.memory.nn import Linear
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import ONE, Grads, Parameter, Tensor

__all__ = ["LoraLike", "lora_gated", "lora_products"]


class LoraLike(Protocol):
    """A linear layer with two thin matrices beside it."""

    base_layer: Linear
    dropout: float

    @property
    def thin(self) -> tuple[Parameter, Parameter]:
        """The matrix down (rank x in) and the one up (out x rank)."""
        ...


class _Product:
    """``x W + s (dropout(x) A) B`` as one step of such a function, and what its way back needs."""

    def __init__(self, x: Tensor, layer: LoraLike, dropped: list[Tensor]) -> None:
        """``dropped``: what a name of the function holds of the last dropout's results."""
        tape, env = x.tape, x.tape.env
        self.rows, self.dtype = x.rows, env.autocast or x.dtype
        self.style = env.kernels.lora
        self.base, self.parameters = layer.base_layer, layer.thin
        self.rank, self.in_features = self.parameters[0].shape
        self.out_features = self.parameters[1].shape[0]
        self.kept: list[Tensor] = []
        self.masked = self.style == "unsloth" and layer.dropout > 0 and env.training
        if self.masked:  # before the product, whose expanded weight has a buffer of its own then
            made = x.tape.tensor(x.rows, x.width, x.dtype, "dropped input")
            self.kept.append(x.tape.tensor(x.rows, x.width, "bool", "dropout mask"))
            dropped[:] = [made]
            del made
        expanded = self._expand(x, buffered=not self.masked)
        self._count(x, base=True)
        self.out = tape.tensor(x.rows, self.out_features, self.dtype, "linear")
        del expanded
        self._drop(x, layer.dropout)
        down = self._cast(x, self.parameters[0])
        thin = tape.tensor(x.rows, self.rank, self.dtype, "thin product")
        del down
        up = self._cast(x, self.parameters[1])
        if self.style == "foak":  # out += (x A)(s B): the product is made first
            wide = tape.tensor(x.rows, self.out_features, self.dtype, "wide product")
            del wide
        del up, thin

    def _count(self, like: Tensor, *, base: bool, times: int = 1) -> None:
        """Products through the thin matrices, and through the base's."""
        if base:
            like.tape.multiply(self.rows, self.in_features, self.out_features)
        like.tape.multiply(self.rows, self.in_features, self.rank, times=times)
        like.tape.multiply(self.rows, self.rank, self.out_features, times=times)

    def casts(self, like: Tensor) -> list[Tensor]:
        """The thin matrices in the dtype of the function: axolotl keeps them for the way back,
        Unsloth makes them anew there."""
        made = [self._cast(like, parameter) for parameter in self.parameters]
        return [cast for cast in made if cast is not None]

    def _expand(self, like: Tensor, *, buffered: bool = False) -> Tensor | None:
        """A quantised weight in full; Unsloth has one buffer for all that run forward."""
        if not isinstance(self.base, QuantizedLinear) or (buffered and self.style == "unsloth"):
            return None
        rows = ONE * self.out_features
        return like.tape.tensor(rows, self.in_features, self.dtype, "dequantised weight")

    def _cast(self, like: Tensor, parameter: Parameter) -> Tensor | None:
        if parameter.dtype == self.dtype:
            return None
        rows, width = parameter.shape
        return like.tape.tensor(ONE * rows, width, self.dtype, "cast")

    def _drop(self, x: Tensor, probability: float) -> None:
        """foak's dropout is inside the function, which keeps what it made and no mask."""
        if probability <= 0 or not x.tape.env.training or self.style != "foak":
            return
        out = x.tape.tensor(x.rows, x.width, x.dtype, "dropped input")
        mask = x.tape.tensor(x.rows, x.width, "bool", "dropout mask")
        del mask
        self.kept.append(out)

    def gradients(self, like: Tensor, dropped: list[Tensor]) -> list[Tensor]:
        """Of the two thin matrices, in the dtype of the function; ``dropped`` is as forward."""
        self._count(like, base=False, times=2)
        if self.masked:  # its input again, by the mask
            shape = self.rows, self.in_features, self.dtype
            dropped[:] = [like.tape.tensor(*shape, "dropped input")]
        made = []
        for parameter in self.parameters:
            thin = like.tape.tensor(self.rows, self.rank, self.dtype, "thin product")
            rows, width = parameter.shape
            made.append(like.tape.tensor(ONE * rows, width, self.dtype, "gradient"))
            del thin
        return made

    def arrived(self, grads: list[Tensor]) -> list[Tensor]:
        """As the engine hands them on: in the parameters' own dtype, one after the other."""
        return [ops.to(grads.pop(0), parameter.dtype) for parameter in self.parameters]

    def add_to(
        self, total: Tensor | None, into: Tensor | None, like: Tensor, *, buffered: bool = False
    ) -> Tensor:
        """The gradient of the input through this product, added to ``total`` or written ``into``
        what is given."""
        tape = like.tape
        expanded = self._expand(like, buffered=buffered and not self.masked)
        self._count(like, base=True)
        shape = (self.rows, self.in_features, self.dtype)
        if total is None:
            total = into if into is not None else tape.tensor(*shape, "gradient")
        elif self.style == "foak":  # dX += dY W: not in place of an addmm
            product = tape.tensor(*shape, "product")
            del product
        del expanded
        thin = tape.tensor(self.rows, self.rank, self.dtype, "thin product")
        if self.masked:  # dX += mask * (dY B A)
            product = tape.tensor(*shape, "product")
            masked = tape.tensor(*shape, "product")
            del product, masked
        if self.style == "foak":  # dX += (dropped != 0) * (dY B A)
            mask = tape.tensor(self.rows, self.in_features, "bool", "mask")
            product = tape.tensor(*shape, "product")
            masked = tape.tensor(*shape, "product")
            del mask, product, masked
        del thin
        return total


def _inputs(x: Tensor, products: Sequence[_Product]) -> list[Tensor]:
    leaves = [x.tape.leaf(p) for product in products for p in product.parameters]
    return [x, *leaves]


def lora_products(x: Tensor, layers: Sequence[LoraLike]) -> list[Tensor]:
    """``LoRA_QKV`` and ``LoRA_W`` (``LoRA_O``): projections of one input, which is kept once.

    The gradient of the input replaces it where there are several (Unsloth's ``inplace``); one
    projection, and axolotl's, make a new tensor.
    """
    tape, style = x.tape, x.tape.env.kernels.lora
    dropped = _drop_outside(x, layers[0].dropout)
    held: list[Tensor] = []
    with tape.no_grad():
        products = [_Product(x, layer, held) for layer in layers]
    held.clear()
    outs = []
    for product in products:  # what the way back holds is no longer its result
        outs.append(product.out)
        del product.out
    saved: list[Tensor] = [x.alias()]
    wants, shares = x.requires_grad, len(layers) > 1 and style != "axolotl"
    inputs = _inputs(x, products)
    outside = _Outside(x, dropped, alone=len(layers) == 1)
    kept = [product.casts(x) for product in products] if style == "axolotl" else []

    def apply(*grads: Tensor | None) -> Grads:
        like = next(grad for grad in grads if grad is not None)
        _kept = kept
        again = [product.casts(like) for product in products] if style == "unsloth" else []
        thin = [product.gradients(like, held) for product in products]
        held.clear()
        total: Tensor | None = None
        if wants:
            for product in products:
                total = product.add_to(total, saved[0] if shares else None, like)
        back = outside.gradient(like)
        again.clear()
        made = [g for product, pair in zip(products, thin, strict=True)
                for g in product.arrived(pair)]  # fmt: skip
        return (total, *made, *back)

    ops.record(outs, "LoRA products", [*inputs, *outside.inputs], apply)
    return outs


class _Outside:
    """axolotl's dropout is outside of the function, which takes what it made as an input."""

    def __init__(self, x: Tensor, dropped: Tensor | None, *, alone: bool) -> None:
        self.inputs = [] if dropped is None else [dropped]
        self._kept = None if dropped is None else dropped.alias()
        self._shape = x.rows, x.width, x.dtype
        self._alone = alone

    def gradient(self, like: Tensor) -> list[Tensor]:
        """Of what dropout made; one projection scales it in a second step."""
        if self._kept is None:
            return []
        product = like.tape.tensor(*self._shape, "product") if self._alone else None
        made = [like.tape.tensor(*self._shape, "gradient")]
        del product
        return made


def _drop_outside(x: Tensor, probability: float) -> Tensor | None:
    """axolotl: one dropout for all projections of an input, outside of the function."""
    if x.tape.env.kernels.lora != "axolotl" or probability <= 0 or not x.tape.env.training:
        return None
    return ops.dropout(x, probability)


def lora_gated(x: Tensor, layers: tuple[LoraLike, LoraLike, LoraLike]) -> Tensor:
    """``LoRA_MLP``: gate, up and down in one function, which keeps its input, gate and up.

    Backward makes ``act(gate) * up`` again, over the gradient of it, and writes the gradients of
    gate and up over those.
    """
    tape, style = x.tape, x.tape.env.kernels.lora
    dropped = _drop_outside(x, layers[0].dropout)
    held: list[Tensor] = []
    with tape.no_grad():
        gate_product, up_product = (_Product(x, layer, held) for layer in layers[:2])
        held.clear()
        hidden = tape.tensor(x.rows, gate_product.out_features, gate_product.dtype, "gated")
        down_product = _Product(hidden, layers[2], held)
    held.clear()
    out = down_product.out
    products = (gate_product, up_product, down_product)
    saved = [x.alias(), gate_product.out, up_product.out]
    for product in products:
        del product.out
    wants = x.requires_grad
    inputs = _inputs(x, products)
    outside = _Outside(x, dropped, alone=False)
    kept = [product.casts(x) for product in products] if style == "axolotl" else []
    del hidden

    def apply(grad: Tensor) -> Grads:
        _kept = kept
        again = [product.casts(grad) for product in products] if style == "unsloth" else []
        hidden = down_product.add_to(None, None, grad, buffered=True)
        again_gated: list[Tensor] = []  # a name of the function until it returns
        thin = [down_product.gradients(grad, again_gated)]
        thin += [product.gradients(grad, held) for product in (up_product, gate_product)]
        held.clear()
        total: Tensor | None = None
        if wants:
            into = saved[0] if style == "unsloth" else None
            total = up_product.add_to(None, into, grad)
            total = gate_product.add_to(total, None, grad)
        back = outside.gradient(grad)
        del hidden
        again_gated.clear()
        again.clear()
        made = [g for product, pair in zip(products, reversed(thin), strict=True)
                for g in product.arrived(pair)]  # fmt: skip
        return (total, *made, *back)

    ops.record([out], "LoRA MLP", [*inputs, *outside.inputs], apply)
    return out
