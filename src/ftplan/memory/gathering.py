"""ZeRO-3's live weights in the model at full depth.

Hooks have left marks on the tape (:mod:`hooks`). What lies between two marks is played as it was
recorded; at each mark :class:`Coordinator` says what comes alive and what is freed. Layers in which
the same happens share one segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from operator import attrgetter
from typing import Any, NamedTuple

from ftplan.dataclass import dataclass
from ftplan.dtypes import find_format
from ftplan.memory.coordinator import REUSE_ELEMENTS, Coordinator, Running, Weight
from ftplan.memory.fsdp import BUFFERS
from ftplan.memory.hooks import BESIDE, Hooks, Mark, View, Visit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ITEM_BYTES, Parameter, Phases, Product, Segment
from ftplan.memory.units import Unit

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
    engines: list[int] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)
    """Whether the model runs with its adapters off."""
    others: list[int] = field(default_factory=list)
    """Events that are no marks."""
    before: list[int] = field(default_factory=list)
    """How many of them come before each event of the segment."""

    def add(
        self, place: int, act: Callable[[Coordinator, Any, bool], None], of: Visit | View,
        mark: Mark | None = None,
    ) -> None:  # fmt: skip
        """One more; ``mark``: None where the graph keeps a view, or lets go of it."""
        self.places.append(place)
        self.acts.append(act)
        self.of.append(of)
        self.forward.append(mark is not None and mark.forward)
        self.engines.append(mark.visit.engine if mark is not None else 0)
        self.again.append(mark is not None and mark.again)


class _Part(NamedTuple):
    """A segment in the model at full depth, and the modules and weights of its marks."""

    segment: Segment
    marked: _Marked
    on: list[Any]


class _Group(NamedTuple):
    """Phases that run once for each batch, as the last batch ran them."""

    before: Counter[int]
    """What was alive when they began."""
    played: Phases
    ends: list[int]
    """What happens when they have ended."""
    after: Counter[int]


class Gathering:
    """The live weights of a step, put between what is on the tape."""

    def __init__(
        self, hooks: Hooks, spec: ShardingSpec, batches: int, unseen: bool = False,
        trained: Gathering | None = None,
    ) -> None:  # fmt: skip
        self._hooks = hooks
        self._tape = hooks.tape
        self._spec = spec
        self._batches = batches
        """Batches in a row that are played, of which the last one is shown."""
        self._unseen = unseen
        """The first engine's model runs forward before each batch without being shown."""
        self._trained = trained
        """The training that an evaluation interrupts."""
        self._traces: dict[int, Sequence[Running]] = {}
        """By engine, in what order modules run in training, which an evaluation follows as far as
        it goes."""
        self._phases: Phases = []
        self._skipped = range(0)
        """Layers that are not played, because they are like those before and behind them."""
        self._weights: dict[object, Weight] = {}
        self._first: list[Weight] = []
        """Those of the first engine."""
        self._made: dict[int, tuple[int, int, int, bool, bool]] = {}
        """What weights are made of, by the parameter that was recorded for all of them."""
        self._running: dict[tuple[int, str, int], Running] = {}
        self._bare: dict[tuple[int, str, str], Running] = {}
        """Modules without weights of their own."""
        self._apart = self._interrupted
        """Whether those of each layer are told apart: some may run backward to the very end."""
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
        alone = not any(visit.model or not visit.adapted for visit in self._hooks.visits)
        self._skipped = _middle(phases, self._reach(phases)) if alone else range(0)
        try:
            return self._play(phases, self._skipped)
        except _UnlikeError:
            return self._in_full()

    @property
    def _interrupted(self) -> bool:
        """No telling what the first engine has recorded: its model runs forward more than once for
        each time that it runs back, or by its inner modules alone."""
        marks = (mark for mark in self._hooks.marks.values() if isinstance(mark, Mark))
        begun = sum(mark.begins and not mark.visit.engine for mark in marks)
        return self._unseen or begun != 1

    def _in_full(self) -> Phases:
        """Every layer is played."""
        self._skipped, self._traces = range(0), {}
        return self._play(self._phases, self._skipped)

    def _follow(self, trained: Gathering) -> None:
        """Modules in the order of training, with those of layers that were not played there."""
        if trained._skipped:
            trained._skipped, trained._traces = range(0), {}
            trained._place(trained._phases, trained._skipped)
        self._traces = trained._traces
        self._weights, self._running = trained._weights, trained._running
        self._first, self._bare, self._apart = trained._first, trained._bare, trained._apart

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
        if not self._traces:
            found: dict[int, list[Running]] = {}
            for part in (part for _, parts in placed for part in parts):
                marked = part.marked
                for act, on, engine in zip(marked.acts, part.on, marked.engines, strict=True):
                    if act is Coordinator.fetch:
                        found.setdefault(engine, []).append(on)
            self._traces.update(found)
        return placed

    def _play(self, phases: Phases, skipped: range) -> Phases:
        placed = self._place(phases, skipped)
        for weight in self._weights.values():
            weight.restart()
        # where there is no telling what has been recorded when, several steps are run
        steps, known = (3, None) if self._interrupted else (1, self._traces[0])
        engines = [Coordinator(self._tape, self._spec, known)]
        engines += [Coordinator(self._tape, self._spec, t) for e, t in self._traces.items() if e]
        groups: list[_Group] = []
        for _ in range(steps):
            engines[0].part_all(self._first)
            engines[0].gather_small(self._first)
            groups = self._step(engines, placed)
        return self._joined(phases, groups, skipped, engines[0])

    def _step(
        self, engines: Sequence[Coordinator], placed: Sequence[tuple[str, Sequence[_Part]]]
    ) -> list[_Group]:
        """The batches of an optimizer step: all of them are scored, then each is trained on."""
        groups: list[_Group] = []
        scored = [phase for phase in placed if phase[0] == "scoring"]
        trained = [phase for phase in placed if phase[0] != "scoring"]
        for group in (scored, trained):
            for number in range(self._batches if group else 0):
                if group is trained and self._unseen:
                    self._run_unseen(engines[0], trained[0][1])
                if number == self._batches - 1:
                    before = _alive(engines)
                engines[0].events = []
                played = self._pass(engines, group)
            if group:
                groups.append(_Group(before, played, engines[0].events, _alive(engines)))
        return groups

    def _run_unseen(
        self, engine: Coordinator, parts: Sequence[_Part], *, adapted: bool = True
    ) -> None:
        """A forward without a graph, of which only what it leaves behind matters."""
        for part in parts:
            marked = part.marked
            for act, on, number, again in zip(
                marked.acts, part.on, marked.engines, marked.again, strict=True
            ):
                forward = act not in (Coordinator.keep, Coordinator.let_go)
                if forward and not number and again != adapted:
                    act(engine, on, True)
        engine.events = []

    def _joined(
        self, phases: Phases, groups: Sequence[_Group], skipped: range, engine: Coordinator
    ) -> Phases:
        """All phases in a row: what other batches did between them is done at once."""
        played = [phase for group in groups for phase in group.played]
        if skipped:
            played = [
                (name, _widened(whole, shorter, skipped))
                for (name, whole), (_, shorter) in zip(phases, played, strict=True)
            ]
        stays = Counter(self._small_of(skipped, engine))
        alive, first = Counter[int](), 0
        for group in groups:
            wanted = group.before + stays
            born, gone = (wanted - alive).elements(), (alive - wanted).elements()
            played[first][1].insert(0, self._write([*born, *(-number for number in gone)]))
            first += len(group.played)
            played[first - 1][1].append(self._write(group.ends))
            alive = group.after + stays
        played[-1][1].append(self._write(-number for number in alive.elements()))
        return played

    def _small_of(self, skipped: range, coordinator: Coordinator) -> list[int]:
        """What stays of the layers that are not played: as much as of one before them."""
        return [
            coordinator.number(w.size) for key, w in self._weights.items()
            if isinstance(key, tuple) and key[0] == skipped.start - 1 and key[2] == 0 and w.stays
        ] * len(skipped)  # fmt: skip

    def _pass(
        self, engines: Sequence[Coordinator], placed: Sequence[tuple[str, Sequence[_Part]]]
    ) -> Phases:
        played: Phases = []
        for name, parts in placed:
            if name == "backward" and self._unseen:  # the reference of what ran unseen before
                self._run_unseen(engines[0], placed[0][1], adapted=False)
            engines[0].in_backward = name == "backward"
            played.append((name, [self._run(engines, part) for part in parts]))
        engines[0].leftovers()
        return played

    def _run(self, engines: Sequence[Coordinator], part: _Part) -> Segment:
        marked = part.marked
        if not marked.places:
            return part.segment
        changes: list[tuple[int, tuple[int, ...]]] = []
        for place, act, on, forward, number in zip(
            marked.places, marked.acts, part.on, marked.forward, marked.engines, strict=True
        ):
            engine = engines[number]
            act(engine, on, forward)
            if engine.events:
                changes.append((place, tuple(engine.events)))
                engine.events = []
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
                    self._weight(of.unit, of.parameter, layer, of.model)
                    if isinstance(of, View) else self._run_of(of, layer)
                )  # fmt: skip
        return _Part(part, marked, [known[of] for of in marked.of])

    def _marks_of(self, part: Segment) -> _Marked:
        found, marks = _Marked(), self._hooks.marks
        act: Callable[[Coordinator, Any, bool], None]
        for place in range(part.start, part.stop):
            event = self._tape.events[place]
            mark = marks.get(abs(event))
            found.before.append(len(found.others))
            if mark is None:
                found.others.append(event)
                continue
            if isinstance(mark, View):
                act = Coordinator.keep if event > 0 else Coordinator.let_go
                found.add(place, act, mark)
            elif event > 0 and mark.begins:
                found.add(place, _begin, mark.visit, mark)
            elif event > 0:
                act = Coordinator.fetch if mark.fetches else Coordinator.release
                alike = self._hooks.running_as(mark.visit)
                for visit, *_ in alike if mark.fetches else reversed(alike):
                    found.add(place, act, visit, mark)
        return found

    def _run_of(self, visit: Visit, layer: int) -> Running:
        """The module of a layer: blocks that are alike were recorded once."""
        unit, owned = visit.unit, [*self._owned.get(visit, ()), *visit.looks_at]
        if not owned:
            place = (layer if self._apart else 0, unit.name, visit.path)
            return self._bare.setdefault(place, Running([]))
        model = visit.model
        key = (layer if _in_layer(unit, layer) else id(owned[0]), visit.path, model)
        running = self._running.get(key)
        if running is None:
            weights = [self._weight(unit, p, layer, model) for p in self._owned.get(visit, ())]
            seen = [self._weight(unit, p, layer, model) for p in visit.looks_at]
            weights += [w for w in seen if not w.stays]
            # what stays of a model that is never stepped was gathered once: it is static
            running = Running([w for w in weights if w.numel and not (visit.engine and w.stays)])
            self._running[key] = running
        return running

    def _weight(self, unit: Unit, parameter: Parameter, layer: int, model: int) -> Weight:
        key: object = id(parameter)
        if _in_layer(unit, layer):
            key = (layer, self._places[id(parameter)], model)
        if key not in self._weights:
            if id(parameter) not in self._made:
                self._made[id(parameter)] = self._measured(parameter)
            self._weights[key] = Weight(*self._made[id(parameter)])
            if model != BESIDE:
                self._first.append(self._weights[key])
        return self._weights[key]

    def _measured(self, parameter: Parameter) -> tuple[int, int, int, bool, bool]:
        """Elements, bytes and what else a weight is made of."""
        numel, item = stored(parameter)
        part = -(-numel // self._spec.shard_ranks) * item
        stays = numel <= self._spec.persistence_elements
        waits = self._spec.offload in ("params", "nvme") and not stays
        whole = part * self._spec.shard_ranks
        return numel, whole, part if waits else 0, stays, not parameter.trainable


def _begin(coordinator: Coordinator, _on: Any, _forward: bool) -> None:
    coordinator.reset()


def _alive(engines: Iterable[Coordinator]) -> Counter[int]:
    """What is alive of all of them."""
    return Counter(number for engine in engines for number in engine.alive.elements())


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
