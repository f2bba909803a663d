"""ZeRO-3's live weights in the model at full depth.

Hooks have left marks on the tape (:mod:`hooks`). What lies between two marks is played as it was
recorded; at each mark :class:`Coordinator` says what comes alive and what is freed. Layers in which
the same happens share one segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from operator import attrgetter
from typing import Any, NamedTuple

from ftplan.dataclass import dataclass
from ftplan.dtypes import find_format
from ftplan.memory.coordinator import REUSE_ELEMENTS, Coordinator, Running, Weight
from ftplan.memory.fsdp import BUFFERS, Unit
from ftplan.memory.hooks import Hooks, Mark, View, Visit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ITEM_BYTES, Parameter, Phases, Product, Segment

__all__ = ["Gathering", "stored"]


def stored(parameter: Parameter) -> tuple[int, int]:
    """Elements of a weight as it is stored, and bytes of each: packed values are bytes."""
    if parameter.dtype.startswith(BUFFERS):
        return 0, 0
    if parameter.dtype in ITEM_BYTES:
        return parameter.numel, ITEM_BYTES[parameter.dtype]
    return find_format(parameter.dtype).storages(parameter.shape)[0], 1


@dataclass(slots=True)
class _Marked:
    """A segment's marks: where they are, what is done there, with what, and whether forward."""

    places: list[int] = field(default_factory=list)
    acts: list[Callable[[Coordinator, Any, bool], None]] = field(default_factory=list)
    of: list[Visit | View] = field(default_factory=list)
    """What each mark is about."""
    forward: list[bool] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    """Events that are no marks."""
    before: list[int] = field(default_factory=list)
    """How many of them come before each event of the segment."""


class _Part(NamedTuple):
    """A segment in the model at full depth, and the modules and weights of its marks."""

    segment: Segment
    marked: _Marked
    on: list[Any]


class Gathering:
    """The live weights of a step, put between what is on the tape."""

    def __init__(
        self, hooks: Hooks, spec: ShardingSpec, batches: int, trained: Gathering | None = None
    ) -> None:
        self._hooks = hooks
        self._tape = hooks.tape
        self._spec = spec
        self._batches = batches
        """Batches in a row that are played, of which the last one is shown."""
        self._trained = trained
        """The training that an evaluation interrupts."""
        self._trace: Sequence[Running] = []
        """In what order modules run in training, which an evaluation follows as far as it goes."""
        self._phases: Phases = []
        self._skipped = range(0)
        """Layers that are not played, because they are like those before and behind them."""
        self._weights: dict[object, Weight] = {}
        self._made: dict[int, tuple[int, int, int, bool, bool]] = {}
        """What weights are made of, by the parameter that was recorded for all of them."""
        self._running: dict[tuple[int, str], Running] = {}
        self._bare: dict[str, Running] = {}
        """Modules without weights of their own, whichever layer's."""
        self._known: dict[int, dict[Visit | View, Running | Weight]] = {}
        """By layer, what marks are about."""
        self._marked: dict[tuple[int, int], _Marked] = {}
        self._written: dict[object, Segment] = {}
        self._places = {
            id(p): n for unit in {id(v.unit): v.unit for v in hooks.visits}.values()
            for n, p in enumerate(unit.parameters)
        }  # fmt: skip
        self._owned = self._owners()

    def _owners(self) -> dict[Visit, list[Parameter]]:
        """Weights of modules that never run belong to the one around them, as in DeepSpeed."""
        owned: dict[Visit, list[Parameter]] = {}
        by_unit: dict[int, dict[str, Visit]] = {}
        for visit in self._hooks.visits:
            by_unit.setdefault(id(visit.unit), {})[visit.path] = visit
        for visits in by_unit.values():
            unit = visits[""].unit
            assert unit.module is not None
            for path, module in unit.module.named_modules():
                owner = _runner(visits, path)
                if owner is not None:
                    owned.setdefault(owner, []).extend(module.parameters.values())
        return owned

    def __call__(self, phases: Phases) -> Phases:
        """The phases with the births and deaths of weights in them.

        Of a deep model the middle is played once, where its layers turn out to be all alike.
        """
        self._phases = phases
        if self._trained is not None:
            self._follow(self._trained)
            return self._play(phases, range(0))
        self._skipped = _middle(phases, self._reach(phases))
        try:
            return self._play(phases, self._skipped)
        except _UnlikeError:
            return self._in_full()

    def _in_full(self) -> Phases:
        """Every layer is played."""
        self._skipped, self._trace = range(0), []
        return self._play(self._phases, self._skipped)

    def _follow(self, trained: Gathering) -> None:
        """Modules in the order of training, with those of layers that were not played there."""
        if trained._skipped:
            trained._skipped, trained._trace = range(0), []
            trained._place(trained._phases, trained._skipped)
        self._trace = trained._trace
        self._weights, self._running = trained._weights, trained._running

    def _reach(self, phases: Phases) -> int:
        """Over how many layers what happens in one may reach."""
        first = next((part for _, parts in phases for part in parts if part.layer == 0), None)
        if first is None:
            return 0
        self._placed(first)
        layer = sum(w.numel for key, w in self._weights.items() if isinstance(key, tuple))
        reach = REUSE_ELEMENTS + self._spec.max_live_elements + self._spec.prefetch_elements
        return -(-reach // max(1, layer)) + 3

    def _place(self, phases: Phases, skipped: range) -> list[tuple[str, list[_Part]]]:
        """What is played, with its modules; the first such sequence is the trace."""
        short = [(name, [p for p in parts if p.layer not in skipped]) for name, parts in phases]
        placed = [(name, [self._placed(part) for part in parts]) for name, parts in short]
        self._trace = self._trace or [
            on for _, parts in placed for part in parts
            for act, on in zip(part.marked.acts, part.on, strict=True) if act is Coordinator.fetch
        ]  # fmt: skip
        return placed

    def _play(self, phases: Phases, skipped: range) -> Phases:
        placed = self._place(phases, skipped)
        coordinator = Coordinator(self._tape, self._spec, self._trace)
        coordinator.gather_small()
        for _ in range(self._batches - 1):
            self._pass(coordinator, placed)
        alive = list(coordinator.alive.elements())
        coordinator.events = []
        played = self._pass(coordinator, placed)
        stays = self._small_of(skipped, coordinator)
        if skipped:
            played = [
                (name, _widened(whole, shorter, skipped))
                for (name, whole), (_, shorter) in zip(phases, played, strict=True)
            ]
        played[0][1].insert(0, self._write([*alive, *stays]))
        gone = [*coordinator.events, *(-number for number in coordinator.alive.elements())]
        played[-1][1].append(self._write([*gone, *(-number for number in stays)]))
        return played

    def _small_of(self, skipped: range, coordinator: Coordinator) -> list[int]:
        """What stays of the layers that are not played: as much as of one before them."""
        return [
            coordinator.number(w.size) for key, w in self._weights.items()
            if isinstance(key, tuple) and key[0] == skipped.start - 1 and w.stays
        ] * len(skipped)  # fmt: skip

    def _pass(
        self, coordinator: Coordinator, placed: Sequence[tuple[str, Sequence[_Part]]]
    ) -> Phases:
        coordinator.reset()
        played: Phases = []
        for name, parts in placed:
            coordinator.in_backward = name == "backward"
            played.append((name, [self._run(coordinator, part) for part in parts]))
        coordinator.leftovers()
        return played

    def _run(self, coordinator: Coordinator, part: _Part) -> Segment:
        marked = part.marked
        if not marked.places:
            return part.segment
        changes: list[tuple[int, tuple[int, ...]]] = []
        for place, act, on, forward in zip(
            marked.places, marked.acts, part.on, marked.forward, strict=True
        ):
            act(coordinator, on, forward)
            if coordinator.events:
                changes.append((place, tuple(coordinator.events)))
                coordinator.events = []
        return self._changed(part.segment, marked, changes)

    def _write(self, events: Iterable[int]) -> Segment:
        start = len(self._tape.events)
        self._tape.events += events
        return Segment("live weights", start, len(self._tape.events))

    def _changed(
        self, part: Segment, marked: _Marked, changes: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Segment:
        """The segment without its marks, with other events in their places."""
        key = (part.start, part.stop, tuple(changes))
        if key not in self._written:
            made: list[int] = []
            done = 0
            for place, events in changes:
                stop = marked.before[place - part.start]
                made += marked.others[done:stop]
                made += events
                done = stop
            segment = self._write([*made, *marked.others[done:]])
            for product in self._products_of(part):
                moved = marked.before[product.event - part.start]
                moved += sum(len(events) for place, events in changes if place < product.event)
                self._tape.products.append(product._replace(event=segment.start + moved))
            self._written[key] = Segment(part.name, segment.start, segment.stop)
        return self._written[key]

    def _products_of(self, part: Segment) -> list[Product]:
        """What is computed in a segment: later events have later products."""
        products, event = self._tape.products, attrgetter("event")
        start, stop = (bisect_left(products, at, key=event) for at in (part.start, part.stop))
        return products[start:stop]

    def _placed(self, part: Segment) -> _Part:
        key, layer = (part.start, part.stop), part.layer
        if key not in self._marked:
            self._marked[key] = self._marks_of(part)
        marked, known = self._marked[key], self._known.setdefault(layer, {})
        for of in marked.of:
            if of not in known:
                known[of] = (
                    self._weight(of.unit, of.parameter, layer)
                    if isinstance(of, View) else self._run_of(of, layer)
                )  # fmt: skip
        return _Part(part, marked, [known[of] for of in marked.of])

    def _marks_of(self, part: Segment) -> _Marked:
        found, marks = _Marked(), self._hooks.marks
        for place in range(part.start, part.stop):
            event = self._tape.events[place]
            mark = marks.get(abs(event))
            found.before.append(len(found.others))
            if mark is None:
                found.others.append(event)
                continue
            act: Callable[[Coordinator, Any, bool], None]
            if isinstance(mark, View):
                act = Coordinator.keep if event > 0 else Coordinator.let_go
            elif event > 0:
                act = Coordinator.fetch if mark.fetches else Coordinator.release
            else:
                continue
            found.places.append(place)
            found.acts.append(act)
            found.of.append(mark if isinstance(mark, View) else mark.visit)
            found.forward.append(isinstance(mark, Mark) and mark.forward)
        return found

    def _run_of(self, visit: Visit, layer: int) -> Running:
        """The module of a layer: blocks that are alike were recorded once."""
        unit, owned = visit.unit, [*self._owned.get(visit, ()), *visit.looks_at]
        if not owned:
            if visit.path not in self._bare:
                self._bare[visit.path] = Running([])
            return self._bare[visit.path]
        key = (layer if _in_layer(unit, layer) else id(owned[0]), visit.path)
        running = self._running.get(key)
        if running is None:
            weights = [self._weight(unit, p, layer) for p in self._owned.get(visit, ())]
            weights += [w for p in visit.looks_at if not (w := self._weight(unit, p, layer)).stays]
            running = self._running[key] = Running([w for w in weights if w.numel])
        return running

    def _weight(self, unit: Unit, parameter: Parameter, layer: int) -> Weight:
        key: object = id(parameter)
        if _in_layer(unit, layer):
            key = (layer, self._places[id(parameter)])
        if key not in self._weights:
            if id(parameter) not in self._made:
                self._made[id(parameter)] = self._measured(parameter)
            self._weights[key] = Weight(*self._made[id(parameter)])
        return self._weights[key]

    def _measured(self, parameter: Parameter) -> tuple[int, int, int, bool, bool]:
        """Elements, bytes and what else a weight is made of."""
        numel, item = stored(parameter)
        part = -(-numel // self._spec.shard_ranks) * item
        stays = numel <= self._spec.persistence_elements
        waits = self._spec.offload in ("params", "nvme") and not stays
        whole = part * self._spec.shard_ranks
        return numel, whole, part if waits else 0, stays, not parameter.trainable


class _UnlikeError(Exception):
    """Layers that were taken to be alike are not."""


def _middle(phases: Phases, reach: int) -> range:
    """Layers that are recorded as one, but for so many on either side of them."""
    runs: list[dict[int, tuple[int, int]]] = []
    for _, parts in phases:
        runs.append({part.layer: (part.start, part.stop) for part in parts if part.layer >= 0})
    depth = max((max(run, default=-1) for run in runs), default=-1) + 1
    same = [
        layer for layer in range(1, depth)
        if all(run.get(layer) == run.get(layer - 1) for run in runs)
    ]  # fmt: skip
    start, stop = depth, depth
    while stop > 1 and stop - 1 not in same:
        stop -= 1
    start = stop
    while start - 1 in same:
        start -= 1
    return range(start + reach, max(start + reach, stop - reach))


def _widened(whole: Sequence[Segment], played: Sequence[Segment], skipped: range) -> list[Segment]:
    """What was played of a phase, with the skipped layers like the one before them."""
    shorter = [part for part in whole if part.layer not in skipped]
    made = {part.layer: out for part, out in zip(shorter, played, strict=True)}
    around = range(skipped.start - 2, skipped.stop + 2)
    alike = {(made[n].start, made[n].stop) for n in around if n in made}
    if len(alike) > 1:
        raise _UnlikeError
    rest = iter(played)
    return [
        made[skipped.start - 1] if part.layer in skipped else next(rest) for part in whole
    ]  # fmt: skip


def _in_layer(unit: Unit, layer: int) -> bool:
    """Whether a unit stands for others too: blocks that are alike were recorded once."""
    return unit.name == "block" and layer >= 0


def _runner(visits: dict[str, Visit], path: str) -> Visit | None:
    """The nearest module at ``path`` or around it that has run."""
    while True:
        visit = visits.get(path)
        if visit is not None and visit.called:
            return visit
        if not path:
            return None
        path = path.rpartition(".")[0]
