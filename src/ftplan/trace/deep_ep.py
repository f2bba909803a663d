"""axolotl's expert parallelism with DeepEP's kernels replaced by what they return.

The plugin's own forward runs (``_deep_ep_forward``, axolotl 0.19, with its default local kernel);
a dispatch returns as many rows as a balanced router sends, rounded up to whole ones a token, and
the handle that the combine needs. What the kernels hold by themselves is not seen.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import importlib.util
import sys
from math import ceil, comb
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ftplan.errors import UnsupportedError

__all__ = ["spread_by_deep_ep"]

KERNEL = "deep_ep_grouped_mm"
CHANNELS = 10
"""Of DeepEP's default configuration: half of 20 multiprocessors."""


def _plugin() -> Any:
    """The plugin's two modules, without the rest of axolotl, which is not imported."""
    found = importlib.util.find_spec("axolotl")
    if found is None or not found.submodule_search_locations:
        raise UnsupportedError(
            "tracing axolotl's expert parallelism without axolotl",
            remedy="pip install --no-deps axolotl==0.19.0",
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "integrations/expert_parallel"
    package = "axolotl_expert_parallel"
    if f"{package}.experts_fn" not in sys.modules:
        parent = sys.modules[package] = ModuleType(package)
        parent.__path__ = [str(folder)]
    return importlib.import_module(f"{package}.experts_fn")


class _Buffer:
    """DeepEP's ``Buffer`` for ``ranks``, of which each has ``here`` of ``whole`` experts."""

    def __init__(self, ranks: int, whole: int, here: int) -> None:
        self.ranks, self.whole, self.here = ranks, whole, here

    def get_dispatch_layout(self, index: Any, experts: int) -> tuple[Any, ...]:
        """Tokens for each rank and expert, and which go where."""
        goes = torch.empty((index.shape[0], self.ranks), dtype=torch.bool)
        return _counts(self.ranks), None, _counts(experts), goes, None

    def dispatch(self, x: Any, handle: Any = None, **layout: Any) -> tuple[Any, ...]:
        """Rows received: hidden states, experts, weights, and the handle; again by a handle."""
        width = x.shape[1]
        if handle is not None:
            rows = handle[3].shape[0]
            return torch.empty((rows, width), dtype=x.dtype), None, None, None, None, None
        tokens, top_k = layout["topk_idx"].shape
        elsewhere = comb(self.whole - self.here, top_k) / comb(self.whole, top_k)
        rows = tokens * ceil(self.ranks * (1 - elsewhere))
        made = (
            _counts(self.ranks, self.ranks), _counts(self.ranks, CHANNELS),
            _counts(self.ranks, CHANNELS), _counts(rows), layout["is_token_in_rank"],
            _counts(tokens, self.ranks),
        )  # fmt: skip
        index = torch.empty((rows, top_k), dtype=torch.int64)
        weights = torch.empty((rows, top_k), dtype=torch.float32)
        return torch.empty((rows, width), dtype=x.dtype), index, weights, None, made, None

    def combine(self, x: Any, handle: Any, topk_weights: Any = None, **_: Any) -> tuple[Any, ...]:
        """Sums for the rank's own tokens, and gradients of their weights."""
        tokens = handle[5].shape[0]
        weights = None
        if topk_weights is not None:
            weights = torch.empty((tokens, topk_weights.shape[1]), dtype=torch.float32)
        return torch.empty((tokens, x.shape[1]), dtype=x.dtype), weights, None


def _counts(*shape: int) -> Any:
    return torch.empty(shape, dtype=torch.int32)


def spread_by_deep_ep(mixtures: list[Any], ranks: int) -> None:
    """Cut every layer's experts, and let the plugin's forward run them."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    plugin = _plugin()
    for experts in mixtures:
        whole = experts.num_experts
        here = whole // ranks
        buffer = _Buffer(ranks, whole, here)
        plugin.get_buffer = lambda buffer=buffer: buffer
        experts.num_experts_global, experts.num_experts = whole, here
        experts.config._experts_implementation = KERNEL
        for name, weight in list(experts._parameters.items()):
            cut = torch.empty((here, *weight.shape[1:]), dtype=weight.dtype)
            experts._parameters[name] = torch.nn.Parameter(cut, requires_grad=weight.requires_grad)
    plugin.get_dispatch_config = plugin.get_combine_config = lambda: None
    plugin.barrier_ep = lambda: None
    ALL_EXPERTS_FUNCTIONS.register(KERNEL, plugin.deep_ep_grouped_mm_experts_forward)
