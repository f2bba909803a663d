"""ZeRO-3's live weights: which of them are gathered when, as DeepSpeed's coordinator decides it.

DeepSpeed hooks every module. Before one runs, forward or backward, its weights are fetched, and the
next ones in the order of the first iteration are fetched ahead, ``stage3_prefetch_bucket_size``
elements with each module, while there are fewer than ``stage3_max_live_parameters``. After it has
run its weights go, unless they are wanted again within ``stage3_max_reuse_distance`` elements.
Several weights that are fetched together come as one flat buffer, from which each is copied out
when the first of them is needed; the buffer stays until the last one has been
(deepspeed/runtime/zero/partitioned_param_coordinator.py, parameter_offload.py and
partition_parameters.py, 0.19.8: ``fetch_sub_module``, ``release_sub_module``, ``reset_step``,
``all_gather_coalesced``, ``AllGatherCoalescedHandle.wait``).

Hooks leave marks on the tape (:class:`Hooks`). What lies between two marks is played as before;
at each mark :class:`Coordinator` says what comes alive and what is freed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ftplan.dtypes import find_format
from ftplan.memory import ops
from ftplan.memory.experts import Routing
from ftplan.memory.fsdp import BUFFERS, Unit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Module
from ftplan.memory.tape import (
    ITEM_BYTES, NOTHING, ONE, Label, Parameter, Phases, Segment, Storage, Tape, Tensor,
)  # fmt: skip

__all__ = ["Gathering", "Hooks", "stored"]

LIVE = Label("gathered", "live weights")
FLAT = Label("gathered", "flat weights")
REUSE_ELEMENTS = 1_000_000_000
"""``stage3_max_reuse_distance``."""


def stored(parameter: Parameter) -> tuple[int, int]:
    """Elements of a weight as it is stored, and bytes of each: packed values are bytes."""
    if parameter.dtype.startswith(BUFFERS):
        return 0, 0
    if parameter.dtype in ITEM_BYTES:
        return parameter.numel, ITEM_BYTES[parameter.dtype]
    return find_format(parameter.dtype).storages(parameter.shape)[0], 1


@dataclass(slots=True, eq=False)
class Visit:
    """A module that runs."""

    unit: Unit
    path: str
    """In the unit."""
    parameters: list[Parameter]
    around: Visit | None = None
    """A module that has no forward code here, and runs while those in it do."""
    looks_at: Sequence[Parameter] = ()
    """Weights of modules inside that DeepSpeed finds away, and from then on fetches with this one
    (``register_external_parameter``)."""
    called: bool = False
    first: dict[bool, Visit] = field(default_factory=dict)
    """Of a module without forward code: which of those in it runs first, each way."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment at which a module starts (its weights are fetched) or has ended."""

    visit: Visit
    fetches: bool
    forward: bool


@dataclass(frozen=True, slots=True)
class View:
    """The graph keeps a view of a weight, from the birth of a storage to its death."""

    unit: Unit
    parameter: Parameter


class Hooks:
    """Hooks on the modules of every unit, which leave marks on the tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        tape.viewed, tape.module_hook = self._viewed, self._runs
        self._nameless = Visit(Unit("nameless", []), "", [])
        self.marks: dict[int, Mark | View] = {}
        """By the storage without bytes that stands for the mark."""
        self._unit_of: dict[int, Unit] = {}
        self.visits: list[Visit] = []
        self._before: list[tuple[Module, Callable[..., Any] | None]] = []

    def watch(self, unit: Unit) -> Visit:
        """Hook every module of the unit but the unit itself, which is returned."""
        assert unit.module is not None
        self._unit_of.update((id(parameter), unit) for parameter in unit.parameters)
        whole = Visit(unit, "", list(unit.module.parameters.values()))
        around: dict[str, Visit | None] = {"": None}
        for path, module in unit.module.named_modules():
            if not path:
                continue
            outer = around[path.rpartition(".")[0]]
            visit = Visit(unit, path, list(module.parameters.values()), outer)
            visit.looks_at = module.looks_at()
            if hasattr(module, "forward"):
                around[path] = None
                self._hook(module, visit)
            else:
                around[path] = outer if _is_list(module) else visit
                if around[path] is outer:
                    continue
            self.visits.append(visit)
        self.visits.append(whole)
        return whole

    def unhook(self) -> None:
        """The step has been recorded: modules run by themselves again."""
        for module, own in reversed(self._before):
            _restore(module, own)
        self.tape.viewed = self.tape.module_hook = None

    def _hook(self, module: Module, visit: Visit) -> None:
        own = vars(module).get("forward")
        if hasattr(own, "hooked"):  # a copy of a block that has hooks
            own = own.hooked
            _restore(module, own)
        self._before.append((module, own))
        forward = module.forward

        def hooked(*args: Any, **kwargs: Any) -> Any:
            return self._run(visit, forward, args, kwargs)

        hooked.hooked = own  # type: ignore[attr-defined]
        module.forward = hooked

    def _run(
        self, visit: Visit, forward: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        left = [0]
        self.mark(visit, fetches=True, forward=True)
        out = forward(*(self._enter(value, visit, left) for value in args), **kwargs)
        self.mark(visit, fetches=False, forward=True)
        return self._leave(out, visit)

    def _runs(self, x: Tensor | None, forward: Callable[[Any], Any]) -> Any:
        return self._run(self._nameless, forward, (x,), {})

    def mark(self, visit: Visit, *, fetches: bool, forward: bool) -> None:
        """A storage without bytes that comes and goes: what moves events moves it too."""
        visit.called = True
        outer = visit.around
        if outer is not None and fetches and outer.first.setdefault(forward, visit) is visit:
            self.mark(outer, fetches=True, forward=forward)
        storage = self.tape.allocate(NOTHING, "mark")
        self.marks[storage.index] = Mark(visit, fetches, forward)

    def _viewed(self, parameter: Parameter) -> Storage:
        storage = self.tape.allocate(NOTHING, "view")
        if id(parameter) in self._unit_of:
            self.marks[storage.index] = View(self._unit_of[id(parameter)], parameter)
        return storage

    def _enter(self, x: Any, visit: Visit, left: list[int]) -> Any:
        """``PostBackwardFunctionModule``: the module has ended with its last input's gradient."""
        if isinstance(x, Routing):
            return Routing(x.logits, self._enter(x.weights, visit, left), x.index)
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        left[0] += 1

        def ended() -> None:
            left[0] -= 1
            if not left[0]:
                self.mark(visit, fetches=False, forward=False)

        return _seen(x, "post_backward", ended)

    def _leave(self, out: Any, visit: Visit) -> Any:
        """``PreBackwardFunctionForModule``: it starts with the gradient of an output."""
        if isinstance(out, (list, tuple)):
            return type(out)(self._leave(item, visit) for item in out)
        if isinstance(out, Routing):
            parts = (self._leave(part, visit) for part in (out.logits, out.weights, out.index))
            return Routing(*parts)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return out
        return _seen(
            out, "pre_backward", lambda: self.mark(visit, fetches=True, forward=False)
        )


def _is_list(module: Module) -> bool:
    """``ModuleList`` or ``ModuleDict``, which nobody calls."""
    return all(name.isdigit() or name == "default" for name in module.children)


def _restore(module: Module, own: Callable[..., Any] | None) -> None:
    vars(module).pop("forward", None)
    if own is not None:
        module.forward = own


def _seen(x: Tensor, name: str, note: Callable[[], None]) -> Tensor:
    """The same tensor, whose gradient is noted when it comes by."""
    seen = x.alias()
    seen.part = x.part

    def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
        note()
        return (grad,)

    ops.record([seen], name, [x], apply)
    return seen


@dataclass(slots=True, eq=False)
class Weight:
    """One weight of the model at full depth."""

    numel: int
    size: int
    """Bytes when it is gathered."""
    part: int
    """Bytes that are copied from the host to be gathered."""
    stays: bool
    """So small that it is never released (``stage3_param_persistence_threshold``)."""
    frozen: bool
    here: bool = False
    flight: Flight | None = None
    """What it comes with, until it has been asked for."""
    active: set[Running] = field(default_factory=set)
    fetched: int = -1
    """The last step for which it has been taken off the queue."""
    uses: list[int] = field(default_factory=list)
    """Steps at which it is fetched."""
    copy: int = 0
    """How often the graph has kept what was gathered before."""
    views: list[int] = field(default_factory=list)
    """The copies of which the graph keeps views, the latest last."""

    def restart(self) -> None:
        """``_partition_all_parameters``: before a step nothing is gathered."""
        self.here, self.flight, self.copy = False, None, 0
        for held in (self.active, self.uses, self.views):
            held.clear()


@dataclass(slots=True, eq=False)
class Flight:
    """Weights that are gathered together, and the buffer where there are several."""

    weights: list[Weight]
    flat: int
    """Bytes."""
    waited: bool = False
    left: int = 0
    """How many have not been asked for."""


@dataclass(slots=True, eq=False)
class Running:
    """A module of the model at full depth."""

    weights: list[Weight]
    again: list[Weight] = field(default_factory=list)
    """Frozen weights that a checkpoint fetched for it."""


class Coordinator:
    """``PartitionedParameterCoordinator`` with a complete trace.

    ``events`` fills with births and deaths. What has one size has one number: which of two such
    storages dies makes no difference.
    """

    def __init__(self, tape: Tape, spec: ShardingSpec, trace: Sequence[Running]) -> None:
        self._tape = tape
        self._spec = spec
        self._numbers: dict[tuple[int, Label], int] = {}
        self.events: list[int] = []
        self.alive: Counter[int] = Counter()
        self._queue = [(w, step) for step, running in enumerate(trace) for w in running.weights]
        self._passed = list(
            accumulate((sum(w.numel for w in r.weights) for r in trace), initial=0)
        )
        self._weights = list(dict.fromkeys(w for w, _ in self._queue))
        for weight in self._weights:
            weight.restart()
        for weight, step in self._queue:
            weight.uses.append(step)
        self._flying: dict[Weight, Flight] = {}
        self._backward: dict[Running, None] = {}
        """Modules that run backward."""
        self._goes: dict[tuple[Running, int], list[Weight]] = {}
        self._next = self._step = self._live = 0
        self.in_backward = False

    def _number(self, size: int, label: Label) -> int:
        key = (size, label)
        if key not in self._numbers:
            self._tape.sizes.append(ONE * size)
            self._tape.labels.append(label)
            self._numbers[key] = len(self._tape.sizes)
        return self._numbers[key]

    def _born(self, size: int, label: Label = LIVE) -> None:
        number = self._number(size, label)
        self.alive[number] += 1
        self.events.append(number)

    def _dies(self, size: int, label: Label = LIVE) -> None:
        number = self._number(size, label)
        self.alive[number] -= 1
        self.events.append(-number)

    def gather_small(self) -> None:
        """``_post_step``: all that stays is gathered."""
        for weight in self._weights:
            if weight.stays:
                weight.here = True
                self._born(weight.size)

    def reset(self) -> None:
        """``reset_step``: a forward begins. What is still there is no longer counted."""
        for weight in list(self._flying):
            self._wait(weight)
            self._release(weight)
        for weight in self._weights:
            weight.fetched = -1
        self._next = self._step = self._live = 0
        self.in_backward = False

    def leftovers(self) -> None:
        """``release_backward_leftovers``: modules whose input asked for no gradient."""
        for running in reversed(list(self._backward)):
            self._end(running, [w for w in running.weights + running.again if not w.stays])
        self._backward.clear()

    def fetch(self, running: Running, forward: bool) -> None:
        """``fetch_sub_module``."""
        if not forward:
            self._backward[running] = None
        if running.weights:
            self._fetch(running, forward)
        if self._next < len(self._queue):
            self._ahead()
        self._step += 1

    def _fetch(self, running: Running, forward: bool) -> None:
        self._gather([w for w in running.weights if not w.here and w.flight is None])
        for weight in running.weights:
            weight.active.add(running)
            if forward and self.in_backward and self._backward and weight.frozen:
                owner = next(reversed(self._backward))
                owner.again.append(weight)
                weight.active.add(owner)
            if weight.flight is not None:
                self._wait(weight)
        self._skip({w for w in running.weights if w.fetched < self._step})

    def release(self, running: Running, forward: bool) -> None:
        """``release_sub_module``."""
        if not running.weights and not running.again:
            if not forward:
                self._backward.pop(running, None)
            return
        gone = self._released(running)
        if not forward:
            gone = [*gone, *(w for w in running.again if not w.stays)]
            self._backward.pop(running, None)
        self._end(running, gone)

    def _end(self, running: Running, gone: list[Weight]) -> None:
        for weight in (*running.weights, *running.again):
            weight.active.discard(running)
        running.again = []
        for weight in gone:
            self._release(weight)

    def _released(self, running: Running) -> list[Weight]:
        """``__params_to_release``, which remembers what it said."""
        key = (running, self._step)
        if key not in self._goes:
            self._goes[key] = [
                w for w in running.weights
                if not w.stays and w.fetched <= self._step and not self._reused(w)
            ]  # fmt: skip
        return self._goes[key]

    def _reused(self, weight: Weight) -> bool:
        place = bisect_left(weight.uses, self._step)
        if place == len(weight.uses):
            return False
        between = self._passed[weight.uses[place]] - self._passed[self._step]
        return between < REUSE_ELEMENTS

    def _release(self, weight: Weight) -> None:
        if not weight.here or weight.active:
            return
        weight.here = False
        self._live -= weight.numel
        if weight.copy in weight.views:
            weight.copy += 1  # the next time it comes it is another one
        else:
            self._dies(weight.size)

    def keep(self, weight: Weight, _forward: bool) -> None:
        """The graph keeps a view of a weight that is there."""
        weight.views.append(weight.copy)

    def let_go(self, weight: Weight, _forward: bool) -> None:
        """The graph has used its latest view of a weight."""
        copy = weight.views.pop()
        if copy not in weight.views and copy != weight.copy:
            self._dies(weight.size)

    def _gather(self, weights: list[Weight]) -> None:
        if not weights:
            return
        self._live += sum(w.numel for w in weights)
        size, several = sum(w.size for w in weights), len(weights) > 1
        flight = Flight(weights, size if several else 0, left=len(weights))
        self._born(size, FLAT if several else LIVE)
        copied = sum(w.part for w in weights)
        if copied:
            self._born(copied, FLAT)
            self._dies(copied, FLAT)
        for weight in weights:
            weight.flight = self._flying[weight] = flight

    def _wait(self, weight: Weight) -> None:
        """Copy all that came together out of the buffer, which goes with the last one waited for."""
        flight = self._flying.pop(weight)
        weight.flight = None
        if not flight.waited:
            flight.waited = True
            for each in flight.weights:
                each.here = True
                if flight.flat:
                    self._born(each.size)
        flight.left -= 1
        if not flight.left and flight.flat:
            self._dies(flight.flat, FLAT)

    def _skip(self, wanted: set[Weight]) -> None:
        """Take off the queue what has just been fetched."""
        found: set[Weight] = set()
        while self._next < len(self._queue) and len(found) < len(wanted):
            weight, weight.fetched = self._queue[self._next]
            found.add(weight)
            self._next += 1

    def _ahead(self) -> None:
        """Fetch what comes next."""
        most = min(self._spec.max_live_elements - self._live, self._spec.prefetch_elements)
        chosen: dict[Weight, None] = {}
        elements = 0
        while self._next < len(self._queue) and elements < most:
            weight, step = self._queue[self._next]
            self._next += 1
            weight.fetched = max(weight.fetched, step)
            if not weight.here and weight.flight is None and weight not in chosen:
                chosen[weight] = None
                elements += weight.numel
        self._gather(list(chosen))


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
        self._trace = trained._trace if trained else []
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
