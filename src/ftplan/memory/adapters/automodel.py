"""NeMo AutoModel's LoRA: autograd functions that keep an input and make the thin product again.

Source: nemo_automodel 0.7.0, components/_peft/lora.py (``LoRATritonFunction``) and lora_mlp.py
(``LoRASwiGLUMLPFunction``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.memory import ops
from ftplan.memory.adapters.functions import LoraLike
from ftplan.memory.tape import ONE, Grads, Parameter, Tensor

__all__ = ["automodel_gated", "automodel_product"]


def automodel_product(x: Tensor, layer: LoraLike, result: Tensor) -> Tensor:
    """``result + s (x A) B``, added where the product lies; with dropout that is after it."""
    drops = layer.dropout > 0 and x.tape.env.training
    if not drops:
        return _product(x, layer, result)
    dropped = ops.dropout(_product(x, layer, None), layer.dropout)
    return ops.add_(dropped, result)


def _product(x: Tensor, layer: LoraLike, result: Tensor | None) -> Tensor:
    tape, parameters = x.tape, layer.thin
    rank, (width, _) = parameters[0].shape[0], parameters[1].shape
    dtype = x.dtype if result is None else result.dtype
    with tape.no_grad():
        thin = _thin(x, parameters[0], dtype, scaled=True)
        out = tape.tensor(x.rows, width, dtype, "wide product")
        del thin
    _count(x, parameters)
    kept = [x.alias()]
    rows, inner, wanted = x.rows, x.width, (x.requires_grad, result is not None)
    inputs = [x, *(tape.leaf(p) for p in parameters)]

    def apply(grad: Tensor) -> Grads:
        _kept = kept
        _count(grad, parameters, times=3)
        down = grad.tape.tensor(rows, rank, dtype, "thin product")
        made = grad.tape.tensor(rows, inner, dtype, "gradient") if wanted[0] else None
        grads = [_like(grad, parameters[0], dtype)]
        again = grad.tape.tensor(rows, rank, dtype, "thin product")
        grads.append(_like(grad, parameters[1], dtype))
        del down, again
        return (made, *grads, *([grad.alias()] if wanted[1] else []))

    ops.record([out], "LoRA", inputs if result is None else [*inputs, result], apply)
    return out


def _thin(x: Tensor, down: Parameter, dtype: str, *, scaled: bool = False) -> Tensor:
    """``x A``; ``scaled`` is another tensor."""
    made = x.tape.tensor(x.rows, down.shape[0], dtype, "thin product")
    return x.tape.tensor(x.rows, down.shape[0], dtype, "thin product") if scaled else made


def _like(grad: Tensor, parameter: Parameter, dtype: str) -> Tensor:
    """A thin matrix's gradient, handed back in the matrix's own dtype."""
    rows, width = parameter.shape
    return ops.to(grad.tape.tensor(ONE * rows, width, dtype, "gradient"), parameter.dtype)


def _count(x: Tensor, parameters: Sequence[Parameter], *, times: int = 1) -> None:
    for parameter in parameters:
        x.tape.multiply(x.rows, parameter.shape[1], parameter.shape[0], times=times)


def automodel_gated(x: Tensor, layers: tuple[LoraLike, LoraLike, LoraLike]) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, of which the input, gate and up are kept.

    The way back makes the gated product where its gradient is, and the gradients of gate and up
    where those are.
    """
    tape, dtype = x.tape, x.dtype
    gate, up, down = layers
    inner, width = gate.thin[1].shape[0], down.thin[1].shape[0]
    parameters = [p for layer in layers for p in layer.thin]
    with tape.no_grad():
        wide = [_built(x, layer, inner) for layer in (gate, up)]
        hidden = tape.tensor(x.rows, inner, dtype, "gated")
        out = _built(hidden, down, width)
        del hidden
    kept = [x.alias(), *wide]
    wide.clear()
    rows, entering, wanted = x.rows, x.width, x.requires_grad

    def apply(grad: Tensor) -> Grads:
        tape, _kept = grad.tape, kept
        _count(grad, parameters, times=3)
        held = [tape.tensor(rows, down.thin[0].shape[0], dtype, "thin product")]
        product = tape.tensor(rows, inner, dtype, "product")
        hidden = tape.tensor(rows, inner, dtype, "gradient of gated")
        del product
        thin: list[Tensor] = []
        for layer in (down, up, gate):
            held.append(tape.tensor(rows, layer.thin[0].shape[0], dtype, "thin product"))
            if layer is not down:
                held.append(tape.tensor(rows, layer.thin[0].shape[0], dtype, "thin product"))
            thin = [_like(grad, p, dtype) for p in layer.thin] + thin
        made = None
        if wanted:
            for layer in layers:
                tape.multiply(rows, layer.base_layer.out_features, layer.base_layer.in_features)
            product = tape.tensor(rows, entering, dtype, "product")
            made = tape.tensor(rows, entering, dtype, "gradient")
            del product
        del hidden
        order = thin[:2], thin[2:4], thin[4:]
        return (made, *(g for pair in order for g in pair))

    ops.record([out], "LoRA MLP", [x, *(tape.leaf(p) for p in parameters)], apply)
    return out


def _built(x: Tensor, layer: LoraLike, width: int) -> Tensor:
    """A projection with its update added in place."""
    tape = x.tape
    tape.multiply(x.rows, x.width, width)
    _count(x, layer.thin)
    out = tape.tensor(x.rows, width, x.dtype, "linear")
    thin = _thin(x, layer.thin[0], x.dtype, scaled=True)
    del thin
    return out
