"""Adapters: which modules they wrap, what they add, and how they run (peft's own rules)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Embedding, Linear, Module, Network
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.tape import TOKENS, Parameter, Size, Tape, Tensor

__all__ = ["adapt", "matches", "rank_of"]

ATTENTION = ("attn", "attention", "self_attn", "self_attention", "SelfAttention")


class Named(Module):
    """peft keeps one matrix per adapter name; ours is ``default``."""

    def __init__(self, matrix: Linear) -> None:
        super().__init__()
        self.default = matrix


class LoraLinear(Module):
    """``peft.tuners.lora.Linear``: the base matrix and two thin ones beside it."""

    def __init__(self, base: Linear | QuantizedLinear, spec: AdapterSpec, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = Named(_thin(base.in_features, rank, spec))
        self.lora_B = Named(_thin(rank, base.out_features, spec))
        self.quantized = isinstance(base, QuantizedLinear)
        self.dropout = spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized:
            return self._forward_quantized(x)
        result = self.base_layer.forward(x)
        dtype = result.dtype
        x = ops.to(x, self.lora_A.default.weight.dtype)
        result = ops.add(
            result,
            ops.scale(
                self.lora_B.default.forward(
                    self.lora_A.default.forward(ops.dropout(x, self.dropout))
                )
            ),
        )
        return ops.to(result, dtype)

    def _forward_quantized(self, x: Tensor) -> Tensor:
        """``peft.tuners.lora.bnb.Linear4bit``: the base's result is copied defensively."""
        result = ops.copy(self.base_layer.forward(x))
        converts = x.tape.env.autocast is None
        dtype = result.dtype
        if converts:
            x = ops.to(x, self.lora_A.default.weight.dtype)
        output = ops.scale(
            self.lora_B.default.forward(self.lora_A.default.forward(ops.dropout(x, self.dropout)))
        )
        if converts:
            output = ops.to(output, dtype)
        return ops.add(result, output)


def _thin(in_features: int, out_features: int, spec: AdapterSpec) -> Linear:
    matrix = Linear(in_features, out_features)
    matrix.weight.dtype = spec.dtype
    return matrix


class LoraEmbedding(Module):
    """``peft.tuners.lora.Embedding``."""

    def __init__(self, base: Embedding, spec: AdapterSpec, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        count, width = base.weight.shape
        self.lora_embedding_A = Module()
        self.lora_embedding_A.parameters["default"] = Parameter(
            "lora_A", (rank, count), spec.dtype, True
        )
        self.lora_embedding_B = Module()
        self.lora_embedding_B.parameters["default"] = Parameter(
            "lora_B", (width, rank), spec.dtype, True
        )

    @property
    def weight(self) -> Parameter:
        """The table below the adapter."""
        return self.base_layer.weight

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        result = self.base_layer.forward(tape, rows)
        down = tape.leaf(self.lora_embedding_A.parameters["default"])
        table = down.alias(down.rows * 0 + Size((down.width, 0, 0, 0, 0, 0, 0)), down.rows[0])
        table.requires_grad, table.node = down.requires_grad, down.node
        after = ops.embedding(tape, table, rows)
        up = tape.leaf(self.lora_embedding_B.parameters["default"])
        return ops.to(ops.add(result, ops.scale(ops.linear(after, up))), result.dtype)


def matches(name: str, targets: tuple[str, ...] | str) -> bool:
    """peft's rule: a string is a regular expression for the whole name, a list are endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def rank_of(name: str, spec: AdapterSpec) -> int:
    """The rank of one module: peft's ``rank_pattern`` by ending or regular expression."""
    for pattern, rank in spec.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return spec.rank


def _selected(name: str, module: Module, network: Network, spec: AdapterSpec) -> bool:
    linear = isinstance(module, Linear | QuantizedLinear)
    if spec.targets == "all-linear":
        return linear and name != network.head_name
    if spec.targets == "attention":
        return linear and any(part in ATTENTION for part in name.split("."))
    return (linear or isinstance(module, Embedding)) and matches(name, spec.targets)


def _wrap(parent: Module, path: str, module: Module, spec: AdapterSpec, name: str) -> None:
    rank = rank_of(name, spec)
    if spec.kind not in ("lora", "dora", "qlora"):
        raise UnsupportedError(f"the adapter {spec.kind!r}", remedy="use lora, dora or qlora")
    if isinstance(module, Embedding):
        parent.replace(path, LoraEmbedding(module, spec, rank))
    elif isinstance(module, Linear | QuantizedLinear):
        parent.replace(path, LoraLinear(module, spec, rank))


def _modules(network: Network) -> Iterator[tuple[Module, str, str, Module]]:
    """(root, path below it, full name, module) of everything an adapter may wrap."""
    for path, module in list(network.named_modules()):
        yield network, path, path, module
    for stage in network.stages:
        for kind, block in enumerate(stage.stack.kinds):
            layer = stage.stack.pattern.index(kind)
            for path, module in list(block.named_modules()):
                yield block, path, f"{stage.stack.name}.{layer}.{path}", module


def adapt(network: Network, spec: AdapterSpec) -> None:
    """Wrap every target. Raises UnsupportedError when nothing matches."""
    wrapped = 0
    for root, path, name, module in _modules(network):
        if _selected(name, module, network, spec):
            _wrap(root, path, module, spec, name)
            wrapped += 1
    if not wrapped:
        raise UnsupportedError(f"targets {spec.targets!r} that match no module of this model")
