"""Bottleneck adapters: a small network after attention and feed-forward (Houlsby), or after
feed-forward alone (Pfeiffer).

Source: the ``adapters`` library, ``configuration/adapter_config.py`` (``DoubleSeqBnConfig``,
``SeqBnConfig``: reduction factor 16, swish and relu) and ``methods/modeling.py`` (``Adapter``);
papers arXiv:1902.00751 and arXiv:2005.00247.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import thin
from ftplan.memory.experts import Experts
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module, Network, activation
from ftplan.memory.tape import Tensor

__all__ = ["add_bottlenecks"]

REDUCTION = 16
CROSS = ("encdec", "cross", "encoder_attn")
"""Attention to an encoder gets none."""


class Bottleneck(Module):
    """``x + up(act(down(x)))``, both with biases."""

    def __init__(self, width: int, spec: AdapterSpec) -> None:
        super().__init__()
        inner = spec.bottleneck or width // REDUCTION
        self.act = "silu" if spec.kind == "houlsby" else "relu"
        self.adapter_down = thin(width, inner, spec.dtype, bias=True)
        self.adapter_up = thin(inner, width, spec.dtype, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        down = self.adapter_down.forward(ops.to(x, self.adapter_down.weight.dtype))
        up = self.adapter_up.forward(activation(down, self.act))
        return ops.add(ops.to(up, x.dtype), x)


def add_bottlenecks(network: Network, spec: AdapterSpec) -> int:
    """Put bottlenecks after the last linear layer of attention and of feed-forward. How many."""
    count = 0
    for stage in network.stages:
        for block in stage.stack.kinds:
            for path in _outputs(block, both=spec.kind == "houlsby"):
                part = block.child(path)
                if isinstance(part, Linear):
                    block.replace(path, AfterLinear(part, Bottleneck(part.out_features, spec)))
                else:
                    block.replace(path, After(part, Bottleneck(_width(part), spec)))
                count += 1
    if not count:
        raise UnsupportedError(f"{spec.kind} on blocks without attention and feed-forward layers")
    return count


class After(Module):
    """A mixture of experts whose output passes through a bottleneck."""

    def __init__(self, part: Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.part = part
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck.forward(self.part.forward(x))


class AfterLinear(Linear):
    """A linear layer whose output passes through a bottleneck."""

    def __init__(self, base: Linear, bottleneck: Bottleneck) -> None:
        Module.__init__(self)
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.transposed = base.transposed
        object.__setattr__(self, "weight", base.weight)
        object.__setattr__(self, "bias", base.bias)
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck.forward(self.base_layer.forward(x))


def _outputs(block: Module, *, both: bool) -> list[str]:
    """Where self-attention (``both``) and the feed-forward part of a block end."""
    attention: list[str] = []
    rest: list[str] = []
    mixtures: list[str] = []
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            mixtures.append(path.rpartition(".")[0])
        name = path.lower()
        if not isinstance(module, Linear) or any(part in name for part in CROSS):
            continue
        (attention if "att" in name else rest).append(path)
    return [*(attention[-1:] if both else []), *(mixtures[:1] or rest[-1:])]


def _width(mixture: Module) -> int:
    return next(m.hidden for m in mixture.children.values() if isinstance(m, Experts))
