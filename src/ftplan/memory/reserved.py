"""What the caching allocator holds after some steps of a job: ``max_memory_reserved``.

The step's tensors are handed to :class:`ftplan.memory.allocator.Allocator` in the order in which
they are made, over two steps: optimizer states come to life at the end of the first, in the places
that it left. Batches of one length find the places of the batch before. Batches of differing
lengths do not: what was made for a shorter one is too small for a longer one and stays beside it,
so every new longest batch adds its largest tensors once more. A run of N batches sees about ln N
new longest ones; each leaves on average 1/e (by the geometric mean) to half (by the arithmetic
one) of the way to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ftplan.memory.allocator import Allocator, Block, OutOfSegmentsError, play
from ftplan.memory.estimate import Structure
from ftplan.memory.lengths import Lengths
from ftplan.memory.replay import Program, rounded
from ftplan.report import Interval

__all__ = ["reserved"]

GOLDEN = 0.6180339887498949
FEW, MANY = (math.e, 5), (2.0, 10)
"""How the gap to the longest batch shrinks, and how often, before it comes: a run of about 150
batches, and one of about 1,000 that approaches it slowly."""
EVENTS, BRIEF = 3000, 0
"""About how many births and deaths a step is played in: one length, and many of them."""
PRIMED = 3
"""Batches before the optimizer's first step, where lengths vary."""


def reserved(
    structure: Structure,
    micro: int,
    seq_len: int,
    chunk: int = 0,
    *,
    workspace: int = 0,
    capacity: int | None = None,
    lengths: Lengths | None = None,
) -> Interval:
    """The most that a job reserves on a card of ``capacity`` bytes (None: without end).

    Low: every batch has the same length. Expected and high: the same, but where ``lengths`` of
    samples up to ``seq_len`` differ: a run of some hundred batches, and of a thousand.
    ``workspace``: cuBLAS's, in bytes.
    """

    def most(shares: Sequence[float]) -> int:
        batches = [lengths.at(share, seq_len, micro) if lengths else seq_len for share in shares]
        try:
            return _Run(structure, micro, chunk, workspace, capacity).peak(batches)
        except OutOfSegmentsError:
            return _Run(structure, micro, chunk, workspace, None).peak(batches)

    fixed = most([1.0, 1.0])
    if lengths is None:
        return Interval(low=fixed, expected=fixed, high=fixed)
    few, many = (max(fixed, most(_records(*pace))) for pace in (FEW, MANY))
    return Interval(low=fixed, expected=few, high=max(few, many))


def _records(base: float, count: int) -> list[float]:
    """Shares at which new longest batches come, one shorter after each, the longest last."""
    place, shares = GOLDEN, []
    for number in range(1, count + 1):
        record = 1 - base**-number
        place = (place + GOLDEN) % 1
        shares += [record, record * place]
    return [*shares, 1.0, place, 1.0]


class _Run:
    """Some steps of a job on an allocator of its own."""

    def __init__(
        self, structure: Structure, micro: int, chunk: int, workspace: int, capacity: int | None
    ) -> None:
        self._structure = structure
        self._micro = micro
        self._chunk = chunk
        self._outside = 0
        self._allocator = Allocator(capacity)
        self._temporaries = _temporaries(structure)
        self._events = EVENTS
        self._place(lambda name: not name.startswith(("optimizer/", "gradients/")))
        if workspace:
            self._allocator.place([workspace // 2] * 2)

    def _place(self, chosen: Callable[[str], bool]) -> None:
        for term in self._structure.static:
            if not chosen(term.name):
                continue
            if term.name == "runtime/sampler":  # an engine's own, beside PyTorch's allocator
                self._outside += term.bytes
                continue
            self._allocator.place(term.sizes())

    def peak(self, batches: Sequence[int]) -> int:
        """The most reserved over batches of these lengths, and what runs besides training."""
        structure, allocator = self._structure, self._allocator
        varied = len(batches) > 2
        first = PRIMED if varied else 1
        self._events = BRIEF if varied else EVENTS
        for number, length in enumerate(batches):
            self._batch(structure.program, self._micro, length)
            if number + 1 == first:
                self._place(lambda name: name.startswith("optimizer/"))
                self._place(lambda name: name.startswith("gradients/"))
            if number + 1 >= first:
                self._step()
        if structure.evaluation is not None:
            self._batch(structure.evaluation, structure.eval_micro, max(batches))
        return allocator.peak_bytes + self._outside

    def _batch(self, program: Program, micro: int, seq_len: int) -> None:
        script = program.script(self._events)
        held: list[Block | int | None] = [None] * len(script.slots)
        sizes = program.sizes_at(micro, seq_len, self._chunk)
        play(self._allocator, script.events, script.slots, sizes, held)
        for slot in script.left:
            block = held[slot]
            if block is not None:
                self._allocator.release(block)

    def _step(self) -> None:
        """Temporaries of the optimizer: as many as there are at once, each by itself."""
        allocator = self._allocator
        held = [allocator.allocate(size) for size in self._temporaries]
        for block in held:
            allocator.release(block)


def _temporaries(structure: Structure) -> list[int]:
    """The step's temporaries as tensors: of every weight at once, or two of the largest."""
    total = structure.step_bytes
    sizes = [p.numel for p, times, _ in structure.learned for _ in range(times)]
    if not total or not sizes:
        return []
    if total <= 2 * 4 * max(sizes):
        return [rounded(total // 2)] * 2
    whole = sum(sizes)
    return [rounded(total * size // whole) for size in sizes]
