"""The key-value cache: what each layer keeps of every token that has passed.

A key and a value of every key-value head; a layer with a sliding window keeps the window at most; a
layer of latent attention keeps the latent and the rotated part of the key (DeepSeek-V2, arXiv
2405.04434, section 2.1). Layers without attention keep a state that does not grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.dtypes import Format
from ftplan.errors import UnsupportedError
from ftplan.memory.attention import Heads
from ftplan.memory.nn import Module, Network
from ftplan.memory.optimizer import rounded

__all__ = ["CacheLayer", "cache_bytes", "cache_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """What one layer keeps per token, in values, and for how many tokens at most."""

    kind: str
    values: int
    window: int | None
    state: int = 0
    """Values a sequence, whatever its length: a scan's state and a convolution's last inputs."""


def _window(config: Mapping[str, Any], layer: int) -> int | None:
    window = config.get("sliding_window") or config.get("attention_window_size")
    kinds = config.get("layer_types")
    if not window:
        return None
    if kinds:
        sliding = layer < len(kinds) and kinds[layer] in ("sliding_attention", "chunked_attention")
        return int(window) if sliding else None
    if config.get("use_sliding_window") is False:
        return None
    every = config.get("sliding_window_pattern")
    if every:
        return int(window) if (layer + 1) % every else None
    if config.get("model_type") == "gemma2":
        return int(window) if not (layer + 1) % 2 else None
    return int(window)


def _attention(block: Module) -> Module | None:
    for _, module in block.named_modules():
        if isinstance(getattr(module, "heads", None), Heads):
            return module
    return None


def _state(block: Module) -> int:
    """Values of the states of a block: what a convolution and a scan carry from token to token."""
    total = 0
    for name, module in block.named_modules():
        total += int(getattr(module, "state_values", 0))
        if name.rpartition(".")[2] == "conv1d":
            total += module.parameters["weight"].numel
    return total


def cache_layers(network: Network, config: Mapping[str, Any]) -> list[CacheLayer]:
    """What each layer of the decoder keeps."""
    stack = network.stages[-1].stack
    layers: list[CacheLayer] = []
    for layer, kind in enumerate(stack.pattern):
        block = stack.kinds[kind]
        attention, state = _attention(block), _state(block)
        if attention is None:
            layers.append(CacheLayer(kind="state", values=0, window=None, state=state))
            continue
        heads: Heads = attention.heads  # type: ignore[attr-defined]
        if not heads.causal:
            raise UnsupportedError("a key-value cache of an encoder", remedy="size its training")
        rank = getattr(attention, "rank", None)
        if rank:
            turned = getattr(attention, "turned", 0)
            layers.append(CacheLayer(kind="latent", values=rank + turned, window=None))
            continue
        values = heads.kv_count * (heads.size + heads.value_size)
        window = _window(config, layer)
        name = "sliding window" if window else "full"
        layers.append(CacheLayer(kind=name, values=values, window=window, state=state))
    return layers


def cache_bytes(layers: list[CacheLayer], storage: Format, concurrency: int, context: int) -> int:
    """Bytes of the cache of ``concurrency`` sequences of ``context`` tokens."""
    total = 0
    for layer in layers:
        tokens = min(context, layer.window or context) * concurrency
        total += rounded(storage.bytes_for((tokens, layer.values))) if layer.values else 0
        total += rounded(storage.bytes_for((concurrency, layer.state))) if layer.state else 0
    return total
