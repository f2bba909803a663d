"""ZeRO-3's live weights: which are fetched when, and when they go, as DeepSpeed decides it.

Before a module runs, forward or backward, its weights are fetched, and the next ones in the order
of the first iteration are fetched ahead, ``stage3_prefetch_bucket_size`` elements with each module,
while there are fewer than ``stage3_max_live_parameters``. After it has run its weights go, unless
they are wanted again within ``stage3_max_reuse_distance`` elements. Several weights that are
fetched together come as one flat buffer, from which each is copied out when the first of them is
needed; the buffer stays until the last one has been
(deepspeed/runtime/zero/partitioned_param_coordinator.py and partition_parameters.py, 0.19.8:
``fetch_sub_module``, ``release_sub_module``, ``reset_step``, ``all_gather_coalesced``,
``AllGatherCoalescedHandle.wait``).

An iteration begins with each forward of the model, with a graph or without. Where one goes another
way than the one that was recorded, the record is thrown away (``trace_prologue``): until the second
forward after that nothing is fetched ahead, and weights go as soon as their module has run, small
ones too. A trainer that asks the same engine for log-probabilities first, or with the adapters
off, may never have a record that lasts until backward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ONE, Label, Tape

__all__ = ["REUSE_ELEMENTS", "Coordinator", "Running", "Weight"]

LIVE = Label("gathered", "live weights")
FLAT = Label("gathered", "flat weights")
REUSE_ELEMENTS = 1_000_000_000
"""``stage3_max_reuse_distance``."""


class Weight:
    """One weight of the model at full depth."""

    # plain classes, because a deep model has thousands of them

    __slots__ = (
        "active", "copy", "fetched", "flight", "frozen", "here", "numel", "part", "size", "stays",
        "uses", "views",
    )  # fmt: skip

    def __init__(self, numel: int, size: int, part: int, stays: bool, frozen: bool) -> None:
        self.numel = numel
        self.size = size
        """Bytes when it is gathered."""
        self.part = part
        """Bytes that are copied from the host to be gathered."""
        self.stays = stays
        """So small that it is never released (``stage3_param_persistence_threshold``)."""
        self.frozen = frozen
        self.here = False
        self.flight: Flight | None = None
        """What it comes with, until it has been asked for."""
        self.active: set[Running] = set()
        self.fetched = -1
        """The last step for which it has been taken off the queue."""
        self.uses: list[int] = []
        """Steps at which it is fetched."""
        self.copy = 0
        """How often the graph has kept what was gathered before."""
        self.views: list[int] = []
        """The copies of which the graph keeps views, the latest last."""

    def restart(self) -> None:
        """Nothing has been gathered yet."""
        self.here, self.flight, self.copy, self.fetched = False, None, 0, -1
        for held in (self.active, self.uses, self.views):
            held.clear()


class Flight:
    """Weights that are gathered together, and the buffer where there are several."""

    __slots__ = ("flat", "left", "waited", "weights")

    def __init__(self, weights: list[Weight], flat: int) -> None:
        self.weights = weights
        self.flat = flat
        """Bytes."""
        self.waited = False
        self.left = len(weights)
        """How many have not been asked for."""


class Running:
    """A module of the model at full depth."""

    __slots__ = ("again", "weights")

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        self.again: list[Weight] = []
        """Frozen weights that a checkpoint fetched for it."""


class Coordinator:
    """``PartitionedParameterCoordinator``.

    ``trace``: the order in which modules run, as an earlier iteration recorded it; None: nothing
    has run yet. ``events`` fills with births and deaths. What has one size has one number: which of
    two such storages dies makes no difference.
    """

    def __init__(
        self, tape: Tape, spec: ShardingSpec, trace: Sequence[Running] | None = None
    ) -> None:
        self._tape = tape
        self._spec = spec
        self._numbers: dict[tuple[int, str], int] = {}
        self.events: list[int] = []
        self.alive: Counter[int] = Counter()
        self._order: list[Running] = []
        self._queue: list[tuple[Weight, int]] = []
        self._passed: list[int] = []
        self._complete, self._recording = trace is not None, False
        self._flying: dict[Weight, Flight] = {}
        self._backward: dict[Running, None] = {}
        """Modules that run backward."""
        self._goes: dict[tuple[Running, int], list[Weight]] = {}
        self._next = self._step = self._live = 0
        self.in_backward = False
        if trace is not None:
            self._learn(trace)

    def _learn(self, trace: Sequence[Running]) -> None:
        """``construct_parameter_trace_from_module_trace``."""
        self._order = list(trace)
        self._queue = [(w, step) for step, running in enumerate(trace) for w in running.weights]
        self._passed = list(accumulate((sum(w.numel for w in r.weights) for r in trace), initial=0))
        for weight, _ in self._queue:
            weight.uses.clear()
        for weight, step in self._queue:
            weight.uses.append(step)
        self._complete, self._recording = True, False

    def number(self, size: int, label: Label = LIVE) -> int:
        """What stands for storages of a size."""
        key = (size, label.name)
        if key not in self._numbers:
            self._tape.sizes.append(ONE * size)
            self._tape.labels.append(label)
            self._numbers[key] = len(self._tape.sizes)
        return self._numbers[key]

    def _born(self, size: int, label: Label = LIVE) -> None:
        number = self.number(size, label)
        self.alive[number] += 1
        self.events.append(number)

    def _dies(self, size: int, label: Label = LIVE) -> None:
        number = self.number(size, label)
        self.alive[number] -= 1
        self.events.append(-number)

    def gather_small(self, weights: Iterable[Weight]) -> None:
        """``_post_step``: all that stays is gathered."""
        for weight in weights:
            if weight.stays and not weight.here:
                weight.here = True
                self._born(weight.size)

    def part_all(self, weights: Iterable[Weight]) -> None:
        """``_partition_all_parameters``: before an optimizer step nothing is gathered."""
        self._land()
        for weight in weights:
            weight.active.clear()
            self._release(weight)

    def reset(self) -> None:
        """``reset_step``: a forward begins. What is still there is no longer counted."""
        self._land()
        if self._recording:
            self._learn(self._order)
        elif not self._complete:
            self._recording, self._order = True, []
        for weight, _ in self._queue:
            weight.fetched = -1
        self._next = self._step = self._live = 0
        self.in_backward = False

    def _land(self) -> None:
        """``_clean_inflight_param_registry``."""
        for weight in list(self._flying):
            self._wait(weight)
            self._release(weight)

    def _follow(self, running: Running) -> None:
        """``trace_prologue``, ``record_module``: whether this one is expected now."""
        step = self._step
        if self._complete and (step >= len(self._order) or self._order[step] is not running):
            self._complete = False
            for weight, _ in self._queue:
                weight.fetched = -1
            self._queue = []
            self._land()
        if self._recording:
            self._order.append(running)

    def leftovers(self) -> None:
        """``release_backward_leftovers``: modules whose input asked for no gradient."""
        for running in reversed(list(self._backward)):
            self._end(running, [w for w in running.weights + running.again if not w.stays])
        self._backward.clear()

    def fetch(self, running: Running, forward: bool) -> None:
        """``fetch_sub_module``."""
        self._follow(running)
        if not forward:
            self._backward[running] = None
        if running.weights:
            self._fetch(running, forward)
        if self._complete and self._next < len(self._queue):
            self._ahead()
        self._step += 1

    def _fetch(self, running: Running, forward: bool) -> None:
        self._gather([w for w in running.weights if not w.here and w.flight is None])
        again = forward and self.in_backward and bool(self._backward)
        for weight in running.weights:
            weight.active.add(running)
            if again and weight.frozen:
                owner = next(reversed(self._backward))
                owner.again.append(weight)
                weight.active.add(owner)
            if weight.flight is not None:
                self._wait(weight)
        if self._complete:
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
        """``__params_to_release``, which remembers what it said; without a record everything."""
        if not self._complete:
            return running.weights
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
        flight = Flight(weights, size if several else 0)
        self._born(size, FLAT if several else LIVE)
        copied = sum(w.part for w in weights)
        if copied:
            self._born(copied, FLAT)
            self._dies(copied, FLAT)
        for weight in weights:
            weight.flight = self._flying[weight] = flight

    def _wait(self, weight: Weight) -> None:
        """Copy all that came together out of the buffer, which goes with the last one asked for."""
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
            weight, step = self._queue[self._next]
            weight.fetched = step
            found.add(weight)
            self._next += 1

    def _ahead(self) -> None:
        """Fetch what comes next."""
        most = min(self._spec.max_live_elements - self._live, self._spec.prefetch_elements)
        if most <= 0:
            return
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
