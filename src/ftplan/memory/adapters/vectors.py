"""Adapters that learn vectors: IA3, VeRA, layer-norm tuning; and biases.

Source: peft 0.21.2, ``tuners/ia3``, ``tuners/vera``, ``tuners/ln_tuning``.
"""

from __future__ import annotations

import copy

from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named, learned
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import ONE, Parameter, Tensor

__all__ = ["Ia3Linear", "Projections", "VeraLinear", "train_biases", "trained_copy"]


class Ia3Linear(Adapted):
    """A factor for each output, or in feed-forward modules for each input."""

    def __init__(self, base: Linear, spec: AdapterSpec, *, feedforward: bool) -> None:
        super().__init__(base)
        self.feedforward = feedforward
        shape = (1, base.in_features) if feedforward else (base.out_features, 1)
        self.ia3_l = Named.of("ia3_l", shape, spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        parameter = self.ia3_l.parameters["default"]
        factor = x.tape.leaf(parameter)
        factor = ops.scale(ops.view(factor, ONE, parameter.numel))
        if self.feedforward:
            before = x.dtype
            x = ops.to(x, parameter.dtype)
            inner = ops.to(ops.mul(x, factor), before)
            return self.base_layer.forward(inner)
        result = self.base_layer.forward(x)
        return ops.to(ops.mul(result, factor), result.dtype)


class Projections(Module):
    """VeRA's two random matrices, as large as the largest adapted layer, shared by all.

    ``up``: the rank of the second one, where it differs (PVeRA).
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, dtype: str, *, up: int | None = None,
        prefix: str = "vera",
    ) -> None:  # fmt: skip
        super().__init__()
        shapes = {"A": (rank, in_features), "B": (out_features, rank if up is None else up)}
        for name, shape in shapes.items():
            matrix = learned(f"{prefix}_{name}", shape, dtype, trainable=False)
            setattr(self, f"{prefix}_{name}", matrix)


class VeraLinear(Adapted):
    """``b * (B (d * (A x)))``: the vectors b and d are learned, A and B are random."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int, shared: Projections) -> None:
        super().__init__(base)
        self.vera_lambda_b = Named.of("vera_lambda_b", (base.out_features,), spec.dtype)
        self.vera_lambda_d = Named.of("vera_lambda_d", (rank,), spec.dtype)
        self.dropout = spec.dropout
        object.__setattr__(self, "shared", shared)
        self.shared: Projections

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        before = x.dtype
        result = self.base_layer.forward(x)
        dtype = result.dtype
        if isinstance(self.base_layer, QuantizedLinear) and self.base_layer.four_bit:
            result = ops.copy(result)
        b = tape.leaf(self.vera_lambda_b.parameters["default"])
        d = tape.leaf(self.vera_lambda_d.parameters["default"])
        down = tape.leaf(self.shared.parameters["vera_A"]).alias(width=self.in_features)
        up = tape.leaf(self.shared.parameters["vera_B"]).alias(rows=ONE * self.out_features)
        x = ops.to(x, d.dtype)
        thin = ops.mul(d, ops.linear(ops.dropout(x, self.dropout), down))
        result = ops.add(result, ops.mul(b, ops.linear(thin, up)))
        return ops.to(ops.to(result, dtype), before)


def trained_copy(module: Module) -> Module:
    """A copy of a module that is trained in full beside the frozen original.

    ``ModulesToSaveWrapper`` and ``LNTuningLayer`` keep both, in the base's dtype.
    """
    twin = copy.deepcopy(module)
    for _, parameter in twin.named_parameters():
        parameter.trainable = True
        parameter.added = True
    twin.original_module = module
    return twin


def train_biases(parameters: dict[str, Parameter]) -> int:
    """BitFit: every bias is trained as it is, nothing is added. How many tensors."""
    found = 0
    for name, parameter in parameters.items():
        if name.rpartition(".")[2].endswith("bias"):
            parameter.trainable = True
            found += 1
    return found
