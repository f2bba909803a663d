"""Bytes that do not come and go with a batch, as terms: weights above all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from ftplan.dataclass import dataclass
from ftplan.dtypes import find_format
from ftplan.memory.optimizer import rounded
from ftplan.memory.tape import ITEM_BYTES, Parameter

__all__ = ["Counted", "StaticTerm", "weight_bytes", "weights_term"]

Counted = Sequence[tuple[Parameter, int, bool]]
"""Parameters, how many tensors each stands for, and whether it is in a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticTerm:
    """Bytes that are there at every moment of the step."""

    name: str
    bytes: int
    formula: str
    source: str
    tensors: tuple[tuple[int, int], ...] = ()
    """Bytes of a tensor and how many there are like it; empty: one tensor."""

    def sizes(self) -> Iterator[int]:
        """Bytes of each tensor, in order."""
        for size, times in self.tensors or ((self.bytes, 1),):
            yield from repeat(size, times)


def weight_bytes(parameter: Parameter) -> int:
    """Bytes of one weight as it is stored, each tensor rounded as the allocator does."""
    if parameter.dtype in ITEM_BYTES:
        return rounded(parameter.numel * ITEM_BYTES[parameter.dtype])
    storage = find_format(parameter.dtype)
    # what is sharded is the packed values: every rank has all of their scales (bitsandbytes'
    # Linear4bit keeps its quant_state beside the weight: fix_4bit_weight_quant_state_from_module)
    parts = (storage.storages(parameter.shape)[0], *storage.storages(parameter.whole)[1:])
    return sum(rounded(part) for part in parts)


def weights_term(counted: Counted, name: str, source: str) -> StaticTerm:
    """Weights as one term: how many there are of each dtype."""
    tensors = tuple((weight_bytes(parameter), times) for parameter, times, _ in counted)
    total = sum(size * times for size, times in tensors)
    by_dtype: dict[str, int] = {}
    for parameter, times, _ in counted:
        by_dtype[parameter.dtype] = by_dtype.get(parameter.dtype, 0) + parameter.numel * times
    parts = [f"{count:,} x {dtype}" for dtype, count in by_dtype.items()]
    formula = " + ".join(parts)
    return StaticTerm(name=name, bytes=total, formula=formula, source=source, tensors=tensors)
