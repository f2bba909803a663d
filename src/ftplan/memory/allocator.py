"""PyTorch's caching allocator, played over a step: what is reserved, not only what is in use.

The allocator asks the driver for whole segments and keeps what is freed: 2 MiB for tensors up to
1 MiB, 20 MiB for those below 10 MiB, and the size rounded up to 2 MiB above. A request takes the
smallest free block that is large enough and leaves the rest, where that is more than 1 MiB, as a
block of its own; freed neighbours of one segment are joined, segments never are. When the driver
has no more, whole free segments go back to it (c10/cuda/CUDACachingAllocator.cpp: ``get_pool``,
``get_allocation_size``, ``should_split``, ``try_merge_blocks``, ``release_cached_blocks``; the
defaults of PYTORCH_CUDA_ALLOC_CONF).

Nothing here is measured: the sizes and the order of a step's tensors are the walk's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from ftplan.units import MIB

__all__ = ["Allocator", "Block", "OutOfSegmentsError"]

SMALL = MIB
"""Largest tensor of the small pool."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LEAST_OWN = 10 * MIB
"""Tensors from here on get a segment of their own size."""
ROUNDING = 2 * MIB


class OutOfSegmentsError(Exception):
    """The driver has no more, and nothing that is cached helps."""


class Block:
    """A run of bytes of one segment."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, size: int, address: int) -> None:
        self.size = size
        self.address = address
        """Of blocks of one size the lowest is taken."""
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


class Allocator:
    """One GPU's segments. ``capacity``: bytes that the driver has; None: no end to them."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.peak_bytes = 0
        """The most that was reserved."""
        self._large = 0
        self._small = 0
        self._small_segments = 0
        self._free: list[tuple[int, int, Block]] = []
        """By size, then by address."""
        self._next = 0

    @property
    def reserved_bytes(self) -> int:
        """What is reserved now."""
        return self._large + self._small_segments

    def place(self, sizes: Iterable[int]) -> None:
        """Tensors that stay for good, each by itself: weights as they are loaded."""
        for size in sizes:
            self.allocate(size)

    def allocate(self, size: int) -> Block | int:
        """A block for a tensor of ``size`` bytes; a small one is a number of bytes."""
        if size <= SMALL:
            self._small += size
            if self._small > self._small_segments:
                self._small_segments += SMALL_SEGMENT
                self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
            return size
        free = self._free
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._segment(size)
        rest = block.size - size
        if rest > SMALL:
            block.size = size
            self._split(block, rest)
        block.free = False
        return block

    def release(self, block: Block | int) -> None:
        """The tensor is gone; its block joins free neighbours."""
        if isinstance(block, int):
            self._small -= block
            return
        after = block.after
        if after is not None and after.free:
            self._take(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        before = block.before
        if before is not None and before.free:
            self._take(before)
            before.size += block.size
            before.after = block.after
            if block.after is not None:
                block.after.before = before
            block = before
        block.free = True
        insort(self._free, (block.size, block.address, block))

    def _segment(self, size: int) -> Block:
        whole = LARGE_SEGMENT if size < LEAST_OWN else -(-size // ROUNDING) * ROUNDING
        if self.capacity is not None and self.reserved_bytes + whole > self.capacity:
            self._give_back()
            if self.reserved_bytes + whole > self.capacity:
                raise OutOfSegmentsError
        self._large += whole
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        block = Block(whole, self._next)
        self._next += whole
        return block

    def _split(self, block: Block, rest: int) -> None:
        part = Block(rest, block.address + block.size)
        part.free = True
        part.before, part.after = block, block.after
        if block.after is not None:
            block.after.before = part
        block.after = part
        insort(self._free, (part.size, part.address, part))

    def _take(self, block: Block) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.address)))

    def _give_back(self) -> None:
        """Segments that are free as a whole return to the driver."""
        kept: list[tuple[int, int, Block]] = []
        for size, address, block in self._free:
            if block.before is None and block.after is None:
                self._large -= size
            else:
                kept.append((size, address, block))
        self._free = kept


def play(
    allocator: Allocator,
    script: Sequence[int],
    slots: Sequence[int],
    sizes: Sequence[int],
    held: list[Block | int | None],
) -> None:
    """Run a script's births (``n``) and deaths (``~n``) of its slots.

    ``slots`` gives each slot's number in ``sizes`` (bytes, in whole blocks of 512); ``held`` has
    room for every slot.
    """
    allocate, release = allocator.allocate, allocator.release
    for event in script:
        if event >= 0:
            size = sizes[slots[event]]
            held[event] = allocate(size) if size else None
        else:
            block = held[~event]
            if block is not None:
                release(block)
                held[~event] = None
