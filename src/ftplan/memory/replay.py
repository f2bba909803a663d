"""The step played: segments of tape in order, and the largest moment among them.

A :class:`Program` is made once for a network and a way of training it. :meth:`Program.peak` plays
it for a micro batch and a sequence length; :meth:`Program.moment` says what is alive at the peak.
Both read the same events, so they give the same integer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.memory.moments import WorstMoments
from ftplan.memory.record import BOUNDARY, HANDED, Recording, Segment
from ftplan.memory.tape import (
    BATCH,
    BLOCK_BYTES,
    CHUNK,
    NOTHING,
    PART,
    SCORES,
    TOKENS,
    Label,
    Size,
    basis,
)

__all__ = ["Alive", "Moment", "Operations", "Phase", "Program", "Run", "Script", "rounded"]


def rounded(size: int) -> int:
    """Bytes as the caching allocator hands them out: whole blocks of 512."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Run:
    """A segment played ``times`` times in a row."""

    segment: int
    times: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the step: its segments in order."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """What of one label is alive: bytes, and the same as an expression in the batch."""

    bytes: int
    size: Size


@dataclass(frozen=True, slots=True)
class Moment:
    """The worst moment: how much is alive on top of what is static, and what it is."""

    phase: str
    peak_bytes: int
    alive: Mapping[Label, Alive]


@dataclass(frozen=True, slots=True)
class Script:
    """A step tensor by tensor: births (``n``) and deaths (``~n``) of numbered slots."""

    events: tuple[int, ...]
    slots: tuple[int, ...]
    """The size of each slot, by its number among the program's sizes."""
    left: tuple[int, ...]
    """Slots that are alive at the end."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating point operations of matrix products, as an expression in the batch."""

    phase: str
    kind: str
    """As in :class:`ftplan.memory.tape.Product`."""
    again: bool
    """Computed a second time."""
    size: Size


class Program:
    """The dynamic part of a step as a function of micro batch and sequence length."""

    def __init__(
        self, recording: Recording, phases: Sequence[tuple[str, Sequence[Segment]]]
    ) -> None:
        tape = recording.tape
        self._sizes: list[Size] = []
        self._labels = _final_labels(recording)
        index_of: dict[Size, int] = {}
        storage_size: list[int] = []
        for size in tape.sizes:
            if size not in index_of:
                index_of[size] = len(self._sizes)
                self._sizes.append(size)
            storage_size.append(index_of[size])
        self._events: list[tuple[int, ...]] = []
        """Per segment: the event's storage, negative where it dies (storages count from 1)."""
        self._steps: list[tuple[int, ...]] = []
        """Per segment: index into the table of signed sizes."""
        self._storage_size = storage_size
        self._worst: WorstMoments | None = None
        self._scripts: dict[int, Script] = {}
        self._products = tape.products
        self._chunks_played = tape.chunks_played
        self._parts = tape.env.sequence_parts
        self._spans: list[tuple[int, int]] = []
        """Per segment: its events on the tape."""
        self.gathered = recording.gathered
        """What ZeRO-3 gathers, where an evaluation goes on from there."""
        self.asks_count = tape.asks_count
        """Whether the record is another one for one sequence than for several."""
        self.virtual_tokens = 0
        """Learned tokens before each sequence."""
        self.sequences = 1
        """Sequences that go through the model for each of the micro batch."""
        self.turns = 1
        """Into how many parts a packed row is cut, that go through the model one after another."""
        self.completion = 0
        """Tokens of each sequence that the loss looks at; 0: all."""
        self.shifted = False
        """The loss drops the last position of each sequence before it cuts chunks."""
        self.chunked_by_sequence = False
        """A chunk of the loss is so many tokens of each sequence."""
        count = len(self._sizes)
        segments: dict[tuple[int, int], int] = {}
        self.phases: list[Phase] = []
        for name, parts in phases:
            runs: list[Run] = []
            for part in parts:
                key = (part.start, part.stop)
                if part.stop == part.start:
                    continue
                if key not in segments:
                    segments[key] = len(self._steps)
                    self._spans.append(key)
                    events = tuple(tape.events[part.start : part.stop])
                    self._events.append(events)
                    self._steps.append(
                        tuple(storage_size[abs(e) - 1] + (count if e < 0 else 0) for e in events)
                    )
                if runs and runs[-1].segment == segments[key]:
                    runs[-1] = Run(segments[key], runs[-1].times + 1)
                else:
                    runs.append(Run(segments[key], 1))
            self.phases.append(Phase(name, tuple(runs)))

    def point(self, micro: int, seq_len: int, chunk: int = 0) -> tuple[int, ...]:
        """The basis of sizes for a batch: a chunk is no more than the rows that are scored."""
        sequences, length = micro * self.sequences, -(-seq_len // self.turns) + self.virtual_tokens
        scored = self.completion or length - self.shifted
        chunk *= micro if self.chunked_by_sequence else 1
        return basis(sequences, length, min(chunk, sequences * scored), self._parts)

    def _bytes(self, micro: int, seq_len: int, chunk: int) -> list[int]:
        point = self.point(micro, seq_len, chunk)
        sizes = [rounded(size.at(point)) for size in self._sizes]
        return sizes + [-size for size in sizes]

    def levels(self, micro: int, seq_len: int, chunk: int = 0) -> tuple[list[tuple[str, int]], int]:
        """The most alive in each phase, and what is alive when the last one has ended, in bytes.

        Both come on top of what is static.
        """
        table = self._bytes(micro, seq_len, chunk)
        shapes: list[tuple[int, int]] = []
        for steps in self._steps:
            levels = list(accumulate(map(table.__getitem__, steps)))
            shapes.append((max(levels), levels[-1]))
        level = 0
        peaks: list[tuple[str, int]] = []
        for phase in self.phases:
            peak = level
            for run in phase.runs:
                top, net = shapes[run.segment]
                peak = max(peak, level + top, level + (run.times - 1) * net + top)
                level += run.times * net
            peaks.append((phase.name, peak))
        return peaks, level

    def script(self, events: int) -> Script:
        """The step as births and deaths one by one, in about so many ``events``.

        Of many blocks in a row the first ones and the last are played in full; of those between,
        what outlives them or was alive before: their other tensors find places that are there.
        """
        if events not in self._scripts:
            unrolled = _Unrolled(self._events, self._storage_size, self._labels)
            self._scripts[events] = unrolled.script(self.phases, self._in_full(events))
        return self._scripts[events]

    def _in_full(self, events: int) -> int:
        """How many blocks of a row can be played in full within ``events``."""
        runs = [(len(self._events[r.segment]), r.times) for p in self.phases for r in p.runs]
        deep = sum(size for size, times in runs if times > 1)
        rest = sum(size for size, times in runs if times == 1)
        return max(2, (events - rest) // max(1, deep) - 1)

    def sizes_at(self, micro: int, seq_len: int, chunk: int = 0) -> list[int]:
        """Bytes of each size of the script, in whole blocks."""
        return self._bytes(micro, seq_len, chunk)[: len(self._sizes)]

    def births(self) -> int:
        """How many storages are made in a micro batch."""
        each = [sum(event > 0 for event in events) for events in self._events]
        return sum(each[run.segment] * run.times for p in self.phases for run in p.runs)

    def born(self) -> Size:
        """Bytes of all storages that are made in a micro batch, those of every chunk of a loss."""
        each = [
            sum((self._sizes[self._storage_size[e - 1]] for e in events if e > 0), NOTHING)
            for events in self._events
        ]
        total = sum((each[r.segment] * r.times for p in self.phases for r in p.runs), NOTHING)
        if not self._chunks_played:
            return total
        every = total[6] // self._chunks_played
        return total + TOKENS * every + CHUNK * -total[6]

    def operations(self) -> list[Operations]:
        """What a micro batch computes. Raises LookupError where a product's size is not known."""
        starts = [product.event for product in self._products]
        each: list[dict[tuple[str, bool], Size]] = []
        for start, stop in self._spans:
            sums: dict[tuple[str, bool], Size] = {}
            for product in self._products[bisect_left(starts, start) : bisect_left(starts, stop)]:
                if product.each is None:
                    raise LookupError(product.name)
                key = (product.kind, product.again)
                sums[key] = sums.get(key, NOTHING) + product.rows * product.each
            each.append(sums)
        totals: dict[tuple[str, str, bool], Size] = {}
        for phase in self.phases:
            for run in phase.runs:
                for (kind, again), size in each[run.segment].items():
                    place = (phase.name, kind, again)
                    totals[place] = totals.get(place, NOTHING) + size * run.times
        return [Operations(*place, size) for place, size in totals.items()]

    def peak(self, micro: int, seq_len: int, chunk: int = 0) -> int:
        """The largest moment, in bytes on top of what is static."""
        return self.peak_and_rest(micro, seq_len, chunk)[0]

    def peak_and_rest(self, micro: int, seq_len: int, chunk: int = 0) -> tuple[int, int]:
        """The largest moment and what is alive at the end: the integers of :meth:`levels`.

        Only the moments that can be the worst are looked at; they are found at the first call.
        """
        if self._worst is None:
            runs = [(run.segment, run.times) for phase in self.phases for run in phase.runs]
            self._worst = WorstMoments(self._sizes, self._steps, runs)
        return self._worst.at(self.point(micro, seq_len, chunk))

    def moment(self, micro: int, seq_len: int, chunk: int = 0) -> Moment:
        """What is alive at the largest moment."""
        table = self._bytes(micro, seq_len, chunk)
        best, level = -1, 0
        where: tuple[int, int, int, int] = (0, 0, 0, 0)
        for number, phase in enumerate(self.phases):
            for position, run in enumerate(phase.runs):
                levels = list(accumulate(map(table.__getitem__, self._steps[run.segment])))
                top, net = max(levels), levels[-1]
                for repeat in {0, run.times - 1}:
                    if level + repeat * net + top > best:
                        best = level + repeat * net + top
                        where = (number, position, repeat, levels.index(top))
                level += run.times * net
        return Moment(self.phases[where[0]].name, best, self._alive_at(where, table))

    def rest(self, micro: int, seq_len: int, chunk: int = 0) -> dict[Label, Alive]:
        """What is alive when the last phase has ended: gradients, mostly."""
        table = self._bytes(micro, seq_len, chunk)
        last = len(self.phases) - 1
        final = len(self.phases[last].runs) - 1
        run = self.phases[last].runs[final]
        where = (last, final, run.times - 1, len(self._events[run.segment]) - 1)
        return self._alive_at(where, table)

    def _alive_at(self, where: tuple[int, int, int, int], table: list[int]) -> dict[Label, Alive]:
        copies = [0] * len(self._storage_size)
        for events, times in self._until(where):
            for event in events:
                copies[abs(event) - 1] += times if event > 0 else -times
        alive: dict[Label, list[Any]] = {}
        for storage, times in enumerate(copies):
            if times:
                index = self._storage_size[storage]
                entry = alive.setdefault(self._labels[storage], [0, NOTHING])
                entry[0] += table[index] * times
                entry[1] = entry[1] + self._sizes[index] * times
        return {
            label: Alive(entry[0], per_sample(entry[1], self.sequences))
            for label, entry in alive.items()
            if entry[0]
        }

    def _until(self, where: tuple[int, int, int, int]) -> Iterator[tuple[tuple[int, ...], int]]:
        """Every segment that ran before the moment with its repeats, then the part of the last."""
        last_phase, last_run, repeat, event = where
        for number, phase in enumerate(self.phases[: last_phase + 1]):
            for position, run in enumerate(phase.runs):
                if (number, position) == (last_phase, last_run):
                    yield self._events[run.segment], repeat
                    yield self._events[run.segment][: event + 1], 1
                    return
                yield self._events[run.segment], run.times


class _Unrolled:
    """Segments unrolled: every tensor of a deep model has a slot of its own.

    A segment that is played for many blocks has one set of storages, so a death names what was
    born in the same place last; what came from another place (the block before) is the youngest
    of the same size, or of the same name: where blocks of several kinds alternate, one that is
    played for many gathers the weights of the block that it was recorded before.
    """

    def __init__(
        self, events: Sequence[tuple[int, ...]], sizes: Sequence[int], labels: Sequence[Label]
    ) -> None:
        self._events = events
        self._sizes = sizes
        self._labels = labels
        self._born = {event for segment in events for event in segment if event > 0}
        """What dies and was never born was there before: it is static, and stays in its place."""
        self._alive: dict[int, list[int]] = {}
        self._slots: list[int] = []
        self._played: list[int] = []

    def script(self, phases: Sequence[Phase], whole: int) -> Script:
        """All runs in order, the first ``whole`` blocks and the last in full; and what is left."""
        for phase in phases:
            for run in phase.runs:
                events = self._events[run.segment]
                lasting = _lasting(events)
                for number in range(run.times):
                    inner = whole <= number < run.times - 1
                    self._play(lasting if inner else events)
        left = [slot for slots in self._alive.values() for slot in slots]
        return Script(tuple(self._played), tuple(self._slots), tuple(left))

    def _play(self, events: Sequence[int]) -> None:
        alive, slots, played = self._alive, self._slots, self._played
        for event in events:
            if event > 0:
                slot = len(slots)
                if event in alive:
                    alive[event].append(slot)
                else:
                    alive[event] = [slot]
                played.append(slot)
                slots.append(self._sizes[event - 1])
            elif there := alive.get(-event):
                played.append(~there.pop())
            elif -event in self._born:
                played += [~slot for slot in self._another(-event)]

    def _another(self, storage: int) -> list[int]:
        """The slot that dies for one that was born elsewhere; none: it has died before."""
        size, label = self._sizes[storage - 1], self._labels[storage - 1]
        others = [(other, slots) for other, slots in self._alive.items() if slots]
        alike = [slots for _, slots in others if self._slots[slots[-1]] == size]
        alike = alike or [slots for other, slots in others if self._labels[other - 1] == label]
        slots = max(alike, key=lambda slots: slots[-1], default=[])
        return [slots.pop()] if slots else []


def _lasting(events: Sequence[int]) -> list[int]:
    """The events of a segment but for storages that come and go within it."""
    born = {event for event in events if event > 0}
    passing = {-event for event in events if -event in born}
    return [event for event in events if abs(event) not in passing]


def per_sample(size: Size, sequences: int) -> Size:
    """A size as an expression in samples, where each is so many sequences."""
    *once, _ = BATCH + TOKENS + SCORES + PART
    times = (*(sequences if grows else 1 for grows in once), sequences**2)
    return Size(map(mul, size, times))


def _final_labels(recording: Recording) -> list[Label]:
    """Storages that outlive forward are activations (or logits); the rest is temporary."""
    labels: list[Label] = []
    passing: dict[int, Label] = {}
    """By the identity of a label: few of them name many storages."""
    for number, label in enumerate(recording.tape.labels, start=1):
        if number in recording.saved:
            labels.append(label)
            continue
        if id(label) not in passing:
            named = label.group in ("gradients", "logits", "recomputed", "gathered")
            named = named or label in (BOUNDARY, HANDED)
            passing[id(label)] = label if named else Label("temporary", label.name)
        labels.append(passing[id(label)])
    return labels
