"""ZeRO-3's live weights in the model at full depth.

Hooks have left marks on the tape (:mod:`hooks`). What lies between two marks is played as it was
recorded; at each mark :class:`Coordinator` says what comes alive and what is freed. Layers in which
the same happens share one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftplan.dtypes import find_format
from ftplan.memory.coordinator import Coordinator, Running, Weight
from ftplan.memory.fsdp import BUFFERS, Unit
from ftplan.memory.hooks import Hooks, Mark, View, Visit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ITEM_BYTES, Parameter, Phases, Segment

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
    marks: list[Mark | View] = field(default_factory=list)
    forward: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
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
        self._trace: Sequence[Running] = trained._trace if trained else []
        """In what order modules run in training, which an evaluation follows as far as it goes."""
        self._weights: dict[object, Weight] = trained._weights if trained else {}
        self._running: dict[tuple[int, str], Running] = trained._running if trained else {}
        self._bare: dict[str, Running] = {}
        """Modules without weights of their own, whichever layer's."""
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
        """The phases with the births and deaths of weights in them."""
        placed = [(name, [self._placed(part) for part in parts]) for name, parts in phases]
        self._trace = self._trace or [
            on for _, parts in placed for part in parts
            for act, on in zip(part.marked.acts, part.on, strict=True) if act is Coordinator.fetch
        ]  # fmt: skip
        coordinator = Coordinator(self._tape, self._spec, self._trace)
        coordinator.gather_small()
        for _ in range(self._batches - 1):
            self._pass(coordinator, placed)
        alive = list(coordinator.alive.elements())
        coordinator.events = []
        played = self._pass(coordinator, placed)
        played[0][1].insert(0, self._write(alive))
        gone = [*coordinator.events, *(-number for number in coordinator.alive.elements())]
        played[-1][1].append(self._write(gone))
        return played

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
        return self._changed(part.segment, changes)

    def _write(self, events: Iterable[int]) -> Segment:
        start = len(self._tape.events)
        self._tape.events += events
        return Segment("live weights", start, len(self._tape.events))

    def _changed(self, part: Segment, changes: list[tuple[int, tuple[int, ...]]]) -> Segment:
        """The segment without its marks, with other events in their places."""
        key = (part.start, part.stop, tuple(changes))
        if key not in self._written:
            marks, tape, instead = self._hooks.marks, self._tape, dict(changes)
            made: list[int] = []
            moved: list[int] = []
            """Where each event of the segment is now."""
            for place in range(part.start, part.stop):
                moved.append(len(made))
                made += instead.get(place, ())
                if abs(tape.events[place]) not in marks:
                    made.append(tape.events[place])
            segment = self._write(made)
            tape.products += [
                product._replace(event=segment.start + moved[product.event - part.start])
                for product in tape.products
                if part.start <= product.event < part.stop
            ]
            self._written[key] = Segment(part.name, segment.start, segment.stop)
        return self._written[key]

    def _placed(self, part: Segment) -> _Part:
        key, layer = (part.start, part.stop), part.layer
        if key not in self._marked:
            self._marked[key] = self._marks_of(part)
        marked = self._marked[key]
        on = [
            self._weight(mark.unit, mark.parameter, layer)
            if isinstance(mark, View) else self._run_of(mark.visit, layer)
            for mark in marked.marks
        ]  # fmt: skip
        return _Part(part, marked, on)

    def _marks_of(self, part: Segment) -> _Marked:
        found, marks = _Marked(), self._hooks.marks
        for place in range(part.start, part.stop):
            event = self._tape.events[place]
            mark = marks.get(abs(event))
            act: Callable[[Coordinator, Any, bool], None]
            if isinstance(mark, View):
                act = Coordinator.keep if event > 0 else Coordinator.let_go
            elif mark is not None and event > 0:
                act = Coordinator.fetch if mark.fetches else Coordinator.release
            else:
                continue
            found.places.append(place)
            found.acts.append(act)
            found.marks.append(mark)
            found.forward.append(isinstance(mark, Mark) and mark.forward)
        return found

    def _run_of(self, visit: Visit, layer: int) -> Running:
        """The module of a layer: blocks that are alike were recorded once."""
        unit, owned = visit.unit, [*self._owned.get(visit, ()), *visit.looks_at]
        if not owned:
            return self._bare.setdefault(visit.path, Running([]))
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
            numel, item = stored(parameter)
            part = -(-numel // self._spec.shard_ranks) * item
            stays = numel <= self._spec.persistence_elements
            waits = self._spec.offload in ("params", "nvme") and not stays
            self._weights[key] = Weight(
                numel, part * self._spec.shard_ranks, part if waits else 0, stays,
                not parameter.trainable,
            )  # fmt: skip
        return self._weights[key]


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
