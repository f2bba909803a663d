"""The recorder: one micro batch on tape, each distinct block once, cut into segments.

The blocks of a stack that are alike leave the same events, so the tape holds a short network: one
block of each kind, in order, between the real embedding and the real head. Its events are cut at
the borders of the blocks; :mod:`replay` then plays the segments as often as the model has layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.env import Environment
from ftplan.memory.families.native import Native
from ftplan.memory.fsdp import Fsdp
from ftplan.memory.nn import Module, Network, Shared
from ftplan.memory.tape import (
    Label,
    Node,
    Played,
    Segment,
    Size,
    Storage,
    Tape,
    Tensor,
    backward,
)  # fmt: skip
from ftplan.memory.units import Unit

__all__ = [
    "BORDER", "BOUNDARY", "HANDED", "PREVIOUS", "Recorder", "Recording", "Segment", "States",
    "run_backward",
]  # fmt: skip

BOUNDARY = Label("activations", "block inputs")
HANDED = Label("activations", "tokens that a layer picked")
BORDER = Label("temporary", "gradient between blocks")
PREVIOUS = Label("logits", "the batch before")


@dataclass(slots=True)
class Recording:
    """The events of a micro batch, and the order in which a model of full depth runs them."""

    tape: Tape
    forward: list[Segment] = field(default_factory=list)
    autocast_exit: list[Segment] = field(default_factory=list)
    """Per forward segment: what dies when autocast ends."""
    cast_order: list[int] = field(default_factory=list)
    """What is done with the model's outputs then, before they reach the caller."""
    cache_exit: list[Segment] = field(default_factory=list)
    """Per forward segment: what dies with the outputs that the caller drops."""
    backward: list[Segment] = field(default_factory=list)
    """Per forward segment: its way back."""
    forward_order: list[int] = field(default_factory=list)
    """Indices into ``forward``, one for each block and each part between blocks."""
    before_order: list[int] = field(default_factory=list)
    """The same for what runs before the step, without a graph (GRPO's log-probabilities)."""
    once: list[int] = field(default_factory=list)
    """The same for what is there before the first micro batch of a pipeline."""
    tail_order: list[int] = field(default_factory=list)
    """The same for what a task does with the model's outputs after autocast has ended."""
    buffers: list[Storage] = field(default_factory=list)
    """What a pipeline holds from its first micro batch to its last."""
    regained: dict[int, Segment] = field(default_factory=dict)
    """Per forward segment: what the caller still holds when its way back has let go of it."""
    batch: list[Tensor] = field(default_factory=list)
    """What the loop holds until the step has ended: the batch, and those fetched with it."""
    outputs: list[Tensor] = field(default_factory=list)
    """The model's outputs, where the caller keeps them until backward has ended."""
    dropped: list[Segment] = field(default_factory=list)
    """Per forward segment: what dies when backward has ended: with the graph, with hooks, or with
    the model's cache, where the caller keeps that."""
    after: Segment = field(default_factory=lambda: Segment("", 0, 0))
    """What else dies then."""
    saved: set[int] = field(default_factory=set)
    """Storages that are alive between forward and backward."""
    carried: list[Segment] = field(default_factory=list)
    """Per forward segment: what of it the loop still holds when the next batch enters."""
    replaced: list[Segment] = field(default_factory=list)
    """The same, where the next batch's outputs take its place."""
    names_loss: bool = False
    """The loop has a name for the loss, and its graph lasts until the next one is there."""
    gathered: Played | None = None
    """Puts what ZeRO-3 gathers into the phases."""

    def phases(self, *, under_way: int = 0) -> list[tuple[str, list[Segment]]]:
        """Forward and backward of the model at full depth, as segments in order.

        ``under_way``: other micro batches of a pipeline whose forward is done before, and whose
        backward comes after.
        """
        order, after = self.forward_order, [*self.cast_order, *self.tail_order]
        everything = [*order, *after] if self.carried else []
        forward = [self.carried[index] for index in everything]
        forward += self._placed(self.forward, order)
        forward += [self.autocast_exit[index] for index in order]
        forward += [self.forward[index] for index in self.cast_order]
        forward += [self.cache_exit[index] for index in order]
        ends = [self.replaced[index] for index in everything]
        tail = self._placed(self.forward, self.tail_order)
        forward += [*tail, *ends] if self.names_loss else [*ends, *tail]
        phases = [("forward", forward)]
        if self.before_order:
            phases.insert(0, ("scoring", self._placed(self.forward, self.before_order)))
        if self.backward:
            backward: list[Segment] = []
            order = order + after
            places = self._placed(self.backward, order)
            for index, place in zip(reversed(order), reversed(places), strict=True):
                backward.append(place)
                if index in self.regained:
                    backward.append(self.regained[index])
            order = list(reversed(order))
            dropped = [self.dropped[index] for index in order]
            phases.append(("backward", [*backward, *dropped, self.after]))
        if under_way:
            phases.insert(0, ("warm-up", forward * under_way))
        if self.once:
            phases.insert(0, ("receive", [self.forward[index] for index in self.once]))
        return phases if self.gathered is None else self.gathered(phases)

    def _placed(self, segments: Sequence[Segment], order: Sequence[int]) -> list[Segment]:
        """The segments in order, blocks with their layers: each pass of the model has them all."""
        blocks = [self.forward[index].name == "block" for index in self.forward_order]
        depth, layer, placed = max(1, sum(blocks)), 0, []
        for index in order:
            segment = segments[index]
            if self.forward[index].name == "block":
                segment = segment._replace(layer=layer % depth)
                layer += 1
            placed.append(segment)
        return placed


@dataclass(slots=True)
class _Region:
    """What was recorded between two borders; its nodes have sequence numbers up to ``last``."""

    name: str
    last: int
    segment: int


class Recorder:
    def __init__(self, network: Network, env: Environment) -> None:
        self.network = network
        self.recording = Recording(Tape(env))
        self.tape = self.recording.tape
        self.order = self.recording.forward_order
        """Which of the recording's orders is being recorded."""
        self.regions: list[_Region] = []
        self.casts: list[dict[int, Tensor]] = []
        self.caches: list[list[Tensor]] = []
        """Per forward segment: what is held beside the graph."""
        self.attributes: list[list[object]] = []
        """The same of what the graph's functions hold as attributes."""
        self.start = 0
        self.fsdp: Fsdp | None = None
        self.units: list[Unit] = []
        self.outer: list[Unit] = []
        """Those that are no blocks: the root first."""
        self.place: int | str | None = None
        """Of the block that is recorded next (:meth:`Fsdp.place`)."""
        self.adapted: Network | None = None
        """The trained network, while it runs with its adapters off."""
        self.blocks = 0
        """Blocks of the stages before: every n-th of all is checkpointed, not of a stage's."""
        self.states: States | None = None
        """Every hidden state, where the caller asked for them."""
        self.critic_states: States | None = None
        self.copies: list[Module] = []
        """Blocks beside the network's own: the real model holds them, and with them their
        gradients, so no garbage collection may take them while the step is recorded."""

    def shard(self, fsdp: Fsdp) -> None:
        """Make the root a unit, and what is wrapped apart; blocks become one as they run."""
        self.fsdp = fsdp
        self.outer = fsdp.outer_units(self.network)
        self.network.sharded(fsdp, self.outer)
        root = self.outer[0]
        if fsdp.spec.wrap == "model":
            for stage in self.network.stages:
                root.times.update(stage.stack.times())
                root.parameters += stage.stack.parameters()
        self.units = list(self.outer)
        for unit in self.outer:
            fsdp.adopt(unit)

    @contextmanager
    def apart(self, network: Network, *, beside: bool, trained: bool = False) -> Iterator[None]:
        """Run another network, sharded like the first.

        ``beside``: it is a model of its own. Else it is the first one with its adapters off, whose
        root may still be gathered. ``trained``: with the first, in one wrapper around both.
        """
        before = (self.network, self.units)
        blocks, self.blocks = self.blocks, 0
        self.network = network
        if self.fsdp is not None:
            order = list(self.fsdp.order)
            fsdp = self.fsdp
            fsdp.beside, fsdp.again, fsdp.second = beside and not trained, not beside, trained
            if beside:
                self.units = fsdp.outer_units(network, held=True)
            else:
                self.adapted = before[0]
                fsdp.share_units(network, before[0], self.outer)
                self.units = list(self.outer)
                fsdp.ran_again = True
            if trained:
                fsdp.adopt(self.units[0])
        yield
        self.network, self.units = before
        self.blocks, self.adapted = blocks, None
        if self.fsdp is not None:
            self.fsdp.order = order
            self.fsdp.beside = self.fsdp.again = self.fsdp.second = False

    def begin_root(self) -> None:
        """Gather what belongs to no block."""
        if self.fsdp is not None:
            self.fsdp.begin_model(self.units[0])

    def end_root(self, loss: Tensor) -> Tensor:
        """The model's forward is over."""
        if self.fsdp is None:
            return loss
        for unit in reversed(self.units):
            if unit.waiting:
                loss = self.fsdp.complete(unit, loss)
        self.fsdp.end_model(self.units[0])
        return self.fsdp.leave(self.units[0], loss)

    def cut(self, name: str) -> int:
        """End a forward segment here."""
        stop = len(self.tape.events)
        self.recording.forward.append(Segment(name, self.start, stop))
        self.start = stop
        index = len(self.recording.forward) - 1
        self.regions.append(_Region(name, self.tape.sequence, index))
        self.casts.append(self.tape.weight_cache)
        self.caches.append(self.tape.cached)
        self.attributes.append(self.tape.attributes)
        self.tape.weight_cache, self.tape.cached, self.tape.attributes = {}, [], []
        return index

    def end_step(self, shared: Shared, trained: Played | None = None) -> None:
        """The caller lets go of what the model returned, and of what every block was handed."""
        own = self.network if isinstance(self.network, Native) else None
        names_loss = self.recording.names_loss
        outlive = names_loss or (own is not None and own.outputs_outlive_step)
        both = zip(self.caches, self.attributes, strict=True)
        self.recording.dropped = [self._drop() if outlive else self._drop(*held) for held in both]
        start = len(self.tape.events)
        if not outlive:
            self.recording.outputs.clear()
        shared.zeros.clear()
        self.recording.after = Segment("outputs dropped", start, len(self.tape.events))
        if names_loss or (own is not None and own.meets_previous):
            self._carry()
        if self.fsdp is not None:
            self.recording.gathered = self.fsdp.played(trained)

    def _carry(self) -> None:
        """What the loop holds of this batch is there when the next one enters."""
        recording, tape = self.recording, self.tape
        self.attributes[-1] += recording.outputs
        copies: list[list[Storage]] = []
        for held in self.attributes:
            start = len(tape.events)
            tensors = [t for t in held if isinstance(t, Tensor)]
            storages = {t.storage.index: t.storage for t in tensors if t.storage is not None}
            copies.append([])
            for index in storages:
                copies[-1].append(tape.allocate(tape.sizes[index - 1], "previous batch"))
                tape.labels[-1] = PREVIOUS
            recording.carried.append(Segment("previous batch", start, len(tape.events)))
        for storages_of in copies:
            start = len(tape.events)
            storages_of.clear()
            recording.replaced.append(Segment("previous batch goes", start, len(tape.events)))

    def end_autocast(self, outputs: list[Tensor] | None = None) -> None:
        """Autocast drops its casts of weights, those of each block when the model is deep.

        Accelerate casts the model's ``outputs`` only then. Unless the caller keeps what the model
        returned, its cache goes too.
        """
        tape = self.tape
        self.recording.autocast_exit = [self._drop(casts) for casts in self.casts]
        self.start = len(tape.events)
        if outputs:
            if tape.env.outputs_to_fp32:
                self._cast(outputs)
            if tape.env.keep_outputs:
                self.recording.outputs += outputs
            outputs.clear()
            self.recording.cast_order.append(self.cut("outputs"))
        keeps = tape.env.keep_outputs or self.states is not None
        caches = self.caches[: len(self.recording.autocast_exit)]
        self.recording.cache_exit = [self._drop([] if keeps else cached) for cached in caches]
        self.start = len(tape.events)

    def drop_casts(self, begun: int) -> None:
        """Autocast ends around another network, whose forward is in the order since ``begun``."""
        ran = self.order[begun:]
        for index in dict.fromkeys(ran):
            if self.casts[index]:
                self.casts[index].clear()
                self.order += [self.cut("casts dropped")] * ran.count(index)

    def _cast(self, outputs: list[Tensor]) -> None:
        """Outputs, and every layer's cache where it is tuples, while the first ones are held."""
        tape = self.tape
        with tape.scoped("logits"):
            cast = [ops.to(output, "fp32") for output in outputs]
            others = [
                tape.tensor(cached.rows, cached.width, "fp32", "returned cache in fp32")
                for index in self.order
                for cached in self.caches[index]
                if self.network.returns_tuples and cached.dtype != "fp32"
            ]
            outputs[:] = cast
            del others, cast

    def _drop(self, *held: dict[int, Tensor] | list[Tensor] | list[object]) -> Segment:
        start = len(self.tape.events)
        for tensors in held:
            tensors.clear()
        return Segment("dropped", start, len(self.tape.events))


class States:
    """All hidden states (``output_hidden_states=True``), which the model's outputs hold.

    Where the graph keeps the input of a block too, it is counted there, and again from the moment
    the block's way back lets go of it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: Tensor | None = None
        self._shape: tuple[Size, int, str] | None = None
        self._segment = 0
        self._kept: dict[int, bool] = {}
        """Per forward segment of a block: whether its input has a tensor of its own here."""
        self._own = 0
        self.count = 0

    def keep(self, segment: int, entering: int, x: Tensor) -> None:
        """A block has run on the storage ``entering``."""
        tape = self._recorder.tape
        self._shape = (x.rows, x.width, x.dtype)
        self._kept[segment] = entering > 0 and -entering in tape.events
        if self._kept[segment] and self._held is None:
            self._held = tape.tensor(*self._shape, "hidden states")
            self._segment = self._recorder.cut("hidden states")
        self.again(segment)

    def again(self, segment: int) -> None:
        """A block like an earlier one has run."""
        self.count += 1
        if self._kept.get(segment):
            self._own += 1
            self._recorder.order.append(self._segment)

    def drop(self) -> None:
        """The outputs go, before anything runs backward."""
        if self._held is not None:
            self._held = None
            segment = self._recorder.cut("hidden states dropped")
            self._recorder.order += [segment] * self._own
        self._own = 0

    def return_them(self) -> None:
        """The outputs reach the caller, in fp32 where mixed precision casts them."""
        recorder, recording = self._recorder, self._recorder.recording
        if self._shape is None:
            return
        tape = recorder.tape
        rows, width, dtype = self._shape
        if tape.env.outputs_to_fp32 and dtype != "fp32":
            cast = tape.tensor(rows, width * (self.count + 1), "fp32", "hidden states")
            recording.batch.append(cast)
            recorder.order.append(recorder.cut("hidden states cast"))
            self.drop()
            return
        recorder.order.append(recorder.cut("outputs"))
        for segment, own in self._kept.items():
            if not own:
                start = len(tape.events)
                recording.batch.append(tape.tensor(rows, width, dtype, "hidden states"))
                recording.regained[segment] = Segment("held", start, len(tape.events))
        recorder.start = len(tape.events)
        if self._held is not None:
            recording.batch.append(self._held)


def run_backward(recorder: Recorder, root: Tensor) -> None:
    tape, recording = recorder.tape, recorder.recording
    regions = recorder.regions
    current = len(regions) - 1
    cuts: dict[int, Segment] = {}
    start = len(tape.events)

    def cut(region: _Region) -> None:
        nonlocal start
        stop = len(tape.events)
        cuts[region.segment] = Segment(region.name, start, stop)
        recorder.caches[region.segment] += tape.cached
        start, tape.cached = stop, []

    def on_node(node: Node) -> None:
        nonlocal current
        while current > 0 and node.sequence <= regions[current - 1].last:
            cut(regions[current])
            current -= 1
            for grad in node.buffers:  # whichever block made it, it has one name
                if grad is not None and grad.storage is not None:
                    tape.labels[grad.storage.index - 1] = BORDER

    backward(root, tape.tensor(root.rows, root.width, root.dtype, "output gradient"), on_node)
    if recorder.fsdp is not None:
        recorder.fsdp.finish(recorder.units)
    cut(regions[current])
    empty = Segment("", 0, 0)
    recording.backward = [cuts.get(i, empty) for i in range(len(recording.forward))]
