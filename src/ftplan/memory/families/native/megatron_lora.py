"""LoRA on Transformer Engine's layers (``LoraParallelLinear``): split as the layer is.

Of a column-parallel layer the first thin matrix is whole on every rank and sees the rank's tokens,
and the second is split by its outputs; of a row-parallel one it is the other way round. Experts
have a pair each, in grouped products. Both are bf16: ``Float16Module`` casts what PEFT made fp32.

Source: mcore-bridge 1.6.3 tuners/lora.py; ms-swift 3.9.0 swift/megatron/tuners/lora.py.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.families.native import te
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Module
from ftplan.memory.tape import Tensor

__all__ = ["OutputToSave", "adapted"]

_SPLIT: dict[te.Mode, tuple[te.Mode, te.Mode]] = {
    "column": ("duplicated", "column"),
    "row": ("row", "duplicated"),
    "grouped": ("grouped", "grouped"),
}
"""How the two thin matrices are split beside a layer that is split so."""
_NAMES = {
    "linear_qkv": {"query", "key", "value"}, "linear_proj": {"projection"},
    "linear_fc1": {"mlp"}, "linear_fc2": {"mlp"},
}  # fmt: skip


class LoraParallelLinear(Module):
    """``layer(x) + B A x scaling``."""

    def __init__(self, layer: te.Linear, spec: AdapterSpec) -> None:
        super().__init__()
        self.base_layer = layer
        self.dropout = spec.dropout
        count = layer.weight.shape[0] if layer.mode == "grouped" else 0
        sequence = layer.gathers or layer.scatters
        first, second = _SPLIT[layer.mode]
        self.lora_A = te.Linear(
            layer.in_features, spec.rank, first, sequence=sequence, experts=count
        )
        self.lora_B = te.Linear(
            spec.rank, layer.out_features, second, sequence=sequence, experts=count
        )
        for thin in (self.lora_A, self.lora_B):
            thin.weight.added = True

    def forward(self, x: Tensor) -> Tensor:
        layer = self.base_layer
        if isinstance(layer, te.LayerNormLinear):
            result, x = layer.normed(x, returned=True)
        else:
            result = layer.forward(x)
        lora_result = self.lora_A.forward(ops.dropout(x, self.dropout))
        lora_result = self.lora_B.forward(lora_result)
        lora_result = ops.scale(lora_result)
        return ops.add(result, lora_result)


class OutputToSave(Module):
    """A head that classifies under LoRA: a trained copy beside the first one."""

    def __init__(self, layer: Module) -> None:
        super().__init__()
        assert isinstance(layer, te.Linear)
        self.original_module = layer
        layer.weight.fixed = True
        self.modules_to_save = te.Linear(layer.in_features, layer.out_features, "duplicated")
        self.modules_to_save.weight.added = True

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save.forward(x)


def adapted(block: Module, spec: AdapterSpec, parts: frozenset[str]) -> None:
    """Put an adapter on the block's layers that a plan's targets name.

    Raises UnsupportedError where they name a part of a fused layer.
    """
    if "head" in parts:
        raise UnsupportedError(
            "an adapter on Megatron's output layer", remedy="leave lm_head out of method.targets"
        )
    for path, module in list(block.named_modules()):
        wanted = _NAMES.get(path.rpartition(".")[2])
        if wanted is None or not isinstance(module, te.Linear) or not wanted & parts:
            continue
        if not wanted <= parts:
            raise UnsupportedError(
                f"an adapter on {', '.join(sorted(wanted & parts))} alone: a part of {path}",
                remedy="name q_proj, k_proj and v_proj together",
            )
        block.replace(path, LoraParallelLinear(module, spec))
