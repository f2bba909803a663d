"""One way of running a job on one card: which batches fit, and how far each goes.

The step is recorded once; every size is then asked of the record. Within one record the peak
never falls as the batch or the sequence grows, so the last size that fits is found by halving.
A record holds for sequence lengths on one side of the model's attention window, so there is one
for each side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, replace
from functools import partial
from itertools import pairwise

from ftplan.dataclass import dataclass
from ftplan.fit.time import Demand, Load
from ftplan.memory.counters import Counters, counters, workspace_bytes
from ftplan.memory.estimate import Structure, structure_of
from ftplan.memory.job import Job
from ftplan.memory.lengths import Lengths
from ftplan.memory.reserved import reserved
from ftplan.report import Verdict

__all__ = ["Records", "Room", "Sizer", "largest"]


GRAIN = 128
"""Kernels fill sequences up to multiples of at most so many tokens: a record holds for lengths that
leave the same remainder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The card a job has to fit."""

    usable_bytes: int
    """What a program may use, after headroom and what others hold; 0: no card is named."""
    capability: tuple[int, int] | None
    named: bool
    gpus: int
    traced: bool = True
    """The stack's modules are those that the walk was held against."""
    above: float = 0.0
    """By what share of all published readings of the stack lie above it."""
    lengths: Lengths | None = None
    """Of samples, where batches differ in them."""


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest n from 0 to ``most`` for which ``fits(n)``, for a property that, once lost, is
    not regained; 0 when not even 1 fits. Doubling, then halving: about 2 log2(n) calls."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True)
class Records:
    """What was recorded of one job: it holds on every card that is alike to the calculator."""

    structures: dict[tuple[int, int, bool], Structure] = field(default_factory=dict)
    """By side of the model's attention window, and for one sequence or several."""
    demands: dict[int, Demand] = field(default_factory=dict)
    """By the identity of their record, which lives as long."""


class Sizer:
    """Sizes of a job on a card. ``chunk`` says how many tokens one chunk of the loss holds.

    ``job_at`` makes the job for a batch where more than sizes depends on it (what is generated
    and scored in reinforcement finetuning): then every size gets a record of its own.
    ``records`` are those of the same job on another card.
    """

    def __init__(
        self,
        job: Job,
        room: Room,
        chunk: Callable[[int], int] | None = None,
        job_at: Callable[[int, int], Job] | None = None,
        records: Records | None = None,
    ) -> None:
        self.job = job
        self.room = room
        self._chunk = chunk
        self._job_at = job_at
        self._records = Records() if records is None else records
        self._single: dict[tuple[int, int], Structure] = {}
        self._edges = _windows(job.config)
        self.evaluated = 0
        """How many sizes were asked of a record."""

    def structure(self, seq_len: int, micro: int | None = None) -> Structure:
        """The record that holds for a sequence length, and for one sequence or for several."""
        side = sum(edge <= seq_len for edge in self._edges)
        alone = (self.job.micro if micro is None else micro) == 1
        key = side, seq_len % GRAIN, alone
        structures = self._records.structures
        if key not in structures:
            environment = replace(self.job.environment, seq_len=seq_len, one_sequence=alone)
            structures[key] = made = structure_of(replace(self.job, environment=environment))
            if not made.asks_count:
                structures[(*key[:2], not alone)] = made
        return structures[key]

    def record(self, micro: int, seq_len: int) -> Structure:
        """The record that holds for a batch."""
        if self._job_at is None:
            return self.structure(seq_len, micro)
        key = (micro, seq_len)
        if key not in self._single:
            self._single[key] = structure_of(self._job_at(micro, seq_len))
        return self._single[key]

    def load(self, micro: int, seq_len: int, accumulation: int | None = None) -> Load:
        """What one of a step's micro batches asks of the card."""
        record = self.record(micro, seq_len)
        demands = self._records.demands
        if id(record) not in demands:
            demands[id(record)] = Demand(record, self.job)
        steps = self.job.accumulation if accumulation is None else accumulation
        return demands[id(record)].at(micro, seq_len, self.chunk(micro, seq_len), steps)

    def chunk(self, micro: int, seq_len: int) -> int:
        """Tokens of one chunk of the loss; 0: it is not chunked."""
        return self._chunk(micro * seq_len) if self._chunk else self.job.loss_chunk

    def peak(self, micro: int, seq_len: int) -> int:
        """Worst moment of the walk, in bytes."""
        self.evaluated += 1
        record = self.record(micro, seq_len)
        return record.peak(micro, seq_len, self.chunk(micro, seq_len))

    def counters(self, micro: int, seq_len: int, *, played: bool = True) -> Counters:
        """What the three counters will show; not ``played``: what is needed alone, which decides
        whether it fits."""
        room = self.room
        record = self.record(micro, seq_len)
        held = None
        if played:
            held = reserved(
                record, micro, seq_len, self.chunk(micro, seq_len),
                workspace=workspace_bytes(room.capability) if room.named else 0,
                capacity=room.usable_bytes if room.named else None,
                lengths=room.lengths,
            )  # fmt: skip
        return counters(
            self.peak(micro, seq_len),
            record.static_bytes,
            capability=room.capability,
            named=room.named,
            gpus=room.gpus,
            communicators=self.job.sharding.communicators,
            traced=room.traced,
            above=room.above,
            held=held,
            usable_bytes=room.usable_bytes,
            uneven=record.uneven_bytes(micro, seq_len, self.chunk(micro, seq_len)),
            beside=record.beside_bytes,
        )

    def verdict(self, micro: int, seq_len: int) -> Verdict:
        """Whether it fits the card."""
        if self.fits(micro, seq_len):
            return "fits"
        device = self.counters(micro, seq_len).device
        return "tight" if device.expected <= self.room.usable_bytes else "over"

    def fits(self, micro: int, seq_len: int) -> bool:
        """Whether it fits the card for certain."""
        need = self.counters(micro, seq_len, played=False)
        return need.device.high <= self.room.usable_bytes

    def largest_micro(self, seq_len: int, *, most: int = 4096) -> int:
        """Most sequences at once that fit; 0: not even one does."""
        return largest(lambda micro: self.fits(micro, seq_len), most=most)

    def longest(self, micro: int, *, most: int) -> int:
        """Longest sequence that fits, in tokens: ``most``, or a multiple of :data:`GRAIN`, or less
        than that; 0: not even one token does."""
        if self.fits(micro, most):
            return most
        # Beyond a window the record is another one: each side is searched by itself, the
        # longest first.
        edges = {-(-edge // GRAIN) for edge in (1, *self._edges, most) if edge <= most}
        for start, stop in reversed(list(pairwise(sorted(edges)))):
            found = largest(partial(self._fits_from, micro, start), most=stop - start)
            if found:
                return (start + found - 1) * GRAIN
        return largest(partial(self.fits, micro), most=min(GRAIN, most) - 1)

    def _fits_from(self, micro: int, start: int, count: int) -> bool:
        return self.fits(micro, (start + count - 1) * GRAIN)


def _windows(config: Mapping[str, object]) -> list[int]:
    """Sequence lengths at which the masks of a model change."""
    edges: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            edges |= set(_windows(value))
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            if any(word in name for word in ("window", "chunk", "block_size", "topk")):
                edges.add(value)
        elif isinstance(value, list) and "window" in name:
            edges |= {item for item in value if isinstance(item, int) and item > 1}
    return sorted(edges)
