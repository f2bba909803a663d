"""The step played: segments of tape in order, and the largest moment among them.

A :class:`Program` is made once for a network and a way of training it. :meth:`Program.peak` plays
it for a micro batch and a sequence length; :meth:`Program.moment` says what is alive at the peak.
Both read the same events, so they give the same integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ftplan.memory.moments import WorstMoments
from ftplan.memory.record import BOUNDARY, Recording, Segment
from ftplan.memory.tape import BATCH, BLOCK_BYTES, SCORES, TOKENS, Label, Size, basis

__all__ = ["Alive", "Moment", "Phase", "Program", "Run", "rounded"]


NOTHING = Size((0,) * 7)


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
        self.virtual_tokens = 0
        """Learned tokens before each sequence."""
        self.sequences = 1
        """Sequences that go through the model for each of the micro batch."""
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

    def _point(self, micro: int, seq_len: int, chunk: int) -> tuple[int, ...]:
        chunk *= micro if self.chunked_by_sequence else 1
        return basis(micro * self.sequences, seq_len + self.virtual_tokens, chunk)

    def _bytes(self, micro: int, seq_len: int, chunk: int) -> list[int]:
        point = self._point(micro, seq_len, chunk)
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

    def births(self) -> int:
        """How many storages are made in a micro batch."""
        each = [sum(event > 0 for event in events) for events in self._events]
        return sum(each[run.segment] * run.times for p in self.phases for run in p.runs)

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
        point = self._point(micro, seq_len, chunk)
        return self._worst.at(point)

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
        alive: dict[Label, list[Any]] = {}
        for events, times in self._until(where):
            for event in events:
                storage = abs(event) - 1
                index = self._storage_size[storage]
                sign = times if event > 0 else -times
                entry = alive.setdefault(self._labels[storage], [0, NOTHING])
                entry[0] += table[index] * sign
                entry[1] = entry[1] + self._sizes[index] * sign
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


def per_sample(size: Size, sequences: int) -> Size:
    """A size as an expression in samples, where each is so many sequences."""
    batch = (BATCH, TOKENS, SCORES)
    return Size(
        value * sequences if any(unit[at] for unit in batch) else value
        for at, value in enumerate(size)
    )


def _final_labels(recording: Recording) -> list[Label]:
    """Storages that outlive forward are activations (or logits); the rest is temporary."""
    labels: list[Label] = []
    for number, label in enumerate(recording.tape.labels, start=1):
        named = (
            label.group in ("gradients", "logits", "recomputed", "gathered") or label == BOUNDARY
        )
        keep = named or number in recording.saved
        labels.append(label if keep else Label("temporary", label.name))
    return labels
